"""Submodules, loops, branches, hooks, regions without gradients: what the code around the operators does."""

from __future__ import annotations

from .program import Step
from .scope import Scope, Table

STRUCTURE = Table()

PART = (("part", "{part_class}()"),)


@STRUCTURE.add(3)
def submodule(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x)
    if x is None or body is None:
        return None
    return Step("submodule", (x,), "{out} = {part}({0})", PART, body=body, frame="{body}\nreturn {result}")


@STRUCTURE.add(2)
def residual(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    frame = scope.choice(
        "{body}\nreturn {result} + {0}",
        "{body}\n{result} += {0}\nreturn {result}",
        "{body}\nreturn F.relu({result} + {0}, inplace=True)",
        "identity = {0}\n{body}\nreturn torch.add(identity, {result})",
    )
    return Step("residual", (x,), "{out} = {part}({0})", PART, body=body, frame=frame)


@STRUCTURE.add(2)
def repeated(scope: Scope) -> Step | None:
    """Blocks of a loop, with weights of their own or the same ones."""
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    layer, code = scope.choice(
        (
            "nn.ModuleList({part_class}() for _ in range(2))",
            "{out} = {0}\nfor block in {part}:\n    {out} = block({out})",
        ),
        ("nn.Sequential({part_class}(), {part_class}())", "{out} = {part}({0})"),
        ("{part_class}()", "{out} = {0}\nfor _ in range(2):\n    {out} = {part}({out})"),
    )
    return Step("repeated", (x,), code, (("part", layer),), body=body, frame="{body}\nreturn {result}")


@STRUCTURE.add(2)
def without_gradient(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x)
    if x is None or body is None:
        return None
    if scope.chance(0.5):
        return Step("no_grad", (x,), "with torch.no_grad():\n    {body}\n    {out} = {result}", body=body)
    code = scope.choice("with torch.no_grad():\n    {out} = {part}({0})", "{out} = {part}({0}).detach()")
    return Step("no_grad", (x,), code, PART, body=body, frame="{body}\nreturn {result}")


@STRUCTURE.add(2)
def data_branch(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    test = scope.choice("{0}.sum() > 1", "{0}.abs().max() > 100", "bool(({0} > 0).any())", "{0}.mean().item() < 0.2")
    frame = f"if {test}:\n    {{body}}\n    return {{result}}\nreturn {{0}} * 0.5"
    return Step("branch on data", (x,), "{out} = {part}({0})", PART, body=body, frame=frame)


@STRUCTURE.add(2)
def shape_branch(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    last = scope.shapes[x][-1]
    test = scope.choice(
        "{0}.shape[0] > 1", "{0}.size(0) == 1", f"{{0}}.shape[-1] > {last}", f"{{0}}.shape[-1] <= {last}"
    )
    if scope.chance(0.5):
        frame = f"if {test}:\n    {{body}}\n    return {{result}}\nreturn {{0}} * 0.5"
        return Step("branch on shape", (x,), "{out} = {part}({0})", PART, body=body, frame=frame)
    code = f"{{out}} = {{0}}\nif {test}:\n    {{body}}\n    {{out}} = {{result}}"
    return Step("branch on shape", (x,), code, body=body)


@STRUCTURE.add(2)
def training_branch(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    test = scope.choice("self.training", "not self.training", "self.training and torch.rand(()) < 0.5")
    code = f"{{out}} = {{0}}\nif {test}:\n    {{body}}\n    {{out}} = {{result}}"
    return Step("branch on training", (x,), code, body=body)


@STRUCTURE.add(1.5)
def type_branch(scope: Scope) -> Step | None:
    x = scope.pick()
    body = None if x is None else scope.body(x, keep=True)
    if x is None or body is None:
        return None
    test = scope.choice(
        "isinstance({0}, torch.Tensor)", "type({0}) is torch.Tensor", "torch.is_tensor({0})", "{0}.requires_grad"
    )
    code = f"{{out}} = {{0}}\nif {test}:\n    {{body}}\n    {{out}} = {{result}}"
    return Step("branch on type", (x,), code, body=body)


@STRUCTURE.add(2.5)
def hooked(scope: Scope) -> Step | None:
    """A layer or a submodule with a hook that changes what it gives or takes."""
    hook = scope.choice(
        "{part}.register_forward_hook(doubled)",
        "{part}.register_forward_hook(doubled_in_place)",
        "{part}.register_forward_pre_hook(shifted_input)",
    )
    if scope.chance(0.5):
        x = scope.image(3)
        if x is None:
            return None
        channels = scope.shapes[x][1]
        layer = f"nn.Conv2d({channels}, {channels}, 3, padding=1)"
        return Step("hook", (x,), "{out} = {part}({0})", (("part", layer),), hook)
    x = scope.pick()
    body = None if x is None else scope.body(x, most=2)
    if x is None or body is None:
        return None
    return Step("hook", (x,), "{out} = {part}({0})", PART, hook, body=body, frame="{body}\nreturn {result}")


@STRUCTURE.add(1.5)
def remembered(scope: Scope) -> Step | None:
    """A hook leaves a value on the module, which the forward reads."""
    x = scope.image(3)
    if x is None:
        return None
    channels = scope.shapes[x][1]
    layers = (("part", f"nn.Conv2d({channels}, {channels}, 3, padding=1)"),)
    hook, code = scope.choice(
        ("{part}.register_forward_hook(remember)", "h = F.relu({part}({0}))\n{out} = h + {part}.feature"),
        ("{part}.register_forward_pre_hook(remember_input)", "h = F.relu({part}({0}))\n{out} = h + {part}.seen"),
        ("", "{part}.last = {part}({0})\n{out} = F.relu({part}.last)"),
    )
    return Step("stored feature", (x,), code, layers, hook)
