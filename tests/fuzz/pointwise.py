"""Activations, arithmetic, residual adds, gates, and what writes in place."""

from __future__ import annotations

from .program import Step
from .scope import Scope, Table

POINTWISE = Table()

POINTWISE.simple(
    "relu", 6, "{out} = {layer}({0})", "{out} = {layer}({0})", "{out} = F.relu({0})", "{out} = {0}.relu()",
    "{out} = torch.relu({0})", "{out} = {0}.clamp(min=0)", "{out} = torch.clamp_min({0}, 0.0)",
    layers=("Shared:nn.ReLU()", "nn.ReLU()", "", "", "", "", ""),
)  # fmt: skip
POINTWISE.simple(
    "relu in place", 3, "{out} = {layer}({0})", "{out} = F.relu({0}, inplace=True)", "{out} = F.relu_({0})",
    "{0}.relu_()\n{out} = {0}", "{out} = {0}.clamp_(min=0)", layers=("nn.ReLU(inplace=True)", "", "", "", ""),
)  # fmt: skip
POINTWISE.simple(
    "relu6", 2, "{out} = {layer}({0})", "{out} = F.relu6({0})", "{out} = {layer}({0})",
    "{out} = F.hardtanh({0}, -1.0, 2.0)", "{out} = torch.clamp({0}, 0.0, 6.0)",
    layers=("nn.ReLU6()", "", "nn.Hardtanh(0.0, 4.0)", "", ""),
)  # fmt: skip
POINTWISE.simple(
    "smooth", 3, "{out} = {layer}({0})", "{out} = F.silu({0})", "{out} = {layer}({0})",
    "{out} = {0} * torch.sigmoid({0})", "{out} = {0}.sigmoid()", "{out} = {layer}({0})", "{out} = F.gelu({0})",
    "{out} = torch.tanh({0})", "{out} = F.mish({0})",
    layers=("nn.SiLU(inplace=True)", "", "nn.Hardswish()", "", "", "nn.GELU()", "", "", ""),
)  # fmt: skip
POINTWISE.simple(
    "leaky", 1, "{out} = {layer}({0})", "{out} = F.leaky_relu({0}, 0.2)", "{out} = {layer}({0})", "{out} = F.elu({0})",
    layers=("nn.LeakyReLU(0.1, inplace=True)", "", "nn.PReLU()", ""),
)  # fmt: skip
POINTWISE.simple(
    "scalar", 2, "{out} = {0} * 0.5", "{out} = {0} + 1", "{out} = 1 - {0}", "{out} = {0} / 2", "{out} = -{0}",
    "{out} = {0}.abs()", "{out} = ({0} + 3).clamp(0, 6) / 6", "{out} = torch.add({0}, 0.5, alpha=2)",
)  # fmt: skip
POINTWISE.simple(
    "write in place", 3, "{0}.mul_(2)\n{out} = {0}", "{0} *= 0.5\n{out} = {0}", "{0} += 1\n{out} = {0}",
    "{out} = {0}.add_(0.5)", "{out} = {0}.neg_()", "{out} = {0} + 1\n{0}.mul_(0.5)", "{out} = {0} * 1\n{0}.add_(1)",
)  # fmt: skip
POINTWISE.simple(
    "identity", 3, "{out} = {layer}({0})", "{out} = {layer}({0})", "{out} = F.dropout({0}, 0.2, self.training)",
    "{out} = {0}.contiguous()", "{out} = {layer}({0})",
    "{out} = {layer}({0})", "{out} = {0}.float() if {0}.dtype == torch.float16 else {0}",
    layers=("nn.Identity()", "nn.Dropout(0.3)", "", "", "nn.Sequential()", "nn.Dropout(0.2, inplace=True)", ""),
)  # fmt: skip
POINTWISE.simple("Dropout2d", 0.5, "{out} = {layer}({0})", rank=4, layers=("nn.Dropout2d(0.2)",))
POINTWISE.simple("drop path", 1, "{out} = drop_path({0}, 0.3, self.training)")
POINTWISE.simple(
    "no gradient", 1, "{out} = {0}.detach()", "{out} = {0} + {0}.detach()",
    "with torch.no_grad():\n    scale = 1 / (1 + {0}.abs().mean())\n{out} = {0} * scale",
)  # fmt: skip
POINTWISE.simple(
    "autograd function", 1.5, "{out} = RoundStraightThrough.apply({0})", "{out} = ReverseGradient.apply({0})",
    "{out} = {0} + (torch.round({0} * 4) / 4 - {0}).detach()",
)  # fmt: skip


@POINTWISE.add(7)
def add(scope: Scope) -> Step | None:
    x = scope.pick()
    if x is None:
        return None
    y = scope.same(x)
    code = scope.choice(
        "{out} = {0} + {1}", "{out} = {0} + {1}", "{out} = torch.add({0}, {1})", "{out} = {0}.add({1})",
        "{out} = {1} + {0}", "{out} = F.relu({0} + {1})", "{out} = {0} - {1}",
    )  # fmt: skip
    return Step("add", (x, y), code)


@POINTWISE.add(3)
def add_in_place(scope: Scope) -> Step | None:
    x = scope.pick()
    if x is None:
        return None
    y = scope.same(x)
    code = scope.choice(
        "{0} += {1}\n{out} = {0}", "{out} = {0}.add_({1})", "{0} += {1}\n{out} = F.relu({0}, inplace=True)",
        "{0} -= {1}\n{out} = {0}", "{out} = {0} + 0\n{out} += {1}", "{out} = {0}.clone()\n{out}.copy_({1})",
    )  # fmt: skip
    return Step("add in place", (x, y), code)


@POINTWISE.add(2)
def odd_add(scope: Scope) -> Step | None:
    """Adds that are no plain residual one."""
    x = scope.pick()
    if x is None:
        return None
    y, shape = scope.same(x), scope.shapes[x]
    codes = ["{out} = torch.add({0}, {1}, alpha=2)", "{out} = {0}.add({1}, alpha=0.5)", "{out} = {0} + {1} + {0}"]
    if len(shape) == 4:
        codes += [
            "{out} = {0} + {1}.mean((2, 3), keepdim=True)",
            "{out} = {0} + {1}[:, :1]",
            "{out} = {0} + {1}[:, :, :1]",
        ]
        if shape[2] == shape[3]:
            codes += ["{out} = {0} + {1}.transpose(2, 3)", "{out} = {0} + {1}.permute(0, 1, 3, 2)"]
    return Step("odd add", (x, y), scope.rng.choice(codes))


@POINTWISE.add(2)
def product(scope: Scope) -> Step | None:
    x = scope.pick()
    if x is None:
        return None
    code = scope.choice(
        "{out} = {0} * torch.sigmoid({1})", "{out} = {0} * {1} * 0.5", "{out} = torch.maximum({0}, {1})"
    )
    return Step("product", (x, scope.same(x)), code)


@POINTWISE.add(2)
def gate(scope: Scope) -> Step | None:
    """Squeeze and excitation."""
    x = scope.image()
    if x is None:
        return None
    channels = scope.shapes[x][1]
    layers = [("down", f"nn.Conv2d({channels}, 4, 1)"), ("up", f"nn.Conv2d(4, {channels}, 1)")]
    squeeze = scope.choice("{0}.mean((2, 3), keepdim=True)", "F.adaptive_avg_pool2d({0}, 1)")
    gated = scope.choice("{out} = {0} * s", "{out} = s * {0}", "{out} = {0}.mul_(s)")
    curve = scope.choice("torch.sigmoid", "F.hardsigmoid")
    code = f"s = {curve}({{up}}(F.relu({{down}}({squeeze}), inplace=True)))\n{gated}"
    return Step("gate", (x,), code, tuple(layers))


@POINTWISE.add(2)
def parameter(scope: Scope) -> Step | None:
    """A learned scale or shift, or a buffer that the forward keeps up to date."""
    x = scope.image()
    if x is None:
        return None
    channels = scope.shapes[x][1]
    name = scope.choice("Scaled", "LastUpdates", "Reassigned")
    return Step(name, (x,), "{out} = {scaled}({0})", (("scaled", f"{name}({channels})"),))


@POINTWISE.add(3)
def slice_write(scope: Scope) -> Step | None:
    """Writes through views: of a value that others may still read."""
    x = scope.pick(lambda shape: len(shape) in (2, 3, 4) and shape[1] >= 2)
    if x is None:
        return None
    half = scope.shapes[x][1] // 2
    code = scope.choice(
        f"part = {{0}}[:, :{half}]\npart.mul_(3)\n{{out}} = {{0}}",
        "{0}[:, 0] = 0\n{out} = {0}",
        f"{{0}}[:, {half}:] += 1\n{{out}} = {{0}}",
        f"{{out}} = {{0}} * 1\n{{out}}[:, :{half}].zero_()",
        f"{{out}} = {{0}}.clone()\n{{out}}[:, {half}:] = {{0}}[:, {half}:].relu()",
        f"a, b = {{0}}[:, :{half}], {{0}}[:, {half}:]\na.add_(1)\n{{out}} = torch.cat([b, a], 1)",
        "F.relu({0}[:, 1:], inplace=True)\n{out} = {0}",
        "{0}.view(-1)[::2].mul_(0.5)\n{out} = {0}",
    )
    return Step("slice write", (x,), code)
