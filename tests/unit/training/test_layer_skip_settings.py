"""LayerSkip's settings: what is refused, and that each reaches what it is for."""

import pytest

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.training.settings import LayerSkipSettings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "max_drop_prob",
            1.0,
            "max_drop_prob is 1.0; it must be a number of at least 0 and below 1",
        ),
        ("max_drop_prob", -0.1, "max_drop_prob is -0.1"),
        ("e_scale", 1.5, "e_scale is 1.5; it must be a number from 0 to 1"),
        ("depth_schedule", "cubic", "depth_schedule is 'cubic'; it must be one of exponential"),
        ("time_schedule", "linear", "time_schedule is 'linear'"),
        ("exit_scale", "linear", "exit_scale is 'linear'; it must be one of sum, flat"),
        ("curriculum", "random", "curriculum is 'random'; it must be one of none, rotational"),
        ("target", "last", "target is 'last'; it must be one of labels, last_layer"),
        ("rotation", 0, "rotation is 0; it must be an integer of at least 1"),
        ("num_speculative_tokens", 0, "num_speculative_tokens is 0"),
        ("exit_layers", (1, 2), "exit_layers has 1, whose weight is 0"),
        ("exit_layer", 1, "exit_layer is 1, whose weight is 0 with exit_scale sum"),
        # And values of another type.
        ("e_scale", -0.1, "e_scale is -0.1; it must be a number from 0 to 1"),
        ("e_scale", "0.1", "e_scale is '0.1'; it must be a number from 0 to 1"),
        ("exit_scale", "cubic", "exit_scale is 'cubic'; it must be one of sum, flat"),
        ("rotation", True, "rotation is True; it must be an integer of at least 1"),
        ("exit_layers", ["2"], r"exit_layers\[0\] is '2'; it must be an integer"),
    ],
)
def test_settings_name_the_field_and_value_when_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(LayerSkipSettings, {field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotation", 9, "rotation is 9; it must be from 1 to 8"),
        ("exit_layer", 8, "exit_layer is 8; it must be from 1 to 7"),
        ("exit_layer", 0, "exit_layer is 0"),
        ("exit_layers", (2, 8), r"exit_layers\[1\] is 8; it must be from 1 to 7"),
        (
            "exit_layers",
            (3, 4),
            r"exit_layer is 2 \(not set, so a quarter .* in exit_layers, \[3, 4",
        ),
    ],
)
def test_settings_name_the_field_and_value_when_they_do_not_fit_the_model(field, value, message):
    settings = LayerSkipSettings(**{field: value})

    with pytest.raises(ValueError, match=message):
        settings.check_fits(8)


def test_settings_are_refused_when_the_exit_that_drafts_is_not_trained():
    settings = LayerSkipSettings(exit_layer=4, exit_layers=(3, 5))

    with pytest.raises(
        ValueError, match=r"exit_layer is 4, which drafts and must be in exit_layers"
    ):
        settings.check_fits(8)


def test_rotation_is_free_when_the_curriculum_is_another():
    LayerSkipSettings(rotation=100, curriculum="gradual").check_fits(8)


def test_draft_entry_is_a_quarter_of_the_layers_and_four_tokens_when_not_given():
    assert LayerSkipSettings().draft_entry(24) == {"exit_layer": 6, "num_speculative_tokens": 4}


def test_draft_entry_is_what_was_given_when_it_was():
    settings = LayerSkipSettings(exit_layer=3, num_speculative_tokens=7)

    assert settings.draft_entry(24) == {"exit_layer": 3, "num_speculative_tokens": 7}
