"""Did a selection pay? Fresh models on the subset, on random ones and on everything, in numbers and a sentence."""

from dataclasses import dataclass
from math import comb
from typing import Literal

from steepest.report.grids import Entry, Grid
from steepest.report.measure import LOSS, Measure
from steepest.report.summary import Spread, spread_of
from steepest.report.words import count, number

__all__ = ["ARMS", "Arm", "Check", "CheckRun", "check_grid", "check_verdict"]

Arm = Literal["subset", "random", "everything"]
ARMS: tuple[Arm, ...] = ("subset", "random", "everything")
# Percent: what chance does more often than that is neither won nor lost. Three seeds against three make it.
_MOST_CHANCE = 10.0


@dataclass(frozen=True)
class CheckRun:
    """One model trained from scratch.

    Attributes:
        arm: What it was trained on.
        seed: Seed of initialisation, data order and, for a random subset, of its draw.
        val_loss: Validation loss at the end; None if it is not finite.
        val_metric: Main metric on the validation split; None if it is not finite or there is none.
        seconds: Training time.
    """

    arm: Arm
    seed: int
    val_loss: float | None
    val_metric: float | None
    seconds: float


@dataclass(frozen=True)
class Check:
    """All models that a selection is judged by; they differ in nothing but their samples.

    Attributes:
        runs: One per arm and seed.
        method: The method of the selection.
        kept: Samples in the subset, and in a random one.
        num_samples: Samples in everything.
        steps: Steps of every run.
        optimizer: Name of the optimizer, for people.
        measure: What is compared: the task's main metric, or the loss where it has none.
        balanced: Whether random subsets have the same number of samples of each class.
        cost: Seconds of the selection, its scorer included.
    """

    runs: tuple[CheckRun, ...]
    method: str
    kept: int
    num_samples: int
    steps: int
    optimizer: str
    measure: Measure
    balanced: bool
    cost: float

    def values(self, arm: Arm, measure: Measure | None = None) -> list[float | None]:
        """What the runs of an arm came to.

        Args:
            arm: Which runs.
            measure: Which number; None for the one that is compared.

        Returns:
            One value per seed.
        """
        by_loss = (measure or self.measure).name == LOSS.name
        return [run.val_loss if by_loss else run.val_metric for run in self.runs if run.arm == arm]

    def name(self, arm: Arm) -> str:
        """What an arm is called.

        Args:
            arm: Which one.

        Returns:
            The name.
        """
        random = "random, classes alike" if self.balanced else "random"
        return {"subset": f"subset ({self.method})", "random": random, "everything": "everything"}[arm]


def check_grid(check: Check) -> Grid:
    """The table of a check.

    Args:
        check: The models.

    Returns:
        One row per arm.
    """
    own = [] if check.measure.name == LOSS.name else [check.measure]
    measures = [LOSS, *own]
    seeds = len({run.seed for run in check.runs})
    rows = []
    for arm in ARMS:
        shown = [_entry(spread_of(check.values(arm, measure)), measure, check) for measure in measures]
        seconds = spread_of([run.seconds for run in check.runs if run.arm == arm])
        mean = 0.0 if seconds is None else seconds.mean
        ended = sum(value is not None for value in check.values(arm))
        rows.append((
            Entry(check.name(arm)),
            Entry(f"{check.num_samples if arm == 'everything' else check.kept:,}"),
            *shown,
            Entry(number(mean)),
            Entry(number(mean + check.cost) if arm == "subset" else number(mean)),
            Entry(f"{ended}/{seeds}"),
        ))
    titles = (
        "trained on",
        "samples",
        *(f"val {measure.label}" for measure in measures),
        "seconds",
        "with the selection",
        "finished",
    )
    return Grid(titles, tuple(rows), name="Check")


def _entry(spread: Spread | None, measure: Measure, check: Check) -> Entry:
    if spread is None:
        return Entry("-")
    means = [other.mean for arm in ARMS if (other := spread_of(check.values(arm, measure))) is not None]
    best = max(means) if measure.higher_is_better else min(means)
    detail = "" if spread.std is None else f"± {number(spread.std, 2)}"
    return Entry(measure.text(spread.mean), detail, spread.mean == best and means.count(best) == 1)


def check_verdict(check: Check) -> list[str]:
    """Who won, and whether that may be chance.

    Args:
        check: The models.

    Returns:
        Sentences.
    """
    subset, random, everything = (spread_of(check.values(arm)) for arm in ARMS)
    if subset is None or random is None:
        lost = "the subset" if subset is None else "a random subset"
        return [f"No model that was trained on {lost} ended with a finite {check.measure.words}: nothing to compare."]
    return [
        _against_random(check, subset, random),
        *([] if everything is None else [_against_everything(check, subset, everything)]),
    ]


def _against_random(check: Check, subset: Spread, random: Spread) -> str:
    other = "random subsets of the same size" + (" with the classes alike" if check.balanced else "")
    measure = check.measure
    numbers = f"{measure.words} {measure.text(subset.mean)} against {measure.text(random.mean)}"
    if min(subset.count, random.count) < 2:
        return (
            f"With one seed nothing is known of the spread: the subset ends at {numbers} of {other}. "
            "Give --check 3 or more to learn whether that is chance."
        )
    seeds = count(min(subset.count, random.count), "seed")
    if subset.low <= random.high and random.low <= subset.high:
        return (
            f"The subset does no better and no worse than {other}, as far as {seeds} can tell: {numbers} on average, "
            "and the ranges overlap. That the selection helps is not shown here."
        )
    # Of all orders that the values could come in by chance, two have all of one kind before the other.
    chance = 200 / comb(subset.count + random.count, random.count)
    apart = (
        f"{numbers} on average, and the ranges over {seeds} do not overlap (by chance that happens in {chance:.2g} %)"
    )
    better = (subset.mean > random.mean) == measure.higher_is_better
    if chance > _MOST_CHANCE:
        where = "ahead of" if better else "behind"
        return f"The subset is {where} {other}: {apart}. Give --check 3 or more to be sure."
    if better:
        return f"The subset wins over {other}: {apart}."
    return f"The subset loses to {other}: {apart}. Draw at random instead, or try another method."


def _against_everything(check: Check, subset: Spread, everything: Spread) -> str:
    measure = check.measure
    reached = f"Everything reaches {measure.text(everything.mean)} in the same {count(check.steps, 'step')}"
    if min(subset.count, everything.count) < 2:
        return f"{reached}."
    if subset.low <= everything.high and everything.low <= subset.high:
        return f"{reached}, which is within the spread of the subset."
    ahead = (subset.mean > everything.mean) == measure.higher_is_better
    gap = number(abs(everything.mean - subset.mean), 2)
    return f"{reached}: the subset is {gap} {'better' if ahead else 'worse'}."
