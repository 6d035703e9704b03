"""Hyper-parameters by the model's name."""

from __future__ import annotations

from typing import Any, TypeVar

from errata.config import build
from errata.core.model import LM

M = TypeVar("M")


def preset(cls: type, name: str) -> dict[str, Any]:
    """The entry of ``cls.PRESETS`` whose key occurs in the model's name (longest key first); {} when none does."""
    table: dict[str, dict[str, Any]] = getattr(cls, "PRESETS", {})
    plain = name.lower().replace("_", "-")
    return next((dict(table[k]) for k in sorted(table, key=len, reverse=True) if k in plain), {})


def for_model(cls: type[M], lm: LM, settings: dict[str, Any]) -> M:
    """The preset for this model with ``settings`` on top; an unknown or ill-typed one raises `ConfigError`."""
    return build(cls, {**preset(cls, lm.name), **settings})
