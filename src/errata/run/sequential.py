"""Edits one after another on a growing stack, in parts (see `errata.run.parts`): continual and batched editing are this.

A part of edits ends at each mark, after every ``group`` cases, and wherever the guard looks.  Where the guard rolls back, it ends only
at marks and looks: what lies between two looks is done again when one of its edits is taken back, and is a part when the look was good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import ConfigError, FitError
from errata.request import Case
from errata.run.guard import Health, HealthGuard
from errata.run.parts import GROUP, Clock, MergedStack, Part, Progress, Records, ResumeState, Score, asked_by, contrasted, settled
from errata.score.last_written import add_last_written


@dataclass(frozen=True)
class SequentialConfig:
    """size    cases whose requests are one edit
    marks   T at which all cases so far are scored on the stack as it then is; the last is the end
    group   cases edited in one part, at most; ``chunk``: cases of a mark scored in one part
    right_after  score each case right after its own edit too
    """

    size: int = 1
    marks: tuple[int, ...] = ()
    group: int = GROUP
    chunk: int = GROUP
    right_after: bool = True

    def check(self, cases: int) -> None:
        """`ConfigError` unless the marks can be reached."""
        marks = list(self.marks)
        if self.size < 1:
            raise ConfigError(f"a batch holds at least one edit, not {self.size}")
        if not marks or sorted(set(marks)) != marks or marks[0] < 1 or marks[-1] > cases:
            raise ConfigError(f"marks must rise from at least 1 to at most the number of cases ({cases}); got {marks}")
        if odd := [m for m in marks[:-1] if m % self.size]:
            raise ConfigError(f"mark {odd[0]} lies inside a batch; with edits of {self.size} requests marks are multiples of {self.size}")


@dataclass(frozen=True)
class _Edit:
    """Cases ``first`` to ``last`` (left out), the patch they gave (None: none could be made) and the stack with it."""

    first: int
    last: int
    patch: Patch | None
    stack: Stack
    failed: str = ""


@dataclass
class SequentialRun:
    """One editor on one model and one order of cases."""

    lm: LM
    editor: Any
    cases: Sequence[Case]
    score: Score
    how: SequentialConfig
    guard: HealthGuard | None = None
    progress: Progress | None = None
    merged: MergedStack = field(default_factory=MergedStack)

    def __post_init__(self) -> None:
        self.how.check(len(self.cases))
        end, size = self.how.marks[-1], self.how.size

        def every(count: int) -> set[int]:
            step = max(1, count // size) * size
            return set(range(step, end, step))

        self.looks = {*every(self.guard.limits.every), *self.how.marks} if self.guard else set()
        self.asked = asked_by(self.cases)
        self.rolls_back = self.guard is not None and self.guard.limits.action == "rollback"
        self.ends = sorted({*self.how.marks, *self.looks, *(set() if self.rolls_back else every(self.how.group))})

    def parts(self, at: ResumeState | None = None) -> Iterator[Part]:
        """What is left to do from ``at`` on."""
        at = at or ResumeState()
        edits, stack, stopped, undone = at.edits, at.stack, at.stopped, dict(at.undone)
        while True:
            if edits in self.how.marks or stopped:
                yield from self._mark(edits, stack, undone, at.done)
            if stopped or edits >= self.how.marks[-1]:
                return
            part = self._edits(edits, next(end for end in self.ends if end > edits), stack)
            edits, stack, stopped = part.edits, part.stack, part.stopped
            undone |= part.undone
            yield part

    def _edits(self, first: int, last: int, before: Stack) -> Part:
        """Cases ``first`` to ``last`` edited, looked at where it is time, and scored right after their edits."""
        clock = Clock()
        made = clock.run("editing", lambda: self._make(first, last, before))
        undone: list[_Edit] = [m for m in made if m.patch is None]
        health = None
        if last in self.looks:
            made, taken_back, health = self._looked_at(made, before, clock)
            undone += taken_back
        why = {i: m.failed for m in undone for i in range(m.first, m.last)}
        kept = [m for m in made if m.patch is not None]
        records: Records = []
        if self.how.right_after:
            order = sorted((*kept, *undone), key=lambda m: m.first)
            asked = [(self.cases[i], self.merged(m.stack)) for m in order for i in range(m.first, m.last)]
            found = clock.run("scoring", lambda: self.score([c for c, _ in asked], [s for _, s in asked]))
            records = _marked(found, {self.cases[i].id: said for i, said in why.items()})
        return Part(
            f"edits {first + 1}-{last}",
            records,
            last,
            made=tuple((m.last, m.patch) for m in kept if m.patch is not None),
            stack=kept[-1].stack if kept else before,
            undone=why,
            health=health,
            stopped=health is not None and not health.healthy and self.guard is not None and self.guard.limits.action == "stop",
            seconds=clock.spent,
        )

    def _make(self, first: int, last: int, stack: Stack) -> list[_Edit]:
        made = []
        for start in range(first, last, self.how.size):
            end = min(start + self.how.size, last)
            try:
                shown = contrasted(self.lm, self.editor, self.cases[start:end], stack, self.asked)
                patch = settled(self.editor.edit(self.lm, shown, on=stack))
            except FitError as error:
                if not self.rolls_back:
                    raise
                made.append(_Edit(start, end, None, stack, str(error)))
            else:
                stack = active_patches((*stack, patch))
                made.append(_Edit(start, end, patch, stack))
            if self.progress:
                self.progress("editing", end, self.how.marks[-1])
        return made

    def _looked_at(self, made: list[_Edit], before: Stack, clock: Clock) -> tuple[list[_Edit], list[_Edit], Health]:
        """(edits that stay, edits taken back, health with the former).  What follows an edit taken back is made again without it."""
        assert self.guard is not None
        guard, good = self.guard, 0
        gone: list[_Edit] = []
        while True:
            made = [m for m in made if m.patch is not None]
            stacks = [self.merged(m.stack) for m in made]
            health: Health = clock.run("checking", lambda: guard(stacks[-1] if stacks else self.merged(before)))  # noqa: B023
            if health.healthy or not self.rolls_back or not stacks:
                return made, gone, health
            at = good + clock.run("checking", lambda: guard.first_broken(stacks[good:]))  # noqa: B023
            why = clock.run("checking", lambda: guard(stacks[at]))  # noqa: B023
            culprit, rest = made[at], made[at + 1 :]
            gone.append(_Edit(culprit.first, culprit.last, culprit.patch, culprit.stack, f"taken back: {why}"))
            made, good = made[:at], at
            stack = made[-1].stack if made else before
            for later in rest:
                made += clock.run("editing", lambda: self._make(later.first, later.last, stack))  # noqa: B023
                stack = made[-1].stack
            gone += [m for m in made if m.patch is None]

    def _mark(self, edits: int, stack: Stack, undone: dict[int, str], done: Any) -> Iterator[Part]:
        """All cases so far on the stack as it is now."""
        quicker = self.merged(stack)
        why = {self.cases[i].id: said for i, said in undone.items()}
        for start in range(0, edits, self.how.chunk):
            chunk, clock = self.cases[start : min(edits, start + self.how.chunk)], Clock()
            name = f"at {edits} cases {start + 1}-{start + len(chunk)}"
            if name not in done:
                records = clock.run("scoring", lambda: self.score(chunk, [quicker] * len(chunk)))  # noqa: B023
                records = add_last_written(records, self.cases[:edits])
                yield Part(name, _marked(records, why), edits, edits, stack=stack, merged=quicker, seconds=clock.spent)


def _marked(records: Records, why: dict[str, str]) -> Records:
    """Records of cases that were taken back say so."""
    return [{**r, "undone": why[r["case"]]} if r["case"] in why else r for r in records]
