"""What the numbers say, in sentences that promise no more than they hold."""

from collections.abc import Sequence

from steepest.report.goal import Goal, Reach
from steepest.report.measure import LOSS
from steepest.report.summary import OptimizerSummary, Spread, TaskSummary, best_rows
from steepest.report.words import count, listing, number, times

__all__ = ["verdict"]

# Below these ratios percents say more, and the ratio of two times says nothing.
_PERCENT, _ALIKE = 1.1, 1.05


def verdict(summary: TaskSummary) -> list[str]:
    """Who has the lowest validation loss, by how much, and who reached the goal first.

    Args:
        summary: The task.

    Returns:
        Sentences.
    """
    best = best_rows(summary, "val_loss")
    if not best:
        ends = [kind.replace("_", " ") for row in summary.rows for kind in row.problems]
        how = listing([f"{ends.count(kind)} {kind}" for kind in dict.fromkeys(ends)])
        return [f"No run finished: {how}." if ends else "No run finished with a finite validation loss."]
    sentences = [_alone(best[0])] if len(summary.rows) == 1 else _compared(summary, best)
    return [*sentences, *([] if summary.goal is None else [_first_there(summary.goal)])]


def _alone(row: OptimizerSummary) -> str:
    loss = row.numbers["val_loss"]
    if loss.count == 1:
        return f"{row.label} ends at a validation loss of {number(loss.mean)}{_of_runs(row)}."
    return (
        f"{row.label} ends at a mean validation loss of {number(loss.mean)}, from {number(loss.low)} to "
        f"{number(loss.high)} over {count(loss.count, 'run')}{_of_runs(row)}."
    )


def _of_runs(row: OptimizerSummary) -> str:
    return "" if row.finished == row.attempted else f" ({row.finished} of {row.attempted} runs finished)"


def _compared(summary: TaskSummary, best: Sequence[OptimizerSummary]) -> list[str]:
    loss = best[0].numbers["val_loss"]
    names = listing([row.label for row in best])
    ranked = [row for row in summary.rows if row.finished == best[0].finished and "val_loss" in row.numbers]
    others = sorted((row for row in ranked if row not in best), key=lambda row: row.numbers["val_loss"].mean)
    if len(best) > 1:
        sentences = [f"{names} share the lowest mean validation loss, {number(loss.mean)}."]
    elif not others:
        sentences = [f"{names} ends at a mean validation loss of {number(loss.mean)}."]
    else:
        rival = others[0].numbers["val_loss"]
        lowest = f"{names} has the lowest mean validation loss, {number(loss.mean)}"
        following = f"{others[0].label} is next with {number(rival.mean)}{_times(loss.mean, rival.mean)}"
        sentences = [f"{lowest}; {following}.", _certainty(loss, rival)]
    fewer = [row for row in summary.rows if row not in ranked]
    if fewer:
        counts = listing([f"{row.label} ({row.finished} of {row.attempted})" for row in fewer])
        sentences.append(f"Not ranked, because fewer runs finished: {counts}.")
    return sentences


def _times(low: float, high: float) -> str:
    if low <= 0:
        return ""
    ratio = high / low
    return f", {times(ratio)} times as much" if ratio >= _PERCENT else f", {number(100 * (ratio - 1), 2)} % more"


def _certainty(one: Spread, other: Spread) -> str:
    if one.count < 2:
        return "With one seed each, the order may be chance."
    if one.high >= other.low:
        return "The ranges of the two over the seeds overlap, so their order may be chance."
    return f"The ranges of the two over {count(one.count, 'seed')} do not overlap."


def _first_there(goal: Goal) -> str:
    words = f"the goal of {goal.text}" + ("" if goal.measure == LOSS else f" {goal.measure.words}")
    most = max((row.reached for row in goal.rows), default=0)
    if most == 0:
        return f"No run reaches {words}."
    if not any(row.seconds for row in goal.rows):
        return f"The untrained model meets {words}, which so says nothing."
    first, *others = sorted((row for row in goal.rows if row.reached == most), key=_seconds)
    when = f"after {number(first.seconds)} s of training"
    part = "" if first.reached == first.attempted else f" in {first.reached} of {first.attempted} runs"
    if others:
        return f"{first.label} is the first to reach {words}{part}, {when}; {_second(first, others[0])}."
    if any(0 < row.reached < most for row in goal.rows):
        return f"{first.label} reaches {words} in most runs ({first.reached} of {first.attempted}), {when}."
    return f"{first.label} {'reaches' if len(goal.rows) == 1 else 'alone reaches'} {words}{part}, {when}."


def _second(first: Reach, other: Reach) -> str:
    words = f"{other.label} takes {number(other.seconds)} s"
    ratio = _seconds(other) / _seconds(first) if _seconds(first) else None
    if ratio is not None:
        words += f", {times(ratio)} times as long" if ratio >= _ALIKE else ", about as long"
    if first.reached > 1 and (first.slowest or 0.0) >= (other.fastest or 0.0):
        words += ", and the times of their runs overlap"
    return words


def _seconds(row: Reach) -> float:
    return row.seconds if row.seconds is not None else float("inf")
