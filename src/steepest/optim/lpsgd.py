"""LPSGD and LPSGDM: steepest descent in an l_p norm whose p may be annealed."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach, _use_grad_for_differentiable

from steepest._validation import check_choice
from steepest.distributed import Traffic
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.optim._lp_checks import check_group, check_tensor
from steepest.optim._lp_fused import check_fused, fused_update
from steepest.optim._lp_shards import agreed, groups_of, is_shard, local, local_grads
from steepest.optim._lp_update import LpStep, all_finite, update_differentiably, update_rows

__all__ = ["LPSGD", "LPSGDM", "LPSGDDiagnostics", "OnNonfinite"]

OnNonfinite = Literal["raise", "skip", "ignore"]


@dataclass(frozen=True)
class LPSGDDiagnostics:
    """What has happened so far.

    Args:
        num_skipped: Non-finite steps skipped so far.
    """

    num_skipped: int


class LPSGD(Optimizer):
    r"""Steepest descent in the l_p norm: SGD whose steps depend less on how large a partial derivative is.

    .. math:: \theta \leftarrow (1 - \eta w)\,\theta - \eta\, \frac{g}{(|g| + \epsilon)^\rho},
       \qquad \rho = \frac{p - 2}{p - 1}

    entry by entry. p = 2 is `torch.optim.SGD` (to the bit, without weight decay: SGD's is added to the gradient and
    this one is not), and large p descends along the signs. Of all directions with the same l_p norm this one gains
    most: ``<g, v> = |g|_q |v|_p`` with q = p / (p - 1). `CosineAnnealingP` brings p down to 2 during training.

    A gradient c times as large gives a step ``c ** (1 - rho)`` times as long, so clipping and loss scaling act on the
    learning rate in their own way. `torch.amp.GradScaler` unscales before the step, as for SGD; who scales by hand has
    to unscale by hand.

    Args:
        params: Parameters, named parameters, or groups with their own ``lr``, ``p``, ``weight_decay`` and ``eps``.
        lr: Learning rate eta; a number or a tensor of one.
        p: Order of the norm, finite and at least 2; a number or a tensor of one. Where a schedule brings it down, it
            is p_max.
        weight_decay: Decoupled weight decay w.
        eps: epsilon, above 0. It is used in float32 also where parameters are in half precision.
        maximize: Go up instead of down.
        foreach: Whether to join small tensors, which is faster; the result is the same to the bit. None does so where
            torch's own optimizers would, and on CPUs, where their foreach is a loop. Work is done in pieces, so it
            takes no more memory.
        capturable: Whether the step may be captured in a CUDA graph: nothing is read from the device, so gradients are
            not checked. Give ``p`` and ``lr`` as tensors on the device to change them between replays.
        differentiable: Whether autograd should go through the step. Gradients are not checked then.
        fused: Whether to take the step as one compiled pass over the numbers, for parameters on CPUs in float32 or
            float64: with large tensors it takes a quarter to two fifths less time. It needs a C++ compiler and some
            ten seconds when the first optimizer of a process is made, and rounds differently in the last bits. None is
            False.
        on_nonfinite: Whether NaN or infinity in a gradient raises, or skips the step, warns and counts, or is not
            looked for ("ignore": as in torch, without the pass over the gradients and without waiting for a GPU).

    Raises:
        InvalidOptionError: If an option is impossible, or a parameter is sparse, complex or no floating-point tensor.

    Several processes: the optimizer's own part is one step like any other, because the rule is entry by entry. With
    `DistributedDataParallel` all processes have the same gradients and take the same step; nothing is sent beyond
    what that sends. With parameters that are DTensors (`torch.distributed.fsdp.fully_shard`, tensor parallelism) every
    process moves its shard, with ``foreach`` or ``fused`` as elsewhere (``differentiable`` is refused); momenta are
    DTensors too, which `torch.distributed.checkpoint` saves and loads. Where gradients are looked at, NaN or infinity
    in one shard, or an option that one process refuses, raises or skips on all: each step sums 8 bytes over each
    dimension of the device mesh (12 where a norm overflows), which `traffic` counts, and waits for the device once.
    With ``on_nonfinite="ignore"`` or ``capturable`` nothing is sent.

    Memory: the parameters, and temporaries of at most 131,072 numbers on CPUs (32,768 a thread where that is more) and
    4,194,304 on other devices, or of one parameter where that is larger and not contiguous.

    References:
        LPSGD, arXiv 2606.02078.

    Example:
        >>> import torch, steepest as st
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = st.LPSGD([x], lr=0.1, p=4.0)
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     (x * x * torch.tensor([50.0, 0.5])).sum().backward()  # curvatures 100 and 1
        ...     _ = opt.step()
        >>> bool(x[1] < 0.01)  # where SGD, whose lr may not exceed 0.02 here, would be at 0.67
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 1e-2,
        p: float | Tensor = 4.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        options = {
            "lr": lr, "p": p, "weight_decay": weight_decay, "eps": eps, "maximize": maximize, "foreach": foreach,
            "capturable": capturable, "differentiable": differentiable, "fused": fused, "on_nonfinite": on_nonfinite,
        }  # fmt: skip
        self._begin(params, options)

    def _begin(self, params: Iterable[Any], options: dict[str, Any]) -> None:
        check_choice("on_nonfinite", options["on_nonfinite"], ("raise", "skip", "ignore"))
        blind = [name for name in ("capturable", "differentiable") if options[name]]
        if blind and options["on_nonfinite"] == "skip":
            raise InvalidOptionError(
                f"on_nonfinite='skip' with {blind[0]}=True: such a step cannot look at the gradients. Drop one of them."
            )
        for faster in ("foreach", "fused"):
            clash = [name for name in ("differentiable", "capturable", "foreach") if options[name] and name != faster]
            if options[faster] and clash and (faster, clash[0]) != ("foreach", "capturable"):
                raise InvalidOptionError(f"{faster}=True with {clash[0]}=True cannot work: drop one of them.")
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters.

        Args:
            param_group: As in torch.optim.

        Raises:
            InvalidOptionError: If an option or a parameter is impossible; the group is not added then.
        """
        super().add_param_group(param_group)
        # With the groups and not with a parameter: torch.distributed.checkpoint wants a state of all or of none.
        self.param_groups[-1].setdefault("num_skipped", 0)
        try:
            check_group(self.param_groups[-1])
            for number, param in enumerate(self.param_groups[-1]["params"]):
                check_tensor(param, "parameter", self.param_groups[-1], number)
            _check_shards(self.param_groups[-1])
            if self.param_groups[-1]["fused"]:
                params = [local(param) for param in self.param_groups[-1]["params"]]
                check_fused(params, momentum=bool(self.param_groups[-1].get("momentum")))
        except InvalidOptionError:
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state.

        Args:
            state_dict: What `state_dict` returned.
        """
        # torch keeps the given tensors, and two optimizers would share them.
        super().load_state_dict(copy.deepcopy(dict(state_dict)))

    @property
    def diagnostics(self) -> LPSGDDiagnostics:
        """What has happened so far."""
        return LPSGDDiagnostics(max(group.get("num_skipped", 0) for group in self.param_groups))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; whatever it raises, parameters and state are as they were.

        Args:
            closure: As in torch.optim: clears the gradients, computes the loss, calls ``backward`` and returns it.

        Returns:
            What the closure returned.

        Raises:
            NonFiniteError: If a gradient holds NaN or infinity and ``on_nonfinite`` is "raise".
            InvalidOptionError: If a gradient is sparse or complex, or a group was given an impossible option.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if self._may_step(work):
            for group, params in work:
                self._update(group, params)
        return loss

    @property
    def traffic(self) -> Traffic:
        """What this process gave to collectives of the optimizer's own so far."""
        counted: Traffic = self.__dict__.setdefault("_traffic", Traffic())  # a copied optimizer has none
        return counted

    def _check(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        for group, params in work:
            check_group(group, read_tensors=False)
            if group["fused"]:  # parameters may have been moved since
                check_fused([local(param) for param in params], momentum=bool(group.get("momentum")))
            if any(grad.layout != torch.strided or grad.is_complex() for grad in _grads(params)):
                for number, param in enumerate(group["params"]):
                    if param.grad is not None:
                        check_tensor(param.grad, "gradient of parameter", group, number)

    def _may_step(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        refused: Exception | None = None
        if not torch.compiler.is_compiling():
            try:
                self._check(work)
            except InvalidOptionError as error:
                refused = error
        options = self.defaults
        blind = options["on_nonfinite"] == "ignore" or options["capturable"] or options["differentiable"]
        params = [param for _, some in work for param in some]
        groups = [] if blind else groups_of(params)
        if refused is not None and not groups:
            raise refused
        if blind:
            return True
        grads = local_grads(params)
        if agreed(grads, groups, self.traffic, refused) if groups else all_finite(grads):
            return True
        message = "A gradient holds NaN or infinity; parameters and optimizer state are unchanged."
        if options["on_nonfinite"] == "raise":
            raise NonFiniteError(f"{message} Remedy: lower lr, or skip such steps with on_nonfinite='skip'.")
        skipped = self.diagnostics.num_skipped + 1
        for group in self.param_groups:
            group["num_skipped"] = skipped
        warnings.warn(f"Step skipped: {message}", RuntimeWarning, stacklevel=5)
        return False

    def _update(self, group: Mapping[str, Any], params: list[Tensor]) -> None:
        grads = local_grads(params)
        momenta = [local(momentum) for momentum in self._momenta(params)] if group.get("momentum") else grads
        params = [local(param) for param in params]
        rows = list(zip(params, grads, momenta, strict=True))
        keep = group["capturable"] or group["differentiable"]  # tensors where they are
        step = LpStep(
            lr=_squeezed(group["lr"]) if keep else float(group["lr"]),
            p=_squeezed(group["p"]) if keep else float(group["p"]),
            momentum=group.get("momentum", 0.0),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        compiling = torch.compiler.is_compiling()
        if group["differentiable"]:
            update_differentiably(rows, step)
        elif group["fused"] and not compiling:
            fused_update(rows, step)
        else:
            update_rows(rows, step, together=not compiling and _joins(group["foreach"], params))

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
                self.state[param]["momentum_buffer"] = zeros
        return [self.state[param]["momentum_buffer"] for param in params]


class LPSGDM(LPSGD):
    r"""LPSGD on a running mean of the gradients.

    .. math:: m \leftarrow \beta m + (1 - \beta)\, g, \qquad
       \theta \leftarrow (1 - \eta w)\,\theta - \eta\, \frac{m}{(|m| + \epsilon)^\rho},
       \qquad \rho = \frac{p - 2}{p - 1}

    entry by entry, from m = 0. p = 2 is SGD on that mean with decoupled weight decay, to the bit. (The momentum of
    `torch.optim.SGD` is a sum of gradients, ``1 / (1 - beta)`` times as long: its lr is to be multiplied by that.)

    Args:
        params: Parameters, named parameters, or groups with their own options.
        lr: Learning rate eta.
        p: Order of the norm, finite and at least 2; where a schedule brings it down, p_max. Of 2, 2.5, 3, 4, 6 and 10
            with the rate tuned for each (`benchmarks/lpsgd_p_max.py`), the default is among the best on digits with 6,
            on Fashion-MNIST with all others, and on a ResNet for CIFAR-10 with 2, which is SGD. The larger p, the
            smaller the best lr: at 10 it was 0.001 to 0.01, at 2 it was 0.1 to 3.
        momentum: beta, 0 or more and below 1.
        weight_decay: Decoupled weight decay w.
        eps: epsilon, above 0.
        maximize: As in `LPSGD`, and so are all others.
        foreach: Whether to join small tensors.
        capturable: Whether the step may be captured in a CUDA graph.
        differentiable: Whether autograd should go through the step.
        fused: Whether to take the step as one compiled pass, on CPUs.
        on_nonfinite: Whether NaN or infinity in a gradient raises, skips the step, or is not looked for.

    Raises:
        InvalidOptionError: If an option or a parameter is impossible.

    As p falls, the entries of the step shrink with it, by ``|m| ** (rho_max - rho)``: at gradients of 1e-3 a rate that
    suits signs is a thousandth of it at p = 2. The last part of an annealed run takes small steps therefore, beside
    what a schedule of lr does.

    Memory: the parameters, the momenta, and temporaries as in `LPSGD`.

    References:
        LPSGDM, arXiv 2606.02078.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(64, 2)
        >>> opt = st.LPSGDM(model.parameters(), lr=0.1, p=4.0)
        >>> schedule = st.CosineAnnealingP(opt, T_max=100)
        >>> for _ in range(100):
        ...     opt.zero_grad()
        ...     loss = (model(x).squeeze(1) - x.prod(1)).square().mean()
        ...     loss.backward()
        ...     _ = opt.step()
        ...     schedule.step()
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor = 3e-3,
        p: float | Tensor = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        options = {
            "lr": lr, "p": p, "momentum": momentum, "weight_decay": weight_decay, "eps": eps, "maximize": maximize,
            "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused, "on_nonfinite": on_nonfinite,
        }  # fmt: skip
        self._begin(params, options)


def _grads(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _check_shards(group: Mapping[str, Any]) -> None:
    """Refuse what has no meaning for parameters in shards."""
    if group["differentiable"] and any(is_shard(param) for param in group["params"]):
        raise InvalidOptionError(
            "differentiable=True with parameters that are DTensors: the step changes the shard of each process, which "
            "autograd does not see. Give plain parameters, or leave differentiable out."
        )


def _joins(foreach: bool | None, params: list[Tensor]) -> bool:
    """Whether small tensors are joined: as torch decides where nobody did, and on CPUs, where its foreach is a loop."""
    if foreach is not None:
        return foreach
    on_gpu: bool = _default_to_fused_or_foreach(params, differentiable=False)[1]
    return on_gpu or all(param.is_cpu and type(param) in {Tensor, torch.nn.Parameter} for param in params)


def _squeezed(value: float | Tensor) -> float | Tensor:
    return value.squeeze() if isinstance(value, Tensor) else value
