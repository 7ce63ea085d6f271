"""Recalibrate: new ranges from the statistics a model already holds."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from lq.numerics.calibrators import Calibrator, get_calibrator
from lq.numerics.quantizer import Quantizer
from lq.workflow.prepare import activation_quantizers

M = TypeVar("M", bound=nn.Module)


def recalibrate(model: M, calibrator: str | Calibrator, layers: Iterable[str] | None = None) -> M:
    """Recompute ranges with another calibrator from the statistics the model already holds.

    Args:
        model: a calibrated module.
        calibrator: as in :func:`calibrate`, without ``"auto"``, which needs data.
        layers: names of quantizers (see :func:`~lq.quantizers`), or of modules for all quantizers inside them; by
            default every activation's, except those that have their own calibrator (see ``overrides`` of
            :func:`~lq.prepare`). A weight's range always covers it, per channel, so nothing is clipped.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: where ``model`` is not prepared or has no statistics, a name matches nothing, or the statistics are
            not those that the calibrator needs. No range has then been changed.
    """
    chosen = get_calibrator(calibrator)
    quantizers = activation_quantizers(model)
    if layers is not None:
        quantizers = _named(quantizers, [layers] if isinstance(layers, str) else list(layers))
    for name, quantizer in quantizers.items():
        low, high = quantizer.observer.range()
        if low > high:
            raise ValueError(f"{name!r} holds no statistics; call lq.calibrate(model, batches) first")
    takes = {name: (q.own_calibrator if layers is None else None) or chosen for name, q in quantizers.items()}
    ranges = {name: takes[name](quantizer.observer, quantizer.spec) for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.calibrator = takes[name]
        quantizer.set_range(*ranges[name])
    return model


def _named(quantizers: dict[str, Quantizer], names: list[str]) -> dict[str, Quantizer]:
    chosen: dict[str, Quantizer] = {}
    for name in names:
        matches = {key: q for key, q in quantizers.items() if key == name or key.startswith(f"{name}.")}
        if not matches:
            near = difflib.get_close_matches(name, quantizers, n=5, cutoff=0.4) or list(quantizers)[:5]
            raise ValueError(
                f"layers: no activation's quantizer is called {name!r} or lies in a module of that name; similar are "
                f"{', '.join(map(repr, near))}"
            )
        chosen |= matches
    return chosen
