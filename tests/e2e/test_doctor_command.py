"""`layerskip-vllm doctor`, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_command_prints_only_the_report_when_run(checkpoint: Callable[..., Path]) -> None:
    command = Path(sys.executable).with_name("layerskip-vllm")
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("VLLM_")}
    done = subprocess.run(
        [str(command), "doctor", str(checkpoint("llama"))],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sections = re.findall(r"^(\S.*)$", done.stdout, flags=re.MULTILINE)
    assert sections == [
        "versions",
        "plugin",
        "hooks",
        "devices",
        "checkpoint",
        "no problem found",
    ]
    assert "  exit_layer              2, from a quarter of the layers" in done.stdout
    assert re.search(
        r"a draft step reads +\d+\.\d% of the model's bytes \(layers \d+\.\d%, head \d+\.\d%\)",
        done.stdout,
    )
