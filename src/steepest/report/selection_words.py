"""What a selection cost, when it has paid, and what its numbers mean, in sentences."""

import math
from dataclasses import dataclass

from torch import Tensor

from steepest.report.selection_check import Check
from steepest.report.words import count, number, times
from steepest.selection.report import SelectionReport
from steepest.selection.result import Selection
from steepest.training.data import Splits
from steepest.training.task import Task

__all__ = [
    "Scorer",
    "Selected",
    "cost",
    "cost_words",
    "kept_words",
    "meanings",
    "paid_after",
    "percent",
    "score_words",
    "wrong_words",
]


@dataclass(frozen=True)
class Scorer:
    """The model whose gradients were looked at.

    Attributes:
        words: What it is, for people.
        seconds: Training time that it took for this selection.
    """

    words: str
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Selected:
    """A selection and what is told besides it.

    Attributes:
        selection: The selection.
        task: The task whose training split it was made from.
        splits: The task's data.
        scorer: Whose gradients were looked at.
        epoch_seconds: Training time of one epoch on all samples.
        environment: Where the selection was made.
        wrong: Training samples whose label is known to be wrong, `[N]` of bool; None where nobody knows.
        check: What models trained on the subset came to, if that was asked for.
    """

    selection: Selection
    task: Task
    splits: Splits
    scorer: Scorer
    epoch_seconds: float
    environment: dict[str, str | int | None]
    wrong: Tensor | None = None
    check: Check | None = None


def percent(share: float) -> str:
    """A share as people read it.

    Args:
        share: 0 to 1.

    Returns:
        The text.

    Example:
        >>> percent(0.1), percent(0.00123), percent(0.12345), percent(1e-18)
        ('10 %', '0.12 %', '12.3 %', '0 %')
    """
    # A thousandth of a millionth is the rounding of what is exactly nothing.
    value = 100 * share if abs(share) > 1e-9 else 0.0
    return f"{value:.2g} %" if abs(value) < 1 else f"{value:.3g} %"


def cost(selected: Selected) -> float:
    """Seconds that the subset took to find: training of the scorer, and the selection itself.

    Args:
        selected: The selection.

    Returns:
        Seconds; the look at what was kept is not counted, for it is not needed.
    """
    return selected.scorer.seconds + selected.selection.report.seconds


def paid_after(selected: Selected) -> float:
    """Passes over the subset, each in place of one over everything, after which the subset has paid.

    Args:
        selected: The selection.

    Returns:
        Number of epochs; infinity where nothing was left out.
    """
    left_out = 1 - len(selected.selection) / selected.selection.num_samples
    saved = left_out * selected.epoch_seconds
    return cost(selected) / saved if saved > 0 else math.inf


def kept_words(selected: Selected) -> str:
    """How much was kept, by what.

    Args:
        selected: The selection.

    Returns:
        One sentence.
    """
    selection = selected.selection
    share = len(selection) / selection.num_samples
    of = count(selection.num_samples, "training sample")
    return f"{selection.method} kept {len(selection):,} of {of}, {percent(share)}."


def cost_words(selected: Selected) -> list[str]:
    """What the selection cost, and how much training it takes until it has paid.

    Args:
        selected: The selection.

    Returns:
        Sentences.
    """
    scorer, epoch = selected.scorer, selected.epoch_seconds
    whole = cost(selected)
    parts = f" ({number(scorer.seconds)} s of it to train the scorer)" if scorer.seconds else ""
    epochs = f", as long as {_epochs(whole / epoch)} of training on everything" if epoch > 0 else ""
    first = f"The selection took {number(whole)} s{parts}{epochs}."
    paid = paid_after(selected)
    if math.isinf(paid):
        return [first, "It left nothing out, so it saves nothing."]
    saved = (1 - len(selected.selection) / selected.selection.num_samples) * epoch
    second = (
        f"A pass over the subset saves {number(saved)} s of {number(epoch)} s: trained for as many passes as one would "
        f"make over everything, it has paid after {_epochs(paid)}."
    )
    third = "That is about time alone; what the subset costs in accuracy only models trained on it can tell (--check)."
    return [first, second] if selected.check is not None else [first, second, third]


def _epochs(amount: float) -> str:
    text = times(amount) if amount >= 0.1 else number(amount, 1)
    return f"{text} epoch{'' if text == '1' else 's'}"


def meanings(report: SelectionReport) -> list[tuple[str, str, str]]:
    """The numbers of a selection with what they mean.

    Args:
        report: Of the selection.

    Returns:
        Name, value and a sentence for each.
    """
    found = []
    if report.mean_cosine is not None:
        alike = (
            "How alike two kept samples pull on the model, over all pairs: 1 is all in the same direction, 0 is no "
            "more than chance. High agreement is redundancy, the opposite of coverage."
        )
        found.append(("Mean cosine of kept gradients", f"{report.mean_cosine:.3f}", alike))
    if report.duplicates is not None:
        same = "Kept samples whose input is exactly that of a kept sample before."
        found.append(("Duplicates", f"{report.duplicates:,}", same))
    return [*found, *_of_sketch(report), *_others(report)]


_CROWDED = 0.999  # three digits tell no two values apart from here on
_CERTIFICATE = ("certificate", "certificate_relative", "squared_norm")


def _of_sketch(report: SelectionReport) -> list[tuple[str, str, str]]:
    relative = report.numbers.get("certificate_relative")
    if relative is None:
        return []
    meaning = (
        "The sketch stands for all gradients. In no direction does it miss more than this share of their total squared "
        "length; the bound was added up while sketching, and it is proven and not estimated."
    )
    return [("Certificate of the sketch", percent(relative), meaning)]


def _others(report: SelectionReport) -> list[tuple[str, str, str]]:
    shown = [(name, value) for name, value in report.numbers.items() if name not in _CERTIFICATE]
    return [(name.replace("_", " ").capitalize(), _value(value), "") for name, value in shown if math.isfinite(value)]


def _value(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else score_words(value)


def score_words(value: float) -> str:
    """A score: agreements crowd just below 1, where their distance from it says more than their digits.

    Args:
        value: The score.

    Returns:
        The text.

    Example:
        >>> [score_words(value) for value in (0.25, 0.99991, 1.0, 12.3)]
        ['0.250', '1 - 9.0e-5', '1.00', '12.3']
    """
    return f"1 - {number(1 - value, 2)}" if _CROWDED < value < 1 else number(value)


def wrong_words(selected: Selected) -> str:
    """What became of samples whose label is known to be wrong.

    Args:
        selected: The selection.

    Returns:
        A sentence; empty where nobody knows, or nothing is wrong.
    """
    if selected.wrong is None or not bool(selected.wrong.any()):
        return ""
    found = selected.selection.wrong_dropped(selected.wrong)
    verb = "is" if found["wrong_kept"] == 1 else "are"
    left = f"{found['wrong_kept']:,.0f} {verb} left, {percent(found['share_kept'])} of the subset"
    by_chance = found["wrong"] * selected.selection.fraction
    return (
        f"{percent(found['share'])} of the training labels are known to be wrong ({found['wrong']:,.0f}). Of these, "
        f"{percent(found['dropped'])} were dropped: {left if found['wrong_kept'] else 'none is left'}; chance would "
        f"leave about {by_chance:,.0f}. The method was not told which."
    )
