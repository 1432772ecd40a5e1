#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, into dist/; installs the wheel into a venv of its own and
# tries it there, first alone, then beside the vLLM of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly REPOSITORY=$PWD
readonly PYTHON=.venv/bin/python

site_packages() {
  "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

rm -rf dist layerskip_vllm.egg-info # setuptools would add what an old list of files names
"$PYTHON" -m build --no-isolation --outdir dist . >"$folder/build.log" 2>&1 || {
  cat "$folder/build.log" >&2
  exit 1
}

# In an environment of its own, with what it says that it needs and no vLLM.
"$PYTHON" -m venv "$folder/venv"
readonly IN_VENV=$folder/venv/bin
"$PYTHON" -m pip --disable-pip-version-check freeze --exclude-editable |
  grep -v @ >"$folder/constraints.txt"
"$IN_VENV/python" -m pip --disable-pip-version-check install --quiet \
  --constraint "$folder/constraints.txt" dist/*.whl
cd "$folder" # the repository is not on the path here
"$IN_VENV/layerskip-vllm" --help

# Beside vLLM. The wheel comes first on the path, and the .pth files of .venv are not read, with them
# not the editable install of the repository.
site_packages "$REPOSITORY/$PYTHON" >"$(site_packages "$IN_VENV/python")/vllm.pth"
export VLLM_PLUGINS=layerskip VLLM_LOGGING_LEVEL=ERROR
"$IN_VENV/python" "$REPOSITORY/scripts/check_package.py" "$REPOSITORY"/dist
"$IN_VENV/layerskip-vllm" doctor "$REPOSITORY/checkpoints/stdlib-24l"
