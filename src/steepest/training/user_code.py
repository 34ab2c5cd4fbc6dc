"""Python objects that a user names by `module:attribute` or `file.py:attribute`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from steepest.errors import InvalidOptionError
from steepest.training.errors import UnknownNameError, unknown

__all__ = ["code_file", "is_reference", "load_attribute"]


def is_reference(text: str) -> bool:
    """Whether a text names a Python object.

    Args:
        text: What the user wrote.

    Returns:
        True for `module:attribute` and `file.py:attribute`.

    Example:
        >>> is_reference("my_tasks:waves"), is_reference("digits")
        (True, False)
    """
    place, colon, attribute = text.rpartition(":")
    return bool(colon and place) and all(part.isidentifier() for part in attribute.split("."))


def load_attribute(reference: str) -> object:
    """Import what a reference names; modules are also looked for in the current folder.

    Args:
        reference: `module:attribute` or `file.py:attribute`.

    Returns:
        The object.

    Raises:
        UnknownNameError: If the module has no such attribute.
    """
    place, _, attribute = reference.rpartition(":")
    found: object = _import(place)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UnknownNameError(unknown(f"attribute of {place}", part, [n for n in dir(found) if n[0] != "_"]))
        found = getattr(found, part)
    return found


def code_file(reference: str) -> Path | None:
    """File that holds the module of a reference.

    Args:
        reference: `module:attribute` or `file.py:attribute`.

    Returns:
        The file, or None where the module has none.
    """
    file = getattr(_import(reference.rpartition(":")[0]), "__file__", None)
    return Path(file) if file else None


def _import(place: str) -> ModuleType:
    """Import a module by name or by file; what its code raises is told with its place."""
    here = str(Path.cwd())
    # A console script does not look into the folder it was started in, `python -m` does.
    sys.path.insert(0, here)
    try:
        return _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not place.startswith(error.name):
            raise InvalidOptionError(f"{place} needs the module {error.name}, which is not installed") from error
        raise InvalidOptionError(
            f"there is no module {place!r} here: run from the folder that has it, name its file as in "
            "my_code.py:attribute, or install it"
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:
        raise InvalidOptionError(
            f"importing {place} failed with {type(error).__name__}: {error}; --debug shows where"
        ) from error
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    name = f"steepest_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise InvalidOptionError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
