"""Means, standard deviations and who is best."""

from __future__ import annotations

from statistics import fmean, stdev

import pytest

from made import make_problem, make_record
from steepest.report.summary import TaskSummary, best_rows, summarise
from steepest.training.records import Final

SVEN = [make_record(optimizer="sven", seed=seed, loss=loss) for seed, loss in enumerate([1e-8, 3e-8, 2e-8])]
ADAM = [make_record(optimizer="adam", seed=seed, loss=1e-4, seconds=1.0) for seed in range(3)]
LUCKY = [
    make_record(optimizer="sgd", seed=0, loss=1e-12),
    make_record(optimizer="sgd", seed=1, status="diverged", error="nan", final=None),
    make_record(optimizer="sgd", seed=2, status="timed_out", error="late", final=None),
]


def names_of_best(summary: TaskSummary, number: str, *, higher: bool = False) -> set[str]:
    return {row.optimizer for row in best_rows(summary, number, higher=higher)}


def test_a_row_is_mean_deviation_and_range_over_the_finished_runs() -> None:
    (summary,) = summarise(SVEN + ADAM + LUCKY)
    assert (summary.task, summary.metric, summary.loss_label) == ("toy_1d", "r2", "squared error")
    sven, adam, sgd = summary.rows
    losses = [1e-8, 3e-8, 2e-8]
    assert sven.numbers["val_loss"].mean == pytest.approx(fmean(losses))
    assert sven.numbers["val_loss"].std == pytest.approx(stdev(losses))
    assert (sven.numbers["val_loss"].low, sven.numbers["val_loss"].high) == (1e-8, 3e-8)
    assert adam.numbers["ms_per_step"].mean == pytest.approx(1e3 * 1.0 / 30)
    assert (sgd.finished, sgd.attempted, sgd.problems) == (1, 3, ("diverged", "timed_out"))
    assert sgd.numbers["val_loss"].std is None


def test_a_lucky_seed_does_not_make_an_optimizer_the_best() -> None:
    (summary,) = summarise(SVEN + ADAM + LUCKY)
    assert names_of_best(summary, "val_loss") == {"sven"}
    assert names_of_best(summary, "seconds") == {"adam"}


def test_higher_is_better_where_the_metric_says_so() -> None:
    low = make_record(task="digits", optimizer="sgd", final=Final(1.0, 1.0, {"accuracy": 0.9}, {"accuracy": 0.8}))
    high = make_record(task="digits", optimizer="adam", final=Final(1.0, 1.0, {"accuracy": 0.9}, {"accuracy": 0.9}))
    (summary,) = summarise([low, high])
    assert names_of_best(summary, "metric", higher=True) == {"adam"}
    assert names_of_best(summary, "val_loss") == {"sgd", "adam"}


def test_nobody_is_best_where_nothing_finished() -> None:
    (summary,) = summarise(LUCKY[1:])
    assert best_rows(summary, "val_loss") == []
    assert summary.rows[0].numbers == {}


def test_words_come_from_the_records_and_not_from_a_registry() -> None:
    problem = make_problem(description="a table of somebody", loss="their loss", metrics=(), notes=("inferred",))
    (summary,) = summarise([make_record(task="theirs", optimizer="their_own", problem=problem)])
    assert (summary.description, summary.loss_label, summary.notes) == (
        "a table of somebody",
        "their loss",
        ("inferred",),
    )
    assert summary.metric is None
    assert "metric" not in summary.rows[0].numbers
    assert summary.rows[0].label == "their_own"
