"""``errata tune``: settings of methods for one model, found on facts that it knows and checked on others."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.commands import common
from errata.commands.screen import Screen
from errata.config import digest
from errata.errors import ConfigError, InputError, UnknownNameError, near

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.request import Case
    from errata.tune.search import Search, Trial

_CASES, _MINUTES, _WATCHED = 16, 60, 8
_FEWEST = 4  # cases on each side
_TRACED = 8  # facts
_METHODS = "baft,rome,lora,ft-m,grace,wise"


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "tune", run, "find settings of methods for a model, on facts that it knows")
    out.add_argument("--method", default=_METHODS, metavar="NAME[,NAME]", help=f"methods to tune ({_METHODS})")
    common.benchmark_options(out, "everyday", _CASES)
    out.add_argument("--seed", type=int, default=0, help="of the order of the cases (0)")
    out.add_argument("--minutes", type=common.positive, default=_MINUTES, help=f"for all methods together ({_MINUTES})")
    out.add_argument(
        "--carry", metavar="NAME|FILE", help="do not search: compare what was found on another model with the rule, on this one"
    )
    out.add_argument("--anew", action="store_true", help="forget what an earlier search on these cases tried")
    out.add_argument("--out", type=Path, metavar="FILE", help="where the settings go (the cache, where every command finds them)")


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.methods import tuned
    from errata.storage import cache_folder
    from errata.tune.search import Evaluation

    methods = common.editors(args.method)
    carried = _carried(args.carry, methods) if args.carry else None
    every = _every_case(args)
    lm = common.load(args)
    dev, unseen, told = _split(lm, args, every, screen)
    journal = cache_folder() / "tune" / f"{lm.fingerprint}-{digest([c.id for c in (*dev, *unseen)])}.jsonl"
    if args.anew:
        journal.unlink(missing_ok=True)
    screen.say(f"{told} {len(dev)} to choose by, {len(unseen)} to check with; trials are kept in {journal}.")
    path = args.out or tuned.path_of(lm.fingerprint)
    searched, checked = Evaluation(lm, dev, journal), Evaluation(lm, unseen, journal)
    rows: list[dict[str, Any]] = []
    traced = _Traced(lm, dev)
    for i, method in enumerate(methods):
        if carried is not None:
            rows.append(_compare(checked, method, _for_this(carried, method, lm.depth), screen))
            continue
        seconds = args.minutes * 60 / len(methods)
        found, row = _search(searched, checked, method, seconds, traced, screen, f"{i + 1} of {len(methods)}")
        rows.append(row)
        tuned.save(path, _of_model(lm), {method: {**found, "cases": _cases(args, dev, unseen)}})
    _show(screen, rows, carried)
    saved = None if carried is not None else str(path)
    screen.document({"model": lm.name, "base": lm.fingerprint, "dev": len(dev), "unseen": len(unseen), "methods": rows, "saved": saved})
    if saved:
        screen.say(f"Saved in {saved}.")


def _every_case(args: argparse.Namespace) -> list[Case]:
    """All cases of the benchmark in an order by the seed."""
    from errata.benchmarks.files import open_benchmark

    benchmark = open_benchmark(args.benchmark, args.data)
    if benchmark.kind != "edits":
        raise ConfigError(f"{benchmark.name} has no edits to tune on; `errata benchmarks` says which have")
    return list(benchmark.load(args.split, None, args.seed))


def _split(lm: LM, args: argparse.Namespace, every: Sequence[Case], screen: Screen) -> tuple[list[Case], list[Case], str]:
    """(cases to choose by, cases to check with, what to say): facts that the base knows, no subject on both sides."""
    from errata.score import known, neighbours
    from errata.score.evaluator import AnswerCache

    count = args.n or _CASES
    with screen.progress() as progress:
        told = lambda done, of: progress("asking for facts the model knows", done, of)  # noqa: E731
        found = known.known_cases(lm, every, 2 * count, AnswerCache(), told)
        cases = list({case.request.subject: case for case in found.cases}.values())
        half = min(count, len(cases) // 2)
        if half < _FEWEST:
            raise InputError(
                f"the model knows {len(cases)} of the {found.looked} facts looked at; a search needs {2 * _FEWEST}: give another "
                "--benchmark with --data"
            )
        told = lambda done, of: progress("finding neighbours", done, of)  # noqa: E731
        cases = neighbours.add_watch_probes(lm, [_only_needed(c) for c in cases[: 2 * half]], _WATCHED, progress=told)
    return cases[:half], cases[half:], f"{len(cases)} of {found.looked} facts looked at are known to the model:"


def _only_needed(case: Case) -> Case:
    """Without probes that no share counts."""
    from dataclasses import replace

    return replace(case, probes=tuple(p for p in case.probes if p.kind in ("rewrite", "rephrase")))


class _Traced:
    """The block that a causal trace of the dev facts points at, traced when first asked for; None where it points nowhere."""

    def __init__(self, lm: LM, cases: Sequence[Case]) -> None:
        self._lm, self._cases = lm, cases
        self._found: list[int | None] = []

    def __call__(self) -> int | None:
        if not self._found:
            from errata.trace import Fact, TraceConfig, suggest_layers, trace

            facts = [Fact.of(c.request) for c in self._cases[:_TRACED] if c.request.subject]
            found = suggest_layers(trace(self._lm, facts, TraceConfig(("mlp",), samples=4))) if facts else None
            self._found.append(None if found is None else found.block)
        return self._found[0]


def _search(
    searched: Any, checked: Any, method: str, seconds: float, traced: _Traced, screen: Screen, place: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the file holds of a method, what is shown of it)."""
    from errata.tune.search import Search, gain

    began = time.perf_counter()
    with screen.progress() as progress:

        def told(name: str, trial: Trial, taken: bool) -> None:
            shares = trial.failed or ", ".join(f"{k} {v:.2f}" for k, v in trial.shares.items())
            screen.say(f"{name} {_text(trial.settings)}: S {trial.score:.3f} ({shares}), {trial.seconds:.0f} s{' *' if taken else ''}")

        search: Search = Search(searched, method, seconds, traced, told, lambda s, d, t: progress(f"{method} ({place}): {s}", d, t))
        best = search.run()
        rule = search.trials[0]
        there, here = checked.trial(method, {}), checked.trial(method, best.settings)
        more, error = gain(here, there)
        kept = dict(best.settings) if more >= 0 else {}
        if kept != dict(best.settings):
            screen.say(f"{method}: on facts that were not searched the rule is better; its settings stay.")
    row = {
        "method": method,
        "settings": kept,
        "tried": len(search.trials),
        "cut": search.cut,
        "dev": {"rule": rule.to_dict(), "found": best.to_dict()},
        "unseen": {"rule": there.to_dict(), "found": here.to_dict(), "gain": round(more, 4), "error": round(error, 4)},
        "seconds": round(time.perf_counter() - began, 1),
    }
    return {k: v for k, v in row.items() if k != "method"}, row


def _carried(name: str, methods: Sequence[str]) -> dict[str, Any]:
    """A file of another model, by its name where errata brings it or by its path."""
    from errata.methods import tuned

    there = tuned.shipped()
    path = there.get(name, Path(name))
    if name not in there and not path.exists():
        raise UnknownNameError(f"--carry {name}: no such file, and no model of that name is tuned; {near(name, there, 'there are')}")
    found = tuned.read(path)
    if missing := [m for m in methods if m not in found["methods"]]:
        raise ConfigError(f"--carry {name}: it has no settings of {missing[0]}; it has {', '.join(found['methods'])}")
    return found


def _for_this(found: dict[str, Any], method: str, depth: int) -> dict[str, Any]:
    from errata.tune.space import carried

    return carried(found["methods"][method]["settings"], int(found["depth"]), depth)


def _compare(checked: Any, method: str, settings: dict[str, Any], screen: Screen) -> dict[str, Any]:
    """What another model's settings come to here, beside the rule."""
    from errata.tune.search import gain

    there, here = checked.trial(method, {}), checked.trial(method, settings)
    more, error = gain(here, there)
    screen.say(f"{method} {_text(settings)}: S {here.score:.3f}, the rule's {there.score:.3f}")
    unseen = {"rule": there.to_dict(), "found": here.to_dict(), "gain": round(more, 4), "error": round(error, 4)}
    return {"method": method, "settings": settings, "unseen": unseen}


def _of_model(lm: LM) -> dict[str, Any]:
    from errata import __version__

    dtype = str(lm.dtype).removeprefix("torch.")
    return {"model": lm.name, "fingerprint": lm.fingerprint, "depth": lm.depth, "dtype": dtype, "errata": __version__}


def _cases(args: argparse.Namespace, dev: Sequence[Case], unseen: Sequence[Case]) -> dict[str, Any]:
    """What a method was searched on: a file may hold methods of several searches."""
    return {"benchmark": args.benchmark, "seed": args.seed, "dev": [c.id for c in dev], "unseen": [c.id for c in unseen]}


def _text(settings: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items()) or "as the rule has it"


def _show(screen: Screen, rows: Sequence[dict[str, Any]], carried: dict[str, Any] | None) -> None:
    """The rule beside what was found, on facts that no search saw."""
    what = "found" if carried is None else f"from {carried['model']}"
    shown = []
    for row in rows:
        rule, found = row["unseen"]["rule"], row["unseen"]["found"]
        gain = f"{row['unseen']['gain']:+.3f} ± {row['unseen']['error']:.3f}"
        shown.append((row["method"], _text(row["settings"]), _shares(rule), _shares(found), gain))
    screen.table(("method", "settings", "the rule: S rel gen kept", f"{what}: S rel gen kept", "gain in S ± SE"), shown)
    screen.say("On facts that no search saw. S is the harmonic mean of reliability, generality and kept neighbours, free answers.")
    if cut := [f"{row['method']} {value}" for row in rows for value in row.get("cut", ())]:
        screen.say(f"Not tried for want of time: {'; '.join(cut)}. The same command with more --minutes goes on.")


def _shares(trial: dict[str, Any]) -> str:
    if "failed" in trial:
        return f"failed: {trial['failed']}"
    return " ".join("–" if trial[k] is None else f"{trial[k]:.2f}" for k in ("S", "reliability", "generality", "kept"))
