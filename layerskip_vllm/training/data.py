"""Training data as rows of token ids.

Text is packed: documents, each with an end-of-text token, follow one another in rows of one length.
Prompts with completions can have a row each.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Self

import datasets
import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.training.data_sources import DataSource, Rows, load_texts
from layerskip_vllm.training.early_exit_loss import IGNORED_LABEL

Columns = dict[str, list[list[int]]]
PACKED_DOCUMENTS = 1000  # documents that are packed together; their last row is filled up
SHUFFLE_BUFFER = 10_000  # rows of a stream that are shuffled together


class DataConfig(Settings):
    """What a run trains on."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """The data sets to train on."""
    seq_len: int = Field(ge=2)
    """Tokens of a row, of which the first is given; longer prompts with completions are cut."""
    evaluation: tuple[DataSource, ...] = ()
    """The data sets to evaluate on."""
    packing: bool = True
    """Whether documents share rows of `seq_len` tokens, or have a row each."""
    streaming: bool = False
    """Whether data is read while training, for what is too large to be read before."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that read data before training; with streaming they are
    `training.dataloader_num_workers`."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for name in ("train", "evaluation"):
            weights = [source.weight for source in getattr(self, name)]
            if len(weights) > 1 and None in weights and (self.streaming or any(weights)):
                raise ValueError(
                    f"{name} has the weights {weights}; give one to each, or to none without "
                    "streaming."
                )
        return self


def load_rows(
    sources: Sequence[DataSource],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Rows:
    """Load rows of `input_ids` and `labels`, at most `seq_len` long; packed ones exactly.

    `seed` says what is taken from which source when, and a stream's order; the Trainer shuffles
    what is no stream. `ValueError` if the tokenizer has no end-of-text token, or files or columns
    are missing.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which must end each text.")
    rows = [_make_rows(source, config, tokenizer) for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    if len(rows) == 1:
        joined = rows[0]
    elif weights:
        joined = datasets.interleave_datasets(
            rows,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    else:
        joined = datasets.concatenate_datasets(rows)
    return joined.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) if config.streaming else joined


def _make_rows(source: DataSource, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Rows of one data set, in its order."""
    texts = load_texts(source, config.streaming)
    columns = texts.column_names
    if columns is None:  # a stream may have to be looked into
        columns = list(next(iter(texts)))
    encode = _make_encoder(source, columns, tokenizer)
    # A stream is mapped as it is read, by the processes that load it; one process is this one.
    is_parallel = config.num_processes > 1 and not config.streaming
    workers = {"num_proc": config.num_processes} if is_parallel else {}

    def make_rows(batch: dict[str, list[Any]]) -> Columns:
        documents = encode(batch)
        if config.packing:
            return _pack(documents, config.seq_len, tokenizer.eos_token_id)
        return _cut(documents, config.seq_len)

    return texts.map(
        make_rows, batched=True, batch_size=PACKED_DOCUMENTS, remove_columns=columns, **workers
    )


def _make_encoder(
    source: DataSource, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Callable[[dict[str, list[Any]]], Columns]:
    """Return what encodes a batch of texts to documents, each with an end-of-text token."""
    eos_token_id = tokenizer.eos_token_id

    def encode(texts: list[str], **options: Any) -> list[list[int]]:
        return tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []

    def end(token_ids: list[int]) -> list[int]:
        return token_ids if token_ids[-1:] == [eos_token_id] else [*token_ids, eos_token_id]

    def encode_texts(batch: dict[str, list[Any]]) -> Columns:
        token_ids = [end(ids) for ids in encode([text for text in batch[source.text] if text])]
        return {"input_ids": token_ids, "labels": token_ids}

    def encode_pairs(batch: dict[str, list[Any]]) -> Columns:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        prompts = encode([str(source.prompt).format(**row) for row in rows])
        completions = encode(
            [str(source.completion).format(**row) for row in rows], add_special_tokens=False
        )
        result: Columns = {"input_ids": [], "labels": []}
        for prompt, completion in zip(prompts, map(end, completions), strict=True):
            # Some tokenizers end every text, a prompt too.
            prompt = prompt[:-1] if prompt[-1:] == [eos_token_id] else prompt
            result["input_ids"].append(prompt + completion)
            result["labels"].append([IGNORED_LABEL] * len(prompt) + completion)
        return result

    if source.prompt is None:
        if source.text not in columns:
            raise ValueError(
                f"text is {source.text!r}; it must be one of {source.path}'s columns, "
                f"{', '.join(columns)}."
            )
        return encode_texts
    for name in ("prompt", "completion"):
        _check_template(name, getattr(source, name), columns)
    return encode_pairs


def _check_template(name: str, template: str, columns: Sequence[str]) -> None:
    """Check that a template names columns alone; "{answers[text]}" names a part of one."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name} is {template!r}; its braces do not match: {error}.") from error
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in columns:
            raise ValueError(
                f"{name} is {template!r}; it must name columns in braces, of "
                f"{', '.join(columns)}, and {field!r} is none."
            )


def _pack(documents: Columns, seq_len: int, filler_id: int) -> Columns:
    """Put documents one after another into rows of `seq_len` tokens.

    The last row is filled up with tokens that nothing is learned from, so that no text is lost.
    """
    rows: Columns = {}
    for name, filler in (("input_ids", filler_id), ("labels", IGNORED_LABEL)):
        tokens = [token for document in documents[name] for token in document]
        tokens += [filler] * (-len(tokens) % seq_len)
        rows[name] = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
    return rows


def _cut(documents: Columns, seq_len: int) -> Columns:
    """Cut each document to `seq_len` tokens; those that nothing is left to learn of go."""
    pairs = zip(documents["input_ids"], documents["labels"], strict=True)
    kept = [
        (token_ids[:seq_len], labels[:seq_len])
        for token_ids, labels in pairs
        if any(label != IGNORED_LABEL for label in labels[1:seq_len])
    ]
    return {"input_ids": [row[0] for row in kept], "labels": [row[1] for row in kept]}


def collate(rows: Sequence[Mapping[str, Any]], filler_id: int) -> dict[str, torch.Tensor]:
    """Make a batch of rows, filled up on the right to the length of the longest.

    It has `input_ids`, `labels` and, where rows were filled up, `attention_mask`; each
    `[batch_size, seq_len] int64`.
    """
    seq_len = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (seq_len - len(row[name]))] for row in rows])

    batch = {"input_ids": fill("input_ids", filler_id), "labels": fill("labels", IGNORED_LABEL)}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if lengths.min() < seq_len:
        batch["attention_mask"] = (torch.arange(seq_len) < lengths[:, None]).long()
    return batch
