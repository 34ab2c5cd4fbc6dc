"""Saved states in their own precision: torch casts every tensor of a state to the dtype of its parameter."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["restore"]


def restore(optimizer: Optimizer, saved: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Put back, uncast, what an optimizer has just loaded.

    Args:
        optimizer: The optimizer, after torch's ``load_state_dict``.
        saved: A state_dict that nobody else holds.
        keys: Entries of a parameter's state that keep their dtype.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        state = saved["state"].get(number, {})
        optimizer.state[param].update({key: _moved(state[key], param.device) for key in keys if key in state})
        if not optimizer.state[param]:
            del optimizer.state[param]  # as if never asked for


def _moved(value: Any, device: torch.device) -> Any:
    """Bring tensors within nested mappings to a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, Mapping) else value
