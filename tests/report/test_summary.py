"""Means, standard deviations and who is best."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, stdev

import pytest

from made import make_record
from steepest.report.labels import spread_positions
from steepest.report.summary import best_rows, summarise
from steepest.training.records import Final

SVEN = [make_record(optimizer="sven", seed=seed, loss=loss) for seed, loss in enumerate([1e-8, 3e-8, 2e-8])]
ADAM = [make_record(optimizer="adam", seed=seed, loss=1e-4, seconds=1.0) for seed in range(3)]
LUCKY = [
    make_record(optimizer="sgd", seed=0, loss=1e-12),
    make_record(optimizer="sgd", seed=1, status="diverged", error="nan", final=None),
    make_record(optimizer="sgd", seed=2, status="timed_out", error="late", final=None),
]


def test_a_row_is_mean_and_sample_deviation_over_the_finished_runs() -> None:
    (summary,) = summarise(SVEN + ADAM + LUCKY)
    assert (summary.task, summary.metric, summary.loss_label) == ("toy_1d", "r2", "squared error")
    sven, adam, sgd = summary.rows
    losses = [1e-8, 3e-8, 2e-8]
    assert sven.numbers["val_loss"].mean == pytest.approx(fmean(losses))
    assert sven.numbers["val_loss"].std == pytest.approx(stdev(losses))
    assert adam.numbers["ms_per_step"].mean == pytest.approx(1e3 * 1.0 / 30)
    assert (sgd.finished, sgd.attempted, sgd.problems) == (1, 3, ("diverged", "timed_out"))
    assert sgd.numbers["val_loss"].std is None


def test_a_lucky_seed_does_not_make_an_optimizer_the_best() -> None:
    (summary,) = summarise(SVEN + ADAM + LUCKY)
    assert best_rows(summary, "val_loss") == {"sven"}
    assert best_rows(summary, "seconds") == {"adam"}


def test_higher_is_better_where_the_metric_says_so() -> None:
    low = make_record(task="digits", optimizer="sgd", final=Final(1.0, 1.0, {"accuracy": 0.9}, {"accuracy": 0.8}))
    high = make_record(task="digits", optimizer="adam", final=Final(1.0, 1.0, {"accuracy": 0.9}, {"accuracy": 0.9}))
    (summary,) = summarise([low, high])
    assert best_rows(summary, "metric", higher=True) == {"adam"}
    assert best_rows(summary, "val_loss") == {"sgd", "adam"}


def test_nobody_is_best_where_nothing_finished() -> None:
    (summary,) = summarise(LUCKY[1:])
    assert best_rows(summary, "val_loss") == set()
    assert summary.rows[0].numbers == {}


def test_tasks_keep_their_order() -> None:
    records = [make_record(task="toy_1d"), make_record(task="diabetes")]
    assert [summary.task for summary in summarise(records)] == ["toy_1d", "diabetes"]


@pytest.mark.parametrize(
    "wanted", [[], [0.3], [0.5, 0.5, 0.5], [0.1, 0.12, 0.9], [0.9, 0.1, 0.11], [0.0, 0.05, 0.1, 0.15]]
)
def test_labels_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    places = spread_positions(wanted, gap=0.1)
    assert len(places) == len(wanted)
    ranked = sorted(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ranked))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert [places[index] for index in order] == ranked
