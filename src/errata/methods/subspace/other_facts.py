"""The other facts of a subject: prompts about it that the edit does not ask, and that should be answered as before.

Every later word reads an edit at the subject's last token.  Without a term that says what else the subject is asked, "Eminem was born in
Reposaari" makes "Reposaari" of his mother, too (the "essence drift" of ROME, Meng et al. 2022, §3.1, which holds one prompt, "{} is a").
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.core.bank import Stack
from errata.core.model import LM
from errata.request import EditRequest

_ASKED = (
    "{} is a",
    "{} was born in",
    "The mother of {} is",
    "{} works as a",
    "The language spoken in {} is",
    "{} is located in",
    "The author of {} is",
    "{} was founded by",
    "The head of {} is",
    "{} is married to",
    "{} died in",
    "The currency used in {} is",
    "The director of {} is",
    "{} belongs to the genre of",
    "{} studied at",
    "The most famous part of {} is",
)
MOST = len(_ASKED)


def other_facts(lm: LM, requests: Sequence[EditRequest], count: int, on: Stack) -> list[list[str]]:
    """Up to ``count`` prompts about each request's subject.  One whose next token is that of the request's own prompt is left out, for it
    may ask the same fact in other words; so is one that shares a long word with the prompt or a paraphrase."""
    if not count:
        return [[] for _ in requests]
    asked = [[form.format(r.subject) for form in _ASKED[:count]] if r.subject else [] for r in requests]
    prompts = [p for r, own in zip(requests, asked, strict=True) for p in (r.prompt, *own)]
    said = iter(lm.generate_ids(prompts, stacks=[on], rows=[0] * len(prompts), max_new_tokens=1, stop=[]))
    out = []
    for request, own in zip(requests, asked, strict=True):
        first = next(said)
        words = _words(request, " ".join((request.prompt, *request.paraphrases)))
        answers = [next(said) for _ in own]
        out.append([p for p, answer in zip(own, answers, strict=True) if answer != first and not words & _words(request, p)])
    return out


def _words(request: EditRequest, text: str) -> set[str]:
    return {word for word in text.replace(request.subject or "", " ").lower().split() if len(word) > 4}
