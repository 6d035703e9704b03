"""What LoRA and AdaLoRA are beside a linear: where they attach, the branch while it is trained, and its dropout."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.families import is_linear
from errata.core.model import LM
from errata.core.patch import POINTS, OpContext, Site
from errata.errors import ConfigError, ModelError

_PROJECTIONS = ("q_proj", "v_proj")


def find_sites(lm: LM, name: str, targets: Sequence[str] | None, layers: Sequence[int]) -> tuple[Site, ...]:
    """The linears that ``targets`` name in these blocks, block by block.

    A target is the last part of a linear's path, a longer end of it, or ``mlp_down`` or ``attn_out``; it may be missing in some blocks.
    Of alternatives, "mlp_down|attn_out", the first that a block has is meant in it.
    None: every ``q_proj`` and ``v_proj``; in a model without them the linear that computes query, key and value together, which is
    the only one beside the attention's output linear (GPT-2 ``c_attn``, GPT-NeoX ``query_key_value``, Phi-3 ``qkv_proj``).
    """
    paths = {b: [path for path, module in lm.blocks[b].named_modules() if is_linear(module)] for b in sorted(layers)}
    named = {part for t in targets or ("attn_out",) for part in t.split("|")}
    points = {b: _points(lm, b, named) for b in paths}
    if targets is None:
        wanted: Sequence[str] = [t for t in _PROJECTIONS if any(_named(t, p) for own in paths.values() for p in own)]
        wanted = wanted or [_fused(name, own, points[b]) for b, own in paths.items()][:1]
    else:
        wanted = targets
    chosen: set[tuple[int, str]] = set()
    for target in wanted:
        found = {(b, p) for b, own in paths.items() for p in _targeted(target, own, points[b])}
        if not found:
            why = next((f" ({lm.roles.missing(min(paths), t)})" for t in target.split("|") if t in POINTS), "")
            there = ", ".join(_names(paths.values()))
            raise ConfigError(f"{name}: no linear {target!r} in these blocks{why}; set targets to some of {there}")
        chosen |= found
    return tuple(Site(b, points[b].get(p, p)) for b, own in paths.items() for p in own if (b, p) in chosen)


def _targeted(target: str, paths: Sequence[str], points: Mapping[str, str]) -> list[str]:
    """Of a block's linears those that the first alternative names that any of them has."""
    for one in target.split("|"):
        found = [p for p in paths if (points.get(p) == one if one in POINTS else _named(one, p))]
        if found:
            return found
    return []


def _points(lm: LM, block: int, wanted: Collection[str]) -> dict[str, str]:
    """{path: point} of the linears of a block that have a name by their role.  What only a trial could tell is asked for where wanted."""
    out: dict[str, str] = {}
    for point in POINTS:
        if point in wanted or getattr(lm.family, point):
            with contextlib.suppress(ModelError):  # a block may lack it
                out[lm.linear_path(Site(block, point))] = point
    return out


def _named(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _names(paths: Any) -> list[str]:
    return sorted({path.rpartition(".")[2] for own in paths for path in own})


def _fused(name: str, paths: Sequence[str], points: Mapping[str, str]) -> str:
    out = next((path for path, point in points.items() if point == "attn_out"), None)
    beside = [p for p in paths if out is not None and p.rpartition(".")[0] == out.rpartition(".")[0] and p != out]
    if len(beside) != 1:
        raise ConfigError(
            f"{name}: this model has neither q_proj and v_proj nor one linear for both; set targets to some of {_names([paths])}"
        )
    return beside[0]


class Adapter:
    """Beside a linear, for E problems: y + up (gain ∘ (down (m ∘ x))).

    down [E, R, I], up [E, O, R], gain [E, R]; m is the dropout mask.  Rows of a problem stand side by side, equally many each, so one
    batched product serves all problems, whether a problem has one row or many.  What is kept in a patch is ``low_rank``.
    """

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        x = x.to(p["down"].dtype)
        drop: DropoutMask | None = settings["drop"]
        if drop is not None:
            x = x * drop.mask(site, x)
        inner = x.reshape(len(p["down"]), -1, x.shape[-1]) @ p["down"].mT
        return y + ((inner * p["gain"].unsqueeze(1)) @ p["up"].mT).reshape(y.shape).to(y.dtype)


# The increment and the finaliser of SplitMix64 (Steele, Lea & Flood 2014), as signed 64-bit numbers.
_STEP, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class DropoutMask:
    """Dropout of one step.  Whether a number is dropped is a hash of (seed, step, site, row of its problem, position, feature):
    other problems in the batch, padding and the device play no part.

    place [B]: number of each row in its problem, below ``most``.
    """

    rate: float
    seed: int
    step: int
    place: Tensor
    most: int

    def mask(self, site: Site, x: Tensor) -> Tensor:
        """[B or 1, T, I]: 0 where dropped, 1 / (1 − rate) elsewhere.  x [B, T, I] holds whole rows, from their first token."""
        key = hashlib.sha256(f"{self.seed}/{self.step}/{site.block}/{site.point}".encode()).digest()
        row, token, feature = (torch.arange(n, device=x.device) for n in (self.most, *x.shape[1:]))
        number = (row[:, None, None] << 40) + (token[:, None] << 24) + feature  # the same for every length and number of rows
        mixed = number * _STEP + int.from_bytes(key[:8], "big", signed=True)
        for shift, factor in _MIX:
            mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor  # a shift that brings in zeros
        keep = (mixed >> 32 & 0x7FFFFFFF) >= int(self.rate * 0x80000000)
        scaled = keep.to(x.dtype) / (1 - self.rate)
        return scaled if self.most == 1 else scaled[self.place]
