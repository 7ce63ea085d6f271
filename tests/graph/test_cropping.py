"""Kernels cropped for one size of image, against the convolutions they come from."""

from __future__ import annotations

import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lq
from lq.graph.cropping import crop_kernels


def kernels(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[2:]) for name, value in network.state_dict().items() if value.dim() > 2}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A convolution of any settings, and an input that it takes."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, padding = each(1, 5), each(1, 3), each(0, 4)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(n, span - 2 * p) for n, span, p in zip(each(1, 6), spans, padding, strict=True)]
    groups = draw(st.sampled_from([1, 2]))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = layer(4, 6, kernel, stride=each(1, 3), padding=padding, dilation=dilation, groups=groups)  # type: ignore[arg-type]
    return nn.Sequential(conv).eval(), torch.randn(2, 4, *size)


@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_computes_the_same_without_weights_that_meet_padding_alone(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    conv = model[0]  # type: ignore[index]
    whole = lq.fold_batch_norm(model, x)
    cropped = crop_kernels(whole, {"x": x})
    torch.testing.assert_close(cropped(x), model(x), rtol=1e-4, atol=1e-5)
    # A weight has a gradient where it meets the input: none that does is missing, and without dilation none is left
    # that does not, but for what keeps the padding the same on both sides.
    met = torch.autograd.grad(conv(torch.ones_like(x)).sum(), conv.weight)[0] != 0
    for axis, size in enumerate(kernels(cropped)["0.weight"], start=2):
        at = met.transpose(0, axis).flatten(1).any(1).nonzero()
        if len(at):
            first, last = int(at[0]), int(at[-1])
            assert last - first + 1 <= size <= met.shape[axis]
            if conv.stride[axis - 2] == conv.dilation[axis - 2] == 1 and first == met.shape[axis] - 1 - last:
                assert size == last - first + 1


def test_resnet18_on_small_images() -> None:
    model = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    whole = lq.fold_batch_norm(model, x)
    cropped = crop_kernels(whole, {"x": x})
    torch.testing.assert_close(cropped(x), whole(x), rtol=1e-4, atol=1e-4)
    smaller = {name: size for name, size in kernels(cropped).items() if size != kernels(whole)[name]}
    assert smaller == {
        "layer4.0.conv1.weight": (2, 2),
        "layer4.0.conv2.weight": (1, 1),
        "layer4.1.conv1.weight": (1, 1),
        "layer4.1.conv2.weight": (1, 1),
    }
    assert kernels(whole)["layer4.0.conv2.weight"] == (3, 3)
    large = torch.randn(1, 3, 64, 64)
    assert crop_kernels(whole, {"x": large}) is whole


class Twice(nn.Module):
    """One layer on two sizes, only one of which leaves weights idle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.adaptive_avg_pool2d(self.conv(x), 1))


def test_a_layer_that_is_called_twice_keeps_what_the_other_call_needs() -> None:
    model, x = Twice().eval(), torch.randn(3, 4, 5, 5)
    whole = lq.fold_batch_norm(model, x)
    cropped = crop_kernels(whole, {"x": x})
    torch.testing.assert_close(cropped(x), model(x))
    assert sorted(kernels(cropped).values()) == [(1, 1), (3, 3)]
    assert list(kernels(whole).values()) == [(3, 3)]


def test_int8_networks_compute_the_same() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32)
    int8 = lq.convert(lq.calibrate(lq.prepare(model, x, target="x86_avx2"), [x]))
    cropped = crop_kernels(int8, {"x": x})
    assert sum(size == (1, 1) for size in kernels(cropped).values()) == 6
    for execution in ("auto", "simulation"):
        int8.execution = cropped.execution = execution
        torch.testing.assert_close(cropped(x), int8(x), rtol=0, atol=1e-5)
