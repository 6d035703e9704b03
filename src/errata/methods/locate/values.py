"""Value vectors: the δ that, added at one site at the subject's last token, makes the model say the target.

    L(δ) = mean over prefixes of −(1/m) Σ log p_δ(o_i | text, o_<i)  +  λ_KL KL(p_δ ‖ p_0)  +  λ_wd ‖δ‖ / ‖v_0‖²

Source: ROME §3.1 and its released code (norm over squared norm, and the direction of the KL, are the code's).  All requests
and all prefixes are optimised in one batch through the tail: nothing before the subject's last token and, where the MLP adds to
the residual stream as it is, nothing below the next block can change.  A request that has met its stop leaves the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.core.bank import Bank, Stack, non_causal
from errata.core.fit import AdamW, fit
from errata.core.greedy import argmax
from errata.core.lanes import FIXED_TOKENS_ALONE, Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.problems import ProblemRows, mean_per_problem, row_nll
from errata.core.read import adds_to_block
from errata.core.tail import split_rows_at
from errata.core.tokens import Encoded, pad_id
from errata.methods.locate.text import LocatedText

_ROWS_AT_ONCE = 2_048  # of one batch; each holds its labelled tokens' logits


@dataclass(frozen=True)
class ValueTask:
    """One value to find: the rows with the target, the KL row, and ‖v_0‖ of what δ is added to."""

    rows: tuple[LocatedText, ...]
    kl: LocatedText | None
    norm: float


@dataclass(frozen=True)
class ValueResult:
    """δ [D], the last total loss, and the updates made."""

    delta: Tensor
    loss: float
    steps: int


@dataclass(frozen=True)
class Objective:
    """The numbers of L(δ).  ``clamp``: ‖δ‖ ≤ clamp ‖v_0‖ after each update.  ``steps`` counts losses, as the reference code does: one
    update fewer is made."""

    lr: float
    steps: int
    stop: float
    kl: float
    decay: float
    clamp: float
    sites: ClassVar[int] = 1
    asks_right: ClassVar[bool] = False  # whether `total` looks at ``right``

    def total(self, nll: Tensor, kl: Tensor, decay: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(loss to minimise [e], number that ends problem e when it is below ``stop``).  ``right`` [e]: every target token of every row is
        the most likely one."""
        loss = nll + self.kl * kl + self.decay * decay
        return loss, loss


def optimise(
    lm: LM, wanted: Sequence[ValueTask], sites: Sequence[Site], objective: Objective, on: Stack, runner: Any, progress: Progress | None
) -> list[ValueResult]:
    """A δ for each, [len(sites) · D] where several sites are shifted at once (PMET), independent of what else is in the batch."""
    if not wanted:
        return []
    lifted = len(sites) == 1 and adds_to_block(lm, sites[0], on)
    chosen = [Site(sites[0].block)] if lifted else list(sites)
    first = sites[0].block + 1 if lifted or sites[0].point == "block" else sites[0].block

    def work(model: LM, members: list[int], progress: Progress) -> list[ValueResult]:
        return _Values(model, [wanted[i] for i in members], chosen, first, objective, on, runner).run(progress)

    active = [len(w.rows) * max(len(p.row.ids) - 1 - p.at for p in w.rows) for w in wanted]
    most = max(1, _ROWS_AT_ONCE // (1 + max(len(w.rows) for w in wanted)))
    return in_lanes(lm, active, work, progress, most=most)


class _Rows:
    """Rows (problem, text with its place, tokens) cut at the place; those at ``is_kl`` [B] have no target, the prediction there counts."""

    def __init__(
        self, rows: Sequence[tuple[int, LocatedText, Encoded]], kl: int, lm: LM, count: int, first: int, on: Stack, runner: Any
    ) -> None:
        cut = split_rows_at([row for _, _, row in rows], [p.at for _, p, _ in rows], pad_id(lm.tokenizer), lm.device, final=False)
        self.is_kl = torch.arange(len(rows), device=lm.device) >= len(rows) - kl  # the last ``kl``
        cut.labels[self.is_kl, 0] = 0
        cut.prompt_lengths = torch.tensor([p.row.prompt_length for _, p, _ in rows], device=lm.device)
        self.at = torch.tensor([p.at for _, p, _ in rows], device=lm.device)
        self.owned = ProblemRows(runner(lm, cut, first, on), torch.tensor([i for i, _, _ in rows], device=lm.device), count)
        self.before: Tensor | None = None  # log p_0 at the KL rows, [kl, V]


class _Values:
    """One batch of `optimise`."""

    def __init__(
        self, lm: LM, wanted: Sequence[ValueTask], sites: Sequence[Site], first: int, objective: Objective, on: Stack, runner: Any
    ) -> None:
        self.lm, self.wanted, self.sites, self.objective = lm, wanted, sites, objective
        self.precision = torch.promote_types(torch.float32, lm.dtype)
        self.norm = torch.tensor([w.norm for w in wanted], device=lm.device, dtype=self.precision)
        targets = [(i, p, p.row) for i, w in enumerate(wanted) for p in w.rows]
        asked = [(i, w.kl) for i, w in enumerate(wanted) if w.kl and objective.kl]
        ends = [p.row.prompt_length if non_causal(on) else p.at + 1 for _, p in asked]
        kl = [(i, p, Encoded(p.row.ids[:n], n)) for (i, p), n in zip(asked, ends, strict=True)]
        how = (lm, len(wanted), first, on, runner)
        # KL rows run one token; in a batch with the targets they are padded to theirs, apart they cost a pass of their own
        padding = len(kl) * max(len(row.ids) - 2 - p.at for _, p, row in targets)
        apart = padding > FIXED_TOKENS_ALONE
        self.rows = [_Rows(targets, 0, *how), _Rows(kl, len(kl), *how)] if apart else [_Rows([*targets, *kl], len(kl), *how)]

    def run(self, progress: Progress) -> list[ValueResult]:
        o, count = self.objective, len(self.wanted)
        start = torch.zeros(count, len(self.sites) * self.lm.width, device=self.lm.device, dtype=self.precision)
        for rows in self.rows:
            if bool(rows.is_kl.any()):
                with torch.no_grad():
                    logits, at_kl, _, _, _ = self._forward(rows, start, torch.arange(count, device=start.device))
                    rows.before = logits[at_kl].to(self.precision).log_softmax(-1)
        rule = AdamW(o.lr)  # without decay: Adam
        fitted = fit({"delta": start}, self._loss, steps=o.steps - 1, optimizer=rule, stop=o.stop, progress=progress, project=self._clamp)
        return [
            ValueResult(d, loss, steps)
            for d, loss, steps in zip(fitted.params["delta"], fitted.loss.tolist(), fitted.steps.tolist(), strict=True)
        ]

    def _forward(self, rows: _Rows, delta: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Any, Tensor, Tensor]:
        """(logits [M, V], which of the M belong to KL rows, runner, owner [B], numbers [B] of the rows among all of ``rows``)."""
        runner, owner, kept = rows.owned.of(alive)
        parts = delta[owner].split(self.lm.width, -1)
        banks = [Bank("shift", site, {}, {"delta": part, "at": rows.at[kept]}) for site, part in zip(self.sites, parts, strict=True)]
        logits = runner.logits(banks)
        return logits, rows.is_kl[kept][runner.rows.label_mask.nonzero()[:, 0]], runner, owner, kept

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        count = len(alive)
        kl = torch.zeros(count, device=alive.device, dtype=self.precision)
        nll, right = kl, kl == 0
        for rows in self.rows:
            logits, at_kl, runner, owner, kept = self._forward(rows, p["delta"], alive)
            target = ~rows.is_kl[kept]
            if rows is self.rows[0]:  # holds all targets
                summed, number = row_nll(logits, runner.rows.labels, runner.rows.label_mask)
                nll = mean_per_problem((summed / number)[target], owner[target], count)
                if self.objective.asks_right:
                    right = self._right(logits.detach(), runner, owner, target, count)
            if rows.before is not None:
                now = logits[at_kl].to(self.precision).log_softmax(-1)
                own = rows.before[_places(rows.is_kl, kept)]
                kl = kl.index_add(0, owner[~target], (now.exp() * (now - own)).sum(-1))
        decay = torch.linalg.vector_norm(p["delta"], dim=-1) / self.norm[alive].square()
        return self.objective.total(nll, kl, decay, right)

    @staticmethod
    def _right(logits: Tensor, runner: Any, owner: Tensor, target: Tensor, count: int) -> Tensor:
        """[e] bool: every target token of every row is the argmax."""
        where = runner.rows.label_mask
        wrong = (argmax(logits) != runner.rows.labels[where]) & target[where.nonzero()[:, 0]]
        return torch.zeros(count, device=logits.device).index_add(0, owner[where.nonzero()[:, 0]], wrong.float()) == 0

    def _clamp(self, p: Mapping[str, Tensor], alive: Tensor) -> None:
        for part in p["delta"].split(self.lm.width, -1):
            size = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            part.mul_((self.objective.clamp * self.norm[alive, None] / size.clamp_min(1e-30)).clamp_max(1.0))


def _places(is_kl: Tensor, kept: Tensor) -> Tensor:
    """Numbers among all KL rows of those that are kept."""
    number = is_kl.long().cumsum(0) - 1
    return number[kept[is_kl[kept]]]
