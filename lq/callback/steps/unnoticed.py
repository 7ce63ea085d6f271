"""Reading data before training does, so that training reads what it would have read."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lq.util.containers import refill_dict, refill_list, refill_set

#: Lists that are longer are put back, but what is in them is not looked at: they are files and labels, not transforms.
_LONG = 256

#: How many objects are looked at at most.
_MOST = 10_000

#: Orders of samples have no more numbers: token data have, and are not shuffled in place.
_LARGEST_ORDER = 2**23

#: Attributes of a Trainer and of a datamodule, which knows its Trainer: all of it is reachable from there.
_LIGHTNING = ("fit_loop", "prepare_data_per_node")

#: What objects of these packages hold belongs to open files, threads and processes: they are left as they are.
_FOREIGN = frozenset(sys.stdlib_module_names) - {"__main__", "argparse", "types"} | {"PIL"}

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, nn.Module)

#: What an attribute may be put back to by itself: anything else may have been closed or used up by then.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), tuple, list, dict, set, frozenset, deque)


@contextmanager
def unnoticed(loader: Any) -> Iterator[None]:
    """Inside, batches may be taken of a dataloader; afterwards it gives those that it would have given.

    What reading changes is put back: the global generators, those that the data set, the samplers, the transforms and
    the collating function hold, their counters, lists, dicts and orders that are shuffled in place, and the worker
    processes that a DataLoader with ``persistent_workers`` keeps. Not put back are files, threads, connections and
    iterators that are read on.

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
    """What puts everything back that is reachable from ``root``, as it is now; what is nearest comes first."""
    waiting, seen = deque([root]), {id(root): root}
    while waiting and len(seen) < _MOST:
        restorer: Callable[[], None] | None = None
        inner: list[Any] = []
        # Looking at an object may run its own code.
        with suppress(Exception):
            restorer, inner = _state_of(waiting.popleft())
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
        return lambda: _call(value.set_state, state), []
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
    if isinstance(value, (list, deque)):
        items = list(value)
        return lambda: refill_list(value, items), items if len(items) <= _LONG else []
    if isinstance(value, dict):
        entries = dict(value)
        return lambda: refill_dict(value, entries), list(entries.values()) if len(entries) <= _LONG else []
    if isinstance(value, set):
        members = set(value)
        return lambda: refill_set(value, members), list(members) if len(members) <= _LONG else []
    return _state_of_an_object(value)


def _state_of_an_object(value: Any) -> tuple[Callable[[], None] | None, list[Any]]:
    if isinstance(value, (tuple, frozenset)):
        return None, list(value) if len(value) <= _LONG else []
    if isinstance(value, MethodType):
        return None, [value.__self__]
    if isinstance(value, FunctionType):
        return None, list(value.__closure__ or ())
    if isinstance(value, CellType):
        return None, [value.cell_contents]
    if isinstance(value, partial):
        return None, [value.func, *value.args, *value.keywords.values()]
    attributes = _attributes(value)
    if attributes is None or any(name in attributes for name in _LIGHTNING):
        return None, []
    before = dict(attributes)
    return lambda: _put_attributes_back(attributes, before), list(before.values())


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that is Python's, without asking it for them: it may make some up."""
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return None
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


def _order(value: Tensor | np.ndarray[Any, Any]) -> Callable[[], None] | None:
    """Puts an order of samples back, which may be shuffled in place; images are not."""
    is_order = value.ndim in (1, 2) and str(value.dtype).removeprefix("torch.") in ("int64", "int32")
    if not is_order or (value.numel() if isinstance(value, Tensor) else value.size) > _LARGEST_ORDER:
        return None
    if isinstance(value, Tensor):
        kept = value.clone()
        # Written to only where it changed: it may lie in a file that cannot be written to.
        return lambda: None if torch.equal(value, kept) else _call(value.copy_, kept)
    if not value.flags.writeable or isinstance(value, np.memmap):
        return None
    numbers = value.copy()
    return lambda: None if np.array_equal(value, numbers) else value.__setitem__(slice(None), numbers)


def _put_attributes_back(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    workers = attributes.get("_iterator")
    if workers is not None and workers is not before.get("_iterator") and hasattr(workers, "_shutdown_workers"):
        workers._shutdown_workers()
    # In the dict itself: a DataLoader refuses to have its attributes set.
    for name in [*attributes]:
        if name not in before:
            del attributes[name]
    for name, value in before.items():
        is_state = isinstance(value, (*_PLAIN, Tensor, np.ndarray, torch.Generator))
        if name not in attributes or (attributes[name] is not value and is_state):
            attributes[name] = value


def _call(function: Callable[[Any], Any], value: Any) -> None:
    function(value)
