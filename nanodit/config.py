"""The strict config loader of all packages: YAML -> frozen pydantic models, nothing unknown, nothing silent.

A file named ``configs/...`` is the shipped one where the working directory has none. A file may inherit with
``extends: OTHER.yaml`` (relative to the file); sections merge, everything else replaces, also a mapping whose keys the
user chooses.
Overrides are ``dotted.path=value``: the value of a key that is text is taken as it is, any other is read as YAML. Every
error names the file, the path of the key and, for an unknown one, the nearest key that exists.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from nanodit.errors import PROBLEM_BREAK, ConfigError

MOST_SHOWN = 200  # letters of a wrong value
MOST_LETTERS = 1_000_000  # of a file: ours have ten thousand
MOST_VALUES = 100_000  # of a document with its aliases written out: ours have a hundred


TAG = re.compile(r"[\[\]()-]")  # in the names that pydantic has for members of a union


class Config(BaseModel):
    """Base of every config section: immutable, and an unknown key is an error."""

    # strict: "false" is not a bool and "3" is not a number; YAML has its own types
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


# a file, folder or URL; shells leave the ~ in output=~/datasets alone, and nobody wants a folder of that name
Place = Annotated[str, AfterValidator(os.path.expanduser)]

T = TypeVar("T", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2 (``3e-4`` is a number, ``on`` is text), no tags and no duplicate keys."""


_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# the core schema of YAML 1.2.2, section 10.3.2
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
# YAML 1.1 reads 010 as 8 and 1:30 as 90; with the core schema both are plain
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _integer(loader, node))


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text)
    except ValueError:  # Python reads 4,300 digits and no more
        where = f"{node.start_mark.name}:{node.start_mark.line + 1}"
        raise ConfigError(f"{where}: an integer of {len(text)} digits is no setting") from None


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise ConfigError(f"{where}: key {key!r} is not text; quote it")
        if key in mapping:
            raise ConfigError(f"{where}: duplicate key {key!r}; remove one of the two")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML document strictly; ``name`` is what errors call it. Raises :class:`ConfigError`."""
    check_text(text, name)
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_VALUES:
            raise ConfigError(f"{name}: its aliases stand for more than {MOST_VALUES:,} values; write it without them")
        return loader.construct_document(node)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{name}:{error.problem_mark.line + 1}: {error.problem}; only plain YAML is read") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    finally:
        loader.dispose()


def check_text(text: str, name: str) -> None:
    """Raise :class:`ConfigError` for text that YAML cannot hold: not UTF-8 (as the system hands it on), or controls."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{name}: not UTF-8 text: {text!a}")
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        raise ConfigError(f"{name}: control character {found[0]!a} at position {found.start()}; remove it")


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values of a document with what its aliases stand for in their places; inf for one inside itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        children = (child for item in inside for child in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]


def find_config(file: Path | str) -> Path:
    """Return the file of a name: ``configs/...`` is the one that ships with nanodit where the folder has none."""
    path = Path(file)
    shipped = Path(__file__).parent / path
    return shipped if path.parts[:1] == ("configs",) and not path.exists() and shipped.exists() else path


def _read_file(path: Path, model: type[Config], chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged mapping of ``path`` and, for each dotted key, the file that set it."""
    own = Path(os.path.realpath(path))  # resolve() of a link to itself raises
    if own in chain:
        raise ConfigError(f"{path}: `extends` goes round in a circle: {' -> '.join(p.name for p in (*chain, path))}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_LETTERS + 1)  # /dev/zero has no end
        if len(text) > MOST_LETTERS:
            raise ConfigError(f"{path}: is no config: it has more than {MOST_LETTERS:,} letters")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read as a config: {reason}") from None
    data = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config must be a mapping of keys to values, not a {type(data).__name__}")
    parent = data.pop("extends", None)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends must name one file")
        values, origins = _read_file(path.parent / parent, model, (*chain, own))
    _merge(values, data, origins, str(path), model)
    return values, origins


def _merge(
    into: dict[str, Any],
    update: dict[str, Any],
    origins: dict[str, str],
    origin: str,
    model: type[Config],
    prefix: str = "",
) -> None:
    for key, value in update.items():
        dotted = prefix + key
        section = section_model(model, [key])
        if section and isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origins, origin, section, dotted + ".")
        else:
            into[key] = value
            for replaced in [other for other in origins if other.startswith(dotted + ".")]:
                del origins[replaced]
            origins[dotted] = origin


def _apply_override(values: dict[str, Any], override: str, origins: dict[str, str], model: type[Config]) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form dotted.path=value")
    name = f"override {path.strip()}"
    check_text(text, name)
    node = values
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
    section = section_model(model, keys[:-1])
    field = section.model_fields.get(keys[-1]) if section else None
    kinds = _text_kinds(field.annotation) if field else set()
    if kinds and kinds <= {str, types.NoneType}:
        # an empty one is a variable that a shell did not have, never the folder here
        nothing = not text.strip() or (text == "null" and types.NoneType in kinds)
        node[keys[-1]] = None if nothing else text
    else:
        node[keys[-1]] = parse_yaml(text, name)
    origins[path.strip()] = "command line"


def override_text(key: str, value: Any) -> str:
    """Write an override as a command line has it: text as it is, any other value as JSON, which is YAML."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def load_config(model: type[T], file: Path | str | None, overrides: Sequence[str] = ()) -> T:
    """Read ``file`` with what it extends, apply the overrides and validate.

    Raises :class:`ConfigError` that lists every problem with its file, its dotted path and, for an unknown key, the
    nearest one that exists.
    """
    return load_config_with_origins(model, file, overrides)[0]


def load_config_with_origins(
    model: type[T], file: Path | str | None, overrides: Sequence[str] = ()
) -> tuple[T, dict[str, str]]:
    """Return what :func:`load_config` does and, for every key, what set it: a file, "command line" or "default"."""
    values, origins = ({}, {}) if file is None else _read_file(find_config(file), model)
    for override in overrides:
        _apply_override(values, override, origins, model)
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, model, origins, file) for problem in error.errors()]
        raise ConfigError(PROBLEM_BREAK.join(problems)) from None
    paths = {key: key.split(".") for key in walk_keys(model)}
    return config, {key: _origin(path, origins) if _has(values, path) else "default" for key, path in paths.items()}


def _has(values: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _origin(path: Sequence[str], origins: dict[str, str]) -> str | None:
    """Return what set a key, or the nearest of its sections that was set as a whole."""
    dotted = (".".join(path[:end]) for end in range(len(path), 0, -1))
    return next((origins[key] for key in dotted if key in origins), None)


def _describe(problem: Any, model: type[Config], origins: dict[str, str], file: Path | str | None) -> str:
    # drop the parts that pydantic adds for members of a union; they are no keys
    *above, last = problem["loc"] or ("",)
    unknown = problem["type"] == "extra_forbidden"  # whose last part is a key, whatever it looks like
    path = [str(part) for part in above if isinstance(part, int) or not TAG.search(part)]
    path += [str(last)] if unknown or isinstance(last, int) or not TAG.search(last) else []
    dotted = ".".join(path)
    origin = _origin(path, origins) or next(
        # a missing key, or a section: whatever file set something inside it
        (where for key, where in origins.items() if key.startswith(dotted + ".")),
        str(file or "defaults"),
    )
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key `{dotted}`{_nearest(path, model)}"
    if problem["type"] == "missing":
        return f"{origin}: `{dotted}` is required"
    given = problem.get("input")
    if isinstance(given, dict | Config) and problem["type"] in ("value_error", "assertion_error"):
        return f"{origin}: {f'`{dotted}`: ' if dotted else ''}{problem['msg'].removeprefix('Value error, ')}"
    shown = repr(given)
    shown = f"{shown[:MOST_SHOWN]}..." if len(shown) > MOST_SHOWN else shown
    return f"{origin}: `{dotted}`: {problem['msg']}, got {shown} ({type(given).__name__})"


def _nearest(path: list[str], model: type[Config]) -> str:
    section = section_model(model, path[:-1])
    if section is None:
        return ""
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.5)
    if near:
        return f"; did you mean `{'.'.join([*path[:-1], near[0]])}`?"
    elsewhere = [key for key in walk_keys(model) if key.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; known here: {', '.join(section.model_fields)}"


def section_model(model: type[Config], path: Sequence[str]) -> type[Config] | None:
    """Return the config class that a path of sections leads to, or None where there is no such section."""
    for key in path:
        field = model.model_fields.get(key)
        nested = _nested_config(field.annotation) if field else None
        if nested is None:
            return None
        model = nested
    return model


def _nested_config(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_nested_config, typing.get_args(annotation))), None)
    return None


def _text_kinds(annotation: Any) -> set[Any]:
    """Return the types that a field's value may have."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _text_kinds(inside[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_text_kinds, inside))
    return {annotation}


def walk_keys(model: type[Config], prefix: str = "") -> list[str]:
    """List the dotted path of every key of ``model``, sections expanded."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        nested = _nested_config(field.annotation)
        keys += walk_keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML text in the order of its fields; :func:`load_config` reads it back equal."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes floats so that YAML 1.2 readers see floats."""


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", repr(value)))
# YAML reads an unescaped next-line character as a line feed; only double quotes escape it
_Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style='"' if "\x85" in value else None
    ),
)
# quote what the loader above would otherwise read as something else than text
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}
