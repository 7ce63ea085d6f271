"""Running a module without side effects."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lq.util.containers import refill


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """On exit, the buffers, modes and attributes of ``module`` and all random number generators are restored.

    A forward may count its calls, keep a feature for later, or replace a buffer; after an export, what it kept
    would be a fake tensor.
    """
    # No dict with modules as keys: a metric's hash depends on its state, which the forward changes.
    parts = [
        (
            part,
            {name: _shallow(value) for name, value in part.__dict__.items()},
            [(name, b, None if b is None else b.clone()) for name, b in part._buffers.items()],
        )
        for part in module.modules()
    ]
    # Those of TorchScript keep their attributes elsewhere.
    scripted = [(part, part.training) for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        # Compiled parts run uncompiled: compiling them for this takes seconds, and compiled code cannot be followed.
        with torch.random.fork_rng(list(devices)), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for part, attributes, buffers in parts:
            _restore_attributes(part, attributes)
            _restore_buffers(part, buffers)
        for part, training in scripted:
            part.training = training


#: Attributes of ``nn.Module`` itself.
_OWN = ("_parameters", "_buffers", "_modules")


def _shallow(value: Any) -> Any:
    """A value that may be changed in place, with its present content; any other value itself."""
    return (value, type(value)(value)) if type(value) in (list, dict, set, deque) else (value, None)


def _restore_attributes(part: nn.Module, before: dict[str, Any]) -> None:
    for name in [name for name in part.__dict__ if name not in before]:
        del part.__dict__[name]
    for name, (value, held) in before.items():
        part.__dict__[name] = value
        if held is None or name in _OWN:
            continue
        refill(value, held)


@torch.no_grad()
def _restore_buffers(part: nn.Module, before: list[tuple[str, Tensor | None, Tensor | None]]) -> None:
    for name, buffer, value in before:
        part._buffers[name] = buffer
        if buffer is not None and value is not None and not torch.equal(buffer, value):
            buffer.copy_(value)
