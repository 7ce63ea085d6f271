"""A failing program cut down to a small one that still fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .generate import is_valid
from .program import Program, Step

Steps = tuple[Step, ...]

#: Sizes of images that a shrunk program may have.
_SMALL = (4, 6)


def shrink(program: Program, fails: Callable[[Program], bool], seconds: float = 60) -> Program:
    """The smallest program that was found to fail as well.

    Args:
        program: fails.
        fails: whether a program does; it is asked only of programs that eager PyTorch runs.
        seconds: to look for so long.
    """
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in candidates(program):
            if time.monotonic() > end:
                return program
            if is_valid(candidate) and fails(candidate):
                program, smaller = candidate, True
                break
    return program


def candidates(program: Program) -> Iterator[Program]:
    """Programs that are simpler in one way, those that lose most first."""
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield replace(program, outputs=(output,))
    arguments = len(program.shapes)
    for length in range(1, len(program.steps)):  # up to some step
        yield replace(program, steps=program.steps[:length], outputs=(arguments + length - 1,))
    for steps, renamed in _simpler(program.steps, arguments):
        yield replace(program, steps=steps, outputs=tuple(renamed(index) for index in program.outputs))
    if program.form != "tensor" and len(program.outputs) == 1:
        yield replace(program, form="tensor")
    if program.target != "x86":
        yield replace(program, target="x86")
    if arguments > 1:
        yield from _fewer_inputs(program)
    for index, shape in enumerate(program.shapes):
        for axis in range(2, len(shape)):
            for size in _SMALL:
                if size < shape[axis]:
                    smaller = (*shape[:axis], size, *shape[axis + 1 :])
                    yield replace(program, shapes=(*program.shapes[:index], smaller, *program.shapes[index + 1 :]))


def _fewer_inputs(program: Program) -> Iterator[Program]:
    for gone in range(len(program.shapes)):
        read = {index for step in program.steps for index in step.reads} | set(program.outputs)
        if gone in read:
            continue

        def rename(index: int, gone: int = gone) -> int:
            return index - (index > gone)

        steps = tuple(_reading(step, rename) for step in program.steps)
        shapes = program.shapes[:gone] + program.shapes[gone + 1 :]
        yield replace(program, shapes=shapes, steps=steps, outputs=tuple(rename(index) for index in program.outputs))


def _simpler(steps: Steps, arguments: int) -> Iterator[tuple[Steps, Callable[[int], int]]]:
    """Ways to simplify a list of steps, each with what became of the values' indices."""
    for position in reversed(range(len(steps))):
        step = steps[position]
        for instead in dict.fromkeys(step.reads):
            yield _spliced(steps, position, (), arguments, instead)
    for position, step in enumerate(steps):
        if step.body:  # its steps in its place
            inlined = [_reading(inner, _inlined(step, position, arguments)) for inner in step.body]
            yield _spliced(steps, position, tuple(inlined), arguments, arguments + position + len(inlined) - 1)
            for body, _ in _simpler(step.body, 1):
                if body:
                    yield _changed(steps, position, replace(step, body=body)), lambda index: index
        for option in step.options:
            fewer = tuple(other for other in step.options if other is not option)
            yield _changed(steps, position, replace(step, options=fewer)), lambda index: index
        if step.setup:
            yield _changed(steps, position, replace(step, setup="")), lambda index: index


def _changed(steps: Steps, position: int, step: Step) -> Steps:
    return (*steps[:position], step, *steps[position + 1 :])


def _inlined(step: Step, position: int, arguments: int) -> Callable[[int], int]:
    return lambda index: step.reads[0] if index == 0 else arguments + position + index - 1


def _spliced(
    steps: Steps, position: int, between: Sequence[Step], arguments: int, result: int
) -> tuple[Steps, Callable[[int], int]]:
    """The steps with others in the place of one; what read its value reads that with the index ``result``."""
    old, shift = arguments + position, len(between) - 1

    def rename(index: int) -> int:
        if index == old:
            return result
        return index + shift if index > old else index

    return (*steps[:position], *between, *(_reading(step, rename) for step in steps[position + 1 :])), rename


def _reading(step: Step, rename: Callable[[int], int]) -> Step:
    return replace(step, reads=tuple(rename(index) for index in step.reads))
