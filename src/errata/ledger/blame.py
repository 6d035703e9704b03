"""Which live edits change an answer: everything live, the base, each edit switched off, and each alone, in one batch.

An edit is *needed* when the answer is another without it, and *suffices* when the base with it alone gives the live answer.  Both are
said, because one alone misleads: of two edits that write the same fact none is needed, and of two that only work together none suffices.
Edits in one chain share a patch; all but the last can only be switched off together, and are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.core import decode
from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.ledger.stacks import Entries, unmerged, without
from errata.ledger.state import LedgerState

_TIE = 1e-3  # nats: effects that differ by less are called equal


@dataclass(frozen=True)
class AblatedGroup:
    """Edits that are switched off together.

    off    the answer without them; alone: the base's answer with only them (None where they cannot run alone)
    shift  log p(live answer) with everything on, minus without them, in nats: above 0 they make it likelier
    """

    edits: tuple[int, ...]
    off: str
    alone: str | None
    shift: float
    needed: bool
    suffices: bool


@dataclass(frozen=True)
class Blame:
    """parts: largest shift first.  verdict: the answer in words."""

    prompt: str
    base: str
    live: str
    parts: tuple[AblatedGroup, ...]
    verdict: str


@dataclass(frozen=True)
class _Ablation:
    edits: tuple[int, ...]
    off: Stack
    alone: Stack | None


def blame(ledger: LedgerState, prompt: str, tokens: int) -> Blame:
    lm, now = ledger.lm, ledger.stack()
    switches = _switches(ledger, unmerged(ledger.entries()))
    asked: list[Stack] = [now, (), *(s.off for s in switches), *(s.alone for s in switches if s.alone is not None)]
    texts = [t.strip() for t in decode.greedy_answers(lm, [(prompt, s) for s in asked], tokens)]
    given, base, off, alone = texts[0], texts[1], texts[2 : 2 + len(switches)], iter(texts[2 + len(switches) :])
    likely = _likelihoods(lm, prompt, given, [now, *(s.off for s in switches)])
    parts = []
    for switch, text, value in zip(switches, off, likely[1:], strict=True):
        only = None if switch.alone is None else next(alone)
        parts.append(AblatedGroup(switch.edits, text, only, likely[0] - value, text != given, only == given and given != base))
    parts.sort(key=lambda p: (-abs(p.shift), p.edits))
    return Blame(prompt, base, given, tuple(parts), _verdict(base, given, parts))


def _switches(ledger: LedgerState, entries: Entries) -> list[_Ablation]:
    """What can be switched off: each running patch with all edits in it, and of a chain also its last edit."""
    out, running = [], active_patches(entries)
    for own in running:
        inside = {*own.replaces, own.id}
        edits = tuple(e.edit for e in entries if e.id in inside and e.edit is not None)
        out.append(_Ablation(edits, ledger.load(ledger.running(tuple(e for e in entries if e.id not in inside))), ledger.load((own,))))
        if len(edits) > 1 and own.edit is not None:
            rest = active_patches(without(entries, own.edit))
            if all(e.stored for e in rest):
                out.append(_Ablation((own.edit,), ledger.load(rest), None))
    return out


def _likelihoods(lm: LM, prompt: str, answer: str, stacks: Sequence[Stack]) -> list[float]:
    """log p(answer | prompt) under each stack, summed over its tokens; of the end of the text where the answer is empty: 0."""
    if not answer:
        return [0.0] * len(stacks)
    (row,), out = lm.encode([prompt], [answer]), []
    target = torch.tensor(row.target, device=lm.device)
    for start in range(0, len(stacks), decode.AT_ONCE):
        part = list(stacks[start : start + decode.AT_ONCE])
        logits = lm.logits(lm.batch([row] * len(part)), stacks=part, rows=range(len(part)))
        said = torch.log_softmax(logits[:, row.prompt_length - 1 : -1].double(), -1)
        out += said.gather(-1, target.expand(len(part), -1)[..., None]).sum((1, 2)).tolist()
    return out


def _named(parts: Sequence[AblatedGroup]) -> str:
    names = ["+".join(map(str, p.edits)) for p in parts]
    return ("edit " if len(names) == 1 and len(parts[0].edits) == 1 else "edits ") + ", ".join(names)


def _verdict(base: str, given: str, parts: Sequence[AblatedGroup]) -> str:
    needed, enough = [p for p in parts if p.needed], [p for p in parts if p.suffices]
    singles = [p for p in needed if not any(set(q.edits) < set(p.edits) for q in needed)]  # a chain is not named beside its last edit
    if not parts:
        return "No edit is live."
    if given == base:
        if needed:
            return f"The answer is the base's; without {_named(singles)} it would be another, so edits cancel here."
        return "No edit changes this answer: it is the base's, and stays so whichever edit is off."
    if len(singles) == 1:
        return _one(singles[0])
    if singles:
        tie = abs(abs(singles[0].shift) - abs(singles[1].shift)) < _TIE
        return f"A joint effect: {_named(singles)} are each needed{', with equal effect (a tie)' if tie else ''}."
    if len(enough) > 1:
        return f"A tie: {_named(enough)} each give this answer alone, so with one off another still does."
    if enough:
        return f"{_named(enough).capitalize()} gives this answer alone, but is not needed: without it the others give it together."
    return "A joint effect: no single edit is needed and none is enough; several together change this answer."


def _one(part: AblatedGroup) -> str:
    """The verdict on the only part that is needed."""
    name = _named([part]).capitalize()
    shared = f" These {len(part.edits)} share a patch (a chain, or a merge) and cannot be told apart." if len(part.edits) > 1 else ""
    if part.alone is None:
        return f"{name} is needed: off, the answer is {part.off!r}. It cannot run alone, so whether it is enough is not shown."
    if part.suffices:
        return f"{name} changes this answer: off, it is {part.off!r}; alone on the base, it gives this answer.{shared}"
    return f"{name} is needed but not enough: alone on the base it gives {part.alone!r}; others take part.{shared}"
