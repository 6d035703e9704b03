"""``errata edit``: requests to patches, with what the model says before and after."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, files, neighbours
from errata.commands.screen import Progress, Screen, as_json, said
from errata.errors import ConfigError
from errata.request import JOINS, EditRequest, read_requests

if TYPE_CHECKING:
    from errata.contrast.names import Names
    from errata.core.bank import Stack
    from errata.core.model import LM
    from errata.core.patch import Patch
    from errata.score.wanted import Answer

GROUP = 64  # single edits trained in one batch
TOKENS = 12  # of an answer at most, where a ledger is asked


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "edit", run, "write new facts as patches; the model itself is not changed")
    request_options(out)
    out.add_argument(
        "--allow-conflicts",
        action="store_true",
        help="go on although edits of one stack (--mode batched, continual) answer the same prompt, as `errata ledger` finds it",
    )
    neighbours.options(out)
    common.mode_options(out)
    common.out_options(out)


OF_ONE = ("prompt", "target", "subject", "occurrence", "join")  # options that say one edit


def request_options(out: argparse.ArgumentParser) -> None:
    """What to edit, and by which method."""
    out.add_argument("--prompt", help="text that the target should follow")
    out.add_argument("--target", help="the new answer")
    out.add_argument("--subject", help="what the fact is about, in whole words of the prompt")
    common.occurrence_option(out)
    out.add_argument(
        "--join",
        choices=tuple(JOINS),
        help="what stands between prompt and target: a space, none, or (auto, the default) what one writes; --debug shows the tokens",
    )
    out.add_argument("--requests", metavar="FILE.jsonl", help="many edits: one JSON object a line, with prompt, target and maybe subject …")
    common.chat_option(out, "train and ask each prompt")
    out.add_argument("--method", default="baft", help="see `errata methods` (baft)")
    out.add_argument(
        "--rank", type=common.positive, metavar="N", help="rank of the patch, where the method has one; short for --set rank=N"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Hyper-parameters; ``--rank`` is one."""
    return common.settings(args) | ({"rank": args.rank} if args.rank else {})


def requests(args: argparse.Namespace) -> list[EditRequest]:
    """Those of the file, or the one of the arguments."""
    single = [name for name in OF_ONE if getattr(args, name) is not None]
    if args.requests is not None:
        if single:
            raise ConfigError(f"--{single[0]} and --requests exclude each other; put the edit into the file")
        return read_requests(args.requests)
    if args.prompt is None or args.target is None:
        raise ConfigError("nothing to edit; give --prompt and --target, or --requests FILE.jsonl")
    return [EditRequest(**{name: value for name in OF_ONE if (value := getattr(args, name)) is not None})]


def _steps(progress: Progress, stage: str, editor: Any) -> Callable[[int, int, float], None]:
    """The editor's own callback as a bar of its steps."""
    total = int(getattr(editor, "steps", 1))
    return lambda step, running, loss: progress(stage, min(step, max(total, 1)), max(total, 1))


def _make(
    lm: LM, editor: Any, wanted: list[EditRequest], mode: str, size: int, names: Names | None, progress: Progress
) -> tuple[list[Patch], list[Stack]]:
    """(patches to keep, the stack each request is answered under).  ``names``: from which contrast is taken."""
    from errata.core.bank import active_patches

    if mode == "single":
        patches: list[Patch] = []
        for part in common.chunks(wanted, GROUP):
            stage = f"steps, edits {len(patches) + 1} to {len(patches) + len(part)}"
            looking = lambda done, part=part: progress("neighbours to leave alone", done, len(part))  # noqa: E731
            shown = editor.contrasted_each(lm, part, names=names, told=looking)
            patches += editor.edit_each(lm, shown, progress=_steps(progress, stage, editor))
        return patches, [(p,) for p in patches]
    stack: Stack = ()
    done = 0
    for part in common.chunks(wanted, size if mode == "batched" else 1):
        stack = active_patches((*stack, editor.edit(lm, editor.contrasted(lm, part, stack, names=names), on=stack)))
        done += len(part)
        progress("edits", done, len(wanted))
    return list(stack), [stack] * len(wanted)


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.ledger import findings
    from errata.score import wanted as scoring

    given, size, chosen, names = requests(args), common.batch_size(args), settings(args), neighbours.names(args)
    method = args.method
    kind = registry.get("method", method)
    kind.judge(chosen)
    files.check(args.out, args.force)
    if args.mode != "single" and not args.allow_conflicts:  # each alone, they do not meet
        findings.raise_on_findings(list(findings.find_conflicts(given, ())), "go on with --allow-conflicts: the last one written wins")
    lm = common.load(args)
    wanted = common.edited(lm, given, args.chat)
    editor = kind.for_model(lm, **chosen)
    if args.debug:
        _show_tokens(lm, wanted, screen)
    began = time.perf_counter()
    with screen.progress() as progress:
        common.prepare(editor, lm, progress)
        patches, stacks = _make(lm, editor, wanted, args.mode, size, names, progress)
        seconds = time.perf_counter() - began
        kept = neighbours.watched(lm, wanted, stacks, args, names, progress)
    sides: list[list[Stack]] = [[()] * len(wanted), stacks]
    answers = scoring.ask(lm, [(r.prompt, s, r.target) for side in sides for r, s in zip(wanted, side, strict=True)])
    document = _document(args, lm, method, given, patches, stacks, answers, seconds)
    document["answers"] = [{**row, "neighbours": one} for row, one in zip(document["answers"], kept, strict=True)]
    if args.out is not None:
        with files.staged(args.out, args.force) as folder:
            files.save_patches(folder, patches)
            files.write(folder / files.INDEX, as_json(document) + "\n")
    screen.document(document)
    _show(screen, document, args)


def _show_tokens(lm: LM, wanted: list[EditRequest], screen: Screen) -> None:
    """What is trained: the tokens of each prompt with its target, and where the target begins."""
    for request, row in zip(wanted, lm.encode([r.prompt for r in wanted], [r.continuation for r in wanted]), strict=True):
        ids = (row.ids[: row.prompt_length], row.target)
        prompt, target = (" ".join(repr(lm.tokenizer.decode([i])) for i in part) for part in ids)
        screen.say(f"trained, {request.prompt!r} -> {request.target!r}: {prompt} -> {target}")


def _document(
    args: argparse.Namespace,
    lm: LM,
    method: str,
    given: list[EditRequest],
    patches: list[Patch],
    stacks: list[Stack],
    answers: list[Answer],
    seconds: float,
) -> dict[str, Any]:
    """The result as plain values: what ``--json`` prints and ``edit.json`` holds."""
    count = len(given)
    rows = [
        {
            "prompt": r.prompt,
            "target": r.target,
            "before": before.text,
            "after": after.text,
            "as_wanted": after.as_wanted,
            "patch": stack[-1].id,
        }
        for r, stack, before, after in zip(given, stacks, answers[:count], answers[count:], strict=True)
    ]
    kept = [
        {"id": p.id, "edits": len(p.requests), "parameters": p.parameters, "settings": dict(p.settings), "notes": dict(p.notes)}
        for p in patches
    ]
    return {
        "model": lm.name,
        "base": lm.fingerprint,
        "method": method,
        "mode": args.mode,
        "chat": args.chat,
        "patches": kept,
        "answers": rows,
        "seconds": round(seconds, 3),
        "saved": None if args.out is None else str(args.out),
    }


def _show(screen: Screen, document: dict[str, Any], args: argparse.Namespace) -> None:
    rows = document["answers"]
    screen.table(
        ("prompt", "wanted", "before", "after", "as wanted"),
        [(r["prompt"], r["target"], said(r["before"]), said(r["after"]), "yes" if r["as_wanted"] else "no") for r in rows],
    )
    count, right = len(rows), sum(r["as_wanted"] for r in rows)
    neighbours.show(screen, [r["neighbours"] for r in rows])
    patches = document["patches"]
    each = document["seconds"] / count
    screen.say(f"{right} of {count} as wanted; {document['method']}, {document['seconds']:.2f} s, {each:.2f} s an edit.")
    names = ", ".join(p["id"] for p in patches[:6]) + (" …" if len(patches) > 6 else "")
    screen.say(f"{len(patches)} patch{'es' if len(patches) > 1 else ''}: {names}")
    lost = [p["notes"]["lost_share"] for p in patches if "lost_share" in p["notes"]]
    if lost:
        screen.say(f"Kept at a lower rank: {100 * sum(lost) / len(lost):.1f} % of the change's (Frobenius) norm is lost.")
    screen.say(common.saved(args.out))
