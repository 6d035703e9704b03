"""WISE's side memories as an op: changes ΔW_i = W'_i − W of a linear, of which one or none acts on a row, by what each does to its prompt.

    o = y,   o'_i = y + ΔW_i x,   Δ_i = mean over the prompt's tokens of ‖σ(o) − σ(o'_i)‖₂
    memory i is open where Δ_i ≥ act_ratio · least_i;  of the open ones the one with the largest Δ_i acts, on every token of the text

σ is the model's hidden activation (the released code), or the identity: then Δ is the paper's ‖A(x)(W' − W)‖₂.  In a prompt of more than
``long`` tokens the largest token stands for the mean (released code).  No weight is read.

The released code asks anew at every call, of whatever text comes in: the whole prompt with a forced answer, or one token with a
cache.  A row can then change its mind in the middle of an answer, and a cached call differs from an uncached one.  Here the prompt
decides, once, so all of these agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.op_schema import OpSchema, Tensors, within
from errata.core.patch import Op, OpContext, Site
from errata.core.weights import RowGroups
from errata.errors import ConfigError, shortened

LONG = 100  # tokens of a prompt above which its largest token decides


def activation(name: str) -> Any:
    """An activation by its name in a model's config; "linear" is the identity."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def pack(where: Tensor, values: Tensor, size: int) -> dict[str, Tensor]:
    """Entries ``where`` [n] (rising) of ``size`` as ``values`` and int32 ``index`` or a bit mask ``bits``, whichever is smaller."""
    if 32 * len(where) <= size:
        return {"values": values, "index": where.to(torch.int32)}
    mask = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=where.device)
    mask[where] = 1
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=where.device)
    return {"values": values, "bits": (mask.view(-1, 8) * powers).sum(1, dtype=torch.uint8)}


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """``where`` [n] of what `pack` made."""
    if "index" in tensors:
        return tensors["index"].long()
    shifts = torch.arange(8, dtype=torch.uint8, device=tensors["bits"].device)
    return ((tensors["bits"][:, None] >> shifts) & 1).flatten().nonzero().squeeze(1)


def packed(tensors: Tensors, i: int) -> dict[str, Tensor]:
    """What `pack` made of memory ``i`` of an op."""
    return {name.rpartition(".")[0]: t for name, t in tensors.items() if name.endswith(f".{i}")}


@dataclass(frozen=True)
class _Settings:
    shape: tuple[int, ...]
    act: str
    act_ratio: float
    long: int

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ConfigError(f"setting.shape is [O, I], not {list(self.shape)}")
        if min(self.act_ratio, self.long) < 0:
            raise ConfigError("setting.act_ratio and setting.long must not be negative")
        try:
            activation(self.act)
        except KeyError:
            raise ConfigError(f"setting.act {shortened(self.act)} is no activation of transformers") from None


def _tensors(settings: _Settings, given: Tensors) -> dict[str, str]:
    size = settings.shape[0] * settings.shape[1]
    memories = len(given["least"]) if "least" in given and given["least"].ndim == 1 else 1
    said = {"least": "M"}
    for i in range(memories):
        where = {f"index.{i}": f"n{i}:int32"} if f"index.{i}" in given else {f"bits.{i}": f"{-(-size // 8)}:uint8"}
        said |= {f"values.{i}": f"n{i}*", **where}
    return said


def _numbers(settings: _Settings, tensors: Tensors) -> str | None:
    size = settings.shape[0] * settings.shape[1]
    for i in range(len(tensors["least"])):
        where = unpack(packed(tensors, i))
        if len(where) != len(tensors[f"values.{i}"]) or not within(where, 0, size) or not bool((where.diff() > 0).all()):
            return f"memory {i} does not say of each of its values which entry of the matrix it is"
    return None


def _fits(settings: _Settings, _: Tensors, site: tuple[int, int], __: Any) -> str | None:
    inner, outer = site
    return None if settings.shape == (outer, inner) else f"setting.shape {list(settings.shape)} is not the linear's {[outer, inner]}"


class SideMemory:
    """Registered as ``side_memory``.  An op's tensors: ``least`` [M], and ``values.i`` with ``index.i`` or ``bits.i`` of memory i (`pack`);
    settings: ``shape`` [O, I], ``act`` (a name), ``act_ratio``, ``long``.  A bank's: ``delta`` [P, M, O, I], ``least`` [P, M]."""

    schema = OpSchema(_tensors, _Settings, numbers=_numbers, on_model=_fits)
    stateful = True

    @staticmethod
    def non_causal(settings: Mapping[str, Any]) -> bool:
        return True

    @staticmethod
    def bank_key(op: Op) -> tuple[Any, ...]:
        return json.dumps(op.settings, sort_keys=True), str(op.tensors["least"].dtype)

    @staticmethod
    def stack_params(ops: Sequence[Op], device: torch.device) -> dict[str, Tensor]:
        """The changes written out; an op of fewer memories gets ones that never open."""
        most = max(len(op.tensors["least"]) for op in ops)
        outer, inner = ops[0].settings["shape"]
        dtype = ops[0].tensors["least"].dtype
        delta = torch.zeros((len(ops), most, outer * inner), dtype=dtype, device=device)
        least = torch.full((len(ops), most), torch.inf, dtype=dtype, device=device)
        for p, op in enumerate(ops):
            own = op.tensors["least"]
            least[p, : len(own)] = own.to(device)
            for i in range(len(own)):
                tensors = {name: t.to(device) for name, t in packed(op.tensors, i).items()}
                delta[p, i, unpack(tensors)] = tensors["values"]
        return {"delta": delta.view(len(ops), most, outer, inner), "least": least}

    @staticmethod
    def reads_prompt_end(settings: Mapping[str, Any]) -> bool:
        return True

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        name, delta = f"memory {site.block} {site.point}", p["delta"]

        def moved(i: int) -> Tensor:
            own = delta[0, i] if len(delta) == 1 else delta[:, i]
            return x.to(delta.dtype) @ own.mT

        if context.is_prefill:
            out, chosen = _routed(p["least"], settings, moved, y, context)
            context.save_decision(name, chosen)
            return out
        chosen, out = context.load_decision(name), y
        for i in chosen.unique().tolist():
            if i >= 0:
                out = torch.where((chosen == i)[:, None, None], y + moved(int(i)).to(y.dtype), out)
        return out

    @staticmethod
    def apply_grouped(
        p: Mapping[str, Tensor], groups: RowGroups, settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext
    ) -> Tensor:
        parts = [
            SideMemory.apply({k: t[e : e + 1] for k, t in p.items()}, settings, x[rows], y[rows], site, context.select(rows))
            for e, rows in zip(groups.entries, torch.split(groups.order, list(groups.counts)), strict=True)
        ]
        return y.index_copy(0, groups.order, torch.cat(parts))


def _routed(least: Tensor, settings: Mapping[str, Any], moved: Any, y: Tensor, context: OpContext) -> tuple[Tensor, Tensor]:
    """(the site's output, the number of the memory that acts on each row or -1 [B])."""
    sigma, wide = activation(settings["act"]), torch.promote_types(least.dtype, y.dtype)
    prompt = (context.position >= 0) & (context.position < context.prompt_lengths[:, None])
    before, o = sigma(y.to(wide)), y.to(wide)
    top = torch.full((len(y),), -torch.inf, dtype=wide, device=y.device)
    out, chosen, text = y, torch.full_like(top, -1), (context.position >= 0).unsqueeze(-1)  # not what stands in front
    for i in range(least.shape[1]):
        added = moved(i)
        size = torch.linalg.vector_norm(sigma(o + added) - before, dim=-1) * prompt
        delta = torch.where(prompt.sum(1) > settings["long"], size.amax(1), size.sum(1) / prompt.sum(1).clamp_min(1))
        best = (delta >= least[:, i] * settings["act_ratio"]) & (delta > top)
        out = torch.where(best[:, None, None] & text, y + added.to(y.dtype), out)
        chosen, top = torch.where(best, i, chosen), torch.where(best, delta, top)
    return out, chosen


class OutputShift:
    """Registered as ``moved``: adds ``by`` [B, A, O] to the last A tokens.  What a side memory in training does, computed outside.

    With ``start`` [B] the A tokens from that position on, as the caller counts: where context stands in front, BOS is not beside the rest.
    """

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        by = p["by"].to(y.dtype)
        if "start" in p:
            number = context.position - p["start"][:, None]
            here = (context.position >= 0) & (number >= 0) & (number < by.shape[1])
            own = by.gather(1, number.clamp(0, by.shape[1] - 1).unsqueeze(-1).expand(-1, -1, by.shape[2]))
            return y + own * here.unsqueeze(-1)
        rest = y.shape[1] - by.shape[1]
        return y + by if rest == 0 else torch.cat([y[:, :rest], y[:, rest:] + by], 1)
