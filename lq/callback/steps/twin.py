"""A copy of a LightningModule, to try things on that the one in training must not notice."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

#: What the Trainer has ``torch.compile`` make of a LightningModule's own methods, on the object.
_COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def twin_of(pl_module: Any) -> Any:
    """A copy in float32 that knows the same Trainer and reads the same data; None of a module that cannot be copied."""
    memo: dict[int, Any] = {}
    for module in pl_module.modules():
        for value in module.__dict__.values():
            # Shared: a list of a million files takes seconds to copy.
            if isinstance(value, (Dataset, DataLoader)) or hasattr(value, "prepare_data_per_node"):
                memo[id(value)] = value
    memo = {key: value for key, value in memo.items() if value is not pl_module}
    try:
        twin = copy.deepcopy(pl_module, memo)
    except Exception:  # a lock, a file, a tensor with a history: whatever a user keeps on a module
        return None
    _uncompile(twin)
    if twin.dtype != torch.float32:
        twin.float()  # conversion takes no other, and a batch is cast by the loop alone
    trainer = getattr(pl_module, "_trainer", None)
    if trainer is not None:
        twin.trainer = trainer
    return twin


def _uncompile(twin: Any) -> None:
    """Take off the compiled methods of a copy: they are those of the original."""
    if getattr(twin, "_compiler_ctx", None) is not None:
        for name in _COMPILED_METHODS:
            twin.__dict__.pop(name, None)
        twin._compiler_ctx = None
