"""A copy of a LightningModule, to try things on that the one in training must not notice."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lq.util.causes import first_line

#: What the Trainer has ``torch.compile`` make of a LightningModule's own methods, on the object.
_COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")

#: A list of so many items is data, and takes long to look through.
_LONG = 10_000


def twin_of(pl_module: Any) -> Any:
    """A copy in float32 that knows the same Trainer and reads the same data; None of a module that cannot be copied."""
    try:
        twin = copy.deepcopy(pl_module, _in_place_of_copies(pl_module))
    except Exception:  # a lock, a file, a generator: whatever a user keeps on a module
        return None
    _uncompile(twin)
    if twin.dtype != torch.float32:
        twin.float()  # conversion takes no other, and a batch is cast by the loop alone
    trainer = getattr(pl_module, "_trainer", None)
    if trainer is not None:
        twin.trainer = trainer
    return twin


def _in_place_of_copies(pl_module: Any) -> dict[int, Any]:
    """What stands in a copy for some of the objects, by their numbers."""
    memo: dict[int, Any] = {}
    for module in pl_module.modules():
        for value in module.__dict__.values():
            # Shared: a list of a million files takes seconds to copy.
            if isinstance(value, (Dataset, DataLoader)) or hasattr(value, "prepare_data_per_node"):
                memo[id(value)] = value
            # What a hook has kept of the last step has a history, which torch copies nothing with.
            is_long = isinstance(value, (list, tuple, dict)) and len(value) > _LONG
            for leaf in [] if is_long else tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    memo[id(leaf)] = leaf.detach().clone()
    return {key: value for key, value in memo.items() if value is not pl_module}


def what_cannot_be_copied(pl_module: Any) -> str:
    """The attribute for which :func:`twin_of` gives nothing, and why."""
    memo = _in_place_of_copies(pl_module)
    for path, module in pl_module.named_modules():
        own = {name: value for name, value in module.__dict__.items() if name not in ("_modules", "_trainer")}
        for name, value in own.items():
            try:
                copy.deepcopy(value, {**memo, id(pl_module): pl_module})
            except Exception as error:
                return f"{path}.{name}".lstrip(".") + f" ({first_line(error)})"
    return type(pl_module).__name__


def _uncompile(twin: Any) -> None:
    """Take off the compiled methods of a copy: they are those of the original."""
    if getattr(twin, "_compiler_ctx", None) is not None:
        for name in _COMPILED_METHODS:
            twin.__dict__.pop(name, None)
        twin._compiler_ctx = None
