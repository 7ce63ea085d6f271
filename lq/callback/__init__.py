"""The Lightning callback."""

from lq.callback.callback import QuantizationCallback
from lq.callback.from_checkpoint import quantize_checkpoint
from lq.callback.result import QuantizationResult, Side

__all__ = ["QuantizationCallback", "QuantizationResult", "Side", "quantize_checkpoint"]
