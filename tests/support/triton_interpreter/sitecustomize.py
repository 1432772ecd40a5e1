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


class _AfterImport(importlib.abc.MetaPathFinder):
    """Changes a module right after it is imported."""

    def __init__(self, name, change):
        self.name, self.change, self.is_searching = name, change, False

    def find_spec(self, name, path, target=None):
        if name != self.name or self.is_searching:
            return None
        self.is_searching = True
        spec = importlib.util.find_spec(name)
        self.is_searching = False
        exec_module = spec.loader.exec_module

        def exec_and_change(module):
            exec_module(module)
            self.change(module)

        spec.loader.exec_module = exec_and_change
        return spec


def _add_cpu_backend(backends):
    """vLLM looks for a backend of the CPU, the interpreter does not."""
    driver = SimpleNamespace(is_active=lambda: True)
    backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def _mend_interpreter(interpreter):
    _store_under_any_mask(interpreter)
    _patch_language_once(interpreter)


def _patch_language_once(interpreter):
    """The interpreter patches `tl` at each call of a kernel or a function, half of all its time.

    Here it stays patched: in this process nothing is compiled.
    """
    patch_lang, seen = interpreter._patch_lang, set()

    def patch(fn):
        languages = (interpreter.tl, interpreter.tl.core)
        found = {lang for lang in languages if any(v is lang for v in fn.__globals__.values())}
        if not found <= seen:
            seen.update(found)
            patch_lang(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _store_under_any_mask(interpreter):
    """A compiler takes a mask of integers, the interpreter one of booleans."""
    create_masked_store = interpreter.InterpreterBuilder.create_masked_store

    def create(self, ptrs, value, mask, *args):
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return create_masked_store(self, ptrs, value, mask, *args)

    interpreter.InterpreterBuilder.create_masked_store = create


def _sort_in_pytorch(sampler):
    """vLLM's kernel for top-k and top-p has loops that the interpreter cannot run."""
    sampler.HAS_TRITON = False


def _log1p_by_log(sampler):
    """The interpreter has none of the device's own functions."""
    sampler.tldevice = SimpleNamespace(log1p=lambda x: sampler.tl.log(1.0 + x))


for _name, _change in (
    ("triton.backends", _add_cpu_backend),
    ("triton.runtime.interpreter", _mend_interpreter),
    ("vllm.v1.sample.ops.topk_topp_sampler", _sort_in_pytorch),
    ("vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils", _log1p_by_log),
):
    sys.meta_path.insert(0, _AfterImport(_name, _change))
