"""The tape of one capture: which tensors are made of parameters alone, and where they meet the data."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from steepest.engine.layout import Layout
from steepest.engine.records import CHUNK_BYTES, MaterializedRecord, Record
from steepest.errors import CaptureError, UnsupportedModelError

__all__ = ["REFERENCE_REMEDY", "Slot", "Tape", "Use", "function_name", "refusal"]

REFERENCE_REMEDY = "or differentiate this model with steepest.ReferenceCapture (slow, exact for everything)"


def function_name(func: Any) -> str:
    """Name of a torch function, for messages."""
    return str(getattr(func, "__name__", func))


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor made of parameters (and buffers) alone.

    Args:
        tensor: The parameter itself, or a tensor computed from parameters with its graph.
        names: Qualified names of the parameters in it; empty for a buffer.
    """

    tensor: Tensor
    names: tuple[str, ...]

    @property
    def is_parameter(self) -> bool:
        """Whether this is one parameter itself rather than something computed from parameters."""
        return len(self.names) == 1 and self.tensor.is_leaf

    def leaf(self) -> Tensor:
        """Return an alias that cuts the graph, so that real parameters are unreachable from the losses.

        It requires grad like the parameter, so the graph that autograd builds (and what activation checkpointing
        recomputes) is the one of ordinary training.
        """
        return self.tensor.detach().requires_grad_()


class Use(ABC):
    """One call in which a parameter met the data.

    Args:
        tape: The tape.
        function: Name of the function.
        slots: The parameters of the call.
        out: Its output, or the leaf whose gradient is wanted.
        inputs: The data that the record will need, as the call saw it.
        num_lead: How many of the leading dimensions of ``out`` may carry the rows.
    """

    def __init__(
        self,
        tape: "Tape",
        function: str,
        slots: tuple[Slot, ...],
        out: Tensor,
        inputs: Tensor | None,
        num_lead: int,
    ) -> None:
        self.function = function
        self.slots = slots
        self.names = tuple(name for slot in slots for name in slot.names)
        self.num_lead = num_lead
        self.sizes = tuple(out.shape)
        # The edge of this moment: later in-place edits of the output do not move it. An in-place edit of a view
        # rewrites the view's own edge, but not its base's.
        base = out._base if out._is_view() and _stands_for(out, out._base) else None
        self.edge: GradientEdge = get_gradient_edge(out if base is None else base)
        self._inputs = None if inputs is None else inputs.detach()
        self._version = None if inputs is None else inputs._version
        self._params = tape.params
        self._slot_versions = [slot.tensor._version for slot in slots]

    def __str__(self) -> str:
        return f"{self.function} with {', '.join(repr(name) for name in self.names)}"

    @property
    def inputs(self) -> Tensor:
        """The captured input, if it is still what the forward pass saw.

        Raises:
            CaptureError: If it was edited in place since.
        """
        if self._inputs is None or self._inputs._version != self._version:
            raise CaptureError(
                f"The input of {self} was edited in place after the call, so the captured record is wrong. "
                "Replace the in-place operation (x += ..., relu_, out=...) by its out-of-place form."
            )
        return self._inputs

    @abstractmethod
    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Turn the output gradients into a record of real parameters."""

    def _key(self, slot: Slot | None) -> str | None:
        if slot is None:
            return None
        return slot.names[0] if slot.is_parameter else f"<{self.slots.index(slot)}>"

    def _settle(self, record: Record) -> Record:
        """Express a record of slots in real parameters: those computed from parameters are pulled back."""
        if all(slot.is_parameter for slot in self.slots):
            return record
        self._check_slots()
        grads = record.per_sample_grads()
        settled: MaterializedRecord | None = None
        for slot in self.slots:
            key = str(self._key(slot))
            part = {key: grads[key]} if slot.is_parameter else self._pull_back(slot, grads[key])
            made = MaterializedRecord(part)
            settled = made if settled is None else settled.concat_shared(made)
        return settled or record

    def _check_slots(self) -> None:
        if [slot.tensor._version for slot in self.slots] != self._slot_versions:
            raise CaptureError(
                f"A tensor computed from {', '.join(map(repr, self.names))} was edited in place after its use in "
                f"{self.function}. Remedy: replace the in-place operation by its out-of-place form."
            )

    def _pull_back(self, slot: Slot, grads: Tensor, through: int | None = None) -> dict[str, Tensor]:
        """Chain per-sample gradients of a computed tensor to the parameters it was computed from.

        Args:
            slot: The tensor.
            grads: ``[R, *shape]``.
            through: Size of the largest tensor on the way, which the backward makes for every row.

        Returns:
            ``[R, *shape]`` for each parameter.
        """
        params = [self._params[name] for name in slot.names]
        size = max(through or 0, slot.tensor.numel()) * grads.itemsize
        pulled = [
            torch.autograd.grad(slot.tensor, params, part, retain_graph=True, is_grads_batched=True, allow_unused=True)
            for part in grads.to(slot.tensor.dtype).split(max(1, CHUNK_BYTES // max(1, size)))
        ]
        columns = zip(slot.names, zip(*pulled, strict=True), strict=True)
        return {name: torch.cat(parts) for name, parts in columns if parts[0] is not None}


def _stands_for(view: Tensor, base: Tensor | None) -> bool:
    """Whether a view's base holds the same numbers in the same order, with a gradient."""
    return (
        base is not None
        and base.requires_grad
        and view.numel() == base.numel()
        and view.is_contiguous()
        and base.is_contiguous()
    )


class Tape:
    """Everything that one ``with capture:`` block records.

    Args:
        params: The parameters to differentiate, by qualified name.
        buffers: The model's buffers, which count as constants.
        slot: How parameters take part in their calls: cut off from the graph, or attached to it.
    """

    def __init__(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *, slot: type[Slot] = Slot) -> None:
        self.params = params
        self.uses: list[Use] = []
        self.without_grad: set[str] = set()
        self._slots = {id(tensor): Slot(tensor, ()) for tensor in buffers.values()}
        self._slots |= {id(tensor): slot(tensor, (name,)) for name, tensor in params.items()}
        self._buffer_names = {id(tensor): name for name, tensor in buffers.items()}

    def buffer_name(self, tensor: Tensor | None) -> str:
        """Qualified name of the module that owns a buffer, for messages."""
        return self._buffer_names.get(id(tensor), "").rpartition(".")[0]

    def slot(self, value: Any) -> Slot | None:
        """Return the slot of a tensor made of parameters alone, None for anything else."""
        return self._slots.get(id(value))

    def trained(self, value: Any) -> Slot | None:
        """Return the slot of a tensor that holds differentiated parameters, None for anything else."""
        slot = self._slots.get(id(value))
        return slot if slot is not None and slot.names else None

    def slots_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Slot]:
        """Slots among the arguments of a call, looking one level into lists and tuples."""
        known = self._slots
        found = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in known:
                found.append(known[id(value)])
            elif type(value) is list or type(value) is tuple:
                found.extend(known[id(item)] for item in value if id(item) in known)
        return found

    def derive(self, out: Any, sources: list[Slot]) -> Any:
        """Register what was computed from parameters alone; the tape keeps it alive, so ids stay unique."""
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, Tensor) and id(tensor) not in self._slots:
                names = dict.fromkeys(name for slot in sources for name in slot.names)
                self._slots[id(tensor)] = Slot(tensor, tuple(names) if tensor.requires_grad else ())
        return out


def refusal(function: str, slots: Iterable[Slot], why: str, remedy: str) -> UnsupportedModelError:
    """Build the error for a call without a rule.

    Args:
        function: Name of the called function.
        slots: The parameters it was called with.
        why: Why it cannot work.
        remedy: What to do instead; `ReferenceCapture` is named in any case.

    Returns:
        The error, to be raised.
    """
    names = ", ".join(repr(name) for name in dict.fromkeys(n for s in slots for n in s.names))
    return UnsupportedModelError(
        f"Parameter {names} is used in {function}(): {why}. Remedy: {remedy}, {REFERENCE_REMEDY}."
    )
