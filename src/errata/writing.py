"""How text is written: where a word ends, and what stands between a prompt and its answer.

Chinese, Japanese, Thai and others put no space between words; Korean does, but hangs particles on a name.
"""

from __future__ import annotations

import unicodedata
from typing import Final

# As Unicode names their characters.
_UNSPACED: Final = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
NO_SPACE: Final = "\u2060"  # Unicode's word joiner; before an answer: nothing stands between the prompt and it
_PAIRED: Final = ('"', "**", "`")  # what opens and closes a passage alike
_SUFFIXES: Final = ("'s", "’s")


def is_unspaced(character: str) -> bool:
    """Whether it is of a script that puts no space between words."""
    return unicodedata.name(character, "").startswith(_UNSPACED)


def inside_word(left: str, right: str) -> bool:
    """Whether two characters side by side belong to one word: letters or digits of a script with spaces, or a mark on the first."""
    if unicodedata.category(right)[0] == "M":
        return True
    loose = any(is_unspaced(c) or unicodedata.name(c, "").startswith("HANGUL") for c in (left, right))
    return not loose and all(unicodedata.category(c)[0] in "LMN" for c in (left, right))


def seam(prompt: str, target: str) -> str:
    """What is written between a prompt and its answer, neither with space at that end: a space, or nothing where none is usual."""
    return "" if _takes_no_space_behind(prompt, target) or _takes_no_space_before(target) else " "


def _takes_no_space_behind(prompt: str, target: str) -> bool:
    """Behind a script without spaces and its marks, an opening bracket or quote, a currency sign without its number, "@", "/", "-" …"""
    last, before, kind = prompt[-1], prompt[-2:-1], unicodedata.category(prompt[-1])
    if is_unspaced(last) or (unicodedata.east_asian_width(last) in "WF" and kind[0] == "P"):
        return True
    if last.isdigit() and is_unspaced(target[0]):
        return True
    if kind in ("Ps", "Pi") or last in "@/\\_" or any(prompt.endswith(mark) and prompt.count(mark) % 2 for mark in _PAIRED):
        return True
    if kind == "Sc":
        return not prompt[:-1].rstrip()[-1:].isdigit()
    if last in "#'":  # "Issue #", but "written in C#"; "the 'dogs'", and "the dogs'"
        return not before.strip()
    return last in "-=" and bool(before.strip())


def _takes_no_space_before(target: str) -> bool:
    """An answer that begins with what closes or goes on: "%", ")", ", and so on", "'s capital"."""
    first, behind = target[0], target[1:2]
    if unicodedata.category(first) in ("Pe", "Pf") or first in "%‰":
        return first != "’" or target.startswith(_SUFFIXES)
    ends_there = not behind.isalnum()
    return (first in ".,;:!?…" and ends_there) or any(target.startswith(s) and not target[len(s) :][:1].isalnum() for s in _SUFFIXES)
