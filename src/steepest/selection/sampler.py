"""Samplers that draw kept samples only, in a new order in each epoch, and can be resumed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from steepest._validation import check_integer
from steepest.errors import SelectionError

__all__ = ["Chosen", "ReselectingSampler", "SelectionSampler"]


class Chosen(Protocol):
    """What a sampler needs of a `Selection`."""

    @property
    def indices(self) -> Tensor:
        """``[k]``, positions in the data."""

    @property
    def weights(self) -> Tensor:
        """``[k]``, one for each position."""


class _EpochSampler(Sampler[int]):
    """Counts epochs and draws, so that a loader without workers can be resumed within an epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = check_integer("seed", seed, low=0)
        self._epoch = self._drawn = 0
        self._restored = False

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch next; without it every iteration is the next epoch.

        Args:
            epoch: Counted from 0.
        """
        self._epoch, self._drawn, self._restored = check_integer("epoch", epoch, low=0), 0, False

    def _order(self, epoch: int) -> Tensor:
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        finished = self._drawn > 0 and (not self._restored or self._drawn >= len(self))
        if finished:
            self._epoch, self._drawn = self._epoch + 1, 0
        self._restored = False
        for index in self._order(self._epoch)[self._drawn :].tolist():
            self._drawn += 1
            yield index

    def __len__(self) -> int:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return where the sampler is: its epoch, and how many samples of it were drawn.

        A DataLoader with workers draws ahead of what it hands out: keep the state between epochs there.

        Returns:
            Plain values.
        """
        return {"seed": self.seed, "epoch": self._epoch, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration hands out the rest of its epoch, or the next one where none is left.

        Args:
            state: What `state_dict` gave.
        """
        self.seed, self._epoch, self._drawn = int(state["seed"]), int(state["epoch"]), int(state["drawn"])
        self._restored = True


class SelectionSampler(_EpochSampler):
    """Draws the kept samples of a selection from the whole data set, for ``DataLoader(data, sampler=...)``.

    The order is a function of seed and epoch alone. Where weights differ, k samples are drawn with replacement in
    proportion to them, so that a plain mean of losses is the weighted one in expectation.

    Args:
        indices: ``[k]``, positions in the data.
        weights: ``[k]``, not negative.
        seed: Of the order.

    Example:
        >>> import torch
        >>> sampler = SelectionSampler(torch.tensor([3, 5, 8]), torch.ones(3))
        >>> sorted(sampler)
        [3, 5, 8]
    """

    def __init__(self, indices: Tensor, weights: Tensor, seed: int = 0) -> None:
        super().__init__(seed)
        self._indices, self._weights = indices.cpu(), weights.cpu()

    def __len__(self) -> int:
        return len(self._indices)

    def _order(self, epoch: int) -> Tensor:
        return draw(self._indices, self._weights, self.seed, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the sampler is, as its parent does, and how many samples it draws from.

        Returns:
            Plain values.
        """
        return super().state_dict() | {"kept": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a sampler of the same selection.

        Args:
            state: What `state_dict` gave.

        Raises:
            SelectionError: If the state is of another selection.
        """
        if state.get("kept") != len(self):
            raise SelectionError(
                f"the state is of a sampler of {state.get('kept')} samples, this one has {len(self)}: load it into a "
                "sampler of the same selection."
            )
        super().load_state_dict(state)


class ReselectingSampler(_EpochSampler):
    """Selects anew every few epochs, with the model as it then is, and draws what was kept.

    A selection is made when an epoch that needs one begins, so the model is the one that training has got to by then.
    The state holds what is kept now: after a resume nothing is selected before the next turn.

    Args:
        select: Called without arguments, returns a `Selection`: a `select_subset` with the model bound to it.
        every: Epochs between two selections, at least 1.
        seed: Of the order within each epoch.

    Example:
        >>> import torch, steepest as st
        >>> from torch import nn
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 2)
        >>> model, loss_fn = nn.Linear(4, 2), nn.CrossEntropyLoss(reduction="none")
        >>> def select():
        ...     return st.select_subset(model, data, loss_fn, fraction=0.25, method=st.EL2N())
        >>> sampler = ReselectingSampler(select, every=2)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=5, sampler=sampler)
        >>> for epoch in range(4):  # selects in epochs 0 and 2
        ...     assert len(list(loader)) == 2
    """

    def __init__(self, select: Callable[[], Chosen], every: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.every = check_integer("every", every, low=1)
        self._select = select
        self._kept: tuple[Tensor, Tensor] | None = None
        self._turn = -1

    @property
    def indices(self) -> Tensor:
        """What is kept now; selects if nothing was selected yet."""
        return self._now(self._epoch)[0]

    def __len__(self) -> int:
        # A loader asks before its epoch begins: what is kept then is as long, since the number to keep is fixed.
        return len((self._kept or self._now(self._epoch))[0])

    def _now(self, epoch: int) -> tuple[Tensor, Tensor]:
        turn = epoch // self.every
        if self._kept is None or turn != self._turn:
            chosen = self._select()
            self._kept, self._turn = (chosen.indices.cpu(), chosen.weights.cpu()), turn
        return self._kept

    def _order(self, epoch: int) -> Tensor:
        return draw(*self._now(epoch), self.seed, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the sampler is and what is kept now.

        Returns:
            Tensors and plain values.
        """
        indices, weights = self._kept or (None, None)
        return super().state_dict() | {
            "every": self.every,
            "turn": self._turn,
            "indices": indices,
            "weights": weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with what was kept then.

        Args:
            state: What `state_dict` gave.

        Raises:
            SelectionError: If the state is of a sampler that selects at other epochs.
        """
        if state.get("every") != self.every:
            raise SelectionError(
                f"the state is of a sampler that selects every {state.get('every')} epochs, this one does every "
                f"{self.every}: make it with every={state.get('every')}."
            )
        super().load_state_dict(state)
        self._turn = int(state["turn"])
        self._kept = None if state["indices"] is None else (state["indices"], state["weights"])


def draw(indices: Tensor, weights: Tensor, seed: int, epoch: int) -> Tensor:
    """Order of the kept samples in one epoch.

    Args:
        indices: ``[k]``, positions.
        weights: ``[k]``, not negative.
        seed: Of the order.
        epoch: Counted from 0.

    Returns:
        ``[k]``: each position once, or drawn with replacement where weights differ.
    """
    # Two numbers in one: seeds of generators that differ by a constant must not give the same epochs shifted.
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch * 7_919 + 12_345) % 2**63)
    if bool((weights == weights[0]).all()):
        return indices[torch.randperm(len(indices), generator=generator, device="cpu")]
    # By inversion of the cumulative sum: torch.multinomial ends at 2^24 categories and works in float32.
    bounds = weights.double().cumsum(0)
    places = torch.rand(len(indices), generator=generator, dtype=torch.float64, device="cpu") * bounds[-1]
    return indices[torch.searchsorted(bounds, places, right=True).clamp_(max=len(indices) - 1)]
