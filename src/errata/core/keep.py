"""`Kept`: the output term.  What the model says to contrast pairs should stay while something else is written.

    KL_e = 1/C_e Σ_c 1/m_c Σ_t Σ_v p_ct(v) (log p_ct(v) − log q_ct(v)),   t = 0 … m_c − 1

Problem e has C_e pairs (prompt, answer), prompts about other subjects.  Position t = 0 of a pair is its prompt's last token, and by
default the only one (m = 1); t > 0 stands behind t tokens of the answer, which are fed.  p [M, V]: the model before the edit, over the
vocabulary, at all M positions of all rows, computed once; q [M, V]: the model under the parameters of the moment.
∂KL_e/∂logits_ct = (q_ct − p_ct) / (C_e m_c): 0 where nothing changed, so the first update of an edit from nothing never feels the term.

A row runs under the parameters of its own problem, and rows whose problem has ended leave the batch.  Through the tail
(`errata.core.tail`) a step runs the blocks that can change, and the head at these positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Bank, Stack
from errata.core.model import LM
from errata.core.tail import split_rows_at
from errata.core.tokens import Encoded, pad_id
from errata.request import EditRequest

_NUMBERS_KEPT = 2**28  # of p [M, V]; with more, each step makes its own anew


class _Divergence(torch.autograd.Function):
    """Σ_v p (log p − log q), [M].  One [M, V] is made on the way in and turned into the gradient in place on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor) -> Tensor:
        log_q = logits.log_softmax(1)
        ctx.log_p, ctx.log_q = log_p, log_q
        return (log_p.exp() * (log_p - log_q)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.log_q.exp_().sub_(ctx.log_p.exp()).mul_(gradient[:, None]), None


def token_kl(logits: Tensor, log_p: Tensor) -> Tensor:
    """[M]: KL(p ‖ softmax(logits)) over the vocabulary; logits and log p [M, V], natural logarithm."""
    out: Tensor = _Divergence.apply(logits, log_p)  # type: ignore[no-untyped-call]
    return out


class KeptRows:
    """Some of the rows, cut for the problems that run now.

    numbers [c] which rows; owner [c]: the problem of each, as a place among those that run
    even        whether equally many rows of each problem stand side by side, for an op that needs no routing then
    """

    def __init__(self, of: Kept, numbers: Tensor, owner: Tensor, count: int) -> None:
        self._of, self.numbers, self._count, self.owner = of, numbers, count, owner
        self._each = torch.bincount(owner, minlength=count)
        self.even = bool((self._each == self._each[:1]).all()) and bool((owner.diff() >= 0).all())
        self._made: tuple[Any, Tensor] | None = None
        self._before: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def _frozen(self) -> tuple[Any, Tensor]:
        """(runner, log p [M, V]); made for the occasion where there is much of it."""
        if self._made is not None:
            return self._made
        made = self._of.frozen(self.numbers)
        if self._of.few:
            self._made = made
        return made

    def divergence(self, banks: Sequence[Bank]) -> Tensor:
        """KL_e [e] of the problems that run; 0 for one without a row."""
        if not len(self):
            return torch.zeros(self._count, device=self.owner.device)
        runner, self._before = self._frozen()
        return self.divergence_of(runner.logits(banks))

    def divergence_of(self, logits: Tensor) -> Tensor:
        """The same from the logits [M, V] of these rows, where they ran beside others (`Kept.stand_in`)."""
        if not len(self):
            return torch.zeros(self._count, device=self.owner.device)
        log_p = self._of.before(self.numbers) if self._before is None else self._before
        if self._of.few:
            self._before = log_p
        where = self._of.rows.label_mask[self.numbers]
        kl = token_kl(_wide(logits), log_p)
        share = 1 / (where.sum(1) * self._each[self.owner]).to(kl.dtype)
        row = where.nonzero()[:, 0]
        return kl.new_zeros(self._count).index_add(0, self.owner[row], kl * share[row])


class Kept:
    """The contrast pairs of E problems, each a list of requests, as rows of a runner (`errata.core.tail`).

    owner, request   of each row [C]: its problem, and the number of its request, counted over all problems
    first, on        as for the runner: the first block that has to compute, and what runs underneath
    start            banks, for the owner of each row, under which p is read: for an edit that goes on from something; None: the
                     model under ``on``
    answers          also at the tokens of the answer.  On SmolLM2-135M the prompt's last token alone kept more first words of
                     neighbours for the same weight (FT-M, 8 facts: .69 and .62), and costs less
    last             how many last tokens of a prompt an edit changes; None: any
    texts, starts    pairs of each request in the place of its contrast pairs, and the first token of each pair that an edit changes
    """

    def __init__(
        self, lm: LM, problems: Sequence[Sequence[EditRequest]], runner: Any, first: int, on: Stack = (), *,
        start: Callable[[Tensor], Sequence[Bank]] | None = None, answers: bool = False, last: int | None = None,
        texts: Sequence[Sequence[tuple[str, str]]] | None = None, starts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        requests = [(i, r) for i, own in enumerate(problems) for r in own]
        texts = [r.contrast for _, r in requests] if texts is None else texts
        pairs = [(i, n, pair) for n, ((i, _), own) in enumerate(zip(requests, texts, strict=True)) for pair in own]
        encoded = lm.encode([p for _, _, (p, _) in pairs], [a for _, _, (_, a) in pairs])
        self.owner, self.request = (torch.tensor([pair[k] for pair in pairs], device=lm.device) for k in (0, 1))
        self.count = len(problems)
        if not answers:
            encoded = [Encoded(row.ids[: row.prompt_length], row.prompt_length) for row in encoded]
        if starts is None:
            starts = [0 if last is None else max(0, row.prompt_length - last) for row in encoded]
        rows = split_rows_at(encoded, starts, pad_id(lm.tokenizer), lm.device, final=False)
        if not answers:
            ends = torch.tensor([row.prompt_length - start - 1 for row, start in zip(encoded, starts, strict=True)], device=lm.device)
            rows.labels[torch.arange(len(encoded), device=lm.device), ends] = 0  # no target: it marks the place
        self.rows, self._start = rows, start
        self._runner: Callable[[Tensor | None], Any] = lambda numbers: runner(
            lm, rows if numbers is None else rows.select(numbers), first, on
        )
        self.turns = 1
        self.turn = torch.zeros_like(self.owner)  # [C] when a row's turn is …
        self._of_turns = torch.ones_like(self.owner)  # … of so many of its problem
        self.few = int(rows.label_mask.sum()) * int(lm.config.vocab_size) <= _NUMBERS_KEPT
        self._made: tuple[Any, Tensor] | None = None
        self._view: tuple[int, dict[int, KeptRows]] = (-1, {})

    def frozen(self, numbers: Tensor) -> tuple[Any, Tensor]:
        """(runner, log p [M, V]) of the rows with these numbers, which rise."""
        every = len(numbers) == len(self.owner)
        if not self.few:
            return self._read(None if every else numbers)
        runner, _ = self._all()
        return runner if every else runner.select(numbers), self.before(numbers)

    def before(self, numbers: Tensor) -> Tensor:
        """log p [M, V] of the rows with these numbers, which rise."""
        if not self.few:
            return self._read(numbers)[1]
        _, log_p = self._all()
        if len(numbers) == len(self.owner):
            return log_p
        chosen = torch.zeros(len(self.owner), dtype=torch.bool, device=numbers.device).index_fill(0, numbers, True)
        return log_p[chosen[self.rows.label_mask.nonzero()[:, 0]]]

    def _all(self) -> tuple[Any, Tensor]:
        if self._made is None:
            self._made = self._read(None)
        return self._made

    @torch.no_grad()
    def _read(self, numbers: Tensor | None) -> tuple[Any, Tensor]:
        runner, owner = self._runner(numbers), self.owner if numbers is None else self.owner[numbers]
        return runner, _wide(runner.logits(self._start(owner) if self._start else ())).log_softmax(1)

    def stand_in(self, runner: Any, offset: int) -> None:
        """These rows are those of ``runner`` from number ``offset`` on (`errata.core.tail.join_rows`): what is frozen is run there only."""
        every = torch.arange(len(self.owner), device=self.owner.device)
        self._runner = lambda numbers: runner.select(offset + (every if numbers is None else numbers))

    def select(self, numbers: Tensor, owner: Tensor, count: int) -> KeptRows:
        """The rows ``numbers``, which rise, of ``count`` problems; ``owner``: each row's place among these."""
        return KeptRows(self, numbers, owner, count)

    def in_turns(self, size: int) -> None:
        """From now on `of` gives ``size`` rows of each problem, fewer than twice as many, others at each step, so that a step costs less;
        0: all.  How many turns a problem's rows have is a power of two and does not hang on the other problems."""
        if not size:
            return
        for e in range(self.count):
            mine = self.owner == e
            number = int(mine.sum())
            turns = 1 << max(0, (number // size).bit_length() - 1)
            self.turn[mine] = torch.arange(number, device=mine.device) % turns
            self._of_turns[mine] = turns
            self.turns = max(self.turns, turns)

    def now(self, step: int) -> Tensor:
        """[C] bool: the rows whose turn is at ``step``."""
        return self.turn == step % self._of_turns

    def of(self, alive: Tensor, step: int = 0) -> KeptRows:
        """The rows of the problems that still run whose turn is at ``step``.  ``alive`` only ever shrinks during a fit
        (`errata.core.problems`)."""
        length, views = self._view
        if length != len(alive):
            views = {}
            self._view = (len(alive), views)
        turn = step % self.turns
        if turn not in views:
            place = torch.full((self.count,), -1, device=alive.device)
            place[alive] = torch.arange(len(alive), device=alive.device)
            numbers = ((place[self.owner] >= 0) & self.now(turn)).nonzero().squeeze(1)
            views[turn] = self.select(numbers, place[self.owner[numbers]], len(alive))
        return views[turn]


def find_kept(
    editor: Any, lm: LM, problems: Sequence[Sequence[EditRequest]], runner: Any, first: int, on: Stack, **how: Any
) -> Kept | None:
    """The output term of an editor with ``contrast`` and ``contrast_weight``; None where it is off or no request has pairs."""
    if not editor.contrast or not editor.contrast_weight or not any(r.contrast for own in problems for r in own):
        return None
    kept = Kept(lm, problems, runner, first, on, texts=editor.pairs_kept(lm, problems), **how)
    kept.in_turns(editor.contrast_batch)
    return kept


def _wide(logits: Tensor) -> Tensor:
    """float32, or wider where the model is."""
    return logits.to(torch.promote_types(torch.float32, logits.dtype))
