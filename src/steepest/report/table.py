"""Summaries to tables on the terminal, to Markdown and to JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steepest.report.summary import OptimizerSummary, Spread, TaskSummary, best_rows

__all__ = ["cells", "headings", "markdown_table", "print_task_table", "summary_json", "task_table"]


@dataclass(frozen=True)
class _Column:
    key: str
    heading: str
    show: Callable[[Spread], str]
    higher: bool = False
    marked: bool = True
    detail: int = 0


# Tables come in three widths; a column of detail 1 or 2 is left out of the narrower ones.
_DETAILS = (2, 1, 0)
_UNLIMITED = 1000


def _general(spread: Spread) -> str:
    return _with_std(spread, lambda value: f"{value:.3g}")


def _fixed(digits: int) -> Callable[[Spread], str]:
    return lambda spread: _with_std(spread, lambda value: f"{value:.{digits}f}")


def _metric(spread: Spread) -> str:
    # An R2 within 1e-4 of 1 says nothing at four digits: show how far from 1 it is.
    if 0.9999 < spread.mean < 1.0:
        return f"1 - {1 - spread.mean:.1e}"
    return _fixed(4)(spread)


def _with_std(spread: Spread, show: Callable[[float], str]) -> str:
    return show(spread.mean) if spread.std is None else f"{show(spread.mean)} ± {show(spread.std)}"


def _memory(spread: Spread) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if spread.mean >= size:
            return f"{spread.mean / size:.1f} {unit}"
    return f"{spread.mean / 2**10:.0f} KiB"


def _columns(summary: TaskSummary, detail: int) -> list[_Column]:
    every = [
        _Column("val_loss", "val loss", _general),
        _Column("test_loss", "test loss", _general, detail=1),
        _Column("metric", f"test {summary.metric_label}", _metric, higher=summary.metric_higher),
        _Column("seconds", "seconds", _fixed(2)),
        _Column("ms_per_step", "ms/step", lambda spread: f"{spread.mean:.2f}", detail=1),
        _Column("steps", "steps", lambda spread: f"{spread.mean:.0f}", marked=False, detail=1),
        _Column("peak_memory", "peak memory", _memory),
    ]
    return [column for column in every if column.detail <= detail]


def headings(summary: TaskSummary, *, detail: int = 2) -> list[str]:
    """Column headings of a task's table.

    Args:
        summary: The task.
        detail: 2 for everything, 1 without standard deviations, 0 for the main columns only.

    Returns:
        Headings, the optimizer's first.
    """
    return ["optimizer", *(column.heading for column in _columns(summary, detail)), "finished"]


def cells(summary: TaskSummary, row: OptimizerSummary, *, detail: int = 2) -> list[tuple[str, bool]]:
    """One row of a task's table.

    Args:
        summary: The task.
        row: One of its optimizers.
        detail: As in `headings`.

    Returns:
        Text of each cell and whether it is the best of its column.
    """
    line = [(row.label, False)]
    for column in _columns(summary, detail):
        spread = row.numbers.get(column.key)
        if spread is None:
            line.append(("-", False))
            continue
        best = column.marked and row.optimizer in best_rows(summary, column.key, higher=column.higher)
        line.append((column.show(spread if detail == _DETAILS[0] else replace(spread, std=None)), best))
    problems = [f"{row.problems.count(kind)} {kind}" for kind in dict.fromkeys(row.problems)]
    note = f" ({', '.join(problems).replace('_', ' ')})" if problems else ""
    line.append((f"{row.finished}/{row.attempted}{note}", False))
    return line


def task_table(summary: TaskSummary, *, detail: int = 2) -> Table:
    """Table of one task for the terminal; the best of each column is bold and starred.

    Args:
        summary: The task.
        detail: As in `headings`.

    Returns:
        A rich table; no text in it is read as markup.
    """
    table = Table(box=box.SIMPLE)
    for number, heading in enumerate(headings(summary, detail=detail)):
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=True)
    for row in summary.rows:
        first, *middle, last = cells(summary, row, detail=detail)
        table.add_row(
            Text(first[0]),
            *(Text(f"{text} *" if best else f"{text}  ", style="bold green" if best else "") for text, best in middle),
            Text(last[0], style="yellow" if row.problems else ""),
        )
    return table


def print_task_table(console: Console, summary: TaskSummary, *, title: str, caption: str = "") -> None:
    """Print a table with as much detail as the width of the terminal allows.

    Args:
        console: Where to; files and pipes get everything.
        summary: The task.
        title: Line above.
        caption: Line below.
    """
    unlimited = Console(width=_UNLIMITED)
    for detail in _DETAILS:
        table = task_table(summary, detail=detail)
        width = unlimited.measure(table).maximum
        if width <= console.width or not console.is_terminal:
            break
    if not console.is_terminal:
        # A pipe has no width of its own, and rich assumes 80 columns for it.
        console = Console(file=console.file, width=max(width, len(title), len(caption)))
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print(Text(caption, style="dim"))


def markdown_table(summary: TaskSummary) -> str:
    """Table of one task in Markdown.

    Args:
        summary: The task.

    Returns:
        Lines of text; the best of each column is bold.
    """
    names = headings(summary)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in summary.rows:
        shown = [f"**{text}**" if best else text for text, best in cells(summary, row)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def summary_json(summaries: Sequence[TaskSummary]) -> list[dict[str, object]]:
    """Summaries as JSON can hold them.

    Args:
        summaries: One per task.

    Returns:
        One mapping per task.
    """
    return [asdict(summary) for summary in summaries]
