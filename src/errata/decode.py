"""Decoding: tokens one at a time from a padded batch, greedy or sampled, with the cache; where a row ends; ids to text."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.tokens import Batch

AT_ONCE = 64  # prompts answered in one batch


def answers(lm: Any, asked: Iterable[tuple[str, Sequence[Any]]], tokens: int) -> list[str]:
    """Greedy answers to (prompt, stack) pairs; like stacks share a bank, so base and patched models run in one batch."""
    out: list[str] = []
    pairs = iter(asked)
    while part := list(itertools.islice(pairs, AT_ONCE)):
        out += lm.generate([p for p, _ in part], stacks=[s for _, s in part], rows=range(len(part)), max_new_tokens=tokens)
    return out


def decode(lm: Any, batch: Batch, limit: int, stop: Sequence[str], sampler: Sampler | None) -> list[list[int]]:
    """New ids of each row, at most ``limit``, under whatever runs on ``lm``; see `errata.model.LM.continuations`."""
    ends, ids, mask, cache = _ends(lm), batch.ids, batch.mask, None
    new: list[list[int]] = [[] for _ in range(len(ids))]
    done = [False] * len(ids)
    for _ in range(limit):
        out = lm.forward(ids, mask, past_key_values=cache, use_cache=True, **lm.last_only)
        cache, last = out.past_key_values, out.logits[:, -1]
        ids = last.argmax(-1, keepdim=True) if sampler is None else sampler(last)
        for i, token in enumerate(ids[:, 0].tolist()):
            if not done[i]:
                if token in ends:
                    done[i] = True
                    continue
                new[i].append(token)
                done[i] = bool(stop) and any(s in lm.tokenizer.decode(new[i]).lstrip() for s in stop)
        if all(done):
            break
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
    return new


def _ends(lm: Any) -> set[int]:
    eos = lm.hf.generation_config.eos_token_id if getattr(lm.hf, "generation_config", None) else None
    found = {lm.tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else [eos])}
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

    def __call__(self, logits: Tensor) -> Tensor:
        """[B, 1] from logits [B, V]."""
        best, tokens = logits.float().topk(min(self.top_k, logits.shape[-1]))
        draws = torch.tensor([float(torch.rand((), generator=g)) for g in self.generators], device=logits.device)
        place = (best.softmax(-1).cumsum(-1) < draws[:, None]).sum(-1, keepdim=True).clamp_max(best.shape[-1] - 1)
        return tokens.gather(1, place)


def text_of(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of generated ids up to the first ``stop``."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    text = text.lstrip()
    at = min((text.find(s) for s in stop if s in text), default=len(text))
    return text[:at].strip()
