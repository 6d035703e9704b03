"""The three scenarios, as functions from (model, editor, cases) to patches and records.

single     each request alone on the base, scored under its own patch (all in one batch: `edit_each`, rows)
batched    joint edits of n requests, one after another on the growing stack; scored on the final stack
continual  one request at a time on the growing stack; at each mark T everything edited so far is scored on the stack as it then
           is, and each case once more right after its own edit: two different numbers, whose difference is forgetting

The work is done by `errata.run.parts` and `errata.run.sequential`; here it is added up in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import ConfigError
from errata.request import Case
from errata.run.parts import Progress, Records, Score, alone
from errata.run.sequential import SequentialConfig, SequentialRun
from errata.score.evaluator import AnswerCache, score


def scorer(lm: LM, name: str, progress: Progress | None, answers: AnswerCache | None) -> Score:
    """Scores with one memory of what was answered; ``name``: of the method in the records."""
    kept = answers if answers is not None else AnswerCache()
    told = (lambda done, total: progress("scoring", done, total)) if progress else None
    return lambda cases, stacks: score(lm, cases, stacks, name, told, kept)


def single(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    progress: Progress | None = None,
    answers: AnswerCache | None = None,
    label: str | None = None,
) -> tuple[list[Patch], Records]:
    """A patch a case, and the records of each case under its own patch."""
    parts = alone(lm, editor, cases, lambda cases, stacks: [], progress=progress)
    patches = [patch for part in parts for _, patch in part.made]
    return patches, scorer(lm, label or editor.name, progress, answers)(cases, [(p,) for p in patches])


def batched(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    size: int,
    progress: Progress | None = None,
    answers: AnswerCache | None = None,
    label: str | None = None,
) -> tuple[Stack, Records]:
    """Joint edits of ``size`` requests on the growing stack; records of every case on the final stack."""
    if size < 1:
        raise ConfigError(f"a batch holds at least one edit, not {size}")
    how = SequentialConfig(size, (len(cases),), chunk=len(cases), right_after=False)
    *_, last = SequentialRun(lm, editor, cases, scorer(lm, label or editor.name, progress, answers), how, progress=progress).parts()
    return last.stack, last.records


def continual(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    marks: Sequence[int],
    progress: Progress | None = None,
    answers: AnswerCache | None = None,
    label: str | None = None,
    stacks: dict[int, Stack] | None = None,
) -> tuple[Stack, dict[int, Records], Records]:
    """(final stack, {T: records of cases 1..T on the stack after T edits}, records of each case right after its own edit).

    ``stacks``: filled with what was scored at each mark.
    """
    stack: Stack = ()
    at: dict[int, Records] = {}
    immediate: Records = []
    how = SequentialConfig(1, tuple(marks), chunk=len(cases))
    for part in SequentialRun(lm, editor, cases, scorer(lm, label or editor.name, progress, answers), how, progress=progress).parts():
        stack = part.stack
        if part.mark is None:
            immediate += part.records
            continue
        at[part.mark] = part.records
        if stacks is not None:
            stacks[part.mark] = part.merged
    return stack, at, immediate
