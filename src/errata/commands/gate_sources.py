"""What `errata analyse gates` looks at: edits made now, or what a folder of `errata run`, `errata edit` or `errata score` holds."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.commands import common, files
from errata.commands.screen import Progress
from errata.errors import ConfigError, InputError, StorageError

if TYPE_CHECKING:
    from errata.analyse.gate_training import GateRun
    from errata.analyse.gates import GateInputs
    from errata.core.model import LM
    from errata.core.patch import Patch
    from errata.request import Case

CASES = 100
FOLDER = (files.INDEX, "summary.json", "patch.json")  # a folder with one of these is a result, not a model


@dataclass
class Source:
    """What is looked at.  ``inputs``: cases under their stacks; ``by_mark``: {T: records}; ``cases``: what sequential edits are made of;
    ``grown``: the continual run behind it, where one was made here; ``cell``: of the run that was looked at."""

    inputs: list[GateInputs] = field(default_factory=list)
    by_mark: dict[int, Any] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    editor: Any = None
    grown: GateRun | None = None
    cell: str | None = None
    notes: list[str] = field(default_factory=list)


def read(args: argparse.Namespace, values: dict[str, Any], compared: bool, progress: Progress) -> tuple[LM, Source]:
    """The model and what is looked at.  ``values``: settings of BaFT; ``compared``: whether edits will be made anew with them."""
    folder = Path(args.source)
    run, cell = _run(folder)
    if run is None and args.cell is not None:
        raise ConfigError(f"--cell {args.cell}: {folder} is no folder of `errata run`")
    if run is None and not any((folder / name).is_file() for name in FOLDER):
        return _from_model(args, values, progress)
    if values and not compared:
        raise ConfigError(
            "--set and --config change how edits are made, and none is made here; add --compare, or name a model in place of RUN"
        )
    return _from_folder(args, folder, values) if run is None else _from_run(args, run, cell or args.cell, values)


def _run(folder: Path) -> tuple[Path | None, str | None]:
    """(the folder of a run, the cell that was named) where it is one, or one of its cells."""
    if (folder / "manifest.json").is_file() and (folder / "cells").is_dir():
        return folder, None
    if (folder / "cell.json").is_file():
        return folder.resolve().parent.parent, folder.resolve().name
    return None, None


def _from_run(args: argparse.Namespace, run: Path, named: str | None, values: dict[str, Any]) -> tuple[LM, Source]:
    """One cell of `errata run`: its cases under the patches that were kept, and its records at each mark."""
    from errata.analyse import gates
    from errata.run import base_answers, grid
    from errata.run.cell import live_edits
    from errata.run.folder import Journal, PatchFolder

    spec = grid.from_dict(_read(run / "manifest.json").get("config", {}))
    cell = _cell(run, spec, named)
    folder = run / "cells" / cell.id
    if not (folder / "records.jsonl").is_file():
        raise InputError(f"{folder}: is not done yet; finish it with `errata run`")
    args.model, args.benchmark, args.split = args.model or cell.model.name, cell.benchmark.name, cell.benchmark.split
    args.dtype, args.device = args.dtype or cell.model.dtype, args.device or cell.model.device
    more = {"revision": cell.model.revision, "device_map": None if args.device else cell.model.device_map}
    lm = common.load(args, **{k: v for k, v in more.items() if v is not None})
    if (then := _read(folder / "cell.json").get("fingerprint")) != lm.fingerprint:
        raise InputError(f"{folder} belongs to base {then}, {args.model} is {lm.fingerprint}; give its model with --model")
    cases = base_answers.cases_of(lm, spec, cell, run / "base" / cell.base)
    entries = Journal(folder, repair=False).entries
    numbers = live_edits(entries)
    found = Source(cell=cell.id, cases=cases, by_mark=_by_mark(folder / "records.jsonl", cell.method.label))
    found.editor = registry.get("method", "baft").for_model(lm, **{"seed": cell.seed, **cell.method.set, **values})
    patches = PatchFolder(folder / "patches").load(numbers)
    if not patches:
        found.notes.append("the run dropped its patches (store.patches), so its gates cannot be read")
    elif cell.scenario.kind == "single":
        found.inputs = [gates.of_case(cases[t - 1], (patch,)) for t, patch in zip(numbers, patches, strict=True)]
        found.by_mark = {}
        if len(patches) < len(cases):
            found.notes.append(f"the run kept {len(patches)} of {len(cases)} patches; the gates are those of these")
    else:
        found.inputs = [gates.of_case(case, tuple(patches)) for case in cases[: entries[-1]["edits"]]]
    return lm, found


def _cell(run: Path, spec: Any, named: str | None) -> Any:
    """The cell of that name or label, or the only one whose method has gates."""
    from errata.run import grid

    gated = [c for c in grid.cells(spec) if c.method.name == "baft"]
    chosen = [c for c in gated if named in (None, c.id, c.method.label)]
    if len(chosen) == 1:
        return chosen[0]
    there = ", ".join(c.id for c in gated)
    if not gated:
        raise ConfigError(f"{run}: no cell of this run edits with baft; there is no gate to look at")
    what = f"--cell {named} names {len(chosen)} of the cells with gates" if named else f"{len(gated)} cells have gates, name one by --cell"
    raise ConfigError(f"{run}: {what}: {there}")


def _from_model(args: argparse.Namespace, values: dict[str, Any], progress: Progress) -> tuple[LM, Source]:
    """Edits made one after another, scored at each mark."""
    benchmark, cases = common.items(args, CASES, "dev", args.seed)
    _edits(benchmark)
    args.model, args.n = args.source, len(cases)
    lm = common.load(args)
    from errata.analyse import gate_training, gates
    from errata.score.evaluator import AnswerCache

    one = {"opens": "answer", "resume": True}  # one patch whose gates serve all edits
    editor = registry.get("method", "baft").for_model(lm, **one | dict(values))
    marks = common.tens(len(cases))
    grown = gate_training.run_continual(lm, editor, cases, marks, progress)
    by_mark = gate_training.records(lm, grown, cases, "baft", AnswerCache(), progress)
    stack = grown.stacks[len(cases)]
    return lm, Source([gates.of_case(c, stack) for c in cases], by_mark, cases, editor, grown)


def _edits(benchmark: Any) -> None:
    if benchmark.kind != "edits":
        raise ConfigError(f"--benchmark {benchmark.name} has no edits; give one that has")


def _from_folder(args: argparse.Namespace, folder: Path, values: dict[str, Any]) -> tuple[LM, Source]:
    """What a folder of `errata edit` or `errata score` holds: its patches, or only its records."""
    index = next(folder / name for name in FOLDER if (folder / name).is_file())
    head = _read(index)
    patches = files.load_patches([str(folder)]) if index.name != "summary.json" else ()
    args.model = args.model or (head.get("model") if index.name != "patch.json" else None)
    if not args.model:
        raise ConfigError(f"{folder} does not name its model; give it with --model")
    _, pool = _pool(args)
    lm = common.load(args)
    if head.get("base", lm.fingerprint) != lm.fingerprint:
        raise InputError(f"{folder} belongs to base {head['base']}, {args.model} is {lm.fingerprint}; give its model with --model")
    found = _patched(lm, head, patches, pool) if patches else Source(notes=["the folder holds no patch, so its gates cannot be read"])
    if patches and patches[-1].method == "baft":
        found.editor = registry.get("method", "baft").for_model(lm, **{**dict(patches[-1].settings), **values})
    if not patches:
        found.by_mark = _by_mark(folder / "records.jsonl", "baft")
    return lm, found


def _pool(args: argparse.Namespace) -> tuple[Any, dict[tuple[str, str], Case]]:
    """Every case of the benchmark by (prompt, target)."""
    benchmark = open_benchmark(args.benchmark, args.data, args.consistent)
    _edits(benchmark)
    splits = [args.split] if args.split or benchmark.needs_data else list(benchmark.splits)
    return benchmark, {(c.request.prompt, c.request.target): c for s in splits for c in benchmark.load(s, None, 0)}


def _patched(lm: LM, head: dict[str, Any], patches: tuple[Patch, ...], pool: dict[tuple[str, str], Case]) -> Source:
    """Each request under its patch (single mode) or under all; with its case's probes where the benchmark has it."""
    from errata.analyse import gates
    from errata.core.bank import active_patches

    for patch in patches:
        lm.check(patch)
    out, alone = Source(), head.get("mode") == "single"
    for patch in patches if alone else [patches[-1]] if patches[-1].replaces else patches:
        stack = (patch,) if alone else active_patches(patches)
        for request in patch.requests:
            case = pool.get((request.prompt, request.target))
            out.inputs.append(gates.of_request(request, stack) if case is None else gates.of_case(case, stack))
            out.cases += [] if case is None else [case]
    if missing := len(out.inputs) - len(out.cases):
        out.notes.append(f"{missing} of {len(out.inputs)} edits are in no case of the benchmark: their own texts, trained on, stand in")
    return out


def _by_mark(path: Path, label: str) -> dict[int, Any]:
    """{T: records after T edits} of the method with this label in a continual run."""
    out: dict[int, Any] = {}
    try:
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record.get("method") == label and isinstance(record.get("edits"), int):
                out.setdefault(record["edits"], []).append(record)
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{path}:{number}: not a record of errata; restore the file, or score again") from None
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({type(error).__name__}); it was damaged or changed by hand") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not what errata writes there")
    return found
