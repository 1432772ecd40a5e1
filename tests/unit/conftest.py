"""vLLM's own way from arguments to a configuration, in this process, without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.model_configs import write_config


@pytest.fixture(scope="session")
def write_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., str]]:
    """Write the config of an architecture; vLLM looks at model classes in this process then."""
    from vllm.model_executor.models import registry

    root = tmp_path_factory.mktemp("configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(root / "cache"))
        # vLLM asks a process of its own about each architecture, 10 s each; the answer is the same.
        patch.setattr(registry, "_run_in_subprocess", lambda ask: ask())
        yield lambda name="llama", **entries: str(write_config(root, name, **entries))


@pytest.fixture(scope="session")
def configure(write_model: Callable[..., str]) -> Callable[..., Any]:
    """Make a `VllmConfig` as `LLM(...)` does: `configure(architecture, entries, **engine_args)`."""
    from vllm.engine.arg_utils import EngineArgs

    def configure(
        name: str = "llama", entries: dict[str, Any] | None = None, **engine_args: Any
    ) -> Any:
        model = write_model(name, **(entries or {}))
        arguments = {"model": model, "skip_tokenizer_init": True, "load_format": "dummy"}
        return EngineArgs(**{**arguments, **engine_args}).create_engine_config()

    return configure


@pytest.fixture(scope="session")
def speculate(write_model: Callable[..., str]) -> Callable[..., Any]:
    """Make the speculative config of a Llama target, as `EngineArgs` does from its arguments."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    model = write_model("llama")
    parallel_config = ParallelConfig()
    model_config = EngineArgs(model=model, skip_tokenizer_init=True).create_model_config()

    def speculate(**engine_args: Any) -> Any:
        args = EngineArgs(model=model, skip_tokenizer_init=True, **engine_args)
        return args.create_speculative_config(model_config, parallel_config)

    return speculate
