"""Whether free answers are as wanted, as people read them: an answer begins with the target, however it goes on.

A model that was trained on texts alone does not stop behind its answer, and need not.  Scores are not made so (`errata.score.evaluator`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errata.core.bank import Stack
from errata.core.chat import is_rendered
from errata.core.decode import greedy_answers
from errata.core.model import CHAT_TOKENS, LM, STOPS, TOKENS
from errata.score.match import starts

_MORE = 4  # tokens of an answer beyond the target's
_ENDS = re.compile("|".join(map(re.escape, STOPS)))


@dataclass(frozen=True, slots=True)
class Answer:
    """``text``: a chat's whole answer; else its first sentence, or as much of it as the target has sentences ("St. Louis")."""

    text: str
    as_wanted: bool


def read(text: str, target: str, chat: bool = False) -> Answer:
    """A free answer beside what it should be.  ``chat``: the model ended it itself."""
    text = text.strip()
    pieces = [] if chat else [text[: found.start()].strip() for found in _ENDS.finditer(text)]
    good = next((piece for piece in [*pieces, text] if starts(piece, target)), None)
    return Answer([*pieces, text][0] if good is None else good, good is not None)


def ask(lm: LM, asked: Sequence[tuple[str, Stack, str]], *, short: bool = False) -> list[Answer]:
    """Greedy answers to (prompt, stack, target), of as many tokens as an answer has otherwise and at least a few more than the target.

    ``short``: no longer than what it takes to judge.
    """
    out = [Answer("", False)] * len(asked)
    wanted: dict[bool, list[int]] = {}
    for i, (prompt, _, _) in enumerate(asked):
        wanted.setdefault(is_rendered(lm.tokenizer, prompt), []).append(i)
    for chat, rows in wanted.items():
        lengths = [len(e.target) for e in lm.encode([asked[i][0] for i in rows], [asked[i][2] for i in rows])]
        tokens = max(0 if short else CHAT_TOKENS if chat else TOKENS, max(lengths) + _MORE)
        pairs: list[tuple[str, Sequence[Any]]] = [(asked[i][0], asked[i][1]) for i in rows]
        for i, text in zip(rows, greedy_answers(lm, pairs, tokens, stop=()), strict=True):
            out[i] = read(text, asked[i][2], chat)
    return out
