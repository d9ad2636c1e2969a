"""The figures show what they are given, each task and model in its place."""

import pytest

pytest.importorskip("matplotlib")

from fastmoe.tabular import plots

AUCS = {"mmoe": [[0.1, 0.6], [0.2, 0.7]], "single_task": [[0.3, 0.8], [0.5, 0.9]]}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def points(panel):
    """The y values of each line but those of one point, the error bars."""
    return [list(line.get_ydata()) for line in panel.lines if len(line.get_ydata()) > 1]


def test_aucs(drawn, tmp_path):
    plots.plot_aucs(AUCS, ["income", "never"], tmp_path)
    income, never = drawn[0].axes
    assert points(income) == [[0.1, 0.2], [0.3, 0.5]]
    assert points(never) == [[0.6, 0.7], [0.8, 0.9]]
    assert [panel.get_title() for panel in (income, never)] == ["income", "never"]
    assert [label.get_text() for label in income.get_xticklabels()] == ["MMoE", "single task"]


@pytest.mark.parametrize("seeds", [1, 5, 7])
def test_gates_of_every_seed(drawn, tmp_path, seeds):
    gates = {f"seed {seed}": [[0.7, 0.3], [seed / 10, 1 - seed / 10]] for seed in range(seeds)}
    plots.plot_gates(gates, ["income", "never"], tmp_path)
    panels = [panel for panel in drawn[0].axes if panel.get_title()]
    assert {panel.get_title(): panel.images[0].get_array().tolist() for panel in panels} == gates
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["income", "never"]
    low, high = panels[0].get_ylim()
    assert low > high  # the first task is above


def test_curves(drawn, tmp_path):
    losses = {"mmoe": [[9.0, 4.0, 2.0], [9.0, 2.0, 1.0]], "omoe": [[9.0, 5.0, 3.0], [9.0, 5.0, 4.0]]}
    other = {"mmoe": [[9.0, 1.0, 1.0]] * 2, "omoe": [[9.0, 2.0, 2.0]] * 2}
    plots.plot_curves({"0.5": losses, "1": other}, [0, 10, 20], tmp_path)
    upper, lower = drawn[0].axes[0], drawn[0].axes[2]
    assert points(upper) == [[3.0, 1.5], [5.0, 3.5]]
    assert points(lower) == [[2.0, 1.0], [3.0, 4.0]]
    assert list(upper.lines[0].get_xdata()) == [10, 20]
    assert [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()] == ["MMoE", "OMoE"]


def test_a_figure_is_written(tmp_path):
    plots.plot_aucs(AUCS, ["income", "never"], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
