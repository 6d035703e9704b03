"""``errata trace``: where a fact's answer comes from, as numbers and heat maps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.commands import common, files
from errata.commands.screen import Screen, as_json
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.trace import AverageEffects, Fact, Suggestion, TraceConfig, TraceResult

CASES = 50
_DRAWN = 4  # facts that are drawn with --out
DIGITS = 6  # of a number in the document: a probability's own rounding is about there
WORDS = {"subject_first": "first subject", "subject_middle": "middle subject", "subject_last": "last subject"}


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "trace", run, "trace which blocks and tokens a fact's answer hangs on")
    out.add_argument("--prompt", help="text that the answer should follow")
    out.add_argument("--subject", help="what the fact is about, in whole words of the prompt")
    common.occurrence_option(out)
    out.add_argument("--answer", help="trace only if the model says this; without it, whatever it says is traced")
    out.add_argument("--requests", metavar="FILE.jsonl", help="many facts: edit requests with subject; `old` is the expected answer")
    common.benchmark_options(out, None, CASES)
    out.add_argument("--kinds", default="hidden,mlp,attn", help="states to restore (hidden,mlp,attn)")
    out.add_argument("--samples", type=common.positive, default=10, metavar="N", help="noise samples a fact (10)")
    out.add_argument("--noise", type=float, default=3.0, metavar="X", help="in standard deviations of the subjects' embeddings (3)")
    out.add_argument(
        "--window", type=common.positive, metavar="N", help="blocks restored together for mlp and attn (10 of 48, to the model's depth)"
    )
    out.add_argument("--seed", type=int, default=1, help="of the noise (1)")
    out.add_argument("--rows", type=common.positive, default=256, metavar="N", help="of a batch at most: a cap on memory (256)")
    common.out_options(out)


def facts(args: argparse.Namespace) -> Callable[[], list[Fact]]:
    """Where the facts come from; read at once what is quick to check, but import torch only when called."""
    from errata.request import read_requests

    single = [name for name in ("prompt", "subject", "answer", "occurrence") if getattr(args, name) is not None]
    given = [f"--{name}" for name in (*single[:1], "requests", "benchmark") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} exclude each other; trace one or the other")
    if args.benchmark is None and (odd := [name for name in ("data", "split", "n") if getattr(args, name) is not None]):
        raise ConfigError(f"--{odd[0]} has no meaning without --benchmark")
    if args.benchmark is not None:
        wanted = _of_benchmark(args)
    elif args.requests is not None:
        wanted = read_requests(args.requests)
    elif args.prompt is None or args.subject is None:
        raise ConfigError("nothing to trace; give --prompt and --subject, --requests FILE.jsonl, or --benchmark almanac")
    else:
        wanted = []

    def make() -> list[Fact]:
        from errata.trace import Fact

        if not wanted:
            return [Fact(args.prompt, args.subject, args.answer, 1 if args.occurrence is None else args.occurrence)]
        return [Fact(*r) if isinstance(r, tuple) else Fact.of(r) for r in wanted]

    return make


def _of_benchmark(args: argparse.Namespace) -> list[Any]:
    """The requests of a benchmark of edits, or (prompt, subject, answer) of one of facts."""
    benchmark, items = common.items(args, CASES, "dev", 0)
    if benchmark.kind == "edits":
        return [r for case in items for r in case.requests]
    if benchmark.kind != "facts":
        raise ConfigError(f"{benchmark.name} has no facts with a subject to trace; `errata benchmarks` says which have")
    return [(fact.prompt, fact.subject, fact.answer) for fact in items]


def run(args: argparse.Namespace, screen: Screen) -> None:
    wanted = facts(args)
    files.check(args.out, args.force)
    from errata.trace import TraceConfig, trace

    kinds = tuple(common.listed(args.kinds))
    settings = TraceConfig(kinds, args.samples, args.noise, args.window, args.seed, args.rows)
    asked = wanted()
    lm = common.load(args)
    began = time.perf_counter()
    with screen.progress() as progress:
        found = trace(lm, asked, settings, progress)
    document = _document(args, lm, found, time.perf_counter() - began)
    if args.out is not None:
        with files.staged(args.out, args.force) as folder:
            files.write(folder / "trace.json", as_json(document) + "\n")
            _draw(folder, document)
    screen.document(document)
    _show(screen, document)
    screen.say(common.saved(args.out))


def _rounded(values: Any) -> Any:
    if isinstance(values, list | tuple):
        return [_rounded(v) for v in values]
    return round(float(values), DIGITS)


def _document(args: argparse.Namespace, lm: LM, found: TraceResult, seconds: float) -> dict[str, Any]:
    """The result as plain values: what ``--json`` prints and ``trace.json`` holds."""
    from errata.trace import average, suggest_layers

    kinds = found.settings.kinds
    suggestion = suggest_layers(found) if "mlp" in kinds else None
    return {
        "model": lm.name,
        "base": lm.fingerprint,
        "settings": _settings(found.settings, found),
        "facts": [
            {
                "prompt": f.fact.prompt,
                "subject": f.fact.subject,
                "answer": f.answer,
                "tokens": list(f.tokens),
                "span": list(f.span),
                "high": round(f.high, DIGITS),
                "low": round(f.low, DIGITS),
                "scores": {kind: _rounded(f.scores[k].tolist()) for k, kind in enumerate(kinds)},
            }
            for f in found.facts
        ],
        "skipped": [{"prompt": s.fact.prompt, "subject": s.fact.subject, "reason": s.reason} for s in found.skipped],
        "average": _average(average(found)),
        "suggestion": None if suggestion is None else _suggestion(suggestion),
        "seconds": round(seconds, 3),
        "saved": None if args.out is None else str(args.out),
    }


def _settings(settings: TraceConfig, found: TraceResult) -> dict[str, Any]:
    return {
        "kinds": list(settings.kinds),
        "samples": settings.samples,
        "noise": settings.noise,
        "deviation": round(found.deviation, 8),
        "window": found.window,
        "seed": settings.seed,
        "rows": settings.rows,
    }


def _average(found: AverageEffects) -> dict[str, Any]:
    """NaN (a role that no fact has, an error of one fact) becomes null where it is written."""
    from errata.trace import ROLES

    def by_kind(values: Any) -> dict[str, Any]:
        return {kind: _rounded(values[k].tolist()) for k, kind in enumerate(found.kinds)}

    by_role = {r: {"n": found.count(r), "mean": by_kind(found.mean(r)), "error": by_kind(found.error(r))} for r in ROLES}
    whole = {name: round(getattr(found, name), DIGITS) for name in ("high", "low", "total")}
    return {"facts": found.facts, **whole, "roles": by_role}


def _suggestion(found: Suggestion) -> dict[str, Any]:
    return {
        "block": found.block,
        "range": list(found.range),
        "effects": _rounded(found.effects),
        "errors": _rounded(found.errors),
        "alike": list(found.alike),
        "facts": found.facts,
        "total": round(found.total, DIGITS),
        "window": list(found.window),
        "until": found.until,
        "weak": found.weak,
        "reasons": list(found.reasons),
        "text": found.text(),
    }


def _draw(folder: Path, document: dict[str, Any]) -> None:
    """trace-1.png and .svg … for the first facts, trace-average for all."""
    from errata.report import heatmap

    window = document["settings"]["window"]
    for i, record in enumerate(document["facts"][:_DRAWN], 1):
        heatmap.fact(record, window, [folder / f"trace-{i}.{ending}" for ending in ("png", "svg")])
    heatmap.average(document["average"], window, [folder / f"trace-average.{ending}" for ending in ("png", "svg")])


def _show(screen: Screen, document: dict[str, Any]) -> None:
    whole, kinds = document["average"], document["settings"]["kinds"]
    for row in document["facts"][:_DRAWN]:
        screen.say(f"{row['prompt']!r} → {row['answer']!r}: p {row['high']:.3f}, with noise on the subject {row['low']:.3f}")
    if (more := len(document["facts"]) - _DRAWN) > 0:
        screen.say(f"… and {more} more; on average p {whole['high']:.3f}, with noise {whole['low']:.3f}")
    for row in document["skipped"][:_DRAWN]:
        screen.say(f"skipped {row['prompt']!r}: {row['reason']}")
    if (more := len(document["skipped"]) - _DRAWN) > 0:
        screen.say(f"… and {more} more skipped")
    screen.say()
    screen.say("Indirect effect (how much of p comes back) by role of the restored token: the best block and its effect")
    lines = [(WORDS.get(role, role), r["n"], *(_peak(r["mean"][k]) for k in kinds)) for role, r in whole["roles"].items() if r["n"]]
    screen.table(("token", "facts", *kinds), lines, right=(-1,))
    at = whole["roles"]["subject_last"]
    if at["n"]:
        screen.say("At the last subject token, by block")
        blocks = range(len(at["mean"][kinds[0]]))
        screen.table(("block", *kinds), [(b, *(f"{at['mean'][k][b]:.3f}" for k in kinds)) for b in blocks], right=(-1,))
    if document["suggestion"] is not None:
        screen.say(document["suggestion"]["text"])
    elif "mlp" in kinds:
        screen.say("No block is suggested: no prompt goes on after its subject.")
    screen.say(f"{len(document['facts'])} fact(s), {document['seconds']:.2f} s.")


def _peak(values: list[float]) -> str:
    best = max(range(len(values)), key=values.__getitem__)
    return f"{values[best]:.3f} at {best}"
