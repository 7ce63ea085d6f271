"""The package as pip knows it: on the index, ``lq`` is the name of another project."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

#: What pip installs.
NAME = "lightning-quantization"


def package_version() -> str:
    """Its version, or ``"unknown"`` in a checkout that is not installed."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "unknown"


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{NAME}[{extra}]'"
