"""Time to goal, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made import make_history, make_problem, make_record
from steepest.report.goal import Goal, goal_of
from steepest.report.groups import group
from steepest.report.measure import Measure, measure_of
from steepest.training.errors import UnknownNameError
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
    assert (found.value, found.reference, found.given) == (0.4, "Adam", False)
    sven, sgd, adam = found.rows
    assert (adam.reached, adam.attempted, adam.epochs, adam.seconds, adam.ratio) == (2, 2, 2.5, 4.0, 1.0)
    assert (adam.fastest, adam.slowest) == (2.0, 6.0)
    assert (sven.reached, sven.epochs, sven.seconds, sven.ratio) == (2, 1, 2.5, pytest.approx(0.625))
    assert (sgd.reached, sgd.attempted, sgd.seconds, sgd.ratio) == (0, 2, None, None)


def test_without_adam_the_first_row_is_the_reference() -> None:
    found = goal(SGD + SVEN)
    assert (found.value, found.reference) == (0.7, "SGD")
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


ACCURACY = Measure("accuracy", "accuracy", higher_is_better=True)


def scored(optimizer: str, values: list[float | None], *, seconds: float = 3.0, **changes: object) -> RunRecord:
    """A run on digits whose accuracy after every epoch is given."""
    record = run(optimizer, [1.0] * len(values), seconds=seconds, task="digits", **changes)
    points = zip(record.history, values, strict=True)
    return replace(record, history=tuple(replace(point, val_metrics={"accuracy": value}) for point, value in points))


def test_a_goal_by_a_metric_is_reached_from_below() -> None:
    (cell,) = group([
        scored("sgd", [0.1, 0.2, 0.3, 0.4]),
        scored("adam", [0.1, 0.6, 0.8, 0.9]),
        scored("adam", [0.1, 0.2, 0.3, 0.7], seed=1),
    ])
    found = goal_of(cell, measure=ACCURACY)
    assert found is not None
    # The worst of Adam's two final values: the smallest.
    assert (found.metric, found.label, found.higher_is_better) == ("accuracy", "accuracy", True)
    assert (found.value, found.reference) == (0.7, "Adam")
    assert found.origin == "the smallest final accuracy of Adam's finished runs"
    sgd, adam = found.rows
    assert (adam.reached, adam.epochs, adam.seconds) == (2, 2.5, 2.5)
    assert sgd.reached == 0
    given = goal_of(cell, 0.4, ACCURACY)
    assert given is not None
    assert [row.reached for row in given.rows] == [1, 2]
    assert given.origin == "given by the user"


def test_values_that_are_missing_or_not_finite_do_not_reach_a_goal() -> None:
    odd = [None, float("nan"), float("inf"), 0.5]
    (cell,) = group([scored("adam", odd), scored("sgd", [None, None, None, None])])
    found = goal_of(cell, measure=ACCURACY)
    assert found is not None
    assert (found.value, found.rows[0].epochs, found.rows[1].reached) == (0.5, 3, 0)
    absent = [replace(record, history=make_history([1.0, 0.5], metric="another")) for record in cell.records]
    (cell,) = group(absent)
    assert goal_of(cell, measure=ACCURACY) is None


def test_the_measure_comes_from_the_problem_and_none_is_the_loss() -> None:
    problem = make_problem("digits")
    assert measure_of(problem, "accuracy") == ACCURACY
    for name in (None, "val_loss"):
        assert (measure_of(problem, name).name, measure_of(problem, name).higher_is_better) == ("val_loss", False)
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy'"):
        measure_of(problem, "acuracy")


def test_a_metric_next_to_one_is_told_by_its_distance() -> None:
    measure = Measure("r2", "R2", higher_is_better=True)
    assert (measure.text(1 - 2.5e-8), measure.text(0.85), measure.text(1.0)) == ("1 - 2.5e-8", "0.850", "1.00")
