"""Steps of lq that must leave the float network what it is: prepare, training a prepared module, unprepare."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lq

from .compare import named, same, same_form
from .outcome import Failure, answers
from .program import Program, build, random_inputs


def arguments(program: Program) -> Any:
    """Example inputs in the form in which people give them: one tensor, or several in a tuple."""
    inputs = random_inputs(program, seed=0)
    return inputs if len(inputs) > 1 else inputs[0]


def prepared(program: Program, mode: Any = "ptq") -> nn.Module:
    model = build(program)
    with answers("prepare"):
        lq.prepare(model, arguments(program), mode=mode, target=program.target)
    return model


def is_whole(model: nn.Module) -> bool:
    """Whether every convolution and linear layer of a prepared module is quantized."""
    with answers("prepare"):
        rows = lq.report(model).float_layers
    modules = dict(model.named_modules())
    for row in rows:
        if any(word in row.kind.lower() for word in ("conv", "linear", "matmul", "attention")):
            return False
        inside = modules[row.name].parameters() if row.name in modules else ()
        if any(parameter.dim() > 1 for parameter in inside):
            return False
    return True


def evaluation_inputs(program: Program) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of the example's shapes and of others."""
    return {
        "the batch": random_inputs(program, seed=0),
        "its first sample": tuple(x[:1] for x in random_inputs(program, seed=0)),
        "other values": tuple(x * 2 - 0.5 for x in random_inputs(program, seed=2)),
        "another batch size": random_inputs(program, seed=3, batch=5),
        "another image size": random_inputs(program, seed=4, grow=2),
    }


def evaluate(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, dict[str, Any]]:
    """The outputs, and by name the outputs and what became of the inputs."""
    given = [x.clone().to(next(iter(model.parameters()), x).dtype) for x in inputs]
    with torch.no_grad():
        outputs = model(*given)
    return outputs, {**named("output", outputs), **named("input", given)}


def check_evaluation(program: Program, model: nn.Module, check: str = "prepare") -> None:
    """In evaluation mode, with all quantizers off, the network computes what eager PyTorch does."""
    for what, inputs in evaluation_inputs(program).items():
        eager = build(program)
        try:
            expected, values = evaluate(eager, inputs)
        except Exception:  # the network itself is for other sizes alone; whatever lq does, it cannot be wrong
            continue
        with answers(check):
            found, found_values = evaluate(model, inputs)
        same_form(check, f"outputs for {what}", found, expected)

        def exact(inputs: tuple[Tensor, ...] = inputs) -> dict[str, Any]:
            return evaluate(build(program, torch.float64), inputs)[1]

        same(check, f"outputs for {what}", found_values, values, exact)


def train(model: nn.Module, program: Program) -> dict[str, Any]:
    """Two steps of training without an optimizer: outputs, gradients, and buffers at the end."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    values: dict[str, Any] = {}
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        for step in range(2):
            model.zero_grad(set_to_none=True)
            inputs = [x.to(dtype).requires_grad_() for x in random_inputs(program, seed=5 + step)]
            outputs = model(*inputs)
            backward(outputs, program.seed)
            values |= {
                **named(f"{step} output", [value.detach() for value in tree_leaves(outputs)]),
                **{f"{step} gradient of input {index}": x.grad for index, x in enumerate(inputs)},
                **{f"{step} gradient of {name}": p.grad for name, p in model.named_parameters()},
            }
    values |= {f"buffer {name}": buffer for name, buffer in model.named_buffers() if "lq_" not in name}
    model.eval()
    return values


def backward(outputs: Any, seed: int) -> None:
    """From a loss in which every output has a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for value in tree_leaves(outputs):
        weight = torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.requires_grad:
            losses.append((value * weight).sum())
    if losses:
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


def check_training(program: Program, model: nn.Module) -> None:
    """Training a prepared module with its quantizers off is training the float one."""
    try:
        expected = train(build(program), program)
    except RuntimeError as error:  # autograd's: it overwrites what a gradient is computed from
        check_untrainable(program, model, error)
        return
    with answers("train"):
        found = train(model, program)

    def exact() -> dict[str, Any]:
        return train(build(program, torch.float64), program)

    for what in ("output", "gradient", "buffer"):

        def part(values: dict[str, Any], what: str = what) -> dict[str, Any]:
            return {name: value for name, value in values.items() if what in name.split(" ")[:2]}

        same("train", f"{what}s in training", part(found), part(expected), lambda part=part: part(exact()))


def check_untrainable(program: Program, model: nn.Module, reason: RuntimeError) -> None:
    """What autograd refuses in the float module, it refuses in the prepared one."""
    try:
        train(model, program)
    except RuntimeError:
        model.eval()
        return
    raise Failure("train", "trains where the float module cannot", str(reason))


def check_unprepare(program: Program, model: nn.Module) -> None:
    """A float checkpoint loads into a prepared module, and the float module comes back."""
    eager = build(program)
    with answers("unprepare"):
        model.load_state_dict(eager.state_dict())
    check_evaluation(program, model, "unprepare")
    with answers("unprepare"):
        lq.unprepare(model)
    if list(model.state_dict()) != list(eager.state_dict()):
        raise Failure("unprepare", "other keys in the state dict", f"{list(model.state_dict())}")
    for name, module in model.named_modules():
        if "forward" in module.__dict__:
            raise Failure("unprepare", "a replaced forward is left", name)
    with answers("unprepare"):
        torch.save(model.state_dict(), io.BytesIO())
    check_evaluation(program, model, "unprepare")
