"""An optimizer for layers with Kronecker factors that trains all other parameters of the model by AdamW."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.engine.capture import named_trainable
from steepest.errors import InvalidOptionError
from steepest.optim.blocks import Block, assign

__all__ = ["LayerOptimizer"]


class LayerOptimizer(Optimizer):
    """Knows who trains what: every group of the user's becomes one of layers and one of the other parameters.

    Args:
        model: The model.
        params: Which parameters to train, or groups; None takes all that require grad.
        defaults: As in torch.optim, with ``adamw_lr`` and ``adamw_weight_decay`` for the other parameters.
        skip: Regular expressions of layers that count as other parameters.
        tables: Whether embeddings count as layers with factors.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        skip: Iterable[str],
        *,
        tables: bool = False,
    ) -> None:
        everything = named_trainable(model, None)
        self._model = model
        self._assignment = assign(model, everything, skip, tables=tables)
        self._names = {id(p): name for name, p in everything.items()}
        self._blocks: dict[str, Block] = {}
        self._constructed = False
        super().__init__(list(everything.items()) if params is None else params, {**defaults, "method": "kfac"})
        self._constructed = True
        self._begin()

    def _begin(self) -> None:
        """Called when the groups are complete, and after every change of them."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters: those of layers with factors here, the others by AdamW, in a group of their own.

        Args:
            param_group: As in torch.optim.

        Raises:
            InvalidOptionError: If a tensor is no trainable parameter of the model.
        """
        given = param_group["params"]
        entries = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        strangers = sum(id(tensor) not in self._names for tensor in tensors)
        if strangers:
            raise InvalidOptionError(
                f"{strangers} of the tensors in params are no trainable parameters of {type(self._model).__name__}: "
                "pass some of model.parameters(), with requires_grad set."
            )
        blocks = self._assignment.within(tensors)
        self._blocks.update({block.names[0]: block for block in blocks})
        mine = {id(p) for block in blocks for p in block.params}
        for method in ("kfac", "adamw"):
            chosen = [e for e, t in zip(entries, tensors, strict=True) if (id(t) in mine) == (method == "kfac")]
            if not chosen:
                continue
            group = {**param_group, "params": chosen, "method": method}
            if method == "adamw":
                merged = {**self.defaults, **param_group}
                group |= {"lr": merged["adamw_lr"], "weight_decay": merged["adamw_weight_decay"]}
            super().add_param_group(group)
        if self._constructed:
            self._begin()

    def __repr__(self) -> str:
        """List who trains what."""
        layers = [f"    {block.name}: {', '.join(map(_shape, block.params))}" for block in self._blocks.values()]
        watched = {name for block in self._blocks.values() for name in block.names}
        trained = [self._names[id(p)] for group in self.param_groups for p in group["params"]]
        rest = [
            f"    {name}: {self._assignment.others.get(name, 'its weight is in another group')}"
            for name in trained
            if name not in watched
        ]
        heads = [f"  Kronecker factors, {len(layers)} layers:", *layers, f"  AdamW, {len(rest)} parameters:", *rest]
        return "\n".join([super().__repr__(), *heads])

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _layer_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters that have factors."""
        return [group for group in self.param_groups if group["method"] == "kfac"]

    def _rename(self) -> None:
        """Know the names of the parameters again, in a copy."""
        self._names = {id(p): name for name, p in named_trainable(self._model, None).items()}


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
