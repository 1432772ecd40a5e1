"""`top_k` over the logits of a step without any draft, with the plugin's fix and without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
if sys.argv[1] == "fixed":
    from layerskip_vllm.plugin import register
    register()
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

def limit(logits, k):
    k = torch.tensor(k, dtype=torch.int32)
    return apply_top_k_top_p_pytorch(logits, k, None, allow_cpu_sync=True)

assert limit(torch.tensor([[1.0, 3.0, 2.0]]), [2]).isfinite().tolist() == [[False, True, True]]
assert limit(torch.empty(0, 3), []).shape == (0, 3)
"""


@pytest.mark.parametrize(("state", "error"), [("fixed", ""), ("plain", "numel() == 0")])
def test_top_k_takes_logits_without_rows_when_fixed(state: str, error: str) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, state],
        env={**inherited, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (not error), done.stderr[-2000:]
    assert error in done.stderr
