"""How tensors make up arguments and outputs, as text that a stranger may have written.

torch's own reader imports whatever module such a text names: the one that a ``defaultdict``'s factory or an enum is of.
"""

from __future__ import annotations

import json
from typing import Any

from torch.utils import _pytree as pytree

#: The container whose text names a function, as a module and a name, and those that are taken.
_DEFAULTDICT = "collections.defaultdict"
_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")

#: What marks an enum, which is named by a module and a name as well.
_ENUM = "__enum__"

_MAX_DEPTH = 64


def load_treespec(text: str) -> pytree.TreeSpec:
    """What ``torch.utils._pytree.treespec_dumps`` wrote.

    Raises:
        ValueError: where ``text`` is nothing of that, or names a module.
    """
    check_treespec(text)
    try:
        return pytree.treespec_loads(text)
    except Exception as error:
        raise ValueError(f"{_short(text)} says nothing of nested arguments: {error}") from error


def check_treespec(text: Any) -> None:
    """Refuse a text that torch would import a module for.

    Raises:
        ValueError: where it names one, or is no such text.
    """
    try:
        _, schema = json.loads(text)
        _check(schema, _MAX_DEPTH)
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{_short(text)} says nothing of nested arguments: {error!r}") from error


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
        except json.JSONDecodeError:  # text of a class that reads it itself
            return _ENUM in context
    if isinstance(context, dict):
        return _ENUM in context or any(map(_has_enum, context.values()))
    return isinstance(context, list) and any(map(_has_enum, context))


def _is_plain_default(context: Any) -> bool:
    names = isinstance(context, dict) and (context.get("default_factory_module"), context.get("default_factory_name"))
    return bool(names) and names in {("builtins", name) for name in _FACTORIES}


def _short(text: Any) -> str:
    return repr(str(text)[:60])
