"""INT8 networks of one model, each made another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.analysis.analyze import noisiest_layers
from lq.deployment.engine_module import IN_PROCESS
from lq.graph.forward import QUANTIZERS
from lq.int8.module import Int8Module
from lq.numerics.observers import Observer
from lq.schemes.overrides import Overrides
from lq.schemes.targets import Target
from lq.tuning.bias_correction import correct_bias
from lq.tuning.equalization import can_equalize, equalize
from lq.tuning.judged import Judge
from lq.tuning.learned_rounding import learn_rounding
from lq.util.modes import keeping_modes
from lq.workflow.calibrate import calibrate
from lq.workflow.comparison import keeping_ranges
from lq.workflow.convert import convert
from lq.workflow.prepare import activation_quantizers, prepare, prepared_forward, simulate, unprepare
from lq.workflow.recalibrate import recalibrate

BIAS_CORRECTION, EQUALIZATION, LEARNED_ROUNDING = "bias_correction", "equalization", "learned_rounding"

#: In the order they are tried, the quickest first.
METHODS = (BIAS_CORRECTION, EQUALIZATION, LEARNED_ROUNDING)

#: The order of the layers follows from sums over all positions and outputs: few samples are enough.
_SENSITIVITY_SAMPLES = 16


@dataclass(frozen=True)
class Choice:
    """How an INT8 network is made.

    Args:
        calibrator: of the ranges.
        methods: what the weights and biases go through, of :data:`METHODS`; the order does not matter.
        float_layers: names of layers that stay in float, beside those that the model's own overrides keep there.
        fine_tuned: whether the model is then trained with fake-quantizers.
    """

    calibrator: str
    methods: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    fine_tuned: bool = False


class Builder:
    """Makes INT8 networks of a calibrated model, which is afterwards as it was.

    Nothing is prepared or calibrated again for another calibrator or for layers in float: the statistics of all tensors
    that any of these networks rounds are there from the first pass over the data.

    Args:
        model: prepared for PTQ, with histograms, and calibrated.
        batches: of calibration data.
        forward: runs the model on one batch, see :func:`lq.calibrate`.
        target: the engine family to convert for; by default the one the model was prepared for.
        rounding_seconds: how long learned rounding may take.
        observed: runs the model on one batch to calibrate it, where that is another thing: a step that calls it twice.
        judge: gives a network as the engine runs that is to judge it; by default in process.
        fine_tune: trains the model, which rounds to the ranges it was calibrated with; None where it may not be
            trained.
        trained_with: the module that holds the model, where more than the model is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Callable[[Any], Any],
        target: Target | None = None,
        rounding_seconds: float = 120.0,
        observed: Callable[[Any], Any] | None = None,
        judge: Judge | None = None,
        fine_tune: Callable[[], Any] | None = None,
        trained_with: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.judge = judge or Judge(IN_PROCESS)
        self._batches = batches
        self._forward = forward
        self._target = target
        self._observed = observed or forward
        self._rounding_seconds = rounding_seconds
        self._fine_tune = fine_tune
        self._whole = model if trained_with is None else trained_with
        self._own = prepared_forward(model).overrides
        self._equalized: tuple[dict[str, Tensor], dict[str, Observer]] | None = None
        self._rounded: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self._trained: dict[str, Tensor] | None = None
        self._around: dict[str, Tensor] = {}

    @property
    def fine_tunes(self) -> bool:
        """Whether the model may be trained."""
        return self._fine_tune is not None

    def applies(self, method: str) -> bool:
        """Whether there is anything in the model that ``method`` changes."""
        return method != EQUALIZATION or can_equalize(self.model)

    def int8(self, choice: Choice) -> tuple[Int8Module, nn.Module]:
        """The INT8 network made as ``choice`` says, and as the engine runs it that judges.

        Raises:
            Whatever :func:`lq.convert` and, where the engine takes a file, :func:`lq.export` do.
        """
        with self._made(choice):
            int8 = convert(self.model, self._target)
            return int8, self.judge.network(self.model, int8)

    @contextmanager
    def surroundings(self, choice: Choice) -> Iterator[None]:
        """Inside, what lies around the model is as it was trained with it, where ``choice`` has it trained."""
        before = self._outside()
        try:
            if choice.fine_tuned:
                load(self._whole, self._around)
            yield
        finally:
            load(self._whole, before)

    def ranking(self, choice: Choice, seconds: float | None) -> list[str]:
        """The layers that run in INT8 by the noise that each makes alone in the outputs, the largest first.

        Args:
            choice: how the network is made.
            seconds: about how long measuring may take.
        """
        with self._made(choice):
            return noisiest_layers(
                self.model, self._batches, num_samples=_SENSITIVITY_SAMPLES, seconds=seconds, forward=self._forward
            )

    def settle(self, choice: Choice) -> None:
        """Leave the model as ``choice`` wants it: prepared for the layers it keeps in float, and calibrated."""
        before = activation_quantizers(self.model)
        keep_in_float(self.model, choice.float_layers)
        for name, quantizer in activation_quantizers(self.model).items():
            quantizer.observer = before[name].observer
        self._apply(choice)
        if choice.fine_tuned:
            load(self._whole, self._around)

    @contextmanager
    def _made(self, choice: Choice) -> Iterator[None]:
        """The model as ``choice`` wants it converted."""
        forward = prepared_forward(self.model)
        with keeping_ranges(self.model), _keeping_weights_and_statistics(self.model):
            forward.overrides = _and_in_float(self._own, choice.float_layers)
            try:
                self._apply(choice)
                yield
            finally:
                forward.overrides = self._own

    def _apply(self, choice: Choice) -> None:
        if EQUALIZATION in choice.methods:
            self._equalize()
        recalibrate(self.model, choice.calibrator)
        simulate(self.model)
        if LEARNED_ROUNDING in choice.methods:
            self._round(choice)
        if BIAS_CORRECTION in choice.methods:
            correct_bias(self.model, self._batches, forward=self._forward)
        if choice.fine_tuned:
            self._train()

    def _equalize(self) -> None:
        """With the statistics of the equalised network."""
        quantizers = activation_quantizers(self.model)
        if self._equalized is None:
            for quantizer in quantizers.values():
                quantizer.observer = copy.deepcopy(quantizer.observer)
            equalize(self.model, self._batches, forward=self._forward)
            calibrate(self.model, self._batches, forward=self._observed)
            weights = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
            self._equalized = weights, {name: quantizer.observer for name, quantizer in quantizers.items()}
        weights, observers = self._equalized
        load(self.model, weights)
        for name, quantizer in quantizers.items():
            quantizer.observer = observers[name]

    def _train(self) -> None:
        """Once: of one choice, for the others are evaluated by then."""
        if self._trained is None:
            assert self._fine_tune is not None
            before = self._outside()
            home = next((tensor.device for tensor in tensors_of(self.model).values()), torch.device("cpu"))
            try:
                with keeping_modes(self.model), torch.enable_grad():
                    self._fine_tune()
            finally:
                # The calibration data are where the model was; and training fills memory with gradients.
                self._whole.to(home)
                self._whole.zero_grad(set_to_none=True)
                self._around = self._outside()
                load(self._whole, before)
            self._trained = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
        load(self.model, self._trained)

    def _outside(self) -> dict[str, Tensor]:
        """The tensors of what lies around the model."""
        if self._whole is self.model:
            return {}
        inside = {id(tensor) for tensor in [*self.model.parameters(), *self.model.buffers()]}
        tensors = [*self._whole.named_parameters(), *self._whole.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in tensors if id(tensor) not in inside}

    def _round(self, choice: Choice) -> None:
        """Learned once, and left out again of the layers that stay in float."""
        key = (choice.calibrator, EQUALIZATION in choice.methods)
        if key not in self._rounded:
            before = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}
            learn_rounding(
                self.model, self._batches, seconds=self._rounding_seconds, forward=self._forward, progress=False
            )
            after = tensors_of(self.model).items()
            self._rounded[key] = {name: new.clone() for name, new in after if not torch.equal(new, before[name])}
            load(self.model, before)
        overrides = _and_in_float(self._own, choice.float_layers)
        rounded = self._rounded[key].items()
        load(self.model, {name: new for name, new in rounded if not overrides.in_float(name.rpartition(".")[0])})


def keep_in_float(model: nn.Module, layers: Sequence[str]) -> None:
    """Have a model that is prepared for PTQ prepared once more, with ``layers`` in float as well."""
    if not layers:
        return
    forward = prepared_forward(model)
    overrides = _and_in_float(forward.overrides, layers)
    arguments = {**forward.inputs, **forward.settings}
    observer, target = forward.observer, forward.target
    prepare(unprepare(model), arguments, target=target, observer=observer, overrides=overrides)


def _and_in_float(overrides: Overrides, layers: Sequence[str]) -> Overrides:
    kept = [(name, spec) for name, spec in overrides.specs if name not in layers]
    return Overrides((*kept, *((name, None) for name in layers)))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, without those of the quantizers."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if not name.startswith(f"{QUANTIZERS}.")}


def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into the tensors of those names, in place."""
    own = tensors_of(model)
    for name, value in values.items():
        own[name].copy_(value)


@contextmanager
def _keeping_weights_and_statistics(model: nn.Module) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    observers = {quantizer: quantizer.observer for quantizer in activation_quantizers(model).values()}
    try:
        yield
    finally:
        load(model, before)
        for quantizer, observer in observers.items():
            quantizer.observer = observer
