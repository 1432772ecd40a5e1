"""The page of training's settings is what their models say."""

from __future__ import annotations

from scripts.training_settings_page import PAGE, write_page


def test_settings_page_is_what_the_models_say():
    assert write_page() == PAGE.read_text(encoding="utf-8")
