"""Guards: what has to hold for the sizes of a network's inputs, as text that can be read safely from a file."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lq.errors import GuardError

#: The sizes of each input by its name.
Sizes = Mapping[str, Sequence[int]]

_Evaluate = Callable[[Sizes], Any]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min, "abs": abs}


@lru_cache(maxsize=512)
def compile_guard(text: str) -> _Evaluate:
    """A function that tests whether a guard holds.

    A guard compares arithmetic on integers and sizes, ``size('x', 2) // 8 == 4``; nothing else is evaluated.

    Raises:
        GuardError: where ``text`` is not a guard.
    """
    try:
        return _compiled(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise GuardError(f"{text!r} is not a guard of sizes") from error


def _compiled(node: ast.AST) -> _Evaluate:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = node.value
        return lambda sizes: value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        function, left, right = _OPERATORS[type(node.op)], _compiled(node.left), _compiled(node.right)
        return lambda sizes: function(left(sizes), right(sizes))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        function, operand = _OPERATORS[type(node.op)], _compiled(node.operand)
        return lambda sizes: function(operand(sizes))
    if isinstance(node, ast.BoolOp):
        values, combine = [_compiled(value) for value in node.values], all if isinstance(node.op, ast.And) else any
        return lambda sizes: combine(value(sizes) for value in values)
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        terms = [_compiled(term) for term in (node.left, *node.comparators)]
        steps = list(zip((_OPERATORS[type(op)] for op in node.ops), terms, terms[1:], strict=False))
        return lambda sizes: all(compare(a(sizes), b(sizes)) for compare, a, b in steps)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id in _FUNCTIONS:
            function, arguments = _FUNCTIONS[node.func.id], [_compiled(argument) for argument in node.args]
            return lambda sizes: function(*(argument(sizes) for argument in arguments))
        if node.func.id == "size" and len(node.args) == 2:
            name, axis = (argument.value if isinstance(argument, ast.Constant) else None for argument in node.args)
            if isinstance(name, str) and isinstance(axis, int):
                return lambda sizes: sizes[name][axis]
    raise GuardError(f"{ast.unparse(node)!r} cannot be part of a guard of sizes")


def check_guards(guards: Sequence[str], sizes: Sizes) -> None:
    """Refuse inputs for which a network does not compute what the original forward does.

    Raises:
        ValueError: where a guard does not hold.
    """
    for guard in guards:
        if not compile_guard(guard)(sizes):
            shapes = ", ".join(f"{name!r} of the shape {tuple(shape)}" for name, shape in sizes.items())
            raise ValueError(
                f"the INT8 network is not for the input {shapes}: it was made for inputs with {guard}, and computes "
                f"something else for others. Prepare the model with example inputs of such sizes"
            )


def input_name(path: tuple[Any, ...]) -> str:
    """The name of a tensor in the inputs, from its key path."""
    return "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def inputs_of(guard: str) -> set[str]:
    """The names of the inputs that a guard is about."""
    return set(re.findall(r"size\('([^']*)'", guard))


def fixes_the_batch(guard: str) -> bool:
    """Whether a guard holds for only one batch size."""
    return re.fullmatch(r"size\(.*, 0\) == \d+", guard) is not None
