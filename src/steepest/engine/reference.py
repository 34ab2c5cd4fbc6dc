"""The slow, obviously right engine: one ordinary backward for every row."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from steepest.engine.capture import DEFAULT_MAX_MEMORY, NO_RECORDING, Rows, check_rows, named_trainable
from steepest.engine.jacobian import Jacobian, caller_independent
from steepest.engine.records import MaterializedRecord
from steepest.errors import CaptureError

__all__ = ["ReferenceCapture"]


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
        if not self._ready:
            raise CaptureError(NO_RECORDING)
        self._ready = False
        blocks = check_rows(rows)
        params = list(self._params.values())
        scalars = [value for block in blocks for value in block.flatten().unbind()]
        grads = [
            torch.autograd.grad(value, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in scalars
        ]
        stacked = {
            name: torch.stack(column) for name, column in zip(self._params, zip(*grads, strict=True), strict=True)
        }
        shapes = {name: p.shape for name, p in self._params.items()}
        record = MaterializedRecord(stacked)
        return Jacobian([record], shapes, len(scalars), self._max_memory, blocks[0].device, params[0].dtype)
