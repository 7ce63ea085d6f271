"""Which part of a LightningModule is quantized: what its steps call."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lq.callback.steps.calls import COMPILED, Call, Step, has_weighted_layers
from lq.graph.ops import WEIGHTED_MODULES


@dataclass(frozen=True)
class Unit:
    """What is quantized.

    Args:
        paths: of one submodule, or of several that the steps call apart from one another; ``("",)`` is the
            LightningModule itself.
        calls: how often a step calls them; a step that is not in it was not looked at.
        network: the one submodule with layers, where what lies around it is a part of the unit as well; else ``""``.
    """

    paths: tuple[str, ...]
    calls: dict[Step, int] = field(default_factory=dict)
    network: str = ""

    @property
    def calibrated_with(self) -> Step:
        """The step that calls all there is to calibrate."""
        return "training_step" if self.calls.get("training_step", 1) else "validation_step"

    @property
    def is_judged(self) -> bool:
        """Whether the validation step's metrics are those of the unit."""
        return self.calls.get("validation_step", 1) > 0


def find_unit(pl_module: nn.Module, name: str | None) -> str:
    """Path of the submodule to quantize, as far as can be told without a look at the steps; ``""`` is the
    LightningModule itself.

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


def unit_of_calls(
    pl_module: nn.Module, name: str | None, training: Sequence[Call], validation: Sequence[Call] | None
) -> Unit:
    """The unit, as the steps call it.

    It is what :func:`find_unit` says where all calls of its layers go through it. Where a step calls parts of it on
    their own, these are the unit, each for itself, so that INT8 computes whatever the step does. What validation judges
    decides where training and validation call different networks (an average, a student and its teacher). Of a module
    that takes text as well, such as a whole batch with the names of its files, it is the network within.

    Args:
        pl_module: the LightningModule.
        name: as the user named it, or None.
        training: the calls in a training step, of modules with convolutions or linear layers.
        validation: those in a validation step, or None where there is none that could be looked at.

    Raises:
        ValueError: where no step calls what is to be quantized, or what they call cannot be told apart.
    """
    whole, every = find_unit(pl_module, name), [*training, *(validation or ())]
    while name is None and (inner := network_within(whole, every)):
        whole = inner
    steps = {"training_step": training, "validation_step": validation}
    seen = [calls for calls in steps.values() if calls is not None]
    if not any(_entries(calls, whole) for calls in seen):
        raise ValueError(
            f"training_step never called the {type(pl_module.get_submodule(whole)).__name__} that is to be quantized; "
            f"name the submodule that it does call with QuantizationCallback(module='...')"
        )
    if name is None and _takes_text(whole, every) and (parts := _parts_of_each_call(whole, every)):
        # Its parts, each for itself: no file takes text.
        order = [path for path, _ in pl_module.named_modules()]
        return _unit(tuple(sorted(parts, key=order.index)), training, validation)
    is_whole = all(set(_entries(calls, whole)) <= {whole} for calls in seen)
    # A forward that calls an average of what it calls in training, say, is two networks.
    switches = bool(_entries(training, whole)) and not _inner(validation or (), whole) <= _inner(training, whole)
    if is_whole and not switches and (name is not None or validation is None or _entries(validation, whole)):
        return _unit((whole,), training, validation)
    paths = _parts(pl_module, whole, training, validation or (), is_one=not switches)
    return _unit(paths, training, validation)


def around(unit: Unit, training: Sequence[Call], validation: Sequence[Call] | None) -> tuple[Unit, str] | None:
    """The LightningModule itself as the unit, where its forward does more than to call ``unit``: it normalises images,
    say, or makes probabilities of what comes out.

    Args:
        unit: as :func:`unit_of_calls` gives it.
        training: see there.
        validation: likewise.

    Returns:
        That unit, and why it cannot be quantized, or ``""``: it takes or returns another number of tensors than
        ``unit``, or a step calls ``unit`` without it. None where no step calls the LightningModule itself, its forward
        calls other networks as well, or it only passes on what it takes and gets.
    """
    if len(unit.paths) != 1 or unit.paths == ("",):
        return None
    steps = [calls for calls in (validation, training) if calls]
    wholes = [call for calls in steps for call in calls if not call.path]
    if not wholes or any({inner.path for inner in call.inner} != set(unit.paths) for call in wholes):
        return None
    # What only training does is no part of the network: what validation calls decides, where it calls this forward.
    calls = [call for call in steps[0] if not call.path] or wholes
    if all(call.only_passes_on() for call in calls):
        return None
    reason = ""
    if any(_entries([call], path) for calls in steps for call in calls if call.path for path in unit.paths):
        reason = f"the steps also call {unit.paths[0]!r} without it"
    elif not all(call.is_like(call.inner[0]) for call in calls):
        reason = f"it takes or returns other tensors than {unit.paths[0]!r} does"
    return replace(_unit(("",), training, validation), network=unit.paths[0]), reason


def _unit(paths: tuple[str, ...], training: Sequence[Call], validation: Sequence[Call] | None) -> Unit:
    calls: dict[Step, int] = {"training_step": _count(training, paths)}
    if validation is not None:
        calls["validation_step"] = _count(validation, paths)
    if not all(path in _all_paths(training) for path in paths):
        calls["training_step"] = 0  # not enough of it to calibrate with
    return Unit(paths, calls)


def _parts(
    pl_module: nn.Module, whole: str, training: Sequence[Call], validation: Sequence[Call], *, is_one: bool
) -> tuple[str, ...]:
    """What the steps call of ``whole``, and nothing that lies in something else of it.

    Args:
        pl_module: the LightningModule.
        whole: path of what holds all of it.
        training: the calls in a training step.
        validation: those in a validation step.
        is_one: whether ``whole`` is the same network in both.
    """
    steps = (training, validation)
    # By what a step calls: what has to be called in its place.
    pieces = {(step, path): {path} for step, calls in enumerate(steps) for path in _entries(calls, whole)}
    while True:
        known = set().union(*pieces.values())
        outer = next((a for a in known if any(_lies_in(b, a) for b in known) or (a == whole and not is_one)), None)
        if outer is None:
            break
        for (step, _), parts in pieces.items():
            if outer in parts:
                inner = _inner(steps[step], outer) or _inner([*training, *validation], outer)
                if not inner:
                    raise ValueError(
                        f"a step calls {_named(pl_module, outer)} as a whole and another one parts of it, and which "
                        f"these are cannot be seen: name what is to be quantized with "
                        f"QuantizationCallback(module='...')"
                    )
                parts.remove(outer)
                parts |= inner
    judged = set().union(*(parts for (step, _), parts in pieces.items() if step == 1))
    chosen = set().union(*(parts for parts in pieces.values() if not judged or judged & parts))
    order = [path for path, _ in pl_module.named_modules()]
    return tuple(sorted(chosen, key=order.index))


def network_within(path: str, calls: Sequence[Call]) -> str | None:
    """The one network that a module calls which takes text beside tensors: no file takes any."""
    if not _takes_text(path, calls):
        return None
    inner = _inner(calls, path)
    return inner.pop() if len(inner) == 1 else None


def _takes_text(path: str, calls: Sequence[Call]) -> bool:
    return any(call.takes_text for call in _calls_of(calls, path))


def _parts_of_each_call(path: str, calls: Sequence[Call]) -> set[str]:
    """What each call of a module calls, where that is the same for all, and nothing lies in something else of it."""
    inner = [{call.path for call in each.inner} for each in _calls_of(calls, path)]
    apart = not any(_lies_in(one, other) for parts in inner for one in parts for other in parts)
    return inner[0] if apart and all(parts == inner[0] for parts in inner) else set()


def _entries(calls: Sequence[Call], whole: str) -> list[str]:
    """What is called of ``whole`` from outside of it: itself, or parts of it on their own."""
    paths: list[str] = []
    for call in calls:
        if call.path == whole or _lies_in(call.path, whole):
            paths.append(call.path)
        else:
            paths.extend(_entries(call.inner, whole))
    return list(dict.fromkeys(paths))


def _inner(calls: Sequence[Call], path: str) -> set[str]:
    """What the calls of a module call in turn."""
    return {call.path for each in _calls_of(calls, path) for call in each.inner}


def _calls_of(calls: Sequence[Call], path: str) -> Iterator[Call]:
    for call in calls:
        if call.path == path:
            yield call
        yield from _calls_of(call.inner, path)


def _all_paths(calls: Sequence[Call]) -> set[str]:
    return {path for call in calls for path in call.paths()}


def _count(calls: Sequence[Call], paths: Sequence[str]) -> int:
    return sum(1 if call.path in paths else _count(call.inner, paths) for call in calls)


def _lies_in(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _named(pl_module: nn.Module, path: str) -> str:
    return repr(path) if path else f"the {type(pl_module).__name__} itself"
