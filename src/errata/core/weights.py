"""Weight-like ops: what is a change of a linear's weights, ΔW [O, I], computed beside it.

    low_rank   ΔW = up down          down [R, I], up [O, R]
    dense      ΔW = weight           weight [O, I]

They read the linear's input and add to its output, so those at one linear commute and add up: a thousand of them are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from errata import registry
from errata.core.op_schema import OpSchema
from errata.core.patch import WEIGHT_LIKE, Op, OpContext, Patch, Site, weight_like
from errata.errors import PatchError


@dataclass(frozen=True)
class RowGroups:
    """Rows of a batch sorted by the bank entry they run under.

    order [n] rows that have an entry, those of one entry side by side; entries: the distinct entries; counts: rows of each.
    """

    order: Tensor
    entries: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor) -> RowGroups:
        """From ``rows`` [B], -1 where a row has no entry."""
        order = torch.argsort(rows, stable=True)
        order = order[rows[order] >= 0]
        entries, counts = torch.unique_consecutive(rows[order], return_counts=True)
        return cls(order, tuple(entries.tolist()), tuple(counts.tolist()))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x`` [B, …] as one block of rows an entry."""
        return torch.split(x[self.order], list(self.counts))


def _alone(t: Tensor) -> Tensor:
    """A bank of one as a plain matrix: one product over all tokens in place of one a row."""
    return t[0] if t.shape[0] == 1 else t


class LowRank:
    """Beside a linear: ``y + up (down x)``; ``down`` [R, I], ``up`` [O, R], at every token."""

    schema = OpSchema({"down": "R I", "up": "O R"})

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        inner = x.to(p["down"].dtype) @ _alone(p["down"]).mT
        return y + (inner @ _alone(p["up"]).mT).to(y.dtype)

    @staticmethod
    def apply_grouped(
        p: Mapping[str, Tensor], groups: RowGroups, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext
    ) -> Tensor:
        parts = zip(groups.split(x.to(p["down"].dtype)), groups.entries, strict=True)
        down, up = p["down"].unbind(), p["up"].unbind()  # on the way back one stack; a bank of zeros an entry if each were indexed
        added = torch.cat([(part @ down[e].mT) @ up[e].mT for part, e in parts])
        return y.index_add(0, groups.order, added.to(y.dtype))


class Dense:
    """Beside a linear: ``y + weight x``; ``weight`` [O, I], at every token."""

    schema = OpSchema({"weight": "O I"})

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        return y + (x.to(p["weight"].dtype) @ _alone(p["weight"]).mT).to(y.dtype)

    @staticmethod
    def apply_grouped(
        p: Mapping[str, Tensor], groups: RowGroups, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext
    ) -> Tensor:
        parts = zip(groups.split(x.to(p["weight"].dtype)), groups.entries, strict=True)
        weight = p["weight"].unbind()
        added = torch.cat([part @ weight[e].mT for part, e in parts])
        return y.index_add(0, groups.order, added.to(y.dtype))


def sizes(op: Op) -> tuple[int, int, int]:
    """(rank, input size, output size) of a weight-like op; a dense one has rank 0.  `PatchError` when its tensors do not fit."""
    t = op.tensors
    if op.kind == "dense" and t["weight"].ndim == 2:
        return 0, int(t["weight"].shape[1]), int(t["weight"].shape[0])
    if op.kind == "low_rank" and t["down"].ndim == t["up"].ndim == 2 and t["down"].shape[0] == t["up"].shape[1]:
        return int(t["down"].shape[0]), int(t["down"].shape[1]), int(t["up"].shape[0])
    raise PatchError(f"a {op.kind} op at {op.site} has tensors of shapes {[tuple(v.shape) for v in t.values()]}; make the edit again")


def sum_ops(ops: Sequence[Op], device: torch.device | None = None) -> Op:
    """The weight-like ops of one linear as one op.  A single op is handed back as it is.

    Factors are concatenated (exact) while that holds no more numbers than the matrix, R (I + O) <= I O; else, or with a dense op
    among them, the sum is a dense op, in float32 or wider.  ``device``: where to compute and keep it.
    """
    if len(ops) == 1:
        return ops[0]
    shapes = [sizes(op) for op in ops]
    if len({shape[1:] for shape in shapes}) != 1:
        raise PatchError(
            f"patches differ in the size of the linear at {ops[0].site}: {sorted({s[1:] for s in shapes})}; make the edits again"
        )
    rank, (_, inner, outer) = sum(r for r, _, _ in shapes), shapes[0]
    low = [op for op in ops if op.kind == "low_rank"]
    factors = {name: torch.cat([op.tensors[name].to(device) for op in low], axis) for name, axis in (("down", 0), ("up", 1)) if low}
    if len(low) == len(ops) and rank * (inner + outer) <= inner * outer:
        return Op("low_rank", ops[0].site, factors)
    wide = torch.float32
    for t in chain.from_iterable(op.tensors.values() for op in ops):
        wide = torch.promote_types(wide, t.dtype)
    weight = factors["up"].to(wide) @ factors["down"].to(wide) if low else None
    for op in ops:
        if op.kind == "dense":
            more = op.tensors["weight"].to(device, wide)
            weight = more if weight is None else weight + more
    assert weight is not None
    return Op("dense", ops[0].site, {"weight": weight})


def fuse_additive(ops: Sequence[tuple[Op, int]], device: torch.device, made: dict[tuple[int, ...], Op]) -> list[tuple[Op, int]]:
    """(op, place of its patch) pairs of one site with each run of ops that only add to y as one op a kind: those read x alone, so their
    order does not matter.  Weight-like ops are added up (`sum_ops`); so are those of a kind with ``additive`` (`errata.core.patch.Kind`).
    An op between them may read y.

    ``made`` holds what was put together, so that equal stacks share it.
    """
    out: list[tuple[Op, int]] = []
    for adds, run in groupby(ops, lambda placed: _adds(placed[0].kind)):
        members = list(run)
        if adds and len(members) > 1:
            alike: dict[Any, list[Op]] = {}
            for op, _ in members:
                alike.setdefault(None if op.kind in WEIGHT_LIKE else registry.get("op", op.kind).fuse_key(op), []).append(op)
            members = [(_joined(own, device, made), 0) for own in alike.values()]
        out += members
    return out


def _adds(kind: str) -> bool:
    return kind in WEIGHT_LIKE or getattr(registry.get("op", kind), "additive", False)


def _joined(ops: list[Op], device: torch.device, made: dict[tuple[int, ...], Op]) -> Op:
    key = tuple(map(id, ops))
    if key not in made:
        weights = ops[0].kind in WEIGHT_LIKE
        made[key] = sum_ops(ops, device) if weights else registry.get("op", ops[0].kind).fuse(ops, device)
    return made[key]


def delta_weight(op: Op) -> Tensor:
    """ΔW [O, I] in float64, on the CPU (not every device has float64)."""
    t = {name: v.detach().cpu().double() for name, v in op.tensors.items()}
    return t["weight"] if op.kind == "dense" else t["up"] @ t["down"]


def spectrum(op: Op) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (U [O, k], s [k], Vᵀ [k, I]) of ΔW in float64; of factors by two QRs and a small core, without forming ΔW."""
    rank, inner, outer = sizes(op)
    if op.kind == "dense" or rank >= min(inner, outer):
        left, values, right = torch.linalg.svd(delta_weight(op), full_matrices=False)
        return left, values, right
    up, down = (op.tensors[name].detach().cpu().double() for name in ("up", "down"))
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT)
    return q_up @ left, values, right @ q_down.mT


def rank_of(values: Tensor, tolerance: float) -> int:
    """Singular values above ``tolerance`` times the largest; at least 1."""
    return max(1, int((values > values[0] * tolerance).sum()))


def low_rank(site: Site, left: Tensor, values: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> Op:
    """The first ``rank`` terms of an SVD as a low-rank op, the scale shared evenly between the factors."""
    root = values[:rank].sqrt()
    tensors = {"down": root[:, None] * right[:rank], "up": left[:, :rank] * root}
    return Op("low_rank", site, {name: t.to(dtype).contiguous() for name, t in tensors.items()})


def compact(op: Op) -> Op:
    """The same ΔW in the fewest numbers, computed in float64 and rounded to the op's dtype: fewer factors where some depend on others,
    a dense op where no factorisation is smaller, the op itself where there is nothing to save.

    (A factorisation of full rank k = min(O, I) never pays: k (I + O) = I O + k² > I O.)
    """
    rank, inner, outer = sizes(op)
    if op.kind != "low_rank" or rank == 1:
        return op
    dtype = op.tensors["up"].dtype
    left, values, right = spectrum(op)
    true = rank_of(values, max(inner, outer) * torch.finfo(torch.float64).eps)
    if min(true, rank) * (inner + outer) > inner * outer:
        return Op("dense", op.site, {"weight": delta_weight(op).to(dtype)})
    return op if true >= rank else low_rank(op.site, left, values, right, true, dtype)


def merge(patches: tuple[Patch, ...]) -> Patch:
    """Weight-like patches of one base as one, with one op a site (see `sum_ops`); logits as under the stack.

    It replaces them, and what they replaced.
    """
    gone = tuple(old for p in patches for old in p.replaces)
    patches = tuple(p for p in patches if p.id not in gone)
    if not patches or len({p.base for p in patches}) != 1:
        raise PatchError("merge needs at least one patch, all for the same base")
    sites: dict[Site, list[Op]] = {}
    for op in (op for p in patches for op in weight_like(p)):
        sites.setdefault(op.site, []).append(op)
    requests = tuple(r for p in patches for r in p.requests)
    method = "+".join(dict.fromkeys(p.method for p in patches))
    ops = tuple(sum_ops(sites[site]) for site in sorted(sites))
    return Patch(method, {}, patches[0].base, requests, ops, replaces=tuple(dict.fromkeys((*gone, *(p.id for p in patches)))))


def padded(op: Op, rank: int) -> Op:
    """A low-rank op with zero factors added up to ``rank``: the same ΔW."""
    more = rank - sizes(op)[0]
    if not more:
        return op
    pad = torch.nn.functional.pad
    return dataclasses.replace(op, tensors={"down": pad(op.tensors["down"], (0, 0, 0, more)), "up": pad(op.tensors["up"], (0, more))})
