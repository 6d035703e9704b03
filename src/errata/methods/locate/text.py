"""The texts a locate-then-edit method reads and trains on: the prompt behind prefixes, with the place of its subject.

ROME, §3.1: the key is averaged over, and the value optimised on, the prompt behind randomly made prefixes, so that neither holds
only at the start of a text.  Reference code samples them from the model itself behind fixed starters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.core.chat import behind
from errata.core.model import LM
from errata.core.tokens import Encoded, offsets
from errata.errors import InputError
from errata.request import EditRequest

STARTERS = ("The", "Therefore", "Because", "I", "You")  # of EasyEdit's prefixes
_TOP_K = 5
_KL_PROMPT = "{} is a"  # whose next word after the subject should stay (ROME, appendix)


@dataclass(frozen=True, slots=True)
class LocatedText:
    """A tokenised text and the token at which it is read and changed."""

    row: Encoded
    at: int


def prefixes(lm: LM, lengths: Sequence[tuple[int, int]], seed: int) -> list[str]:
    """ "" and then, for each (tokens, count), ``count`` texts of that many sampled tokens behind the starters in turn, each ending in ". ".

    Sampled from the unedited model, top-5, by ``seed`` alone: the same model has the same prefixes in every process.
    """
    key = ("prefixes", tuple(map(tuple, lengths)), seed)
    if key not in lm.base_cache:
        lm.base_cache[key] = ["", *(text for tokens, count in lengths for text in _sampled(lm, tokens, count, seed))]
    out: list[str] = lm.base_cache[key]
    return out


def _sampled(lm: LM, tokens: int, count: int, seed: int) -> list[str]:
    starts = [STARTERS[i % len(STARTERS)] for i in range(count)]
    texts = lm.generate(starts, stacks=[()], max_new_tokens=tokens, stop=(), top_k=_TOP_K, seed=seed)
    return [f"{start} {text}. " for start, text in zip(starts, texts, strict=True)]


def subject_end(request: EditRequest, method: str) -> int:
    """The character of the prompt where its subject ends, at the occurrence that is meant."""
    if request.subject is None:
        raise InputError(
            f"{method} edits at the subject's last token; give the subject of {request.prompt!r} (--subject, or the key in JSONL), "
            "or set fact_token=last to edit at the prompt's last token"
        )
    return request.place()[1]


def place(lm: LM, request: EditRequest, before: Sequence[str], end: str, method: str, fact_token: str) -> list[LocatedText]:
    """The prompt with its target behind each of the prefixes, tokenised in one piece."""
    stop = len(request.prompt) if fact_token == "last" else subject_end(request, method)
    texts = [behind(lm.tokenizer, prefix, request.prompt) for prefix in before]
    return placed(lm, texts, [len(prefix) + stop for prefix in before], request.continuation + end)


def placed(lm: LM, texts: Sequence[str], stops: Sequence[int], target: str | None = None) -> list[LocatedText]:
    """Each text (with the target, tokenised in one piece) and the last token of it that holds a character before ``stop``.

    Read off the offsets of the text alone; a row that goes on behind it has the same tokens up to the end of the prompt, or one
    that runs over it, which then is the prompt's last.
    """
    if not texts:
        return []
    if not lm.tokenizer.is_fast:
        raise InputError("the place of a subject needs a fast tokenizer (with offsets)")
    rows = lm.encode(texts, None if target is None else [target] * len(texts))
    places = offsets(lm.tokenizer, texts)
    ends = [max(i for i, (a, b) in enumerate(own) if a < stop and b > a) for own, stop in zip(places, stops, strict=True)]
    return [LocatedText(row, min(end, row.prompt_length - 1)) for row, end in zip(rows, ends, strict=True)]


def place_kl(lm: LM, request: EditRequest) -> LocatedText | None:
    """``_KL_PROMPT`` about the subject as far as its last token; None without a subject."""
    if request.subject is None:
        return None
    return placed(lm, [_KL_PROMPT.format(request.subject)], [len(request.subject)])[0]
