"""From cases to records with as few forward passes as possible.

Every probe becomes a *query* (stack, prompt, target).  Queries that ask the same of the same stack are asked once; the
unedited model's answers are found once for all methods.  Queries are sorted by length and run in batches whose rows may
run under different stacks: scoring N single edits takes as many passes as scoring one edit with N times the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from errata.bank import Stack
from errata.model import LM
from errata.request import Case, Probe
from errata.score.metrics import exact_match
from errata.tokens import Encoded

Progress = Callable[[int, int], None]
ROWS = 192  # of a batch; more gains nothing on two cores and holds more memory
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Forced:
    """Teacher forcing of one target: what the argmax was at each of its tokens, and whether it was right."""

    argmax: tuple[int, ...]
    right: tuple[bool, ...]

    @property
    def share(self) -> float:
        """The papers' accuracy: the fraction of target tokens that are the argmax."""
        return sum(self.right) / len(self.right)


@dataclass
class Answers:
    """What stacks said, kept by (stack key, prompt[, target]) so that nothing is asked twice."""

    forced: dict[tuple[str, str, str], Forced] = field(default_factory=dict)
    text: dict[tuple[str, str], str] = field(default_factory=dict)


def key(stack: Stack) -> str:
    return "+".join(p.id for p in stack)


def _batches(todo: Sequence[tuple[Any, Encoded]]) -> Iterable[list[int]]:
    """Indices in batches of like length, longest first (so that a batch that does not fit fails at once, not after an hour)."""
    order = sorted(range(len(todo)), key=lambda i: -len(todo[i][1].ids))
    return [order[i : i + ROWS] for i in range(0, len(order), ROWS)]


@torch.no_grad()
def force(lm: LM, asked: Sequence[tuple[Stack, str, str]], answers: Answers, progress: Progress | None = None) -> None:
    """Teacher-forced answers to (stack, prompt, target), into ``answers``."""
    new = {(key(s), p, t): s for s, p, t in asked if (key(s), p, t) not in answers.forced}
    encoded = lm.encode([p for _, p, _ in new], [t for _, _, t in new])
    todo = list(zip(new.items(), encoded, strict=True))
    done = 0
    for indices in _batches(todo):
        rows = [todo[i][1] for i in indices]
        stacks, which = _distinct([todo[i][0][1] for i in indices])
        batch = lm.batch(rows)
        # the head is the widest matrix: it runs from the first position that any row needs
        longest = max(len(r.target) for r in rows) + 1
        best = _argmax(lm, batch, stacks, which, longest).tolist()
        for i, row, line in zip(indices, rows, best, strict=True):
            n = len(row.target)
            said = tuple(line[-n - 1 : -1])
            answers.forced[todo[i][0][0]] = Forced(said, tuple(a == b for a, b in zip(said, row.target, strict=True)))
        done += len(indices)
        if progress:
            progress(done, len(todo))


def _argmax(lm: LM, batch: Any, stacks: list[Stack], which: list[int], keep: int) -> torch.Tensor:
    """[B, keep] argmax token at the last ``keep`` positions of left-padded rows."""
    batch = batch.to(lm.device)
    plan = lm.plan(stacks, which, len(batch.ids))
    plan.prompt_lengths = batch.prompt_lengths
    more = {"logits_to_keep": keep} if lm.takes("logits_to_keep") else {}
    with lm.running(plan):
        return lm.forward(batch.ids, batch.mask, use_cache=False, **more).logits[:, -keep:].argmax(-1)


def generate(lm: LM, asked: Sequence[tuple[Stack, str]], answers: Answers, progress: Progress | None = None) -> None:
    """Greedy free answers to (stack, prompt), into ``answers``."""
    new = {(key(s), p): s for s, p in asked if (key(s), p) not in answers.text}
    todo = list(zip(new.items(), lm.encode([p for _, p in new]), strict=True))
    done = 0
    for indices in _batches(todo):
        stacks, which = _distinct([todo[i][0][1] for i in indices])
        texts = lm.generate([todo[i][0][0][1] for i in indices], stacks=stacks, rows=which, max_new_tokens=MAX_NEW_TOKENS)
        for i, text in zip(indices, texts, strict=True):
            answers.text[todo[i][0][0]] = text
        done += len(indices)
        if progress:
            progress(done, len(todo))


def _distinct(stacks: Sequence[Stack]) -> tuple[list[Stack], list[int]]:
    """(each stack once, the index of every row's)."""
    seen: dict[str, int] = {}
    out: list[Stack] = []
    rows = []
    for stack in stacks:
        name = key(stack)
        if name not in seen:
            seen[name] = len(out)
            out.append(stack)
        rows.append(seen[name])
    return out, rows


def score(
    lm: LM, cases: Sequence[Case], stacks: Sequence[Stack], method: str, progress: Progress | None = None, answers: Answers | None = None
) -> list[dict[str, Any]]:
    """A record (see `errata.score.metrics`) for each probe of each case, case i under ``stacks[i]``.

    ``answers``: keep one between calls and the base is asked once for all methods and marks.
    """
    answers = answers if answers is not None else Answers()
    probes = [(case, probe, stack) for case, stack in zip(cases, stacks, strict=True) for probe in case.probes]
    generate(lm, [((), p.prompt) for _, p, _ in probes], answers, progress)
    targets = [_target(p, answers) for _, p, _ in probes]
    asked = [(s, p.prompt, t) for (_, p, stack), t in zip(probes, targets, strict=True) for s in ((), stack)]
    force(lm, asked, answers, progress)
    generate(lm, [(s, p.prompt) for _, p, s in probes], answers, progress)
    known = _known(lm, cases, answers)
    return [_record(method, c, p, s, t, answers, known) for (c, p, s), t in zip(probes, targets, strict=True)]


def _target(probe: Probe, answers: Answers) -> str:
    """The probe's answer; where it has none, what the unedited model said."""
    return probe.target or answers.text["", probe.prompt].strip() or "?"


def _known(lm: LM, cases: Sequence[Case], answers: Answers) -> dict[str, bool]:
    """Whether the base gave each case's old answer on its own prompt (True where no old answer is named)."""
    return {c.request.id: c.request.old is None or exact_match(answers.text.get(("", c.request.prompt), ""), c.request.old) for c in cases}


def _record(method: str, case: Case, probe: Probe, stack: Stack, target: str, answers: Answers, known: dict[str, bool]) -> dict[str, Any]:
    before, after = answers.forced["", probe.prompt, target], answers.forced[key(stack), probe.prompt, target]
    text_before, text_after = answers.text["", probe.prompt], answers.text[key(stack), probe.prompt]
    matched = exact_match(text_before, target)
    local = probe.kind in ("neighbour", "unrelated")
    return {
        "method": method,
        "case": case.request.id,
        "kind": probe.kind,
        "prompt": probe.prompt,
        "target": probe.target,
        "tf_before": before.share,
        "tf_after": after.share,
        "tf_agree": sum(a == b for a, b in zip(before.argmax, after.argmax, strict=True)) / len(after.argmax),
        "gen_before": text_before,
        "gen_after": text_after,
        "gen_match_before": matched,
        "gen_match_after": exact_match(text_after, target),
        "gen_agree": text_before == text_after,
        # a neighbour's own answer; for the rest, the fact that was edited
        "known": matched if local else known[case.request.id],
    }
