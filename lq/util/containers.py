"""Filling lists, dicts and sets with what they held before, in place; one that holds it still is not written to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any


def refill_dict(values: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Make ``values`` hold the entries of ``before``, and no others."""
    if len(values) == len(before) and all(name in values and values[name] is it for name, it in before.items()):
        return
    values.clear()
    values.update(before)


def refill_list(values: list[Any] | deque[Any], before: Iterable[Any]) -> None:
    """Make ``values`` hold the items of ``before``, in their order."""
    before = list(before)
    if len(values) == len(before) and all(a is b for a, b in zip(values, before, strict=True)):
        return
    values.clear()
    values.extend(before)


def refill_set(values: set[Any], before: set[Any]) -> None:
    """Make ``values`` hold the members of ``before``."""
    if values != before:
        values.clear()
        values.update(before)


def refill(values: Any, before: Any) -> None:
    """Make a list, deque, dict or set hold what ``before``, one of the same kind, holds."""
    if isinstance(values, dict):
        refill_dict(values, before)
    elif isinstance(values, set):
        refill_set(values, before)
    else:
        refill_list(values, before)
