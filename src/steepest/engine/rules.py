"""The table of torch functions that have a rule, and the mode that applies it."""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steepest.engine import bare, conv, embedding, linear, norm
from steepest.engine.tape import Slot, Tape, function_name, refusal
from steepest.errors import CaptureError

__all__ = ["TapeMode"]

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {
    F.linear: linear.linear,
    F.conv1d: conv.convolution,
    F.conv2d: conv.convolution,
    F.conv3d: conv.convolution,
    F.embedding: embedding.embedding,
    F.layer_norm: norm.layer_norm,
    F.rms_norm: norm.rms_norm,
    F.group_norm: norm.group_norm,
    F.instance_norm: norm.instance_norm,
    F.batch_norm: norm.batch_norm,
    F.prelu: bare.prelu,
}
BACKWARD = (Tensor.backward, torch.autograd.grad)
# batch_norm mixes samples even without parameters of its own
ALWAYS = frozenset([F.batch_norm, *BACKWARD])


def _open(function: types.FunctionType) -> types.FunctionType:
    """Copy a composite function, so that the torch functions within it are seen and not only the whole."""
    # The copy differs in one global: it does not hand itself to the active mode a second time.
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


COMPOSITE: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _open(inspect.unwrap(F.multi_head_attention_forward)),
}


def _is_lookup(table: Any, index: Any) -> bool:
    """Whether ``table[index]`` picks rows by number, as an embedding does."""
    return isinstance(index, Tensor) and index.dtype in {torch.int64, torch.int32} and table.ndim == 2


class TapeMode(TorchFunctionMode):
    """Intercepts, within one ``with capture:`` block, every torch function that touches a parameter."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply the rule of ``func``, or run it untouched if no parameter takes part."""
        kwargs = kwargs or {}
        slots = self._tape.slots_in(args, kwargs)
        if not slots and func not in ALWAYS:
            out = func(*args, **kwargs)
            # Position numbers are a constant, the same for every sample.
            return self._tape.derive(out, slots) if func is torch.arange and not out.is_floating_point() else out
        return self._dispatch(func, slots, args, kwargs)

    def _dispatch(self, func: Any, slots: list[Slot], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tape = self._tape
        if func in BACKWARD:
            raise CaptureError(
                f"{func.__module__}.{func.__qualname__}() was called inside the capture: its result depends on the "
                "parameters in ways that the records do not hold. Remedy: return the rows themselves and leave the "
                "backward to the engine; for rows made of derivatives in the inputs use steepest.BatchedCapture."
            )
        if func is F.batch_norm:
            norm.refuse_batch_statistics(tape, *args, **kwargs)
        trained = [slot for slot in slots if slot.names]
        if not trained or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                tape.without_grad.update(name for slot in trained for name in slot.names)
            return out if trained or self._meets_data(args, kwargs) else tape.derive(out, slots)
        if func in COMPOSITE:
            with self:
                return COMPOSITE[func](*args, **kwargs)
        if function_name(func) == "__getitem__" and tape.slot(args[1]) is None and _is_lookup(*args):
            table, index = args
            return embedding.embedding(tape, F.embedding, torch.where(index < 0, index + len(table), index), table)
        numeric = func in RULES or function_name(func) in bare.ELEMENTWISE
        if not self._meets_data(args, kwargs, indices=numeric) and func is not F.embedding:
            return tape.derive(func(*args, **kwargs), slots)
        if any(torch._C._functorch.is_functorch_wrapped_tensor(a) for a in args if isinstance(a, Tensor)):
            raise refusal(
                function_name(func),
                trained,
                "a torch.func transform is active",
                "call the model without torch.func",
            )
        return self._apply(func, trained, args, kwargs)

    def _meets_data(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: bool = True) -> bool:
        """Whether a tensor that is neither parameter nor constant, nor made of them, takes part."""
        # Integer tensors count only where `indices` says so: `table[positions]` is made of the table.
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                unknown = isinstance(item, Tensor) and self._tape.slot(item) is None
                if unknown and (indices or item.is_floating_point() or item.is_complex()):
                    return True
        return False

    def _apply(self, func: Any, slots: list[Slot], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = function_name(func)
        if func in RULES:
            return RULES[func](self._tape, func, *args, **kwargs)
        if name in bare.ELEMENTWISE:
            return bare.elementwise(self._tape, func, args, kwargs)
        if name in bare.JOINING:
            return bare.joining(self._tape, func, args, kwargs)
        if name in bare.PRODUCTS:
            return bare.product(self._tape, func, args, kwargs)
        raise refusal(
            name,
            slots,
            "this operation of a parameter with data has no per-sample rule",
            "express it by a layer, an elementwise operation or data @ parameter",
        )
