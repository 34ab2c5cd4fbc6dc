"""What the engine cannot do exactly it refuses: by qualified name, with the reason and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steepest as st
from capturing import capture_rows
from oracles import jacobian, reduction_errors, trainable
from steepest.errors import CaptureError, UnsupportedModelError
from zoo import Net
from zoo_parts import param, rows_of

Teaches = Callable[[Exception], None]
L = nn.Linear


class Scale(torch.autograd.Function):
    """A product that no torch function sees."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


@dataclass(frozen=True)
class Misuse:
    """A closure that must be refused when captured: its message says these words."""

    says: str
    run: Callable[[Net, Tensor], Tensor]
    members: Callable[[], dict[str, nn.Module | Tensor]] = lambda: {"a": L(5, 4), "b": L(4, 3)}
    shape: tuple[int, ...] = (6, 5)

    def model(self) -> Net:
        return Net(self.run, **self.members()).double()


def centred(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    return rows_of(n.b(h - h.mean(0)))


def contrastive(n: Net, x: Tensor) -> Tensor:
    z = F.normalize(n.b(n.a(x)), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")


def attention_over_the_batch(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    return rows_of(n.b(torch.softmax(h @ h.T, 1) @ h))


def functional_batch_norm(n: Net, x: Tensor) -> Tensor:
    return rows_of(n.b(F.batch_norm(n.a(x), None, None, training=True)))


def minus_the_mean(n: Net, x: Tensor) -> Tensor:
    """The sum of these rows has no gradient at all."""
    losses = rows_of(n.b(n.a(x)))
    return losses - losses.mean()


def without_grad(n: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = n.a(x)
    return rows_of(n.b(h))


def reentrant(n: Net, x: Tensor) -> Tensor:
    return rows_of(n.b(checkpoint(n.a, n.first(x), use_reentrant=True)))


def edited_input(n: Net, x: Tensor) -> Tensor:
    x = x.clone()
    rows = rows_of(n.b(n.a(x)))
    x.mul_(2)
    return rows


def edited_activation(n: Net, x: Tensor) -> Tensor:
    h = n.a(x)
    rows = rows_of(n.b(h))
    h.zero_()
    return rows


def edited_through_a_view(n: Net, x: Tensor) -> Tensor:
    x = x.clone()
    rows = rows_of(n.b(n.a(x)))
    x[0, :2].zero_()
    return rows


INTERACT = "(?i)interact|mix|depend|other row|other sample"
CAPTURE: dict[str, Misuse] = {
    "centred_over_the_batch": Misuse(INTERACT, centred),
    "contrastive": Misuse(INTERACT, contrastive),
    "attention_over_the_batch": Misuse(INTERACT, attention_over_the_batch),
    "functional_batch_norm": Misuse(INTERACT + "|batch_norm", functional_batch_norm),
    "losses_minus_their_mean": Misuse(INTERACT, minus_the_mean),
    "losses_accumulated": Misuse(INTERACT, lambda n, x: rows_of(n.b(n.a(x))).cumsum(0)),
    "layer_norm_over_the_batch": Misuse(
        INTERACT + "|norm",
        lambda n, x: rows_of(n.norm(n.a(x).T).T),
        lambda: {"a": L(5, 4), "norm": nn.LayerNorm(6)},
    ),
    "layer_norm_over_everything": Misuse(
        INTERACT + "|norm",
        lambda n, x: rows_of(n.norm(n.a(x))),
        lambda: {"a": L(5, 4), "norm": nn.LayerNorm((6, 4))},
    ),
    "custom_function": Misuse(
        "scale",
        lambda n, x: rows_of(Scale.apply(n.a(x), n.scale)),
        lambda: {"a": L(5, 4), "scale": param(4)},
    ),
    "einsum": Misuse(
        "einsum",
        lambda n, x: rows_of(torch.einsum("bi,ij->bj", x, n.w)),
        lambda: {"w": param(5, 4)},
    ),
    "tensordot": Misuse(
        "tensordot", lambda n, x: rows_of(torch.tensordot(x, n.w, 1)), lambda: {"w": param(5, 4)}
    ),
    "functional_bilinear": Misuse(
        "bilinear", lambda n, x: rows_of(F.bilinear(x, x, n.w)), lambda: {"w": param(3, 5, 5)}
    ),
    "kron": Misuse(
        "(?i)kron|param|'w'|\\bw\\b",
        lambda n, x: rows_of(torch.kron(x, n.w)[: len(x)]),
        lambda: {"w": param(1, 4)},
    ),
    "only_under_no_grad": Misuse(r"(?i)\ba\.weight|no_grad", without_grad),
    "reentrant_checkpoint": Misuse(
        r"(?i)reentrant|checkpoint|no_grad|a\.weight",
        reentrant,
        lambda: {"first": L(5, 5), "a": L(5, 4), "b": L(4, 3)},
    ),
    "reentrant_checkpoint_of_a_shared_layer": Misuse(
        r"(?i)reentrant",
        lambda n, x: rows_of(n.b(checkpoint(n.a, n.a(x), use_reentrant=True))),
        lambda: {"a": L(5, 5), "b": L(5, 3)},
    ),
    "input_edited": Misuse("(?i)in.place", edited_input),
    "activation_edited": Misuse("(?i)in.place", edited_activation),
    "input_edited_through_a_view": Misuse("(?i)in.place", edited_through_a_view),
    "backward_inside": Misuse(
        r"backward\(\)", lambda n, x: (rows := rows_of(n.b(n.a(x)))).sum().backward(retain_graph=True) or rows
    ),
    "grad_inside": Misuse(
        r"\bgrad\(\)",
        lambda n, x: (
            rows := rows_of(n.b(n.a(x))),
            torch.autograd.grad(rows.sum(), n.a.weight, retain_graph=True, allow_unused=True),
        )[0],
    ),
    "scalar": Misuse("(?i)unreduced|scalar|1-D|one.dim|shape", lambda n, x: rows_of(n.b(n.a(x))).mean()),
    "three_dimensional": Misuse(
        r"\(batch, K\)", lambda n, x: rows_of(n.b(n.a(x))).view(-1, 1, 1)
    ),
    "detached": Misuse("(?i)detach|graph|grad", lambda n, x: rows_of(n.b(n.a(x))).detach()),
    "integers": Misuse("(?i)float|dtype|grad", lambda n, x: n.b(n.a(x)).argmax(1)),
    "not_a_tensor": Misuse("(?i)tensor", lambda n, x: rows_of(n.b(n.a(x))).tolist()),
    "too_few_rows": Misuse("(?i)row", lambda n, x: rows_of(n.b(n.a(x)))[:4]),
    "too_many_rows": Misuse(
        "(?i)row|depend", lambda n, x: torch.cat([r := rows_of(n.b(n.a(x))), r[:2]])
    ),
    "no_parameter_used": Misuse("(?i)param|graph|grad", lambda n, x: rows_of(x.requires_grad_(True) * 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTURE)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_refused_at_capture(name: str, teaches: Teaches) -> None:
    misuse = CAPTURE[name]
    model, x = misuse.model(), torch.randn(misuse.shape, dtype=torch.float64)
    capture = st.Capture(model)
    with pytest.raises((UnsupportedModelError, CaptureError), match=misuse.says) as caught:
        capture_rows(capture, lambda: misuse.run(model, x))
    teaches(caught.value)
    assert all(p.grad is None for p in model.parameters())

    with capture:  # and the capture still works
        rows = rows_of(model.a(x)) if hasattr(model, "a") and name != "reentrant_checkpoint" else None
    if rows is not None:
        capture.jacobian(rows).gram()


REFERENCE = ("centred_over_the_batch", "contrastive", "losses_minus_their_mean", "einsum", "custom_function")


@pytest.mark.parametrize("name", REFERENCE)
def test_the_remedy_works(name: str) -> None:
    """ReferenceCapture, which the refusals name, gives the truth on the refused closure."""
    misuse = CAPTURE[name]
    model, x = misuse.model(), torch.randn(misuse.shape, dtype=torch.float64)
    capture = st.ReferenceCapture(model)
    with capture:
        rows = misuse.run(model, x)
    errors = reduction_errors(capture.jacobian(rows), jacobian(lambda: misuse.run(model, x), trainable(model)))
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("name", ["scalar", "three_dimensional", "detached", "integers", "not_a_tensor"])
def test_the_reference_refuses_what_are_no_rows(name: str) -> None:
    misuse = CAPTURE[name]
    model, x = misuse.model(), torch.randn(misuse.shape, dtype=torch.float64)
    with pytest.raises(CaptureError, match=misuse.says):
        capture_rows(st.ReferenceCapture(model), lambda: misuse.run(model, x))
