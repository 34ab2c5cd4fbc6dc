"""`select_subset`: a method, a model and data become a selection."""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steepest._validation import check_real
from steepest.errors import CaptureError, SelectionError, UnsupportedModelError
from steepest.selection.arguments import Amount, check_callers, checked_method, on_device, roles, takes_model
from steepest.selection.checkpoint import Keeper, versions
from steepest.selection.method import Method, Picked, Run
from steepest.selection.notes import class_counts, class_notes, vanished
from steepest.selection.passes import Passes
from steepest.selection.report import Progress, SelectionReport
from steepest.selection.result import Selection
from steepest.selection.review import Review
from steepest.selection.review import review as look
from steepest.selection.samples import Samples
from steepest.selection.scan import BatchLosses, FixedModel, LossFn
from steepest.selection.stored import plain

__all__ = ["select_subset"]


def select_subset(
    model: nn.Module | None,
    data: Any,
    loss_fn: LossFn | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    method: Method | None = None,
    batch_losses: BatchLosses | None = None,
    labels: Any = None,
    reference: Any = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    review: bool = True,
) -> Selection:
    """Choose the samples to train on, by the gradients of a model that is held fixed.

    The model is used as it is: train it for a while first. It runs in eval mode and is left as it was found. The data
    are gone through in their own order, so give them without shuffling in mind and without random augmentation:
    passes that see different data are refused.

    Args:
        model: The model that scores; None for a method that looks at no model, such as `Random`.
        data: A data set of map style, a DataLoader (its data set, batch size, collate function and workers are used,
            its order is not), an IterableDataset, a list of batches, or a tuple of equally long tensors.
        loss_fn: From outputs and targets to one loss per sample, ``[B]``, such as
            ``nn.CrossEntropyLoss(reduction="none")``; for batches of inputs and targets.
        fraction: Share of the samples to keep, in (0, 1]. Either this or ``count``.
        count: Number of samples to keep.
        method: How to choose; None is ``SAGE()``.
        batch_losses: From model and batch to losses ``[B]``, for batches of any other kind; in place of ``loss_fn``.
        labels: ``[N]``, whole numbers, where they are not to be read from the batches.
        reference: Data of the same kind that some methods compare with, such as a validation set.
        batch_size: Samples per batch where the data do not say; 256 by default.
        device: Where to compute, if not where the model is; the model is moved there and back.
        progress: Called with a `Progress` after every batch, now and then in a choice that takes long, and once with
            an estimate of time and memory.
        checkpoint: File that keeps the state, so that the same call continues after an interruption, bit for bit.
            ``fraction`` and ``count`` may change. It is removed when the selection is done.
        checkpoint_every: Seconds between two writes of it; Ctrl-C writes it too.
        review: Whether to go through the kept samples once more, to tell how alike they are.

    Returns:
        The selection.

    Raises:
        InvalidOptionError: If an option has an impossible value, or too many or too few are given.
        SelectionError: If the data or the model changed on the way, or the checkpoint is of something else.

    Example:
        >>> import torch, steepest as st
        >>> from torch import nn
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> selection = st.select_subset(model, (x, y), nn.CrossEntropyLoss(reduction="none"), fraction=0.1)
        >>> selection.indices.shape
        torch.Size([20])
    """
    method = checked_method(method)
    amount = Amount(fraction, count)
    check_real("checkpoint_every", checkpoint_every, low=0.0)
    check_callers(progress, checkpoint)
    run = method.begin()
    samples = roles(run, method, Samples(data, labels=labels, batch_size=batch_size), reference, batch_size)

    def at_length(number: int) -> None:
        amount.of(number)
        if (expect := getattr(run, "expect", None)) is not None:  # some methods want to know N beforehand
            expect(number)

    if (number := samples["data"].num_samples) is not None:
        at_length(number)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # or nothing of the selection could take part in training
        fixed, model_hash = None, ""
        if takes_model(run, method, model, loss_fn, batch_losses, review) and model is not None:
            stack.enter_context(on_device(model, device))
            fixed = FixedModel(model, method.scope, loss_fn, batch_losses)
            model_hash = fixed.fingerprint
            stack.enter_context(fixed)
        passes = Passes(run, samples, fixed if run.passes else None, progress)
        keeper = None
        if checkpoint is not None:
            identity = _identity(method, samples["data"], *((model_hash, model) if run.passes else ("", None)))
            keeper = Keeper(Path(checkpoint), passes, identity, checkpoint_every)
            keeper.restore()
            if passes.num_samples is not None:
                at_length(passes.num_samples)
        _go(passes, keeper, at_length)
        picked = _picked(passes, run, method, amount)
        if fixed is not None and fixed.fingerprint != model_hash:
            raise SelectionError(
                "the model changed while it scored: its parameters or buffers are not those of the beginning. Train it "
                "before or after, and not in the loss or in another thread."
            )
        notes: list[str] = []
        seen = _look(data, samples["data"], picked, fixed, passes, run, notes) if review else None
        if keeper:
            keeper.remove()
        selection = _selection(picked, passes, seen, method, run, model_hash if run.passes else "", notes)
    if lost := vanished(selection.report.class_counts):
        warnings.warn(lost, stacklevel=2)
    return selection


def _identity(method: Method, data: Samples, model_hash: str, model: nn.Module | None) -> dict[str, Any]:
    """What a checkpoint must agree with. The number to keep is not in it: it matters to the choice alone."""
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu") if model is not None else "none"
    return {
        "method": method.name,
        "options": _options(method),
        "model": model_hash,
        "number of samples": data.num_samples,
        "batch size": data.batch_size,
        "device": device,
        **versions(),
    }


def _go(passes: Passes, keeper: Keeper | None, at_length: Callable[[int], object]) -> None:
    if keeper is None:
        passes.go(lambda: None, at_length)
        return
    with keeper.guard():
        passes.go(keeper.after_batch, at_length)
    keeper.write()  # the choice may take long too


def _options(method: Method) -> dict[str, Any]:
    content = plain(method)
    if not isinstance(content, dict):  # somebody's own method that is no dataclass
        return {"method": content}
    return {name: value for name, value in content.items() if name != "type"}


def _picked(passes: Passes, run: Run, method: Method, amount: Amount) -> Picked:
    began = time.monotonic()
    number = passes.num_samples or 0
    count = amount.of(number)
    run.tell = lambda done, total: passes.tell_pick(done, total, time.monotonic() - began)
    picked = run.pick(count, passes.labels)
    indices = picked.indices
    right = len(indices) == count == len(picked.weights) and bool((indices.diff() > 0).all())
    if not right or int(indices[0]) < 0 or int(indices[-1]) >= number:
        raise SelectionError(
            f"{method} returned {len(indices)} positions and {len(picked.weights)} weights: a method must pick {count} "
            f"ascending positions below {number}, with a weight for each."
        )
    passes.seconds += time.monotonic() - began
    return picked


def _look(
    data: Any,
    samples: Samples,
    picked: Picked,
    fixed: FixedModel | None,
    passes: Passes,
    run: Run,
    notes: list[str],
) -> Review:
    try:
        return look(data, samples, picked.indices, fixed, passes.tell_review)
    except (UnsupportedModelError, CaptureError) as error:
        if run.passes:
            raise
        # The method needed no gradients: that there are none must not keep it from its choice.
        notes.append(f"The gradients of the kept samples were not compared: {error}")
        return look(data, samples, picked.indices, None, passes.tell_review)


def _selection(
    picked: Picked, passes: Passes, seen: Review | None, method: Method, run: Run, model_hash: str, notes: list[str]
) -> Selection:
    counts = class_counts(passes.labels, picked.indices)
    report = SelectionReport(
        seconds=passes.seconds,
        review_seconds=seen.seconds if seen else 0.0,
        passes=run.passes,
        estimate=passes.estimate,
        class_counts=counts,
        mean_cosine=seen.mean_cosine if seen else None,
        duplicates=seen.duplicates if seen else None,
        numbers=dict(picked.numbers),
        notes=(*picked.notes, *class_notes(counts, len(picked.indices)), *notes),
        kept=len(picked.indices),
        num_samples=passes.num_samples or 0,
    )
    return Selection(
        indices=picked.indices.cpu(),
        scores=None if picked.scores is None else picked.scores.cpu(),
        weights=picked.weights.cpu(),
        labels=passes.labels,
        method=method.name,
        options=_options(method),
        num_samples=passes.num_samples or 0,
        fingerprint=passes.fingerprint,
        model_hash=model_hash,
        report=report,
    )
