"""Versions that stand in more than one file are the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from layerskip_vllm.hooks.vllm_source import SUPPORTED_VLLM_VERSIONS

ROOT = Path(__file__).parents[2]


def test_vllm_is_one_of_the_supported_in_setup_and_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    setup = (ROOT / "scripts/setup.sh").read_text()
    in_setup = dict(re.findall(r"\b(GPU|CPU)_VLLM=([\d.]+)", setup))
    first, last = SUPPORTED_VLLM_VERSIONS[0], SUPPORTED_VLLM_VERSIONS[-1]
    assert in_setup["GPU"] == last
    assert in_setup["CPU"] in SUPPORTED_VLLM_VERSIONS
    major, minor, _ = last.split(".")
    allowed = f"vllm>={first},<{major}.{int(minor) + 1}"
    assert project["optional-dependencies"]["gpu"] == [allowed]


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    pin = re.compile(r"([a-z-]+)==([\d.]+)")
    in_venv = dict(pin.findall((ROOT / "scripts/constraints.txt").read_text()))
    in_hooks = pin.findall((ROOT / ".pre-commit-config.yaml").read_text())
    assert in_hooks
    assert [(name, in_venv.get(name)) for name, _ in in_hooks] == in_hooks
