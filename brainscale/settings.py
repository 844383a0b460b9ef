"""How settings are read: TOML into frozen models, `key=value` overrides, one sentence for every mistake.

A value that this version does not know is refused. The settings themselves are in config.py.
"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class InputError(ValueError):
    """A mistake in what the user gave: printed as one sentence, exit code 2, no traceback."""


class Model(BaseModel):
    """A frozen group of settings that refuses keys it does not know, and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Every leaf that differs between two dumped configs, as (dotted key, old, new). Of two lists of groups of the same
    length, the leaves of each group (`stores.0.path`)."""
    changes = []
    for key in sorted({*old, *new}):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if _are_groups(before) and _are_groups(after) and len(before) == len(after):
            before, after = ({str(at): group for at, group in enumerate(groups)} for groups in (before, after))
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, f"{name}.")
        elif before != after:
            changes.append((name, before, after))
    return changes


def _are_groups(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


M = TypeVar("M", bound=Model)


def load(model: type[M], path: str | Path | None, overrides: tuple[str, ...] = ()) -> M:
    """Read a TOML file (none: the defaults), apply `key=value` overrides, validate.

    Raises InputError with one sentence that names the file, the key, what was got and what would do.
    """
    where = str(path) if path else "the defaults"
    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise InputError(f"{file}: no such config file; give the path of a .toml file, e.g. one under configs/")
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is not valid TOML: {error}") from None
    for override in overrides:
        set_override(tree, override)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(model, error)}") from None


def set_override(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to a tree in place; a value that is not TOML is a string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r} is not of the form key=value, e.g. train.num_steps=300")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *groups, leaf = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise InputError(f"override {override!r}: {group!r} is a value, not a group of settings")
    tree[leaf] = value


def to_toml(model: Model) -> str:
    """The effective settings as TOML that `load` reads back to an equal model (None is left out)."""
    lines: list[str] = []
    groups: list[tuple[str, dict[str, Any]]] = []
    for key, value in model.model_dump(mode="json").items():
        if isinstance(value, dict):
            groups.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    for name, group in groups:
        lines += ["", f"[{name}]", *(f"{k} = {_toml_value(v)}" for k, v in group.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    """A value as TOML; groups inside a value as inline tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _sentence(model: type[Model], error: ValidationError) -> str:
    """All mistakes of a validation, each with its key and the valid neighbours."""
    parts = []
    for item in error.errors():
        path = [str(p) for p in item["loc"]]
        dotted = ".".join(path)
        if item["type"] == "extra_forbidden":
            names = sorted(_group(model, item["loc"][:-1]).model_fields)
            close = difflib.get_close_matches(path[-1], names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            parts.append(f"unknown key {dotted!r}; {hint}Valid keys here: {', '.join(names)}")
        elif item["type"] == "value_error":
            parts.append(str(item["ctx"]["error"]))
        else:
            parts.append(f"{dotted} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(parts)


def _group(model: type[Model], path: tuple[int | str, ...]) -> type[Model]:
    """The group of settings at a place that pydantic names; a number is a place in a list."""
    for name in path:
        if isinstance(name, str):
            kind = model.model_fields[name].annotation
            model = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Model))
    return model
