"""What is odd about new facts, found before they are edited: written already, contradicted by a live edit, known to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import LedgerError
from errata.ledger.database import Edit
from errata.request import EditRequest, fill
from errata.score import wanted
from errata.score.match import exact_match, normalise


@dataclass(frozen=True)
class Finding:
    """``kind``: duplicate, contradiction or known.  ``edit``: the live edit it is about; None: another new request, or the model."""

    kind: str
    request: EditRequest
    edit: int | None
    text: str


class FindingsError(LedgerError):
    """Requests that were not applied, and what is odd about them."""

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


def surfaces(request: EditRequest) -> set[str]:
    """Every prompt that the fact is asked by, as `normalise` leaves it."""
    names = (fill(request, name) for name in request.aliases)
    return {normalise(text) for text in (request.prompt, *request.paraphrases, *names)}


def find_conflicts(requests: Sequence[EditRequest], live: Sequence[Edit]) -> Iterator[Finding]:
    """Requests that share a prompt (or a paraphrase, or the prompt under an alias) with a live edit, or with each other."""
    asked: dict[str, list[tuple[EditRequest, int | None]]] = {}
    for edit in live:
        for old in edit.requests:
            for text in surfaces(old):
                asked.setdefault(text, []).append((old, edit.number))
    for request in requests:
        own = surfaces(request)
        told: set[tuple[int | None, str]] = set()
        for old, number in (pair for text in sorted(own) for pair in asked.get(text, [])):
            if (number, old.id) in told:
                continue
            told.add((number, old.id))
            where = "another new request" if number is None else f"edit {number}"
            if exact_match(old.target, request.target):
                yield Finding("duplicate", request, number, f"{where} writes {old.target!r} after {old.prompt!r} already")
            else:
                advice = "leave one out" if number is None else f"undo it first (`errata ledger undo {number}`)"
                yield Finding("contradiction", request, number, f"{where} writes {old.target!r} after {old.prompt!r}; {advice}")
        for text in own:
            asked.setdefault(text, []).append((request, None))


def known(lm: LM, requests: Sequence[EditRequest], stack: Stack) -> Iterator[Finding]:
    """Requests whose target the greedy answer begins with already, under what is live."""
    answers = wanted.ask(lm, [(r.prompt, stack, r.target) for r in requests], short=True)
    for request, answer in zip(requests, answers, strict=True):
        if answer.as_wanted:
            yield Finding("known", request, None, f"the model as it is now answers {answer.text!r} already")


def raise_on_findings(found: Sequence[Finding], way_out: str = "go on with --force") -> None:
    """`FindingsError`, a `LedgerError`, with all of them, if there is one.  ``way_out``: how to go on all the same."""
    if found:
        lines = [f"{f.request.prompt!r} -> {f.request.target!r}: {f.text}" for f in found[:10]]
        more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
        raise FindingsError(f"nothing was edited. {'; '.join(lines)}{more}. Leave these out, or {way_out}", found)
