"""A network with layers that are broken on purpose: in float they compute what they did, in INT8 nothing of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from helpers.calibration import Block, images
from helpers.networks import randomize_batch_norm

BATCHES = images(4, samples=8)
TEST = images(1, samples=32, seed=1)[0]


def network(blocks: int = 8) -> nn.Sequential:
    """For images ``(N, 3, 8, 8)``: a stem, blocks ``layer0`` ... of two convolutions each, a linear layer."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    layers.update((f"layer{index}", Block()) for index in range(blocks))
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, 10))
    return randomize_batch_norm(nn.Sequential(layers)).eval()


@torch.no_grad()
def break_layers(model: nn.Sequential, blocks: Iterable[str]) -> nn.Sequential:
    """Break ``conv2`` of some blocks, by weights so large that all others round to zero beside them.

    They are those for a channel that is always zero, so in float they change nothing.
    """
    for name in blocks:
        block = model.get_submodule(name)
        block.bn1.weight[0] = 1000.0  # as large as those that read it: nothing is to be equalised
        block.bn1.bias[0] = -1e6
        block.conv2.weight[:, 0] = 1000.0
    return model


def explained(model: nn.Module) -> Callable[[nn.Module], float]:
    """How much of the variance of a float model's outputs another one's have, percent, at least 0."""
    with torch.no_grad():
        reference: Tensor = model(TEST).double()
    variance = (reference - reference.mean(0)).square().sum()

    def evaluate(network: nn.Module) -> float:
        noise = (network(TEST).double() - reference).square().sum()
        return max(0.0, float(100 * (1 - noise / variance)))

    return evaluate
