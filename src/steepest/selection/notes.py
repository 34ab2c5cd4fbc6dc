"""What should be known of the classes of a selection."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["class_counts", "class_notes", "vanished"]


def class_counts(labels: Tensor | None, indices: Tensor) -> dict[int, tuple[int, int]] | None:
    """Count kept and all samples of each class.

    Args:
        labels: ``[N]``; None where there are none.
        indices: ``[k]``, kept positions.

    Returns:
        Kept and all by class, in ascending order; None without labels.

    Example:
        >>> class_counts(torch.tensor([0, 0, 7]), torch.tensor([2]))
        {0: (0, 2), 7: (1, 1)}
    """
    if labels is None:
        return None
    names, places, totals = labels.unique(return_inverse=True, return_counts=True)
    kept = torch.bincount(places[indices], minlength=len(names))
    return {name: (k, n) for name, k, n in zip(names.tolist(), kept.tolist(), totals.tolist(), strict=True)}


def vanished(counts: Mapping[int, tuple[int, int]] | None) -> str | None:
    """Say which classes have no kept sample.

    Args:
        counts: Kept and all by class.

    Returns:
        A sentence, or None where every class is there.
    """
    gone = [name for name, (kept, _) in (counts or {}).items() if not kept]
    if not gone or counts is None:
        return None
    return (
        f"no sample of {len(gone)} of {len(counts)} classes was kept ({_listed(gone)}): a model trained on "
        "the selection cannot learn what is missing; keep more samples, or use class_policy='balanced' where the "
        "method has it."
    )


def class_notes(counts: Mapping[int, tuple[int, int]] | None, count: int) -> tuple[str, ...]:
    """Say what is remarkable about the classes.

    Args:
        counts: Kept and all by class.
        count: Number of kept samples.

    Returns:
        Sentences.
    """
    if not counts:
        return ()
    notes = [sentence for sentence in (vanished(counts),) if sentence]
    total = sum(of for _, of in counts.values())
    small = [name for name, (_, of) in counts.items() if of * count < total]
    if count < len(counts):
        notes.append(f"Fewer samples were kept ({count}) than there are classes ({len(counts)}).")
    elif small:
        notes.append(
            f"The share of {len(small)} of {len(counts)} classes in {count} samples is less than one sample "
            f"({_listed(small)}): whether they are kept at all depends on rounding and on the class policy."
        )
    return tuple(notes)


def _listed(names: Sequence[int]) -> str:
    shown = ", ".join(str(name) for name in names[:5])
    return f"labels {shown} and {len(names) - 5} more" if len(names) > 5 else f"label{'s' * (len(names) > 1)} {shown}"
