"""Rows of any derivatives by one backward, against one backward for each row; and what it may take of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steepest as st
from oracles import entry_truth, to_double
from steepest.engine import owners, reference
from steepest.engine.reference import gradients, graph_bytes
from steepest.errors import CaptureError, InvalidOptionError
from zoo import ZOO, Entry

D = torch.float64
Closure = Callable[[nn.Module], Tensor | dict[str, Tensor]]


def mlp(width: int = 8, inputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).double()


def points(count: int = 7, seed: int = 1) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


def slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    first = slopes(u, x)
    return slopes(first[:, 0], x)[:, 0] + slopes(first[:, 1], x)[:, 1]


def equation(model: nn.Module) -> Tensor:
    x = points()
    u = model(x)
    return laplacian(u, x) + 3 * u[:, 0] ** 2


def third_order(model: nn.Module) -> Tensor:
    x = points()
    return slopes(laplacian(model(x), x), x)[:, 1]


def blocks(model: nn.Module) -> dict[str, Tensor]:
    x, edge = points(), points(3, seed=2)
    u = model(x)
    return {"equation": laplacian(u, x), "edge": 20 * model(edge)[:, 0], "mean of two": model(x)[:, 0] * u[:, 0]}


def slices_of_one_call(model: nn.Module) -> dict[str, Tensor]:
    x = points(9)
    u = model(x)
    return {"edge": u[6:, 0], "equation": laplacian(u, x)[:6]}


def joined_and_out_of_order(model: nn.Module) -> Tensor:
    x, edge = points(), points(3, seed=2)
    rows = torch.cat([model(edge)[:, 0], slopes(model(x), x)[:, 0]])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))]


def periodic(model: nn.Module) -> Tensor:
    return (model(points()) - model(points() + 1))[:, 0]


def vectors(model: nn.Module) -> Tensor:
    x = points()
    u = model(x)
    return torch.stack([laplacian(u, x), u[:, 0], slopes(u, x)[:, 1]], 1)


ALONE: list[Closure] = [
    equation, third_order, blocks, slices_of_one_call, joined_and_out_of_order, periodic, vectors,
]  # fmt: skip


def shared(model: nn.Module) -> Tensor:
    u = model(points())[:, 0]
    return u - u.roll(1)


def cancelling(model: nn.Module) -> Tensor:
    u = model(points(1))[:, 0]
    return torch.cat([u, -u])


def by_the_batch(model: nn.Module) -> Tensor:
    x = points()
    u = model(x)[:, 0]
    return u - u.mean() + laplacian(u, x)


def of_a_layer(model: nn.Module) -> Tensor:
    """Parameters that the closure uses beside the call of the model."""
    x = points()
    inside = model.get_submodule("0")(x).square().sum(1)
    return slopes(inside, x)[:, 0] + model(x)[:, 0] * model.get_parameter("4.bias")


SHARED: list[Closure] = [shared, cancelling, by_the_batch, of_a_layer]


def taken(capture: st.ReferenceCapture, closure: Closure, model: nn.Module) -> Tensor:
    with capture:
        rows = closure(model)
    return capture.jacobian(rows).to_dense()


def check(closure: Closure, model: nn.Module, max_memory: int = 1 << 28) -> None:
    """The same Jacobian as by one backward for each row, and a model that is as it was."""
    forward = model.forward
    found = taken(st.BatchedCapture(model, max_memory=max_memory), closure, model)
    wanted = taken(st.ReferenceCapture(model), closure, model)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert "forward" not in vars(model)
    assert model.forward == forward


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were differentiated one by one."""
    counts: list[int] = []
    one = torch.autograd.grad

    def counted(outputs: Tensor, *args: object, **kwargs: object) -> object:
        counts.append(1)
        return one(outputs, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return counts


@pytest.mark.parametrize("max_memory", [1 << 28, 1 << 15, 1])
@pytest.mark.parametrize("closure", ALONE)
def test_rows_of_samples_of_their_own_are_those_of_one_backward_each(closure: Closure, max_memory: int) -> None:
    check(closure, mlp(), max_memory)


@pytest.mark.parametrize("closure", SHARED)
def test_rows_that_share_samples_or_parameters_are_as_right(closure: Closure) -> None:
    check(closure, mlp())


def test_many_rows_take_as_many_backwards_as_few(backwards: list[int]) -> None:
    model, found = mlp(), []
    for count in (4, 400):
        capture = st.BatchedCapture(model)
        with capture:
            x = points(count)
            rows = laplacian(model(x), x)
        backwards.clear()
        capture.jacobian(rows)
        found.append(len(backwards))
    assert found[0] == found[1] <= 3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_model_of_the_zoo_has_its_jacobian_and_is_left_as_it_was(entry: Entry) -> None:
    model, batch = to_double(*entry.build())
    before = {name: id(p) for name, p in model.named_parameters()}
    wanted = entry_truth(entry, model, batch)
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    capture = st.BatchedCapture(model)
    for _ in range(2):
        with capture:
            rows = entry.losses(model, batch)
        found = capture.jacobian(rows).per_sample_grads()
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-11 * scale)
    assert {name: id(p) for name, p in model.named_parameters()} == before


class WithCoefficient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.c = nn.Parameter(torch.tensor([0.7], dtype=D))
        self.unused = nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, x: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
        out: Tensor = scale * self.net(x)
        return out


def test_an_unknown_coefficient_of_the_closure_is_differentiated_too(backwards: list[int]) -> None:
    model = WithCoefficient()

    def rows(model: nn.Module) -> Tensor:
        x = points(50)
        return model.get_parameter("c") * laplacian(model(x), x) + 1

    check(rows, model)
    capture = st.BatchedCapture(model)
    with capture:
        found = rows(model)
    backwards.clear()
    jacobian = capture.jacobian(found)
    assert len(backwards) <= 4
    assert not jacobian.per_sample_grads()["unused"].any()


def test_tensors_and_numbers_by_name_reach_the_model() -> None:
    scale = torch.rand(7, 1, dtype=D)
    check(lambda model: model(points(), scale=scale)[:, 0], WithCoefficient())
    check(lambda model: model(points(), scale=3.0)[:, 0], WithCoefficient())
    check(lambda model: model(points(), scale=torch.tensor(3.0, dtype=D))[:, 0], WithCoefficient())


class OfTheBatch(nn.Module):
    """As a layer that normalises by the batch: alone, a sample would have another output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        u: Tensor = self.net(x)
        return u - u.mean(0)


class Pair(OfTheBatch):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.net(x), x


@pytest.mark.parametrize(
    ("model", "closure"),
    [
        (OfTheBatch(), lambda model: model(points())[:, 0]),
        (Pair(), lambda model: model(points())[0][:, 0]),
        (nn.Sequential(mlp(), nn.BatchNorm1d(1).double()), lambda model: model(points())[:, 0]),
        (nn.Sequential(nn.Unflatten(1, (2, 1)), nn.LSTM(1, 3, batch_first=True).double()),
         lambda model: model(points())[0].sum((1, 2))),
    ],
    ids=["batch", "tuple", "batch norm", "lstm"],
)  # fmt: skip
def test_models_that_cannot_be_vectorised_are_as_right(model: nn.Module, closure: Closure) -> None:
    check(closure, model)


def test_random_numbers_are_drawn_as_without_the_capture() -> None:
    model = nn.Sequential(mlp(), nn.Dropout(), nn.Linear(1, 3).double())
    found = []
    for capture in (st.BatchedCapture(model), st.ReferenceCapture(model)):
        torch.manual_seed(3)
        found.append(taken(capture, lambda model: model(points(20)).sum(1), model))
    assert torch.equal(found[0], found[1])


def test_frozen_parameters_and_chosen_ones_have_their_columns_alone() -> None:
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)
    check(equation, model)
    chosen = [model[2].weight]
    found = taken(st.BatchedCapture(model, params=chosen), equation, model)
    torch.testing.assert_close(found, taken(st.ReferenceCapture(model, params=chosen), equation, model))
    assert found.shape == (7, 64)


def test_tied_weights_have_one_gradient() -> None:
    model = mlp(2)
    model[2].weight = model[0].weight
    check(equation, model)


def test_hooks_run_once_and_the_model_is_itself_again_after_an_error() -> None:
    model, calls = mlp(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    taken(st.BatchedCapture(model), lambda model: model(points())[:, 0], model)
    assert calls == [1]
    capture = st.BatchedCapture(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capture:
        model(torch.ones(4, 3, dtype=D))
    assert "forward" not in vars(model)
    with pytest.raises(CaptureError, match="no recording"):
        capture.jacobian(model(points())[:, 0])


def test_a_forward_of_the_users_own_is_called_and_stays() -> None:
    model = mlp()
    plain = model.forward
    model.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    own = vars(model)["forward"]
    found = taken(st.BatchedCapture(model), equation, model)
    torch.testing.assert_close(found, taken(st.ReferenceCapture(model), equation, model))
    assert vars(model)["forward"] is own


def test_single_precision_is_as_near_as_it_can_be() -> None:
    model = mlp().float()

    def rows(model: nn.Module) -> Tensor:
        x = points(40).detach().float().requires_grad_()
        return laplacian(model(x), x)

    found, wanted = (taken(kind(model), rows, model) for kind in (st.BatchedCapture, st.ReferenceCapture))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_sven_takes_the_same_steps_with_it() -> None:
    models = []
    for kind in (st.BatchedCapture, st.ReferenceCapture):
        model = mlp()
        opt = st.Sven(model, rows="residuals", solver=st.LevenbergMarquardt(), capture=kind(model))
        losses = [float(opt.step(lambda model=model: blocks(model))) for _ in range(5)]
        assert losses[-1] < losses[0]
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*models, rtol=1e-7, atol=1e-9)


class Live(TorchDispatchMode):
    """Bytes that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def test_max_memory_bounds_what_is_alive_beside_the_result() -> None:
    model, count = mlp(64), 128
    size = sum(p.numel() * 8 for p in model.parameters())
    over = []
    for limit in (1 << 30, 1 << 22, 1 << 21, 1 << 20):
        capture = st.BatchedCapture(model, max_memory=limit)
        with capture:
            x = points(count)
            rows = laplacian(model(x), x)
        with Live() as live:
            jacobian = capture.jacobian(rows)
        over.append(live.most - count * size)
        assert jacobian.num_rows == count
        assert over[-1] <= limit + 8 * count * 64 * 8  # and a few tensors as large as a layer's output
    assert over[0] > 1 << 23  # the limits did something
    assert over[0] > over[1] > over[2] > over[3]


def test_shared_rows_are_vectorised_within_the_memory() -> None:
    model = mlp(32)
    rows = shared(model)
    params = list(model.parameters())
    one = graph_bytes(rows) + sum(p.numel() * 8 for p in params)
    for limit in (3 * one, 7 * one):
        with Live() as live:
            parts = [len(grads[0]) for _, grads in gradients(rows, params, limit)]
        assert parts == [limit // one] * (7 // (limit // one)) + [7 % (limit // one)] * bool(7 % (limit // one))
        assert live.most <= 2 * limit


class Stubborn(torch.autograd.Function):
    """Its backward looks at numbers, which vectorised ones do not have."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (2 if float(grad.abs().sum()) >= 0 else 3)


def test_a_node_without_a_vectorised_backward_is_differentiated_row_by_row() -> None:
    check(lambda model: Stubborn.apply(shared(model)), mlp())  # type: ignore[no-any-return]
    rows = Stubborn.apply(shared(mlp()))
    assert reference._several(rows, [], slice(0, 2)) is None


def test_a_sample_of_several_rows_has_no_owner() -> None:
    first, second = owners.probe(torch.ones(4, dtype=D), torch.Generator())
    ratios = second / first
    own = torch.eye(3, 4, dtype=D)  # samples x rows, one parameter per row
    pair = ([own * first], [own * second])
    assert owners.owners_of(*pair, ratios).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    both = own.clone()
    both[1, 3] = 1
    assert owners.owners_of([both * first], [both * second], ratios) is None
    alike = own.sum(1, keepdim=True) * (first[:1] + first[1:2])  # proportional, so no direction tells
    assert owners.owners_of([alike], [own.sum(1, keepdim=True) * (second[:1] + second[1:2])], ratios) is None
    assert owners.owners_of([own.float()], [own.float()], torch.ones(1 << 10)) is None  # too many to be told apart


def test_impossible_memory_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="max_memory"):
        st.BatchedCapture(mlp(), max_memory=0)
