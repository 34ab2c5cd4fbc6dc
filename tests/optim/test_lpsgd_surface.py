"""LPSGD and LPSGDM: everything that users of torch.optim expect beside the update."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import steepest as st

Optimizers = Callable[..., Optimizer]
both = pytest.mark.parametrize("kind", [st.LPSGD, st.LPSGDM])


def grown(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype)) for size in sizes]
    for number, param in enumerate(params):
        param.grad = torch.linspace(-2, 0.5 + number, param.numel(), dtype=dtype)
    return params


class Peak(TorchDispatchMode):
    """Bytes of the tensors that were made and live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        import weakref

        if storage.data_ptr() in given or storage in self.known:
            return
        self.known[storage] = True
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def freed() -> None:
            self.alive -= size

        weakref.finalize(storage, freed)


@both
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("sizes", [[100_000] * 20, [5_000] * 400, [2_000_000]], ids=["20", "400", "1"])
def test_a_step_needs_less_memory_than_one_copy_of_the_parameters(
    kind: Optimizers, foreach: bool | None, sizes: list[int]
) -> None:
    params = grown(sizes)
    opt = kind(params, lr=0.1, p=3.0, weight_decay=0.1, foreach=foreach)
    opt.step()  # makes the momenta
    with Peak() as memory:
        opt.step()
    assert 0 < memory.peak < 0.3 * 4 * sum(sizes)


def test_the_measure_of_memory_sees_what_torchs_foreach_takes() -> None:
    params = grown([100_000] * 20)
    opt = torch.optim.AdamW(params, foreach=True)
    opt.step()
    with Peak() as memory:
        opt.step()
    assert memory.peak > 0.9 * 4 * 2_000_000


def test_the_state_is_the_momentum_and_nothing_else() -> None:
    params = grown([3, 5])
    opt = st.LPSGDM(params, lr=0.1)
    opt.step()
    assert [list(state) for state in opt.state_dict()["state"].values()] == [["momentum_buffer"]] * 2
    plain = st.LPSGD(params, lr=0.1)
    plain.step()
    assert plain.state_dict()["state"] == {}


@both
def test_gradients_are_left_as_they_were(kind: Optimizers) -> None:
    for foreach in (True, False):
        params = grown([4, 300_000, 7])
        before = [param.grad.clone() for param in params if param.grad is not None]
        versions = [param.grad._version for param in params if param.grad is not None]
        kind(params, lr=0.1, p=3.0, foreach=foreach, maximize=True).step()
        assert versions == [param.grad._version for param in params if param.grad is not None]
        assert all(torch.equal(a, p.grad) for a, p in zip(before, params, strict=True) if p.grad is not None)


@both
def test_parameters_without_a_gradient_are_passed_over(kind: Optimizers) -> None:
    params = grown([4, 5])
    params[0].grad = None
    before = params[0].detach().clone()
    opt = kind(params, lr=0.1)
    opt.step()
    assert torch.equal(params[0], before)
    assert params[0] not in opt.state
    params[1].grad = None
    opt.step()  # and one without any gradient is no step at all


@both
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_lr_and_p_may_be_tensors(kind: Optimizers, capturable: bool, p: float) -> None:
    a, b = grown([5, 70]), grown([5, 70])
    numbers = kind(a, lr=0.25, p=p, weight_decay=0.5)
    in_tensors = kind(b, lr=torch.tensor([0.25]), p=torch.tensor(p), weight_decay=0.5, capturable=capturable)
    for _ in range(3):
        numbers.step()
        in_tensors.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6 if capturable else 0, atol=1e-7 if capturable else 0)


@both
def test_a_capturable_step_reads_nothing_from_the_device(kind: Optimizers) -> None:
    # On the device "meta" there are no numbers: whoever reads one fails.
    params = [torch.nn.Parameter(torch.zeros(size, device="meta")) for size in (3, 40)]
    for param in params:
        param.grad = torch.zeros_like(param)
    scalars = {"lr": 0.1, "p": 3.0}
    opt = kind(params, **scalars, weight_decay=0.1, capturable=True)
    for group in opt.param_groups:
        group.update({name: torch.tensor(value, device="meta") for name, value in scalars.items()})
    opt.step()
    with pytest.raises(RuntimeError):
        kind(params, **scalars).step()  # which looks at the gradients


@both
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_a_differentiable_step_has_the_right_derivative(kind: Optimizers, p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    start, grad = (torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lr, order = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, p))

    def two_steps(start: Tensor, grad: Tensor, lr: Tensor, order: Tensor) -> Tensor:
        param = start.clone()
        with torch.no_grad():  # what the constructor checks is no part of the graph
            opt = kind([{"params": [param], "lr": 0.1, "p": p}], differentiable=True, weight_decay=0.1)
        opt.param_groups[0].update(lr=lr, p=order)
        for factor in (1.0, -0.3):
            param.grad = factor * grad
            opt.step()
        return param

    inputs = (start, grad, lr, order if p > 2 else order.detach())
    assert torch.autograd.gradcheck(two_steps, inputs)


@both
def test_a_compiled_capturable_step_is_the_step(kind: Optimizers) -> None:
    a, b = grown([5, 70]), grown([5, 70])
    plain, traced = kind(a, lr=0.25, p=3.0), kind(b, lr=0.25, p=3.0, capturable=True)
    step = torch.compile(traced.step, backend="eager")
    for _ in range(3):
        plain.step()
        step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing(unscale: bool) -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(model.weight, 0.5)
        torch.nn.init.constant_(model.bias, 0.1)
        opt = st.LPSGDM(model.parameters(), lr=0.1, p=4.0)
        for _ in range(3):
            opt.zero_grad()
            loss = model(torch.tensor([[1.0, -2.0, 3.0]])).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                opt.step()
                continue
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_grad_scaler_skips_steps_with_infinite_gradients() -> None:
    params = grown([3])
    opt, scaler = st.LPSGD(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    before = params[0].detach().clone()
    params[0].grad = torch.tensor([1.0, float("inf"), 0.0])
    scaler.step(opt)
    scaler.update()
    assert torch.equal(params[0], before)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_gradients_are_no_infinite_ones(dtype: torch.dtype) -> None:
    # Their norm overflows.
    param = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    param.grad = torch.full_like(param, torch.finfo(dtype).max / 2)
    st.LPSGD([param], lr=1e-6, p=4.0).step()
    assert bool(param.isfinite().all())
    assert bool((param <= 0).all())


@both
def test_one_bad_gradient_stops_the_step_of_all_groups(kind: Optimizers) -> None:
    params = grown([3, 4, 5], torch.float64)
    params[2].data = params[2].data.half()
    params[2].grad = torch.tensor([0, 0, float("nan"), 0, 0], dtype=torch.float16)
    opt = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    before, state = copy.deepcopy(params), copy.deepcopy(opt.state_dict())
    with pytest.raises(st.NonFiniteError, match="unchanged"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert opt.state_dict() == state


def test_who_wants_torchs_own_manners_gets_nan_into_the_parameters() -> None:
    params = grown([3])
    params[0].grad = torch.tensor([1.0, float("nan"), 0.0])
    st.LPSGD(params, lr=0.1, on_nonfinite="ignore").step()
    assert params[0].isnan().tolist() == [False, True, False]


def test_skipped_steps_are_counted_across_a_resume() -> None:
    params = grown([3])
    opt = st.LPSGDM(params, lr=0.1, on_nonfinite="skip")
    params[0].grad = torch.full((3,), torch.inf)
    with pytest.warns(RuntimeWarning, match="skipped") as warned:
        opt.step()
    assert warned[0].filename == __file__
    other = st.LPSGDM(grown([3]), lr=0.1, on_nonfinite="skip")
    other.load_state_dict(opt.state_dict())
    assert other.diagnostics.num_skipped == opt.diagnostics.num_skipped == 1
    other.step()  # a momentum of a parameter that has a count and no momentum yet
    assert "momentum_buffer" in other.state_dict()["state"][0]


def test_the_first_group_may_have_no_parameters() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    opt = st.LPSGD([{"params": []}, {"params": [x]}], on_nonfinite="skip")
    assert opt.diagnostics.num_skipped == 0
    x.grad = torch.tensor([1.0, torch.nan])
    with pytest.warns(RuntimeWarning, match="Step skipped"):
        opt.step()
    assert opt.diagnostics.num_skipped == 1


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"weight_decay": 0.3}])
def test_torchs_schedules_and_hands_may_change_a_group(change: dict[str, float]) -> None:
    a, b = grown([5]), grown([5])
    changed, made = st.LPSGD(a, lr=0.1), st.LPSGD(b, **{"lr": 0.1, **change})
    changed.param_groups[0].update(change)
    changed.step()
    made.step()
    assert torch.equal(a[0], b[0])
