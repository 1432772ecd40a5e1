"""Scripts run in a process of their own, for what a process imports, patches or registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def see(script: str, *args: object, env: Mapping[str, str] | None = None) -> Any:
    """Run a script with arguments, and return what it prints as JSON after `seen:`.

    Without `env` it has the tests' environment but for their settings of vLLM.
    """
    if env is None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("seen:"))
    return json.loads(line.removeprefix("seen:"))
