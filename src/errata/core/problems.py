"""Rows that belong to independent problems: which still run, and figures per problem from figures per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errata.core.fit import token_nll


class ProblemRows:
    """The rows of a runner (`errata.core.tail`), row b belonging to problem ``owner[b]`` of ``count``."""

    def __init__(self, runner: Any, owner: Tensor, count: int) -> None:
        self.runner, self.owner, self.count = runner, owner, count
        self._view: tuple[int, Any, Tensor, Tensor] = (count, runner, owner, torch.arange(len(owner), device=owner.device))

    def of(self, alive: Tensor) -> tuple[Any, Tensor, Tensor]:
        """(runner, owner as a place in ``alive``, original row numbers) of the rows whose problems still run.

        ``alive`` only ever shrinks during a fit, so rows are cut anew when its length has changed.
        """
        if self._view[0] != len(alive):
            position = torch.full((self.count,), -1, device=alive.device)
            position[alive] = torch.arange(len(alive), device=alive.device)
            kept = (position[self.owner] >= 0).nonzero().squeeze(1)
            self._view = (len(alive), self.runner.select(kept), position[self.owner[kept]], kept)
        return self._view[1], self._view[2], self._view[3]


class RowsInTurns:
    """Rows that belong to problems, of which some (``turn`` −1) run at every step and others only at their turn, step by step.

    owner [B]  the problem of each row; turn [B]  when a row's turn is, from 0 up, or −1
    """

    def __init__(self, owner: Tensor, count: int, turn: Tensor) -> None:
        self.owner, self.count = owner, count
        self.turns = max(1, int(turn.max()) + 1 if len(turn) else 1)
        self.rows = [((turn < 0) | (turn == t)).nonzero().squeeze(1) for t in range(self.turns)]
        self._view: tuple[int, dict[int, tuple[Tensor, Tensor]]] = (-1, {})

    def of(self, alive: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(owner as a place in ``alive`` [b], numbers [b]) of the rows that run at this step, in order.  ``alive`` only ever shrinks."""
        if self._view[0] != len(alive):
            self._view = (len(alive), {})
        place, views = step % self.turns, self._view[1]
        if place not in views:
            position = torch.full((self.count,), -1, device=alive.device)
            position[alive] = torch.arange(len(alive), device=alive.device)
            numbers = self.rows[place]
            numbers = numbers[position[self.owner[numbers]] >= 0]
            views[place] = position[self.owner[numbers]], numbers
        return views[place]


class Chosen:
    """A runner, cut to the rows with given numbers; made once while they stay the same."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._last: tuple[Tensor, Any] | None = None

    def __call__(self, numbers: Tensor) -> Any:
        if len(numbers) == len(self._runner.rows.active):
            return self._runner
        if self._last is None or not torch.equal(self._last[0], numbers):
            self._last = numbers, self._runner.select(numbers)
        return self._last[1]


class WorstOfTurns:
    """What problems whose rows take turns are compared with a stop by: the largest of what each turn came to last."""

    def __init__(self, turns: int, count: int, device: torch.device) -> None:
        self._recent = torch.zeros(turns, count, device=device)
        self._seen = 0

    def __call__(self, compared: Tensor, alive: Tensor, stop: float) -> Tensor:
        """[e]; at least ``stop`` until every turn was there."""
        self._recent[self._seen % len(self._recent), alive] = compared.detach().to(self._recent)
        self._seen += 1
        worst = self._recent[:, alive].amax(0)
        return worst if self._seen >= len(self._recent) else worst.clamp_min(stop)


def mean_per_problem(values: Tensor, owner: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Sum of row values [B, …] over each problem's rows, divided by the sum of ``weights`` (1 a row without), [e, …]."""
    weights = torch.ones_like(values) if weights is None else weights
    total = torch.zeros((count, *values.shape[1:]), device=values.device, dtype=values.dtype).index_add(0, owner, values)
    norm = torch.zeros((count, *weights.shape[1:]), device=values.device, dtype=values.dtype).index_add(0, owner, weights)
    return total / norm


def row_nll(logits: Tensor, labels: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """(summed negative log-likelihood of each row's labels [B], how many labels it has [B]).

    logits [M, V] at the M places where ``where`` [B, A] holds, row by row; labels [B, A].
    """
    nll = token_nll(logits.to(torch.promote_types(torch.float32, logits.dtype)), labels[where])
    summed = torch.zeros(len(where), device=nll.device, dtype=nll.dtype).index_add(0, where.nonzero()[:, 0], nll)
    return summed, where.sum(1)
