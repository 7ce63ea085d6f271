"""Reading data before training does, so that training reads what it would have read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

#: Lists that are longer are put back, but what is in them is not looked at: they are files and labels, not transforms.
_LONG = 256

#: How many objects are looked at at most.
_MOST = 10_000

#: Attributes of a Trainer and of a datamodule, which knows its Trainer: all of it is reachable from there.
_LIGHTNING = ("fit_loop", "prepare_data_per_node")

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, FunctionType, nn.Module)


@contextmanager
def unnoticed(loader: Any) -> Iterator[None]:
    """Inside, batches may be taken of a dataloader; afterwards it gives those that it would have given.

    What reading changes is put back: the global generators, those that the data set, the samplers and the transforms
    have of their own, their counters, orders that they shuffle in place, and the worker processes that a DataLoader
    with ``persistent_workers`` keeps. Not put back is what lies outside of Python: a file that is read on.

    Args:
        loader: of any kind, or several of them in lists, dicts or a ``CombinedLoader``.
    """
    restore = [*_restorers(loader)]
    try:
        with isolate_rng():
            yield
    finally:
        for put_back in reversed(restore):
            # An object that refuses its own former value is no reason to end a training.
            with suppress(Exception):
                put_back()


def can_be_read_again(loader: Any) -> bool:
    """Whether what is looked at is still there for the training."""
    return isinstance(loader, DataLoader) or iter(loader) is not loader


def _restorers(root: Any) -> Iterator[Callable[[], None]]:
    """What puts everything back that is reachable from ``root``, as it is now."""
    waiting, seen = [root], {id(root): root}
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        restorer, inner = _state_of(value)
        if restorer is not None:
            yield restorer
        for each in inner:
            if id(each) not in seen and not isinstance(each, _ATOMS):
                seen[id(each)] = each
                waiting.append(each)


def _state_of(value: Any) -> tuple[Callable[[], None] | None, list[Any]]:
    """What puts ``value`` back, and what else it holds."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _set(value.set_state, state), []
    if isinstance(value, random.Random):
        numbers = value.getstate()
        return lambda: value.setstate(numbers), []
    if isinstance(value, np.random.RandomState):
        words = value.get_state()
        return lambda: value.set_state(words), []
    if isinstance(value, np.random.Generator):
        return _state_of(value.bit_generator)
    if isinstance(value, np.random.BitGenerator):
        bits = value.state
        return lambda: setattr(value, "state", bits), []
    if isinstance(value, (Tensor, np.ndarray)):
        return _order(value), []
    if type(value) is list:
        items = list(value)
        return lambda: value.__setitem__(slice(None), items), items if len(items) <= _LONG else []
    if type(value) is dict:
        entries = dict(value)
        return lambda: _refill(value, entries), list(entries.values()) if len(entries) <= _LONG else []
    if isinstance(value, (tuple, set, frozenset)):
        return None, list(value) if len(value) <= _LONG else []
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or any(hasattr(value, name) for name in _LIGHTNING):
        return None, []
    before = dict(attributes)
    return lambda: _put_attributes_back(value, before), list(before.values())


def _order(value: Tensor | np.ndarray[Any, Any]) -> Callable[[], None] | None:
    """Puts an order of samples back, which may be shuffled in place; images are not."""
    if value.ndim not in (1, 2) or str(value.dtype).removeprefix("torch.") not in ("int64", "int32"):
        return None
    if isinstance(value, Tensor):
        kept = value.clone()
        return lambda: _set(value.copy_, kept)
    if not value.flags.writeable:
        return None
    numbers = value.copy()
    return lambda: value.__setitem__(slice(None), numbers)


def _put_attributes_back(value: Any, before: Mapping[str, Any]) -> None:
    attributes = value.__dict__
    workers = attributes.get("_iterator")
    if workers is not None and workers is not before.get("_iterator") and hasattr(workers, "_shutdown_workers"):
        workers._shutdown_workers()
    # In the dict itself: a DataLoader refuses to have its attributes set.
    _refill(attributes, before)


def _refill(values: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    if len(values) == len(before) and all(name in values and values[name] is it for name, it in before.items()):
        return
    values.clear()
    values.update(before)


def _set(function: Callable[[Any], Any], value: Any) -> None:
    function(value)
