"""When two answers count as the same: plain functions on texts."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """Lower case, NFKC, without punctuation and articles, single spaces.  Letters and digits of any script stay.

    A text of articles only ("The The", "A") stays as it is: it would otherwise equal every empty answer.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Apostrophes join ("cote divoire"), everything else that is no letter, mark or number separates.
    folded = re.sub(r"['’`]", "", folded)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words)


def exact_match(a: str, b: str) -> bool:
    """Whether two answers are the same after `normalise`; an empty answer matches nothing."""
    left, right = normalise(a), normalise(b)
    return bool(left) and left == right


def contains(text: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand next to each other in ``text``, after `normalise`."""
    inner = normalise(answer)
    return bool(inner) and f" {inner} " in f" {normalise(text)} "
