"""``errata demo``: BaFT and ReFT side by side on facts that a real model knows, in a few minutes; or BaFT's Theorem 2.3 in numbers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, files, results
from errata.commands.screen import Progress, Screen, as_json, said
from errata.report import tables

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.core.patch import Patch
    from errata.request import Case
    from errata.score.evaluator import AnswerCache

METHODS = ("baft", "reft")
REAL = "smollm2-135m"
FACTS = {"everyday": 8, "almanac": 24}
_READ = (
    "each fact was given a new answer, alone. Reliability: the edited prompt gets the new answer. Generality: other ways to ask get it, "
    "too. Neighbours kept, or locality: other facts are answered as before. Below the tables stands every answer, before and after."
)
SHOWN = {"rewrite": "the edited prompt", "rephrase": "asked otherwise", "neighbour": "another fact", "watch": "another subject"}


def add(commands: common.Subparsers) -> None:
    out = common.parser(
        commands,
        "demo",
        run,
        f"edit facts that a real model knows with {' and '.join(METHODS)}, and show what comes of it",
        model=False,
    )
    out.add_argument(
        "what", nargs="?", choices=("edits", "theorem"), default="edits", help="facts, or why a linear edit moves what is near it"
    )
    out.add_argument("--n", type=common.positive, help=f"facts to edit ({FACTS['everyday']}; of the almanac {FACTS['almanac']})")
    out.add_argument("--model", metavar="MODEL", help=f"any model ({REAL}; where that is not on this machine, the almanac)")
    out.add_argument("--facts", choices=tuple(FACTS), help="everyday facts that the model knows, or the almanac's (as the model is)")
    common.model_options(out)
    common.out_options(out)


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata import run as scenarios
    from errata.score.evaluator import AnswerCache
    from errata.score.metrics import summarise

    files.check(args.out, args.force)
    if args.what == "theorem":
        return _theorem(args, screen)
    _choose(args, screen)
    benchmark, answers = registry.get("benchmark", args.facts)(), AnswerCache()  # the base is asked once for both methods
    lm = common.load(args)
    records: list[dict[str, Any]] = []
    made: dict[str, list[Patch]] = {}
    seconds: dict[str, float] = {}
    with screen.progress() as progress:
        cases, split = _cases(lm, benchmark, args, answers, progress)
        for name in METHODS:
            editor = registry.get("method", name).for_model(lm)
            watched = results.Watched(progress, name)
            made[name], found = scenarios.single(lm, editor, cases, watched, answers)
            seconds[name] = watched.seconds / len(cases)
            records += found
    rows = summarise(records)
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
        what = results.notes(lm, benchmark, split, len(cases), 0, "single: each edit alone", seconds)
        what["how to read it"] = _READ
        with files.staged(args.out, args.force) as folder:
            results.save(folder, f"errata demo: {len(cases)} facts of {lm.name}, edited", document, records, records, what)
            files.save_patches(folder / "patches", [p for patches in made.values() for p in patches])
    screen.document(document)
    _show(screen, document, len(cases))
    screen.say(common.saved(args.out))
    if args.out is not None:
        screen.say(
            f"Open {args.out / 'report.html'}, or: errata ask {args.model} 'PROMPT' --patch {args.out / 'patches' / made['baft'][0].id}"
        )


def _choose(args: argparse.Namespace, screen: Screen) -> None:
    """The model, the facts and how many, where they were not given."""
    from errata.core import catalogue

    if args.model is None:
        there = catalogue.where(catalogue.known(REAL)) is not None
        args.model = REAL if there else "almanac"
        if not there:
            screen.say(f"{REAL} is not on this machine (`{catalogue.known(REAL).command}` brings it), so this is errata's own test bed.")
    args.facts = args.facts or ("almanac" if args.model == "almanac" else "everyday")
    args.n = args.n or FACTS[args.facts]


def _cases(lm: LM, benchmark: Any, args: argparse.Namespace, answers: AnswerCache, progress: Progress) -> tuple[list[Case], str]:
    """(facts to edit, the split they are from): everyday facts that the model knows, with neighbours found on it."""
    from errata.score import known, neighbours

    if args.facts == "almanac":
        return list(benchmark.load("dev", args.n)), "dev"
    found = known.known_cases(lm, benchmark.load(), args.n, answers, lambda done, of: progress("facts the model knows", done, of)).cases
    told = lambda done, of: progress("finding neighbours", done, of)  # noqa: E731
    return neighbours.add_watch_probes(lm, found, progress=told), benchmark.splits[0]


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
    screen.say(
        f"{count} facts that {document['model']} knows, each changed alone: {first['prompt']!r} from {first['old']!r} to {first['new']!r}, "
        "and so on. An answer is right when it begins as wanted; other subjects should be answered as before."
    )
    lines = []
    for case in document["answers"]:
        for row in case["said"]:
            wanted = row["wanted"] or "as before"
            lines.append((SHOWN[row["kind"]], row["prompt"], wanted, said(row["before"]), *(said(row[m]) for m in METHODS)))
    screen.table(("", "asked", "wanted", "before", *METHODS), lines)
    screen.say()
    headline = tables.headline(document["summary"])  # the page has the others
    results.show(screen, *([row for row in document[part] if row["protocol"] == headline] for part in ("summary", "differences")))
    each = ", ".join(f"{name} {value:.2f}" for name, value in document["seconds_an_edit"].items())
    screen.say(f"Seconds an edit (all trained in one batch): {each}.")
    screen.say(
        "The page of --out has every answer, the other protocols (equal to the answer, teacher-forced, likelihoods), and what each means."
    )


def _theorem(args: argparse.Namespace, screen: Screen) -> None:
    from errata.analyse import theorem

    shown = theorem.demonstrate()
    document = {"facts": shown.facts, "points": shown.points, "saved": None if args.out is None else str(args.out)}
    if args.out is not None:
        from errata.report import theorem as drawing

        with files.staged(args.out, args.force) as folder:
            files.write(folder / "theorem.json", as_json(document) + "\n")
            drawing.draw(shown.points, shown.facts, [folder / f"theorem.{ending}" for ending in ("svg", "png")])
    screen.document(document)
    f = shown.facts
    reach = f["eps_0"] + f["eps_ir below"]
    screen.say(f"BaFT, Theorem 2.3, in {f['width']} dimensions, rank {f['rank']}: how far an edit moves states it should leave alone.")
    screen.say(
        f"ReFT moves h₀ by {f['shift']:.2f} and keeps its ball of radius {f['eps_0']:g} within {f['eps_t']:.2f}: σ(I + H) = "
        f"{f['sigma(I + H)']:.2f}, σ(H) = {f['sigma(H)']:.2f}."
    )
    screen.say(f"So, however it was trained, it moves every state nearer than {reach:.2f} out of that state's own ball; a gate need not.")
    lines = [
        (f"{p['distance']:.2f}", f"{max(0.0, p['bound']):.2f}", f"{p['reft']:.2f}", f"{p['baft']:.2f}", "yes" if p["reft leaves"] else "")
        for p in shown.points
    ]
    screen.table(("distance from h₀", "at least, if linear", "moved by ReFT", "moved by BaFT", "ReFT: out of its ball"), lines, right=(-1,))
    missed, moved = ([f"{f[f'{name} {what}']:.2f}" for name in ("reft", "baft")] for what in ("from t", "moves unrelated"))
    screen.say(
        f"Both trained on one objective.  The edited state and its ball end {missed[0]} (ReFT) and {missed[1]} (BaFT) from the wanted one;"
    )
    screen.say(f"unrelated states are moved by {moved[0]} (ReFT) and {moved[1]} (BaFT), on average.")
    screen.say(common.saved(args.out))
