"""What WISE keeps over a run of edits: memories, which entries of W each may change, when one is closed, when some are merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.core.patch import Op, Site
from errata.errors import ConfigError
from errata.methods.wise.op import LONG, pack, packed, unpack


def ties(deltas: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """TIES-merging (Yadav et al., NeurIPS 2023) of changes [n, N] as one [N]: trim, elect a sign, merge what agrees.

    trim    the ``density`` N entries of largest size of each change are kept
    elect   s = sign of Σ_i w_i δ_i  (+ where that is 0)
    merge   Σ w_i δ_i / Σ w_i over the i whose trimmed entry has the sign s; 0 where none has
    """
    if not 0 < density <= 1 or len(weights) != len(deltas) or min(weights) <= 0:
        raise ConfigError(f"ties: needs a density in (0, 1] and a positive weight for each of {len(deltas)} changes")
    kept = torch.zeros_like(deltas)
    places = deltas.abs().topk(max(1, int(density * deltas.shape[1])), dim=1).indices
    kept.scatter_(1, places, deltas.gather(1, places))
    share = torch.tensor(list(weights), dtype=deltas.dtype, device=deltas.device)[:, None]
    sign = torch.where((kept * share).sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == sign
    total = (agrees * share).sum(0)
    return (agrees * kept * share).sum(0) / torch.where(total > 0, total, 1.0)


def entries(size: int, ratio: float, pool: float, seed: int, number: int) -> Tensor:
    """The entries of W (flat, rising) that mask ``number`` lets change: Bernoulli(``ratio``), within a fixed random ``pool`` of them all.

    The pool depends on the seed alone and has round(pool · size) entries.
    """
    own = torch.arange(size)
    if pool < 1:
        own = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: round(pool * size)].sort().values
    if ratio < 1:
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + number)
        own = own[torch.rand(len(own), generator=generator) < ratio]
    if not len(own):
        raise ConfigError(f"wise: mask_ratio {ratio} of pool {pool} leaves none of {size} weights to change; raise them")
    return own


@dataclass(frozen=True)
class Memory:
    """ΔW at entries ``where`` [n] of the flat matrix, and the least Δ that its edits had."""

    where: Tensor
    values: Tensor
    min_activation: float


@dataclass(frozen=True)
class Memories:
    """All memories after ``edits`` edits.  The last one is still open unless ``edits`` is a multiple of ``save_freq``.

    plan: the editor, for mask_ratio, pool, seed, save_freq, merge_freq, retrieve, densities, old_weight
    """

    editor: Any
    size: int
    stored: tuple[Memory, ...] = ()
    edits: int = 0

    def begin(self, device: torch.device, dtype: torch.dtype) -> Memory:
        """What the next edit goes on from: the open memory, or an empty one with a new mask."""
        if self.edits % self.editor.save_freq:
            last = self.stored[-1]
            return replace(last, where=last.where.to(device), values=last.values.to(device, dtype))
        where = entries(self.size, self.editor.mask_ratio, self.editor.pool, self.editor.seed, self.edits // self.editor.save_freq)
        return Memory(where.to(device), torch.zeros(len(where), device=device, dtype=dtype), math.inf)

    def after(self, edited: Memory, act: float) -> Memories:
        """One more edit, which left the memory `begin` gave as ``edited`` and had ``act`` as its Δ."""
        closed = self.stored[:-1] if self.edits % self.editor.save_freq else self.stored
        kept = (*closed, replace(edited, min_activation=min(edited.min_activation, act)))
        if not self.editor.retrieve:  # one minimum over all edits
            kept = tuple(replace(m, min_activation=min(k.min_activation for k in kept)) for m in kept)
        edits, many = self.edits + 1, self.editor.merge_freq // self.editor.save_freq
        if edits % self.editor.merge_freq == 0 and (many > 1 or not self.editor.retrieve):
            older, new = kept[:-many], kept[-many:]
            if self.editor.retrieve:
                kept = (*older, self._merged(new, [1.0] * many))
            elif older:
                kept = (self._merged((*new, *older), [(1 - self.editor.old_weight) / many] * many + [self.editor.old_weight]),)
            else:
                kept = (self._merged(new, [1.0] * many),)
        return replace(self, stored=kept, edits=edits)

    def _merged(self, group: Sequence[Memory], weights: Sequence[float]) -> Memory:
        full = torch.zeros((len(group), self.size), dtype=group[0].values.dtype, device=group[0].values.device)
        for row, memory in zip(full, group, strict=True):
            row[memory.where] = memory.values
        one = ties(full, weights, self.editor.densities)
        where = one.nonzero().squeeze(1)
        return Memory(where, one[where], min(m.min_activation for m in group))

    def op(self, site: Site, shape: tuple[int, int], act: str) -> Op:
        """As an op; the open memory is stored with all of its mask."""
        tensors = {
            "least": torch.tensor(
                [m.min_activation for m in self.stored], dtype=self.stored[0].values.dtype, device=self.stored[0].values.device
            )
        }
        for i, memory in enumerate(self.stored):
            tensors |= {f"{name}.{i}": t for name, t in pack(memory.where, memory.values, self.size).items()}
        settings = {"shape": list(shape), "act": act, "act_ratio": self.editor.act_ratio, "long": LONG}
        return Op("side_memory", site, tensors, settings)

    def resumed(self, op: Op, edits: int) -> Memories:
        """From an op that `op` made after ``edits`` edits."""
        least = op.tensors["least"].tolist()
        found = [packed(op.tensors, i) for i in range(len(least))]
        kept = tuple(Memory(unpack(own), own["values"], low) for own, low in zip(found, least, strict=True))
        return replace(self, stored=kept, edits=edits)
