"""Plots in files: right numbers in, valid files out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from made import make_history, make_problem, make_record
from steepest.report.axis import scale_of
from steepest.report.curves import series_of
from steepest.report.groups import Cell, group
from steepest.report.measure import Goals, Measure
from steepest.report.outcome import write_outcome
from steepest.report.plot import draw_curves, file_axes, save_plots
from steepest.report.style import FilePaint
from steepest.training.records import MetricNote, RunRecord

RECORDS = [
    make_record(optimizer=name, seed=seed, loss=loss * (1 + seed), seconds=seconds + seed)
    for name, loss, seconds in (("sven", 1e-8, 7.0), ("sgd", 1e-3, 2.0), ("adam", 1.1e-3, 3.0))
    for seed in range(3)
]


def cell_of(*records: RunRecord) -> Cell:
    (cell,) = group(records)
    return cell


def test_a_line_is_median_and_range_over_the_finished_runs() -> None:
    lost = make_record(optimizer="sgd", seed=3, status="diverged", error="nan", final=None)
    sgd = series_of(cell_of(*RECORDS, lost))[1]
    assert sgd.band is not None
    assert sgd.band.middle[-1] == pytest.approx(2e-3)
    assert (sgd.band.low[-1], sgd.band.high[-1]) == pytest.approx((1e-3, 3e-3))
    assert sgd.band.seconds[-1] == pytest.approx(3.0)
    assert (sgd.name, sgd.label) == ("SGD", "SGD (3 of 4 runs)")


def test_a_run_that_did_not_finish_is_a_line_as_far_as_it_was_finite() -> None:
    history = make_history([1.0, 5.0, None, 7.0])
    (series,) = series_of(cell_of(make_record(status="diverged", error="nan", final=None, history=history)))
    assert series.band is None
    assert [lost.values for lost in series.lost] == [(1.0, 5.0, 7.0)]


def test_runs_of_different_length_meet_at_the_epochs_that_all_reached() -> None:
    histories = [make_history([1.0] * length) for length in (4, 6)]
    (series,) = series_of(cell_of(*(make_record(seed=seed, history=history) for seed, history in enumerate(histories))))
    assert series.band is not None
    assert series.band.epochs == (0, 1, 2, 3)


def test_a_loss_that_is_not_finite_counts_as_infinitely_high() -> None:
    histories = [make_history([1.0, None, None]), make_history([1.0, 0.5, None]), make_history([1.0, 0.3, 0.2])]
    (series,) = series_of(cell_of(*(make_record(seed=seed, history=history) for seed, history in enumerate(histories))))
    assert series.band is not None
    assert series.band.middle[:2] == (1.0, 0.5)
    assert math.isnan(series.band.middle[2])


@pytest.mark.parametrize(
    ("values", "log"),
    [([1, 4], True), ([1, 2], False), ([0, 1e9], False), ([-1, 5], False), ([], False), ([math.nan, 1, 10], True)],
)
def test_an_axis_is_logarithmic_where_that_makes_sense(values: list[float], log: bool) -> None:
    scale = scale_of(values)
    assert scale.log is log
    assert all(scale.low < value < scale.top for value in values if math.isfinite(value))


def test_svg_and_png_are_valid_and_the_svg_is_the_same_every_time(tmp_path: Path) -> None:
    svg, png = save_plots(cell_of(*RECORDS), tmp_path / "a", subtitle="3 seeds")
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert png.read_bytes().startswith(b"\x89PNG")
    again, _ = save_plots(cell_of(*RECORDS), tmp_path / "b", subtitle="3 seeds")
    assert svg.read_bytes() == again.read_bytes()


def test_a_task_where_nothing_finished_still_has_a_plot(tmp_path: Path) -> None:
    lost = make_record(status="diverged", error="nan", final=None)
    assert all(path.exists() for path in save_plots(cell_of(lost), tmp_path))


def test_names_of_a_user_are_no_formulas(tmp_path: Path) -> None:
    svg, _ = save_plots(cell_of(make_record(task="$\\nothing{$", optimizer="$x^2$")), tmp_path)
    assert ET.parse(svg).getroot() is not None


def test_an_outcome_is_report_summary_and_plots(tmp_path: Path) -> None:
    files = write_outcome([*RECORDS, make_record(task="digits", optimizer="sven")], tmp_path, subtitle="3 seeds")
    assert [path.name for path in files["report"]] == ["report.html"]
    assert {path.name for path in files["summary"]} == {"summary.json", "summary.md"}
    assert {path.name for path in files["plots"]} == {"toy_1d.svg", "toy_1d.png", "digits.svg", "digits.png"}
    assert all(path.exists() for paths in files.values() for path in paths)
    assert (tmp_path / "summary.md").read_text().count("## ") == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_comparisons_of_one_task_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = write_outcome([make_record(epochs=3), make_record(epochs=5)], tmp_path, subtitle="1 seed")
    assert len({path.name for path in files["plots"]}) == 4


def test_a_goal_by_a_metric_has_a_plot_in_a_file_of_a_safe_name(tmp_path: Path) -> None:
    problem = make_problem(metrics=(MetricNote("../r 2", "R2", higher_is_better=True),))
    records = [
        make_record(optimizer=name, problem=problem, history=make_history([1.0, 0.5], metric="../r 2"))
        for name in ("sven", "adam")
    ]
    files = write_outcome(records, tmp_path, subtitle="1 seed", goals=Goals({"toy_1d": 0.6}, "../r 2"))
    assert {path.name for path in files["plots"]} == {
        "toy_1d.svg", "toy_1d.png", "toy_1d-_r_2.svg", "toy_1d-_r_2.png",
    }  # fmt: skip
    assert {path.parent for path in files["plots"]} == {tmp_path / "plots"}


def test_what_is_better_when_higher_is_drawn_on_an_even_axis_and_lost_runs_leave_it_below() -> None:
    measure = Measure("r2", "R2", higher_is_better=True)
    points = zip(make_history([1.0] * 4), (0.01, 0.9, -50.0, 0.5), strict=True)
    lost = tuple(replace(point, val_metrics={"r2": value}) for point, value in points)
    records = [
        make_record(optimizer="adam", history=tuple(replace(point, val_metrics={"r2": 0.3}) for point in lost)),
        make_record(optimizer="sgd", status="diverged", error="nan", final=None, history=lost),
    ]
    with file_axes("a title", "", 5) as (_, axes):
        draw_curves(axes, series_of(cell_of(*records), measure), FilePaint(), "epochs", measure=measure, goal=0.2)
        low, high = axes.get_ylim()
        assert axes.get_yscale() == "linear"
        assert low < 0.2 < 0.3 < high
        dotted = next(line for line in axes.get_lines() if line.get_linestyle() == ":")
        # Up to the edge at epoch 0 already: 0.01 is below it.
        assert list(dotted.get_xdata()) == [0.0]
        assert list(dotted.get_ydata()) == [low]
