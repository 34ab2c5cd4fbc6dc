"""Plots in files: right numbers in, valid files out."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from made import make_history, make_record
from steepest.report.axis import scale_of
from steepest.report.curves import series_of
from steepest.report.groups import Cell, group
from steepest.report.outcome import write_outcome
from steepest.report.plot import save_loss_plot
from steepest.training.records import RunRecord

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
    svg, png = save_loss_plot(cell_of(*RECORDS), tmp_path / "a", subtitle="3 seeds")
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert png.read_bytes().startswith(b"\x89PNG")
    again, _ = save_loss_plot(cell_of(*RECORDS), tmp_path / "b", subtitle="3 seeds")
    assert svg.read_bytes() == again.read_bytes()


def test_a_task_where_nothing_finished_still_has_a_plot(tmp_path: Path) -> None:
    lost = make_record(status="diverged", error="nan", final=None)
    assert all(path.exists() for path in save_loss_plot(cell_of(lost), tmp_path))


def test_names_of_a_user_are_no_formulas(tmp_path: Path) -> None:
    svg, _ = save_loss_plot(cell_of(make_record(task="$\\nothing{$", optimizer="$x^2$")), tmp_path)
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
