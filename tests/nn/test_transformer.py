"""The small transformers: their sizes, their arithmetic written out a second time, the engine and the optimizers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from attending import layer_by_hand
from steepest.errors import InvalidOptionError
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.softmax import SoftmaxAttention
from steepest.nn.transformer import SequenceTransformer, VisionTransformer

ATTENTIONS = ("softmax_free", "softmax")
WIDTH = 8
MAKES: dict[str, Callable[..., nn.Module]] = {
    # 4 x 3 patches after padding, and a grid of 2 x 2 landmarks
    "images": lambda **o: VisionTransformer(2, 3, (7, 5), **{"dim": WIDTH, "depth": 2, "heads": 2, **o}),
    # 3 landmarks for runs of 4 tokens
    "sequences": lambda **o: SequenceTransformer(2, 3, 12, **{"dim": WIDTH, "depth": 2, "heads": 2, **o}),
}
SHAPES = {"images": (2, 7, 5), "sequences": (12, 2)}
BOTH = pytest.mark.parametrize(("kind", "attention"), list(itertools.product(MAKES, ATTENTIONS)))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tiny(kind: str, **options: object) -> nn.Module:
    """A model in float64 whose weights are all away from where they start."""
    torch.manual_seed(1)
    model = MAKES[kind](**options).double()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
    return model


def made(kind: str, number: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(number, *SHAPES[kind], generator=generator, dtype=torch.float64)


# Shapes and sizes


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("size", "patch", "grid", "landmarks"),
    [
        ((8, 8), 2, (4, 4), 4),
        ((28, 28), 4, (7, 7), 12),
        ((32, 32), 4, (8, 8), 16),
        ((9, 12), 2, (5, 6), 7),
        ((1, 1), 2, (1, 1), 1),
        ((3, 100), 13, (1, 8), 2),
        ((224, 224), 28, (8, 8), 16),
    ],
)
def test_images_of_any_size_are_covered_by_few_patches(
    attention: str, size: tuple[int, int], patch: int, grid: tuple[int, int], landmarks: int
) -> None:
    model = VisionTransformer(3, 5, size, dim=16, depth=1, attention=attention)
    assert (model.patches.kernel_size, model.grid) == ((patch, patch), grid)
    outputs = model(torch.randn(2, 3, *size))
    assert outputs.shape == (2, 5)
    assert torch.isfinite(outputs).all()
    found = {m.num_landmarks for m in model.modules() if isinstance(m, SoftmaxFreeAttention)}
    assert found == ({landmarks} if attention == "softmax_free" else set())


@pytest.mark.parametrize(
    ("dim", "heads"), [(1, 1), (8, 1), (16, 1), (31, 1), (32, 2), (40, 2), (48, 3), (50, 2), (64, 4), (97, 1)]
)
def test_heads_divide_the_width_and_hold_sixteen_features_or_more(dim: int, heads: int) -> None:
    for attention in ATTENTIONS:
        model = SequenceTransformer(1, 2, 5, dim=dim, depth=1, attention=attention)
        assert [m.num_heads for m in model.modules() if hasattr(m, "num_heads")] == [heads]


@pytest.mark.parametrize(("length", "landmarks"), [(1, 1), (5, 1), (8, 2), (196, 49), (3072, 49)])
def test_a_sequence_has_a_landmark_for_every_four_tokens_up_to_49(length: int, landmarks: int) -> None:
    model = SequenceTransformer(2, 3, length, dim=4, depth=1)
    assert [m.num_landmarks for m in model.modules() if isinstance(m, SoftmaxFreeAttention)] == [landmarks]
    assert model(torch.randn(2, length, 2)).shape == (2, 3)


def test_the_parameters_are_those_of_the_formula() -> None:
    d, depth, heads, hidden = 32, 3, 2, 64
    common = 2 * d + (d + 1) * 10  # last norm and head
    block = 4 * d + (d + 1) * hidden + (hidden + 1) * d
    projection = d * d + d
    image, sequence = (3 * 4 * 4 + 1) * d + 64 * d, 2 * d + 784 * d
    for attention, each in (("softmax_free", 3 * projection + heads), ("softmax", 4 * projection)):
        blocks = depth * (block + each)
        assert count(VisionTransformer(3, 10, (32, 32), dim=d, depth=depth, attention=attention)) == (
            image + blocks + common
        )
        assert count(SequenceTransformer(1, 10, 784, dim=d, depth=depth, attention=attention)) == (
            sequence + blocks + common
        )


@pytest.mark.parametrize("kind", MAKES)
def test_the_twins_differ_in_keys_and_widths_of_the_kernel_alone(kind: str) -> None:
    soft, plain = (
        {name: p.shape for name, p in tiny(kind, attention=attention).named_parameters()} for attention in ATTENTIONS
    )
    assert {name: shape for name, shape in soft.items() if "log_bandwidth" not in name} == {
        name: shape for name, shape in plain.items() if ".k_proj." not in name
    }
    assert len(soft) + 2 == len(plain)  # one against weight and bias, in two blocks


# The arithmetic


def softmax_by_hand(layer: SoftmaxAttention, tokens: Tensor) -> Tensor:
    """Ordinary attention for one sequence, head by head."""
    outputs, width = [], tokens.shape[1] // layer.num_heads
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        query, key, value = (
            tokens @ projection.weight[part].T + projection.bias[part]
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        weights = (query @ key.T / math.sqrt(width)).exp()
        outputs.append(weights / weights.sum(1, keepdim=True) @ value)
    return torch.cat(outputs, 1) @ layer.out_proj.weight.T + layer.out_proj.bias


def by_hand(model: nn.Module, kind: str, sample: Tensor) -> Tensor:
    """One sample through everything that is not attention, in the open."""
    values = dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * values[f"{name}.weight"] + values[f"{name}.bias"]

    size, grid = ((4, 3), (2, 2)) if kind == "images" else (None, None)
    if kind == "images":
        padded = torch.zeros(2, 8, 6, dtype=sample.dtype)
        padded[:, :7, :5] = sample
        patches = [padded[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for i in range(4) for j in range(3)]
        x = torch.stack(patches) @ values["patches.weight"].flatten(1).T + values["patches.bias"]
    else:
        x = linear(sample, "embed")
    x = x + values["encoder.position"]
    for number, block in enumerate(model.encoder.blocks):
        before = norm(x, f"encoder.blocks.{number}.norm1")
        soft = isinstance(block.attention, SoftmaxFreeAttention)
        mixed = layer_by_hand(block.attention, before, size=size, grid=grid) if soft else None
        x = x + (softmax_by_hand(block.attention, before) if mixed is None else mixed)
        inner = linear(norm(x, f"encoder.blocks.{number}.norm2"), f"encoder.blocks.{number}.mlp.0")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = x + linear(inner, f"encoder.blocks.{number}.mlp.2")
    return linear(norm(x, "encoder.norm").mean(0, keepdim=True), "encoder.head")[0]


@BOTH
def test_the_outputs_are_those_of_the_same_arithmetic_written_out(kind: str, attention: str) -> None:
    # 4 landmarks of 12 patches are a grid of 2 x 2, of 12 tokens they are runs of 3.
    model, samples = tiny(kind, attention=attention, num_landmarks=4), made(kind)
    expected = torch.stack([by_hand(model, kind, sample) for sample in samples])
    torch.testing.assert_close(model(samples), expected)


def test_softmax_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    layer, peer = SoftmaxAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        peer.in_proj_bias.copy_(torch.cat([p.bias for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        peer.out_proj.load_state_dict(layer.out_proj.state_dict())
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    out, weights = layer(tokens)
    torch.testing.assert_close(out, peer(tokens, tokens, tokens, need_weights=False)[0])
    assert weights is None


# The engine and the optimizers

# A shift of all queries by one vector moves tokens and landmarks alike, and one of all keys leaves a softmax.
WITHOUT_EFFECT = {"softmax_free": "q_proj.bias", "softmax": "k_proj.bias"}


def losses(model: nn.Module, kind: str) -> Callable[[], Tensor]:
    samples = made(kind).to(next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(samples), torch.tensor([0, 1, 2, 0]), reduction="none")


@BOTH
def test_the_engine_gives_what_one_backward_per_row_gives(kind: str, attention: str) -> None:
    model = tiny(kind, attention=attention)
    closure, found = losses(model, kind), []
    for capture in (st.Capture(model), st.ReferenceCapture(model)):
        with capture:
            rows = closure()
        found.append(capture.jacobian(rows))
    fast, slow = found
    assert fast.names == slow.names == tuple(name for name, _ in model.named_parameters())
    torch.testing.assert_close(fast.to_dense(), slow.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.gram(), slow.gram(), rtol=1e-10, atol=1e-12)
    dead = {name for name, rows in slow.per_sample_grads().items() if rows.abs().max() < 1e-6}
    assert dead == {f"encoder.blocks.{number}.attention.{WITHOUT_EFFECT[attention]}" for number in range(2)}


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "lpsgdm": lambda model: st.LPSGDM(model.parameters(), lr=2e-2),
    "kfac": lambda model: st.KFAC(model, lr=0.1, damping=0.03),
    "fop": lambda model: st.FOP(model, lr=0.1, damping=0.03),
    "sven": lambda model: st.Sven(model, lr=0.3, solver=st.Damped(damping=0.1)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@BOTH
def test_every_optimizer_trains_every_parameter_that_has_an_effect(kind: str, attention: str, optimizer: str) -> None:
    model = tiny(kind, attention=attention).float()
    closure = losses(model, kind)
    before, first = {name: p.clone() for name, p in model.named_parameters()}, closure().mean().item()
    chosen = OPTIMIZERS[optimizer](model)
    for _ in range(20):
        if optimizer == "sven":
            chosen.step(closure)
        else:
            chosen.zero_grad()
            closure().mean().backward()
            chosen.step()
    assert closure().mean().item() < 0.5 * first
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in still if not name.endswith(WITHOUT_EFFECT[attention])} == set()


@BOTH
def test_an_output_depends_on_its_own_sample_alone(kind: str, attention: str) -> None:
    model, samples = tiny(kind, attention=attention), made(kind)
    together = model(samples)
    torch.testing.assert_close(together, torch.cat([model(sample.unsqueeze(0)) for sample in samples]))


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0: give an integer of at least 1"),
        ({"depth": 0}, "depth=0: give an integer of at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0: give an integer of at least 1"),
        ({"heads": 3}, "num_heads=3 does not divide embed_dim=8: give one that does"),
        ({"attention": "linear"}, "attention='linear': choose one of 'softmax_free', 'softmax'"),
        ({"num_landmarks": 0}, "num_landmarks=0: give an integer of at least 1"),
    ],
)
@pytest.mark.parametrize("kind", MAKES)
def test_what_makes_no_transformer_is_told(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        MAKES[kind](**options)


def test_the_softmax_twin_refuses_the_same_heads() -> None:
    with pytest.raises(InvalidOptionError, match="num_heads=3 does not divide embed_dim=8"):
        MAKES["images"](heads=3, attention="softmax")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformer(0, 3, (4, 4)), "in_channels=0"),
        (lambda: VisionTransformer(1, 0, (4, 4)), "out_features=0"),
        (lambda: VisionTransformer(1, 3, (4, 0)), "image_size=0"),
        (lambda: VisionTransformer(1, 3, (4, 4), patch_size=0), "patch_size=0"),
        (lambda: SequenceTransformer(0, 3, 4), "in_features=0"),
        (lambda: SequenceTransformer(1, 3, 0), "length=0"),
    ],
)
def test_a_transformer_needs_inputs_and_outputs(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{message}: give an integer of at least 1"):
        make()


def test_an_image_has_two_sides() -> None:
    with pytest.raises(InvalidOptionError, match=r"image_size=\(3, 8, 8\): give height and width"):
        VisionTransformer(3, 10, (3, 8, 8))


@pytest.mark.parametrize(
    ("kind", "shape", "wanted"),
    [("images", (4, 2, 8, 5), r"\[B, 2, 7, 5\]"), ("sequences", (4, 11, 2), r"\[B, 12, 2\]")],
)
def test_inputs_of_another_size_are_refused(kind: str, shape: tuple[int, ...], wanted: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{kind} have the shape .*embedding of positions is for {wanted}"):
        MAKES[kind]()(torch.randn(shape))
