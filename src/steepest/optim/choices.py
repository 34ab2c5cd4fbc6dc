"""The options of Sven, checked, with the defaults that follow from each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from steepest._validation import check_choice, check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.optim.balance import BalancedMetric
from steepest.optim.kalman import KalmanFilter
from steepest.optim.leave_one_out import LeaveOneOut
from steepest.optim.metric import KroneckerMetric
from steepest.optim.rows import RowKind
from steepest.optim.solvers import SearchingSolver, Solver
from steepest.optim.together import solver_name

__all__ = ["Choices", "default_lr"]

_SMALL = 1024  # parameters of a model whose covariance costs little
_RELATIVE_DECAY = 2e-3  # where nobody chose a solver, and the model is not small
_MAX_NORM_RATIO = 3.0  # where nothing tries the steps out


@dataclass(frozen=True, eq=False)
class Choices:
    """What the user of a Sven has chosen, see there.

    Args:
        rows: What the closure returns.
        kappa: Rows of losses are ``l ** (kappa / 2)``.
        solver: How conditions are solved.
        metric: What the length of a step is measured by; None for the Euclidean norm.
        momentum: mu.
        weights: Weight of some named blocks.
        max_norm_ratio: Of the norm guard; None for none, "auto" where the solver decides (`norm_ratio`).
        relative_decay: c of the decay that follows the conditions.
        fraction: Random fraction of the output rows that a step changes.
        samples_per_row: Losses averaged into one row.
        seed: Seed of the random fraction.
        skip: Whether steps that are not finite are skipped.
    """

    rows: RowKind
    kappa: float
    solver: Solver
    metric: KroneckerMetric | BalancedMetric | None
    momentum: float
    weights: dict[str, float]
    max_norm_ratio: float | Literal["auto"] | None
    relative_decay: float
    fraction: float
    samples_per_row: int
    seed: int
    skip: bool

    @classmethod
    def checked(
        cls,
        *,
        rows: RowKind,
        kappa: float | None,
        solver: Solver | None,
        metric: KroneckerMetric | BalancedMetric | Literal["auto"] | None,
        momentum: float,
        weights: Mapping[str, float] | None,
        max_norm_ratio: float | Literal["auto"] | None,
        relative_decay: float | None,
        fraction: float,
        samples_per_row: int,
        seed: int,
        on_nonfinite: Literal["raise", "skip"],
        size: int,
    ) -> Self:
        """Take the constructor's arguments.

        Args:
            rows: As there.
            kappa: As there; the root of a loss is the residual behind it, the paper's solvers take the losses.
            solver: As there.
            metric: As there.
            momentum: As there.
            weights: As there.
            max_norm_ratio: As there.
            relative_decay: As there.
            fraction: As there.
            samples_per_row: As there.
            seed: As there.
            on_nonfinite: As there.
            size: Number of parameters that Sven trains.

        Returns:
            All of them, with defaults.

        Raises:
            InvalidOptionError: If an option is impossible.
        """
        check_choice("rows", rows, ("losses", "residuals"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        default_kappa = 1.0 if solver is None else 2.0
        kappa = check_real("kappa", default_kappa if kappa is None else kappa, low=0, open_low=True)
        if max_norm_ratio is not None and max_norm_ratio != "auto":
            max_norm_ratio = check_real("max_norm_ratio", max_norm_ratio, low=1)
        fraction = check_real("fraction", fraction, low=0, high=1, open_low=True)
        samples_per_row = check_integer("samples_per_row", samples_per_row, low=1)
        if rows == "residuals" and samples_per_row > 1:
            raise InvalidOptionError(
                "samples_per_row > 1 with rows='residuals': signed residuals cancel in a mean. Use rows='losses'."
            )
        momentum = check_real("momentum", momentum, low=0, high=1, open_high=True)
        # Whoever asks for more than the conditions gets the solver that takes all of it.
        plain = metric == "auto" and max_norm_ratio in {"auto", None} and fraction == 1 and momentum == 0
        if solver is None and plain and size <= _SMALL:
            solver = KalmanFilter()
        if relative_decay is None:
            relative_decay = _RELATIVE_DECAY if solver is None else 0.0
        found = cls(
            rows,
            kappa,
            _solver(LeaveOneOut() if solver is None else solver, max_norm_ratio),
            _metric(metric, solver, fraction),
            momentum,
            {str(n): check_real(f"weights[{n!r}]", w, low=0) for n, w in (weights or {}).items()},
            max_norm_ratio,
            check_real("relative_decay", relative_decay, low=0, high=1, open_high=True),
            fraction,
            samples_per_row,
            check_integer("seed", seed, low=0),
            on_nonfinite == "skip",
        )
        found.check_columns()
        if isinstance(found.solver, KalmanFilter):
            found.solver.check_size(size)
        return found

    def solved_by(self, solver: Solver) -> Self:
        """Choose another solver.

        Args:
            solver: The new one.

        Returns:
            The choices with it.
        """
        found = replace(self, solver=_solver(solver, self.max_norm_ratio))
        found.check_columns()
        return found

    def check_columns(self) -> None:
        """Refuse a filter of parameters that are not the same in every step.

        Raises:
            InvalidOptionError: If there is one.
        """
        if isinstance(self.solver, KalmanFilter) and (self.metric is not None or self.fraction < 1):
            other = f"fraction={self.fraction:g}" if self.metric is None else f"metric={self.metric!r}"
            raise InvalidOptionError(
                f"{self.solver!r} with {other}: its covariance is that of all parameters, in their own coordinates. "
                "Drop one of the two."
            )

    @property
    def tries(self) -> bool:
        """Whether steps are tried out."""
        return isinstance(self.solver, SearchingSolver) or (isinstance(self.solver, LeaveOneOut) and self.solver.verify)

    @property
    def norm_ratio(self) -> float | None:
        """That of the norm guard; of steps that are tried out the first one alone is guarded."""
        if self.max_norm_ratio == "auto":
            return math.inf if self.tries else _MAX_NORM_RATIO
        return self.max_norm_ratio

    def alike(self) -> dict[str, object]:
        """What must be the same on all processes, or they would part."""
        named: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "skip"}
        return named | {
            "solver": solver_name(self.solver),
            "metric": repr(self.metric),
            "on_nonfinite": "skip" if self.skip else "raise",
        }


def default_lr(solver: Solver | None) -> float:
    """The rate where the user gives none: solvers that find the length of a step themselves take all of it.

    Args:
        solver: The user's.

    Returns:
        1, or 0.1.
    """
    return 1.0 if solver is None or isinstance(solver, LeaveOneOut | SearchingSolver) else 0.1


def _solver(solver: Solver, max_norm_ratio: float | Literal["auto"] | None) -> Solver:
    if isinstance(solver, SearchingSolver) and max_norm_ratio not in {"auto", None}:
        raise InvalidOptionError(
            f"max_norm_ratio={max_norm_ratio:g} with {solver!r}, which tries its steps out and has no norm guard: "
            "leave max_norm_ratio out."
        )
    if not isinstance(solver, Solver):
        raise InvalidOptionError(f"solver={solver!r}: give a solver object such as steepest.TruncatedEigh(rtol=1e-3).")
    return solver


def _metric(
    metric: KroneckerMetric | BalancedMetric | Literal["auto"] | None, solver: Solver | None, fraction: float
) -> KroneckerMetric | BalancedMetric | None:
    """Check the option and say what "auto" means with the user's solver."""
    if metric == "auto":
        return KroneckerMetric() if solver is None and fraction == 1 else None
    if metric is not None and not isinstance(metric, KroneckerMetric | BalancedMetric):
        raise InvalidOptionError(
            f"metric={metric!r}: give steepest.KroneckerMetric(...), steepest.BalancedMetric(...), None for none, or "
            "'auto'."
        )
    if isinstance(metric, KroneckerMetric) and fraction < 1:
        raise InvalidOptionError(
            f"metric={metric!r} with fraction={fraction:g}: a metric is that of whole layers; drop one of the two."
        )
    return metric
