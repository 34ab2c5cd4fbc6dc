"""The residual network: its shapes and size, its arithmetic written out a second time, and the engine on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest as st
from steepest.errors import InvalidOptionError, UnsupportedModelError


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolution(before: int, after: int, size: int = 3) -> int:
    """Weights of a convolution without bias, and scale and shift of the normalisation behind it."""
    return size * size * before * after + 2 * after


def tiny(**options: object) -> nn.Module:
    torch.manual_seed(1)
    return st.nn.ResNet(2, 3, **{"widths": (4, 6), "blocks": (1, 1), **options}).double()


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (9, 9), (9, 12), (1, 1)])
def test_images_of_any_size_give_one_row_each(norm: str, size: tuple[int, int]) -> None:
    outputs = st.nn.ResNet(3, 10, norm=norm)(torch.randn(2, 3, *size))
    assert outputs.shape == (2, 10)
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_parameters_are_those_of_three_stages(norm: str) -> None:
    stem = convolution(3, 16)
    first = 2 * convolution(16, 16)
    second = convolution(16, 32) + convolution(32, 32) + convolution(16, 32, size=1)
    third = convolution(32, 64) + convolution(64, 64) + convolution(32, 64, size=1)
    assert count(st.nn.ResNet(3, 10, norm=norm)) == stem + first + second + third + 65 * 10 == 78_042


def test_further_blocks_of_a_stage_keep_its_width() -> None:
    more = count(st.nn.ResNet(1, 4, widths=(8, 12), blocks=(2, 3)))
    assert more - count(st.nn.ResNet(1, 4, widths=(8, 12), blocks=(1, 1))) == 2 * (
        convolution(8, 8) + 2 * convolution(12, 12)
    )


def test_every_stage_after_the_first_halves_the_image() -> None:
    model, sizes = st.nn.ResNet(1, 4, widths=(4, 8, 8, 4), blocks=(2, 1, 2, 1)), []
    handles = [b.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:]))) for b in model.blocks]
    model(torch.randn(2, 1, 9, 12))
    for handle in handles:
        handle.remove()
    assert sizes == [(4, 9, 12), (4, 9, 12), (8, 5, 6), (8, 3, 3), (8, 3, 3), (4, 2, 2)]


def test_the_outputs_are_those_of_the_same_arithmetic_written_out() -> None:
    model = tiny()
    images = torch.randn(3, 2, 7, 5, dtype=torch.float64)
    values = dict(model.named_parameters())

    def normalised(x: Tensor, name: str, stride: int = 1, *, groups: int = 1) -> Tensor:
        weight = values[f"{name}.0.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        parts = x.reshape(len(x), groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        scale, shift = (values[f"{name}.1.{end}"][:, None, None] for end in ("weight", "bias"))
        return parts.reshape(x.shape) * scale + shift

    with torch.no_grad():
        for value in values.values():
            value += 0.1 * torch.randn_like(value)
    x = normalised(images, "stem").relu()
    x = (x + normalised(normalised(x, "blocks.0.first").relu(), "blocks.0.second")).relu()
    inner = normalised(normalised(x, "blocks.1.first", 2).relu(), "blocks.1.second")
    x = (normalised(x, "blocks.1.shortcut", 2) + inner).relu()
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ values["head.weight"].T + values["head.bias"])


@pytest.mark.parametrize(
    ("width", "groups"), [(1, 1), (3, 1), (4, 1), (6, 1), (7, 1), (8, 2), (10, 2), (12, 3), (16, 4), (64, 8), (128, 8)]
)
def test_groups_divide_the_width_and_hold_four_channels_or_more(width: int, groups: int) -> None:
    model = st.nn.ResNet(1, 2, widths=(width,), blocks=(1,))
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {groups}


def test_nothing_is_edited_in_place() -> None:
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    before = images.clone()
    tiny()(images).sum().backward()
    assert torch.equal(images, before)


# The engine


def losses(model: nn.Module) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 2, 9, 9, generator=generator, dtype=torch.float64)
    return lambda: F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]), reduction="none")


@pytest.mark.parametrize(
    "options", [{}, {"widths": (4, 8, 8), "blocks": (1, 2, 1)}], ids=["two_stages", "three_stages"]
)
def test_the_engine_gives_what_one_backward_per_row_gives(options: dict[str, object]) -> None:
    model = tiny(**options)
    closure, found = losses(model), []
    for capture in (st.Capture(model), st.ReferenceCapture(model)):
        with capture:
            rows = closure()
        found.append(capture.jacobian(rows))
    fast, slow = found
    assert fast.names == slow.names == tuple(name for name, _ in model.named_parameters())
    torch.testing.assert_close(fast.to_dense(), slow.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast.gram(), slow.gram(), rtol=1e-10, atol=1e-12)
    assert (slow.to_dense().abs().amax(dim=0) > 0).float().mean() > 0.9  # nearly all of it is alive


def test_the_engine_refuses_batch_statistics_and_takes_running_ones() -> None:
    model = tiny(norm="batch")
    closure = losses(model)
    with pytest.raises(UnsupportedModelError, match=r"BatchNorm2d.*GroupNorm"), st.Capture(model):
        closure()
    model.eval()
    with st.Capture(model) as capture:
        rows = closure()
    assert capture.jacobian(rows).gram().shape == (4, 4)


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 8), "blocks": (1,)}, r"widths=\(4, 8\) and blocks=\(1,\): give one width"),
        ({"widths": (), "blocks": ()}, "at least one stage"),
        ({"widths": (4, 0)}, r"widths\[1\]=0: give an integer of at least 1"),
        ({"widths": (4.0, 8)}, r"widths\[0\]=4.0: give an integer"),
        ({"blocks": (0, 1)}, r"blocks\[0\]=0: give an integer of at least 1"),
        ({"norm": "layer"}, "norm='layer': choose one of 'group', 'batch'"),
    ],
)
def test_what_makes_no_network_is_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        tiny(**options)


@pytest.mark.parametrize(("sizes", "name"), [((0, 3), "in_channels"), ((3, 0), "out_features")])
def test_a_network_needs_inputs_and_outputs(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{name}=0: give an integer of at least 1"):
        st.nn.ResNet(*sizes)
