"""How a jet goes through a module: linear layers, smooth activations, and modules that say it themselves."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.errors import UnsupportedModelError
from steepest.nn.jets import Jet

__all__ = ["HasJet", "propagate"]

Curve = tuple[Tensor, Tensor, Tensor]

_REMEDY = (
    "Remedy: build the network from Sequential, Linear, Tanh, Sigmoid, GELU, SiLU, Softplus and the layers of "
    "steepest.nn (Sine, FourierFeatures, Affine), give the module a method jet(self, jet) of its own, or compute the "
    "derivatives by torch.autograd.grad(..., create_graph=True) in the closure and give the optimizer "
    "capture=BatchedCapture(model)."
)


@runtime_checkable
class HasJet(Protocol):
    """A module that says itself how a jet goes through it."""

    def jet(self, jet: Jet) -> Jet:
        """The jet of the output, given the jet of the input."""
        ...


def propagate(module: nn.Module, jet: Jet, name: str = "") -> Jet:
    """Send a jet through a module.

    Args:
        module: The module; one of one's own has a method ``jet(self, jet)`` beside `forward`.
        jet: What comes in.
        name: Qualified name of the module, for messages.

    Returns:
        What goes out.

    Raises:
        UnsupportedModelError: If the module, or one in it, has no rule; with its qualified name.
    """
    shown = f"Layer {name!r} ({type(module).__name__})" if name else f"The model ({type(module).__name__})"
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedModelError(
            f"{shown} has forward hooks, which see no derivatives: remove them (of weight_norm: use "
            "torch.nn.utils.parametrizations.weight_norm, which needs no hook)."
        )
    if isinstance(module, HasJet):
        return module.jet(jet)
    # By the function and not by the type: a subclass may have another forward, a parametrized layer has the same.
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        for child, layer in module.named_children():
            jet = propagate(layer, jet, f"{name}.{child}" if name else child)
        return jet
    rule = _RULES.get(forward)
    if rule is None or (isinstance(module, nn.Dropout) and module.training and module.p > 0):
        raise UnsupportedModelError(f"{shown} has no rule for derivatives in the inputs{_hint(module)}. {_REMEDY}")
    return rule(module, jet)


def _hint(module: nn.Module) -> str:
    if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold)):
        return ": its second derivative is zero wherever it exists, so no second-order equation can be fitted"
    if isinstance(module, nn.Dropout):
        return " in training mode: it would draw another mask for every point"
    return ""


def _linear(module: Any, jet: Jet) -> Jet:
    # One call for value and derivatives: they are positions that share the weight. The bias belongs to the value.
    moved = jet.linear(lambda stacked: F.linear(stacked, module.weight))
    return moved if module.bias is None else moved.shift(module.bias)


def _same(_module: Any, jet: Jet) -> Jet:
    return jet


def _tanh(a: Tensor) -> Curve:
    t = a.tanh()
    slope = 1 - t * t
    return t, slope, -2 * t * slope


def _sigmoid(a: Tensor) -> Curve:
    s = a.sigmoid()
    slope = s * (1 - s)
    return s, slope, slope * (1 - 2 * s)


def _silu(a: Tensor) -> Curve:
    s, slope, _ = _sigmoid(a)
    return a * s, s + a * slope, slope * (2 + a * (1 - 2 * s))


def _gelu_exact(a: Tensor) -> Curve:
    below = torch.special.ndtr(a)
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return a * below, below + a * density, density * (2 - a * a)


def _gelu_tanh(a: Tensor) -> Curve:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t, slope, bend = _tanh(scale * (a + cubic * a**3))
    inner, curve = scale * (1 + 3 * cubic * a * a), 6 * scale * cubic * a
    half = 0.5 * a
    return (
        half * (1 + t),
        0.5 * (1 + t) + half * slope * inner,
        slope * inner + half * (bend * inner * inner + slope * curve),
    )


def _softplus(module: Any, jet: Jet) -> Jet:
    beta, threshold = module.beta, module.threshold

    def curve(a: Tensor) -> Curve:
        s, slope, _ = _sigmoid(beta * a)
        straight = beta * a > threshold  # where torch takes the line
        return F.softplus(a, beta, threshold), torch.where(straight, 1, s), torch.where(straight, 0, beta * slope)

    return jet.map(curve)


def _activation(curve: Callable[[Tensor], Curve]) -> Callable[[Any, Jet], Jet]:
    return lambda _module, jet: jet.map(curve)


def _gelu(module: Any, jet: Jet) -> Jet:
    return jet.map(_gelu_tanh if module.approximate == "tanh" else _gelu_exact)


_RULES: dict[Callable[..., Any], Callable[[Any, Jet], Jet]] = {
    nn.Linear.forward: _linear,
    nn.Identity.forward: _same,
    nn.Dropout.forward: _same,  # in eval mode
    nn.Tanh.forward: _activation(_tanh),
    nn.Sigmoid.forward: _activation(_sigmoid),
    nn.SiLU.forward: _activation(_silu),
    nn.GELU.forward: _gelu,
    nn.Softplus.forward: _softplus,
}
