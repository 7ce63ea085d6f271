"""Typed configs for recipes: a dataclass, YAML files on top of it, ``key=value`` overrides on top of those.

A recipe declares its config as a dataclass of :func:`field` and hands it to :func:`main`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lq.errors import ConfigError

T = TypeVar("T")

_USAGE = "[--config FILE] [--dry-run] [--help] [key=value ...]"


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """A parsed command line.

    Attributes:
        config: an instance of the recipe's config dataclass.
        dry_run: the user asked only what would be done.
    """

    config: T
    dry_run: bool


def field(
    default: Any = dataclasses.MISSING, *, help: str, choices: Sequence[Any] = (), positional: bool = False
) -> Any:
    """A dataclass field with a help text and, optionally, the values it may take.

    Args:
        default: copied for every instance, so lists and groups are fine. Without a default the user must give a value.
        help: what the key means, in one sentence.
        choices: the allowed values, where the type (a ``Literal``, an ``Enum``) does not name them.
        positional: whether arguments without a ``key=`` are this key's, a list.

    Example:
        >>> @dataclass
        ... class Config:
        ...     lr: float = field(0.1, help="peak learning rate")
        ...     optimizer: str = field("sgd", help="which one", choices=("sgd", "adamw"))
        >>> parse(Config, ["lr=1e-2"]).config
        Config(lr=0.01, optimizer='sgd')
    """
    metadata = {"help": help, "choices": tuple(choices), "positional": positional}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def parse(config_cls: type[T], argv: Sequence[str]) -> Parsed[T]:
    """Reads ``[--config FILE] [--dry-run] [key=value ...]``; ``--help`` is for :func:`main`.

    Files are read before overrides, wherever they stand. Of two values for one key the later one wins.

    Args:
        config_cls: a dataclass; fields that are dataclasses are groups, whose keys are dotted.
        argv: the arguments, without the name of the program.

    Raises:
        ConfigError: for what is misspelt, of the wrong type, not among the choices, or missing.
    """
    files, overrides, words, dry_run = _split_argv(argv)
    schema = _schema(config_cls)
    if words:
        taker = next((key for key in schema.values() if key.positional), None)
        if taker is None:
            raise ConfigError(f"expected key=value, got {words[0]!r}")
        overrides.append((taker.name, words))
    conf = OmegaConf.structured(_without_literals(config_cls))
    for file in files:
        for name, value in _flatten(_load_yaml(file), schema):
            _assign(conf, _find(name, schema, f"{file}: "), value, f"{file}: ")
    for name, text in overrides:
        key = _find(name, schema)
        _assign(conf, key, _value(key, text) if isinstance(text, str) else text)
    return Parsed(_finish(conf, schema, config_cls), dry_run)


def main(
    config_cls: type[T],
    run: Callable[[T], object],
    plan: Callable[[T], str],
    description: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a recipe from its command line.

    Args:
        config_cls: the recipe's config dataclass.
        run: the recipe. A :class:`ConfigError` that it raises is reported as one from the command line.
        plan: says what :attr:`run` would do. ``--dry-run`` prints it, as a comment, below the resolved config, and
            what it prints is a file for ``--config``.
        description: printed by ``--help`` above the keys.
        argv: the arguments; None takes those of the process.

    Raises:
        SystemExit: with code 2, and one line on stderr, for a :class:`ConfigError`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(config_cls, description)
        return
    try:
        parsed = parse(config_cls, argv)
        if parsed.dry_run:
            print(
                to_yaml(parsed.config), *(f"# {line}".rstrip() for line in plan(parsed.config).splitlines()), sep="\n"
            )
        else:
            run(parsed.config)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def to_yaml(config: object) -> str:
    """A config dataclass as YAML, such as ``--config`` reads."""
    cls = _without_literals(type(config))
    return OmegaConf.to_yaml(OmegaConf.create(_plain(OmegaConf.structured(_copied(config, cls)), resolve=True)))


def print_help(config_cls: type[Any], description: str = "") -> None:
    """Prints the usage, and a table of every key with its type, default and meaning."""
    keys = _schema(config_cls)
    key_width = max(len(name) for name in keys)
    console = Console()
    # Keys are for copying, so the table may be wider than a very narrow console.
    console.width = max(console.width, key_width + 50)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("key", no_wrap=True, min_width=key_width)
    table.add_column("type", overflow="fold", max_width=20)
    table.add_column("default", overflow="fold", max_width=16)
    table.add_column("meaning", overflow="fold")
    for name, key in keys.items():
        cells = (name, "", "", key.help) if key.group else (name, key.type_name, key.default, key.meaning)
        # Text, because rich would read the brackets of list[int] as markup.
        table.add_row(*map(Text, cells), style="bold" if key.group else "")
    words = "".join(f"{name.upper().removesuffix('S')}... " for name, key in keys.items() if key.positional)
    console.print(Text(f"usage: {_program()} {words}{_USAGE}\n"), soft_wrap=True)
    if description:
        # A command that is broken into lines is no command.
        console.print(Text(description.strip() + "\n"), soft_wrap=True)
    console.print(table)


@dataclass(frozen=True)
class _Key:
    """One key of a config, or a group of keys."""

    name: str
    hint: Any
    help: str
    choices: tuple[Any, ...]
    group: bool
    default: str
    positional: bool = False

    @property
    def type_name(self) -> str:
        return _type_name(self.hint)

    @property
    def meaning(self) -> str:
        return f"{self.help} (one of {_listed(self.choices)})" if self.choices else self.help

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types that a value may have, None aside."""
        union = get_origin(self.hint) in (Union, types.UnionType)
        return tuple(t for t in (get_args(self.hint) if union else (self.hint,)) if t is not types.NoneType)

    @property
    def optional(self) -> bool:
        return types.NoneType in get_args(self.hint)


def _schema(config_cls: type[Any]) -> dict[str, _Key]:
    if not (isinstance(config_cls, type) and dataclasses.is_dataclass(config_cls)):
        raise TypeError(f"config_cls={config_cls!r} must be a dataclass.")
    return dict(_walk(config_cls, _plain(OmegaConf.structured(_without_literals(config_cls)), resolve=False), ""))


def _without_literals(config_cls: type[Any]) -> type[Any]:
    """A dataclass like ``config_cls`` for OmegaConf 2.3, which Hydra needs and which does not support ``Literal``: it
    gets the type of the choices, and the choices are checked here."""
    hints = get_type_hints(config_cls)
    fields = []
    for item in dataclasses.fields(config_cls):
        hint = hints[item.name]
        if _is_group(hint):
            hint = _without_literals(hint)
            default = dataclasses.field(default_factory=partial(_default, item, hint))
        elif item.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=item.default_factory)
        else:
            default = dataclasses.field(default=MISSING if item.default is dataclasses.MISSING else item.default)
        fields.append((item.name, _open(hint), default))
    return dataclasses.make_dataclass(config_cls.__name__, fields)


def _default(item: dataclasses.Field[Any], cls: type[Any]) -> Any:
    """A group's default, in the class that OmegaConf gets."""
    if item.default_factory is dataclasses.MISSING:
        return cls()
    return _copied(item.default_factory(), cls)


def _copied(config: Any, cls: type[Any]) -> Any:
    """The values of a config in another class of the same fields."""
    hints = get_type_hints(cls)

    def copied(hint: Any, value: Any) -> Any:
        if _is_group(hint):
            return _copied(value, hint)
        # OmegaConf 2.3 makes lists of tuples.
        is_tuple = tuple in (get_origin(hint), *map(get_origin, get_args(hint)))
        return tuple(value) if is_tuple and isinstance(value, list) else value

    names = [item.name for item in dataclasses.fields(cls)]
    return cls(**{name: copied(hints[name], getattr(config, name)) for name in names})


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _open(hint: Any) -> Any:
    """The type ``hint``, with the type of its choices in place of a ``Literal``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        kinds = {type(choice) for choice in arguments}
        return kinds.pop() if len(kinds) == 1 else Any
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_open, arguments))]  # noqa: UP007
    return hint


def _walk(config_cls: type[Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, _Key]]:
    hints = get_type_hints(config_cls)
    for item in dataclasses.fields(config_cls):
        name, hint, default = prefix + item.name, hints[item.name], defaults[item.name]
        group = _is_group(hint)
        help, choices = item.metadata.get("help", ""), item.metadata.get("choices", ())
        positional = item.metadata.get("positional", False)
        yield name, _Key(name, hint, help, choices, group, "" if group else _text(default), positional)
        if group:
            yield from _walk(hint, default, name + ".")


def _split_argv(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | list[str]]], list[str], bool]:
    files: list[str] = []
    overrides: list[tuple[str, str | list[str]]] = []
    words: list[str] = []
    dry_run = False
    arguments = iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name == "--config":
            file = text if equals else next(arguments, "")
            if not file:
                raise ConfigError("--config needs a file: --config FILE")
            files.append(file)
        elif argument == "--dry-run":
            dry_run = True
        elif argument.startswith("-"):
            hint = f"; keys have no dashes: {argument.lstrip('-')}" if equals else ""
            raise ConfigError(f"unknown option {argument!r}; options are --config FILE, --dry-run and --help{hint}")
        elif not equals:
            words.append(argument)
        else:
            overrides.append((name, text))
    return files, overrides, words, dry_run


def _load_yaml(file: str) -> Mapping[Any, Any]:
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"config file {file!r} does not exist") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read config file {file!r}: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file}: expected 'key: value' lines, found a list")
    values: Mapping[Any, Any] = _plain(loaded, resolve=False)
    return values


def _flatten(values: Mapping[Any, Any], schema: Mapping[str, _Key], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for part, value in values.items():
        name = f"{prefix}{part}"
        if name in schema and schema[name].group and isinstance(value, Mapping | None):
            # A group whose lines are all commented out reads as None.
            yield from _flatten(value or {}, schema, name + ".")
        else:
            yield name, value


def _find(name: str, schema: Mapping[str, _Key], source: str = "") -> _Key:
    if name not in schema:
        # By the last part too, so that batch_size matches data.batch_size.
        by_part: dict[str, list[str]] = {}
        for known in schema:
            by_part.setdefault(known.rpartition(".")[2], []).append(known)
        parts = difflib.get_close_matches(name.rpartition(".")[2], by_part)
        near = [*difflib.get_close_matches(name, schema), *(known for part in parts for known in by_part[part])]
        suggestion = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "no key is similar;"
        raise ConfigError(f"{source}unknown key {name!r}; {suggestion} --help lists all keys")
    key = schema[name]
    if key.group:
        members = ", ".join(known for known in schema if known.startswith(name + "."))
        raise ConfigError(f"{source}{name!r} is a group of keys; set one of {members}")
    return key


def _value(key: _Key, text: str) -> Any:
    """The value of an override's text: YAML, but strings as they are, because YAML could read them as numbers."""
    if key.optional and text == "null":
        return None
    if all(_is_text(alternative) for alternative in key.alternatives):
        return text
    try:
        return _plain(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key.name}={text}: not valid YAML for {key.type_name}") from error


def _is_text(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in get_args(hint))
    return isinstance(hint, type) and issubclass(hint, str | Path | Enum)


def _assign(conf: DictConfig, key: _Key, value: Any, source: str = "") -> None:
    try:
        OmegaConf.update(conf, key.name, value, merge=False)
    except OmegaConfBaseException as error:
        choices = [choice for hint in key.alternatives for choice in _choices(hint)]
        wanted = _one_of(choices, value) if choices else f"{key.type_name}{_form_hint(key)}"
        raise ConfigError(f"{source}{key.name}={_text(value)}: expected {wanted}") from error
    if not (isinstance(value, str) and "${" in value):  # a reference is checked once all values are there
        _check_literal(key, OmegaConf.select(conf, key.name), source)


def _check_literal(key: _Key, value: Any, source: str = "") -> None:
    if not all(get_origin(hint) is Literal for hint in key.alternatives) or (key.optional and value is None):
        return
    choices = [choice for hint in key.alternatives for choice in get_args(hint)]
    if value != MISSING and value not in choices:
        raise ConfigError(f"{source}{key.name}={_text(value)}: expected {_one_of(choices, value)}")


def _finish(conf: DictConfig, schema: Mapping[str, _Key], config_cls: type[Any]) -> Any:
    """The typed config, with the checks that need all values, as they may refer to each other."""
    for key in schema.values():
        try:
            value = OmegaConf.select(conf, key.name, default=MISSING)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key.name}: {str(error).splitlines()[0]}") from error
        if value == MISSING:
            raise ConfigError(f"{key.name} has no value; give {key.name}=VALUE ({key.type_name})")
        if key.choices and value not in key.choices and not (key.optional and value is None):
            raise ConfigError(f"{key.name}={_text(value)}: expected {_one_of(key.choices, value)}")
        if not key.group:
            _check_literal(key, value)
    try:
        return _copied(OmegaConf.to_object(conf), config_cls)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        # Raised by a dataclass's own __post_init__.
        raise ConfigError(str(error).splitlines()[0]) from error


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(hint.__members__) if isinstance(hint, type) and issubclass(hint, Enum) else ()


def _listed(choices: Sequence[Any]) -> str:
    """As they are written in YAML and on the command line."""
    return ", ".join("null" if choice is None else str(choice) for choice in choices)


def _one_of(choices: Sequence[Any], value: Any) -> str:
    near = difflib.get_close_matches(str(value), list(map(str, choices)), n=1)
    return f"one of {_listed(choices)}" + (f"; did you mean {near[0]}?" if near else "")


def _form_hint(key: _Key) -> str:
    """How a value with several parts is written."""
    forms = {list: ", written [a,b]", tuple: ", written [a,b]", dict: ", written {a: b}"}
    return next((forms[form] for hint in key.alternatives if (form := get_origin(hint)) in forms), "")


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    if choices := _choices(hint):
        return " | ".join(map(str, choices))
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _text(value: Any) -> str:
    """A value as the user would write it."""
    match value:
        case str() if value == MISSING:
            return "(required)"
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case list():
            return f"[{', '.join(map(_text, value))}]"
        case str():
            return value or '""'
    return str(value)


def _plain(conf: Any, resolve: bool) -> Any:
    """A config as dicts, lists and YAML scalars only."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return convert(OmegaConf.to_container(conf, resolve=resolve, enum_to_str=True))


def _program() -> str:
    """How the user started this program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {Path(sys.argv[0]).name}"
