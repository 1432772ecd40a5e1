#!/usr/bin/env bash
# Carries the registry's diff over to another vLLM:
#
#   scripts/port_diff.sh 0.32.0 0.33.0
#
# The first run applies what applies to copies in build/port/NEW/b, and leaves a .rej beside each file
# that has a hunk to be put in by hand; each run writes patches/vllm-NEW.diff from the copies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly OLD=$1 NEW=$2 WORK=$PWD/build/port/$2

if [[ ! -d $WORK ]]; then
  tree=$(.venv/bin/python -m scripts.vllm_python "$NEW")
  mkdir -p "$WORK/a"
  for file in $(sed -n 's|^--- a/||p' "patches/vllm-$OLD.diff"); do
    [[ ! -f $tree/$file ]] || (cd "$tree" && cp --parents "$file" "$WORK/a")
  done
  cp -r "$WORK/a" "$WORK/b"
  git apply --reject --directory=build/port/"$NEW"/b "patches/vllm-$OLD.diff" || true
fi
# Without times, and no .rej; diff ends with 1 where there is a difference.
(cd "$WORK" && LC_ALL=C diff -urN --exclude='*.rej' a b || true) |
  sed -E '/^diff /d; s/^((---|\+\+\+) [ab]\/[^\t]*)\t.*/\1/' >"patches/vllm-$NEW.diff"
find "$WORK/b" -name '*.rej' -printf 'put in by hand, then delete: %p\n'
