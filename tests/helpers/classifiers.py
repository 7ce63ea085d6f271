"""Small LightningModules of several shapes, and data that a linear rule separates."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


def network(num_classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


class _Steps(LightningModule):
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return self(x), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, y = self.logits(batch)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits, y = self.logits(batch)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Wrapped(_Steps):
    """The network is one submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Direct(_Steps):
    """The layers sit on the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class TwoParts(_Steps):
    """Backbone and head are two submodules."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.backbone, self.head = net[:-1], net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Configured(Wrapped):
    """The network is built in configure_model."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = network()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.scalar, self.out = network(8), nn.Linear(2, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, scalar: Tensor, *, double: bool = False) -> dict[str, Tensor]:
        hidden = F.relu(self.image(image) + self.scalar(scalar))
        return {"logits": self.out(hidden * 2 if double else hidden)}


class DictBatches(_Steps):
    """Batches are dicts, the network takes two inputs, one by keyword, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TwoInputs()

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.net(batch["image"], scalar=batch["scalar"], double=True)["logits"], batch["label"]


class Unquantizable(_Steps):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :1] * self.scale


def images(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with a class-dependent colour: quickly learnt, with wide margins."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    colour = torch.tensor([[1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [-1.0, -1.0, -1.0]])
    x = torch.randn(count, 3, 8, 8, generator=generator) + colour[y][:, :, None, None]
    return x, y


def loader(count: int = 64, seed: int = 0, nan: bool = False, shuffle: bool = False) -> DataLoader[Any]:
    x, y = images(count, seed)
    if nan:
        x[0, 0, 0, 0] = torch.nan
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle)


class _DictData(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = images()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.x[index], "scalar": self.x[index, 0, 0, :2], "label": self.y[index]}


def dict_loader() -> DataLoader[Any]:
    return DataLoader(_DictData(), batch_size=16)
