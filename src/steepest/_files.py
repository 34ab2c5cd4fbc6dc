"""Files that are either complete or as they were, whatever happens while they are written."""

import contextlib
import os
import secrets
from pathlib import Path

from steepest.errors import OutputError

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either complete or as it was, whatever happens.

    Args:
        path: Where to.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OutputError: If it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not tempfile: its files are for their owner only, and a rename would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may be the folder that is none
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}); what was written before is complete: make room "
                "or name another folder, and go on from there"
            ) from error
        raise
