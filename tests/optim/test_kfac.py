"""KFAC against slow truths: autograd row by row, dense Kronecker products, dense Hessians."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.linalg.kronecker import DecompositionError, KroneckerSolver
from steepest.optim.fisher import Exact, Fisher, MonteCarlo, OutputFisher

L, S = nn.Linear, nn.Sequential
DOUBLE = torch.float64
STILL: dict[str, Any] = {"lr": 0.0, "momentum": 0.0, "kl_clip": None}
EVERY: dict[str, Any] = {"factor_update_steps": 1, "inverse_update_steps": 1}


def mlp(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return S(L(4, 5), nn.Tanh(), L(5, classes)).double()


def data(rows: int = 8, seed: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator, dtype=DOUBLE), torch.arange(rows) % classes


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> float:
    opt.zero_grad()
    value = loss(model(x), y)
    value.backward()
    opt.step()
    return float(value.detach())


def factors(opt: st.KFAC) -> dict[str, tuple[Tensor, Tensor]]:
    """The bias-corrected running factors of every layer."""
    found = {}
    for block in opt._blocks.values():
        state = opt.state[block.weight]
        found[block.name] = (state["input_factor"] / state["weight"], state["grad_factor"] / state["weight"])
    return found


def factors_after(
    model: nn.Module, loss: Callable[..., Tensor], *batches: tuple[Tensor, Tensor], **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one step that moves nothing; several batches are accumulated."""
    opt = st.KFAC(model, **{**STILL, **options})
    opt.zero_grad()
    for x, y in batches:
        (loss(model(x), y) / (len(batches) if options.get("reduction") != "sum" else 1)).backward()
    opt.step()
    opt.close()
    return factors(opt)


def assert_same(a: dict[str, tuple[Tensor, Tensor]], b: dict[str, tuple[Tensor, Tensor]], rtol: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        for left, right in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(left, right, rtol=rtol, atol=1e-12)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def layer_records(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs with a 1 joined and output gradients of every sample's loss, of linear layers, by autograd alone."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, L)
    ]
    rows = losses(model(x))
    for handle in handles:
        handle.remove()
    found = {}
    for name, (inputs, out) in seen.items():
        g = torch.stack([torch.autograd.grad(row, out, retain_graph=True)[0][n] for n, row in enumerate(rows)])
        found[name] = (torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1).detach(), g)
    return found


# -- factors ---------------------------------------------------------------------------------------


def test_one_datum_has_the_outer_product_of_its_gradient() -> None:
    model = S(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Tanh(), L(3, 4)).double()
    x, y = torch.randn(1, 2, 3, 3, dtype=DOUBLE), torch.tensor([1])
    opt = st.KFAC(model, **STILL)
    train(model, opt, x, y, F.cross_entropy)
    for block in opt._blocks.values():
        a, s = factors(opt)[block.name]
        flat = block.join([p.grad for p in block.params]).flatten()
        torch.testing.assert_close(torch.kron(s, a), torch.outer(flat, flat))


@pytest.mark.parametrize("scale", [2.0 / 3, 0.7])
def test_the_exact_fisher_of_a_deep_linear_net_is_the_gauss_newton_matrix(scale: float) -> None:
    """There the gradients at every layer are the same for all data, so that nothing is lost by the factors."""
    torch.manual_seed(0)
    model = S(L(4, 5), L(5, 6, bias=False), L(6, 3)).double()
    x, _ = data(7)
    found = factors_after(
        model, lambda out, y: scale / 2 * (out - y).square().sum(1).mean(), (x, torch.zeros(7, 3, dtype=DOUBLE)),
        fisher=Exact("gaussian", scale=scale),
    )  # fmt: skip
    for name, layer in model.named_children():
        out = model(x)
        params = list(layer.parameters())
        rows = []
        for n in range(7):
            for c in range(3):
                grads = torch.autograd.grad(out[n, c], params, retain_graph=True)
                rows.append(torch.cat([g if g.ndim == 2 else g.unsqueeze(1) for g in grads], 1).flatten())
        J = torch.stack(rows)
        a, s = found[name]
        torch.testing.assert_close(torch.kron(s, a), scale * J.T @ J / 7)


OUTPUTS: dict[str, tuple[OutputFisher, Callable[[Tensor], Tensor]]] = {
    "categorical": (Exact("categorical"), lambda f: F.cross_entropy(f, torch.tensor([0, 2, 1]), reduction="sum")),
    "bernoulli": (
        Exact("bernoulli"),
        lambda f: F.binary_cross_entropy_with_logits(f, torch.eye(3, 4, dtype=DOUBLE), reduction="sum"),
    ),
    "gaussian": (Exact("gaussian", scale=0.5), lambda f: 0.25 * (f - 1).square().sum()),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_exact_roots_are_those_of_the_dense_hessian_in_the_output(kind: str) -> None:
    fisher, loss = OUTPUTS[kind]
    f = torch.randn(3, 4, dtype=DOUBLE)
    hessian = torch.autograd.functional.hessian(loss, f).reshape(12, 12)
    total = torch.zeros(3, 4, 4, dtype=DOUBLE)
    for root, weight in fisher.roots(f, 0):
        total += weight * torch.einsum("na,nb->nab", root, root)
    torch.testing.assert_close(torch.block_diag(*total), hessian)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_exact_fisher_is_the_mean_of_many_draws(kind: str) -> None:
    model, (x, y) = mlp(), data()
    exact = OUTPUTS[kind][0]
    assert isinstance(exact, Exact)
    drawn = MonteCarlo(exact.output, exact.scale, draws=3000, seed=5)
    one, many = (factors_after(model, F.cross_entropy, (x, y), fisher=fisher) for fisher in (exact, drawn))
    for name in one:
        torch.testing.assert_close(one[name][0], many[name][0])
        assert (one[name][1] - many[name][1]).norm() < 0.05 * one[name][1].norm()


def test_draws_follow_from_seed_and_step_alone() -> None:
    model, (x, y) = mlp(), data()
    found = {}
    for name, seed, burn in (("a", 1, 0), ("b", 1, 99), ("c", 2, 0)):
        torch.rand(burn + 1)
        found[name] = factors_after(model, F.cross_entropy, (x, y), fisher=MonteCarlo(seed=seed))["0"][1]
    assert torch.equal(found["a"], found["b"])
    assert not torch.allclose(found["a"], found["c"])
    opt = st.KFAC(model, **STILL, fisher=MonteCarlo(), factor_decay=0.0)
    seen = []
    for _ in range(2):
        train(model, opt, x, y, F.cross_entropy)
        seen.append(factors(opt)["0"][1])
    assert not torch.allclose(*seen)


FISHERS: dict[str, Fisher] = {"empirical": st.Empirical(), "exact": Exact(), "monte_carlo": MonteCarlo(draws=2)}
both = pytest.mark.parametrize("fisher", [FISHERS["empirical"], FISHERS["exact"]], ids=["empirical", "exact"])


@both
def test_a_batch_given_twice_has_the_factors_of_the_batch(fisher: Fisher) -> None:
    model, (x, y) = mlp(), data()
    once = factors_after(model, F.cross_entropy, (x, y), fisher=fisher)
    assert_same(once, factors_after(model, F.cross_entropy, (x.repeat(3, 1), y.repeat(3)), fisher=fisher))


@both
def test_a_sum_has_the_factors_of_a_mean(fisher: Fisher) -> None:
    model, (x, y) = mlp(), data()

    def summed(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target, reduction="sum")

    mean = factors_after(model, F.cross_entropy, (x, y), fisher=fisher)
    assert_same(mean, factors_after(model, summed, (x, y), fisher=fisher, reduction="sum"))


@both
def test_the_factors_do_not_depend_on_the_length_of_a_sequence(fisher: Fisher) -> None:
    model = S(L(4, 5), nn.Tanh(), L(5, 3)).double()
    x, y = torch.randn(5, 3, 4, dtype=DOUBLE), torch.arange(15).view(5, 3) % 3

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), target.flatten())

    once = factors_after(model, loss, (x, y), fisher=fisher, loss_terms="positions")
    more = factors_after(model, loss, (x.repeat(1, 4, 1), y.repeat(1, 4)), fisher=fisher, loss_terms="positions")
    assert_same(once, more)
    flat = factors_after(model, F.cross_entropy, (x.flatten(0, 1), y.flatten()), fisher=fisher)
    assert_same(once, flat)
    given = factors_after(model, loss, (x, y), fisher=fisher, loss_terms=lambda out: out.shape[:2].numel())
    assert_same(once, given)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_factors_do_not_depend_on_the_resolution_of_an_image(pooled: bool) -> None:
    """Pictures tiled with themselves: a loss at every position with "expand", one of the mean with "reduce"."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    model = S(conv, nn.Tanh()).double()
    x, y = torch.randn(4, 2, 5, 5, dtype=DOUBLE), torch.randn(4, 3, 1, 1, dtype=DOUBLE)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        out = out.mean((2, 3), keepdim=True) if pooled else out
        return (out - target).square().sum(1).mean()

    options = (
        {"sharing": "reduce", "loss_terms": "samples"} if pooled else {"loss_terms": lambda out: out[:, 0].numel()}
    )
    small = factors_after(model, loss, (x, y), **options)
    assert_same(small, factors_after(model, loss, (x.repeat(1, 1, 3, 2), y), **options))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_factors_of_a_convolution_are_those_of_its_patches(sharing: Any) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    model = S(conv, nn.Tanh(), nn.Flatten(), L(54, 4)).double()
    x, y = torch.randn(5, 2, 6, 4, dtype=DOUBLE), torch.arange(5) % 4
    a, s = factors_after(model, F.cross_entropy, (x, y), sharing=sharing)["0"]
    z = conv(x)
    out = model[3](z.tanh().flatten(1))
    (g,) = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), z)
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1)).transpose(1, 2)
    patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2)
    grads = g.flatten(2).transpose(1, 2)
    if sharing == "reduce":
        patches, grads = patches.mean(1, keepdim=True), grads.sum(1, keepdim=True)
    torch.testing.assert_close(a, torch.einsum("nti,ntj->ij", patches, patches) / patches.shape[:2].numel())
    torch.testing.assert_close(s, torch.einsum("nti,ntj->ij", grads, grads) / 5)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_micro_batches_make_the_step_of_the_batch(fisher: Fisher, reduction: Any) -> None:
    x, y = data(8)
    results, sizes = [], {}
    for parts in (1, 4):
        model = mlp()
        opt = st.KFAC(model, lr=0.1, fisher=fisher, reduction=reduction, kl_clip=None)
        for step in range(3):
            opt.zero_grad()
            for xs, ys in zip((x + step).chunk(parts), y.chunk(parts), strict=True):
                divisor = parts if reduction == "mean" else 1
                (F.cross_entropy(model(xs), ys, reduction=reduction) / divisor).backward()
            opt.step()
        results.append(snapshot(model))
        sizes[parts] = factors(opt)
    assert_same(sizes[1], sizes[4])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
def test_clearing_between_forward_and_backward_is_as_good_as_before(fisher: Fisher) -> None:
    results = []
    for early in (True, False):
        model, (x, y) = mlp(), data()
        opt = st.KFAC(model, fisher=fisher)
        for _ in range(3):
            if early:
                opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if not early:
                opt.zero_grad()
            loss.backward()
            opt.step()
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
def test_a_forward_without_a_backward_changes_nothing(fisher: Fisher) -> None:
    results = []
    for validate in (False, True):
        model, (x, y) = mlp(), data()
        opt = st.KFAC(model, fisher=fisher)
        for _ in range(3):
            train(model, opt, x, y, F.cross_entropy)
            if validate:
                kept = F.cross_entropy(model(2 * x), y)  # with gradients, as careless validation has it
                with torch.no_grad():
                    model(x)
                assert kept.requires_grad
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_is_unused_in_a_step_stays_and_is_trained_later() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.with_b = L(4, 3), L(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if self.with_b else self.a(x)

    model = Switch().double()
    opt = st.KFAC(model)
    start = model.b.weight.detach().clone()
    train(model, opt, *data(), F.cross_entropy)
    assert torch.equal(start, model.b.weight)
    model.with_b = True
    train(model, opt, *data(), F.cross_entropy)
    assert not torch.equal(start, model.b.weight)


def test_layers_used_twice_and_attention_are_trained() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
    head = L(4, 3).double()
    model = S(encoder, head, nn.Flatten(1), L(9, 3).double())
    opt = st.KFAC(model, **EVERY)
    x, y = torch.randn(5, 3, 4, dtype=DOUBLE), torch.arange(5) % 3
    history = [train(model, opt, x, y, F.cross_entropy) for _ in range(30)]
    assert history[-1] < 0.5 * history[0]
    assert "0.self_attn" in {block.name for block in opt._blocks.values()}


# -- the running factors ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_running_factors_are_unbiased_means(steps: int) -> None:
    model, decay = mlp(), 0.8
    opt = st.KFAC(model, **{**STILL, **EVERY}, factor_decay=decay)
    single = []
    for step in range(steps):
        x, y = data(seed=step)
        single.append(factors_after(mlp(), F.cross_entropy, (x, y)))
        train(model, opt, x, y, F.cross_entropy)
    weights = [decay ** (steps - 1 - step) for step in range(steps)]
    for name, found in factors(opt).items():
        for which in (0, 1):
            mean = sum(w * part[name][which] for w, part in zip(weights, single, strict=True)) / sum(weights)
            torch.testing.assert_close(found[which], mean)


def test_factors_and_decompositions_keep_their_periods() -> None:
    model = mlp()
    opt = st.KFAC(model, factor_update_steps=3, inverse_update_steps=6)
    updated, decomposed = [], []
    for step in range(20):
        before = factors(opt)["0"][0] if step else torch.zeros(())
        train(model, opt, *data(seed=step), F.cross_entropy)
        if not torch.equal(before, factors(opt)["0"][0]):
            updated.append(step)
        assert opt.diagnostics is not None
        assert opt.diagnostics.num_decompositions in {0, 2}
        if opt.diagnostics.num_decompositions:
            decomposed.append(step)
    assert updated == [0, 1, 2, 3, 6, 9, 12, 15, 18]  # the first three are all looked at
    assert decomposed == [0, 1, 3, 9, 15]  # the first soon: at update 1, 2, 4; then every second


def test_the_first_decompositions_come_at_updates_1_2_4_8() -> None:
    model = mlp()
    opt = st.KFAC(model, factor_update_steps=1, inverse_update_steps=100)
    decomposed = []
    for step in range(20):
        train(model, opt, *data(seed=step), F.cross_entropy)
        assert opt.diagnostics is not None
        if opt.diagnostics.num_decompositions:
            decomposed.append(step + 1)
    assert decomposed == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("how", ["group", "schedule"])
def test_damping_acts_at_once_and_without_a_decomposition(how: str) -> None:
    model, (x, y) = mlp(), data()
    damping = (lambda step: 0.1 if step < 5 else 7.0) if how == "schedule" else 0.1
    opt = st.KFAC(model, lr=0.1, momentum=0.0, kl_clip=None, damping=damping, factor_update_steps=4, factor_decay=0.0)
    for _ in range(5):
        train(model, opt, x, y, F.cross_entropy)
    if how == "group":
        opt.param_groups[0]["damping"] = 7.0
    a, s = (torch.stack([f]) for f in factors(opt)["0"])
    basis = opt._curvature(next(iter(opt._blocks.values()))).basis.tensors()
    before = model[0].weight.detach().clone()
    train(model, opt, x, y, F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_decompositions == 0
    assert torch.equal(factors(opt)["0"][0], a[0])
    assert torch.equal(factors(opt)["0"][1], s[0])
    a, s = ((basis[f"{k}_basis"] * basis[f"{k}_values"]) @ basis[f"{k}_basis"].T for k in ("input", "grad"))
    flat = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], 1).flatten()
    M = torch.kron(s, a) + 7.0 * torch.eye(len(flat), dtype=DOUBLE)
    moved = torch.linalg.solve(M, flat).view(5, 5)[:, :-1]
    torch.testing.assert_close(before - 0.1 * moved, model[0].weight.detach())


def test_all_schedules_are_asked_for_the_step() -> None:
    model, (x, y) = mlp(), data()
    asked: dict[str, list[int]] = {"damping": [], "momentum": [], "factor_decay": [], "kl_clip": []}

    def schedule(name: str, value: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            asked[name].append(step)
            return value / (step + 1)

        return at

    opt = st.KFAC(model, **{name: schedule(name, 0.5) for name in asked})
    for step in range(3):
        train(model, opt, x, y, F.cross_entropy)
        assert all(opt.param_groups[0][name] == 0.5 / (step + 1) for name in asked)
    assert all(set(steps) == {0, 1, 2} for steps in asked.values())


# -- the step --------------------------------------------------------------------------------------


class Slow:
    """KFAC of linear layers with biases, dense and row by row, that decomposes in every step."""

    def __init__(self, model: nn.Module, solver: str, **options: float) -> None:
        self.model, self.solver, self.o = model, solver, options
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, L)}
        self.past: dict[str, Any] = {}
        self.steps, self.clip = 0, 1.0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.steps += 1
        records = layer_records(self.model, lambda out: F.cross_entropy(out, y, reduction="none"), x)
        pairs = {name: self.direction(name, *record) for name, record in records.items()}
        o = self.o
        if o["kl_clip"]:
            change = sum((gradient * update).sum() for gradient, update in pairs.values())
            self.clip = min(1.0, float((o["kl_clip"] / (o["lr"] ** 2 * change)) ** 0.5))
        for name, layer in self.layers.items():
            past = self.past[name]
            past["v"] = o["momentum"] * past["v"] + self.clip * pairs[name][1]
            with torch.no_grad():
                for param, move in ((layer.weight, past["v"][:, :-1]), (layer.bias, past["v"][:, -1])):
                    param.mul_(1 - o["lr"] * o["weight_decay"]).sub_(o["lr"] * move)

    def direction(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.einsum("no,ni->oi", g, x) / len(x)
        past = self.past.setdefault(name, {"A": 0.0, "S": 0.0, "w": 0.0, "v": torch.zeros_like(gradient)})
        decay, damping = self.o["factor_decay"], self.o["damping"]
        for key, new in (("A", x.T @ x / len(x)), ("S", g.T @ g / len(x)), ("w", 1.0)):
            past[key] = decay * past[key] + (1 - decay) * new
        a, s = past["A"] / past["w"], past["S"] / past["w"]
        if self.solver == "corrected":
            return gradient, self.corrected(past, a, s, x, g, gradient)
        if self.solver == "cholesky":
            pi = ((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
            M = torch.kron(
                s + damping**0.5 / pi * torch.eye(len(s), dtype=DOUBLE),
                a + damping**0.5 * pi * torch.eye(len(a), dtype=DOUBLE),
            )
        else:
            M = torch.kron(s, a) + damping * torch.eye(len(a) * len(s), dtype=DOUBLE)
        return gradient, torch.linalg.solve(M, gradient.flatten()).view_as(gradient)

    def corrected(self, past: Any, a: Tensor, s: Tensor, x: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
        """EKFAC as a full matrix Q diag(d) Q^T over flat gradients, Q the Kronecker product of the eigenvectors."""
        (sv, su), (av, au) = torch.linalg.eigh(s), torch.linalg.eigh(a)
        Q = torch.kron(su, au)
        if "Q" in past:
            per_sample = torch.einsum("no,ni->noi", g, x).flatten(1)
            seen = (per_sample @ past["Q"]).square().mean(0)
            d = self.o["factor_decay"] * past["d"] + (1 - self.o["factor_decay"]) * seen
            d = (Q.T @ past["Q"]).square() @ d  # the diagonal of the same matrix in the new basis
        else:
            d = torch.kron(sv, av)
        past["Q"], past["d"] = Q, d
        return (Q @ ((Q.T @ gradient.flatten()) / (d + self.o["damping"]))).view_as(gradient)


SOLVERS: dict[str, KroneckerSolver] = {
    "eigenbasis": st.Eigenbasis(),
    "cholesky": st.Cholesky(),
    "corrected": st.EigenbasisCorrected(),
}
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "kl_clip": 0.0},
    "momentum_and_decay": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3, "kl_clip": 0.0},
    "clipped": {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "kl_clip": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_steps_are_those_of_dense_linear_algebra(solver: str, options: dict[str, float]) -> None:
    options = {**options, "damping": 0.03, "factor_decay": 0.7}
    fast, slow = mlp(), mlp()
    opt = st.KFAC(fast, solver=SOLVERS[solver], **EVERY, **{**options, "kl_clip": options["kl_clip"] or None})
    reference = Slow(slow, solver, **options)
    for step in range(4):
        x, y = data(9, seed=step)
        train(fast, opt, x, y, F.cross_entropy)
        reference.step(x, y)
        assert opt.diagnostics is not None
        assert opt.diagnostics.clip == pytest.approx(reference.clip)
        for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert (reference.clip < 1) == bool(options["kl_clip"])


def test_what_has_no_factors_is_trained_by_adamw_to_the_bit() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return S(L(4, 5), nn.LayerNorm(5), nn.PReLU(), L(5, 3))

    mine, theirs = model(), model()
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    opt = st.KFAC(mine, skip=["."], **{f"adamw_{name}": value for name, value in settings.items()})
    reference = torch.optim.AdamW(theirs.parameters(), **settings)
    for step in range(5):
        x, y = data(seed=step)
        train(mine, opt, x.float(), y, F.cross_entropy)
        train(theirs, reference, x.float(), y, F.cross_entropy)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_have_their_own_options() -> None:
    model, (x, y) = mlp(), data()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    opt = st.KFAC(model, params=[{"params": first, "lr": 0.0}, {"params": last, "weight_decay": 0.5}], lr=0.1)
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.1]
    before = snapshot(model)
    train(model, opt, x, y, F.cross_entropy)
    after = snapshot(model)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def test_a_weight_and_a_bias_in_two_groups_are_trained_apart() -> None:
    model, (x, y) = mlp(), data()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = st.KFAC(model, params=[{"params": weights}, {"params": biases}])
    assert [group["method"] for group in opt.param_groups] == ["kfac", "adamw"]
    train(model, opt, x, y, F.cross_entropy)
    assert factors(opt)["0"][0].shape == (4, 4)
    assert "its weight is in another group" in repr(opt)


def test_parameters_can_be_named_and_added_later() -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model, params=model[2].named_parameters(prefix="last"))
    assert opt.param_groups[0]["param_names"] == ["last.weight", "last.bias"]
    before = snapshot(model)
    train(model, opt, x, y, F.cross_entropy)
    assert torch.equal(before[0], model[0].weight)
    opt.add_param_group({"params": list(model[0].named_parameters()), "lr": 0.02})
    train(model, opt, x, y, F.cross_entropy)
    assert not torch.equal(before[0], model[0].weight)


def test_printing_tells_who_trains_what() -> None:
    model = S(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), L(4, 3))
    model.add_module("head", L(3, 3, bias=False))
    text = repr(st.KFAC(model, skip=["head"]))
    assert "Kronecker factors, 2 layers:\n    0: 4 x 2 x 3, 4\n    4: 3 x 4, 3\n" in text
    assert "AdamW, 5 parameters:" in text
    for line in (
        "1.weight: BatchNorm1d has no Kronecker factors",
        "2.bias: a convolution with groups has no Kronecker factors",
        "head.weight: skip='head'",
    ):
        assert line in text


def test_who_gets_factors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.utils.parametrizations.weight_norm(L(4, 4))
            self.frozen, self.head = L(4, 4), L(4, 7, bias=False)
            self.frozen.weight.requires_grad_(False)
            self.head.weight = self.embed.weight
            self.attn = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
            self.plain = L(4, 4)

    text = repr(st.KFAC(Tied()))
    assert "Kronecker factors, 2 layers:\n    attn.out_proj: 4 x 4, 4\n    plain: 4 x 4, 4" in text
    for line in (
        "embed.weight: Embedding has no Kronecker factors",
        "norm.bias: its weight is parametrized",
        "frozen.bias: its weight is not trained",
        "attn.k_proj_weight:",
    ):
        assert line in text


def test_schedulers_scale_the_rate_of_every_group() -> None:
    model, (x, y) = S(L(4, 5), nn.LayerNorm(5), L(5, 3)).double(), data()
    opt = st.KFAC(model, lr=0.4, adamw_lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    train(model, opt, x, y, F.cross_entropy)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.01]


# -- states ----------------------------------------------------------------------------------------

RESUMED = [(solver, fisher) for solver in SOLVERS for fisher in FISHERS]


@pytest.mark.parametrize(("solver", "fisher"), RESUMED, ids=["-".join(pair) for pair in RESUMED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_resumed_within_a_period_goes_on_to_the_bit(solver: str, fisher: str, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, st.KFAC]:
        torch.manual_seed(0)
        model = S(L(4, 5), nn.LayerNorm(5), L(5, 3)).to(dtype)
        options: dict[str, Any] = {"factor_update_steps": 3, "inverse_update_steps": 6}
        return model, st.KFAC(model, solver=SOLVERS[solver], fisher=FISHERS[fisher], **options)

    def run(model: nn.Module, opt: st.KFAC, start: int) -> list[float]:
        steps = range(start, start + 7)
        return [train(model, opt, data(seed=k)[0].to(dtype), data()[1], F.cross_entropy) for k in steps]

    model, opt = make()
    run(model, opt, 0)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for name, pair in factors(resumed).items():
        assert all(factor.dtype == torch.float32 for factor in pair)
        assert all(torch.equal(a, b) for a, b in zip(pair, factors(opt)[name], strict=True))
    assert run(model, opt, 7) == run(other, resumed, 7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_is_the_optimizers_own() -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model)
    train(model, opt, x, y, F.cross_entropy)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = mlp()
    resumed = st.KFAC(other)
    resumed.load_state_dict(saved)
    for _ in range(3):
        train(other, resumed, x, y, F.cross_entropy)
    buffers = [saved["state"][0]["momentum_buffer"], kept["state"][0]["momentum_buffer"]]
    assert torch.equal(*buffers)


# -- mixed precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("how", ["plain", "unscaled", "clipped"])
@pytest.mark.parametrize("kind", [st.KFAC, st.FOP])
def test_a_grad_scaler_leaves_the_step(kind: type[st.KFAC], how: str, fisher: str) -> None:
    results, found = [], []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = S(L(4, 5), nn.LayerNorm(5), L(5, 3))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        opt = kind(model, kl_clip=None, lr=0.05, grad_scaler=scaler, fisher=FISHERS[fisher], **EVERY)
        for step in range(4):
            x, y = data(8, seed=step)
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
            if how != "plain":
                scaler.unscale_(opt)
            if how == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
        results.append(snapshot(model))
        found.append(factors(opt))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert_same(*found, rtol=2e-3)


def test_infinite_scaled_gradients_skip_the_step_and_lower_the_scale() -> None:
    model, (x, y) = mlp().float(), data()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = st.KFAC(model)
    before = snapshot(model)
    scaler.scale(F.cross_entropy(model(x.float() * torch.inf), y)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert opt.diagnostics is None
    opt.zero_grad()
    scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
    scaler.step(opt)
    assert opt.diagnostics is not None


@pytest.mark.parametrize("fisher", FISHERS)
def test_bfloat16_autocast_is_close_to_float32(fisher: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = S(L(4, 16), nn.ReLU(), L(16, 3))
        opt = st.KFAC(model, **{**STILL, "damping": 0.1}, fisher=FISHERS[fisher])
        x, y = data(64)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        opt.step()
        results.append(factors(opt))
    for name in ("0", "2"):
        for a, b in zip(results[0][name], results[1][name], strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert (a - b).norm() < 0.02 * a.norm()


# -- failures --------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the matrices whose decomposition fails from now on."""
    sizes: list[int] = []
    eigh = torch.linalg.eigh

    def broken(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(matrix) in sizes:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    return sizes


def test_a_failed_decomposition_keeps_the_last_good_one_and_three_in_a_row_raise(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model, **EVERY)
    train(model, opt, *data(seed=0), F.cross_entropy)
    good = {k: v.clone() for k, v in opt.state[model[2].weight]["decomposition"].items()}
    failing.append(6)  # the inputs of the last layer, its bias joined
    for count in (1, 2):
        train(model, opt, *data(seed=count), F.cross_entropy)
        assert opt.diagnostics is not None
        assert opt.diagnostics.num_failures == count
        assert opt.diagnostics.num_decompositions == 1
        kept = opt.state[model[2].weight]["decomposition"]
        assert all(torch.equal(kept[name], good[name]) for name in good)
    before, state = snapshot(model), copy.deepcopy(opt.state[model[2].weight]["input_factor"])
    with pytest.raises(DecompositionError, match="Layer '2'"):
        train(model, opt, *data(seed=3), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert torch.equal(state, opt.state[model[2].weight]["input_factor"])
    failing.clear()
    train(model, opt, *data(seed=3), F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_failures == 0


def test_two_failures_with_a_success_between_do_not_add_up(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model, **EVERY)
    for step, fails in enumerate([False, True, True, False, True, True, False]):
        failing[:] = [6] if fails else []
        train(model, opt, *data(seed=step), F.cross_entropy)
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_failures == 0


def test_a_first_decomposition_that_fails_raises_with_the_layer(failing: list[int]) -> None:
    model = mlp()
    opt = st.KFAC(model)
    before = snapshot(model)
    failing.append(6)
    with pytest.raises(DecompositionError, match=r"Layer '2'.*input factor A"):
        train(model, opt, *data(), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    failing.clear()
    train(model, opt, *data(), F.cross_entropy)


def numbers_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return sum(map(numbers_in, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize(
    ("solver", "decomposition"),
    [
        (st.Eigenbasis(), lambda m, n: m * m + n * n + m + n),
        (st.EigenbasisCorrected(), lambda m, n: m * m + n * n + m * n),
        (st.Cholesky(), lambda m, n: 2 * (m * m + n * n) + 2),
    ],
    ids=repr,
)
def test_the_state_is_as_large_as_the_documentation_says(
    solver: KroneckerSolver, decomposition: Callable[[int, int], int]
) -> None:
    model, (x, y) = mlp(), data()
    opt = st.KFAC(model, solver=solver)
    train(model, opt, x, y, F.cross_entropy)
    expected = sum(m * m + n * n + decomposition(m, n) + m * n for m, n in ((5, 5), (6, 3)))
    assert sum(map(numbers_in, opt.state.values())) == expected
