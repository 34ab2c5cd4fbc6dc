"""What a selection cost and what it looks like, in numbers and in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from steepest._validation import check_real

__all__ = ["Estimate", "Progress", "SelectionReport", "in_bytes", "in_seconds"]


@dataclass(frozen=True)
class Estimate:
    """What a selection will cost, told after its first batches.

    Args:
        samples: Number of samples; None where it is not known before the data have been gone through.
        passes: Passes over the data.
        seconds: Of all passes, from the median of the first batches and what the method says of the passes to come;
            a choice that takes long comes on top. None where the number of samples is not known.
        bytes: Memory that the method says it needs beside the model and one batch; None where it does not say.
    """

    samples: int | None
    passes: int
    seconds: float | None
    bytes: int | None


@dataclass(frozen=True)
class Progress:
    """Where a selection is, as ``progress`` of `select_subset` is told.

    Args:
        kind: "estimate" once, after the first batches; "batch" after every batch; "pick" now and then in a choice that
            takes long; "review" after every batch of the look at what was kept.
        pass_number: The pass, counted from 0.
        passes: How many there are.
        batch: Batches of this pass that are done; of a pick, samples that are chosen.
        batches: Batches of this pass, None where their number is not known; of a pick, samples to choose.
        seconds: Spent so far, the time before an interruption included; of an estimate, those of all passes
            (0 where it is not known).
        estimate: What the selection will cost; None as long as it is not known.
    """

    kind: Literal["estimate", "batch", "pick", "review"]
    pass_number: int
    passes: int
    batch: int
    batches: int | None
    seconds: float
    estimate: Estimate | None = None


@dataclass(frozen=True)
class SelectionReport:
    """What a selection cost and what was kept.

    Args:
        seconds: Wall-clock time of the passes and of the choice.
        review_seconds: Time of the look at the kept samples, which is no part of ``seconds``.
        passes: Passes over the data with the model.
        estimate: What was foretold; None where there were too few batches to tell.
        class_counts: Kept and all samples of each class; None without labels.
        mean_cosine: Mean cosine between the gradients of two kept samples; 1 is all the same, 0 is all different.
            None without a review or with fewer than two gradients that are not zero.
        duplicates: Kept samples whose input is that of a kept sample before; None without a review.
        numbers: What the method measured by the way.
        notes: What should be known of this selection, a sentence each.
        kept: Number of samples kept.
        num_samples: Number of samples to choose from.
        processes: How many made the selection; the times are those of the first.
        traffic: Bytes of tensors that the first of several processes gave to collectives.
    """

    seconds: float
    review_seconds: float = 0.0
    passes: int = 0
    estimate: Estimate | None = None
    class_counts: Mapping[int, tuple[int, int]] | None = None
    mean_cosine: float | None = None
    duplicates: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kept: int = 0
    num_samples: int = 0
    processes: int = 1
    traffic: int = 0

    def break_even(self, epoch_seconds: float) -> float:
        """Passes over the kept samples, each in place of one over all, after which the selection has paid.

        A pass over the kept samples saves the time of those left out. Nothing is said here of accuracy.

        Args:
            epoch_seconds: Seconds that one epoch of training on all samples takes.

        Returns:
            Number of epochs; infinity where all samples are kept.

        Example:
            >>> SelectionReport(seconds=9.0, kept=100, num_samples=1000).break_even(epoch_seconds=20.0)
            0.5
        """
        epoch = check_real("epoch_seconds", epoch_seconds, low=0.0, open_low=True)
        saved = epoch * (1 - self.kept / max(1, self.num_samples))
        return self.seconds / saved if saved > 0 else math.inf

    def __str__(self) -> str:
        passes = f"{self.passes} {'pass' if self.passes == 1 else 'passes'} with the model"
        shared = f", shared by {self.processes} processes" if self.processes > 1 else ""
        lines = [f"kept {self.kept} of {self.num_samples} samples in {in_seconds(self.seconds)} ({passes}{shared})"]
        if self.class_counts:
            lines.append(_classes(self.class_counts))
        if self.mean_cosine is not None:
            lines.append(f"mean cosine between kept gradients: {self.mean_cosine:.3f}")
        if self.duplicates:
            lines.append(f"kept twice or more often: {self.duplicates}")
        lines += [f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.numbers.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _classes(counts: Mapping[int, tuple[int, int]]) -> str:
    if len(counts) > 20:
        return f"classes: {sum(kept > 0 for kept, _ in counts.values())} of {len(counts)} kept"
    return "kept per class: " + ", ".join(f"{name}: {kept} of {of}" for name, (kept, of) in sorted(counts.items()))


def in_seconds(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: The time.

    Returns:
        Text.

    Example:
        >>> in_seconds(75.0)
        '1 min 15 s'
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def in_bytes(count: int) -> str:
    """Write an amount of memory for people.

    Args:
        count: Bytes.

    Returns:
        Text.

    Example:
        >>> in_bytes(3_500_000)
        '3.5 MB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
