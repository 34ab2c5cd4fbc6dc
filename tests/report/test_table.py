"""Tables on terminals of several widths, in pipes and in Markdown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from made import make_history, make_problem, make_record
from steepest.report.columns import ending
from steepest.report.measure import Goals
from steepest.report.outcome import write_outcome
from steepest.report.summary import summarise
from steepest.report.table import cells, headings, markdown_table, print_task_table, summary_json
from steepest.training.records import Final, MetricNote

RECORDS = [
    make_record(optimizer=name, seed=seed, loss=loss)
    for name, loss in (("sven", 1e-8), ("sgd", 1e-3))
    for seed in range(3)
] + [make_record(optimizer="adam", seed=0, status="diverged", error="nan", final=None)]


def printed(width: int, *, terminal: bool, title: str = "a title", goal: float | None = None) -> str:
    (summary,) = summarise(RECORDS, None if goal is None else Goals({"toy_1d": goal}))
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    print_task_table(console, summary, title=title, caption="a caption")
    return file.getvalue()


def test_a_pipe_gets_everything_on_one_line_per_optimizer() -> None:
    text = printed(80, terminal=False)
    assert "…" not in text
    for heading in ("val loss", "test loss", "test R2", "seconds", "ms/step", "steps", "peak memory", "finished"):
        assert heading in text
    assert "±" in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_gets_what_fits(width: int) -> None:
    text = printed(width, terminal=True)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for heading in ("val loss", "test R2", "seconds", "peak memory", "finished"):
        assert heading in text
    assert ("±" in text) is (width == 200)


def test_the_best_is_starred_and_a_diverged_run_is_shown() -> None:
    (summary,) = summarise(RECORDS)
    sven, sgd, adam = (dict(zip(headings(summary), cells(summary, row), strict=True)) for row in summary.rows)
    assert sven["val loss"] == ("1.00e-8 ± 0", True)
    assert sgd["val loss"][1] is False
    assert adam["finished"][0] == "0/1 (1 diverged)"
    assert adam["val loss"] == ("-", False)


def test_text_of_a_user_is_no_markup() -> None:
    assert "[red]odd[/red] [/nothing]" in printed(200, terminal=False, title="[red]odd[/red] [/nothing]")


def test_markdown_has_one_line_per_optimizer_and_the_best_in_bold() -> None:
    (summary,) = summarise(RECORDS)
    lines = markdown_table(summary).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "**1.00e-8 ± 0**" in lines[2]


def test_an_r2_next_to_one_shows_its_distance() -> None:
    record = make_record()
    assert record.final is not None
    record.final.test_metrics["r2"] = 1 - 2.5e-8
    (summary,) = summarise([record])
    assert dict(zip(headings(summary), cells(summary, summary.rows[0]), strict=True))["test R2"][0] == "1 - 2.5e-8"


def test_json_is_json() -> None:
    data = json.loads(json.dumps(summary_json(summarise(RECORDS))))
    assert data[0]["rows"][0]["numbers"]["val_loss"]["count"] == 3


def test_the_times_to_the_goal_are_a_table_of_their_own() -> None:
    lines = printed(200, terminal=False, goal=1e-3).splitlines()
    assert any("Goal: validation loss 0.00100, given by the user." in line for line in lines)
    sven, sgd, adam = ([word for word in line.split() if word] for line in lines[-4:-1])
    assert sven == ["Sven", "3/3", "2", "1.33", "1.0", "x"]
    assert sgd == ["SGD", "3/3", "3", "2.00", "1.5", "x"]
    assert adam == ["Adam", "0/1", "-", "-", "-"]


def test_json_tells_the_goal_and_who_reached_it() -> None:
    data = json.loads(json.dumps(summary_json(summarise(RECORDS))))
    assert data[0]["goal"]["reference"] == "Sven"
    assert [row["reached"] for row in data[0]["goal"]["rows"]] == [3, 0, 0]


def test_a_bar_in_a_name_does_not_break_markdown() -> None:
    (summary,) = summarise([make_record(optimizer="a|b")])
    assert "a\\|b" in markdown_table(summary)


def test_equal_values_are_not_starred() -> None:
    (summary,) = summarise([make_record(optimizer="sven"), make_record(optimizer="sgd")])
    assert not any(best for row in summary.rows for _, best in cells(summary, row))


def test_all_metrics_are_shown_even_on_a_narrow_terminal() -> None:
    metrics = (
        MetricNote("accuracy", "accuracy", higher_is_better=True),
        MetricNote("rare", "accuracy of rare classes", higher_is_better=True),
    )
    final = Final(0.1, 0.1, {}, {"accuracy": 0.9, "rare": 0.4321})
    record = make_record(task="digits", problem=make_problem("digits", metrics=metrics), final=final)
    (summary,) = summarise([record])
    shown = {}
    for width in (80, 200):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=True, color_system=None)
        print_task_table(console, summary, title="a title")
        shown[width] = file.getvalue()
        assert max(map(len, shown[width].splitlines())) <= width
        assert "0.4321" in shown[width]
        assert "…" not in shown[width]
    assert "test accuracy of rare classes" in shown[200]
    assert "test accuracy of rare classes" in markdown_table(summary)


def test_the_goal_of_a_metric_is_told_with_its_name() -> None:
    (summary,) = summarise(RECORDS, Goals({"toy_1d": 0.25}, "r2"))
    file = io.StringIO()
    print_task_table(Console(file=file, width=200), summary, title="a title")
    assert "Goal: validation R2 0.250, given by the user." in file.getvalue()
    goal = json.loads(json.dumps(summary_json([summary])))[0]["goal"]
    assert (goal["metric"], goal["label"], goal["higher_is_better"], goal["value"]) == ("r2", "R2", True, 0.25)


def test_a_small_error_keeps_its_digits_in_every_form(tmp_path: Path) -> None:
    records = [make_record(optimizer=name, seed=seed) for name in ("sven", "sgd") for seed in (0, 1)]
    for record in records:
        assert record.final is not None
        record.final.test_metrics["r2"] = 2.3456e-7
    (summary,) = summarise(records)
    assert dict(zip(headings(summary), cells(summary, summary.rows[0]), strict=True))["test R2"][0] == "2.346e-7 ± 0"
    write_outcome(records, tmp_path, subtitle="")
    for name in ("report.html", "summary.md"):
        assert "2.346e-7" in (tmp_path / name).read_text("utf-8")
    assert json.loads((tmp_path / "summary.json").read_text("utf-8"))["tasks"][0]["rows"][0]["numbers"]["metric"][
        "mean"
    ] == pytest.approx(2.3456e-7)


def test_a_run_that_blew_up_is_counted_where_the_finished_ones_are() -> None:
    lost = make_record(seed=1, history=make_history([1.0, 0.05, 3.0, 4.0]))
    summaries = summarise([make_record(seed=0), lost])
    (row,) = summaries[0].rows
    assert ending(row) == "2/2 (1 blew up)"
    assert json.loads(json.dumps(summary_json(summaries)))[0]["rows"][0]["blow_ups"] == 1
    gone = make_record(seed=2, status="diverged", final=None, history=lost.history)
    assert ending(summarise([gone])[0].rows[0]) == "0/1 (1 diverged)"
