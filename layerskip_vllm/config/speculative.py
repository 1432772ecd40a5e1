"""`LayerSkipConfig`, made of what the user says and what the model's folder says.

Built in the API server (or by `LLM`) from `EngineArgs`, then pickled to every other process.
"""

from __future__ import annotations

import copy
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger

from layerskip_vllm.checkpoint.draft_vocab import read_draft_vocab
from layerskip_vllm.checkpoint.entry import DraftSettings, Setting, default_settings
from layerskip_vllm.checkpoint.exit_adapter import read_exit_adapter_config
from layerskip_vllm.config.engine_refusals import (
    check_adaptive_verification,
    check_auto_length,
    check_engine,
    check_lookup_memory,
    check_reuse,
)
from layerskip_vllm.config.flags import METHOD, is_auto, read_settings
from layerskip_vllm.config.model_refusals import (
    check_draft,
    check_draft_vocab,
    check_exit_adapter,
    check_model,
)
from layerskip_vllm.config.setting_refusals import check_schedule, check_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.layerskip")

# The most tokens that a step drafts where K is "auto" and neither user nor checkpoint says more.
LONGEST_AUTO_DRAFT = 8


@config
class LayerSkipConfig(SpeculativeConfig):
    """Speculative decoding whose draft model is the target's first layers.

    To the rest of vLLM it is a `draft_model` configuration whose draft model is the target itself,
    so that scheduling, lookahead slots, metrics and the rejection sampler are vLLM's own.
    """

    registered_method: ClassVar[str] = METHOD
    """What a registry of speculative methods knows it by (`patches/vllm-*.diff`)."""

    exit_layer: int = 0
    """E, the number of layers that draft: layers [0, E)."""

    exit_layer_source: str = field(default="", compare=False)
    """Where E comes from, in words: "the user", "the exit adapter", ..."""

    num_speculative_tokens_source: str = field(default="", compare=False)
    """Where K comes from, in words."""

    is_length_auto: bool = False
    """Whether K is only the most that a step drafts, and each drafts as many tokens as pay."""

    exit_adapter: str | None = None
    """The folder of the adapter between the exit and the head, None for the plain exit."""

    draft_vocab: str | None = None
    """The file of the tokens that drafts choose among, None for all."""

    draft_vocab_size: int = 0
    """How many tokens drafts choose among."""

    reuse_exit_states: Literal["auto", "on", "off"] = "off"
    """Whether verification begins at the exit, with the states that drafting has left there."""

    lookup: str = "off"
    """Whether drafts are copied where a request's text repeats itself: "off" or "auto"."""

    def __post_init__(self) -> None:
        """Take the place of vLLM's search for a draft checkpoint: there is none."""
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        # A copy, so that vLLM never takes the target's configuration for a draft's.
        self.draft_model_config = copy.copy(self.target_model_config)
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size

    @property
    @override
    def max_num_new_slots_for_drafting(self) -> int:
        """Draft steps take one token a request, so a batch needs no more room than the target's."""
        return 0

    @override
    def use_ngram(self) -> bool:
        """Have Model Runner V2 keep all tokens of all requests on the device."""
        return self.lookup != "off"

    @override
    def compute_hash(self) -> str:
        """Hash what shapes the compiled graphs: the target's factors and where drafting exits.

        An exit adapter and the head come after the compiled stage, whose graph is the same with
        any of them.
        """
        return f"{super().compute_hash()}-exit{self.exit_layer}"

    def __repr__(self) -> str:
        names = ["exit_layer", "num_speculative_tokens"]
        names += [name for name in ("exit_adapter", "draft_vocab") if getattr(self, name)]
        names += ["reuse_exit_states"] if self.reuse_exit_states != "off" else []
        names += ["lookup"] * (self.lookup != "off")
        shown = {name: repr(getattr(self, name)) for name in names}
        shown["num_speculative_tokens"] = self.describe_length()
        values = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"LayerSkipConfig({values})"

    def describe_length(self) -> str:
        """Return K in words: a number, or what it is at most."""
        length = str(self.num_speculative_tokens)
        return f"auto, up to {length}" if self.is_length_auto else length


def get_layerskip_config(vllm_config: VllmConfig) -> LayerSkipConfig:
    """Return the speculative config of an engine that drafts with layerskip."""
    speculative_config = vllm_config.speculative_config
    assert isinstance(speculative_config, LayerSkipConfig)
    return speculative_config


def create_layerskip_config(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> LayerSkipConfig:
    """Build the configuration from everything that the user says, or refuse it.

    `ValueError` if a setting is unknown, of the wrong type or out of range, or if the model or
    another engine setting cannot work with layerskip. The message names the field, its value and
    what would be right.
    """
    settings = read_settings(args)
    check_settings(settings, has_lora=bool(args.enable_lora))
    check_adaptive_verification(settings, args)
    check_model(model_config)
    check_engine(args, parallel_config)
    check_reuse(settings, args, model_config, parallel_config)
    check_lookup_memory(settings, args, model_config)
    draft = default_settings(
        model_config.model, model_config.hf_config, model_config.get_total_num_hidden_layers()
    )
    if "exit_adapter" in settings:
        folder = Path(settings["exit_adapter"]).expanduser().resolve()
        draft = _adapter_settings(folder, settings.get("exit_layer"), model_config)
        settings["exit_adapter"] = str(folder)
    draft_vocab_size = model_config.get_vocab_size()
    if "draft_vocab" in settings:
        file = Path(settings["draft_vocab"]).expanduser().resolve()
        draft_vocab = read_draft_vocab(file)
        check_draft_vocab(file, draft_vocab, model_config)
        settings["draft_vocab"] = str(file)
        draft_vocab_size = len(draft_vocab.token_ids)
    is_length_auto = is_auto(settings.get("num_speculative_tokens"))
    if is_length_auto:
        check_auto_length(settings, parallel_config, model_config)
        settings["num_speculative_tokens"] = _longest_draft(
            settings["num_speculative_tokens"], draft, model_config
        )
    given = {key: settings.pop(key) for key in vars(draft) if key in settings}
    draft = replace(draft, **{key: Setting(value, "the user") for key, value in given.items()})
    check_draft(draft, model_config)
    check_schedule(settings, draft.num_speculative_tokens.value)
    speculative_config = LayerSkipConfig(
        target_model_config=model_config,
        target_parallel_config=parallel_config,
        exit_layer=draft.exit_layer.value,
        exit_layer_source=draft.exit_layer.source,
        num_speculative_tokens=draft.num_speculative_tokens.value,
        num_speculative_tokens_source=draft.num_speculative_tokens.source,
        is_length_auto=is_length_auto,
        draft_vocab_size=draft_vocab_size,
        **settings,
    )
    logger.info(
        "layerskip: exit_layer=%d (from %s), num_speculative_tokens=%s (from %s)",
        speculative_config.exit_layer,
        speculative_config.exit_layer_source,
        speculative_config.describe_length(),
        speculative_config.num_speculative_tokens_source,
    )
    return speculative_config


def _longest_draft(length: str, draft: DraftSettings, model_config: ModelConfig) -> int:
    """Return the most tokens that a step drafts where K is "auto"."""
    _, _, most = length.partition(":")
    if most:
        return int(most)
    longest = max(LONGEST_AUTO_DRAFT, draft.num_speculative_tokens.value)
    return min(longest, max(1, model_config.max_model_len - 1))


def _adapter_settings(
    folder: Path, exit_layer: int | None, model_config: ModelConfig
) -> DraftSettings:
    """Read E and K from an exit adapter that fits the model, and the user's E if there is one."""
    adapter = read_exit_adapter_config(folder)
    check_exit_adapter(folder, adapter, exit_layer, model_config)
    source = "the exit adapter"
    return DraftSettings(
        Setting(adapter.exit_layer, source), Setting(adapter.num_speculative_tokens, source)
    )
