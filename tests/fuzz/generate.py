"""A program from a seed: steps are tried on real tensors as they are added, so that all shapes and values are right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .operators import OPERATORS
from .program import (
    IMPORTS,
    ClassWriter,
    Program,
    Step,
    all_steps,
    build,
    execute,
    initialise,
    input_names,
    needed_helpers,
    random_inputs,
)
from .scope import Scope, Shape

#: Values of this size and more are a network that no one would train.
LARGEST = 1e3

#: A tensor of more elements makes the tests slow and finds nothing more.
MOST_ELEMENTS = 20_000

SHAPES: tuple[tuple[Shape, float], ...] = (
    ((3, 8, 8), 4),
    ((3, 12, 12), 3),
    ((4, 7, 9), 2),
    ((8, 6, 6), 2),
    ((1, 16, 16), 1),
    ((4, 10), 0.7),
    ((8, 4, 5, 5), 0.5),
    ((12,), 0.3),
)

#: What a network begins with as a rule.
FIRST = ("conv2d", "conv2d", "conv2d", "custom_conv2d", "functional_conv2d", "conv1d", "conv3d", "linear")

TARGETS = {"x86": 6, "x86_avx2": 2, "onnxruntime": 2, "xnnpack": 1, "tensorrt": 1}


class Trial:
    """A class that grows: each step is run on the values so far, and taken back where it fails.

    Args:
        inputs: values of the arguments.
        names: of the arguments.
    """

    def __init__(self, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
        self.inputs = list(inputs)
        self.names = list(names)
        self.steps: list[Step] = []
        self._restart()

    def _restart(self) -> None:
        self.module = nn.Module().eval()
        self.writer = ClassWriter([])
        self.leaf = torch.zeros((), requires_grad=True)
        self.variables: dict[str, Any] = {"self": self.module}
        self.values = list(self.names)
        for name, value in zip(self.names, self.inputs, strict=True):
            self.variables[name] = value + self.leaf
        self.namespace = execute(IMPORTS, "fuzz trial")

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(self.variables[name].shape) for name in self.values]

    def add(self, step: Step) -> bool:
        """Run the step and keep it, unless it fails."""
        try:
            value = self._run(step)
            self.values.append(value)
            fine = self._is_fine(step)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            fine = False
        if not fine:
            self._restart()
            for kept in self.steps:  # what it wrote in place is undone
                self.values.append(self._run(kept))
            return False
        self.steps.append(step)
        return True

    def _run(self, step: Step) -> str:
        known = len(self.writer.classes)
        init, forward, out = self.writer.step(step, [self.values[index] for index in step.reads])
        text = "\n\n".join([*self.writer.classes[known:], "\n".join([*init, *forward])])
        exec(needed_helpers(text), self.namespace)
        for source in self.writer.classes[known:]:
            exec(source, self.namespace)
        before = set(self.module.modules())
        exec("\n".join(init), self.namespace, self.variables)
        for module in set(self.module.modules()) - before:
            initialise(module, torch.Generator().manual_seed(0))
        self.module.eval()
        exec("\n".join(forward), self.namespace, self.variables)
        return out

    def _is_fine(self, step: Step) -> bool:
        values = [self.variables[name] for name in self.values]
        newest = values[-1]
        if newest.numel() == 0 or newest.numel() > MOST_ELEMENTS or newest.dim() < 2:
            return False
        if newest.shape[0] != self.inputs[0].shape[0]:
            return False
        if not all(is_sane(value) for value in values):
            return False
        if "_(" in step.code or "= " in step.code.replace("{out} = ", ""):  # perhaps over what a gradient needs
            total = torch.stack([value.sum() for value in values]).sum()
            torch.autograd.grad(total, self.leaf, retain_graph=True, allow_unused=True)
        return True


def is_sane(value: Tensor) -> bool:
    largest = float(value.detach().abs().max())
    return 1e-6 < largest < LARGEST  # false for a NaN, too


def _grow(rng: Random, trial: Trial, count: int, depth: int) -> None:
    """Add ``count`` steps, or somewhat fewer where little fits."""
    names = list(OPERATORS)
    weights = [operator.weight for operator in OPERATORS.values()]

    def body(shape: Shape, most: int, keep: bool, depth: int) -> tuple[Step, ...] | None:
        if depth > 2:
            return None
        inner = Trial([torch.randn(shape)], ["x"])
        _grow(rng, inner, most, depth)
        shapes = inner.shapes
        if keep:
            # What comes after the last value of the input's shape goes.
            fitting = [index for index, other in enumerate(shapes) if other == shape]
            return tuple(inner.steps[: fitting[-1]]) or None
        return tuple(inner.steps) or None

    for _ in range(count * 3):
        if len(trial.steps) >= count:
            return
        # A network without layers is not to be quantized: it begins with one as a rule.
        first = not trial.steps and depth == 0 and rng.random() < 0.9
        operator = OPERATORS[rng.choice(FIRST) if first else rng.choices(names, weights)[0]]
        step = operator.propose(Scope(rng, trial.shapes, body, depth))
        if step is not None:
            trial.add(step)


def _attempt(rng: Random, seed: int, longest: int) -> Program:
    shapes = [rng.choices([shape for shape, _ in SHAPES], [weight for _, weight in SHAPES])[0]]
    while rng.random() < 0.15 and len(shapes) < 3:
        shapes.append(rng.choice([shapes[0], rng.choice(SHAPES)[0]]))
    batch = rng.choice((2, 2, 3, 4))
    program = Program(seed, tuple((batch, *shape) for shape in shapes), (), (0,))
    count = min(int(rng.paretovariate(1.0)) + rng.randint(0, 4), longest)
    trial = Trial(random_inputs(program, seed=0), input_names(program))
    _grow(rng, trial, count, 0)
    if not trial.steps:
        return program
    newest = len(trial.values) - 1
    outputs = [newest]
    form = "tensor"
    if rng.random() < 0.3:
        form = rng.choice(("tuple", "list", "dict", "auxiliary"))
        read = {index for step in trial.steps for index in step.reads}
        unread = [index for index in range(len(shapes), newest) if index not in read]
        outputs += rng.sample(unread, min(len(unread), 3)) or [rng.randint(len(shapes), newest)]
    steps = tuple(trial.steps)
    if rng.random() < 0.9:
        steps, outputs = without_dead_steps(steps, outputs, len(shapes))
    target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
    return Program(seed, program.shapes, steps, tuple(outputs), form, target)


def writes_in_place(step: Step) -> bool:
    """Whether the step may change values that others read."""
    # The ReLU after a convolution writes over a value that no one else has.
    code = "" if step.op == "conv2d" else step.code + step.setup + str(step.layers)
    changes = re.search(r"_\(|[-+*]= |\] = |inplace=True|_in_place", code)
    return changes is not None or any(writes_in_place(inner) for inner in step.body)


def without_dead_steps(
    steps: tuple[Step, ...], outputs: list[int], arguments: int
) -> tuple[tuple[Step, ...], list[int]]:
    """The steps that the outputs depend on, and those that write in place."""
    needed = set(outputs)
    for position in reversed(range(len(steps))):
        if arguments + position in needed or writes_in_place(steps[position]):
            needed |= {arguments + position, *steps[position].reads}
    kept = [position for position in range(len(steps)) if arguments + position in needed]
    renamed = {index: index for index in range(arguments)}
    renamed |= {arguments + position: arguments + index for index, position in enumerate(kept)}
    live = [replace(steps[p], reads=tuple(renamed[index] for index in steps[p].reads)) for p in kept]
    return tuple(live), [renamed[index] for index in outputs]


def has_layers(steps: Sequence[Step]) -> bool:
    """Whether there is a convolution or a linear layer."""
    return any(re.search(r"Conv|Linear|conv|linear", step.code + str(step.layers)) for step in all_steps(steps))


def is_valid(program: Program) -> bool:
    """Whether eager PyTorch runs the program, in evaluation and in training mode, with values of a sane size."""
    if not program.steps:
        return False
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(program.seed)
            model = build(program)
            for batch in (None, 1):
                with torch.no_grad():
                    outputs = tree_leaves(model(*random_inputs(program, seed=0, batch=batch)))
                if not all(is_sane(value) for value in outputs):
                    return False
            # Batch norms at the inputs' own batch alone: one sample's statistics may be those of one value.
            outputs = tree_leaves(model.train()(*(x.requires_grad_() for x in random_inputs(program, seed=0))))
            if not all(is_sane(value) for value in outputs):
                return False
            with_gradient = [value.sum() for value in outputs if value.requires_grad]
            if with_gradient:
                torch.stack(with_gradient).sum().backward()
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError, KeyError):
            return False
    return True


def generate(seed: int, longest: int = 40) -> Program:
    """The program of a seed, always the same: of 1 to ``longest`` steps."""
    for attempt in range(100):
        rng = Random(f"{seed} {attempt}")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed * 100 + attempt)
            program = _attempt(rng, seed, longest)
        if (has_layers(program.steps) or rng.random() < 0.05) and is_valid(program):
            return program
    raise RuntimeError(f"no valid program came about from seed {seed}")
