"""From a unit with ranges to its INT8 network: files, figures, and INT8 in the unit's place."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
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
from lq.int8 import Int8Module
from lq.modes import evaluating
from lq.prepare import activation_quantizers, unprepared
from lq.runtime.cpu import has_onednn_int8, has_vnni
from lq.runtime.timing import measure
from lq.targets import Target

#: Samples in the batch that throughput is measured with.
BATCH_SIZE = 32

#: Formats that are written on request, with the endings of their files.
_OTHER_FORMATS: dict[Format, str] = {"onnx": ".onnx", "aoti": ".aoti.pt2"}


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
        output_dir: where ``int8.pt2`` and everything else goes.
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

    output_dir: Path
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

        Args:
            staged: the unit, prepared and calibrated or trained.
            float_metrics: of the same weights in float.

        Returns:
            The result, which is also written to ``int8.json`` and ``int8.html``, with what was seen on the way.
        """
        unit = staged.unit.cpu()
        int8 = convert(unit, self.target)
        write = partial(export, labels=self.labels, preprocessing=self.preprocessing)
        artifact = self.output_dir / "int8.pt2"
        exports: list[ExportResult] = [write(int8, artifact)]
        failure: Exception | None = None
        try:
            for format, ending in _OTHER_FORMATS.items():
                if format in self.formats:
                    network = int8 if format == "aoti" else unit
                    exports.append(write(network, artifact.with_suffix(ending), format=format))
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
            float_side, int8_side = self._measure(unit, int8, artifact)
        findings = Findings() if self.inspect is None else self.inspect(int8)
        calibrator = next(iter(activation_quantizers(unit).values())).calibrator
        staged.put_int8(int8)
        int8_metrics = {} if self.evaluate is None else self.evaluate()
        assert int8.report is not None
        result = QuantizationResult(
            mode=forward.mode,
            target=self.target.name,
            calibrator=str(calibrator),
            calibrator_scores={} if self.comparison is None else self.comparison.scores,
            float_side=replace(float_side, metrics=float_metrics),
            int8_side=replace(int8_side, metrics=int8_metrics),
            report=int8.report,
            batch_size=BATCH_SIZE,
            artifact=str(artifact),
            exports=tuple(str(written.path) for written in exports),
            weights=self.weights,
            settings=dict(self.settings),
            analysis=findings.analysis,
        )
        artifact.with_suffix(".json").write_text(result.to_json())
        with going_on("writing the page"):
            advised = [] if result.analysis is None else [advice.layer for advice in result.analysis.advice()]
            page = result_page(result, findings.predictions, findings.tensor_charts(advised))
            artifact.with_suffix(".html").write_text(page, encoding="utf-8")
            rank_zero_info(f"lq: what was done, layer by layer, is in {artifact.with_suffix('.html')}")
        for written in exports:
            rank_zero_info(f"lq: INT8 model written to {written}")
        return Outcome(result, failure, findings)

    def _measure(self, float_unit: nn.Module, int8: Int8Module, artifact: Path) -> tuple[Side, Side]:
        """Size, latency and throughput of both, CPU against CPU: there INT8 kernels run in process, also after a fit
        on a GPU."""
        float_side = Side(size_bytes=_state_bytes(float_unit))
        int8_side = Side(size_bytes=artifact.stat().st_size)
        if self.evaluate is None:
            return float_side, int8_side
        models = {"float": float_unit, "int8": int8}
        inputs = {**int8.settings, **int8.example_inputs}
        with evaluating(float_unit):
            one = measure(models, repeat_samples(inputs, 1), 1)
            many = measure(models, repeat_samples(inputs, BATCH_SIZE), BATCH_SIZE)
        return (
            replace(float_side, latency=one["float"], batch=many["float"]),
            replace(int8_side, latency=one["int8"], batch=many["int8"]),
        )


def _state_bytes(module: nn.Module) -> int:
    """Size of the module's weights on disk."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()
