"""``errata reproduce``: a published table measured again on any model, the paper's figures beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata import published, registry
from errata.commands import common, files
from errata.commands.score import settings_of
from errata.commands.screen import Screen, as_json, json_lines
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.analyse.reproduce import ReproduceOptions

CASES = 100


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "reproduce", run, "measure a published table again, the paper's figures beside it", model=False)
    out.add_argument("name", metavar="NAME", help=", ".join(published.names()))
    common.model_argument(out)
    out.add_argument(
        "--method", metavar="NAME[,NAME]", help="methods to run (reft,baft; baft-table4, baft-fig2 and rep-main have their own)"
    )
    out.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="BENCHMARK=PATH",
        help="a file of the table's benchmark; without it the almanac stands in",
    )
    out.add_argument("--n", type=common.positive, help=f"cases of each benchmark ({CASES}, or as many as there are)")
    out.add_argument("--split", metavar="NAME", help="of the almanac (test)")
    out.add_argument("--seed", type=int, default=0, help="of the almanac's order (0); a file is taken in its own order")
    common.set_options(out, "a setting, or METHOD.K=V for one method")
    common.out_options(out)


def _asked_of(args: argparse.Namespace) -> ReproduceOptions:
    """The command line as plain values."""
    from errata.analyse.reproduce import VARIANTS, ReproduceOptions

    values, data = common.settings(args), {}
    published.get(args.name)
    for given in args.data:
        name, equals, path = given.partition("=")
        if not equals or not path:
            raise ConfigError(f"--data {given!r}: say which benchmark it is, like --data zsre={given}")
        registry.get("benchmark", name)
        data[name] = path
    methods = None if args.method is None else common.editors(args.method)
    known = methods or list(dict.fromkeys(method for method, _ in VARIANTS[args.name].values()))
    for method in known:
        registry.get("method", method).judge(settings_of(method, known, values))
    return ReproduceOptions(args.name, methods, lambda m: settings_of(m, known, values), data, args.n, CASES, args.split, args.seed)


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.analyse import reproduce
    from errata.analyse.protocols import Measurement

    asked = _asked_of(args)
    table = reproduce.check(asked)
    files.check(args.out, args.force)
    for benchmark in dict.fromkeys([*asked.data]):
        if registry.get("benchmark", benchmark).kind == "edits":
            reproduce.cases_of(asked, benchmark)  # a wrong file is found before the model is loaded
    lm = common.load(args)
    made = reproduce.editors(lm, asked)
    with screen.progress() as progress:
        found = reproduce.measure(Measurement(lm, progress), table, asked, made)
    rows, reference, same = reproduce.compare(table, lm.name, found)
    n = max(r["T"] if r.get("part") == "piqa" else r["n"] for r in (*found.rows, *found.redundancy))  # facts edited, not questions asked
    document = {
        **{k: getattr(table, k) for k in ("name", "title", "paper", "where", "read", "protocol", "misprints", "remarks")},
        "model": lm.name,
        "base": lm.fingerprint,
        "reference": reference,
        "same_model": same,
        "differences": reproduce.differences(lm, table, asked, made, found.rows, n),
        "left_out": found.left_out,
        "rows": rows,
        "weights": found.weights,
        "redundancy": found.redundancy,
        "saved": None if args.out is None else str(args.out),
    }
    if args.out is not None:
        _save(args, document, found.records)
    screen.document(document)
    _show(screen, document)
    screen.say(common.saved(args.out))


def _save(args: argparse.Namespace, document: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    from errata.report import gates, reproduce

    endings = ("svg", "png")
    with files.staged(args.out, args.force) as folder:
        files.write(folder / "reproduce.json", as_json(document) + "\n")
        files.write(folder / "reproduce.md", reproduce.markdown(document))
        if records:
            files.write(folder / "records.jsonl", json_lines(records))
        if len({r.get("T") for r in document["rows"]}) > 1:
            reproduce.marks(document["rows"], [folder / f"reproduce-marks.{e}" for e in endings])
        if document["weights"]:
            gates.weights(document["weights"], [folder / f"reproduce-weights.{e}" for e in endings])
        if document["redundancy"]:
            reproduce.redundancy(document["redundancy"], [folder / f"reproduce-redundancy.{e}" for e in endings])


def _show(screen: Screen, document: dict[str, Any]) -> None:
    from errata.report import reproduce

    screen.say(f"{document['title']}: {document['paper']}, {document['where']}")
    if document["rows"]:
        screen.table(reproduce.HEADINGS, reproduce.lines(document["rows"]))
    if document["redundancy"]:
        screen.table(*reproduce.redundancy_table(document["redundancy"]))
    for line in reproduce.footers(document):
        screen.say(line)
    for title, items in (("Not as in the paper", document["differences"]), ("Not measured", document["left_out"])):
        if items:
            screen.say(f"{title}:")
            for line in items:
                screen.say(f"  {line}")
