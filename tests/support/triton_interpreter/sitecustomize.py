"""Runs vLLM's Model Runner V2 on the CPU, its Triton kernels under Triton's interpreter.

Put this folder on PYTHONPATH of the process that runs the engine: it must be in effect in every
process before vLLM is imported, and `sitecustomize` is. For tests alone: it is very slow.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

import importlib.abc
import importlib.util
import sys
from types import SimpleNamespace


class _AddCpuBackend(importlib.abc.MetaPathFinder):
    """Gives `triton.backends` an entry "cpu" on import: vLLM looks for it, the interpreter not."""

    def find_spec(self, name, path, target=None):
        if name != "triton.backends":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        exec_module = spec.loader.exec_module

        def exec_and_add(module):
            exec_module(module)
            driver = SimpleNamespace(is_active=lambda: True)
            module.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

        spec.loader.exec_module = exec_and_add
        return spec


sys.meta_path.insert(0, _AddCpuBackend())
