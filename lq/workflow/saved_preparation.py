"""How a module was prepared, as plain values that a checkpoint can hold: enough to prepare another without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lq.interface.metadata import dtype_name
from lq.numerics.spec import QuantSpec
from lq.schemes.targets import Target
from lq.workflow.prepare import M, PreparedForward, prepare

_PRIMITIVES = (bool, int, float, str, type(None))

#: What represents a tensor: its shape and its dtype.
_TENSOR = "tensor"


def describe_preparation(forward: PreparedForward) -> dict[str, Any]:
    """What :func:`prepare_like` needs, as dicts, lists and primitives: no data, only their shapes.

    Args:
        forward: of a prepared module, see :func:`~lq.workflow.prepare.prepared_forward`.

    Raises:
        TypeError: where the module was prepared with an argument that plain values cannot represent.
    """
    target = asdict(forward.target)
    for name in ("activation", "weight"):
        target[name] = {**target[name], "dtype": dtype_name(target[name]["dtype"])}
    return {
        "target": target,
        "mode": forward.mode,
        "observer": forward.observer,
        "overrides": forward.overrides.as_dict(),
        "inputs": {name: _plain(value, name) for name, value in forward.inputs.items()},
        "settings": {name: _plain(value, name) for name, value in forward.settings.items()},
    }


def target_of(description: Mapping[str, Any]) -> Target:
    """The target that a module of this ``description`` was prepared for."""
    values = dict(description["target"])
    for name in ("activation", "weight"):
        values[name] = QuantSpec(**{**values[name], "dtype": getattr(torch, values[name]["dtype"])})
    return Target(**values)


def prepare_like(model: M, description: Mapping[str, Any]) -> M:
    """Prepare ``model`` as ``description`` says; the example inputs are noise of the same shapes.

    Args:
        model: a float module.
        description: from :func:`describe_preparation`.

    Raises:
        Whatever :func:`lq.prepare` does.
    """
    generator = torch.Generator().manual_seed(0)
    arguments = {**description["inputs"], **description["settings"]}
    return prepare(
        model,
        {name: _example(value, generator) for name, value in arguments.items()},
        target=target_of(description),
        mode=description["mode"],
        observer=description["observer"],
        overrides=description["overrides"],
    )


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}}
    if isinstance(value, _PRIMITIVES):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(item, name) for item in value)
    if type(value) is dict and all(isinstance(key, str) for key in value) and _TENSOR not in value:
        return {key: _plain(item, name) for key, item in value.items()}
    raise TypeError(f"argument {name!r} of the forward has a {type(value).__name__}, which is not a plain value")


def _example(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        shape, dtype = value[_TENSOR]["shape"], getattr(torch, value[_TENSOR]["dtype"])
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        # 0 is an index of every table, and a mask that lets everything through avoids a division by zero.
        return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_example(item, generator) for item in value)
    if isinstance(value, dict):
        return {key: _example(item, generator) for key, item in value.items()}
    return value
