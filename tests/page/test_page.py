"""The page as a file: whole, self-contained, escaped, and it says what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.finished_run import BROKEN, FinishedRun
from helpers.page_reader import Reader, read
from helpers.sample_results import analysis_of, predictions_of
from lq.callback.end.page import result_page
from lq.callback.result import QuantizationResult
from lq.charts import layer_sqnr
from lq.results.report import LayerReport, QuantizationReport


def is_self_contained(text: str, reader: Reader) -> bool:
    return (
        all(link.startswith(("data:image/", "#")) for link in reader.links)
        and "link" not in reader.tags
        and "@import" not in text
        and re.search(r"url\(", text) is None
        and "http" not in re.sub(r'"data:[^"]*"', "", text)
    )


@pytest.mark.parametrize("run", ["ptq_run", "qat_run"])
def test_page_of_a_run(run: str, request: pytest.FixtureRequest) -> None:
    finished: FinishedRun = request.getfixturevalue(run)
    text = (finished.int8 / "int8.html").read_text()
    reader = read(text)
    assert text.startswith("<!DOCTYPE html>")
    assert is_self_contained(text, reader)
    assert len(text) < 2e6
    headings = {"Result", "Advice", "Charts", "Layers", "Settings"}
    if run == "ptq_run":  # the other one measures nothing
        headings.add("Engines")
    assert headings <= set(reader.texts["h2"])
    assert {link for link in reader.links if link.startswith("#")} == {f"#{name.lower()}" for name in headings}
    assert {"chart-sqnr", "chart-sensitivity", "chart-confusion", "chart-activations-2"} <= set(reader.ids)
    cells = " ".join(reader.texts["td"])
    for word in ("TensorDataset, 96 samples", "x86_avx2", "conv + batch_norm + relu"):
        assert word in cells


@pytest.mark.parametrize("run", ["ptq_run", "qat_run"])
def test_the_broken_layer_is_found(run: str, request: pytest.FixtureRequest) -> None:
    finished: FinishedRun = request.getfixturevalue(run)
    analysis = finished.result.analysis
    assert analysis is not None
    figure = layer_sqnr(analysis)
    assert figure.axes[0].get_yticklabels()[0].get_text() == BROKEN
    reader = read((finished.int8 / "int8.html").read_text())
    assert reader.texts["strong"][0] == BROKEN
    assert f"overrides={{'{BROKEN}': None" in reader.texts["code"][0]
    table = [text for text in reader.texts["td"] if text in "0368"]
    assert table[0] == BROKEN


def test_json_beside_the_page_is_the_result(ptq_run: FinishedRun) -> None:
    text = (ptq_run.int8 / "int8.json").read_text()
    assert QuantizationResult.from_json(text) == replace(ptq_run.result, settings=json.loads(text)["settings"])
    with pytest.raises(ValueError, match=r"not what lq writes to int8\.json"):
        QuantizationResult.from_json("{}")


def large_result(finished: FinishedRun, count: int = 71) -> QuantizationResult:
    analysis = analysis_of(count)
    layers = tuple(
        LayerReport(layer.name, layer.kind, "int8", "int8 per channel", "x: uint8") for layer in analysis.layers
    )
    report = QuantizationReport("ResNet", "x86", layers)
    return replace(finished.result, analysis=analysis, report=report)


def test_page_of_resnet50_is_small(ptq_run: FinishedRun) -> None:
    text = result_page(large_result(ptq_run), predictions_of(10))
    assert is_self_contained(text, read(text))
    assert len(text) < 2e6


def test_what_the_user_named_is_escaped(ptq_run: FinishedRun) -> None:
    nasty = '<script>alert("x")</script>&"'
    layer = replace(analysis_of(1).layers[0], name=nasty)
    result = replace(
        ptq_run.result,
        analysis=replace(analysis_of(1), layers=(layer,)),
        report=QuantizationReport(nasty, "x86", (LayerReport(nasty, "conv", "int8"),)),
        weights=nasty,
        settings={"overrides": {nasty: {"weight_bits": 4}}, nasty: nasty},
    )
    text = result_page(result)
    reader = read(text)
    assert reader.tags.count("script") == 1
    assert "alert" not in "".join(reader.texts["script"])
    assert nasty in reader.texts["td"]
    assert repr(nasty) in reader.texts["code"][0]


def test_without_an_analysis(ptq_run: FinishedRun) -> None:
    report = ptq_run.result.report
    untimed = report.with_times([{} for _ in report.layers])
    reader = read(result_page(replace(ptq_run.result, analysis=None, report=untimed)))
    assert "Advice" not in reader.texts["h2"]
    assert reader.texts["caption"] == ["Click a header to sort by it, again to reverse the order."]


def test_page_is_written_below_the_output_folder_alone(ptq_run: FinishedRun) -> None:
    written = {path.name for path in Path(ptq_run.int8).iterdir()}
    assert written == {"int8.pt2", "int8.json", "int8.html"}
