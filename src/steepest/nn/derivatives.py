"""Derivatives of a network in its inputs, for equations and other conditions of science."""

from torch import Tensor, nn

from steepest.errors import InvalidOptionError
from steepest.nn.jet_pairs import Second, wanted_pairs
from steepest.nn.jet_rules import propagate
from steepest.nn.jets import Jet

__all__ = ["WithDerivatives", "differentiate"]


def differentiate(model: nn.Module, points: Tensor, *, order: int = 2, second: Second = "diagonal") -> Jet:
    r"""Value, gradient and second derivatives of a network in its inputs, in one forward pass (Taylor mode).

    Derivatives go through the linear layers beside the values, as further positions that share the weight, and through
    activations by the chain rule. So `Capture` records them like any other forward pass, one backward gives the
    Jacobian of rows made of u, u_x and u_xx, and nothing is differentiated twice. A pass costs about
    ``1 + d + m`` passes of the plain network with d inputs and m second derivatives.

    Args:
        model: Sequential, Linear, Tanh, Sigmoid, GELU, SiLU, Softplus, Identity, Dropout in eval mode, the layers
            `Sine`, `FourierFeatures` and `Affine`, and modules with a method ``jet(self, jet)``.
        points: `[B, d]`, in the model's dtype; float64 pays where residuals are to become small.
        order: Highest derivative, 1 or 2.
        second: Which second derivatives: "diagonal" (u_xx, u_yy), "all" (u_xy too), or pairs of inputs, such as
            ``[(0, 0)]`` for u_xx alone.

    Returns:
        The jet of the output: ``u.value`` `[B, K]`, ``u.gradient`` `[B, K, d]`, ``u.d(0)``, ``u.d(0, 0)``,
        ``u.laplacian()`` `[B, K]`.

    Raises:
        UnsupportedModelError: If a layer has no rule; with its qualified name and what to do.
        InvalidOptionError: If the points or an option are impossible.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> u = differentiate(model, torch.rand(5, 2))
        >>> u.value.shape, u.gradient.shape, u.laplacian().shape
        (torch.Size([5, 1]), torch.Size([5, 1, 2]), torch.Size([5, 1]))
    """
    own = next(model.parameters(), None)
    if own is not None and isinstance(points, Tensor) and own.dtype != points.dtype:
        raise InvalidOptionError(
            f"points are {points.dtype} and the model is {own.dtype}: convert one of them, as in model.double()."
        )
    return propagate(model, Jet.of(points, order=order, second=second))


class WithDerivatives(nn.Module):
    """A network whose output has the derivatives in its inputs as further columns.

    The columns are the K values, then the K first derivatives along every input, then the K second derivatives for
    every pair: ``K * (1 + d + m)`` of them. So anything that trains a model on ``model(x)`` can train on equations.

    Args:
        model: As in `differentiate`.
        in_features: Number of inputs d.
        order: As in `differentiate`.
        second: As in `differentiate`.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> model = WithDerivatives(net, 2)
        >>> columns = model(torch.rand(5, 2))
        >>> columns.shape
        torch.Size([5, 5])
        >>> model.jet_of(columns).laplacian().shape
        torch.Size([5, 1])
    """

    def __init__(self, model: nn.Module, in_features: int, *, order: int = 2, second: Second = "diagonal") -> None:
        super().__init__()
        self.model = model
        self.in_features, self.order = in_features, order
        self.pairs = wanted_pairs(in_features, order, second)

    def forward(self, points: Tensor) -> Tensor:
        """Compute values and derivatives.

        Args:
            points: `[B, d]`.

        Returns:
            `[B, K * (1 + d + m)]`.

        Raises:
            InvalidOptionError: If the points have another number of inputs.
        """
        if points.shape[1:] != (self.in_features,):
            raise InvalidOptionError(
                f"points have the shape {tuple(points.shape)}, and this model is for [B, {self.in_features}]: give "
                "those, or another in_features."
            )
        u = differentiate(self.model, points, order=self.order, second=self.pairs)
        return u.columns()

    def jet_of(self, columns: Tensor) -> Jet:
        """Read the columns of an output again.

        Args:
            columns: `[B, K * (1 + d + m)]`.

        Returns:
            The jet.
        """
        return Jet.of_columns(columns, self.in_features, self.pairs)
