"""Optimizers by batch sizes on the terminal, in Markdown and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steepest.report.grids import Entry, Grid
from steepest.report.sweep import Sweep
from steepest.report.sweep_grids import sweep_grids
from steepest.report.sweep_view import goal_sentence
from steepest.report.table import markdown_lines

__all__ = ["print_sweep", "sweep_json", "sweep_markdown"]

_UNLIMITED = 1000


def print_sweep(console: Console, sweep: Sweep) -> None:
    """Print the tables of a sweep.

    Args:
        console: Where to; files and pipes get one line per optimizer.
        sweep: The sweep.
    """
    if not console.is_terminal:
        # A pipe has no width of its own, and rich assumes 80 columns for it.
        console = Console(file=console.file, width=_UNLIMITED)
    console.print(Text(_title(sweep), style="bold"))
    console.print(Text(goal_sentence(sweep), style="dim"))
    for grid in sweep_grids(sweep):
        console.print()
        console.print(Text(grid.name))
        console.print(_rich(grid))


def _title(sweep: Sweep) -> str:
    return f"Batch sizes: {sweep.task} ({sweep.variant})" if sweep.variant else f"Batch sizes: {sweep.task}"


def _rich(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE)
    for place, heading in enumerate(grid.headings):
        table.add_column(Text(heading), justify="right" if place else "left")
    for first, *others in grid.rows:
        texts = [
            (f"{_joined(entry)} *", "bold green") if entry.best else (f"{_joined(entry)}  ", "") for entry in others
        ]
        table.add_row(Text(first.text), *(Text(text, style=style) for text, style in texts))
    return table


def _joined(entry: Entry) -> str:
    part = f" ({entry.detail})" if entry.detail and not entry.detail.startswith("±") else f" {entry.detail}"
    return f"{entry.text}{part}".rstrip()


def sweep_markdown(sweep: Sweep) -> str:
    """The tables of a sweep in Markdown.

    Args:
        sweep: The sweep.

    Returns:
        Headings, a sentence and tables.
    """
    parts = [f"## {_title(sweep)}", goal_sentence(sweep)]
    for grid in sweep_grids(sweep):
        rows = [[(_joined(entry), entry.best) for entry in row] for row in grid.rows]
        parts += [f"### {grid.name}", markdown_lines(grid.headings, rows)]
    return "\n\n".join(parts) + "\n"


def sweep_json(sweeps: Sequence[Sweep]) -> list[dict[str, object]]:
    """Sweeps as JSON can hold them.

    Args:
        sweeps: One per problem with several batch sizes.

    Returns:
        One mapping per sweep.
    """
    return [asdict(sweep) for sweep in sweeps]
