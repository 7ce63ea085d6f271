"""A step of quantization-aware training against the same step in float."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .float_checks import backward, prepared
from .outcome import Failure, answers
from .program import Program, all_steps, build, random_inputs

#: Least cosine of the gradient over all parameters with that of the float model.
LEAST_COSINE = 0.5

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
    expected = gradients(build(program), program)
    with answers("qat"):
        found = gradients(model, program)
    for name, wanted in expected.items():
        gradient = found[name]
        if (gradient is None) != (wanted is None):
            raise Failure("qat", f"{'no ' if gradient is None else 'a '}gradient where the float model's is not", name)
        if gradient is not None and not torch.isfinite(gradient).all():
            raise Failure("qat", "a gradient is not finite", name)
    if program.count() > MOST_STEPS or any("round(" in step.code for step in all_steps(program.steps)):
        return  # rounding of the program's own makes steps of what quantization makes of its input
    pairs = [(found[name], wanted) for name, wanted in expected.items() if wanted is not None]
    both = [(one.flatten(), other.flatten()) for one, other in pairs if one is not None]
    if not both:
        return
    one, other = (torch.cat(parts).double() for parts in zip(*both, strict=True))
    norms = float(one.norm()), float(other.norm())
    cosine = float(one @ other) / max(norms[0] * norms[1], 1e-30)
    if norms[1] > 1e-6 and not (cosine > LEAST_COSINE and 1 / 3 < norms[0] / norms[1] < 3):
        details = f"cosine {cosine:.2f}, norm {norms[0]:.3g} instead of {norms[1]:.3g}"
        raise Failure("qat", "the gradient points elsewhere", details)
    assert math.isfinite(cosine)
