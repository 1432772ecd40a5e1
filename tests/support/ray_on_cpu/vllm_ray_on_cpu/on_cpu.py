"""The entry point `vllm.platform_plugins`: whether this process runs Ray's executor on the CPU.

vLLM calls `find_platform` in each of its processes, before anything else of a plugin is loaded.
"""

from __future__ import annotations

import os

RAY_ON_CPU = "VLLM_LAYERSKIP_RAY_ON_CPU"


def find_platform() -> str | None:
    """Name the platform on which Ray's executor works without GPUs, if it is asked for.

    Returns:
        The class's qualified name if `VLLM_LAYERSKIP_RAY_ON_CPU=1` and vLLM is a build for CPUs,
        None otherwise: vLLM then finds its platform as ever.
    """
    if os.environ.get(RAY_ON_CPU) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_ray_on_cpu.cpu_platform.RayCpuPlatform"
