"""A run on several processes that torchrun started: the group, each one's share of a batch, and what they agree on."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steepest.distributed import Ranks
from steepest.distributed.contact import LostRankError, RankError, contact, ending, lost_contact
from steepest.errors import InvalidOptionError
from steepest.training.optimizer import OptimizerEntry
from steepest.training.rank_logs import shared_warnings, tell_user
from steepest.training.rendezvous import Store, leave, meet, said_by

__all__ = ["alone_first", "check_shares", "if_lost", "launched", "process_group", "replica", "share"]

# A process that waits so long for another one gives up.
_TIMEOUT_SECONDS = 120.0
# So long a process that failed lets the others see why, before it closes its connections.
_LEAVE_SECONDS = 2.0
_REMEDY = "what was saved before is kept, and the same command goes on from there (steepest train: with --resume)"


class _LostContact(SystemExit):
    """Ends a command: what notes the errors of a run must not take it for one of them."""


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

    A process that loses contact with another one tells it in a line and ends, with exit code 1: at once where the
    other is gone, after STEEPEST_TIMEOUT seconds (120 without it) where it does not answer.
    """
    if launched() == 1:
        yield None
        return
    seconds = float(os.environ.get("STEEPEST_TIMEOUT", _TIMEOUT_SECONDS))
    rank, size = int(os.environ["RANK"]), launched()
    with ending(_LostContact):
        try:
            store = _join(device, seconds)
        except (_LostContact, LostRankError) as error:
            _end(error)
        with shared_warnings(store, rank, size):
            try:
                yield Ranks.current()
            except (_LostContact, LostRankError) as error:
                _end(error)
            except BaseException as error:
                leave(store, rank, size, str(error), _LEAVE_SECONDS)
                # The first process tells its own error on the way out; others only what it does not tell.
                if rank > 0 and isinstance(error, Exception) and not isinstance(error, RankError):
                    _tell_unless_told(store, rank, size, str(error))
                raise
            else:
                leave(store, rank, size, "", seconds)
            finally:
                dist.destroy_process_group()


def _join(device: str, seconds: float) -> Store:
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = meet(seconds)
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
    except RuntimeError as error:
        reason = lost_contact(error)
        if reason is None:
            raise
        raise LostRankError(f"[rank {rank}/{size}] lost contact at the start: {reason}") from error
    return store


def _end(error: BaseException) -> NoReturn:
    """End this process without another word to the others: one line, and no farewell that would wait for them."""
    remedy = "; ".join(getattr(error, "__notes__", [])) or _REMEDY
    sys.stderr.write(f"steepest: {error}; {remedy}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _tell_unless_told(store: Store, rank: int, size: int, message: str) -> None:
    told = said_by(store, 0)
    if told is None or message not in told:
        tell_user(rank, size, message)


@contextmanager
def if_lost(remedy: Callable[[], str]) -> Iterator[None]:
    """Say how to go on where contact with another process is lost.

    Args:
        remedy: Gives the text.

    Raises:
        LostRankError: As it came, with the text as a note.
        _LostContact: The same, within `process_group`.
    """
    try:
        yield
    except (_LostContact, LostRankError) as error:
        error.add_note(remedy())
        raise


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
    with contact():
        return _averaged(model, loss_of)


def _averaged(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> DistributedDataParallel:
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
