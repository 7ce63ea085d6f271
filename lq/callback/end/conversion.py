"""From a unit with ranges to its INT8 network: files, figures, and INT8 in the unit's place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lq.analysis.timing import time_layers
from lq.callback.end.engine_runs import Contender, contenders, time_engines, validate_engines
from lq.callback.end.engines import EAGER, Engine
from lq.callback.end.inspection import Findings, warns_on_failure
from lq.callback.end.joining import JoinedFile, export_joined
from lq.callback.end.page import result_page
from lq.callback.end.stopwatch import Stopwatch
from lq.callback.outputs import NETWORK, OTHER_FORMATS, OUTPUTS, PAGE, RESULT
from lq.callback.result import QuantizationResult, Side
from lq.callback.steps.batches import repeat_samples
from lq.callback.steps.between import Between
from lq.callback.steps.stages import StagedUnit
from lq.charts.predictions import Predictions
from lq.deployment.engine_module import IN_PROCESS, EngineModule
from lq.deployment.export import ExportResult, pays_off
from lq.deployment.formats import FORMATS, FormatName
from lq.int8.module import Int8Module
from lq.results.report import slower_text
from lq.results.tuning import Tuning
from lq.schemes.targets import Target
from lq.util.cpu import has_onednn_int8, has_vnni
from lq.util.file_sets import replaced_as_a_whole
from lq.util.files import write_text
from lq.workflow.comparison import CalibratorComparison
from lq.workflow.convert import convert
from lq.workflow.prepare import activation_quantizers

#: Samples in the batch that throughput is measured with.
BATCH_SIZE = 32


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
        compare: classes by the float unit, by INT8 and by other engines, see
            :func:`~lq.callback.end.predictions.compare_predictions`.
        watch: times the stages.
        optional: those of ``formats`` that may fail.
        evaluate: metrics of the LightningModule as it is; None to measure nothing, not even latency.
        float_seconds: what that took with the float model.
        comparison: what ``calibrator="auto"`` compared.
        tuning: what was tried to keep to ``max_drop``.
        inspect: looks at the prepared unit and its INT8 network, given the layers' times where there are some; None not
            to.
        settings: what to tell of the run.
        between: what the steps compute between the parts of the network, where they call it so and that is a graph.
    """

    output_dir: Path | None
    weights: str
    target: Target
    compare: Callable[..., tuple[Predictions | None, dict[str, float]]]
    watch: Stopwatch = field(default_factory=Stopwatch)
    formats: Sequence[FormatName] = ()
    optional: Sequence[FormatName] = ()
    labels: Sequence[str] | None = None
    preprocessing: Mapping[str, Any] | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    float_seconds: float = 0.0
    comparison: CalibratorComparison | None = None
    tuning: Tuning | None = None
    inspect: Callable[[Int8Module, list[dict[str, float]] | None], Findings] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    between: Callable[[Int8Module], Between | None] = lambda int8: None

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
        if (self.output_dir / PAGE).exists():
            rank_zero_info(f"lq: what was done, layer by layer, is in {self.output_dir / PAGE}")
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
        unit, watch = staged.unit.cpu(), self.watch
        with watch.stage("conversion"):
            int8 = convert(unit, self.target)
        with watch.stage("export"):
            between = self.between(int8)
        files, failure = self._export(unit, int8, folder, between)
        exports = [file.export for file in files]
        forward = staged.prepared_forward
        if has_onednn_int8() and not has_vnni() and self.target.weight.quant_max > 64:
            rank_zero_warn(
                f"lq: this CPU has no VNNI instructions, so its INT8 kernels get the 8-bit weights of target "
                f"{self.target} rounded to 7 bits, where their sums cannot overflow; the saved model keeps 8 bits. "
                f"To deploy on such CPUs, train or calibrate for them: QuantizationCallback(target='x86_avx2')"
            )
        engines, times = self._measure(staged, int8, files)
        predictions = self._judge(staged, int8, engines)
        findings = Findings()
        if self.inspect is not None:
            with watch.stage("analysis"):
                findings = self.inspect(int8, times)
        findings = replace(findings, predictions=predictions)
        calibrator = next(iter(activation_quantizers(unit).values())).calibrator
        staged.put_int8(int8)
        int8_metrics: dict[str, float] = {}
        if self.evaluate is not None:
            with watch.stage("evaluation"):
                int8_metrics = self.evaluate()
        measured = {
            EAGER: replace(engines[EAGER].engine, metrics=float_metrics),
            IN_PROCESS: replace(engines[IN_PROCESS].engine, metrics=int8_metrics),
        }
        rows = tuple(measured.get(name, contender.engine) for name, contender in engines.items())
        assert int8.report is not None
        kept = self.output_dir
        result = QuantizationResult(
            mode=forward.mode,
            target=self.target.name,
            calibrator=str(calibrator),
            calibrator_scores={} if self.comparison is None else self.comparison.scores,
            float_side=_side(measured[EAGER]),
            int8_side=_side(measured[IN_PROCESS]),
            report=int8.report,
            batch_size=BATCH_SIZE,
            artifact="" if kept is None else str(kept / FORMATS[NETWORK].file),
            exports=() if kept is None else tuple(str(kept / written.path.name) for written in exports),
            weights=self.weights,
            settings=dict(self.settings),
            analysis=findings.analysis,
            tuning=self.tuning,
            engines=rows if self.evaluate is not None else (),
        )
        with watch.stage("page"), warns_on_failure("writing the page"):
            advised = [] if result.analysis is None else [advice.layer for advice in result.analysis.advice()]
            so_far = replace(result, stages=dict(watch.seconds))
            page = result_page(so_far, findings.predictions, findings.tensor_charts(advised))
            write_text(folder / PAGE, page)
        result = replace(result, stages=dict(watch.seconds))
        write_text(folder / RESULT, result.to_json())
        return Outcome(result, failure, findings), exports

    def _export(
        self, unit: nn.Module, int8: Int8Module, folder: Path, between: Between | None
    ) -> tuple[list[JoinedFile], Exception | None]:
        """The files, and what failed beside ``int8.pt2``; a file that was not asked for is left out with a warning."""
        files: list[JoinedFile] = []

        def write(name: FormatName) -> None:
            about = {"labels": self.labels, "preprocessing": self.preprocessing}
            written = export_joined(name, folder, unit, int8, between, **about)
            self.watch.add("export", written.export.seconds)
            self.watch.add("verification", written.export.verification_seconds)
            files.append(written)

        write(NETWORK)
        for name in OTHER_FORMATS:
            if name not in self.formats:
                continue
            try:
                if name not in self.optional or pays_off(unit, name):
                    write(name)
            except Exception as error:
                if name not in self.optional:
                    return files, error
                file = FORMATS[name].file
                rank_zero_warn(f"lq: {file}, which is written by default, is left out: {error}")
        return files, None

    def _measure(
        self, staged: StagedUnit, int8: Int8Module, files: list[JoinedFile]
    ) -> tuple[dict[str, Contender], list[dict[str, float]] | None]:
        """Every engine with its size, and with ``evaluate`` how long it takes, CPU against CPU: there INT8 kernels run,
        also after a fit on a GPU. The times of the layers are those for one sample."""
        unit = staged.unit
        times = None
        with self.watch.stage("timing"):
            engines = contenders(unit, int8, files)
            if self.evaluate is not None:
                time_engines(unit, int8, engines, BATCH_SIZE)
                with warns_on_failure("timing the layers"):
                    times = time_layers(unit, int8, repeat_samples(int8.example_inputs, 1))
        if times is not None and int8.report is not None:
            int8.report = int8.report.with_times(times)
            if int8.report.slower_layers:
                rank_zero_info(f"lq: {slower_text(int8.report.slower_layers)}")
        return {contender.engine.runtime: contender for contender in engines}, times

    def _judge(self, staged: StagedUnit, int8: Int8Module, engines: Mapping[str, Contender]) -> Predictions | None:
        """What the engines make of the validation data, noted with each; predictions of float and INT8 in process."""
        predictions = None
        with self.watch.stage("evaluation"):
            if self.evaluate is not None:
                validate_engines(staged, int8, list(engines.values()), self.evaluate, self.float_seconds)
            elif self.inspect is None:
                return None
            others = {} if self.evaluate is None else {name: c for name, c in engines.items() if c.run is not None}
            runs = {name: EngineModule(int8, c.run) for name, c in others.items() if c.run and name != EAGER}
            with warns_on_failure("comparing predictions"):
                predictions, agreement = self.compare(staged, int8, runs)
                if agreement:
                    agreement[EAGER] = 1.0
                for name, share in agreement.items():
                    engines[name].engine = replace(engines[name].engine, agreement=share)
        return predictions


def _side(engine: Engine) -> Side:
    return Side(engine.metrics, engine.size_bytes, engine.latency, engine.batch)
