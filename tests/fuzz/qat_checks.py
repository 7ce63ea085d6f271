"""A step of quantization-aware training against the same step in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .float_checks import backward, check_untrainable, prepared
from .outcome import Failure, answers
from .program import Program, build, random_inputs

#: Least cosine of the gradient over all parameters and inputs with that of the float model. On five hundred programs
#: what rounding alone did stayed above 0.75, and what a reversed or a lost gradient did below 0.
LEAST_COSINE = 0.5

#: The same for that of one parameter, if it has so many numbers and so large a share of the whole gradient's norm: a
#: gradient that is lost at one place turns those alone that lie in front of it.
LEAST_COSINE_OF_ONE, LEAST_NUMBERS, LEAST_SHARE = 0.1, 8, 0.05

#: In longer programs rounding alone turns gradients: a ReLU here and there passes what it did not, or holds it back.
MOST_STEPS = 12

#: Samples of a step: with few, batch norms amplify rounding.
BATCH = 8


def gradients(model: nn.Module, program: Program) -> dict[str, Tensor | None]:
    """Of the parameters and the inputs, for one step in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    inputs = [x.requires_grad_() for x in random_inputs(program, seed=7, batch=BATCH)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        backward(model(*inputs), program.seed)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {f"input {index}": x.grad for index, x in enumerate(inputs)}


def check_qat(program: Program) -> None:
    """The same parameters get a gradient, it is finite, and it points where the float one does."""
    model = prepared(program, "qat")
    try:
        expected = gradients(build(program), program)
    except RuntimeError as error:  # autograd's, see check_training
        check_untrainable(program, model, error)
        return
    with answers("qat"):
        found = gradients(model, program)
    for name, wanted in expected.items():
        gradient = found[name]
        if (gradient is None) != (wanted is None):
            raise Failure("qat", f"{'no ' if gradient is None else 'a '}gradient where the float model's is not", name)
        if gradient is not None and not torch.isfinite(gradient).all():
            raise Failure("qat", "a gradient is not finite", name)
    if program.count() > MOST_STEPS:
        return
    pairs = {name: (found[name], wanted) for name, wanted in expected.items() if wanted is not None}
    both = {name: (one.flatten(), other.flatten()) for name, (one, other) in pairs.items() if one is not None}
    if not both:
        return
    one, other = (torch.cat(parts) for parts in zip(*both.values(), strict=True))
    whole = float(other.norm())
    if whole < 1e-6:
        return
    if not (cosine(one, other) > LEAST_COSINE and 1 / 3 < float(one.norm()) / whole < 3):
        details = f"cosine {cosine(one, other):.2f}, norm {one.norm():.3g} instead of {whole:.3g}"
        raise Failure("qat", "the gradient points elsewhere", details)
    for name, (one, other) in both.items():
        counts = other.numel() >= LEAST_NUMBERS and float(other.norm()) > LEAST_SHARE * whole
        if counts and not cosine(one, other) > LEAST_COSINE_OF_ONE:
            details = f"{name}: cosine {cosine(one, other):.2f}, norm {one.norm():.3g} instead of {other.norm():.3g}"
            raise Failure("qat", "the gradient of a parameter points elsewhere", details)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two gradients; 0 where one of them is zero."""
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()).clamp(min=1e-30))
