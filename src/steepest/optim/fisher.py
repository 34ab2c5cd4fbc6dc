"""Which Fisher information the factors of KFAC estimate: objects, so that an optimizer names its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest._validation import check_choice, check_integer, check_real

__all__ = ["Empirical", "Exact", "Fisher", "MonteCarlo", "OutputFisher"]

Outputs = Literal["categorical", "gaussian", "bernoulli"]
OUTPUTS = ("categorical", "gaussian", "bernoulli")


class Fisher:
    """An estimate of the Fisher information."""


@dataclass(frozen=True)
class Empirical(Fisher):
    r"""The gradients of the labels themselves, from the training backward: no cost of its own.

    .. math:: S = \tfrac1N \sum_n g_n g_n^T, \qquad g_n = \nabla_{z} \ell(f(x_n), y_n)

    It is the Fisher where the model is right about its labels on average, and shrinks as the losses do.
    """


@dataclass(frozen=True)
class OutputFisher(Fisher, ABC):
    """A Fisher information of the model's output distribution, by backward passes of its own from the output.

    Args:
        output: What the outputs are: class scores, means of a Gaussian, or logits of independent bits. Of ``[N, C]``
            the last dimension holds the C components; leading dimensions are independent samples.
        scale: Of a Gaussian, the Hessian of one sample's loss in its output: 1 for ``(f - y)^2 / 2`` summed over the
            components, 2 for squares without the half, ``2 / C`` for `torch.nn.MSELoss`.
    """

    output: Outputs = "categorical"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("output", self.output, OUTPUTS)
        check_real("scale", self.scale, low=0, open_low=True)

    @abstractmethod
    def roots(self, output: Tensor, seed: tuple[int, int]) -> Iterator[tuple[Tensor, float]]:
        """Yield vectors v of the output's shape with weights w, so that ``sum w E[v v^T]`` is the loss' Hessian.

        Args:
            output: What the model returned.
            seed: Numbers of the step and of the forward in it.
        """


@dataclass(frozen=True)
class MonteCarlo(OutputFisher):
    r"""Labels drawn from the model's own output distribution: one backward to the layers for each draw.

    .. math:: S = \tfrac1N \sum_n \mathrm{E}_{\hat y \sim p(\cdot | f(x_n))}\, \hat g_n \hat g_n^T

    Args:
        output: As in `OutputFisher`.
        scale: As in `OutputFisher`.
        draws: Labels per sample.
        seed: Seed of the draws, which follow from it, the step and the number of the forward in the step: a resumed run
            repeats them.

    Example:
        >>> import steepest as st
        >>> st.MonteCarlo("categorical", draws=2)
        MonteCarlo(output='categorical', scale=1.0, draws=2, seed=0)
    """

    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("draws", self.draws, low=1)
        check_integer("seed", self.seed, low=0)

    def roots(self, output: Tensor, seed: tuple[int, int]) -> Iterator[tuple[Tensor, float]]:
        """Gradients of the negative log-likelihood of drawn labels."""
        step, forward = seed
        generator = torch.Generator(output.device).manual_seed((self.seed * 1_000_003 + step) * 1_009 + forward)
        f = output.detach().float() if output.dtype.itemsize < 4 else output.detach()
        for _ in range(self.draws):
            if self.output == "categorical":
                p = f.softmax(-1)
                labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])
                root = p - torch.nn.functional.one_hot(labels, p.shape[-1])
            elif self.output == "bernoulli":
                p = f.sigmoid()
                root = p - torch.bernoulli(p, generator=generator)
            else:
                draw = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
                root = draw * self.scale**0.5
            yield root.to(output.dtype), 1 / self.draws


@dataclass(frozen=True)
class Exact(OutputFisher):
    r"""The Fisher information itself, which for these outputs is the generalised Gauss-Newton matrix.

    One backward to the layers for each of the C components of the output:

    .. math:: S = \tfrac1N \sum_n \sum_c g_{nc} g_{nc}^T, \qquad
        \sum_c v_{nc} v_{nc}^T = \nabla_f^2\, \ell(f(x_n), y_n)

    Example:
        >>> import steepest as st
        >>> st.Exact("gaussian", scale=2.0)
        Exact(output='gaussian', scale=2.0)
    """

    def roots(self, output: Tensor, seed: tuple[int, int]) -> Iterator[tuple[Tensor, float]]:
        """Columns of a root of the Hessian of the loss in the output."""
        del seed
        f = output.detach()
        probabilities = f.softmax(-1) if self.output == "categorical" else f.sigmoid()
        for component in range(f.shape[-1]):
            root = torch.zeros_like(f)
            if self.output == "categorical":
                root[..., component] = 1
                root = (root - probabilities) * probabilities[..., component : component + 1].sqrt()
            elif self.output == "bernoulli":
                p = probabilities[..., component]
                root[..., component] = (p * (1 - p)).sqrt()
            else:
                root[..., component] = self.scale**0.5
            yield root, 1.0
