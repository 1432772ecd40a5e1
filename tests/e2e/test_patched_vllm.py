"""A vLLM with `patches/vllm-*.diff` runs layerskip through its registry, not through hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm

from layerskip_vllm.hooks.install import check
from layerskip_vllm.hooks.uses import USES
from layerskip_vllm.hooks.vllm_fixes import FIXES
from layerskip_vllm.hooks.vllm_source import SUPPORTED_VLLM_VERSIONS, find_file, read_digests
from scripts.compare_vllm import read_version
from scripts.vllm_python import overlay_python
from tests.support.engine_process import RUNNERS
from tests.support.scripts import see

PATCHES = Path(__file__).parents[2] / "patches"

# Runs in a process that imports the patched vLLM: plain tokens, drafted tokens, what was drafted.
SCRIPT = """
import json, sys
import vllm
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from layerskip_vllm.hooks.install import hook_state
from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS
from layerskip_vllm.hooks.vllm_fixes import FIXES
from layerskip_vllm.hooks.vllm_source import read_digests
from layerskip_vllm.plugin import register

model = sys.argv[1]
sizes = dict(dtype="float32", max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=1 << 24)
prompts = [{"prompt_token_ids": list(range(2, 2 + n))} for n in (3, 20)]
def greedy(**kwargs):
    return SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, **kwargs)

def ask(num_drafts):
    return greedy(extra_args={"layerskip": {"num_speculative_tokens": num_drafts}})

def count_drafts(llm):
    values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return values["vllm:spec_decode_num_drafts"], values["vllm:spec_decode_num_draft_tokens"]

def run(params, **kwargs):
    llm = LLM(model, enforce_eager=True, disable_log_stats=False, **sizes, **kwargs)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    metrics = {m.name: m.value for m in llm.get_metrics() if m.name.endswith("num_accepted_tokens")}
    return llm, tokens, sum(metrics.values())

register()
register()
digests = read_digests(vllm.__version__)  # None for a fix that this version does not need
from layerskip_vllm.drafting.speculator import LayerSkipSpeculator
calls = dict.fromkeys(("prepare_sampling", "prepare_target_graphs"), 0)
def count(name, call):
    def counted(*args):
        calls[name] += 1
        return call(*args)
    return counted
for name in calls:
    setattr(LayerSkipSpeculator, name, count(name, getattr(LayerSkipSpeculator, name)))
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
flags = ["--model", model, "--spec-method", "layerskip", "--spec-exit-layer", "3"]
from_flags = EngineArgs.from_cli_args(parser.parse_args(flags))
_, plain, _ = run([greedy(), greedy()])
# The first request drafts one token at a time, the second none.
llm, drafted, num_accepted = run(
    [ask(1), ask(0)], speculative_config={"method": "layerskip", "exit_layer": 4}
)
num_drafts, num_draft_tokens = count_drafts(llm)
try:
    llm.generate(prompts, ask(5), use_tqdm=False)
    refusal = ""
except ValueError as error:
    refusal = str(error)
print("seen:" + json.dumps({
    "is_patched": vllm.__file__.startswith(sys.argv[2]),
    "method_hooks": sorted({hook_state(hook) for hook in METHOD_HOOKS}),
    "fixes": sorted({hook_state(hook) for hook in FIXES if digests[hook.name] is not None}),
    "exit_layer": from_flags.create_engine_config().speculative_config.exit_layer,
    "is_equal": plain == drafted,
    "num_accepted": num_accepted,
    "num_drafts": num_drafts,
    "num_draft_tokens": num_draft_tokens,
    "calls": calls,
    "refusal": refusal,
}))
"""


@pytest.fixture(scope="module", params=SUPPORTED_VLLM_VERSIONS)
def patched_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vLLM, by links, its patched files copied and patched.

    One that is not installed is its Python over what the installed one compiled.
    """
    site = tmp_path_factory.mktemp("patched")
    version = request.param
    is_installed = vllm.__version__.partition("+")[0] == version
    package = find_file("vllm").parent if is_installed else overlay_python(version) / "vllm"
    diff = PATCHES / f"vllm-{version}.diff"
    shutil.copytree(
        package, site / "vllm", copy_function=os.symlink, ignore=shutil.ignore_patterns("*.pyc")
    )
    for line in diff.read_text().splitlines():
        file = site / line.removeprefix("--- a/")
        if line.startswith("--- a/") and file.is_symlink():
            original = file.resolve()
            file.unlink()
            shutil.copy(original, file)
    subprocess.run(["git", "apply", "--verbose", str(diff)], cwd=site, check=True)
    return site


def test_fixes_and_uses_fit_when_vllm_is_patched(patched_site: Path) -> None:
    digests = read_digests(read_version(patched_site))
    needed = [entry for entry in (*FIXES, *USES) if digests[entry.name] is not None]
    assert [problem for entry in needed for problem in check(entry, digests, patched_site)] == []


@pytest.mark.parametrize("runner", RUNNERS)
def test_registry_serves_layerskip_without_method_hooks_when_vllm_is_patched(
    patched_site: Path, checkpoint: Callable[..., Path], runner: str
) -> None:
    result = _run_script(patched_site, checkpoint("llama"), runner)
    assert result["is_patched"]
    assert result["method_hooks"] == ["not installed"]
    assert set(result["fixes"]) <= {"armed", "applied"}  # some are for V1's CPU kernels alone
    assert result["exit_layer"] == 3
    assert result["is_equal"]
    assert 0 < result["num_accepted"] <= result["num_draft_tokens"] == result["num_drafts"]
    assert {num > 0 for num in result["calls"].values()} == {runner == "v2"}
    assert "is 5; it must be an integer from 0" in result["refusal"]


def _run_script(site: Path, model: Path, runner: str) -> dict[str, Any]:
    paths = (str(site), RUNNERS[runner].get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        **RUNNERS[runner],
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    return see(SCRIPT, model, site, env=environment)
