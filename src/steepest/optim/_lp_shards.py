"""Parameters whose numbers lie on several processes (DTensor, as FSDP2 makes them): each process moves its own."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.ranks import RankError, Ranks, Traffic
from steepest.optim._lp_update import all_finite, doubtful

__all__ = ["agreed", "groups_of", "is_shard", "local", "local_grads"]


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; nothing of torch.distributed is imported to know."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Numbers of a tensor that lie on this process, in the same memory."""
    if not is_shard(tensor):
        return tensor
    shard: Any = tensor
    part: Tensor = shard.to_local()
    return part


def local_grads(params: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of parameters, of each the numbers that belong to those that `local` gives of the parameter.

    Args:
        params: Parameters; those without gradient are left out.

    Returns:
        Plain tensors.
    """
    found = []
    for param in params:
        grad: Any = param.grad
        if grad is None:
            continue
        if is_shard(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        found.append(local(grad))
    return found


def groups_of(params: Iterable[Tensor]) -> list[Any]:
    """Find the processes that parameters are shared with.

    Args:
        params: Parameters.

    Returns:
        A process group for each dimension of their device meshes, without those of one process; each once, and in
        the same order on all processes. Empty for plain parameters.
    """
    found: dict[str, Any] = {}
    for param in params:
        if is_shard(param):
            mesh: Any = param.device_mesh  # type: ignore[attr-defined]
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                if dist.get_world_size(group) > 1:
                    found.setdefault(group.group_name, group)
    return list(found.values())


def agreed(grads: Sequence[Tensor], groups: Sequence[Any], traffic: Traffic, error: Exception | None) -> bool:
    """Let all processes know whether any has NaN or infinity in its part, or refuses the step.

    One sum of two numbers over each group, read once from the device; a second one where a norm overflows.

    Args:
        grads: Parts of gradients that lie here.
        groups: What `groups_of` gave, not empty.
        traffic: Counts.
        error: Why this process refuses the step, or None.

    Returns:
        Whether all numbers of all gradients on all processes are finite.

    Raises:
        RankError: If another process refuses the step; the one that does raises its own error.
    """
    device = grads[0].device if grads else torch.device("cpu")
    flags = torch.stack([doubtful(grads, device), torch.full((), float(error is not None), device=device)])
    suspected, failed = _sum(flags, groups, traffic)
    if error is not None:
        raise error
    if failed:
        raise RankError(
            "Another process refused this step, and says why; parameters and optimizer state are unchanged on all. "
            "Give all processes the same options."
        )
    if not suspected:
        return True
    # A norm can overflow where no number did.
    flags = torch.full((1,), float(not all_finite(grads)), device=device)
    return not _sum(flags, groups, traffic)[0]


def _sum(flags: Tensor, groups: Sequence[Any], traffic: Traffic) -> list[float]:
    for group in groups:  # over one dimension of the mesh after the other: over all in the end
        Ranks(group, traffic).sum_([flags])
    numbers: list[float] = flags.tolist()
    return numbers
