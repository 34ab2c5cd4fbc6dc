"""The state of an optimizer by the names of the parameters; torch counts them instead."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["by_name", "by_number"]


def by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer with names in the place of numbers.

    Unlike torch.distributed.checkpoint.state_dict it makes no step to find a state where there is none yet.

    Args:
        optimizer: The optimizer. If its `state_dict` must be called on all ranks, so must this.
        model: The model that has its parameters.

    Returns:
        As `Optimizer.state_dict`, sharing its tensors.
    """
    names = [name for group in _names(optimizer, model) for name in group]
    saved = optimizer.state_dict()
    state = {names[key] if isinstance(key, int) else key: value for key, value in saved["state"].items()}
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def by_number(saved: Mapping[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What `by_name` returned, for `Optimizer.load_state_dict`.

    Args:
        saved: The state by name; the order of parameters within a group does not matter.
        optimizer: The optimizer that it is for.
        model: The model that has its parameters.

    Returns:
        The state by number.

    Raises:
        ValueError: If the optimizer has other groups of parameters.
    """
    names = _names(optimizer, model)
    then = [group["params"] for group in saved["param_groups"]]
    if list(map(sorted, then)) != list(map(sorted, names)):
        other = sorted({name for group in then for name in group} ^ {name for group in names for name in group})
        what = f"not both have {', '.join(other[:5])}" if other else "they are grouped in another way"
        raise ValueError(
            f"its optimizer has {sum(map(len, then))} parameters in {len(then)} groups, this one has "
            f"{sum(map(len, names))} in {len(names)}: {what}"
        )
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    state = {numbers.get(key, key): value for key, value in saved["state"].items()}
    groups = [
        {**group, "params": [numbers[name] for name in own]}
        for group, own in zip(saved["param_groups"], names, strict=True)
    ]
    return {**saved, "state": state, "param_groups": groups}


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters of every group, as torch counts them: every one has its place."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(parameter), f"group.{number}.{place}") for place, parameter in enumerate(group["params"])]
        for number, group in enumerate(optimizer.param_groups)
    ]
