"""Small networks that between them have every pattern the graph code knows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: statistics and weights of their own for each channel, some weights negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            n = module.num_features
            module.running_mean = torch.randn(n, generator=generator) * 0.2
            module.running_var = torch.rand(n, generator=generator) + 0.5
            module.weight.data = (torch.rand(n, generator=generator) + 0.5) * torch.sign(
                torch.rand(n, generator=generator) - 0.2
            )
            module.bias.data = torch.randn(n, generator=generator) * 0.2
    return model


class Residual(nn.Module):
    """Stem, max-pool, a block with a downsampling shortcut, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        out = self.relu(out)
        return self.fc(torch.flatten(self.avgpool(out), 1))


class WideResidual(Residual):
    """The same with 16 channels: oneDNN's strided 1x1 convolution is not to be trusted with less, in any engine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.down = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))


class SmallResNet(nn.Module):
    """Layers by the names of torchvision's ``resnet18``, and few of them."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, stride=8, padding=3, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer4 = nn.Sequential(self.Block(16)), nn.Sequential(self.Block(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(self.layer1(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


class SharedResidual(nn.Module):
    """The sum's operand is read again behind the sum: a kernel that adds in place must not destroy it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = F.relu(self.b(y) + y)
        z = F.relu(self.c(z) + y)
        return self.fc(z.mean((2, 3)))


class SameConv(nn.Conv2d):
    """A layer with a forward of its own: pads to the input's size, more at the end."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class StandardizedConv(nn.Conv2d):
    """The weight is computed from the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight * 0.2, self.bias, padding=1)


class Gate(nn.Module):
    """Squeeze and excitation, whose product has no INT8 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return self.out(x).mean((2, 3))


class Gated(nn.Module):
    """Hard-swish, squeeze and excite, a concatenation: what lies between convolutions in mobile networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.stem(x)))
        y = F.relu(self.depthwise(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        x = y * F.hardsigmoid(gate)
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1) + x
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.fc(torch.cat([x, F.relu(self.b(x))], 1)).mean((2, 3))


class DenseBlock(nn.Module):
    """A block of a DenseNet: all that was computed before is joined, normalized and read again. 20 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            parts.append(layer(F.relu(norm(torch.cat(parts, 1)))))
        return torch.cat(parts, 1).mean((2, 3))


class DataDependent(nn.Module):
    """Control flow that tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class WithDataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.odd, self.fc = nn.Conv2d(3, 8, 3), DataDependent(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.odd(F.relu(self.conv(x))).mean((2, 3)))


class TrainingDependent(nn.Module):
    """Code that asks self.training: functional dropout and an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(x)).mean((2, 3))
        x = F.dropout(x, 0.5, training=self.training)
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def networks() -> dict[str, nn.Module]:
    """Networks for images ``(N, 3, 16, 16)`` with ten outputs."""
    return {
        "residual": Residual(),
        "shared_residual": SharedResidual(),
        "same_conv": sequential(SameConv(3, 8, 2), nn.ReLU()),
        "standardized": sequential(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        "string_same": sequential(nn.Conv2d(3, 8, 4, padding="same"), nn.ReLU()),
        "reflect": sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
        "depthwise": sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6()),
        "grouped": sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()),
        "dilated": sequential(nn.Conv2d(3, 8, 3, dilation=2, padding=2), nn.Hardtanh(-0.5, 0.5)),
        "no_activation": sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
        "silu": sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1)),
        "norm_first": sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU()),
        "linear_norm": nn.Sequential(
            nn.Flatten(), nn.Linear(768, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)
        ),
        "gate": Gate(),
        "dense": Dense(),
    }


def eager_style_resnet18(add_relu: bool = False) -> nn.Module:
    """torchvision's resnet18 as it is written for eager quantization: stubs, FloatFunctional, a ReLU reused."""
    from torchvision.models.resnet import BasicBlock, ResNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.ao.nn.quantized import FloatFunctional
        from torch.ao.quantization import DeQuantStub, QuantStub

        class Block(BasicBlock):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.skip_add = FloatFunctional()
                self.relu2 = nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
                identity = x if self.downsample is None else self.downsample(x)
                if add_relu:
                    return self.skip_add.add_relu(identity, out)
                return self.relu2(self.skip_add.add(identity, out))

        class Network(ResNet):
            def __init__(self) -> None:
                super().__init__(Block, [2, 2, 2, 2], num_classes=10)
                self.quant, self.dequant = QuantStub(), DeQuantStub()

            def forward(self, x: Tensor) -> Tensor:
                return self.dequant(super().forward(self.quant(x)))

        return Network()
