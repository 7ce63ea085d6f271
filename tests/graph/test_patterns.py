"""The whole way from float to kernels, over ways to write a forward."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import lq
from helpers.exact import assert_kernels_are_exact
from helpers.patterns import Forward, conv, one_convolution_residual, patterns
from helpers.quantized import noise, quantized
from lq.util.cpu import has_onednn_int8

X = noise(16, seed=1)
kernels = pytest.mark.skipif(not has_onednn_int8(), reason="no oneDNN INT8 kernels on this machine")


def assert_equal_but_for_biases(actual: Tensor, expected: Tensor) -> None:
    """Equal but for biases, which an INT8 network has on the grid of its sums: less than a step of 255 in the mean."""
    off = (actual - expected).abs() / expected.abs().max()
    assert off.max() < 0.03
    assert off.mean() < 1 / 255


@pytest.mark.parametrize("name", patterns())
def test_from_float_to_kernels(name: str) -> None:
    torch.manual_seed(0)
    model = patterns()[name].eval()
    expected, twin = model(X), copy.deepcopy(model)
    lq.prepare(model, X, target="x86_avx2")
    assert torch.equal(model(X), expected)
    torch.manual_seed(0)
    trained = twin.train()(X)
    torch.manual_seed(0)
    assert torch.equal(model.train()(X), trained)
    int8 = lq.convert(lq.calibrate(model.eval(), [X]))
    simulated = model(X)
    assert (simulated - expected).abs().max() < 0.1 * expected.abs().max()
    int8.execution = "simulation"
    assert_equal_but_for_biases(int8(X), simulated)
    if has_onednn_int8():
        assert_kernels_are_exact(int8, X)
        assert int8.kernels().float_ops == []
    layers = {layer.name for layer in int8.report.int8_layers}
    assert layers == {n for n, m in twin.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))} or (
        name == "weight_norm"  # whose weight is computed, and takes the name of the operator
    )


@kernels
def test_a_sum_onto_the_convolutions_own_input_is_made_on_a_copy() -> None:
    int8 = quantized(one_convolution_residual(64), X)
    (sum_node,) = (n for n in int8.kernels().graph.nodes if n.target is torch.ops.onednn.qconv2d_pointwise.binary)
    assert sum_node.args[6].target is torch.clone
    expected = int8(X)
    assert all(torch.equal(int8(X), expected) for _ in range(10))


@kernels
def test_threads_share_a_module() -> None:
    int8 = quantized(one_convolution_residual(16), X)
    expected = int8(X)
    right: list[bool] = []
    threads = [threading.Thread(target=lambda: right.append(torch.equal(int8(X), expected))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_two_tensors_never_share_a_quantizer_by_name() -> None:
    def forward(self: Forward, x: Tensor) -> Tensor:
        x = self.b(self.relu(self.a(self.relu(x)) * 0.01))  # the second call of `relu` is no `relu_1`
        return self.c(self.relu_1(x)).mean((2, 3))

    model = Forward(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), relu=nn.ReLU(), relu_1=nn.ReLU()).eval()
    lq.calibrate(lq.prepare(model, X), [X])
    found = lq.quantizers(model)
    assert found.keys() == {"relu", "relu_1", "relu_2", "a", "c", "a.weight", "b.weight", "c.weight"}
    # Each has the range of its own tensor: b's input is the small one.
    assert found["relu_2"].scale < found["relu_1"].scale
    report = {layer.name: layer.input for layer in lq.report(model).int8_layers}
    assert report["b"].startswith("relu_2:")
    assert report["c"].startswith("relu_1:")


def test_a_replaced_forward_is_what_is_captured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    own, layer_forward = model.forward, model[0].forward
    model.forward = lambda x: own(x) * 3  # type: ignore[method-assign]
    model[0].forward = lambda x: layer_forward(x) - 1
    replaced = model.forward, model[0].forward
    expected = model(X)
    lq.prepare(model, X, target="x86_avx2")
    assert torch.equal(model(X), expected)
    int8 = lq.convert(lq.calibrate(model, [X]))
    assert (int8(X) - expected).abs().max() < 0.05 * expected.abs().max()
    lq.unprepare(model)
    assert (model.forward, model[0].forward) == replaced


def test_what_kernels_cannot_take_is_refused_or_stays_float() -> None:
    double = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double().eval()
    lq.calibrate(lq.prepare(double, X.double()), [X.double()])
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is torch\.float64; call model\.float\(\)"):
        lq.convert(double)
    assert lq.convert(double.float())(X).dtype == torch.float32
    with pytest.raises(lq.NothingToQuantizeError, match="0: its input has no batch axis"):
        lq.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), X[0])


@kernels
def test_images_in_other_forms() -> None:
    int8 = quantized(nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)), X)
    expected = int8(X)
    assert torch.equal(int8(X.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(int8(X.double()), expected)
    assert int8(X[:0]).shape == (0, 10)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(int8)(X), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int8(X), expected)
    assert not int8(X.requires_grad_()).requires_grad
    X.requires_grad_(False)
