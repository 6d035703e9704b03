"""The three scenarios, as functions from (model, editor, cases) to patches and records.

single     each request alone on the base, scored under its own patch (all in one batch: `edit_each`, rows)
batched    joint edits of n requests, one after another on the growing stack; scored on the final stack
continual  one request at a time on the growing stack; at each mark T everything edited so far is scored on the stack as it then
           is, and each case once more right after its own edit: two different numbers, whose difference is forgetting
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from errata.bank import Stack, live
from errata.errors import ConfigError
from errata.model import LM
from errata.patch import WEIGHT_LIKE, Patch
from errata.request import Case
from errata.score.queries import Answers, score
from errata.weights import merge

Progress = Callable[[str, int, int], None]
Records = list[dict[str, Any]]
GROUP = 256  # single edits trained at once


def _scoring(progress: Progress | None) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress("scoring", done, total)) if progress else None


def _editing(progress: Progress | None, before: int, group: int, total: int) -> Callable[[int, int, float], None] | None:
    """Edits that have come to their end, as a count."""
    return (lambda step, running, loss: progress("editing", before + group - running, total)) if progress else None


def _grown(scored: Stack, patch: Patch) -> Stack:
    """A stack with one more patch; changes of weights are added up, so that hundreds of growing stacks can be scored in one batch."""
    both = live((*scored, patch))
    return (merge(both),) if len(both) > 1 and all(op.kind in WEIGHT_LIKE for p in both for op in p.ops) else both


def single(
    lm: LM, editor: Any, cases: Sequence[Case], progress: Progress | None = None, answers: Answers | None = None, label: str | None = None
) -> tuple[list[Patch], Records]:
    """A patch a case, and the records of each case under its own patch.  ``label`` names the method in the records."""
    patches: list[Patch] = []
    for start in range(0, len(cases), GROUP):
        group = cases[start : start + GROUP]
        patches += _each(lm, editor, group, _editing(progress, start, len(group), len(cases)))
        if progress:
            progress("editing", len(patches), len(cases))
    return patches, score(lm, cases, [(p,) for p in patches], label or editor.name, _scoring(progress), answers)


def _each(lm: LM, editor: Any, cases: Sequence[Case], told: Callable[[int, int, float], None] | None) -> list[Patch]:
    """A patch a case.  Cases of one request are edited together, as independent edits; one of several is a joint edit by itself."""
    alone = [i for i, c in enumerate(cases) if not c.more]
    found = dict(zip(alone, editor.edit_each(lm, [cases[i].request for i in alone], progress=told), strict=True)) if alone else {}
    return [found[i] if i in found else editor.edit(lm, list(c.requests)) for i, c in enumerate(cases)]


def batched(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    size: int,
    progress: Progress | None = None,
    answers: Answers | None = None,
    label: str | None = None,
) -> tuple[Stack, Records]:
    """Joint edits of ``size`` cases' requests on the growing stack; records of every case on the final stack."""
    if size < 1:
        raise ConfigError(f"a batch holds at least one edit, not {size}")
    stack: Stack = ()
    for start in range(0, len(cases), size):
        chunk = [r for c in cases[start : start + size] for r in c.requests]
        stack = live((*stack, editor.edit(lm, chunk, on=stack)))
        if progress:
            progress("editing", min(start + size, len(cases)), len(cases))
    return stack, score(lm, cases, [stack] * len(cases), label or editor.name, _scoring(progress), answers)


def continual(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    marks: Sequence[int],
    progress: Progress | None = None,
    answers: Answers | None = None,
    label: str | None = None,
    stacks: dict[int, Stack] | None = None,
) -> tuple[Stack, dict[int, Records], Records]:
    """(final stack, {T: records of cases 1..T on the stack after T edits}, records of each case right after its own edit).

    ``stacks``: filled with what was scored at each mark.
    """
    if not marks or sorted(set(marks)) != list(marks) or marks[0] < 1 or marks[-1] > len(cases):
        raise ConfigError(f"marks must rise from at least 1 to at most the number of cases ({len(cases)}); got {list(marks)}")
    answers = answers if answers is not None else Answers()
    stack: Stack = ()
    scored: Stack = ()  # gives the same answers
    at: dict[int, Records] = {}
    pending: list[tuple[Case, Stack]] = []
    immediate: Records = []
    name = label or editor.name
    for i, case in enumerate(cases[: marks[-1]], 1):
        patch = editor.edit(lm, list(case.requests), on=stack)
        stack, scored = live((*stack, patch)), _grown(scored, patch)
        pending.append((case, scored))
        if i in marks or len(pending) == GROUP:  # rows let many stacks be scored at once, so the scores can wait
            immediate += score(lm, [c for c, _ in pending], [s for _, s in pending], name, None, answers)
            pending = []
        if i in marks:
            if stacks is not None:
                stacks[i] = scored
            at[i] = score(lm, cases[:i], [scored] * i, name, _scoring(progress), answers)
        if progress:
            progress("editing", i, marks[-1])
    return stack, at, immediate
