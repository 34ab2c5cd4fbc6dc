"""The solution of Burgers' equation by the transformation of Cole and Hopf, for the error of what networks find."""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["burgers"]

_NODES = 256


def burgers(points: Tensor, viscosity: float) -> Tensor:
    r"""Solution of ``u_t + u u_x = viscosity u_xx`` on the line, from ``u = -sin(pi x)``.

    .. math:: u = -\frac{\int \sin(\pi y)\, f(y)\, e^{-z^2} dz}{\int f(y)\, e^{-z^2} dz}, \quad
        y = x - z \sqrt{4 \nu t}, \quad f(y) = e^{-\cos(\pi y) / (2 \pi \nu)}

    by Gauss-Hermite quadrature. It is zero at x = -1, 0 and 1.

    Args:
        points: x and t, `[N, 2]`.
        viscosity: nu, above 0.

    Returns:
        `[N]`, in float64.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(_NODES))
    x, t = points.double().unbind(1)
    y = x.unsqueeze(1) - nodes * torch.sqrt(4 * viscosity * t).unsqueeze(1)
    exponent = -torch.cos(math.pi * y) / (2 * math.pi * viscosity)
    # The largest exponent of each point is taken out: the quotient stays, and nothing overflows.
    factors = weights * torch.exp(exponent - exponent.amax(1, keepdim=True))
    return -(factors * torch.sin(math.pi * y)).sum(1) / factors.sum(1)
