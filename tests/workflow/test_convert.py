"""Convert: INT8 kernels that compute what the prepared model simulates."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lq
from helpers.exact import assert_kernels_are_exact
from helpers.networks import Residual, SharedResidual, networks, randomize_batch_norm
from helpers.quantized import TARGET, noise, quantized
from lq.int8.module import Int8Module
from lq.util.cpu import has_onednn_int8, has_vnni

# torch's remark on even kernels with padding="same", which one of the networks has.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

X = noise(32, seed=1)
kernels = pytest.mark.skipif(not has_onednn_int8(), reason="no oneDNN INT8 kernels on this machine")


def prepared_and_int8(model: nn.Module, x: Tensor = X, target: str = TARGET) -> tuple[nn.Module, Int8Module]:
    return model, quantized(randomize_batch_norm(model), x, example=x[:4], target=target)


def assert_on_the_same_grids(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rare values between two steps, which the rounding of folded biases and scales may move."""
    off = (actual - expected).abs() / expected.abs().max()
    assert off.max() < 0.03
    assert (off > 1e-4).float().mean() < 0.1


@pytest.mark.parametrize("name", networks())
def test_simulation_is_the_prepared_model(name: str) -> None:
    model, int8 = prepared_and_int8(networks()[name])
    int8.execution = "simulation"
    off = (int8(X) - model(X)).abs() / model(X).abs().max()
    # Biases lie on the grid of the sums: less than a step of 255 in the mean.
    assert off.max() < 0.03
    assert off.mean() < 1 / 255
    assert int8.report.fold_difference < 1e-4


@kernels
@pytest.mark.parametrize("name", networks())
def test_kernels_are_the_simulation(name: str) -> None:
    _, int8 = prepared_and_int8(networks()[name])
    int8.execution = "simulation"
    simulated = int8(X)
    int8.execution = "kernels"
    assert_on_the_same_grids(int8(X), simulated)
    assert_kernels_are_exact(int8, X)
    assert int8.kernels().float_ops == []


@kernels
def test_8_bit_weights_never_saturate() -> None:
    # On a CPU without VNNI the kernels get these weights rounded to 7 bits; 16-bit sums would be far off.
    _, int8 = prepared_and_int8(Residual(), X + 5, target="x86")
    ran = int8(X + 5)
    int8.execution = "simulation"
    simulated = int8(X + 5)
    if has_vnni():
        assert_on_the_same_grids(ran, simulated)
    torch.testing.assert_close(ran, simulated, atol=0.05 * simulated.abs().max().item(), rtol=0)
    assert int8.state_dict()["stem.weight"].abs().max() == 127


@kernels
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "squeezenet1_1",
        "resnet50",
        "regnet_y_400mf",
        pytest.param("densenet121", marks=pytest.mark.thorough),
    ],
)
def test_torchvision_networks(name: str) -> None:
    x = torch.randn(4, 3, 64, 64)
    _, int8 = prepared_and_int8(torchvision.models.get_model(name, num_classes=10), x)
    int8.execution = "simulation"
    simulated = int8(x)
    int8.execution = "kernels"
    torch.testing.assert_close(int8(x), simulated, atol=0.1 * simulated.abs().max().item(), rtol=0)


def executed(int8: Int8Module, x: Tensor) -> dict[str, int]:
    int8(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        int8(x)
    return {event.key: event.count for event in profiler.key_averages()}


@kernels
@pytest.mark.filterwarnings("ignore:.*Profiler.*")
def test_resnet18_executes_int8_kernels_and_no_float_convolution() -> None:
    x = torch.randn(2, 3, 32, 32)
    _, int8 = prepared_and_int8(torchvision.models.resnet18(num_classes=10), x)
    ran = executed(int8, x)
    assert ran["onednn::qconv2d_pointwise"] == 20
    assert ran["onednn::qlinear_pointwise"] == 1
    assert ran["quantized::max_pool2d"] == 1
    assert not {"aten::convolution", "aten::conv2d", "aten::linear", "aten::addmm", "aten::relu"} & ran.keys()
    # Eight residual sums are done by the convolutions themselves.
    fused = [n for n in int8.kernels().graph.nodes if n.target is torch.ops.onednn.qconv2d_pointwise.binary]
    assert len(fused) == 8
    int8.execution = "simulation"
    assert not any("onednn" in key for key in executed(int8, x))


@kernels
def test_a_sum_does_not_overwrite_what_is_read_later() -> None:
    _, int8 = prepared_and_int8(SharedResidual())
    sums = [n for n in int8.kernels().graph.nodes if n.target is torch.ops.onednn.qconv2d_pointwise.binary]
    copies = [n for n in int8.kernels().graph.nodes if n.target is torch.clone]
    assert (len(sums), len(copies)) == (2, 1)
    assert torch.equal(int8(X), int8(X))


@kernels
@pytest.mark.parametrize("channels", [8, 16, 24])
def test_strided_pointwise_convolutions_are_right_every_time(channels: int) -> None:
    # oneDNN's AVX2 kernel for these has a race between threads where channels are no multiple of 16.
    x = torch.randn(32, channels, 8, 8)
    model = nn.Sequential(nn.Conv2d(channels, 24, 1, stride=2), nn.ReLU(), nn.Conv2d(24, 24, 1, stride=(1, 2)))
    _, int8 = prepared_and_int8(model, x)
    expected = int8(x)
    int8.execution = "simulation"
    torch.testing.assert_close(expected, int8(x), atol=0.02 * expected.abs().max().item(), rtol=0)
    int8.execution = "kernels"
    assert all(torch.equal(int8(x), expected) for _ in range(30))


@kernels
def test_batch_sizes_in_any_order() -> None:
    _, int8 = prepared_and_int8(Residual())
    expected = int8(X)
    for size in (1, 7, 32, 1, 5):
        torch.testing.assert_close(int8(X[:size]), expected[:size])


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    x = torch.randn(4, 2, *[6] * dims)
    model = nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, 4, 3), nn.Flatten()).eval()
    lq.calibrate(lq.prepare(model, x, target="x86_avx2"), [x])
    int8 = lq.convert(model)
    torch.testing.assert_close(int8(x), model(x), atol=0.03 * model(x).abs().max().item(), rtol=0)


def reference_fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    bias = torch.zeros_like(factor) if bias is None else bias.detach()
    return weight.detach() * factor[:, None, None, None], (bias - norm.running_mean) * factor + norm.bias.detach()


@pytest.mark.parametrize("bias", [False, True])
def test_folding_keeps_the_integers(bias: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)
    model = randomize_batch_norm(nn.Sequential(conv, norm, nn.ReLU())).eval()
    norm.weight.data = torch.tensor([1.5, -0.5, 0.0, 1e-3])  # plain, flipped, dead, tiny
    lq.calibrate(lq.prepare(model, X, target="x86"), [X])
    int8 = lq.convert(model)
    state = int8.state_dict()
    scale = conv.weight.detach().flatten(1).abs().amax(1) / 127
    integers = torch.round(conv.weight.detach() / scale[:, None, None, None])
    assert state["0.weight"].dtype == torch.int8
    assert torch.equal(state["0.weight"][0].float(), integers[0])
    assert torch.equal(state["0.weight"][1].float(), -integers[1])
    assert not state["0.weight"][2].any()
    folded, folded_bias = reference_fold(conv.weight, conv.bias, norm)
    dequantized = state["0.weight"].float() * state["0.weight_scale"][:, None, None, None]
    step = state["0.weight_scale"].max()
    torch.testing.assert_close(dequantized, folded, atol=0.51 * step.item(), rtol=0)
    # The bias lies on the grid of the sums of products, where an engine adds it as an integer.
    step = state["input.scale"] * state["0.weight_scale"]
    assert ((state["0.bias"] - folded_bias).abs() <= 0.51 * step + 1e-6).all()
    multiples = state["0.bias"].double() / step.double()
    torch.testing.assert_close(multiples, multiples.round(), atol=1e-2, rtol=1e-6)


def test_a_hook_between_convolution_and_batch_norm_is_part_of_the_network() -> None:
    model = randomize_batch_norm(Residual()).eval()
    model.conv1.register_forward_hook(lambda module, args, output: output * 3)
    lq.calibrate(lq.prepare(model, X), [X])
    int8 = lq.convert(model)
    int8.execution = "simulation"
    expected = model(X)
    torch.testing.assert_close(int8(X), expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    assert "conv + relu" not in {layer.kind for layer in int8.report.layers if layer.name == "conv1"}


def test_nan_in_a_weight_is_refused() -> None:
    model = Residual().eval()
    lq.calibrate(lq.prepare(model, X), [X])
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(lq.FoldError, match="conv2: .*NaN in the weights"):
        lq.convert(model)


class BatchesThatFail:
    def __iter__(self) -> Any:
        yield X
        raise RuntimeError("disk gone")


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], lq.CalibrationError, "no calibration data reached 'x'"),
        ([torch.zeros(0, 3, 16, 16)], lq.CalibrationError, "no calibration data reached 'x'"),
        ([X, X * torch.nan], lq.CalibrationError, "NaN or an infinity at 'x'"),
        ([X, X / 0.0], lq.CalibrationError, "NaN or an infinity at 'x'"),
        ([torch.full_like(X, torch.inf), X], lq.CalibrationError, "NaN or an infinity at 'x'"),
        (BatchesThatFail(), RuntimeError, "disk gone"),
    ],
)
def test_calibration_that_fails_leaves_the_float_model(
    batches: Any, error: type[Exception], message: str, observer: str
) -> None:
    model = Residual().eval()
    expected = model(X)
    lq.prepare(model, X[:2], observer=observer)
    with pytest.raises(error, match=message):
        lq.calibrate(model, batches)
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="quantizers have no range yet.*'x' is the first"):
        lq.convert(model)


def test_loading_another_state_takes_effect_at_once() -> None:
    _, one = prepared_and_int8(Residual())
    _, two = prepared_and_int8(Residual())
    expected = two(X)
    assert not torch.equal(one(X), expected)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(X), expected)
    parent_one, parent_two = (
        nn.ModuleDict({"net": copy.deepcopy(one)}),
        nn.ModuleDict({"net": prepared_and_int8(Residual())[1]}),
    )
    parent_one["net"](X)
    parent_one.load_state_dict(parent_two.state_dict())
    assert torch.equal(parent_one["net"](X), parent_two["net"](X))


def test_converting_leaves_the_prepared_model() -> None:
    model, int8 = prepared_and_int8(Residual())
    before, state = model(X), copy.deepcopy(model.state_dict())
    lq.convert(model)
    assert torch.equal(model(X), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert not any(p.requires_grad for p in int8.parameters())
    assert not int8.train().training
    assert torch.equal(copy.deepcopy(int8)(X), int8(X))


def test_report_is_a_table_and_a_dict() -> None:
    _, int8 = prepared_and_int8(Residual())
    text = str(int8.report)
    for part in ("conv2", "conv + batch_norm", "int8 [-64, 64] symmetric", "uint8 [0, 255] affine", "pooling averages"):
        assert part in text
    assert lq.QuantizationReport.from_dict(int8.report.to_dict()) == int8.report


@pytest.mark.parametrize("name", ["graph", "report", "kernels"])
def test_a_submodule_called_like_an_attribute_of_the_int8_module(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict({name: nn.Conv2d(3, 8, 3)})).eval()
    lq.calibrate(lq.prepare(model, X, target=TARGET), [X])
    int8 = lq.convert(model)
    assert f"{name}_.weight" in int8.state_dict()
    torch.testing.assert_close(int8(X), model(X), rtol=0, atol=0.05)
    lq.export(int8, tmp_path / "int8.pt2")
    assert torch.equal(lq.load(tmp_path / "int8.pt2")(X), int8(X))


def test_int8_mistakes() -> None:
    _, int8 = prepared_and_int8(Residual())
    with pytest.raises(ValueError, match="execution='gpu' is unknown; choose one of 'auto', 'kernels', 'simulation'"):
        int8.execution = "gpu"
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        int8()
