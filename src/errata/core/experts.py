"""Fused experts of a mixture (one 3-D weight for all) as one linear, with a site of its own kind.

    y = Σ_j g_j W_j k_j = [W_1 … W_E] κ        κ = (g_1 k_1, …, g_E k_E) in R^(E·I)

k_j [I] is what expert j's last matrix reads, g_j its gate, 0 where the router does not choose it.  So a key of the mixture is sparse, and a
change of all experts' last matrices is one low-rank change of a wide linear.  Source of the per-expert keys and gates: MoEEdit (ICLR 2026).

Experts hand nobody their k_j, so these are computed again from what the experts were given: the first matrices of the experts are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from errata.core.families import by_row
from errata.core.op_schema import OpSchema, within
from errata.core.patch import Op, OpContext, Site
from errata.errors import ModelError

POINT = "experts"
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")  # of transformers' fused experts


def sizes(module: Any) -> tuple[int, int, int]:
    """(experts, input size, output size) of their last matrices; `ModelError` for experts of another layout."""
    first = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
    fused = all(hasattr(module, name) for name in _LAYOUT) and module.down_proj.ndim == 3 and isinstance(first, Tensor)
    if not fused or first is None or not first.is_floating_point() or module.has_post_expert_norm or module._is_expert_parallel:
        raise ModelError(
            f"{type(module).__name__} does not keep its experts in plain 3-D weights on one device, so they cannot be edited one by one; "
            "edit another part"
        )
    count, a, b = module.down_proj.shape
    return (count, a, b) if module.is_transposed else (count, b, a)


@dataclass(frozen=True)
class ExpertInputs:
    """What the experts of one block are given: hidden [B, T, D], and the experts [B, T, k] of each token with their gates [B, T, k]."""

    module: Any
    hidden: Tensor
    index: Tensor
    gates: Tensor

    @classmethod
    def of(cls, module: Any, args: Sequence[Tensor], rows: int, tokens: int | None, site: Site) -> ExpertInputs:
        """From the arguments of the experts' forward."""
        sizes(module)
        if len(args) != 3 or args[1].is_floating_point():
            raise ModelError(f"block {site.block}: {type(module).__name__} is not given tokens, experts and gates; edit another part")
        return cls(module, *(by_row(t, rows, tokens, site) for t in args))

    def __getitem__(self, where: Any) -> Any:
        """Of some rows [b]; or κ [n, E·I] of n tokens, by (row [n], place [n])."""
        own = ExpertInputs(self.module, self.hidden[where], self.index[where], self.gates[where])
        if not isinstance(where, tuple):
            return own
        count, inner, _ = sizes(self.module)
        out = self.hidden.new_zeros(len(own.hidden), count, inner)
        for expert, tokens, keys in own.served():
            out[tokens, expert] = keys
        return out.flatten(1)

    def served(self, experts: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert j, the tokens [n] that it serves, counted over all rows, g_j k_j [n, I]) of these experts (None: all), as they occur."""
        hidden, m = self.hidden.reshape(-1, self.hidden.shape[-1]), self.module
        index, gates = self.index.reshape(-1, self.index.shape[-1]), self.gates.reshape(-1, self.gates.shape[-1])
        weight, bias = ("gate_up_proj", "gate_up_proj_bias") if m.has_gate else ("up_proj", "up_proj_bias")
        for expert in index.unique().tolist() if experts is None else experts:
            tokens, slot = (index == expert).nonzero().unbind(1)
            if len(tokens) and 0 <= expert < m.num_experts:
                own = getattr(m, weight)[expert]
                first = linear(hidden[tokens], own.mT if m.is_transposed else own, getattr(m, bias)[expert] if m.has_bias else None)
                keys = m._apply_gate(first) if m.has_gate else m.act_fn(first)
                yield expert, tokens, keys * gates[tokens, slot, None]


def inputs(module: Any, args: Sequence[Tensor], rows: int, tokens: int | None, site: Site) -> Any:
    """What the module of a site reads: `ExpertInputs` of experts, else [B, T, I]."""
    return ExpertInputs.of(module, args, rows, tokens, site) if site.point == POINT else by_row(args[0], rows, tokens, site)


def pack(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the experts [m] that any row of ``keys`` [n, E·I] touches, their part [n, m·I])."""
    apart = keys.view(len(keys), count, -1)
    experts = apart.ne(0).any(2).any(0).nonzero()[:, 0]
    return experts, apart[:, experts].flatten(1)


def unpack(experts: Tensor, packed: Tensor, count: int) -> Tensor:
    """``keys`` [n, E·I] of what `pack` made."""
    apart = packed.view(len(packed), len(experts), -1)
    out = apart.new_zeros(len(packed), count, apart.shape[2])
    out[:, experts] = apart
    return out.flatten(1)


def _touched(settings: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    count, wide = (max(1, tensors[name].shape[-1] if name in tensors and tensors[name].ndim else 1) for name in ("experts", "down"))
    return {"experts": "m:int64", "down": f"R {wide // count * count}", "up": "O R"}  # a whole number of keys an expert


def _on_experts(settings: Any, tensors: Mapping[str, Tensor], site: tuple[int, int], model: Any) -> str | None:
    """Experts that the site does not have, or one twice, or keys of another length."""
    chosen, block_keys = tensors["experts"], site[0]
    inner = tensors["down"].shape[1] // len(chosen)
    if len(chosen.unique()) < len(chosen) or not within(chosen, 0, block_keys // inner if inner else 0):
        return "it names an expert twice, or one that is not there"
    return None if block_keys % inner == 0 else f"its keys have {inner} numbers an expert, which those here do not"


class Experts:
    """Registered as ``experts``: y + up (down κ) at every token; experts [m], down [R, m·I] of these, up [O, R]."""

    schema = OpSchema(_touched, on_model=_on_experts)

    @staticmethod
    def bank_key(op: Op) -> tuple[Any, ...]:
        t = op.tensors
        return t["down"].shape[1] // len(t["experts"]), t["up"].shape[0], str(t["down"].dtype), str(t["up"].dtype)

    @staticmethod
    def stack_params(ops: Sequence[Op], device: torch.device) -> dict[str, Tensor]:
        """Experts that an op does not have are -1, factors 0."""
        rank, most = max(op.tensors["up"].shape[1] for op in ops), max(len(op.tensors["experts"]) for op in ops)
        inner = ops[0].tensors["down"].shape[1] // len(ops[0].tensors["experts"])
        out: dict[str, list[Tensor]] = {"experts": [], "down": [], "up": []}
        for op in ops:
            experts, down, up = (op.tensors[name].to(device) for name in out)
            pad, more, ranks = torch.nn.functional.pad, most - len(experts), rank - up.shape[1]
            out["experts"].append(pad(experts, (0, more), value=-1))
            out["down"].append(pad(down, (0, more * inner, 0, ranks)))
            out["up"].append(pad(up, (0, ranks)))
        return {name: torch.stack(parts) for name, parts in out.items()}

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: ExpertInputs, y: Tensor, site: Site, context: OpContext) -> Tensor:
        rows, tokens = y.shape[:2]
        down = p["down"].unflatten(2, (p["experts"].shape[1], -1))  # [P, R, m, I]
        inner = torch.zeros(rows * tokens, down.shape[1], dtype=down.dtype, device=y.device)
        touched = [expert for expert in p["experts"].unique().tolist() if expert >= 0]
        for expert, at, keys in x.served(touched):
            has, slot = (p["experts"] == expert).max(1)
            of_entry = down[torch.arange(len(down), device=y.device), :, slot] * has[:, None, None]  # [P, R, I]
            if len(down) == 1:
                added = keys.to(down.dtype) @ of_entry[0].mT
            else:
                added = torch.einsum("ni,nri->nr", keys.to(down.dtype), of_entry[at // tokens])
            inner = inner.index_add(0, at, added)
        return y + (inner.view(rows, tokens, -1) @ p["up"].mT).to(y.dtype)
