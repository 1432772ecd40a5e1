#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, into dist/; installs the wheel into a venv of its own and
# tries it there. vLLM and all else comes from .venv.
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

# The wheel comes first on the path. Where .venv is added so, its .pth files are not read, and with
# them not the editable install of this repository.
"$PYTHON" -m venv "$folder/venv"
readonly IN_VENV=$folder/venv/bin
"$IN_VENV/python" -m pip --disable-pip-version-check install --quiet --no-deps dist/*.whl
site_packages "$PYTHON" >"$(site_packages "$IN_VENV/python")/vllm.pth"

cd "$folder" # the repository is not on the path here
export VLLM_PLUGINS=layerskip VLLM_LOGGING_LEVEL=ERROR
"$IN_VENV/python" "$REPOSITORY/scripts/check_package.py" "$REPOSITORY"/dist
"$IN_VENV/layerskip-vllm" --help
"$IN_VENV/layerskip-vllm" doctor "$REPOSITORY/checkpoints/stdlib-24l"
