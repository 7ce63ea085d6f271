"""What the user's code keeps on its LightningModule, put back after lq has called it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lq.util.containers import refill_dict, refill_list, refill_set

#: Tensors of more bytes are data, and are not written to.
_LARGEST_TENSOR = 2**26

#: Containers that hold more are data as well.
_LONG = 10_000


@contextmanager
def same_attributes(pl_module: nn.Module, *, tensors: bool = True) -> Iterator[None]:
    """Afterwards the attributes of ``pl_module`` are as before: counters, lists of outputs, what is made the first time
    it is asked for, the parts that a step adds.

    Containers have the contents that they had. Of its submodules only which they are is put back.

    Args:
        pl_module: the LightningModule.
        tensors: whether its own buffers and other tensors are as before, too, such as a queue of keys.
    """
    attributes = pl_module.__dict__
    before = dict(attributes)
    held = {name: value for name, value in before.items() if tensors or name not in ("_buffers", "_parameters")}
    restore = [*_restorers(held, tensors, set())]
    try:
        yield
    finally:
        if not tensors:
            before |= {name: v for name, v in attributes.items() if name in before and isinstance(v, Tensor)}
        refill_dict(attributes, before)
        for put_back in restore:
            # An object that refuses its own former value is no reason to end a training.
            with suppress(Exception):
                put_back()


def _restorers(values: dict[Any, Any], tensors: bool, seen: set[int]) -> Iterator[Callable[[], None]]:
    """What puts back the contents of all containers, and of those in them."""
    waiting = list(values.values())
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, deque)):
            yield partial(refill_list, value, list(value))
            waiting += value if len(value) <= _LONG else ()
        elif isinstance(value, dict):
            yield partial(refill_dict, value, dict(value))
            waiting += value.values() if len(value) <= _LONG else ()
        elif isinstance(value, set):
            yield partial(refill_set, value, set(value))
        elif isinstance(value, tuple):
            waiting += value if len(value) <= _LONG else ()
        elif tensors and isinstance(value, Tensor) and not isinstance(value, (nn.Parameter, UninitializedBuffer)):
            if not value.is_inference() and value.numel() * value.element_size() <= _LARGEST_TENSOR:
                yield partial(_write_back, value, value.detach().clone())
        elif tensors and isinstance(value, np.ndarray) and value.flags.writeable and value.nbytes <= _LARGEST_TENSOR:
            yield partial(np.copyto, value, value.copy())


def _write_back(value: Tensor, before: Tensor) -> None:
    if not torch.equal(value, before):
        value.detach().copy_(before)
