"""What an edit is trained on beside its prompt: the prompt behind a few short texts, and neighbours behind the same texts.

A fact is rarely asked at the very beginning of a text.  An edit that saw its prompt only there is not found behind another sentence, and a
gate that saw neighbours only there may open on anything that follows a sentence; so both are shown both.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.core.chat import behind
from errata.core.model import LM
from errata.core.tokens import subject_spans
from errata.core.window import fits_answer
from errata.request import EditRequest

_BEFORE = (
    "It is often said that",
    "In 2019, a local newspaper wrote about it.",
    "He looked up and smiled.",
    "Here is what I know:",
    "The meeting ended late, and most people had left.",
    "See chapter 3 for details.",
    "She closed the book and thought for a while.",
    "For many years nobody asked, but today it is well known:",
)
MOST = len(_BEFORE)


def ways_to_ask(lm: LM, request: EditRequest, prefixes: int) -> list[str]:
    """The prompt, its paraphrases, and the prompt behind so many short texts."""
    texts = [_behind(lm, before, request.prompt, request.continuation) for before in _BEFORE[:prefixes]]
    return [request.prompt, *request.paraphrases, *texts]


def what_stays(lm: LM, requests: Sequence[EditRequest], prefixes: int, named: bool = True) -> list[tuple[str, str]]:
    """The requests' ``unrelated`` and ``contrast`` pairs, the latter also behind one of so many short texts each.  ``named`` False: without
    those whose prompt names the subject."""
    out = []
    for request in requests:
        unrelated, contrast = (
            [pair for pair in pairs if named or not names(request, pair[0])] for pairs in (request.unrelated, request.contrast)
        )
        out += [*unrelated, *neighbours(lm, contrast, prefixes)]
    return out


def neighbours(lm: LM, contrast: Sequence[tuple[str, str]], prefixes: int) -> list[tuple[str, str]]:
    """Contrast pairs, and the same behind one of so many short texts each."""
    asked = [(_behind(lm, _BEFORE[i % prefixes], prompt, answer), answer) for i, (prompt, answer) in enumerate(contrast) if prefixes]
    return [*contrast, *asked]


def _behind(lm: LM, before: str, prompt: str, answer: str) -> str:
    """A short text, and the prompt; the prompt alone where the model's window does not hold both."""
    text = behind(lm.tokenizer, f"{before} ", prompt)
    return text if fits_answer(lm, text, answer) else prompt


def names(request: EditRequest, text: str) -> bool:
    """Whether a text names the subject, be it as a part of a longer name ("Nintendo DS" in "Nintendo DSi"): its last token is then in the
    same state as the edit's, so that no gate tells the two apart."""
    return request.subject is not None and request.subject in text


def subject_ends(lm: LM, request: EditRequest, text: str) -> list[int]:
    """The last token of the subject at each place where a text names it (see `names`); none where it does not.

    A state before is the same whoever is asked about, so no gate can be open there on the edit and shut on a neighbour.
    """
    if request.subject is None or not names(request, text):
        return []
    return sorted({end - 1 for _, end in subject_spans(lm.tokenizer, text, request.subject, parts=True)})
