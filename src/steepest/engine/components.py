"""Vector rows, K to a sample: their output gradients from one batched backward, and the records made of them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.assembly import explained, gradients_of_uses
from steepest.engine.conv import ConvRecord
from steepest.engine.embedding import EmbeddingRecord
from steepest.engine.layout import Layout
from steepest.engine.linear import LinearRecord
from steepest.engine.records import MaterializedRecord, Record
from steepest.engine.tape import Use
from steepest.engine.vector import LinearVectorRecord
from steepest.engine.vector_conv import ConvVectorRecord

__all__ = ["ComponentBackward", "vector_record"]


class ComponentBackward:
    """Differentiates the components of vector rows, all K in one backward where torch can batch it.

    One backward over a batch of K selections (``torch.vmap`` of the graph's own backward) does for all components what
    one backward does for scalar rows. Where a node of the graph has no rule for that (a custom function that looks at
    numbers, dropout that activation checkpointing draws again), K backwards run instead, one after the other: the same
    numbers, K times the passes. Which of the two a graph takes is remembered by its shape.
    """

    def __init__(self) -> None:
        self._batched: dict[tuple[object, ...], bool] = {}

    def gradients(
        self,
        rows: Tensor,
        uses: Sequence[Use],
        params: Mapping[str, Tensor],
        signature: tuple[object, ...],
        keep: bool,
    ) -> list[Tensor]:
        """Gradients of every component's sum over samples in the outputs of the uses.

        Args:
            rows: ``[B, K]`` with graph.
            uses: The captured calls that the rows depend on.
            params: The differentiated parameters by name.
            signature: Shape of the graph.
            keep: Whether the graph is needed again.

        Returns:
            ``[K, *sizes]`` for each use.
        """
        edges: list[Any] = [use.edge for use in uses]
        targets = [*edges, *params.values()]
        if self._batched.get(signature, True):
            # The first time, the graph must outlive a backward that fails on its way.
            grads = _all_at_once(rows, targets, keep or signature not in self._batched)
            self._batched[signature] = grads is not None
            if grads is not None:
                return gradients_of_uses(grads, uses, params, rows, rows.shape[1:])
        parts = []
        for number in range(rows.shape[1]):
            grads = _one(rows, number, targets, keep or number < rows.shape[1] - 1)
            parts.append(gradients_of_uses(grads, uses, params, rows, ()))
        return [torch.stack(column) for column in zip(*parts, strict=True)]


def _all_at_once(rows: Tensor, targets: Sequence[Any], keep: bool) -> Sequence[Tensor | None] | None:
    """``[K, *sizes]`` for each target, or None where the graph cannot be differentiated in a batch."""
    components = rows.shape[1]
    selections = torch.eye(components, dtype=rows.dtype, device=rows.device).unsqueeze(1).expand(-1, len(rows), -1)
    try:
        with warnings.catch_warnings():  # a node that torch batches by a loop of its own is slower, and as right
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.autograd.grad(
                rows, targets, selections, allow_unused=True, retain_graph=keep, is_grads_batched=True
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what is wrong with the graph itself, single backwards say as well
        return None


def _one(rows: Tensor, number: int, targets: Sequence[Any], keep: bool) -> Sequence[Tensor | None]:
    """Gradients of one component's sum over the samples."""
    selection = torch.zeros_like(rows)
    selection[:, number] = 1
    try:
        return torch.autograd.grad(rows, targets, selection, allow_unused=True, retain_graph=keep)
    except RuntimeError as error:
        translated = explained(error)
        raise translated from error


def vector_record(use: Use, output_grads: Tensor, layout: Layout, samples: int) -> Record:
    """Turn the output gradients of all components into one record of all rows, ordered sample by sample.

    Args:
        use: The captured call.
        output_grads: ``[K, *sizes]``.
        layout: Where the samples are in its output.
        samples: Number of samples B.

    Returns:
        A record of B K rows; of layers without a form of their own, with explicit gradients.
    """
    first = use.record(output_grads[0], layout, samples)
    options, tensors = first.parts()
    if type(first) is LinearRecord:
        g = torch.stack([layout.canonical(grads, use.num_lead) for grads in output_grads], 1)
        return LinearVectorRecord(options[0], options[1], tensors[0], g)
    if type(first) is ConvRecord:
        g = torch.stack([layout.canonical(grads, use.num_lead).flatten(0, 1) for grads in output_grads], 1)
        return ConvVectorRecord(options[0], options[1], tensors[0], g, options[2], samples)
    records = [first, *(use.record(grads, layout, samples) for grads in output_grads[1:])]
    if type(first) is EmbeddingRecord:  # token numbers are small beside the gradients
        g = torch.stack([record.parts()[1][1] for record in records], 1).flatten(0, 1)
        return EmbeddingRecord(options[0], tensors[0].repeat_interleave(len(records), 0), g, options[1])
    return _explicit(records)


def _explicit(records: Sequence[Record]) -> MaterializedRecord:
    """Interleave records of one component each."""
    grads = [record.per_sample_grads() for record in records]
    return MaterializedRecord({name: torch.stack([g[name] for g in grads], 1).flatten(0, 1) for name in grads[0]})
