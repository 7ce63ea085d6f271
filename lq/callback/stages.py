"""The unit of a LightningModule in its three stages, and how it goes from one to another."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lq.callback.unit import COMPILED, find_unit, has_weighted_layers
from lq.prepare import Mode, PreparedForward, is_prepared, prepared_forward, unprepare

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

    Attributes:
        fit_mode: what the ``fit`` that is under way, or was the last one, makes of the unit.
        takes_any_target: whether that ``fit`` goes on with whatever target a checkpoint was trained for.
    """

    def __init__(self, pl_module: nn.Module, name: str | None) -> None:
        self.pl_module = pl_module
        self.name = name
        self.fit_mode: Mode | None = None
        self.takes_any_target = False
        self._path: str | None = None
        self._kept: Any = None  # the submodule, or the forward of the LightningModule, that INT8 replaces

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
    def stage(self) -> Stage:
        if self._kept is not None:
            return "int8"
        return "prepared" if is_prepared(self.unit) else "float"

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

    @property
    def int8_prefix(self) -> str:
        """What the keys of the INT8 network start with in the state dict of the LightningModule."""
        return f"{self._place}."

    def put_int8(self, int8: nn.Module) -> None:
        """Let ``int8`` compute what the unit did; the LightningModule's steps stay as they are."""
        if self.path:
            self._kept = self.pl_module.get_submodule(self._place)
            self._set(int8)
        else:
            self._kept = self.pl_module.forward
            self.pl_module.add_module(_INT8, int8)
            self.pl_module.forward = int8.__call__

    def take_int8_off(self) -> None:
        """Put the prepared unit back where INT8 stands in its place; else nothing is done."""
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        if self.path:
            self._set(kept)
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

    @property
    def _is_compiled(self) -> bool:
        return self.path.rpartition(".")[2] == COMPILED

    @property
    def _place(self) -> str:
        """Path of what INT8 replaces: INT8 kernels gain nothing from ``torch.compile``, so its wrapper goes as well."""
        if not self.path:
            return _INT8
        return self.path.rpartition(".")[0] if self._is_compiled else self.path

    def _set(self, module: nn.Module) -> None:
        owner, _, name = self._place.rpartition(".")
        setattr(self.pl_module.get_submodule(owner), name, module)


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
    pl_module.__dict__[_ATTRIBUTE] = StagedUnit(pl_module, name)
    return staged_unit(pl_module)
