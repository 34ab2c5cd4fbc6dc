"""Progress: plain lines in pipes, a live display on terminals."""

from __future__ import annotations

import io

from rich.console import Console

from made import make_history, make_record
from steepest.report.live import LiveListener, PlainListener, epoch_line, listener_for, run_line
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


def told(losses: list[float | None], *, terminal: bool, every_epoch: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=terminal, color_system=None)
    with listener_for(console, every_epoch=every_epoch) as listener:
        listener.begin("comparison", 2)
        for number in (1, 2):
            listener.run_started(SPEC, number, 2)
            for point in make_history(losses):
                listener.epoch_done(SPEC, point)
    return file.getvalue()


LOST: list[float | None] = [2.0, 0.3, 0.1, 30.0, 40.0, 50.0, 60.0]


def test_a_validation_loss_that_blew_up_is_warned_of_once_in_every_run() -> None:
    words = (
        "warning: the validation loss has blown up: 40 after epoch 4, 2 before training and 0.1 at its best; "
        "a smaller lr or more damping shortens the steps"
    )
    lines = told(LOST, terminal=False).splitlines()
    assert [line for line in lines if "warning" in line] == [words] * 2
    assert lines[lines.index(words) - 1].startswith("epoch   4/3")
    brief = told(LOST, terminal=False, every_epoch=False).splitlines()
    assert brief == ["comparison: 2 runs", f"[1/2] {words}", f"[2/2] {words}"]
    assert words in told(LOST, terminal=True)
    assert "warning" not in told([2.0, 0.3, 0.1, 30.0, 0.2, 30.0], terminal=False)


def test_the_line_of_a_run_tells_where_it_blew_up() -> None:
    line = run_line(SPEC, make_record(history=make_history(LOST)), resumed=False)
    assert line.endswith("finished  (the validation loss blew up at epoch 3)")
    assert "blew up" not in run_line(SPEC, make_record(), resumed=False)


def test_a_small_metric_keeps_its_digits() -> None:
    line = epoch_line(SPEC, EpochPoint(1, 10, 0.5, 0.3, 0.25, {"relative_error": 1.98765e-7, "r2": 1 - 3e-9}))
    assert "relative_error 1.988e-7  r2 1 - 3.0e-9" in line
