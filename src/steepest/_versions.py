"""Versions of installed packages, for what is written to disk."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["package_version"]


def package_version(name: str) -> str:
    """Version of an installed package, without importing it.

    Args:
        name: Name of the distribution.

    Returns:
        The version, or "unknown" where the package runs from its source without being installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
