"""Files of settings that a search found for one model (`errata tune`): in the cache, and those that come with errata.

A file holds, for the model with its fingerprint, the settings of each method that differ from the rule for any model, and what the search
saw.  The user's own file goes before errata's.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.documents import parse_json
from errata.errors import StorageError
from errata.storage import cache_folder, write_atomic

_SHIPPED = Path(__file__).parent / "settings"


def path_of(fingerprint: str) -> Path:
    """The user's file for a model."""
    return cache_folder() / "settings" / f"{fingerprint}.json"


def read(path: Path) -> dict[str, Any]:
    """The file; `StorageError` for one that is none."""
    try:
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); give a file of `errata tune`") from None
    except ValueError as error:
        raise StorageError(f"{path}: no JSON ({error}); remove it, or make it anew by `errata tune`") from None
    methods = found.get("methods") if isinstance(found, dict) else None
    whole = isinstance(methods, dict) and all(isinstance(m, dict) and isinstance(m.get("settings"), dict) for m in methods.values())
    if not whole or not isinstance(found.get("fingerprint"), str):
        raise StorageError(f"{path}: not a file of `errata tune`; remove it, or make it anew")
    return dict(found)


@functools.cache
def shipped() -> dict[str, Path]:
    """{name of the model: file} of those that come with errata."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.json"))}


@functools.cache
def _shipped_for(fingerprint: str) -> dict[str, Any]:
    return next((found for path in shipped().values() if (found := read(path))["fingerprint"] == fingerprint), {})


def settings_of(fingerprint: str, method: str) -> dict[str, Any]:
    """What was found for a method on the model of that fingerprint; {} where nothing was."""
    own = path_of(fingerprint)
    for found in (read(own) if own.exists() else {}, _shipped_for(fingerprint)):
        if method in found.get("methods", {}):
            return dict(found["methods"][method]["settings"])
    return {}


def every(method: str) -> list[dict[str, Any]]:
    """What was found for a method, on any model."""
    out = []
    for path in (*sorted((cache_folder() / "settings").glob("*.json")), *shipped().values()):
        with contextlib.suppress(StorageError):  # of another model: whoever uses it says so
            out += [dict(held["settings"]) for name, held in read(path)["methods"].items() if name == method]
    return out


def save(path: Path, model: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Add methods to the file of a model, or begin it; what it holds of others stays."""
    before = read(path) if path.exists() else {}
    if before and before["fingerprint"] != model["fingerprint"]:
        raise StorageError(f"{path}: holds settings of another model ({before['fingerprint']}); give another --out")
    whole = {**model, "methods": {**before.get("methods", {}), **methods}}
    write_atomic(path, (json.dumps(whole, indent=1) + "\n").encode())
