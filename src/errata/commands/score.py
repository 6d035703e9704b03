"""``errata score``: methods on a benchmark, with intervals, records and a report."""

from __future__ import annotations

import argparse
import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, downstream, files, results
from errata.commands.screen import Progress, Screen
from errata.contrast.names import COUNT
from errata.core.chat import case_in_chat
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from errata.core.model import LM
    from errata.request import Case
    from errata.score.judges import Judge

CASES = 100
METHOD = "baft"


@dataclass
class ScoreRun:
    """final: one record a probe and method, for tables and page; every: also those of earlier marks and right after each edit.
    texts: what was sampled, so that the base is asked once."""

    final: list[dict[str, Any]] = field(default_factory=list)
    every: list[dict[str, Any]] = field(default_factory=list)
    at: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    right_after: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    texts: dict[Any, str] = field(default_factory=dict)


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "score", run, "score editing methods on a benchmark")
    out.add_argument("--method", metavar="NAME[,NAME]", help=f"methods to compare ({METHOD})")
    common.case_options(out, CASES)
    out.add_argument(
        "--known",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="only cases whose old answer the model gives; --n counts these (counterfact, mquake, robustkey: unless --no-known)",
    )
    _judge_options(out)
    out.add_argument("--patch", nargs="+", action="extend", default=[], metavar="DIR", help="benchmarks without edits: score under these")
    out.add_argument("--marks", metavar="T,T,…", help="continual mode: score after so many edits (powers of ten and the last)")
    out.add_argument("--free-tokens", action="store_true", help="also the token agreement of free answers, by which GRACE was published")
    out.add_argument(
        "--robustness",
        action="store_true",
        help="also other names and shuffled tokens of the subject, long contexts, question form, chat template, true or false, negation",
    )
    out.add_argument(
        "--watch",
        type=common.count,
        metavar="N",
        help=f"also N neighbours of each fact that no editor is shown, found on the model ({COUNT} where the benchmark has none)",
    )
    out.add_argument("--fluency", action="store_true", help="also fluency (GE) and consistency (RS) of sampled text, after all edits")
    common.chat_option(out, "edit and ask every prompt of a benchmark with edits")
    common.mode_options(out)
    common.out_options(out)


def _judge_options(out: argparse.ArgumentParser) -> None:
    out.add_argument(
        "--judge",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="who else says whether an answer is right, as a protocol: contains, module:function, or any name with --judge-endpoint",
    )
    out.add_argument("--judge-endpoint", metavar="URL", help="a server that speaks OpenAI's chat completions (http://…/v1)")
    out.add_argument("--judge-model", metavar="NAME", help="the name it knows its model by")
    out.add_argument("--judge-key-env", metavar="NAME", help="the environment variable that holds its key")


def _judges_of(args: argparse.Namespace) -> list[Judge]:
    """Those of --judge; what an endpoint said is kept in the cache."""
    from errata.score import judges
    from errata.storage import cache_folder

    asked = (args.judge_endpoint, args.judge_model, args.judge_key_env)
    if not args.judge and any(asked):
        raise ConfigError("--judge-endpoint, --judge-model and --judge-key-env have no meaning without --judge NAME")
    if len(set(args.judge)) < len(args.judge):
        raise ConfigError(f"--judge {' '.join(args.judge)} names one judge twice")
    named = [name for name in args.judge if name in ("exact", "contains") or ":" in name]
    if any(asked) and len(args.judge) - len(named) != 1:
        raise ConfigError("--judge-endpoint belongs to one judge; give it a name of its own: --judge NAME --judge-endpoint URL")
    made = [judges.make(name, cache_folder() / "judged", *(asked if name not in named else ())) for name in args.judge]
    return [judge for judge in made if judge is not None]


def marks(args: argparse.Namespace) -> list[int]:
    """When continual mode scores; rising, from 1 to the number of cases."""
    if args.marks is None:
        return common.tens(args.n)
    if args.mode != "continual":
        raise ConfigError(f"--marks has no meaning in {args.mode} mode; add --mode continual")
    try:
        found = [int(part) for part in args.marks.split(",")]
    except ValueError:
        raise ConfigError(f"--marks {args.marks!r}: write whole numbers with commas, like 1,10,100") from None
    if found != sorted(set(found)) or found[0] < 1 or found[-1] > args.n:
        raise ConfigError(f"--marks {args.marks!r} must rise from at least 1 to at most the number of cases ({args.n})")
    return found


def settings_of(method: str, methods: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """Settings for one method: plain keys go to all, "reft.lr" only to reft."""
    for key in values:
        if "." in key and key.partition(".")[0] not in methods:
            raise UnknownNameError(f"setting {key!r}: no method {key.partition('.')[0]!r} is scored here; there are {', '.join(methods)}")
    plain = {k: v for k, v in values.items() if "." not in k}
    return plain | {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{method}.")}


def _score(
    lm: LM,
    editor: Any,
    cases: list[Case],
    benchmark: Any,
    args: argparse.Namespace,
    at: list[int],
    answers: Any,
    progress: Progress,
    into: ScoreRun,
    judged: Sequence[Judge] = (),
) -> None:
    """One method in one mode; its records are added to ``into``."""
    from errata import run as scenarios
    from errata.score.judges import judge

    watched = results.Watched(progress, editor.name)
    stacks: list[Any]
    if args.mode == "single":
        patches, found = scenarios.single(lm, editor, cases, watched, answers)
        final = judge(found, judged)
        stacks, into.every = [(p,) for p in patches], into.every + final
    elif args.mode == "batched":
        stack, found = scenarios.batched(lm, editor, cases, common.batch_size(args), watched, answers)
        final = judge(found, judged)
        stacks, into.every = [stack] * len(cases), into.every + final
    else:
        stack, by_mark, right_after = scenarios.continual(lm, editor, cases, at, watched, answers)
        by_mark, right_after = {mark: judge(records, judged) for mark, records in by_mark.items()}, judge(right_after, judged)
        stacks, final = [stack] * at[-1], by_mark[at[-1]]
        for mark, records in by_mark.items():
            into.at.setdefault(mark, []).extend(records)
            into.every += [{**r, "edits": mark} for r in records]
        into.right_after += right_after
        into.every += [{**r, "edits": "right after its own"} for r in right_after]
    into.final += final
    if args.fluency:
        sampled = _fluency(lm, editor, cases[: len(stacks)], stacks, benchmark, into.texts, progress)
        into.final, into.every = into.final + sampled, into.every + sampled
    if args.mode != "continual":  # there the scoring at the marks lies between the edits
        into.seconds[editor.name] = watched.seconds / len(cases)


def _fluency(
    lm: LM, editor: Any, cases: list[Case], stacks: list[Any], benchmark: Any, texts: dict[Any, str], progress: Progress
) -> list[dict[str, Any]]:
    """GE and RS records of each case that has prompts for them."""
    from errata.score import generation

    if not hasattr(benchmark, "generation"):
        raise ConfigError("--fluency: this benchmark offers no prompts to sample from; leave it out")
    told = lambda done, total: progress(f"{editor.name}: sampling", done, total)  # noqa: E731
    found = generation.score(lm, cases, stacks, editor.name, benchmark, texts=texts, progress=told)
    if not found:
        raise ConfigError("--fluency: no case has a prompt to sample from; leave it out")
    return found


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.score import known, windows
    from errata.score.evaluator import AnswerCache
    from errata.score.metrics import summarise

    common.batch_size(args)
    values, methods = common.settings(args), common.editors(args.method or METHOD)
    files.check(args.out, args.force)
    benchmark, cases = common.items(args, CASES, "test", args.seed)
    if odd := [name for name in ("robustness", "chat") if getattr(args, name) and benchmark.kind != "edits"]:
        raise ConfigError(f"--{odd[0]}: {benchmark.name} makes no edits; leave it out")
    if benchmark.kind in ("choices", "questions"):
        return downstream.run(args, screen, benchmark, cases)
    if benchmark.kind != "edits":
        raise ConfigError(f"{benchmark.name} has no edits to score; try `errata trace --benchmark {benchmark.name} --data {args.data}`")
    if args.chat and args.fluency:
        raise ConfigError("--fluency samples texts that go on from plain prompts; leave it or --chat out")
    if args.patch:
        raise ConfigError(f"--patch: {benchmark.name} makes its own edits; leave it out, or score a benchmark without edits")
    for method in methods:
        registry.get("method", method).judge(settings_of(method, methods, values))
    judged = _judges_of(args)
    args.n = len(cases)
    at = marks(args)
    if benchmark.needs_data:
        screen.say("\n".join(benchmark.report.lines()))
    lm = common.load(args)
    editors = [registry.get("method", m).for_model(lm, **settings_of(m, methods, values)) for m in methods]
    scored, answers, told = ScoreRun(), AnswerCache(free_tokens=args.free_tokens), None
    args.left_out = collections.Counter()
    if getattr(benchmark, "only_known", False) if args.known is None else args.known:
        cases, told = _known(lm, benchmark, args, answers, screen)
    cases = windows.fitting(lm, cases, args.left_out)
    args.n, at = len(cases), marks(args)
    cases = _watching(lm, args, cases, screen)
    if args.robustness:
        cases = _widened(lm, editors, cases, screen)
    if args.chat:
        cases = [case_in_chat(lm.tokenizer, case) for case in cases]
    with screen.progress() as progress:
        for editor in editors:
            common.prepare(editor, lm, progress)
            _score(lm, editor, cases, benchmark, args, at, answers, progress, scored, judged)
    told = told or known.all_cases(lm, cases, answers)
    about = {**common.benchmark_facts(args, benchmark, len(cases)), "known": told, "left_out": dict(args.left_out)}
    document = _document(args, lm, editors, scored, summarise, about)
    if args.out is not None:
        what = results.notes(lm, benchmark, args.split, len(cases), args.seed, _mode(args), scored.seconds)
        what |= {"known": said.removeprefix("known: ")} if (said := known.say(told)) else {}
        what |= {f"{e.name} settings": _settings(e) for e in editors}
        title = f"{' and '.join(methods)} on {lm.name or 'the model'}"
        with files.staged(args.out, args.force) as folder:
            results.save(folder, title, document, scored.every, scored.final, what)
    screen.document(document)
    for said in filter(None, (known.say(told), windows.say(args.left_out, lm.context_length))):
        screen.say(f"{said[:1].upper()}{said[1:]}.")
    results.show(screen, document["summary"], document["differences"])
    results.micro(screen, document.get("micro_averages", ()))
    _retention(screen, document)
    screen.say(common.saved(args.out))


def _known(lm: LM, benchmark: Any, args: argparse.Namespace, answers: Any, screen: Screen) -> tuple[list[Case], dict[str, Any]]:
    """(the cases whose facts the base knows, --n of them where there are so many, what was found)."""
    from errata.score import known, windows

    with screen.progress() as progress:
        every = windows.editable(lm, benchmark.load(args.split, None, args.seed), args.left_out)
        shown = (lambda case: case_in_chat(lm.tokenizer, case)) if args.chat else (lambda case: case)
        told = lambda done, of: progress("asking for facts the model knows", done, of)  # noqa: E731
        found = known.known_cases(lm, every, args.n, answers, told, shown)
    args.n = len(found.cases)
    return found.cases, found.to_dict()


def _watching(lm: LM, args: argparse.Namespace, cases: list[Case], screen: Screen) -> list[Case]:
    """With probes of the watch half: as many a case as --watch says, by default where the benchmark brings nothing that should stay."""
    from errata.score import neighbours

    count = neighbours.to_watch(args.watch, cases)
    if not count:
        return cases
    with screen.progress() as progress:
        told = lambda done, of: progress("finding neighbours", done, of)  # noqa: E731
        return neighbours.add_watch_probes(lm, cases, count, together=args.mode != "single", progress=told)


def _widened(lm: LM, editors: list[Any], cases: list[Case], screen: Screen) -> list[Case]:
    """With robustness probes, the same for all methods: those that fit behind the longest context an editor may put in front."""
    from errata.score import robustness

    out = robustness.add_robustness_probes(lm, cases, room=robustness.room_of(lm, editors))
    if missing := robustness.unasked(out):
        screen.say(
            f"Not asked, since the model's window is too short (an in-context method may get a smaller budget): {', '.join(missing)}."
        )
    return out


def _mode(args: argparse.Namespace) -> str:
    chat = ", in the chat template" if args.chat else ""
    if args.mode == "batched":
        return f"batched, {common.batch_size(args)} edits in a patch, scored after all{chat}"
    return {"single": "single: each edit alone", "continual": "continual: one after another, scored after all"}[args.mode] + chat


def _settings(editor: Any) -> str:
    from errata.config import to_dict

    return ", ".join(f"{k}={v}" for k, v in to_dict(editor).items())


def _document(
    args: argparse.Namespace, lm: LM, editors: list[Any], scored: ScoreRun, summarise: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    from errata.config import to_dict

    rows = summarise(scored.final)
    out = {
        "model": lm.name,
        "base": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **facts,
        "mode": args.mode,
        "chat": args.chat,
        "settings": {e.name: to_dict(e) for e in editors},
        "seconds_an_edit": {k: round(v, 4) for k, v in scored.seconds.items()},
        "summary": rows,
        "differences": results.differences(scored.final, rows),
        "saved": None if args.out is None else str(args.out),
    }
    if args.robustness:
        from errata.score.robustness import micro_averages

        out["micro_averages"] = micro_averages(scored.final)
    if args.mode == "batched":
        out["batch_size"] = common.batch_size(args)
    if args.mode == "continual":
        out["retention"] = [{**row, "T": mark} for mark, records in scored.at.items() for row in summarise(records)]
        out["right_after"] = summarise(scored.right_after)
    return out


def _retention(screen: Screen, document: dict[str, Any]) -> None:
    """How each method's metrics stand after T edits, in the headline protocol."""
    from errata.report import tables

    first = tables.headline(document.get("retention", ()))
    rows = [r for r in tables.main(document.get("retention", ())) if r["protocol"] == first]
    if not rows:
        return
    at = sorted({r["T"] for r in rows})
    found = {(r["method"], r["metric"], r["T"]): r for r in rows}
    soon = {(r["method"], r["metric"]): r for r in document["right_after"] if r["protocol"] == first}
    names = tables.merged([*rows, *(r for r in soon.values() if r["metric"] in {row["metric"] for row in rows})])
    pairs = [(m, k) for m in tables.methods(rows) for k in names if (m, k, at[-1]) in found]
    screen.say(f"{tables.title(first).partition(':')[0]}: the same after T edits, and of each case right after its own edit")
    lines = [(m, names[k], tables.cell(soon.get((m, k))), *(tables.cell(found.get((m, k, t))) for t in at)) for m, k in pairs]
    screen.table(("method", "metric", "right after", *(f"T = {t}" for t in at)), lines)
