"""Columns of the final table: what they show, in which words, and which value is the best."""

from collections.abc import Callable
from dataclasses import dataclass

from steepest.report.summary import OptimizerSummary, Spread, TaskSummary, best_rows, metric_key
from steepest.report.words import memory, number, score

__all__ = ["FULL", "Column", "Value", "columns", "ending", "metric_text", "value_of"]

# Tables come in three widths; a column of detail 1 or 2 is left out of the narrower ones.
FULL = 2


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: Which number of a row.
        heading: Words above it.
        show: Text of a number.
        higher: Whether higher is better.
        marked: Whether the best is marked.
        spread: Whether the standard deviation is shown.
        detail: Smallest width of the table that has it.
    """

    key: str
    heading: str
    show: Callable[[float], str] = number
    higher: bool = False
    marked: bool = True
    spread: bool = True
    detail: int = 0


@dataclass(frozen=True)
class Value:
    """What stands in one place of the table; `detail` is the standard deviation, if there is one."""

    text: str
    detail: str = ""
    best: bool = False


def columns(summary: TaskSummary, detail: int = FULL) -> list[Column]:
    """Columns of a task's table, after the name of the row.

    Args:
        summary: The task.
        detail: 2 for everything, 0 for the main columns only.

    Returns:
        The columns.
    """
    metrics = [
        Column(metric_key(place, metric), f"test {metric.label}", metric_text, higher=metric.higher_is_better)
        for place, metric in enumerate(summary.metrics)
    ]
    subsets = [
        Column("kept", "samples", "{:,.0f}".format, marked=False, spread=False),
        Column("selecting", "of them selecting", marked=False, detail=1),
    ]
    if all(row.select is None for row in summary.rows):
        subsets = []
    every = [
        *subsets[:1],
        Column("val_loss", "val loss"),
        Column("test_loss", "test loss", detail=1),
        *metrics,
        Column("seconds", "seconds"),
        *subsets[1:],
        Column("ms_per_step", "ms/step", spread=False, detail=1),
        Column("steps", "steps", lambda mean: f"{mean:.0f}", marked=False, spread=False, detail=1),
        Column("peak_memory", "peak memory", memory, spread=False),
    ]
    return [column for column in every if column.detail <= detail]


def value_of(summary: TaskSummary, row: OptimizerSummary, column: Column) -> Value:
    """Fill one place.

    Args:
        summary: The task.
        row: One of its rows.
        column: The column.

    Returns:
        The value, a dash where nobody has the number.
    """
    spread = row.numbers.get(column.key)
    if spread is None:
        return Value("-")
    return Value(column.show(spread.mean), _deviation(spread, column), column.marked and _is_best(summary, row, column))


def _is_best(summary: TaskSummary, row: OptimizerSummary, column: Column) -> bool:
    best = best_rows(summary, column.key, higher=column.higher)
    # The best of one, or of equals, says nothing.
    return row in best and len(best) < sum(column.key in other.numbers for other in summary.rows)


def _deviation(spread: Spread, column: Column) -> str:
    if spread.std is None or not column.spread:
        return ""
    return number(spread.std, 2)


def metric_text(mean: float) -> str:
    """A metric with four significant digits, however small it is.

    Args:
        mean: The number.

    Returns:
        The text.

    Example:
        >>> metric_text(0.85), metric_text(1.234567e-7)
        ('0.8500', '1.235e-7')
    """
    return score(mean, lambda value: number(value, 4))


def ending(row: OptimizerSummary) -> str:
    """How many runs finished, and how the others ended.

    Args:
        row: A row.

    Returns:
        The words.
    """
    problems = [f"{row.problems.count(kind)} {kind}" for kind in dict.fromkeys(row.problems)]
    problems += [f"{row.blow_ups} blew up"] if row.blow_ups else []
    note = f" ({', '.join(problems).replace('_', ' ')})" if problems else ""
    return f"{row.finished}/{row.attempted}{note}"
