"""Which layer a call of a model goes through last."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from steepest.engine.capture import named_trainable
from steepest.engine.conv import ConvUse
from steepest.engine.embedding import EmbeddingUse
from steepest.engine.linear import LinearUse
from steepest.engine.rules import TapeMode
from steepest.engine.tape import Slot, Tape
from steepest.errors import CaptureError, UnsupportedModelError

__all__ = ["last_layer"]


class _Noting(TapeMode):
    """Notes the calls that have a rule, and lets all others pass: they need no gradient here."""

    def _dispatch(self, func: Any, slots: list[Slot], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super()._dispatch(func, slots, args, kwargs)
        except (UnsupportedModelError, CaptureError):
            return func(*args, **kwargs)


def last_layer(model: nn.Module, run: Callable[[], object]) -> tuple[str, ...]:
    """Find the last linear layer, convolution or embedding, in order of execution, whose weight is trainable.

    Layers are seen where they meet the data, by no hook of a module: the order in which the model defines them, names
    and what comes after them without a weight do not matter.

    Args:
        model: The model, in eval mode: it is called once.
        run: Calls the model on a batch; what it returns is ignored.

    Returns:
        Qualified names of the weight and, where it is trainable, of the bias; those that a weight is computed from,
        if it is; of a tied weight the first of its names.

    Raises:
        UnsupportedModelError: If the call meets no such layer.
    """
    path = [(name, module) for name, module in model.named_modules() if module._buffers]
    buffers = {f"{name}.{key}": b for name, module in path for key, b in module._buffers.items() if b is not None}
    tape = Tape(named_trainable(model, None), buffers)
    with torch.enable_grad(), _Noting(tape):
        run()
    for use in reversed(tape.uses):
        layer = isinstance(use, (LinearUse, ConvUse, EmbeddingUse))
        if layer and any(slot.tensor.ndim > 1 for slot in use.slots):
            return tuple(dict.fromkeys(n for slot in use.slots for n in tape.params if n in slot.names))
    raise UnsupportedModelError(
        f"The call of {type(model).__name__} met no linear layer, convolution or embedding with a trainable weight, so "
        "there is no last layer. Name the modules whose parameters are meant instead, or unfreeze the last layer."
    )
