"""Which part of a LightningModule is quantized, and what flows into it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lq.callback.idle import run_idle, same_attributes
from lq.graph.ops import WEIGHTED_MODULES

#: The module that ``torch.compile(module)`` wraps, as a child of the wrapper.
COMPILED = "_orig_mod"

#: The user's own steps that a batch is for.
Step = Literal["training_step", "validation_step"]


def has_weighted_layers(module: nn.Module) -> bool:
    return any(isinstance(submodule, WEIGHTED_MODULES) for submodule in module.modules())


def find_unit(pl_module: nn.Module, name: str | None) -> str:
    """Path of the submodule to quantize; ``""`` is the LightningModule itself.

    Without a name it is the one child that holds all convolutions and linear layers, or the LightningModule itself
    where several do (its forward calls them all) or the layers sit on it. Of a submodule that ``torch.compile`` wrapped
    it is the module inside.

    Raises:
        ValueError: where no submodule is called ``name``, with near names.
    """
    if name is not None:
        paths = [path for path, _ in pl_module.named_modules() if path]
        if name not in paths:
            near = difflib.get_close_matches(name, paths, n=3, cutoff=0.4)
            children = [path for path, child in pl_module.named_children() if has_weighted_layers(child)]
            raise ValueError(
                f"module={name!r}: {type(pl_module).__name__} has no submodule of that name; choose one of "
                f"{', '.join(map(repr, dict.fromkeys([*near, *children])))}"
            )
        return _inside_wrapper(pl_module, name)
    candidates = [path for path, child in pl_module.named_children() if has_weighted_layers(child)]
    direct = any(isinstance(child, WEIGHTED_MODULES) for child in pl_module.children())
    return _inside_wrapper(pl_module, candidates[0]) if len(candidates) == 1 and not direct else ""


def _inside_wrapper(pl_module: nn.Module, path: str) -> str:
    return f"{path}.{COMPILED}" if COMPILED in pl_module.get_submodule(path)._modules else path


class _UnitReached(BaseException):
    """Leaves a step as soon as the unit has been called; not an Exception, so that no step swallows it."""


@contextmanager
def _stop_behind(register: Callable[..., RemovableHandle], seen: list[Any]) -> Iterator[None]:
    """Leave the body when the hook that ``register`` puts on the unit is called, and keep what it was called with."""

    def hook(_: nn.Module, *values: Any) -> None:
        seen.append(values)
        raise _UnitReached

    handle = register(hook, with_kwargs=True)
    try:
        yield
    except _UnitReached:
        pass
    finally:
        handle.remove()


def unit_arguments(
    pl_module: Any, unit: nn.Module, batch: Any, step: Step = "training_step"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` that the user's own step calls the unit with.

    Whatever the step does before (unpacking a dict, normalising, calling another method) is done as in training, so a
    batch of any form reaches the unit as it does there. The unit itself does not run.

    Args:
        pl_module: the LightningModule.
        unit: the submodule that is quantized, or ``pl_module`` itself.
        batch: a batch of the dataloader, on the module's device.
        step: which step the batch is for.

    Raises:
        ValueError: where the step never calls the unit.
    """
    with same_attributes(pl_module):  # looking is no step of the training
        # Before hooks of the user's own: what they do to the arguments is part of the unit.
        register = partial(unit.register_forward_pre_hook, prepend=True)
        args, kwargs = _step_until(register, pl_module, unit, batch, step)
    return args, kwargs


def run_unit(pl_module: Any, unit: nn.Module, batch: Any, step: Step = "training_step") -> Any:
    """Run a step up to the end of its first call of the unit, and return what that returns.

    Nothing behind the unit runs: no loss, no logging. See :func:`unit_arguments`.
    """
    _, _, output = _step_until(unit.register_forward_hook, pl_module, unit, batch, step)
    return output


def _step_until(
    register: Callable[..., RemovableHandle], pl_module: Any, unit: nn.Module, batch: Any, step: Step
) -> Any:
    calls: list[Any] = []
    # Compiled code was made for the module as it was, and does not know of hooks.
    with torch.compiler.set_stance("force_eager"), _stop_behind(register, calls):
        try:
            run_idle(pl_module, lambda: getattr(pl_module, step)(batch, 0))
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(_what_was_tried(unit, step))
            raise
    if not calls:
        name = type(unit).__name__
        raise ValueError(
            f"{step} never called the {name} that is to be quantized; name the submodule that it does call "
            f"with QuantizationCallback(module='...')"
        )
    return calls[0]


def _what_was_tried(unit: nn.Module, step: Step) -> str:
    return (
        f"lq called {step} on one batch, without gradients, to see what it gives the {type(unit).__name__} that is "
        f"quantized. Up to there it has to do without a loop around it: self.manual_backward(loss) then does nothing, "
        f"and loss.backward() fails"
    )
