"""How far Sven goes: a direction is formed once, and the norm guard measures it as the parameters see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest as st
from optim.sven_runs import counted, data, flat, mlp, residuals, seen
from steepest.engine import Jacobian
from steepest.optim.metric import Geometry

pytestmark = pytest.mark.usefixtures("no_model_is_small")

METRIC = st.KroneckerMetric()
EVERYWAY: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.6},
    "euclidean": {"metric": None},
    "euclidean with momentum": {"metric": None, "momentum": 0.6},
    "fraction": {"fraction": 0.5},
    "row by row": {"reference": True},
}
each = pytest.mark.parametrize("options", EVERYWAY.values(), ids=EVERYWAY)


def after_some_steps(options: dict[str, Any], worse: int) -> tuple[st.Sven, Tensor, list[str]]:
    """The move of a last step of which some tries fail, and the products that it took."""
    options = dict(options)
    model, (x, y) = mlp(), data(12)
    if options.pop("reference", False):
        options["capture"] = st.ReferenceCapture(model)
    opt = st.Sven(model, rows="residuals", relative_decay=0.0, **options)  # which is no share of a direction

    def closure() -> Tensor:
        return residuals(model, x, y + 1)

    for _ in range(4):
        opt.step(closure)
    before, products = flat(model), []
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((Jacobian, "vjp"), (Jacobian, "add_vjp_"), (Geometry, "direction")):
            patch.setattr(kind, name, noted(getattr(kind, name), name, products))
        opt.step(counted(closure, lambda call, rows: rows + 100 if 0 < call <= worse else rows))
    return opt, before - flat(model), products


def noted(method: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    return called


@each
@pytest.mark.parametrize("worse", [0, 1, 3])
def test_a_step_that_is_halved_is_a_share_of_the_one_that_is_not(options: dict[str, Any], worse: int) -> None:
    whole, move, _ = after_some_steps(options, 0)
    opt, part, _ = after_some_steps(options, worse)
    assert seen(whole).accepted
    assert seen(opt).accepted
    assert seen(opt).length == pytest.approx(seen(whole).length / 2**worse)
    torch.testing.assert_close(part * 2**worse, move, rtol=1e-10, atol=1e-13)
    assert move.norm() > 1e-6


@each
def test_a_direction_is_formed_once_however_often_it_is_tried(options: dict[str, Any]) -> None:
    """Straight into the parameters at first, where that can be, and once more where it has to be tried again."""
    for worse in (0, 1, 3):
        _, _, products = after_some_steps(options, worse)
        straight = options == {"metric": None}
        assert products.count("add_vjp_") == straight
        assert products.count("vjp") == (bool(worse) if straight else 1)
        assert products.count("direction") <= 1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"solver": st.Damped(1e-3), "metric": METRIC, "lr": 1.0}], ids=str)
def test_the_first_step_in_a_metric_is_no_longer_than_the_parameters(options: dict[str, Any], momentum: float) -> None:
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", momentum=momentum, relative_decay=0.0, **options)
    before = flat(model)
    opt.step(lambda: residuals(model, x, 1000 * y))
    assert seen(opt).clipped
    taken = (before - flat(model)).norm()
    torch.testing.assert_close(taken, seen(opt).length * before.norm(), rtol=1e-9, atol=0)


def test_later_steps_are_compared_in_the_norm_of_the_metric() -> None:
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", solver=st.Damped(0.1), metric=METRIC, lr=0.5)
    mean, apart = 0.0, []
    for step in range(6):
        before = flat(model)
        opt.step(lambda step=step: residuals(model, x, y * (100 if step == 4 else 1)))
        apart.append(float((before - flat(model)).norm()) / 0.5 / seen(opt).update_norm)
        assert seen(opt).clipped == (step in {0, 4})
        if step == 4:
            assert seen(opt).update_norm == pytest.approx(3 * mean / (1 - 0.9**4), rel=1e-9)
        mean = 0.9 * mean + 0.1 * seen(opt).update_norm
    assert max(abs(ratio - 1) for ratio in apart) > 0.1  # it is not the Euclidean one


@pytest.mark.parametrize("solver", [None, st.Damped(0.1)])
def test_a_direction_beyond_the_numbers_of_the_parameters_is_not_taken(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the solution itself is well within them: a tried step is given up, another one raises."""
    model, (x, y) = mlp(), data(12)
    opt = st.Sven(model, rows="residuals", solver=solver, metric=METRIC)
    opt.step(lambda: residuals(model, x, y))
    before, usual = flat(model), Geometry.direction
    with monkeypatch.context() as patch:
        patch.setattr(Geometry, "direction", lambda *args: {n: d / 0 for n, d in usual(*args).items()})
        if solver is None:
            opt.step(lambda: residuals(model, x, y))
            assert not seen(opt).accepted
        else:
            with pytest.raises(st.NonFiniteError, match=r"which torch\.float64 does not hold"):
                opt.step(lambda: residuals(model, x, y))
    assert torch.equal(flat(model), before)
    opt.step(lambda: residuals(model, x, y))
    assert seen(opt).accepted
