"""Figures read off the curves."""

import pytest

from fastmoe.train.history import History, busiest, loss_at, steps_to_reach


@pytest.fixture
def history():
    return History(
        seconds=40.0, valid_steps=[0, 10, 20], valid_seconds=[0.0, 20.0, 40.0], valid_losses=[8.0, 4.0, 3.0], loads=[]
    )


@pytest.mark.parametrize(("seconds", "loss"), [(0, 8.0), (10, 6.0), (20, 4.0), (30, 3.5), (40, 3.0), (50, 3.0)])
def test_loss_at_a_time_is_interpolated(history, seconds, loss):
    assert loss_at(seconds, history) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("loss", "steps"), [(9.0, 0), (8.0, 0), (6.0, 5), (4.0, 10), (3.5, 15), (3.0, 20), (2.9, None)]
)
def test_steps_to_a_loss_are_interpolated(history, loss, steps):
    assert steps_to_reach(loss, history) == (None if steps is None else pytest.approx(steps))


def test_the_busiest_expert_is_that_of_the_most_uneven_layer():
    assert busiest([[0.25, 0.75], [0.5, 0.5]]) == pytest.approx(1.5)
    assert busiest([]) == 1.0
