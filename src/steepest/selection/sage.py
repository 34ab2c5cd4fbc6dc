"""SAGE: keep the samples whose gradients agree with the consensus of their class, seen through a small sketch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from steepest._validation import check_choice, check_integer
from steepest.errors import InvalidOptionError
from steepest.selection.agreement import SageRun
from steepest.selection.method import Method, Run, Scope
from steepest.selection.quotas import ClassPolicy, check_policy
from steepest.selection.rules import Rule, Strata

__all__ = ["SAGE"]


@dataclass(frozen=True)
class SAGE(Method):
    r"""Agreement with the consensus of a class, through a Frequent Directions sketch of the gradients.

    The model stays fixed. The gradients :math:`g_i \in R^D` of all samples stream through a sketch
    :math:`S \in R^{l \times D}`; then every sample is scored:

    .. math::
        z_i = S g_i, \quad \hat z_i = z_i / |z_i|, \quad \alpha_i = \langle \hat z_i, u_{c(i)} \rangle \in [-1, 1]

    with the consensus u of the sample's class c, one of

    .. math::
        \text{"gradients":} \quad u_c \propto S\, \mathrm{mean}_{i \in c}\, g_i / |g_i| \qquad
        \text{"sketch":} \quad u_c \propto \mathrm{mean}_{i \in c}\, \hat z_i

    These differ: S does not keep lengths, so the mean of directions taken before S is not the mean taken after it.
    The first averages true gradients and needs one pass less; the second is the formula of the paper.

    Memory beside the model, with N samples, C classes, in bytes::

        sketch                         8 l D in the first pass (2 l float32 rows), 12 l D at its end, then 4 l D
        consensus="gradients"          + 8 C D in the first pass; more than the sketch where C > l
        consensus="sketch"             + 8 C l, and one pass more
        ... with keep_projections      + 2 N l
        scores                         + 4 N
        never                          N x D, N x N

    Writing a checkpoint copies what is held.

    Several processes (see `select_subset`) each sketch their part of the data; the first merges these sketches in the
    order of the ranks, adds up the means, and gives sketch and consensus to all. Where l is at least the rank of the
    gradients, scores are those of one process up to rounding. Else the merged sketch has the same bound but other
    numbers, as if one process had read the data in another order. On 900 points whose gradients have 68 dimensions,
    with 2 and 4 processes, scores differed by 0.005 on average for l = 8, 0.001 for 16 and 0.0003 for 32 (correlation
    0.998 and above). `Top` kept 90, 96 and 99 % the same samples; `Strata`, which takes evenly spaced ranks and so
    another neighbour wherever two scores change places, 25, 30 and 70 %. Beside the memory above the first process
    holds one further sketch of 4 l D bytes.

    What it is good for, as measured: the agreement with a trained scorer drops samples with wrong labels (hardness
    scores such as EL2N collect them), and keeps what is typical. On clean data with 30 % kept or less, a random subset
    with the same number from each class is hard to beat. An untrained scorer says nothing.

    Defined edges: a zero gradient agrees with nothing and scores 0, as does every sample of a class whose unit
    gradients cancel; a class of one sample agrees with itself, 1. Scaling the loss of a sample changes nothing but
    its share of the sketch.

    Differences from the paper: the consensus and the number kept are per class by default; samples
    whose gradients point far away from it are cut and the rest kept in even strata (the top alone keeps near-copies;
    over all classes it keeps few classes).
    Differences from the authors' code: the same scope for sketch and scores (not the sketch of one layer scored with
    all), the images of the data as they come (not augmented anew in each pass), a model that is the caller's own and
    meant to be trained (theirs never is), a shrink per l rows by a small eigenproblem (not one SVD per row), float32
    rows (float16 breaks the bound of the sketch), quotas that sum exactly (not rounded down class by class). The
    accuracies that the paper reports are not reproduced here.

    Args:
        sketch_size: Rows l of the sketch. The sum of squares that it can lose in any direction is at most
            ``min_k |A - A_k|_F^2 / (l - k)``; what it lost at most is ``numbers["certificate"]``.
        scope: Whose gradients: "last" (the last layer with a weight that the model calls), "all", or qualified names
            of modules. D is the number of its parameters.
        class_policy: "balanced" or "proportional": a consensus per class, and the same number from each class or its
            share of the data; "global": one consensus, classes do not matter; "auto": "balanced" where the data has
            labels, else "global".
        consensus: "gradients" (2 passes); "sketch" (3 passes, or 2 with ``keep_projections``); "reference" (3
            passes): as "sketch", with the mean over a reference set, such as a clean validation set, that must hold
            every class.
        rule: Whom to keep by score in a class: `Strata`, `Top`, `RandomAboveCut`.
        weights: "uniform", or "class": size of the class over how many of it are kept, with mean 1 over all kept.
        keep_projections: With consensus="sketch", keep every unit projection in float16 instead of a third pass:
            scores change by less than 5e-4.
        robust: Report the certificate of Robust Frequent Directions (arXiv 1705.05067), half as large, and its ridge.
            Sketch and scores stay the same.

    Raises:
        InvalidOptionError: If an option is impossible, or does not go with another.

    References:
        SAGE: Streaming Agreement-Driven Gradient Sketches for Representative Subset Selection, arXiv 2510.02470.

    Example:
        >>> SAGE(sketch_size=32, class_policy="balanced").begin().passes
        2
    """

    name: ClassVar[str] = "sage"

    sketch_size: int = 64
    scope: Scope = "last"
    class_policy: ClassPolicy = "auto"
    consensus: Literal["gradients", "sketch", "reference"] = "gradients"
    rule: Rule = field(default_factory=Strata)
    weights: Literal["uniform", "class"] = "uniform"
    keep_projections: bool = False
    robust: bool = False

    def __post_init__(self) -> None:
        check_integer("sketch_size", self.sketch_size, low=1)
        check_policy(self.class_policy)
        check_choice("consensus", self.consensus, ("gradients", "sketch", "reference"))
        check_choice("weights", self.weights, ("uniform", "class"))
        if not isinstance(self.rule, Rule):
            raise InvalidOptionError(f"rule={self.rule!r}: give Top(), Strata() or RandomAboveCut().")
        if self.keep_projections and self.consensus != "sketch":
            raise InvalidOptionError(
                f"keep_projections=True saves a pass only with consensus='sketch', not with {self.consensus!r}: leave "
                "it out."
            )

    def begin(self) -> Run:
        """Start a selection.

        Returns:
            Its passes, nothing learnt yet.
        """
        return SageRun(self)
