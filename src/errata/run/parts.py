"""Editing and scoring in parts: after each, what was done can be put on disk, and a run can go on from there.

A scenario is an iterator of `Part`s; `errata.run.scenarios` adds them up in memory, `errata.run.cell` makes each durable before the next
begins.  A part depends on the cases, the editor and the patches it starts from, not on which process made the parts before it:
patches are `settled` as soon as they are made, so that one in memory and one read from disk are the same down to the layout of its tensors
(a product over another layout, or from another alignment, may round differently).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.core.patch import WEIGHT_LIKE, Op, Patch
from errata.core.weights import merge
from errata.errors import FitError
from errata.request import Case, EditRequest
from errata.run.guard import Health

Progress = Callable[[str, int, int], None]
Records = list[dict[str, Any]]
Score = Callable[[Sequence[Case], Sequence[Stack]], Records]
GROUP = 256  # single edits trained at once; stacks scored in one go; cases of a mark scored in one go


@dataclass(frozen=True)
class Part:
    """A piece of work that is done.

    name      unlike that of any other part of its scenario
    records   its scores
    edits     T, cases edited so far (those undone count)
    mark      the T whose stack all cases were scored on; None: each was scored right after its own edit
    made      (T, patch) of the edits made in it
    stack     what is on at its end, oldest first (of single edits: nothing); merged: gives the same answers, quicker (see `MergedStack`)
    undone    cases taken back in it: place in the order of cases, from 0 -> why
    health    what the guard found at its end
    stopped   the guard ended the scenario here
    """

    name: str
    records: Records
    edits: int
    mark: int | None = None
    made: tuple[tuple[int, Patch], ...] = ()
    stack: Stack = ()
    merged: Stack = ()
    undone: dict[int, str] = field(default_factory=dict)
    health: Health | None = None
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumeState:
    """Where a scenario begins: T, the stack then, cases taken back before, whether the guard ended it; parts not to be done again."""

    edits: int = 0
    stack: Stack = ()
    undone: dict[int, str] = field(default_factory=dict)
    stopped: bool = False
    done: Collection[str] = ()


def settled(patch: Patch) -> Patch:
    """The patch as it is read from disk: tensors on the CPU in memory of their own, settings as JSON gives them; no times in its notes."""
    for op in patch.ops:
        if not all(bool(torch.isfinite(t).all()) for t in op.tensors.values() if t.is_floating_point()):
            raise FitError(f"{patch.method}: the edit of {patch.requests[-1].prompt!r} gave numbers that are not finite; lower lr or steps")
    ops = tuple(Op(op.kind, op.site, {k: _own(t) for k, t in op.tensors.items()}, _plain(op.settings)) for op in patch.ops)
    return dataclasses.replace(
        patch,
        settings=_plain(patch.settings),
        ops=ops,
        state={k: _own(t) for k, t in patch.state.items()},
        notes=_plain({k: v for k, v in patch.saved_notes().items() if k != "seconds"}),
    )


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(dict(values)))


class MergedStack:
    """Stacks that give the same answers as the growing stack, quicker: changes of weights are added up from the oldest on, so that
    hundreds of growing stacks can be scored in one batch.  A function of the stack alone; the last one is kept, to go on from."""

    def __init__(self) -> None:
        self.of: tuple[str, ...] = ()
        self.stack: Stack = ()

    def __call__(self, stack: Stack) -> Stack:
        ids = tuple(p.id for p in stack)
        begun = len(self.of) if self.of == ids[: len(self.of)] else 0
        merged = self.stack if begun else ()
        for patch in stack[begun:]:
            merged = _one_more(merged, patch)
        self.of, self.stack = ids, merged
        return merged


def _one_more(merged: Stack, patch: Patch) -> Stack:
    both = active_patches((*merged, patch))
    return (merge(both),) if len(both) > 1 and all(op.kind in WEIGHT_LIKE for p in both for op in p.ops) else both


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    spent: dict[str, float] = field(default_factory=dict)

    def run(self, what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - began


def alone(
    lm: LM,
    editor: Any,
    cases: Sequence[Case],
    score: Score,
    group: int = GROUP,
    at: ResumeState | None = None,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """Each request alone on the base, scored under its own patch; a part for each ``group`` of edits, which train together."""
    at = at or ResumeState()
    for start in range(at.edits, len(cases), group):
        chunk, clock = cases[start : start + group], Clock()
        told = _editing(progress, start, len(chunk), len(cases))
        patches = [settled(p) for p in clock.run("editing", lambda: _each(lm, editor, chunk, told))]  # noqa: B023
        end = start + len(chunk)
        if progress:
            progress("editing", end, len(cases))
        records = clock.run("scoring", lambda: score(chunk, [(p,) for p in patches]))  # noqa: B023
        made = tuple(enumerate(patches, start + 1))
        yield Part(f"edits {start + 1}-{end}", records, end, end, made, seconds=clock.spent)


def _each(lm: LM, editor: Any, cases: Sequence[Case], told: Callable[[int, int, float], None] | None) -> list[Patch]:
    """A patch a case.  Cases of one request are edited together, as independent edits; one of several is a joint edit by itself."""
    alone = [i for i, c in enumerate(cases) if not c.more]
    shown = [contrasted(lm, editor, [c], (), asked_by([c])) for c in cases]
    found = dict(zip(alone, editor.edit_each(lm, [shown[i][0] for i in alone], progress=told), strict=True)) if alone else {}
    return [found[i] if i in found else editor.edit(lm, own) for i, own in enumerate(shown)]


def asked_by(cases: Sequence[Case]) -> str:
    """Every text that scores some cases, but for the watch half, whose names never train."""
    return "\n".join(probe.prompt for case in cases for probe in case.probes if probe.kind != "watch")


def contrasted(lm: LM, editor: Any, cases: Sequence[Case], on: Stack, asked: str) -> list[EditRequest]:
    """The cases' requests with contrast pairs, where the editor is one that is shown some; none is about a subject of ``asked``."""
    requests = [r for c in cases for r in c.requests]
    if not getattr(editor, "contrast", 0):
        return requests
    found: list[EditRequest] = editor.contrasted(lm, requests, on, (asked,))
    return found


def _editing(progress: Progress | None, before: int, group: int, total: int) -> Callable[[int, int, float], None] | None:
    """Edits that have come to their end, as a count."""
    return (lambda step, running, loss: progress("editing", before + group - running, total)) if progress else None
