"""Sven: singular value descent."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steepest._validation import check_choice, check_real
from steepest.distributed.ranks import Ranks, Traffic
from steepest.engine import Capture, ReferenceCapture, Rows, named_trainable
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.optim.balance import BalancedMetric
from steepest.optim.choices import Choices, default_lr
from steepest.optim.memory import Memory
from steepest.optim.metric import KroneckerMetric
from steepest.optim.moving import Mover
from steepest.optim.posing import Batch, alone, pose
from steepest.optim.restoring import restore
from steepest.optim.rows import RowKind
from steepest.optim.sets import ADAMW_DEFAULTS, apply_adamw, other_gradients
from steepest.optim.solvers import Solver
from steepest.optim.solving import Step
from steepest.optim.system import Outcome, SvenDiagnostics, System
from steepest.optim.together import Shared, fingerprints, share

__all__ = ["Sven"]


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

    Without options nothing has to be tuned. Up to 1,024 trained parameters `KalmanFilter` remembers what all batches so
    far have settled, by which smooth functions gain most. For larger models `LeaveOneOut` finds damping and length of
    every step from the batch itself, and `KroneckerMetric` measures steps by the curvature of past batches. Both try
    their steps out. Where samples have wrong or ambiguous labels, as in most classification, ``kappa=2`` with
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
    ``M (R + 1) g + M s`` gathered, ``P s + 8`` summed and ``96 + 8 R + 8 K`` broadcast bytes; in primal form nothing is
    sent, and it gives ``M s``, ``(P^2 + P) g`` and ``96 + P s + 8 K``. A few kilobytes of descriptions come on top. A
    solver that learns broadcasts 8 bytes for every number of its memory, every try of a step sums 16 bytes, momentum
    and ``relative_decay`` gather ``M s`` more each, a metric sums both factors of each layer, ``(n^2 + m^2) s + 16``
    for n inputs, the bias as one of them, and m outputs, and the gradients of Q parameters of AdamW are summed,
    ``Q s + 8``.
    `TruncatedSVD`, `RandomizedSVD` and `LeaveOneOut` with more rows than parameters gather J itself on every rank,
    ``M P s``; `KalmanFilter` and `LevenbergMarquardt` count their own.
    `traffic` counts. A solver of one's own sees a Jacobian of all rows, whose methods every rank must call alike; if it
    fails between them on one rank alone, the others wait.

    Args:
        model: The model, whose layers the engine must support (see `Capture`).
        params: Which parameters to train, or parameter groups with their own ``lr`` and ``weight_decay``; all that
            require grad by default.
        lr: Learning rate eta, the fraction of the solution that is taken; by default 1 with solvers that find the
            length themselves (`KalmanFilter`, `LeaveOneOut`, `LevenbergMarquardt`), else 0.1.
        rows: What the closure returns: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``. With 2 a row is the loss itself, with 1 its root, the residual
            behind a squared loss. By default 1 without a ``solver``, else 2 as in the paper.
        solver: How ``J d = R`` is solved. By default `KalmanFilter` where at most 1,024 parameters are trained and
            neither a metric, a momentum, a fraction nor a norm guard is asked for, else `LeaveOneOut`.
        metric: What the length of d is measured by: a `KroneckerMetric`, a `BalancedMetric`, or None for the Euclidean
            norm. "auto" is the first with `LeaveOneOut` by default (and with ``fraction=1``), else None.
        momentum: mu of ``|J d - R|^2 + lambda |d - mu d_before|^2``, d staying near the step before (SPRING, arXiv
            2401.10190).
        weights: Weight of some named blocks in the loss: residuals are multiplied with its root.
        max_norm_ratio: Norm guard: d is shortened to this multiple of its norm's running mean (Euclidean, or that of
            the metric), the first d to the norm of the parameters themselves; None for no guard. Without it one
            ill-conditioned batch can carry the model far away at finite loss, the first batch above all. "auto" is 3,
            and for the first step alone where steps are tried out (`LeaveOneOut`): long ones are needed there when a
            much smaller damping becomes the better one. `KalmanFilter` and `LevenbergMarquardt` have no guard and take
            no number.
        weight_decay: Decoupled weight decay w: parameters shrink by ``lr w`` of themselves in every step.
        relative_decay: c of a decay that follows the conditions and is added to w:
            ``c min(1, |R|^2 / |J theta|^2)``. It keeps models small that could fit wrong labels, and leaves those alone
            that fit everything. By default 0.002 with `LeaveOneOut` by default, else 0.
        fraction: Random fraction of the output rows of every layer that a step changes: less memory and time.
        samples_per_row: Losses averaged into one row (micro-batching): fewer rows, less memory and time.
        seed: Seed of the random fraction.
        on_nonfinite: Whether a NaN or infinite loss or update raises, or skips the step, warns and counts.
        max_memory: Bytes for the temporaries of the Gram, see `Capture`.
        capture: An engine made by the user, such as ``BatchedCapture(model)`` for layers without an exact rule.

    Raises:
        UnsupportedModelError: If the model holds a layer without an exact rule.
        InvalidOptionError: If an option is impossible.

    Differs from the paper:
        One forward and one backward instead of two; the Gram's spectrum instead of J's, in float64; a damping and a
        step length that the batch decides instead of a rank and a rate; the metric; the decay; norm guard. The paper's
        own is ``Sven(model, lr=..., solver=TruncatedEigh(rank=..., rtol=...), max_norm_ratio=None)``.

    References:
        Sven, arXiv 2604.01279, equations 6 to 12.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> opt = st.Sven(model, rows="residuals")
        >>> for _ in range(100):
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
        metric: KroneckerMetric | BalancedMetric | Literal["auto"] | None = "auto",
        momentum: float = 0.0,
        weights: Mapping[str, float] | None = None,
        max_norm_ratio: float | Literal["auto"] | None = "auto",
        weight_decay: float = 0.0,
        relative_decay: float | None = None,
        fraction: float = 1.0,
        samples_per_row: int = 1,
        seed: int = 0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        max_memory: int = 1 << 28,
        capture: Capture | ReferenceCapture | None = None,
    ) -> None:
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
        rate = default_lr(solver) if lr is None else lr
        super().__init__(params, {"lr": rate, "weight_decay": weight_decay, "method": "sven"})
        self._choices = Choices.checked(
            rows=rows, kappa=kappa, solver=solver, metric=metric, momentum=momentum, weights=weights,
            max_norm_ratio=max_norm_ratio, relative_decay=relative_decay, fraction=fraction,
            samples_per_row=samples_per_row, seed=seed, on_nonfinite=on_nonfinite,
            size=sum(p.numel() for p in self._sven_params()),
        )  # fmt: skip
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
        return self._choices.rows

    @property
    def solver(self) -> Solver:
        """How conditions are solved; assigned between steps it follows a schedule, of ``rtol`` or a damping say."""
        return self._choices.solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        chosen = self._choices.solved_by(solver)
        if type(solver) is not type(self.solver) and self._memory["solver"] is not None:
            self._memory.change(solver=None)  # what another kind of solver had learnt
        self._choices = chosen

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
            self._compared = False

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle together with the model; the engine is small and goes along."""
        base: dict[str, Any] = super().__getstate__()
        own = ("_choices", "_model", "_wrapper", "_max_memory", "_capture", "_traffic", "diagnostics")
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
        try:
            system, outcome, grads = self._take(closure, ranks)
        except NonFiniteError as error:
            if not self._choices.skip:
                raise
            self._memory.change(num_skipped=self._memory["num_skipped"] + 1)
            warnings.warn(f"Step skipped: {error}", RuntimeWarning, stacklevel=3)
            return None
        if grads:
            others = [group for group in self.param_groups if group["method"] == "adamw"]
            apply_adamw(others, self.state, {self.capture.params[name]: grad for name, grad in grads.items()})
        self.diagnostics = self._memory.remember(system, outcome)
        return system.loss

    def _take(
        self, closure: Callable[[], Rows] | None, ranks: Ranks | None
    ) -> tuple[System, Outcome, dict[str, Tensor]]:
        """Solve the conditions and move Sven's parameters; the gradients of the others come along."""
        batch = Batch.of(closure, self._capture, self._wrapper, self._choices)
        shared = alone(batch) if ranks is None else self._shared(batch, ranks)
        trained = self._sven_named()
        system = pose(shared, self._choices, self._memory, trained, ranks)
        others = [name for name in self.capture.params if name not in trained]
        grads = other_gradients(system, self._choices, others)
        mover = Mover(system, self._sven_groups, self.capture.params, self._choices.momentum)
        rate = max(float(group["lr"]) for group in self._sven_groups)
        step = Step(self._choices, self._memory, system, mover, self._sven_params(), rate, ranks)
        return system, step.take(batch), grads

    def _shared(self, batch: Batch, ranks: Ranks) -> Shared:
        """The conditions of all processes, once it is clear that they train the same model in the same way."""
        ranks.traffic = self._traffic
        number = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        groups = {name: number[id(p)] for name, p in self.capture.params.items()}
        prints = None if self._compared else lambda: fingerprints(self._model, groups)
        choices = self._choices
        shared = share(ranks, batch.conditions, choices.rows, self._settings(), prints, choices.weights)
        self._compared = True
        return shared

    @property
    def _sven_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["method"] == "sven"]

    def _sven_params(self) -> list[Tensor]:
        return [p for group in self._sven_groups for p in group["params"]]

    def _sven_named(self) -> dict[str, Tensor]:
        trained = {id(p) for p in self._sven_params()}
        return {name: p for name, p in self.capture.params.items() if id(p) in trained}

    @property
    def _memory(self) -> Memory:
        return Memory(self.state, self._sven_params(), self.capture.params)

    def _settings(self) -> dict[str, object]:
        """What must be the same on all processes, or they would part."""
        given = ("method", "lr", "weight_decay", "betas", "eps")
        groups = {name: [group.get(name) for group in self.param_groups] for name in given}
        groups["lr"] = [float(group["lr"]) for group in self.param_groups]
        memory = {"number of steps": self._memory["step"], "state of the norm guard": self._memory["norm_mean"]}
        return self._choices.alike() | groups | memory
