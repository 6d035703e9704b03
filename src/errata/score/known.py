"""Only facts that the base knows: cases are drawn until so many are found whose edited prompts it answers with the old answer.

An edit of a fact that the model never knew changes nothing that it believed, and what should stay (neighbours with the same object)
is mostly not there to be lost.  A case is known if the base's free answer to each of its edited prompts begins with the old answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from errata.core.model import LM
from errata.errors import InputError
from errata.request import Case
from errata.score.evaluator import AnswerCache, Progress, ask_edited_prompts, knows

AT_ONCE: Final = 64  # cases asked together
MOST: Final = 20  # times as many cases are looked at as are wanted


@dataclass(frozen=True)
class KnownCases:
    """The cases found; ``looked``: at so many, in the order of the benchmark; ``unnamed`` of them name no old answer."""

    cases: list[Case]
    looked: int
    unnamed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"only": True, "cases": len(self.cases), "looked_at": self.looked, "without_old_answer": self.unnamed}


def say(known: dict[str, Any] | None) -> str:
    """A document's ``known`` (`KnownCases.to_dict`, or `all_cases`) in words; "" where there is nothing to say."""
    if not known or (not known["only"] and known["known"] is None):
        return ""
    if not known["only"]:
        return f"known: all {known['cases']} cases, of which the base knows the fact in {known['known']}"
    unnamed = f"; {known['without_old_answer']} of them name no old answer" if known["without_old_answer"] else ""
    return (
        f"known: {known['cases']} of {known['looked_at']} cases looked at, those whose edited prompt the base answers with the old answer"
        f"{unnamed}"
    )


def all_cases(lm: LM, cases: Iterable[Case], answers: AnswerCache) -> dict[str, Any]:
    """What a document says of cases that were not chosen; ``known``: facts that the base knows, None where no old answer is named."""
    every = list(cases)
    named = [case for case in every if all(request.old is not None for request in case.requests)]
    return {"only": False, "cases": len(every), "known": sum(knows(lm, case, answers) for case in named) if named else None}


def known_cases(
    lm: LM,
    cases: Iterable[Case],
    wanted: int | None,
    answers: AnswerCache,
    progress: Progress | None = None,
    shown: Callable[[Case], Case] = lambda case: case,
) -> KnownCases:
    """The first ``wanted`` cases (None: all) whose facts the base knows; what it was asked is in ``answers``.

    ``shown``: a case as it is asked, in a chat template for one.  At most `MOST` times as many are looked at; `InputError` where none is
    found.
    """
    left = iter(cases) if wanted is None else itertools.islice(cases, MOST * wanted)
    found: list[Case] = []
    looked = unnamed = 0
    while (wanted is None or len(found) < wanted) and (part := list(itertools.islice(left, AT_ONCE))):
        there = {case.id: shown(case) for case in part if all(request.old is not None for request in case.requests)}
        ask_edited_prompts(lm, list(there.values()), answers)
        for case in part:
            looked += 1
            unnamed += case.id not in there
            found += [case] if case.id in there and knows(lm, there[case.id], answers) else []
            if len(found) == wanted:
                break
        if progress:
            progress(len(found), wanted or looked)
    if not found:
        why = "none of them names an old answer" if unnamed == looked else "the model answers none with its old answer"
        raise InputError(
            f"--known (score.known): of {looked} cases looked at {why}; --no-known (score.known: false) edits facts that it does not know"
        )
    return KnownCases(found, looked, unnamed)
