"""FOP against its formulas on dense matrices, with halves from backwards of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import steepest as st
from steepest.errors import CaptureError, InvalidOptionError
from zoo_parts import Net

L, S = nn.Linear, nn.Sequential
DOUBLE = torch.float64
LR, DAMPING = 0.3, 0.05
PLAIN: dict[str, Any] = {
    "lr": LR, "damping": DAMPING, "momentum": 0.0, "kl_clip": None, "factor_update_steps": 1, "inverse_update_steps": 1,
}  # fmt: skip


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def labels(rows: int) -> Tensor:
    return (torch.arange(rows) * 7 // 2) % 3


def mlp() -> nn.Module:
    return S(L(4, 5), nn.Tanh(), L(5, 3))


def attention() -> nn.Module:
    return S(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(1), L(20, 3))


def image_net() -> nn.Module:
    return S(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Flatten(), L(18, 3))


def frames_net() -> nn.Module:
    return Net(lambda n, x: n.b(n.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)), a=L(4, 5), b=L(5, 3))


def checkpointed() -> nn.Module:
    return Net(lambda n, x: n.b(checkpoint(lambda h: n.a(h).tanh(), x, use_reentrant=False)), a=L(4, 5), b=L(5, 3))


# A model and the shape of one sample
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (4,)),
    "no_bias": (lambda: S(L(4, 5, bias=False), nn.Tanh(), L(5, 3, bias=False)), (4,)),
    "sequence": (lambda: S(L(4, 5), nn.Tanh(), nn.Flatten(1), L(25, 3)), (5, 4)),
    "conv1d": (lambda: S(nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten(), L(15, 3)), (2, 9)),
    "conv2d": (image_net, (2, 5, 4)),
    "conv3d": (lambda: S(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), L(16, 3)), (1, 3, 3, 3)),
    "frames": (frames_net, (2, 4)),
    "used_twice": (lambda: Net(lambda n, x: n.b(n.a(n.a(x).tanh()).tanh()), a=L(4, 4), b=L(4, 3)), (4,)),
    "attention": (attention, (5, 4)),
    "layer_norm": (lambda: S(L(4, 5), nn.LayerNorm(5), nn.Tanh(), L(5, 3)), (4,)),
    "checkpointed": (checkpointed, (4,)),
}  # fmt: skip


def build(kind: str, rows: int) -> tuple[nn.Module, Tensor, Tensor]:
    factory, shape = KINDS[kind]
    torch.manual_seed(0)
    return factory().double(), draw(rows, *shape), labels(rows)


def backward(model: nn.Module, x: Tensor, y: Tensor, divisor: float = 1.0) -> None:
    (F.cross_entropy(model(x), y) / divisor).backward()


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By one backward of these samples alone, in a copy."""
    model = copy.deepcopy(model)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def dense_step(
    opt: st.FOP, first: dict[str, Tensor], second: dict[str, Tensor], mean: dict[str, Tensor], **options: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The formulas of FOP word by word; the curvature is the optimizer's own, whose truth is tested elsewhere."""
    moves, cosines = {}, {}
    for block in opt._blocks.values():
        g1, g2, average = (block.join([g[n] for n in block.names]).flatten() for g in (first, second, mean))
        state = opt.state[block.weight]
        a, s = state["input_factor"] / state["weight"], state["grad_factor"] / state["weight"]
        F_ = torch.kron(s, a)
        M = F_ + DAMPING * torch.eye(len(F_), dtype=DOUBLE)
        metric, inverse = (F_ if options.get("metric") == "undamped" else M), torch.linalg.inv(M)
        difference = g1 - g2
        share = (difference @ metric @ average) / (average @ metric @ average)
        perp = difference - share * average
        beta = (average @ inverse @ perp) / (perp @ inverse @ perp)
        combined = average + beta * perp
        total = 2 * average if options.get("total") == "sum" else average
        eta = (total @ inverse @ combined) / (combined @ inverse @ combined)
        move = (eta * inverse @ combined).view(len(s), len(a))
        moves.update(zip(block.names, block.split(move), strict=True))
        D, A, E = average @ inverse @ perp, average @ inverse @ average, perp @ inverse @ perp
        cosines[block.name] = float(D**2 / (A * E))
    return moves, cosines


def assert_moved(before: dict[str, Tensor], model: nn.Module, moves: dict[str, Tensor], rtol: float = 1e-6) -> None:
    for name, param in model.named_parameters():
        if name in moves:
            torch.testing.assert_close(param.detach(), before[name] - LR * moves[name], rtol=rtol, atol=1e-9)


def blend(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: share * first[name] + (1 - share) * second[name] for name in first}


@pytest.mark.parametrize("rows", [6, 7, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_makes_the_step_of_two_half_batches(kind: str, rows: int) -> None:
    model, x, y = build(kind, rows)
    half = rows // 2
    first, second = gradients(model, x[:half], y[:half]), gradients(model, x[half:], y[half:])
    before = state_of(model)
    opt = st.FOP(model, **PLAIN)
    backward(model, x, y)
    opt.step()
    moves, cosines = dense_step(opt, first, second, blend(first, second, half / rows))
    assert_moved(before, model, moves)
    assert opt.layers.keys() == cosines.keys()
    for name, layer in opt.layers.items():
        assert layer.gate
        assert layer.r == pytest.approx(cosines[name], rel=1e-5, abs=1e-9)
        assert layer.eta == pytest.approx((1 + layer.r) / (1 + 3 * layer.r))


@pytest.mark.parametrize("total", ["mean", "sum"])
@pytest.mark.parametrize("metric", ["damped", "undamped"])
def test_metric_and_total_are_as_selected(metric: Any, total: Any) -> None:
    model, x, y = build("linear", 8)
    first, second = gradients(model, x[:4], y[:4]), gradients(model, x[4:], y[4:])
    before = state_of(model)
    opt = st.FOP(model, metric=metric, total=total, **PLAIN)
    backward(model, x, y)
    opt.step()
    moves, _ = dense_step(opt, first, second, blend(first, second, 0.5), metric=metric, total=total)
    assert_moved(before, model, moves)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention"])
def test_accumulated_micro_batches_are_halved_one_by_one(kind: str) -> None:
    model, x, y = build(kind, 12)
    parts = list(zip(x.chunk(3), y.chunk(3), strict=True))
    first, second = (
        {
            name: torch.stack([gradients(model, xs[part], ys[part])[name] for xs, ys in parts]).mean(0)
            for name, _ in model.named_parameters()
        }
        for part in (slice(0, 2), slice(2, 4))
    )
    before = state_of(model)
    opt = st.FOP(model, **PLAIN)
    for xs, ys in parts:
        backward(model, xs, ys, 3)
    opt.step()
    moves, _ = dense_step(opt, first, second, blend(first, second, 0.5))
    assert_moved(before, model, moves)


def run(kind: type[st.KFAC], x: Tensor, y: Tensor, steps: int = 3, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = mlp().to(x.dtype)
    opt = kind(model, **{**PLAIN, "kl_clip": 0.1, "momentum": 0.7, **options})
    for _ in range(steps):
        opt.zero_grad()
        backward(model, x, y)
        opt.step()
    return state_of(model)


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("solver", [st.Eigenbasis(), st.EigenbasisCorrected()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_equal_halves_make_the_step_of_kfac_to_the_bit(solver: Any, dtype: torch.dtype) -> None:
    x, y = draw(4, 4).to(dtype).repeat(2, 1), labels(4).repeat(2)
    assert_identical(run(st.FOP, x, y, solver=solver), run(st.KFAC, x, y, solver=solver))


def test_equal_halves_make_the_step_of_kfac_with_cholesky() -> None:
    """To rounding: KFAC multiplies with inverses there, and FOP with their roots."""
    x, y = draw(4, 4).repeat(2, 1), labels(4).repeat(2)
    a, b = (run(kind, x, y, solver=st.Cholesky()) for kind in (st.FOP, st.KFAC))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


def test_a_batch_of_one_makes_the_step_of_kfac_to_the_bit() -> None:
    x, y = draw(1, 4), labels(1)
    assert_identical(run(st.FOP, x, y), run(st.KFAC, x, y))


def test_different_halves_make_another_step_than_kfac() -> None:
    x, y = draw(8, 4), labels(8)
    a, b = run(st.FOP, x, y), run(st.KFAC, x, y)
    assert all((a[name] - b[name]).norm() > 1e-3 * a[name].norm() for name in a)


def test_swapping_the_halves_leaves_the_step() -> None:
    x, y = draw(8, 4), labels(8)
    a, b = run(st.FOP, x, y), run(st.FOP, x.roll(4, 0), y.roll(4))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-10)


# -- gradients that somebody changed ---------------------------------------------------------------


def normalised() -> nn.Module:
    """All biases stand before a normalisation, which takes their gradients away."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    return S(conv, nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), L(60, 3, bias=False))


@pytest.mark.parametrize(
    "make", [mlp, KINDS["no_bias"][0], normalised, image_net], ids=["bias", "none", "norm", "conv"]
)
@pytest.mark.parametrize("factor", [1e-3, 0.5, 8.0])
def test_scaling_all_gradients_scales_the_whole_step(make: Callable[[], nn.Module], factor: float) -> None:
    """As clipping by a norm does between backward and step: the difference of the halves shrinks with the mean."""
    steps = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        model = make().double()
        x = draw(8, 2, 5, 4) if make in {image_net, normalised} else draw(8, 4)
        opt = st.FOP(model, **PLAIN)
        before = state_of(model)
        backward(model, x, labels(8))
        for p in model.parameters():
            p.grad *= scale
        opt.step()
        weights = [name for block in opt._blocks.values() for name in block.names]
        after = state_of(model)
        steps.append({name: (after[name] - before[name]) / scale for name in weights if "bias" not in name})
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-6, atol=1e-9)


def test_gradients_of_the_inputs_in_between_change_nothing() -> None:
    """Adversarial training asks for them before every step."""
    results = []
    for attack in (False, True):
        model, x, y = build("linear", 8)
        opt = st.FOP(model, **PLAIN)
        for _ in range(2):
            opt.zero_grad()
            if attack:
                probe = x.clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(probe), y), probe)
            backward(model, x, y)
            opt.step()
        results.append(state_of(model))
    assert_identical(*results)


# -- passes of their own ---------------------------------------------------------------------------


def step_in_passes(model: nn.Module, opt: st.FOP, x: Tensor, y: Tensor, order: tuple[int, int] = (0, 1)) -> None:
    half = len(x) // 2
    parts = {0: (x[:half], y[:half]), 1: (x[half:], y[half:])}
    for index in order:
        with opt.sub_batch(index):
            backward(model, *parts[index])
    opt.step()


@pytest.mark.parametrize("fisher", [st.Empirical(), st.Exact()], ids=repr)
@pytest.mark.parametrize("kind", ["layer_norm", "conv2d", "attention"])
def test_two_passes_make_the_step_of_two_halves(kind: str, fisher: Any) -> None:
    results = []
    for passes in (False, True):
        model, x, y = build(kind, 8)
        opt = st.FOP(model, fisher=fisher, **{**PLAIN, "momentum": 0.5, "kl_clip": 0.05})
        for step in range(3):
            opt.zero_grad()
            if passes:
                step_in_passes(model, opt, x + step, y, (1, 0) if step == 1 else (0, 1))
            else:
                backward(model, x + step, y)
                opt.step()
        results.append(state_of(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-7, atol=1e-9)


def test_passes_with_batch_normalisation_are_two_independent_batches() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return S(L(4, 5), nn.BatchNorm1d(5), nn.Tanh(), L(5, 3)).double()

    x, y = draw(8, 4), labels(8)
    model, joint = make(), make()
    first, second = gradients(model, x[:4], y[:4]), gradients(model, x[4:], y[4:])
    before = state_of(model)
    opt = st.FOP(model, **PLAIN)
    step_in_passes(model, opt, x, y)
    mean = blend(first, second, 0.5)
    # the bias before the normalisation has no gradient but rounding, in which no direction can be compared
    moves, _ = dense_step(opt, first, second, mean)
    assert_moved(before, model, {name: move for name, move in moves.items() if name.startswith("3.")})
    torch.testing.assert_close(model[0].weight, before["0.weight"] - LR * moves["0.weight"], rtol=1e-5, atol=1e-7)
    other = st.FOP(joint, **PLAIN)
    backward(joint, x, y)
    other.step()
    assert (joint[3].weight - model[3].weight).norm() > 1e-3 * model[3].weight.norm()


def test_passes_can_be_accumulated_and_clipped() -> None:
    results = []
    for parts in (1, 2):
        model, x, y = build("linear", 8)
        opt = st.FOP(model, **PLAIN)
        for index, chosen in ((0, slice(0, 4)), (1, slice(4, 8))):
            for xs, ys in zip(x[chosen].chunk(parts), y[chosen].chunk(parts), strict=True):
                with opt.sub_batch(index):
                    backward(model, xs, ys, parts)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        results.append(state_of(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-7, atol=1e-9)


def test_one_pass_alone_is_refused_and_changes_nothing() -> None:
    model, x, y = build("linear", 8)
    opt = st.FOP(model, **PLAIN)
    with opt.sub_batch(1):
        backward(model, x, y)
    before = state_of(model)
    with pytest.raises(CaptureError, match=r"sub_batch\(0\) and sub_batch\(1\)"):
        opt.step()
    assert_identical(before, state_of(model))
    opt.zero_grad()
    step_in_passes(model, opt, x, y)
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_misuse_of_passes_is_told() -> None:
    model, x, y = build("linear", 8)
    opt = st.FOP(model, **PLAIN)
    with pytest.raises(InvalidOptionError, match=r"sub_batch\(2\)"), opt.sub_batch(2):
        pass
    with opt.sub_batch(0), pytest.raises(InvalidOptionError, match=r"within sub_batch\(0\)"), opt.sub_batch(1):
        pass
    with opt.sub_batch(0), pytest.raises(InvalidOptionError, match=r"zero_grad\(\).*sub_batch\(0\)"):
        opt.zero_grad()
    with pytest.raises(IndexError), opt.sub_batch(0):
        backward(model, x, y * 9)
    opt.zero_grad()
    backward(model, x, y)
    opt.step()  # the pass that was broken off has left nothing behind


# -- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", ["mean", "sum"])
def test_the_diagnostics_are_within_their_bounds(total: Any) -> None:
    model, x, y = build("layer_norm", 9)
    opt = st.FOP(model, total=total)
    assert opt.layers == {}
    scale = 2 if total == "sum" else 1
    for step in range(12):
        opt.zero_grad()
        backward(model, x + step % 3, y)
        opt.step()
        assert sorted(opt.layers) == ["0", "3"]
        for layer in opt.layers.values():
            assert 0 <= layer.r <= 1
            assert 0.5 * scale <= layer.eta <= scale
            assert layer.correction >= 0
            assert layer.gate is True


def test_a_refused_step_keeps_the_diagnostics_of_the_last() -> None:
    model, x, y = build("linear", 8)
    opt = st.FOP(model, **PLAIN)
    backward(model, x, y)
    opt.step()
    kept, before = opt.layers, state_of(model)
    opt.zero_grad()
    backward(model, torch.cat([x[:7], x[7:] * torch.nan]), y)
    with pytest.raises(st.NonFiniteError):
        opt.step()
    assert opt.layers == kept
    assert_identical(before, state_of(model))


@pytest.mark.parametrize("unused", [False, True])
def test_one_process_of_ddp_trains_as_the_model_alone(tmp_path: Path, unused: bool) -> None:
    alone, x, y = build("layer_norm", 8)
    wrapped = copy.deepcopy(alone)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(wrapped, find_unused_parameters=unused)
        for model in (alone, ddp):
            opt = st.FOP(model, **PLAIN)
            for _ in range(3):
                opt.zero_grad()
                backward(model, x, y)
                opt.step()
            opt.close()
        del ddp, model, opt
    finally:
        torch.distributed.destroy_process_group()
    assert_identical(state_of(alone), state_of(wrapped))
