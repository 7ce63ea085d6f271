"""Forwards as people write them, each of which takes a way of its own through the graph code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Forward(nn.Module):
    """A module whose forward is ``fn(self, x)``."""

    def __init__(self, fn: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return self.fn(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def one_convolution_residual(channels: int, kernel: int = 3, groups: int = 1) -> nn.Module:
    """``conv(y) + y``: the sum's operand is the very input of the convolution that does the sum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.fc(F.relu(self.b(y) + y).mean((2, 3)))

    return Forward(
        forward, a=conv(3, channels), b=conv(channels, channels, kernel, groups=groups), fc=nn.Linear(channels, 10)
    )


def _pooled_residual(self: Any, x: Tensor) -> Tensor:
    y = F.max_pool2d(F.relu(self.a(x)), 2)
    return self.fc(F.relu(self.b(y) + y).mean((2, 3)))


def _keywords(self: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(input=F.relu(input=self.a(input=x)), kernel_size=2)
    x = F.dropout(input=self.b(x), p=0.5, training=self.training)
    return self.fc(torch.flatten(input=F.adaptive_avg_pool2d(input=x, output_size=1), start_dim=1))


def _three_way_sum(self: Any, x: Tensor) -> Tensor:
    return self.fc((self.a(x) + self.b(x) + self.c(x)).mean((2, 3)))


def _sum_relu6(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu6(self.b(F.relu(self.a(x))) + self.c(x)).mean((2, 3)))


def _flat_residual(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x.flatten(2)))
    return self.fc(F.relu(self.b(F.relu(self.a(x.flatten(2)))) + y).mean(2))


def _tokens(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.relu(self.a(x)).permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, 8)).mean(1)


class Scaled(nn.Module):
    """Cannot be traced, has a ``scale``, and takes a view that needs a contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return x.view(len(x), -1).view(x.shape) * self.scale


class Prompt(nn.Module):
    """A linear layer on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(10, 8))
        self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).mean((2, 3)) @ self.fc(self.query).t()


def patterns() -> dict[str, nn.Module]:
    """Networks for images ``(N, 3, 16, 16)`` with ten outputs."""
    silu, twice = nn.SiLU(), conv(8, 8)
    return {
        "residual_3x3": one_convolution_residual(8),
        "residual_64": one_convolution_residual(64),
        "residual_1x1": one_convolution_residual(32, 1),
        "residual_depthwise": one_convolution_residual(64, groups=64),
        "residual_pooled": Forward(_pooled_residual, a=conv(3, 16), b=conv(16, 16), fc=nn.Linear(16, 10)),
        "three_way_sum": Forward(_three_way_sum, a=conv(3, 8), b=conv(3, 8), c=conv(3, 8, 1), fc=nn.Linear(8, 10)),
        "sum_relu6": Forward(_sum_relu6, a=conv(3, 8), b=conv(8, 8), c=conv(3, 8, 1), fc=nn.Linear(8, 10)),
        "conv1d_residual": Forward(
            _flat_residual,
            a=nn.Conv1d(3, 8, 3, padding=1),
            b=nn.Conv1d(8, 8, 3, padding=1),
            fc=nn.Linear(8, 10),
        ),
        "conv1d_relu6": nn.Sequential(
            nn.Flatten(2),
            nn.Conv1d(3, 8, 3, stride=4, dilation=2),
            nn.ReLU6(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(248, 10),
        ),
        "keywords": Forward(_keywords, a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 10)),
        "view": Forward(
            lambda self, x: self.fc(F.max_pool2d(F.relu(self.a(x)), 4).view(x.size(0), -1)),
            a=conv(3, 8),
            fc=nn.Linear(128, 10),
        ),
        "view_after_average": Forward(
            lambda self, x: self.fc(F.avg_pool2d(F.relu(self.a(x)), 4).view(x.size(0), -1)),
            a=conv(3, 8),
            fc=nn.Linear(128, 10),
        ),
        "tokens": Forward(_tokens, a=conv(3, 8), fc=nn.Linear(8, 10)),
        "method_names": Forward(
            lambda self, x: self.fc(self.a(x.float()).to(torch.float32).mean((2, 3))),
            a=conv(3, 8),
            fc=nn.Linear(8, 10),
        ),
        "sum_at_the_root": Forward(
            lambda self, x: self.fc(self.b(self.a(x) + self.c(x))).mean((2, 3)),
            a=conv(3, 8),
            b=conv(8, 8),
            c=conv(3, 8),
            fc=conv(8, 10, 1),
        ),
        "float_module_twice": nn.Sequential(
            conv(3, 8), silu, conv(8, 8), silu, conv(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        "layer_twice": nn.Sequential(
            conv(3, 8), nn.ReLU(), twice, nn.ReLU(), twice, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        ),
        "float_leaf_with_a_scale": nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 8), Scaled(), conv(8, 8), nn.Flatten(), nn.Linear(2048, 10)
        ),
        "parameter_as_input": Prompt(),
        "weight_norm": nn.Sequential(
            nn.utils.parametrizations.weight_norm(conv(3, 8)), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)
        ),
        "transposed": nn.Sequential(
            conv(3, 8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, stride=2),
            nn.ReLU(),
            nn.PixelShuffle(2),
            conv(2, 10),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        ),
        "linear_3d": nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False), nn.ReLU6(), nn.Flatten(), nn.Linear(384, 10)
        ),
    }
