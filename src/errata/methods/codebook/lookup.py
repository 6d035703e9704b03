"""The look-up that GRACE and MELO share: the nearest of N keys with radii, for all rows of a batch, and what it found kept for the text.

    query q = what a linear reads at the last prompt token;   j = nearest key (Euclidean);   hit where ‖q − κ_j‖ ≤ ε_j + r ‖q‖

The small term with r (`rounding`) is ours: the same prompt in another batch gives a query that differs in its last bits, and the edge of a
radius often lies exactly on one (a key that was added by rule, a radius that was widened to it).  r = 0 is the published comparison.

Source: GRACE (Hartvigsen et al., NeurIPS 2023) §3, MELO (Yu et al., AAAI 2024), and their released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from errata.core.patch import OpContext
from errata.core.weights import RowGroups

FEW = 64  # keys that are compared one by one
_CANDIDATES = 8  # of a coarse look-up

Look = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def rounding_of(dtype: torch.dtype) -> float:
    """How far rounding may move a query, as a share of its norm.  Between a prompt alone and in a padded batch 16 eps were seen
    in float32 and 1 eps in bfloat16 (almanac, block 6 of 8, and twelve tiny families); four times that."""
    return torch.finfo(dtype).eps * (4 if torch.finfo(dtype).bits < 32 else 64)


def nearest(keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """(distance [B], number [B]) of the key nearest to each query [B, I]; infinity and -1 where there is none.

    keys [N, I], or [B, N, I] where each query has its own.
    """
    if keys.shape[-2] == 0:
        return query.new_full((len(query),), torch.inf), torch.full((len(query),), -1, dtype=torch.long, device=query.device)
    if keys.ndim == 3:
        distance, number = torch.linalg.vector_norm(query[:, None] - keys, dim=-1).min(1)
        return distance, number
    return _coarse(keys, query) if len(keys) > FEW and len(query) > 1 else _all(keys, query)


def _all(keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """By differences, never by ‖q‖² − 2 q·κ + ‖κ‖²: at norms of 1,000 that leaves nothing of a distance of 1 in float32."""
    if torch.finfo(keys.dtype).bits < 32:  # torch has no such kernel for them
        query, keys = query.float(), keys.float()
    distance, number = torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return distance, number


def _coarse(keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The same answer, ten times as fast for many rows: a product finds candidates, differences decide between them.

    score = ½‖κ‖² − q·κ = ½ρ² − ½‖q‖².  A row is done when the last candidate's score, less what rounding can have done to a score
    (γ (½‖κ‖² + ‖q‖‖κ‖), γ = I·eps), is still above the best candidate's; the others are compared with every key.
    """
    half, size = torch.linalg.vector_norm(keys, dim=1).square() / 2, torch.linalg.vector_norm(query, dim=1)
    last, number = (half - query @ keys.T).topk(min(_CANDIDATES, len(keys)), 1, largest=False)
    number = number.sort(1)[0]  # of equal distances the first key counts
    distance, place = torch.linalg.vector_norm(query[:, None] - keys[number], dim=-1).min(1)
    number = number.gather(1, place[:, None])[:, 0]
    most = half.max()
    error = keys.shape[1] * torch.finfo(keys.dtype).eps * (2 * most + size * (2 * most).sqrt() + size.square())
    unsure = (last[:, -1] - error <= (distance.square() - size.square()) / 2).nonzero()[:, 0]
    if len(unsure):
        again = _all(keys, query[unsure])
        distance, number = distance.index_copy(0, unsure, again[0]), number.index_copy(0, unsure, again[1])
    return distance, number


def nearest_within_radius(keys: Tensor, radii: Tensor, query: Tensor, rounding: float) -> Tensor:
    """[B]: number of the nearest key where the query is within its radius, else -1; shapes as in `nearest`."""
    distance, number = nearest(keys, query)
    if not keys.shape[-2]:
        return number
    at = number.clamp_min(0)
    reach = radii[at] if radii.ndim == 1 else radii.gather(1, at[:, None])[:, 0]
    reach = reach + rounding * torch.linalg.vector_norm(query, dim=1)
    return torch.where(distance <= reach, number, -1)


def entries_of(p: Tensor, groups: RowGroups | None, rows: int) -> Tensor:
    """[rows]: the bank entry of each row, -1 where it has none.  ``p``: any parameter, with the leading axis of 1, B or (with groups) P."""
    if groups is None:
        return torch.zeros(rows, dtype=torch.long, device=p.device) if len(p) == 1 else torch.arange(rows, device=p.device)
    own = torch.full((rows,), -1, dtype=torch.long, device=p.device)
    number = torch.tensor(groups.entries, device=p.device).repeat_interleave(torch.tensor(groups.counts, device=p.device))
    return own.index_copy(0, groups.order, number)


@torch.no_grad()
def lookup_at_prompt_end(p: Mapping[str, Tensor], own: Tensor, grouped: bool, read_from: Tensor, context: OpContext, look: Look) -> Tensor:
    """[B]: what ``look`` finds for the rows whose prompt ends in this chunk, -1 for the others.

    p: the parameters the look-up needs; own: `entries_of`; read_from [B, T, I]: where queries are read.  All queries of one book are looked
    up together; ``grouped`` books are shared by several rows each, others are given to ``look`` with an axis for the row.
    """
    found = torch.full((len(read_from),), -1, dtype=torch.long, device=read_from.device)
    end = (context.position >= 0) & (context.position == context.prompt_lengths[:, None] - 1) & (own >= 0)[:, None]
    rows, at = end.nonzero().unbind(1)
    if not len(rows):
        return found
    some = next(t for t in p.values() if t.is_floating_point())
    query = read_from[rows, at].to(some.dtype)
    if grouped or len(some) == 1:
        for entry in own[rows].unique().tolist() if grouped else [0]:
            mine = own[rows] == entry
            found[rows[mine]] = look({k: t[entry] for k, t in p.items()}, query[mine])
    else:
        found[rows] = look({k: t[own[rows]] for k, t in p.items()}, query)
    return found


def remembered(name: str, found: Tensor, own: Tensor, context: OpContext) -> Tensor:
    """[B]: the decision of this text: ``found``, kept for later sites and chunks, where the text begins here; else what was kept."""
    mine = (own >= 0).nonzero()[:, 0]
    part = context if len(mine) == len(own) else context.select(mine)
    if context.is_prefill:
        part.save_decision(name, found[mine])
        return found
    return torch.full_like(found, -1).index_copy(0, mine, part.load_decision(name))
