"""Kronecker factors and sketches: the reductions that later optimizers read."""

import pytest
import torch
from torch import Tensor, nn

import steepest as st


def jacobian(model: nn.Module, inputs: Tensor) -> st.Jacobian:
    capture = st.Capture(model)
    with capture:
        rows = model(inputs).flatten(1).square().sum(1)
    return capture.jacobian(rows)


LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (1, 3)),
    "no_bias": (lambda: nn.Linear(3, 2, bias=False), (1, 3)),
    "conv_one_position": (lambda: nn.Conv2d(2, 3, 3), (1, 2, 3, 3)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_datum_is_exact(name: str, sharing: str) -> None:
    """A (x) S is then the outer product of the gradient with itself, bias joined to the weight's columns."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    jac = jacobian(layer, torch.randn(shape, dtype=torch.float64))
    ((names, factors),) = jac.kronecker_factors(sharing).items()
    assert names == tuple(dict(layer.named_parameters()))
    grads = [grad[0].flatten(1) if grad.ndim > 2 else grad[0].unsqueeze(1) for grad in jac.per_sample_grads().values()]
    gradient = torch.cat(grads, 1).T.flatten()  # columns first: A (x) S acts on vec(weight)
    torch.testing.assert_close(torch.kron(factors.input_factor, factors.grad_factor), gradient.outer(gradient))


@pytest.mark.parametrize("copies", [2, 5])
def test_the_scale_does_not_depend_on_the_batch(copies: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(4, 6, 3)
    one, many = (jacobian(model, batch).kronecker_factors()["weight", "bias"] for batch in (x, x.repeat(copies, 1, 1)))
    torch.testing.assert_close(one.input_factor, many.input_factor)
    torch.testing.assert_close(one.grad_factor, many.grad_factor)


def test_layers_without_a_rule_have_no_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert list(jacobian(model, torch.randn(3, 4)).kronecker_factors()) == [("0.weight", "0.bias")]


def test_sharing_is_checked() -> None:
    with pytest.raises(st.InvalidOptionError, match="sharing='sum'"):
        jacobian(nn.Linear(2, 1), torch.randn(3, 2)).kronecker_factors("sum")


def test_sketches_get_every_row_by_parameter() -> None:
    seen: dict[str, Tensor] = {}

    class Keep:
        def insert(self, blocks: dict[str, Tensor]) -> None:
            seen.update(blocks)

    jac = jacobian(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
    jac.sketch_into(Keep())
    torch.testing.assert_close(torch.cat([seen[name] for name in jac.names], 1), jac.to_dense())
