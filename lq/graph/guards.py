"""What the sizes of a network's inputs have to fulfil for its graph to be what the forward computes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: How a guard names a size: by the number of the tensor among the inputs, and of its axis.
_SIZE = re.compile(r"size_(\d+)_(\d+)")


def size_name(tensor: int, axis: int) -> str:
    """What a guard calls a size."""
    return f"size_{tensor}_{axis}"


def check_guards(guards: Sequence[str], inputs: Any) -> None:
    """Refuse inputs of sizes for which the graph is not known to hold.

    Args:
        guards: Python expressions of sizes, ``"size_0_2 > 16"`` for the third axis of the first tensor.
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


@lru_cache(maxsize=1024)
def _broken(guards: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str | None:
    """The first guard that does not hold; the expressions come from a capture in this process, not from files."""
    scope: dict[str, Any] = {"math": math, "torch": torch}
    scope |= {size_name(i, axis): size for i, shape in enumerate(shapes) for axis, size in enumerate(shape)}
    for guard in guards:
        try:
            holds = bool(eval(guard, scope))
        except (NameError, ZeroDivisionError):
            holds = False
        if not holds:
            return guard
    return None


def _readable(guard: str) -> str:
    return _SIZE.sub(lambda match: f"size {match[2]} of input {match[1]}", guard)
