"""When two answers count as the same: plain functions on texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Final

from errata.writing import inside_word, is_unspaced

_ARTICLES: Final = frozenset({"a", "an", "the"})


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


def starts(text: str, answer: str) -> bool:
    """Whether a free text begins with the answer, as a reader takes it: "Lyon, a city in France" does with "Lyon", "Lyons" does not.

    Case, punctuation and articles do not matter, as in `normalise`; what equals the answer there begins with it.  The answer must end
    where a word ends: not inside a number ("1,5" does not begin with "1"); a possessive 's is a word of its own, too; in scripts without
    spaces any prefix will do.  An article at the answer's end is part of it ("Vitamin A"); an empty answer matches nothing.
    """
    return exact_match(text, answer) or any(
        match is not None and _ends(words, match.end())
        for words, pattern in _readings(text, answer)
        for match in (re.match(pattern, words),)
    )


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands somewhere in the text, beginning and ending where words do (as in `starts`, which implies it)."""
    return exact_match(text, answer) or any(
        _ends(words, match.start(1)) and _ends(words, match.end(1))
        for words, pattern in _readings(text, answer)
        for match in re.finditer(f"(?={pattern})", words)
    )


def first_word(text: str) -> str:
    """The first word of a text after `normalise`; "" where it has none.  Without spaces: all up to a mark."""
    return normalise(text).partition(" ")[0]


_SKIPPED: Final = f"(?:(?:{'|'.join(sorted(_ARTICLES))}) )*"


def _readings(text: str, answer: str) -> Iterator[tuple[str, str]]:
    """(words of the text, a pattern of the answer's among them): with a possessive 's joined to its word, then as a word of its own."""
    for apart in (False, True):
        wanted = _words(answer, apart)
        end = len(wanted)
        while end and wanted[end - 1] in _ARTICLES:
            end -= 1
        kept = [re.escape(word) for word in wanted[:end] if word not in _ARTICLES]
        pattern = " ".join([*([f" {_SKIPPED}".join(kept)] if kept else []), *wanted[end:]])
        if pattern:
            yield " ".join(_words(text, apart)), f"{_SKIPPED if kept else ''}({pattern})"


def _words(text: str, apart: bool) -> list[str]:
    """As `normalise` finds them, with articles; a number is one word ("1,5", "10:30")."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"['’`](?=s\b)", " ", folded) if apart else folded
    folded = re.sub(r"['’`]", "", folded)
    kept = []
    for i, c in enumerate(folded):
        joins = c in ".,:/" and folded[i - 1 : i].isdigit() and folded[i + 1 : i + 2].isdigit()
        kept.append(c if joins or unicodedata.category(c)[0] in "LMN" else " ")
    return "".join(kept).split()


def _ends(words: str, at: int) -> bool:
    """Whether a word begins or ends at this place."""
    before, behind = words[at - 1 : at] if at else "", words[at : at + 1]
    if not before.strip() or not behind.strip():
        return True
    return (is_unspaced(before) or is_unspaced(behind)) and not inside_word(before, behind)
