"""How REP's adaptors are trained: on keys that are read once, all adaptors of all edits in one batch, a block after the other.

    L = aggregation · mean_i −⟨k̂_i / ‖k̂_i‖, t⟩ + consistency · mean (k̂_o − k_o)² + match · mean_i ‖k̂_i − k_o‖² / ‖k_o‖² + closing · BCE(g)

k̂_i are the adapted keys of the surfaces drawn at a step, k_o the key of the prompt itself, which only the consistency term sees (as
released: its key is left out of the mean of the first term); t is what the edit's own change answers to:
C⁻¹k*/‖C⁻¹k*‖, or k* as it is.  The gate is soft here and hard at use.  Adaptors of a later block are trained on keys as the finished
adaptors below leave them at use; the released code trains all blocks at once under each other's soft gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from errata.core.fit import AdamW, fit
from errata.methods.rep.op import gate_logit
from errata.methods.rep.surfaces import OWN

_GATE_PARAMS = ("w1", "b1", "w2", "b2")
TRAINED = ("a", "b", *_GATE_PARAMS)
_NEGATIVES_PER_KEY = 4  # keys at which a gate is trained shut at a step, for each at which it is trained open
Step = Callable[[int, int, float], None]


@dataclass
class Keys:
    """What the adaptors of one block train on.

    surfaces [R, I]     keys of every text;  steps [S, n, m]: which of them each of n edits sees at each of S steps
    own [n, I]          the key of the prompt itself;  target [n, I]
    away [n, w, I]      keys at which the gate should stay shut: the first `OWN` at every step, of the rest some; none without ``closing``
    """

    surfaces: Tensor
    steps: Tensor
    own: Tensor
    target: Tensor
    away: Tensor

    def of(self, edits: slice, count: int) -> dict[str, Tensor]:
        """What a later training rehearses of some edits: ``count`` surfaces and `_NEGATIVES_PER_KEY` times as many keys away of each."""
        rows = self.steps[:, edits].transpose(0, 1).flatten(1)[:, :count]  # the first that were drawn
        tensors = {"surfaces": self.surfaces[rows], "own": self.own[edits], "target": self.target[edits]}
        return {k: t.clone() for k, t in (tensors | {"away": self.away[edits, : OWN + _NEGATIVES_PER_KEY * count]}).items()}


def together(old: Mapping[str, Tensor], new: Keys, seed: int) -> Keys:
    """The kept keys of earlier edits (`Keys.of`) in front of those of new ones, drawn as often."""
    old = {k: t.to(new.own) for k, t in old.items()}
    edits, kept = old["surfaces"].shape[:2]
    steps, _, batch = new.steps.shape
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(kept, (steps, edits, batch), generator=g) + kept * torch.arange(edits)[:, None]
    width = new.away.shape[1]
    have = old["away"].shape[1]
    cycled = torch.cat([torch.arange(OWN), OWN + torch.arange(width - OWN) % max(1, have - OWN)]) if width else torch.arange(0)
    return Keys(
        torch.cat([old["surfaces"].flatten(0, 1), new.surfaces]),
        torch.cat([drawn.to(new.steps), new.steps + edits * kept], 1),
        torch.cat([old["own"], new.own]),
        torch.cat([old["target"], new.target]),
        torch.cat([old["away"][:, cycled], new.away]) if width else new.away.new_zeros(edits + len(new.own), 0, new.own.shape[1]),
    )


def initial(inner: int, rank: int, hidden: int, constant: bool, seed: int) -> dict[str, Tensor]:
    """As torch makes linear layers: A and the gate uniform in ±1/√(inputs); B = 0."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, of: int) -> Tensor:
        return ((2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1) / math.sqrt(of)).float()

    rank = 1 if constant else rank
    return {
        "a": uniform(rank, inner, of=inner), "b": torch.zeros(inner, rank),
        "w1": uniform(hidden, inner, of=inner), "b1": uniform(hidden, of=inner),
        "w2": uniform(hidden, of=hidden), "b2": uniform(1, of=hidden)[0],
    }  # fmt: skip


def projected(p: Mapping[str, Tensor], x: Tensor, constant: bool, mask: Tensor | None = None) -> Tensor:
    """B A (mask ∘ x), [U, M, I]; ‖x‖ B where it is ``constant``."""
    inner = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if constant else (x if mask is None else x * mask) @ p["a"].mT
    return inner @ p["b"].mT


def soft(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The gates' logits [U, M] of U adaptors, each at its own keys [U, M, I]."""
    return gate_logit({k: p[k].unsqueeze(1) for k in _GATE_PARAMS}, x).squeeze(-1)


def train(e: Any, keys: Keys, start: Mapping[str, Tensor], units: int, progress: Step | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """({name: [U, …]}, last loss [U]) of U = ``units`` adaptors, each for an equal share of the edits in their order."""
    at = 0

    def loss(p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal at
        total = _loss(e, keys, p, min(at, len(keys.steps) - 1), units)
        at += 1
        return total, total

    wide = {k: t.to(keys.own.dtype) for k, t in start.items()}
    idle = (("a",) if e.projection == "constant" else ()) + (() if e.gate else _GATE_PARAMS)  # what an ablation leaves out
    fitted = fit(
        {k: t for k, t in wide.items() if k not in idle},
        loss,
        steps=len(keys.steps),
        optimizer=AdamW(e.lr, e.weight_decay),
        progress=progress,
    )
    return wide | fitted.params, fitted.loss


def _loss(e: Any, keys: Keys, p: Mapping[str, Tensor], step: int, units: int) -> Tensor:
    """[U]: the loss of every adaptor at a step; U adaptors, each for n / U of the edits."""
    drawn, numbers = keys.steps[step], keys.own.shape[1]
    edits, batch = drawn.shape

    def grouped(values: Tensor) -> Tensor:
        """[n, m, ·] -> [U, n / U · m, ·]"""
        return values.reshape(units, edits // units * values.shape[1], *values.shape[2:])

    def each(values: Tensor) -> Tensor:
        """[n, I] -> one a surface, [U, n / U · m, I]"""
        return grouped(values.unsqueeze(1).expand(edits, batch, numbers))

    own = grouped(keys.own.unsqueeze(1))
    both = torch.cat([grouped(keys.surfaces[drawn]), own], 1)
    mask = _dropped(e.dropout, e.seed, step, both.shape[1], numbers).to(both) if e.dropout else None
    logit, seen = soft(p, both) if e.gate else None, edits // units * batch
    adapted = both + (1.0 if logit is None else logit.sigmoid().unsqueeze(-1)) * projected(p, both, e.projection == "constant", mask)
    surfaces = adapted[:, :seen]
    aligned = normalize(surfaces, dim=-1) if e.normalise else surfaces
    total = -e.aggregation * (aligned * each(keys.target)).sum(-1).mean(1)
    total = total + e.consistency * (adapted[:, seen:] - own).square().mean((1, 2))
    if e.match:
        goal = each(keys.own)
        total = total + e.match * ((surfaces - goal).square().sum(-1) / goal.square().sum(-1)).mean(1)
    if e.closing and logit is not None:
        some = torch.randint(OWN, keys.away.shape[1], (_NEGATIVES_PER_KEY * batch,), generator=_numbers(e.seed, step)).to(own.device)
        for shut in (keys.away[:, :OWN], keys.away[:, some]):
            total = total + e.closing * softplus(soft(p, grouped(shut))).mean(1)
        total = total + e.closing * softplus(-logit[:, :seen]).mean(1)
    out: Tensor = total
    return out


def _dropped(rate: float, seed: int, step: int, rows: int, width: int) -> Tensor:
    """[rows, width]: 0 where dropped, 1 / (1 − rate) elsewhere; the same for every adaptor, whatever else is in the batch."""
    return (torch.rand(rows, width, generator=_numbers(seed, step)) >= rate).float() / (1 - rate)


def _numbers(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
