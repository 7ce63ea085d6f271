"""LightningModules of the shapes that users write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.classifiers import TwoInputs, Wrapped, images, network


class Manual(Wrapped):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        logits, y = self.logits(batch)
        loss = F.cross_entropy(logits, y)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.model[:6].parameters(), lr=0.1, momentum=0.9),
            torch.optim.SGD(self.model[6:].parameters(), lr=0.1, momentum=0.9),
        ]


class CompiledInside(Wrapped):
    """The network is compiled by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(network(), backend="eager")  # type: ignore[assignment]


class OtherMethod(Wrapped):
    """Steps call a method other than forward, which is not what the module computes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(1)

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self._compute(x=batch[0]), batch[1]

    def _compute(self, x: Tensor) -> Tensor:
        return self.model(x)


class Embedded(Wrapped):
    """Integer inputs: each image is a grid of 3 numbers, looked up in a table."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.model = nn.Sequential(_Lookup(), network())

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch[0].clamp(-3, 3).round().long()[:, 0] + 3 + 7 * (batch[0][:, 2] > 0).long()), batch[1]


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(14, 3)

    def forward(self, indices: Tensor) -> Tensor:
        return self.table(indices).permute(0, 3, 1, 2)


class Finetuned(Wrapped):
    """A backbone and a head, as BackboneFinetuning wants them."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        net = network()
        self.backbone, self.head = net[:-1], net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1, momentum=0.9)


class Several(Wrapped):
    """Several inputs, one of them by keyword, a setting, and a dict as output."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = TwoInputs()

    def forward(self, x: Tensor) -> Tensor:
        scalar = x[:, 0, 0, :2]
        found: Tensor = self.net(x, scalar=scalar, double=True)["logits"]
        return found


class FromCommandLine(Wrapped):
    """Has its own data, as a class that LightningCLI starts."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*images(64)), batch_size=16)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*images(64, seed=1)), batch_size=32)


class BuiltInSetup(Wrapped):
    """The network is built in setup."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.model: Any = None

    def setup(self, stage: str) -> None:
        if self.model is None:
            self.model = Wrapped().model


class NeverTrained(Wrapped):
    """What is wrong is said before training begins."""

    def on_train_start(self) -> None:
        pytest.fail("training began")
