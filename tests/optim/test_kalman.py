"""The Kalman filter against the textbook, against least squares of all batches, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest as st
from optim.sven_runs import (
    DOUBLE,
    counted,
    data,
    dense_jacobian,
    flat,
    mlp,
    residuals,
    same,
    seen,
    snapshot,
    state_of,
    unchanged,
)

KF = st.KalmanFilter


def batch(step: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    x, noise = data(rows, seed=100 + step)
    return x, torch.sin(x.sum(1)) + 0.05 * noise


def memory(opt: st.Sven) -> tuple[float, Tensor]:
    """The prior and the covariance."""
    kept = opt.state_dict()["state"][0]["solver"]
    side = math.isqrt(len(kept) - 5)
    return float(kept[0]), kept[5:].view(side, side)


def found_noise(opt: st.Sven) -> tuple[int, float]:
    """How many batches have looked for the noise, and what they have found, in multiples of the mean square."""
    count, tens = opt.state_dict()["state"][0]["solver"][2:4].tolist()
    return int(count), 10**tens


def best_noise(jacobian: Tensor, rhs: Tensor, covariance: Tensor, size: int, mean: float) -> float:
    """Of which least is left of the samples' rows by the conditions of all others, solved again for every sample."""
    tens, lefts = torch.linspace(-2.5, 2.5, 11).tolist(), []
    for ten in tens:
        left = 0.0
        for first in range(0, len(rhs), size):
            others = [n for n in range(len(rhs)) if not first <= n < first + size]
            rows, target = jacobian[others], rhs[others]
            noise = 10**ten * mean * torch.eye(len(others), dtype=DOUBLE)
            step = covariance @ rows.T @ torch.linalg.solve(rows @ covariance @ rows.T + noise, target)
            left += float((rhs - jacobian @ step)[first : first + size].square().sum())
        lefts.append(left)
    return tens[lefts.index(min(lefts))]


class ByHand:
    """The filter in the form of Joseph, which holds for any gain, with inverses."""

    def __init__(self, solver: KF, model: nn.Module, rates: Tensor) -> None:
        self.solver, self.model, self.rates = solver, model, rates
        self.prior, self.factor, self.covariance, self.trials = 0.0, 1.0, torch.empty(0), 0
        self.noises: list[float] = []

    def multiple(self) -> float:
        return 10 ** (sum(self.noises) / len(self.noises)) if self.solver.noise == "auto" else self.solver.noise

    def step(self, rows: Callable[[], Tensor]) -> bool:
        graph = rows()
        jacobian, rhs, theta = dense_jacobian(list(self.model.parameters()), graph), graph.detach(), flat(self.model)
        unit = torch.eye(len(theta), dtype=DOUBLE)
        mean = float(rhs.square().mean())
        scale = mean / float(jacobian.square().sum(1).mean())
        if not self.prior:
            self.prior, self.covariance = scale, scale * unit
        else:
            self.prior = max(self.prior, scale)
            drift = self.solver.drift / max(1.0, self.multiple())
            faded = min(1.0, drift * len(rhs) / len(theta) * math.sqrt(scale / self.prior))
            self.covariance = (1 - faded) * self.covariance + faded * self.prior * unit
        if self.solver.noise == "auto":
            some = slice(None, None, -(-len(rhs) // 128))
            self.noises.append(best_noise(jacobian[some], rhs[some], self.covariance, 1, mean))
        for trial in range(self.solver.max_trials):
            noise = self.multiple() * mean * self.factor * torch.eye(len(rhs), dtype=DOUBLE)
            gain = self.covariance @ jacobian.T @ torch.linalg.inv(jacobian @ self.covariance @ jacobian.T + noise)
            gain = self.rates.unsqueeze(1) * gain
            nn.utils.vector_to_parameters(theta - gain @ rhs, self.model.parameters())
            if rows().detach().square().sum() < rhs.square().sum():
                self.trials = max(self.trials, trial)
                self.factor = max(1.0, self.factor / 2) if trial == 0 else self.factor
                left = unit - gain @ jacobian
                self.covariance = left @ self.covariance @ left.T + gain @ noise @ gain.T
                return True
            self.factor *= 10
        nn.utils.vector_to_parameters(theta, self.model.parameters())
        return False


@pytest.mark.parametrize("noise", ["auto", 1e-2])
@pytest.mark.parametrize("rows", [12, 300])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.4, 0.4), (1.0, 0.3)])
def test_it_is_the_filter_of_the_textbook(rates: tuple[float, float], rows: int, noise: Any) -> None:
    """With rejected trials, shortened steps, and more rows than are taken at a time."""
    solver = KF(noise=noise, drift=0.8)
    ours, hand = mlp(), mlp()
    for model in (ours, hand):
        model[0].weight.data *= 6  # type: ignore[index]
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip((ours[0], ours[2]), rates, strict=True)]  # type: ignore[index]
    opt = st.Sven(ours, params=groups, rows="residuals", solver=solver)
    each = torch.cat([torch.full((p.numel(),), rates[i > 1]) for i, p in enumerate(hand.parameters())]).double()
    filter_ = ByHand(solver, hand, each)
    for step in range(8):
        x, y = batch(step, rows)
        opt.step(lambda x=x, y=y: residuals(ours, x, y))
        assert filter_.step(lambda x=x, y=y: residuals(hand, x, y)) == seen(opt).accepted
        # The inverse of 300 x 300 numbers of low rank has lost some digits.
        torch.testing.assert_close(flat(ours), flat(hand), rtol=1e-6, atol=1e-8 if rows == 12 else 1e-6)
        prior, covariance = memory(opt)
        assert prior == pytest.approx(filter_.prior, rel=1e-7)
        torch.testing.assert_close(covariance, filter_.covariance, rtol=1e-5, atol=1e-7 * prior)
    if noise == 1e-2 and rows == 12 and rates[0] == 1:
        assert filter_.trials > 0  # else no rejection was tried
    if noise == "auto":
        assert len(set(filter_.noises)) > 2  # else anything would have done
        assert found_noise(opt)[0] == 8


@pytest.mark.parametrize(("samples", "outputs"), [(7, 3), (40, 5), (12, 30)])
def test_rows_of_one_sample_are_left_out_together(samples: int, outputs: int) -> None:
    """Of many, some: here all samples, every other one, and every other of 8 of 30 outputs."""
    model, (x, noise), units = mlp(), data(samples), torch.linspace(1, 1.5, outputs, dtype=DOUBLE)

    def rows() -> Tensor:  # outputs that say all of each other, and little of those of other samples
        return (model(x) - 3 * noise.unsqueeze(1)) * units

    opt, graph = st.Sven(model, rows="residuals", solver=KF(max_trials=1)), rows()
    jacobian, rhs = dense_jacobian(list(model.parameters()), graph.flatten()), graph.detach().flatten()
    opt.step(rows)
    every = {7: 1, 40: 2, 12: 1}[samples]
    chosen = torch.arange(samples * outputs).view(samples, outputs)[::every]
    if outputs == 30:
        chosen = chosen[:, [k * 30 // 8 for k in range(8)]]
    mean = float(rhs.square().mean())
    covariance = mean / jacobian.square().sum(1).mean() * torch.eye(jacobian.shape[1], dtype=DOUBLE)
    picked = chosen.flatten()
    expected = best_noise(jacobian[picked], rhs[picked], covariance, chosen.shape[1], mean)
    assert expected > best_noise(jacobian[picked], rhs[picked], covariance, 1, mean)
    assert found_noise(opt) == (1, pytest.approx(10**expected))
    assert seen(opt).damping == pytest.approx(10**expected * mean)


def test_of_one_sample_the_others_say_nothing() -> None:
    model, opt = (made := mlp()), st.Sven(made, rows="residuals", solver=KF())
    for step in range(3):
        x, y = batch(step, 1)
        rows = residuals(model, x, y).detach()
        opt.step(lambda x=x, y=y: residuals(model, x, y))
        assert found_noise(opt) == (0, 1.0)
        assert step or seen(opt).damping == pytest.approx(float(rows.square().mean()))


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.0, 1.0), (1.0, 5.0, math.inf)])
def test_the_noise_of_the_data_is_found(noise: float, low: float, high: float) -> None:
    """Without noise batches decide; with nothing but noise they hardly move the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    opt, generator = st.Sven(model, rows="residuals", solver=KF()), torch.Generator().manual_seed(1)
    for _ in range(100):
        x = torch.randn(16, 2, generator=generator, dtype=DOUBLE)
        y = noise * torch.randn(16, generator=generator, dtype=DOUBLE) + (1 - noise) * torch.sin(x[:, 0])
        opt.step(lambda x=x, y=y: model(x).squeeze(1) - y)
    assert low <= found_noise(opt)[1] < high


def test_a_batch_that_comes_again_has_no_others_to_be_kept_from() -> None:
    """Random targets say nothing of each other, and can be met all the same."""
    x, noise = data(12)
    model, other = mlp(), data(12, seed=7)
    opt = st.Sven(model, rows="residuals", solver=KF())
    losses, counts = [], []
    for _ in range(20):
        losses.append(float(opt.step(lambda: residuals(model, x, 3 * noise))))
        counts.append(found_noise(opt)[0])
    assert counts == [1] * 20
    assert losses[-1] < 1e-6 * losses[0]
    opt.step(lambda: residuals(model, *other))
    assert found_noise(opt)[0] == 2


def test_noise_is_averaged_out_by_many_batches() -> None:
    """What single batches hardly say is not forgotten before it has been learnt."""
    torch.manual_seed(1)
    model, way = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 1)), torch.randn(5) * 2 / 5**0.5
    opt, generator = st.Sven(model, rows="residuals", solver=KF()), torch.Generator().manual_seed(1)
    for _ in range(800):
        x = torch.randn(32, 5, generator=generator)
        y = torch.sin(x @ way) + torch.randn(32, generator=generator)
        opt.step(lambda x=x, y=y: model(x).squeeze(1) - y)
    x = torch.randn(2000, 5, generator=generator)
    assert float((model(x).detach().squeeze(1) - torch.sin(x @ way)).square().mean()) < 0.25  # of .5


def test_a_few_samples_that_stay_the_same_are_soon_met() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 16), nn.GELU(), nn.Linear(16, 1))
        x = torch.linspace(-1, 1, 32).unsqueeze(1)
        opt = st.Sven(model, rows="residuals")
        for _ in range(25):
            loss = opt.step(lambda m=model, x=x: (m(x) - torch.sin(3 * x)).squeeze(1))
        assert loss is not None
        assert loss < 1e-5


def test_on_a_linear_model_it_is_least_squares_of_all_batches() -> None:
    """Weighted with each batch's noise, and with the prior around the start: nothing of an earlier batch is lost."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    start, opt = flat(model), st.Sven(model, rows="residuals", solver=KF(noise=0.5, drift=0.0))
    normal, right = torch.zeros(7, 7, dtype=DOUBLE), torch.zeros(7, dtype=DOUBLE)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3, 6, generator=generator, dtype=DOUBLE)
        y = torch.randn(3, generator=generator, dtype=DOUBLE)
        opt.step(lambda x=x, y=y: model(x).squeeze(1) - y)
        assert seen(opt).accepted
        joined, noise = torch.cat([x, torch.ones(3, 1, dtype=DOUBLE)], 1), seen(opt).damping
        assert noise is not None
        prior, covariance = memory(opt)
        if step == 0:
            normal += torch.eye(7, dtype=DOUBLE) / prior
            first = prior
        normal += joined.T @ joined / noise
        right += joined.T @ (y - joined @ start) / noise
        torch.testing.assert_close(flat(model) - start, torch.linalg.solve(normal, right), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(covariance, torch.linalg.inv(normal), rtol=1e-9, atol=1e-12 * first)


def test_many_small_batches_settle_what_none_of_them_can() -> None:
    """Against the same conditions without a memory."""
    found = {}
    for solver in (KF(), st.Damped(0.1), st.LeaveOneOut()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).double()
        opt, generator = st.Sven(model, rows="residuals", solver=solver), torch.Generator().manual_seed(1)
        for _ in range(300):
            x = 2 * torch.rand(8, 1, generator=generator, dtype=DOUBLE) - 1
            opt.step(lambda m=model, x=x: m(x).squeeze(1) - torch.sin(4 * x).squeeze(1))
        x = torch.linspace(-1, 1, 101, dtype=DOUBLE).unsqueeze(1)
        found[type(solver).__name__] = float((model(x).detach() - torch.sin(4 * x)).square().mean())
    assert found["KalmanFilter"] < 1e-4
    assert found["KalmanFilter"] < 0.5 * min(found["Damped"], found["LeaveOneOut"])


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_targets_far_away_are_reached_all_the_same(scale: float) -> None:
    """What the first steps take back is remembered by the noise of the next ones."""
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", solver=KF())
    losses = [float(opt.step(lambda: residuals(model, x, scale * (y + 2)))) for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]


def test_rows_in_other_units_lead_the_same_way() -> None:
    ways = []
    for unit in (1.0, 1e-4, 1e5):
        model = mlp()
        opt = st.Sven(model, rows="residuals", solver=KF())
        for step in range(10):
            x, y = batch(step)
            opt.step(lambda m=model, u=unit, x=x, y=y: u * residuals(m, x, y))
        ways.append(flat(model))
    for other in ways[1:]:
        torch.testing.assert_close(other, ways[0], rtol=1e-8, atol=1e-10)


def test_losses_and_residuals_are_the_same_conditions() -> None:
    ways = []
    for rows, power in (("losses", 2), ("residuals", 1)):
        model = mlp()
        opt = st.Sven(model, rows=rows, kappa=1.0, solver=KF())  # type: ignore[arg-type]
        for step in range(10):
            x, y = batch(step)
            opt.step(lambda m=model, x=x, y=y, p=power: residuals(m, x, y) ** p)
        ways.append(flat(model))
    torch.testing.assert_close(*ways, rtol=1e-8, atol=1e-10)


def test_a_step_that_no_trial_makes_better_leaves_parameters_and_covariance() -> None:
    model = mlp()
    opt = st.Sven(model, rows="residuals", solver=KF(drift=0.0, max_trials=3))
    x, y = batch(0)
    opt.step(lambda: residuals(model, x, y))
    before, kept, calls = snapshot(model), memory(opt)[1], []
    opt.step(counted(lambda: residuals(model, x, y), lambda n, rows: calls.append(n) or (rows if n == 0 else rows + 9)))
    assert unchanged(model, before)
    assert not seen(opt).accepted
    assert len(calls) == 4
    assert torch.equal(memory(opt)[1], kept)
    opt.step(lambda: residuals(model, x, y))
    assert seen(opt).accepted


def test_a_model_that_is_fitted_already_stays_and_learns_when_the_data_change() -> None:
    model, (x, _) = mlp(), data(12)
    target = model(x).detach().squeeze(1).clone()
    opt = st.Sven(model, rows="residuals", solver=KF())
    before = snapshot(model)
    for _ in range(3):
        opt.step(lambda: residuals(model, x, target))
        assert not seen(opt).accepted
    assert unchanged(model, before)
    first = float(opt.step(lambda: residuals(model, x, target + 1)))
    for _ in range(40):
        last = float(opt.step(lambda: residuals(model, x, target + 1)))
    assert last < 1e-3 * first


@pytest.mark.parametrize("drift", [0.01, 10.0])
def test_thousands_of_steps_leave_a_covariance(drift: float) -> None:
    """To the floor of float32 and on: it stays finite, symmetric and, to rounding, positive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    opt, generator = st.Sven(model, rows="residuals", solver=KF(drift=drift)), torch.Generator().manual_seed(1)
    for _ in range(3000):
        x = 2 * torch.rand(8, 1, generator=generator) - 1
        loss = opt.step(lambda x=x: (model(x) - torch.sin(3 * x)).squeeze(1))
    prior, covariance = memory(opt)
    assert loss is not None
    assert loss < 1e-6
    assert covariance.dtype == DOUBLE
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-12 * prior)
    values = torch.linalg.eigvalsh(covariance)
    assert values[0] > -1e-12 * prior
    assert values[-1] <= (1 + 1e-9) * prior


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_saved_state_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, st.Sven]:
        model = mlp().to(dtype)
        return model, st.Sven(model, rows="residuals", solver=KF(), momentum=0.3, lr=0.7)

    def go(model: nn.Module, opt: st.Sven, start: int) -> None:
        for step in range(start, start + 4):
            x, y = (tensor.to(dtype) for tensor in batch(step))
            opt.step(lambda x=x, y=y: residuals(model, x, y))

    model, opt = build()
    go(model, opt, 0)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state_of(opt))
    for one in ((model, opt), (other, resumed)):
        go(*one, 4)
    assert torch.equal(flat(model), flat(other))
    assert same(opt.state_dict(), resumed.state_dict())


def test_parameters_that_come_later_begin_a_new_covariance() -> None:
    model, (x, y) = mlp(), batch(0)
    opt = st.Sven(model, params=list(model[2].parameters()), rows="residuals", solver=KF())  # type: ignore[index]
    opt.step(lambda: residuals(model, x, y))
    assert len(memory(opt)[1]) == 9
    opt.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]
    opt.step(lambda: residuals(model, x, y))
    assert seen(opt).accepted
    assert len(memory(opt)[1]) == 41


def test_a_parameter_that_no_row_depends_on_keeps_its_place() -> None:
    model, (x, y) = mlp(), batch(0)
    opt = st.Sven(model, rows="residuals", solver=KF(drift=0.0))
    frozen = model[0].weight.detach().clone()  # type: ignore[index]
    opt.step(lambda: model[2](model[1](model[0](x)).detach()).squeeze(1) - y)  # type: ignore[index]
    prior, covariance = memory(opt)
    assert torch.equal(model[0].weight, frozen)  # type: ignore[index]
    assert torch.equal(covariance[:32, :32], prior * torch.eye(32, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": st.KroneckerMetric()}, r"KalmanFilter\(.*with metric=KroneckerMetric.*Drop one"),
        ({"metric": st.BalancedMetric()}, r"KalmanFilter\(.*with metric=BalancedMetric.*Drop one"),
        ({"fraction": 0.5}, r"KalmanFilter\(.*with fraction=0\.5.*Drop one"),
        ({"max_norm_ratio": 3.0}, r"max_norm_ratio=3 with KalmanFilter\(.*leave max_norm_ratio out"),
    ],
)
def test_what_it_cannot_be_joined_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        st.Sven(mlp(), solver=KF(), **options)
    opt = st.Sven(mlp(), solver=st.Damped(), **options)
    with pytest.raises(st.InvalidOptionError, match=message):
        opt.solver = KF()
    assert isinstance(opt.solver, st.Damped)


def test_a_model_that_is_too_large_is_refused_and_left_alone() -> None:
    model, (x, y) = mlp(), batch(0)
    message = r"on 41 parameters.*Raise max_parameters=40.*LeaveOneOut"
    with pytest.raises(st.InvalidOptionError, match=message):
        st.Sven(model, solver=KF(max_parameters=40))
    opt = st.Sven(model, rows="residuals", solver=st.Damped())
    opt.solver = KF(max_parameters=40)
    before = snapshot(model)
    with pytest.raises(st.InvalidOptionError, match=message):
        opt.step(lambda: residuals(model, x, y))
    assert unchanged(model, before)
    assert not opt.state_dict()["state"]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, (x, y) = mlp(), batch(0)
    opt = st.Sven(model, rows="residuals", solver=KF())
    opt.step(lambda: residuals(model, x, y))
    before, kept = snapshot(model), state_of(opt)
    with pytest.raises(st.NonFiniteError, match="unchanged"):
        opt.step(lambda: (residuals(model, x, y) * 0).abs().sqrt() + residuals(model, x, y))
    assert unchanged(model, before)
    assert same(opt.state_dict(), kept)
