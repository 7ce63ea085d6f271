"""Two names of one tensor: in-place operators, identities and writes through views."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lq
from helpers.capture_checks import check
from helpers.networks import randomize_batch_norm
from helpers.patterns import Forward, conv
from helpers.quantized import noise

X = noise(8, 12, seed=1)


def network(forward: Any, layers: str, **children: nn.Module) -> nn.Module:
    """Images to ten outputs: ``forward`` makes eight channels of the stem's eight, with ``layers`` of these names."""

    def whole(self: Any, x: Tensor) -> Tensor:
        # An average, for a maximum would hide a lost ReLU.
        return self.head(F.avg_pool2d(forward(self, self.stem(x)), 4).flatten(1))

    convolutions = {name: conv(8, 8) for name in layers}
    return Forward(whole, stem=conv(3, 8), head=nn.Linear(72, 10), **convolutions, **copy.deepcopy(children))


def _sum_into_the_skip(self: Any, x: Tensor) -> Tensor:
    skip = x
    x += self.a(F.relu(x))
    return self.b(x) + skip


def _sum_out_of_place(self: Any, x: Tensor) -> Tensor:
    skip = x
    x = x + self.a(F.relu(x))
    return self.b(x) + skip


def _method_into_the_skip(self: Any, x: Tensor) -> Tensor:
    skip = x
    x.add_(self.a(F.relu(x)), alpha=0.5).clamp_(min=-1)
    return self.b(x) * skip


def _skip_of_a_skip(self: Any, x: Tensor) -> Tensor:
    first = x
    second = first
    x = self.a(F.relu(x))
    first -= x
    return self.b(second) + first


def _relu_on_the_skip(self: Any, x: Tensor) -> Tensor:
    return self.shortcut(x) + self.b(self.a(self.relu(x)))


def _functional_relu_on_the_skip(self: Any, x: Tensor) -> Tensor:
    skip = self.shortcut(x)
    return self.b(self.a(F.relu(x, inplace=True))) + skip


def _relu_of_the_identity(self: Any, x: Tensor) -> Tensor:
    return self.a(self.relu(self.shortcut(x))) + self.b(x)


def _sum_into_the_identity(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(F.relu(x)))
    skip = self.shortcut(x)
    skip += y
    return self.b(x)


def _view_written(self: Any, x: Tensor) -> Tensor:
    part = x[:, :4]
    part.mul_(3)
    return self.a(x)


def _view_item_set(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x[:, ::2] = F.relu(x[:, 1::2]) * 2
    return self.b(x)


def _halves_written(self: Any, x: Tensor) -> Tensor:
    first, second = x[:, :4], x.narrow(1, 4, 4)
    second += 2 * first
    return self.a(x)


def _flat_view_written(self: Any, x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], 8, -1)
    flat.transpose(1, 2).relu_()
    return self.a(x)


def _border_zeroed(self: Any, x: Tensor) -> Tensor:
    x = self.a(x)
    x[..., 0].zero_()
    x[..., 0, :] = 0
    return self.b(x)


def _part_rectified_in_place(self: Any, x: Tensor) -> Tensor:
    # What the call returns is a part of what the next layer reads.
    x = self.a(x) / 2
    F.relu(x[:, 1:], inplace=True)
    return self.b(F.pad(x, (1, 1, 1, 1)))


def _data_written(self: Any, x: Tensor) -> Tensor:
    # Autograd does not see this write, and the forward does.
    x.data.clamp_(min=-0.5)
    return self.a(x)


def _data_read(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + x.data * 0.5


def _out_argument(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    with torch.no_grad():
        total = torch.empty_like(y)
        torch.mul(y.detach(), 0.5, out=total)
    return self.b(y) + total


SKIP = {"relu": nn.ReLU(inplace=True), "shortcut": nn.Identity()}

FORWARDS: dict[str, tuple[Any, str, dict[str, nn.Module]]] = {
    "sum into the skip": (_sum_into_the_skip, "ab", {}),
    "sum out of place": (_sum_out_of_place, "ab", {}),
    "method into the skip": (_method_into_the_skip, "ab", {}),
    "skip of a skip": (_skip_of_a_skip, "ab", {}),
    "identity beside an in-place ReLU": (_relu_on_the_skip, "ab", SKIP),
    "identity beside a functional ReLU": (_functional_relu_on_the_skip, "ab", SKIP),
    "dropout as the identity": (_relu_on_the_skip, "ab", {**SKIP, "shortcut": nn.Dropout(0.0)}),
    "empty shortcut": (_relu_on_the_skip, "ab", {**SKIP, "shortcut": nn.Sequential()}),
    "in-place SiLU": (_relu_on_the_skip, "ab", {**SKIP, "relu": nn.SiLU(inplace=True)}),
    "in-place ReLU of the identity": (_relu_of_the_identity, "ab", SKIP),
    "sum into the identity": (_sum_into_the_identity, "ab", SKIP),
    "view written": (_view_written, "a", {}),
    "view item set": (_view_item_set, "ab", {}),
    "halves written": (_halves_written, "a", {}),
    "part rectified in place": (_part_rectified_in_place, "ab", {}),
    "flat view written": (_flat_view_written, "a", {}),
    "border zeroed": (_border_zeroed, "ab", {}),
    "data written": (_data_written, "a", {}),
    "data read": (_data_read, "a", {}),
    "out argument": (_out_argument, "ab", {}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_names_of_one_tensor(name: str) -> None:
    forward, layers, children = FORWARDS[name]
    check(network(forward, layers, **children), X)


class FloatReader(nn.Module):
    """A tensor that is written to as a whole, read as INT8 and by a float layer, beside a written view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 10)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.stem(x))
        y = y.mul_(torch.sigmoid(y))
        z = self.a(y)
        part = z[:, :4]
        part.add_(1)
        return self.head(z.mean((2, 3))), self.up(y)


def test_float_layers_read_what_int8_layers_read() -> None:
    model = FloatReader().eval()
    lq.calibrate(lq.prepare(model, X, target="x86_avx2"), [X])
    int8 = lq.convert(model)
    int8.execution = "simulation"
    with torch.no_grad():
        found, expected = int8(X)[1], model(X)[1]
    # Biases are rounded here alone: values between two steps may go the other way, and no others.
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.05


class InPlaceBlock(nn.Module):
    """A residual block of a model zoo: the shortcut is taken before an in-place ReLU, as pre-activation ResNets do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = conv(channels, channels, bias=False), conv(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x = self.conv1(self.relu(self.norm1(x)))
        x = self.conv2(self.relu(self.norm2(x)))
        x += skip
        return x


def test_pre_activation_blocks() -> None:
    layers = (conv(3, 8), InPlaceBlock(8), InPlaceBlock(8), nn.ReLU(inplace=True))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    check(randomize_batch_norm(model), X)


def test_the_input_is_written_to() -> None:
    # The reference writes to its argument as well; a caller that keeps the image sees the same there.
    def forward(self: Any, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return self.b(F.relu(self.a(x))).mean((2, 3)) + x.mean((1, 2, 3))[:, None]

    check(Forward(forward, a=conv(3, 8), b=conv(8, 8)), X)


def test_a_module_returns_its_argument() -> None:
    class Passes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep, self.conv, self.act = Passes(), conv(8, 8), nn.Hardswish(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            kept = self.keep(x)
            return self.conv(self.act(x)) + kept

    check(nn.Sequential(conv(3, 8), Shortcut(), Shortcut(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), X)
