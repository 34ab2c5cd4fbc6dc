"""Rows of any derivatives, in one backward: every sample gets a copy of the parameters of its own, by torch.func."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from steepest._validation import check_integer
from steepest.engine.capture import DEFAULT_MAX_MEMORY, Rows
from steepest.engine.copies import Vectorised, batch_of, form_of, part_of, without_speed_warnings
from steepest.engine.jacobian import Jacobian, caller_independent
from steepest.engine.owners import owners_of, probe
from steepest.engine.reference import ReferenceCapture, gradients

__all__ = ["BatchedCapture"]

# Tensors as large as the copies of the parameters that are alive at a time: two gradients of each, and what a backward
# holds while it adds up those of several uses.
_ALIVE = 8
# Vectorised rows against the model's own: more than rounding is another function, such as one of the whole batch.
_SAME = 0.5  # power of the precision
_PROBE_EVERY = 256


class BatchedCapture(ReferenceCapture):
    """Differentiate rows made of derivatives in the inputs, by one backward for all of them.

    Within ``with capture:`` a call ``model(x)`` is vectorised over the samples by `torch.func.vmap`, each with its own
    copy of the parameters. What the closure then makes of the output and its derivatives (``torch.autograd.grad(...,
    create_graph=True)`` of any order) depends on these copies, and one backward of all rows gives every sample's
    gradient, exactly.

    Which sample belongs to which row is found by a second backward with other weights, so the model may be called
    several times, at other points each, and rows may be in any order. A sample may count in several blocks, but in one
    row of each. The exceptions are as right, by one backward for each row: rows that share samples, models that look
    at the batch as a whole, draw random numbers or return something else than a tensor, and parameters that the closure
    uses beside ``model(...)``; of those that enter late, such as an unknown coefficient, it is a short backward.

    Args:
        model: The module. It is called twice, plainly to compare outputs with, and in the 1st, 2nd, 4th, 8th, ... and
            every 256th call of a kind gradients too; only in the ``with`` block is its ``forward`` another.
        params: The parameters to differentiate; all that require grad by default.
        max_memory: Bytes that the gradients in hand may take beside the result, R x P numbers, and beside the graph of
            the rows. The smallest step, the gradients of one sample, may exceed it.

    Raises:
        InvalidOptionError: If there is nothing to differentiate, or an option is impossible.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> x = torch.linspace(0, 1, 5).unsqueeze(1).requires_grad_()
        >>> capture = st.BatchedCapture(model)
        >>> with capture:
        ...     u = model(x)
        ...     (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        ...     residuals = (slope + u)[:, 0]
        >>> capture.jacobian(residuals).gram().shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[Tensor] | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
    ) -> None:
        super().__init__(model, params=params, max_memory=check_integer("max_memory", max_memory, low=1))
        self._model = model
        sizes = sum(p.numel() * p.element_size() for p in self._params.values())
        self._chunk = max(1, max_memory // (_ALIVE * sizes))
        self._copies: list[dict[str, Tensor]] = []
        self._calling = False
        self._calls: dict[tuple[object, ...], int] = {}
        self._refused: set[tuple[object, ...]] = set()
        self._generator = torch.Generator()

    def __enter__(self) -> Self:
        """Vectorise the calls of the model from here on.

        Returns:
            This capture.
        """
        super().__enter__()
        self._copies = []
        self._holder = Vectorised(self._model, self._params)
        self._model.forward = self._forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the model its own forward back."""
        super().__exit__(kind, error, trace)
        self._holder.give_back()

    @caller_independent
    def jacobian(self, rows: Rows) -> Jacobian:
        """Differentiate the rows.

        Args:
            rows: ``[R]`` or ``[B, K]`` with graph (ordered as by ``rows.flatten()``), or a mapping of names to such
                tensors, stacked in their order.

        Returns:
            The Jacobian of the rows in the parameters.
        """
        blocks = self._checked(rows)
        copies, self._copies = self._copies, []
        found = []
        for block in blocks:
            vector = block.unsqueeze(1) if block.ndim == 1 else block
            grads = {n: p.new_zeros(*vector.shape, *p.shape) for n, p in self._params.items()}
            for number in range(vector.shape[1]):
                self._component(vector[:, number], copies, {n: grad[:, number] for n, grad in grads.items()})
            found.append({n: grad.flatten(0, 1) for n, grad in grads.items()})
        return self._joined(found, blocks)

    def _component(self, rows: Tensor, copies: Sequence[Mapping[str, Tensor]], out: Mapping[str, Tensor]) -> None:
        """Add the gradients of rows ``[B]`` to ``[B, *shape]``."""
        first, second = probe(rows, self._generator)
        for part in copies:
            grads = torch.autograd.grad(rows, [*part.values()], first, retain_graph=True, allow_unused=True)
            if all(grad is None for grad in grads):
                continue
            others = torch.autograd.grad(rows, [*part.values()], second, retain_graph=True, allow_unused=True)
            owners = owners_of(grads, others, second / first)
            if owners is None:
                _add_shared(rows, part, out)
                continue
            for name, grad in zip(part, grads, strict=True):
                if grad is not None:
                    scale = first[owners].reciprocal().to(grad).view(-1, *(1 for _ in grad.shape[1:]))
                    out[name].index_add_(0, owners, grad * scale)
        self._add_direct(rows, out)

    def _add_direct(self, rows: Tensor, out: Mapping[str, Tensor]) -> None:
        """Add what the rows have of the parameters themselves."""
        params = list(self._params.values())
        reached = torch.autograd.grad(rows.sum(), params, retain_graph=True, allow_unused=True)
        used = {name: p for (name, p), grad in zip(self._params.items(), reached, strict=True) if grad is not None}
        for start, grads in gradients(rows, [*used.values()], self._max_memory) if used else ():
            for name, grad in zip(used, grads, strict=True):
                out[name][start : start + len(grad)] += grad

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model does in the ``with`` block."""
        holder = self._holder
        count = 0 if self._calling or not torch.is_grad_enabled() else batch_of(args, kwargs)
        kind = (self._model.training, *(form_of(a) for a in (*args, *kwargs.values())))
        if not count or kind in self._refused:
            return holder.plain(*args, **kwargs)
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        probing = calls & (calls - 1) == 0 or calls % _PROBE_EVERY == 0
        self._calling = True
        try:
            found = self._vectorised(count, args, kwargs, probing=probing)
        finally:
            self._calling = False
        if found is not None:
            return found
        if probing:
            self._refused.add(kind)
        return holder.plain(*args, **kwargs)

    def _vectorised(
        self, count: int, args: Sequence[Any], kwargs: Mapping[str, Any], *, probing: bool
    ) -> Tensor | None:
        """The output of samples with copies of their own, None where it is not the model's."""
        outputs, copies = [], []
        # What is wrong with the call itself, the plain one says as well.
        with suppress(RuntimeError, ValueError, IndexError, TypeError), without_speed_warnings():
            for start in range(0, count, self._chunk):
                taken = slice(start, min(count, start + self._chunk))
                size = taken.stop - taken.start
                copies.append({n: p.detach().expand(size, *p.shape).requires_grad_() for n, p in self._params.items()})
                some, named = [part_of(a, taken) for a in args], {key: part_of(a, taken) for key, a in kwargs.items()}
                out = self._holder.each(copies[-1], some, named)
                if not isinstance(out, Tensor) or out.ndim < 2 or out.shape[1] != 1:
                    return None
                outputs.append(out.squeeze(1))
            found = torch.cat(outputs)
            with torch.set_grad_enabled(probing):
                plain = self._holder.plain(*args, **kwargs)
            if _same(found, plain) and (not probing or self._same_gradient(found, plain, copies)):
                self._copies += copies
                return found
        return None

    def _same_gradient(self, found: Tensor, plain: Tensor, copies: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether the gradients of all samples together are the model's own: a layer may scale them by the batch."""
        weights = torch.randn(found.shape, generator=self._generator, dtype=torch.float64).to(found)
        wanted = torch.autograd.grad(plain, [*self._params.values()], weights, allow_unused=True)
        sums = [torch.zeros_like(p) for p in self._params.values()]
        for part in copies:
            grads = torch.autograd.grad(found, [*part.values()], weights, retain_graph=True, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total += grad.sum(0)
        apart = [total - (0 if grad is None else grad) for total, grad in zip(sums, wanted, strict=True)]
        most = max(float(grad.abs().max()) for grad in wanted if grad is not None)
        return bool(max(float(each.abs().max()) for each in apart) <= torch.finfo(found.dtype).eps ** _SAME * most)


def _same(found: Tensor, plain: Any) -> bool:
    if not isinstance(plain, Tensor) or plain.shape != found.shape or plain.dtype != found.dtype:
        return False
    if not plain.is_floating_point() or not plain.numel():
        return False
    apart = (found.detach() - plain).abs().max()
    return bool(apart <= torch.finfo(plain.dtype).eps ** _SAME * plain.abs().max())


def _add_shared(rows: Tensor, part: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
    """Add the gradients of rows that share samples: one backward each, summed over the samples."""
    for number, row in enumerate(rows.unbind()):
        grads = torch.autograd.grad(row, [*part.values()], retain_graph=True, allow_unused=True)
        for name, grad in zip(part, grads, strict=True):
            if grad is not None:
                out[name][number] += grad.sum(0)
