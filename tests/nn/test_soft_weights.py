"""Published weights of SOFT: names and shapes, what is refused, and the published formulas written out again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.errors import InvalidOptionError

Entries = dict[str, Tensor]
TINY = {"dims": (64, 128, 320, 512), "depths": (1, 2, 3, 2), "maps": (56, 28, 14, 7), "classes": 1000}
# Of the same kind, small enough to be computed entry by entry. Heads have 4 features.
SMALL = {"dims": (8, 8, 16, 16), "depths": (1, 2, 1, 2), "maps": (16, 8, 4, 2), "classes": 3}


def made_up(
    dims: tuple[int, ...], depths: tuple[int, ...], maps: tuple[int, ...], classes: int, *, features: int = 32
) -> Entries:
    """Random entries with the names and shapes of the authors' files, written down from those, not from the model."""
    generator = torch.Generator().manual_seed(6)
    entries: Entries = {}

    def add(name: str, *shape: int) -> None:
        entries[name] = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)

    def layer(name: str, *shape: int) -> None:
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    def statistics(name: str, width: int) -> None:
        layer(name, width)
        add(f"{name}.running_mean", width)
        entries[f"{name}.running_var"] = 0.5 + torch.rand(width, dtype=torch.float64, generator=generator)
        entries[f"{name}.num_batches_tracked"] = torch.tensor(1234)

    half = dims[0] // 2
    for j, (before, after) in zip((0, 3, 6), ((3, half), (half, half), (half, dims[0])), strict=True):
        layer(f"patch_embed1.proj.{j}", after, before, 3, 3)
        statistics(f"patch_embed1.proj.{j + 1}", after)
    for k in (2, 3, 4):
        layer(f"patch_embed{k}.proj.0", dims[k - 1], dims[k - 2], 3, 3)
        statistics(f"patch_embed{k}.proj.1", dims[k - 1])
    for k in (1, 2, 3, 4):
        add(f"pos_embed{k}", 1, maps[k - 1] ** 2 + (k == 4), dims[k - 1])
    add("cls_token", 1, 1, dims[3])
    for k, stride, kernel in ((1, 8, 9), (2, 4, 5), (3, 2, 3)):
        dim = dims[k - 1]
        for i in range(depths[k - 1]):
            block = f"block{k}.{i}.att"
            for name in ("mha.W_q", "mha.W_v", "mha.ff"):
                layer(f"{block}.{name}", dim, dim)
            add(f"{block}.mha.attn.Qlandmark_op.weight", features, features, stride, stride)
            layer(f"{block}.mha.attn.Qnorm_act.0", features)
            add(f"{block}.mha.attn.conv.weight", dim // features, 1, kernel, kernel)
            layer(f"{block}.ff1", 4 * dim, dim)
            layer(f"{block}.ff2", dim, 4 * dim)
            layer(f"{block}.norm1", dim)
            layer(f"{block}.norm2", dim)
    dim = dims[3]
    for i in range(depths[3]):
        layer(f"block4.{i}.norm1", dim)
        layer(f"block4.{i}.attn.q", dim, dim)
        layer(f"block4.{i}.attn.kv", 2 * dim, dim)
        layer(f"block4.{i}.attn.proj", dim, dim)
        layer(f"block4.{i}.norm2", dim)
        layer(f"block4.{i}.mlp.fc1", 4 * dim, dim)
        layer(f"block4.{i}.mlp.fc2", dim, 4 * dim)
    layer("norm", dim)
    layer("head", classes, dim)
    return entries


def small_entries() -> Entries:
    return made_up(**SMALL, features=4)


def small_model(**options: Any) -> nn.Module:
    torch.manual_seed(7)
    chosen = {"dims": SMALL["dims"], "heads": (2, 2, 4, 4), "depths": SMALL["depths"], "image_size": 64}
    return st.nn.SOFT(3, 3, **{**chosen, **options}).double().eval()


def images(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


# The published formulas


def layer_norm(x: Tensor, entries: Entries, name: str, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * entries[f"{name}.weight"] + entries[f"{name}.bias"]


def linear(x: Tensor, entries: Entries, name: str) -> Tensor:
    return x @ entries[f"{name}.weight"].T + entries[f"{name}.bias"]


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def patches(image: Tensor, entries: Entries, k: int) -> Tensor:
    """An image or map `[c, h, w]` through convolution, running statistics and ReLU."""
    for j, stride in zip((0, 3, 6) if k == 1 else (0,), (2, 1, 2), strict=False):
        name = f"patch_embed{k}.proj.{j}"
        image = F.conv2d(image[None], entries[f"{name}.weight"], entries[f"{name}.bias"], stride, padding=1)[0]
        name = f"patch_embed{k}.proj.{j + 1}"
        mean, variance, scale, shift = (
            entries[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        image = ((image - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
    return image


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (-(x[:, None] - y[None]).square().sum(-1) / 2).exp()


def soft_attention(x: Tensor, entries: Entries, name: str, side: int, *, normalize: bool, features: int) -> Tensor:
    """The tokens `[n, d]` of one image: every head by itself, with the inverse of A + 0.01 I."""
    queries, values = (linear(x, entries, f"{name}.{layer}") for layer in ("W_q", "W_v"))
    landmark = entries[f"{name}.attn.Qlandmark_op.weight"]
    outs = []
    for head in range(x.shape[1] // features):
        part = slice(head * features, (head + 1) * features)
        q, v = queries[:, part] / features**0.25, values[:, part]
        maps = F.conv2d(q.T.reshape(1, features, side, side), landmark, stride=landmark.shape[-1])
        points = exact_gelu(layer_norm(maps[0].flatten(1).T, entries, f"{name}.attn.Qnorm_act.0", 1e-5))
        near, among = kernel(q, points), kernel(points, points)
        inverse = torch.linalg.inv(among + 0.01 * torch.eye(len(among), dtype=x.dtype))
        if normalize:
            spread = among.sum(1).rsqrt()
            inverse = spread[:, None] * inverse * spread[None, :]
        out = near @ inverse @ near.T @ v
        local = entries[f"{name}.attn.conv.weight"][head : head + 1]
        added = F.conv2d(v.T.reshape(features, 1, side, side), local, padding=local.shape[-1] // 2)
        outs.append(out + added.reshape(features, -1).T)
    return linear(torch.cat(outs, 1), entries, f"{name}.ff")


def softmax_attention(x: Tensor, entries: Entries, name: str, heads: int) -> Tensor:
    width = x.shape[1]
    queries, both = linear(x, entries, f"{name}.q"), linear(x, entries, f"{name}.kv")
    outs = []
    keys, values = both[:, :width], both[:, width:]
    parts = (tokens.split(width // heads, dim=1) for tokens in (queries, keys, values))
    for q, k, v in zip(*parts, strict=True):
        scores = (q @ k.T / math.sqrt(width // heads)).exp()
        outs.append(scores / scores.sum(1, keepdim=True) @ v)
    return linear(torch.cat(outs, 1), entries, f"{name}.proj")


def published(image: Tensor, entries: Entries, depths: tuple[int, ...], *, normalize: bool) -> Tensor:
    """Scores of one image, as 2110.11945 and 2207.03341 say; heads have 4 features."""
    for k in (1, 2, 3):
        image = patches(image, entries, k)
        side = image.shape[-1]
        x = image.flatten(1).T + entries[f"pos_embed{k}"][0]
        for i in range(depths[k - 1]):
            name = f"block{k}.{i}.att"
            mixed = soft_attention(x, entries, f"{name}.mha", side, normalize=normalize, features=4)
            x = layer_norm(x + mixed, entries, f"{name}.norm1", 1e-5)
            hidden = linear(tanh_gelu(linear(x, entries, f"{name}.ff1")), entries, f"{name}.ff2")
            x = layer_norm(x + hidden, entries, f"{name}.norm2", 1e-5)
        image = x.T.reshape(-1, side, side)
    x = torch.cat([entries["cls_token"][0], patches(image, entries, 4).flatten(1).T]) + entries["pos_embed4"][0]
    for i in range(depths[3]):
        name = f"block4.{i}"
        x = x + softmax_attention(layer_norm(x, entries, f"{name}.norm1", 1e-6), entries, f"{name}.attn", 4)
        hidden = exact_gelu(linear(layer_norm(x, entries, f"{name}.norm2", 1e-6), entries, f"{name}.mlp.fc1"))
        x = x + linear(hidden, entries, f"{name}.mlp.fc2")
    return linear(layer_norm(x, entries, "norm", 1e-6)[0], entries, "head")


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
def test_loaded_weights_give_the_numbers_of_the_published_formulas(normalize: bool) -> None:
    entries = small_entries()
    found = {}
    for how, inverse in (("cholesky", st.nn.CholeskyInverse(0.01)), ("newton", st.nn.NewtonInverse(0.01))):
        model = small_model(normalize=normalize, inverse=inverse)
        st.nn.load_published_weights(model, entries)
        found[how] = model(images())
    expected = torch.stack([published(image, entries, SMALL["depths"], normalize=normalize) for image in images()])
    torch.testing.assert_close(found["cholesky"], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["newton"], expected, rtol=1e-7, atol=1e-9)
    other = torch.stack([published(image, entries, SMALL["depths"], normalize=not normalize) for image in images()])
    assert (other - expected).abs().max() > 1e-4  # the normalisation is not lost in the rest


def test_twenty_steps_of_newton_are_enough_for_these_landmarks() -> None:
    entries, found = small_entries(), []
    for inverse in (st.nn.CholeskyInverse(0.01), st.nn.NewtonInverse(0.01, steps=20)):
        model = small_model(inverse=inverse)
        st.nn.load_published_weights(model, entries)
        found.append(model(images()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


# Loading


def test_every_entry_of_a_published_model_is_loaded_and_no_other() -> None:
    entries = made_up(**TINY)
    model = st.nn.soft_tiny()
    st.nn.load_published_weights(model, {name: value.float() for name, value in entries.items()})
    held = list(model.state_dict().values())
    assert len(held) == len(entries) == 187
    sums = sorted(value.double().sum().item() for value in held)
    assert sums == pytest.approx(sorted(value.double().sum().item() for value in entries.values()), rel=1e-4, abs=1e-3)
    state = model.state_dict()
    for own, published_name in (
        ("stages.2.blocks.1.attention.q_proj.weight", "block3.1.att.mha.W_q.weight"),
        ("stages.2.blocks.1.attention.v_proj.bias", "block3.1.att.mha.W_v.bias"),
        ("stages.0.embedding.4.running_var", "patch_embed1.proj.4.running_var"),
        ("stages.1.positions.weight", "pos_embed2"),
        ("stages.3.blocks.1.kv_proj.weight", "block4.1.attn.kv.weight"),
        ("stages.3.class_token", "cls_token"),
    ):
        assert torch.equal(state[own], entries[published_name].to(state[own].dtype)), own


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entries: {"model": entries, "epoch": 3},
        lambda entries: {"state_dict": {f"module.{name}": value for name, value in entries.items()}},
        lambda entries: {"state_dict_ema": entries, "optimizer": {"state": {}}},
        lambda entries: {f"module.{name}": value for name, value in entries.items()},
        lambda entries: {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in entries.items()},
        lambda entries: {name: v.float() if v.is_floating_point() else v for name, v in entries.items()},
    ],
    ids=["model", "state_dict_and_module", "ema", "module", "parameters", "float32"],
)
def test_a_state_dict_may_lie_in_a_checkpoint(wrap: Callable[[Entries], dict[str, Any]]) -> None:
    entries = small_entries()
    plain, wrapped = small_model(), small_model()
    st.nn.load_published_weights(plain, entries)
    st.nn.load_published_weights(wrapped, wrap(entries))
    torch.testing.assert_close(wrapped(images()), plain(images()), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in wrapped.parameters())
    assert all(p.dtype == torch.float64 for p in wrapped.parameters())


def test_what_was_loaded_survives_saving_and_loading(tmp_path: Any) -> None:
    entries = small_entries()
    torch.save({"state_dict": entries}, tmp_path / "released.pth")
    first, second = small_model(), small_model()
    st.nn.load_published_weights(first, torch.load(tmp_path / "released.pth", map_location="cpu", weights_only=True))
    torch.save(first.state_dict(), tmp_path / "own.pth")
    second.load_state_dict(torch.load(tmp_path / "own.pth", weights_only=True))
    assert torch.equal(first(images()), second(images()))
    entries["norm.weight"].add_(1.0)  # the model holds copies
    assert torch.equal(first(images()), second(images()))


def test_other_classes_are_taken_when_the_user_says_so() -> None:
    entries = small_entries()
    model = small_model()
    model.head = nn.Linear(16, 5).double()
    own = model.head.weight.clone()
    with pytest.raises(
        InvalidOptionError, match=r"head\.bias has the shape \(3,\) and not \(5,\) \(head=False keeps the model's own\)"
    ):
        st.nn.load_published_weights(model, entries)
    st.nn.load_published_weights(model, entries, head=False)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.norm.weight, entries["norm.weight"])
    del entries["head.weight"], entries["head.bias"]
    st.nn.load_published_weights(model, entries, head=False)
    with pytest.raises(InvalidOptionError, match=r"missing head\.bias, head\.weight"):
        st.nn.load_published_weights(small_model(), entries)


def test_positions_of_another_image_size_are_interpolated_when_the_user_asks() -> None:
    entries = small_entries()
    large = small_model(image_size=(64, 96))
    with pytest.raises(
        InvalidOptionError, match=r"pos_embed1 is for a map of 16 x 16, and the model's is 16 x 24: .*image_size=64"
    ):
        st.nn.load_published_weights(large, entries)
    st.nn.load_published_weights(large, entries, interpolate_positions=True)
    maps = entries["pos_embed2"].reshape(1, 8, 8, 8).permute(0, 3, 1, 2)
    wider = F.interpolate(maps, size=(8, 12), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 96, 8)
    torch.testing.assert_close(large.stages[1].positions.weight.detach(), wider)
    assert torch.equal(large.stages[3].positions.weight[:, 0], entries["pos_embed4"][:, 0])
    # The same as a model of the published size, which interpolates whenever it is called.
    usual = small_model()
    st.nn.load_published_weights(usual, entries)
    torch.testing.assert_close(large(images((64, 96))), usual(images((64, 96))))


def test_positions_of_as_many_tokens_on_a_map_of_another_form_are_not_mixed_up() -> None:
    model = small_model(image_size=(32, 128))  # 8 x 32 tokens, as many as 16 x 16
    with pytest.raises(InvalidOptionError, match="pos_embed1 is for a map of 16 x 16, and the model's is 8 x 32"):
        st.nn.load_published_weights(model, small_entries())


# What is refused


def without(name: str) -> Callable[[Entries], object]:
    return lambda entries: entries.pop(name)


def put(name: str, value: Any) -> Callable[[Entries], object]:
    return lambda entries: entries.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("block2.1.att.mha.W_q.weight"), r"missing block2\.1\.att\.mha\.W_q\.weight"),
        (without("patch_embed1.proj.4.running_mean"), r"missing patch_embed1\.proj\.4\.running_mean"),
        (put("block3.0.att.mha.attn.bias", torch.zeros(2)), r"unexpected block3\.0\.att\.mha\.attn\.bias"),
        (put("module.norm.weight", torch.zeros(16)), r"unexpected module\.norm\.weight"),
        (put("norm.weight", torch.zeros(17)), r"norm\.weight has the shape \(17,\) and not \(16,\)"),
        (put("cls_token", torch.zeros(1, 16)), r"cls_token has the shape \(1, 16\) and not \(1, 1, 16\)"),
        (put("pos_embed2", torch.zeros(1, 65, 8)), r"pos_embed2 has the shape \(1, 65, 8\) .*of a square map, 8\]"),
        (put("pos_embed4", torch.zeros(1, 4, 16)), r"pos_embed4 has the shape \(1, 4, 16\) .*\[1, 1 \+ tokens"),
        (put("pos_embed1", torch.zeros(256, 8)), r"pos_embed1 has the shape \(256, 8\)"),
        (put("norm.bias", [0.0] * 16), r"norm\.bias is a list and no tensor"),
        (put("norm.bias", torch.zeros(16, dtype=torch.int64)), r"norm\.bias is torch\.int64.* like torch\.float64"),
        (put("norm.bias", torch.zeros(16, device="meta")), r"norm\.bias is .*on meta"),
        (
            lambda entries: entries.update({f"block2.2.{name[9:]}": entries[name] for name in list(entries)
                                            if name.startswith("block2.1.")}),
            r"unexpected block2\.2\.att.*and 14 more; the weights are of depths=\(1, 3, 1, 2\) and the model's",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("interpolate", [False, True])
def test_what_does_not_fit_is_told_by_name_and_nothing_is_loaded(
    change: Callable[[Entries], object], message: str, interpolate: bool
) -> None:
    model, entries = small_model(), small_entries()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(entries)
    with pytest.raises(InvalidOptionError, match=f"does not fit the model; nothing was loaded: .*{message}"):
        st.nn.load_published_weights(model, entries, interpolate_positions=interpolate)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_message_about_a_model_of_another_size_stays_short() -> None:
    with pytest.raises(InvalidOptionError, match=r"and \d+ more") as caught:
        st.nn.load_published_weights(small_model(dims=(8, 8, 32, 16)), small_entries())
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("model", "state_dict", "message"),
    [
        (lambda: small_model(norm="group"), small_entries, "norm='group': published weights are of norm='batch'"),
        (lambda: nn.DataParallel(small_model()), small_entries, "model is a DataParallel: give the steepest.nn.SOFT"),
        (small_model, lambda: torch.zeros(3), "state_dict is a Tensor without names"),
        (small_model, lambda: {0: torch.zeros(3)}, "state_dict is a dict without names"),
        (small_model, dict, r"missing block1\.0\.att\.ff1\.bias"),
        (
            small_model,
            lambda: {"state_dict": small_entries(), "state_dict_ema": small_entries()},
            r"under 'state_dict', 'state_dict_ema': give one of them, such as checkpoint\['state_dict_ema'\]",
        ),
        (lambda: small_model().to("meta"), small_entries, r"block1.*of the model is on the meta device"),
    ],
    ids=["group", "wrapped", "tensor", "numbers", "empty", "two", "meta"],
)
def test_what_is_no_model_or_no_state_dict_is_told(
    model: Callable[[], nn.Module], state_dict: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        st.nn.load_published_weights(model(), state_dict())
