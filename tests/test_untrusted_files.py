"""Files from strangers: nothing in them runs, is followed elsewhere, or unpacks to more than such a file has."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import re
import resource
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import lq
from helpers.classifiers import Wrapped
from helpers.networks import Residual, randomize_batch_norm
from helpers.processes import finish, start
from helpers.quantized import calibrated, noise
from helpers.runs import every_epoch, module, quantization, train_data, trainer, val_data
from lq.data.image_folder import decode_rgb
from lq.deployment.formats import read_metadata
from lq.recipes import inspect_file
from lq.recipes.blocks.config import main
from lq.util.archives import check_torch_archive, checked_members, read_members

X = noise(8, seed=1)

MODEL = "archive/models/model.json"
SAMPLES = "archive/data/sample_inputs/model.pt"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"


@pytest.fixture(scope="module")
def prepared() -> torch.nn.Module:
    torch.manual_seed(0)
    return calibrated(randomize_batch_norm(Residual()), X)


@pytest.fixture(scope="module")
def folder(prepared: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("int8.pt2", "int8.onnx"):
        lq.export(prepared, folder / name, verify=False)
    lq.save_statistics(prepared, folder / "statistics.npz")
    return folder


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path: Path, members: dict[str, bytes], **kwargs: Any) -> None:
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


class Trap:
    """What a pickle can do: here it makes a file, whose presence tells."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


def pickled(path: Path, value: Any = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(((Trap(path),), {}) if value is None else value, buffer)
    return buffer.getvalue()


def changed(path: Path, name: str, change: Callable[[Any], Any]) -> dict[str, bytes]:
    """The members of a program with one of its JSON files changed."""
    members = members_of(path)
    values = json.loads(members[name])
    return members | {name: json.dumps(change(values) or values).encode()}


def first_weight(config: Any) -> dict[str, Any]:
    payload: dict[str, Any] = next(iter(config["config"].values()))
    return payload


def refused(path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lq.load(path)
    with pytest.raises(SystemExit):
        main(inspect_file.Config, inspect_file.run, inspect_file.plan, argv=[str(path), f"output_dir={path.parent}"])


def in_size(code: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        sizes = next(v["sizes"] for v in program["graph_module"]["graph"]["tensor_values"].values() if "sizes" in v)
        sizes[0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}

    return change


def in_node(**values: Any) -> Callable[[Any], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update(values)


def in_spec(key: str, context: Any, kind: str) -> Callable[[Any], None]:
    text = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    return lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update({key: text})


def renamed(old: str, new: str) -> Callable[[Any], Any]:
    return lambda program: json.loads(json.dumps(program).replace(json.dumps(old), json.dumps(new)))


DEFAULTDICT = {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []}
ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:fly", "name": "x"})

#: What a program's JSON can hold that torch would run, and what is said.
PROGRAMS: dict[str, tuple[Callable[[str], Callable[[Any], Any]], str]] = {
    "size": (lambda code: in_size(code), "has the size"),
    "size in a symbol": (lambda code: in_size(f"Symbol({code!r}).func({code})"), "has the size"),
    "power": (lambda code: in_size("Pow(Integer(9), Integer(999999999))"), "has the size"),
    "function": (lambda code: in_node(target="torch.os.system"), "calls 'torch.os.system'"),
    "operator of Python": (lambda code: in_node(target="_operator.methodcaller"), "calls '_operator.methodcaller'"),
    "library": (lambda code: in_node(target="torch.ops.load_library"), "calls 'torch.ops.load_library'"),
    "file": (lambda code: in_node(target="torch.ops.aten.from_file.default"), "not an operator on tensors"),
    "torch's own": (lambda code: in_node(target="torch.ops.image.read_file.default"), "not an operator on tensors"),
    "name of a node": (lambda code: in_node(name=f"x = {code}"), "has the name"),
    "name of an input": (lambda code: renamed("x", f"x={code}"), "has the (name|text)"),
    "name of a weight": (lambda code: renamed("stem.weight", f'a"){code}#'), "has the name"),
    "class": (lambda code: renamed("stem.weight", "__class__.forward"), "has the name"),
    "import": (lambda code: in_spec("out_spec", DEFAULTDICT, "collections.defaultdict"), "names a module to import"),
    "enum": (lambda code: in_spec("out_spec", ENUM, "builtins.dict"), "names a module to import"),
    "argument": (
        lambda code: (
            lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(
                forward_arg_names=[f"x={code}"]
            )
        ),
        "has the name",
    ),
    "symbols": (lambda code: lambda p: p["range_constraints"].update(u99999999999={"min_val": 0}), "has the name"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_would_run_something(name: str, folder: Path, tmp_path: Path, trap: Path) -> None:
    change, said = PROGRAMS[name]
    path = tmp_path / "int8.pt2"
    write_archive(path, changed(folder / "int8.pt2", MODEL, change(f"open({str(trap)!r}, 'w').close()")))
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match=f"is not an INT8 network written by lq, or is damaged: .*{said}"):
        lq.load(path)
    assert "antigravity" not in sys.modules


def test_what_torch_makes_of_them(folder: Path, tmp_path: Path) -> None:
    """Why this is looked at: torch does run it. Where it no longer does, less needs to be looked at."""
    sprung = tmp_path / "sprung"
    path = tmp_path / "int8.pt2"
    code = f"open({str(sprung)!r}, 'w').close() or Integer(2)"
    write_archive(path, changed(folder / "int8.pt2", MODEL, in_size(code)))
    torch.export.load(path)
    assert sprung.exists()


def test_guards_are_left_out(folder: Path, tmp_path: Path, trap: Path) -> None:
    path = tmp_path / "int8.pt2"
    code = f"open({str(trap)!r}, 'w').close() is None"
    write_archive(path, changed(folder / "int8.pt2", MODEL, lambda program: program.update(guards_code=[code])))
    assert lq.load(path)(X).shape == (8, 10)


@pytest.mark.filterwarnings("ignore:.*pickle.*:UserWarning")
@pytest.mark.parametrize("place", ["samples", "weights", "constants", "custom", "legacy weights", "old format"])
def test_pickles_stay_closed(place: str, folder: Path, tmp_path: Path, trap: Path) -> None:
    original, path = folder / "int8.pt2", tmp_path / "int8.pt2"
    if place == "samples":
        members, said = members_of(original) | {SAMPLES: pickled(trap)}, "example inputs are not plain tensors"
    elif place == "weights":
        members = changed(original, WEIGHTS, lambda config: first_weight(config).update(use_pickle=True))
        members["archive/data/weights/weight_0"] = pickled(trap, Trap(trap))
        said = "is not a plain tensor"
    elif place in ("constants", "custom"):
        file = "tensor_0" if place == "constants" else "opaque_obj_0"
        payload = {"path_name": file, "is_param": False, "use_pickle": True, "tensor_meta": None}
        members = changed(original, CONSTANTS, lambda config: {"config": {"c": payload}})
        members[f"archive/data/constants/{file}"] = pickle.dumps(Trap(trap))
        said = "is not a plain tensor" if place == "constants" else "lq writes no member"
    elif place == "legacy weights":
        members = members_of(original) | {"archive/data/weights/model.pt": pickled(trap, {"a": Trap(trap)})}
        said = "lq writes no member"
    else:
        names = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_example_inputs.pt")
        members = {"version": b"8.20"} | dict.fromkeys(names, pickled(trap))
        said = "do not lie in one folder"
    write_archive(path, members)
    refused(path, said)


def test_a_package_is_not_loaded_without_being_asked_for(folder: Path, tmp_path: Path) -> None:
    """Compiled code runs as it is loaded."""
    path = tmp_path / "int8.pt2"
    text = members_of(folder / "int8.pt2")["archive/extra/lq"].decode()
    described = json.dumps({"lq": text}).encode()
    library = {
        "archive/data/aotinductor/model/a.so": b"code",
        "archive/data/aotinductor/model/a_metadata.json": described,
    }
    write_archive(path, library)
    with pytest.raises(
        ValueError, match=r"compiled code, which runs as it is loaded; where you trust it: lq.load\('.*'aoti'\)"
    ):
        lq.load(path)
    main(inspect_file.Config, inspect_file.run, inspect_file.plan, argv=[str(path)])  # it reads what the file says
    assert "5 layers in INT8" in (tmp_path / "int8.pt2.html").read_text()
    assert read_metadata(path) == read_metadata(folder / "int8.pt2")
    write_archive(path, members_of(folder / "int8.pt2") | library)
    with pytest.raises(ValueError, match="compiled code"):
        lq.load(path)


@pytest.mark.parametrize("name", ["int8.pt2", "int8.onnx"])
def test_metadata_of_a_stranger(name: str, folder: Path, tmp_path: Path) -> None:
    def write(text: str) -> Path:
        path = tmp_path / name
        if name.endswith(".pt2"):
            write_archive(path, members_of(folder / name) | {"archive/extra/lq": text.encode()})
        else:
            model = onnx.load(folder / name)
            next(entry for entry in model.metadata_props if entry.key == "lq").value = text
            onnx.save(model, path)
        return path

    values = json.loads(members_of(folder / "int8.pt2")["archive/extra/lq"])
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": DEFAULTDICT, "children_spec": []}])
    refused(write(json.dumps(values | {"out_spec": spec})), "names a module to import")
    refused(write(json.dumps(values | {"inputs": ["x, y=print('hello')"]})), "name an input that is not an argument")
    refused(write("[" * 100_000), "metadata|damaged")
    refused(write(json.dumps({"lq": 1})), "metadata are not lq's")
    assert "antigravity" not in sys.modules


def test_any_flipped_bit_in_a_program_is_found(folder: Path, tmp_path: Path) -> None:
    """Nothing that is loaded is other than what was written; a bit of padding may be."""
    content = bytearray((folder / "int8.pt2").read_bytes())
    expected = lq.load(folder / "int8.pt2").state_dict()  # type: ignore[union-attr]
    chances, loaded = random.Random(0), 0
    for _ in range(60):
        bit = chances.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "int8.pt2").write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            found = lq.load(tmp_path / "int8.pt2").state_dict()  # type: ignore[union-attr]
        except ValueError:
            continue
        loaded += 1
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert loaded < 50


def test_a_flipped_bit_in_a_weight_is_found(folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / "int8.pt2").read_bytes())
    members = members_of(folder / "int8.pt2")
    name = max((name for name in members if "/weights/weight_" in name), key=lambda name: len(members[name]))
    content[content.index(members[name]) + 100] ^= 0x40
    (tmp_path / "int8.pt2").write_bytes(content)
    refused(tmp_path / "int8.pt2", f"is damaged: .*{name.rpartition('/')[2]}")


def test_onnx_values_elsewhere_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 100)
    for nested in (False, True):
        model = onnx.load(folder / "int8.onnx")
        tensor = next(value for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../secret"
        if nested:  # in a subgraph of an attribute of a node
            tensor = model.graph.initializer.pop(list(model.graph.initializer).index(tensor))
            inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
            model.graph.node.append(onnx.helper.make_node("If", ["a"], ["b"], then_branch=inner))
        path = tmp_path / "sub" / "int8.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.SerializeToString())
        for runtime in ("openvino", "onnxruntime"):
            with pytest.raises(ValueError, match=r"keeps values in another file \(external data\).*onnx.save"):
                lq.load(path, runtime)
        refused(path, "external data")


def test_onnx_checksum(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "int8.onnx")
    entry = next((entry for entry in model.metadata_props if entry.key == "lq.sha256"), None)
    entry = entry or model.metadata_props.add(key="lq.sha256")
    entry.value = hashlib.sha256(model.graph.SerializeToString()).hexdigest()
    path = tmp_path / "int8.onnx"
    onnx.save(model, path)
    assert lq.load(path)(X).shape == (8, 10)
    content = bytearray(path.read_bytes())
    weight = max(model.graph.initializer, key=lambda value: len(value.raw_data)).raw_data
    content[content.index(weight) + 50] ^= 0x40
    path.write_bytes(content)
    refused(path, r"is damaged: its graph is not the one that lq wrote \(checksum\)")


def test_statistics_unpack_to_no_more_than_statistics(
    prepared: torch.nn.Module, folder: Path, tmp_path: Path, trap: Path
) -> None:
    path = tmp_path / "statistics.npz"
    with np.load(folder / "statistics.npz") as arrays:
        values = dict(arrays)
    np.savez_compressed(path, **values | {"x/more": np.zeros(20_000_000, dtype=np.int64)})
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"unpacks to 160\d{6} bytes, and \d+ are the most"):
        lq.load_statistics(prepared, path)
    np.savez(path, **values | {"header": np.array([Trap(trap)], dtype=object)})
    with pytest.raises(ValueError, match="holds no statistics written by lq.save_statistics, or is damaged"):
        lq.load_statistics(prepared, path)


def archive_of(tmp_path: Path, *infos: tuple[str, bytes], **changes: Any) -> zipfile.ZipFile:
    path = tmp_path / "a.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in infos:
            info = zipfile.ZipInfo(name)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return zipfile.ZipFile(path)


@pytest.mark.parametrize(
    ("infos", "changes", "said"),
    [
        ([("a/b", b"1"), ("a/b", b"2")], {}, "two members of the name 'a/b'"),
        ([("/etc/passwd", b"1")], {}, "leads out of the archive"),
        ([("a/../../b", b"1")], {}, "leads out of the archive"),
        ([("a\\..\\b", b"1")], {}, "leads out of the archive"),
        ([("c:/b", b"1")], {}, "leads out of the archive"),
        ([("a/link", b"/etc/passwd")], {"external_attr": 0o120777 << 16}, "is a symbolic link"),
        ([("a/zeros", bytes(1000))], {"compress_type": zipfile.ZIP_DEFLATED}, "is compressed"),
        ([(f"a/{number}", b"") for number in range(11)], {}, "11 members, and 10 are the most"),
    ],
)
def test_archives(infos: list[tuple[str, bytes]], changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with archive_of(tmp_path, *infos, **changes) as archive, pytest.raises(ValueError, match=said):
        checked_members(archive, max_members=10)


def test_members_that_share_their_bytes(tmp_path: Path) -> None:
    """A thousand entries for one member: each is in order, all of them are many times the file."""
    with archive_of(tmp_path, ("a", bytes(100_000))) as archive:
        content = Path(archive.filename or "").read_bytes()
        entry = content[archive.start_dir : -22]
    entries = b"".join(entry[:-1] + bytes([byte]) for byte in range(40, 120) if byte not in b":/\\")
    count = len(entries) // len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entries), len(content) - 22 - len(entry), 0)
    path = tmp_path / "b.zip"
    path.write_bytes(content[: -22 - len(entry)] + entries + end)
    with pytest.raises(ValueError, match=r"its members take 7\d{6} bytes of the 1\d{5}|damaged"):
        read_members(path)


def test_checkpoints(tmp_path: Path, trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.arange(1000.0)}}, path)
    check_torch_archive(path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 99] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last.ckpt' is damaged: Bad CRC-32"):
        lq.quantize_checkpoint(path, torch.nn.Module)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        main(inspect_file.Config, inspect_file.run, inspect_file.plan, argv=[str(path)])
    assert "is damaged" in capsys.readouterr().err
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(1_000_000)}}, buffer)
    with zipfile.ZipFile(buffer) as whole:
        write_archive(path, {n: whole.read(n) for n in whole.namelist()}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="is compressed in a way that no such file is"):
        lq.quantize_checkpoint(path, torch.nn.Module)  # type: ignore[arg-type]
    torch.save({"state_dict": {}, "lq": Trap(trap)}, path)
    with pytest.raises(SystemExit):
        main(inspect_file.Config, inspect_file.run, inspect_file.plan, argv=[str(path)])
    assert "if it holds pickled objects and you trust it, add trusted=true" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds pickled objects"):
        lq.quantize_checkpoint(path, torch.nn.Module)  # type: ignore[arg-type]


class PickledHyperparameters(Wrapped):
    """Its checkpoints hold an object that only a pickle can."""

    def __init__(self, trap: Any = None) -> None:
        super().__init__()
        self.trap = trap

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.trap or Harmless()


class Harmless:
    """No plain value."""


def best(folder: Path) -> Any:
    return every_epoch(folder, monitor="val_acc", mode="max", save_top_k=1, save_on_train_epoch_end=False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_pickles_in_the_best_checkpoint(tmp_path: Path, trap: Path) -> None:
    """What this run wrote is its own. The path of the best one of a run that is resumed is the checkpoint's."""
    run = trainer(tmp_path, quantization(tmp_path), best(tmp_path), epochs=1)
    run.fit(module(PickledHyperparameters), train_data(), val_data())
    assert (tmp_path / "int8" / "int8.pt2").exists()
    stranger = tmp_path / "stranger.ckpt"
    torch.save({"state_dict": {}, "mine": Trap(trap)}, stranger)
    last = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=False)
    del checkpoint["mine"]
    (name,) = [name for name in checkpoint["callbacks"] if name.startswith("ModelCheckpoint")]
    score = torch.tensor(2.0)
    checkpoint["callbacks"][name].update(
        best_model_path=str(stranger),
        best_model_score=score,
        best_k_models={str(stranger): score},
        kth_best_model_path=str(stranger),
        kth_value=score,
    )
    torch.save(checkpoint, last)
    resumed = trainer(tmp_path, quantization(tmp_path), best(tmp_path), epochs=2)
    with pytest.raises(
        ValueError, match=r"'.*stranger.ckpt', was written by an earlier run, and holds pickled objects"
    ):
        resumed.fit(module(), train_data(), val_data(), ckpt_path=last)


def test_images_of_any_size_and_kind(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    size = content.index(b"\xff\xc0") + 5  # height and width in the header of the frame
    content[size : size + 4] = struct.pack(">HH", 65_500, 65_500)
    for name, damaged in {"huge.jpg": bytes(content), "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}: .*(decompression bomb|cannot identify)"):
            decode_rgb(tmp_path / name)


def in_little_memory(act: str, path: Path) -> None:
    """Runs in a process of its own, which may take 300 MB beyond what it has."""
    from lq.data import CIFAR10, MNIST

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, used + 300_000_000))
    try:
        data = CIFAR10(str(path), cache_dir=str(path.parent / "cache")) if act == "zip" else MNIST(str(path))
        data.setup()
    except ValueError as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("it was read")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="takes Linux")
@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_data_that_unpack_to_gigabytes(kind: str, tmp_path: Path) -> None:
    if kind == "zip":
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for split in ("train", "test"):
                with archive.open(f"{split}/cat/0.png", "w", force_zip64=True) as member:
                    for _ in range(500):
                        member.write(bytes(1_000_000))
        said = "0.png of .* has 500000000 bytes, and an image of 32x32 pixels at most"
    else:
        path = tmp_path / "raw"
        path.mkdir()
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            with gzip.open(path / f"{name}-ubyte.gz", "wb") as file:
                dimensions = int(name[-1])
                shape = (10, 28, 28)[:dimensions]
                file.write(bytes((0, 0, 8, dimensions)) + struct.pack(f">{dimensions}I", *shape))
                for _ in range(500):
                    file.write(bytes(1_000_000))
        said = r"gives the shape \(10, 28, 28\), which 7904 or more bytes follow"
    process = start(in_little_memory, kind, path, output=tmp_path / "output")
    finish(process, tmp_path / "output")
    assert re.search(f"refused: .*{said}", (tmp_path / "output").read_text())
