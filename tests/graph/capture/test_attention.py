"""Attention: its linear layers run in INT8, also those that a function of torch computes inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.capture_checks import check, check_qat

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(3))


class SelfAttention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.fc((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


class CrossAttention(nn.Module):
    """Queries, keys and values are three tensors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.query, self.key, self.fc = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 2, **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.transpose(0, 1)
        y, weights = self.attention(self.query(y), self.key(y), y)
        return self.fc(y.mean(0)), weights


class Encoder(nn.Module):
    """Transformer layers, which torch computes in one call when nothing watches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x)[:, 0])


class AttentionPool(nn.Module):
    """Calls the function with layers of its own, as CLIP's image encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        pooled, _ = F.multi_head_attention_forward(
            x.mean(0, keepdim=True),
            x,
            x,
            embed_dim_to_check=16,
            num_heads=2,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            training=self.training,
            need_weights=False,
        )
        return pooled[0]


PACKED = ["attention.in_proj", "attention.out_proj", "fc"]
THREE = ["attention.linear", "attention.linear_1", "attention.linear_2", "attention.out_proj"]


@pytest.mark.parametrize(
    ("model", "int8"),
    [
        pytest.param(SelfAttention(), PACKED, id="self"),
        pytest.param(SelfAttention(bias=False), PACKED, id="no_bias"),
        pytest.param(SelfAttention(dropout=0.3), PACKED, id="dropout"),
        pytest.param(SelfAttention(add_bias_kv=True, add_zero_attn=True), PACKED, id="bias_kv"),
        pytest.param(CrossAttention(), [*THREE, "query", "key", "fc"], id="cross"),
        pytest.param(AttentionPool(), ["q", "k", "v", "out"], id="functional"),
        pytest.param(
            Encoder(),
            [f"layers.layers.{n}.{name}" for n in "01" for name in ("linear1", "linear2", "self_attn.out_proj")],
            id="encoder",
        ),
    ],
)
def test_linear_layers(model: nn.Module, int8: list[str]) -> None:
    check(model, X, int8=int8)


def test_separate_projections() -> None:
    class OtherWidths(CrossAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.transpose(0, 1)
            y, weights = self.attention(self.query(y), y[..., :8], y[..., 8:])
            return self.fc(y.mean(0)), weights

    int8 = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]
    check(OtherWidths(kdim=8, vdim=8), X, int8=int8)


def test_qat() -> None:
    check_qat(SelfAttention(), X)
