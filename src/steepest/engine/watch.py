"""What the layers of a model see in an ordinary training loop, without a closure and without a second backward."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from steepest.engine.embedding import EmbeddingUse
from steepest.engine.layout import Layout, candidates
from steepest.engine.records import Record
from steepest.engine.rules import COMPOSITE, RULES
from steepest.engine.settle import settle
from steepest.engine.tape import Slot, Tape, Use, function_name
from steepest.errors import CaptureError, UnsupportedModelError

__all__ = ["Pass", "Watch"]

_Note = TypeVar("_Note")


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward of the model.

    Args:
        uses: The calls in which watched parameters met the data, with the layout of each.
        rows: Number of samples of the batch.
        output: What the model returned.
    """

    uses: tuple[tuple[Use, Layout], ...]
    rows: int
    output: Any

    def records(self, of: Tensor, weights: Tensor | None = None) -> list[Record]:
        """Differentiate something computed from the output, leaving the graph for the caller's own backward.

        Args:
            of: A tensor with a graph, such as losses of labels that were drawn.
            weights: Weights of its entries, of its shape; None sums them.

        Returns:
            A record for every use that it depends on.
        """
        edges: list[Any] = [use.edge for use, _ in self.uses]
        weighting = torch.ones_like(of) if weights is None else weights
        grads = torch.autograd.grad(of, edges, weighting, retain_graph=True, allow_unused=True)
        return [
            use.record(grad.reshape(use.sizes), layout, self.rows)
            for (use, layout), grad in zip(self.uses, grads, strict=True)
            if grad is not None
        ]


class _Attached(Slot):
    """A watched parameter: it takes part in the forward itself, so that ``backward`` reaches it."""

    def leaf(self) -> Tensor:
        return self.tensor


class _WatchMode(TorchFunctionMode):
    """Notes, within one forward of the model, every call that touches a watched parameter."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.batches: dict[Use, int] = {}  # within attention: how many sequences its [positions, batch, ...] hold

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        slots = self.tape.slots_in(args, kwargs)
        if not any(slot.tensor.requires_grad for slot in slots):  # they may have been frozen since
            return func(*args, **kwargs)
        if func in COMPOSITE:
            before = len(self.tape.uses)
            with self:
                out = COMPOSITE[func](*args, **kwargs)
            query = args[0] if args else kwargs["query"]
            batch = query.shape[1] if query.ndim == 3 else 1
            self.batches.update(dict.fromkeys(self.tape.uses[before:], batch))
            return out
        if not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and func in RULES:
                self.tape.without_grad.update(name for slot in slots for name in slot.names)
            return out
        if func in RULES:
            return RULES[func](self.tape, func, *args, **kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, (Tensor, tuple, list)) and _has_graph(out):
            raise UnsupportedModelError(
                f"Parameter {', '.join(repr(n) for slot in slots for n in slot.names)} is used in "
                f"{function_name(func)}() besides its layer: its gradient would hold a part that the layer's curvature "
                "does not know. Remedy: leave it to AdamW with skip=, or call only the layer itself."
            )
        return out


def _has_graph(out: Any) -> bool:
    items = out if isinstance(out, (tuple, list)) else (out,)
    return any(isinstance(item, Tensor) and item.requires_grad for item in items)


class _Hook:
    """A hook of a model that keeps its watch alive no longer than others do, and does nothing in copies."""

    def __init__(self, method: Callable[..., None]) -> None:
        self._method: Any = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        method = self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle, ()


def _idle() -> Callable[..., None]:
    """What a hook becomes in a copy or a pickle of its model."""
    return _nothing


def _nothing(*_args: Any) -> None:
    """Do nothing."""


def _remove(handles: Iterable[RemovableHandle], open_: list[_WatchMode | None]) -> None:
    for handle in handles:
        handle.remove()
    _leave(open_)


def _leave(open_: list[_WatchMode | None]) -> None:
    for mode in open_:
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    open_.clear()


def _reaches_parameters(use: Use) -> bool:
    """Whether the backward under way goes on to the parameters; one for input gradients alone trains nothing."""
    leaves = [slot.tensor for slot in use.slots if slot.tensor.requires_grad]
    try:
        return any(torch._C._will_engine_execute_node(get_gradient_edge(leaf).node) for leaf in leaves)
    except RuntimeError:  # torch.autograd.grad was asked for the parameter itself
        return True


def _refuse_second_derivatives(use: Use) -> None:
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"The output of {use} was differentiated in the inputs with create_graph=True: the gradient of such a loss "
            "holds a part that the layer's curvature does not know. Remedy: leave these layers to AdamW with skip=, or "
            "use steepest.Sven with steepest.ReferenceCapture."
        )


class Watch(Generic[_Note]):
    """Watch some layers of a model while it is trained by ``loss.backward()``.

    One pair of hooks on the model notes the forward; nothing is registered on its layers. They are removed by
    `close`, and when the watch is collected. In copies of the model they do nothing.

    Args:
        model: The model; only calls of the model itself are seen, not of its parts.
        params: The parameters to watch, weights and biases of Linear and convolution layers, by qualified name.
        is_due: Asked at every forward with gradients whether it is to be watched.
        exact_rows: Whether it matters which entries of an output belong to which sample. Where the sizes leave that
            open, the first batch of a shape is differentiated twice more to find it out; with embeddings it always is.
        on_forward: Called after a watched forward, before the caller's backward. What it returns is handed to
            ``on_gradient``; it must not hold the output, or the graph would hold itself.
        on_gradient: Called during the caller's backward with that and the record of every use, when it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        *,
        is_due: Callable[[], bool],
        exact_rows: bool,
        on_forward: Callable[[Pass], _Note],
        on_gradient: Callable[[_Note, Record], None],
    ) -> None:
        self._model = weakref.ref(model)
        self._params, self._exact_rows = dict(params), exact_rows
        self._is_due, self._on_forward, self._on_gradient = is_due, on_forward, on_gradient
        # One entry for every call under way: calls within calls belong to the outermost and have None.
        self._open: list[_WatchMode | None] = []
        self._settled: dict[tuple[object, ...], tuple[Layout, ...]] = {}
        handles = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True),
            model.register_forward_hook(_Hook(self._end), with_kwargs=True, always_call=True),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles, self._open)

    def close(self) -> None:
        """Remove the hooks: nothing is seen from now on."""
        self._finalizer()

    @property
    def is_closed(self) -> bool:
        """Whether the hooks are removed."""
        return not self._finalizer.alive

    def abandon(self) -> None:
        """Leave a forward that was interrupted (Ctrl-C), of which torch does not tell the hooks."""
        _leave(self._open)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open or not torch.is_grad_enabled() or not self._is_due():
            self._open.append(None)
            return
        mode = _WatchMode(Tape(self._params, {}, slot=_Attached))
        self._open.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        mode = self._open.pop() if self._open else None
        if mode is None:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the forward raised
            return
        tape = mode.tape
        _refuse_without_grad(tape)
        rows = _batch_size((*args, *kwargs.values()))
        layouts = self._layouts(tape.uses, mode.batches, rows, output)
        seen = Pass(tuple(zip(tape.uses, layouts, strict=True)), rows, output)
        note = self._on_forward(seen)
        for use, layout in seen.uses:
            edge = use.edge
            del use.edge  # a node whose hook holds the node itself would never be freed
            edge.node.register_prehook(partial(self._receive, note, use, edge.output_nr, layout, rows))

    def _layouts(self, uses: Sequence[Use], batches: Mapping[Use, int], rows: int, output: Any) -> Sequence[Layout]:
        """Where the samples are in the output of every use."""
        possible = [_possible(use, rows, batches.get(use)) for use in uses]
        layouts = [options[0] for options in possible]
        unclear = [
            i
            for i, (use, options) in enumerate(zip(uses, possible, strict=True))
            # Positions, which are the same for all samples, may be as many as there are samples.
            if isinstance(use, EmbeddingUse) or (self._exact_rows and len(options) > 1)
        ]
        if rows == 1 or not unclear:
            return layouts
        key = (rows, *((use.names, use.sizes) for use in uses))
        found = self._settled.get(key)
        if found is None:
            found, certain = settle([uses[i] for i in unclear], [possible[i] for i in unclear], output, rows)
            if certain:
                self._settled[key] = found
        for i, layout in zip(unclear, found, strict=True):
            layouts[i] = layout
        return layouts

    def _receive(
        self, note: _Note, use: Use, output: int, layout: Layout, rows: int, grads: tuple[Tensor | None, ...]
    ) -> None:
        grad = grads[output]
        if grad is None:
            return
        if not _reaches_parameters(use):
            _refuse_second_derivatives(use)
            return
        with torch.no_grad():
            self._on_gradient(note, use.record(grad.detach().reshape(use.sizes), layout, rows))


def _refuse_without_grad(tape: Tape) -> None:
    lost = sorted(tape.without_grad - {name for use in tape.uses for name in use.names})
    if lost:
        raise UnsupportedModelError(
            f"Parameter {', '.join(map(repr, lost))} was used with gradients switched off (torch.no_grad, or reentrant "
            "activation checkpointing), where its layer cannot be watched. Remedy: checkpoint with "
            "use_reentrant=False, or freeze it with requires_grad_(False)."
        )


def _batch_size(values: Iterable[Any]) -> int:
    """Size of dimension 0 of the first tensor that the model got."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
        if isinstance(value, Mapping):
            value = tuple(value.values())
        if isinstance(value, (tuple, list)) and any(isinstance(item, (Tensor, tuple, list, Mapping)) for item in value):
            return _batch_size(value)
    raise CaptureError(
        "The model was called without a tensor, so the size of the batch is not known. Remedy: pass the batch to the "
        "model itself, in dimension 0 of its first tensor."
    )


def _possible(use: Use, rows: int, batch: int | None) -> Sequence[Layout]:
    """Where the sizes of an output allow the batch to be; the one place inside attention, which says it."""
    lead = use.sizes[: use.num_lead]
    if batch == rows:  # within attention: [positions, batch], or both in one dimension
        return [Layout(1) if len(lead) == 2 else Layout(0, lead[0] // rows, shared_major=True)]
    possible = list(candidates(lead, rows))
    if not possible:
        raise UnsupportedModelError(
            f"The output of {use} has leading sizes {tuple(lead)}, and the batch of {rows} is none of them. Remedy: "
            "pass the batch in dimension 0 of the model's first tensor, or leave the layer to AdamW with skip=."
        )
    return possible
