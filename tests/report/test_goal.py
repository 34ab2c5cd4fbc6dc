"""Time to goal, by hand."""

from __future__ import annotations

import pytest

from made import make_history, make_record
from steepest.report.goal import Goal, goal_of
from steepest.report.groups import group
from steepest.training.records import RunRecord


def run(optimizer: str, losses: list[float | None], *, seconds: float, **changes: object) -> RunRecord:
    return make_record(optimizer=optimizer, history=make_history(losses, seconds=seconds), **changes)  # type: ignore[arg-type]


ADAM = [
    run("adam", [1.0, 0.5, 0.3, 0.2], seconds=3.0),  # reaches 0.4 at epoch 2, 2 s
    run("adam", [1.0, 0.6, 0.5, 0.4], seconds=6.0, seed=1),  # reaches 0.4 at epoch 3, 6 s
]
SVEN = [
    run("sven", [1.0, 0.4, 0.3, 0.1], seconds=6.0),  # epoch 1, 2 s
    run("sven", [1.0, 0.3, 0.3, 0.1], seconds=9.0, seed=1),  # epoch 1, 3 s
]
SGD = [
    run("sgd", [1.0, 0.9, 0.8, 0.7], seconds=1.0),
    run("sgd", [1.0, None, None, None], seconds=1.0, seed=1, status="diverged", error="nan", final=None),
]


def goal(records: list[RunRecord], given: float | None = None) -> Goal:
    (cell,) = group(records)
    found = goal_of(cell, given)
    assert found is not None
    return found


def test_the_default_goal_is_what_every_run_of_adam_reaches() -> None:
    found = goal(SVEN + SGD + ADAM)
    assert (found.val_loss, found.reference, found.given) == (0.4, "Adam", False)
    sven, sgd, adam = found.rows
    assert (adam.reached, adam.attempted, adam.epochs, adam.seconds, adam.ratio) == (2, 2, 2.5, 4.0, 1.0)
    assert (adam.fastest, adam.slowest) == (2.0, 6.0)
    assert (sven.reached, sven.epochs, sven.seconds, sven.ratio) == (2, 1, 2.5, pytest.approx(0.625))
    assert (sgd.reached, sgd.attempted, sgd.seconds, sgd.ratio) == (0, 2, None, None)


def test_without_adam_the_first_row_is_the_reference() -> None:
    found = goal(SGD + SVEN)
    assert (found.val_loss, found.reference) == (0.7, "SGD")
    assert found.rows[1].reached == 2


def test_an_adam_that_never_finished_is_no_reference() -> None:
    lost = run("adam", [1.0, 2.0], seconds=1.0, status="failed", error="x", final=None)
    assert goal([lost, *SVEN]).reference == "Sven"


def test_a_given_goal_is_taken_and_may_be_out_of_reach() -> None:
    found = goal(ADAM + SVEN, given=1e-9)
    assert found.given
    assert [row.reached for row in found.rows] == [0, 0]
    assert all(row.ratio is None for row in found.rows)


def test_a_goal_that_the_untrained_model_meets_has_no_ratio() -> None:
    found = goal(ADAM + SVEN, given=2.0)
    assert [row.seconds for row in found.rows] == [0.0, 0.0]
    assert [row.ratio for row in found.rows] == [None, None]


def test_runs_that_reach_the_goal_later_diverge_and_still_count() -> None:
    late = run("sgd", [1.0, 0.1, 9e9], seconds=2.0, status="diverged", error="x", final=None)
    assert goal([*ADAM, late]).rows[1].reached == 1


@pytest.mark.parametrize("records", [ADAM, [SGD[1], run("sven", [1.0], seconds=1, status="failed", final=None)]])
def test_there_is_no_goal_where_nothing_can_be_compared(records: list[RunRecord]) -> None:
    (cell,) = group(records)
    assert goal_of(cell) is None
