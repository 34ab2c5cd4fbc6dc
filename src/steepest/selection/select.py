"""`select_subset`: a method, a model and data become a selection."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steepest._validation import check_real
from steepest.distributed import Ranks
from steepest.errors import SelectionError
from steepest.selection.arguments import (
    Amount,
    check_callers,
    check_joins,
    checked_method,
    on_device,
    roles,
    takes_model,
)
from steepest.selection.checkpoint import Keeper, versions
from steepest.selection.concluding import assemble, choose, look_at, options_of
from steepest.selection.keeping import Keep, check_writable
from steepest.selection.method import Method
from steepest.selection.notes import vanished
from steepest.selection.passes import Passes, Role
from steepest.selection.report import Progress
from steepest.selection.result import Selection
from steepest.selection.samples import Samples
from steepest.selection.scan import BatchLosses, FixedModel, LossFn
from steepest.selection.share import Share
from steepest.selection.together import Together, attempt

__all__ = ["select_subset"]

_NOT_COMPARED = "The gradients of the kept samples were not compared"


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
    checkpoint: str | Path | Keep | None = None,
    checkpoint_every: float = 30.0,
    review: bool = True,
    process_group: Any = None,
    alone: bool = False,
) -> Selection:
    """Choose the samples to train on, by the gradients of a model that is held fixed.

    The model is used as it is: train it for a while first. It runs in eval mode and is left as it was found. The data
    are gone through in their own order, so give them without shuffling in mind and without random augmentation:
    passes that see different data are refused.

    Several processes: where `torch.distributed` has been started, all of them must make this call, with the same model,
    data and options, and all get the same selection. Each reads and scores a stretch of the batches that one process
    would read (of a stream it reads all and scores every W-th batch), so that scores of single samples are those of one
    process; `SAGE` merges the sketches of all in the order of the ranks, which is a sketch with the same bound but not
    the same numbers. The first process makes the choice from the scores of all. The fingerprint is that of one process.
    What fails on one fails on all. The first process alone calls ``progress``, warns, and writes what `Selection.save`
    is to write. With a checkpoint, Ctrl-C on any of them is held back until they meet, and stops all. With n samples on
    the process that has most of W, k kept ones, labels, and no stream, a process gives to collectives, in bytes::

        gathered     8 n in each pass over the data, and 40 n once: positions, labels, digests for the fingerprint
                     + 4 n for scores, or 4 n times the numbers that a method keeps of each sample
        broadcast    12 k + 4 N: what the first process chose, and the scores of all
        review       reduced 8 D, gathered 32 of each kept sample of the process that looks at most of them
        SAGE         sent 4 l D but by the first; reduced 8 C D, or 8 C l for a consensus in the sketch;
                     broadcast 4 l D + 8 C l; gathered 2 l n for projections that are kept

    Checkpoints: folders such as ``step-00000003`` within ``checkpoint``, which need not be there and has nothing else
    in it. Each is written by all processes together, by `torch.distributed.checkpoint`, with a digest of every file,
    and gets its name when all of it is on disk. Two stay; where the newest is damaged, it is named and the one before
    it used. As many processes continue bit for bit. Any other number continues too: what was read is kept, the rest of
    the pass is shared out anew, and no sample is read twice in a pass (but those of the first batch, by which the data
    are known). `SAGE` merges the sketches of the processes before in the order of their ranks, so that its sketch is
    another one of the same bound; what other methods choose is the same. A method of your own that does not merge
    (`Run.merges`) begins that pass anew. At the end of a pass that was continued by another number, each process
    gathers 40 bytes for every batch that it knows of.

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
        checkpoint: Folder for checkpoints, so that the same call continues after an interruption. ``fraction`` and
            ``count`` may change. It is removed when the selection is done. A `Keep` says more.
        checkpoint_every: Seconds between two of them; Ctrl-C writes one too.
        review: Whether to go through the kept samples once more, to tell how alike they are.
        process_group: The processes of `torch.distributed` that select together; None for all. It does nothing where
            no process group was made.
        alone: Whether this process selects without the others.

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
    ranks = None if alone else Ranks.current(process_group)
    together = None if ranks is None else Together(ranks)
    with attempt(together):
        method = checked_method(method)
        amount = Amount(fraction, count)
        check_real("checkpoint_every", checkpoint_every, low=0.0)
        keep = _keep(progress, checkpoint, checkpoint_every)
        run = method.begin()
        samples = roles(run, method, Samples(data, labels=labels, batch_size=batch_size), reference, batch_size)
        number = samples["data"].num_samples

        def at_length(number: int) -> None:
            amount.of(number)
            if (expect := getattr(run, "expect", None)) is not None:  # some methods want to know N beforehand
                expect(number)

        if number is not None:
            at_length(number)
        with_model = takes_model(run, method, model, loss_fn, batch_losses, review)
        identity = _identity(method, samples["data"])
    told = progress
    parts: Mapping[Role, Samples | Share] = samples
    if together is not None:
        check_joins(run, method)
        together.alike(identity | _given(fraction, count, review, with_model, keep is not None))
        parts = {role: Share(part, together.ranks.rank, together.ranks.size) for role, part in samples.items()}
        run.shared = True
        told = progress if together.leads else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # or nothing of the selection could take part in training
        fixed, model_hash = None, ""
        with attempt(together):
            if with_model and model is not None:
                stack.enter_context(on_device(model, device))
                fixed = FixedModel(model, method.scope, loss_fn, batch_losses)
                model_hash = fixed.fingerprint
                stack.enter_context(fixed)
            device_ = _device(model if run.passes else None)
            kind = "none" if device_ is None else device_.type
            identity |= {"model": model_hash if run.passes else "", "device": kind}
        if together is not None:
            together.alike({"model": model_hash})
        passes = Passes(run, parts, fixed if run.passes else None, told, together)
        keeper = None
        if keep is not None:
            with attempt(together):
                keeper = Keeper(keep, passes, identity, device_ or torch.device("cpu"), together)
            keeper.restore()
            with attempt(together):
                if passes.num_samples is not None:
                    at_length(passes.num_samples)
            if together is not None:  # who left a meeting at once would keep the others waiting
                stack.enter_context(keeper.held_back())
        _go(passes, keeper, at_length)
        picked = choose(passes, run, method, amount, together)
        with attempt(together):
            _check_model_unchanged(fixed, model_hash)
        notes: list[str] = []
        seen = look_at(data, parts["data"], picked, fixed, passes, run, notes, together) if review else None
        selection = assemble(picked, passes, seen, method, run, model_hash if run.passes else "", notes, together)
        if keeper:
            with attempt(together):
                pass  # Ctrl-C in the meantime
            keeper.remove()
    if selection.writes and (lost := vanished(selection.report.class_counts)):
        warnings.warn(lost, stacklevel=2)
    return selection


def _identity(method: Method, data: Samples) -> dict[str, Any]:
    """What a checkpoint must agree with. The number to keep is not in it: it matters to the choice alone."""
    return {
        "method": method.name,
        "options": options_of(method),
        "model": "",
        "number of samples": data.num_samples,
        "batch size": data.batch_size,
        "device": "",
        **versions(),
    }


def _keep(progress: Any, checkpoint: Any, every: float) -> Keep | None:
    if isinstance(checkpoint, Keep):
        check_callers(progress, checkpoint.folder)
        return checkpoint
    check_callers(progress, checkpoint)
    if checkpoint is None:
        return None
    check_writable(Path(checkpoint))
    return Keep(Path(checkpoint), every, say=_warn)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)


def _device(model: nn.Module | None) -> torch.device | None:
    return None if model is None else next((part.device for part in model.parameters()), torch.device("cpu"))


def _check_model_unchanged(fixed: FixedModel | None, model_hash: str) -> None:
    if fixed is not None and fixed.fingerprint != model_hash:
        raise SelectionError(
            "the model changed while it scored: its parameters or buffers are not those of the beginning. Train it "
            "before or after, and not in the loss or in another thread."
        )


def _given(
    fraction: float | None, count: int | None, review: bool, with_model: bool, checkpoint: bool
) -> dict[str, Any]:
    """What all processes must have been given beside what a checkpoint must agree with."""
    given = {"fraction": fraction, "count": count, "review": review, "model": with_model, "checkpoint": checkpoint}
    return {f"whether there is a {name}" if isinstance(value, bool) else name: value for name, value in given.items()}


def _go(passes: Passes, keeper: Keeper | None, at_length: Callable[[int], object]) -> None:
    if keeper is None:
        passes.go(lambda: None, at_length)
        return
    with keeper.guard():
        passes.go(keeper.after_batch, at_length, keeper, kept=True)
        keeper.after_passes()
