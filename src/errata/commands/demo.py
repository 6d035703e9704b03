"""``errata demo``: BaFT and ReFT side by side on facts that the almanac knows, in under three minutes."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, files, results
from errata.commands.screen import Progress, Screen, said

if TYPE_CHECKING:
    from errata.patch import Patch
    from errata.request import Case

METHODS = ("baft", "reft")
FACTS = 24
SHOWN = {"rewrite": "the edited prompt", "rephrase": "asked otherwise", "neighbour": "another fact"}


def add(commands: common.Subparsers) -> None:
    out = common.parser(
        commands, "demo", run, f"edit {FACTS} facts of the almanac with {' and '.join(METHODS)} and show what comes of it", model=False
    )
    out.add_argument("--n", type=common.positive, default=FACTS, help=f"facts to edit ({FACTS})")
    out.add_argument(
        "--model", default="almanac", metavar="PATH", help="another model that knows the almanac's facts (the one in the package)"
    )
    common.model_options(out)
    common.out_options(out)


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata import run as scenarios
    from errata.score.metrics import summarise
    from errata.score.queries import Answers

    if args.out is not None:
        files.check(args.out, args.force)
    benchmark = registry.get("benchmark", "almanac")()
    cases = list(benchmark.load("dev", args.n))
    lm = common.load(args)
    records: list[dict[str, Any]] = []
    made: dict[str, list[Patch]] = {}
    answers = Answers()  # the base is asked once for both methods
    with screen.progress() as progress:
        for name in METHODS:
            editor = registry.get("method", name).for_model(lm)
            named = functools.partial(_named, progress, name)
            made[name], found = scenarios.single(lm, editor, cases, named, answers)
            records += found
    rows = summarise(records)
    seconds = {name: sum(float(p.notes.get("seconds", 0.0)) for p in patches) / len(patches) for name, patches in made.items()}
    document = {
        "model": lm.name,
        "base": lm.fingerprint,
        "seconds_an_edit": {k: round(v, 4) for k, v in seconds.items()},
        "patches": {name: [p.id for p in patches] for name, patches in made.items()},
        "answers": replies(cases, records),
        "summary": rows,
        "differences": results.differences(records, rows),
        "saved": None if args.out is None else str(args.out),
    }
    if args.out is not None:
        what = results.notes(lm, benchmark, "dev", len(cases), 0, "single: each edit alone", seconds)
        with files.staged(args.out, args.force) as folder:
            results.save(folder, f"errata demo: {len(cases)} facts, edited", document, records, records, what)
            files.save_patches(folder / "patches", [p for patches in made.values() for p in patches])
    screen.document(document)
    _show(screen, document, len(cases))
    screen.say(common.saved(args.out))
    if args.out is not None:
        screen.say(
            f"Open {args.out / 'report.html'}, or: errata ask {args.model} 'PROMPT' --patch {args.out / 'patches' / made['baft'][0].id}"
        )


def _named(progress: Progress, name: str, stage: str, done: int, total: int) -> None:
    progress(f"{name}: {stage}", done, total)


def replies(cases: list[Case], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case its prompt, the first rephrasing and the first neighbour: what the model said before, and after by method."""
    by_probe: dict[tuple[str, str, str], dict[str, Any]] = {}
    for r in records:
        row = by_probe.setdefault(
            (r["case"], r["kind"], r["prompt"]), {"kind": r["kind"], "prompt": r["prompt"], "before": r["gen_before"]}
        )
        row[r["method"]] = r["gen_after"]
    out = []
    for case in cases:
        rows = []
        for kind in SHOWN:
            probe = next((p for p in case.probes if p.kind == kind), None)
            if probe is not None:
                rows.append({**by_probe[case.request.id, kind, probe.prompt], "wanted": probe.target})
        out.append({"prompt": case.request.prompt, "old": case.request.old, "new": case.request.target, "said": rows})
    return out


def _show(screen: Screen, document: dict[str, Any], count: int) -> None:
    first = document["answers"][0]
    screen.say(f"{count} facts, each changed alone: {first['prompt']!r} from {first['old']!r} to {first['new']!r}, and so on.")
    lines = []
    for case in document["answers"]:
        for row in case["said"]:
            wanted = row["wanted"] or "as before"
            lines.append((SHOWN[row["kind"]], row["prompt"], wanted, said(row["before"]), *(said(row[m]) for m in METHODS)))
    screen.table(("", "asked", "wanted", "before", *METHODS), lines)
    screen.say()
    results.show(screen, document["summary"], document["differences"])
    each = ", ".join(f"{name} {value:.2f}" for name, value in document["seconds_an_edit"].items())
    screen.say(f"Seconds an edit (all trained in one batch): {each}.")
