"""One call and one training step of a module, and what it is for two of them to be the same."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map


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


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()
