"""The texts WISE trains on: the prompt behind contexts with its target, and texts whose answers should stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.core.chat import behind, is_exact
from errata.core.model import LM
from errata.core.tokens import Encoded
from errata.request import EditRequest

STARTERS = ("I", "You", "Because", "Yes", "Q: ")  # of EasyEdit's contexts


def contexts(lm: LM, lengths: Sequence[tuple[int, ...]]) -> list[str]:
    """ "" and then, for each (tokens, count), ``count`` greedy continuations of the starters in turn by the unedited model; none twice."""
    key = ("contexts", tuple(map(tuple, lengths)))
    if key not in lm.base_cache:
        found = [""]
        for tokens, count in lengths:
            starts = [STARTERS[i % len(STARTERS)] for i in range(count)]
            texts = lm.generate(starts, stacks=[()], max_new_tokens=tokens, stop=())
            found += [f"{start.strip()} {text}".strip() for start, text in zip(starts, texts, strict=True)]
        lm.base_cache[key] = list(dict.fromkeys(found))
    out: list[str] = lm.base_cache[key]
    return out


@dataclass(frozen=True)
class Texts:
    """Tokenised texts of one edit: the prompt behind each context with its target, and what should not be touched."""

    edit: list[Encoded]
    unrelated: list[Encoded]

    @classmethod
    def of(cls, lm: LM, request: EditRequest, before: Sequence[str], end: str, contrast: bool = False) -> Texts:
        """``contrast``: the request's contrast pairs should not be touched either."""
        prompts = [behind(lm.tokenizer, f"{context} " if context else "", request.prompt) for context in before]
        prompts = [p if is_exact(lm.tokenizer, p) else p.strip() for p in prompts]
        edit = lm.encode(prompts, [request.continuation + end] * len(prompts))
        beside = _pairs(lm, request.contrast if contrast else ())
        if request.unrelated:
            return cls(edit, _pairs(lm, request.unrelated) + beside)
        return cls(edit, lm.encode([context for context in before if context]) + beside)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in (*self.edit, *self.unrelated))


def _pairs(lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
    return lm.encode([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
