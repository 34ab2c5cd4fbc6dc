"""Plots: right numbers in, valid files out."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from made import make_record
from steepest.report.outcome import write_outcome
from steepest.report.plot import curves, save_loss_plot

RECORDS = [
    make_record(optimizer=name, seed=seed, loss=loss * (1 + seed), seconds=seconds + seed)
    for name, loss, seconds in (("sven", 1e-8, 7.0), ("sgd", 1e-3, 2.0), ("adam", 1.1e-3, 3.0))
    for seed in range(3)
]


def test_a_curve_is_median_and_range_over_the_finished_runs() -> None:
    lost = make_record(optimizer="sgd", seed=3, status="diverged", error="nan", final=None)
    sgd = next(curve for curve in curves([*RECORDS, lost]) if curve.optimizer == "sgd")
    assert sgd.middle[-1] == pytest.approx(2e-3)
    assert (sgd.low[-1], sgd.high[-1]) == pytest.approx((1e-3, 3e-3))
    assert sgd.seconds[-1] == pytest.approx(3.0)
    assert sgd.label == "SGD (3 of 4 runs)"


def test_runs_of_different_length_meet_at_the_epochs_that_all_reached() -> None:
    (curve,) = curves([make_record(epochs=3), make_record(seed=1, epochs=5)])
    assert len(curve.seconds) == 4


def test_svg_and_png_are_valid_and_the_svg_is_the_same_every_time(tmp_path: Path) -> None:
    svg, png = save_loss_plot(RECORDS, tmp_path / "a", subtitle="3 seeds")
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert png.read_bytes().startswith(b"\x89PNG")
    again, _ = save_loss_plot(RECORDS, tmp_path / "b", subtitle="3 seeds")
    assert svg.read_bytes() == again.read_bytes()


def test_a_task_where_nothing_finished_still_has_a_plot(tmp_path: Path) -> None:
    lost = make_record(status="diverged", error="nan", final=None)
    assert all(path.exists() for path in save_loss_plot([lost], tmp_path))


def test_an_outcome_is_summary_and_plots(tmp_path: Path) -> None:
    files = write_outcome([*RECORDS, make_record(task="digits", optimizer="sven")], tmp_path, subtitle="3 seeds")
    assert {path.name for path in files["summary"]} == {"summary.json", "summary.md"}
    assert {path.name for path in files["plots"]} == {"toy_1d.svg", "toy_1d.png", "digits.svg", "digits.png"}
    assert (tmp_path / "summary.md").read_text().count("## ") == 2
    assert not list(tmp_path.rglob("*.tmp"))
