"""Gathers, in an ordinary loop, what the factors of KFAC are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steepest._typing import Sharing
from steepest._validation import check_choice
from steepest.engine.records import Record
from steepest.engine.tape import Use
from steepest.engine.watch import Pass, Watch
from steepest.errors import CaptureError, InvalidOptionError, UnsupportedModelError
from steepest.linalg.decompositions import Decomposition
from steepest.optim.blocks import Block
from steepest.optim.curvature import Gathered
from steepest.optim.fisher import Fisher, OutputFisher
from steepest.optim.terms import LossTerms, check_terms, count_terms

__all__ = ["Gathering", "Recipe"]

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Recipe:
    """What is gathered; the options of `steepest.KFAC` of these names."""

    fisher: Fisher
    sharing: Sharing
    reduction: Reduction
    loss_terms: LossTerms

    def __post_init__(self) -> None:
        if not isinstance(self.fisher, Fisher):
            raise InvalidOptionError(f"fisher={self.fisher!r}: give an object such as steepest.Empirical().")
        check_choice("sharing", self.sharing, ("expand", "reduce"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_terms(self.loss_terms)

    @property
    def from_output(self) -> bool:
        """Whether gradients come from the output's distribution instead of from the labels."""
        return isinstance(self.fisher, OutputFisher)

    def grad_scale(self, terms: int, loss_scale: float) -> float:
        """Turn sums of squares of captured gradients into the mean over samples.

        Args:
            terms: Terms of the loss in all backwards of the step.
            loss_scale: What the loss was multiplied with.

        Returns:
            The factor.
        """
        if self.from_output:
            return 1 / terms
        return (terms if self.reduction == "mean" else 1 / terms) / loss_scale**2


class _Batch:
    """One forward that may get a backward; only then does it count."""

    def __init__(self, terms: int) -> None:
        self.terms = terms
        self.records: list[tuple[Record, float]] = []


class Gathering:
    """Sums over the samples of one step, from one backward or several, gathered while it is under way.

    Args:
        model: The model, watched as long as this lives.
        blocks: Layers with factors, by the qualified name of their weight.
        recipe: What is gathered.
        due: Asked at every forward: the number of the step if its samples are to be gathered, else None.
        decomposition: The decomposition in use for a layer; some learn from single gradients.
        on_record: Called in every backward with what it leaves for a layer; None watches only where something is due.
        exact_rows: Whether the gradients of single samples are needed, and not only their sums over all positions.
        place: Number of this process and how many there are, so that no two draw the same labels.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Block],
        recipe: Recipe,
        *,
        due: Callable[[], int | None],
        decomposition: Callable[[Block], Decomposition | None],
        on_record: Callable[[Record], None] | None = None,
        exact_rows: bool = False,
        place: Callable[[], tuple[int, int]] = lambda: (0, 1),
    ) -> None:
        self.parts: dict[str, Gathered] = {}
        self.terms = 0
        self.grad_weight = 1.0
        self._forwards = 0
        self._blocks, self._recipe = blocks, recipe
        self._due, self._decomposition, self._on_record, self._place = due, decomposition, on_record, place
        self._watch = Watch(
            model,
            {name: p for block in blocks.values() for name, p in zip(block.names, block.params, strict=True)},
            is_due=lambda: on_record is not None or due() is not None,
            exact_rows=on_record is not None or exact_rows or recipe.sharing == "reduce",
            on_forward=self._forward,
            on_gradient=self._gradient,
        )

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has stopped."""
        return self._watch.is_closed

    def clear(self) -> None:
        """Forget what was gathered."""
        self._watch.abandon()
        self.parts.clear()
        self.terms = 0
        self._forwards = 0

    def _forward(self, seen: Pass) -> _Batch | None:
        step = self._due()
        if step is None or not seen.uses:
            return None
        for use, _ in seen.uses:
            self._refuse_foreign(use)
        recipe = self._recipe
        if not isinstance(recipe.fisher, OutputFisher):
            counted = recipe.reduction == "mean"
            return _Batch(count_terms(recipe.loss_terms, seen.output, seen.rows) if counted else seen.rows)
        if not isinstance(seen.output, Tensor) or seen.output.ndim < 2:
            raise CaptureError(
                f"The model returned {_kind(seen.output)}, and {recipe.fisher} needs a tensor [..., C] with the "
                "components in its last dimension: return one, or use fisher=steepest.Empirical()."
            )
        batch = _Batch(seen.output.shape[:-1].numel())
        rank, size = self._place()
        number, self._forwards = self._forwards * size + rank, self._forwards + 1
        with torch.no_grad():
            for root, weight in recipe.fisher.roots(seen.output, (step, number)):
                batch.records += [(record, weight) for record in seen.records(seen.output, root)]
        return batch

    def _refuse_foreign(self, use: Use) -> None:
        """Refuse a call of a layer's parameters as those of another kind of layer: its factors are other ones."""
        block = self._blocks.get(use.names[0])
        if block is None or set(use.names) != set(block.names) or (use.function == "embedding") != block.is_table:
            raise UnsupportedModelError(
                f"The parameters of {use} are not called as in the layer that they belong to, as where a linear layer "
                "takes the table of an embedding: it has other Kronecker factors. Remedy: leave the layer to AdamW "
                "with skip=, or call only the layer itself."
            )

    def _gradient(self, batch: _Batch | None, record: Record) -> None:
        if self._on_record is not None:
            self._on_record(record)
        if batch is None:
            return
        self.terms, batch.terms = self.terms + batch.terms, 0
        if not self._recipe.from_output:
            self._add(record, self.grad_weight)
        records, batch.records = batch.records, []
        for drawn, weight in records:
            self._add(drawn, weight)

    def _add(self, record: Record, weight: float) -> None:
        name = record.names[0]
        gathered = self.parts.setdefault(name, Gathered())
        gathered.add(record, self._recipe.sharing, weight, self._decomposition(self._blocks[name]))


def _kind(output: object) -> str:
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
