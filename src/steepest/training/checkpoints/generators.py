"""States of torch's random generators, those of every process under a name of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.distributed import Ranks

__all__ = ["generator_states", "how_many", "set_generators"]

_CPU, _CUDA = "generators.cpu.", "generators.cuda."


def how_many(ranks: Ranks | None) -> dict[str, int]:
    """Number of generators in all: those of another number cannot be taken up.

    Args:
        ranks: The ranks; None for one process alone.

    Returns:
        Number by kind.
    """
    size = 1 if ranks is None else ranks.size
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": size, "cuda": size if cuda and ranks is not None else cuda}


def generator_states(ranks: Ranks | None) -> dict[str, Tensor]:
    """States of this process's generators: of all GPUs it sees, or beside other processes of its own.

    Args:
        ranks: The ranks; None for one process alone.

    Returns:
        States by name.
    """
    rank = 0 if ranks is None else ranks.rank
    found = {f"{_CPU}{rank}": torch.get_rng_state()}
    if not torch.cuda.is_available():
        return found
    own = torch.cuda.get_rng_state_all() if ranks is None else [torch.cuda.get_rng_state()]
    return found | {f"{_CUDA}{rank + place}": state for place, state in enumerate(own)}


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Go on drawing from where states were taken.

    Args:
        states: What `generator_states` returned in a process of the same place.
    """
    cuda = [state for name, state in states.items() if name.startswith(_CUDA)]
    for name, state in states.items():
        if name.startswith(_CPU):
            torch.set_rng_state(state)
    if len(cuda) == 1:
        torch.cuda.set_rng_state(cuda[0])
    elif cuda:
        torch.cuda.set_rng_state_all(cuda)
