"""``errata ask``: what the base says, and what it says under patches."""

from __future__ import annotations

import argparse

from errata.commands import common, files, neighbours
from errata.commands.screen import Screen, clean, said
from errata.errors import InputError


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "ask", run, "ask a model, with and without patches")
    out.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to go on from")
    out.add_argument(
        "--patch",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="patch folders, or a folder made by `errata edit --out`; stacked in this order",
    )
    out.add_argument("--max-new-tokens", type=common.positive, metavar="N", help="length of an answer at most (12; in a chat 64)")
    common.chat_option(out, "ask each prompt")
    neighbours.options(out)


def run(args: argparse.Namespace, screen: Screen) -> None:
    for prompt in args.prompts:
        if clean(prompt) != prompt:
            raise InputError(f"prompt {prompt!r} holds control characters, or bytes that are not UTF-8; write it as text")
    stack, names = files.load_patches(args.patch), neighbours.names(args)
    lm = common.load(args)
    for patch in stack:
        lm.check(patch)
    sides = ((), stack) if stack else ((),)
    prompts = common.asked(lm, args.prompts, args.chat)
    texts = common.answers(lm, [(p, s) for s in sides for p in prompts], args.max_new_tokens)
    count = len(args.prompts)
    rows = [{"prompt": p, "base": texts[i], "patched": texts[count + i] if stack else None} for i, p in enumerate(args.prompts)]
    edited = list({r.id: r for patch in stack for r in patch.requests}.values())
    with screen.progress() as progress:
        kept = neighbours.watched(lm, edited, [stack] * len(edited), args, names, progress)
    about = [{"prompt": r.prompt, "target": r.target, "neighbours": one} for r, one in zip(edited, kept, strict=True)]
    screen.document({"model": lm.name, "base": lm.fingerprint, "patches": [p.id for p in stack], "answers": rows, "edits": about})
    if stack:
        screen.table(("prompt", "base", "patched"), [(r["prompt"], said(r["base"]), said(r["patched"])) for r in rows])
        neighbours.show(screen, kept)
    else:
        screen.table(("prompt", "answer"), [(r["prompt"], said(r["base"])) for r in rows])
