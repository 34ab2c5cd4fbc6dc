"""`max_memory` bounds the temporaries of the Gram and changes no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steepest as st
from oracles import entry_truth, reduction_errors
from zoo import ZOO
from zoo_parts import rows_of

L = nn.Linear
BY_NAME = {entry.name: entry for entry in ZOO}


class Peak(TorchDispatchMode):
    """The largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        made = (t for t in tree_leaves(out) if isinstance(t, Tensor) and not t._is_view())
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in made)])
        return out


BIG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), (24, 3, 16, 16)),
    "conv_wide": (lambda: nn.Conv2d(32, 48, 3), (16, 32, 5, 5)),
    "linear_sequence": (lambda: L(8, 96), (24, 40, 8)),
    "linear_wide": (lambda: L(64, 128), (16, 24, 64)),
    "embedding": (lambda: nn.Embedding(3000, 16), (24, 50)),
    "layer_norm": (lambda: nn.LayerNorm((40, 64)), (24, 40, 64)),
}
LIMIT = 1 << 18


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", BIG)
def test_max_memory_bounds_the_gram(name: str, precision: str) -> None:
    factory, shape = BIG[name]
    model = factory()
    x = torch.randint(3000, shape) if name == "embedding" else torch.randn(shape)
    grams, peaks = [], []
    for limit in (1 << 30, LIMIT):
        capture = st.Capture(model, max_memory=limit)
        with capture:
            rows = rows_of(model(x))
        jac = capture.jacobian(rows)
        assert jac.max_memory == limit
        with Peak() as peak:
            grams.append(jac.gram(precision=precision))
        peaks.append(peak.bytes)
    # the two may take different forms of a layer's Gram, equal to the rounding of float32 gradients
    tolerance = 1e-6 if precision == "float64" else 1e-5
    torch.testing.assert_close(grams[1], grams[0], rtol=0, atol=tolerance * grams[0].abs().max().item())
    # one product may copy its slice of the operands: twice the limit at most
    assert peaks[1] <= 2 * LIMIT, f"a temporary of {peaks[1]} bytes where {LIMIT} were allowed"


@pytest.mark.parametrize("max_memory", [1, 300, 4096])
@pytest.mark.parametrize(
    "name", ["linear_3d_long", "conv2d", "conv_depthwise", "gpt", "embedding", "mha", "two_blocks"]
)
def test_tiny_memory_is_slow_but_right(name: str, max_memory: int) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build()
    capture = st.Capture(model, max_memory=max_memory)
    with capture:
        rows = entry.losses(model, inputs)
    errors = reduction_errors(capture.jacobian(rows), entry_truth(entry, model, inputs), skip=())
    assert max(errors.values()) <= 1e-5, errors
    assert max(error for name, error in errors.items() if name != "gram32") <= 1e-10, errors
