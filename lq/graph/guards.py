"""What the sizes of a network's inputs have to fulfil for its graph to be what the forward computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: How a guard speaks of a size: the number of the tensor, and of its axis.
_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def check_guards(guards: Sequence[str], inputs: Any) -> None:
    """Refuse inputs of sizes for which the graph is not known to hold.

    Args:
        guards: Python expressions as ``torch.export`` writes them, of ``L["tensors"]``.
        inputs: the network's inputs, in any nesting.

    Raises:
        ValueError: with the sizes and what they have to fulfil.
    """
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    broken = _broken(tuple(guards), shapes)
    if broken is not None:
        raise ValueError(
            f"inputs of shape {', '.join(map(str, shapes))}: the forward may take another way there than the one that "
            f"was converted, which holds where {_readable(broken)}; convert the model with example inputs of that size"
        )


class _Sized:
    """Stands for a tensor in a guard."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def size(self) -> tuple[int, ...]:
        return self._shape


@lru_cache(maxsize=1024)
def _broken(guards: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str | None:
    """The first guard that does not hold; expressions come from the capture in this process, not from files."""
    scope = {"L": {"tensors": [_Sized(shape) for shape in shapes]}, "torch": torch}
    for guard in guards:
        try:
            holds = bool(eval(guard, scope))
        except (IndexError, ZeroDivisionError):
            holds = False
        if not holds:
            return guard
    return None


def _readable(guard: str) -> str:
    return _SIZE.sub(lambda match: f"size {match[2]} of input {match[1]}", guard)
