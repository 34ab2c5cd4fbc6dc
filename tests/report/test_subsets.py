"""Runs on subsets beside runs on everything: rows of their own, one goal, and what was selected."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from made import make_history, make_record
from report.pages import check_harmless, read_page, table_named
from steepest.commands.output import print_tables
from steepest.report.goal import goal_of
from steepest.report.groups import group, label_of
from steepest.report.html import render_report
from steepest.report.live import run_line
from steepest.report.measure import Goals
from steepest.report.names import short_names
from steepest.report.plot import save_plots
from steepest.report.subsets import SELECTION_NOTE, subset_grid
from steepest.report.summary import summarise
from steepest.report.sweep import sweeps_of
from steepest.report.table import headings, summary_json
from steepest.training.records import RunRecord, Selected
from steepest.training.spec import RunSpec


def chosen(epochs: Sequence[int] = (2,), *, kept: int = 10, wrong: tuple[int, int] | None = None) -> dict[str, object]:
    made = tuple(Selected(epoch, kept, 0.25, wrong, "d" * 16, ("a <note>",), {"certificate": 0.5}) for epoch in epochs)
    return {"selections": made}


def run(
    select: str | None, *, optimizer: str = "adamw", seed: int = 0, loss: float = 0.1, **changes: object
) -> RunRecord:
    if select is not None and "selections" not in changes:
        changes |= chosen()
    return make_record(optimizer=optimizer, select=select, seed=seed, loss=loss, **changes)  # type: ignore[arg-type]


RECORDS = [
    run(select, seed=seed, loss=loss, optimizer=name)
    for seed in (0, 1)
    for name in ("sgd", "adamw")
    for select, loss in (("sage:0.1", 0.2), (None, 0.1), ("random:0.1:every=1", 0.3))
]


def test_a_record_with_selections_survives_the_round_trip() -> None:
    record = run("sage:0.1", **chosen([2, 3], wrong=(1, 7)))
    assert RunRecord.from_line(record.to_line(), "here") == record


def test_a_row_is_an_optimizer_on_a_selection() -> None:
    (cell,) = group(RECORDS)
    assert [(row.label, len(row.records)) for row in cell.rows] == [
        ("SGD, sage 0.1", 2),
        ("SGD", 2),
        ("SGD, random 0.1 (every=1)", 2),
        ("AdamW, sage 0.1", 2),
        ("AdamW", 2),
        ("AdamW, random 0.1 (every=1)", 2),
    ]
    assert label_of("unheard_of", "newer:0.5") == "unheard_of, newer 0.5"


def test_options_that_differ_are_told_behind_the_selection() -> None:
    (cell,) = group([run("sage:0.1"), run(None), run(None, options={"lr": 0.5}, seed=1)])
    assert [row.label for row in cell.rows] == ["AdamW, sage 0.1 lr=0.1", "AdamW lr=0.1", "AdamW lr=0.5"]


def test_the_goal_is_that_of_the_reference_on_everything() -> None:
    slow = make_history([1.0, 0.5, 0.3, 0.25])
    (cell,) = group([run("sage:0.1", history=slow), *RECORDS])
    found = goal_of(cell)
    assert found is not None
    assert (found.reference, round(found.value, 9)) == ("AdamW", 0.1)
    assert [(row.label, row.reached) for row in found.rows] == [
        ("AdamW, sage 0.1", 0),
        ("SGD, sage 0.1", 0),
        ("SGD", 2),
        ("SGD, random 0.1 (every=1)", 0),
        ("AdamW", 2),
        ("AdamW, random 0.1 (every=1)", 0),
    ]


def test_an_optimizer_on_everything_is_the_reference_before_adam_on_a_subset() -> None:
    (cell,) = group([run("sage:0.1", optimizer="adam"), run(None, optimizer="sgd", loss=0.4)])
    found = goal_of(cell)
    assert found is not None
    assert found.reference == "SGD"
    (cell,) = group([run("sage:0.1", optimizer="sgd"), run("random:0.1", optimizer="adam", loss=0.4)])
    found = goal_of(cell)
    assert found is not None
    assert found.reference == "Adam, random 0.1"


def test_columns_about_subsets_are_there_where_there_are_any() -> None:
    (summary,) = summarise(RECORDS)
    assert headings(summary)[:3] == ["optimizer", "samples", "val loss"]
    rows = {row.label: row.numbers for row in summary.rows}
    assert (rows["AdamW"]["kept"].mean, rows["AdamW, sage 0.1"]["kept"].mean) == (100, 10)
    assert rows["AdamW, sage 0.1"]["selecting"].mean == 0.25
    assert "selecting" not in rows["AdamW"]
    # 2 s in 30 steps, a quarter of a second of them not spent on steps.
    steps = (rows["AdamW"]["ms_per_step"].mean, rows["AdamW, sage 0.1"]["ms_per_step"].mean)
    assert [round(time, 3) for time in steps] == [66.667, 58.333]
    (plain,) = summarise([record for record in RECORDS if record.select is None])
    assert not {"samples", "of them selecting"} & set(headings(plain))
    (found,) = summary_json([summary])
    assert [row["select"] for row in found["rows"]][:2] == ["sage:0.1", None]  # type: ignore[index]


def test_what_was_selected_is_a_table() -> None:
    (cell,) = group([
        run(None),
        run("sage:0.1", **chosen([2, 3], wrong=(1, 20))),
        run("sage:0.1", seed=1, **chosen([2, 3], wrong=(2, 20))),
        run("random:0.1:warmup=0", **chosen([1], kept=50, wrong=(10, 20))),
        run("el2n:0.1", status="failed", error="x", selections=()),
    ])
    grid = subset_grid(cell)
    assert grid is not None
    assert grid.headings == ("optimizer", "selection", "samples", "selected", "selecting", "wrong labels", "notes")
    rows = [[" ".join(filter(None, (entry.text, entry.detail))) for entry in row] for row in grid.rows]
    when = "after 1 epoch, 2 times in all"
    assert rows == [
        ["AdamW, sage 0.1", "sage:0.1", "10 of 100", when, "0.500 s", "15.0 % of all 20.0 %", "a <note>"],
        [
            "AdamW, random 0.1 (warmup=0)",
            "random:0.1:warmup=0",
            "50 of 100",
            "before the first epoch",
            "0.250 s",
            "20.0 % of all 20.0 %",
            "a <note>",
        ],
        ["AdamW, el2n 0.1", "el2n:0.1", "- of 100", "-", "-", "-", "-"],
    ]
    (plain,) = group([run(None)])
    assert subset_grid(plain) is None


def test_the_page_has_the_table_and_says_what_the_seconds_hold() -> None:
    page = render_report(RECORDS)
    root = read_page(page)
    check_harmless(page, root)
    assert [row[0] for row in table_named(root, "Selections")][1] == "SGD, sage 0.1"
    assert "what selecting takes" in root.text()
    assert "Selections" not in render_report([record for record in RECORDS if record.select is None])


def test_the_terminal_says_what_the_seconds_hold() -> None:
    def printed(records: Sequence[RunRecord]) -> str:
        file = io.StringIO()
        print_tables(Console(file=file, width=300), records, Goals())
        return file.getvalue()

    assert SELECTION_NOTE in printed(RECORDS)
    assert SELECTION_NOTE not in printed([record for record in RECORDS if record.select is None])


def test_batch_sizes_are_compared_selection_by_selection() -> None:
    both = [*RECORDS, *(run(record.select, optimizer=record.optimizer, batch_size=64) for record in RECORDS[:6])]
    (sweep,) = sweeps_of(group(both))
    assert [row.label for row in sweep.rows] == [row.label for row in group(RECORDS)[0].rows]
    assert sweep.goal is not None
    assert "AdamW's" in sweep.goal.origin


def test_lines_about_runs_name_the_selection() -> None:
    line = run_line(RunSpec("toy_1d", "adamw", select="sage:0.1"), run("sage:0.1"), resumed=False)
    assert "AdamW, sage 0.1" in line


def test_beside_the_lines_names_leave_out_what_all_selections_share() -> None:
    both = [run(select, optimizer=name) for name in ("sgd", "adamw") for select in (None, "sage:0.1", "random:0.1")]
    (cell,) = group(both)
    assert short_names(cell.rows) == ["SGD", "SGD, sage", "SGD, random", "AdamW", "AdamW, sage", "AdamW, random"]
    drawn = [text.text() for svg in read_page(render_report(both)).all("svg") for text in svg.all("text")]
    assert "AdamW, random" in drawn
    assert not any("…" in text for text in drawn)
    (cell,) = group([run(None), run("sage:0.1"), run("gradmatch:0.1")])
    assert short_names(cell.rows) == ["AdamW", "sage", "gradmatch"]
    (cell,) = group([run("sage:0.1"), run("sage:0.2")])
    assert short_names(cell.rows) == ["sage 0.1", "sage 0.2"]
    (cell,) = group([run(None), run("sage:0.1")])
    assert short_names(cell.rows) == ["AdamW", "AdamW, sage 0.1"]


LONG = (
    None,
    "sage:0.2",
    "sage:0.2:rule=RandomAboveCut:every=1",
    "sage:0.2:rule=Strata(tail_cut=0.3)",
    "sage:0.2:rule=Strata(tail_cut=0.35)",
    "gradmatch:0.2:every=1",
)


def test_long_names_are_said_in_fewer_words_and_stay_different() -> None:
    (cell,) = group([run(select) for select in LONG])
    assert short_names(cell.rows, 28, shared=True) == [
        "AdamW",
        "AdamW, sage 0.2",
        "AdamW, sage 0.2 RandomAbove…",
        "AdamW, sage 0.2 tail_cut=0.3",
        "AdamW, sage 0…tail_cut=0.35",
        "AdamW, gradmatch 0.2 every=1",
    ]
    assert short_names(cell.rows, 16) == [
        "AdamW",
        "sage",
        "sage RandomAbov…",
        "sage ta…_cut=0.3",
        "sage ta…cut=0.35",
        "gradmatch every…",
    ]


@pytest.mark.parametrize("length", [12, 16, 28])
def test_no_two_lines_of_a_plot_bear_the_same_label(length: int) -> None:
    (cell,) = group([run(select, optimizer=name) for name in ("sgd", "adamw") for select in LONG])
    for shared in (False, True):
        names = short_names(cell.rows, length, shared=shared)
        assert len(set(names)) == 2 * len(LONG)
        assert max(map(len, names)) <= length


def test_the_labels_in_a_plot_of_long_selections_differ(tmp_path: Path) -> None:
    records = [run(select, seed=seed) for select in LONG for seed in (0, 1)]
    drawn = [text.text() for svg in read_page(render_report(records)).all("svg") for text in svg.all("text")]
    labels = [text for text in drawn if "sage" in text or "gradmatch" in text]
    assert len(labels) == 2 * 5  # against epochs and against seconds
    assert len(set(labels)) == 5
    (cell,) = group(records)
    svg = next(path for path in save_plots(cell, tmp_path) if path.suffix == ".svg").read_text(encoding="utf-8")
    assert "AdamW, sage 0.2 tail_cut=0.3" in svg
