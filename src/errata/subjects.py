"""Where a subject stands in a text: as whole words, in the text's own casing.

A name's edge may not lie between two letters or digits: "Franc" does not stand in "France", but "France" does in "France's" and in
"anti-France".  Scripts that put no space between words (Chinese, Japanese, Thai …) have no such edges, so there any place will do.
"""

from __future__ import annotations

import re
import unicodedata

from errata.errors import InputError

_UNSPACED = re.compile("CJK |HIRAGANA |KATAKANA|BOPOMOFO |HANGUL |THAI |LAO |KHMER |MYANMAR |TIBETAN |YI |JAVANESE |BALINESE ")


def _inside_word(left: str, right: str) -> bool:
    """Whether two characters side by side belong to one word: a letter or digit and one more, or a mark on the first."""
    if unicodedata.combining(right) or unicodedata.category(right) == "Mc":
        return True
    return all((c.isalnum() or unicodedata.category(c)[0] == "M") and not _UNSPACED.match(unicodedata.name(c, "")) for c in (left, right))


def _is_whole(text: str, begin: int, end: int) -> bool:
    edges = [at for at in (begin, end) if 0 < at < len(text)]
    return not any(_inside_word(text[at - 1], text[at]) for at in edges)


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
        while begin and _inside_word(prompt[begin - 1], prompt[begin]):
            begin -= 1
        while end < len(prompt) and _inside_word(prompt[end - 1], prompt[end]):
            end += 1
        name = prompt[begin:end]
        raise InputError(f"subject {subject!r} is a part of a word of prompt {prompt!r}; give the whole name, perhaps {name!r}")
    raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r}; spell it as the prompt does")
