"""Any convolution, any stack of layers: drawn by hypothesis, judged by autograd row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs
from torch import Tensor, nn

from capturing import capture_rows, check
from zoo_parts import residual, rows_of

FEW = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_exact(model: nn.Module, x: Tensor) -> None:
    check(capture_rows(model, lambda: rows_of(model(x))), model, lambda: rows_of(model(x)))


@hs.composite
def convolutions(draw: hs.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(hs.integers(1, 3))
    kernel, dilation = (tuple(draw(hs.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    mode = draw(hs.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(hs.booleans())
    stride = (1,) * dims if same else tuple(draw(hs.integers(1, 3)) for _ in range(dims))
    padding = "same" if same else tuple(draw(hs.integers(0, 2)) for _ in range(dims))
    groups = draw(hs.integers(1, 2))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        2 * groups, draw(hs.integers(1, 2)) * groups, kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=draw(hs.booleans()), padding_mode=mode,
    )  # fmt: skip
    size = tuple(draw(hs.integers(5, 6)) for _ in range(dims))
    x = torch.randn(draw(hs.integers(2, 4)), 2 * groups, *size, dtype=torch.float64)
    return conv.double(), x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(case=convolutions())
@FEW
def test_any_convolution(case: tuple[nn.Module, Tensor]) -> None:
    assert_exact(*case)


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "no_bias": lambda: nn.Linear(4, 4, bias=False),
    "layer_norm": lambda: nn.LayerNorm(4),
    "rms_norm": lambda: nn.RMSNorm(4),
    "tanh": nn.Tanh,
    "relu_in_place": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "residual": lambda: residual(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
}


@given(
    names=hs.lists(hs.sampled_from(sorted(LAYERS)), max_size=5),
    repeat=hs.booleans(),
    rows=hs.integers(1, 5),
    positions=hs.integers(1, 5),
    seed=hs.integers(0, 3),
)
@FEW
def test_any_stack(names: list[str], repeat: bool, rows: int, positions: int, seed: int) -> None:
    """Also with every layer called twice, and with as many positions as rows."""
    torch.manual_seed(seed)
    stack = [LAYERS[name]() for name in ["linear", *names]]
    model = nn.Sequential(*stack, *(stack if repeat else [])).double()
    assert_exact(model, torch.randn(rows, positions, 4, dtype=torch.float64))


@given(length=hs.integers(1, 6), rows=hs.integers(1, 5), vocabulary=hs.integers(1, 5), padding=hs.booleans())
@FEW
def test_any_embedding(length: int, rows: int, vocabulary: int, padding: bool) -> None:
    torch.manual_seed(length)
    table = nn.Embedding(vocabulary, 3, padding_idx=0 if padding else None)
    assert_exact(nn.Sequential(table, nn.Linear(3, 2)).double(), torch.randint(vocabulary, (rows, length)))
