"""Rules for parameters outside a layer: position embeddings, scales, class tokens, bare matrices.

A parameter that meets the data in an elementwise operation is expanded along the batch first, as a leaf whose
gradient autograd gives sample by sample; that holds for any such operation without a formula of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steepest.engine.layout import Layout
from steepest.engine.linear import linear
from steepest.engine.records import MaterializedRecord, Record
from steepest.engine.tape import Slot, Tape, Use, function_name, refusal

__all__ = ["ELEMENTWISE", "JOINING", "PRODUCTS", "elementwise", "joining", "prelu", "product"]

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "pow")
ELEMENTWISE = frozenset(
    [f"__{prefix}{name}__" for name in _ARITHMETIC for prefix in ("", "r", "i")]
    + [f"{name}{suffix}" for name in _ARITHMETIC for suffix in ("", "_")]
    + [
        "rsub",
        "subtract",
        "subtract_",
        "multiply",
        "multiply_",
        "divide",
        "divide_",
        "true_divide",
        "true_divide_",
    ]
    + [
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "where",
        "lerp",
        "lerp_",
        "addcmul",
        "addcdiv",
        "float_power",
        "atan2",
    ]
    + ["clamp", "clip", "clamp_min", "clamp_max", "hypot", "logaddexp", "masked_fill"]
)
JOINING = frozenset(["cat", "concat", "concatenate", "stack"])
PRODUCTS = frozenset(["matmul", "__matmul__", "mm"])


class LeafUse(Use):
    """A parameter, repeated for every sample without a copy, on its way into an operation with data.

    Args:
        tape: The tape.
        function: Name of the operation.
        source: The parameter as it was given.
        leaf: What took its place, ``source`` expanded.
    """

    def __init__(self, tape: Tape, function: str, source: Slot, leaf: Tensor) -> None:
        super().__init__(tape, function, (source,), leaf, None, num_lead=leaf.ndim)
        self._source = source

    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Pull each sample's gradient back through one sample's copy."""
        tensor, dim = self._source.tensor, layout.dim
        self._check_slots()
        missing = len(self.sizes) - tensor.ndim  # leading dimensions that broadcasting added
        if dim >= missing and tensor.shape[dim - missing] != 1 and tensor.stride(dim - missing) != 0:
            raise refusal(
                self.function,
                self.slots,
                f"copies of shape {tuple(tensor.shape)} differ along the batch (dimension {dim})",
                "give every sample the same value through expand() rather than repeat() or one value for each sample",
            )
        one = tensor if dim < missing else tensor.narrow(dim - missing, 0, 1)
        one = one.expand(*self.sizes[:dim], 1, *self.sizes[dim + 1 :]).select(dim, 0)
        grads = layout.split(output_grads).sum(1)
        return MaterializedRecord(self._pull_back(Slot(one, self._source.names), grads, through=tensor.numel()))


def _repeat(tape: Tape, function: str, slot: Slot, source: Tensor, shape: Sequence[int]) -> Tensor:
    """Put a leaf, ``source`` expanded, in the parameter's place and record it."""
    leaf = source.detach().expand(shape).requires_grad_()
    tape.uses.append(LeafUse(tape, function, Slot(source, slot.names), leaf))
    return leaf


def _replace(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Any], Any]
) -> tuple[list[Any], dict[str, Any]]:
    return [change(value) for value in args], {key: change(value) for key, value in kwargs.items()}


def elementwise(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Expand the parameters to the shape of the result, then compute as ever."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))

    def expand(value: Any) -> Any:
        slot = tape.trained(value)
        if slot is None:
            return value
        # A scalar does not take part in type promotion; expanded, it would.
        others = [t for t in tensors if t is not value and t.ndim > 0]
        cast = value.to(others[0].dtype) if value.ndim == 0 and others and others[0].is_floating_point() else value
        return _repeat(tape, function_name(func), slot, cast, shape)

    new_args, new_kwargs = _replace(args, kwargs, expand)
    return func(*new_args, **new_kwargs)


def joining(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Concatenate data with parameters that were expanded along the batch."""

    def change(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [
            _repeat(tape, function_name(func), slot, item, item.shape) if (slot := tape.trained(item)) else item
            for item in value
        ]

    new_args, new_kwargs = _replace(args, kwargs, change)
    return func(*new_args, **new_kwargs)


def product(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``data @ parameter`` is a linear layer."""
    if len(args) == 2 and not kwargs and tape.slot(args[0]) is None and args[1].ndim == 2:
        weight = tape.derive(args[1].t(), [s for s in (tape.trained(args[1]),) if s])
        return linear(tape, F.linear, args[0], weight)
    raise refusal(
        function_name(func),
        tape.slots_in(args, kwargs),
        "only data @ matrix has a per-sample rule",
        "write it as torch.nn.functional.linear(data, parameter)",
    )


def prelu(tape: Tape, func: Any, input: Tensor, weight: Tensor) -> Any:  # noqa: A002
    """Rule of `F.prelu`: the slope is a scale of the negative part."""
    slot = tape.trained(weight)
    if slot is None:
        return func(input, weight)
    slope = weight.view(-1, *[1] * (input.ndim - 2)) if input.ndim > 1 else weight
    leaf = _repeat(tape, "prelu", slot, slope, input.shape)
    return torch.where(input > 0, input, leaf * input)
