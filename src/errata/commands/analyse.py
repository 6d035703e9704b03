"""``errata analyse``: keys (where those of a fact's surfaces lie, seen from the edit, and how REP moves them), and gates (see `gates`)."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, files, gates
from errata.commands.screen import Screen, as_json
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.analyse.keys import KeyComparison
    from errata.request import EditRequest

CASES = 50


def add(commands: common.Subparsers) -> None:
    group = commands.add_parser("analyse", help="look into what an edit rests on", description="Look into what an edit rests on.")
    inner = group.add_subparsers(metavar="WHAT", required=True, dest="what")
    out = common.parser(inner, "keys", run, "whitened similarity of a fact's keys to the edited one, and what REP makes of it")
    out.add_argument("--method", default="rome", metavar="NAME", help="locate-and-edit method under REP (rome)")
    out.add_argument("--requests", metavar="FILE.jsonl", help="facts to edit, each with its subject; without it a benchmark's")
    common.benchmark_options(out, "almanac", CASES)
    common.set_options(out, "a setting of REP")
    common.out_options(out)
    gates.add(inner)


def wanted(args: argparse.Namespace) -> list[EditRequest]:
    """The facts to edit."""
    from errata.request import read_requests

    if args.requests is not None:
        return read_requests(args.requests)
    benchmark, cases = common.items(args, CASES, "dev", 0)
    if benchmark.kind != "edits":
        raise ConfigError(f"{benchmark.name} has no edits to look at; `errata benchmarks` says which have")
    return [case.request for case in cases]


def run(args: argparse.Namespace, screen: Screen) -> None:
    registry.get("method", args.method)
    values, kind = {"wraps": args.method, **common.settings(args)}, registry.get("method", "rep")
    kind.judge(values)
    requests = wanted(args)
    files.check(args.out, args.force)
    lm = common.load(args)
    from errata.analyse import keys

    editor = kind.for_model(lm, **values)
    with screen.progress() as progress:
        common.prepare(editor, lm, progress)
    found = keys.compare(lm, requests, editor)
    document = _document(args, lm, editor, found)
    if args.out is not None:
        from errata.report import keys as drawing

        with files.staged(args.out, args.force) as folder:
            files.write(folder / "keys.json", as_json({**document, "keys": found.rows, "cases": found.limits}) + "\n")
            drawing.draw(document["summary"], document["limits"], [folder / f"keys.{ending}" for ending in ("svg", "png")])
    screen.document(document)
    _show(screen, document)
    screen.say(common.saved(args.out))


def _document(args: argparse.Namespace, lm: Any, editor: Any, found: KeyComparison) -> dict[str, Any]:
    from errata.analyse import keys
    from errata.config import to_dict

    middle = {name: [row[name] for row in found.limits if row[name] is not None] for name in ("beta_min", "beta_max")}
    return {
        "model": lm.name,
        "base": lm.fingerprint,
        "method": args.method,
        "settings": to_dict(editor),
        "facts": len(found.limits),
        "limits": {name: statistics.median(v) if v else None for name, v in middle.items()},
        "summary": keys.summary(found),
        "saved": None if args.out is None else str(args.out),
    }


def _show(screen: Screen, document: dict[str, Any]) -> None:
    limits = document["limits"]
    shown = {name: "–" if value is None else f"{value:.2f}" for name, value in limits.items()}
    screen.say(
        f"β(k, k*) / β(k*, k*) of {document['facts']} edits by {document['method']}, native and moved by REP: median (5 % to 95 %). "
        f"An edit fires from β_min = {shown['beta_min']}, the old answer stays up to β_max = {shown['beta_max']} (medians)."
    )
    lines = []
    for r in document["summary"]:
        ratios = [f"{r[w][2]:.2f} ({r[w][0]:.2f} to {r[w][4]:.2f})" for w in ("before", "after")]
        shares = [f"{100 * r[w]:.0f} %" for w in ("before holds", "after holds", "opened")]
        lines.append((r["block"], r["kind"].replace("_", ", "), r["n"], *ratios, *shares))
    screen.table(("block", "key", "n", "native", "moved", "in bounds", "then", "gate open"), lines)
