"""What a checkpoint says of quantization, without the model it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lq.numerics.quantizer import QuantizerState

_SCALE = ".quantizer.scale"


@dataclass(frozen=True)
class SavedQuantizer:
    """A quantizer as it lies in a checkpoint.

    Args:
        name: what it sits on.
        scale: smallest and largest step of its channels; None before calibration.
        zero_points: smallest and largest.
        observed: smallest and largest value seen, or None.
        channels: how many have a scale of their own; 1 for one range per tensor.
        calibrator: where the range comes from.
        state: what it was doing: ``"OBSERVE|FAKE_QUANTIZE"``.
    """

    name: str
    scale: tuple[float, float] | None
    zero_points: tuple[int, int]
    observed: tuple[float, float] | None
    channels: int
    calibrator: str
    state: str


def saved_quantizers(section: Mapping[str, Any]) -> list[SavedQuantizer]:
    """The quantizers in a checkpoint, in the order they were put on the model.

    Args:
        section: see :func:`~lq.callback.checkpoints.hooks.section_of`.
    """
    state: Mapping[str, Tensor] = section["quantizers"]
    saved = []
    for key, scale in state.items():
        if not key.endswith(_SCALE):
            continue
        name = key.removesuffix(_SCALE)
        flags, calibrated, *calibrator = state[f"{name}.quantizer._extra_state"].tolist()
        low = state[f"{name}.quantizer.observer.min_val"].min()
        high = state[f"{name}.quantizer.observer.max_val"].max()
        zero_point = state[f"{name}.quantizer.zero_point"]
        saved.append(
            SavedQuantizer(
                name=name,
                scale=(float(scale.min()), float(scale.max())) if calibrated else None,
                zero_points=(int(zero_point.min()), int(zero_point.max())),
                observed=(float(low), float(high)) if low <= high else None,
                channels=scale.numel(),
                calibrator=bytes(calibrator).decode(),
                state=QuantizerState(flags).name or str(flags),
            )
        )
    return saved
