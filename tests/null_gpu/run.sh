#!/bin/bash
# Runs the GPU path where there is no GPU: on a stand-in whose kernels do nothing, so that what is
# tested is that the path runs (profiling, torch.compile, CUDA graphs, async scheduling, the server),
# never that its tokens are right. `make check-null-gpu` calls it; it is not part of `make test`.
#
#   NULL_GPU=DIR        a stand-in that is ready: DIR/env.sh sets it up, DIR/vllm/site holds vLLM
#   NULL_GPU_SETUP=FILE the script that makes one, called with the folder to make it in
#   VLLM=VERSION        another supported vLLM than the stand-in's, over what that has compiled
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${NULL_GPU:-$PWD/.null-gpu}
if [ ! -f "$dir/env.sh" ]; then
  setup=${NULL_GPU_SETUP:-}
  if [ ! -f "$setup" ]; then
    echo "check-null-gpu: no stand-in for a GPU. Set NULL_GPU to a folder that has one (env.sh)," \
      "or NULL_GPU_SETUP to the script that makes one; it is '${setup}' now." >&2
    exit 2
  fi
  bash "$setup" "$dir"
fi
. "$dir/env.sh"
python -m pip install -q --upgrade --no-deps --target "$dir/vllm/site" .
python -m pip install -q wrapt packaging orjson
rm -rf build/lib build/bdist.*
if [ -n "${VLLM:-}" ]; then
  site=$(python -m scripts.vllm_python "$VLLM" "$dir/vllm-$VLLM")
  export PYTHONPATH="$site:$PYTHONPATH"
fi
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
exec python tests/null_gpu/check.py "$@"
