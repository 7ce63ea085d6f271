"""Running a step of the user's until it has called what is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.callback.steps.attributes import same_attributes
from lq.callback.steps.calls import Step, watched
from lq.callback.steps.idle import run_idle
from lq.callback.steps.seen import at_stage
from lq.callback.steps.stages import StagedUnit
from lq.graph.capture.agreement import difference
from lq.util.modes import evaluating


class _AllCalledError(BaseException):
    """Leaves a step as soon as it has called all; not an Exception, so that no step swallows it."""


class _Calls:
    """Keeps arguments and outputs of the calls in a step, until there are so many.

    Args:
        stop_before: the number of the call that is not run; 0 for none.
        stop_after: the number of calls after which the step is left.
    """

    def __init__(self, *, stop_before: int = 0, stop_after: int = 0) -> None:
        self.arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: list[Any] = []
        self._begun = self._depth = 0
        self._stop_before = stop_before
        self._stop_after = stop_after

    def begin_again(self) -> None:
        """Forget what was seen: the step is run once more."""
        self.arguments.clear()
        self.outputs.clear()
        self._begun = self._depth = 0

    def begin(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begun += 1
        self._depth += 1
        self.arguments.setdefault(path, (args, kwargs))
        if self._begun == self._stop_before:
            raise _AllCalledError

    def end(self, path: str, output: Any) -> None:
        self._depth -= 1
        self.outputs.append(output)
        if self._begun >= self._stop_after and not self._depth:
            raise _AllCalledError


class _CallsThatMayWrite(_Calls):
    """Keeps the arguments as they were before a part wrote into them, and sees which part reads them after that."""

    def begin_again(self) -> None:
        super().begin_again()
        self._unwritten: dict[int, tuple[Tensor, Tensor, int]] = {}  # by where the values are; with their version
        self._suspects: dict[str, tuple[Any, Any]] = {}

    def begin(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in self.arguments:
            before = tree_map(self._before, (args, kwargs))
            now = tree_map(_clone, (args, kwargs))
            if any(a is not b for a, b in zip(tree_leaves(before), tree_leaves((args, kwargs)), strict=True)):
                self._suspects[path] = (now, before)
            args, kwargs = now
        super().begin(path, args, kwargs)

    def _before(self, value: Any) -> Any:
        """What a tensor held when a part was given it first."""
        if not isinstance(value, Tensor) or value.is_inference():
            return value
        original, copy, version = self._unwritten.setdefault(
            value.untyped_storage().data_ptr(), (value, value.detach().clone(), value._version)
        )
        return value if value._version == version or original.shape != value.shape else copy

    def check(self, pl_module: nn.Module) -> None:
        """Refuse a part whose results depend on what another part wrote: in INT8 no part writes into its arguments."""
        for path, (now, before) in self._suspects.items():
            part = pl_module.get_submodule(path)
            with evaluating(part), torch.no_grad():
                one, other = (part(*tree_map(_clone, args), **tree_map(_clone, kw)) for args, kw in (now, before))
            if difference(one, other) is not None:
                raise ValueError(
                    f"{path!r} is given a tensor that another part of the network has written into, which no part does "
                    f"in INT8: give the part before it inplace=False activations, or a copy of the tensor"
                )


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def call_step(pl_module: Any, step: Step, batch: Any) -> Any:
    """Call a step as a loop does for its first batch, with those of its arguments that it has."""
    function = getattr(pl_module, step)
    names = list(inspect.signature(function).parameters)
    further: list[Any] = [] if len(names) < 2 else [0]
    with at_stage(pl_module, step):
        return function(batch, *further, **({"dataloader_idx": 0} if "dataloader_idx" in names else {}))


def unit_arguments(
    staged: StagedUnit, batch: Any, step: Step = "training_step"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` that the user's own step calls the unit with, the first time.

    Whatever the step does before (unpacking a dict, normalising, calling another method) is done as in training, so a
    batch of any form reaches the unit as it does there. A unit that is called once does not run.

    Args:
        staged: the unit.
        batch: a batch of the dataloader, on the module's device.
        step: which step the batch is for.

    Raises:
        ValueError: where the step never calls the unit, or a part of it computes from what another one wrote into its
            own arguments.
    """
    if staged.parts:
        parts = _CallsThatMayWrite(stop_after=_number(staged, step))
        _run(staged, batch, step, parts)
        parts.check(staged.pl_module)
        return (), {"parts": {path: [list(args), kwargs] for path, (args, kwargs) in parts.arguments.items()}}
    calls = _Calls(stop_before=1)
    _run(staged, batch, step, calls)
    return calls.arguments[staged.path]


def run_unit(staged: StagedUnit, batch: Any, step: Step = "training_step") -> Any:
    """Run a step up to the end of its last call of the unit, and return what that returned: a list, where it is called
    several times.

    Nothing after that runs: no loss, no logging. See :func:`unit_arguments`.
    """
    calls = _Calls(stop_after=_number(staged, step))
    _run(staged, batch, step, calls)
    return calls.outputs[0] if len(calls.outputs) == 1 else calls.outputs


def call_unit(staged: StagedUnit, batch: Any, step: Step = "training_step") -> Any:
    """Call the unit with what a step calls it with the first time, hooks and all, and return what it returns."""
    args, kwargs = unit_arguments(staged, batch, step)
    return staged.unit(*args, **kwargs)


def _number(staged: StagedUnit, step: Step) -> int:
    """How many calls to wait for."""
    return max(1, staged.calls.get(step, 1))


def _run(staged: StagedUnit, batch: Any, step: Step, calls: _Calls) -> None:
    pl_module = staged.pl_module
    modules: Mapping[str, nn.Module] = {path: pl_module.get_submodule(path) for path in staged.parts or (staged.path,)}
    name = type(staged.unit).__name__

    def run() -> None:
        calls.begin_again()
        call_step(pl_module, step, batch)

    try:
        with watched(modules, calls), same_attributes(pl_module):  # this is no step of the training
            run_idle(pl_module, run)
    except _AllCalledError:
        return
    except Exception as error:
        add_note(error, name, step)
        raise
    missing = [path for path in modules if path not in calls.arguments]
    if missing:
        raise ValueError(
            f"{step} never called the {type(modules[missing[0]]).__name__} that is to be quantized; name the submodule "
            f"that it does call with QuantizationCallback(module='...')"
        )


def add_note(error: Exception, unit: str, step: Step) -> None:
    """Tell with ``error`` what the step was called for."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(
            f"lq called {step} on one batch, without gradients, to see what it gives the {unit} that is quantized. Up "
            f"to there it has to do without a loop around it: self.manual_backward(loss) then does nothing, and "
            f"loss.backward() fails"
        )
