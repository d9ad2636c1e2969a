"""The picture of `fastmoe compare`, as matplotlib holds it before it is a file."""

import pytest
from finished_runs import write_run

from fastmoe.train.compare import AXES, read_side
from fastmoe.train.compare_plot import draw_sides, plot_sides


@pytest.fixture
def sides(tmp_path):
    a = [write_run(tmp_path / f"a{seed}", [8.0, 5.0, last], seed=seed) for seed, last in enumerate((2.0, 4.0))]
    b = write_run(tmp_path / "b", [8.0, 4.0, 1.0], kind="moe", step_seconds=3.0, flops=4.0)
    return read_side(",".join(a), "dense"), read_side(b, "MoE")


def test_each_panel_goes_by_an_axis_of_its_own(sides):
    panels = draw_sides(sides, "").axes
    assert [panel.get_xlabel() for panel in panels] == ["steps", "seconds of training", "training FLOPs"]
    for panel, axis in zip(panels, AXES, strict=True):
        for line, side in zip(panel.lines, sides, strict=False):
            assert list(line.get_xdata()) == side.mean(axis)[1:]
            assert list(line.get_ydata()) == side.losses[1:]


def test_a_line_marks_the_final_loss_of_the_first_side(sides):
    for panel in draw_sides(sides, "").axes:
        assert list(panel.lines[-1].get_ydata()) == [3.0, 3.0]
        assert panel.lines[-1].get_linestyle() == "--"


def test_the_band_is_a_standard_deviation_to_each_side(sides):
    for panel in draw_sides(sides, "").axes:
        band = panel.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((3 - 2**0.5, 5.0))


def test_the_legend_has_each_side_once_and_the_caption_stands_above(sides):
    figure = draw_sides(sides, "text; some CPU")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense, mean of 2 runs", "MoE"]
    assert figure.get_suptitle() == "text; some CPU"


def test_of_a_long_name_the_end_is_shown(tmp_path):
    side = read_side(write_run(tmp_path / "a", [8.0, 4.0]), "x" * 90 + "end")
    (text,) = draw_sides([side], "").legends[0].get_texts()
    assert text.get_text() == "..." + "x" * 77 + "end"


def test_dollars_are_no_formulas(tmp_path):
    side = read_side(write_run(tmp_path / "a", [8.0, 4.0]), r"$\no$")
    plot_sides([side], tmp_path / "a.png", r"$\formula$")
    assert (tmp_path / "a.png").is_file()
