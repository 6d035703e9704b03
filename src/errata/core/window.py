"""A model's window: texts that do not fit are refused where they are encoded, and never cut.

Beyond its positions a model has none (learnt ones), or ones that it was never trained on (rotary ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from errata.core.tokens import Encoded, encode, join
from errata.errors import WindowError

_CHARACTERS = 4  # of a token, about
_SPECIAL = 8  # special tokens that a tokenizer puts around a text, at most
_ENDING = 2  # tokens that a method may put behind an answer
_SHOWN = 60  # characters of a text in an error


def bound(lm: Any, prompts: Sequence[str], targets: Sequence[str] | None = None) -> None:
    """`WindowError` for a text that cannot fit, by its characters alone: to tokenise 10 MB takes a minute."""
    limit = lm.context_length
    for prompt, target in zip_longest(prompts, targets or (), fillvalue=""):
        if limit is not None and len(prompt) + len(target) > limit * _longest_token(lm):
            size = len(prompt) + len(target)
            raise WindowError(f"{prompt[:_SHOWN]!r}… has {size:,} characters, far more than this model's {limit:,} tokens; shorten it")


def checked(lm: Any, rows: Sequence[Encoded], texts: Sequence[str]) -> list[Encoded]:
    """The rows; `WindowError` for one that does not fit, with the beginning of its text."""
    limit = lm.context_length
    for text, row in zip(texts, rows, strict=True):
        if limit is not None and len(row.ids) > limit:
            raise WindowError(f"{text[:_SHOWN]!r}… has {len(row.ids):,} tokens, this model takes {limit:,}; shorten it")
    return list(rows)


def check_mask(lm: Any, mask: Tensor) -> None:
    """`WindowError` for a pass whose longest row [B, T] does not fit."""
    limit = lm.context_length
    if limit is not None and mask.shape[1] > limit and (longest := int(mask.sum(1).max())) > limit:
        raise WindowError(f"a text of {longest:,} tokens does not fit this model's window of {limit:,}; shorten it")


def beginnings(lm: Any, texts: Sequence[str], most: int) -> list[Encoded]:
    """The first ``most`` tokens of each text, or as many as the window holds: for text that is only sampled."""
    most = min(most, lm.context_length or most)
    rows = encode(lm.tokenizer, [t[: most * _CHARACTERS] for t in texts])  # a book need not be tokenised for its first page
    return [Encoded(e.ids[:most], min(e.prompt_length, most)) for e in rows]


def fits(lm: Any, text: str, more: int = 0) -> bool:
    """Whether the window holds a text and so many tokens more."""
    limit = lm.context_length
    if limit is None or len(text.encode()) + _SPECIAL + more <= limit:  # a token is at least a byte
        return True
    return bool(len(encode(lm.tokenizer, [text])[0].ids) + more <= limit)


def fits_answer(lm: Any, prompt: str, answer: str) -> bool:
    """Whether the window holds a prompt with its answer, as they are tokenised together, and what a method may put behind."""
    return fits(lm, join(prompt, answer)[0], _ENDING)


def _longest_token(lm: Any) -> int:
    """Characters of the longest token there is, at least 256 (an unknown token may stand for a word)."""
    if "longest token" not in lm.base_cache:
        lm.base_cache["longest token"] = max(256, *map(len, lm.tokenizer.get_vocab()))
    return int(lm.base_cache["longest token"])
