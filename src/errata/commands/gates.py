"""``errata analyse gates``: where BaFT's gates open, its failure signs, and what its two extra losses do."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.commands import common, files
from errata.commands.screen import Progress, Screen, as_json
from errata.errors import ConfigError, InputError, StorageError

if TYPE_CHECKING:
    from errata.analyse.gate_training import Grown
    from errata.analyse.gates import Inputs
    from errata.model import LM
    from errata.patch import Patch
    from errata.request import Case

CASES = 100
COMPARE = ("balance", "locality")
FOLDER = (files.INDEX, "summary.json", "patch.json")  # a folder with one of these is a result, not a model


@dataclass
class Source:
    """What is looked at.  ``inputs``: cases under their stacks; ``by_mark``: {T: records}; ``cases``: what sequential edits are made of;
    ``grown``: the continual run behind it, where one was made here."""

    inputs: list[Inputs] = field(default_factory=list)
    by_mark: dict[int, Any] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    editor: Any = None
    grown: Grown | None = None
    notes: list[str] = field(default_factory=list)


def add(commands: common.Subparsers) -> None:
    out = common.parser(
        commands, "gates", run, "BaFT's gate weights and failure signs: of a result folder, or of edits made now", model=False
    )
    out.add_argument("source", metavar="RUN|MODEL", help="a folder of `errata edit` or `errata score`, a patch, or a model to edit now")
    out.add_argument("--model", metavar="MODEL", help="the model of RUN, where its folder does not name it")
    common.model_options(out)
    common.benchmark_options(out, "almanac", CASES)
    out.add_argument("--seed", type=common.seed_or_file, default=0, help="of the order of the cases (0); file: the file's own order")
    out.add_argument(
        "--compare", default="", metavar="WHAT,…", help="also edit without the balance loss, or the locality term: balance,locality"
    )
    out.add_argument("--set", action="append", default=[], metavar="K=V", help="a setting of BaFT; may be repeated")
    out.add_argument("--config", metavar="FILE.yaml", help="settings from a file; --set goes on top")
    common.out_options(out)


def run(args: argparse.Namespace, screen: Screen) -> None:
    values = common.settings(args)
    compared = [part.strip() for part in args.compare.split(",") if part.strip()]
    if odd := [part for part in compared if part not in COMPARE]:
        raise ConfigError(f"--compare {odd[0]!r}: there are {' and '.join(COMPARE)}")
    if args.out is not None:
        files.check(args.out, args.force)
    folder = Path(args.source)
    is_run = any((folder / name).is_file() for name in FOLDER)
    with screen.progress() as progress:
        if is_run:
            lm, found = _from_folder(args, folder, values, bool(compared))
        else:
            lm, found = _from_model(args, values, progress)
        document = _document(args, lm, found, compared, progress)
    if args.out is not None:
        _save(args, document)
    screen.document(document)
    _show(screen, document)
    screen.say(common.saved(args.out))


def _from_model(args: argparse.Namespace, values: dict[str, Any], progress: Progress) -> tuple[LM, Source]:
    """Edits made one after another, scored at each mark."""
    benchmark, cases = common.items(args, CASES, "dev", args.seed)
    _edits(benchmark)
    args.model, args.n = args.source, len(cases)
    lm = common.load(args)
    from errata.analyse import gate_training, gates
    from errata.score.queries import Answers

    editor = registry.get("method", "baft").for_model(lm, **values)
    marks = sorted({t for t in (10**i for i in range(8)) if t < len(cases)} | {len(cases)})
    grown = gate_training.grow(lm, editor, cases, marks, progress)
    by_mark = gate_training.records(lm, grown, cases, "baft", Answers(), progress)
    stack = grown.stacks[len(cases)]
    return lm, Source([gates.of_case(c, stack) for c in cases], by_mark, cases, editor, grown)


def _edits(benchmark: Any) -> None:
    if benchmark.kind != "edits":
        raise ConfigError(f"--benchmark {benchmark.name} has no edits; give one that has")


def _from_folder(args: argparse.Namespace, folder: Path, values: dict[str, Any], compared: bool) -> tuple[LM, Source]:
    """What a result folder holds: its patches, or only its records."""
    if values and not compared:
        raise ConfigError(
            "--set and --config change how edits are made, and none is made here; add --compare, or name a model in place of RUN"
        )
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
        found.by_mark = _by_mark(folder / "records.jsonl")
    return lm, found


def _pool(args: argparse.Namespace) -> tuple[Any, dict[tuple[str, str], Case]]:
    """Every case of the benchmark by (prompt, target)."""
    benchmark = open_benchmark(args.benchmark, args.data)
    _edits(benchmark)
    splits = [args.split] if args.split or benchmark.needs_data else list(benchmark.splits)
    return benchmark, {(c.request.prompt, c.request.target): c for s in splits for c in benchmark.load(s, None, 0)}


def _patched(lm: LM, head: dict[str, Any], patches: tuple[Patch, ...], pool: dict[tuple[str, str], Case]) -> Source:
    """Each request under its patch (single mode) or under all; with its case's probes where the benchmark has it."""
    from errata.analyse import gates
    from errata.bank import live

    for patch in patches:
        lm.check(patch)
    out, alone = Source(), head.get("mode") == "single"
    for patch in patches if alone else [patches[-1]] if patches[-1].replaces else patches:
        stack = (patch,) if alone else live(patches)
        for request in patch.requests:
            case = pool.get((request.prompt, request.target))
            out.inputs.append(gates.of_request(request, stack) if case is None else gates.of_case(case, stack))
            out.cases += [] if case is None else [case]
    if missing := len(out.inputs) - len(out.cases):
        out.notes.append(f"{missing} of {len(out.inputs)} edits are in no case of the benchmark: their own texts, trained on, stand in")
    return out


def _by_mark(path: Path) -> dict[int, Any]:
    """{T: BaFT's records after T edits} of a continual run."""
    out: dict[int, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record.get("method") == "baft" and isinstance(record.get("edits"), int):
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


def _document(args: argparse.Namespace, lm: LM, found: Source, compared: list[str], progress: Progress) -> dict[str, Any]:
    from errata.analyse import gates
    from errata.config import to_dict

    weights = gates.read(lm, found.inputs, lambda done, of: progress("reading gates", done, of)) if found.inputs else []
    return {
        "model": lm.name,
        "base": lm.fingerprint,
        "source": str(args.source),
        "benchmark": args.benchmark,
        "split": args.split,
        "cases": len(found.inputs),
        "settings": None if found.editor is None else to_dict(found.editor),
        "notes": found.notes,
        "signs": gates.signs(weights, found.by_mark),
        "tests": gates.tests(weights),
        "summary": gates.summary(weights),
        **_comparisons(lm, found, compared, progress),
        "saved": None if args.out is None else str(args.out),
    }


def _comparisons(lm: LM, found: Source, compared: list[str], progress: Progress) -> dict[str, Any]:
    if not compared:
        return {}
    from errata.analyse import gate_training
    from errata.score.queries import Answers

    if found.editor is None or not found.cases:
        raise ConfigError(
            "--compare edits anew with the run's settings, and this folder has no BaFT patch of cases; name a model in place of RUN"
        )
    out: dict[str, Any] = {}
    if "balance" in compared:
        done = found.grown or gate_training.grow(lm, found.editor, found.cases, [len(found.cases)], progress)
        out["balance"] = gate_training.balance(lm, found.editor, found.cases, done, progress)
    if "locality" in compared:
        out["locality"] = gate_training.locality(lm, found.editor, found.cases, Answers(), progress)
    return out


def _save(args: argparse.Namespace, document: dict[str, Any]) -> None:
    from errata.report import gates as drawing

    with files.staged(args.out, args.force) as folder:
        files.write(folder / "gates.json", as_json(document) + "\n")
        for name, rows, draw in (
            ("weights", document["summary"], drawing.weights),
            ("balance", document.get("balance"), drawing.balance),
            ("locality", document.get("locality"), drawing.locality),
        ):
            if rows:
                draw(rows, [folder / f"gates-{name}.{ending}" for ending in ("svg", "png")])


def _show(screen: Screen, document: dict[str, Any]) -> None:
    for note in document["notes"]:
        screen.say(f"Note: {note}.")
    screen.say(f"Gate weights of {document['cases']} cases, the mean over bases: median (5 % to 95 %) over cases.")
    lines = [
        (
            r["block"],
            r["kind"].replace("_", " "),
            r["cases"],
            r["inputs"],
            f"{r['weight'][2]:.3f} ({r['weight'][0]:.3f} to {r['weight'][4]:.3f})",
        )
        for r in document["summary"]
    ]
    screen.table(("block", "input", "cases", "inputs", "weight"), lines)
    words = {True: "WARNING", False: "no", None: "not measured"}
    screen.say("Failure signs")
    screen.table(
        ("sign", "block", "there", "what was seen"),
        [(s["sign"], "–" if s["block"] is None else s["block"], words[s["fires"]], s["says"]) for s in document["signs"]],
    )
    screen.say("Do weights differ between inputs of the same case?  Sign-flip test over cases, p adjusted for all rows (Holm).")
    tests = [(t["block"], f"{t['a']} – {t['b']}".replace("_", " "), t["n"], t["gap"], t["p"], t["adjusted"]) for t in document["tests"]]
    screen.table(("block", "pair", "cases", "gap", "p", "adjusted"), [(*t[:3], *(_number(v) for v in t[3:])) for t in tests])
    _show_comparisons(screen, document)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _show_comparisons(screen: Screen, document: dict[str, Any]) -> None:
    if rows := document.get("balance"):
        last = max(r["t"] for r in rows)
        screen.say(f"Variance over bases of the mean weights after {last} edits (and over their mean squared), each block")
        ends = [r for r in rows if r["t"] == last]
        screen.table(
            ("balancing loss", "block", "variance", "variance / mean²", "mean weight"),
            [(r["variant"], r["block"], f"{r['variance']:.5f}", f"{r['squared_cv']:.4f}", f"{r['mean']:.4f}") for r in ends],
        )
    if rows := document.get("locality"):
        screen.say("Reliability and locality (teacher-forced) with and without the locality term, along learning rates")
        from errata.report.tables import cell

        screen.table(
            ("locality term", "rate", "reliability", "locality", "on its front", "on the front of all"),
            [
                (
                    r["variant"],
                    f"{r['lr']:.1e}",
                    cell(r["reliability"]),
                    cell(r["locality_agreement"]),
                    *("yes" if r[k] else "" for k in FRONTS),
                )
                for r in rows
            ],
        )


FRONTS = ("front", "front_of_all")
