"""Sven: singular value descent."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steepest._validation import check_choice, check_integer, check_real
from steepest.distributed.jacobian import SpreadJacobian
from steepest.distributed.ranks import Ranks, Traffic
from steepest.engine import Capture, Jacobian, ReferenceCapture, Rows, named_trainable
from steepest.errors import ClosureError, InvalidOptionError, NonFiniteError
from steepest.optim._apply import check_magnitude, decay
from steepest.optim.rows import RowKind, conditions, mean_loss
from steepest.optim.solvers import Damped, Solution, Solver, TruncatedEigh
from steepest.optim.together import Conditions, decide, fingerprints, share, solver_name

__all__ = ["Sven", "SvenDiagnostics"]

NORM_DECAY = 0.9  # of the running mean that the norm guard compares with


@dataclass(frozen=True, eq=False)
class SvenDiagnostics:
    """What the last step did.

    Args:
        rows: Number of conditions R, of all processes.
        rank: Singular directions used.
        spectrum: Singular values of J, largest first, float64; None where the solver needs none.
        noise_floor: Relative size below which singular values are rounding.
        update_norm: Euclidean norm of the direction d before lr, after clipping.
        clipped: Whether the norm guard shortened it.
        num_clipped: How many steps it has shortened so far.
        num_skipped: How many non-finite steps were skipped so far.
    """

    rows: int
    rank: int
    spectrum: Tensor | None
    noise_floor: float
    update_norm: float
    clipped: bool
    num_clipped: int
    num_skipped: int


class Sven(Optimizer):
    r"""Singular value descent: every sample's loss is a condition, and a step solves all of them at once.

    .. math:: d = J^+ R, \qquad \theta \leftarrow (1 - \eta w)\,\theta - \eta\, d

    with rows R_n of the batch, their Jacobian J (R x P) and a truncated or damped pseudo-inverse: d is the smallest
    change of the parameters that meets the conditions to first order. J is captured layer by layer in one forward and
    one backward and is not formed (`Capture`).

    Rows are ``l ** (kappa / 2)`` of the unreduced losses, or signed residuals r where the loss is r^2
    (``rows="residuals"``). Several kinds of conditions (equation, boundary, data) are given as a dict of named blocks.

    Several processes: where `torch.distributed` has a process group, every process calls `step` with a closure of its
    own part of the batch (parts may differ in size, none may be empty), and all of them take the step that one process
    would take with the whole batch. The model is plain: there is no backward that `DistributedDataParallel` could
    average, and of such a wrapper the inner module is trained. Rows are ordered by rank, those of a rank in the order
    of its blocks; a block that only some ranks have is allowed. What comes back is the mean loss of the whole batch.
    Parameters must start equal, which the first step checks, and every step checks options, learning rates and state;
    it ends with the same bits everywhere, because rank 0's solution is used. What fails on one rank raises on all
    (`NonFiniteError` is skipped on all), with nothing changed.

    Each rank forms a share of the Gram ``J J^T``: layer by layer the ranks send each other what the engine recorded,
    or explicit gradients where these are smaller, every pair of ranks once; so of W ranks each sends its own records
    (W - 1) / 2 times on average, and holds those of two others at a time, of one layer. Then, with R rows in all, M on
    the rank with most, P parameters of s bytes (of a ``fraction`` those that are kept), Gram numbers of g bytes (8, or
    4 with precision "float32") and K reported singular values, it gives to each step's collectives
    ``M (R + 1) g + M s`` gathered, ``P s + 8`` summed and ``64 + 8 R + 8 K`` broadcast bytes; in primal form nothing is
    sent, and it gives ``M s``, ``(P^2 + P) g`` and ``64 + P s + 8 K``. A few kilobytes of descriptions come on top.
    `TruncatedSVD` and `RandomizedSVD` gather J itself on every rank, ``M P s``. `traffic` counts. A solver of one's own
    sees a Jacobian of all rows, whose methods every rank must call alike; if it fails between them on one rank alone,
    the others wait.

    Args:
        model: The model, whose layers the engine must support (see `Capture`).
        params: Which parameters to train, or parameter groups with their own ``lr`` and ``weight_decay``; all that
            require grad by default.
        lr: Learning rate eta, the fraction of the solution that is taken.
        rows: What the closure returns: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``. With 2 a row is the loss itself, with 1 its root.
        solver: How ``J d = R`` is solved; ``TruncatedEigh(rtol=1e-3)`` for losses and ``Damped(1e-2)`` for
            residuals by default: residuals without damping follow the noise of nearly fitted samples.
        max_norm_ratio: Norm guard: d is shortened to this multiple of its norm's running mean, the first d to the
            norm of the parameters themselves; None for no guard. Without it one ill-conditioned batch can carry the
            model far away at finite loss, the first batch above all.
        weight_decay: Decoupled weight decay w.
        fraction: Random fraction of the output rows of every layer that a step changes: less memory and time.
        samples_per_row: Losses averaged into one row (micro-batching): fewer rows, less memory and time.
        seed: Seed of the random fraction.
        on_nonfinite: Whether a NaN or infinite loss or update raises, or skips the step, warns and counts.
        max_memory: Bytes for the temporaries of the Gram, see `Capture`.
        capture: An engine made by the user, such as ``ReferenceCapture(model)``.

    Raises:
        UnsupportedModelError: If the model holds a layer without an exact rule.
        InvalidOptionError: If an option is impossible.

    Differs from the paper:
        One forward and one backward instead of two; the Gram's spectrum instead of J's, in float64; truncation at
        ``rtol`` rather than at a rank by default; norm guard and damping.

    References:
        Sven, arXiv 2604.01279, equations 6 to 12.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> opt = st.Sven(model, lr=0.5, rows="residuals")
        >>> for _ in range(30):
        ...     loss = opt.step(lambda: (model(x) - torch.sin(3 * x)).squeeze(1))
        >>> bool(loss < 1e-3)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 0.1,
        rows: RowKind = "losses",
        kappa: float = 2.0,
        solver: Solver | None = None,
        max_norm_ratio: float | None = 3.0,
        weight_decay: float = 0.0,
        fraction: float = 1.0,
        samples_per_row: int = 1,
        seed: int = 0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        max_memory: int = 1 << 28,
        capture: Capture | ReferenceCapture | None = None,
    ) -> None:
        check_choice("rows", rows, ("losses", "residuals"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self._rows: RowKind = rows
        self._kappa = check_real("kappa", kappa, low=0, open_low=True)
        self._solver = solver if solver is not None else (TruncatedEigh() if rows == "losses" else Damped())
        if not isinstance(self._solver, Solver):
            raise InvalidOptionError(
                f"solver={solver!r}: give a solver object such as steepest.TruncatedEigh(rtol=1e-3)."
            )
        if max_norm_ratio is not None:
            check_real("max_norm_ratio", max_norm_ratio, low=1)
        self._max_norm_ratio = max_norm_ratio
        self._fraction = check_real("fraction", fraction, low=0, high=1, open_low=True)
        self._samples_per_row = check_integer("samples_per_row", samples_per_row, low=1)
        if rows == "residuals" and samples_per_row > 1:
            raise InvalidOptionError(
                "samples_per_row > 1 with rows='residuals': signed residuals cancel in a mean. Use rows='losses'."
            )
        self._seed = check_integer("seed", seed, low=0)
        self._skip = on_nonfinite == "skip"
        self._model = model
        self._wrapper: DistributedDataParallel | None = None
        if isinstance(model, DistributedDataParallel):
            self._model, self._wrapper = model.module, model
            warnings.warn(
                "Sven trains the module inside DistributedDataParallel: it makes no gradient that the wrapper could "
                "average, and sums over processes itself. Its state belongs to the names of model.module.",
                UserWarning,
                stacklevel=2,
            )
        self._max_memory = max_memory
        if params is None:
            params = [(n, p) for n, p in named_trainable(self._model, None).items()]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._capture = self._make_capture() if capture is None else capture
        self._check_capture()
        self._traffic = Traffic()
        self._compared = False  # the parameters of all processes, once
        self.diagnostics: SvenDiagnostics | None = None

    def _make_capture(self, kind: type[Capture | ReferenceCapture] = Capture) -> Capture | ReferenceCapture:
        params = [p for group in self.param_groups for p in group["params"]]
        return kind(self._model, params=params, max_memory=self._max_memory)

    def _check_capture(self) -> None:
        for group in self.param_groups:
            check_real("lr", group["lr"], low=0)
            check_real("weight_decay", group["weight_decay"], low=0)
        trained = {id(p) for group in self.param_groups for p in group["params"]}
        if trained != {id(p) for p in self.capture.params.values()}:
            raise InvalidOptionError(
                "capture= differentiates other parameters than params= trains: build it with the same parameters, "
                "as in ReferenceCapture(model, params=...)."
            )

    @property
    def rows(self) -> RowKind:
        """What the closure returns: "losses" or "residuals"."""
        return self._rows

    @property
    def capture(self) -> Capture | ReferenceCapture:
        """The engine that differentiates the rows."""
        return self._capture

    @property
    def traffic(self) -> Traffic:
        """What this process gave to collectives so far; nothing where it is alone."""
        return self._traffic

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters.

        Args:
            param_group: As in torch.optim.
        """
        super().add_param_group(param_group)
        if hasattr(self, "diagnostics"):  # constructed: the engine must follow
            self._capture = self._make_capture(type(self.capture))
            self._check_capture()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle together with the model; the engine is small and goes along."""
        base: dict[str, Any] = super().__getstate__()
        own = (
            "_rows", "_kappa", "_solver", "_max_norm_ratio", "_fraction", "_samples_per_row", "_seed", "_skip",
            "_model", "_wrapper", "_max_memory", "_capture", "_traffic", "diagnostics",
        )  # fmt: skip
        return base | {name: self.__dict__[name] for name in own} | {"_compared": False}

    @torch.no_grad()
    def step(self, closure: Callable[[], Rows] | None = None) -> Tensor | None:  # type: ignore[override]
        """Solve the conditions of one batch and move the parameters.

        The step is atomic: whatever it raises, parameters and state are as they were.

        Args:
            closure: Computes and returns the unreduced losses or residuals, ``(batch,)`` or a dict of such blocks.
                It calls no ``backward()`` and needs no ``zero_grad()``.

        Returns:
            The mean loss (of residuals the mean square), summed over blocks, before the step; None if it was skipped.

        Raises:
            ClosureError: If the closure is missing or returns something else.
            NonFiniteError: If rows, Gram or update hold NaN or infinity and ``on_nonfinite`` is "raise".
            UnsupportedModelError: If rows interact or a parameter is used without an exact rule.
        """
        ranks = Ranks.current()
        try:
            if ranks is None:
                found = self._differentiate(closure)
                jacobian, rhs, loss = found.jacobian, found.rhs, mean_loss(found.output, self._rows)
            else:
                ranks.traffic = self._traffic
                prints = None if self._compared else lambda: fingerprints(self._model, self.capture.params)
                settings = self._settings()
                jacobian, rhs, loss = share(ranks, lambda: self._differentiate(closure), self._rows, settings, prints)
                self._compared = True
            index, jacobian = self._restrict(jacobian)
            if ranks is None:
                solution, scale = self._solve(jacobian, rhs)
            else:
                solution, scale = decide(ranks, jacobian, lambda: self._solve(jacobian, rhs))
            rate = max(float(group["lr"]) for group in self.param_groups)
            remedy = "lower lr, raise rtol, or use steepest.Damped"
            check_magnitude(solution.magnitude * max(rate, 1.0), jacobian.dtype, remedy)
        except NonFiniteError as error:
            if not self._skip:
                raise
            self._change(num_skipped=self._memory["num_skipped"] + 1)
            warnings.warn(f"Step skipped: {error}", RuntimeWarning, stacklevel=3)
            return None
        self._apply(solution, scale, index)
        self._remember(solution, scale)
        return loss

    def _differentiate(self, closure: Callable[[], Rows] | None) -> Conditions:
        """Run the closure once, and one backward."""
        if closure is None:
            raise ClosureError(
                "Sven.step() needs a closure that returns the unreduced losses: "
                "opt.step(lambda: loss_fn(model(x), y)) with reduction='none'."
            )
        # A wrapper called in the closure would wait for gradients that never come.
        quiet = contextlib.nullcontext() if self._wrapper is None else self._wrapper.no_sync()
        with torch.enable_grad():
            with quiet, self.capture:
                output = closure()
            rows = conditions(output, self._rows, self._kappa, self._samples_per_row)
        return Conditions(output, self.capture.jacobian(rows), _stack(rows))

    def _solve(self, jacobian: Jacobian, rhs: Tensor) -> tuple[Solution, float]:
        solution = self._solver.solve(jacobian, rhs)
        return solution, self._guard(solution.norm)

    def _settings(self) -> dict[str, object]:
        """What must be the same on all processes, or they would part."""
        return {
            "rows": self._rows,
            "kappa": self._kappa,
            "samples_per_row": self._samples_per_row,
            "solver": solver_name(self._solver),
            "fraction": self._fraction,
            "seed": self._seed,
            "max_norm_ratio": self._max_norm_ratio,
            "on_nonfinite": "skip" if self._skip else "raise",
            "lr": [float(group["lr"]) for group in self.param_groups],
            "weight_decay": [float(group["weight_decay"]) for group in self.param_groups],
            "number of steps": self._memory["step"],
            "state of the norm guard": self._memory["norm_mean"],
        }

    @property
    def _memory(self) -> dict[str, Any]:
        """State of the optimizer as a whole; kept with the first parameter, as in torch.optim.LBFGS."""
        start: dict[str, Any] = {"step": 0, "norm_mean": 0.0, "num_clipped": 0, "num_skipped": 0}
        return self.state.get(self.param_groups[0]["params"][0]) or start

    def _change(self, **values: Any) -> None:
        """Change that state, which is there from the first step on that does something."""
        self.state[self.param_groups[0]["params"][0]] = {**self._memory, **values}

    def _restrict(self, jacobian: Jacobian) -> tuple[dict[str, Tensor], Jacobian]:
        """Choose this step's random output rows; the choice follows from seed and step, so a resumed run repeats it."""
        if self._fraction == 1:
            return {}, jacobian
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._memory["step"])
        index = jacobian.sample_outputs(self._fraction, generator)
        return index, jacobian.restrict(index)

    def _guard(self, norm: float) -> float:
        """Factor that keeps the update's norm within bounds."""
        memory = self._memory
        if self._max_norm_ratio is None:
            return 1.0
        if memory["step"] == 0:
            params = [p for group in self.param_groups for p in group["params"]]
            limit = float(
                torch.linalg.vector_norm(torch.stack([n.double().cpu() for n in torch._foreach_norm(params)]))
            )
        else:
            limit = self._max_norm_ratio * memory["norm_mean"] / (1 - NORM_DECAY ** memory["step"])
        # Parameters that are all zero, or updates that were so far, set no scale.
        return limit / norm if norm > limit > 0 else 1.0

    def _apply(self, solution: Solution, scale: float, index: Mapping[str, Tensor]) -> None:
        names = {id(p): name for name, p in self.capture.params.items()}
        groups = [(group, [names[id(p)] for p in group["params"]]) for group in self.param_groups]
        alone = not isinstance(solution.jacobian, SpreadJacobian)
        if solution.weights is not None and not index and alone:  # straight into the parameters, no copy of d
            for group, _ in groups:
                decay(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
            alphas = {name: -float(group["lr"]) * scale for group, trained in groups for name in trained}
            solution.jacobian.add_vjp_(self.capture.params, solution.weights, alphas)
            return
        direction = solution.direction()
        for group, trained in groups:
            updates = [_widen(direction[n], p, index.get(n)) for n, p in zip(trained, group["params"], strict=True)]
            decay(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-float(group["lr"]) * scale)

    def _remember(self, solution: Solution, scale: float) -> None:
        memory = self._memory
        self._change(
            step=memory["step"] + 1,
            norm_mean=NORM_DECAY * memory["norm_mean"] + (1 - NORM_DECAY) * solution.norm * scale,
            num_clipped=memory["num_clipped"] + (scale < 1),
        )
        memory = self._memory
        self.diagnostics = SvenDiagnostics(
            rows=solution.jacobian.num_rows,
            rank=solution.rank,
            spectrum=solution.spectrum,
            noise_floor=solution.noise_floor,
            update_norm=solution.norm * scale,
            clipped=scale < 1,
            num_clipped=memory["num_clipped"],
            num_skipped=memory["num_skipped"],
        )


def _widen(update: Tensor, param: Tensor, index: Tensor | None) -> Tensor:
    """Put the update of some output rows into zeros of the parameter's shape."""
    if index is None or param.ndim == 0:
        return update
    return torch.zeros_like(param).index_copy_(0, index, update)


def _stack(rows: Rows) -> Tensor:
    blocks = rows.values() if isinstance(rows, Mapping) else [rows]
    return torch.cat([block.detach() for block in blocks])
