"""What every optimizer of the library owes torch.optim, from one table."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import steepest as st


@dataclass(frozen=True)
class Entry:
    """One way to build an optimizer and to take a step with it."""

    name: str
    make: Callable[..., Optimizer]
    output: Callable[[nn.Module, Tensor, Tensor], Tensor]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).squeeze(1) - y).square()


def residuals(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).squeeze(1) - y


def trained(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The closure of optimizers that read ``p.grad``."""
    model.zero_grad()
    loss = losses(model, x, y).mean()
    loss.backward()
    return loss.detach()


def kfac(name: str, kind: Callable[..., Optimizer] = st.KFAC, **options: Any) -> Entry:
    return Entry(name, lambda model, **o: kind(model, **{"momentum": 0.5, **options, **o}), trained)


def sven(name: str, *, reference: bool = False, **options: Any) -> Entry:
    def make(model: nn.Module, **o: Any) -> Optimizer:
        given = {**options, **o}
        if reference:
            groups = list(given["params"]) if "params" in given else list(model.parameters())
            given.update({"params": groups} if "params" in given else {})
            trained_ = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
            given["capture"] = st.ReferenceCapture(model, params=trained_)
        return st.Sven(model, **given)

    return Entry(name, make, residuals if options.get("rows") == "residuals" else losses)


def lpsgd(name: str, kind: Callable[..., Optimizer], **options: Any) -> Entry:
    def make(model: nn.Module, params: Any = None, **o: Any) -> Optimizer:
        chosen = model.named_parameters() if params is None else params
        return kind(chosen, **{"lr": 0.03, "p": 3.0, **options, **o})

    return Entry(name, make, trained)


EIGH: dict[str, Any] = {"solver": st.TruncatedEigh(rtol=1e-3)}
DAMPED: dict[str, Any] = {"solver": st.Damped(1e-2)}
LEVENBERG: dict[str, Any] = {"solver": st.LevenbergMarquardt()}
METRIC: dict[str, Any] = {"metric": st.KroneckerMetric(every=3)}

OPTIMIZERS = [
    sven("sven"),
    sven("sven_residuals", rows="residuals"),
    sven("sven_momentum", rows="residuals", momentum=0.5),
    sven("sven_untried", solver=st.LeaveOneOut(verify=False)),
    sven("sven_losses", **EIGH, lr=0.1),
    sven("sven_damped", **DAMPED, rows="residuals", lr=0.3),
    sven("sven_metric", **DAMPED, **METRIC, rows="residuals", lr=0.3, momentum=0.5),
    sven("sven_fraction", **EIGH, lr=0.1, fraction=0.5, seed=3),
    sven("sven_fraction_momentum", **DAMPED, rows="residuals", lr=0.1, fraction=0.5, momentum=0.5),
    sven("sven_guard", **EIGH, lr=0.1, max_norm_ratio=1.0),
    sven("sven_levenberg", **LEVENBERG, rows="residuals"),
    sven("sven_levenberg_all", **LEVENBERG, **METRIC, rows="residuals", momentum=0.3),
    sven("sven_kalman", solver=st.KalmanFilter(), rows="residuals"),
    sven("sven_kalman_all", solver=st.KalmanFilter(), lr=0.7, momentum=0.3),
    sven("sven_reference", reference=True),
    kfac("kfac"),
    kfac("kfac_mid_period", factor_update_steps=2, inverse_update_steps=4),
    kfac("kfac_exact", fisher=st.Exact("gaussian", scale=2.0)),
    kfac("kfac_monte_carlo", fisher=st.MonteCarlo("gaussian", scale=2.0, draws=2, seed=4)),
    kfac("kfac_cholesky", solver=st.Cholesky(), sharing="reduce"),
    kfac("ekfac", solver=st.EigenbasisCorrected()),
    kfac("fop", st.FOP),
    kfac("fop_undamped", st.FOP, metric="undamped", total="sum"),
    lpsgd("lpsgd", st.LPSGD),
    lpsgd("lpsgd_foreach", st.LPSGD, foreach=True, p=4.0),
    lpsgd("lpsgd_sgd", st.LPSGD, p=2.0, lr=0.1),
    lpsgd("lpsgdm", st.LPSGDM, momentum=0.5),
    lpsgd("lpsgdm_loop", st.LPSGDM, momentum=0.5, foreach=False),
    lpsgd("lpsgdm_signs", st.LPSGDM, p=1e6, lr=0.01),
]
each = pytest.mark.parametrize("entry", OPTIMIZERS, ids=lambda entry: entry.name)


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    return model, x, (x * torch.tensor([1.0, -2.0, 0.5])).sum(1).sin()


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors within nested mappings included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run(entry: Entry, model: nn.Module, opt: Optimizer, x: Tensor, y: Tensor, steps: int) -> list[float]:
    return [float(opt.step(lambda: entry.output(model, x, y))) for _ in range(steps)]


@each
def test_it_trains_and_returns_the_loss_before_the_step(entry: Entry) -> None:
    model, x, y = problem()
    expected = float(losses(model, x, y).mean().detach())
    history = run(entry, model, entry.make(model), x, y, 40)
    assert history[0] == pytest.approx(expected, rel=1e-6)
    assert history[-1] < 0.5 * history[0]


@each
def test_it_is_deterministic_and_leaves_the_global_generator_alone(entry: Entry) -> None:
    results = []
    for _ in range(2):
        model, x, y = problem()
        opt = entry.make(model)
        state = torch.get_rng_state()
        run(entry, model, opt, x, y, 4)
        assert torch.equal(state, torch.get_rng_state())
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_a_resumed_run_continues_bit_identically(entry: Entry, how: str) -> None:
    model, x, y = problem()
    opt = entry.make(model)
    run(entry, model, opt, x, y, 5)
    if how == "deepcopy":
        other, resumed = copy.deepcopy((model, opt))
    elif how == "pickle":
        other, resumed = pickle.loads(pickle.dumps((model, opt)))
    else:
        other, _, _ = problem(seed=9)
        resumed = entry.make(other)
        saved = {"model": model.state_dict(), "opt": opt.state_dict()}
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
    assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert run(entry, model, opt, x, y, 5) == run(entry, other, resumed, x, y, 5)
    for a, b in zip(snapshot(model), snapshot(other), strict=True):
        assert torch.equal(a, b)


@each
def test_lr_schedulers_step_hooks_and_groups(entry: Entry) -> None:
    model, x, y = problem()
    groups = [{"params": list(model[0].parameters()), "lr": 0.0}, {"params": list(model[2].parameters())}]
    opt = entry.make(model, params=groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, total_iters=2)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    before = snapshot(model)
    run(entry, model, opt, x, y, 1)
    scheduler.step()
    after = snapshot(model)
    assert torch.equal(before[0], after[0])  # lr 0
    assert not torch.equal(before[2], after[2])
    assert seen == ["pre", "post"]
    assert scheduler.get_last_lr()[1] == pytest.approx(0.75 * opt.defaults["lr"])


@each
def test_weight_decay_is_decoupled(entry: Entry) -> None:
    model, x, y = problem()
    twin = copy.deepcopy(model)
    run(entry, model, entry.make(model, lr=0.1), x, y, 1)
    run(entry, twin, entry.make(twin, lr=0.1, weight_decay=0.5), x, y, 1)
    start, _, _ = problem()
    for plain, decayed, old in zip(snapshot(model), snapshot(twin), snapshot(start), strict=True):
        torch.testing.assert_close(decayed, plain - 0.05 * old, rtol=1e-5, atol=1e-6)


@each
def test_a_tensor_lr_is_a_number(entry: Entry) -> None:
    model, x, y = problem()
    twin = copy.deepcopy(model)
    run(entry, model, entry.make(model, lr=0.25), x, y, 3)
    run(entry, twin, entry.make(twin, lr=torch.tensor(0.25)), x, y, 3)
    for a, b in zip(snapshot(model), snapshot(twin), strict=True):
        assert torch.equal(a, b)


@each
def test_parameters_outside_params_stay(entry: Entry) -> None:
    model, x, y = problem()
    opt = entry.make(model, params=model[2].parameters())
    before = snapshot(model)
    run(entry, model, opt, x, y + 2, 2)
    after = snapshot(model)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])
    if entry.output is not trained:
        assert all(p.grad is None for p in model.parameters())


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(entry: Entry, bad: float) -> None:
    model, x, y = problem()
    opt = entry.make(model)
    run(entry, model, opt, x, y, 2)
    before, state = snapshot(model), copy.deepcopy(opt.state_dict())
    poisoned = y.clone()
    poisoned[3] = bad
    with pytest.raises(st.NonFiniteError, match="unchanged"):
        run(entry, model, opt, x, poisoned, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert same(opt.state_dict()["state"], state["state"])
    run(entry, model, opt, x, y, 1)  # and the next step is a good one


@each
def test_non_finite_steps_are_skipped_and_counted_on_request(entry: Entry) -> None:
    model, x, y = problem()
    opt = entry.make(model, on_nonfinite="skip")
    run(entry, model, opt, x, y, 1)
    before = snapshot(model)
    with pytest.warns(RuntimeWarning, match="skipped"):
        loss = opt.step(lambda: entry.output(model, x, y * torch.nan))
    assert loss is None or loss.isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(entry, model, opt, x, y, 1)
    assert opt.diagnostics.num_skipped == 1


@each
def test_named_parameters_and_repr(entry: Entry) -> None:
    model, _, _ = problem()
    opt = entry.make(model)
    assert opt.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert "lr" in repr(opt)
