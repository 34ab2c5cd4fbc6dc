"""From uses and their output gradients to a few records that cover all rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steepest.engine.layout import Layout, agrees, candidates, is_silent
from steepest.engine.records import Record, join
from steepest.engine.tape import REFERENCE_REMEDY, Use
from steepest.errors import CaptureError, UnsupportedModelError

__all__ = [
    "LayoutFinder",
    "assemble",
    "explained",
    "gradients_of_uses",
    "output_gradients",
    "reached",
    "single_row",
]


def output_gradients(
    rows: Tensor, uses: Sequence[Use], params: Mapping[str, Tensor], weights: Tensor | None, keep: bool
) -> list[Tensor]:
    """Run one backward to the outputs of the captured calls, and to nothing else.

    Autograd skips every weight gradient. The parameters themselves are asked for as well: the capture cut them
    off, so a gradient that reaches one comes from a use that the capture did not see.

    Args:
        rows: ``[R]`` or ``[B, K]`` with graph.
        uses: The captured calls that the rows depend on.
        params: The differentiated parameters by name.
        weights: Of the same shape, to weight the rows by, or None for their sum.
        keep: Whether the graph is needed again.

    Returns:
        One gradient for each use, of the shape of its output.

    Raises:
        CaptureError: If the graph is gone already, or was spoilt by an in-place operation.
    """
    weighting = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    targets: list[Any] = [use.edge for use in uses]
    try:
        grads = torch.autograd.grad(rows, [*targets, *params.values()], weighting, allow_unused=True, retain_graph=keep)
    except RuntimeError as error:
        translated = explained(error)
        raise translated from error
    return gradients_of_uses(grads, uses, params, rows, ())


def gradients_of_uses(
    grads: Sequence[Tensor | None],
    uses: Sequence[Use],
    params: Mapping[str, Tensor],
    rows: Tensor,
    lead: tuple[int, ...],
) -> list[Tensor]:
    """Sort what one backward gave: the gradients of the uses, and none of the parameters.

    Args:
        grads: Gradients of the edges of the uses, then of the parameters.
        uses: The captured calls.
        params: The differentiated parameters by name.
        rows: What was differentiated.
        lead: Sizes of the batch of backwards, empty for one.

    Returns:
        ``[*lead, *sizes]`` for each use.

    Raises:
        UnsupportedModelError: If a parameter reaches the rows by another way.
    """
    hidden = [name for name, grad in zip(params, grads[len(uses) :], strict=True) if grad is not None]
    if hidden:
        raise UnsupportedModelError(
            f"Parameter {', '.join(map(repr, hidden))} reaches the rows through a call that the capture does not see "
            "(a custom autograd.Function, a fused kernel, a graph made before the capture, or a layer fed with a "
            "buffer instead of the batch). Remedy: call supported layers on the batch inside `with capture:`, "
            f"{REFERENCE_REMEDY}."
        )
    # A gradient is None where the rows depend on a use in name only, through a function that stops gradients.
    return [
        torch.zeros((*lead, *use.sizes), dtype=rows.dtype, device=rows.device)
        if grad is None
        else grad.reshape((*lead, *use.sizes))
        for use, grad in zip(uses, grads, strict=False)
    ]


def reached(rows: Tensor, uses: Sequence[Use]) -> tuple[list[Use], tuple[object, ...]]:
    """Find the uses that rows depend on, by a walk over the graph.

    Args:
        rows: ``[R]`` or ``[B, K]`` with graph.
        uses: The captured calls.

    Returns:
        Those of them below ``rows``, in order, and the shape of the graph: another closure has another one.
    """
    wanted = {use.edge.node for use in uses}
    root = rows.grad_fn
    found, stack, kinds = {root}, [root], []
    while stack:
        node = stack.pop()
        kinds.append(type(node))
        for below, _ in node.next_functions if node is not None else ():
            if below is not None and below not in found:
                found.add(below)
                stack.append(below)
    below_rows = wanted & found
    used = [use for use in uses if use.edge.node in below_rows]
    return used, (len(rows), tuple(rows.shape), *kinds, *((use.function, use.names, use.sizes) for use in used))


def explained(error: RuntimeError) -> Exception:
    """Translate what autograd says of a graph that cannot be walked.

    Args:
        error: What it raised.

    Returns:
        An error that says what to do, or the same one.
    """
    text = str(error)
    if "second time" in text:
        return CaptureError(
            "The graph of the rows was freed: backward() ran on it before. Remedy: leave the backward to the engine, "
            "or make the rows anew inside `with capture:`."
        )
    if "inplace operation" in text:
        return CaptureError(
            f"A tensor that the gradient needs was edited in place: {text.splitlines()[0]} Remedy: replace the "
            "in-place operation (x += ..., relu_, out=...) by its out-of-place form."
        )
    if "checkpoint" in text.lower():
        return UnsupportedModelError(
            "Activation checkpointing in its reentrant form hides the layers. Remedy: "
            f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False), {REFERENCE_REMEDY}."
        )
    return error


class LayoutFinder:
    """Finds the layout of every use by a probe, and remembers it for graphs of the same shape.

    Args:
        every: How often a graph seen before is probed again: at its 1st, 2nd, 4th, 8th, ... batch and at every
            multiple of this.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._known: dict[tuple[object, ...], tuple[Layout, ...]] = {}
        self._seen: dict[tuple[object, ...], int] = {}
        self._probes = 0

    @property
    def probes(self) -> int:
        """How many extra backward passes the probe has taken so far."""
        return self._probes

    def known(self, signature: tuple[object, ...]) -> tuple[Layout, ...] | None:
        """Layouts settled before for a graph of the same shape; None when they are to be probed."""
        seen = self._seen[signature] = self._seen.get(signature, 0) + 1
        due = seen % self.every == 0 or seen & (seen - 1) == 0
        return None if due else self._known.get(signature)

    def weights(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the weights of two probes, from a generator of its own: the user's is untouched.

        Args:
            rows: Number of rows.
            device: Where they lie.

        Returns:
            Two vectors of weights, each zero on the half of the rows that the other holds.
        """
        self._probes += 1
        generator = torch.Generator("cpu").manual_seed(self._probes)  # whatever the default device
        # Powers of two scale every row's gradient without rounding, however ill-conditioned the model has become.
        # There are 16 of them: rows that share one are told apart by the zeros or by the next probe.
        weights = 2.0 ** (torch.randperm(rows, generator=generator, device="cpu") % 16 - 8)
        half = torch.zeros(rows, device="cpu")
        half[torch.randperm(rows, generator=generator, device="cpu")[: rows // 2]] = 1
        return (weights * half).to(device), (weights * (1 - half)).to(device)

    def coefficients(self, components: int, device: torch.device) -> Tensor:
        """Draw weights of the rows of a sample: gradients that cancel in their sum do not cancel in this one.

        Args:
            components: Number of rows of a sample.
            device: Where they lie.

        Returns:
            One number for each, none of them small.
        """
        generator = torch.Generator("cpu").manual_seed(self._probes)
        return (0.5 + torch.rand(components, generator=generator, device="cpu")).to(device)

    def find(
        self,
        uses: Sequence[Use],
        full: Sequence[Tensor],
        probe: Callable[[Tensor, bool], Sequence[Tensor]],
        signature: tuple[object, ...],
    ) -> tuple[Layout, ...]:
        """Compare the gradients of every use with those of two probes, one probe in memory at a time.

        Args:
            uses: The uses that the rows depend on.
            full: Their gradients of the sum of all rows.
            probe: Gives their gradients of the rows' weighted sum; called with the weights and whether it is the last.
            signature: Key to remember the answer by.

        Returns:
            A layout for every use.

        Raises:
            UnsupportedModelError: If rows interact in one of them.
        """
        rows = int(cast("int", signature[0]))
        possible = [list(candidates(w.shape[: use.num_lead], rows)) for use, w in zip(uses, full, strict=True)]
        # The lowest precision and the largest gradient anywhere bound what rounding can do to any of them.
        eps = max(torch.finfo(grads.dtype).eps for grads in full)
        tolerance = min(64 * eps, 0.1) * torch.stack([grads.abs().amax().double() for grads in full]).amax()
        settled = bool(tolerance.isfinite())  # else nothing can be told; the optimizer refuses such a step itself
        for weights, last in zip(self.weights(rows, full[0].device), (False, True), strict=True):
            probed = probe(weights, last)
            for i, (whole, part) in enumerate(zip(full, probed, strict=True)):
                if tolerance.isfinite():
                    possible[i] = [p for p in possible[i] if agrees(p, whole, part, weights, tolerance)]
                if not possible[i]:
                    error = _interaction(uses[i], whole, rows)
                    raise error
                settled = settled and not is_silent(possible[i][0], whole, weights)
        layouts = tuple(options[0] for options in possible)
        if settled:
            self._known[signature] = layouts
        return layouts


def _interaction(use: Use, grads: Tensor, rows: int) -> UnsupportedModelError:
    """Build the error for rows that have no part of their own in a captured call."""
    lead = tuple(grads.shape[: use.num_lead])
    return UnsupportedModelError(
        f"The {rows} rows cannot be told apart in {use}, whose output has leading sizes {lead}: either row n depends "
        "on other samples there (batch statistics, a mean over the batch, a loss that compares samples), or the batch "
        f"is not a dimension of it, or the number of rows is wrong. Remedy: make row n depend on sample n alone, give "
        f"several rows of each sample in shape (batch, K) and not flattened, {REFERENCE_REMEDY}."
    )


def single_row(uses: Sequence[Use], grads: Sequence[Tensor]) -> tuple[Layout, ...]:
    """Layouts for one row, which everything belongs to."""
    return tuple(next(candidates(tuple(g.shape[: u.num_lead]), 1)) for u, g in zip(uses, grads, strict=True))


def assemble(blocks: Sequence[tuple[int, Sequence[Record]]]) -> list[Record]:
    """Merge the records of all uses into one for each group of parameters, covering all rows.

    Parameters that some record holds together belong to one group; a tied weight joins the groups of its layers.

    Args:
        blocks: For each block of rows, their number and the records of the uses.

    Returns:
        Records of disjoint groups of parameters.
    """
    if len(blocks) == 1:  # the usual case: every parameter used once
        records = list(blocks[0][1])
        if len({name for record in records for name in record.names}) == sum(len(record.names) for record in records):
            return records
    groups: list[set[str]] = []
    for names in dict.fromkeys(frozenset(record.names) for _, records in blocks for record in records):
        touching = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names]
        groups.append(set(names).union(*touching))
    return [_assemble_group(group, blocks) for group in groups]


def _assemble_group(group: set[str], blocks: Sequence[tuple[int, Sequence[Record]]]) -> Record:
    parts: list[tuple[int, Record | None]] = []
    for rows, records in blocks:
        mine = [record for record in records if group.issuperset(record.names)]
        parts.append((rows, join(mine, rows=False) if mine else None))
    if len(parts) == 1 and parts[0][1] is not None:
        return parts[0][1]
    example = next(record for _, record in parts if record is not None)
    return join([record if record is not None else example.zero_rows(rows) for rows, record in parts], rows=True)
