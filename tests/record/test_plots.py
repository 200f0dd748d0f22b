"""Plots are the same bytes for the same records, and keep their text as text."""

from __future__ import annotations

import base64

from layerif.record.plots import plots_of_run
from tests.records import record


def test_the_same_record_is_drawn_in_the_same_bytes_with_its_text():
    first, again = (plots_of_run(record("datainf", [True])) for _ in range(2))
    assert list(first) == ["scores", "allocation"]
    for name, plot in first.items():
        assert plot.data_uri() == again[name].data_uri()
        kind, _, content = plot.data_uri().partition("base64,")
        assert kind == "data:image/svg+xml;"
        assert f">{plot.title}</text>" in base64.b64decode(content).decode()


def test_a_plot_is_written_in_the_format_of_its_name(tmp_path):
    plots_of_run(record("datainf", [True]))["scores"].save(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_of_scores_are_shaded_and_inside_the_picture():
    one = record("cca", [True])
    assert one.decision is not None
    assert one.decision.scores is not None
    highest = max(one.decision.scores.values)
    one.decision.scores.intervals = [(value - 1, value + highest) for value in one.decision.scores.values]
    plot = plots_of_run(one)["scores"]
    (axes,) = plot.figure.axes
    assert "shaded: 95 % interval" in plot.title
    assert len(axes.collections) == 1
    assert axes.get_ylim()[1] >= 2
    assert not plots_of_run(record("datainf", [True]))["scores"].figure.axes[0].collections
