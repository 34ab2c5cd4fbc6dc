"""Sven: singular value descent."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
from steepest.optim.gram import Solution
from steepest.optim.leave_one_out import LeaveOneOut, verified
from steepest.optim.levenberg import LevenbergMarquardt, search
from steepest.optim.metric import KroneckerMetric, LayerMetric, geometry_of
from steepest.optim.restoring import restore
from steepest.optim.rows import RowKind, check_weights, conditions, mean_loss, row_values, sample_sizes, weighted
from steepest.optim.sets import ADAMW_DEFAULTS, apply_adamw, columns, loss_gradient, row_weights
from steepest.optim.solvers import AdaptiveSolver, Solver
from steepest.optim.system import SvenDiagnostics, System, chosen_metric, default_kappa, stacked, widened
from steepest.optim.together import Conditions, decide, fingerprints, share, solver_name
from steepest.optim.trials import Trials, random_state, repeated

__all__ = ["Sven"]

NORM_DECAY = 0.9  # of the running mean that the norm guard compares with


class Sven(Optimizer):
    r"""Singular value descent: every sample's loss is a condition, and a step solves all of them at once.

    .. math:: d = J^+ R, \qquad \theta \leftarrow (1 - \eta w)\,\theta - \eta\, d

    with rows R_n of the batch, their Jacobian J (R x P) and a truncated or damped pseudo-inverse: d is the smallest
    change of the parameters that meets the conditions to first order. J is captured layer by layer in one forward and
    one backward and is not formed (`Capture`).

    Rows are ``l ** (kappa / 2)`` of the unreduced losses, or signed residuals r where the loss is r^2
    (``rows="residuals"``), ``(batch,)`` or ``(batch, K)`` for several outputs. `ggn_rows` makes residuals of
    cross-entropy and other convex losses. Several kinds of conditions (equation, boundary, data) are given as a dict of
    named blocks.

    Without options nothing has to be tuned: `LeaveOneOut` finds damping and length of every step from the batch itself
    and tries the step out, and `KroneckerMetric` measures steps by the curvature of past batches. Where samples have
    wrong or ambiguous labels, as in most classification, it fits them too: there ``kappa=2`` with
    ``solver=Damped(0.1)``, a falling rate and some weight decay end lower. For a fixed set of conditions, such as those
    of an equation, `LevenbergMarquardt` goes to the bottom.

    A group of ``params`` with ``"method": "adamw"`` is trained by AdamW, by the gradient of the mean loss from the same
    backward, with ``lr``, ``betas``, ``eps`` and ``weight_decay`` of its own, such as a head beside layers of Sven.

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
    ``M (R + 1) g + M s`` gathered, ``P s + 8`` summed and ``88 + 8 R + 8 K`` broadcast bytes; in primal form nothing is
    sent, and it gives ``M s``, ``(P^2 + P) g`` and ``88 + P s + 8 K``. A few kilobytes of descriptions come on top. A
    solver that learns broadcasts 8 bytes for every number of its memory, every try of a step
    sums ``P s + 16`` instead of ``P s + 8``, momentum gathers ``M s`` and sums ``P s + 8`` more, and a metric sums both
    factors of each layer, ``(n^2 + m^2) s + 16`` for n inputs, the bias as one of them, and m outputs.
    `TruncatedSVD` and `RandomizedSVD` gather J itself on every rank, ``M P s``. `traffic` counts. A solver of one's own
    sees a Jacobian of all rows, whose methods every rank must call alike; if it fails between them on one rank alone,
    the others wait.

    Args:
        model: The model, whose layers the engine must support (see `Capture`).
        params: Which parameters to train, or parameter groups with their own ``lr`` and ``weight_decay``; all that
            require grad by default.
        lr: Learning rate eta, the fraction of the solution that is taken; by default 1 with solvers that find the
            length themselves (`LeaveOneOut`, `LevenbergMarquardt`), else 0.1.
        rows: What the closure returns: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``. With 2 a row is the loss itself, with 1 its root, the residual
            behind a squared loss. By default 1 without a ``solver``, else 2 as in the paper.
        solver: How ``J d = R`` is solved; `LeaveOneOut` by default.
        metric: What the length of d is measured by: a `KroneckerMetric`, or None for the Euclidean norm. "auto" is the
            metric without a ``solver`` (and with ``fraction=1``), else None.
        momentum: mu of ``|J d - R|^2 + lambda |d - mu d_before|^2``, d staying near the step before (SPRING, arXiv
            2401.10190).
        weights: Weight of some named blocks in the loss: residuals are multiplied with its root.
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
        One forward and one backward instead of two; the Gram's spectrum instead of J's, in float64; a damping and a
        step length that the batch decides instead of a rank and a rate; the metric; norm guard. The paper's own is
        ``Sven(model, lr=..., solver=TruncatedEigh(rank=..., rtol=...), max_norm_ratio=None)``.

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
        lr: float | Tensor | None = None,
        rows: RowKind = "losses",
        kappa: float | None = None,
        solver: Solver | None = None,
        metric: KroneckerMetric | Literal["auto"] | None = "auto",
        momentum: float = 0.0,
        weights: Mapping[str, float] | None = None,
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
        self._kappa = check_real("kappa", default_kappa(kappa, solver), low=0, open_low=True)
        self._solver = LeaveOneOut() if solver is None else solver
        self._check_solver(self._solver)
        if max_norm_ratio is not None:
            check_real("max_norm_ratio", max_norm_ratio, low=1)
        self._max_norm_ratio = max_norm_ratio
        self._fraction = check_real("fraction", fraction, low=0, high=1, open_low=True)
        self._samples_per_row = check_integer("samples_per_row", samples_per_row, low=1)
        if rows == "residuals" and samples_per_row > 1:
            raise InvalidOptionError(
                "samples_per_row > 1 with rows='residuals': signed residuals cancel in a mean. Use rows='losses'."
            )
        self._metric = chosen_metric(metric, solver, fraction)
        self._momentum = check_real("momentum", momentum, low=0, high=1, open_high=True)
        self._weights = {str(n): check_real(f"weights[{n!r}]", w, low=0) for n, w in (weights or {}).items()}
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
        if lr is None:
            lr = 1.0 if isinstance(self._solver, LeaveOneOut | LevenbergMarquardt) else 0.1
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "method": "sven"})
        self._capture = self._make_capture() if capture is None else capture
        self._check_capture()
        self._traffic = Traffic()
        self._compared = False  # the parameters of all processes, once
        self.diagnostics: SvenDiagnostics | None = None

    @staticmethod
    def _check_solver(solver: Solver) -> None:
        if not isinstance(solver, Solver):
            raise InvalidOptionError(
                f"solver={solver!r}: give a solver object such as steepest.TruncatedEigh(rtol=1e-3)."
            )

    def _make_capture(self, kind: type[Capture | ReferenceCapture] = Capture) -> Capture | ReferenceCapture:
        params = [p for group in self.param_groups for p in group["params"]]
        return kind(self._model, params=params, max_memory=self._max_memory)

    def _check_capture(self) -> None:
        for group in self.param_groups:
            check_choice("method", group["method"], ("sven", "adamw"))
            check_real("lr", group["lr"], low=0)
            check_real("weight_decay", group["weight_decay"], low=0)
        if not self._sven_groups:
            raise InvalidOptionError(
                "Every parameter group has method='adamw': leave one to Sven, or use AdamW itself."
            )
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
    def solver(self) -> Solver:
        """How conditions are solved; assigned between steps it follows a schedule, of ``rtol`` or a damping say."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._check_solver(solver)
        if type(solver) is not type(self._solver) and self._memory["solver"] is not None:
            self._change(solver=None)  # what another kind of solver had learnt
        self._solver = solver

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
            param_group: As in torch.optim; with ``"method": "adamw"`` AdamW trains them, whose ``lr``, ``betas``,
                ``eps`` and ``weight_decay`` may be given too.
        """
        if isinstance(param_group, dict) and param_group.get("method") == "adamw":
            param_group = {**ADAMW_DEFAULTS, **param_group}
        super().add_param_group(param_group)
        if hasattr(self, "diagnostics"):  # constructed: the engine must follow
            self._capture = self._make_capture(type(self.capture))
            self._check_capture()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle together with the model; the engine is small and goes along."""
        base: dict[str, Any] = super().__getstate__()
        own = (
            "_rows", "_kappa", "_solver", "_metric", "_momentum", "_weights", "_max_norm_ratio",
            "_fraction", "_samples_per_row", "_seed", "_skip",
            "_model", "_wrapper", "_max_memory", "_capture", "_traffic", "diagnostics",
        )  # fmt: skip
        return base | {name: self.__dict__[name] for name in own} | {"_compared": False}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state.

        Args:
            state_dict: What `state_dict` returned for an optimizer of the same model and options.
        """
        own = copy.deepcopy(dict(state_dict))  # torch keeps the given tensors, and two optimizers would share them
        super().load_state_dict(own)
        restore(self, own, ("solver", "metric"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Rows] | None = None) -> Tensor | None:  # type: ignore[override]
        """Solve the conditions of one batch and move the parameters.

        The step is atomic: whatever it raises, parameters and state are as they were.

        Args:
            closure: Computes and returns the unreduced losses or residuals, ``(batch,)``, of residuals also
                ``(batch, K)``, or a dict of such blocks. It calls no ``backward()`` and needs no ``zero_grad()``. It is
                called again, on the same batch, by solvers that try their steps.

        Returns:
            The mean loss (of residuals the mean square), summed over blocks, before the step; None if it was skipped.

        Raises:
            ClosureError: If the closure is missing or returns something else.
            NonFiniteError: If rows, Gram or update hold NaN or infinity and ``on_nonfinite`` is "raise".
            UnsupportedModelError: If rows interact or a parameter is used without an exact rule.
        """
        ranks = Ranks.current()
        tries = isinstance(self._solver, LevenbergMarquardt)
        tries = tries or (isinstance(self._solver, LeaveOneOut) and self._solver.verify)
        random = random_state(self.capture.params.values()) if tries else []
        try:
            system = self._system(closure, ranks)
            if tries:
                move = partial(self._move, system)
                evaluate = partial(self._evaluate, closure, random)
                probe = partial(self._move, system, plain=True)
                trials = Trials(self._sven_params(), system.given, move, probe, evaluate, ranks)
                solution, scale, grads, accepted = self._tried(system, trials, ranks)
            else:
                solution, scale = self._solve(system, ranks)
                grads = self._other_gradients(system)
                self._move(system, solution, scale * solution.step)
                accepted = True
        except NonFiniteError as error:
            if not self._skip:
                raise
            self._change(num_skipped=self._memory["num_skipped"] + 1)
            warnings.warn(f"Step skipped: {error}", RuntimeWarning, stacklevel=3)
            return None
        if grads:
            apply_adamw([g for g in self.param_groups if g["method"] == "adamw"], self.state, grads)
        self._remember(solution, scale, system, accepted=accepted)
        return system.loss

    def _tried(
        self, system: System, trials: Trials, ranks: Ranks | None
    ) -> tuple[Solution, float, dict[int, Tensor], bool]:
        """Solve, and move as far as it helps: solution, norm guard, AdamW's gradients, whether anything moved."""
        grads = self._other_gradients(system)
        if isinstance(self._solver, LevenbergMarquardt):
            memory = self._memory["solver"]
            solution, accepted = search(self._solver, system.used, system.rhs, memory, trials)
            return solution, 1.0, grads, accepted
        solution, scale = self._solve(system, ranks)
        solution, accepted = verified(solution, trials.before, lambda s, length: trials(s, length * scale))
        return solution, scale, grads, accepted

    def _system(self, closure: Callable[[], Rows] | None, ranks: Ranks | None) -> System:
        """The conditions of this batch, of all processes, in the coordinates that they are solved in."""
        if ranks is None:
            found = self._differentiate(closure)
            jacobian, rhs, samples = found.jacobian, found.rhs, found.samples
            loss = mean_loss(found.output, self._rows)
        else:
            ranks.traffic = self._traffic
            prints = None if self._compared else lambda: fingerprints(self._model, self.capture.params)
            compute = partial(self._differentiate, closure, several=True)
            jacobian, rhs, loss, samples = share(ranks, compute, self._rows, self._settings(), prints, self._weights)
            self._compared = True
        whole, given = jacobian, rhs
        if len(self._sven_groups) < len(self.param_groups):
            jacobian = columns(jacobian, self._sven_names())
        index, jacobian = self._restrict(jacobian)
        geometry = None
        if self._metric is not None:
            geometry = geometry_of(self._metric, self._layers(), jacobian, ranks)
        slopes = row_weights(rhs, samples, self._rows, self._kappa)
        previous = self._previous(jacobian, index) if self._momentum else None
        if previous is not None:
            rhs = rhs - self._momentum * jacobian.jvp(previous).to(rhs)
        return System(whole, jacobian, geometry, rhs, slopes, samples, index, previous, loss, given)

    def _differentiate(self, closure: Callable[[], Rows] | None, *, several: bool = False) -> Conditions:
        """Run the closure once, and one backward; with several processes, where others hear of what fails here."""
        if several:
            self._check_several()
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
            if not several:
                check_weights(self._weights, output if isinstance(output, Mapping) else ())
            output = weighted(output, self._weights, self._rows)
            rows = conditions(output, self._rows, self._kappa, self._samples_per_row)
        return Conditions(output, self.capture.jacobian(rows), stacked(rows), sample_sizes(rows))

    def _evaluate(self, closure: Callable[[], Rows] | None, random: list[tuple[torch.device, Tensor]]) -> Tensor:
        """The rows of the same batch once more."""
        if closure is None:
            raise ClosureError("Sven.step() needs a closure that returns the unreduced losses.")
        # With gradients, which a closure may need for its own derivatives; a wrapper must not wait for any.
        quiet = contextlib.nullcontext() if self._wrapper is None else self._wrapper.no_sync()
        with torch.enable_grad(), quiet, repeated(random):
            output = weighted(closure(), self._weights, self._rows)
        return row_values(output, self._rows, self._kappa, self._samples_per_row)

    def _solve(self, system: System, ranks: Ranks | None) -> tuple[Solution, float]:
        """The solution, the same on all processes, and the factor of the norm guard."""
        if ranks is None:
            solution, scale = self._solved(system)
        else:
            solution, scale = decide(ranks, system.used, lambda: self._solved(system))
        rate = max(float(group["lr"]) for group in self._sven_groups)
        remedy = "lower lr, raise rtol, or use steepest.Damped"
        check_magnitude(solution.magnitude * max(rate, 1.0), system.used.dtype, remedy)
        return solution, scale

    def _solved(self, system: System) -> tuple[Solution, float]:
        if isinstance(self._solver, AdaptiveSolver):
            solution = self._solver.adapt(system.used, system.rhs, self._memory["solver"], system.samples)
        else:
            solution = self._solver.solve(system.used, system.rhs)
        return solution, self._guard(solution.norm)

    def _move(self, system: System, solution: Solution, scale: float, *, plain: bool = False) -> None:
        """Move the parameters along a share of a solution; plainly: without learning rate and weight decay."""
        straight = system.geometry is None and system.previous is None and not system.index
        alone = not isinstance(solution.jacobian, SpreadJacobian)
        names = {id(p): name for name, p in self.capture.params.items()}
        groups = [(group, [names[id(p)] for p in group["params"]]) for group in self._sven_groups]
        if straight and alone and not plain and solution.weights is not None:  # into the parameters, no copy of d
            for group, _ in groups:
                decay(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
            alphas = {name: -float(group["lr"]) * scale for group, trained in groups for name in trained}
            solution.jacobian.add_vjp_(self.capture.params, solution.weights, alphas)
            return
        direction = self._direction(system, solution)
        for group, trained in groups:
            updates = [
                widened(direction[n], p, system.index.get(n)) for n, p in zip(trained, group["params"], strict=True)
            ]
            if not plain:
                decay(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-(1.0 if plain else float(group["lr"])) * scale)

    def _direction(self, system: System, solution: Solution) -> dict[str, Tensor]:
        """The direction in the parameters' own coordinates, with momentum."""
        direction = solution.direction() if system.geometry is None else system.geometry.direction(solution)
        if system.previous is not None:
            direction = {n: d.add(system.previous[n], alpha=self._momentum) for n, d in direction.items()}
        if system.geometry is not None or system.previous is not None:
            size = float(torch.stack([n.double() for n in torch._foreach_norm(list(direction.values()))]).sum())
            check_magnitude(size, system.jacobian.dtype, "lower lr, or raise the metric's damping")
        return direction

    def _previous(self, jacobian: Jacobian, index: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The direction of the step before, in the Jacobian's columns."""
        found = {}
        for name, shape in jacobian.shapes.items():
            param = self.capture.params[name]
            last = self.state[param].get("direction") if param in self.state else None
            if last is None:
                found[name] = torch.zeros(shape, dtype=jacobian.dtype, device=jacobian.device)
            else:
                found[name] = last if name not in index or param.ndim == 0 else last.index_select(0, index[name])
        return found

    def _other_gradients(self, system: System) -> dict[int, Tensor]:
        """Gradients of the mean loss in the parameters that AdamW trains, by their ids."""
        if len(self._sven_groups) == len(self.param_groups):
            return {}
        trained = set(self._sven_names())
        names = [name for name in self.capture.params if name not in trained]
        grads = loss_gradient(columns(system.whole, names), system.slopes, "lower the learning rate")
        return {id(self.capture.params[name]): grad for name, grad in grads.items()}

    @property
    def _sven_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["method"] == "sven"]

    def _sven_params(self) -> list[Tensor]:
        return [p for group in self._sven_groups for p in group["params"]]

    def _sven_names(self) -> list[str]:
        trained = {id(p) for p in self._sven_params()}
        return [name for name, p in self.capture.params.items() if id(p) in trained]

    def _layers(self) -> dict[str, LayerMetric]:
        """The metric of every layer so far."""
        found = {name: self.state[p].get("metric") for name, p in self.capture.params.items() if p in self.state}
        return {name: LayerMetric(**state) for name, state in found.items() if state}

    def _check_several(self) -> None:
        """Refuse what has no form on several processes."""
        odd = "method='adamw'" if len(self._sven_groups) < len(self.param_groups) else None
        if isinstance(self._solver, LevenbergMarquardt):
            odd = "solver=LevenbergMarquardt(...)"
        if odd is not None:
            raise InvalidOptionError(
                f"Sven with {odd} works in one process: leave it out, or start one process (without torchrun)."
            )

    def _settings(self) -> dict[str, object]:
        """What must be the same on all processes, or they would part."""
        return {
            "rows": self._rows,
            "kappa": self._kappa,
            "samples_per_row": self._samples_per_row,
            "solver": solver_name(self._solver),
            "metric": repr(self._metric),
            "momentum": self._momentum,
            "weights": self._weights,
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
        """State of the optimizer as a whole; kept with its first parameter, as in torch.optim.LBFGS."""
        start: dict[str, Any] = {"step": 0, "norm_mean": 0.0, "num_clipped": 0, "num_skipped": 0, "solver": None}
        found: dict[str, Any] = self.state.get(self._sven_params()[0], {})
        return start | found

    def _change(self, **values: Any) -> None:
        """Change that state, which is there from the first step on that does something."""
        self.state[self._sven_params()[0]] = {**self._memory, **values}

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
            norms = torch._foreach_norm(self._sven_params())
            limit = float(torch.linalg.vector_norm(torch.stack([n.double().cpu() for n in norms])))
        else:
            limit = self._max_norm_ratio * memory["norm_mean"] / (1 - NORM_DECAY ** memory["step"])
        # Parameters that are all zero, or updates that were so far, set no scale.
        return limit / norm if norm > limit > 0 else 1.0

    def _remember(self, solution: Solution, scale: float, system: System, *, accepted: bool) -> None:
        memory = self._memory
        self._change(
            step=memory["step"] + 1,
            norm_mean=NORM_DECAY * memory["norm_mean"] + (1 - NORM_DECAY) * solution.norm * scale,
            num_clipped=memory["num_clipped"] + (scale < 1),
            solver=solution.memory,
        )
        params = self.capture.params
        if system.geometry is not None:
            for name, layer in system.geometry.layers.items():
                self.state[params[name]]["metric"] = layer.state()
        if system.previous is not None:
            last = self._direction(system, solution) if accepted else {}
            for name in system.previous:  # a momentum that leads nowhere is given up
                self.state[params[name]].pop("direction", None)
                if name in last:
                    self.state[params[name]]["direction"] = widened(last[name], params[name], system.index.get(name))
        memory = self._memory
        self.diagnostics = SvenDiagnostics(
            rows=system.jacobian.num_rows,
            rank=solution.rank,
            spectrum=solution.spectrum,
            noise_floor=solution.noise_floor,
            update_norm=solution.norm * scale,
            clipped=scale < 1,
            num_clipped=memory["num_clipped"],
            num_skipped=memory["num_skipped"],
            damping=solution.damping,
            length=solution.step,
            accepted=accepted,
        )
