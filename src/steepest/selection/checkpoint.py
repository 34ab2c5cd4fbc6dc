"""A selection under way in one file, so that it can be interrupted and continued bit for bit."""

import glob
import io
import os
import pickle
import re
import signal
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from steepest._files import write_atomically
from steepest._versions import package_version
from steepest.distributed.ranks import RankError
from steepest.errors import SelectionError
from steepest.selection.passes import Passes
from steepest.selection.together import Together, attempt

__all__ = ["Keeper"]

_FORMAT = 1
_SAME_SECONDS = 2.0  # two signals to one of several processes within this time are one


class Keeper:
    """Writes the state of a selection every so often, and puts it back.

    Args:
        path: The file.
        passes: The selection under way.
        identity: What the selection is of, in plain values; a checkpoint of anything else is refused.
        every: Seconds between two writes.
        together: The processes that make the selection, each of which keeps its own state in a file of its own; None
            for one alone.

    Raises:
        SelectionError: If there can be no such file, or there is one of another number of processes.
    """

    def __init__(
        self,
        path: Path,
        passes: Passes,
        identity: Mapping[str, Any],
        every: float,
        together: Together | None = None,
    ) -> None:
        self._path, self._passes, self._identity, self._every = path, passes, dict(identity), every
        self._together = together
        self._last = time.monotonic()
        self._stop, self._stopped_at = False, 0.0
        if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise SelectionError(f"checkpoint={str(path)!r} cannot be written: name a file in a folder that can be.")
        size = 1
        if together is not None:
            size = together.ranks.size
            self._path = path.with_name(f"{path.name}.{together.ranks.rank}-of-{size}")
        _refuse_other_numbers(path, size)

    def restore(self) -> None:
        """Continue what the file holds, if there is one.

        Of several processes one may have noted the end of a pass that another has not: it gives that its state.

        Raises:
            SelectionError: If the files of several processes do not belong together.
        """
        with attempt(self._together):
            self._restore_own()
        if self._together is None:
            return
        places = self._together.told(self._passes.place)
        newest = max(number for number, _ in places)
        if newest == min(number for number, _ in places):
            return
        if (newest, 0) not in places:  # `after_pass` prevents it
            raise SelectionError(
                f"the checkpoints beside {self._path} do not belong together: some are a pass behind others; delete "
                "them to begin anew."
            )
        content = self._together.bytes_of(_packed(self._passes.state_dict()), places.index((newest, 0)))
        with self._together.attempt():
            if self._passes.place[0] < newest:
                self._passes.follow(torch.load(io.BytesIO(content), weights_only=True))

    def _restore_own(self) -> None:
        """Continue what this process's file holds, if there is one.

        Raises:
            SelectionError: If it is damaged or of another selection.
        """
        if not self._path.exists():
            return
        content = self._read()
        changed = [
            f"its {name} was {content['identity'].get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if content["identity"].get(name) != value
        ]
        remedy = "go on with what it was made with, or delete it to begin anew"
        if changed:
            raise SelectionError(
                f"the checkpoint {self._path} is of another selection: {'; '.join(changed)}; {remedy}."
            )
        try:
            self._passes.load_state_dict(content["state"])
        except SelectionError as error:
            raise SelectionError(f"the checkpoint {self._path} is of another selection: {error}; {remedy}.") from error
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise SelectionError(f"the checkpoint {self._path} is not complete ({reason}); {remedy}.") from error

    def after_batch(self) -> None:
        """Write if it is time to.

        Raises:
            KeyboardInterrupt: If the user asked for it while a batch was worked on.
        """
        if self._stop:
            raise KeyboardInterrupt
        if time.monotonic() - self._last >= self._every:
            self.write()

    def after_pass(self) -> None:
        """Let no process go on before all have noted the end of a pass: afterwards none can be a pass behind."""
        if self._together is not None:
            with self._together.attempt():
                self.write()

    def write(self) -> None:
        """Write the state in place of the one before."""
        content = {"format": _FORMAT, "identity": self._identity, "state": self._passes.state_dict()}
        write_atomically(self._path, _packed(content))
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the selection is done."""
        self._path.unlink(missing_ok=True)

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
                if self._passes.whole:  # otherwise the file has the last whole state
                    self.write()
                raise

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
        if not numbers or threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in numbers:
            signal.signal(number, self._asked)
        if self._together is not None:
            self._together.asked = lambda: self._stop
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
        if again or (self._passes.whole and self._together is None):
            raise KeyboardInterrupt
        if not self._stop:
            self._stop, self._stopped_at = True, now

    def _read(self) -> dict[str, Any]:
        remedy = "delete it to begin anew"
        try:
            with zipfile.ZipFile(self._path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is not None:
                raise SelectionError(f"the checkpoint {self._path} is damaged in {damaged}: {remedy}.")
            content = torch.load(self._path, weights_only=True)
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            reason = " ".join(str(error).split())[:160]
            raise SelectionError(f"the checkpoint {self._path} cannot be read ({reason}): {remedy}.") from error
        if (
            not isinstance(content, dict)
            or content.get("format") != _FORMAT
            or not {"identity", "state"} <= set(content)
        ):
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise SelectionError(
                f"{self._path} has selection checkpoint format {found!r}, this steepest reads {_FORMAT}: {remedy}."
            )
        return content


def _packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _refuse_other_numbers(path: Path, size: int) -> None:
    """Refuse the files of another number of processes, which share the data in another way."""
    others = path.absolute().parent.glob(f"{glob.escape(path.name)}.*-of-*")
    counts = {int(found[1]): file for file in others if (found := re.search(r"\.\d+-of-(\d+)$", file.name))}
    if path.exists():
        counts[1] = path
    counts.pop(size, None)
    for number, file in counts.items():
        raise SelectionError(
            f"the checkpoint {file} is of a selection by {number} process{'es' * (number > 1)}, and this one has "
            f"{size}: go on with {number}, or delete it to begin anew."
        )


def versions() -> dict[str, str]:
    """Versions that a continued selection must share with its beginning.

    Returns:
        Version by package.
    """
    return {name: package_version(name) for name in ("steepest", "torch")}
