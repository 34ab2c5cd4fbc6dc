"""Rows of the generalised Gauss-Newton matrix: gradient and matrix against torch.func and curvlinops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import steepest as st
from capturing import capture_rows
from oracles import dense, jacobian, trainable
from steepest.errors import ClosureError, InvalidOptionError

B, K = 6, 4


def labels() -> Tensor:
    return torch.arange(B) % K


def probabilities() -> Tensor:
    return torch.softmax(torch.randn(B, K, dtype=torch.float64), 1)


def smoothed() -> Tensor:
    return 0.9 * F.one_hot(labels(), K).double() + 0.1 / K


LOSSES: dict[str, tuple[str, Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "class_numbers": ("cross_entropy", labels, lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "probabilities": ("cross_entropy", probabilities, lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "smoothed": ("cross_entropy", smoothed, lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "binary": (
        "binary_cross_entropy",
        lambda: torch.rand(B, K, dtype=torch.float64),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    ),
    "squares": ("squared_error", lambda: torch.randn(B, K, dtype=torch.float64), lambda f, y: (f - y).square().sum()),
    "counts": (
        "poisson",
        lambda: torch.arange(B * K).view(B, K) % 3,
        lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
    ),
}
EACH = pytest.mark.parametrize("name", LOSSES)


def hessian(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Backwards twice: the forward mode of torch.func.hessian warns."""
    return jacrev(jacrev(function))


def model(out: int = K) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, out)).double()


def inputs() -> Tensor:
    return torch.randn(B, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def factors(f: Tensor, y: Tensor, loss: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The value u ``[B, M]`` and the Jacobian of the rows in the outputs, ``[B, M, K]``."""
    f = f.detach().requires_grad_()
    rows = st.ggn_rows(f, y, loss, **options)
    parts = [torch.autograd.grad(rows[:, k].sum(), f, retain_graph=True)[0] for k in range(rows.shape[1])]
    return rows.detach(), torch.stack(parts, 1)


def at_outputs(f: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient ``[B, K]`` and Hessian ``[B, K, K]`` of each sample's loss, by torch."""
    one = [(f[i : i + 1].detach(), y[i : i + 1]) for i in range(len(f))]
    grads = [torch.func.grad(loss)(a, b)[0] for a, b in one]
    return torch.stack(grads), torch.stack([hessian(loss)(a, b)[0, :, 0] for a, b in one])


@EACH
def test_factors_are_a_root_of_the_hessian_and_give_the_gradient(name: str) -> None:
    loss, targets, function = LOSSES[name]
    torch.manual_seed(2)
    f, y = 2 * torch.randn(B, K, dtype=torch.float64), targets()
    u, lt = factors(f, y, loss)
    gradient, curvature = at_outputs(f, y, function)
    torch.testing.assert_close((lt.mT @ u.unsqueeze(2)).squeeze(2), gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(lt.mT @ lt, curvature, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [st.Capture, st.ReferenceCapture])
@EACH
def test_rows_of_a_model_give_its_gradient_and_its_gauss_newton_matrix(name: str, kind: type) -> None:
    loss, targets, function = LOSSES[name]
    made, x, y = model(), inputs(), targets()
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(st.ggn_rows(made(x), y, loss))  # type: ignore[arg-type]
        return seen[-1]

    jac = capture_rows(kind(made), closure)
    matrix, projected = jac.normal_equations(seen[-1].detach().flatten(), torch.float64)
    parameters = list(made.parameters())
    summed = torch.autograd.grad(function(made(x), y), parameters)
    torch.testing.assert_close(projected, torch.cat([g.flatten() for g in summed]), rtol=0, atol=1e-11)
    outputs = dense(jacobian(lambda: made(x).flatten(), trainable(made))).view(B, K, -1)
    curvature = at_outputs(made(x), y, function)[1]
    torch.testing.assert_close(matrix, torch.einsum("bkp,bkl,blq->pq", outputs, curvature, outputs), rtol=0, atol=1e-11)


def test_of_a_linear_model_it_is_the_hessian_of_the_loss_in_the_parameters() -> None:
    made, x, y = nn.Linear(5, K).double(), inputs(), labels()
    params = {name: p.detach() for name, p in made.named_parameters()}
    whole = hessian(lambda p: F.cross_entropy(functional_call(made, p, (x,)), y, reduction="sum"))(params)
    blocks = [[whole[a][b].reshape(params[a].numel(), -1) for b in params] for a in params]
    jac = capture_rows(made, lambda: st.ggn_rows(made(x), y))
    rows = jac.to_dense()
    torch.testing.assert_close(rows.T @ rows, torch.cat([torch.cat(b, 1) for b in blocks]), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_curvlinops_forms_the_same_matrix() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed: `make peers`")
    made, x, y = model(), inputs(), labels()
    loss = nn.CrossEntropyLoss(reduction="sum")
    operator = curvlinops.GGNLinearOperator(made, loss, list(made.parameters()), [(x, y)], check_deterministic=False)
    rows = capture_rows(made, lambda: st.ggn_rows(made(x), y)).to_dense()
    theirs = operator @ torch.eye(rows.shape[1], dtype=torch.float64)
    torch.testing.assert_close(rows.T @ rows, theirs, rtol=0, atol=1e-11)


def test_a_step_is_the_damped_natural_gradient_step() -> None:
    """The damped least-squares solution of the rows, against the matrix of the definition."""
    made, x, y = model(), inputs(), labels()
    seen: list[Tensor] = []
    jac = capture_rows(made, lambda: seen.append(st.ggn_rows(made(x), y)) or seen[-1])  # type: ignore[func-returns-value]
    u = seen[-1].detach().flatten()
    damping = 0.3 * torch.eye(jac.num_rows, dtype=torch.float64)
    step = jac.vjp(torch.linalg.solve(jac.gram() + damping, u))
    gradient = torch.cat([
        g.flatten() for g in torch.autograd.grad(F.cross_entropy(made(x), y, reduction="sum"), list(made.parameters()))
    ])
    flat = jacrev(lambda p: functional_call(made, p, (x,)))({n: p.detach() for n, p in made.named_parameters()})
    outputs = torch.cat([j.reshape(B, K, -1) for j in flat.values()], 2)
    curvature = at_outputs(made(x), y, LOSSES["class_numbers"][2])[1]
    matrix = torch.einsum("bkp,bkl,blq->pq", outputs, curvature, outputs)
    want = torch.linalg.solve(matrix + 0.3 * torch.eye(len(matrix), dtype=torch.float64), gradient)
    torch.testing.assert_close(torch.cat([s.flatten() for s in step.values()]), want, rtol=0, atol=1e-10)


def test_sven_takes_that_step() -> None:
    made, x, y = model(), inputs(), labels()
    before = nn.utils.parameters_to_vector(made.parameters()).detach().clone()
    jac = capture_rows(made, lambda: st.ggn_rows(made(x), y))
    u = st.ggn_rows(made(x), y).detach()
    gram = jac.gram()
    damping = 0.1 * gram.trace() / len(gram) * torch.eye(B * K, dtype=torch.float64)
    step = jac.vjp(torch.linalg.solve(gram + damping, u.flatten()))
    opt = st.Sven(made, lr=1.0, rows="residuals", solver=st.Damped(0.1), max_norm_ratio=None)
    loss = opt.step(lambda: st.ggn_rows(made(x), y))
    assert loss is not None
    torch.testing.assert_close(loss, u.square().sum(1).mean())
    moved = before - nn.utils.parameters_to_vector(made.parameters()).detach()
    torch.testing.assert_close(moved, torch.cat([s.flatten() for s in step.values()]), rtol=0, atol=1e-9)


def test_residuals_of_several_outputs_and_of_one_are_named_blocks_of_a_step() -> None:
    """Vectors and scalars in one step, against the same rows flattened for the reference engine."""
    made, again, x = model(3), model(3), inputs()

    def blocks(net: nn.Module) -> dict[str, Tensor]:
        return {"field": net(x), "energy": net(x[:4]).square().sum(1) - 1}

    fast = st.Sven(made, lr=0.5, rows="residuals", solver=st.Damped(0.01))
    slow = st.Sven(again, lr=0.5, rows="residuals", solver=st.Damped(0.01), capture=st.ReferenceCapture(again))
    for _ in range(3):
        fast.step(lambda: blocks(made))
        slow.step(lambda: {n: b.flatten() for n, b in blocks(again).items()})
    for mine, theirs in zip(made.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_several_losses_of_a_sample_are_refused_with_the_remedy() -> None:
    made, x = model(), inputs()
    with pytest.raises(ClosureError, match=r"shape \(6, 4\).*rows='residuals'"):
        st.Sven(made).step(lambda: made(x).square())
    with pytest.raises(ClosureError, match=r"flatten\(1\)"):
        st.Sven(made, rows="residuals").step(lambda: made(x).view(B, 2, 2))


# Extreme numbers


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_logits_of_any_size_give_finite_rows_and_the_exact_gradient(
    loss: Any, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    f = scale * torch.cat([torch.eye(K), -torch.eye(K), torch.randn(B, K)]).to(dtype)
    y = torch.randint(K, (len(f),))  # most of them labels of probability zero
    given = y if loss == "cross_entropy" else F.one_hot(y, K)
    u, lt = factors(f, given, loss)
    assert u.isfinite().all()
    assert lt.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert u.abs().max() <= eps**-0.5
    exact = f.double().softmax(1) if loss == "cross_entropy" else f.double().sigmoid()
    gradient = (lt.mT @ u.unsqueeze(2)).squeeze(2).double()
    assert (gradient - (exact - F.one_hot(y, K))).abs().max() <= 8 * eps
    curvature = torch.diag_embed(exact) - exact.unsqueeze(2) * exact.unsqueeze(1)
    if loss != "cross_entropy":
        curvature = torch.diag_embed(f.double().sigmoid() * (-f.double()).sigmoid())
    assert ((lt.mT @ lt).double() - curvature).abs().max() <= 16 * eps


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "squares"])
def test_a_floor_leaves_the_gradient_and_raises_the_curvature_no_more_than_it_says(name: str) -> None:
    loss, targets, function = LOSSES[name]
    torch.manual_seed(2)
    f, y = 4 * torch.randn(B, K, dtype=torch.float64), targets()
    u, lt = factors(f, y, loss, floor=0.05)
    gradient, curvature = at_outputs(f, y, function)
    torch.testing.assert_close((lt.mT @ u.unsqueeze(2)).squeeze(2), gradient, rtol=0, atol=1e-12)
    raised = torch.linalg.eigvalsh(lt.mT @ lt - curvature)
    assert raised.max() > 0.02  # it has an effect
    assert raised.min() >= -1e-12
    assert raised.max() <= 0.05 * (1 + K)
    if loss != "poisson":
        assert u.abs().max() <= 0.05**-0.5


def test_rates_of_any_size_give_finite_rows() -> None:
    f = torch.tensor([[-200.0, -50.0, 0.0, 100.0]])  # exp(100) is no float32
    u, lt = factors(f, torch.tensor([[3.0, 0.0, 1.0, 2.0]]), "poisson")
    assert u.isfinite().all()
    assert lt.isfinite().all()
    want = torch.tensor([[-3.0, 0.0, 0.0]])
    torch.testing.assert_close((lt.mT @ u.unsqueeze(2)).squeeze(2)[:, :3], want, rtol=1e-6, atol=1e-6)


def test_half_precision_is_brought_to_float32() -> None:
    f = torch.randn(B, K, dtype=torch.bfloat16, requires_grad=True)
    rows = st.ggn_rows(f, labels())
    assert rows.dtype == torch.float32
    assert torch.equal(rows, st.ggn_rows(f.float(), labels()))


def test_one_output_of_each_sample_is_one_row() -> None:
    f = torch.randn(B, dtype=torch.float64, requires_grad=True)
    y = torch.arange(B) % 2
    assert torch.equal(
        st.ggn_rows(f, y, "binary_cross_entropy"), st.ggn_rows(f[:, None], y[:, None], "binary_cross_entropy")
    )


# Random rows


@EACH
def test_random_rows_are_right_on_average(name: str) -> None:
    loss, targets, function = LOSSES[name]
    torch.manual_seed(4)
    f, y = torch.randn(B, K, dtype=torch.float64), targets()
    gradient, curvature = at_outputs(f, y, function)
    times = 8000
    many = y.repeat_interleave(times, 0)
    u, lt = factors(f.repeat_interleave(times, 0), many, loss, samples=2, generator=torch.Generator().manual_seed(0))
    assert u.shape == (B * times, 2)
    drawn_gradient = (lt.mT @ u.unsqueeze(2)).squeeze(2).view(B, times, K)
    drawn_curvature = (lt.mT @ lt).view(B, times, K, K)
    for drawn, exact in ((drawn_gradient, gradient), (drawn_curvature, curvature)):
        spread = drawn.std(1) / times**0.5
        assert ((drawn.mean(1) - exact).abs() <= 5 * spread + 1e-12).all()
        assert (spread > 0).any()  # they are random


def test_a_generator_makes_random_rows_repeatable_and_leaves_the_global_one_alone() -> None:
    f, y = torch.randn(B, K), labels()
    state = torch.get_rng_state()
    drawn = [st.ggn_rows(f, y, samples=1, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    st.ggn_rows(f, y, samples=1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_random_rows_of_a_model_are_differentiated_exactly() -> None:
    made, x, y = model(), inputs(), labels()

    def closure() -> Tensor:
        return st.ggn_rows(made(x), y, samples=2, generator=torch.Generator().manual_seed(0))

    jac = capture_rows(made, closure)
    truth = dense(jacobian(lambda: closure().flatten(), trainable(made)))
    assert jac.num_rows == 2 * B
    torch.testing.assert_close(jac.to_dense(), truth, rtol=0, atol=1e-12)


# Wrong arguments

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": "hinge"}, "choose one of 'cross_entropy'"),
    "floor": ({"floor": 0.0}, "floor=0.0"),
    "samples": ({"samples": 0}, "samples=0"),
    "outputs_without_classes": ({"outputs": torch.randn(B)}, r"shape \(6,\) for cross_entropy.*\(batch, K\)"),
    "outputs_of_sequences": ({"outputs": torch.randn(2, 3, K)}, r"outputs.flatten\(0, 1\)"),
    "outputs_of_integers": ({"outputs": torch.ones(B, K).long()}, "torch.int64 tensor"),
    "no_samples": ({"outputs": torch.randn(0, K)}, r"shape \(0, 4\)"),
    "class_numbers_of_another_batch": ({"targets": torch.zeros(5).long()}, r"class numbers of shape \(5,\)"),
    "class_numbers_beyond": ({"targets": torch.arange(B)}, "from 0 to 5 for 4 classes"),
    "ignored_class": ({"targets": torch.full((B,), -100)}, "leave samples to be ignored out"),
    "probabilities_of_another_shape": ({"targets": torch.rand(B)}, r"or class numbers of shape \(6,\)"),
    "no_probabilities": ({"targets": torch.rand(B, K) * 0.1}, "sum to .* in sample"),
    "negative_probabilities": ({"targets": torch.tensor([[2.0, -1, 0, 0]]).expand(B, K)}, "between -1 and 2"),
    "no_tensor": ({"targets": [0] * B}, "targets that are a list"),
    "binary_targets": (
        {"loss": "binary_cross_entropy", "targets": 2 * torch.ones(B, K)},
        "between 2 and 2 for binary_cross_entropy: its targets lie between 0 and 1",
    ),
    "negative_counts": ({"loss": "poisson", "targets": -torch.ones(B, K)}, "lie between 0 and inf"),
    "values_that_would_broadcast": (
        {"loss": "squared_error", "targets": torch.ones(B, 1)},
        r"outputs of shape \(6, 4\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_with_the_remedy(name: str) -> None:
    change, message = WRONG[name]
    arguments = {"outputs": torch.randn(B, K), "targets": labels(), **change}
    with pytest.raises((ClosureError, InvalidOptionError), match=message):
        st.ggn_rows(**arguments)
