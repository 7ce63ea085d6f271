"""A small network, and all of it once more in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from helpers.networks import randomize_batch_norm

Array = NDArray[np.float64]

#: What has a quantizer of its own, and what its layers read.
TENSORS = ("x", "2", "4", "5")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ]
    return randomize_batch_norm(nn.Sequential(*layers)).eval()  # type: ignore[return-value]


def convolve(x: Array, weight: Array) -> Array:
    """Of (N, C, H, W) with (O, C, 3, 3), without padding."""
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    return np.einsum("nchwij,ocij->nohw", patches, weight)


def activation_grid(x: Array) -> tuple[float, int]:
    """Scale and zero point of uint8 over the values of ``x`` and zero (Jacob et al. 2018, section 3)."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = float(np.float32(high / 255 - low / 255))
    return scale, int(-np.round(low / scale))


def round_activation(x: Array, grid: tuple[float, int]) -> Array:
    scale, zero_point = grid
    return (np.clip(np.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


def round_weight(weight: Array, most: int) -> Array:
    scale = np.abs(weight).reshape(len(weight), -1).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / most
    return np.clip(np.round(weight / scale), -most, most) * scale


def sqnr(x: Array, y: Array) -> float:
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


def cosine(x: Array, y: Array) -> float:
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


@dataclass
class Reference:
    """The network in numpy, with some of its tensors and weights rounded.

    Args:
        model: the float network.
        most: largest integer of a weight.
        values: of the tensors, as made, after a run.
    """

    model: nn.Sequential
    most: int
    values: dict[str, Array] = field(default_factory=dict)

    def parameter(self, name: str) -> Array:
        return self.model.state_dict()[name].double().numpy()  # type: ignore[no-any-return]

    def batch_norm(self) -> tuple[Array, Array]:
        factor = self.parameter("1.weight") / np.sqrt(self.parameter("1.running_var") + 1e-5)
        return factor, self.parameter("1.bias") - self.parameter("1.running_mean") * factor

    def run(self, x: Array, grids: dict[str, tuple[float, int]], weights: set[str]) -> Array:
        """The outputs, with the tensors in ``grids`` and the weights of the layers in ``weights`` rounded."""

        def weight(layer: str) -> Array:
            value = self.parameter(f"{layer}.weight")
            return round_weight(value, self.most) if layer in weights else value

        def read(name: str, value: Array) -> Array:
            self.values[name] = value
            return round_activation(value, grids[name]) if name in grids else value

        factor, shift = (v.reshape(1, -1, 1, 1) for v in self.batch_norm())
        padded = np.pad(read("x", x), ((0, 0), (0, 0), (1, 1), (1, 1)))
        y = np.maximum(convolve(padded, weight("0")) * factor + shift, 0)
        y = convolve(read("2", y), weight("3")) + self.parameter("3.bias").reshape(1, -1, 1, 1)
        y = read("4", np.maximum(y, 0)).mean((2, 3))
        self.values["7"] = read("5", y) @ weight("7").T + self.parameter("7.bias")
        return self.values["7"]
