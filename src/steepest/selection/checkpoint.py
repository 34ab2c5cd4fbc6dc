"""A selection under way in one file, so that it can be interrupted and continued bit for bit."""

import io
import os
import pickle
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
from steepest.errors import SelectionError
from steepest.selection.passes import Passes

__all__ = ["Keeper"]

_FORMAT = 1


class Keeper:
    """Writes the state of a selection every so often, and puts it back.

    Args:
        path: The file.
        passes: The selection under way.
        identity: What the selection is of, in plain values; a checkpoint of anything else is refused.
        every: Seconds between two writes.

    Raises:
        SelectionError: If there can be no such file.
    """

    def __init__(self, path: Path, passes: Passes, identity: Mapping[str, Any], every: float) -> None:
        self._path, self._passes, self._identity, self._every = path, passes, dict(identity), every
        self._last = time.monotonic()
        self._stop = False
        if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise SelectionError(f"checkpoint={str(path)!r} cannot be written: name a file in a folder that can be.")

    def restore(self) -> None:
        """Continue what the file holds, if there is one.

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

    def write(self) -> None:
        """Write the state in place of the one before."""
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "identity": self._identity, "state": self._passes.state_dict()}, buffer)
        write_atomically(self._path, buffer.getvalue())
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the selection is done."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Write on Ctrl-C, which is held back while a batch is worked on; a second one breaks through.

        Yields:
            Nothing.

        Raises:
            KeyboardInterrupt: The user's.
        """
        with self._held_back():
            try:
                yield
            except KeyboardInterrupt:
                if self._passes.whole:  # otherwise the file has the last whole state
                    self.write()
                raise

    @contextmanager
    def _held_back(self) -> Iterator[None]:
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not ours or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        if self._stop or self._passes.whole:
            raise KeyboardInterrupt
        self._stop = True

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


def versions() -> dict[str, str]:
    """Versions that a continued selection must share with its beginning.

    Returns:
        Version by package.
    """
    return {name: package_version(name) for name in ("steepest", "torch")}
