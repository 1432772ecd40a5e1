"""vLLM's CPU platform with what Ray's executor asks of a platform; see `on_cpu`.

For development and tests: Ray is told of GPUs that do not exist (`ray.init(num_gpus=2)`) and places
one worker on each; the workers run on the CPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from typing_extensions import override
from vllm.platforms.cpu import CpuPlatform

from vllm_ray_on_cpu.on_cpu import RAY_ON_CPU

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RayCpuPlatform(CpuPlatform):
    """The CPU platform, with Ray's logical GPUs as the places of workers."""

    # Ray takes no other name: "CPU" is reserved for cores, and a worker cannot ask which units of a
    # resource of our own it was given.
    ray_device_key = "GPU"
    # What vLLM sets to 1 in each worker before it looks for its platform: Ray shall leave
    # CUDA_VISIBLE_DEVICES alone, and the platform is this one however the node was started.
    ray_noset_device_env_vars = ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", RAY_ON_CPU)

    @classmethod
    @override
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Let the engine core's process join the Ray cluster of this one.

        vLLM exports the cluster's address where it decides to spawn that process, but the CPU
        platform has decided so before; the engine core would start a cluster of its own.
        """
        super().check_and_update_config(vllm_config)
        if not vllm_config.parallel_config.use_ray:
            return
        import ray

        if ray.is_initialized():
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
