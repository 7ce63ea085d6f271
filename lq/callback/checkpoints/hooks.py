"""What checkpoints hold of quantization.

In every Trainer checkpoint ``state_dict`` is that of the float model, whichever stage the module is in: it loads into
the plain LightningModule, with ``load_from_checkpoint`` and without lq. What quantization adds lies beside it, under
``"lq"``: the quantizers' state, and how the unit was prepared. With both a module is brought back to its stage, also in
a process that has neither data nor the callback's arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.callback.averages import AVERAGED, refresh_averaged_ranges
from lq.callback.steps.stages import StagedUnit
from lq.callback.steps.unit import Unit
from lq.graph.emission import as_it_is
from lq.graph.forward import QUANTIZERS
from lq.workflow.convert import convert
from lq.workflow.prepare import is_prepared, refresh_weights, unprepare
from lq.workflow.saved_preparation import describe_preparation, prepare_like, target_of

#: Where it lies in a checkpoint.
SECTION = "lq"

_VERSION = 1


def attach_hooks(staged: StagedUnit) -> None:
    """Let the LightningModule's own checkpoint hooks, which every Trainer calls first, see to the quantizers.

    A callback's hooks would come too late (after the weights were loaded) or not at all (``save_weights_only=True``).
    """
    pl_module: Any = staged.pl_module
    for name, act in (("on_save_checkpoint", _on_save), ("on_load_checkpoint", _on_load)):
        present = pl_module.__dict__.get(name)
        original = present.args[1] if isinstance(present, partial) and present.func is act else getattr(pl_module, name)
        setattr(pl_module, name, partial(act, staged, original))


def section_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``checkpoint`` holds of quantization; None for one of a float model.

    Raises:
        ValueError: where a later version of lq wrote it.
    """
    section: dict[str, Any] | None = checkpoint.get(SECTION)
    if section is not None and section["version"] != _VERSION:
        raise ValueError(
            f"the checkpoint's quantization state has version {section['version']}, and this lq reads {_VERSION}; "
            f"update lq. The float weights, under 'state_dict', can be loaded by the plain LightningModule"
        )
    return section


def restore(staged: StagedUnit, checkpoint: Mapping[str, Any], section: Mapping[str, Any], strict: bool = True) -> None:
    """Prepare the unit as it was when the checkpoint was written, and load weights and ranges.

    Args:
        staged: the unit, in any stage.
        checkpoint: the checkpoint; the quantizers' keys are added to its ``state_dict``.
        section: see :func:`section_of`.
        strict: of ``load_state_dict``.

    Raises:
        ValueError: where the preparation could not be written into the checkpoint.
        RuntimeError: where the weights or the quantizers do not fit the module.
    """
    _make_prepared(staged, section)
    _add_quantizers(staged, checkpoint["state_dict"], section)
    staged.pl_module.load_state_dict(checkpoint["state_dict"], strict=strict)
    if AVERAGED in checkpoint:
        refresh_averaged_ranges(staged)


def _on_save(staged: StagedUnit, original: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    original(checkpoint)
    if not staged.is_built or staged.stage == "float":
        return
    stage = staged.stage
    state = checkpoint["state_dict"]
    if stage == "prepared":
        refresh_weights(staged.unit)  # in place, so in `state` too: the scales of the weights that are saved
    if stage == "int8":
        state.update(staged.quantizer_state())  # the rest is that of the float module, as everywhere
    if "hyper_parameters" in checkpoint:  # a network that was an argument of the LightningModule
        checkpoint["hyper_parameters"] = _in_float(checkpoint["hyper_parameters"])
    preparation = None
    try:
        preparation = describe_preparation(staged.prepared_forward)
    except TypeError as error:
        rank_zero_warn(f"lq: to quantize this checkpoint later the model has to be prepared by hand: {error}")
    checkpoint[SECTION] = {
        "version": _VERSION,
        "stage": stage,
        "preparation": preparation,
        "paths": list(staged.parts or (staged.path,)),
        "quantizers": _remove(state, _quantizer_prefix(staged)),
    }


def _in_float(hyperparameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyperparameters with networks as they are without lq."""

    def in_float(value: Any) -> Any:
        if not isinstance(value, nn.Module):
            return value
        try:
            network = as_it_is(value)
        except Exception:  # what cannot be copied is saved as it is: no checkpoint is lost for it
            return value
        for part in list(network.modules()):
            if is_prepared(part):
                unprepare(part)
        return network

    given = copy.copy(hyperparameters)
    for name, value in hyperparameters.items():
        if any(isinstance(leaf, nn.Module) for leaf in tree_leaves(value)):
            given[name] = tree_map(in_float, value)  # type: ignore[index]
    return given


def _on_load(staged: StagedUnit, original: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
    original(checkpoint)
    trainer = getattr(staged.pl_module, "_trainer", None)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        _for_training(staged, checkpoint)
    else:
        _for_inference(staged, checkpoint)


def _for_training(staged: StagedUnit, checkpoint: dict[str, Any]) -> None:
    section = section_of(checkpoint)
    if staged.fit_mode != "qat":
        if section is not None:
            rank_zero_info("lq: the checkpoint's fake-quantizers are left out: mode='ptq' trains its weights in float")
        return
    if section is None:
        rank_zero_info("lq: the checkpoint is of a float model: its weights start the quantization-aware training")
        return
    preparation = section["preparation"]
    if preparation is not None and preparation["mode"] != "qat":
        rank_zero_info(
            "lq: the checkpoint was calibrated after training: its weights start quantization-aware training"
        )
        return
    if is_prepared(staged.unit) and preparation is not None:
        here, there = staged.prepared_forward.target, target_of(preparation)
        if here != there and staged.takes_any_target:
            rank_zero_info(f"lq: target {there.name!r}: the checkpoint was trained for it")
        elif here != there:
            raise ValueError(
                f"the checkpoint was trained for target {there.name!r}, and this run is for {here.name!r}: resume it "
                f"with QuantizationCallback(mode='qat', target={there.name!r}); or load its float weights with "
                f"load_from_checkpoint, and start a run for {here.name!r} with them"
            )
    _make_prepared(staged, section)
    _add_quantizers(staged, checkpoint["state_dict"], section)


def _for_inference(staged: StagedUnit, checkpoint: dict[str, Any]) -> None:
    """Bring the module to what the checkpoint holds; an INT8 module stays one wherever that says how."""
    section = section_of(checkpoint)
    state = checkpoint["state_dict"]
    if section is not None:
        to_int8 = "int8" in (section["stage"], staged.stage)
        pl_module: Any = staged.pl_module
        restore(staged, checkpoint, section, strict=pl_module.strict_loading)
        if to_int8:
            staged.put_int8(convert(staged.unit.cpu()))
        checkpoint["state_dict"] = _with_present_unit(staged, state)
        rank_zero_info(f"lq: the checkpoint gives the {'INT8' if to_int8 else 'fake-quantized'} network")
    elif staged.stage == "int8" and _has_weights_of(staged, state):
        checkpoint["state_dict"] = _with_present_unit(staged, state)
        rank_zero_info("lq: the INT8 network was made of this checkpoint's weights, and is used")
    elif staged.stage != "float":
        rank_zero_warn(
            "lq: the checkpoint holds float weights that no ranges are known for, so the module is the float network "
            "again; lq.quantize_checkpoint makes an INT8 network of them"
        )
        staged.to_float()


def _make_prepared(staged: StagedUnit, section: Mapping[str, Any]) -> None:
    """Have the unit prepared as ``section`` says."""
    preparation = section["preparation"]
    staged.take_int8_off()
    if is_prepared(staged.unit):
        if preparation is None or describe_preparation(staged.prepared_forward) == preparation:
            return
        staged.to_float()
    if preparation is None:
        raise ValueError(
            "the checkpoint does not say how its model was prepared (a forward argument was no plain value): call "
            "lq.prepare on the submodule before you give the module to the Trainer"
        )
    try:
        paths = tuple(section.get("paths", ()))
        modules = dict(staged.pl_module.named_modules())
        if paths and staged.name is None and not staged.is_found and modules.keys() >= set(paths):
            staged.use(Unit(paths))
        staged.prepare_with(partial(prepare_like, description=preparation))
    except Exception as error:
        raise ValueError(
            f"the checkpoint was written for another network than this {type(staged.unit).__name__}, which cannot be "
            f"prepared as that one was: {error}"
        ) from error


def _quantizer_prefix(staged: StagedUnit) -> str:
    return f"{staged.prefix}{QUANTIZERS}."


def _add_quantizers(staged: StagedUnit, state: dict[str, Any], section: Mapping[str, Any]) -> None:
    prefix = _quantizer_prefix(staged)
    state.update({f"{prefix}{key}": value for key, value in section["quantizers"].items()})


def _remove(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take all entries out that start with ``prefix``, and return them without it."""
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}


def _with_present_unit(staged: StagedUnit, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with the unit as it is in the module now, and everything else as it was."""
    prefixes = tuple(f"{path}." for path in staged.parts or (staged.path,) if path)
    others = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    return {**staged.pl_module.state_dict(), **others}


def _has_weights_of(staged: StagedUnit, state: dict[str, Any]) -> bool:
    """Whether the weights of the unit that are there are those that INT8 was made of; frozen ones may be left out."""
    held = staged.pl_module.state_dict()  # the float module's
    given = [key for key in held if key.startswith(staged.prefix) and key in state]
    return bool(given) and all(torch.equal(held[key].cpu(), state[key].cpu()) for key in given)
