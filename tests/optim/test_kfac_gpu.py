"""KFAC and FOP on a CUDA device: the CPU's steps, one wait for the device, mixed precision, TF32.

What makes sense on the CPU too runs there as well, so that these tests are tried on every machine.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import steepest as st

L, S = nn.Linear, nn.Sequential
KINDS: tuple[type[st.KFAC], ...] = (st.KFAC, st.FOP)
SOLVERS = {"eigenbasis": st.Eigenbasis(), "corrected": st.EigenbasisCorrected(), "cholesky": st.Cholesky()}
FISHERS = {"empirical": st.Empirical(), "exact": st.Exact("categorical")}


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def image_net() -> nn.Module:
    torch.manual_seed(0)
    return S(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.Tanh(),
        nn.Conv2d(6, 4, 2, bias=False), nn.Tanh(), nn.Flatten(), L(36, 6), nn.Tanh(), L(6, 3),
    )  # fmt: skip


def mlp(depth: int = 2, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth - 1) for layer in (L(width, width), nn.Tanh())]
    return S(nn.LayerNorm(width), *hidden, L(width, 3))


def batch(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype), torch.arange(shape[0]) * 5 // 2 % 3


def train(model: nn.Module, opt: st.KFAC, x: Tensor, y: Tensor) -> float:
    where = next(model.parameters()).device
    opt.zero_grad()
    loss = F.cross_entropy(model(x.to(where)), y.to(where))
    loss.backward()
    opt.step()
    return float(loss.detach())


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def factors(opt: st.KFAC) -> dict[str, tuple[Tensor, Tensor]]:
    """The bias-corrected running factors of every layer."""
    states = {block.name: opt.state[block.weight] for block in opt._blocks.values()}
    return {n: (s["input_factor"] / s["weight"], s["grad_factor"] / s["weight"]) for n, s in states.items()}


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-8, atol=1e-8)


# -- the CPU's steps -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_cuda_equal_those_on_the_cpu(
    kind: type[st.KFAC], solver: str, fisher: str, cuda: torch.device
) -> None:
    models = [image_net().double().to(where) for where in ("cpu", cuda)]
    options: dict[str, Any] = {"lr": 0.1, "damping": 1e-2, "factor_update_steps": 1, "inverse_update_steps": 2}
    opts = [kind(model, solver=SOLVERS[solver], fisher=FISHERS[fisher], **options) for model in models]
    before = snapshot(models[0])
    for step in range(4):
        x, y = batch(step, 48, 2, 8, 8, dtype=torch.float64)
        losses = [train(model, opt, x, y) for model, opt in zip(models, opts, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert_same(*map(snapshot, models))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, snapshot(models[0]), strict=True))
    here, there = map(factors, opts)
    assert here.keys() == there.keys()
    assert all(tensor.device.type == "cuda" for pair in there.values() for tensor in pair)
    for name in here:
        assert_same(list(here[name]), list(there[name]))
    found = [opt.diagnostics for opt in opts]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].update_norm == pytest.approx(found[1].update_norm, rel=1e-8)
    assert found[0].num_decompositions == found[1].num_decompositions


def resumed(kind: type[st.KFAC], there: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after four steps on the CPU; and after two there, from a state saved there after two."""
    model = image_net().double()
    opt = kind(model)
    batches = [batch(step, 48, 2, 8, 8, dtype=torch.float64) for step in range(4)]
    for x, y in batches[:2]:
        train(model, opt, x, y)
    other = copy.deepcopy(model).to(there)
    continued = kind(other)
    continued.load_state_dict(opt.state_dict())
    for x, y in batches[2:]:
        train(model, opt, x, y)
        train(other, continued, x, y)
    assert all(
        value.device.type == there.type
        for block in continued._blocks.values()
        for name, value in continued.state[block.weight].items()
        if name in {"input_factor", "grad_factor", "momentum_buffer"}
    )
    return snapshot(model), snapshot(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_on_the_cpu_goes_on_elsewhere(kind: type[st.KFAC], device: torch.device) -> None:
    assert_same(*resumed(kind, device))


# -- waiting for the device ------------------------------------------------------------------------

# Reads that make the host wait for a device.
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__"}


class _Reads(TorchFunctionMode):
    """Counts what would be a wait if the tensors were on another device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """A list that holds a string for every wait of the block, when it has ended."""
    found: list[str] = []
    if device.type == "cpu":
        with _Reads(found):
            yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


def waits_of_a_step(kind: type[st.KFAC], depth: int, device: torch.device, period: int, **options: Any) -> int:
    """Waits in a step that decomposes nothing: the third updates the factors, the fourth does so at period 1 only."""
    model = mlp(depth).to(device)
    opt = kind(model, factor_update_steps=period, **options)
    x, y = (t.to(device) for t in batch(0, 32, 8))
    for _ in range(period + 1):
        train(model, opt, x, y)
    with waits(device) as found:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert opt.diagnostics is not None
    assert opt.diagnostics.num_decompositions == 0
    assert len(opt._blocks) == depth
    return len(found)


@pytest.mark.parametrize("period", [1, 2], ids=["updating", "plain"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_wait_once_per_layer(
    kind: type[st.KFAC], solver: str, period: int, device: torch.device
) -> None:
    shallow, deep = (waits_of_a_step(kind, depth, device, period, solver=SOLVERS[solver]) for depth in (2, 8))
    assert shallow > 0  # the step reads whether it is finite: otherwise nothing is counted here
    assert deep == shallow


# -- mixed precision -------------------------------------------------------------------------------


def moved_under(
    device: torch.device, dtype: torch.dtype | None, kind: type[st.KFAC]
) -> tuple[list[Tensor], st.KFAC, list[Tensor]]:
    """What two steps move under autocast to a dtype, with the optimizer and the parameters before."""
    model = mlp(width=16).to(device)
    opt = kind(model, lr=0.1, damping=0.1, momentum=0.0, kl_clip=None, factor_update_steps=1)
    before = snapshot(model)
    for step in range(2):
        x, y = (t.to(device) for t in batch(step, 64, 16))
        opt.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
    return [after - b for after, b in zip(snapshot(model), before, strict=True)], opt, before


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_takes_nearly_the_same_steps(kind: type[st.KFAC], device: torch.device) -> None:
    exact, opt, _ = moved_under(device, None, kind)
    rounded, low, _ = moved_under(device, torch.bfloat16, kind)
    for name, pair in factors(opt).items():
        for a, b in zip(pair, factors(low)[name], strict=True):
            assert b.dtype == torch.float32
            assert (a - b).norm() < 0.03 * a.norm()
    assert any(not torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))
    for block in opt._blocks.values():
        index = [id(p) for p in opt._model.parameters()].index(id(block.weight))
        assert (exact[index] - rounded[index]).norm() < 0.05 * exact[index].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_with_float16_skips_infinity_and_then_takes_the_step(
    kind: type[st.KFAC], device: torch.device
) -> None:
    options: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "kl_clip": None}
    model, plain = mlp(width=16).to(device), mlp(width=16).to(device)
    opt, reference = kind(model, **options), kind(plain, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-30)
    x, y = (t.to(device) for t in batch(0, 64, 16))
    before = snapshot(model)
    for infinite in (True, False):
        opt.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0**10  # gradients of float16 do not hold 2 ** 40
        assert (opt.diagnostics is None) == infinite
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True)) == infinite
    train(plain, reference, x, y)
    for block in reference._blocks.values():
        name = block.names[0]
        start = dict(zip(dict(model.named_parameters()), before, strict=True))[name]
        ours, theirs = (dict(m.named_parameters())[name].detach() - start for m in (model, plain))
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    for name, pair in factors(reference).items():
        for a, b in zip(pair, factors(opt)[name], strict=True):
            assert (a - b).norm() < 0.02 * a.norm()


# -- products of full precision --------------------------------------------------------------------


def seen_by_layers(model: nn.Module, backward: Callable[[], None]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every Linear layer in a forward and backward, as the layers saw them."""
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, out: Tensor) -> None:
        inputs[name] = x.detach()
        out.register_hook(lambda g: grads.update({name: g.detach()}))

    handles = [
        layer.register_forward_hook(lambda _m, args, out, name=name: note(name, args[0], out))
        for name, layer in model.named_modules()
        if isinstance(layer, L)
    ]
    backward()
    for handle in handles:
        handle.remove()
    return {name: (inputs[name], grads[name]) for name in inputs}


def worst_error(device: torch.device, backward: Callable[[nn.Module, Tensor, Tensor], None]) -> float:
    """Largest relative error of a factor against float64 products of the very tensors that the layers saw."""
    model = mlp(width=64).to(device)
    opt = st.KFAC(model, lr=0.0, kl_clip=None)
    x, y = (t.to(device) for t in batch(0, 16, 64))
    seen = seen_by_layers(model, lambda: backward(model, x, y))
    opt.step()
    worst = 0.0
    for name, (a, s) in factors(opt).items():
        inputs, grads = (part.double() for part in seen[name])
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        for found, exact in ((a, inputs.T @ inputs / 16), (s, grads.T @ grads * 16)):
            assert found.dtype == torch.float32
            worst = max(worst, float((found.double() - exact).norm() / exact.norm()))
    return worst


def test_factors_are_formed_in_full_precision_where_the_backward_runs_under_autocast(device: torch.device) -> None:
    def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            F.cross_entropy(model(x), y).backward()

    assert worst_error(device, backward) < 1e-6


@pytest.fixture
def tf32(cuda: torch.device) -> Iterator[torch.device]:
    """A CUDA device whose float32 products are rounded."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield cuda
    finally:
        matmul.allow_tf32 = before


@pytest.mark.gpu
def test_tf32_does_not_reach_the_factors(tf32: torch.device) -> None:
    x, _ = batch(0, 64, 64)
    there, exact = x.to(tf32), x.double().T @ x.double()
    rounding = float(((there.T @ there).cpu().double() - exact).norm() / exact.norm())
    if rounding < 1e-5:
        pytest.skip("this CUDA device has no TF32")
    assert worst_error(tf32, lambda model, x, y: F.cross_entropy(model(x), y).backward()) < 1e-6
