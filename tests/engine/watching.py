"""A watch that keeps all it is told: what the tests of the watch have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steepest.engine.capture import named_trainable
from steepest.engine.records import Record
from steepest.engine.watch import Pass, Watch
from steepest.optim.blocks import assign


class Seen:
    """A watch of all layers with factors, and all that it was told."""

    def __init__(self, model: nn.Module, *, exact: bool = True, due: Callable[[], bool] = lambda: True) -> None:
        blocks = assign(model, named_trainable(model, None), ()).blocks
        self.params = {n: p for block in blocks for n, p in zip(block.names, block.params, strict=True)}
        self.forwards: list[int] = []
        self.records: list[Record] = []
        self.watch = Watch(
            model, self.params, is_due=due, exact_rows=exact, on_forward=self._forward, on_gradient=self._gradient
        )

    def _forward(self, seen: Pass) -> int:
        self.forwards.append(seen.rows)
        return len(self.forwards)

    def _gradient(self, note: int, record: Record) -> None:
        assert note <= len(self.forwards)
        self.records.append(record)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()

    def sums(self, take: Callable[[int], slice] | None = None) -> dict[str, Tensor]:
        """Gradients by name, of all rows or of some."""
        total: dict[str, Tensor] = {}
        for record in self.records:
            part = record if take is None else record.take(take(record.num_rows))
            for name, grad in zip(record.names, part.summed(), strict=True):
                total[name] = total[name] + grad if name in total else grad
        return total

    def check(self, tolerance: float = 1e-10) -> None:
        """What was seen adds up to p.grad."""
        sums = self.sums()
        assert sums.keys() == {name for name, p in self.params.items() if p.grad is not None}
        for name, grad in sums.items():
            torch.testing.assert_close(grad, self.params[name].grad.to(grad), rtol=tolerance, atol=tolerance)
