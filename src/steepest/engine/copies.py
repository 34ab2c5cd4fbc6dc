"""A model called on samples that have a copy of the parameters each."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Vectorised", "batch_of", "form_of", "part_of", "without_speed_warnings"]


class Vectorised:
    """Stands in for a model's forward, past the hooks, which the outer call runs already.

    Args:
        model: The model, whose ``forward`` is kept for `give_back`.
        params: The parameters that samples have copies of, by qualified name.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        self._model = model
        self._own = model.__dict__.get("forward")  # what somebody else put there
        self._call = model.forward
        names = {id(p): name for name, p in params.items()}
        # Not torch.func.functional_call: where a module is in a model twice, it leaves the copies behind.
        self._places = [
            (module._parameters, key, names[id(p)])
            for module in model.modules()
            for key, p in module._parameters.items()
            if id(p) in names
        ]

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        return self._call(*args, **kwargs)

    def give_back(self) -> None:
        """Undo that the model's forward is another."""
        del self._model.forward
        if self._own is not None:
            self._model.forward = self._own

    def each(self, copies: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model on every sample.

        Args:
            copies: ``[B, *shape]`` for every parameter.
            args: Tensors ``[B, ...]``, and whatever is the same for all samples.
            kwargs: The same by name.

        Returns:
            ``[B, 1, ...]``.
        """

        def one(values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._with(values):
                return self._call(*map(_lone, args), **{key: _lone(a) for key, a in kwargs.items()})

        dims = (0, tuple(map(_dim, args)), {key: _dim(a) for key, a in kwargs.items()})
        return torch.func.vmap(one, in_dims=dims)(dict(copies), tuple(args), dict(kwargs))

    @contextmanager
    def _with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        before = [place[key] for place, key, _ in self._places]
        try:
            for place, key, name in self._places:
                place[key] = values[name]  # type: ignore[assignment]
            yield
        finally:
            for (place, key, _), value in zip(self._places, before, strict=True):
                place[key] = value


@contextmanager
def without_speed_warnings() -> Iterator[None]:
    """A layer that torch vectorises by a loop of its own is slower, and as right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Number of samples of a call, 0 where its tensors do not agree on it."""
    sizes = {a.shape[0] if a.ndim else 0 for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 0


def part_of(value: Any, taken: slice) -> Any:
    """Some samples of an argument."""
    return value[taken] if isinstance(value, Tensor) else value


def form_of(value: Any) -> object:
    """What tells the arguments of different kinds of calls from each other."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def _dim(value: Any) -> int | None:
    return 0 if isinstance(value, Tensor) else None


def _lone(value: Any) -> Any:
    return value.unsqueeze(0) if isinstance(value, Tensor) else value
