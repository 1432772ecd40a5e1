"""Where training data comes from: Hugging Face data sets and local files, as columns of text.

`data` turns what is loaded here into rows of token ids.
"""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import datasets
from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
# How `datasets` reads a file, by its suffix.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    # Quotes in tab-separated files, TOPv2's too, are characters like others.
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3}),
}
_WHOLE_TEXT: tuple[str, dict[str, Any]] = ("text", {"sample_by": "document"})
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


class DataSource(Settings):
    """One data set."""

    path: str
    """A local file or a pattern such as `corpus/**/*.py`, or a data set's name on the hub. Files
    are read by their suffix: .jsonl, .json, .csv, .tsv and .parquet have columns, any other file is
    one text. Compressed ones are read too."""
    config_name: str | None = None
    """The hub data set's configuration."""
    data_dir: str | None = None
    """The folder in the hub data set."""
    split: str = "train"
    """The split."""
    text: str = "text"
    """The column that has the text."""
    prompt: str | None = None
    """Instead of `text`, a template with columns' names in braces; nothing is learned from what it
    makes."""
    completion: str | None = None
    """The template of what follows the prompt, and is learned."""
    weight: float | None = Field(default=None, gt=0)
    """The share of this source in the rows, relative to the others'. Without it sources follow one
    another whole."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError(
                f"prompt is {self.prompt!r} and completion is {self.completion!r}; give both, or "
                "neither for plain text."
            )
        return self


def load_texts(source: DataSource, streaming: bool) -> Rows:
    """Load a data set's columns; `ValueError` if its files are missing, unlike or unreadable."""
    try:
        return _load(source, streaming)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(
            f"path is {source.path!r}, which cannot be read: {error.__cause__ or error}"
        ) from error


def _load(source: DataSource, streaming: bool) -> Rows:
    files = sorted(path for path in glob.glob(source.path, recursive=True) if Path(path).is_file())
    if files:
        reader, options = _find_reader(source.path, files)
        # The split is the user's name for these files, maybe with a slice: train[:1000].
        data_files = {source.split.partition("[")[0]: files}
        return datasets.load_dataset(
            reader, data_files=data_files, split=source.split, streaming=streaming, **options
        )
    looks_local = source.path.startswith((".", "/", "~")) or any(c in source.path for c in "*?[")
    has_suffix = Path(source.path).suffix in (*_READERS, *_COMPRESSIONS, ".txt")
    if (looks_local or has_suffix) and not Path(source.path).is_dir():
        raise ValueError(f"path is {source.path!r}, and there is no such file.")
    return datasets.load_dataset(
        source.path,
        source.config_name,
        data_dir=source.data_dir,
        split=source.split,
        streaming=streaming,
    )


def _find_reader(path: str, files: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return `datasets`' reader for some files, and its options."""
    found = []
    for file in files:
        suffixes = [suffix for suffix in Path(file).suffixes if suffix not in _COMPRESSIONS]
        reader = _READERS.get(suffixes[-1] if suffixes else "", _WHOLE_TEXT)
        if reader not in found:
            found.append(reader)
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"path is {path!r}, whose files are of several kinds ({names}); give a source to each."
        )
    return found[0]
