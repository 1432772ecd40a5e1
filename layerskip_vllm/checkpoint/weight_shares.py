"""What a draft step reads of a model's weights, and which weight lies in which layer.

Read here from a checkpoint's headers or its config, without loading a weight, for
`layerskip-vllm doctor` and `watch`; of a loaded model by `drafting/bytes_read.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.")


@dataclass(frozen=True)
class WeightShares:
    """What a draft step reads, as parts of what the target's step reads: all layers and the head.

    Of an embedding a step reads single rows, and of the norms next to nothing, so neither counts;
    an embedding that is the head counts as the head. All experts of a mixture count.
    """

    layers: float  # the first E
    head: float  # its rows that drafts choose among
    adapter: float = 0.0  # an exit adapter's weights, in the same unit; no part of the target

    @classmethod
    def from_sizes(
        cls, layers: Sequence[int], head: int, exit_layer: int, adapter: int = 0
    ) -> WeightShares:
        """Make shares of the sizes of each layer, the head and an adapter, all in one unit."""
        whole = sum(layers) + head
        return cls(sum(layers[:exit_layer]) / whole, head / whole, adapter / whole)

    def with_draft_vocab(self, share: float) -> WeightShares:
        """Return the shares where drafts choose among so much of the vocabulary, 0 to 1."""
        return replace(self, head=self.head * share)

    @property
    def total(self) -> float:
        """All that a draft step reads."""
        return self.layers + self.head + self.adapter


def layer_of_weight(name: str) -> int | None:
    """Return the number of the layer that a checkpoint's weight lies in, None for no layer."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def find_folder(model: str) -> Path | None:
    """Find a checkpoint's folder on this machine; None if it is not (wholly) here."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; not a name
        return None


def read_shares(folder: Path | None, num_layers: int, exit_layer: int) -> WeightShares | None:
    """Add up the sizes in the headers of a folder's safetensors files.

    Layers beyond `num_layers` (draft heads) do not count. None if the folder does not hold all
    layers and a head under names known here; `ValueError` if a file is no safetensors file.
    """
    layers, head, embedding = [0] * num_layers, 0, 0
    for file in _weight_files(folder):
        for name, num_bytes in _read_header(file).items():
            layer = layer_of_weight(name)
            if layer is not None:
                if layer < num_layers:
                    layers[layer] += num_bytes
            elif _HEAD.search(name):
                head += num_bytes
            elif _EMBEDDING.search(name):
                embedding += num_bytes
    head = head or embedding
    if not all(layers) or not head:
        return None
    return WeightShares.from_sizes(layers, head, exit_layer)


def _weight_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names) if (folder / name).exists()]


def _read_header(file: Path) -> dict[str, int]:
    """Read the sizes in bytes by tensor name.

    Source: https://github.com/huggingface/safetensors#format
    """
    with file.open("rb") as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        if num_bytes > file.stat().st_size:
            raise ValueError(
                f"{file} is no safetensors file; if it is a pointer of Git LFS, fetch the weights "
                "with git lfs pull."
            )
        header = json.loads(stream.read(num_bytes))
    return {
        name: tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def estimate_shares(model_config: ModelConfig, exit_layer: int) -> WeightShares | None:
    """Estimate the shares from the config: equal layers of attention and a gated MLP.

    None if the config does not name the MLP's size as most do.
    """
    hidden_size, head_size = model_config.get_hidden_size(), model_config.get_head_size()
    text_config = model_config.hf_text_config
    num_experts = model_config.get_num_experts()
    intermediate_size = getattr(text_config, "intermediate_size", None)
    if num_experts:
        intermediate_size = getattr(text_config, "moe_intermediate_size", intermediate_size)
    if not isinstance(intermediate_size, int):
        return None
    num_heads = text_config.num_attention_heads + model_config.get_total_num_kv_heads()
    attention = 2 * hidden_size * head_size * num_heads
    layer = attention + 3 * hidden_size * intermediate_size * max(1, num_experts)
    head = hidden_size * model_config.get_vocab_size()
    layers = [layer] * model_config.get_total_num_hidden_layers()
    return WeightShares.from_sizes(layers, head, exit_layer)
