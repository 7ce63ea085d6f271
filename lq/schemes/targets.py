"""Targets: what an INT8 engine needs, as frozen tables that the placement of quantizers reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lq.numerics.spec import QuantSpec
from lq.util.cpu import architecture, has_vnni, is_arm, is_x86

#: How a residual add ``conv(x) + y`` is computed. ``"fused"``: by the convolution's kernel, so that only
#: ``y`` is quantized. ``"operands"``: by a kernel of its own, so that both operands and the sum are.
Residual = Literal["fused", "operands"]

#: Operators between the convolutions, as :class:`~lq.graph.ops.OpKind` names them.
Operator = Literal[
    "mul", "concat", "avg_pool", "batch_norm", "sigmoid", "hard_sigmoid", "silu", "hard_swish", "leaky_relu"
]


@dataclass(frozen=True)
class Target:
    """The schemes of one family of INT8 engines.

    Args:
        name: what the user types.
        description: one line for reports and error messages.
        activation: grid of the activations (per tensor).
        weight: grid of the weights; ``ch_axis`` 0 is the output channel of ``(O, I, kH, kW)`` and ``(O, I)``.
        residual: how residual adds are computed.
        operators: beside sums, what the engine computes from integers to integers in kernels of their own; its other
            engines compute them in float, or in the convolution's kernel.
        integer_outputs: whether its kernels of convolutions and linear layers give integers and nothing else, so that
            all their outputs are rounded, the network's results too.
        integer_batch_norms: whether a batch norm that no convolution takes in reads integers, also what concatenates
            them, so that the kernels before it write integers.
    """

    name: str
    description: str
    activation: QuantSpec
    weight: QuantSpec
    residual: Residual = "fused"
    operators: tuple[Operator, ...] = ()
    integer_outputs: bool = False
    integer_batch_norms: bool = False

    def __str__(self) -> str:
        return self.name


#: TensorRT takes only the zero point 0, and the whole range of int8 for activations.
_INT8_SYMMETRIC = QuantSpec(torch.int8, -128, 127, symmetric=True)

_UINT8_AFFINE = QuantSpec(torch.uint8, 0, 255, symmetric=False)

#: ARM multiplies signed bytes; the grid is that of uint8, 128 lower.
_INT8_AFFINE = QuantSpec(torch.int8, -128, 127, symmetric=False)

#: The narrow range: -w is on the grid whenever w is, so folding a batch norm with a negative weight stays exact.
_INT8_PER_CHANNEL = QuantSpec(torch.int8, -127, 127, symmetric=True, ch_axis=0)

#: Two products of a uint8 and a 7-bit weight fit the 16-bit sums of `vpmaddubsw`: 255 * 64 * 2 = 32640 < 2**15.
_INT7_PER_CHANNEL = QuantSpec(torch.int8, -64, 64, symmetric=True, ch_axis=0)

X86 = Target(
    name="x86",
    description="x86 CPUs with VNNI (oneDNN, OpenVINO): uint8 affine activations, 8-bit weights per channel",
    activation=_UINT8_AFFINE,
    weight=_INT8_PER_CHANNEL,
    integer_batch_norms=True,
)

X86_AVX2 = Target(
    name="x86_avx2",
    description="x86 CPUs without VNNI, where 16-bit sums saturate: as x86, with 7-bit weights that cannot overflow",
    activation=_UINT8_AFFINE,
    weight=_INT7_PER_CHANNEL,
    integer_batch_norms=True,
)

ONNXRUNTIME = Target(
    name="onnxruntime",
    description="ONNX Runtime on CPUs: as x86, with all that lies between convolutions in INT8 kernels of its own",
    activation=_UINT8_AFFINE,
    weight=_INT8_PER_CHANNEL,
    residual="operands",
    # Its convolutions are INT8 where their outputs are, and do nothing to their outputs but clamp.
    operators=get_args(Operator),
)

TENSORRT = Target(
    name="tensorrt",
    description="NVIDIA TensorRT (explicit quantization): int8 symmetric activations, 8-bit weights per channel",
    activation=_INT8_SYMMETRIC,
    weight=_INT8_PER_CHANNEL,
)

XNNPACK = Target(
    name="xnnpack",
    description="ARM CPUs (XNNPACK, ONNX Runtime): int8 affine activations, 8-bit weights per channel",
    activation=_INT8_AFFINE,
    weight=_INT8_PER_CHANNEL,
    residual="operands",
    # XNNPACK computes the others in float, within the network that it is given.
    operators=("mul", "concat"),
    integer_outputs=True,
)

TARGETS: dict[str, Target] = {target.name: target for target in (X86, X86_AVX2, ONNXRUNTIME, TENSORRT, XNNPACK)}


#: The name for the target of this machine's CPU.
AUTO_TARGET = "auto"

#: What a user may type.
TARGET_CHOICES = (AUTO_TARGET, *TARGETS)


def native_target() -> tuple[Target, str]:
    """The target for this machine's CPU, and why."""
    if is_x86():
        # Depends on the kernels, not the CPU: ONEDNN_MAX_CPU_ISA may limit what they use.
        return (X86, "this CPU has VNNI") if has_vnni() else (X86_AVX2, "this CPU has no VNNI")
    if is_arm():
        return XNNPACK, "this is an ARM CPU"
    return ONNXRUNTIME, f"this CPU ({architecture()}) is neither x86 nor ARM, and ONNX Runtime runs on most"


def get_target(target: str | Target) -> Target:
    """The target called ``target``, ``"auto"`` for this machine's CPU; a :class:`Target` is returned as it is.

    Raises:
        ValueError: where no target has that name.
    """
    if isinstance(target, Target):
        return target
    if target == AUTO_TARGET:
        return native_target()[0]
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; choose one of {', '.join(map(repr, TARGET_CHOICES))}")
    return TARGETS[target]
