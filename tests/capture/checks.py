"""What every module must be to lq: the same in float before and after preparation, and near itself in INT8.

The reference is always a deep copy of the user's module, made before ``lq.prepare`` and run eagerly.
"""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

import lq
from lq.runtime.cpu import has_onednn_int8

# 7-bit weights: exact on every x86 CPU, with VNNI and without.
TARGET = "x86_avx2"

#: Decibels. Shallow networks of random weights have 25 to 40; a forward that lost a factor or an addend has below 15.
NEAR_FLOAT = 20.0

#: Decibels between two computations on the same grids: only values between two steps round the other way.
SAME_GRIDS = 25.0


@dataclass
class Call:
    """Arguments of a forward. Every call gets copies of them, for a forward may write to its inputs."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Any:
        args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (self.args, self.kwargs))
        return model(*args, **kwargs)

    def first_sample(self) -> Call:
        """The same call with a batch of one."""
        size = max(len(v) for v in self.tensors() if v.dim())
        args, kwargs = tree_map(
            lambda v: v[:1] if isinstance(v, Tensor) and v.dim() and len(v) == size else v, (self.args, self.kwargs)
        )
        return Call(args, kwargs)

    def with_gradients(self) -> tuple[Call, list[Tensor]]:
        """The same call with inputs whose gradients can be read afterwards, and these inputs."""
        leaves: list[Tensor] = []

        def require(value: Any) -> Any:
            if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())):
                return value
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1]

        args, kwargs = tree_map(require, (self.args, self.kwargs))
        return Call(args, kwargs), leaves

    def tensors(self) -> list[Tensor]:
        return [v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]


def seed(value: int = 0) -> None:
    """Set the random state of torch and of Python: forwards draw from both."""
    torch.manual_seed(value)
    random.seed(value)


def outputs(value: Any) -> list[Tensor]:
    return [v for v in tree_leaves(value) if isinstance(v, Tensor)]


def sqnr(actual: Any, expected: Any) -> float:
    """Signal to quantization noise, decibels; the worst of all outputs."""
    worst = math.inf
    for a, e in zip(outputs(actual), outputs(expected), strict=True):
        assert a.shape == e.shape
        noise = (a - e).abs().square().mean().item()
        worst = min(worst, 10 * math.log10(e.abs().square().mean().item() / noise) if noise else math.inf)
    return worst


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Equal but for the order of floating-point sums."""
    found, wanted = tree_leaves(actual), tree_leaves(expected)
    assert len(found) == len(wanted), what
    for index, (a, e) in enumerate(zip(found, wanted, strict=True)):
        assert type(a) is type(e), f"{what} {index}"
        if isinstance(e, Tensor):
            scale = e.detach().abs().max().item() if e.numel() and e.dtype is not torch.bool else 1.0
            torch.testing.assert_close(
                a, e, rtol=1e-5, atol=1e-5 * scale, msg=lambda text, index=index: f"{what} {index}: {text}"
            )
        else:
            assert a == e, f"{what} {index}"


def no_tracing_left(model: nn.Module) -> None:
    """No tensor or value of a capture stayed on the module, where the user's code or a checkpoint would meet it."""
    for name, module in model.named_modules():
        values = {**module.__dict__, **module._buffers, **module._parameters}
        for key, value in values.items():
            for leaf in tree_leaves(value):
                assert not isinstance(leaf, (FakeTensor, fx.Proxy, torch.SymInt)), f"{name}.{key} is a {type(leaf)}"


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if not name.startswith("lq_")}


@dataclass
class Step:
    """What one forward and backward in training mode left."""

    outputs: Any
    parameters: dict[str, Tensor | None]
    inputs: list[Tensor | None]
    buffers: dict[str, Tensor]


def training_step(model: nn.Module, call: Call, state: int = 0) -> Step:
    """One forward and backward from the random state ``state``; the loss weighs every output differently."""
    model.train()
    model.zero_grad(set_to_none=True)
    with_gradients, leaves = call.with_gradients()
    seed(state)
    result = with_gradients(model)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for value in outputs(result):
        if value.requires_grad:
            value = torch.view_as_real(value) if value.is_complex() else value
            loss = loss + (value.float() * torch.randn(value.shape, generator=generator)).sum()
    loss.backward()
    parameters = {n: p.grad for n, p in model.named_parameters() if not n.startswith("lq_")}
    detached = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, result)
    return Step(detached, parameters, [leaf.grad for leaf in leaves], float_buffers(model))


def assert_same_step(actual: Step, expected: Step) -> None:
    assert_same(actual.outputs, expected.outputs, "output in training")
    assert actual.parameters.keys() == expected.parameters.keys()
    missing = {n for n, gradient in expected.parameters.items() if gradient is None}
    assert {n for n, gradient in actual.parameters.items() if gradient is None} == missing
    for name, gradient in expected.parameters.items():
        assert_same(actual.parameters[name], gradient, f"gradient of {name}")
    assert_same(actual.inputs, expected.inputs, "gradient of input")
    assert actual.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert_same(actual.buffers[name], buffer, f"buffer {name} after training")


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


def as_tensors(value: Any) -> Any:
    """Outputs of whichever engine as tensors."""
    return tree_map(lambda v: v if isinstance(v, Tensor) else torch.as_tensor(v), value)


# Quantization-aware training


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


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
    lq.prepare(model, args, mode="qat", target=TARGET)
    no_tracing_left(model)
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
