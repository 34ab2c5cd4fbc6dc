"""The update of LPSGD and LPSGDM, many tensors at a time and in pieces that fit into a processor's cache."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.power import lp_direction, lp_weights
from steepest.optim._apply import decay

__all__ = ["LpStep", "all_finite", "doubtful", "update_differentiably", "update_rows"]

# torch gives one thread so many elements at least.
_GRAIN = 1 << 15
# Elements that are worked on at once: half a megabyte on a CPU of few threads; on a GPU enough to keep it busy.
_PIECE, _PIECE_ELSEWHERE = 4 * _GRAIN, 1 << 22
_VECTOR = 64  # a multiple of the elements in any vector register


@dataclass(frozen=True)
class LpStep:
    """The numbers of a step of one parameter group.

    Args:
        lr: Learning rate; a tensor stays on its device.
        p: Order of the norm; a tensor stays on its device.
        momentum: Share of the past in the running mean of gradients; 0 for none.
        weight_decay: Decoupled weight decay.
        eps: Keeps the weight of zero finite.
        maximize: Whether to go up instead of down.
    """

    lr: float | Tensor
    p: float | Tensor
    momentum: float
    weight_decay: float
    eps: float
    maximize: bool

    @property
    def factor(self) -> float:
        """What directions are multiplied by, after a learning rate that is a tensor has been."""
        size = 1.0 if isinstance(self.lr, Tensor) else self.lr
        return size if self.maximize else -size


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; reads every number once and waits for the device.

    Args:
        tensors: On any devices, of any real dtypes.

    Returns:
        The answer.
    """
    for same in _by_kind((tensor,) for tensor in tensors):
        numbers = [tensor for (tensor,) in same]
        # A norm can overflow where no number did: then look at the numbers.
        if torch.stack(torch._foreach_norm(numbers)).isfinite().all():
            continue
        if not all(tensor.isfinite().all() for tensor in numbers):
            return False
    return True


def doubtful(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether `all_finite` might find NaN or infinity, without waiting for the device.

    Args:
        tensors: As there.
        device: Where to have the answer.

    Returns:
        float32: 0 for certainly not, 1 where some norm is not finite.
    """
    found = torch.zeros((), dtype=torch.bool, device=device)
    for same in _by_kind((tensor,) for tensor in tensors):
        norms = torch.stack(torch._foreach_norm([tensor for (tensor,) in same]))
        found = found | ~norms.isfinite().all().to(device)
    return found.float()


def _by_kind(rows: Iterable[tuple[Tensor, ...]]) -> Iterable[list[tuple[Tensor, ...]]]:
    """Rows whose first tensors have the same device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in rows:
        kinds.setdefault((row[0].device, row[0].dtype), []).append(row)
    return kinds.values()


def update_rows(rows: Iterable[tuple[Tensor, ...]], step: LpStep, *, together: bool) -> None:
    """Move parameters and their momenta, in place.

    Args:
        rows: Parameters, each with its gradient, which is not changed, and its momentum, which is the gradient itself
            for no momentum.
        step: The numbers.
        together: Whether to join small tensors; the result is the same to the bit.
    """
    for same in _by_kind(rows):
        for piece in _pieces(same, together=together):
            _update_piece(piece, step)


def _pieces(rows: Sequence[tuple[Tensor, ...]], *, together: bool) -> Iterator[list[tuple[Tensor, ...]]]:
    """Cut rows of large tensors and join those of small ones; what is not contiguous stays as it is."""
    limit = max(_PIECE, _GRAIN * torch.get_num_threads()) if rows[0][0].is_cpu else _PIECE_ELSEWHERE
    joined: list[tuple[Tensor, ...]] = []
    count = 0
    for row in rows:
        size = row[0].numel()
        if torch.compiler.is_compiling() or not all(tensor.is_contiguous() for tensor in row):
            yield [row]
            continue
        if size > limit:
            yield from ([cut] for cut in zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True))
            continue
        if joined and (not together or count + size > limit):
            yield joined
            joined, count = [], 0
        joined.append(row)
        count += size
    if joined:
        yield joined


def _update_piece(piece: list[tuple[Tensor, ...]], step: LpStep) -> None:
    params, grads, momenta = zip(*piece, strict=True)
    if step.momentum:
        torch._foreach_lerp_(momenta, grads, 1 - step.momentum)
    if step.weight_decay != 0:
        decay(params, lr=step.lr, weight_decay=step.weight_decay, capturable=True)
    if not isinstance(step.p, Tensor) and step.p == 2:
        moves = torch._foreach_mul(momenta, step.lr) if isinstance(step.lr, Tensor) else momenta
        torch._foreach_add_(params, moves, alpha=step.factor)
        return
    wide = torch.promote_types(params[0].dtype, torch.float32)
    if wide == params[0].dtype:
        weights = lp_weights(_sizes(momenta), step.p, step.eps)
        if isinstance(step.lr, Tensor):
            weights.mul_(step.lr)
        torch._foreach_addcmul_(params, _parts(weights, momenta), momenta, value=step.factor)
        return
    # Half precision: the direction is rounded once, as a whole.
    signed = _joined(momenta).to(wide)
    direction = lp_weights(signed.abs(), step.p, step.eps).mul_(signed)
    if isinstance(step.lr, Tensor):
        direction.mul_(step.lr)
    torch._foreach_add_(params, _parts(direction.to(params[0].dtype), momenta), alpha=step.factor)


def _sizes(tensors: tuple[Tensor, ...]) -> Tensor:
    """Sizes of all entries in new memory: flat, unless a single tensor is not contiguous."""
    first = tensors[0]
    if torch.compiler.is_compiling() or not first.is_contiguous():
        return first.abs()
    if len(tensors) > 1:
        return _joined(tensors).abs_()
    room = _room(first)
    torch.abs(first.view(-1), out=room[: first.numel()])
    return room


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Copy of tensors in one; what is behind them is 1."""
    if len(tensors) == 1 and (torch.compiler.is_compiling() or not tensors[0].is_contiguous()):
        return tensors[0].clone()
    room = _room(*tensors)
    torch.cat([tensor.view(-1) for tensor in tensors], out=room[: sum(map(Tensor.numel, tensors))])
    return room


def _room(*tensors: Tensor) -> Tensor:
    """Flat memory for tensors, longer than they are, and 1 there.

    torch's exp2 differs in the last bit between numbers that fill a vector and the rest, and every thread has such a
    rest. Here no number is in one, so that what a number becomes does not depend on its place or on its neighbours.

    Args:
        *tensors: Tensors of one device and dtype.

    Returns:
        Memory that is not filled otherwise.
    """
    count = sum(map(Tensor.numel, tensors))
    threads = max(1, min(torch.get_num_threads(), -(-count // _GRAIN)))
    share = _VECTOR * threads
    room = tensors[0].new_empty(-(-count // share) * share)
    room[count:] = 1
    return room


def _parts(flat: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What was joined, taken apart."""
    if len(like) == 1 and flat.shape == like[0].shape:
        return (flat,)
    parts: tuple[Tensor, ...] = torch._utils._unflatten_dense_tensors(flat, like)
    return parts


def update_differentiably(rows: Iterable[tuple[Tensor, ...]], step: LpStep) -> None:
    """As `update_rows`, in operations that autograd follows: slower, and what they need is kept.

    Args:
        rows: As there; the parameters are no leaves of the graph.
        step: The numbers, which may require grad where they are tensors.
    """
    for param, grad, buffer in rows:
        if step.momentum:
            buffer.lerp_(grad, 1 - step.momentum)
        if step.weight_decay != 0:
            param.mul_(1 - step.lr * step.weight_decay)
        # A copy, since the buffer changes in place at the next step.
        direction = lp_direction(buffer.clone(), step.p, step.eps)
        if isinstance(step.lr, Tensor):
            direction = direction * step.lr
        param.add_(direction, alpha=step.factor)
