"""Charts: readable for any network, in both themes."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from helpers.sample_results import analysis_of, predictions_of
from lq.charts import (
    THEMES,
    Comparison,
    changed_predictions,
    confusion_difference,
    gallery,
    layer_latency,
    layer_sqnr,
    sensitivity,
    summary,
    tensor_histogram,
    theme,
    weight_histogram,
)
from lq.charts.theme import short_names
from lq.numerics.quantizer import Quantizer, activation_quantizer, weight_quantizer
from lq.schemes.targets import get_target

RESNET50 = 71


def drawn(figure: Figure) -> Any:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def labels_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize(("chart", "theme"), [(layer_sqnr, "light"), (layer_latency, "dark")])
def test_names_do_not_overlap_and_are_not_cut(chart: Any, theme: str) -> None:
    figure = chart(analysis_of(RESNET50, "backbone.encoder.stages.a_rather_long_name.layer3.blocks.{}.conv1"), theme)
    renderer = drawn(figure)
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == RESNET50
    assert all(not a.overlaps(b) for a, b in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert len(set(labels_of(figure))) == RESNET50


def test_names_beside_the_scatter_do_not_overlap() -> None:
    for count in (2, 3, RESNET50):
        figure = sensitivity(analysis_of(count))
        renderer = drawn(figure)
        for axes in figure.axes:
            # Of the text alone: an annotation's own extent has its line to the point in it.
            boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_most_harmful_layer_is_on_top() -> None:
    analysis = analysis_of(5)
    worst = analysis.by_harm()[0].name
    figure = layer_sqnr(analysis)
    drawn(figure)
    assert labels_of(figure)[0] == worst
    low, high = figure.axes[0].get_ylim()
    assert low > high  # row 0 is the uppermost


def test_axes_are_named_with_units() -> None:
    analysis = analysis_of(4)
    assert layer_sqnr(analysis).axes[0].get_xlabel().startswith("SQNR, dB")
    assert layer_latency(analysis).axes[0].get_xlabel() == "time, ms per sample"
    upper, lower = sensitivity(analysis).axes
    assert upper.get_xscale() == "log"
    assert "dB" in upper.get_ylabel()
    assert lower.get_xlabel().startswith("parameters")
    confusion = confusion_difference(predictions_of(4)).axes[0]
    assert (confusion.get_xlabel(), confusion.get_ylabel()) == ("predicted class", "true class")


def test_what_was_not_measured_is_said() -> None:
    analysis = analysis_of(3)
    blind = replace(
        analysis,
        layers=tuple(
            replace(layer, only_sqnr_db=None, all_but_sqnr_db=None, float_ms=None, int8_ms=None)
            for layer in analysis.layers
        ),
    )
    assert "was not measured" in sensitivity(blind).axes[0].texts[0].get_text()
    assert "not timed" in layer_latency(blind).axes[0].texts[0].get_text()
    assert [chart.name for chart in gallery((), blind)] == ["sqnr"]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_predictions(classes: int, theme: str) -> None:
    predictions = predictions_of(classes)
    difference = predictions.confusion(predictions.int8_classes) - predictions.confusion(predictions.float_classes)
    assert int(difference.sum()) == 0
    figure = confusion_difference(predictions, theme)
    assert len(figure.axes[0].get_yticks()) == min(classes, 24)
    drawn(figure)
    grid = changed_predictions(predictions, theme)
    drawn(grid)
    titles = [axes.get_title("left") for axes in grid.axes]
    assert sum(bool(title) for title in titles) == len(predictions.changed)
    first = int(predictions.changed[0])
    assert f"INT8 {predictions.name(int(predictions.int8_classes[first]))}" in titles[0]


def calibrated(values: torch.Tensor) -> Quantizer:
    quantizer = activation_quantizer(get_target("x86").activation, "histogram")
    quantizer.observer(values)
    quantizer.update_qparams()
    return quantizer


def test_tensor_histogram_shows_what_is_clipped() -> None:
    values = torch.linspace(0, 1, 10_001)
    quantizer = calibrated(values)
    whole = tensor_histogram("x", quantizer)
    assert not any("outside" in text.get_text() for text in whole.axes[0].get_legend().get_texts())
    quantizer.set_range(torch.tensor(0.0), torch.tensor(0.25))
    cut = tensor_histogram("x", quantizer, "dark")
    outside = next(t.get_text() for t in cut.axes[0].get_legend().get_texts() if "outside" in t.get_text())
    assert float(outside.split()[1].removesuffix("%")) == pytest.approx(75, abs=1.5)
    with pytest.raises(ValueError, match=r"'x' has a MinMaxObserver, which keeps no histogram"):
        tensor_histogram("x", activation_quantizer(get_target("x86").activation, "minmax"))


def test_weight_histogram_names_the_sqnr() -> None:
    weight = torch.randn(16, 8, 3, 3)
    quantizer = weight_quantizer(get_target("x86").weight, weight)
    quantizer.refresh(weight)
    figure = weight_histogram("conv.weight", weight, quantizer)
    assert figure._suptitle is not None  # type: ignore[attr-defined]
    assert "SQNR 4" in figure._suptitle.get_text()  # type: ignore[attr-defined]


def test_svg_has_text_and_both_themes_differ_in_colour_alone() -> None:
    chart = next(
        chart for chart in gallery([Comparison("size, MB", 40.0, 10.0)], analysis_of(3)) if chart.name == "sqnr"
    )
    light, dark = (drawing.decode() for drawing in chart.svg())
    assert "layer.0.conv" in light
    assert light != dark
    assert light.count("<path") == dark.count("<path")
    assert THEMES["dark"].background in dark
    assert not any(color in dark for color in set(THEMES["light"].colors) - set(THEMES["dark"].colors))


def test_summary_has_a_panel_for_each_quantity() -> None:
    figure = summary([Comparison("size, MB", 40.0, 10.0, "4.00x smaller"), Comparison("val_acc", 0.9, 0.89)])
    assert [axes.get_title() for axes in figure.axes] == ["size, MB", "val_acc"]


def test_short_names_stay_apart() -> None:
    names = [f"model.{'block.' * 12}{i}.{'x' * 30}" for i in range(12)]
    short = short_names(names, 30)
    assert len(set(short)) == 12
    assert all(len(name) <= 30 for name in short)
    assert short_names(["conv1"]) == ["conv1"]


def test_unknown_theme() -> None:
    with pytest.raises(ValueError, match="theme='sepia' is unknown; choose one of 'light', 'dark'"):
        layer_sqnr(analysis_of(2), "sepia")


def test_pyplot_is_not_needed() -> None:
    source = theme.__file__
    assert source is not None
    assert not [name for name, m in sys.modules.items() if name.startswith("lq.") and hasattr(m, "plt")]
