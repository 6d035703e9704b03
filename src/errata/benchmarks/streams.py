"""A stream of edits that contradicts itself: one fact asked in other words, with other new answers.

ZsRE does (`zsre_mend_edit.json`: 218 of its first 1,000 edits are overwritten by a later record of the same fact), KnowEdit's ZsRE does,
CounterFact hardly.  An editor that generalises perfectly loses the earlier answer of such a fact; one that does not generalise keeps both.
So there is the stream as published, and one with a record a fact (``consistent``); what was last written is scored beside each record's own
answer (`errata.score.last_written`).
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.request import Case, EditRequest


def fact_of(request: EditRequest) -> tuple[str, ...]:
    """What a request is about: its subject and the old answer, in whichever words; without either, its prompt.

    Two relations of a subject with one old answer (born in Paris, works in Paris) count as one fact: records do not name the relation.
    """
    if request.subject is None or request.old is None:
        return (request.prompt,)
    return request.subject.casefold(), request.old.casefold()


def last_targets(cases: Sequence[Case]) -> dict[tuple[str, ...], str]:
    """fact -> the target that was written last."""
    return {fact_of(request): request.target for case in cases for request in case.requests}


def overwritten(cases: Sequence[Case]) -> list[Case]:
    """The cases with a fact that a later one writes otherwise."""
    last = last_targets(cases)
    return [case for case in cases if any(last[fact_of(r)] != r.target for r in case.requests)]


def one_a_fact(cases: Sequence[Case]) -> list[Case]:
    """The first case of each fact, in their order."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for case in cases:
        facts = {fact_of(request) for request in case.requests}
        if not facts & seen:
            kept.append(case)
            seen |= facts
    return kept
