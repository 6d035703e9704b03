"""What can be known wrong of a run before a model is loaded: settings, cases and marks, judges, texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.errors import ConfigError
from errata.run import grid
from errata.run.folder import complete
from errata.run.sequential import SequentialConfig
from errata.score import judges
from errata.text.corpora import open_corpus


@dataclass(frozen=True)
class Planned:
    """A cell, how many cases it has (at most, where only known facts are edited) and at which T they are scored."""

    cell: grid.Cell
    cases: int
    marks: tuple[int, ...]


def check(spec: grid.RunSpec, root: Path) -> list[Planned]:
    """Every cell of the grid; an error that says what cannot be run.  ``root``: the run's folder.

    A run that is complete asks no judge and reads no text any more: its tables are there without the key, too.
    """
    cells = grid.cells(spec)
    if not all(complete(root / "cells" / cell.id) for cell in cells):
        for judge in spec.score.judges:
            judges.make(judge.name, root / "judged", judge.endpoint, judge.model, judge.key_env)
        if spec.guard is not None:
            open_corpus(spec.guard.text)
    opened: dict[str, int] = {}
    return [_planned(cell, spec.score.fluency, opened) for cell in cells]


def _planned(cell: grid.Cell, fluency: bool, opened: dict[str, int]) -> Planned:
    """``opened``: how many cases there are, of the cells so far by `grid.Cell.base`; the same file is not read for every method."""
    grid.editor(cell)
    if cell.base not in opened:
        opened[cell.base] = _count(cell, fluency)
    count = opened[cell.base]
    marks = cell.scenario.at(count)
    if cell.scenario.kind != "single":
        SequentialConfig(cell.scenario.size or 1, marks).check(count)
    return Planned(cell, count, marks)


def _count(cell: grid.Cell, fluency: bool) -> int:
    source = grid.benchmark(cell.benchmark)
    cases = cell.cases(source)
    if fluency and not _can_be_sampled(source, cases):
        name = cell.benchmark.name
        raise ConfigError(f"score.fluency: the benchmark {name}, or its file, offers no prompts to sample from; leave it out")
    return len(cases)


def _can_be_sampled(source: Any, cases: list[Any]) -> bool:
    return hasattr(source, "generation") and any(source.generation(case)[0] for case in cases)
