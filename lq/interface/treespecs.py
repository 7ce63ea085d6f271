"""How arguments and outputs nest their tensors, as text that need not be trusted.

torch's own reader imports any module that such a text names, as that of a ``defaultdict``'s factory or of an enum.
"""

from __future__ import annotations

import json
from typing import Any

from torch.utils import _pytree as pytree

#: The container whose text names a function by module and name, and the functions that are accepted.
_DEFAULTDICT = "collections.defaultdict"
_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")

#: What marks an enum, which is also named by module and name.
_ENUM = "__enum__"

_MAX_DEPTH = 64


def without_names(values: Any) -> Any:
    """``values`` with plain tuples for named ones, whose classes a text cannot name."""
    if isinstance(values, tuple):
        return tuple(map(without_names, values))
    # Subclasses too: a graph's own are immutable.
    if isinstance(values, dict):
        return {key: without_names(value) for key, value in values.items()}
    return [without_names(value) for value in values] if isinstance(values, list) else values


def load_treespec(text: str) -> pytree.TreeSpec:
    """What ``torch.utils._pytree.treespec_dumps`` wrote.

    Raises:
        ValueError: where ``text`` is not such a text, or names a module.
    """
    check_treespec(text)
    try:
        return pytree.treespec_loads(text)
    except Exception as error:
        raise ValueError(f"{_short(text)} is not a description of nested arguments: {error}") from error


def check_treespec(text: Any) -> None:
    """Refuse a text that torch would import a module for.

    Raises:
        ValueError: where it names one, or is not such a text.
    """
    try:
        _, schema = json.loads(text)
        _check(schema, _MAX_DEPTH)
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{_short(text)} is not a description of nested arguments: {error!r}") from error


def _check(schema: dict[str, Any], depth: int) -> None:
    if not depth:
        raise ValueError(f"arguments are nested in more than {_MAX_DEPTH} levels")
    context = schema["context"]
    if _has_enum(context) or (schema["type"] == _DEFAULTDICT and not _is_plain_default(context)):
        raise ValueError(
            f"it nests arguments in a {schema['type']} that names a module to import, which is not done for a file"
        )
    for child in schema["children_spec"]:
        _check(child, depth - 1)


def _has_enum(context: Any) -> bool:
    if isinstance(context, str):
        try:
            context = json.loads(context)
        except json.JSONDecodeError:  # the text of a class with its own reader
            return _ENUM in context
    if isinstance(context, dict):
        return _ENUM in context or any(map(_has_enum, context.values()))
    return isinstance(context, list) and any(map(_has_enum, context))


def _is_plain_default(context: Any) -> bool:
    names = isinstance(context, dict) and (context.get("default_factory_module"), context.get("default_factory_name"))
    return bool(names) and names in {("builtins", name) for name in _FACTORIES}


def _short(text: Any) -> str:
    return repr(str(text)[:60])
