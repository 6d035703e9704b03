"""Run files on the tiny model, runs of them, and what they left: shared by the tests of `errata run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from errata.run import executors, grid

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from kill_runs import differences

__all__ = ["FILE", "FINETUNE", "MEMORY", "cell", "differences", "done", "records", "spec_of", "stop_at", "summary"]

FILE = """
methods: [{name: reft, label: quick, set: {rank: 2, lr: 0.02, steps: 6, layers: [3]}}]
benchmark: {name: "own:Tiny", n: 9}
scenario: {kind: continual, marks: [2, 5, 9]}
store: {group: 2, chunk: 4}
score: {latency: false}
threads: 1
"""
FINETUNE = "methods=[{name: ft-m, set: {layers: [3], steps: 3, lr: 0.01}}]"  # every patch stays on, and they are added up
MEMORY = "methods=[{name: grace, set: {}}]"


def spec_of(tmp_path: Path, tiny: str, *sets: str, text: str = FILE) -> grid.RunSpec:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\n{text}")
    return grid.read(path, sets)


def done(root: Path, spec: grid.RunSpec, **how: Any) -> Path:
    """Run it; every cell must be complete."""
    outcomes = executors.run(root, spec, **how)
    assert not [o for o in outcomes if o.error], outcomes
    return root


def cell(root: Path) -> Path:
    (found,) = (root / "cells").iterdir()
    return found


def records(root: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (cell(root) / "records.jsonl").read_text().splitlines()]


def summary(root: Path) -> dict[str, Any]:
    return json.loads((cell(root) / "summary.json").read_text())


def stop_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """The ``moment``-th time that anything goes to the disk does not come."""
    from errata import storage

    left = [moment]
    for name in ("write", "write_atomic", "append", "flush"):
        real = getattr(storage, name)

        def counted(*args: Any, real: Any = real, **how: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt  # nothing on the way up keeps it: as with a kill, no handler runs that a kill would not run
            real(*args, **how)

        monkeypatch.setattr(storage, name, counted)
