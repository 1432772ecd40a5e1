#!/usr/bin/env bash
# `make check-gpu`: the tests and one benchmark on a machine with an NVIDIA GPU.
#
#   MODEL=facebook/layerskip-llama3.2-1B make check-gpu     another model for the benchmark
#   make check-gpu ARGS="--concurrency 16"                  more arguments for the benchmark
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python - <<'PYTHON'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(
        f"check-gpu: torch {torch.__version__} in .venv sees no GPU. On a machine with one, run "
        "`make clean setup` without VLLM_TARGET_DEVICE=cpu; elsewhere, `make test` needs none."
    )
print(f"check-gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}")
PYTHON
# Without those that need two ranks, which there are of CPUs alone.
.venv/bin/python -m pytest --ignore tests/e2e/distributed \
  --ignore tests/e2e/reliability/test_dead_processes.py
.venv/bin/python -m benchmarks.serving.demo --output-dir benchmark-output/gpu \
  ${MODEL:+--model "$MODEL"} "$@"
