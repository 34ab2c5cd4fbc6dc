"""Kronecker factors and sketches: the reductions that later optimizers read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.engine import conv
from steepest.engine.conv import ConvRecord
from steepest.engine.conv_shape import ConvShape
from steepest.engine.linear import LinearRecord
from steepest.engine.records import KroneckerFactors
from steepest.training.memory import peak_memory


def rows_of_squares(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).flatten(1).square().sum(1)


def jacobian(model: nn.Module, inputs: Tensor) -> st.Jacobian:
    capture = st.Capture(model)
    with capture:
        rows = rows_of_squares(model, inputs)
    return capture.jacobian(rows)


LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (1, 3)),
    "no_bias": (lambda: nn.Linear(3, 2, bias=False), (1, 3)),
    "conv_one_position": (lambda: nn.Conv2d(2, 3, 3), (1, 2, 3, 3)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_datum_is_exact(name: str, sharing: str) -> None:
    """A (x) S is then the outer product of the gradient with itself, bias joined to the weight's columns."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    jac = jacobian(layer, torch.randn(shape, dtype=torch.float64))
    ((names, factors),) = jac.kronecker_factors(sharing).items()
    assert names == tuple(dict(layer.named_parameters()))
    grads = [grad[0].flatten(1) if grad.ndim > 2 else grad[0].unsqueeze(1) for grad in jac.per_sample_grads().values()]
    gradient = torch.cat(grads, 1).T.flatten()  # columns first: A (x) S acts on vec(weight)
    torch.testing.assert_close(torch.kron(factors.input_factor, factors.grad_factor), gradient.outer(gradient))


@pytest.mark.parametrize("copies", [2, 5])
def test_the_scale_does_not_depend_on_the_batch(copies: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(4, 6, 3)
    one, many = (jacobian(model, batch).kronecker_factors()["weight", "bias"] for batch in (x, x.repeat(copies, 1, 1)))
    torch.testing.assert_close(one.input_factor, many.input_factor)
    torch.testing.assert_close(one.grad_factor, many.grad_factor)


def slow_factors(layer: nn.Module, images: Tensor, grads: Tensor, sharing: str) -> tuple[Tensor, Tensor]:
    """A and S of a convolution, one position after another; a row is ``[images of the row, channels, *spatial]``."""
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[layer.weight.ndim - 2]
    features = layer.weight[0].numel()
    # Filters that each pick one entry of the patch under a position.
    pick = torch.eye(features, dtype=images.dtype).view(features, *layer.weight.shape[1:])
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    a, s, count = 0.0, 0.0, 0
    for row, grad in zip(images, grads, strict=True):
        patches = convolve(row, pick, **options).flatten(2)  # [images, features, positions]
        if layer.bias is not None:
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        x, g = (list(part.flatten(2).transpose(1, 2).flatten(0, 1)) for part in (patches, grad))
        if sharing == "reduce":
            x, g = [sum(x) / len(x)], [sum(g)]
        a, s, count = a + sum(v.outer(v) for v in x), s + sum(v.outer(v) for v in g), count + len(x)
    return a / count, s / len(images)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=2, dilation=2), (3, 17)),
    "2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 6, 7)),
    "2d_no_bias": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2, bias=False), (2, 5, 5)),
    "2d_pointwise": (lambda: nn.Conv2d(5, 2, 1), (5, 4, 3)),
    "2d_halved": (lambda: nn.Conv2d(15, 6, 3, padding=1), (15, 16, 16)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("rows_of_a_chunk", [1, 2, 99])
@pytest.mark.parametrize("images", [1, 2], ids=["one_image", "two_images"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_factors_of_a_convolution_are_those_of_its_patches(
    name: str, sharing: str, images: int, rows_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(5, images, *shape, dtype=torch.float64)
    capture = st.Capture(layer)
    with capture:
        out = layer(x.flatten(0, 1)).unflatten(0, (5, images))
        loss = out.pow(3).flatten(1).sum(1)
    positions = images * out[0, 0, 0].numel()
    row = positions * (layer.weight[0].numel() + 1) * x.itemsize
    monkeypatch.setattr(conv, "CHUNK_BYTES", rows_of_a_chunk * row)
    (factors,) = capture.jacobian(loss).kronecker_factors(sharing).values()
    a, s = slow_factors(layer, x, 3 * out.detach().square(), sharing)
    assert factors.positions == 5 * (1 if sharing == "reduce" else positions)
    torch.testing.assert_close(factors.input_factor, a, rtol=1e-12, atol=1e-12 * float(a.abs().max()))
    torch.testing.assert_close(factors.grad_factor, s, rtol=1e-12, atol=1e-12 * float(s.abs().max()))


def linear_factors() -> tuple[KroneckerFactors, Tensor, Tensor]:
    """Factors of a record in single precision; inputs and output gradients in double, a column for each position."""
    torch.manual_seed(0)
    x, g = torch.randn(300, 2, 150), torch.randn(300, 2, 20)
    factors = LinearRecord("weight", None, x, g).kronecker_factors("expand")
    assert factors is not None
    return factors, x.flatten(0, 1).T.double(), g.flatten(0, 1).T.double()


def conv_factors() -> tuple[KroneckerFactors, Tensor, Tensor]:
    """The same of a convolution."""
    torch.manual_seed(0)
    x, g = torch.randn(9, 20, 10, 10), torch.randn(9, 5, 8, 8)
    shape = ConvShape.of(torch.Size([5, 20, 3, 3]), 1, 0, 1, 1)
    factors = ConvRecord("weight", None, x, g, shape, 9).kronecker_factors("expand")
    assert factors is not None
    return factors, *(part.transpose(0, 1).flatten(1).double() for part in (F.unfold(x, 3), g.flatten(2)))


@pytest.mark.parametrize("make", [linear_factors, conv_factors])
def test_factors_keep_full_precision_under_autocast(
    make: Callable[[], tuple[KroneckerFactors, Tensor, Tensor]],
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors, x, g = make()
    rows = 300 if make is linear_factors else 9
    for found, exact in ((factors.input_factor, x @ x.T / x.shape[1]), (factors.grad_factor, g @ g.T / rows)):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 3e-7


def test_factors_of_a_convolution_take_the_memory_of_a_chunk_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images, channels = 48, 64
    chunk, result = 1 << 19, 4 * ((9 * channels + 1) ** 2 + channels**2)
    torch.manual_seed(0)
    jac = jacobian(nn.Conv2d(channels, channels, 3, padding=1), torch.randn(images, channels, 8, 8))
    monkeypatch.setattr(conv, "CHUNK_BYTES", chunk)
    peak = peak_memory("cpu", jac.kronecker_factors)
    # A chunk of patches, and with it the images padded and the output gradients, which are a ninth each.
    assert result < peak < result + 1.4 * chunk, f"{peak} bytes: {result} are the result's, and {chunk} a chunk's"


def test_layers_without_a_rule_have_no_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert list(jacobian(model, torch.randn(3, 4)).kronecker_factors()) == [("0.weight", "0.bias")]


def test_sharing_is_checked() -> None:
    with pytest.raises(st.InvalidOptionError, match="sharing='sum'"):
        jacobian(nn.Linear(2, 1), torch.randn(3, 2)).kronecker_factors("sum")


def test_sketches_get_every_row_by_parameter() -> None:
    seen: dict[str, Tensor] = {}

    class Keep:
        def insert(self, blocks: dict[str, Tensor]) -> None:
            seen.update(blocks)

    jac = jacobian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
    jac.sketch_into(Keep())
    torch.testing.assert_close(torch.cat([seen[name] for name in jac.names], 1), jac.to_dense())
