"""Versions that stand in more than one file are the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from layerskip_vllm.hooks.vllm_source import SUPPORTED_VLLM_VERSIONS

ROOT = Path(__file__).parents[2]


def test_vllm_is_one_version_in_setup_extras_and_hooks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    in_setup = re.findall(r"VLLM_VERSION=([\d.]+)$", (ROOT / "scripts/setup.sh").read_text(), re.M)
    assert project["optional-dependencies"]["gpu"] == [f"vllm=={in_setup[0]}"]
    assert SUPPORTED_VLLM_VERSIONS[-1] == in_setup[0]


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    pin = re.compile(r"([a-z-]+)==([\d.]+)")
    in_venv = dict(pin.findall((ROOT / "scripts/constraints.txt").read_text()))
    in_hooks = pin.findall((ROOT / ".pre-commit-config.yaml").read_text())
    assert in_hooks
    assert [(name, in_venv.get(name)) for name, _ in in_hooks] == in_hooks
