"""Rules of the normalisation layers: their gradients are small and kept explicitly."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steepest.engine.layout import Layout
from steepest.engine.records import MaterializedRecord, Record, at_least_float32
from steepest.engine.tape import REFERENCE_REMEDY, Slot, Tape, Use, function_name, refusal
from steepest.errors import UnsupportedModelError

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "refuse_batch_statistics", "rms_norm"]


class NormUse(Use):
    """A call ``normalized(x) * weight + bias``.

    Args:
        tape: The tape.
        name: Name of the function.
        x: Its input.
        weight: Slot of the weight, or None.
        bias: Slot of the bias, or None.
        out: Its output.
        normalize: The same call without weight and bias.
        features: Number of trailing feature dimensions; 0 where the features are the channels, dimension 1.
    """

    def __init__(
        self,
        tape: Tape,
        name: str,
        x: Tensor,
        weight: Slot | None,
        bias: Slot | None,
        out: Tensor,
        normalize: Callable[[Tensor], Tensor],
        features: int = 0,
    ) -> None:
        slots = tuple(slot for slot in (weight, bias) if slot is not None)
        super().__init__(tape, name, slots, out, x, num_lead=x.ndim - features if features else 1)
        self._weight, self._bias, self._normalize, self._channels = weight, bias, normalize, not features

    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Add up ``g * normalized(x)`` and ``g`` over what shares a weight."""
        grads = {}
        g = at_least_float32(output_grads)
        if self._weight is not None:
            x = at_least_float32(self.inputs)
            grads[str(self._key(self._weight))] = self._reduce(g * self._normalize(x), layout)
        if self._bias is not None:
            grads[str(self._key(self._bias))] = self._reduce(g, layout)
        return self._settle(MaterializedRecord(grads))

    def _reduce(self, grads: Tensor, layout: Layout) -> Tensor:
        grads = layout.canonical(grads, self.num_lead).sum(1)  # [R, features...] or [R, channels, positions...]
        return grads.flatten(2).sum(2) if self._channels and grads.ndim > 2 else grads


def _apply(
    tape: Tape,
    func: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    call: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    features: int = 0,
) -> Tensor:
    w, b = tape.trained(weight), tape.trained(bias)
    out = call(x, w.leaf() if w else weight, b.leaf() if b else bias)
    slots = [slot for slot in (w, b) if slot is not None]
    if not slots:
        return out
    if x.ndim <= features:
        raise refusal(
            function_name(func), slots, f"normalized_shape covers the whole input {tuple(x.shape)}, the batch among it",
            "normalise over the features only",
        )  # fmt: skip
    use = NormUse(tape, function_name(func), x, w, b, out, lambda t: call(t, None, None), features)
    tape.uses.append(use)
    return out


def layer_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.layer_norm`."""
    shape = tuple(normalized_shape)

    def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, w, b, eps)

    return _apply(tape, func, input, weight, bias, call, features=len(shape))


def rms_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Rule of `F.rms_norm`."""
    shape = list(normalized_shape)

    def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.rms_norm(x, shape, w, eps)

    return _apply(tape, func, input, weight, None, call, features=len(shape))


def group_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.group_norm`."""

    def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups, w, b, eps)

    return _apply(tape, func, input, weight, bias, call)


def instance_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.instance_norm`."""
    # The record must normalise as this call did: with the running statistics of this moment, unchanged.
    stats = None if use_input_stats or running_mean is None else running_mean.clone()
    spread = None if use_input_stats or running_var is None else running_var.clone()

    def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.instance_norm(x, stats, spread, w, b, use_input_stats, momentum, eps)

    if use_input_stats and running_mean is not None:
        with torch.no_grad():
            F.instance_norm(input, running_mean, running_var, None, None, True, momentum, eps)
    return _apply(tape, func, input, weight, bias, call)


def batch_norm(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.batch_norm` with running statistics."""
    mean = None if running_mean is None else running_mean.clone()
    var = None if running_var is None else running_var.clone()

    def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, False, momentum, eps)

    return _apply(tape, func, input, weight, bias, call)


def refuse_batch_statistics(
    tape: Tape,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: float,
    **__: float,
) -> None:
    """Refuse a `F.batch_norm` that mixes the samples, with or without parameters of its own."""
    if not training:
        return
    named = tape.trained(weight) or tape.trained(bias)
    name = tape.buffer_name(running_mean) or (named.names[0].rpartition(".")[0] if named else "batch_norm")
    raise UnsupportedModelError(
        f"BatchNorm {name!r} uses the statistics of the batch: samples interact and have no gradient of their own. "
        f"Remedy: call .eval() on it (running statistics), replace it by GroupNorm, {REFERENCE_REMEDY}."
    )
