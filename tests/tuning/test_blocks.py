"""Which layers a network's blocks hold: by its structure alone, whatever its modules are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lq
from lq.tuning.blocks import residual_blocks
from lq.tuning.paired import called_once
from lq.workflow.prepare import prepared_forward


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.d(self.c(self.a(x) + self.b(y)).relu())  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """A size is read before the block that needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        x = self.a(x).relu()
        x = self.b(x)
        g = self.gate(x.mean((2, 3))).sigmoid().view(n, 8, 1, 1)
        return self.last((x * g).relu().mean((2, 3)))  # type: ignore[no-any-return]


def blocks_of(model: nn.Module, *inputs: Tensor) -> list[list[str]]:
    prepared = lq.prepare(model.eval(), inputs)
    analysis = prepared_forward(prepared).analyze()
    blocks = residual_blocks(analysis, called_once(analysis), analysis.placement.activations)
    order = {node: index for index, node in enumerate(analysis.graph.nodes)}
    for block in blocks:
        # What is computed outside a block is computed before it, or needs no input; the inside is in order.
        assert [order[node] for node in block.nodes] == sorted(order[node] for node in block.nodes)
        assert {layer.op.node for layer in block.layers} <= set(block.nodes)
        for node in block.nodes[:-1]:
            assert node.users.keys() <= set(block.nodes) or not isinstance(analysis.values[node], Tensor)
    return [[layer.name for layer in block.layers] for block in blocks]


def test_residual_network() -> None:
    blocks = blocks_of(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    assert blocks[0] == ["conv1"] and blocks[-1] == ["fc"]
    assert blocks[1:-1] == [
        [f"layer{stage}.{block}.conv{conv}" for conv in (1, 2)]
        + [f"layer{stage}.{block}.downsample.0"] * (stage > 1 and block == 0)
        for stage in range(1, 5)
        for block in range(2)
    ]


def test_without_branches_each_layer_is_a_block() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 3)]
    assert blocks_of(nn.Sequential(*layers), torch.randn(2, 3, 16, 16)) == [["0"], ["3"], ["5"]]


def test_several_inputs_and_gates() -> None:
    assert blocks_of(TwoInputs(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)) == [["a", "b"], ["c"], ["d"]]
    assert blocks_of(Scaled(), torch.randn(2, 3, 4, 4)) == [["a"], ["b"], ["gate"], ["last"]]


@pytest.mark.parametrize("make", [torchvision.models.densenet121, torchvision.models.mobilenet_v3_small])
def test_all_layers_are_in_one_block(make: Callable[[], nn.Module]) -> None:
    model = make()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    blocks = blocks_of(model, torch.randn(1, 3, 64, 64))
    assert sorted(name for block in blocks for name in block) == sorted(names)
    assert max(map(len, blocks)) <= 8
