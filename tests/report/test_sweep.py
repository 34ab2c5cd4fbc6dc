"""A large-batch study: one goal for all batch sizes, drawn and tabulated across them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from made import make_history, make_record
from report.pages import check_harmless, read_page, table_named
from steepest.report.groups import group, studies
from steepest.report.html import render_report
from steepest.report.measure import Goals
from steepest.report.outcome import write_outcome
from steepest.report.plot import file_axes
from steepest.report.style import FilePaint
from steepest.report.sweep import Sweep, sweeps_of
from steepest.report.sweep_charts import charts_of, draw_sweep, sweep_series
from steepest.report.sweep_grids import sweep_grids
from steepest.report.sweep_table import print_sweep, sweep_json
from steepest.training.records import Final, RunRecord


def run(optimizer: str, batch: int, losses: list[float | None], *, seed: int = 0, **changes: object) -> RunRecord:
    """A run of 3 s whose accuracy is 1 - loss."""
    history = tuple(
        replace(point, val_metrics={"accuracy": None if point.val_loss is None else 1 - point.val_loss})
        for point in make_history(losses, seconds=3.0)
    )
    last = losses[-1] or 0.0
    made = {
        "task": "digits",
        "batch_size": batch,
        "seed": seed,
        "history": history,
        "samples": (256, 50, 50),
        "final": Final(last, last, {"accuracy": 1 - last}, {"accuracy": 1 - last}),
    }
    return make_record(optimizer=optimizer, **{**made, **changes})  # type: ignore[arg-type]


RECORDS = [
    run("adamw", 256, [0.9, 0.8, 0.7, 0.6]),
    run("adamw", 256, [0.9, 0.8, 0.7, 0.2], seed=1),
    run("fop", 256, [0.9, 0.2, 0.1, 0.1]),
    run("fop", 256, [0.9, 0.8, 0.2, 0.1], seed=1),
    run("adamw", 16, [0.9, 0.5, 0.4, 0.3]),
    run("adamw", 16, [0.9, 0.5, 0.25, 0.2], seed=1),
    run("fop", 16, [0.9, 0.8, 0.7, 0.3]),
    run("fop", 16, [0.9, 0.8, 0.7, 0.3], seed=1),
    run("kfac", 64, [0.9, 0.9, None, None], status="diverged", error="nan", final=None),
    run("fop", 64, [0.9, 0.5, 0.25, 0.1]),
]


def sweep(records: list[RunRecord] = RECORDS, goals: Goals | None = None) -> Sweep:
    (found,) = sweeps_of(group(records), goals)
    return found


def rows(found: Sweep, name: str) -> list[list[str]]:
    (grid,) = [grid for grid in sweep_grids(found) if grid.name.startswith(name)]
    return [[" ".join(filter(None, (e.text, e.detail, "*" * e.best))) for e in row] for row in grid.rows]


def test_the_goal_is_what_the_reference_reaches_at_the_smallest_batch_size() -> None:
    found = sweep()
    assert found.sizes == (16, 64, 256)
    assert found.goal is not None
    assert (found.goal.value, found.goal.metric, found.goal.given) == (0.3, "val_loss", False)
    assert found.goal.origin == "the largest final loss of AdamW's finished runs at batch size 16"


def test_a_given_goal_and_a_goal_by_a_metric_hold_at_all_batch_sizes() -> None:
    given = sweep(goals=Goals({"digits": 0.85}, "accuracy")).goal
    assert given is not None
    assert (given.value, given.metric, given.origin) == (0.85, "accuracy", "given by the user")
    default = sweep(goals=Goals(metric="accuracy")).goal
    assert default is not None
    assert default.value == pytest.approx(0.7)
    assert default.origin == "the smallest final accuracy of AdamW's finished runs at batch size 16"


def test_where_nothing_finished_at_the_smallest_batch_size_the_next_sets_the_goal() -> None:
    lost = run("adamw", 8, [0.9, None], status="diverged", error="nan", final=None)
    goal = sweep([lost, *RECORDS]).goal
    assert goal is not None
    assert goal.origin.endswith("at batch size 16")
    nothing = sweep([lost, replace(lost, batch_size=16)])
    assert nothing.goal is None
    assert charts_of(nothing) == []
    assert next(grid.name for grid in sweep_grids(nothing)).startswith("Final validation loss")


def test_the_table_has_epochs_and_seconds_and_how_many_runs_got_there() -> None:
    assert rows(sweep(), "Epochs / seconds to a validation loss of 0.300") == [
        ["AdamW", "2.5 / 2.50 *", "not run", "3 / 3.00 1 of 2"],
        ["FOP", "3 / 3.00", "2 / 2.00", "1.5 / 1.50 *"],
        ["KFAC", "not run", "- 0 of 1", "not run"],
    ]


def test_final_losses_and_metrics_are_tables_too() -> None:
    found = sweep()
    assert rows(found, "Final validation loss (cross-entropy)")[:2] == [
        ["AdamW", "0.250 ± 0.071 *", "not run", "0.400 ± 0.28"],
        ["FOP", "0.300 ± 0", "0.100", "0.100 ± 0 *"],
    ]
    assert rows(found, "Final validation accuracy")[0][1:] == ["0.7500 ± 0.071 *", "not run", "0.6000 ± 0.28"]
    assert rows(found, "Final validation accuracy")[2][2] == "- 0 of 1"


def test_a_line_has_a_point_where_runs_reach_the_goal_and_a_hollow_one_where_not_all_do() -> None:
    found = sweep()
    epochs, seconds = charts_of(found)
    assert (epochs.key, seconds.key) == ("epochs", "seconds")
    adamw, fop, kfac = sweep_series(found, seconds.read)
    assert adamw.band is not None
    assert fop.band is not None
    assert adamw.band.middle == (2.5, 3.0)
    assert fop.band.middle == (3.0, 2.0, 1.5)
    assert kfac.band is None
    # Side by side, and still nearer to their own batch size than to any other.
    assert adamw.band.epochs[0] < 16 < fop.band.epochs[0]
    assert all(abs(math.log2(x / size)) < 0.2 for x, size in zip(fop.band.epochs, found.sizes, strict=True))
    with file_axes("a title", "", 5) as (_, axes):
        draw_sweep(axes, found, seconds, sweep_series(found, seconds.read), FilePaint())
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "64", "256"]
        markers = [line for line in axes.get_lines() if line.get_marker() == "o" and math.isfinite(line.get_ydata()[0])]
        hollow = [line.get_ydata()[0] for line in markers if line.get_markerfacecolor() == FilePaint.paper]
        assert len(markers) == 5
        assert hollow == [3.0]
        # AdamW was not run at 64: its line is broken there.
        (broken,) = [line for line in axes.get_lines() if len(line.get_ydata()) == 3 and line.get_ydata()[0] == 2.5]
        assert math.isnan(broken.get_ydata()[1])


def test_the_measured_r_is_drawn_where_records_hold_it() -> None:
    measured = [
        replace(
            record,
            history=tuple(
                replace(point, diagnostics={"r": record.batch_size / 1000 + point.epoch} if point.epoch else {})
                for point in record.history
            ),
        )
        if record.optimizer == "fop"
        else record
        for record in RECORDS
    ]
    found = sweep(measured)
    assert [chart.key for chart in charts_of(found)] == ["epochs", "seconds", "r"]
    fop = next(row for row in found.rows if row.optimizer == "fop")
    assert [place.r if place else None for place in fop.places] == pytest.approx([2.016, 2.064, 2.256])
    root = read_page(render_report(measured))
    assert "Measured r of FOP's projection" in [caption.text() for caption in root.all("figcaption")]
    assert "r is the squared cosine" in root.all("section")[0].text()


def test_the_section_stands_before_those_of_its_batch_sizes_and_says_who_is_first() -> None:
    other = [make_record(task="toy_1d", optimizer=name) for name in ("adam", "sven")]
    page = render_report([*other, *RECORDS])
    root = read_page(page)
    check_harmless(page, root)
    titles = [" ".join(heading.text().split()) for heading in root.all("h2")]
    assert titles[:5] == ["toy_1d", "Batch sizes digits", "digits batch 256", "digits batch 16", "digits batch 64"]
    text = " ".join(root.all("section")[1].text().split())
    assert "at batch size 16, 64 and 256, the whole training split." in text
    assert "Each batch size by itself has a goal of its own." in text
    assert "Fewest epochs to a validation loss of 0.300: AdamW at 16; FOP at 64 and 256. Fewest seconds:" in text
    table = table_named(root, "Epochs / seconds to a validation loss of 0.300")
    assert table[0] == ["optimizer", "batch 16", "batch 64", "batch 256 (all)"]
    assert table[1] == ["AdamW", "2.5 / 2.50★", "not run", "3 / 3.00 1 of 2"]
    label = root.all("section")[1].all("svg")
    told = [svg.attributes["aria-label"] for svg in label if svg.attributes.get("role") == "img"]
    assert "FOP: 3.00 at 16, 2.00 at 64, 1.50 at 256." in told[0]


def test_a_goal_that_nobody_or_the_untrained_model_reaches_is_said_and_not_drawn() -> None:
    for goal, words in ((1e-9, "No run reaches a validation loss of 1.00e-9."), (5.0, "such a goal says nothing")):
        root = read_page(render_report(RECORDS, goals=Goals({"digits": goal})))
        section = root.all("section")[0]
        assert words in section.text()
        assert not section.all("figure")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x$", "{{ 7 * 7 }}", "a&b"])
def test_names_of_a_user_are_text(name: str) -> None:
    renamed = [
        replace(record, task=name, optimizer=record.optimizer + name, problem=replace(record.problem, loss=name))
        for record in RECORDS
    ]
    page = render_report(renamed)
    root = read_page(page)
    check_harmless(page, root)
    assert root.all("h2")[0].text() == f"Batch sizes {name}"


def test_one_batch_size_or_other_conditions_are_no_study() -> None:
    assert studies(group([record for record in RECORDS if record.batch_size == 16])) == []
    assert studies(group([RECORDS[0], replace(RECORDS[4], schedule="constant")])) == []
    assert "Batch sizes" not in render_report(RECORDS[:4])


def test_two_studies_of_one_task_are_told_apart() -> None:
    longer = [replace(record, epochs=9) for record in RECORDS]
    first, second = studies(group([*RECORDS, *longer]))
    assert (first.variant, second.variant) == ("epochs 3", "epochs 9")
    assert (first.stem, second.stem) == ("digits-batch_sizes-1", "digits-batch_sizes-2")
    assert first.sizes == second.sizes == (16, 64, 256)


def test_the_terminal_shows_the_same_table() -> None:
    file = io.StringIO()
    print_sweep(Console(file=file, width=80), sweep())
    lines = file.getvalue().splitlines()
    assert lines[0] == "Batch sizes: digits"
    assert "0.300: the largest final loss of AdamW's finished runs at batch size 16." in lines[1]
    adamw = next(line.split() for line in lines if line.strip().startswith("AdamW"))
    assert adamw == ["AdamW", "2.5", "/", "2.50", "*", "not", "run", "3", "/", "3.00", "(1", "of", "2)"]


def test_files_have_the_charts_the_tables_and_the_numbers(tmp_path: Path) -> None:
    files = write_outcome(RECORDS, tmp_path, subtitle="2 seeds")
    names = {path.name for path in files["plots"]}
    assert {f"digits-batch_sizes-{key}.{kind}" for key in ("epochs", "seconds") for kind in ("svg", "png")} <= names
    assert "| AdamW | **2.5 / 2.50** | not run | 3 / 3.00 (1 of 2) |" in (tmp_path / "summary.md").read_text()
    (found,) = json.loads((tmp_path / "summary.json").read_text())["sweeps"]
    assert found == json.loads(json.dumps(sweep_json([sweep()])[0]))
    assert found["goal"]["value"] == 0.3
    assert [place and place["reach"]["reached"] for place in found["rows"][0]["places"]] == [2, None, 1]
