"""Frozen dataclasses <-> plain mappings <-> YAML <-> ``--set key=value``.  Unknown keys and wrong types raise."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from errata.documents import parse_yaml
from errata.errors import ConfigError, near, shortened

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a config as plain values (tuples become lists, configs in it mappings)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def build(cls: type[C], values: Mapping[str, Any], name: str | None = None) -> C:
    """``cls(**values)`` with each value checked against the field's type; a field that is a dataclass is built from a mapping.

    ``name``: what messages call it, where that is not the class's name.
    """
    hints, called = typing.get_type_hints(cls), name or cls.__name__
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{called} has no setting {shortened(key)}; {near(str(key), fields, 'known keys:')}")
        out[key] = _convert(f"{called}.{key}", value, hints[key])
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in out and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{called} needs the setting {missing[0]!r}; give it")
    return cls(**out)


def _convert(name: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(name, value, option)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, args))}, not {shortened(value)}")
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise ConfigError(f"{name} must map settings to values, not {shortened(value)}; write {{key: value}}")
        return dict(value)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, not {shortened(value)}")
        return tuple(_convert(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a mapping of setting to value, not {shortened(value)}")
        return build(typing.cast("type[Any]", hint), value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name} must be a finite number; this one is too large") from None
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise ConfigError(f"{name} must be {hint.__name__}, not {shortened(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {shortened(value)}")
    return value


def digest(value: Any) -> str:
    """A short hash of plain values: equal ones have equal hashes on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


def parse_sets(sets: Iterable[str]) -> dict[str, Any]:
    """``["lr=3e-4", "layers=[1,2]"]`` -> values, each read as YAML."""
    out: dict[str, Any] = {}
    for text in sets:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: write key=value")
        try:
            value = parse_yaml(raw)
        except ValueError as error:
            raise ConfigError(f"--set {shortened(text)}: the value is not valid YAML: {error}") from None
        if isinstance(value, str):  # YAML 1.1 reads 3e-4 as a text
            with contextlib.suppress(ValueError):
                value = float(value)
        out[key.strip()] = value
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    try:
        value = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except ValueError as error:  # also for what is not UTF-8
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one mapping of setting to value")
    return value
