"""Nested state in two parts: tensors under names, and everything else as JSON that says where they belong."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.errors import CheckpointError

__all__ = ["blank", "leaves", "pack", "unpack"]

_KIND = "$"  # marks an object that stands for something JSON does not have


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Take nested dicts, lists, tuples, numbers, words and tensors apart.

    Args:
        value: The state.
        path: Its name, which the names of its tensors begin with.
        tensors: Gets the tensors, as they are and not as copies.

    Returns:
        What JSON can hold, every number exactly. A tensor is the object with its key, type, shape and, where memory is
        laid out in another order than usual, strides: products round in the order of the memory.

    Raises:
        CheckpointError: If there is anything else in it.

    Example:
        >>> tensors = {}
        >>> pack({"steps": 2, "pair": (1.0, torch.zeros(3))}, "state", tensors)["pair"]["items"][1]
        {'$': 'tensor', 'key': 'state.pair.1', 'dtype': 'float32', 'shape': [3]}
        >>> list(tensors)
        ['state.pair.1']
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}
    if isinstance(value, Tensor):
        return _leaf(value, path, tensors)
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]
        return items if isinstance(value, list) else {_KIND: "tuple", "items": items}
    if isinstance(value, Mapping):
        packed = {key: pack(item, f"{path}.{key}", tensors) for key, item in value.items()}
        if _KIND not in packed and all(isinstance(key, str) for key in packed):
            return packed
        if all(isinstance(key, (str, int)) for key in packed):
            return {_KIND: "dict", "items": [[key, item] for key, item in packed.items()]}
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, and a checkpoint keeps tensors, numbers, words, lists and dicts: turn it "
        "into these, or keep it elsewhere"
    )


def _leaf(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    key = path
    while key in tensors:  # a name with a dot can look like two names
        key += "'"
    tensors[key] = tensor.detach()
    leaf = {_KIND: "tensor", "key": key, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if not tensor.is_contiguous() and 0 not in tensor.stride():
        leaf["stride"] = list(tensor.stride())
    return leaf


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` took apart.

    Args:
        tree: What it returned.
        tensors: The tensors by their keys.

    Returns:
        The state.
    """
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_KIND)
    if kind is None:
        return {key: unpack(item, tensors) for key, item in tree.items()}
    if kind == "tensor":
        return tensors[tree["key"]]
    if kind == "float":
        return float(tree["value"])
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in tree["items"])
    return {key: unpack(item, tensors) for key, item in tree["items"]}


def leaves(tree: Any) -> Iterator[dict[str, Any]]:
    """The tensors of a packed state.

    Args:
        tree: What `pack` returned.

    Yields:
        What is told of each: key, dtype, shape, perhaps stride.
    """
    if isinstance(tree, list):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        if tree.get(_KIND) == "tensor":
            yield tree
        else:
            yield from leaves(list(tree.values()))


def blank(leaf: Mapping[str, Any]) -> Tensor:
    """Make the tensor on the CPU that the content of a saved one is read into.

    Args:
        leaf: What is told of it.

    Returns:
        The tensor, with the saved one's type, shape and order of memory.

    Raises:
        CheckpointError: If there is no such type.
    """
    dtype = getattr(torch, leaf["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{leaf['key']} has the type {leaf['dtype']!r}, which this torch does not know")
    if "stride" in leaf:
        return torch.empty_strided(leaf["shape"], leaf["stride"], dtype=dtype)
    return torch.empty(leaf["shape"], dtype=dtype)
