"""The manifest of a run folder: what made its numbers, and whether a folder may be gone on with."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import errata
from errata.config import to_dict
from errata.errors import StorageError
from errata.run import grid
from errata.run.folder import document, read_document
from errata.score.metric_table import METRICS, PROTOCOLS

NAME = "manifest.json"
FORMAT = 1


def versions() -> dict[str, str]:
    found = {"errata": errata.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers", "numpy", "safetensors")}


def commit() -> str | None:
    """The commit of the source errata runs from, with "+" where files differ from it; None where it is no git checkout."""

    def git(*arguments: str) -> str:
        where = str(Path(errata.__file__).parent)
        return subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def files(spec: grid.RunSpec) -> dict[str, str]:
    """sha256 of the files that benchmarks read."""
    named = {b.data for b in spec.benchmark if b.data is not None and Path(b.data).is_file()}
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sorted(named)}


def begin(root: Path, spec: grid.RunSpec, workers: int) -> dict[str, Any]:
    """The manifest of this folder: a new one, or the one that is there.  `StorageError` where that is of another run.

    ``workers``: processes that will share the machine, where the run file says nothing of threads.
    """
    path = root / NAME
    if path.exists():
        return _continued(path, spec)
    if root.exists() and any(p for p in root.iterdir() if not p.name.startswith(".")):
        raise StorageError(f"{root} exists and is not a run of errata; it is left alone, give another --out")
    share = max(1, torch.get_num_threads() // max(1, workers))
    out = {
        "format": FORMAT,
        "config": to_dict(spec),
        "config_hash": spec.digest,
        "versions": versions(),
        "commit": commit(),
        "files": files(spec),
        "seeds": list(spec.seeds),
        "threads": spec.threads or share,
        "protocols": {"names": list(PROTOCOLS), "metrics": {name: metric.version for name, metric in METRICS.items()}},
        "cells": [cell.id for cell in grid.cells(spec)],
    }
    document(path, out)
    return out


def _continued(path: Path, spec: grid.RunSpec) -> dict[str, Any]:
    then = read_document(path)
    if then.get("format") != FORMAT or "config" not in then:
        raise StorageError(f"{path}: format {then.get('format')!r}, this errata reads format {FORMAT}; give another --out")
    if then["config_hash"] != spec.digest:
        raise StorageError(
            f"{path.parent}: holds a run of another config ({_first_difference(then['config'], to_dict(spec))}); "
            "give another --out, or the run file it was begun with"
        )
    if then["files"] != (now := files(spec)):
        changed = next(name for name in {**then["files"], **now} if then["files"].get(name) != now.get(name))
        raise StorageError(f"{changed} has changed since {path.parent} was begun; give another --out")
    if then["versions"] != versions() and versions() not in then.get("continued_with", []):
        document(path, then := {**then, "continued_with": [*then.get("continued_with", []), versions()]})
    return then


def _first_difference(then: Any, now: Any, where: str = "") -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        return _first_difference(then.get(keys[0]), now.get(keys[0]), f"{where}.{keys[0]}".lstrip(".")) if keys else where
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        place = next((i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b), 0)
        return _first_difference(then[place], now[place], f"{where}[{place}]")
    return f"{where}: {then!r} there, {now!r} here"


def complete(root: Path) -> None:
    """Add the models' fingerprints and the digests of each cell's cases, which are known when they were loaded."""
    path = root / NAME
    then = read_document(path)
    begun = {p.parent.name: read_document(p) for p in sorted((root / "cells").glob("*/cell.json"))}
    models = {c["cell"]["model"]["name"]: c["fingerprint"] for c in begun.values()}
    more = {"models": models, "cases": {name: c["cases"] for name, c in begun.items()}}
    if {k: then.get(k) for k in more} != more:
        document(path, {**then, **more})
