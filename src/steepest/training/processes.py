"""A run on several processes that torchrun started: the group, each one's share of a batch, and what they agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steepest.distributed import Ranks
from steepest.errors import InvalidOptionError
from steepest.training.optimizer import OptimizerEntry

__all__ = ["alone_first", "check_shares", "launched", "process_group", "refuse_several", "replica", "share"]

# A process that waits so long for another one gives up.
_TIMEOUT_SECONDS = 120.0


def launched() -> int:
    """Number of processes that torchrun, or whatever sets its variables, has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def process_group(device: str) -> Iterator[Ranks | None]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Args:
        device: Torch device of the run; on "cuda" every process takes the GPU of its local number, by NCCL.

    Yields:
        The ranks; None for one process alone.
    """
    if launched() == 1:
        yield None
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    seconds = float(os.environ.get("STEEPEST_TIMEOUT", _TIMEOUT_SECONDS))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=seconds))
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


@contextmanager
def alone_first(ranks: Ranks | None) -> Iterator[None]:
    """Let the first process do something with files before the others do, all of which fail if it does.

    Args:
        ranks: The ranks.
    """
    if ranks is None:
        yield
        return
    if ranks.rank > 0:
        ranks.agree(None)
        yield
        return
    try:
        yield
    except Exception as error:
        ranks.agree(error)
    else:
        ranks.agree(None)


def refuse_several(command: str) -> None:
    """Refuse a command that works in one process.

    Args:
        command: Its name.

    Raises:
        InvalidOptionError: If torchrun has started several processes.
    """
    if launched() > 1:
        raise InvalidOptionError(
            f"steepest {command} does its work from one process: start it without torchrun; steepest train is the "
            "command that shares a run among several, --select included"
        )


def check_shares(batch_size: int, ranks: Ranks | None) -> None:
    """Refuse batches that cannot be shared out evenly: the mean over the ranks would not be the batch's.

    Args:
        batch_size: Samples per step, of all processes together.
        ranks: The ranks.

    Raises:
        InvalidOptionError: If the number of processes does not divide it.
    """
    if ranks is not None and batch_size % ranks.size:
        raise InvalidOptionError(
            f"a batch of {batch_size} samples cannot be shared evenly by {ranks.size} processes: give a --batch-size "
            f"that is a multiple of {ranks.size}"
        )


def share(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """This process's part of a batch: the batch in the order of the ranks is that of one process."""
    return tensor if ranks is None else tensor.tensor_split(ranks.size)[ranks.rank]


def replica(
    model: nn.Module, entry: OptimizerEntry, ranks: Ranks | None, loss_of: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """What is called in a step: gradients are averaged on the way for torch's optimizers; ours do it themselves.

    Args:
        model: The model.
        entry: The optimizer's entry.
        ranks: The ranks.
        loss_of: A loss of the model on some batch, the same on every rank.

    Returns:
        The model, or a DDP wrapper around it.
    """
    if ranks is None or entry.takes == "model":
        return model
    wrapper = DistributedDataParallel(model)
    # After its first backward DDP sorts gradients into buckets anew. That must not happen within the run: sums of a
    # run that goes on from a checkpoint would be rounded in another order than those of one that was never stopped.
    training = model.training
    model.eval()  # running statistics and random generators stay as they are
    for _ in range(2):
        torch.autograd.backward(loss_of(wrapper))
    model.train(training)
    model.zero_grad(set_to_none=True)
    return wrapper
