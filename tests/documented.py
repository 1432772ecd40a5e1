"""The code that the documentation prints, and what runs it: `python -m tests.documented`.

What runs as it is printed needs no mark. A comment right before a block says where that can't be:

    <!-- slow: five minutes -->     run by that command, not by `tests/e2e/test_documented.py`
    <!-- not run: needs a GPU -->   parsed alone, as all are by `tests/unit/test_printed_code.py`
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>slow|not run): .+ -->\n)?^```(?P<language>.*)\n(?P<code>(?s:.*?))^```$",
    re.MULTILINE,
)
# What the documentation leaves to the reader, and what is shortened.
SUBSTITUTES = {
    r"\bMODEL\b": "checkpoints/stdlib-24l",
    r"\bfacebook/layerskip-llama3\.2-1B\b": "checkpoints/stdlib-24l",
    r"\bPID\b": "$server",
    r"--minutes 30\b": "--minutes 1",
}
# Names that a page's snippets take from the reader's own script.
_PREPARED = {
    "docs/training.md": """
from transformers import AutoModelForCausalLM, TrainingArguments
model = AutoModelForCausalLM.from_pretrained("checkpoints/stdlib-24l", num_hidden_layers=8)
rows = [{"input_ids": list(range(64)), "labels": list(range(64))}] * 4
args = TrainingArguments("outputs/printed", max_steps=1, use_cpu=True, report_to=[])
batches = [model.dummy_inputs | {"labels": model.dummy_inputs["input_ids"]}] * 2
"""
}
_SERVERS = ("vllm serve ", "python examples/ray_serve.py ")
_SHELL = """
set -euo pipefail
pip() { echo "not installed again: $*"; }
# ask URL [BODY]: what a server on this machine answers, whatever proxy there is.
ask() {
  python -c 'import sys, urllib.request as http
request = http.Request(sys.argv[1], *(body.encode() for body in sys.argv[2:]))
request.add_header("Content-Type", "application/json")
print(http.build_opener(http.ProxyHandler({})).open(request).read().decode())' "$@"
}
server=
stop() {
  [[ $server ]] || return 0
  kill "$server"
  wait "$server"
  server=
}
# serve PORT COMMAND: in a terminal of its own, until the next one starts.
serve() {
  local models=http://127.0.0.1:$1/v1/models
  stop
  ! ask "$models" 2>/dev/null || { echo "somebody serves at port $1"; return 1; }
  "${@:2}" &
  server=$!
  until ask "$models" 2>/dev/null; do
    kill -0 "$server"
    sleep 1
  done
  [[ $2 != vllm ]] || ask "${models/models/completions}" '{"prompt": "def f(", "max_tokens": 16}'
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `mark` is "slow", "not run" or empty."""

    page: str
    line: int
    mark: str
    language: str
    code: str

    @property
    def place(self) -> str:
        """Where it is, as an editor takes it."""
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """The code without what it leaves to the reader."""
        code = self.code
        for name, value in SUBSTITUTES.items():
            code = re.sub(name, lambda _, value=value: value, code)
        return code


def find_blocks(pages: Sequence[str] = PAGES) -> list[Block]:
    """Return all fenced blocks of pages."""
    blocks = []
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start("language")) + 1
            mark, language, code = found["mark"] or "", found["language"], found["code"]
            blocks.append(Block(page, line, mark, language, code))
    return blocks


def write_shell(blocks: Sequence[Block]) -> str:
    """Return one shell script of several blocks; a server in it is left running meanwhile."""
    lines = [_SHELL, "set -x"]
    for line in "".join(block.script for block in blocks).splitlines():
        if line.startswith(_SERVERS):
            port = re.search(r"--port[ =](\d+)", line)
            line = f"serve {port[1] if port else 8000} {line}"
        lines.append(line)
    return "\n".join([*lines, "stop", ""])


def run_page(page: str, is_slow: bool, folder: Path) -> str | None:
    """Run a page's blocks, those in the shell first, in a folder that looks like the repository.

    Returns:
        What is wrong, with the end of the output; None if nothing is.
    """
    marks = {"", "slow"} if is_slow else {""}
    blocks = [block for block in find_blocks([page]) if block.mark in marks]
    shell = [block for block in blocks if block.language == "bash"]
    python = [block.script for block in blocks if block.language == "python"]
    for name in {path.partition("/")[0] for path in _list_tracked()}:
        (folder / name).symlink_to(ROOT / name)
    if shell:
        (folder / "printed.sh").write_text(write_shell(shell))
    if python:
        (folder / "printed.py").write_text("\n".join([_PREPARED.get(page, ""), *python]))
    for command in ([["bash", "printed.sh"]] if shell else []) + (
        [[sys.executable, "printed.py"]] if python else []
    ):
        status, output = _run(command, folder)
        if status != 0:
            return f"{page}: {' '.join(command)} ended with status {status}:\n{output[-6000:]}"
    return None


def _list_tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return [path for path in listed.stdout.splitlines() if not path.startswith(".")]


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command, and end all that it leaves: its exit status and output."""
    reset = ("VLLM_", "OMP_NUM_THREADS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(reset)}
    env |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        # As README.md says of a machine without a GPU.
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    log = folder / "output.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log.read_text(errors="replace")


def main(pages: Sequence[str]) -> int:
    """Run all blocks of pages that a machine like this can, and say what is wrong with them."""
    status = 0
    for page in pages or PAGES:
        begin_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="documented-") as folder:
            problem = run_page(page, is_slow=True, folder=Path(folder))
        print(f"{page}: {time.monotonic() - begin_s:.0f} s, {problem or 'as printed'}", flush=True)
        status |= problem is not None
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
