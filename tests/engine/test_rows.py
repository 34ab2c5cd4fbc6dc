"""What may be a row: blocks, micro-batches, a single row, half precision, vanishing and undefined gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from capturing import capture_rows, check, exact_or_refused, mlp, points
from oracles import dense, entry_truth, jacobian, reduction_errors, trainable
from zoo import ZOO, Net
from zoo_parts import rows_of

L = nn.Linear
BY_NAME = {entry.name: entry for entry in ZOO}


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv2d", "layer_norm", "mha", "gpt_square", "position_td"])
def test_autocast(name: str) -> None:
    """bf16 products, float32 parameters: within bf16 rounding of the truth, and close to autograd's own."""
    entry = BY_NAME[name]
    model, inputs = entry.build(torch.float32)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return entry.losses(model, inputs).float()

    jac = capture_rows(model, closure)
    assert all(g.dtype == torch.float32 for g in jac.per_sample_grads().values())
    for truth, tolerance in (
        (entry_truth(entry, model, inputs), 6e-2),
        (jacobian(closure, trainable(model)), 3e-2),
    ):
        errors = reduction_errors(jac, truth)
        assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "conv2d", "layer_norm", "embedding", "position_td"])
def test_model_in_half_precision(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build(torch.bfloat16)
    jac = capture_rows(model, entry.closure(model, inputs))
    assert jac.gram().dtype == torch.float64
    check(jac, model, entry.closure(model, inputs), tolerance=3e-2)


@pytest.mark.parametrize("members", [1, 2, 3, 6])
def test_micro_batched_rows(members: int) -> None:
    model, x = mlp(), points()

    def closure() -> Tensor:
        return rows_of(model(x)).view(-1, members).mean(1)

    jac = capture_rows(model, closure)
    assert jac.num_rows == 6 // members
    check(jac, model, closure)


def test_micro_batched_sequences() -> None:
    entry = BY_NAME["gpt_square_embedded_positions"]
    model, (text,) = entry.build()

    def closure() -> Tensor:
        return entry.losses(model, (text,)).view(2, 2).mean(1)

    check(capture_rows(model, closure), model, closure)


def test_a_row_per_token() -> None:
    """Losses by token of a model that does not mix the positions of a sequence."""
    model, x = nn.Sequential(L(5, 4), nn.Tanh(), L(4, 3)).double(), torch.randn(3, 4, 5, dtype=torch.float64)

    def closure() -> Tensor:
        return rows_of(model(x).flatten(0, 1))

    exact_or_refused(model, model, closure)


@pytest.mark.parametrize("shared_use", [False, True], ids=["model_only", "with_bare_use"])
@pytest.mark.parametrize("sizes", [(4, 3, 2), (3, 3), (1, 5), (6, 1)], ids=str)
def test_blocks_equal_stacked_rows(sizes: tuple[int, ...], shared_use: bool) -> None:
    model = mlp()
    parts = {f"block{i}": points(n) for i, n in enumerate(sizes)}

    def blocks() -> dict[str, Tensor]:
        rows = {name: rows_of(model(x)) for name, x in parts.items()}
        if shared_use:
            rows["block0"] = rows["block0"] + model[0].weight.square().sum()
        return rows

    jac = capture_rows(model, blocks)
    assert jac.num_rows == sum(sizes)
    check(jac, model, blocks)


def test_blocks_of_different_layout() -> None:
    """Equal sizes, one block batch first and one sequence first: each has a layout of its own."""
    model = mlp()
    x, y = torch.randn(4, 4, 5, dtype=torch.float64), torch.randn(4, 4, 5, dtype=torch.float64)

    def blocks() -> dict[str, Tensor]:
        return {"batch_first": rows_of(model(x)), "sequence_first": rows_of(model(y).transpose(0, 1))}

    check(capture_rows(model, blocks), model, blocks)


def test_blocks_of_one_forward() -> None:
    """Interior and boundary points in one batch, split afterwards."""
    model, x = mlp(), points()

    def blocks() -> dict[str, Tensor]:
        out = model(x)
        return {"inside": rows_of(out[:4]), "edge": out[4:].square().sum(1)}

    exact_or_refused(model, model, blocks)


def test_blocks_with_different_parameters() -> None:
    model = Net(lambda n, x: x, a=L(5, 3), b=L(5, 2)).double()
    x, y = points(4), points(3)

    def blocks() -> dict[str, Tensor]:
        return {"first": rows_of(model.a(x)), "second": rows_of(model.b(y))}

    jac = capture_rows(model, blocks)
    check(jac, model, blocks)
    assert not jac.per_sample_grads()["a.weight"][4:].any()


@pytest.mark.parametrize("which", ["last_weight", "all", "dead_relu"])
def test_gradients_that_vanish(which: str) -> None:
    model = nn.Sequential(L(5, 6), nn.ReLU(), L(6, 3)).double()
    with torch.no_grad():
        if which == "dead_relu":
            model[0].bias.fill_(-100.0)
        for parameter in model.parameters() if which == "all" else [model[2].weight, model[2].bias]:
            if which != "dead_relu":
                parameter.zero_()
    x = points()
    jac = capture_rows(model, lambda: rows_of(model(x)))
    check(jac, model, lambda: rows_of(model(x)))
    assert not jac.per_sample_grads()["0.weight"].any()


@pytest.mark.parametrize(
    "name", ["one_layer", "gpt", "conv2d", "position_td", "regularised", "mha_sequence_first_square"]
)
def test_one_row(name: str) -> None:
    """R = 1 as the sum over a whole batch: every sample belongs to the only row."""
    entry = BY_NAME[name]
    model, inputs = entry.build()

    def closure() -> Tensor:
        return entry.losses(model, inputs).sum().view(1)

    jac = capture_rows(model, closure)
    check(jac, model, closure)
    truth = dense(jacobian(closure, trainable(model)))
    torch.testing.assert_close(jac.gram(), truth @ truth.T)


@pytest.mark.parametrize("name", ["mlp", "conv_frames", "mha_sequence_first", "gpt"])
def test_permuted_samples_permute_the_gram(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build()
    order = torch.randperm(len(inputs[0]))
    gram, permuted = (
        capture_rows(model, entry.closure(model, data)).gram() for data in (inputs, tuple(t[order] for t in inputs))
    )
    torch.testing.assert_close(permuted, gram[order][:, order])


@pytest.mark.parametrize("name", ["mlp", "linear_3d", "linear_3d_long", "conv2d", "conv_frames", "gpt"])
def test_float64_gram_of_a_float32_model_has_no_noise_floor(name: str) -> None:
    """A sample twice is a zero eigenvalue; the products of a float32 Gram would drown it at 1e-7."""
    entry = BY_NAME[name]
    model, inputs = entry.build(torch.float32)
    twice = tuple(torch.cat([t, t[:1]]) for t in inputs)
    values = torch.linalg.eigvalsh(capture_rows(model, entry.closure(model, twice)).gram())
    assert abs(values[0]) <= 1e-12 * values[-1]


def test_not_finite_is_not_hidden() -> None:
    """Rows with NaN are the optimizer's to refuse: the engine shows them and does not call them interacting."""
    model, x = mlp(), points()
    x[2] = float("nan")
    gram = capture_rows(model, lambda: rows_of(model(x))).gram()
    assert gram[2].isnan().all()
    assert gram[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]].isfinite().all()
