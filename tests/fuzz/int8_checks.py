"""Calibration, conversion and kernels: the INT8 network against the simulation that the prepared module is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lq

from .compare import same_form
from .float_checks import prepared
from .outcome import Failure, Refusal, answers, has_vnni
from .program import Program, random_inputs
from .rounding import Guide, amplification, distance, float_amplification, grids, outputs_of, recorded, share_turned

T = TypeVar("T")

Noise = Callable[[], list[tuple[float, float]]]

#: Root mean square and largest difference of the outputs, as multiples of what the network makes of roundings.
RMS_FACTOR, LARGEST_FACTOR = 2.0, 3.0

#: Share of an output's largest value by which a layer's float arithmetic may be off: a bias is rounded to the grid of
#: the sums it is added to.
ARITHMETIC = 1e-3

#: Share of a layer's integers that may have been rounded to a neighbour, where it read the same integers.
ROUNDED_OTHERWISE = 0.01

#: Samples of the inputs that networks are compared on.
BATCH = 6


@dataclass
class Quantized:
    """A program's network, calibrated, and what it computes.

    Args:
        model: prepared and calibrated: it simulates INT8.
        int8: converted.
        inputs: compared on.
        simulated: outputs of the INT8 network's simulation, once that was checked.
        integers: of the simulation.
    """

    model: nn.Module
    int8: Any
    inputs: tuple[Tensor, ...]
    simulated: list[Tensor]
    integers: list[Tensor]

    def noise(self, inputs: tuple[Tensor, ...]) -> Noise:
        """What the network makes of roundings on these inputs, asked for only where outputs differ."""
        return lambda: amplification(self.model, inputs)


def quantized(program: Program) -> Quantized:
    model = prepared(program)
    batches = [random_inputs(program, seed=10 + index, batch=8) for index in range(3)]
    with answers("int8"):
        lq.calibrate(model, batches)
    inputs = random_inputs(program, seed=20, batch=BATCH)
    with answers("int8"):
        int8 = lq.convert(model)
        int8.execution = "simulation"
        return Quantized(model, int8, inputs, [], [])


def check_int8(program: Program) -> Quantized:
    """The INT8 network's simulation against the prepared module's, and its kernels against its simulation."""
    found = quantized(program)
    model, int8, inputs = found.model, found.int8, found.inputs
    sample = tuple(x[:1] for x in inputs)
    with answers("int8"), recorded(model) as integers:
        expected = outputs_of(model, inputs)
    with answers("int8"):
        with Guide([]) as watch:
            found.simulated = outputs_of(int8, inputs)
        found.integers = watch.found
        if foreign := watch.grids - grids(model):
            raise Failure("int8", "the simulation rounds to a grid that no quantizer has", f"{foreign}")
        _same_form("the simulation", int8, model, inputs)
    judge("int8", "the simulation", found.simulated, expected, found.noise(inputs))
    guided("the simulation", int8, inputs, integers, expected)
    with answers("int8"):
        single, alone = (outputs_of(network, sample) for network in (int8, model))
    judge("int8", "the simulation, one sample", single, alone, found.noise(sample))
    other_size = random_inputs(program, seed=21, grow=2)
    resized = _at_another_size(found, other_size)
    if not has_vnni() and program.target != "x86_avx2":
        return found  # kernels that overflow compute something else, which lq says
    try:
        int8.execution = "kernels"
    except ValueError:  # none on this machine
        return found
    with answers("int8"):
        computed = outputs_of(int8, inputs)
        _same_form("kernels", int8, model, inputs)
    judge("int8", "kernels", computed, found.simulated, found.noise(inputs))
    guided("kernels", int8, inputs, found.integers, found.simulated)
    with answers("int8"):
        of_one = outputs_of(int8, sample)
    judge("int8", "kernels, one sample", of_one, single, found.noise(sample))
    if resized is not None:
        with answers("int8"):
            computed = outputs_of(int8, other_size)
        judge("int8", "kernels, another size", computed, resized, found.noise(other_size))
    int8.execution = "simulation"
    return found


def _same_form(what: str, int8: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():  # on copies, which a network may write to
        found, expected = (network(*(x.clone() for x in inputs)) for network in (int8, model))
    same_form("int8", what, found, expected)


def _at_another_size(quantized: Quantized, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """The simulation's outputs for images of another size, checked; None where the network does not take them."""
    try:
        expected = outputs_of(quantized.model, inputs)
    except Exception:  # a network for one size, or a graph for one size
        return None
    try:
        with answers("int8"):
            found = outputs_of(quantized.int8, inputs)
    except Refusal:  # what was converted may hold for the size of the example alone, if it says so
        return None
    judge("int8", "the simulation, another size", found, expected, quantized.noise(inputs))
    return found


def judge(check: str, what: str, found: list[Tensor], expected: list[Tensor], noise: Noise) -> None:
    """Check that outputs are no further apart than roundings of the network make them.

    Args:
        check: name of the check.
        what: computed ``found``.
        found: outputs.
        expected: likewise.
        noise: measures what roundings make, for each output.
    """
    if [value.shape for value in found] != [value.shape for value in expected]:
        shapes = [[tuple(value.shape) for value in values] for values in (found, expected)]
        raise Failure(check, f"{what}: another number or shape of outputs", f"{shapes[0]} instead of {shapes[1]}")
    pairs = [(distance(value, wanted), _arithmetic(wanted)) for value, wanted in zip(found, expected, strict=True)]
    if all(most <= size for (_, most), size in pairs):
        return
    for index, (((rms, most), size), (usual_rms, usual)) in enumerate(zip(pairs, noise(), strict=True)):
        if not (rms <= RMS_FACTOR * usual_rms + size and most <= LARGEST_FACTOR * usual + size):
            raise Failure(
                check,
                f"{what}: outputs differ by more than roundings make",
                f"output {index}: RMS {rms:.3g} (roundings {usual_rms:.3g}), largest {most:.3g} (roundings "
                f"{usual:.3g}), largest value {expected[index].abs().max():.3g}",
            )


def _arithmetic(value: Tensor) -> float:
    return ARITHMETIC * float(value.abs().max().clamp(min=1e-6))


def guided(what: str, int8: Any, inputs: tuple[Tensor, ...], integers: list[Tensor], expected: list[Tensor]) -> None:
    """Check an INT8 network layer by layer, each on the integers that are expected there."""
    with answers("int8"), Guide(integers) as guide:
        found = outputs_of(int8, inputs)
    share, others, steps = guide.worst
    if others > 2 and (share > ROUNDED_OTHERWISE or steps > 1):
        # Values that lie in the middle between two integers, and means over many pixels, turn over more easily.
        turned, apart = _simulating(int8, lambda: share_turned(int8, inputs, integers))
        if share > 2 * turned or steps > max(apart, 1):
            details = f"{others} integers ({share:.1%}) of a tensor differ, by {steps} steps at most"
            raise Failure("int8", f"{what}: a layer's integers differ by more than rounding", details)
    if guide.lost:
        details = f"{guide.lost} tensors of integers are near to none of those expected"
        raise Failure("int8", f"{what}: a layer computes something else", details)
    if not guide.replaced:
        return
    # Float operators after the last integers may amplify, too: a layer norm of values that are nearly the same.
    judge(
        "int8",
        f"{what}, layer by layer",
        found,
        expected,
        lambda: _simulating(int8, lambda: float_amplification(int8, inputs, integers)),
    )


def _simulating(int8: Any, run: Callable[[], T]) -> T:
    execution, int8.execution = int8.execution, "simulation"
    try:
        return run()
    finally:
        int8.execution = execution
