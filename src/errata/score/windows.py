"""Cases of a benchmark that a model's window holds: the others are left out, and counted, before anything is asked."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from dataclasses import replace

from errata.core.model import LM
from errata.core.tokens import join
from errata.core.window import fits
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe

_ENDING = 2  # tokens that a method may put behind a target


def fitting(lm: LM, cases: Iterable[Case], left_out: collections.Counter[str]) -> Iterator[Case]:
    """The cases whose edits fit, without the probes that do not; ``left_out`` counts both by what they are."""
    for case in cases:
        if not all(_fits(lm, prompt, target) for r in case.requests for prompt, target in _texts(r)):
            left_out["case"] += 1
            continue
        kept = tuple(probe for probe in case.probes if _asked(lm, probe))
        left_out.update(f"{probe.kind} probe" for probe in case.probes if probe not in kept)
        yield case if len(kept) == len(case.probes) else replace(case, probes=kept)


def checked(lm: LM, cases: Iterable[Case], left_out: collections.Counter[str]) -> list[Case]:
    """All of them; `InputError` where none is left."""
    kept = list(cases)
    if not kept:
        raise InputError(f"no case fits: {say(lm, left_out)}")
    return kept


def say(lm: LM, left_out: collections.Counter[str]) -> str:
    """In words; "" where nothing was left out."""
    if not left_out:
        return ""
    parts = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in sorted(left_out.items()))
    return f"left out {parts}: longer than this model's window of {lm.context_length} tokens"


def _texts(request: EditRequest) -> Iterator[tuple[str, str]]:
    yield from ((prompt, request.continuation) for prompt in (request.prompt, *request.paraphrases))
    yield from (*request.unrelated, *request.contrast)


def _fits(lm: LM, prompt: str, target: str) -> bool:
    return fits(lm, join(prompt, target)[0], _ENDING)


def _asked(lm: LM, probe: Probe) -> bool:
    """Whether a probe's prompt fits with each answer that stands behind it, and with one token where none does."""
    return fits(lm, probe.prompt, 1) if probe.target is None else _fits(lm, probe.prompt, probe.target)
