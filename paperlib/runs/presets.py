"""Presets: one frozen dataclass of settings per experiment, and named instances of it.

A preset shows only what differs from the one it derives from:

    PRESETS = {"smoke": (smoke := Settings()), "cpu": replace(smoke, steps=20_000)}
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from paperlib.system.errors import UserError


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and one line of help, which `--list` prints."""
    return dataclasses.field(default=default, metadata={"help": help})


def choose(presets: Mapping[str, Any], name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The preset called `name` with `overrides` put in, each checked against the type of its field.

    Raises `UserError`, naming the valid ones, for an unknown preset or field, and for a value of the wrong type.
    """
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(presets)}")
    settings = presets[name]
    hints = typing.get_type_hints(type(settings))
    checked = {}
    for field, value in (overrides or {}).items():
        if field not in hints:
            raise UserError(f"unknown setting {field!r}: choose from {', '.join(hints)}")
        checked[field] = _checked(field, value, hints[field])
    try:
        return dataclasses.replace(settings, **checked)
    except ValueError as error:  # raised by a settings class that checks its own ranges
        raise UserError(str(error)) from error


def parse(settings: Any, assignments: Iterable[str]) -> dict[str, Any]:
    """Overrides from `name=value` words of a command line, for `choose` to check.

    A value is JSON, or a plain word where the field of `settings` is text. Raises `UserError` for a word without `=`.
    """
    hints = typing.get_type_hints(type(settings))
    overrides = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"cannot read {word!r}: write name=value, and lists without spaces, such as hidden=[64,64]")
        try:
            overrides[name] = text if hints.get(name) is str else json.loads(text)
        except json.JSONDecodeError:
            overrides[name] = text
    return overrides


def check_numbers(settings: Any, may_be_zero: Iterable[str]) -> None:
    """Raise `ValueError` for a number of `settings`, alone or in a tuple, that is not finite or not above 0."""
    for name, value in dataclasses.asdict(settings).items():
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not math.isfinite(number) or number < 0 or (number == 0 and name not in may_be_zero):
                least = "0 or more" if name in may_be_zero else "above 0"
                raise ValueError(f"{name} is {value}, but must be {least} and finite")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it: bool, int, float, str, tuple[T, ...], or one of these or None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for kind in options:
        if kind is type(None) and value is None:
            return None
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind in (bool, int, str) and type(value) is kind:
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            return tuple(_checked(name, item, typing.get_args(kind)[0]) for item in value)
    if float in options and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            raise UserError(f"setting {name!r} is text: write {number!r}, as YAML takes {value} for a word")
    wanted = " or ".join(_words(kind) for kind in options)
    raise UserError(f"setting {name!r} is {value!r}, but takes {wanted}")


def _words(kind: Any) -> str:
    """A type as a reader would write a value of it."""
    if typing.get_origin(kind) is tuple:
        return f"a list of {_words(typing.get_args(kind)[0])}, such as [1, 2]"
    words = {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words[kind]
