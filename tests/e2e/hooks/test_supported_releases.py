"""Each supported version as it is released, which may not be the build that is installed."""

from __future__ import annotations

import pytest

from layerskip_vllm.hooks.vllm_source import SUPPORTED_VLLM_VERSIONS
from scripts import compare_vllm


@pytest.mark.parametrize("version", SUPPORTED_VLLM_VERSIONS)
def test_release_fits_with_its_own_diff_when_supported(
    version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = compare_vllm.main([version])
    text = capsys.readouterr().out
    assert status == 0, text
    (line,) = [line for line in text.splitlines() if f"vllm-{version}.diff" in line]
    num_applied, _, num_hunks = line.partition(": ")[2].removesuffix(" hunks apply").split()
    assert num_applied == num_hunks
