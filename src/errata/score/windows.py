"""Cases of a benchmark that a model's window holds: the others are left out, and counted, before anything is asked."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from errata.core.model import LM
from errata.core.window import fits, fits_answer
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe


def editable(lm: LM, cases: Iterable[Case], left_out: collections.Counter[str]) -> Iterator[Case]:
    """The cases whose edits fit; ``left_out`` counts the others."""
    for case in cases:
        if all(fits_answer(lm, prompt, target) for r in case.requests for prompt, target in _texts(r)):
            yield case
        else:
            left_out["case"] += 1


def fitting(lm: LM, cases: Iterable[Case], left_out: collections.Counter[str]) -> list[Case]:
    """`editable` cases without the probes that do not fit, which ``left_out`` counts by kind.  `InputError` where no case is left."""
    out = []
    for case in editable(lm, cases, left_out):
        kept = tuple(probe for probe in case.probes if _asked(lm, probe))
        left_out.update(f"{probe.kind} probe" for probe in case.probes if probe not in kept)
        out.append(case if len(kept) == len(case.probes) else replace(case, probes=kept))
    if not out:
        raise InputError(f"no case fits: {say(left_out, lm.context_length)}")
    return out


def say(left_out: Mapping[str, int], window: int | None) -> str:
    """In words; "" where nothing was left out."""
    if not left_out:
        return ""
    parts = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in sorted(left_out.items()))
    return f"left out {parts}: longer than this model's window of {window} tokens"


def _texts(request: EditRequest) -> Iterator[tuple[str, str]]:
    yield from ((prompt, request.continuation) for prompt in (request.prompt, *request.paraphrases))
    yield from (*request.unrelated, *request.contrast)


def _asked(lm: LM, probe: Probe) -> bool:
    """Whether a probe's prompt fits with each answer that stands behind it, and with one token where none does."""
    return fits(lm, probe.prompt, 1) if probe.target is None else fits_answer(lm, probe.prompt, probe.target)
