"""A real model, where it is installed: SmolLM2-135M-Instruct out of a package of pip's."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.real_checkpoint import make_real_checkpoint


def need_real_checkpoint() -> Path:
    """Return the checkpoint's folder, made at the first call; skip the test if it cannot be."""
    try:
        return make_real_checkpoint()
    except ImportError as error:
        pytest.skip(f"not run: {error}")
