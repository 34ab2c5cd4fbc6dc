"""Which parameters of a model get Kronecker factors, and who trains the others."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from steepest.errors import InvalidOptionError, UnsupportedModelError

__all__ = ["Assignment", "Block", "assign"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Block:
    """A layer whose weight, and bias if it has one, share a Kronecker-factored block.

    Args:
        name: Qualified name of the layer.
        names: Qualified names of its weight and bias.
        params: The parameters.
        is_table: Whether the weight is an embedding's ``[num_embeddings, d]``, the transpose of a linear layer's.
    """

    name: str
    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    is_table: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight; the optimizer keeps the state of the block with it."""
        return self.params[0]

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """Put tensors like weight and bias into one matrix ``[d_out, d_in (+ 1)]``."""
        weight, *bias = tensors
        matrix = weight.T if self.is_table else weight.flatten(1)
        return torch.cat([matrix, bias[0].unsqueeze(1)], 1) if bias else matrix

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Take a matrix apart into tensors like weight and bias."""
        if self.is_table:
            return (matrix.T,)
        if len(self.params) == 1:
            return (matrix.view_as(self.weight),)
        return matrix[:, :-1].reshape(self.weight.shape), matrix[:, -1]


@dataclass(frozen=True)
class Assignment:
    """Who trains what.

    Args:
        blocks: Layers with Kronecker factors.
        others: Qualified names of all other trained parameters, with the reason.
    """

    blocks: tuple[Block, ...]
    others: Mapping[str, str]

    def within(self, tensors: Iterable[Tensor]) -> list[Block]:
        """The blocks whose weight is among some tensors, with their bias where it is too."""
        inside = {id(tensor) for tensor in tensors}
        found = []
        for block in self.blocks:
            if id(block.weight) in inside:
                kept = [(n, p) for n, p in zip(block.names, block.params, strict=True) if id(p) in inside]
                names, params = zip(*kept, strict=True)
                found.append(replace(block, names=names, params=params))
        return found


def assign(model: nn.Module, trained: Mapping[str, Tensor], skip: Iterable[str], *, tables: bool = False) -> Assignment:
    """Go through the layers of a model.

    Linear layers, convolutions without groups and the packed input projection of `torch.nn.MultiheadAttention` have
    Kronecker factors, unless they are tied to other layers or parametrized.

    Args:
        model: The model.
        trained: The parameters to train, by qualified name.
        skip: Regular expressions; layers whose qualified name one of them matches anywhere are left out.
        tables: Whether embeddings have factors too.

    Returns:
        The assignment.

    Raises:
        InvalidOptionError: If an expression is none, or matches nothing.
        UnsupportedModelError: If the model is compiled, or a parameter has no shape yet.
    """
    for path, module in model.named_modules():
        if _is_compiled(module):
            raise UnsupportedModelError(
                f"{path or 'The model'} is compiled ({type(module).__name__}), and its layers cannot be watched: give "
                "the optimizer the model as it was before torch.compile, and train that."
            )
    for name, parameter in trained.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedModelError(f"Parameter {name!r} has no shape yet: run one batch through the model first.")
    patterns = [_compiled(pattern) for pattern in skip]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    blocks, others, matched = [], {}, set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + name: p for name, p in module.named_parameters(recurse=False) if prefix + name in trained}
        if not own:
            continue
        hits = [pattern for pattern in patterns if pattern.search(path)]
        matched.update(hits)
        weight, bias, reason = _factored(module, prefix, own, tables=tables)
        if hits:
            reason = f"skip={hits[0].pattern!r}"
        elif weight is not None and owners[id(own[weight])] > 1:
            reason = "its weight is tied to another layer"
        if weight is None or reason:
            others.update(dict.fromkeys(own, reason or f"{type(module).__name__} has no Kronecker factors"))
            continue
        names = tuple(name for name in (weight, bias) if name is not None and name in own)
        table = isinstance(module, nn.Embedding)
        blocks.append(Block(path, names, tuple(own[name] for name in names), is_table=table))
        others.update({name: "not part of the layer's weight and bias" for name in own if name not in names})
    _refuse_idle(patterns, matched)
    return Assignment(tuple(blocks), others)


def _is_compiled(module: nn.Module) -> bool:
    # Without this import there is no compiled model, and it takes seconds.
    dynamo = sys.modules.get("torch._dynamo")
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InvalidOptionError(f"skip={pattern!r} is no regular expression: {error}.") from error


def _refuse_idle(patterns: Iterable[re.Pattern[str]], matched: set[re.Pattern[str]]) -> None:
    idle = [pattern.pattern for pattern in patterns if pattern not in matched]
    if idle:
        raise InvalidOptionError(
            f"skip={idle[0]!r} matches no layer with trained parameters: correct it, or leave it out."
        )


def _factored(
    module: nn.Module, prefix: str, own: Mapping[str, Tensor], *, tables: bool
) -> tuple[str | None, str | None, str]:
    """Names of the weight and the bias that have factors, and a reason if there are none."""
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    if isinstance(module, nn.MultiheadAttention):
        weight, bias = f"{prefix}in_proj_weight", f"{prefix}in_proj_bias"
        if module.bias_k is not None:
            return None, None, "MultiheadAttention with add_bias_kv has no Kronecker factors"
    elif isinstance(module, _CONVOLUTIONS):
        if module.groups > 1:
            return None, None, "a convolution with groups has no Kronecker factors"
    elif isinstance(module, nn.Embedding):
        if not tables:
            return None, None, "an embedding, which embeddings='kronecker' would give a factor"
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return None, None, "an embedding with max_norm, scale_grad_by_freq or sparse has no Kronecker factors"
    elif not isinstance(module, nn.Linear):
        return None, None, ""
    if is_parametrized(module):
        return None, None, "its weight is parametrized"
    if weight not in own:
        return None, None, "its weight is not trained"
    return weight, bias, ""
