"""The unit of a LightningModule in its three stages, and how it goes from one to another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lq.callback.steps.calls import COMPILED, Step, has_weighted_layers
from lq.callback.steps.unit import Unit, find_unit
from lq.graph.forward import QUANTIZERS
from lq.graph.parts import PartsForward
from lq.graph.stand_in import StandIn
from lq.int8.module import Int8Module
from lq.int8.parts import split
from lq.schemes.overrides import Overrides
from lq.workflow.prepare import Mode, PreparedForward, is_prepared, prepared_forward, unprepare

Stage = Literal["float", "prepared", "int8"]

#: Where the LightningModule keeps its :class:`StagedUnit`.
_ATTRIBUTE = "_lq_unit"

#: The child that a LightningModule with layers of its own gets while INT8 computes its forward.
_INT8 = "int8"


class StagedUnit:
    """The part of a LightningModule that is quantized: in float, prepared with quantizers, or with INT8 in its place.

    While INT8 stands in its place the prepared module is kept, with its weights in float and its ranges: checkpoints
    are written from it, and training can go on with it.

    Args:
        pl_module: the LightningModule.
        name: path of the unit in it, or None to have it found once the layers are built.

    Where the steps call several parts on their own, the unit is the LightningModule, and a call of it one of each part
    (see :class:`~lq.graph.parts.PartsForward`).

    Attributes:
        fit_mode: what the ``fit`` that is under way, or was the last one, makes of the unit.
        needs_hooks: whether a training step calls the unit only where the hooks before it have run.
        takes_any_target: whether that ``fit`` goes on with whatever target a checkpoint was trained for.
    """

    def __init__(self, pl_module: nn.Module, name: str | None) -> None:
        self.pl_module = pl_module
        self.name = name
        self.fit_mode: Mode | None = None
        self.takes_any_target = False
        self.needs_hooks = False
        self._path: str | None = None
        self._unit: Unit | None = None
        self._kept: Any = None  # the submodule, or the forward of the LightningModule, that INT8 replaces
        self._kept_parts: dict[str, nn.Module] = {}

    @property
    def is_built(self) -> bool:
        """Whether there are layers yet: some are built in ``LightningModule.setup`` or ``configure_model``."""
        return self._kept is not None or has_weighted_layers(self.pl_module)

    @property
    def path(self) -> str:
        """Path of the unit in the LightningModule, ``""`` for the LightningModule itself."""
        if self._path is None:
            self._path = find_unit(self.pl_module, self.name)
        return self._path

    @property
    def is_found(self) -> bool:
        """Whether the steps have been looked at."""
        return self._unit is not None

    @property
    def found(self) -> tuple[Unit, bool]:
        """What was found of the steps, for :meth:`use` in other processes.

        Raises:
            ValueError: where they were not looked at.
        """
        if self._unit is None:
            raise ValueError(f"the steps of {type(self.pl_module).__name__} were not looked at")
        return self._unit, self.needs_hooks

    def use(self, unit: Unit, needs_hooks: bool | None = None) -> None:
        """Take what the steps call for the unit, which is in float."""
        self._unit = unit
        self.needs_hooks = self.needs_hooks if needs_hooks is None else needs_hooks
        self._path = unit.paths[0] if len(unit.paths) == 1 else ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the parts that the steps call on their own; none where the unit is called as a whole."""
        return self._unit.paths if self._unit is not None and len(self._unit.paths) > 1 else ()

    def overrides(self, given: Overrides) -> Overrides:
        """What the user says of layers, whose names are those in the network also where more than that is the unit."""
        if self._unit is None or not self._unit.network:
            return given
        return given.within(self._unit.network, (name for name, _ in self.pl_module.named_modules() if name))

    @property
    def calls(self) -> Mapping[Step, int]:
        """How often the steps call the unit, as far as is known."""
        return {} if self._unit is None else self._unit.calls

    @property
    def calibrated_with(self) -> Step:
        """The step that calls all of the unit."""
        return "training_step" if self._unit is None else self._unit.calibrated_with

    @property
    def is_judged(self) -> bool:
        """Whether the validation step's metrics are those of the unit."""
        return self._unit is None or self._unit.is_judged

    @property
    def stage(self) -> Stage:
        if self.holds_int8:
            return "int8"
        return "prepared" if is_prepared(self.unit) else "float"

    @property
    def holds_int8(self) -> bool:
        """Whether INT8 stands in the unit's place."""
        return self._kept is not None

    @property
    def unit(self) -> nn.Module:
        """The float or prepared module, also while INT8 stands in its place."""
        if not self.path:
            return self.pl_module
        if self._kept is None:
            return self.pl_module.get_submodule(self.path)
        kept: nn.Module = self._kept
        return kept.get_submodule(COMPILED) if self._is_compiled else kept

    @property
    def prepared_forward(self) -> PreparedForward:
        """What is known of the unit's preparation, also while INT8 stands in its place.

        Raises:
            ValueError: where the unit is in float.
        """
        if isinstance(self._kept, PreparedForward):
            return self._kept
        return prepared_forward(self.unit)

    @property
    def prefix(self) -> str:
        """What the keys of the unit start with in the state dict of the LightningModule."""
        return f"{self.path}." if self.path else ""

    def float_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the LightningModule with INT8 in place, with what INT8 replaces instead of INT8."""
        kept = self._kept_parts or ({self._place: self._kept} if self.path else {_INT8: nn.Module()})
        prefixes = tuple(f"{path}." for path in kept)
        float_state = OrderedDict((key, value) for key, value in state.items() if not key.startswith(prefixes))
        float_state._metadata = OrderedDict()  # type: ignore[attr-defined]  # versions, as torch keeps them
        for path, module in kept.items():
            module.state_dict(destination=float_state, prefix=f"{path}.")
        return float_state

    def int8_state(self) -> dict[str, Any]:
        """The state of what stands in the unit's place, by its keys in the LightningModule."""
        places = self._kept_parts or (self._place,)
        state: dict[str, Any] = {}
        for path in places:
            self.pl_module.get_submodule(path).state_dict(destination=state, prefix=f"{path}.")
        return state

    def quantizer_state(self) -> dict[str, Any]:
        """The state of the quantizers of a prepared unit, by its keys in the LightningModule."""
        prefix = f"{self.prefix}{QUANTIZERS}."
        state: dict[str, Any] = self.unit.get_submodule(QUANTIZERS).state_dict(prefix=prefix)
        return state

    def prepare_with(self, prepare: Callable[[nn.Module], Any]) -> None:
        """Have the unit prepared by ``prepare``, as the steps call it."""
        forward = PartsForward(self.pl_module, self.parts) if self.parts else None
        if forward is not None:
            forward.install()
        try:
            prepare(self.unit)
        except BaseException:
            if forward is not None:
                forward.remove()
            raise

    def put_int8(self, int8: nn.Module) -> None:
        """Let ``int8`` compute what the unit did; the LightningModule's steps stay as they are."""
        if self.parts:
            self._kept = self.pl_module.forward
            self._kept.own.remove()
            assert isinstance(int8, Int8Module)
            for path, part in split(int8).items():
                place = _uncompiled(path)
                self._kept_parts[place] = self.pl_module.get_submodule(place)
                part.stand_in_for(self.pl_module.get_submodule(path))
                self._set(place, part)
        elif self.path:
            self._kept = self.pl_module.get_submodule(self._place)
            self._set(self._place, int8)
            if isinstance(int8, StandIn):
                int8.stand_in_for(self.unit)
        else:
            self._kept = self.pl_module.forward
            self.pl_module.add_module(_INT8, int8)
            self.pl_module.forward = int8.__call__

    def take_int8_off(self) -> None:
        """Put the prepared unit back where INT8 stands in its place; else nothing is done."""
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        if self._kept_parts:
            for path, part in self._kept_parts.items():
                self._set(path, part)
            self._kept_parts = {}
            self.pl_module.forward = kept
        elif self.path:
            self._set(self._place, kept)
        else:
            del self.pl_module._modules[_INT8]
            self.pl_module.forward = kept
        like = next(self.pl_module.parameters(), None)
        if like is not None:
            self.unit.to(like.device)

    def to_float(self) -> None:
        """Take off what INT8 and preparation put on; the weights stay those of the unit."""
        self.take_int8_off()
        if is_prepared(self.unit):
            unprepare(self.unit)
        forward = self.pl_module.__dict__.get("forward")
        if isinstance(forward, PartsForward):
            forward.remove()

    @property
    def _is_compiled(self) -> bool:
        return self.path.rpartition(".")[2] == COMPILED

    @property
    def _place(self) -> str:
        """Path of what INT8 replaces."""
        return _uncompiled(self.path) if self.path else _INT8

    def _set(self, path: str, module: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(self.pl_module.get_submodule(owner), name, module)


def _uncompiled(path: str) -> str:
    """Where INT8 is put for the module at ``path``: it gains nothing from ``torch.compile``, whose wrapper goes as
    well."""
    owner, _, name = path.rpartition(".")
    return owner if name == COMPILED else path


def staged_unit(pl_module: nn.Module) -> StagedUnit:
    """The staged unit that was attached to ``pl_module``."""
    staged: StagedUnit = pl_module.__dict__[_ATTRIBUTE]
    return staged


def attach(pl_module: nn.Module, name: str | None) -> StagedUnit:
    """The staged unit of ``pl_module``: the one it has, or a new one where it has none or one of another name."""
    staged: StagedUnit | None = pl_module.__dict__.get(_ATTRIBUTE)
    if staged is not None and (name is None or name in (staged.name, staged._path)):
        return staged
    if staged is not None:
        staged.take_int8_off()
    if staged is None:
        pl_module._register_state_dict_hook(_give_float_state)
        pl_module.register_load_state_dict_pre_hook(_keep_int8)
    pl_module.__dict__[_ATTRIBUTE] = StagedUnit(pl_module, name)
    return staged_unit(pl_module)


def _int8_in(module: nn.Module) -> StagedUnit | None:
    """The staged unit of a LightningModule in which INT8 stands in its place."""
    staged: StagedUnit | None = module.__dict__.get(_ATTRIBUTE)
    return staged if staged is not None and staged.pl_module is module and staged.holds_int8 else None


def _give_float_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict is that of the float model while INT8 stands in its place, too: scripts end with one."""
    staged = _int8_in(module)
    if staged is None:
        return
    own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    given: Any = staged.float_state(own)
    state.update({prefix + key: value for key, value in given.items() if QUANTIZERS not in key.split(".")})
    if hasattr(state, "_metadata"):
        state._metadata.update({prefix + path: versions for path, versions in given._metadata.items()})


def _keep_int8(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """The float weights that INT8 was made of change nothing; with others the module is the float network again."""
    staged = _int8_in(module)
    if staged is None:
        return
    int8 = {prefix + key: value for key, value in staged.int8_state().items()}
    if int8.keys() <= state.keys():
        return
    held = {prefix + key: value for key, value in staged.float_state({}).items()} or module.state_dict(prefix=prefix)
    held = {key: v for key, v in held.items() if isinstance(v, torch.Tensor) and QUANTIZERS not in key.split(".")}
    given = held.keys() & state.keys()
    misfits = [key for key in given if held[key].shape != state[key].shape]
    *_, missing, _, errors = args
    if misfits:
        errors.append(f"these weights are of another network: {', '.join(sorted(misfits))} have another shape")
    elif not all(torch.equal(held[key].cpu(), state[key].cpu()) for key in given):
        rank_zero_warn(
            f"lq: {staged.path or type(module).__name__!r} was an INT8 network, and is given the weights of another "
            f"one, so that it is the float network again; lq.quantize_checkpoint, or another fit, quantizes it"
        )
        staged.to_float()
        for key in [key for key in state if QUANTIZERS in key.split(".")]:
            del state[key]
        return
    missing.extend(key for key in held if key not in state)
    for key in given if staged.path or staged.parts else ():
        del state[key]
    state.update(int8)
    if not staged.path:  # the quantizers are the LightningModule's own
        state.update({prefix + key: value for key, value in staged.quantizer_state().items()})
