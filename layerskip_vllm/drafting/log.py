"""The one log line that says that drafting is on; written by both drafters in the worker."""

from __future__ import annotations

from vllm.logger import init_logger

from layerskip_vllm.config.speculative import LayerSkipConfig
from layerskip_vllm.drafting.bytes_read import share_of_bytes
from layerskip_vllm.drafting.cpu_dtypes import is_emulated
from layerskip_vllm.drafting.exit_model import ExitModel
from layerskip_vllm.drafting.stages import layers_of

logger = init_logger("vllm.layerskip")


def log_drafting(model: ExitModel, config: LayerSkipConfig, runner: str, graphs: str) -> None:
    """Log what drafts, with how much of the model, on which runner, with which CUDA graphs."""
    adapter = model.exit_adapter
    shares = share_of_bytes(model.target, config.exit_layer, adapter, model.draft_head)
    head = "head" if model.draft_head is None else f"head of {config.draft_vocab_size:,} tokens"
    parts = [f"layers {shares.layers:.1%}", f"{head} {shares.head:.1%}"]
    if adapter is not None:
        parts.append(f"exit adapter of rank {adapter.config.rank} {shares.adapter:.1%}")
    dtype = config.target_model_config.dtype
    if is_emulated(dtype, next(model.target.parameters()).device.type):
        logger.warning_once(
            "%s is emulated on this CPU: drafts may cost more than they gain; float32 is faster",
            str(dtype).removeprefix("torch."),
        )
    longest = config.num_speculative_tokens
    source = "" if config.lookup == "off" else ", copied where the text repeats"
    logger.info_once(
        "layerskip is on: layers [0, %d) of %d draft %s tokens a step%s; a draft step reads "
        "%.1f %% of the model's bytes (%s); Model Runner %s; CUDA graphs: %s",
        config.exit_layer,
        len(layers_of(model.inner)),
        f"up to {longest}" if config.is_length_auto else longest,
        source,
        100 * shares.total,
        ", ".join(parts).replace("%", " %"),
        runner,
        graphs,
    )
