"""A program: a random network as data, its Python source, and the module that the source makes."""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .helpers import HELPERS

IMPORTS = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


@dataclass(frozen=True)
class Step:
    """One value of a network: the code that makes it, and the layers that the code calls.

    Args:
        op: name of the operator in the table, for statistics.
        reads: indices of the values that it reads: those of the inputs first, then those of the steps.
        code: statements; ``{out}`` is the variable they must set, ``{0}`` and ``{1}`` those of ``reads``, ``{options}``
            the ``options`` as keyword arguments, and ``{conv}`` the layer of that role.
        layers: roles and constructors; a role that ends in ``*`` is one layer for the whole class.
        setup: statements of ``__init__`` that follow the layers.
        options: keyword arguments with a default, which a shrunk program does without.
        body: steps within this one, a function of one value. With a ``frame`` they are a submodule of a class of its
            own, which ``layers`` constructs as ``{part_class}``; without, ``{body}`` in ``code`` stands for them, and
            ``{result}`` for the last one's value.
        frame: statements of the submodule's forward, with ``{body}``, ``{result}`` and its input ``{0}``.
    """

    op: str
    reads: tuple[int, ...]
    code: str
    layers: tuple[tuple[str, str], ...] = ()
    setup: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    body: tuple[Step, ...] = ()
    frame: str = ""


@dataclass(frozen=True)
class Program:
    """A network.

    Args:
        seed: what it was generated from; also that of its weights and inputs.
        shapes: of the inputs, each with the batch as its first axis.
        steps: see :class:`Step`.
        outputs: indices of the values that the forward returns.
        form: how it returns them: ``"tensor"``, ``"tuple"``, ``"list"`` or ``"dict"``; with ``"auxiliary"`` those after
            the first one in training mode alone.
        target: what the network is quantized for.
    """

    seed: int
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "tensor"
    target: str = "x86"

    def count(self) -> int:
        """How many steps there are, those within others included."""
        return len(all_steps(self.steps))


def all_steps(steps: Sequence[Step]) -> list[Step]:
    return [inner for step in steps for inner in (step, *all_steps(step.body))]


class ClassWriter:
    """Writes the ``__init__`` and the forward of one class, step by step.

    Args:
        classes: sources of the classes of submodules, which the writers of one program share.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.names: Counter[str] = Counter()

    def step(self, step: Step, reads: Sequence[str]) -> tuple[list[str], list[str], str]:
        """Lines of ``__init__``, lines of the forward, and the variable that holds the step's value."""
        init: list[str] = []
        options = "".join(f", {name}={value!r}" for name, value in step.options)
        names = {str(index): name for index, name in enumerate(reads)} | {"options": options}
        body: list[str] = []
        if step.frame:
            names["part_class"] = self._part(step)
        elif step.body:
            init, body, names["result"] = self.body(step.body, reads[0])
        for role, constructor in step.layers:
            shared = role.endswith("*")
            role = role.removesuffix("*")
            self.names[role] += 1
            attribute = f"self.{role if shared else f'{role}{self.names[role]}'}"
            names[role] = attribute
            if not shared or self.names[role] == 1:
                made = _fill(constructor, names, [])
                init += [made] if made.startswith("self.") else [f"{attribute} = {made}"]
        init += _lines(_fill(step.setup, names, []))
        self.names["v"] += 1
        out = f"v{self.names['v']}"
        return init, _lines(_fill(step.code, names | {"out": out}, body)), out

    def body(self, steps: Sequence[Step], argument: str) -> tuple[list[str], list[str], str]:
        """The same of several steps that have one input."""
        init, forward, values = list[str](), list[str](), [argument]
        for step in steps:
            more_init, more_forward, out = self.step(step, [values[index] for index in step.reads])
            init, forward = init + more_init, forward + more_forward
            values.append(out)
        return init, forward, values[-1]

    def _part(self, step: Step) -> str:
        writer = ClassWriter(self.classes)
        init, body, result = writer.body(step.body, "x")
        forward = _lines(_fill(step.frame, {"0": "x", "result": result}, body))
        name = f"Part{len(self.classes) + 1}"
        self.classes.append(class_source(name, ["x"], init, forward))
        return name


def class_source(name: str, arguments: Sequence[str], init: Sequence[str], forward: Sequence[str]) -> str:
    lines = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in init]
    lines += ["", f"    def forward(self, {', '.join(arguments)}):", *(f"        {line}" for line in forward)]
    return "\n".join(lines) + "\n"


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _fill(template: str, names: dict[str, str], body: Sequence[str]) -> str:
    """The template with its names filled in; ``{body}`` stands on a line of its own and gives its indent to it."""
    lines = []
    for line in template.splitlines():
        if line.strip() == "{body}":
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + inner for inner in body] or [indent + "pass"]
        else:
            lines.append(re.sub(r"\{(\w+)\}", lambda match: names[match[1]], line))
    return "\n".join(lines)


def needed_helpers(text: str) -> str:
    """Sources of the helpers that ``text`` names."""
    return "\n\n".join(source for name, source in HELPERS.items() if re.search(rf"\b{name}\b", text))


def input_names(program: Program) -> list[str]:
    return ["x", "y", "z"][: len(program.shapes)]


def source(program: Program) -> str:
    """The program as a Python module with a class ``Network``."""
    classes: list[str] = []
    writer = ClassWriter(classes)
    values = input_names(program)
    init, forward = list[str](), list[str]()
    for step in program.steps:
        more_init, more_forward, out = writer.step(step, [values[index] for index in step.reads])
        init, forward = init + more_init, forward + more_forward
        values.append(out)
    results = [values[index] for index in program.outputs]
    returned = {
        "tensor": results[0],
        "auxiliary": results[0],
        "tuple": f"({', '.join(results)},)",
        "list": f"[{', '.join(results)}]",
        "dict": "{" + ", ".join(f"'out{index}': {name}" for index, name in enumerate(results)) + "}",
    }[program.form]
    if program.form == "auxiliary":
        forward += ["if self.training:", f"    return {', '.join(results)}"]
    forward.append(f"return {returned}")
    classes.append(class_source("Network", input_names(program), init, forward))
    text = "\n\n".join(classes)
    helpers = needed_helpers(text)
    return "\n\n".join(part for part in (IMPORTS, helpers, text) if part)


def execute(text: str, name: str) -> dict[str, Any]:
    """What the source defines; a traceback through it shows its lines."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(text, filename, "exec"), namespace)
    return namespace


def build(program: Program, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network in evaluation mode, with the same weights each time.

    Args:
        program: the network.
        dtype: of its parameters; float64 ones are the same numbers as float32 ones.
    """
    make: Callable[[], nn.Module] = execute(source(program), f"fuzz program {program.seed}")["Network"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        model = make()
        initialise(model, torch.Generator().manual_seed(program.seed))
        _take_statistics(model, random_inputs(program, seed=1, batch=4))
    return model.eval().to(dtype)


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the values about as large as they are, and batch norms as after training."""
    for name, parameter in module.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
        elif "bias" in kind or kind == "beta":
            parameter.copy_(noise * 0.2)
        else:  # of a norm; some are negative
            parameter.copy_((1 + noise * 0.3) * torch.sign(torch.rand(parameter.shape, generator=generator) - 0.1))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


@torch.no_grad()
def _take_statistics(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Statistics of a random batch: of the modules exactly, of the functions as far as their momentum goes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    model.train()
    model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def random_inputs(program: Program, seed: int, batch: int | None = None, grow: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the program's shapes.

    Args:
        program: the network.
        seed: other seeds give other inputs.
        batch: samples; by default as many as the shapes say.
        grow: added to the sizes of the axes after the channels.
    """
    generator = torch.Generator().manual_seed(program.seed * 1000 + seed)
    inputs = []
    for shape in program.shapes:
        sizes = [batch or shape[0], *shape[1:2], *(size + grow for size in shape[2:])]
        inputs.append(torch.randn(sizes, generator=generator))
    return tuple(inputs)
