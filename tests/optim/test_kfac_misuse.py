"""Every misuse of KFAC and FOP gets one clear message, and nothing changes."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.errors import CaptureError, InvalidOptionError, NonFiniteError, UnsupportedModelError
from zoo_parts import Net

X, Y = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 2
kinds = pytest.mark.parametrize("kind", [st.KFAC, st.FOP])


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor = X, y: Tensor = Y) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def freeze(model: nn.Module, opt: torch.optim.Optimizer) -> tuple[list[Tensor], Any]:
    return [p.detach().clone() for p in model.parameters()], copy.deepcopy(opt.state_dict()["state"])


def assert_unchanged(before: tuple[list[Tensor], Any], model: nn.Module, opt: torch.optim.Optimizer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert same(before[1], opt.state_dict()["state"])


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"momentum": lambda step: 2.0}, "momentum=2.0"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"damping": -1e-3}, "damping"),
    ({"damping": "auto"}, "damping='auto'"),
    ({"factor_decay": 1.0}, "factor_decay=1.0"),
    ({"factor_update_steps": 0}, "factor_update_steps=0"),
    ({"inverse_update_steps": 1.5}, "inverse_update_steps=1.5"),
    ({"kl_clip": 0.0}, "kl_clip"),
    ({"fisher": "empirical"}, r"steepest.Empirical\(\)"),
    ({"fisher": st.Empirical}, "fisher="),
    ({"solver": "eigh"}, r"steepest.Eigenbasis\(\)"),
    ({"solver": st.Eigenbasis}, "solver="),
    ({"solver": st.TruncatedEigh()}, "solver="),
    ({"sharing": "mean"}, "'reduce'"),
    ({"reduction": "none"}, "'sum'"),
    ({"loss_terms": "tokens"}, "'positions'"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ({"skip": ["2", "["]}, r"skip='\[' is no regular expression"),
    ({"skip": [3]}, "skip=3 is no regular expression"),
    ({"skip": ["head"]}, "skip='head' matches no layer"),
    ({"params": [torch.zeros(2, requires_grad=True)]}, "no trainable parameters of Sequential"),
]


@kinds
@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(kind: type[st.KFAC], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        kind(small(), **options)


FISHERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: st.Exact("softmax"), "'categorical'"),
    (lambda: st.Exact("gaussian", scale=0.0), "scale"),
    (lambda: st.MonteCarlo(draws=0), "draws=0"),
    (lambda: st.MonteCarlo(seed=-1), "seed=-1"),
    (lambda: st.FOP(small(), metric="euclidean"), "'undamped'"),
    (lambda: st.FOP(small(), total="both"), "'mean'"),
]


@pytest.mark.parametrize(("make", "message"), FISHERS, ids=[message for _, message in FISHERS])
def test_other_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        make()


def test_a_schedule_that_leaves_its_range_stops_before_the_step() -> None:
    model = small()
    opt = st.KFAC(model, damping=lambda step: 1.0 - step)
    train(model, opt)
    train(model, opt)
    before = freeze(model, opt)
    with pytest.raises(InvalidOptionError, match=r"damping=-1\.0"):
        train(model, opt)
    assert_unchanged(before, model, opt)


def test_a_parameter_list_instead_of_a_model() -> None:
    with pytest.raises(InvalidOptionError, match="pass the model itself"):
        st.KFAC(small().parameters())  # type: ignore[arg-type]


def test_lazy_models_run_once_before() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight' has no shape yet: run one batch"):
        st.KFAC(nn.Sequential(nn.LazyLinear(3)))


def test_compiled_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="compiled"):
        st.KFAC(torch.compile(small(), backend="eager"))


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_after_construction_trains_as_before() -> None:
    results = []
    for compiled in (False, True):
        model = small()
        opt = st.FOP(model)
        called = torch.compile(model, backend="eager") if compiled else model
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(called(X), Y).backward()
            opt.step()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.compiler.reset()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# -- in the loop -----------------------------------------------------------------------------------


@kinds
def test_a_step_without_a_backward(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model)
    with pytest.raises(CaptureError, match=r"call loss\.backward\(\)"):
        opt.step()
    train(model, opt)


@kinds
def test_a_part_of_the_model_called_alone(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model)
    F.cross_entropy(model[2](model[1](model[0](X))), Y).backward()
    before, _ = freeze(model, opt)
    with pytest.raises(CaptureError, match=r"Layer '0'.*call the model itself"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_fop_wants_to_see_every_forward() -> None:
    model = small()
    opt = st.FOP(model)
    train(model, opt)
    opt.zero_grad()
    F.cross_entropy(model[2](model[1](model[0](X))), Y).backward()
    with pytest.raises(CaptureError, match="not seen in this step"):
        opt.step()


@kinds
def test_a_closed_optimizer_takes_no_step(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model)
    train(model, opt)
    opt.close()
    before = freeze(model, opt)
    with pytest.raises(CaptureError, match="closed"):
        train(model, opt)
    assert_unchanged(before, model, opt)


@kinds
def test_collecting_the_optimizer_leaves_the_model_as_it_was(
    kind: type[st.KFAC], world: Callable[[], dict[str, object]]
) -> None:
    model = small()
    opt = kind(model)
    train(model, opt)
    assert world()["hooks"]
    del opt
    gc.collect()
    assert world()["hooks"] == []


@kinds
def test_an_interrupted_forward_does_not_disturb_the_next(
    kind: type[st.KFAC], world: Callable[[], dict[str, object]]
) -> None:
    results = []
    modes = world()["function modes"]
    for interrupt in (False, True):
        model = small()
        opt = kind(model)
        train(model, opt)
        if interrupt:
            handle = model[1].register_forward_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(X)
            handle.remove()
        train(model, opt)
        assert world()["function modes"] == modes
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_unclear_number_of_terms_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(2, 4))
    opt = st.KFAC(model)
    with pytest.raises(CaptureError, match=r"returned \(3, 5, 4\).*loss_terms='samples'"):
        model(torch.randn(3, 5, 2))
    opt.close()
    st.KFAC(model, reduction="sum")
    model(torch.randn(3, 5, 2))


@pytest.mark.parametrize("output", ["tuple", "vector"])
def test_an_output_without_components_has_no_distribution(output: str) -> None:
    model = Net(lambda n, x: (n.a(x), x) if output == "tuple" else n.a(x).squeeze(1), a=nn.Linear(2, 1))
    opt = st.KFAC(model, fisher=st.Exact())
    with pytest.raises(CaptureError, match=r"needs a tensor \[\.\.\., C\].*Empirical"):
        model(X)
    opt.close()


@pytest.mark.parametrize("solver", [st.EigenbasisCorrected(), None], ids=["ekfac", "fop"])
def test_single_samples_that_cannot_be_told_apart_are_refused_by_name(solver: Any) -> None:
    """Samples and positions in one dimension of the output: EKFAC's second moment and halves need single samples."""
    model, x = nn.Sequential(nn.Flatten(0, 1), nn.Linear(2, 4)), torch.randn(3, 3, 2)
    opt = st.FOP(model, reduction="sum") if solver is None else st.KFAC(model, solver=solver, reduction="sum")
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight'.*cannot be told"):
        model(x)
    opt.close()
    opt = st.KFAC(model, reduction="sum")
    model(x).square().sum().backward()
    opt.step()


def test_an_unscaled_gradient_needs_the_scaler() -> None:
    model = small()
    opt, scaler = st.KFAC(model), torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(X), Y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(CaptureError, match="grad_scaler=scaler"):
        scaler.step(opt)


def test_a_state_of_another_solver_is_refused() -> None:
    model = small()
    opt = st.KFAC(model)
    train(model, opt)
    other = st.KFAC(model, solver=st.Cholesky())
    other.load_state_dict(opt.state_dict())
    with pytest.raises(InvalidOptionError, match="solver that the state was saved with"):
        train(model, other)


# -- nothing is half done --------------------------------------------------------------------------


def half_nan() -> tuple[Tensor, Tensor]:
    x = X.clone()
    x[4] = torch.nan
    return x, Y


@kinds
@pytest.mark.parametrize("what", ["half", "weight", "bias", "norm", "factors"])
def test_a_non_finite_gradient_changes_nothing(kind: type[st.KFAC], what: str) -> None:
    model = small()
    opt = kind(model)
    train(model, opt)
    before = freeze(model, opt)
    opt.zero_grad()
    x, y = half_nan() if what == "half" else (X, Y)
    F.cross_entropy(model(x), y).backward()
    if what == "weight":
        model[2].weight.grad[0, 1] = torch.inf
    elif what == "bias":
        model[0].bias.grad[2] = torch.nan
    elif what == "norm":
        model[1].weight.grad[0] = torch.nan
    elif what == "factors":
        opt._gathering.parts["0.weight"].grad[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(NonFiniteError, match="unchanged"):
        opt.step()
    assert_unchanged(before, model, opt)
    train(model, opt)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_overflows_changes_nothing(kind: type[st.KFAC], dtype: torch.dtype) -> None:
    model = small().to(dtype)
    opt = kind(model, kl_clip=None)
    train(model, opt, X.to(dtype))
    before = freeze(model, opt)
    opt.param_groups[0]["lr"] = 3e38
    with pytest.raises(NonFiniteError, match=r"The update reaches .*does not hold"):
        train(model, opt, X.to(dtype))
    assert_unchanged(before, model, opt)


def test_half_precision_parameters_hold_less() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).half()
    opt = st.KFAC(model, kl_clip=None, lr=1e-3, momentum=0.0, damping=1e-7, reduction="sum")
    model(X.half()).backward(torch.full((6, 2), 1e-2, dtype=torch.half))
    for p in model.parameters():
        p.grad *= 1e5
    before = freeze(model, opt)
    with pytest.raises(NonFiniteError, match=r"torch.float16 does not hold"):
        opt.step()
    assert_unchanged(before, model, opt)


@kinds
def test_non_finite_steps_are_skipped_and_counted_on_request(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model, on_nonfinite="skip")
    train(model, opt)
    before = freeze(model, opt)
    for count in (1, 2):
        with pytest.warns(RuntimeWarning, match="Step skipped"):
            train(model, opt, *half_nan())
        assert opt._memory["num_skipped"] == count
    after = opt.state_dict()["state"]
    after[0]["num_skipped"] = before[1][0]["num_skipped"]
    assert_unchanged(before, model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt)
    assert opt.diagnostics is not None


@kinds
def test_zero_gradients_are_no_failure(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model)
    train(model, opt)
    opt.zero_grad()
    (F.cross_entropy(model(X), Y) * 0).backward()
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@kinds
def test_without_damping_the_pseudo_inverse_is_finite(kind: type[st.KFAC]) -> None:
    model = small()
    opt = kind(model, damping=0.0)
    for _ in range(3):
        train(model, opt, X[:2], Y[:2])
    assert all(p.isfinite().all() for p in model.parameters())
