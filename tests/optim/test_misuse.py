"""Every misuse of Sven gets one clear message, and nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest as st


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


X, Y = torch.ones(3, 2), torch.tensor([0.0, 1.0, 2.0])
Closure = Callable[[nn.Module], Any]


def squared(model: nn.Module) -> torch.Tensor:
    return (model(X).squeeze(1) - Y).square()


def with_backward(model: nn.Module) -> torch.Tensor:
    losses = squared(model)
    losses.mean().backward()
    return losses


CLOSURES: dict[str, tuple[Closure, type[Exception], str]] = {
    "scalar": (lambda m: squared(m).mean(), st.ClosureError, "reduction='none'"),
    "python_number": (lambda m: squared(m).mean().item(), st.ClosureError, "float"),
    "nothing": (lambda m: None, st.ClosureError, "NoneType"),
    "matrix": (lambda m: (m(X) - Y).square(), st.ClosureError, r"\(3, 3\)"),
    "empty": (lambda m: squared(m)[:0], st.ClosureError, r"\(0,\)"),
    "empty_dict": (lambda m: {}, st.ClosureError, "empty dict"),
    "bad_block": (lambda m: {"pde": squared(m), "wall": squared(m).mean()}, st.ClosureError, "'wall'"),
    "detached": (lambda m: squared(m).detach(), st.ClosureError, "no graph"),
    "no_grad": (lambda m: torch.no_grad()(squared)(m), st.ClosureError, "no graph"),
    "backward": (with_backward, st.CaptureError, "backward"),
    "other_model": (lambda m: squared(small()), st.CaptureError, "captured model"),
    "wrong_length": (lambda m: squared(m).repeat(2)[:5], st.UnsupportedModelError, "5 rows"),
    "interacting": (lambda m: squared(m) - squared(m).mean(), st.UnsupportedModelError, "rows cannot be told apart"),
    "nan": (lambda m: squared(m) * torch.nan, st.NonFiniteError, "3 of 3"),
}


OPTIONS_OF: dict[str, dict[str, Any]] = {"interacting": {"kappa": 2.0}}  # its losses are negative, some of them


@pytest.mark.parametrize("case", CLOSURES, ids=str)
def test_closures(case: str) -> None:
    closure, error, message = CLOSURES[case]
    model = small()
    opt = st.Sven(model, **OPTIONS_OF.get(case, {}))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        opt.step(lambda: closure(model))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert opt.state_dict()["state"] == {}
    assert float(opt.step(lambda: squared(model))) > 0


def test_a_missing_closure_is_told() -> None:
    with pytest.raises(st.ClosureError, match="needs a closure"):
        st.Sven(small()).step()


def test_an_error_of_the_closure_itself_passes_through() -> None:
    model = small()
    opt = st.Sven(model)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert float(opt.step(lambda: squared(model))) > 0


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"lr": "fast"}, "lr='fast'"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"rows": "loss"}, "'residuals'"),
    ({"kappa": 0.0}, "kappa"),
    ({"solver": "eigh"}, "TruncatedEigh"),
    ({"max_norm_ratio": 0.5}, "max_norm_ratio"),
    ({"fraction": 0.0}, "fraction"),
    ({"fraction": 1.5}, "fraction"),
    ({"samples_per_row": 0}, "samples_per_row"),
    ({"samples_per_row": 2, "rows": "residuals"}, "cancel"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ({"momentum": 1.0}, "momentum"),
    ({"metric": "none"}, "KroneckerMetric"),
    ({"weights": {"edge": -1.0}}, r"weights\['edge'\]"),
    ({"max_memory": 0}, "max_memory"),
    ({"params": [torch.zeros(2, requires_grad=True)]}, "no trainable parameters of"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        st.Sven(small(), **options)


def test_a_parameter_list_instead_of_a_model() -> None:
    with pytest.raises(st.InvalidOptionError, match="pass the model itself"):
        st.Sven(small().parameters())


SOLVERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: st.TruncatedEigh(rank=0), "rank=0"),
    (lambda: st.TruncatedEigh(rtol=1.0), "rtol=1.0"),
    (lambda: st.TruncatedEigh(exponent=-1), "exponent"),
    (lambda: st.TruncatedEigh(form="both"), "form='both'"),
    (lambda: st.TruncatedEigh(precision="float16"), "precision"),
    (lambda: st.TruncatedSVD(rank=1.5), "rank=1.5"),
    (lambda: st.RandomizedSVD(rank=None), "rank=None"),
    (lambda: st.RandomizedSVD(rank=2, oversampling=-1), "oversampling"),
    (lambda: st.Damped(0.0), "damping=0.0"),
    (lambda: st.Damped(1e-2, relative_to="median"), "relative_to"),
    (lambda: st.LeaveOneOut(caution=2.0), "caution"),
    (lambda: st.LevenbergMarquardt(max_trials=0), "max_trials"),
    (lambda: st.KalmanFilter(noise=0), r"noise=0: give a finite number in \(0"),
    (lambda: st.KalmanFilter(noise="none"), r"noise='none': choose 'auto' or a number above 0"),  # type: ignore[arg-type]
    (lambda: st.KalmanFilter(drift=-1), "drift"),
    (lambda: st.KalmanFilter(max_trials=0), "max_trials"),
    (lambda: st.KalmanFilter(max_parameters=0), "max_parameters"),
    (lambda: st.KroneckerMetric(every=0), "every"),
]


@pytest.mark.parametrize(("make", "message"), SOLVERS, ids=[message for _, message in SOLVERS])
def test_solver_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(st.InvalidOptionError, match=message):
        make()


def test_samples_per_row_needs_whole_rows() -> None:
    model = small()
    with pytest.raises(st.ClosureError, match="no multiple of samples_per_row=2"):
        st.Sven(model, samples_per_row=2).step(lambda: squared(model))


def test_negative_losses_have_no_root() -> None:
    model = small()
    with pytest.raises(st.ClosureError, match="negative losses"):
        st.Sven(model, kappa=1.0).step(lambda: model(X).squeeze(1) - 5)


def test_an_update_that_overflows_is_refused() -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    opt = st.Sven(model, lr=1e38, solver=st.TruncatedEigh(rtol=1e-3))
    with pytest.raises(st.NonFiniteError, match="The update reaches"):
        opt.step(lambda: squared(model) * 1e-30 + 1e30)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("engine", [st.Capture, st.ReferenceCapture])
def test_groups_added_later_are_trained(engine: type) -> None:
    model = small()
    last = list(model[2].parameters())
    opt = st.Sven(model, params=last, solver=st.Damped(1e-2), capture=engine(model, params=last))
    opt.add_param_group({"params": list(model[0].parameters())})
    assert type(opt.capture) is engine
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(lambda: squared(model))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_guard_shortens_a_leap() -> None:
    model = small()
    opt = st.Sven(model, lr=0.01, rows="residuals", solver=st.Damped(1e-2), max_norm_ratio=2.0)
    for _ in range(5):
        opt.step(lambda: model(X).squeeze(1) - Y)
    assert opt.diagnostics is not None
    usual = opt.diagnostics.update_norm
    opt.step(lambda: (model(X).squeeze(1) - Y) + 1e3)
    assert opt.diagnostics.clipped
    assert opt.diagnostics.num_clipped == 1
    assert opt.diagnostics.update_norm < 3 * usual


@pytest.mark.parametrize(
    ("solver", "ratio", "clips"),
    [
        (st.Damped(1e-2), "auto", True),
        (st.Damped(1e-2), None, False),
        (st.LeaveOneOut(verify=False), "auto", True),
        (st.LeaveOneOut(), "auto", False),
        (st.LeaveOneOut(), 3.0, True),
    ],
)
def test_the_guard_leaves_alone_what_is_tried_out(solver: st.optim.Solver, ratio: Any, clips: bool) -> None:
    """Also where the solver that does so is assigned later, or taken away again."""
    model = small()
    opt = st.Sven(model, lr=1e-3, rows="residuals", solver=st.Damped(1e-2), max_norm_ratio=ratio)
    for _ in range(5):
        opt.step(lambda: model(X).squeeze(1) - Y)
    opt.solver = solver
    opt.step(lambda: (model(X).squeeze(1) - Y) + 1e3)
    assert opt.diagnostics is not None
    assert (opt.diagnostics.num_clipped, opt.diagnostics.clipped) == (int(clips), clips)


def test_a_guard_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(st.errors.InvalidOptionError, match="max_norm_ratio=3 with LevenbergMarquardt"):
        st.Sven(small(), rows="residuals", solver=st.LevenbergMarquardt(), max_norm_ratio=3.0)
    opt = st.Sven(small(), rows="residuals", max_norm_ratio=3.0)
    with pytest.raises(st.errors.InvalidOptionError, match="leave max_norm_ratio out"):
        opt.solver = st.LevenbergMarquardt()


def test_the_first_step_is_no_longer_than_the_parameters() -> None:
    """Before any mean exists the parameters set the scale: an ill-conditioned first batch cannot carry them away."""
    model = small()
    norm = torch.cat([p.detach().flatten() for p in model.parameters()]).norm()
    opt = st.Sven(model, rows="residuals", lr=1.0, solver=st.TruncatedEigh(rtol=0))
    opt.step(lambda: 1e4 * model(X).squeeze(1) - 1e6)
    assert opt.diagnostics is not None
    assert opt.diagnostics.clipped
    assert opt.diagnostics.update_norm == pytest.approx(float(norm), rel=1e-6)


def test_parameters_that_are_zero_set_no_scale() -> None:
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    opt = st.Sven(model, rows="residuals", lr=1.0, solver=st.Damped(1e-2))
    opt.step(lambda: model(X).squeeze(1) - Y)
    assert model.weight.abs().sum() > 0


@pytest.mark.parametrize("narrow", ["params", "capture"])
def test_capture_and_params_must_agree(narrow: str) -> None:
    model = small()
    last = list(model[2].parameters())
    params = last if narrow == "params" else list(model.parameters())
    captured = last if narrow == "capture" else list(model.parameters())
    with pytest.raises(st.InvalidOptionError, match="same parameters"):
        st.Sven(model, params=params, capture=st.ReferenceCapture(model, params=captured))


def test_a_batch_that_is_fitted_already_does_not_stop_the_next() -> None:
    """Its update is zero, and zero sets no scale for the guard either."""
    model = small()
    opt = st.Sven(model, rows="residuals", lr=0.5, solver=st.Damped(1e-2))
    fitted = model(X).squeeze(1).detach()
    opt.step(lambda: model(X).squeeze(1) - fitted)
    before = squared(model).mean().item()
    opt.step(lambda: model(X).squeeze(1) - Y)
    assert opt.diagnostics is not None
    assert opt.diagnostics.update_norm > 0
    assert squared(model).mean().item() < before
