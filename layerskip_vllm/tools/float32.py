"""float32 as IEEE 754 has it: the environment of each engine whose tokens are compared.

`verify`, the benchmarks, the demo and the tests give it to the processes that they start.
"""

from __future__ import annotations

from collections.abc import Mapping

# On a GPU, Triton's products of float32, attention's among them, are TF32's if nothing says
# otherwise, with 10 bits of mantissa: near ties then fall as the batch's shape has it. cuBLAS' and
# PyTorch's are float32's, unless the machine or its image says otherwise. A CPU has no such thing.
IEEE_FLOAT32: Mapping[str, str] = {
    "TRITON_F32_DEFAULT": "ieee",
    "NVIDIA_TF32_OVERRIDE": "0",
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",  # vLLM's word for PyTorch's own flags
}


def float32_env(dtype: str) -> dict[str, str]:
    """Return the variables that an engine of this dtype needs: none if it is not float32."""
    return dict(IEEE_FLOAT32) if dtype in ("float32", "float") else {}
