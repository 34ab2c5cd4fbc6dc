"""LPSGD's and LPSGDM's update as one compiled pass over the numbers, on CPUs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.linalg.power import lp_weights
from steepest.optim._lp_update import LpStep, update_rows

__all__ = ["check_fused", "compiled", "fused_update"]

# Tensors of one call: a call costs as much as some ten thousand numbers, and compiling takes its time for each.
_TENSORS = 8
# Smaller tensors are faster joined.
_LEAST = 1 << 13
_DTYPES = (torch.float32, torch.float64)


def check_fused(params: Sequence[Tensor], *, momentum: bool) -> None:
    """Refuse what the compiled pass is not for, and compile it.

    Args:
        params: Parameters that are to be trained by it.
        momentum: Whether there is momentum.

    Raises:
        InvalidOptionError: If a parameter is elsewhere or of another dtype, or there is no compiler.
    """
    for param in params:
        if not param.is_cpu or param.dtype not in _DTYPES:
            raise InvalidOptionError(
                f"fused=True with a parameter on {param.device} in {param.dtype}: the compiled pass is for float32 and "
                "float64 on CPUs. Leave fused out; the joined update is the fast one elsewhere."
            )
    for dtype in {param.dtype for param in params}:
        compiled(dtype, momentum=momentum)


@cache
def compiled(dtype: torch.dtype, *, momentum: bool) -> Callable[..., None]:
    """The pass for one dtype; it is compiled once in a process, in about ten seconds.

    Args:
        dtype: dtype of the tensors.
        momentum: Whether there is momentum.

    Returns:
        Function of lists of flat tensors, changed in place, and of the numbers of a step.

    Raises:
        InvalidOptionError: If nothing can be compiled here.
    """
    # Sizes that are equal in the first call would have to be equal in all.
    sizes = [1000 + 17 * number for number in range(_TENSORS)]
    lists = [[torch.ones(size, dtype=dtype) for size in sizes] for _ in range(3 if momentum else 2)]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about itself
            one = torch.compile(_momentum_pass if momentum else _plain_pass, dynamic=True)
            one(*lists, *_numbers(LpStep(0.1, 3.0, 0.9, 0.0, 1e-8, maximize=False)))
    except Exception as error:  # of many kinds: torch's own, and those of what it runs
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InvalidOptionError(
            f"fused=True compiles the update, and that failed ({reason}). Install a C++ compiler (g++ or clang++), or "
            "leave fused out."
        ) from error
    return one


def fused_update(rows: Sequence[tuple[Tensor, ...]], step: LpStep) -> None:
    """As `update_rows`, in one pass; small tensors, those that are not contiguous, and p = 2 go there.

    Args:
        rows: Parameters, each with its gradient and its momentum.
        step: The numbers, none of them a tensor.
    """
    fitting: dict[torch.dtype, list[tuple[Tensor, ...]]] = {dtype: [] for dtype in _DTYPES}
    others: list[tuple[Tensor, ...]] = []
    for row in rows:
        fits = step.p != 2 and row[0].numel() >= _LEAST and all(tensor.is_contiguous() for tensor in row)
        (fitting[row[0].dtype] if fits else others).append(row)
    if others:
        update_rows(others, step, together=True)
    numbers = _numbers(step)
    for dtype, rows in fitting.items():
        for lists in _lists(rows, dtype):
            compiled(dtype, momentum=bool(step.momentum))(*(lists if step.momentum else lists[:2]), *numbers)


def _lists(rows: Sequence[tuple[Tensor, ...]], dtype: torch.dtype) -> Iterator[tuple[list[Tensor], ...]]:
    """Parameters, gradients and momenta of `_TENSORS` tensors at a time; the last are made up with small ones."""
    for start in range(0, len(rows), _TENSORS):
        # Detached, since the compiler would tell parameters from other tensors.
        chunk = [tuple(tensor.detach().view(-1) for tensor in row) for row in rows[start : start + _TENSORS]]
        chunk += [tuple(torch.ones(2, dtype=dtype) for _ in range(3)) for _ in range(_TENSORS - len(chunk))]
        params, grads, momenta = map(list, zip(*chunk, strict=True))
        yield params, grads, momenta


def _numbers(step: LpStep) -> list[Tensor]:
    """As tensors: a Python number would be compiled in."""
    decay = 1 - float(step.lr) * step.weight_decay
    values = (step.factor, step.p, 1 - step.momentum, decay, step.eps)
    return [torch.tensor(float(value), dtype=torch.float64) for value in values]


def _plain_pass(
    params: list[Tensor], grads: list[Tensor], factor: Tensor, p: Tensor, new: Tensor, decay: Tensor, eps: Tensor
) -> None:
    del new
    for param, grad in zip(params, grads, strict=True):
        param.mul_(decay).add_(lp_weights(grad.abs(), p, eps) * grad * factor)


def _momentum_pass(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    factor: Tensor,
    p: Tensor,
    new: Tensor,
    decay: Tensor,
    eps: Tensor,
) -> None:
    for grad, momentum in zip(grads, momenta, strict=True):
        momentum.lerp_(grad, new)
    _plain_pass(params, momenta, factor, p, new, decay, eps)
