"""``errata score`` on a benchmark without edits: the base, and the stack of --patch where one is given."""

from __future__ import annotations

import argparse
from typing import Any

from errata.commands import common, files, results
from errata.commands.screen import Screen
from errata.errors import ConfigError


def run(args: argparse.Namespace, screen: Screen, benchmark: Any, items: list[Any]) -> None:
    """Accuracy with intervals, before and after."""
    for name in ("method", "marks", "config", "fluency", "free_tokens", "set", "known", "judge"):
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option}: {benchmark.name} has no edits to make; leave it out, and give --patch DIR to score a patched model"
            )
    stack = files.load_patches(args.patch)
    lm = common.load(args)
    from errata.score import downstream
    from errata.score.metrics import summarise

    for patch in stack:
        lm.check(patch)
    ask: Any = {"choices": downstream.choices, "questions": downstream.questions}[benchmark.kind]  # two types of items
    method = "+".join(dict.fromkeys(p.method for p in stack)) or "unedited"
    with screen.progress() as progress:
        records = ask(lm, items, stack, method, None, lambda done, of: progress("scoring", done, of))
    document = {
        "model": lm.name,
        "base": lm.fingerprint,
        **common.benchmark_facts(args, benchmark, len(items)),
        "patches": [p.id for p in stack],
        "summary": summarise(records),
        "differences": [],
        "saved": None if args.out is None else str(args.out),
    }
    if args.out is not None:
        what = results.notes(lm, benchmark, args.split, len(items), args.seed, "no edits" if not stack else "under a stack of patches", {})
        with files.staged(args.out, args.force) as folder:
            results.save(folder, f"{benchmark.name} of {lm.name or 'the model'}", document, records, records, what)
    screen.document(document)
    results.show(screen, document["summary"], [])
    screen.say(common.saved(args.out))
