"""How a model foretells ordinary text, under any stack: what an edit, or a thousand, did to everything that is not the edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import InputError
from errata.score.evaluator import distinct

ROWS = 16
NUMBERS = 1 << 26  # logits of a batch: 256 MB in float32; a wide vocabulary gets fewer rows


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of one stack on one text.

    nll             mean negative log-likelihood of a token, in nats
    tokens          how many were foretold
    bits_per_byte   nll / ln 2 · tokens of the text / its UTF-8 bytes (line breaks not counted): comparable across tokenizers
    """

    nll: float
    tokens: int
    bits_per_byte: float

    @property
    def value(self) -> float:
        """exp(nll); infinite where that is too large for a number."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@torch.no_grad()
def perplexity(lm: LM, text: str, stacks: Sequence[Stack] = ((),), tokens: int = 40_000, length: int = 256) -> list[Perplexity]:
    """exp(mean NLL a token) of ``text`` under each of ``stacks`` (the base without any); what is attached stands aside.

    The text's lines are tokenised one by one and joined until ``tokens`` are there, and cut into rows of ``length`` tokens,
    each behind BOS (where the tokenizer has one, otherwise a row's first token is not foretold).  What does not fill a row
    is left out, unless the text has less than one row.  Everything after the first token is taken as output of the model, so
    ops that run on answers only do run.
    """
    rows, ratio = _rows(lm, text, tokens, length)
    ids = torch.tensor(rows, device=lm.device)
    todo = [(s, c) for s in range(len(stacks)) for c in range(len(ids))]  # stack by stack: a batch holds few of them
    totals = [0.0] * len(stacks)
    step = _rows_at_once(lm, ids)
    for start in range(0, len(todo), step):
        part = todo[start : start + step]
        batch = ids[torch.tensor([c for _, c in part], device=lm.device)]
        nll, _ = _foretold(lm, batch, [stacks[s] for s, _ in part])
        for (s, _), lost in zip(part, nll.double().sum(1).tolist(), strict=True):
            totals[s] += lost
    return [_mean(total, ids, ratio) for total in totals]


@torch.no_grad()
def perplexity_and_kl(lm: LM, text: str, stack: Stack, tokens: int, length: int) -> tuple[Perplexity, Perplexity, float]:
    """(base, under ``stack``, KL) on ``text``, read as in `perplexity`.

    KL = mean over foretold tokens of Σ_v p(v) (ln p(v) − ln q(v)), p the base's distribution and q the stack's after the same tokens.
    """
    rows, ratio = _rows(lm, text, tokens, length)
    ids = torch.tensor(rows, device=lm.device)
    totals = [0.0, 0.0, 0.0]
    step = max(1, _rows_at_once(lm, ids) // 2)
    for start in range(0, len(ids), step):
        batch = ids[start : start + step]
        n = len(batch)
        nll, logits = _foretold(lm, torch.cat([batch, batch]), [()] * n + [stack] * n)
        p, q = (part.log_softmax(-1) for part in (logits[:n], logits[n:]))
        found = (nll[:n], nll[n:], (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum(-1))
        totals = [total + float(part.double().sum()) for total, part in zip(totals, found, strict=True)]
    return _mean(totals[0], ids, ratio), _mean(totals[1], ids, ratio), totals[2] / (len(ids) * (ids.shape[1] - 1))


def _foretold(lm: LM, batch: torch.Tensor, stacks: Sequence[Stack]) -> tuple[torch.Tensor, torch.Tensor]:
    """(NLL of each row's tokens but the first [B, T − 1], the logits that foretold them), row i under ``stacks[i]``, all of it output."""
    used, which = distinct(stacks)
    plan = lm.plan(used, which, len(batch))
    plan.prompt_lengths = torch.ones(len(batch), dtype=torch.long, device=lm.device)
    with lm.running(plan):
        logits = lm.forward(batch, torch.ones_like(batch), use_cache=False).logits[:, :-1]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(batch), -1), logits


def _rows_at_once(lm: LM, ids: torch.Tensor) -> int:
    return max(1, min(ROWS, NUMBERS // (ids.shape[1] * int(lm.config.vocab_size))))


def _mean(total: float, ids: torch.Tensor, ratio: float) -> Perplexity:
    count = len(ids) * (ids.shape[1] - 1)
    return Perplexity(total / count, count, total / count / math.log(2) * ratio)


def _rows(lm: LM, text: str, tokens: int, length: int) -> tuple[list[list[int]], float]:
    """(rows of token ids, tokens a byte)."""
    most = lm.context_length
    bos = [] if lm.tokenizer.bos_token_id is None else [lm.tokenizer.bos_token_id]
    if length < 2 or (most is not None and length + len(bos) > most):
        raise InputError(f"rows of {length} tokens do not fit; give a length of at least 2" + (f" and below {most}" if most else ""))
    if tokens < length:
        raise InputError(f"{tokens} tokens are less than one row of {length}; ask for more tokens or shorter rows")
    lines = text.split("\n")
    ids: list[int] = []
    used = 0
    for line, encoded in zip(lines, lm.tokenizer(lines, add_special_tokens=False)["input_ids"], strict=True):
        ids += encoded
        used += len(line.encode())
        if len(ids) >= tokens:
            break
    if len(ids) + len(bos) < 2:
        raise InputError("the text has no token to foretell; give a few sentences")
    width = min(length, len(ids))
    starts = range(0, min(len(ids), tokens) - width + 1, width)
    return [bos + ids[start : start + width] for start in starts], len(ids) / used
