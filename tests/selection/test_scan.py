"""A model held fixed: what is differentiated, what is put back, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader

from steepest.errors import CaptureError, InvalidOptionError, NonFiniteError, SteepestError, UnsupportedModelError
from steepest.selection.samples import Batch, Samples
from steepest.selection.scan import FixedModel

LOSS = nn.CrossEntropyLoss(reduction="none")


class Net(nn.Module):
    """A head defined before its trunk, dropout, batch norm, and no weight after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.trunk = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.between = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.between(self.trunk(x)).tanh()), 1)


@pytest.fixture
def net() -> Net:
    model = Net()
    model.trunk[1].running_mean.fill_(0.1)
    return model


@pytest.fixture
def batch() -> Batch:
    return next(Samples((torch.randn(7, 1, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0, 1]))).batches())


def per_sample(model: nn.Module, batch: Batch, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Per-sample gradients by torch.func, in eval mode."""
    model = copy.deepcopy(model).eval()
    rest = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    chosen = {n: rest.pop(n) for n in names}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**params, **rest}, (x[None],))
        return F.cross_entropy(outputs, y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(chosen, *batch.content)


SCOPES: list[tuple[Any, tuple[str, ...], str]] = [
    ("last", ("head.weight", "head.bias"), "head.weight"),
    (("between",), ("between.weight", "between.bias"), "between.weight"),
    ("trunk", ("trunk.0.weight", "trunk.0.bias", "trunk.1.weight", "trunk.1.bias"), "trunk.0.weight"),
    (("trunk.1",), ("trunk.1.weight", "trunk.1.bias"), ""),
    (("trunk.0", "head"), ("head.weight", "head.bias", "trunk.0.weight", "trunk.0.bias"), "head.weight"),
    ("all", tuple(name for name, _ in Net().named_parameters()), "head.weight"),
]


@pytest.mark.parametrize(("scope", "names", "last"), SCOPES)
def test_rows_are_the_gradients_of_the_scope_in_eval_mode(
    net: Net, batch: Batch, scope: Any, names: tuple[str, ...], last: str
) -> None:
    net.double()
    wide = Batch(batch.indices, (batch.content[0].double(), batch.content[1]), batch.labels)
    with FixedModel(net, scope, LOSS) as fixed:
        for _ in range(3):  # the scope is settled at the first batch, the probe does without at the third
            rows = fixed.rows(wide)
            assert rows.last == last
            assert rows.jacobian.names == names
            found = rows.jacobian.per_sample_grads()
            for name, wanted in per_sample(net, wide, names).items():
                torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)
    losses = LOSS(net.eval()(wide.content[0]), wide.content[1])
    torch.testing.assert_close(rows.losses, losses.detach())
    assert not rows.losses.requires_grad
    assert rows.indices is batch.indices
    assert rows.labels is batch.labels


def test_no_graph_is_built_outside_the_scope(net: Net, batch: Batch) -> None:
    seen: dict[str, bool] = {}

    def losses(model: nn.Module, content: Any) -> Tensor:
        assert isinstance(model, Net)
        features = model.trunk(content[0])
        seen["trunk"] = features.requires_grad
        outputs = model.head(model.between(features))
        seen["head"] = outputs.requires_grad
        return LOSS(outputs, content[1])

    with FixedModel(net, "last", batch_losses=losses) as fixed:
        fixed.rows(batch)
        assert seen == {"trunk": False, "head": True}


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "values": [tensor.clone() for tensor in model.state_dict().values()],
    }


def unchanged(before: dict[str, Any], model: nn.Module) -> bool:
    after = state(model)
    values = all(torch.equal(a, b) for a, b in zip(before.pop("values"), after.pop("values"), strict=True))
    grads = all(a is b for a, b in zip(before.pop("grads"), after.pop("grads"), strict=True))
    return values and grads and before == after


class Breaking(nn.CrossEntropyLoss):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError("the loss")


@pytest.mark.parametrize("scope", ["last", "all", ("between",)])
@pytest.mark.parametrize("loss", [LOSS, Breaking(reduction="none")])
def test_everything_is_put_back_after_errors_too(
    net: Net, batch: Batch, scope: Any, loss: nn.Module, world: Callable[[], dict[str, object]]
) -> None:
    net.train()
    net.trunk[1].eval()  # a flag of a child that differs from its parent's
    net.trunk[0].requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before, around, noise = state(net), world(), torch.get_rng_state()
    fixed = FixedModel(net, scope, loss)
    fingerprint = fixed.fingerprint
    for _ in range(2):  # one object serves several blocks
        try:
            with fixed:
                assert not any(module.training for module in net.modules())
                torch.rand(3)
                fixed.rows(batch)
        except ZeroDivisionError:
            assert isinstance(loss, Breaking)
        assert unchanged(dict(before), net)
        assert fixed.fingerprint == fingerprint
    assert world() == around
    assert torch.equal(torch.get_rng_state(), noise)


def test_the_callers_modes_do_not_change_the_rows(net: Net, batch: Batch) -> None:
    with FixedModel(net, "last", LOSS) as fixed:
        wanted = fixed.rows(batch).jacobian.to_dense()
        with torch.no_grad():
            assert torch.equal(fixed.rows(batch).jacobian.to_dense(), wanted)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            foreign = Batch(batch.indices, (batch.content[0].clone(), batch.content[1].clone()), batch.labels)
            assert torch.equal(fixed.rows(foreign).jacobian.to_dense(), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fixed.rows(batch).jacobian.to_dense(), wanted)
            assert torch.is_autocast_enabled("cpu")


def test_a_frozen_trunk_is_no_obstacle_and_a_frozen_head_is(
    net: Net, batch: Batch, teaches: Callable[[Exception], None]
) -> None:
    net.trunk.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    with FixedModel(net, "last", LOSS) as fixed:
        assert fixed.rows(batch).jacobian.names == ("head.weight",)
    net.head.requires_grad_(False)
    before = state(net)
    with (
        FixedModel(net, "last", LOSS) as fixed,
        pytest.raises(InvalidOptionError, match=r"'head.weight' is fr") as caught,
    ):
        fixed.rows(batch)
    teaches(caught.value)
    assert unchanged(before, net)
    for scope in ("head", ("between", "head")):
        with pytest.raises(InvalidOptionError, match="'head' is frozen") as caught:
            FixedModel(net, scope, LOSS)
        teaches(caught.value)
    with pytest.raises(InvalidOptionError, match="Net is frozen"):
        FixedModel(net.requires_grad_(False), "all", LOSS)


BAD_SCOPES: list[tuple[Any, str]] = [
    ("haed", "did you mean 'head'"),
    (("trunk", "betwen"), "no module 'betwen'; did you mean 'between'"),
    (("head.weight",), "no module 'head.weight'"),
    (("trunk.2",), "'trunk.2' is without parameters"),
    ((), "give 'last', 'all'"),
    (3, "give 'last', 'all'"),
    ((3,), "give 'last', 'all'"),
]


@pytest.mark.parametrize(("scope", "message"), BAD_SCOPES)
def test_impossible_scopes_are_refused(
    net: Net, scope: Any, message: str, teaches: Callable[[Exception], None]
) -> None:
    with pytest.raises(InvalidOptionError, match=message) as caught:
        FixedModel(net, scope, LOSS)
    teaches(caught.value)


BAD_LOSSES: list[tuple[Any, str]] = [
    (lambda o, y: LOSS(o, y).mean(), "reduced over the batch"),
    (lambda o, y: LOSS(o, y)[:3], r"shape \(3,\)"),
    (lambda o, y: (o - F.one_hot(y, 3)).square(), r"shape \(7, 3\)"),
    (lambda o, y: 1.0, "is a float"),
    (lambda o, y: LOSS(o.detach(), y), "detached"),
    (lambda o, y: o.argmax(1), "detached"),
]


@pytest.mark.parametrize(("loss", "message"), BAD_LOSSES)
def test_losses_that_are_not_one_for_each_sample_are_refused(
    net: Net, batch: Batch, loss: Any, message: str, teaches: Callable[[Exception], None]
) -> None:
    for scope in ("last", "all"):
        with FixedModel(net, scope, loss) as fixed, pytest.raises(SteepestError, match=message) as caught:
            fixed.rows(batch)
        teaches(caught.value)


def test_loss_and_batch_losses_are_checked_before_any_work(net: Net, teaches: Callable[[Exception], None]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "Neither loss_fn nor batch_losses"),
        ({"loss_fn": LOSS, "batch_losses": LOSS}, "Both loss_fn and batch_losses"),
        ({"loss_fn": nn.CrossEntropyLoss()}, "reduction='mean'"),
        ({"loss_fn": "cross entropy"}, "loss_fn is a str"),
        ({"batch_losses": 3}, "batch_losses is a int"),
    ]
    for options, message in cases:
        with pytest.raises(InvalidOptionError, match=message) as caught:
            FixedModel(net, **options)
        teaches(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_sample(
    net: Net, value: float, teaches: Callable[[Exception], None]
) -> None:
    inputs = torch.randn(9, 1, 4, 4)
    inputs[[6, 8]] = value
    samples = Samples((inputs, torch.zeros(9, dtype=torch.int64)), batch_size=4)
    first, second, _ = samples.batches()
    with FixedModel(net, "last", LOSS) as fixed:
        fixed.rows(first)
        with pytest.raises(NonFiniteError, match=r"sample 6 is nan") as caught:
            fixed.rows(second)
    teaches(caught.value)


def test_a_batch_that_is_no_pair_needs_batch_losses(net: Net, teaches: Callable[[Exception], None]) -> None:
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    for content, found in (({"x": x, "label": y}, "dict with the keys 'x', 'label'"), ((x, y, y), "tuple of 3")):
        batch = Batch(torch.arange(4), content, y)
        with FixedModel(net, "last", LOSS) as fixed, pytest.raises(InvalidOptionError, match=found) as caught:
            fixed.rows(batch)
        teaches(caught.value)
    batch = Batch(torch.arange(4), {"x": x, "label": y}, y)
    with FixedModel(net, "last", batch_losses=lambda m, b: LOSS(m(b["x"]), b["label"])) as fixed:
        assert fixed.rows(batch).jacobian.num_rows == 4


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.eval(), torch.zeros(1, 1, 4, 4))


BAD_MODELS: list[tuple[Callable[[], Any], str]] = [
    (lambda: torch.compile(Net()), "compiled or scripted"),
    (lambda: nn.Sequential(torch.compile(Net())), "Its part '0' is compiled"),
    (lambda: scripted(Net()), "compiled or scripted"),
    (lambda: nn.DataParallel(Net()), "is a DataParallel"),
    (lambda: Net().half(), r"'head.weight' is torch.float16"),
    (lambda: Net().bfloat16(), "is torch.bfloat16"),
    (lambda: nn.Sequential(nn.ReLU()), "has no parameters"),
    (lambda: nn.LazyLinear(3), "not initialised"),
    (lambda: Net().forward, "is a method"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("make", "message"), BAD_MODELS, ids=[message for _, message in BAD_MODELS])
def test_models_that_cannot_be_seen_through_are_refused(
    make: Callable[[], Any], message: str, teaches: Callable[[Exception], None]
) -> None:
    model = make()
    for scope in ("last", "all"):
        with pytest.raises(SteepestError, match=message) as caught:
            FixedModel(model, scope, LOSS)
        teaches(caught.value)


def test_a_model_compiled_in_place_runs_as_it_was_written(net: Net, batch: Batch) -> None:
    with FixedModel(net, "last", LOSS) as fixed:
        wanted = fixed.rows(batch).jacobian.to_dense()
    net.compile()
    compiled = net._compiled_call_impl
    with FixedModel(net, "last", LOSS) as fixed:
        assert torch.equal(fixed.rows(batch).jacobian.to_dense(), wanted)
    assert net._compiled_call_impl is compiled is not None


def test_samples_that_interact_are_refused(batch: Batch) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x.flatten(1))
            return out - out.mean(0)

    with (
        FixedModel(Mixing(), "last", LOSS) as fixed,
        pytest.raises(UnsupportedModelError, match="cannot be told apart"),
    ):
        fixed.rows(batch)


def test_rows_are_made_inside_the_block_only(net: Net, batch: Batch) -> None:
    fixed = FixedModel(net, "last", LOSS)
    with pytest.raises(CaptureError, match="not held fixed"):
        fixed.rows(batch)
    with fixed, pytest.raises(CaptureError, match="already"), fixed:
        pass
    assert net.training


def test_the_fingerprint_is_of_every_parameter_and_buffer(net: Net) -> None:
    fixed = FixedModel(net, "last", LOSS)
    found = {fixed.fingerprint}
    assert FixedModel(copy.deepcopy(net), "all", LOSS).fingerprint in found
    for name, tensor in net.state_dict().items():
        tensor.view(-1)[0] += 1
        assert fixed.fingerprint not in found, name
        found.add(fixed.fingerprint)
    assert {len(value) for value in found} == {64}


def test_layers_without_a_rule_outside_the_scope_are_no_obstacle() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0][:, -1])

    data = (torch.randn(6, 7, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    with FixedModel(Recurrent(), "last", LOSS) as fixed:
        rows = [fixed.rows(batch) for batch in Samples(data, batch_size=4).batches()]
    assert [r.jacobian.num_rows for r in rows] == [4, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_rows_do_not_depend_on_the_loader(net: Net) -> None:
    data = [(torch.randn(1, 4, 4), i % 3) for i in range(10)]
    found = []
    for loader in (
        DataLoader(data, batch_size=4),
        DataLoader(data, batch_size=4, shuffle=True, num_workers=1),
        DataLoader(data, batch_size=4, shuffle=True, num_workers=2, drop_last=True),
    ):
        with FixedModel(net, "all", LOSS) as fixed:
            found.append(torch.cat([fixed.rows(b).jacobian.to_dense() for b in Samples(loader).batches()]))
    assert found[0].shape[0] == 10
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
