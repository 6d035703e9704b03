"""The ops of GRACE and MELO: what is stored answers where the prompt's key is near, and is silent elsewhere.

    codebook   j = nearest key;  where ‖q − κ_j‖ ≤ ε_j the linear's output is ν_j at the replaced positions;  else y, bit for bit (GRACE)
    router     c = nearest centre;  none where ‖q − centre_c‖ > radius_c;  else the block of the point of cluster c nearest to q (MELO)
    routed     y + s up_b (s down_b x)  at every token of a row with block b;  y, bit for bit, where the router chose none (MELO)

The ops of one patch find each other by the patch's place in the stack (`ForwardContext.save_decision`), so patches do not read each other's
choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from errata.core.op_schema import OpSchema, Tensors, within
from errata.core.patch import Op, OpContext, Site
from errata.core.weights import RowGroups
from errata.errors import ConfigError
from errata.methods.codebook.lookup import entries_of, lookup_at_prompt_end, nearest_within_radius, remembered

Params: TypeAlias = Mapping[str, Tensor]
AT_ONCE = 1 << 24  # numbers of points that are compared at once
INDEX = ("centres", "radii", "points", "cluster", "block")


def route(book: Mapping[str, Tensor], query: Tensor, rounding: float) -> Tensor:
    """[B]: the block for each query [B, I], -1 for none; the book's tensors with or without an axis for the row.  A cluster may have
    lost all its points (they were outside when it shrank): its queries get none."""
    chosen = nearest_within_radius(book["centres"], book["radii"], query, rounding)
    out = torch.full_like(chosen, -1)
    if book["points"].ndim == 3:
        apart = torch.linalg.vector_norm(query[:, None] - book["points"], dim=-1)
        apart = apart.masked_fill(book["cluster"] != chosen[:, None], torch.inf)
        if apart.shape[1]:
            distance, point = apart.min(1)
            out = torch.where(distance.isinf(), out, book["block"].gather(1, point[:, None])[:, 0])
        return out
    first, end = (torch.searchsorted(book["cluster"], chosen, right=side) for side in (False, True))  # points lie cluster by cluster
    rows = (end > first).nonzero()[:, 0]
    if not len(rows):
        return out
    widest = int((end - first).max())
    for part in rows.split(max(1, AT_ONCE // (widest * query.shape[1]))):
        index = first[part, None] + torch.arange(widest, device=query.device)
        apart = torch.linalg.vector_norm(query[part, None] - book["points"][index.clamp_max(len(book["points"]) - 1)], dim=-1)
        apart = apart.masked_fill(index >= end[part, None], torch.inf)
        out[part] = book["block"][index.gather(1, apart.argmin(1)[:, None])[:, 0]]
    return out


def _not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ConfigError(f"setting.{name} must not be negative, not {value:g}")


@dataclass(frozen=True)
class _CodebookSettings:
    replace: Literal["last", "prompt", "all"]
    rounding: float

    def __post_init__(self) -> None:
        _not_negative("rounding", self.rounding)


@dataclass(frozen=True)
class _RouterSettings:
    reads: Literal["input", "output"]
    rounding: float

    def __post_init__(self) -> None:
        _not_negative("rounding", self.rounding)


@dataclass(frozen=True)
class _RoutedSettings:
    scale: float


def _router_tensors(settings: _RouterSettings, _: Tensors) -> dict[str, str]:
    own = "I" if settings.reads == "input" else "O"
    return {"centres": f"C {own}", "radii": "C", "points": f"M* {own}", "cluster": "M*:int64", "block": "M*:int64"}


def _router_numbers(_: _RouterSettings, tensors: Tensors) -> str | None:
    cluster = tensors["cluster"]
    if not within(cluster, 0, len(tensors["radii"])) or not bool((cluster.diff() >= 0).all()):
        return "tensor 'cluster' must rise and name clusters"
    return None if within(tensors["block"], 0, 1 << 31) else "tensor 'block' must number blocks"


def _has_router(op: Op, ops: Sequence[Op]) -> str | None:
    routers = [other for other in ops if other.kind == "router"]
    if len(routers) != 1 or routers[0].site.block >= op.site.block:
        return "it needs one router in its patch, at a lower block"
    end = len(op.tensors["up"])
    return None if within(routers[0].tensors["block"], 0, end) else f"its router names blocks that it does not hold; it has {end}"


class _Call(NamedTuple):
    """What a site is given in one forward pass."""

    x: Tensor
    y: Tensor
    site: Site
    context: OpContext


class _Stored(ABC):
    """A kind that looks entries up, or acts by what was looked up: ``_run`` does it for rows that share stores (``groups``) and for rows
    with parameters of their own (None)."""

    stateful = True

    @classmethod
    def apply(cls, p: Params, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        return cls._run(p, None, settings, _Call(x, y, site, context))

    @classmethod
    def apply_grouped(
        cls, p: Params, groups: RowGroups, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext
    ) -> Tensor:
        return cls._run(p, groups, settings, _Call(x, y, site, context))

    @staticmethod
    def reads_prompt_end(settings: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    @abstractmethod
    def _run(cls, p: Params, groups: RowGroups | None, settings: Mapping[str, Any], call: _Call) -> Tensor:
        """The site's new output; ``p`` [1 or B, …], or [P, …] with groups."""


class Codebook(_Stored):
    """Registered as ``codebook``: keys [N, I], values [N, O], radii [N]; settings ``replace`` and ``rounding``."""

    schema = OpSchema({"keys": "N I", "values": "N O", "radii": "N"}, _CodebookSettings, mixed=True)

    @staticmethod
    def non_causal(settings: Mapping[str, Any]) -> bool:
        return bool(settings["replace"] != "last")

    @classmethod
    def _run(cls, p: Params, groups: RowGroups | None, settings: Mapping[str, Any], call: _Call) -> Tensor:
        x, y, site, context = call
        own = entries_of(p["values"], groups, len(x))
        index = {k: p[k] for k in ("keys", "radii")}
        entry = lookup_at_prompt_end(
            index, own, groups is not None, x, context, lambda b, q: nearest_within_radius(b["keys"], b["radii"], q, settings["rounding"])
        )
        end = context.prompt_lengths[:, None] - 1
        if settings["replace"] == "all":
            entry, where = remembered("entry", entry, own, context), context.position >= 0
        else:
            where = context.position == end if settings["replace"] == "last" else context.position < end
        where = where & (context.position >= 0) & (entry >= 0)[:, None]
        context.record(site, "entry", torch.where(where, entry[:, None], -1))
        rows, at = where.nonzero().unbind(1)
        return y.index_put((rows, at), p["values"][own[rows], entry[rows]].to(y.dtype))


class Router(_Stored):
    """Registered as ``router``: centres [C, I], radii [C], points [M, I], cluster [M] and block [M] of each point; changes nothing itself.

    Settings: ``reads`` "input" or "output" of the linear, ``rounding``.
    """

    schema = OpSchema(_router_tensors, _RouterSettings, mixed=True, numbers=_router_numbers)

    @staticmethod
    def non_causal(settings: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def _run(cls, p: Params, groups: RowGroups | None, settings: Mapping[str, Any], call: _Call) -> Tensor:
        x, y, site, context = call
        own = entries_of(p["radii"], groups, len(x))
        book = {k: p[k] for k in INDEX}
        read_from = x if settings["reads"] == "input" else y
        found = lookup_at_prompt_end(book, own, groups is not None, read_from, context, lambda b, q: route(b, q, settings["rounding"]))
        block = remembered("block", found, own, context)
        context.record(site, "block", torch.where(context.position >= 0, block[:, None], -1))
        return y


class Routed(_Stored):
    """Registered as ``routed``: blocks down [N, R, I] and up [N, O, R]; setting ``scale``: s, by which both are multiplied."""

    schema = OpSchema({"down": "N R I", "up": "N O R"}, _RoutedSettings, beside=_has_router)

    @staticmethod
    def non_causal(settings: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def _run(cls, p: Params, groups: RowGroups | None, settings: Mapping[str, Any], call: _Call) -> Tensor:
        x, y, _, context = call
        own = entries_of(p["up"], groups, len(x))
        block = context.load_decision("block")
        rows = ((block >= 0) & (own >= 0)).nonzero()[:, 0]
        if not len(rows):
            return y
        down, up = (settings["scale"] * p[k][own[rows], block[rows]] for k in ("down", "up"))
        added = (x[rows].to(down.dtype) @ down.mT) @ up.mT
        return y.index_add(0, rows, added.to(y.dtype))
