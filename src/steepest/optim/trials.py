"""Steps that are tried out: parameters move, the batch is looked at again, and what does not help is taken back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from steepest.distributed.agreement import attempt_together, fail_together
from steepest.distributed.ranks import Ranks
from steepest.errors import NonFiniteError
from steepest.optim.gram import Solution
from steepest.optim.moving import Mover

__all__ = ["Trials", "random_state", "repeated"]


class Trials:
    """Moves of parameters that stay only if they lower the sum of the squared rows.

    Weight decay comes after that: it may raise the sum, and then no step would be short enough.

    Args:
        params: What moves.
        rows: The rows where they are, of this process.
        before: The sum of their squares, of all processes.
        samples: Number of samples and rows of each, block by block, of all processes.
        mover: Moves the parameters along a share of a solution, as a step does.
        evaluate: The rows at the parameters as they are, of this process.
        ranks: The processes that share the batch; every try sums 16 bytes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Tensor,
        before: float,
        samples: Sequence[tuple[int, int]],
        mover: Mover,
        evaluate: Callable[[], Tensor],
        ranks: Ranks | None,
    ) -> None:
        self._params, self._saved = list(params), [p.detach().clone() for p in params]
        self._mover, self._evaluate, self._ranks = mover, evaluate, ranks
        self.rows, self.before, self.samples = rows, before, samples

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of every parameter that moves, by name."""
        return self._mover.rates

    def __call__(self, solution: Solution, length: float) -> float:
        """Try a step.

        Args:
            solution: The direction.
            length: The share of it.

        Returns:
            The sum of squares after it and before weight decay, of all processes; infinite where it is not finite. If
            it is not below the sum before, or something is raised, the parameters are as they were.
        """
        after = torch.inf
        try:
            after = self._total(lambda: self._tried(solution, length))
        finally:
            if not after < self.before:
                torch._foreach_copy_(self._params, self._saved)
        if after < self.before:
            self._mover.shrink(dict(zip(self._params, self._saved, strict=True)))
        return after

    def rows_at(self, solution: Solution, length: float) -> Tensor:
        """The rows at a share of a direction, whatever the learning rate is; the parameters go back.

        Args:
            solution: The direction.
            length: The share of it.

        Returns:
            ``[R]``, of this process. Where one process fails all do, for which they sum 8 bytes.
        """
        if self._ranks is None:
            return self._glance(solution, length)
        return attempt_together(self._ranks, lambda: self._glance(solution, length), self._params[0].device)

    def _glance(self, solution: Solution, length: float) -> Tensor:
        try:
            self._mover(solution, length, rated=False)
            return self._evaluate()
        finally:
            torch._foreach_copy_(self._params, self._saved)

    def _tried(self, solution: Solution, length: float) -> float:
        try:
            self._mover(solution, length)
            after = float(self._evaluate().double().square().sum())
            return after if after < torch.inf else torch.inf
        except NonFiniteError:  # too long a step: a shorter one will do
            return torch.inf

    def _total(self, compute: Callable[[], float]) -> float:
        """This process's sum, or that of all; what fails on one fails on all."""
        if self._ranks is None:
            return compute()
        failure: Exception | None = None
        value = torch.inf
        try:
            value = compute()
        except Exception as error:
            failure = error
        told = torch.tensor([value, float(failure is not None)], dtype=torch.float64, device=self._params[0].device)
        self._ranks.sum_([told])
        total, failures = told.tolist()
        if failures:
            fail_together(self._ranks, failure)
        return float(total)


def random_state(tensors: Iterable[Tensor]) -> list[tuple[torch.device, Tensor]]:
    """Where the random generators are that a model draws from, for `repeated`."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    found = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return [(torch.device("cpu"), torch.get_rng_state()), *found]


@contextmanager
def repeated(states: Sequence[tuple[torch.device, Tensor]]) -> Iterator[None]:
    """Draw the same random numbers once more, and go on afterwards as if nothing had been drawn."""
    cuda = [device.index for device, _ in states if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        for device, state in states:
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
        yield
