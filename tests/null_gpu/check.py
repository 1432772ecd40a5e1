"""Takes layerskip through vLLM's GPU path on a stand-in GPU whose kernels do nothing.

Called by `run.sh`. Each case is a process of its own that starts an engine, generates and checks
how the drafts were run; the tokens themselves mean nothing here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

NUM_SPECULATIVE_TOKENS = 3
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
OWN_K = "requests that draft less"
COPIED = "copied drafts"
REUSED = "reused exit states"
REUSED_REBUILT = f"{REUSED}, metadata built between replays"
ADAPTIVE = "adaptive verification"
DRAFT_VOCAB: dict[str, Any] = {"draft_vocab": "a file that is made for the case"}
SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}  # vLLM ends a step in which the host waits
FULL, NO_GRAPH = "full", "none"

# name: (engine arguments, speculative settings, environment, which CUDA graphs the drafts must use)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str], str]] = {
    "eager": ({"enforce_eager": True}, {}, {}, NO_GRAPH),
    "compiled, a graph of a step": ({}, {}, {}, FULL),
    "Triton attention": ({"attention_backend": "TRITON_ATTN"}, {}, {}, FULL),
    # It cannot change its metadata on the device.
    "metadata built between replays": ({"attention_backend": "FLEX_ATTENTION"}, {}, {}, FULL),
    "drafts eager, target with graphs": ({}, {"enforce_eager": True}, {}, NO_GRAPH),
    "probabilistic drafts": ({}, {"draft_sample_method": "probabilistic"}, {}, FULL),
    "K by batch size": (
        {},
        {"num_speculative_tokens_per_batch_size": [[1, 1, 3], [2, 3, 1], [4, 4, 0]]},
        {},
        FULL,
    ),
    OWN_K: ({}, {}, {}, FULL),
    ADAPTIVE: ({}, {"enable_adaptive_verification": True}, SYNC_CHECK, FULL),
    "draft vocabulary": ({}, DRAFT_VOCAB, SYNC_CHECK, FULL),
    "draft vocabulary, probabilistic drafts": (
        {},
        {**DRAFT_VOCAB, "draft_sample_method": "probabilistic"},
        SYNC_CHECK,
        FULL,
    ),
    "draft vocabulary, adaptive verification": (
        {},
        {**DRAFT_VOCAB, "enable_adaptive_verification": True},
        SYNC_CHECK,
        FULL,
    ),
    "no host sync": ({}, {}, SYNC_CHECK, FULL),
    COPIED: ({}, {"lookup": "auto"}, SYNC_CHECK, FULL),
    REUSED: ({}, {"reuse_exit_states": "on"}, SYNC_CHECK, FULL),
    REUSED_REBUILT: (
        {"attention_backend": "FLEX_ATTENTION"},
        {"reuse_exit_states": "on"},
        {},
        FULL,
    ),
    "no async scheduling": ({"async_scheduling": False}, {}, {}, FULL),
    # vLLM asserts that several ranges of compiled sizes come of a graph with a size in it.
    "one request, compiled in ranges": (
        {"max_num_seqs": 1, "compilation_config": {"compile_ranges_endpoints": [64]}},
        {},
        {},
        FULL,
    ),
    "KV offloading": ({"kv_offloading_size": 0.05}, {}, {}, FULL),
    "LoRA": (LORA, {}, SYNC_CHECK, FULL),
    "LoRA, metadata built between replays": (
        {**LORA, "attention_backend": "FLEX_ATTENTION"},
        {},
        {},
        FULL,
    ),
    "runner V1": ({}, {}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "piecewise"),
    "LoRA, runner V1": (LORA, {}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, NO_GRAPH),
}


def run_case(name: str, model: str) -> None:
    """Start an engine as the case says, generate, and check which graphs the drafts used."""
    engine_args, speculative, environment, graphs = CASES[name]
    os.environ.update(environment)
    import null_tokens

    null_tokens.apply()
    _allow_copies_of_the_stand_in()
    if "draft_vocab" in speculative:
        speculative = {**speculative, "draft_vocab": _make_draft_vocab()}
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=256,
        gpu_memory_utilization=0.5,
        disable_log_stats=False,
        speculative_config={
            "method": "layerskip",
            "exit_layer": 2,
            "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
            **speculative,
        },
        **{"max_num_seqs": 4, **engine_args},
    )
    prompts = [{"prompt_token_ids": list(range(2, 2 + length))} for length in (3, 20, 40)]
    sampling = SamplingParams(
        max_tokens=8,
        ignore_eos=True,
        temperature=1.0 if speculative.get("draft_sample_method") else 0.0,
    )
    adapters = _make_adapters(Path(model)) if "enable_lora" in engine_args else None
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8, 8]
    drafts = {m.name: m.value for m in llm.get_metrics() if m.name.endswith("num_drafts")}
    assert drafts["vllm:spec_decode_num_drafts"] > 0, "nothing was drafted"
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    if name == OWN_K:
        _check_own_k(llm, runner)
    if name == COPIED:
        _check_copies(llm, runner)
    if name in (REUSED, REUSED_REBUILT):
        _check_reuse(llm, runner)
    print("result:", json.dumps(_describe(runner, graphs)))


def _check_copies(llm: Any, runner: Any) -> None:
    """See no draft step but after the prompts, where copies are expected in all rows."""
    from vllm import SamplingParams

    speculator = runner.speculator
    lookup, graphs = speculator.lookup, speculator.graphs
    copy_drafts, run_fullgraph = lookup.copy_drafts, graphs.run_fullgraph
    has_draft_steps: list[bool] = []
    replays: list[Any] = []

    def see_copies(*args: Any) -> None:
        has_draft_steps.append(args[-1])
        copy_drafts(*args)

    def see_replay(desc: Any) -> Any:
        replays.append(desc)
        return run_fullgraph(desc)

    # No text is computed here, so none repeats itself.
    lookup.expects_copies = lambda batch: not batch.has_prefill
    lookup.copy_drafts, graphs.run_fullgraph = see_copies, see_replay
    prompts = [{"prompt_token_ids": [2 + index, 3, 4]} for index in range(3)]
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    llm.generate(prompts, sampling, use_tqdm=False)
    assert has_draft_steps.count(False) > 0, f"draft steps in all {len(has_draft_steps)} steps"
    num_expected = NUM_SPECULATIVE_TOKENS * has_draft_steps.count(True)
    assert len(replays) == num_expected > 0, f"{len(replays)} draft steps, not {num_expected}"


def _check_reuse(llm: Any, runner: Any) -> None:
    """See each step after that of the prompts begin at the exit, in two full graphs."""
    from vllm import SamplingParams

    speculator = runner.speculator
    replays: list[str] = []
    for name in ("last_token_graphs", "remaining_graphs"):
        manager = getattr(speculator, name)

        def run(desc: Any, run: Any = manager.run_fullgraph, name: str = name) -> Any:
            replays.append(name)
            return run(desc)

        manager.run_fullgraph = run
    before = speculator.verifier.num_steps
    prompts = [{"prompt_token_ids": [2 + index, 3, 4]} for index in range(3)]
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    llm.generate(prompts, sampling, use_tqdm=False)
    num_steps = speculator.verifier.num_steps - before
    assert num_steps >= 7, f"{num_steps} steps began at the exit"
    assert replays == ["last_token_graphs", "remaining_graphs"] * num_steps, replays


def _check_own_k(llm: Any, runner: Any) -> None:
    """See the target in full graphs after the prompts, and no draft step that nobody asks for."""
    from vllm import SamplingParams

    modes: list[str] = []
    replays: list[str] = []
    for manager, seen in ((runner.cudagraph_manager, modes), (runner.speculator.graphs, replays)):

        def run(desc: Any, run: Any = manager.run_fullgraph, seen: list[str] = seen) -> Any:
            seen.append(desc.cg_mode.name)
            return run(desc)

        manager.run_fullgraph = run
    for limits in ((0, 0, 0), (0, 1, NUM_SPECULATIVE_TOKENS)):
        modes.clear()
        replays.clear()
        sampling = [
            SamplingParams(
                max_tokens=8,
                ignore_eos=True,
                temperature=0.0,
                extra_args={"layerskip": {"num_speculative_tokens": limit}},
            )
            for limit in limits
        ]
        prompts = [{"prompt_token_ids": [2 + index, 3, 4]} for index in range(len(limits))]
        llm.generate(prompts, sampling, use_tqdm=False)
        # Each step after that of the prompts takes one token a request at least.
        assert len(modes) >= 7, f"{limits}: the target ran {len(modes)} steps in full graphs"
        assert bool(replays) == any(limits), f"{limits}: {len(replays)} draft steps"


def _make_draft_vocab() -> str:
    """Write a draft vocabulary; the logits that it is tried with mean nothing here."""
    from layerskip_vllm.drafting.draft_head import DraftHead
    from tests.support.draft_vocabs import make_draft_vocab

    DraftHead._check = lambda *_: None  # type: ignore[method-assign]
    return make_draft_vocab(Path(tempfile.mkdtemp()) / "ids.json", range(0, 256, 8))


def _allow_copies_of_the_stand_in() -> None:
    """What says that each request got one token copies it to the device."""
    from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    init = AsyncOutput.__init__

    def allowed(self: AsyncOutput, *args: Any, **kwargs: Any) -> None:
        with gpu_sync_allowed():
            init(self, *args, **kwargs)

    AsyncOutput.__init__ = allowed


def _make_adapters(model: Path) -> list[Any]:
    """An adapter for the first prompt, another for the second, none for the third."""
    from vllm.lora.request import LoRARequest

    from tests.support.lora_adapters import make_lora_adapter

    folders = [Path(tempfile.mkdtemp()) / "adapter" for _ in range(2)]
    for seed, folder in enumerate(folders):
        make_lora_adapter(folder, model, seed)
    return [*(LoRARequest(str(i), 1 + i, str(f)) for i, f in enumerate(folders)), None]


def _describe(runner: Any, graphs: str) -> dict[str, Any]:
    if hasattr(runner, "drafter"):
        mode = runner.drafter.cudagraph_dispatcher.cudagraph_mode.name.lower()
        assert type(runner.drafter).__name__ == "LayerSkipProposer"
        assert mode == graphs, f"drafts ran with CUDA graphs {mode!r}, not {graphs!r}"
        return {"runner": "V1", "graphs": mode}
    speculator = runner.speculator
    assert type(speculator).__name__ == "LayerSkipSpeculator"
    assert (runner.adaptive_verification is not None) == (
        speculator.speculative_config.enable_adaptive_verification
    )
    found = FULL if speculator.graphs.graphs else NO_GRAPH
    assert graphs == found, f"drafts ran with CUDA graphs {found!r}, not {graphs!r}"
    return {
        "runner": "V2",
        "graphs": found,
        "sizes": sorted(
            (desc.num_tokens, desc.num_active_loras) for desc in speculator.graphs.graphs
        ),
        "backends": sorted({g.backend.get_name() for g in speculator._all_attn_groups()}),
    }


def run_server(model: str) -> None:
    """Start `vllm serve` with the CLI flags and have it answer one request."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = ["--speculative-model=layerskip", "--num-speculative-tokens=3", "--spec-exit-layer=2"]
    sizes = ["--max-model-len=256", "--max-num-seqs=4", "--gpu-memory-utilization=0.5"]
    # Every process of the server must say that each request got one token.
    boot = "import null_tokens; null_tokens.apply()"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import wrapt\n"
            "wrapt.when_imported('vllm.v1.worker.gpu.async_utils')"
            f"(lambda module: exec({boot!r}))\n"
        )
        environment = os.environ | {
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        server = subprocess.Popen(
            ["vllm", "serve", model, "--host=127.0.0.1", f"--port={port}", *flags, *sizes],
            env=environment,
            start_new_session=True,
        )
        try:
            _wait_and_complete(server, f"http://127.0.0.1:{port}", model)
        finally:
            os.killpg(server.pid, 15)
            server.wait(60)


def _wait_and_complete(server: subprocess.Popen[bytes], url: str, model: str) -> None:
    for _ in range(600):
        assert server.poll() is None, "vllm serve ended before it was ready"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            break
        except OSError:
            time.sleep(1)
    body = {"model": model, "prompt": [2, 3, 4], "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=120))
    assert answer["usage"]["completion_tokens"] == 8, answer
    metrics = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    counter = next(
        line
        for line in metrics.splitlines()
        if line.startswith("vllm:spec_decode_num_drafts_total")
    )
    assert float(counter.rsplit(" ", 1)[1]) > 0, counter
    print("result:", json.dumps({"server": "answered", "drafts": counter.rsplit(" ", 1)[1]}))


def main() -> int:
    """Run every case in a process of its own; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="run this case alone, in this process")
    parser.add_argument("--model", help="a checkpoint; a tiny random one is made if not given")
    parser.add_argument("--only", nargs="*", help="names of the cases to run")
    args = parser.parse_args()
    if args.case:
        run_server(args.model) if args.case == "serve" else run_case(args.case, args.model)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or _make_model(Path(folder) / "model")
        failed = []
        for name in args.only or [*CASES, "serve"]:
            start = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, "--case", name, "--model", model],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=1200,
            )
            result = [line for line in done.stdout.splitlines() if line.startswith("result:")]
            is_passed = done.returncode == 0 and bool(result)
            detail = result[-1] if is_passed else done.stdout[-3000:]
            print(f"{'ok  ' if is_passed else 'FAIL'} {name} ({time.monotonic() - start:.0f} s)")
            print(f"     {detail}", flush=True)
            if not is_passed:
                failed.append(name)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


def _make_model(path: Path) -> str:
    from tests.support.checkpoints import make_checkpoint

    return str(make_checkpoint(path))


if __name__ == "__main__":
    sys.exit(main())
