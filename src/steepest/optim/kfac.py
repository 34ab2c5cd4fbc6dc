"""KFAC: natural gradient with Kronecker-factored curvature, in an ordinary training loop."""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest._typing import Sharing
from steepest._validation import check_choice, check_integer, check_real
from steepest.engine.records import Record
from steepest.errors import CaptureError, InvalidOptionError, NonFiniteError
from steepest.linalg.decompositions import Decomposition
from steepest.linalg.kronecker import Cholesky, DecompositionError, Eigenbasis, KroneckerSolver
from steepest.optim._apply import adamw_step, check_magnitude, descend
from steepest.optim.blocks import Block
from steepest.optim.curvature import CURVATURE_KEYS, Curvature
from steepest.optim.fisher import Empirical, Exact, MonteCarlo
from steepest.optim.gathering import Gathering, Recipe, Reduction
from steepest.optim.layers import LayerOptimizer
from steepest.optim.loss_scale import captured_scale, loss_scale
from steepest.optim.plan import Planned, clip_factor, read, total, total_norm
from steepest.optim.terms import LossTerms

# One batch says little about the curvature: so many steps at the start all update the factors.
_FIRST_STEPS = 10
__all__ = ["KFAC", "KFACDiagnostics", "Period", "Schedule"]

Schedule = float | Callable[[int], float]
Period = int | Callable[[int], int]


@dataclass(frozen=True)
class KFACDiagnostics:
    """What the last step did.

    Args:
        update_norm: Euclidean norm of the preconditioned gradient, before momentum and lr.
        clip: Factor of kl_clip, 1 where nothing was clipped.
        num_decompositions: Layers whose factors were decomposed in this step.
        num_failures: Decompositions that failed and left the last good one in use, all layers and the current row
            of failures.
        num_skipped: Non-finite steps skipped so far.
    """

    update_norm: float
    clip: float
    num_decompositions: int
    num_failures: int
    num_skipped: int


class KFAC(LayerOptimizer):
    r"""Natural gradient with a Kronecker-factored Fisher information, in an ordinary loop.

    Every Linear and convolution layer has a block :math:`F \approx A \otimes S` with A the second moment of its inputs
    (a 1 joined for the bias) and S that of the gradients at its output; with the block damped to M, its weight and
    bias move by

    .. math:: \theta \leftarrow (1 - \eta w)\,\theta - \eta\, v, \qquad v \leftarrow \mu v + \nu M^{-1} g

    All other parameters (norms, embeddings unless you ask, lone biases, grouped convolutions) are trained by AdamW
    inside the same optimizer; ``print(opt)`` says who trains what. ``loss.backward()`` is the only backward: the engine
    watches the forward of the model and sees the output gradients on the way.

    Args:
        model: The model, called as a whole in the loop. DDP-wrapped models are taken as they are.
        params: Which parameters to train, or parameter groups; all that require grad by default.
        lr: * Learning rate eta. A function of the step (0, 1, ...) may be given in place of every number marked with *;
            it then sets that number in every group, before every step.
        momentum: * mu.
        weight_decay: * Decoupled weight decay w.
        damping: * lambda of M.
        factor_decay: * Share of the past in the running factors, whose bias is corrected.
        factor_update_steps: * Steps between two updates of the factors; the first ten steps all update them.
        inverse_update_steps: * Steps between two decompositions; the first ones come sooner, at update 1, 2, 4, 8, ...
        fisher: Which Fisher information: `Empirical`, `MonteCarlo` or `Exact`.
        solver: How M is inverted: `Eigenbasis`, `EigenbasisCorrected` (EKFAC) or `Cholesky`.
        sharing: Layers that share weights over positions: "expand" treats every position as a sample, "reduce" sums
            over positions first (Eschenhagen et al., arXiv 2311.00636).
        kl_clip: * Bound c on the quadratic model's lr^2 g^T M^-1 g, by nu = min(1, sqrt(c / that)); None for no
            bound. Without it the first steps, whose factors have seen a batch or two, can carry the model far away.
        reduction: Whether the loss is a "mean" over samples or a "sum".
        loss_terms: What a mean loss is the mean of: "samples", "positions" or a function of the output; "auto" is
            samples for outputs ``[B, C]`` and asks otherwise.
        skip: Regular expressions of layers to leave to AdamW.
        embeddings: Who trains `torch.nn.Embedding`: "adamw", or "kronecker". As a linear layer of one-hot inputs it
            has a diagonal A, the frequencies of the tokens; tokens always count one by one, whatever ``sharing``. Its
            tokens must be the batch: an embedding of positions alone is left to AdamW with ``skip``.
        adamw_lr: * Learning rate of AdamW.
        adamw_betas: Its betas.
        adamw_eps: Its eps.
        adamw_weight_decay: * Its weight decay.
        grad_scaler: A `torch.amp.GradScaler`, needed only where ``scaler.unscale_(opt)`` is called in the loop.
        on_nonfinite: Whether NaN or infinity in a gradient raises, or skips the step, warns and counts.

    Raises:
        UnsupportedModelError: If the model is compiled.
        InvalidOptionError: If an option is impossible.

    Memory, in numbers for each layer of n outputs and m inputs (the bias counts as an input): the running factors
    m^2 + n^2, the decomposition m^2 + n^2 + m + n (Eigenbasis), m^2 + n^2 + m n (EigenbasisCorrected) or
    2 (m^2 + n^2) + 2 (Cholesky), and m n for the momentum; of an embedding of m tokens all m^2 are m.

    Gradient accumulation: divide each loss by the number of backwards, as usual. With a batch-normalised model in
    train mode gradients of single samples do not exist, and the factors are those of the normalised activations, as in
    all KFAC.

    References:
        Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407 (convolutions); George et al.,
        arXiv 1806.03884 (EKFAC).

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 2)
        >>> y = (x[:, 0] * x[:, 1] > 0).long()
        >>> opt = st.KFAC(model, lr=0.3, damping=1e-2)
        >>> for _ in range(40):
        ...     opt.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()
        >>> bool(loss < 0.1)
        True
    """

    # torch.amp.GradScaler then leaves the unscaling to `step`, which knows what was captured under which scale.
    _step_supports_amp_scaling = True
    _kept: tuple[str, ...] = (
        "_recipe", "_solver", "_factor_update_steps", "_inverse_update_steps",
        "_skip_nonfinite", "_grad_scaler", "_model", "_schedules", "_assignment", "_blocks", "_constructed",
        "diagnostics",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        *,
        params: Iterable[Any] | None = None,
        lr: Schedule | Tensor = 0.1,
        momentum: Schedule = 0.9,
        weight_decay: Schedule = 0.0,
        damping: Schedule = 1e-3,
        factor_decay: Schedule = 0.95,
        factor_update_steps: Period = 10,
        inverse_update_steps: Period = 100,
        fisher: Empirical | MonteCarlo | Exact | None = None,
        solver: KroneckerSolver | None = None,
        sharing: Sharing = "expand",
        kl_clip: Schedule | None = 1e-3,
        reduction: Reduction = "mean",
        loss_terms: LossTerms = "auto",
        skip: str | tuple[str, ...] = (),
        embeddings: Literal["adamw", "kronecker"] = "adamw",
        adamw_lr: Schedule = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: Schedule = 0.01,
        grad_scaler: Any = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_choice("embeddings", embeddings, ("adamw", "kronecker"))
        self._recipe = Recipe(Empirical() if fisher is None else fisher, sharing, reduction, loss_terms)
        self._solver = Eigenbasis() if solver is None else solver
        if not isinstance(self._solver, KroneckerSolver) or isinstance(self._solver, type):
            raise InvalidOptionError(f"solver={solver!r}: give a solver object such as steepest.Eigenbasis().")
        self._factor_update_steps, self._inverse_update_steps = factor_update_steps, inverse_update_steps
        for name, period in (
            ("factor_update_steps", factor_update_steps),
            ("inverse_update_steps", inverse_update_steps),
        ):
            _at(name, period, 0)
        self._skip_nonfinite = on_nonfinite == "skip"
        self._grad_scaler = grad_scaler
        given = {
            "lr": lr, "weight_decay": weight_decay, "damping": damping, "momentum": momentum, "kl_clip": kl_clip,
            "factor_decay": factor_decay, "adamw_lr": adamw_lr, "adamw_weight_decay": adamw_weight_decay,
        }  # fmt: skip
        self._schedules = {name: value for name, value in given.items() if callable(value)}
        numbers = {name: value(0) if callable(value) else value for name, value in given.items()}
        defaults = {**numbers, "betas": adamw_betas, "eps": adamw_eps}
        self._gathering: Gathering | None = None
        self.diagnostics: KFACDiagnostics | None = None
        patterns = (skip,) if isinstance(skip, str) else skip
        super().__init__(model, params, defaults, patterns, tables=embeddings == "kronecker")

    def _begin(self) -> None:
        """Watch the layers of all groups, in place of those watched so far."""
        for group in self.param_groups:
            _check_group(group)
        self.close()
        # The hooks on the model must not keep the optimizer alive.
        this = weakref.ref(self)
        self._gathering = Gathering(
            self._model,
            self._blocks,
            self._recipe,
            due=lambda: _due(this()),
            decomposition=lambda block: _decomposition(this(), block),
            on_record=self._listener(),
            exact_rows=not isinstance(self._solver, (Eigenbasis, Cholesky)),
        )

    def _listener(self) -> Callable[[Record], None] | None:
        """What is to be called in every backward with what it leaves for a layer; it must not hold the optimizer."""
        return None

    def close(self) -> None:
        """Stop watching the model and remove the hooks from it; the optimizer takes no step afterwards."""
        if self._gathering is not None:
            self._gathering.close()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle together with the model; the copy watches its own model."""
        base: dict[str, Any] = super().__getstate__()
        return base | {name: self.__dict__[name] for name in self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or pickled state."""
        super().__setstate__(state)
        if "_model" in state:
            self._rename()
            self._gathering = None
            self._begin()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state.

        Args:
            state_dict: What `state_dict` returned for an optimizer of the same model and options.
        """
        own = copy.deepcopy(dict(state_dict))  # torch keeps the given tensors, and two optimizers would share them
        super().load_state_dict(own)
        # torch casts every tensor of a state to its parameter's dtype; factors keep their own.
        saved = {id(p): own["state"].get(i) for i, p in enumerate(self._trained())}
        for block in self._blocks.values():
            state = saved[id(block.weight)]
            if state is not None:
                kept = {name: state[name] for name in CURVATURE_KEYS if name in state}
                self.state[block.weight].update(_moved(kept, block.weight.device))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what was gathered on their way.

        Args:
            set_to_none: As in torch.optim.
        """
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        if self._gathering is not None:
            self._gathering.clear()

    @property
    def _memory(self) -> dict[str, Any]:
        """State of the optimizer as a whole; kept with the first parameter, as in torch.optim.LBFGS."""
        state: dict[str, Any] = self.state[next(p for group in self.param_groups for p in group["params"])]
        if "steps" not in state:
            state.update(steps=0, num_skipped=0)
        return state

    def _curvature(self, block: Block) -> Curvature | None:
        return Curvature.from_state(self.state[block.weight], self._solver)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the factors when it is time, and move the parameters.

        The step is atomic: whatever it raises, parameters and state are as they were.

        Args:
            closure: As in torch.optim: clears the gradients, computes the loss, calls ``backward`` and returns it.

        Returns:
            What the closure returned.

        Raises:
            NonFiniteError: If a gradient or an update holds NaN or infinity and ``on_nonfinite`` is "raise".
            DecompositionError: If the factors of a layer cannot be decomposed.
            CaptureError: If a layer has a gradient and its forward was never seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._take_step()
        except NonFiniteError as error:
            if not self._skip_nonfinite:
                raise
            self._memory["num_skipped"] += 1
            warnings.warn(f"Step skipped: {error}", RuntimeWarning, stacklevel=3)
        finally:
            self._forget_gradients()
        return loss

    def _gathered(self) -> Gathering:
        if self._gathering is None:
            raise RuntimeError("the optimizer is not constructed yet")
        return self._gathering

    def _take_step(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse_many(torch.distributed.get_world_size())
        if self._gathered().is_closed:
            raise CaptureError("The optimizer was closed and no longer watches the model: make a new one to go on.")
        memory = self._memory
        self._schedule(memory["steps"])
        scale = loss_scale(self)
        if scale is None:
            return  # the GradScaler found infinity: it skips the step, as with every optimizer
        self._check_gradients()
        every = _at("factor_update_steps", self._factor_update_steps, memory["steps"])
        period = -(-_at("inverse_update_steps", self._inverse_update_steps, memory["steps"]) // every)
        plan = [
            (group, [self._planned(block, group, scale, period) for block in self._blocks_of(group)])
            for group in self._layer_groups()
        ]
        self._finish(plan, scale)

    def _planned(self, block: Block, group: dict[str, Any], scale: float, period: int) -> Planned:
        curvature, gradient = self._refreshed(block, group, scale, period), self._gradient(block, scale)
        return Planned(block, curvature, gradient, self._direction(block, gradient, curvature, group))

    def _blocks_of(self, group: dict[str, Any]) -> list[Block]:
        """Layers of a group that have a gradient."""
        mine = {id(p) for p in group["params"]}
        return [b for b in self._blocks.values() if id(b.weight) in mine and b.weight.grad is not None]

    def _gradient(self, block: Block, scale: float) -> Tensor:
        return self._summed(block) / self._divisor(scale)

    def _summed(self, block: Block) -> Tensor:
        """What all backwards of the step have left in ``p.grad``, as one matrix."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.params]
        return block.join(grads).to(torch.promote_types(block.weight.dtype, torch.float32))

    def _divisor(self, scale: float) -> float:
        """What ``p.grad`` is to be divided by, to be the gradient of the step."""
        return scale

    def _schedule(self, step: int) -> None:
        values = {name: schedule(step) for name, schedule in self._schedules.items()}
        for group in self.param_groups:
            prefix = "adamw_" if group["method"] == "adamw" else ""
            group.update({name: values[prefix + name] for name in ("lr", "weight_decay") if prefix + name in values})
            group.update({name: value for name, value in values.items() if name not in {"lr", "weight_decay"}})
            _check_group(group)

    def _check_gradients(self) -> None:
        grads = [p.grad for p in self._trained() if p.grad is not None]
        if not grads:
            raise CaptureError("No parameter has a gradient: call loss.backward() before step().")
        if any(grad.is_sparse or grad.is_complex() for grad in grads):
            raise InvalidOptionError("A gradient is sparse or complex: use dense real parameters.")
        sizes = [size for part in self._gathered().parts.values() for size in part.sizes()]
        if not math.isfinite(total([*torch._foreach_norm(grads), *sizes])):
            raise NonFiniteError(
                "A gradient holds NaN or infinity; parameters and optimizer state are unchanged. Remedy: lower lr, "
                "raise damping, clip with kl_clip, or skip such steps with on_nonfinite='skip'."
            )

    def _refreshed(self, block: Block, group: dict[str, Any], scale: float, period: int) -> Curvature:
        """The curvature of a layer after this step's samples, decomposed anew after so many updates."""
        curvature, gathering = self._curvature(block), self._gathered()
        part = gathering.parts.get(block.names[0])
        if part is not None and part.input is not None:
            grad_scale = self._recipe.grad_scale(gathering.terms, captured_scale(self, self._grad_scaler, scale))
            curvature = Curvature.updated(curvature, part, group["factor_decay"], grad_scale)
        if curvature is None:
            raise CaptureError(
                f"Layer {block.name!r} has a gradient and its forward was never seen: call the model itself in the "
                "loop (model(x), not a part of it), or leave the layer to AdamW with skip=."
            )
        if curvature.is_stale(period):
            try:
                return curvature.decomposed(self._solver, group["damping"])
            except DecompositionError as error:
                raise DecompositionError(f"Layer {block.name!r}: {error}") from error
        return curvature

    def _direction(self, block: Block, gradient: Tensor, curvature: Curvature, group: dict[str, Any]) -> Tensor:
        """The preconditioned gradient of a layer, ``[d_out, d_in (+ 1)]``."""
        del block
        return curvature.basis.precondition(gradient, group["damping"])

    def _finish(self, plan: list[tuple[dict[str, Any], list[Planned]]], scale: float) -> None:
        """Check the update, then change parameters and state: nothing before this line has."""
        layers = [layer for _, mine in plan for layer in mine]
        clips = [clip_factor(group, mine) for group, mine in plan]
        numbers = read([total_norm([layer.direction for layer in layers]), *clips])
        if not math.isfinite(numbers[0]):
            raise NonFiniteError(
                "The update holds NaN or infinity; parameters and optimizer state are unchanged. Remedy: raise "
                "damping, or skip such steps with on_nonfinite='skip'."
            )
        for (group, mine), clip in zip(plan, numbers[1:], strict=True):
            for dtype in {p.dtype for layer in mine for p in layer.block.params}:
                reach = max(1.0, float(group["lr"])) * clip * numbers[0]
                check_magnitude(reach, dtype, "lower lr, raise damping, or set kl_clip")
        for (group, mine), nu in zip(plan, clips, strict=True):
            params = [p for layer in mine for p in layer.block.params]
            moves = [move for layer in mine for move in layer.block.split(layer.direction * nu)]
            descend(params, [m.to(p.dtype) for m, p in zip(moves, params, strict=True)], self.state, group)
        for group in self.param_groups:
            if group["method"] == "adamw":
                adamw_step(group, self.state, self._divisor(scale))
        for layer in layers:
            self.state[layer.block.weight].update(layer.curvature.state())
        memory, fresh = self._memory, [layer for layer in layers if layer.curvature.age == 0]
        self.diagnostics = KFACDiagnostics(
            update_norm=numbers[0],
            clip=min(numbers[1:], default=1.0),
            num_decompositions=len(fresh) if self._gathered().parts else 0,
            num_failures=sum(layer.curvature.failures for layer in layers),
            num_skipped=memory["num_skipped"],
        )
        memory["steps"] += 1


def _due(optimizer: KFAC | None) -> int | None:
    """The number of the step that is under way, if it updates the factors."""
    if optimizer is None:
        return None
    steps: int = optimizer._memory["steps"]
    period = _at("factor_update_steps", optimizer._factor_update_steps, steps)
    return steps if steps < min(period, _FIRST_STEPS) or steps % period == 0 else None


def _at(name: str, period: Period, step: int) -> int:
    return check_integer(name, period(step) if callable(period) else period, low=1)


def _decomposition(optimizer: KFAC | None, block: Block) -> Decomposition | None:
    curvature = None if optimizer is None else optimizer._curvature(block)
    return None if curvature is None else curvature.decomposition


def _check_group(group: Mapping[str, Any]) -> None:
    check_real("lr", group["lr"], low=0)
    check_real("weight_decay", group["weight_decay"], low=0)
    check_real("damping", group["damping"], low=0)
    check_real("momentum", group["momentum"], low=0, high=1, open_high=True)
    check_real("factor_decay", group["factor_decay"], low=0, high=1, open_high=True)
    if group["kl_clip"] is not None:
        check_real("kl_clip", group["kl_clip"], low=0, open_low=True)


def _refuse_many(processes: int) -> None:
    if processes > 1:
        raise InvalidOptionError(
            f"This is one of {processes} processes, and the factors are not shared between processes yet: each would "
            "take a step of its own. Train in one process."
        )


def _moved(value: Any, device: torch.device) -> Any:
    """Bring tensors within nested mappings to a device, in their own dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, Mapping) else value
