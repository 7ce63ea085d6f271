"""What TensorBoard's event files and other loggers hold when a run has ended, read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from helpers.finished_run import BROKEN, FinishedRun
from lq.callback.logging.tables import advice_markdown
from lq.results.analysis import Analysis, LayerAnalysis


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def qat(qat_run: FinishedRun) -> EventAccumulator:
    return events(qat_run.tensorboard)


@pytest.fixture(scope="module")
def ptq(ptq_run: FinishedRun) -> EventAccumulator:
    return events(ptq_run.tensorboard)


def test_float_and_int8_side_by_side(ptq: EventAccumulator, ptq_run: FinishedRun) -> None:
    tags = set(ptq.Tags()["scalars"])
    assert set(ptq_run.result.scalars()) <= tags
    for name in ("val_acc", "size_MB", "latency_p50_ms_batch_1"):
        assert {f"quantization/{name}/float", f"quantization/{name}/int8"} <= tags
    logged = ptq.Scalars("quantization/val_acc/int8")[0].value
    assert logged == pytest.approx(ptq_run.result.int8_side.metrics["val_acc"])


def test_ranges_over_training(qat: EventAccumulator, ptq: EventAccumulator) -> None:
    low, high = (qat.Scalars(f"ranges/input/{end}") for end in ("low", "high"))
    assert [event.step for event in high] == list(range(18))
    assert all(a.value < 0 < b.value for a, b in zip(low, high, strict=True))
    assert len({event.value for event in high}) > 1  # until they are frozen
    assert not any(tag.startswith("ranges/") for tag in ptq.Tags()["scalars"])


def test_histograms_of_every_quantizer(qat: EventAccumulator, ptq: EventAccumulator) -> None:
    for found in (qat, ptq):
        tags = set(found.Tags()["histograms"])
        assert {"activations/input", "activations/2", "activations/5"} <= tags
        assert {f"weights/{layer}/{kind}" for layer in "038" for kind in ("float", "int8")} <= tags
        histogram = found.Histograms("weights/3/float")[0].histogram_value
        assert histogram.num == sum(histogram.bucket) == 16 * 8 * 9
    # Behind a ReLU; the values are the float model's, also where they lie outside the range.
    histogram = ptq.Histograms("activations/2")[0].histogram_value
    assert histogram.min == 0.0
    assert histogram.bucket_limit[-1] >= histogram.max > 1.0


def test_figures(ptq: EventAccumulator, qat: EventAccumulator) -> None:
    expected = {"summary", "sqnr", "sensitivity", "latency", "confusion"}
    assert {f"quantization/{name}" for name in expected} <= set(ptq.Tags()["images"])
    for found in (ptq, qat):
        assert {"activations/input", "activations/2", "weights/3"} <= set(found.Tags()["images"])
    image = ptq.Images("quantization/sqnr")[0]
    pixels = imread(io.BytesIO(image.encoded_image_string), format="png")
    assert pixels.shape == (image.height, image.width, 4)
    assert pixels[..., :3].std() > 0.05


def test_graph_marks_int8(ptq: EventAccumulator) -> None:
    nodes = {node.name: node for node in ptq.Graph().node}
    for name in "012345":
        assert nodes[name].attr["precision"].s == b"int8", name
        assert nodes[name].device == "/device:INT8:0"
    assert nodes["6"].attr["precision"].s == b"float"  # the pooling
    assert nodes["0"].op == "Conv2d"
    assert list(nodes["3"].input) == ["2"]
    assert nodes["2"].attr["quantized_to"].s.startswith(b"uint8 [0, 255] affine")


def test_text_tables(ptq: EventAccumulator) -> None:
    def text(tag: str) -> str:
        value: bytes = ptq.Tensors(f"quantization/{tag}/text_summary")[0].tensor_proto.string_val[0]
        return value.decode()

    header, rule, first, *_ = text("measured").splitlines()
    assert header.startswith("| layer | gain in float, dB |")
    assert header.count("|") == rule.count("|") == first.count("|")
    assert first.startswith(f"| {BROKEN} |")
    assert "conv + batch_norm + relu" in text("layers")
    assert f"'{BROKEN}': None" in text("advice")


def test_custom_scalars_group_float_and_int8(qat: EventAccumulator, ptq: EventAccumulator) -> None:
    def charts(found: EventAccumulator) -> dict[str, dict[str, list[str]]]:
        layout = layout_pb2.Layout()
        layout.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
        return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}

    assert charts(ptq)["float and INT8"]["val_acc"] == ["^float/val_acc$", "^int8/val_acc$"]
    assert "ranges in training" not in charts(ptq)
    assert charts(qat)["ranges in training"]["input"] == ["^ranges/input/low$", "^ranges/input/high$"]


def test_hyperparameters_with_final_metrics(ptq_run: FinishedRun) -> None:
    found = events(ptq_run.tensorboard / "quantization")

    def content(tag: str) -> plugin_data_pb2.HParamsPluginData:
        parsed = plugin_data_pb2.HParamsPluginData()
        parsed.ParseFromString(found.SummaryMetadata(tag).plugin_data.content)
        return parsed

    values = content("_hparams_/session_start_info").session_start_info.hparams
    assert values["mode"].string_value == "ptq"
    assert values["target"].string_value == "x86_avx2"
    assert values["calibrator"].string_value == "minmax"
    assert values["overrides"].number_value == 0
    assert values["int8_layers"].number_value == 3
    assert values["width"].number_value == 8  # the user's own
    assert {"float/val_acc", "int8/val_acc", "int8/latency_p50_ms"} <= set(found.Tags()["scalars"])
    # One run that says which columns there are would say so for all.
    for run in (found, events(ptq_run.tensorboard)):
        with pytest.raises(KeyError):
            run.SummaryMetadata("_hparams_/experiment")


def test_event_files_are_small(qat_run: FinishedRun) -> None:
    size = sum(path.stat().st_size for path in qat_run.tensorboard.rglob("events.*"))
    assert size < 1e6


def test_csv_logger_has_all_scalars(ptq_run: FinishedRun, qat_run: FinishedRun) -> None:
    with open(ptq_run.csv / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name, value in ptq_run.result.scalars().items():
        assert [float(row[name]) for row in rows if row[name]] == [pytest.approx(value)]
    with open(qat_run.csv / "metrics.csv") as file:
        assert sum(bool(row["ranges/input/high"]) for row in csv.DictReader(file)) == 18
    settings = yaml.safe_load((ptq_run.csv / "hparams.yaml").read_text())
    assert settings["quantization/calibrator"] == "minmax"


def test_a_logger_that_takes_images_gets_the_charts(ptq_run: FinishedRun) -> None:
    logger = ptq_run.pictures
    assert set(ptq_run.result.scalars()) <= set(logger.metrics)
    assert logger.settings["quantization/mode"] == "ptq"
    (pixels,) = logger.images["quantization/sqnr"]
    assert pixels.dtype == "uint8"
    assert pixels.shape[2] == 3


def test_advice_keeps_what_is_overridden_already() -> None:
    layers = (LayerAnalysis("0", "conv", "int8", all_but_sqnr_db=40.0, only_sqnr_db=12.0, parameters=9, weights=9),)
    analysis = Analysis("Net", "x86", samples=2, output_sqnr_db=10.0, layers=layers)
    text = advice_markdown(analysis, {"3": {"weight_bits": 6}})
    assert "`QuantizationCallback(overrides={'3': {'weight_bits': 6}, '0': None})`" in text
