"""What the watch leaves behind: of forwards that raise, of copies, of closed and of long runs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from capturing import mlp, points
from engine.watching import Seen

L = nn.Linear


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(5, 6), L(6, 3)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.error is not None:
            raise self.error("on the way")
        return self.b(h)


def test_a_forward_that_raises_leaves_nothing_behind(world: Callable[[], dict[str, object]]) -> None:
    model = Fails().double()
    with Seen(model) as seen:
        before = world()
        model.error = ValueError
        with pytest.raises(ValueError, match="on the way"):
            model(points(2))
        assert world() == before
        model.error = None
        model(points()).square().sum().backward()
        seen.check()
        assert seen.forwards == [6]


@pytest.mark.parametrize("remedy", ["abandon", "close", "collect"])
def test_an_interrupted_forward_is_left(world: Callable[[], dict[str, object]], remedy: str) -> None:
    """Torch does not run the hooks after Ctrl-C: the mode stays until something of the optimizer is called."""
    model = Fails().double()
    modes = world()["function modes"]
    seen = Seen(model)
    model.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(points(2))
    assert world()["function modes"] != modes
    if remedy == "abandon":
        seen.watch.abandon()
        model.error = None
        model(points()).square().sum().backward()
        seen.check()
        seen.watch.close()
    elif remedy == "close":
        seen.watch.close()
    else:
        del seen
        gc.collect()
    assert world()["function modes"] == modes


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_watched_model_is_not_watched_and_trains(how: str) -> None:
    model = mlp()
    with Seen(model) as seen:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        x = points()
        other(x).square().sum().backward()
        assert seen.forwards == []
        model(x).square().sum().backward()
        seen.check()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
            assert a.grad is not b.grad


@pytest.mark.parametrize("how", ["close", "collect"])
def test_no_hook_is_left(how: str, world: Callable[[], dict[str, object]]) -> None:
    model = mlp()
    seen = Seen(model)
    model(points()).square().sum().backward()
    assert world()["hooks"]
    if how == "close":
        seen.watch.close()
        assert seen.watch.is_closed
        seen.watch.close()  # a second time is nothing
    else:
        del seen
        gc.collect()
    assert world()["hooks"] == []
    model(points()).sum().backward()


def test_a_graph_that_is_not_walked_is_freed_without_the_collector() -> None:
    model = mlp()
    kept: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda _m, _i, out: kept.append(weakref.ref(out)))
    with Seen(model) as seen:
        gc.disable()
        try:
            for walked in (True, False, True):
                loss = model(points()).square().sum()
                if walked:
                    loss.backward()
                del loss
                seen.records.clear()
                assert [ref() for ref in kept] == [None] * len(kept)
        finally:
            gc.enable()
    assert len(kept) == 3
    model[0]._forward_hooks.clear()


def test_nothing_grows_over_fifty_steps() -> None:
    model = mlp()

    def tensors() -> int:
        return sum(type(item) in {Tensor, nn.Parameter} for item in gc.get_objects())

    with Seen(model) as seen:
        gc.collect()
        counts = []
        gc.disable()
        try:
            for step in range(50):
                model.zero_grad()
                model(points()).square().sum().backward()
                seen.records.clear()
                if step in {1, 49}:
                    counts.append(tensors())
        finally:
            gc.enable()
    assert counts[1] <= counts[0]
