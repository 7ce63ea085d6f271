"""What every module must be to lq: the same in float before and after preparation, and near itself in INT8.

The reference is always a deep copy of the user's module, made before ``lq.prepare`` and run eagerly.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lq
from helpers.quantized import TARGET, quantized
from helpers.training_steps import (
    Call,
    assert_same,
    assert_same_step,
    cosine,
    float_buffers,
    no_tracing_left,
    outputs,
    seed,
    sqnr,
    training_step,
)
from lq.util.cpu import has_onednn_int8

#: Decibels. Shallow networks of random weights have 25 to 40; a forward that lost a factor or an addend has below 15.
NEAR_FLOAT = 20.0

#: Decibels between two computations on the same grids: only values between two steps round the other way.
SAME_GRIDS = 25.0


def check_float(model: nn.Module, *args: Any, training: bool = True, **kwargs: Any) -> nn.Module:
    """Prepare ``model`` and assert that it computes, trains and keeps state as it did before.

    Args:
        model: the user's module; prepared in place.
        args: arguments of its forward.
        training: whether to compare a training step as well.
        kwargs: keyword arguments of its forward.

    Returns:
        ``model``, prepared for PTQ and in evaluation mode.
    """
    call = Call(args, kwargs)
    eager = copy.deepcopy(model).eval()
    before = float_buffers(model)
    lq.prepare(model.eval(), args, example_kwargs=kwargs, target=TARGET)
    no_tracing_left(model)
    for name, buffer in float_buffers(model).items():
        assert_same(buffer, before[name], f"buffer {name} after lq.prepare")
    with torch.no_grad():
        for what, one in (("batch", call), ("first sample", call.first_sample())):
            seed()
            expected = one(eager)
            seed()
            assert_same(one(model), expected, f"output for the {what}")
    if training:
        for state in range(3):
            assert_same_step(training_step(model, call, state), training_step(eager, call, state))
        model.zero_grad(set_to_none=True)
        no_tracing_left(model)
    return model.eval()


def check(
    model: nn.Module,
    *args: Any,
    int8: Sequence[str] | None = None,
    leaves: Sequence[str] = (),
    training: bool = True,
    **kwargs: Any,
) -> lq.Int8Module:
    """:func:`check_float`, then to INT8, which must be near float.

    Args:
        model: the user's module.
        args: arguments of its forward.
        int8: layers that must run in INT8; by default all convolutions and linear layers outside of ``leaves``.
        leaves: modules that may stay in float, each with a reason in the report.
        training: whether to compare a training step as well.
        kwargs: keyword arguments of its forward.
    """
    call = Call(args, kwargs)
    eager = copy.deepcopy(model).eval()
    layers = [n for n, m in eager.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    check_float(model, *args, training=training, **kwargs)
    if training:
        # Batch norm statistics and the like moved by then.
        eager.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("lq_")})
    expected_int8 = [n for n in layers if not _below(n, leaves)] if int8 is None else int8
    assert_report(model, expected_int8, leaves)

    lq.calibrate(model, [call], forward=lambda batch: batch(model))
    converted = lq.convert(model)
    assert_report(converted, expected_int8, leaves)
    check_int8(converted, call, eager, model)
    return converted


def check_int8(int8: lq.Int8Module, call: Call, eager: nn.Module, prepared: nn.Module | None = None) -> None:
    """The INT8 network is near the float one and the calibrated one, for a batch and its first sample."""
    for one in (call, call.first_sample()):
        with torch.no_grad():
            wanted = one(eager)
            int8.execution = "simulation"
            simulated = one(int8)
            assert sqnr(simulated, wanted) > NEAR_FLOAT
            if prepared is not None:
                assert sqnr(simulated, one(prepared)) > SAME_GRIDS
            if has_onednn_int8():
                int8.execution = "kernels"
                assert sqnr(one(int8), simulated) > SAME_GRIDS
                int8.execution = "simulation"


def _below(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def assert_report(model: nn.Module, int8: Sequence[str], leaves: Sequence[str]) -> None:
    """The report has these layers in INT8, and a line with a reason for each of the float ``leaves``."""
    report = lq.report(model)
    assert str(report)
    names = {layer.name for layer in report.int8_layers}
    assert set(int8) <= names, f"{sorted(set(int8) - names)} not in INT8:\n{report}"
    assert names, f"nothing in INT8:\n{report}"
    for leaf in leaves:
        rows = [layer for layer in report.float_layers if layer.name == leaf or _below(layer.name, [leaf])]
        assert rows, f"no line about {leaf}:\n{report}"
        assert all(layer.reason for layer in rows), f"no reason for {leaf}:\n{report}"


def is_lq_error(error: BaseException) -> bool:
    """Whether ``error`` was raised on purpose: an exception of lq, or a built-in one by a ``raise`` in lq's code."""
    if type(error).__module__.split(".")[0] == "lq":
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(Path(lq.__file__).parent) and (frame.line or "").startswith("raise")


def right_or_refused(run: Callable[[], Any], expected: Any, near: float = NEAR_FLOAT) -> bool:
    """Assert that ``run()`` gives ``expected`` or an error of lq; whether it gave it."""
    try:
        actual = run()
    except Exception as error:
        if not is_lq_error(error):
            raise AssertionError(f"neither right nor refused by lq, but {type(error).__name__}: {error}") from error
        return False
    found, wanted = outputs(actual), outputs(expected)
    assert [v.shape for v in found] == [v.shape for v in wanted]
    assert sqnr(found, wanted) > near
    return True


def through_file(model: nn.Module, path: Path, runtime: str = "auto") -> Any:
    """``model`` exported to ``path`` and read again."""
    lq.export(model, path)
    return lq.load(path, runtime)


def check_program(model: nn.Module, x: Tensor, path: Path) -> None:
    """A program that is written to ``path`` and read again is the INT8 network of ``model``, whatever the batch."""
    int8 = quantized(model, x)
    loaded = through_file(int8, path)
    assert sqnr(loaded(x), int8(x)) > 40
    assert sqnr(loaded(x[:3]), int8(x[:3])) > 40
    loaded.execution = "simulation"
    assert sqnr(loaded(x), model(x)) > SAME_GRIDS
    assert loaded.report.int8_layers == int8.report.int8_layers


def as_tensors(value: Any) -> Any:
    """Outputs of whichever engine as tensors."""
    return tree_map(lambda v: v if isinstance(v, Tensor) else torch.as_tensor(v), value)


def check_qat(
    model: nn.Module, *args: Any, steps: int = 3, between: Callable[[nn.Module, int], None] | None = None
) -> nn.Module:
    """Prepare ``model`` for QAT and assert that its gradients are the eager ones but for rounding.

    Args:
        model: the user's module; prepared in place.
        args: arguments of its forward.
        steps: how many random states to try.
        between: what a callback does to the module before a step, as ``between(model, step)``.

    Returns:
        ``model``, trained on nothing yet.
    """
    call = Call(args)
    eager = copy.deepcopy(model)
    lq.prepare(model, args, mode="qat", target=TARGET, observer="minmax")
    no_tracing_left(model)
    for state in range(steps):  # the ranges of all ways that the forward takes: clipping is no gradient of eager's
        if between is not None:
            between(model, state)
        training_step(model, call, state)
        if between is not None:
            between(eager, state)
        training_step(eager, call, state)
    for state in range(steps):
        if between is not None:
            between(model, state)
            between(eager, state)
        actual, expected = training_step(model, call, state), training_step(eager, call, state)
        assert sqnr(actual.outputs, expected.outputs) > 15
        largest = max(g.norm().item() for g in expected.parameters.values() if g is not None)
        pairs = [(n, actual.parameters[n], g) for n, g in expected.parameters.items()]
        pairs += [(f"input {i}", *g) for i, g in enumerate(zip(actual.inputs, expected.inputs, strict=True))]
        for name, found, wanted in pairs:
            assert (found is None) == (wanted is None), f"gradient of {name}: None here or in eager, not both"
            # A gradient that is all but zero (of a bias in front of batch norm) has no direction.
            if wanted is not None and wanted.norm() > 1e-3 * largest:
                assert found is not None and cosine(found, wanted) > 0.9, f"gradient of {name}, state {state}"
    no_tracing_left(model)
    return model
