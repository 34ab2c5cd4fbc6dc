"""Values with their derivatives in the inputs, and how they go through products, sums and elementwise functions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.nn.jet_pairs import Pairs, Second, wanted_pairs

__all__ = ["Jet"]


@dataclass(frozen=True, eq=False)
class Jet:
    r"""Numbers `[B, K]` that depend on inputs `[B, d]`, with their first and some second derivatives.

    Jets are added, subtracted and multiplied with jets, and with tensors `[B, K]`, `[K]` or numbers, which count as
    constants. That is enough to build a condition into a network, as in ``x * (1 - x) * net(x)``.

    Args:
        value: `[B, K]`.
        first: `[B, d, K]`: entry i is the derivative along input i.
        second: `[B, m, K]`, one entry for each of the pairs; None where all of them are zero.
        pairs: The m pairs (i, j), i <= j, of inputs that `second` is about.

    Example:
        >>> x = Jet.of(torch.tensor([[2.0]]))
        >>> cube = x * x * x
        >>> cube.value.item(), cube.d(0).item(), cube.d(0, 0).item()
        (8.0, 12.0, 12.0)
    """

    value: Tensor
    first: Tensor
    second: Tensor | None
    pairs: Pairs

    @classmethod
    def of(cls, points: Tensor, *, order: int = 2, second: Second = "diagonal") -> "Jet":
        """The inputs themselves.

        Args:
            points: `[B, d]`.
            order: Highest derivative, 1 or 2.
            second: As in `differentiate`.

        Returns:
            Their jet: the first derivatives are the identity, the second ones zero.

        Raises:
            InvalidOptionError: If the points are no matrix of real numbers, or an option is impossible.
        """
        if points.ndim != 2 or not points.is_floating_point():
            raise InvalidOptionError(
                f"points have the shape {tuple(points.shape)} and dtype {points.dtype}: give [B, d] of real numbers, "
                "one row for each point."
            )
        pairs = wanted_pairs(points.shape[1], order, second)
        identity = torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
        return cls(points, identity.expand(len(points), -1, -1), None, pairs)

    @property
    def gradient(self) -> Tensor:
        """First derivatives, `[B, K, d]`."""
        return self.first.transpose(1, 2)

    @property
    def num_inputs(self) -> int:
        """How many inputs d there are."""
        return self.first.shape[1]

    def d(self, i: int, j: int | None = None) -> Tensor:
        """One derivative of all K numbers.

        Args:
            i: Input to differentiate along.
            j: A second input, which may be the same; None for a first derivative.

        Returns:
            `[B, K]`.

        Raises:
            InvalidOptionError: If that derivative was not asked for.
        """
        d = self.num_inputs
        if not (0 <= i < d and (j is None or 0 <= j < d)):
            raise InvalidOptionError(f"d({i}{'' if j is None else f', {j}'}) of {d} inputs: they are 0 to {d - 1}.")
        if j is None:
            return self.first[:, i]
        pair = (min(i, j), max(i, j))
        if pair not in self.pairs:
            raise InvalidOptionError(
                f"d({i}, {j}) was not computed, only {list(self.pairs) or 'first derivatives'}: give order=2 and "
                f"second='all', or a list with the pair {pair}."
            )
        return torch.zeros_like(self.value) if self.second is None else self.second[:, self.pairs.index(pair)]

    def laplacian(self) -> Tensor:
        """Sum of the second derivatives along all inputs, `[B, K]`."""
        total = self.d(0, 0)
        for i in range(1, self.num_inputs):
            total = total + self.d(i, i)
        return total

    def hessian(self) -> Tensor:
        """All second derivatives, `[B, K, d, d]`; they must have been asked for with ``second="all"``."""
        rows = [torch.stack([self.d(i, j) for j in range(self.num_inputs)], -1) for i in range(self.num_inputs)]
        return torch.stack(rows, -2)

    def columns(self) -> Tensor:
        """Everything side by side, `[B, K * (1 + d + m)]`: values, first derivatives, second derivatives."""
        second = self.value.new_zeros(len(self.value), len(self.pairs), self.value.shape[1])
        parts = [self.value.unsqueeze(1), self.first, second if self.second is None else self.second]
        return torch.cat(parts, 1).flatten(1)

    @classmethod
    def of_columns(cls, columns: Tensor, num_inputs: int, pairs: Pairs) -> "Jet":
        """Read what `columns` wrote.

        Args:
            columns: `[B, K * (1 + d + m)]`.
            num_inputs: d.
            pairs: The m pairs of inputs.

        Returns:
            The jet.

        Raises:
            InvalidOptionError: If the number of columns does not fit.
        """
        parts = 1 + num_inputs + len(pairs)
        if columns.ndim != 2 or columns.shape[1] % parts:
            raise InvalidOptionError(
                f"columns have the shape {tuple(columns.shape)}: with {num_inputs} inputs and {len(pairs)} second "
                f"derivatives give [B, {parts} * K]."
            )
        stacked = columns.unflatten(1, (parts, -1))
        return cls(stacked[:, 0], stacked[:, 1 : 1 + num_inputs], stacked[:, 1 + num_inputs :], pairs)

    def column(self, k: int) -> "Jet":
        """Number k alone, as a jet with K = 1."""
        span = slice(k, k + 1) if k != -1 else slice(k, None)
        second = None if self.second is None else self.second[..., span]
        return Jet(self.value[:, span], self.first[..., span], second, self.pairs)

    def beside(self, other: "Jet") -> "Jet":
        """Join the numbers of another jet to these ones, `[B, K + L]`."""
        self._check(other)
        second = None
        if self.second is not None or other.second is not None:
            both = [torch.zeros_like(j.first[:, :1]).expand(-1, len(j.pairs), -1) if j.second is None else j.second
                    for j in (self, other)]  # fmt: skip
            second = torch.cat(both, -1)
        value, first = torch.cat([self.value, other.value], -1), torch.cat([self.first, other.first], -1)
        return Jet(value, first, second, self.pairs)

    def map(self, function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> "Jet":
        """Apply an elementwise function by the chain rule.

        Args:
            function: Gives f(a), f'(a) and f''(a) of `[B, K]`, by operations that autograd knows.

        Returns:
            The jet of f.

        Example:
            >>> x = Jet.of(torch.zeros(1, 1))
            >>> x.map(lambda a: (a.exp(), a.exp(), a.exp())).d(0, 0).item()
            1.0
        """
        value, slope, bend = function(self.value)
        if not self.pairs:
            return Jet(value, slope.unsqueeze(1) * self.first, None, self.pairs)
        second = bend.unsqueeze(1) * self._products(self)
        slope = slope.unsqueeze(1)
        if self.second is not None:
            second = torch.addcmul(second, slope, self.second)
        return Jet(value, slope * self.first, second, self.pairs)

    def linear(self, function: Callable[[Tensor], Tensor]) -> "Jet":
        """Apply a linear function without an offset to the last dimension, of value and derivatives in one call.

        Args:
            function: From `[B, C, K]` to `[B, C, L]`.

        Returns:
            A jet of L numbers.
        """
        d, parts = self.num_inputs, [self.value.unsqueeze(1), self.first]
        moved = function(torch.cat(parts if self.second is None else [*parts, self.second], 1))
        second = None if self.second is None else moved[:, 1 + d :]
        return Jet(moved[:, 0], moved[:, 1 : 1 + d], second, self.pairs)

    def shift(self, offset: Tensor) -> "Jet":
        """Add a constant, or a parameter, to the value."""
        return Jet(self.value + offset, self.first, self.second, self.pairs)

    def _products(self, other: "Jet") -> Tensor:
        """First derivatives of this along i times those of the other along j, for the pairs (i, j)."""
        if self.pairs == wanted_pairs(self.num_inputs, 2, "diagonal"):  # without a copy
            return self.first * other.first
        left, right = (torch.tensor([pair[side] for pair in self.pairs], device=self.value.device) for side in (0, 1))
        return self.first.index_select(1, left) * other.first.index_select(1, right)

    def __add__(self, other: "Jet | Tensor | float") -> "Jet":
        if not isinstance(other, Jet):
            return Jet(self.value + other, self.first, self.second, self.pairs)
        self._check(other)
        parts = [second for second in (self.second, other.second) if second is not None]
        second = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return Jet(self.value + other.value, self.first + other.first, second, self.pairs)

    def __mul__(self, other: "Jet | Tensor | float") -> "Jet":
        if not isinstance(other, Jet):
            factor = other.unsqueeze(-2) if isinstance(other, Tensor) and other.ndim else other
            second = None if self.second is None else self.second * factor
            return Jet(self.value * other, self.first * factor, second, self.pairs)
        self._check(other)
        mine, theirs = self.value.unsqueeze(1), other.value.unsqueeze(1)
        first = self.first * theirs + mine * other.first
        if not self.pairs:
            return Jet(self.value * other.value, first, None, self.pairs)
        second = self._products(other) + other._products(self)
        second = second if self.second is None else second + self.second * theirs
        second = second if other.second is None else second + mine * other.second
        return Jet(self.value * other.value, first, second, self.pairs)

    def __neg__(self) -> "Jet":
        return self * -1.0

    def __sub__(self, other: "Jet | Tensor | float") -> "Jet":
        return self + (-other)

    def __rsub__(self, other: "Tensor | float") -> "Jet":
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def _check(self, other: "Jet") -> None:
        if other.pairs != self.pairs or other.num_inputs != self.num_inputs:
            raise InvalidOptionError(
                f"jets of {self.num_inputs} inputs with second derivatives {list(self.pairs)} and of "
                f"{other.num_inputs} inputs with {list(other.pairs)} do not fit: make both with the same options."
            )
