"""KFAC: natural gradient with Kronecker-factored curvature, in an ordinary training loop."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest._typing import Sharing
from steepest._validation import check_choice
from steepest.engine.records import Record
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.linalg.decompositions import Decomposition
from steepest.linalg.kronecker import Cholesky, Eigenbasis, KroneckerSolver
from steepest.optim.blocks import Block
from steepest.optim.combining import Local
from steepest.optim.crew import Crew, Distribution
from steepest.optim.curvature import CURVATURE_KEYS
from steepest.optim.fisher import Empirical, Exact, MonteCarlo
from steepest.optim.gathering import Gathering, Recipe, Reduction
from steepest.optim.periods import Period, Schedule, at_step, check_group, is_due
from steepest.optim.shards import Shards
from steepest.optim.stepping import KFACDiagnostics, KroneckerStep
from steepest.optim.terms import LossTerms

__all__ = ["KFAC", "KFACDiagnostics", "Period", "Schedule"]


class KFAC(KroneckerStep):
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
        distribution: Where several processes train: "replicated" decomposes and preconditions every layer on every
            rank; "sharded" gives each layer to one rank, which alone holds its decomposition and sends its direction;
            "hybrid" decomposes on one rank, which sends the decomposition to the others that precondition the layer.
        hybrid_fraction: Share of the ranks that precondition a layer with "hybrid": its workers, whose number is the
            divisor of W nearest to this share. 1 means all; of 1 / W "sharded" comes out.

    Raises:
        UnsupportedModelError: If the model is compiled.
        InvalidOptionError: If an option is impossible.

    Memory, in numbers for each layer of n outputs and m inputs (the bias counts as an input): the running factors
    m^2 + n^2, the decomposition m^2 + n^2 + m + n (Eigenbasis), m^2 + n^2 + m n (EigenbasisCorrected) or
    2 (m^2 + n^2) + 2 (Cholesky), and m n for the momentum; of an embedding of m tokens all m^2 are m.

    Gradient accumulation: divide each loss by the number of backwards, as usual. With a batch-normalised model in
    train mode gradients of single samples do not exist, and the factors are those of the normalised activations, as in
    all KFAC.

    Several processes (torch.distributed): every rank takes the step of one process with all local batches put together.
    Wrap the model in DDP, or leave it plain: then the step writes the mean gradients of all trained parameters into
    ``p.grad`` itself, and nothing should clip them before. As in DDP they are means over ranks of the local gradients:
    of unequal local batches the samples of a small one weigh more in the gradient, and in the factors all samples
    alike; with ``reduction="sum"`` it is the sum over W. `MonteCarlo` draws other labels on every rank. What fails on
    one rank, NaN or an error, raises on all, and changes no parameter and no state. A checkpoint is the same on every
    rank, and serves any number of ranks and any ``distribution``. Where a rank has a part of the decompositions
    ("sharded", and "hybrid" with fewer workers than ranks) `state_dict` must be called on all ranks.

    All modes take the same steps to the bit. More than one worker trusts the ranks to compute the same from the same
    numbers, as "replicated" does; where their devices differ, choose "sharded". The running factors are on every rank.
    Of the decompositions a rank holds those of the layers that it works on: all with "replicated", about 1 / W of them
    with "sharded" and k / W with k workers, but all with `EigenbasisCorrected`, which measures local gradients in the
    bases of all layers. "hybrid" has KAISA's gradient workers (arXiv 2107.01739): a team of k ranks next to each other
    preconditions the layers that its members decompose, and each member tells the ranks of its place in other teams.

    Bytes that each of W ranks gives to collectives, with P trained parameters, B layers, G groups of layers, and w
    bytes for each number: in every step ``8 (5 + 4 W + P + 4 B + G)`` for counts, w for each entry of a gradient (none
    with DDP), w n m for each layer with fewer workers than ranks; where factors are updated
    ``w (m (m + 1) + n (n + 1)) / 2`` (m in place of ``m (m + 1) / 2`` of embeddings), and w m n with
    `EigenbasisCorrected`; where they are decomposed, with more than one worker under "hybrid", what the decompositions
    of the rank's team hold, and those of all layers with `EigenbasisCorrected` in place of it, also with "sharded".
    Each time of these, a few pickled names and sizes come to it.

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
        "diagnostics", "_distribution", "_fraction",
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
        distribution: Distribution = "replicated",
        hybrid_fraction: float = 1.0,
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
            at_step(name, period, 0)
        self._skip_nonfinite = on_nonfinite == "skip"
        self._grad_scaler = grad_scaler
        given = {
            "lr": lr, "weight_decay": weight_decay, "damping": damping, "momentum": momentum, "kl_clip": kl_clip,
            "factor_decay": factor_decay, "adamw_lr": adamw_lr, "adamw_weight_decay": adamw_weight_decay,
        }  # fmt: skip
        self._schedules = {name: value for name, value in given.items() if callable(value)}
        numbers = {name: value(0) if callable(value) else value for name, value in given.items()}
        defaults = {**numbers, "betas": adamw_betas, "eps": adamw_eps}
        self._distribution, self._fraction = distribution, hybrid_fraction
        self._crew = Crew(model, distribution, hybrid_fraction)
        self._gathering = None
        self.diagnostics = None
        patterns = (skip,) if isinstance(skip, str) else skip
        super().__init__(model, params, defaults, patterns, tables=embeddings == "kronecker")

    def _begin(self) -> None:
        """Watch the layers of all groups, in place of those watched so far."""
        for group in self.param_groups:
            check_group(group)
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
            place=lambda: _place(this()),
        )
        self._shards = Shards(self._crew, self._solver, self._blocks)

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
            self._crew = Crew(self._model, self._distribution, self._fraction)
            self._gathering = None
            self._begin()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, the same on every rank and for any number of them.

        On several ranks all of them must call it between the same steps, if each has some of the decompositions only
        ("sharded", and "hybrid" with fewer workers than ranks); then write the file on one.

        Returns:
            As in torch.optim.

        Raises:
            InvalidOptionError: If the others take a step meanwhile, on which this is raised too.
            LostRankError: If they do something else until the time-out of the process group, or are gone.
        """
        saved: dict[str, Any] = super().state_dict()
        if self._shards.is_partial:
            self._crew.meet_to_save(self._own_counts(Local(None), []), self._trained())
            kept = {name: self.state.get(b.weight, {}).get("decomposition") for name, b in self._blocks.items()}
            found = self._shards.missing_elsewhere({name: tensors for name, tensors in kept.items() if tensors})
            numbers = {id(p): i for i, p in enumerate(self._trained())}
            for name, tensors in found.items():
                i = numbers[id(self._blocks[name].weight)]
                saved["state"][i] = {**saved["state"][i], "decomposition": tensors}
        return saved

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
            RankError: If anything of this happened on another rank.
        """
        loss, crew = None, self._crew
        crew.begin()
        if closure is not None:
            with torch.enable_grad(), crew.guarded():
                loss = closure()
        broken = crew.trouble is not None
        try:
            self._take_step()
        except NonFiniteError as error:
            if not self._skip_nonfinite or broken:
                raise
            self._memory["num_skipped"] += 1
            warnings.warn(f"Step skipped: {error}", RuntimeWarning, stacklevel=3)
        finally:
            self._forget_gradients()
        return loss


def _due(optimizer: KFAC | None) -> int | None:
    """The number of the step that is under way, if it updates the factors."""
    if optimizer is None:
        return None
    steps: int = optimizer._memory["steps"]
    period = at_step("factor_update_steps", optimizer._factor_update_steps, steps)
    return steps if is_due(period, steps) else None


def _place(optimizer: KFAC | None) -> tuple[int, int]:
    return (0, 1) if optimizer is None else optimizer._crew.place


def _decomposition(optimizer: KFAC | None, block: Block) -> Decomposition | None:
    curvature = None if optimizer is None else optimizer._curvature(block)
    return None if curvature is None else curvature.decomposition


def _moved(value: Any, device: torch.device) -> Any:
    """Bring tensors within nested mappings to a device, in their own dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, Mapping) else value
