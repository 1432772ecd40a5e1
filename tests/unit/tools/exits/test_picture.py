"""The picture marks what the report speaks for, whatever the model's shape."""

import pytest
from matplotlib.patches import Rectangle

from layerskip_vllm.tools.exits.exit_report import Draft, Exit, ExitReport
from layerskip_vllm.tools.exits.picture import draw_exits, make_exits_figure
from layerskip_vllm.training.exit_evaluation import Acceptance


def make_report(num_layers: int, max_k: int, best: tuple[int, int], speedup: float) -> ExitReport:
    """A report in which one (E, K) promises `speedup` and every other one 0.2 less."""
    exits = []
    for e in range(1, num_layers + 1):
        drafts = tuple(
            Draft(e, k, Acceptance(0.5, [0.5] * k, 9), speedup - 0.2 * ((e, k) != best))
            for k in range(1, max_k + 1)
        )
        is_last = e == num_layers
        exits.append(Exit(e, 1 + 1 / e, e / num_layers, e / num_layers, () if is_last else drafts))
    setting = {"data": ["a.txt", "b.txt", "c.txt"], "dtype": "bfloat16", "num_prompts": 4}
    return ExitReport("folder/model", setting, 512, 256, 0.01, tuple(exits))


@pytest.mark.parametrize(
    ("num_layers", "max_k", "best", "speedup"),
    [(2, 1, (1, 1), 1.5), (24, 8, (6, 4), 1.6), (24, 8, (23, 8), 0.9), (80, 16, (9, 16), 2.0)],
)
def test_picture_marks_the_best_when_drawn(tmp_path, num_layers, max_k, best, speedup):
    report = make_report(num_layers, max_k, best, speedup)
    figure = make_exits_figure(report)
    heatmap, *lines = figure.axes
    (frame,) = [each for each in heatmap.patches if isinstance(each, Rectangle)]
    assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == best
    assert heatmap.images[0].get_array().argmax() == (best[1] - 1) * (num_layers - 1) + best[0] - 1
    for axes in lines:
        (band,) = axes.patches
        assert band.get_x() + band.get_width() / 2 == best[0]
    assert report.describe() in [text.get_text() for text in figure.texts]
    assert "a.txt and 2 more" in figure.texts[-1].get_text()

    draw_exits(tmp_path / "exits.png", report)
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("best", [(1, 1), (6, 4), (29, 8)])
def test_labels_stay_within_their_axes_when_the_best_exit_is_at_an_end(best):
    figure = make_exits_figure(make_report(30, 8, best, 1.5))
    figure.draw_without_rendering()
    for axes in figure.axes[1:]:
        labels = [text for text in axes.texts if text.get_fontweight() == "bold"]
        assert labels
        frame = axes.get_window_extent()
        for label in labels:
            box = label.get_window_extent()
            assert frame.x0 <= box.x0
            assert box.x1 <= frame.x1
            assert frame.y0 <= box.y0
            assert box.y1 <= frame.y1
