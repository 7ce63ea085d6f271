"""Recipe configs through their public door: parse, main, to_yaml and print_help."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.errors import ConfigError
from lq.recipes.blocks.config import field, main, parse, print_help, to_yaml


class Mode(Enum):
    PTQ = "post-training"
    QAT = "quantization-aware"


@dataclass
class Data:
    root: Path = field(Path("data"), help="where the data set lies")
    batch_size: int = field(128, help="images per step")


@dataclass
class Config:
    data: Data = field(Data(batch_size=64), help="what to train on")
    name: str = field("run", help="name of the run")
    network: str = field("resnet18", help="the network", choices=("resnet18", "resnet34"))
    lr: float = field(0.1, help="peak learning rate")
    limit: int | None = field(None, help="images to use; null for all")
    optimizer: Literal["sgd", "adamw"] = field("sgd", help="which optimizer")
    mode: Mode = field(Mode.PTQ, help="when to quantize")
    milestones: tuple[float, ...] = field((0.5, 0.75), help="where the learning rate drops")
    tags: list[str] = field([], help="words for the log")
    augment: bool = field(True, help="random [crops] and flips")
    layers: dict[str, Any] = field({}, help="settings by the names of layers")


@dataclass
class Required:
    root: Path = field(help="where the data set lies")


@dataclass
class Strict:
    epochs: int = field(1, help="passes over the data")

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")


def plan(config: Config) -> str:
    return f"train {config.network}\nquantize it"


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "variant.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_arguments_the_config_is_the_dataclass_with_its_defaults() -> None:
    parsed = parse(Config, [])
    assert parsed.config == Config()
    assert parsed.config.data.batch_size == 64
    assert not parsed.dry_run


def test_defaults_are_not_shared_between_instances() -> None:
    Config().tags.append("changed")
    Config().data.batch_size = 1
    assert Config().tags == []
    assert Config().data.batch_size == 64


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.batch_size=32", Config(data=Data(batch_size=32))),
        ("data.root=/somewhere/else", Config(data=Data(root=Path("/somewhere/else"), batch_size=64))),
        ("lr=1e-3", Config(lr=1e-3)),
        ("lr=1", Config(lr=1.0)),
        ("limit=5", Config(limit=5)),
        ("limit=null", Config(limit=None)),
        ("optimizer=adamw", Config(optimizer="adamw")),
        ("mode=QAT", Config(mode=Mode.QAT)),
        ("milestones=[0.25]", Config(milestones=(0.25,))),
        ("tags=[a,b]", Config(tags=["a", "b"])),
        ("augment=false", Config(augment=False)),
        ("name=a=b", Config(name="a=b")),
        ("name=", Config(name="")),
        ("name=${network}", Config(name="resnet18")),
    ],
)
def test_override_sets_one_key_to_a_value_of_its_type(override: str, expected: Config) -> None:
    config = parse(Config, [override]).config
    assert config == expected
    # Equality takes 1 for 1.0.
    assert type(config.lr) is float


@pytest.mark.parametrize("text", ["yes", "off", "007", "1e3", "null", "1_000", "a: b", "#x", "[", " padded "])
def test_string_keys_take_the_text_as_it_is_where_yaml_would_make_something_else_of_it(text: str) -> None:
    assert parse(Config, [f"name={text}"]).config.name == text


def test_last_of_two_overrides_wins() -> None:
    assert parse(Config, ["lr=1", "tags=[a,b]", "lr=2", "tags=[c]"]).config == Config(lr=2.0, tags=["c"])


def test_files_come_before_overrides_wherever_they_stand(yaml_file: Callable[[str], str]) -> None:
    path = yaml_file("lr: 0.5\ndata:\n  batch_size: 8\nmode: QAT\n")
    for argv in (["lr=2", "--config", path], [f"--config={path}", "lr=2"]):
        assert parse(Config, argv).config == Config(lr=2.0, mode=Mode.QAT, data=Data(batch_size=8))


def test_later_file_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("lr: 1\nname: first")
    second.write_text("lr: 2")
    assert parse(Config, ["--config", str(first), "--config", str(second)]).config == Config(lr=2.0, name="first")


@pytest.mark.parametrize("text", ["", "data:\n  # batch_size: 8\n", "# nothing\n"])
def test_file_or_group_with_everything_commented_out_changes_nothing(
    text: str, yaml_file: Callable[[str], str]
) -> None:
    assert parse(Config, ["--config", yaml_file(text)]).config == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nam=x"], r"unknown key 'nam'; did you mean name\?"),
        (["batch_size=4"], r"unknown key 'batch_size'; did you mean data\.batch_size\?"),
        (["data.batchsize=4"], r"unknown key 'data\.batchsize'; did you mean data\.batch_size\?"),
        (["zzz=4"], r"unknown key 'zzz'; no key is similar; --help lists all keys"),
        (["data=4"], r"'data' is a group of keys; set one of data\.root, data\.batch_size"),
        (["lr=fast"], r"lr=fast: expected float"),
        (["data.batch_size=1.5"], r"data\.batch_size=1\.5: expected int"),
        (["limit=many"], r"limit=many: expected int \| null"),
        (["lr=null"], r"lr=null: expected float"),
        (["milestones=0.5"], r"milestones=0\.5: expected tuple\[float, \.\.\.\], written \[a,b\]"),
        (["milestones=[0.5"], r"milestones=\[0\.5: not valid YAML for tuple\[float, \.\.\.\]"),
        (["layers=3"], r"layers=3: expected dict\[str, Any\], written \{a: b\}"),
        (["optimizer=sdg"], r"optimizer=sdg: expected one of sgd, adamw; did you mean sgd\?"),
        (["mode=FAST"], r"mode=FAST: expected one of PTQ, QAT"),
        (["network=resnet19"], r"network=resnet19: expected one of resnet18, resnet34; did you mean resnet18\?"),
        (["name=${nowhere}"], r"name: .*nowhere"),
        (["name=${"], r"name=\$\{: expected str"),
        (["lr"], r"expected key=value, got 'lr'"),
        (["--lr=1"], r"unknown option '--lr=1'; options are --config FILE, --dry-run .*; keys have no dashes: lr=1"),
        (["--dryrun"], r"unknown option '--dryrun'; options are"),
        (["--config"], r"--config needs a file"),
        (["--config", "nowhere.yaml"], r"config file 'nowhere\.yaml' does not exist"),
    ],
)
def test_mistake_is_named_with_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(Config, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", r"variant\.yaml: lr=fast: expected float"),
        ("learning_rate: 1", r"variant\.yaml: unknown key 'learning_rate'"),
        ("data:\n  batchsize: 4", r"variant\.yaml: unknown key 'data\.batchsize'; did you mean data\.batch_size\?"),
        ("data: 4", r"variant\.yaml: 'data' is a group of keys"),
        ("lr: 1\nname: [a", r"variant\.yaml:\d+:\d+: not valid YAML"),
        ("lr: 1\nlr: 2", r"variant\.yaml:2:1: not valid YAML: found duplicate key"),
        ("- lr", r"variant\.yaml: expected 'key: value' lines"),
    ],
)
def test_mistake_in_a_file_is_named_with_the_file(text: str, message: str, yaml_file: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Config, ["--config", yaml_file(text)])


def test_config_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config file"):
        parse(Config, ["--config", str(tmp_path)])


def test_key_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"root has no value; give root=VALUE \(Path\)"):
        parse(Required, [])
    assert parse(Required, ["root=here"]).config == Required(root=Path("here"))


def test_what_the_dataclass_itself_refuses_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="epochs=0 must be at least 1"):
        parse(Strict, ["epochs=0"])


def test_config_class_must_be_a_dataclass() -> None:
    with pytest.raises(TypeError, match=r"config_cls=.* must be a dataclass"):
        parse(int, [])


# "$" starts an interpolation and "???" is a missing value: the two texts that do not stand for themselves.
names = st.text(st.characters(codec="utf-8", exclude_categories="C", exclude_characters="$"), max_size=20).filter(
    lambda text: text != "???"
)
configs = st.builds(
    Config,
    data=st.builds(Data, root=st.just(Path("a/b")), batch_size=st.integers(1, 10**6)),
    name=names,
    network=st.sampled_from(["resnet18", "resnet34"]),
    lr=st.floats(0, 1e6, allow_subnormal=False),
    limit=st.none() | st.integers(-(10**9), 10**9),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    mode=st.sampled_from(Mode),
    milestones=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    tags=st.lists(st.from_regex(r"[a-z]{4,8}x", fullmatch=True), max_size=3),
    augment=st.booleans(),
    layers=st.dictionaries(
        st.from_regex(r"[a-z]{3,6}\.[a-z*]{1,6}x", fullmatch=True),
        st.none() | st.integers(0, 8) | st.fixed_dictionaries({"weight_bits": st.integers(2, 8)}),
        max_size=3,
    ),
)


def as_overrides(config: Config) -> list[str]:
    values = {
        "data.root": config.data.root,
        "data.batch_size": config.data.batch_size,
        "name": config.name,
        "network": config.network,
        "lr": config.lr,
        "limit": "null" if config.limit is None else config.limit,
        "optimizer": config.optimizer,
        "mode": config.mode.name,
        "milestones": list(config.milestones),
        "tags": f"[{','.join(config.tags)}]",
        "augment": config.augment,
        "layers": json.dumps(config.layers),
    }
    return [f"{key}={value}" for key, value in values.items()]


@settings(deadline=None, max_examples=30)
@given(config=configs)
def test_any_config_can_be_given_as_overrides(config: Config) -> None:
    assert parse(Config, as_overrides(config)).config == config


@settings(deadline=None, max_examples=30)
@given(config=configs)
def test_any_config_survives_its_yaml(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse(Config, ["--config", str(path)]).config == config


def test_main_runs_the_recipe_with_its_config() -> None:
    ran: list[Config] = []
    main(Config, ran.append, plan, argv=["lr=2"])
    assert ran == [Config(lr=2.0)]


def test_main_takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py", "lr=3"])
    ran: list[Config] = []
    main(Config, ran.append, plan)
    assert ran == [Config(lr=3.0)]


def test_mistake_is_one_line_on_stderr_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[Config] = []
    with pytest.raises(SystemExit, match=r"^2$"):
        main(Config, ran.append, plan, argv=["lrr=2"])
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: unknown key 'lrr'; did you mean lr? --help lists all keys\n")
    assert not ran


def test_dry_run_prints_a_config_file_with_the_plan_and_does_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[Config] = []
    main(Config, ran.append, plan, argv=["--dry-run", "lr=2", "mode=QAT", "name=${network}"])
    out = capsys.readouterr().out
    assert out.endswith("# train resnet18\n# quantize it\n")
    assert not ran

    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    assert parse(Config, ["--config", str(printed)]).config == Config(lr=2.0, mode=Mode.QAT, name="resnet18")


KEYS = ["data.root", "data.batch_size", "name", "network", "lr", "limit", "optimizer", "mode", "milestones", "tags"]


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_lists_every_key_unbroken(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    main(Config, pytest.fail, plan, description="Trains it.", argv=["lrr=2", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: ")
    assert "Trains it." in out
    for key in KEYS:
        assert re.search(rf"^{re.escape(key)} ", out, re.MULTILINE), key
    if columns == "80":
        # The usage line is for copying and stays whole.
        assert max(map(len, out.splitlines()[1:])) <= 80


def test_help_says_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    print_help(Config)
    lines = {line.split()[0]: re.split(r"  +", line.rstrip()) for line in capsys.readouterr().out.splitlines() if line}
    assert lines["data"] == ["data", "what to train on"]
    # The group's default, and not that of the dataclass.
    assert lines["data.batch_size"] == ["data.batch_size", "int", "64", "images per step"]
    assert lines["limit"] == ["limit", "int | null", "null", "images to use; null for all"]
    assert lines["optimizer"] == ["optimizer", "sgd | adamw", "sgd", "which optimizer"]
    assert lines["mode"] == ["mode", "PTQ | QAT", "PTQ", "when to quantize"]
    assert lines["network"] == ["network", "str", "resnet18", "the network (one of resnet18, resnet34)"]
    assert lines["augment"] == ["augment", "bool", "true", "random [crops] and flips"]

    print_help(Required)
    assert re.search(r"root +Path +\(required\) +where the data set lies", capsys.readouterr().out)
