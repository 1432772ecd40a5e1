"""Makes a random Llama checkpoint that a layer-skip drafter can draft for, in a minute or so.

It has a trained model's costs and, for drafts of K tokens, a wished acceptance, and says nothing
sensible. `benchmarks.decoding.speedup` runs this file in a process of its own, before any engine
starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decoding.synthetic_calibration import calibrate
from benchmarks.decoding.synthetic_model import build_synthetic_model, lean_head, make_config
from benchmarks.decoding.synthetic_spec import PRESETS, SyntheticSpec

if TYPE_CHECKING:
    import torch

DEFAULT_FOLDER = Path("benchmark-output/checkpoints")
REPORT_NAME = "synthetic.json"


@dataclass(frozen=True)
class SyntheticCheckpoint:
    """A made checkpoint and what it does under greedy decoding in Transformers.

    One without weights does nothing there: all but its folders is None.

    Attributes:
        folder: Where the checkpoint lies.
        draft_folder: The first E layers as a checkpoint of their own, with links to the same files.
        late_scale: What the residual contributions of the layers from E on were multiplied by.
        acceptance: Accepted drafts by drafted tokens.
        distinct_ngrams: Share of different 4-grams among those of a text; 1 if none comes twice.
        near_ties: Share of tokens whose two largest logits are within 0.02 standard deviations,
            so that bfloat16 may well choose the other one.
    """

    folder: Path
    draft_folder: Path
    late_scale: float | None = None
    acceptance: float | None = None
    distinct_ngrams: float | None = None
    near_ties: float | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config


def make_checkpoint(spec: SyntheticSpec, root: Path = DEFAULT_FOLDER) -> SyntheticCheckpoint:
    """Make the checkpoint, or find the one that was made before.

    The layers are plain random ones. The LM head leans towards one random order of all tokens: its
    row of a token's successor holds some of the token's embedding, so that the first layers name
    the successor clearly and later layers sometimes overrule them. A head without it gives logits
    so close to one another that rounding decides every tenth token, in no trained model's way; and
    as the order is one cycle over the vocabulary, greedy texts do not run into loops.

    Args:
        spec: What to make; it fixes every weight.
        root: Where checkpoints are kept.

    Returns:
        The checkpoint and its measured acceptance.
    """
    folder = root / spec.name()
    if not (folder / REPORT_NAME).exists():
        import torch

        with torch.inference_mode():
            model = build_synthetic_model(spec)
            lean_head(model, spec)
            report = calibrate(model, spec)
            unfinished = folder.with_suffix(f".unfinished-{os.getpid()}")
            _save(model, spec, report["late_scale"], unfinished)
        (unfinished / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return read_checkpoint(folder)


def make_shape(spec: SyntheticSpec, root: Path = DEFAULT_FOLDER) -> SyntheticCheckpoint:
    """Write the configs alone, for engines that draw their weights themselves."""
    checkpoint = SyntheticCheckpoint(root / f"{spec.name()}-shape", root / f"{spec.name()}-draft")
    make_config(spec).save_pretrained(checkpoint.folder)
    make_config(spec, num_layers=spec.exit_layer).save_pretrained(checkpoint.draft_folder)
    return checkpoint


def read_checkpoint(folder: Path) -> SyntheticCheckpoint:
    """Return the finished checkpoint in a folder."""
    report = json.loads((folder / REPORT_NAME).read_text())
    draft_folder = folder / f"exit-{report.pop('exit_layer')}"
    return SyntheticCheckpoint(folder=folder, draft_folder=draft_folder, **report)


def _save(model: Any, spec: SyntheticSpec, late_scale: float, folder: Path) -> None:
    """Write the checkpoint, a file a layer, and the draft model as links to the first of them."""
    from safetensors.torch import save_file

    draft_folder = folder / f"exit-{spec.exit_layer}"
    draft_folder.mkdir(parents=True)
    make_config(spec).save_pretrained(folder)
    make_config(spec, num_layers=spec.exit_layer).save_pretrained(draft_folder)
    late_layers = range(spec.exit_layer, spec.num_layers)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        index = int(name.split(".")[2]) if ".layers." in name else None
        if index in late_layers and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight = weight * late_scale
        file_name = "ends" if index is None else f"layer-{index:03d}"
        files.setdefault(f"model-{file_name}.safetensors", {})[name] = weight.cpu().contiguous()
    for file_name, weights in files.items():
        save_file(weights, folder / file_name, metadata={"format": "pt"})
    _write_index(files, folder)
    late_files = {f"model-layer-{index:03d}.safetensors" for index in late_layers}
    kept = {name: weights for name, weights in files.items() if name not in late_files}
    _write_index(kept, draft_folder)
    for file_name in kept:
        (draft_folder / file_name).symlink_to(Path("..") / file_name)


def _write_index(files: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """Tells loaders which file holds which weight."""
    num_bytes = sum(weight.nbytes for weights in files.values() for weight in weights.values())
    places = {name: file_name for file_name, weights in files.items() for name in weights}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Make a preset's checkpoint and print what it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu-0.6b")
    parser.add_argument("--exit-layer", type=int, help="E (default: a quarter of the layers)")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, help="K")
    parser.add_argument("--acceptance", type=float, default=0.72, help="to reach, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = vars(parser.parse_args())
    spec, folder = PRESETS[options.pop("preset")], options.pop("folder")
    if options["exit_layer"] is None:
        options["exit_layer"] = spec.exit_layer
    checkpoint = make_checkpoint(dataclasses.replace(spec, **options), folder)
    print(json.dumps(dataclasses.asdict(checkpoint), indent=2, default=str))


if __name__ == "__main__":
    main()
