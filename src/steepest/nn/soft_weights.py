"""Weights of the SOFT models as their authors released them, in `steepest.nn.SOFT`."""

import math
import re
from collections.abc import Mapping, Set
from typing import Any, cast

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.nn.soft import SOFT
from steepest.nn.soft_layers import Positions, resize_positions

__all__ = ["load_published_weights"]

# Under which names training scripts put the weights into a checkpoint.
_NESTS = ("model", "state_dict", "state_dict_ema")
_WRAPPED = "module."
# Layers of a block here, and under the authors' names.
_SOFTMAX_FREE = {
    "attention.q_proj": "att.mha.W_q",
    "attention.v_proj": "att.mha.W_v",
    "attention.landmark_conv": "att.mha.attn.Qlandmark_op",
    "attention.landmark_norm": "att.mha.attn.Qnorm_act.0",
    "attention.value_conv": "att.mha.attn.conv",
    "attention.out_proj": "att.mha.ff",
    "norm1": "att.norm1",
    "linear1": "att.ff1",
    "linear2": "att.ff2",
    "norm2": "att.norm2",
}
_SOFTMAX = {
    "norm1": "norm1",
    "q_proj": "attn.q",
    "kv_proj": "attn.kv",
    "out_proj": "attn.proj",
    "norm2": "norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}
# How many entries a message lists.
_SHOWN = 4


def load_published_weights(
    model: SOFT, state_dict: Mapping[str, Any], *, head: bool = True, interpolate_positions: bool = False
) -> None:
    r"""Fill a model with weights that the authors of SOFT released, all of them or none.

    Names on the left are the authors', for the stages k = 1 to 4 and the blocks i = 0, 1, ...; those on the right are
    this library's, where P stands for `stages.{k-1}`. Of each layer the weight and the bias are taken, and the running
    statistics of BatchNorm::

        patch_embed{k}.proj.{j}                  P.embedding.{j}
        pos_embed{k}                             P.positions.weight
        cls_token                                P.class_token, of the last stage
        block{k}.{i}.att.mha.W_q, W_v, ff        P.blocks.{i}.attention.q_proj, v_proj, out_proj
        block{k}.{i}.att.mha.attn.Qlandmark_op   P.blocks.{i}.attention.landmark_conv
        block{k}.{i}.att.mha.attn.Qnorm_act.0    P.blocks.{i}.attention.landmark_norm
        block{k}.{i}.att.mha.attn.conv           P.blocks.{i}.attention.value_conv
        block{k}.{i}.att.ff1, ff2, norm1, norm2  P.blocks.{i}.linear1, linear2, norm1, norm2
        block4.{i}.attn.q, kv, proj              P.blocks.{i}.q_proj, kv_proj, out_proj
        block4.{i}.mlp.fc1, fc2                  P.blocks.{i}.linear1, linear2
        block4.{i}.norm1, norm2                  P.blocks.{i}.norm1, norm2
        norm, head                               norm, head

    The model's numbers are then those of the authors' code as far as its Newton iteration inverts A + 0.01 I, which
    it is made for in their plain models since July 2022. Before, and in their normalised models, it is stopped after
    20 steps towards the inverse of A itself; `inverse=NewtonInverse(ridge=1e-6, steps=20)` comes nearest to that, but
    for its start, which there depends on the other images of the batch.

    Args:
        model: The model, with `norm="batch"`.
        state_dict: From `torch.load(file, map_location="cpu", weights_only=True)`. It may lie within a checkpoint,
            under "model", "state_dict" or "state_dict_ema", and its names may begin with "module.".
        head: Whether the last layer is loaded; False leaves the model's own, for other classes.
        interpolate_positions: Whether position embeddings made for another image size are interpolated.

    Raises:
        InvalidOptionError: If an entry is missing, unknown, or of another shape; the model is as it was then.

    Example:
        >>> from steepest.nn import SOFT
        >>> model = SOFT(dims=(32, 32), heads=(1, 1), depths=(1, 1), landmark_strides=(2,), value_kernel_sizes=(3,))
        >>> load_published_weights(model, {"state_dict": {"pos_embed1": torch.zeros(1, 3136, 32)}})
        Traceback (most recent call last):
        steepest.errors.InvalidOptionError: The state dict does not fit the model; nothing was loaded: missing ...
    """
    if not isinstance(model, SOFT):
        raise InvalidOptionError(f"model is a {type(model).__name__}: give the steepest.nn.SOFT itself, unwrapped.")
    if model.norm_kind != "batch":
        raise InvalidOptionError(
            f"The model has norm={model.norm_kind!r}: published weights are of norm='batch', build it with that."
        )
    given = _unwrapped(state_dict)
    wanted = {_published_name(name, len(model.stages)): tensor for name, tensor in model.state_dict().items()}
    if not head:
        wanted, given = ({k: v for k, v in d.items() if not k.startswith("head.")} for d in (wanted, given))
    problems = _compare_names(model, wanted.keys(), given.keys())
    ready, misfits = {}, []
    for name in sorted(wanted.keys() & given.keys()):
        try:
            ready[name] = _fitted(model, name, given[name], wanted[name], interpolate_positions)
        except _MisfitError as misfit:
            misfits.append(f"{name} {misfit}")
    problems += _shortened(misfits)
    if problems:
        raise InvalidOptionError(f"The state dict does not fit the model; nothing was loaded: {'; '.join(problems)}.")
    with torch.no_grad():
        for name, value in ready.items():
            wanted[name].copy_(value)


class _MisfitError(Exception):
    """What is wrong with one entry."""


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _unwrapped(state_dict: Any) -> dict[str, Any]:
    """The entries themselves, under the authors' names."""
    while isinstance(state_dict, Mapping):
        nests = [name for name in _NESTS if isinstance(state_dict.get(name), Mapping)]
        if not nests:
            break
        if len(nests) > 1:
            raise InvalidOptionError(
                f"The checkpoint holds weights under {', '.join(map(repr, nests))}: give one of them, such as "
                f"checkpoint[{nests[-1]!r}]."
            )
        state_dict = state_dict[nests[0]]
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise InvalidOptionError(
            f"state_dict is a {type(state_dict).__name__} without names: give what torch.load returns."
        )
    wrapped = bool(state_dict) and all(name.startswith(_WRAPPED) for name in state_dict)
    return {name.removeprefix(_WRAPPED) if wrapped else name: value for name, value in state_dict.items()}


def _published_name(name: str, stages: int) -> str:
    """The authors' name of an entry of this library's state dict."""
    found = re.fullmatch(r"stages\.(\d+)\.(\w+)\.?(.*)", name)
    if found is None:
        return name  # norm and head
    number, part, rest = int(found[1]) + 1, found[2], found[3]
    if part == "class_token":
        return "cls_token"
    if part == "positions":
        return f"pos_embed{number}"
    if part == "embedding":
        return f"patch_embed{number}.proj.{rest}"
    block, layer = rest.split(".", 1)
    layer, kind = layer.rsplit(".", 1)
    layers = _SOFTMAX if number == stages else _SOFTMAX_FREE
    return f"block{number}.{block}.{layers[layer]}.{kind}"


def _compare_names(model: SOFT, wanted: Set[str], given: Set[str]) -> list[str]:
    """What is missing and what is too much, with the depths where they tell why."""
    problems = []
    for what, names in (("missing", wanted - given), ("unexpected", given - wanted)):
        if names:
            problems.append(f"{what} {', '.join(_shortened(sorted(names)))}")
    blocks = [(int(found[1]), int(found[2])) for name in given if (found := re.match(r"block(\d+)\.(\d+)\.", name))]
    depths = tuple(max((i + 1 for k, i in blocks if k == n + 1), default=0) for n in range(len(model.depths)))
    if problems and all(depths) and depths != model.depths:
        problems.append(f"the weights are of depths={depths} and the model's are {model.depths}, build it with those")
    return problems


def _fitted(model: SOFT, name: str, value: Any, own: Tensor, interpolate: bool) -> Tensor:
    """The entry as the model needs it."""
    if own.is_meta:
        raise _MisfitError("of the model is on the meta device: call model.to_empty(device='cpu') before")
    if not isinstance(value, Tensor):
        raise _MisfitError(f"is a {type(value).__name__} and no tensor")
    if value.is_meta or value.layout is not torch.strided or (own.is_floating_point() > value.is_floating_point()):
        raise _MisfitError(f"is {value.dtype}, {value.layout}, on {value.device}: it must be like {own.dtype} on a CPU")
    if found := re.fullmatch(r"pos_embed(\d+)", name):
        return _fitted_positions(model, int(found[1]) - 1, value, own, interpolate)
    if value.shape != own.shape:
        remedy = " (head=False keeps the model's own)" if name.startswith("head.") else ""
        raise _MisfitError(f"has the shape {tuple(value.shape)} and not {tuple(own.shape)}{remedy}")
    return value


def _fitted_positions(model: SOFT, stage: int, value: Tensor, own: Tensor, interpolate: bool) -> Tensor:
    """Position embeddings for the model's image size; the authors' maps are square."""
    wanted = cast(Positions, model.stages[stage].positions).size
    extra = own.shape[1] - math.prod(wanted)
    side = math.isqrt(max(value.shape[1] - extra, 0)) if value.ndim == 3 else 0
    if side == 0 or value.shape != (1, extra + side**2, own.shape[2]):
        raise _MisfitError(
            f"has the shape {tuple(value.shape)} and not [1, {f'{extra} + ' if extra else ''}tokens of a square map, "
            f"{own.shape[2]}]"
        )
    if (side, side) != wanted and not interpolate:
        raise _MisfitError(
            f"is for a map of {side} x {side}, and the model's is {wanted[0]} x {wanted[1]}: pass "
            f"interpolate_positions=True, or build the model with image_size={side * 2 ** (stage + 2)}"
        )
    return resize_positions(value.to(own.dtype), (side, side), wanted)
