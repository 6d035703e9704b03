"""``errata run``: a grid of methods, benchmarks and scenarios from one file, in a folder that survives a kill."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from errata.commands import common
from errata.commands.screen import Progress, Screen, quiet
from errata.errors import ConfigError, ErrataError

_ENGINES = "a number of processes, or 'ray'"


def workers(text: str) -> str | int:
    """The argument --workers."""
    return text if text == "ray" else common.positive(text)


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "run", run, "run a grid of methods from one file; run it again to go on after a stop", model=False)
    out.add_argument("file", metavar="RUN.yaml", help="model, methods, benchmark, scenario, seeds … (see docs/runs.md)")
    out.add_argument("--set", action="append", default=[], metavar="K=V", help="a setting on top: benchmark.n=10, methods.baft.rank=6 …")
    out.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/NAME OF THE FILE); gone on with where it is there")
    out.add_argument("--dry-run", action="store_true", help="check everything but the model and print the grid")
    out.add_argument("--workers", type=workers, default=1, metavar="N|ray", help=f"{_ENGINES} (1: cells one after another)")
    out.add_argument("--address", help="of a Ray cluster (--workers ray); without it a local one")


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.run import executors, grid, manifest, preflight
    from errata.run.folder import read_document

    if args.address is not None and args.workers != "ray":
        raise ConfigError("--address has no meaning without --workers ray")
    args.until_end.enter_context(quiet(args.debug))
    spec = grid.read(args.file, args.set)
    root = args.out or Path("runs") / Path(args.file).stem
    planned = preflight.check(spec, root)
    cells, rows = [p.cell for p in planned], [_row(p) for p in planned]
    if args.dry_run:
        screen.document({"out": str(root), "cells": rows})
        screen.table(("cell", "method", "benchmark", "cases", "scenario", "marks", "seed"), [tuple(r.values()) for r in rows])
        if any(grid.only_known(spec, cell) for cell in cells):
            screen.say("Cases: at most, where only facts that the base knows are edited (score.known: false edits all).")
        screen.say(f"{len(cells)} cells; nothing was run. They would go to {root}.")
        return
    with screen.progress() as progress:

        def told(outcome: Any) -> None:
            _tell(screen, root, outcome)

        def named(label: str) -> Progress:
            return lambda stage, done, total: progress(f"{label}: {stage}", done, total)

        outcomes = executors.run(root, spec, args.workers, args.address, told, named)
    failed = [o for o in outcomes if o.error]
    whole = [cell.id for cell in cells if cell.id not in {o.cell for o in failed}]
    found = {name: _found(root, name) for name in whole}
    screen.document({"out": str(root), "cells": found, "failed": {o.cell: o.error for o in failed}})
    _show(screen, found)
    if more := read_document(root / manifest.NAME).get("continued_with"):
        screen.say(
            f"Note: the run was begun with other versions than it was ended with ({more[-1]}); numbers may differ in their last bits."
        )
    screen.say(f"Saved in {root}.")
    if failed:
        raise _failure(failed, len(cells))


def _row(planned: Any) -> dict[str, Any]:
    """One line of the grid."""
    cell = planned.cell
    where = Path(cell.benchmark.data).name if cell.benchmark.data else cell.benchmark.split or ""
    return {
        "cell": cell.id,
        "method": cell.method.label,
        "benchmark": f"{cell.benchmark.name} {where}".strip(),
        "cases": planned.cases,
        "scenario": cell.scenario.title,
        "marks": "–" if cell.scenario.kind == "single" else ", ".join(map(str, planned.marks)),
        "seed": cell.seed,
    }


def _found(root: Path, name: str) -> dict[str, Any]:
    from errata.run.folder import read_document

    folder = root / "cells" / name
    return {**read_document(folder / "summary.json"), "cost": read_document(folder / "cost.json")}


def _tell(screen: Screen, root: Path, outcome: Any) -> None:
    """A line a cell when it ends, and what its guard did."""
    if outcome.error:
        screen.say(f"{outcome.cell}: failed: {outcome.error}")
        return
    from errata.score import known, windows

    found = _found(root, outcome.cell)
    spent = found["cost"]["seconds"]
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in spent.items() if seconds >= 0.05)
    screen.say(f"{outcome.cell}: done ({times})")
    for said in filter(None, (known.say(found.get("known")), windows.say(found.get("left_out", {}), found.get("window")))):
        screen.say(f"  {said}")
    for gone in found.get("undone", ()):
        screen.say(
            f"  edit {gone['edit']} {gone['prompt']!r} → {gone['target']!r} was taken back: {gone['why'].removeprefix('taken back: ')}"
        )
    for look in (h for h in found.get("health", ()) if not h["healthy"]):
        what = "stopped" if found["stopped"] else "warning"
        values = ", ".join(
            f"{k.replace('_', ' ')} {'not finite' if v is None else format(v, '.4g')}" for k, v in look.items() if k != "healthy"
        )
        screen.say(f"  {what}: the model is no longer healthy ({values})")


def _show(screen: Screen, found: dict[str, dict[str, Any]]) -> None:
    """Reliability, generality and locality of free text, teacher-forced reliability, and times of each cell; the rest is in the folder."""
    from errata.report import tables

    first = tables.headline([row for cell in found.values() for row in cell["summary"]])
    columns = (*((metric, first) for metric in ("reliability", "generality", "locality_agreement")), ("reliability", "teacher_forced"))
    lines = []
    for name, cell in found.items():
        by = {(r["metric"], r["protocol"]): r["value"] for r in cell["summary"]}
        values = [f"{100 * by[c]:.1f}" if c in by else "–" for c in columns]
        spent = cell["cost"]["seconds"]
        lines.append((name, cell["edits"], *values, *(f"{spent.get(k, 0.0):.1f}" for k in ("loading", "editing", "scoring"))))
    heads = ("cell", "T", "reliability", "generality", "locality (as before)", "reliability, forced", "loading s", "editing s", "scoring s")
    screen.table(heads, lines, right=(-1,))
    what = tables.title(first).partition(":")[0].lower()
    screen.say(
        f"Percent, free text ({what}) but where it says forced; intervals, marks and forgetting by age are in each cell's summary.json."
    )


def _failure(failed: list[Any], count: int) -> ErrataError:
    first = failed[0]
    error = ErrataError(
        f"{len(failed)} of {count} cells failed; run the same command to try them again. First: {first.cell}: {first.error}"
    )
    error.exit_code = max(1, first.code)
    return error
