"""Teacher forcing: what a model foretells at each token of a given answer, behind prompts that have run or in one text with them.

One pass gives both the argmax and the likelihood of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.core.bank import Stack
from errata.core.decode import PrefilledBatch
from errata.core.greedy import argmax
from errata.core.model import LM
from errata.core.tokens import Encoded, pad, pad_id

NUMBERS = 1 << 24  # of the logits that are held in float32 at once: 64 MB
WORST = 1e3  # nats of a token that has no probability, or of a model that says NaN: records hold finite numbers


@dataclass(frozen=True)
class TeacherForced:
    """Teacher forcing of one target: its tokens, what the argmax was at each, whether it was right, and its likelihood.

    nll = −1/n Σ_t ln p(target_t | prompt, target_<t) over the n tokens of the target, in nats; ``nats`` are its terms (none of one
    that was read from a file).
    """

    target: tuple[int, ...]
    argmax: tuple[int, ...]
    right: tuple[bool, ...]
    nll: float
    nats: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """The papers' accuracy: the fraction of target tokens that are the argmax."""
        return sum(self.right) / len(self.right)


@torch.no_grad()
def score_continuations(prefilled: PrefilledBatch, rows: Sequence[int], targets: Sequence[tuple[int, ...]]) -> list[TeacherForced]:
    """Target i behind the prompt in row ``rows[i]`` of a prefilled batch.

    The prompt foretells a target's first token and the last one foretells nothing: n tokens take n − 1 steps, together.  Where texts
    cannot go on from what has run (`errata.core.decode.can_fork`), prompts run again with their targets.
    """
    if not rows:
        return []
    device = prefilled.next_token_logits.device
    at = torch.tensor(rows, device=device)
    if not prefilled.can_fork:
        return _anew(prefilled, at, targets)
    first = prefilled.next_token_logits[at][:, None]
    found: dict[int, TeacherForced] = {}
    several = [j for j, target in enumerate(targets) if len(target) > 1]
    if several:
        some = torch.tensor(several, device=device)
        fed = pad([Encoded(targets[j][:-1], 0) for j in several], pad_id(prefilled.lm.tokenizer), "right").to(device)
        _, later = prefilled.select(at[some]).extend(fed.ids, fed.mask)
        found |= zip(several, measured([targets[j] for j in several], torch.cat([first[some], later], 1)), strict=True)
    short = [j for j, target in enumerate(targets) if len(target) == 1]
    found |= zip(short, measured([targets[j] for j in short], first[short]), strict=True)
    return [found[j] for j in range(len(targets))]


def _anew(prefilled: PrefilledBatch, at: Tensor, targets: Sequence[tuple[int, ...]]) -> list[TeacherForced]:
    lm, wide = prefilled.lm, prefilled.ids.shape[1]
    after = pad([Encoded(target, 0) for target in targets], pad_id(lm.tokenizer), "right").to(prefilled.ids.device)
    ids, mask = torch.cat([prefilled.ids[at], after.ids], 1), torch.cat([prefilled.mask[at], after.mask], 1)
    with lm.running(prefilled.plan.select(at)):
        logits = lm.forward(ids, mask, use_cache=False).logits[:, wide - 1 :]
    return measured(targets, logits)


@torch.no_grad()
def score_full_texts(lm: LM, texts: Sequence[Encoded], stacks: Sequence[Stack], which: Sequence[int]) -> list[TeacherForced]:
    """The targets of texts that hold their prompts, text i under ``stacks[which[i]]``."""
    batch = lm.batch(texts).to(lm.device)
    plan = lm.plan(stacks, which, len(texts))
    plan.prompt_lengths = batch.prompt_lengths
    # the head is the widest matrix: it runs from the first position that any row needs
    keep = max(len(t.target) for t in texts) + 1
    more = {"logits_to_keep": keep} if lm.accepts("logits_to_keep") else {}
    with lm.running(plan):
        logits = lm.forward(batch.ids, batch.mask, use_cache=False, **more).logits[:, -keep:]
    # left-padded rows end together: n targets are foretold from position − n − 1 on, counted from the end
    return measured([t.target for t in texts], logits, [keep - len(t.target) - 1 for t in texts])


def measured(targets: Sequence[tuple[int, ...]], logits: Tensor, starts: Sequence[int] | None = None) -> list[TeacherForced]:
    """Target i under logits [B, T, V] that foretell its tokens from position ``starts[i]`` (0) of row i on."""
    where = [(i, (starts[i] if starts else 0) + t, token) for i, target in enumerate(targets) for t, token in enumerate(target)]
    best: list[int] = []
    nats: list[float] = []
    step = max(1, NUMBERS // logits.shape[-1])
    for start in range(0, len(where), step):
        row, column, token = torch.tensor(where[start : start + step], device=logits.device).unbind(1)
        picked = logits[row, column]  # [m, V]
        best += argmax(picked).tolist()
        picked = picked.float() if picked.dtype.itemsize < 4 else picked
        nats += (picked.logsumexp(-1) - picked.gather(1, token[:, None]).squeeze(1)).nan_to_num(WORST, WORST, WORST).tolist()
    out, at = [], 0
    for target in targets:
        said, lost = tuple(best[at : at + len(target)]), nats[at : at + len(target)]
        at += len(target)
        right = tuple(a == b for a, b in zip(said, target, strict=True))
        out.append(TeacherForced(tuple(target), said, right, sum(lost) / len(target), tuple(lost)))
    return out
