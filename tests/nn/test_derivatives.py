"""Derivatives in the inputs, against torch.func; and rows made of them, in the engine, against one backward each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from steepest.errors import InvalidOptionError, UnsupportedModelError
from steepest.nn import Affine, FourierFeatures, Jet, Sine, WithDerivatives, differentiate, propagate
from steepest.nn.jet_pairs import Second

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softplus, sharp": lambda: nn.Softplus(beta=3.0, threshold=2.0),
    "sine": Sine,
    "sine, fast": lambda: Sine(3.0),
}


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, d: int = 3, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(d, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, outputs)]
    return nn.Sequential(*layers).double()


def points(count: int = 5, d: int = 3) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check_derivatives(model: nn.Module, x: Tensor) -> None:
    """Value, gradient and all second derivatives against torch.func, point by point."""

    def one(point: Tensor) -> Tensor:
        out: Tensor = model(point.unsqueeze(0)).squeeze(0)
        return out

    u = differentiate(model, x, second="all")
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(u.value, model(x), **close)
    torch.testing.assert_close(u.gradient, torch.func.vmap(torch.func.jacrev(one))(x), **close)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(one)))(x)
    torch.testing.assert_close(u.hessian(), hessian, **close)
    diagonal = differentiate(model, x)
    torch.testing.assert_close(diagonal.laplacian(), hessian.diagonal(dim1=2, dim2=3).sum(2), **close)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_the_derivatives_of_torch_func(name: str) -> None:
    # Inputs that are large enough to reach the straight part of softplus.
    check_derivatives(mlp(ACTIVATIONS[name]), 3 * points(20))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Linear(3, 2, bias=False),
        nn.Identity(),
        nn.Sequential(nn.Tanh(), nn.Linear(3, 2)),
        nn.Sequential(
            Affine([2.0, 0.5, -1.0], [0.1, 0.2, 0.3]), nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Dropout())
        ),
        nn.Sequential(FourierFeatures(3, 4, deviation=0.3), nn.Linear(8, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), FourierFeatures(4, 2, deviation=0.3), nn.Linear(4, 1)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
    ],
    ids=[
        "linear",
        "no bias",
        "identity",
        "activation first",
        "nested",
        "features first",
        "features later",
        "weight norm",
    ],
)
def test_every_arrangement_of_layers_has_the_derivatives_of_torch_func(model: nn.Module) -> None:
    check_derivatives(model.double().eval(), points())


class Vanishing(nn.Module):
    """Zero where the first input is 0 or 1, by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x[:, :1] * (1 - x[:, :1]) * self.net(x) - 0.5 * self.net(x) + 1
        return out

    def jet(self, x: Jet) -> Jet:
        first, net = x.column(0), propagate(self.net, x)
        return first * (1 - first) * net - 0.5 * net + 1


def test_a_module_of_ones_own_says_how_jets_go_through_it() -> None:
    check_derivatives(nn.Sequential(nn.Linear(3, 3), Vanishing(), nn.Tanh()).double(), points())


def test_one_number_times_several_and_tensors_on_the_left_follow_the_product_rule() -> None:
    x = Jet.of(points(), second="all")
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    u = scale * x * x.column(1) + scale
    assert torch.equal(u.value, scale * points() * points()[:, 1:2] + scale)
    assert torch.equal(u.d(1, 1), torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64).expand(5, 3))
    assert torch.equal(u.d(0, 1), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(5, 3))
    assert torch.equal(u.d(1, 0), u.d(0, 1))
    assert torch.equal((-x).d(0), -x.d(0))


@pytest.mark.parametrize("second", ["diagonal", "all", [(2, 2), (1, 0)]])
def test_what_was_asked_for_is_all_that_is_computed(second: Second) -> None:
    model, x = mlp(), points()
    full, u = differentiate(model, x, second="all"), differentiate(model, x, second=second)
    assert len(u.pairs) == {"diagonal": 3, "all": 6}.get(str(second), 2)
    for i, j in u.pairs:
        torch.testing.assert_close(u.d(i, j), full.d(i, j), rtol=1e-13, atol=1e-13)
    first = differentiate(model, x, order=1)
    assert first.pairs == ()
    torch.testing.assert_close(first.gradient, full.gradient, rtol=1e-13, atol=1e-13)
    with pytest.raises(InvalidOptionError, match=r"d\(0, 0\) was not computed, only first derivatives"):
        first.d(0, 0)


def test_gradients_in_the_parameters_are_those_of_derivatives_by_autograd() -> None:
    model, x = mlp(Sine), points()
    u = differentiate(model, x)
    ours = torch.autograd.grad((u.laplacian() ** 2 + u.d(1) * u.value).sum(), list(model.parameters()))
    x = x.requires_grad_()
    value = model(x)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(2):
        (gradient,) = torch.autograd.grad(value[:, k].sum(), x, create_graph=True)
        seconds = [torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3)]
        total = total + (sum(seconds) ** 2 + gradient[:, 1] * value[:, k]).sum()
    theirs = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True, allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_pass_gradcheck_in_points_and_weights(name: str) -> None:
    layer = ACTIVATIONS[name]()

    def second(points: Tensor, weight: Tensor) -> Tensor:
        jet = propagate(layer, Jet.of(points, second="all").linear(lambda stacked: stacked @ weight.T))
        return jet.columns()

    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(second, (points().requires_grad_(), weight.requires_grad_()))


def rows_of(model: nn.Module, inside: Tensor, edge: Tensor) -> dict[str, Tensor]:
    u = differentiate(model, inside)
    residual = u.d(0) + u.value * u.d(1) - 0.1 * u.laplacian()
    return {"equation": residual[:, 0] - residual[:, 1], "slope": u.d(2)[:, 0], "edge": 10 * model(edge)[:, 0]}


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "softplus", "sine"])
def test_the_engine_records_rows_of_derivatives_exactly(name: str) -> None:
    model = mlp(ACTIVATIONS[name])
    jacobians = []
    for capture in (st.Capture(model), st.ReferenceCapture(model)):
        with capture:
            rows = rows_of(model, points(8), points(4))
        jacobians.append(capture.jacobian(rows))
    mine, reference = jacobians
    assert mine.num_rows == 8 + 8 + 4
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(mine.to_dense(), reference.to_dense(), **close)
    torch.testing.assert_close(mine.gram(), reference.gram(), **close)
    weights = points(20, 1).squeeze(1)
    for ours, theirs in zip(mine.vjp(weights).values(), reference.vjp(weights).values(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_features_scalings_and_products_with_coordinates_go_through_the_engine() -> None:
    model = nn.Sequential(
        Affine(2.0, -1.0), FourierFeatures(3, 4, deviation=0.3), nn.Linear(8, 3), Vanishing()
    ).double()
    jacobians = []
    for capture in (st.Capture(model), st.ReferenceCapture(model)):
        with capture:
            rows = differentiate(model, points(6)).laplacian()[:, 1]
        jacobians.append(capture.jacobian(rows).to_dense())
    torch.testing.assert_close(*jacobians, rtol=1e-10, atol=1e-10)


def test_rows_by_autograd_in_the_closure_go_through_the_reference_engine() -> None:
    """The path for models without a rule: it is the same Jacobian."""
    model = mlp()

    def by_autograd() -> Tensor:
        x = points(6).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient[:, 1].sum(), x, create_graph=True)
        return gradient[:, 0] - second[:, 1]

    reference, capture = st.ReferenceCapture(model), st.Capture(model)
    with reference:
        rows = by_autograd()
    theirs = reference.jacobian(rows).to_dense()
    with capture:
        u = differentiate(model, points(6), second=[(1, 1)])
        rows = (u.d(0) - u.d(1, 1))[:, 0]
    torch.testing.assert_close(capture.jacobian(rows).to_dense(), theirs, rtol=1e-10, atol=1e-10)
    with pytest.raises(st.CaptureError, match="BatchedCapture"), capture:
        by_autograd()


def test_a_step_of_sven_on_an_equation_brings_the_residual_down() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.linspace(0, 1, 32, dtype=torch.float64).unsqueeze(1)

    def conditions() -> dict[str, Tensor]:  # u'' = -pi^2 sin(pi x)
        equation = differentiate(model, x).d(0, 0) + math.pi**2 * torch.sin(math.pi * x)
        return {"equation": equation[:, 0], "ends": 10 * model(x[[0, -1]])[:, 0]}

    opt = st.Sven(model, lr=1.0, rows="residuals", solver=st.Damped(1e-6))
    losses = [float(opt.step(conditions)) for _ in range(30)]
    assert losses[-1] < 1e-4 * losses[0]
    with torch.no_grad():
        assert (model(x) - torch.sin(math.pi * x)).abs().max() < 1e-2


def test_the_module_form_has_the_same_numbers_as_columns() -> None:
    net, x = mlp(), points()
    model = WithDerivatives(net, 3, second="all")
    columns, u = model(x), differentiate(net, x, second="all")
    assert columns.shape == (5, 2 * (1 + 3 + 6))
    again = model.jet_of(columns)
    assert torch.equal(again.value, u.value)
    assert torch.equal(again.gradient, u.gradient)
    assert torch.equal(again.hessian(), u.hessian())
    assert list(model.state_dict()) == [f"model.{name}" for name in net.state_dict()]
    first = WithDerivatives(net, 3, order=1)
    assert torch.equal(first.jet_of(first(x)).gradient, differentiate(net, x, order=1).gradient)
    linear = WithDerivatives(nn.Linear(3, 2).double(), 3)
    assert not linear.jet_of(linear(x)).laplacian().any()


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class OtherForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).square()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), r"'1.0' \(ReLU\).*second derivative is zero"),
        (nn.Dropout(), r"'1.0' \(Dropout\).*in training mode"),
        (nn.LayerNorm(7), r"'1.0' \(LayerNorm\).*BatchedCapture"),
        (Custom(), r"'1.0' \(Custom\).*method jet"),
        (OtherForward(7, 7), r"'1.0' \(OtherForward\)"),
        (torch.nn.utils.spectral_norm(nn.Linear(7, 7)), r"'1.0' \(Linear\) has forward hooks"),
    ],
)
def test_a_layer_without_a_rule_is_refused_by_its_qualified_name(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.Sequential(layer), nn.Linear(7, 1))
    with pytest.raises(UnsupportedModelError, match=f"Layer {message}"):
        differentiate(model, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: differentiate(mlp(), points().float()), "points are torch.float32 and the model is torch.float64"),
        (lambda: differentiate(mlp(), points()[0]), r"points have the shape \(3,\)"),
        (lambda: differentiate(mlp(), points(), order=3), "order=3.*create_graph"),
        (lambda: differentiate(mlp(), points(), second="mixed"), "second"),  # type: ignore[arg-type]
        (lambda: differentiate(mlp(), points(), second=[(0, 3)]), "from 0 to 2"),
        (lambda: differentiate(mlp(), points(), second=[(0, 1), (1, 0)]), "different pairs"),
        (lambda: differentiate(mlp(), points()).d(3), "0 to 2"),
        (lambda: differentiate(mlp(), points()).d(0, 1), r"pair \(0, 1\)"),
        (lambda: Jet.of(points()) + Jet.of(points(), order=1), "do not fit"),
        (lambda: WithDerivatives(mlp(), 3)(points(5, 2)), r"for \[B, 3\]"),
        (lambda: WithDerivatives(mlp(), 3).jet_of(points()), r"\[B, 7 \* K\]"),
        (lambda: FourierFeatures(2, 4)(points()), "3 features"),
        (lambda: Sine(0.0), "frequency"),
    ],
)
def test_an_impossible_request_is_refused_with_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        call()


def test_fixed_scalings_keep_float64() -> None:
    layer = nn.Sequential(Affine(0.1, 0.7)).double()
    assert layer(points()).dtype == torch.float64
    torch.testing.assert_close(layer(points()), 0.1 * points() + 0.7, rtol=1e-15, atol=1e-15)
    assert layer(points().float()).dtype == torch.float32
