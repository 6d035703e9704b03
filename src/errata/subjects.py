"""Where a subject stands in a text: as whole words, in the text's own casing.

A name's edge may not lie inside a word (`errata.writing`): "Franc" does not stand in "France", but "France" does in "France's" and in
"anti-France", and "法国" in "法国的".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from errata.errors import InputError
from errata.writing import inside_word

_WORDS = re.compile(r"\w+")


def _is_whole(text: str, begin: int, end: int) -> bool:
    edges = [at for at in (begin, end) if 0 < at < len(text)]
    return not any(inside_word(text[at - 1], text[at]) for at in edges)


def places(text: str, subject: str, *, parts: bool = False) -> list[tuple[int, int]]:
    """Characters [begin, end) of each place where the subject stands in the text, in its casing and as whole words.

    ``parts``: where it stands nowhere as that, the places where it is a part of longer words ("Nintendo DS" in "Nintendo DSi").
    """
    found = [m.span(1) for m in re.finditer(f"(?=({re.escape(subject)}))", text)]
    whole = [span for span in found if _is_whole(text, *span)]
    return found if parts and not whole else whole


def spell(prompt: str, subject: str) -> str:
    """The subject without the space around it, spelt as the prompt spells it.

    Raises `InputError` where it stands nowhere in the prompt, or as a part of longer words only.
    """
    subject = subject.strip()
    if places(prompt, subject):
        return subject
    otherwise = [m.span(1) for m in re.finditer(f"(?=({re.escape(subject)}))", prompt, re.IGNORECASE)]
    whole = [span for span in otherwise if _is_whole(prompt, *span)]
    if whole:
        return prompt[slice(*whole[0])]
    if otherwise:
        begin, end = otherwise[0]
        while begin and inside_word(prompt[begin - 1], prompt[begin]):
            begin -= 1
        while end < len(prompt) and inside_word(prompt[end - 1], prompt[end]):
            end += 1
        name = prompt[begin:end]
        raise InputError(f"subject {subject!r} is a part of a word of prompt {prompt!r}; give the whole name, perhaps {name!r}")
    raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r}; spell it as the prompt does")


def names_in(text: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that stand in the text as whole words."""
    inside = f" {_words(text)} "
    return [name for name in names if (words := _words(name)) and f" {words} " in inside]


@functools.lru_cache(1 << 15)
def _words(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))
