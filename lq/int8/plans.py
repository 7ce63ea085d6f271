"""Plans: networks made for certain input sizes, kept for further inputs of these sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Enough for a training (its batch, a smaller last one, a single image) and for a server that rounds batch sizes.
KEPT = 8

#: A network for certain input sizes, and the outputs for the inputs it was made with.
Made = tuple[Callable[..., Any], Any]


def sizes(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What distinguishes inputs: the tensors' shapes and dtypes, and the values of everything else."""
    flat = all(isinstance(value, Tensor) for value in inputs)  # pytree takes longer than a small kernel
    leaves = inputs if flat else tree_leaves(inputs)
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


class Plans:
    """Calls the network for the sizes of its inputs; makes it if there is none yet.

    Concurrent threads share what one of them makes.

    Args:
        make: makes it.
        kept: how many networks to keep; the least recently called is dropped first.
    """

    def __init__(self, make: Callable[[tuple[Any, ...]], Made], kept: int = KEPT) -> None:
        self._make = make
        self._kept = kept
        self._plans: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        key = (torch.get_num_threads(), *sizes(inputs))  # the weights' layout depends on the number of threads, too
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                self._plans[key], outputs = self._make(inputs)
                while len(self._plans) > self._kept:
                    self._plans.popitem(last=False)
                return outputs
            self._plans.move_to_end(key)
        return plan(*inputs)

    def __len__(self) -> int:
        return len(self._plans)
