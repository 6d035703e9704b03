"""Two stacks side by side: what each says to the same prompts, how likely given answers are, how far the next token moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from errata.core.bank import Stack
from errata.core.decode import AT_ONCE, PrefilledBatch, decode, detokenize
from errata.core.model import LM, STOPS
from errata.core.tokens import Encoded
from errata.score import teacher_forcing


@dataclass(frozen=True)
class Completion:
    """A greedy answer: its text up to a stop; its tokens, and the log-probability of each in nats; p of each answer that was asked for."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    likely: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """moved: total variation ½ Σ |p − q| of the two next-token distributions, from 0 (the same) to 1."""

    prompt: str
    before: Completion
    after: Completion
    moved: float

    @property
    def changed(self) -> bool:
        return self.before.text != self.after.text


def compare(
    lm: LM, prompts: Sequence[str], sides: tuple[Stack, Stack], tokens: int, asked: Sequence[Sequence[str]] = ()
) -> list[Comparison]:
    """``asked``: answers to each prompt whose likelihoods are wanted (none).  Prompts run once, both sides in one batch."""
    given, half = list(asked) or [()] * len(prompts), AT_ONCE // 2
    return [one for i in range(0, len(prompts), half) for one in _part(lm, list(prompts[i : i + half]), sides, tokens, given[i : i + half])]


@torch.no_grad()
def _part(lm: LM, prompts: list[str], sides: tuple[Stack, Stack], tokens: int, asked: Sequence[Sequence[str]]) -> list[Comparison]:
    n, encoded = len(prompts), lm.encode(prompts)
    which = [0] * n + [1] * n
    prefilled = PrefilledBatch.prefill(lm, lm.batch([*encoded, *encoded]).to(lm.device), lm.plan(list(sides), which, 2 * n))
    p = torch.softmax(prefilled.next_token_logits.double(), -1)
    moved = (0.5 * (p[:n] - p[n:]).abs().sum(-1)).clamp_max(1.0).tolist()
    said = [tuple(ids) for ids in decode(prefilled, tokens, STOPS)]
    likely = _likelihoods(lm, prefilled, encoded, sides, [(i, text) for i, texts in enumerate(asked) for text in texts], prompts)
    spoken = [i for i, ids in enumerate(said) if ids]  # one that ends at once says nothing
    nats = dict(zip(spoken, teacher_forcing.score_continuations(prefilled, spoken, [said[i] for i in spoken]), strict=True))

    def side(i: int) -> Completion:
        text = detokenize(lm.tokenizer, said[i], STOPS)
        return Completion(text, said[i], tuple(-x for x in nats[i].nats) if i in nats else (), likely.get(i, {}))

    return [Comparison(prompt, side(i), side(n + i), moved[i]) for i, prompt in enumerate(prompts)]


def _likelihoods(
    lm: LM,
    prefilled: PrefilledBatch,
    encoded: Sequence[Encoded],
    sides: tuple[Stack, Stack],
    asked: Sequence[tuple[int, str]],
    prompts: Sequence[str],
) -> dict[int, dict[str, float]]:
    """Row -> answer -> its probability.  asked: (prompt, answer), of both sides each; where the prompt's last token is another before
    this answer, the two run as a text of their own."""
    n, out = len(prompts), dict[int, dict[str, float]]()
    texts = lm.encode([prompts[i] for i, _ in asked], [text for _, text in asked])
    pairs = [(i + n * side, text, row) for (i, text), row in zip(asked, texts, strict=True) for side in (0, 1)]
    behind = [row.ids[: row.prompt_length] == encoded[place % n].ids for place, _, row in pairs]
    own = [pair for pair, goes_on in zip(pairs, behind, strict=True) if goes_on]
    rest = [pair for pair, goes_on in zip(pairs, behind, strict=True) if not goes_on]
    found = teacher_forcing.score_continuations(prefilled, [place for place, _, _ in own], [row.target for _, _, row in own]) if own else []
    found += (
        teacher_forcing.score_full_texts(lm, [row for _, _, row in rest], list(sides), [place // n for place, _, _ in rest]) if rest else []
    )
    for (place, text, _), forced in zip([*own, *rest], found, strict=True):
        out.setdefault(place, {})[text] = math.exp(-sum(forced.nats))
    return out
