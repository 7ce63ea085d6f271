"""From a unit with ranges to its INT8 network: files, figures, and INT8 in the unit's place."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lq.calibration.comparison import CalibratorComparison
from lq.callback.batches import repeat_samples
from lq.callback.inspection import Findings, going_on
from lq.callback.page import result_page
from lq.callback.result import QuantizationResult, Side
from lq.callback.stages import StagedUnit
from lq.convert import convert
from lq.export import ExportResult, Format, export
from lq.file_sets import replaced_as_a_whole
from lq.files import write_text
from lq.graph.signature import CallSignature
from lq.int8 import Int8Module
from lq.modes import evaluating
from lq.prepare import PreparedForward, activation_quantizers, unprepared
from lq.runtime.cpu import has_onednn_int8, has_vnni
from lq.runtime.timing import measure
from lq.targets import Target

#: Samples in the batch that throughput is measured with.
BATCH_SIZE = 32

#: The network's file, which is always written, and those of the formats that are written on request.
NETWORK = "int8.pt2"
OTHER_FORMATS: dict[Format, str] = {"onnx": "int8.onnx", "aoti": "int8.aoti.pt2"}
_PAGE = "int8.html"
_RESULT = "int8.json"

#: All that a run writes: what an earlier one left under these names goes where this one writes nothing of that name.
OUTPUTS = (NETWORK, *OTHER_FORMATS.values(), _PAGE, _RESULT)


class Outcome(NamedTuple):
    """How a conversion ended.

    Args:
        result: of the first process; the others have None.
        failure: the error of an export beside ``int8.pt2`` that failed, for the caller to raise: by then the INT8
            network is there.
        findings: what was seen of the unit before INT8 took its place.
    """

    result: QuantizationResult | None
    failure: Exception | None
    findings: Findings


@dataclass(frozen=True)
class Conversion:
    """What is done with a unit whose ranges are known.

    Args:
        output_dir: where ``int8.pt2`` and everything else goes, all of it at once when all of it is there; None to
            write nothing.
        weights: what to say of the weights' origin.
        target: the engine family to convert for.
        formats: what to write beside ``int8.pt2``.
        labels: names of the classes, for the files.
        preprocessing: of the images, for the files.
        evaluate: metrics of the LightningModule as it is; None to measure nothing, not even latency.
        comparison: what ``calibrator="auto"`` compared.
        inspect: looks at the prepared unit and its INT8 network; None not to.
        settings: what to tell of the run.
    """

    output_dir: Path | None
    weights: str
    target: Target
    formats: Sequence[Format] = ()
    labels: Sequence[str] | None = None
    preprocessing: Mapping[str, Any] | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    comparison: CalibratorComparison | None = None
    inspect: Callable[[Int8Module], Findings] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, staged: StagedUnit, float_metrics: dict[str, float]) -> Outcome:
        """Write, measure, and put INT8 in the unit's place.

        What is written replaces what an earlier run wrote when everything has gone well, and as a whole.

        Args:
            staged: the unit, prepared and calibrated or trained.
            float_metrics: of the same weights in float.

        Returns:
            The result, which is also written to ``int8.json`` and ``int8.html``, with what was seen on the way.
        """
        with self._folder() as folder:
            outcome, written = self._run(staged, float_metrics, folder)
        if self.output_dir is None:
            rank_zero_info("lq: fast_dev_run: the INT8 model was made and measured, and no file is kept of it")
            return outcome
        if (self.output_dir / _PAGE).exists():
            rank_zero_info(f"lq: what was done, layer by layer, is in {self.output_dir / _PAGE}")
        for file in written:
            rank_zero_info(f"lq: INT8 model written to {replace(file, path=self.output_dir / file.path.name)}")
        return outcome

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where to write, until everything is there."""
        if self.output_dir is None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
        else:
            with replaced_as_a_whole(self.output_dir, OUTPUTS) as new:
                yield new

    def _run(
        self, staged: StagedUnit, float_metrics: dict[str, float], folder: Path
    ) -> tuple[Outcome, list[ExportResult]]:
        unit = staged.unit.cpu()
        int8 = convert(unit, self.target)
        write = partial(export, labels=self.labels, preprocessing=self.preprocessing)
        artifact = folder / NETWORK
        exports: list[ExportResult] = [write(int8, artifact)]
        failure: Exception | None = None
        try:
            for format, name in OTHER_FORMATS.items():
                if format in self.formats:
                    network = int8 if format == "aoti" else unit
                    exports.append(write(network, folder / name, format=format))
        except Exception as error:
            failure = error
        forward = staged.prepared_forward
        if has_onednn_int8() and not has_vnni() and self.target.weight.quant_max > 64:
            rank_zero_warn(
                f"lq: this CPU has no VNNI instructions, so its INT8 kernels get the 8-bit weights of target "
                f"{self.target} rounded to 7 bits, where their sums cannot overflow; the saved model keeps 8 bits. "
                f"To deploy on such CPUs, train or calibrate for them: QuantizationCallback(target='x86_avx2')"
            )
        with unprepared(unit):
            float_side, int8_side = self._measure(unit, int8, forward, artifact)
        findings = Findings() if self.inspect is None else self.inspect(int8)
        calibrator = next(iter(activation_quantizers(unit).values())).calibrator
        staged.put_int8(int8)
        int8_metrics = {} if self.evaluate is None else self.evaluate()
        assert int8.report is not None
        kept = self.output_dir
        result = QuantizationResult(
            mode=forward.mode,
            target=self.target.name,
            calibrator=str(calibrator),
            calibrator_scores={} if self.comparison is None else self.comparison.scores,
            float_side=replace(float_side, metrics=float_metrics),
            int8_side=replace(int8_side, metrics=int8_metrics),
            report=int8.report,
            batch_size=BATCH_SIZE,
            artifact="" if kept is None else str(kept / artifact.name),
            exports=() if kept is None else tuple(str(kept / written.path.name) for written in exports),
            weights=self.weights,
            settings=dict(self.settings),
            analysis=findings.analysis,
        )
        with going_on("writing the page"):
            advised = [] if result.analysis is None else [advice.layer for advice in result.analysis.advice()]
            page = result_page(result, findings.predictions, findings.tensor_charts(advised))
            write_text(folder / _PAGE, page)
        write_text(folder / _RESULT, result.to_json())
        return Outcome(result, failure, findings), exports

    def _measure(
        self, float_unit: nn.Module, int8: Int8Module, forward: PreparedForward, artifact: Path
    ) -> tuple[Side, Side]:
        """Size, latency and throughput of both, CPU against CPU: there INT8 kernels run in process, also after a fit
        on a GPU."""
        float_side = Side(size_bytes=_state_bytes(float_unit))
        int8_side = Side(size_bytes=artifact.stat().st_size)
        if self.evaluate is None:
            return float_side, int8_side
        # As it is called: by position where the forward allows it, for which the hooks of a user may have been written.
        signature = forward.signature
        models = {name: partial(_called, model, signature) for name, model in (("float", float_unit), ("int8", int8))}
        inputs = {**int8.settings, **int8.example_inputs}
        with evaluating(float_unit):
            one = measure(models, repeat_samples(inputs, 1), 1)
            many = measure(models, repeat_samples(inputs, BATCH_SIZE), BATCH_SIZE)
        return (
            replace(float_side, latency=one["float"], batch=many["float"]),
            replace(int8_side, latency=one["int8"], batch=many["int8"]),
        )


def _called(model: nn.Module, signature: CallSignature, **values: Any) -> Any:
    """The output for the values of the forward's parameters, by name."""
    args, kwargs = signature.arguments(values)
    return model(*args, **kwargs)


def _state_bytes(module: nn.Module) -> int:
    """Size of the module's weights on disk."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()
