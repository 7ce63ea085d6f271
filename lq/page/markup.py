"""HTML from Python values: everything but markup is escaped."""

from __future__ import annotations

from html import escape
from typing import Any


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


_VOID = ("img", "source", "meta")


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element with escaped children and attributes.

    Args:
        name: ``"td"``.
        children: :class:`Markup`, or anything else, which is escaped; None is left out.
        attributes: a trailing ``_`` goes and ``_`` becomes ``-`` (``class_``, ``data_value``); None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    inner = "".join(
        child if isinstance(child, Markup) else escape(str(child)) for child in children if child is not None
    )
    return Markup(f"<{name}{written}>{inner}</{name}>")


def joined(*parts: Markup | None) -> Markup:
    """Elements one after the other."""
    return Markup("\n".join(part for part in parts if part))
