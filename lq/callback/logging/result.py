"""What the loggers are given when a model was quantized."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from lq.callback.end.inspection import Findings, warns_on_failure
from lq.callback.logging.hparams import write_hparams
from lq.callback.logging.layout import layout
from lq.callback.logging.loggers import takes_images, tensorboard_writer
from lq.callback.logging.model_graph import model_graph
from lq.callback.logging.summaries import add_chart, add_graph, add_histogram, add_values
from lq.callback.logging.tables import advice_markdown, engines_markdown, layers_markdown
from lq.callback.result import QuantizationResult
from lq.callback.settings import QuantizationSettings
from lq.charts.all_charts import gallery
from lq.numerics.functional import fake_quantize
from lq.numerics.histogram import Histogram
from lq.results.report import slower_text

#: Layers whose weight gets a figure as well; a histogram each of them has.
_WEIGHT_FIGURES = 8


def log_result(settings: QuantizationSettings, trainer: Any, result: QuantizationResult, findings: Findings) -> None:
    """Give every logger of the Trainer what it can show.

    All get the scalars and the settings, those with ``log_image`` the charts as well, and TensorBoard everything.

    Args:
        settings: of the callback, which are hyperparameters.
        trainer: the Trainer.
        result: of the conversion.
        findings: of the inspection.
    """
    charts = gallery(result.comparisons(), result.analysis, findings.predictions)
    hparams = hyperparameters(settings, result)
    for logger in trainer.loggers:
        logger.log_metrics(result.scalars(), step=trainer.global_step)
        writer = tensorboard_writer(logger)
        if writer is not None:
            with warns_on_failure("writing to TensorBoard"):
                _write(writer, trainer, result, findings)
                for chart in charts:
                    add_chart(writer, f"quantization/{chart.name}", chart, trainer.global_step)
                mine = {key: value for key, value in getattr(logger, "hparams", {}).items() if _is_plain(value)}
                metrics = result.scalars()
                write_hparams(Path(logger.log_dir) / "quantization", {**mine, **hparams}, metrics, trainer.global_step)
        else:
            with warns_on_failure(f"logging to {type(logger).__name__}"):
                logger.log_hyperparams({f"quantization/{name}": value for name, value in hparams.items()})
                if takes_images(logger):
                    for chart in charts:
                        image = imread(io.BytesIO(chart.png()), format="png")
                        pixels = (image[..., :3] * 255).round().astype("uint8")
                        logger.log_image(key=f"quantization/{chart.name}", images=[pixels])
        logger.save()


def hyperparameters(settings: QuantizationSettings, result: QuantizationResult) -> dict[str, Any]:
    """What runs are told apart by."""
    values: dict[str, Any] = {
        "mode": result.mode,
        "target": result.target,
        "calibrator": result.calibrator,
        "weights": settings.weights or "default",
        "overrides": len(settings.overrides.specs),
        "int8_layers": len(result.report.int8_layers),
        "float_layers": len(result.report.float_layers),
    }
    if settings.mode == "ptq":
        values["calibration_batches"] = settings.calibration_batches or "no limit"
    else:
        for name in ("observer_freeze", "batch_norm_freeze"):
            value = getattr(settings, name)
            values[name] = "never" if value is None else value
    return values


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _write(writer: Any, trainer: Any, result: QuantizationResult, findings: Findings) -> None:
    step = trainer.global_step
    for comparison in result.comparisons():
        name = comparison.name.replace(", ", "_").replace(" ", "_")
        writer.add_scalar(f"quantization/{name}/float", comparison.float_, step)
        writer.add_scalar(f"quantization/{name}/int8", comparison.int8, step)
    ranges = findings.activations if result.mode == "qat" else ()
    writer.add_custom_scalars(layout(result.scalars(), ranges))
    for name, table in layers_markdown(result.report, result.analysis).items():
        writer.add_text(f"quantization/{name}", table, step)
    if result.engines:
        writer.add_text("quantization/engines", engines_markdown(result.engines, result.batch_size), step)
    if result.report.slower_layers:
        writer.add_text("quantization/slower in INT8", slower_text(result.report.slower_layers, limit=20), step)
    if result.analysis is not None:
        advice = advice_markdown(result.analysis, result.settings.get("overrides"))
        writer.add_text("quantization/advice", advice, step)
    if findings.graph is not None:
        activations = {name: quantizer for name, (quantizer, _) in findings.activations.items()}
        add_graph(writer, model_graph(findings.graph, findings.graph_root, activations))
    for name, (_, observer) in findings.activations.items():
        if observer.counts.any():
            add_histogram(writer, f"activations/{name}", Histogram.of(observer), step)
    for name, quantized in findings.weights.items():
        weight, quantizer = quantized.weight.cpu(), quantized.quantizer.cpu()
        rounded = fake_quantize(weight, quantizer.scale, quantizer.zero_point, quantizer.spec)
        layer = name.removesuffix(".weight")
        add_values(writer, f"weights/{layer}/float", weight, step)
        add_values(writer, f"weights/{layer}/int8", rounded, step)
    harmful = [] if result.analysis is None else [layer.name for layer in result.analysis.by_harm()]
    shown = {f"weights/{layer}" for layer in harmful[:_WEIGHT_FIGURES]}
    for chart in findings.tensor_charts():
        if chart.name.startswith("activations/") or chart.name in shown:
            add_chart(writer, chart.name, chart, step, dpi=75)
