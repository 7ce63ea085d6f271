"""Modules that are called as they are: in an exported program, one operator stands for the call."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class TensorShape:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Shapes:
    """What a call of a module takes and returns.

    Args:
        inputs: shapes of its tensors, in order.
        result: its leaves: the shapes of tensors, and everything else as it is.
        result_spec: how they are nested.
    """

    inputs: tuple[TensorShape, ...]
    result: tuple[Any, ...]
    result_spec: Any


@dataclass
class LeafCall:
    """A call of a leaf in a program: the module's path, and how its tensors are arranged.

    Args:
        path: of the module.
        values: the leaves of its arguments; a tensor's place holds None and is in ``tensor_places``.
        spec: how they are nested.
        tensor_places: see ``values``.
        result_paths: for each tensor of its result the keys that lead to it.
        position: see :mod:`lq.graph.capture.calls`.
    """

    path: str
    values: list[Any]
    spec: Any
    tensor_places: list[int]
    result_paths: list[tuple[Any, ...]]
    position: int = -1

    def arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with the tensors at their places."""
        values = list(self.values)
        for place, tensor in zip(self.tensor_places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        return args, kwargs


def _describe(value: Tensor) -> TensorShape:
    return TensorShape(tuple(value.shape), value.dtype, value.device)


def shapes(values: Any) -> tuple[TensorShape, ...]:
    """The shapes of all tensors in any nesting."""
    return tuple(_describe(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def flatten_shapes(value: Any) -> tuple[tuple[Any, ...], Any]:
    """``(leaves, spec)`` of a value, with the tensors' shapes in their places."""
    flat, spec = pytree.tree_flatten(value)
    return tuple(_describe(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat), spec


#: What leaves return in the program that is being exported, by the number of the call.
_results: dict[int, Shapes] = {}

_numbers = itertools.count()


@cache
def operator_of_leaves() -> Any:
    """``lq::leaf(Tensor[] inputs, int number) -> Tensor[]``, made when it is first needed."""
    library = torch.library.Library("lq", "FRAGMENT")
    library.define("leaf(Tensor[] inputs, int number) -> Tensor[]")

    def fake(inputs: list[Tensor], number: int) -> list[Tensor]:
        known = _results[number]
        return [
            torch.empty(_sizes(result.shape, known.inputs, inputs), dtype=result.dtype, device=result.device)
            for result in known.result
            if isinstance(result, TensorShape)
        ]

    torch.library.register_fake("lq::leaf", fake, lib=library)
    _libraries.append(library)  # its definitions are dropped with the object
    return torch.ops.lq.leaf.default


_libraries: list[Any] = []


def _sizes(shape: tuple[int, ...], known: tuple[TensorShape, ...], inputs: list[Tensor]) -> list[Any]:
    """The size of a result for inputs of free sizes: an axis as long as an input's is assumed to equal it."""
    sizes: list[Any] = []
    for axis, size in enumerate(shape):
        same = (
            given.shape[axis]
            for example, given in zip(known, inputs, strict=True)
            if axis < len(example.shape) and example.shape[axis] == size
        )
        sizes.append(next(same, size))
        if axis >= 2 and sizes[-1] is size:
            for given in inputs:
                for other in given.shape[2:]:
                    int(other)  # how it depends on them is not known: they are fixed
    return sizes


def call(path: str, shapes: Shapes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LeafCall, Any, int]:
    """Call a leaf while it is exported.

    Returns:
        The call, its result, and its number.
    """
    values, spec = pytree.tree_flatten((args, kwargs))
    places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
    number = next(_numbers)
    _results[number] = shapes
    made = iter(operator_of_leaves()([values[place] for place in places], number))
    flat = [next(made) if isinstance(leaf, TensorShape) else leaf for leaf in shapes.result]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(shapes.result), shapes.result_spec))
    result_paths = [keys_of(keys) for keys, leaf in paths if isinstance(leaf, TensorShape)]
    others = [None if isinstance(value, Tensor) else value for value in values]
    leaf_call = LeafCall(path, others, spec, places, result_paths)
    return leaf_call, pytree.tree_unflatten(flat, shapes.result_spec), number


def forget(numbers: Iterable[int]) -> None:
    """The calls of a finished export."""
    for number in numbers:
        _results.pop(number, None)


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys that lead to a leaf of nested lists, tuples and dicts."""
    return tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
