"""``errata analyse gates``: where BaFT's gates open, its failure signs, and what its two extra losses do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, files, gate_sources
from errata.commands.gate_sources import CASES, Source
from errata.commands.screen import Progress, Screen, as_json
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.core.model import LM

_COMPARE = ("balance", "locality")


def add(commands: common.Subparsers) -> None:
    out = common.parser(
        commands, "gates", run, "BaFT's gate weights and failure signs: of a result folder, or of edits made now", model=False
    )
    out.add_argument("source", metavar="RUN|MODEL", help="a folder of `errata run`, `edit` or `score`, a patch, or a model to edit now")
    out.add_argument("--model", metavar="MODEL", help="the model of RUN, where its folder does not name it")
    out.add_argument("--cell", metavar="CELL", help="which cell of a run, or the method's label; needed where several have gates")
    common.model_options(out)
    common.case_options(out, CASES)
    out.add_argument(
        "--compare", default="", metavar="WHAT,…", help="also edit without the balance loss, or the locality term: balance,locality"
    )
    common.set_options(out, "a setting of BaFT")
    common.out_options(out)


def run(args: argparse.Namespace, screen: Screen) -> None:
    values = common.settings(args)
    registry.get("method", "baft").judge(values)
    compared = common.listed(args.compare)
    if odd := [part for part in compared if part not in _COMPARE]:
        raise ConfigError(f"--compare {odd[0]!r}: there are {' and '.join(_COMPARE)}")
    files.check(args.out, args.force)
    with screen.progress() as progress:
        lm, found = gate_sources.read(args, values, bool(compared), progress)
        document = _document(args, lm, found, compared, progress)
    if args.out is not None:
        _save(args, document)
    screen.document(document)
    _show(screen, document)
    screen.say(common.saved(args.out))


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
        **({} if found.cell is None else {"cell": found.cell}),
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
    from errata.score.evaluator import AnswerCache

    if found.editor is None or not found.cases:
        raise ConfigError(
            "--compare edits anew with the run's settings, and this folder has no BaFT patch of cases; name a model in place of RUN"
        )
    out: dict[str, Any] = {}
    if "balance" in compared:
        done = found.grown or gate_training.run_continual(lm, found.editor, found.cases, [len(found.cases)], progress)
        out["balance"] = gate_training.balance(lm, found.editor, found.cases, done, progress)
    if "locality" in compared:
        out["locality"] = gate_training.locality(lm, found.editor, found.cases, AnswerCache(), progress)
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
                    *("yes" if r[k] else "" for k in _FRONTS),
                )
                for r in rows
            ],
        )


_FRONTS = ("front", "front_of_all")
