"""Parsed YAML or JSON → frozen dataclass, every problem of the file at once, nothing ignored."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from defaker_opt.errors import ConfigError, one_of

T = TypeVar("T")

# A problem sink: called with the path of a key ("passes[0].quantize.rules") and what is wrong there.
Report = Callable[[str, str], None]


class Invalid(ValueError):
    """Raised by a dataclass's `__post_init__`; the message says what is wrong with the value."""


def read_value(
    kind: type[T], data: object, file: Path | str, also: Callable[[Report], None] = lambda report: None
) -> T:
    """Build `kind` (a frozen dataclass) from parsed data. Raises ConfigError with every problem found.

    also: reports what is wrong beyond the types.
    """
    problems: list[str] = []

    def report(where: str, what: str) -> None:
        problems.append(f"{where}: {what}" if where else what)

    value = parse(kind, data, "", report)
    also(report)
    if problems:
        raise ConfigError(file, problems)
    return typing.cast("T", value)


def read_json(kind: type[T], path: Path) -> T:
    """Read a JSON file into a frozen dataclass. Raises ConfigError."""
    try:
        return read_value(kind, json.loads(path.read_text(encoding="utf-8")), path)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(path, [f"cannot be read ({error})"]) from error


def read_yaml(path: Path) -> object:
    """Parse one YAML document; a repeated key is an error, because YAML would keep the last silently."""
    import yaml

    repeated: list[str] = []

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
        keys = [str(loader.construct_object(key)) for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            repeated.append(f"line {node.start_mark.line + 1}: {', '.join(twice)} given twice")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(path, [f"cannot be read ({' '.join(str(error).split())})"]) from error
    if repeated:
        raise ConfigError(path, repeated)
    return data


def parse(kind: Any, data: object, where: str, report: Report) -> object:
    """Check `data` against a type; problems go to `report`, and the result is then not to be used."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(typing.cast("type", kind), data, where, report)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else parse(next(a for a in arguments if a is not type(None)), data, where, report)
    if origin is tuple:
        return _parse_tuple(arguments, data, where, report)
    if origin is dict:
        return _parse_dict(arguments[1], data, where, report)
    if origin is typing.Literal:
        if data not in arguments:
            report(where, one_of(data, map(str, arguments)))
        return data
    return _parse_scalar(kind, data, where, report)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several kinds of a noun ("pass"), each with settings of its own. kind_of: a known name → its dataclass."""

    noun: str
    known: Sequence[str]
    kind_of: Callable[[str], Any]


def parse_choice(choice: Choice, setting: Mapping[str, Any], where: str, report: Report) -> object:
    """A mapping {name: settings} as the kind of that name."""
    if len(setting) != 1:
        got = ", ".join(map(str, setting)) or "none"
        report(where, f"must be one {choice.noun} with its settings, got the keys {got}")
        return None
    ((name, settings),) = setting.items()
    if name not in choice.known:
        report(where, f"unknown {choice.noun}, {one_of(name, choice.known)}")
        return None
    return parse(choice.kind_of(name), settings or {}, f"{where}.{name}", report)


def _parse_dataclass(kind: type, data: object, where: str, report: Report) -> object:
    if not isinstance(data, Mapping):
        report(where, f"must be a mapping of keys, got {_show(data)}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, object] = {}
    failed = False

    def note(inner: str, what: str) -> None:
        nonlocal failed
        failed = True
        report(inner, what)

    for key in data:
        if key not in fields:
            note(_join(where, str(key)), f"unknown key, {one_of(key, fields)}")
    for name, field in fields.items():
        if name in data:
            values[name] = _parse_field(kind, name, hints[name], data[name], _join(where, name), note)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            note(_join(where, name), "missing, and it has no default")
    if failed:
        return None
    try:
        return kind(**values)
    except Invalid as error:
        report(where, str(error))
        return None


def _parse_field(kind: type, name: str, hint: Any, data: object, where: str, report: Report) -> object:
    """A class may check fields by themselves: CHECKS, name → what is wrong with a value, or None."""
    failed = False

    def note(inner: str, what: str) -> None:
        nonlocal failed
        failed = True
        report(inner, what)

    value = parse(hint, data, where, note)
    check = getattr(kind, "CHECKS", {}).get(name)
    problem = check(value) if check and not failed else None
    if problem:
        report(where, problem)
    return value


def _parse_tuple(arguments: tuple[Any, ...], data: object, where: str, report: Report) -> object:
    if not isinstance(data, (list, tuple)):
        report(where, f"must be a list, got {_show(data)}")
        return ()
    if Ellipsis not in arguments and len(data) != len(arguments):
        report(where, f"must have {len(arguments)} entries, got {len(data)}")
        return ()
    return tuple(parse(arguments[0], item, f"{where}[{index}]", report) for index, item in enumerate(data))


def _parse_dict(value_kind: Any, data: object, where: str, report: Report) -> object:
    if not isinstance(data, Mapping):
        report(where, f"must be a mapping of keys, got {_show(data)}")
        return {}
    return {str(key): parse(value_kind, item, _join(where, str(key)), report) for key, item in data.items()}


def _parse_scalar(kind: type, data: object, where: str, report: Report) -> object:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    accepted = isinstance(data, kind) or (kind is float and isinstance(data, int))
    if not accepted or (isinstance(data, bool) and kind is not bool):
        report(where, f"must be {names.get(kind, kind.__name__)}, got {_show(data)}")
        return None
    try:
        return float(typing.cast("float", data)) if kind is float else data
    except OverflowError:
        report(where, f"must be a number that fits a float, got {_show(data)}")
        return None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _show(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
