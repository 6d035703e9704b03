"""Real results for tests of `errata report`: tests/data/report holds what came of three facts of the almanac.

errata run run.yaml            rome, grace: dev, n 3, continual with marks 1 and 3, judge contains       -> run
errata score almanac --method none,baft --split dev --n 3 --mode continual --marks 1,3                   -> scored
errata score almanac --method none,baft --split dev --n 3                                                -> single
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.cli import main

DATA = Path(__file__).parent / "data" / "report"
RUN, SCORED, SINGLE = DATA / "run", DATA / "scored", DATA / "single"


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def written(tmp_path: Path, ending: str, *arguments: object) -> str:
    out = tmp_path / f"report.{ending}"
    assert report(*arguments, "--out", out) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def made(source: Path) -> Path:
        out = tmp_path / "copies" / source.name
        shutil.copytree(source, out)
        return out

    return made


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def cell(run: Path, method: str) -> Path:
    (found,) = run.glob(f"cells/*-{method}-*")
    return found
