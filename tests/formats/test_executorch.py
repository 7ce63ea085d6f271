"""ExecuTorch programs: compiled here, run by its Python runtime with the XNNPACK kernels that a phone has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

import lq
from helpers.classifiers import Wrapped, loader
from helpers.modes import both_modes
from helpers.networks import Gated, WideResidual, randomize_batch_norm
from helpers.quantized import calibrated, noise
from lq.deployment.formats import read_metadata
from lq.formats.executorch.write import MAX_BATCH, lower
from lq.formats.pt2.write import export_program

pytest.importorskip(
    "executorch", reason="ExecuTorch is not installed: pip install 'lightning-quantization[executorch]'"
)

# ExecuTorch's compiler warns of its own use of torch and torchao as it is imported by whoever is the first.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = noise(8, seed=1)
LABELS = tuple("abcdefghij")
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module", params=[WideResidual, Gated])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return calibrated(randomize_batch_norm(request.param()), X)


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.pte"
    result = lq.export(network, path, labels=LABELS, preprocessing=PREPROCESSING)
    (verification,) = result.verifications
    assert (result.format, result.target, verification.runtime) == ("executorch", "xnnpack", "executorch")
    return path


def simulation(network: nn.Module) -> lq.Int8Module:
    int8 = lq.convert(network, "xnnpack")
    int8.execution = "simulation"
    return int8


def test_it_computes_what_the_simulation_does(network: nn.Module, file: Path) -> None:
    model, expected = lq.load(file), simulation(network)
    assert model.runtime == "executorch"
    # XNNPACK's sums and pools are in fixed point, and round some numbers in the middle the other way.
    difference = (model(X) - expected(X)).square().mean().sqrt()
    assert difference < 0.05 * expected(X).square().mean().sqrt()
    steps = model(X) / lq.convert(network, "xnnpack").get_buffer("fc.scale")
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    for size in (1, 3, 8):
        actual = model(X[:size].numpy())
        assert actual.dtype is torch.float32
        assert torch.equal(actual, model(X)[:size])
    # Channels last, as images come; a view into a larger batch.
    assert torch.equal(model(X.to(memory_format=torch.channels_last)), model(X))
    assert torch.equal(model(X[::2]), model(X)[::2])
    # What was returned stays what it was when the model runs again.
    kept = model(X)
    expected_again = kept.clone()
    model(X * 2)
    assert torch.equal(kept, expected_again)
    many = X.repeat(MAX_BATCH // 4, 1, 1, 1)  # more than its memory is planned for
    assert torch.equal(model(many), model(X).repeat(MAX_BATCH // 4, 1))


def test_memory_for_the_largest_batch(file: Path) -> None:
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    method = runtime.load_program(file).load_method("forward")
    assert method.metadata.input_tensor_meta(0).sizes() == (MAX_BATCH, *X.shape[1:])


def test_what_is_in_it(file: Path) -> None:
    metadata = read_metadata(file)
    assert metadata.labels == LABELS
    assert metadata.preprocessing == PREPROCESSING
    assert metadata.target == "xnnpack"
    assert metadata.tensors[0].shape == (None, 3, 16, 16)


class Overhanging(nn.Module):
    """Max pools whose last windows hang over the image, as in SqueezeNet and GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, ceil_mode=True)  # 14 pixels in 7 windows, not 6
        x = F.max_pool2d(self.second(x), (2, 3), padding=(0, 1), ceil_mode=True)  # not all is positive
        return self.fc(x.flatten(1))


def test_pools_that_hang_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = calibrated(Overhanging(), X, target="xnnpack")
    int8 = simulation(network)
    lowered = lower(export_program(int8, free_sizes=False).exported, {}).exported_program()
    outside = {str(node.target) for node in lowered.graph.nodes if node.op == "call_function"}
    assert not [name for name in outside if "pool" in name]
    lq.export(network, tmp_path / "int8.pte")
    model = lq.load(tmp_path / "int8.pte")
    for size in (1, 8):
        torch.testing.assert_close(model(X[:size]), int8(X[:size]))


def test_all_int8_operators_are_delegated(network: nn.Module) -> None:
    int8 = simulation(network)
    program = export_program(int8, free_sizes=False).exported
    expected = Counter(str(node.target).split(".")[1] for node in int8.graph.nodes if node.op == "call_function")
    exported = lower(program, {}).exported_program()
    outside = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert not [name for name in outside if "executorch_call_delegate" not in name and "getitem" not in name]
    inside: Counter[str] = Counter()
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            delegate = getattr(exported.graph_module, node.target)
            assert delegate.backend_id == "XnnpackBackend"
            names = (n.target.__name__ for n in delegate.original_module.graph.nodes if n.op == "call_function")
            inside.update(name.removeprefix("aten.").partition(".")[0] for name in names)
    assert inside["convolution"] == expected["conv2d"]
    assert inside["linear"] == expected["linear"]
    assert inside["add"] >= expected["add"]
    assert inside["mul"] == expected["mul"]
    assert inside["cat"] == expected["cat"]


def test_wrong_inputs(file: Path) -> None:
    model = lq.load(file)
    with pytest.raises(ValueError, match=r"input 'x' must have the shape \(any, 3, 16, 16\), got \(8, 3, 20, 20\)"):
        model(torch.zeros(8, 3, 20, 20))
    with pytest.raises(TypeError, match="input 'x' must be float32, got uint8"):
        model(torch.zeros(8, 3, 16, 16, dtype=torch.uint8))


def test_threads(file: Path) -> None:
    """All networks share one pool: one that is loaded for another number of threads must not break those before it."""
    first = lq.load(file)
    expected = first(X)
    one, three = lq.load(file, threads=1), lq.load(file, threads=3)
    for model in (first, one, three, first, three):
        assert torch.equal(model(X), expected)


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    (tmp_path / "half.pte").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.pte' is not an ExecuTorch program, or is damaged: it has \d+ bytes"):
        lq.load(tmp_path / "half.pte")
    content = bytearray(whole)
    content[-len(whole) // 3] ^= 1
    (tmp_path / "flipped.pte").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.pte' is damaged: its content is not what lq wrote"):
        lq.load(tmp_path / "flipped.pte")


def test_networks_of_other_targets_are_refused(tmp_path: Path) -> None:
    int8 = lq.convert(calibrated(randomize_batch_norm(WideResidual()), X, target="x86"))
    with pytest.raises(ValueError, match="Export the prepared model, from before lq.convert"):
        lq.export(int8, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_fewer_bits_and_float_layers(tmp_path: Path) -> None:
    overrides = {"conv1": {"weight_bits": 4, "activation_bits": 5}, "stem": {"activation_bits": 6}, "conv2": None}
    model = lq.calibrate(lq.prepare(WideResidual().eval(), X, target="xnnpack", overrides=overrides), [X])
    lq.export(model, tmp_path / "model.pte")
    expected = simulation(model)(X)
    difference = lq.load(tmp_path / "model.pte")(X) - expected
    assert difference.square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_layers_that_xnnpack_does_not_have(tmp_path: Path) -> None:
    volume = torch.randn(4, 3, 4, 8, 8)
    network = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5))
    model = lq.calibrate(lq.prepare(network.eval(), volume, target="xnnpack"), [volume])
    with pytest.raises(ValueError, match=r"XNNPACK does not take .* of the weights '0\.weight'.*can stay in float"):
        lq.export(model, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


@both_modes
def test_from_a_training(mode: str, tmp_path: Path) -> None:
    callback = lq.QuantizationCallback(mode=mode, target="xnnpack", export=["executorch"], output_dir=str(tmp_path))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(Wrapped(), loader(), loader())
    assert (tmp_path / "int8.pte").is_file()
    assert callback.result is not None
    (row,) = (engine for engine in callback.result.engines if engine.runtime == "executorch")
    assert (row.file, row.title, row.note) == ("int8.pte", "INT8, ExecuTorch", "")
    assert row.metrics
    found = lq.benchmark([tmp_path / "int8.pte"], batch_sizes=[2], threads=[1], seconds=0.1)
    assert [(each.model, each.runtime) for each in found.rows] == [("int8.pte", "executorch")]
