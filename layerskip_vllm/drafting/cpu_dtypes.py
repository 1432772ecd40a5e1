"""Which data types a CPU only emulates, so that they are slower there than float32.

For the log line and `doctor`, and for benchmarks that choose a data type.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CPUINFO = Path("/proc/cpuinfo")
# What an x86 CPU must have one of, by Linux's names, to multiply in a data type. Without, oneDNN
# widens each operand: a row of a batch then costs as much as the first, so that verifying drafts
# costs as much as decoding them.
_NEEDED = {
    "bfloat16": {"avx512_bf16", "amx_bf16"},
    "float16": {"avx512_fp16", "amx_fp16"},
}


def is_emulated(dtype: torch.dtype | str, device_type: str) -> bool:
    """Return whether a data type is emulated on a device; False where that is not known."""
    needed = _NEEDED.get(str(dtype).removeprefix("torch."))
    if needed is None or device_type != "cpu" or platform.machine() != "x86_64":
        return False
    flags = _read_flags()
    return bool(flags) and not needed & flags


def _read_flags() -> set[str]:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
