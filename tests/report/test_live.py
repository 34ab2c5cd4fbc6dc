"""Progress: plain lines in pipes, a live display on terminals."""

from __future__ import annotations

import io

from rich.console import Console

from made import make_record
from steepest.report.live import LiveListener, PlainListener, listener_for, run_line
from steepest.training.records import EpochPoint
from steepest.training.spec import RunSpec

SPEC = RunSpec("toy_1d", "sgd", {"lr": 0.1}, epochs=3)
POINT = EpochPoint(1, 10, 0.5, 0.3, None, {})


def watch(*, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=terminal, color_system=None)
    with listener_for(console) as listener:
        assert isinstance(listener, LiveListener if terminal else PlainListener)
        listener.begin("comparison", 2)
        listener.run_done(SPEC, make_record(), resumed=True)
        listener.run_started(SPEC, 2, 2)
        listener.epoch_done(SPEC, POINT)
        listener.run_done(SPEC, make_record(status="failed", error="[red]bad\nthing[/red]", final=None), resumed=False)
    return file.getvalue()


def test_plain_lines_are_one_per_run_without_control_codes() -> None:
    text = watch(terminal=False)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert len(lines) == 3
    assert lines[0] == "comparison: 2 runs"
    assert lines[1].endswith("already recorded")
    assert lines[2].startswith("[2/2] toy_1d")
    assert "failed  ([red]bad thing[/red])" in lines[2]


def test_the_live_display_shows_runs_and_bars() -> None:
    text = watch(terminal=True)
    assert "comparison" in text
    assert "2/2" in text
    assert "already recorded" in text
    assert "[red]bad" in text


def lines_of_epochs(*, every_epoch: bool) -> list[str]:
    file = io.StringIO()
    with listener_for(Console(file=file, width=120), every_epoch=every_epoch) as listener:
        listener.epoch_done(SPEC, EpochPoint(0, 0, 0.0, None, 0.9, {"r2": None}))
        listener.epoch_done(SPEC, EpochPoint(1, 10, 0.5, 0.3, 0.25, {"r2": 0.5}))
        listener.epoch_done(SPEC, POINT)
    return file.getvalue().splitlines()


def test_a_single_run_has_a_line_per_epoch_if_that_is_asked_for() -> None:
    assert lines_of_epochs(every_epoch=False) == []
    untrained, first, broken = lines_of_epochs(every_epoch=True)
    assert "train loss" not in untrained
    assert first.split() == ["epoch", "1/3", "train", "loss", "0.3", "val", "loss", "0.25", "r2", "0.5", "0.50", "s"]
    assert "val loss not finite" in broken


def test_an_optimizer_of_another_version_has_a_line_too() -> None:
    spec = RunSpec("theirs", "unheard_of", {"lr": "auto"})
    record = make_record(task="theirs", optimizer="unheard_of", options={"lr": "auto"})
    assert "unheard_of seed 0" in run_line(spec, record, resumed=False)
