"""Decoding: tokens one at a time from a padded batch, greedy or sampled, with the cache; where a row ends; ids to text."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.chat import end_of_turn, is_rendered
from errata.core.greedy import argmax
from errata.core.tokens import Batch

AT_ONCE = 64  # prompts answered in one batch
_BRANCHING = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers of a cache that hold keys and values and nothing else
_LEAVE = 0.75  # ended rows leave when no more than this share of a batch goes on: leaving copies the cache, as every step does


def greedy_answers(
    lm: Any, asked: Iterable[tuple[str, Sequence[Any]]], tokens: int | None = None, stop: Sequence[str] | None = None
) -> list[str]:
    """Greedy answers to (prompt, stack) pairs; like stacks share a bank, so base and patched models run in one batch.

    ``tokens`` and ``stop`` None: as `errata.core.model.LM.generate` has them, for a rendered chat as with ``chat``.
    """
    out: list[str] = []
    pairs = iter(asked)
    while part := list(itertools.islice(pairs, AT_ONCE)):
        chats = [is_rendered(lm.tokenizer, p) for p, _ in part]
        texts = [""] * len(part)
        for chat in sorted(set(chats)):
            rows = [i for i, c in enumerate(chats) if c == chat]
            prompts, stacks = [part[i][0] for i in rows], [part[i][1] for i in rows]
            said = lm.generate(prompts, stacks=stacks, rows=range(len(rows)), max_new_tokens=tokens, stop=stop, chat=chat)
            for i, text in zip(rows, said, strict=True):
                texts[i] = text
        out += texts
    return out


@dataclass(frozen=True)
class PrefilledBatch:
    """A padded batch whose prompts have run: what further tokens need.  ``next_token_logits`` [B, V].

    ``ids`` and ``mask`` [B, T] are everything so far; the plan (`errata.core.bank.Plan`) holds what its ops decided on the prompts.
    """

    lm: Any
    plan: Any
    ids: Tensor
    mask: Tensor
    cache: Any
    next_token_logits: Tensor

    @classmethod
    def prefill(cls, lm: Any, batch: Batch, plan: Any) -> PrefilledBatch:
        """Run the prompts of a left-padded batch under a plan."""
        plan.prompt_lengths = batch.prompt_lengths
        with lm.running(plan):
            out = lm.forward(batch.ids, batch.mask, use_cache=True, **lm.last_logits_kwargs)
        return cls(lm, plan, batch.ids, batch.mask, out.past_key_values, out.logits[:, -1])

    @property
    def can_fork(self) -> bool:
        """Whether several texts can go on from it (see `can_fork`)."""
        return can_fork(self.cache)

    def select(self, rows: Tensor) -> PrefilledBatch:
        """Rows [b] of it, any number of times each; the two go on without each other."""
        return PrefilledBatch(
            self.lm,
            self.plan.select(rows),
            self.ids[rows],
            self.mask[rows],
            select_cache_rows(self.cache, rows),
            self.next_token_logits[rows],
        )

    def extend(self, ids: Tensor, mask: Tensor, **more: Any) -> tuple[PrefilledBatch, Tensor]:
        """(it with tokens [B, n] behind it, their logits); padding, where ``mask`` [B, n] is 0, is on the right.  It stays as it is."""
        whole, cache = torch.cat([self.mask, mask], 1), fork(self.cache)
        with self.lm.running(self.plan):
            out = self.lm.forward(ids, whole, past_key_values=cache, use_cache=True, **more)
        return PrefilledBatch(self.lm, self.plan, torch.cat([self.ids, ids], 1), whole, out.past_key_values, out.logits[:, -1]), out.logits


class TokenCache:
    """What stands for the cache of a model that keeps none errata can go on from (GPT-1, Mamba's running states alone): the tokens so far.

    Each further pass runs the whole text, so it cannot be forked.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.layers = ids, [None]


def can_fork(cache: Any) -> bool:
    """Whether a text can go on from this cache in several ways, and by several tokens at once.  Layers that keep a running state (linear
    attention) change it in place and take several tokens only where a text begins."""
    return all(type(layer).__name__ in _BRANCHING for layer in cache.layers)


def fork(cache: Any) -> Any:
    """A cache that shares its tensors with ``cache``; appending to it makes new tensors and leaves ``cache`` as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def select_cache_rows(cache: Any, rows: Tensor) -> Any:
    """The cache of rows of a batch."""
    other = fork(cache)
    for layer in other.layers:
        layer.batch_select_indices(rows)
    return other


def decode(prefilled: PrefilledBatch, limit: int | Sequence[int], stop: Sequence[str], sampler: Sampler | None = None) -> list[list[int]]:
    """New ids of each row, at most ``limit`` (of all rows, or one a row) and as the window has room (`errata.core.model.LM.generate_ids`).
    Rows that have ended leave the batch."""
    over, tokenizer = eos_token_ids(prefilled.lm), prefilled.lm.tokenizer
    new: list[list[int]] = [[] for _ in prefilled.next_token_logits]
    limits = [limit] * len(new) if isinstance(limit, int) else list(limit)
    if (window := prefilled.lm.context_length) is not None:
        limits = [min(own, window - n) for own, n in zip(limits, prefilled.mask.sum(1).tolist(), strict=True)]
    rows = list(range(len(new)))  # of the batch as it is now
    live = {i for i in rows if limits[i] > 0}
    for step in range(max(limits, default=0)):
        ids = argmax(prefilled.next_token_logits).unsqueeze(-1) if sampler is None else sampler(prefilled.next_token_logits, rows)
        for i, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if i not in live:
                continue
            if token in over:
                live.discard(i)
                continue
            new[i].append(token)
            if step + 1 >= limits[i] or (stop and any(s in tokenizer.decode(new[i]).lstrip() for s in stop)):
                live.discard(i)
        if not live:
            break
        if len(live) <= _LEAVE * len(rows) and prefilled.can_fork:
            keep = torch.tensor([at for at, i in enumerate(rows) if i in live], device=ids.device)
            prefilled, ids, rows = prefilled.select(keep), ids[keep], [i for i in rows if i in live]
        prefilled, _ = prefilled.extend(ids, prefilled.mask.new_ones((len(rows), 1)), **prefilled.lm.last_logits_kwargs)
    return new


def eos_token_ids(lm: Any) -> set[int]:
    """Tokens that end a text: all that the generation config names, the tokenizer's EOS, the end of a turn in its chat template."""
    eos = lm.hf.generation_config.eos_token_id if getattr(lm.hf, "generation_config", None) else None
    found = {lm.tokenizer.eos_token_id, end_of_turn(lm.tokenizer), *(eos if isinstance(eos, list | tuple) else [eos])}
    return {e for e in found if isinstance(e, int)}


class Sampler:
    """Draws a token a row from the ``top_k`` likeliest, with a random generator a row."""

    def __init__(self, prompts: Sequence[str], top_k: int, seed: int) -> None:
        seen: dict[str, int] = {}
        self.top_k, self.generators = top_k, []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
            digest = hashlib.sha256(f"{seed} {seen[prompt]} {prompt}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """[b, 1] from logits [b, V] of some rows."""
        best, tokens = logits.float().topk(min(self.top_k, logits.shape[-1]))
        draws = torch.tensor([float(torch.rand((), generator=self.generators[i])) for i in rows], device=logits.device)
        place = (best.softmax(-1).cumsum(-1) < draws[:, None]).sum(-1, keepdim=True).clamp_max(best.shape[-1] - 1)
        return tokens.gather(1, place)


def detokenize(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of generated ids up to the first ``stop``."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    text = text.lstrip()
    at = min((text.find(s) for s in stop if s in text), default=len(text))
    return text[:at].strip()
