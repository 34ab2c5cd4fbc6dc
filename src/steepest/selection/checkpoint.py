"""A selection under way, kept so that it can be interrupted and continued: bit for bit, or by other processes."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from steepest._versions import package_version
from steepest.distributed.checkpoint.folders import complete_folders, forget, forget_newer
from steepest.distributed.checkpoint.manifest import FORMAT
from steepest.distributed.checkpoint.together import each, lead, write_checkpoint
from steepest.distributed.checkpoint.tree import pack
from steepest.distributed.ranks import RankError
from steepest.errors import SelectionError
from steepest.selection.keeping import Keep, check_place
from steepest.selection.meetings import Pause
from steepest.selection.passes import Passes
from steepest.selection.restoring import KIND, restored
from steepest.selection.together import Together

__all__ = ["Keeper", "versions"]

_KEPT = 2
_SAME_SECONDS = 2.0  # two signals to one of several processes within this time are one


class Keeper(Pause):
    """Writes the state of a selection every so often, and puts it back.

    A checkpoint is a folder, written by all processes together; see `steepest.distributed.checkpoint`.

    Args:
        keep: Where to, how often.
        passes: The selection under way.
        identity: What the selection is of, in plain values; a checkpoint of anything else is refused.
        device: Where the model is.
        together: The processes that make the selection; None for one alone.

    Raises:
        SelectionError: If the folder cannot be one of checkpoints.
    """

    def __init__(
        self,
        keep: Keep,
        passes: Passes,
        identity: Mapping[str, Any],
        device: torch.device,
        together: Together | None = None,
    ) -> None:
        self._keep, self._passes, self._identity = keep, passes, dict(identity)
        self._device, self._together = device, together
        self._ranks = None if together is None else together.ranks
        self._last = time.monotonic()
        self._from: Path | None = None  # those after it are damaged
        self._written: tuple[int, int] | None = None
        self._writes = 0
        self._writing = self._stop = False
        self._stopped_at = 0.0
        check_place(keep.folder)

    def restore(self) -> None:
        """Continue the newest checkpoint that is whole, if there is one. All processes must come here.

        Raises:
            SelectionError: If all are damaged, or it is of another selection.
        """
        keep, leads = self._keep, self._ranks is None or self._ranks.rank == 0
        say = (keep.say if leads else None) or (lambda _: None)
        try:
            self._from = restored(keep, self._passes, self._identity, self._device, self._together, say)
        except SelectionError as error:
            if not keep.replaceable:
                raise
            say(f"the selection is begun anew: {error}")
            lead(self._ranks, lambda: forget(keep.folder))
        self._last, self._written = time.monotonic(), self._passes.place

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= self._keep.every

    def act(self) -> None:
        """Write the state: all processes do, between two batches."""
        self.write()

    def after_batch(self) -> None:
        """Write if it is time to; several processes do where they meet.

        Raises:
            KeyboardInterrupt: If the user asked for it while a batch was worked on.
        """
        if self._together is not None:
            return
        if not self._stop and self.due():
            self.write()
        if self._stop:
            raise KeyboardInterrupt

    def after_passes(self) -> None:
        """Write what the choice is made from, which may take long too."""
        worth = self._passes.seconds >= self._keep.worth
        if worth if self._together is None else self._together.one(worth):
            self.write()

    def write(self) -> None:
        """Write the state; the one before stays beside it. All processes must come here."""
        passes, folder, tensors = self._passes, self._keep.folder, dict[str, Tensor]()
        rank = 0 if self._ranks is None else self._ranks.rank
        if not self._writes:
            self._keep.before()
        begun = passes.begun if self._together is None else any(self._together.told(passes.begun))

        def packed() -> tuple[Any, Any, list[str]]:
            common, share = passes.parts(begun)
            # What all know alike is written by the first.
            trees = pack(common if rank == 0 else None, "common", tensors), pack(share, f"shares.{rank}", tensors)
            return *trees, [name for name, tensor in tensors.items() if tensor.device.type != "cpu"]

        self._writing = True
        try:
            told = each(self._ranks, packed)
            if self._from is not None and rank == 0:
                forget_newer(self._from)
            self._from = None
            content = {
                "format": FORMAT,
                "kind": KIND,
                "of": self._keep.of,
                "identity": self._identity,
                "on device": [name for _, _, names in told for name in names],
                "state": {"common": told[0][0], "shares": [share for _, share, _ in told]},
            }
            write_checkpoint(folder, _next_number(folder), _KEPT, tensors, content, self._ranks)
        finally:
            self._writing = False
        self._last, self._written, self._writes = time.monotonic(), passes.place, self._writes + 1

    def remove(self) -> None:
        """Remove all checkpoints: the selection is done. All processes must come here."""
        if not self._keep.stays:
            lead(self._ranks, lambda: forget(self._keep.folder))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Write on Ctrl-C, which is held back while a batch is worked on; a second one breaks through.

        So is SIGTERM, where its handler is Python's own of Ctrl-C.

        Yields:
            Nothing.

        Raises:
            KeyboardInterrupt: The user's.
            RankError: If another process stopped, be it by Ctrl-C.
        """
        with self.held_back():
            try:
                yield
            except (KeyboardInterrupt, RankError):
                if self._is_to_be_written():
                    self.write()
                raise

    def _is_to_be_written(self) -> bool:
        """Whether there is something new and whole: otherwise the checkpoint before has the last whole state."""
        whole, new = self._passes.whole, self._passes.place != self._written
        if self._together is None:
            return whole and new
        if not self._together.stopped:  # something failed, and nobody knows what the others do
            return False
        told = self._together.told((whole, new))
        return all(whole for whole, _ in told) and any(new for _, new in told)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Note Ctrl-C: one process stops after its batch, several where they meet. A second one breaks through.

        Yields:
            Nothing.
        """
        numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is signal.default_int_handler
        ]
        if self._together is not None:
            stop = self._keep.stop
            self._together.asked = lambda: self._stop or (stop is not None and stop())
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        for number in numbers:
            signal.signal(number, self._asked)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, signal.default_int_handler)

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        # Several processes stop where they meet, so that none waits for another; torchrun passes a signal on, so that
        # it may come twice.
        now = time.monotonic()
        again = self._stop and (self._together is None or now - self._stopped_at > _SAME_SECONDS)
        if again or (self._passes.whole and not self._writing and self._together is None):
            raise KeyboardInterrupt
        if not self._stop:
            self._stop, self._stopped_at = True, now


def _next_number(folder: Path) -> int:
    found = complete_folders(folder)
    return 1 + int(found[-1].name.removeprefix("step-").partition(".")[0]) if found else 1


def versions() -> dict[str, str]:
    """Versions that a continued selection must share with its beginning.

    Returns:
        Version by package.
    """
    return {name: package_version(name) for name in ("steepest", "torch")}
