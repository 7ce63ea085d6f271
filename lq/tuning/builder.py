"""INT8 networks of one model, each made another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lq.analysis.analyze import analyze
from lq.int8.module import Int8Module
from lq.results.analysis import Analysis
from lq.schemes.overrides import Overrides
from lq.schemes.targets import Target
from lq.workflow.comparison import keeping_ranges
from lq.workflow.convert import convert
from lq.workflow.prepare import activation_quantizers, prepare, prepared_forward, simulate, unprepare
from lq.workflow.recalibrate import recalibrate


@dataclass(frozen=True)
class Choice:
    """How an INT8 network is made.

    Args:
        calibrator: of the ranges.
        methods: what the weights and biases go through.
        float_layers: names of layers that stay in float, beside those that the model's own overrides keep there.
    """

    calibrator: str
    methods: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()


class Builder:
    """Makes INT8 networks of a calibrated model, which is afterwards as it was.

    Nothing is prepared or calibrated again for another calibrator or for layers in float: the statistics of all tensors
    that any of these networks rounds are there from the first pass over the data.

    Args:
        model: prepared for PTQ, with histograms, and calibrated.
        batches: of calibration data, for the sensitivity of the layers.
        forward: runs the model on one batch, see :func:`lq.calibrate`.
        target: the engine family to convert for; by default the one the model was prepared for.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Callable[[Any], Any],
        target: Target | None = None,
    ) -> None:
        self.model = model
        self._batches = batches
        self._target = target
        self._forward = forward
        self._own = prepared_forward(model).overrides

    def int8(self, choice: Choice) -> Int8Module:
        """The INT8 network made as ``choice`` says.

        Raises:
            Whatever :func:`lq.convert` does.
        """
        with self._made(choice):
            return convert(self.model, self._target)

    def ranking(self, choice: Choice, seconds: float | None) -> list[str]:
        """The layers that run in INT8 by the noise that each makes alone in the outputs, the largest first.

        Args:
            choice: how the network is made.
            seconds: about how long measuring may take.
        """
        with self._made(choice):
            analysis = analyze(
                self.model, self._batches, timing=False, seconds=seconds, forward=self._forward, progress=False
            )
        return _by_harm(analysis)

    def settle(self, choice: Choice) -> None:
        """Leave the model as ``choice`` wants it: prepared for the layers it keeps in float, and calibrated."""
        before = activation_quantizers(self.model)
        if choice.float_layers:
            forward, overrides = prepared_forward(self.model), self._overrides(choice)
            arguments = {**forward.inputs, **forward.settings}
            observer, target = forward.observer, forward.target
            prepare(unprepare(self.model), arguments, target=target, observer=observer, overrides=overrides)
        for name, quantizer in activation_quantizers(self.model).items():
            quantizer.observer = before[name].observer
        recalibrate(self.model, choice.calibrator)
        simulate(self.model)

    def _overrides(self, choice: Choice) -> Overrides:
        kept = [(name, spec) for name, spec in self._own.specs if name not in choice.float_layers]
        return Overrides((*kept, *((name, None) for name in choice.float_layers)))

    @contextmanager
    def _made(self, choice: Choice) -> Iterator[None]:
        """The model as ``choice`` wants it converted."""
        forward = prepared_forward(self.model)
        with keeping_ranges(self.model):
            recalibrate(self.model, choice.calibrator)
            forward.overrides = self._overrides(choice)
            try:
                yield
            finally:
                forward.overrides = self._own


def _by_harm(analysis: Analysis) -> list[str]:
    """Names of the layers that can be left in float alone; a name that is called several times stands once."""
    rows = [layer for layer in analysis.by_harm() if layer.in_int8]
    measured = [row.name for row in rows if row.only_sqnr_db is not None and row.all_but_sqnr_db is not None]
    # Those that there was no time for are the least suspicious ones.
    return list(dict.fromkeys([*measured, *(row.name for row in rows if row.name in analysis.left_out)]))
