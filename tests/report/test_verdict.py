"""The sentences: right numbers, and no more certainty than there is."""

from __future__ import annotations

from made import make_record
from steepest.report.measure import Goals
from steepest.report.summary import summarise
from steepest.report.verdict import verdict
from steepest.training.records import RunRecord


def runs(optimizer: str, *losses: float, seconds: float = 2.0) -> list[RunRecord]:
    return [make_record(optimizer=optimizer, seed=seed, loss=loss, seconds=seconds) for seed, loss in enumerate(losses)]


def lost(optimizer: str, status: str, seed: int = 0) -> RunRecord:
    return make_record(optimizer=optimizer, seed=seed, status=status, error="x", final=None, history=())


def said(records: list[RunRecord], goals: dict[str, float] | None = None, metric: str | None = None) -> str:
    (summary,) = summarise(records, Goals(goals or {}, metric))
    return " ".join(verdict(summary))


def test_the_winner_is_named_with_the_distance_to_the_next() -> None:
    text = said([*runs("adam", 0.2, 0.22), *runs("sven", 0.1, 0.11), *runs("sgd", 0.5, 0.5)])
    assert "Sven has the lowest mean validation loss, 0.105; Adam is next with 0.210, 2.0 times as much." in text
    assert "do not overlap" in text
    assert "Sven is the first to reach the goal of 0.220" in text


def test_a_small_distance_is_told_in_percent() -> None:
    assert "Adam is next with 0.101, 1.0 % more." in said([*runs("adam", 0.101), *runs("sven", 0.1)])


def test_overlapping_ranges_are_told() -> None:
    assert "overlap, so their order may be chance" in said([*runs("adam", 0.1, 0.3), *runs("sven", 0.1, 0.2)])


def test_one_seed_proves_nothing() -> None:
    assert "With one seed each, the order may be chance." in said([*runs("adam", 0.3), *runs("sven", 0.1)])


def test_rows_with_fewer_finished_runs_are_not_ranked() -> None:
    text = said([*runs("adam", 0.3, 0.3), *runs("sven", 0.1), lost("sven", "diverged", 1)])
    assert text.startswith("Adam ends at a mean validation loss of 0.300.")
    assert "Not ranked, because fewer runs finished: Sven (1 of 2)." in text


def test_equal_means_are_shared() -> None:
    assert "Adam and Sven share the lowest mean" in said([*runs("adam", 0.1), *runs("sven", 0.1)])


def test_nothing_finished_is_said() -> None:
    records = [lost("adam", "diverged"), lost("adam", "timed_out", 1), lost("sven", "diverged")]
    assert said(records) == "No run finished: 2 diverged and 1 timed out."


def test_a_single_row_is_not_called_the_lowest() -> None:
    assert said(runs("sven", 0.1)) == "Sven ends at a validation loss of 0.100."
    assert said(runs("sven", 0.1, 0.3)).startswith("Sven ends at a mean validation loss of 0.200, from 0.100 to 0.300")


def test_a_goal_is_reached_first_alone_or_by_nobody() -> None:
    both = [*runs("adam", 0.1, seconds=4.0), *runs("sven", 0.1, seconds=1.0)]
    assert "Sven is the first to reach" in said(both)
    assert "Adam takes 4.00 s, 4.0 times as long." in said(both)
    assert "Sven alone reaches the goal of 0.100" in said([*runs("adam", 0.3), *runs("sven", 0.1)], {"toy_1d": 0.1})
    assert "No run reaches the goal of 1.00e-9." in said(both, {"toy_1d": 1e-9})


def test_losses_of_zero_and_below_need_no_ratio() -> None:
    assert "Adam is next with 0.100." in said([*runs("adam", 0.1), *runs("sven", 0.0)])
    assert "lowest mean validation loss, -1.00; Adam is next with 0.100." in said([
        *runs("adam", 0.1),
        *runs("sven", -1.0),
    ])


def test_a_goal_by_a_metric_is_named() -> None:
    records = [*runs("adam", 0.1, seconds=4.0), *runs("sven", 0.1, seconds=1.0)]
    text = said(records, {"toy_1d": 0.75}, "r2")
    assert "No run reaches the goal of 0.750 validation R2." in text
    # Records made by hand have an R2 of 0.5 before the first step.
    assert "The untrained model meets the goal of 0.500 validation R2, which so says nothing." in said(
        records, metric="r2"
    )
