"""The commands and snippets of the documentation, run as they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented import find_blocks, run_page

RUNS = {"bash", "python"}
PAGES_THAT_RUN = sorted({b.page for b in find_blocks() if b.language in RUNS and not b.mark})


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_blocks_run_when_typed_as_printed(page: str, tmp_path: Path) -> None:
    problem = run_page(page, is_slow=False, folder=tmp_path)
    assert problem is None, problem
