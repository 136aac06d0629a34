"""Strict settings: TOML text becomes a frozen struct, or one error that says what to change.

- An unknown key is refused, with the nearest known one.
- A wrong type or a missing key is named with its place.
- TOML has `nan` and `inf`; no setting has: compared with them, nothing is ever due.
"""

from __future__ import annotations

import difflib
import math
import tomllib
import typing
from typing import Any, TypeVar

import msgspec

from edge_agent.contract.errors import ConfigError

T = TypeVar("T")


def parse_settings(document: str, kind: type[T], origin: str) -> T:
    """Read TOML `document` as a `kind` (a msgspec struct).

    Args:
        origin: the file's name, for messages.

    Raises:
        ConfigError: it is not TOML, or does not fit `kind`.
    """
    try:
        tree = tomllib.loads(document)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{origin}: not TOML: {e}") from e
    _refuse_unknown(tree, kind, origin, "")
    try:
        settings = msgspec.convert(tree, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{origin}: {e}") from e
    _refuse_boundless(tree, origin, "$")
    return settings


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint such as `; did you mean 'device'?`, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none'}"


def _refuse_unknown(tree: Any, kind: Any, origin: str, path: str) -> None:
    if typing.get_origin(kind) is dict:  # a table whose keys are names of the user's own
        for key, value in tree.items() if isinstance(tree, dict) else ():
            _refuse_unknown(value, typing.get_args(kind)[1], origin, f"{path}.{key}")
        return
    for struct in _structs(kind):
        if isinstance(tree, list):
            for i, item in enumerate(tree):
                _refuse_unknown(item, struct, origin, f"{path}[{i}]")
        elif isinstance(tree, dict):
            fields = {f.encode_name: f.type for f in msgspec.structs.fields(struct)}
            for key, value in tree.items():
                if key not in fields:
                    raise ConfigError(f"{origin}: unknown key {path + '.' if path else ''}{key}{nearest(key, fields)}")
                _refuse_unknown(value, fields[key], origin, f"{path}.{key}" if path else key)


def _refuse_boundless(tree: Any, origin: str, path: str) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_boundless(value, origin, f"{path}.{key}")
    elif isinstance(tree, list):
        for i, item in enumerate(tree):
            _refuse_boundless(item, origin, f"{path}[{i}]")
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ConfigError(f"{origin}: {tree} is no setting; write a number - at `{path}`")


def _structs(kind: Any) -> list[type[msgspec.Struct]]:
    """The struct types inside a type such as `list[S] | None`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [s for arg in typing.get_args(kind) for s in _structs(arg)]
