"""A ``.pt2`` program from an untrusted source: nothing in it is unpickled, evaluated or imported.

``torch.export.load`` trusts its file: it unpickles example inputs, constants and weights that ask for it, evaluates the
text of every symbolic size (through sympy) and of guards, calls any Python function that a node names, imports
modules that a description of nested arguments names, writes names into code that it runs, and ignores checksums. So
torch is given a new archive here, made of the checked parts of the file.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lq.interface.metadata import KEY
from lq.interface.treespecs import check_treespec
from lq.util.archives import names_of, read_members

_MODEL = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_SAMPLES = "data/sample_inputs/model.pt"

#: The members that make up a program, and those that torch writes beside it.
_MEMBERS = re.compile(
    rf"{_MODEL}|{_WEIGHTS}|{_CONSTANTS}|{_SAMPLES}|data/weights/weight_\d+|data/constants/tensor_\d+"
    rf"|extra/{KEY}|archive_format|archive_version|byteorder|version|\.data/\w+"
)

#: Python's and torch's functions that compute with sizes.
_SIZES = re.compile(
    r"_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(float|int|ite|max|min|not|sqrt|sum)|torch\._sym_\w+"
)

#: Operators that take tensors and numbers. Of torch's other namespaces some read and write files, or start programs.
_OPERATOR = re.compile(r"torch\.ops\.(?P<namespace>\w+)\.(?P<name>\w+)\.(?P<overload>\w+)")
_NAMESPACES = ("aten", "quantized_decomposed", "torchvision")
_WITH_FILES = ("from_file", "save")
_HIGHER_ORDER = re.compile(r"torch\.ops\.higher_order\.(cond|while_loop|wrap_with_autocast|wrap_with_set_grad_enabled)")

#: Namespaces that come with torch; any other belongs to a package that this process has imported.
_OF_TORCH = re.compile(
    r"_\w*|c10d\w*|coor|debug\w*|export|flex\w*|fsdp|higher_order|image|inductor\w*|mempool|mkl\w*|onednn|onnx\w*|prim|prims"
    r"|profiler|quantization|quantized|rngprims|rpc|sparse|static_runtime|streams|symm_mem|torchao|torchaudio|torchtext"
)

#: What the text of a symbolic size is made of (sympy's ``srepr``).
_SYMPY = re.compile(
    r"Abs|Add|And|BooleanFalse|BooleanTrue|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|FloatPow|FloatTrueDiv|FloorDiv"
    r"|FloorToInt|GreaterThan|Identity|IntTrueDiv|Integer|IsNonOverlappingAndDenseIndicator|LShift|LessThan|Max|Min|Mod"
    r"|ModularIndexing|Mul|Ne|Not|Or|Pow|PowByNatural|PythonMod|RShift|Rational|RoundDecimal|RoundToInt"
    r"|StrictGreaterThan|StrictLessThan|ToFloat|TruncToFloat|TruncToInt|Unequality|Where|ceiling|floor"
)
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}")
_MAX_EXPRESSION, _MAX_EXPONENT = 20_000, 8

#: A path in the model: torch writes it into code, in double quotes.
_PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")

#: What any other text looks like: devices, versions, kinds.
_WORD = re.compile(r"[\w.:+\- ]*")


def read_program(path: Path) -> tuple[io.BytesIO, str]:
    """``(archive, metadata)``: a ``.pt2`` archive that torch may load, and the text that lq wrote into it.

    Raises:
        ValueError: where the file is damaged, or is not a program of tensors and their operators alone.
    """
    members = _members(path)
    for name, check in ((_WEIGHTS, r"weight_\d+"), (_CONSTANTS, r"tensor_\d+")):
        _check_payloads(_json(members, name), check, members, name.rpartition("/")[0])
    members[_MODEL] = json.dumps(_checked_program(_json(members, _MODEL))).encode()
    members[_SAMPLES] = _plain_samples(members)
    return _archive(members), _text(members)


def _members(path: Path) -> dict[str, bytes]:
    content = read_members(path)
    root, names = names_of(content)
    for name in names:
        if not _MEMBERS.fullmatch(name):
            raise ValueError(f"lq writes no member {name!r}")
    return {name: content[root + name] for name in names}


def _text(members: Mapping[str, bytes]) -> str:
    if f"extra/{KEY}" not in members:
        raise ValueError("it does not describe its inputs: lq did not write it")
    return members[f"extra/{KEY}"].decode()


def _archive(members: Mapping[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    buffer.seek(0)
    return buffer


def _json(members: Mapping[str, bytes], name: str) -> Any:
    if name not in members:
        raise ValueError(f"it has no {name}")
    try:
        return json.loads(members[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} cannot be read: {error!r}") from error


def _check_payloads(config: Any, file: str, members: Mapping[str, bytes], folder: str) -> None:
    """Check that weights and constants are files of the archive, with as many bytes as their elements take."""
    try:
        for name, payload in config["config"].items():
            place, meta = payload["path_name"], payload["tensor_meta"]
            if payload["use_pickle"] or not re.fullmatch(file, place) or not _PATH.fullmatch(name):
                raise ValueError(f"its weight or constant {name!r} is not a plain tensor")
            if not members[f"{folder}/{place}"]:  # from an empty file torch makes zeros of any size
                sizes = [size["as_int"] for size in meta["sizes"]]
                if 0 not in sizes:
                    raise ValueError(f"its tensor {name!r} of the shape {sizes} has no bytes")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its weights or constants cannot be read: {error!r}") from error


def _plain_samples(members: Mapping[str, bytes]) -> bytes:
    """The example inputs, read without unpickling and written again."""
    content = members.get(_SAMPLES)
    if content is None:
        raise ValueError("it has no example inputs")
    read_members(io.BytesIO(content))
    try:
        args, kwargs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves((args, kwargs)))
    except Exception as error:
        raise ValueError("its example inputs are not plain tensors") from error
    if type(args) is not tuple or type(kwargs) is not dict or not plain:
        raise ValueError("its example inputs are not plain tensors")
    buffer = io.BytesIO()
    torch.save((args, kwargs), buffer)
    return buffer.getvalue()


def _checked_program(program: Any) -> dict[str, Any]:
    """The program without its traces of the export, every text in it checked."""
    try:
        program["guards_code"] = []  # Python code; sizes are checked when the network is called
        program["graph_module"]["metadata"] = {}
        for symbol in program["range_constraints"]:
            if not _SYMBOL.fullmatch(symbol):
                raise ValueError(f"its program has the name {symbol!r}")
        _check(program, "")
    except RecursionError as error:
        raise ValueError("its program is nested too deeply") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its program cannot be read: {error!r}") from error
    return dict(program)


def _check(value: Any, key: str) -> None:
    """Check every text in ``value``, which stands under ``key``."""
    if isinstance(value, dict):
        if isinstance(value.get("target"), str) and "inputs" in value:  # a node
            value["metadata"] = {}
        for name, item in value.items():
            if not _PATH.fullmatch(name):
                raise ValueError(f"its program has the name {name!r}")
            _check(item, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_word)(value)


def _check_operator(target: str) -> None:
    if _SIZES.fullmatch(target) or _HIGHER_ORDER.fullmatch(target):
        return
    match = _OPERATOR.fullmatch(target)
    if match is not None and match["namespace"] in _NAMESPACES and match["name"] not in _WITH_FILES:
        return
    if match is not None and not _OF_TORCH.fullmatch(match["namespace"]) and match["namespace"] not in _NAMESPACES:
        return  # what the user's own program registered
    raise ValueError(f"its program calls {target!r}, which is not an operator on tensors")


def _check_name(name: str) -> None:
    if name and (not name.isidentifier() or keyword.iskeyword(name)):
        raise ValueError(f"its program has the name {name!r}")


def _check_arguments(text: str) -> None:
    """Check the names of keyword arguments, which become parameters of a generated function."""
    check_treespec(text)
    _, schema = json.loads(text)
    for keywords in schema["children_spec"][1:]:
        for name in json.loads(keywords["context"]):
            _check_name(name)


def _check_path(path: str) -> None:
    if not _PATH.fullmatch(path) or any(part.startswith("__") for part in path.split(".")):
        raise ValueError(f"its program has the name {path!r}")


def _check_word(text: str) -> None:
    if not _WORD.fullmatch(text):
        raise ValueError(f"its program has the text {text[:60]!r}")


def _check_expression(text: str) -> None:
    """Check a size, written as sympy's constructors, which sympy's reader passes to ``eval``."""
    if len(text) > _MAX_EXPRESSION:
        raise ValueError(f"its program has a size of {len(text)} characters")
    try:
        _check_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"its program has the size {text[:60]!r}") from error


def _check_node(node: ast.expr, in_power: bool = False) -> None:
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            values = [each.value.value for each in assumptions if isinstance(each.value, ast.Constant)]
            if _SYMBOL.fullmatch(name) and len(values) == len(assumptions) and set(values) <= {True, False}:
                return
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))], keywords=precision):
            if re.fullmatch(r"[-+\d.e]{1,40}", digits) and all(_integer(each.value, 1000) for each in precision):
                return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if _SYMPY.fullmatch(name):
            is_power = "Pow" in name or "Shift" in name
            # A power of powers of large numbers would be computed when it is read.
            if not is_power or (not in_power and _is_exponent(args[-1])):
                for argument in args:
                    _check_node(argument, in_power or is_power)
                return
        case ast.Name(id=name) if name in ("false", "true") or _SYMBOL.fullmatch(name):
            return
        case ast.Constant(value=float()):
            return
    if not _integer(node, 2**64):
        raise ValueError(ast.unparse(node))


def _is_exponent(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))]):
            return bool(re.fullmatch(r"[-+\d.e]{1,40}", digits)) and abs(float(digits)) <= _MAX_EXPONENT
        case ast.Constant(value=float(value)):
            return abs(value) <= _MAX_EXPONENT
    return _integer(node, _MAX_EXPONENT)


def _integer(node: ast.expr, largest: int) -> bool:
    """Whether it is a whole number, and no larger."""
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[argument]) | ast.UnaryOp(op=ast.USub(), operand=argument):
            return _integer(argument, largest)
        case ast.Constant(value=int(value)):
            return value <= largest
    return False


#: How the texts of a program are checked, by their key; under any other key a text has to be a word.
_CHECKS: dict[str, Callable[[str], None]] = {
    "as_name": _check_name,
    "as_operator": _check_operator,
    "as_string": lambda text: None,  # a constant in quotes
    "as_strings": lambda text: None,
    "buffer_name": _check_path,
    "expr_str": _check_expression,
    "forward_arg_names": _check_name,
    "fqn": _check_path,
    "in_spec": _check_arguments,
    "name": _check_name,
    "out_spec": check_treespec,
    "parameter_name": _check_path,
    "target": _check_operator,
    "tensor_constant_name": _check_path,
    "user_input_name": _check_name,
}
