"""Tensors made in a forward, positions, padding to size and rearrangements: at the example's size and at others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

import lq
from helpers.capture_checks import TARGET, check, check_qat, right_or_refused, through_file
from helpers.patterns import Forward, conv
from helpers.training_steps import assert_same

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(4, 3, 16, 16, generator=GENERATOR)
OTHERS = [torch.randn(shape, generator=GENERATOR) for shape in ((4, 3, 24, 24), (2, 3, 15, 17), (1, 3, 16, 16))]


def _arange(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype) / x.shape[2]
    return self.b(x * rows[:, None]).mean((2, 3))


def _coordinates(self: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    grid = torch.stack([ys, xs]).expand(n, -1, -1, -1).to(x)
    return self.b(torch.cat([F.relu(self.a(x))[:, :6], grid], 1)).mean((2, 3))


def _zeros_and_ones(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    mask = torch.ones(x.shape[2:], device=x.device).triu()
    return self.b(x * mask + torch.zeros_like(x) + x.new_full((1,), 0.25)).mean((2, 3))


def _sine_positions(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
    position = torch.arange(x.shape[1]).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, 8, 2) * (-math.log(1000.0) / 8))
    table = torch.zeros(x.shape[1], 8)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return self.fc(x + table).mean(1)


def _interpolated_positions(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    table = self.table
    if table.shape[-2:] != x.shape[-2:]:
        table = F.interpolate(table, size=x.shape[-2:], mode="bicubic", align_corners=False)
    return self.b(F.relu(x + table)).mean((2, 3))


def _interpolate_to_another(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    z = F.relu(self.down(y))
    return self.b(y + F.interpolate(z, size=y.shape[2:], mode="nearest")).mean((2, 3))


def _interpolate_bilinear(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    z = F.interpolate(F.relu(self.down(y)), size=y.shape[-2:], mode="bilinear", align_corners=True)
    return self.b(torch.cat([y[:, :4], z[:, 4:]], 1)).mean((2, 3))


def _cropped_residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    y = self.valid(x)
    dy, dx = (x.shape[2] - y.shape[2]) // 2, (x.shape[3] - y.shape[3]) // 2
    return self.b(y + x[:, :, dy : dy + y.shape[2], dx : dx + y.shape[3]]).mean((2, 3))


def _einops(self: Any, x: Tensor) -> Tensor:
    # "n c (h p) (w q) -> n (h w) (p q c)", without the package
    x = F.relu(self.a(x))
    n, c, h, w = x.shape
    h, w = h // 2 * 2, w // 2 * 2
    patches = x[:, :, :h, :w].reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return self.patch(patches.reshape(n, (h // 2) * (w // 2), 4 * c)).mean(1)


def _shuffle(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    n, c, h, w = x.size()
    return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)).mean((2, 3))


def _windows(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    n, c, h, w = x.shape
    x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    return self.fc(x.reshape(-1, 16, c)).view(n, -1, 8).mean(1)


def _indexing(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    order = torch.tensor([7, 0, 3, 3, 1, 2, 5, 6])
    return self.b(x[:, order][..., ::2, 1:][:, :, None, ...].squeeze(2)).mean((2, 3))


def _boolean_indexing(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x = torch.where(x > 0, x, x * 0.2)
    keep = torch.tensor([True, False] * 4)
    return self.b(torch.cat([x[:, keep], x[:, ~keep]], 1)).mean((2, 3))


def _gathered(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x)).flatten(2)
    best = x.sum(1, keepdim=True).topk(4, dim=2).indices.expand(-1, 8, -1)
    return self.fc(x.gather(2, best).mean(2))


def _rolled(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    return self.b(torch.roll(x, (x.shape[2] // 2, -1), dims=(2, 3)) + x.flip(3) + x.rot90(2, (2, 3))).mean((2, 3))


def _unfolded(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    columns = F.unfold(x, 3, padding=1).transpose(1, 2)
    return self.columns(columns).mean(1)


def _attention(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
    q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return self.fc(y.transpose(1, 2).reshape(x.shape)).mean(1)


class SameConv(nn.Conv2d):
    """timm's Conv2dSame: pads by the size of the input, more at the end (TensorFlow's "SAME")."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride)


def _same_padding(self: Any, x: Tensor) -> Tensor:
    return self.b(F.relu(self.same(F.relu(self.a(x))))).mean((2, 3))


def _same_pool(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.a(x))
    pads = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in (x.shape[3], x.shape[2])]
    x = F.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2), value=-math.inf)
    return self.b(F.max_pool2d(x, 3, 2)).mean((2, 3))


class WithTable(Forward):
    """Learned positions for images of 16x16."""

    def __init__(self, fn: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__(fn, **children)
        self.table = nn.Parameter(torch.randn(1, 8, 16, 16))


FORWARDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "arange": (_arange, ("a", "b")),
    "coordinates": (_coordinates, ("a", "b")),
    "zeros and ones": (_zeros_and_ones, ("a", "b")),
    "sine positions": (_sine_positions, ("a", "fc")),
    "interpolated positions": (_interpolated_positions, ("a", "b")),
    "interpolated to another": (_interpolate_to_another, ("a", "b", "down")),
    "bilinear": (_interpolate_bilinear, ("a", "b", "down")),
    "cropped residual": (_cropped_residual, ("a", "b", "valid")),
    "einops": (_einops, ("a", "patch")),
    "shuffle": (_shuffle, ("a", "b")),
    "windows": (_windows, ("a", "fc")),
    "indexing": (_indexing, ("a", "b")),
    "boolean indexing": (_boolean_indexing, ("a", "b")),
    "gathered": (_gathered, ("a", "fc")),
    "rolled": (_rolled, ("a", "b")),
    "unfolded": (_unfolded, ("a", "columns")),
    "attention": (_attention, ("a", "qkv", "fc")),
    "same padding": (_same_padding, ("a", "b", "same")),
    "same pool": (_same_pool, ("a", "b")),
}

#: Forwards after which torch knows a size only from data; before 2.12 it exports no convolution of such a tensor, which
#: then stays in float.
SIZES_FROM_DATA = ("boolean indexing",)
EXPORTS_SIZES_FROM_DATA = TorchVersion(torch.__version__) >= "2.12"


def network(name: str) -> nn.Module:
    forward, layers = FORWARDS[name]
    every = {
        "a": conv(3, 8),
        "b": conv(8, 8),
        "down": conv(8, 8, stride=2),
        "valid": nn.Conv2d(8, 8, 3),
        "same": SameConv(8, 8, 3, stride=2),
        "fc": nn.Linear(8, 8),
        "qkv": nn.Linear(8, 24),
        "patch": nn.Linear(32, 8),
        "columns": nn.Linear(72, 8),
    }
    kind = WithTable if name == "interpolated positions" else Forward
    return kind(forward, **{layer: every[layer] for layer in layers})


@pytest.mark.parametrize("name", FORWARDS)
def test_float_and_int8(name: str) -> None:
    if name in SIZES_FROM_DATA and not EXPORTS_SIZES_FROM_DATA:
        check(network(name), X, int8=["a"], leaves=["b"])
    else:
        check(network(name), X)


@pytest.mark.parametrize("name", FORWARDS)
def test_at_other_sizes(name: str, tmp_path: Path) -> None:
    model = network(name).eval()
    eager = copy.deepcopy(model)
    lq.prepare(model, X, target=TARGET)
    for x in (X, *OTHERS):
        assert_same(model(x), eager(x), f"output at {tuple(x.shape)}")
    lq.calibrate(model, [X, *OTHERS])
    int8 = lq.convert(model)
    runs: list[Any] = [int8]
    if name in SIZES_FROM_DATA and not EXPORTS_SIZES_FROM_DATA:
        with pytest.raises(ValueError, match="cannot be exported"):
            lq.export(int8, tmp_path / "int8.pt2")
    else:
        runs.append(through_file(int8, tmp_path / "int8.pt2"))
    for run in runs:
        assert right_or_refused(lambda run=run: run(X), eager(X))
        for x in OTHERS:
            right_or_refused(lambda run=run, x=x: run(x), eager(x))


@pytest.mark.parametrize("name", ["arange", "interpolated positions", "same padding", "windows"])
def test_qat(name: str) -> None:
    check_qat(network(name), X)


UNCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y.contiguous(),
    "requires_grad_": lambda y: y.requires_grad_(False) if not y.requires_grad else y,
    "float": lambda y: y.float(),
    "expand_as": lambda y: y.expand_as(y),
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "ellipsis": lambda y: y[...],
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_call_that_returns_what_it_takes_is_not_the_layer_before_it(name: str) -> None:
    """Weights of 2 bits: where they were not rounded, the simulation would be far from what is converted."""
    torch.manual_seed(0)
    model = Forward(
        lambda self, x: self.b(F.relu(UNCHANGED[name](self.a(x)))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3)
    )
    lq.calibrate(lq.prepare(model.eval(), X, target="x86", overrides={"a": {"weight_bits": 2}}), [X])
    int8 = lq.convert(model)
    int8.execution = "simulation"
    with torch.no_grad():
        assert (model(X) - int8(X)).norm() < 0.01 * int8(X).norm()
