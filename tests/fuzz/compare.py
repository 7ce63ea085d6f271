"""Two runs of what should be the same network, tensor by tensor, against what float rounding alone would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from .outcome import Failure

#: Share of a tensor's largest value by which two orders of summation may differ.
ROUNDING = 1e-5

#: A network amplifies rounding; so many times the difference between its run in float32 and in float64 is no fault.
AMPLIFIED = 30

Values = Mapping[str, Any]


def named(prefix: str, outputs: Any) -> dict[str, Any]:
    """The leaves of nested outputs by name."""
    leaves, _ = tree_flatten_with_path(outputs)
    return {prefix + "".join(str(key) for key in path): leaf for path, leaf in leaves}


def same_form(check: str, what: str, found: Any, expected: Any) -> None:
    """Outputs of the same nesting, types and shapes."""
    found_leaves, found_spec = tree_flatten(found)
    leaves, spec = tree_flatten(expected)
    if found_spec != spec:
        raise Failure(check, f"{what}: another form of outputs", f"{found_spec} instead of {spec}")
    for one, other in zip(found_leaves, leaves, strict=True):
        if not isinstance(one, Tensor):
            raise Failure(check, f"{what}: no tensor but a {type(one).__name__}")
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            details = f"{tuple(one.shape)}, {one.dtype} instead of {tuple(other.shape)}, {other.dtype}"
            raise Failure(check, f"{what}: another shape or dtype", details)


def same(check: str, what: str, found: Values, expected: Values, exact: Callable[[], Values]) -> None:
    """Check that the values are equal but for rounding.

    Args:
        check: name of the check.
        what: is compared, for the failure.
        found: by name; None stands for what is not there.
        expected: likewise, of eager PyTorch in float32.
        exact: computes the same in float64; asked for only where a difference is to be judged.
    """
    if list(found) != list(expected):
        raise Failure(check, f"{what}: other names", f"{sorted(set(found) ^ set(expected))}")
    suspects = []
    for name, wanted in expected.items():
        value = found[name]
        if (value is None) != (wanted is None):
            missing = "None" if value is None else "not None"
            raise Failure(check, f"{what}: {missing} where eager's is not", name)
        if wanted is None:
            continue
        if not isinstance(value, Tensor):
            raise Failure(check, f"{what}: no tensor but a {type(value).__name__}", name)
        if value.shape != wanted.shape:
            raise Failure(check, f"{what}: another shape", f"{name}: {value.shape} instead of {wanted.shape}")
        if not torch.equal(value, wanted) and difference(value, wanted) > ROUNDING * scale(wanted):
            suspects.append(name)
    if not suspects:
        return
    reference = exact()
    for name in suspects:
        error = difference(found[name], expected[name])
        noise = difference(reference[name], expected[name])
        if not error <= ROUNDING * scale(expected[name]) + AMPLIFIED * noise:
            raise Failure(
                check,
                f"{what} differ",
                f"{name}: by {error:.3g}, largest value {scale(expected[name]):.3g}, rounding makes {noise:.3g}",
            )


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where one has a NaN and the other has none."""
    both = torch.isnan(one) & torch.isnan(other)
    error = torch.where(both, 0.0, (one.double() - other.double()).abs())
    return float(torch.nan_to_num(error, nan=float("inf")).max()) if error.numel() else 0.0


def scale(value: Tensor) -> float:
    """The largest absolute value, of a tensor of zeros a tiny one."""
    return max(float(torch.nan_to_num(value.double()).abs().max()), 1e-6) if value.numel() else 1e-6
