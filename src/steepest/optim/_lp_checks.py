"""What LPSGD and LPSGDM refuse."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest._validation import check_real
from steepest.errors import InvalidOptionError

__all__ = ["check_group", "check_tensor"]

# The smallest eps that float32, in which powers are taken at least, holds without loss.
_MIN_EPS = torch.finfo(torch.float32).tiny


def check_group(group: Mapping[str, Any], *, read_tensors: bool = True) -> None:
    """Refuse impossible options.

    Args:
        group: The group.
        read_tensors: Whether to read options that are tensors; on a GPU that would have to be waited for.

    Raises:
        InvalidOptionError: If one is impossible.
    """
    for name, low in (("lr", 0), ("p", 2)):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidOptionError(
                f"{name} has shape {tuple(value.shape)}: give a number or a tensor of one element."
            )
        if read_tensors or not isinstance(value, Tensor):
            check_real(name, value, low=low)
    check_real("weight_decay", group["weight_decay"], low=0)
    check_real("eps", group["eps"], low=_MIN_EPS)
    if "momentum" in group:
        check_real("momentum", group["momentum"], low=0, high=1, open_high=True)


def check_tensor(tensor: Tensor, what: str, group: Mapping[str, Any], number: int) -> None:
    """Refuse tensors that the update is not for, by name.

    Args:
        tensor: A parameter or its gradient.
        what: Which of the two: "parameter" or "gradient of parameter".
        group: Group of the parameter.
        number: Its number there.

    Raises:
        InvalidOptionError: If the tensor is sparse, complex or no floating-point tensor.
    """
    found = "complex" if tensor.is_complex() else str(tensor.layout).removeprefix("torch.")
    if not tensor.is_complex() and tensor.layout == torch.strided:
        if tensor.is_floating_point():
            return
        found = f"of {tensor.dtype}"
    names = group.get("param_names")
    name = repr(names[number]) if names else f"number {number} of its group, of shape {tuple(tensor.shape)},"
    raise InvalidOptionError(
        f"The {what} {name} is {found}: LPSGD and LPSGDM take dense real floating-point tensors. Train it with an "
        "optimizer of torch, or make it dense (torch.nn.Embedding(sparse=False))."
    )
