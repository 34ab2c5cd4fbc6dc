"""What `steepest select` prints when it is done."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steepest.commands.output import print_files
from steepest.report.grids import Grid
from steepest.report.selection_check import check_grid, check_verdict
from steepest.report.selection_words import Selected, cost, cost_words, kept_words, meanings, paid_after, wrong_words
from steepest.report.words import number
from steepest.training.records import finite

__all__ = ["print_selected", "selected_json"]

_UNLIMITED = 500


def print_selected(console: Console, selected: Selected, files: Mapping[str, Path]) -> None:
    """Print a selection.

    Args:
        console: Where to.
        selected: The selection and all that is told about it.
        files: Paths by what they are.
    """
    report, facts = selected.selection.report, _facts(selected)
    width = max(len(name) for name, _ in facts)
    console.print(Text(kept_words(selected), style="bold"), soft_wrap=True)
    for name, value in facts:
        console.print(Text(f"{name:<{width}}  {value}"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for sentence in filter(None, (wrong_words(selected), *cost_words(selected))):
        console.print(Text(sentence), soft_wrap=True)
    if selected.check is not None:
        console.print()
        _print_grid(console, check_grid(selected.check))
        for sentence in check_verdict(selected.check):
            console.print(Text(sentence), soft_wrap=True)
    print_files(console, files)


def _facts(selected: Selected) -> list[tuple[str, str]]:
    report = selected.selection.report
    found = [("gradients of", selected.scorer.words), ("seconds", number(cost(selected)))]
    if report.processes > 1:
        found.append(("shared by", f"{report.processes} processes"))
    if report.class_counts:
        kept = [pair[0] for pair in report.class_counts.values()]
        each = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"
        found.append(("classes kept", f"{sum(amount > 0 for amount in kept)} of {len(kept)}, {each} samples each"))
    return [*found, *((name[:1].lower() + name[1:], value) for name, value, _ in meanings(report))]


def _print_grid(console: Console, grid: Grid) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, heading in enumerate(grid.headings):
        table.add_column(heading, justify="left" if place in grid.words else "right", no_wrap=place in grid.words)
    for row in grid.rows:
        table.add_row(*(Text(f"{entry.text} {entry.detail}".strip() + "*" * entry.best) for entry in row))
    _wide(console).print(table)


def _wide(console: Console) -> Console:
    # A pipe has no width of its own, and rich assumes 80 columns for it.
    return console if console.is_terminal else Console(file=console.file, width=_UNLIMITED, markup=False)


def selected_json(selected: Selected, files: Mapping[str, Path]) -> str:
    """A selection for programs.

    Args:
        selected: The selection and all that is told about it.
        files: Paths by what they are.

    Returns:
        JSON.
    """
    selection, check = selected.selection, selected.check
    report = selection.report
    counts = None if report.class_counts is None else [[label, *pair] for label, pair in report.class_counts.items()]
    content = {
        "schema": 1,
        "method": selection.method,
        "options": selection.options,
        "kept": len(selection),
        "num_samples": selection.num_samples,
        "processes": report.processes,
        "class_counts": counts,
        "mean_cosine": report.mean_cosine,
        "duplicates": report.duplicates,
        "numbers": {name: finite(value) for name, value in report.numbers.items()},
        "notes": list(report.notes),
        "wrong": None if selected.wrong is None else _finite(selection.wrong_dropped(selected.wrong)),
        "scorer": asdict(selected.scorer),
        "seconds": {
            "selection": report.seconds,
            "review": report.review_seconds,
            "scorer": selected.scorer.seconds,
            "epoch": selected.epoch_seconds,
        },
        "paid_after_epochs": finite(paid_after(selected)),
        "check": None
        if check is None
        else {"runs": [asdict(run) for run in check.runs], "steps": check.steps, "verdict": check_verdict(check)},
        "files": files,
    }
    return json.dumps(content, default=str, allow_nan=False)


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in numbers.items()}
