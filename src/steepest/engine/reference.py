"""The slow, obviously right engine: one ordinary backward for every row."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from steepest.engine.capture import DEFAULT_MAX_MEMORY, NO_RECORDING, Rows, check_rows, named_trainable
from steepest.engine.jacobian import Jacobian, caller_independent
from steepest.engine.records import MaterializedRecord
from steepest.errors import CaptureError

__all__ = ["ReferenceCapture", "gradients", "graph_bytes"]


class ReferenceCapture:
    """Differentiate any rows by one backward each, with the interface of `Capture`.

    It takes R backward passes and the memory of R x P numbers, and is right for everything that autograd
    differentiates: recurrent layers, batch statistics, rows made of derivatives in the inputs. Rows may interact:
    row n of the Jacobian is the gradient of row n, whatever it depends on.

    Args:
        model: The module.
        params: The parameters to differentiate; all that require grad by default.
        max_memory: Bytes that the temporaries of `Jacobian.gram` may take.

    Raises:
        InvalidOptionError: If there is nothing to differentiate.

    Example:
        >>> import torch, steepest as st
        >>> model = torch.nn.LSTM(2, 3, batch_first=True)
        >>> capture = st.ReferenceCapture(model)
        >>> with capture:
        ...     losses = model(torch.ones(4, 5, 2))[0].square().mean((1, 2))
        >>> capture.jacobian(losses).gram().shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[Tensor] | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
    ) -> None:
        self._params = named_trainable(model, params)
        self._max_memory = max_memory
        self._ready = False

    @property
    def params(self) -> dict[str, Tensor]:
        """The differentiated parameters by qualified name."""
        return dict(self._params)

    def __enter__(self) -> Self:
        """Mark the beginning of the rows; there is nothing to record.

        Returns:
            This capture.
        """
        self._ready = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Mark the end of the rows."""
        self._ready = kind is None

    @caller_independent
    def jacobian(self, rows: Rows) -> Jacobian:
        """Differentiate the rows one by one.

        Args:
            rows: ``[R]`` or ``[B, K]`` with graph (ordered as by ``rows.flatten()``), or a mapping of names to such
                tensors, stacked in their order.

        Returns:
            The Jacobian of the rows in the parameters.

        Raises:
            CaptureError: If there was no ``with`` block since the last call, or the rows are no vector with a graph.
        """
        blocks = self._checked(rows)
        params = list(self._params.values())
        found = []
        for block in blocks:
            grads = {n: p.new_zeros(block.numel(), *p.shape) for n, p in self._params.items()}
            for number, value in enumerate(block.flatten().unbind()):
                for grad, one in zip(grads.values(), _one(value, params), strict=True):
                    if one is not None:
                        grad[number] = one
            found.append(grads)
        return self._joined(found, blocks)

    def _checked(self, rows: Rows) -> list[Tensor]:
        """The blocks of rows that were made since the last call."""
        if not self._ready:
            raise CaptureError(NO_RECORDING)
        self._ready = False
        return check_rows(rows)

    def _joined(self, found: Sequence[dict[str, Tensor]], blocks: Sequence[Tensor]) -> Jacobian:
        """The Jacobian of gradients ``[R_i, *shape]``, block by block."""
        names = self._params if len(found) > 1 else ()
        grads = {name: torch.cat([part.pop(name) for part in found]) for name in names} or found[0]
        shapes = {name: p.shape for name, p in self._params.items()}
        dtype = next(iter(self._params.values())).dtype
        count = sum(block.numel() for block in blocks)
        return Jacobian([MaterializedRecord(grads)], shapes, count, self._max_memory, blocks[0].device, dtype)


def _one(row: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(row, params, retain_graph=True, allow_unused=True)


def gradients(rows: Tensor, params: Sequence[Tensor], max_memory: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Gradients of rows that may share everything: several backwards at a time where torch can vectorise them.

    Args:
        rows: ``[R]`` with graph.
        params: What to differentiate by; the rows use each.
        max_memory: Bytes that the backwards of one time may take.

    Yields:
        The first row of some, and their gradients, ``[rows, *shape]`` of each parameter.
    """
    # All that a backward makes, were nothing of it freed before the end: more than there is at any time.
    size = graph_bytes(rows) + sum(p.numel() * p.element_size() for p in params)
    count, start = max(1, max_memory // size), 0
    while start < len(rows):
        grads = _several(rows, params, slice(start, start + count)) if count > 1 else None
        if grads is None:
            count = 1
            grads = [g[None] for g in torch.autograd.grad(rows[start], params, retain_graph=True)]
        yield start, grads
        start += len(grads[0])


def _several(rows: Tensor, params: Sequence[Tensor], some: slice) -> Sequence[Tensor] | None:
    """Gradients of some rows; None where a node of the graph cannot be vectorised."""
    numbers = torch.arange(len(rows), device=rows.device)
    selections = (numbers[some].unsqueeze(1) == numbers).to(rows)

    def backward(selection: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rows, params, selection, retain_graph=True)

    try:
        with warnings.catch_warnings():  # a node that torch vectorises by a loop of its own is slower, and as right
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: Sequence[Tensor] = torch.func.vmap(backward)(selections)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return found


def graph_bytes(rows: Tensor) -> int:
    """Bytes of the gradients of everything that rows are computed from.

    Args:
        rows: A tensor with graph.

    Returns:
        The bytes.
    """
    seen: set[Any] = set()
    ahead: list[Any] = [rows.grad_fn]
    total = 0
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        total += sum(math.prod(made.shape) * made.dtype.itemsize for made in node._input_metadata)
        ahead += [before for before, _ in node.next_functions]
    return total
