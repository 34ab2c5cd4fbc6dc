"""Small models of the training tasks."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from steepest.errors import InvalidOptionError
from steepest.nn.resnet import Norm, ResNet
from steepest.nn.transformer import Attention, SequenceTransformer, VisionTransformer
from steepest.training.data import Shape

__all__ = ["MODELS", "build_with", "cnn", "hidden", "mlp", "pixels", "resnet", "vit"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them and torch's default initialisation.

    Args:
        *widths: Width of the input, of every hidden layer and of the output.

    Returns:
        The model.

    Example:
        >>> sum(p.numel() for p in mlp(1, 16, 16, 16, 1).parameters())
        593
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def hidden(*widths: int) -> Callable[[Shape], nn.Sequential]:
    """An `mlp` with these hidden layers for data of any shape; images are flattened first.

    Args:
        *widths: Width of every hidden layer.

    Returns:
        A function from the shape of the data to the model.

    Example:
        >>> hidden(8)(Shape(inputs=(1, 4, 4), outputs=3))
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=16, out_features=8, bias=True)
          (2): GELU(approximate='none')
          (3): Linear(in_features=8, out_features=3, bias=True)
        )
    """

    def build(shape: Shape) -> nn.Sequential:
        layers = mlp(shape.features, *widths, shape.outputs)
        return layers if len(shape.inputs) == 1 else nn.Sequential(nn.Flatten(), *layers)

    return build


def cnn(*channels: int) -> Callable[[Shape], nn.Sequential]:
    """Convolutions of stride 2 with GELU, then one linear layer, for images `[C, H, W]` of any size.

    Args:
        *channels: Channels after every convolution.

    Returns:
        A function from the shape of the data to the model.

    Raises:
        InvalidOptionError: From the returned function, if the inputs are no images.
    """

    def build(shape: Shape) -> nn.Sequential:
        before, height, width = _image(shape)
        layers: list[nn.Module] = []
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
            before, height, width = after, (height + 1) // 2, (width + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * width, shape.outputs))

    return build


def resnet(*widths: int, norm: Norm = "group") -> Callable[[Shape], ResNet]:
    """A residual network with one block in every stage, for images `[C, H, W]` of any size.

    Args:
        *widths: Channels of every stage.
        norm: "group", or "batch" for BatchNorm, which mixes the samples of a batch.

    Returns:
        A function from the shape of the data to the model.

    Raises:
        InvalidOptionError: From the returned function, if the inputs are no images.
    """

    def build(shape: Shape) -> ResNet:
        channels, _, _ = _image(shape)
        return ResNet(channels, shape.outputs, widths=widths, blocks=(1,) * len(widths), norm=norm)

    return build


def vit(width: int, depth: int, *, attention: Attention) -> Callable[[Shape], VisionTransformer]:
    """A small transformer on the patches of images `[C, H, W]` of any size.

    Args:
        width: Features of a token; a head has 16 of them.
        depth: Number of blocks.
        attention: "softmax_free" or "softmax".

    Returns:
        A function from the shape of the data to the model.

    Raises:
        InvalidOptionError: From the returned function, if the inputs are no images.
    """

    def build(shape: Shape) -> VisionTransformer:
        channels, *sides = _image(shape)
        return VisionTransformer(channels, shape.outputs, sides, dim=width, depth=depth, attention=attention)

    return build


def pixels(width: int, depth: int, *, attention: Attention) -> Callable[[Shape], nn.Sequential]:
    """A small transformer on inputs as a sequence of single numbers: every value of every channel is a token.

    Args:
        width: Features of a token; a head has 16 of them.
        depth: Number of blocks.
        attention: "softmax_free" or "softmax".

    Returns:
        A function from the shape of the data, which may be any, to the model.
    """

    def build(shape: Shape) -> nn.Sequential:
        count = shape.features
        # One channel after the other, and in each one row after the other.
        return nn.Sequential(
            nn.Flatten(),
            nn.Unflatten(1, (count, 1)),
            SequenceTransformer(1, shape.outputs, count, dim=width, depth=depth, attention=attention),
        )

    return build


def build_with(constructor: Any, shape: Shape, name: str) -> nn.Module:
    """Make a user's model, giving its constructor whatever it asks for by name.

    Args:
        constructor: A class or a function; it may take `input_shape`, `in_features` and `out_features`.
        shape: Shape of the data.
        name: How the user named it, for the messages.

    Returns:
        The model.

    Raises:
        InvalidOptionError: If it needs anything else, or makes something else than a module.
    """
    known = {"input_shape": shape.inputs, "in_features": shape.features, "out_features": shape.outputs}
    if not callable(constructor):
        raise InvalidOptionError(f"model {name} is {type(constructor).__name__}: name a class or a function")
    parameters = inspect.signature(constructor).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    strange = [parameter for parameter in needed if parameter not in known]
    if strange:
        raise InvalidOptionError(
            f"model {name} needs {', '.join(strange)}: it may take {', '.join(known)} and options with defaults"
        )
    model = constructor(**{p.name: known[p.name] for p in parameters if p.name in known})
    if not isinstance(model, nn.Module):
        raise InvalidOptionError(f"model {name} made {type(model).__name__}: it must make a torch.nn.Module")
    return model


def _image(shape: Shape) -> tuple[int, int, int]:
    if len(shape.inputs) != 3:
        raise InvalidOptionError(
            f"a model for images needs inputs [C, H, W], one input here has the shape {list(shape.inputs)}: use mlp"
        )
    channels, height, width = shape.inputs
    return channels, height, width


def _mlp(*widths: int) -> Callable[[Shape], nn.Module]:
    return hidden(*(widths or (64, 64)))


def _cnn(*channels: int) -> Callable[[Shape], nn.Module]:
    return cnn(*(channels or (16, 32, 64)))


def _resnet(*widths: int) -> Callable[[Shape], nn.Module]:
    return resnet(*(widths or (16, 32, 64)))


def _resnet_bn(*widths: int) -> Callable[[Shape], nn.Module]:
    return resnet(*(widths or (16, 32, 64)), norm="batch")


def _transformer(
    name: str, make: Callable[..., Callable[[Shape], nn.Module]], attention: Attention, default: tuple[int, int]
) -> Callable[..., Callable[[Shape], nn.Module]]:
    def made(*numbers: int) -> Callable[[Shape], nn.Module]:
        if len(numbers) > len(default):
            raise InvalidOptionError(
                f"model {name} got {len(numbers)} numbers: it takes width and depth, as in "
                f"{name}:{default[0]},{default[1]}"
            )
        width, depth = (*numbers, *default[len(numbers) :])
        return make(width, depth, attention=attention)

    return made


# What --model takes by name, with its numbers after a colon: mlp:64,64.
MODELS: dict[str, Callable[..., Callable[[Shape], nn.Module]]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
    "resnet_bn": _resnet_bn,
    "soft_vit": _transformer("soft_vit", vit, "softmax_free", (64, 4)),
    "vit": _transformer("vit", vit, "softmax", (64, 4)),
    "soft_pixels": _transformer("soft_pixels", pixels, "softmax_free", (32, 2)),
    "pixels": _transformer("pixels", pixels, "softmax", (32, 2)),
}
