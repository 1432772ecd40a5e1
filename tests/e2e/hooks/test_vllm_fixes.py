"""`top_k` over the logits of a step without any draft, without the plugin's fix and with it."""

from __future__ import annotations

import pytest

from tests.e2e.serving.server import environment
from tests.support.scripts import see

SCRIPT = """
import json, torch
from layerskip_vllm.plugin import register
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

def limit(logits, k):
    k = torch.tensor(k, dtype=torch.int32)
    return apply_top_k_top_p_pytorch(logits, k, None, allow_cpu_sync=True)

def try_without_rows():
    limited = limit(torch.tensor([[1.0, 3.0, 2.0]]), [2])
    assert limited.isfinite().tolist() == [[False, True, True]]
    try:
        return str(tuple(limit(torch.empty(0, 3), []).shape))
    except Exception as error:
        return str(error)

seen = {"plain": try_without_rows()}
register()
seen["fixed"] = try_without_rows()
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, str]:
    """The shape of the limited logits or the error, in a process before and after registration."""
    return see(SCRIPT, env=environment(VLLM_PLUGINS=""))


@pytest.mark.parametrize(("state", "outcome"), [("fixed", "(0, 3)"), ("plain", "numel() == 0")])
def test_top_k_takes_logits_without_rows_when_fixed(
    seen: dict[str, str], state: str, outcome: str
) -> None:
    assert outcome in seen[state]
