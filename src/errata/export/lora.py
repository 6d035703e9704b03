"""`export_lora`: a stack as a LoRA adapter in PEFT's layout, for PEFT, vLLM (where it adapts that linear) and whatever else reads it.

An adapter computes y + (alpha / r) B (A x) beside a linear; with alpha = r, A = down and B = up that is a low-rank op.  All linears
of an adapter get one rank, the largest, by rows and columns of zeros: llama.cpp divides the one alpha of a file by the rank of each
tensor, SGLang takes no other rank than r, and TGI and older vLLM read no `rank_pattern`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import storage
from errata.core.bank import Stack
from errata.core.families import linear_sizes, resolve
from errata.core.model import LM
from errata.core.patch import Op, Site
from errata.core.weights import delta_weight, low_rank, rank_of, spectrum
from errata.errors import ConfigError, PatchError
from errata.export import tensors
from errata.export.changes import ExportReport, WeightDelta, Written, base_folder, dtype_named, mark, place, share, weight_deltas
from errata.export.tensors import LazyTensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = r"adapter_model\.safetensors|adapter_config\.json|errata\.json|README\.md"
_USE = (
    "A LoRA adapter: `PeftModel.from_pretrained(base, THIS_FOLDER)`, or vLLM with `--enable-lora --lora-modules NAME=THIS_FOLDER "
    "--max-lora-rank {rank}`."
)
# A product of float32 factors is of low rank up to this share of its largest singular value: rounding of independent entries
# adds σ of about ε √(k / min(O, I)), far below.
EXACT = 16 * torch.finfo(torch.float32).eps
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for --max-lora-rank
_HINT = 64  # the rank whose loss the refusal tells


def export_lora(
    lm: LM,
    stack: Stack,
    folder: str | Path,
    *,
    rank: int | None = None,
    dtype: str | torch.dtype = "float32",
    force: bool = False,
    every_block: bool = False,
) -> ExportReport:
    """Write ``stack`` as a LoRA adapter of ``lm``'s base: exact up to the rounding to ``dtype``.

    ``rank``: keep at most so many singular values a linear; the report tells what share of the change went.  Without it a dense op is
    accepted only where it is of low rank in truth.  ``every_block``: zeros for the same linears of all other blocks, without which TGI
    leaves the adapter's weights out.
    """
    out, wanted = Path(folder), dtype_named(dtype)
    checked_rank(rank)
    found = weight_deltas(lm, stack)
    if fused := [change.path for change in found if change.fused]:
        raise PatchError(f"{fused[0]}: fused experts are edited, for which an adapter has no place in serving programs; bake the patch")
    place(lm, out, force, "a LoRA adapter", FILES, CONFIG)
    assert wanted is not None
    adapters = [(change, factors(change, rank, wanted)) for change in found]
    ranks = {change.path: int(op.tensors["down"].shape[0]) for change, op in adapters}
    written = tuple(Written(c.path, ranks[c.path], lost_of(c, op)) for c, op in adapters)
    most = max(1, *ranks.values())
    pairs = {change.path: (op.tensors["down"], op.tensors["up"]) for change, op in adapters}
    for path, (inner, outer) in (_others(lm, found) if every_block else {}).items():
        pairs[path] = torch.zeros(0, inner, dtype=wanted), torch.zeros(outer, 0, dtype=wanted)
    lazy: dict[str, LazyTensor] = {}
    for path, (down, up) in pairs.items():
        missing = most - len(down)
        lazy[f"base_model.model.{path}.lora_A.weight"] = LazyTensor(
            wanted, (most, down.shape[1]), partial(_padded, down, (0, 0, 0, missing))
        )
        lazy[f"base_model.model.{path}.lora_B.weight"] = LazyTensor(wanted, (len(up), most), partial(_padded, up, (0, missing)))
    stored = str(wanted).removeprefix("torch.")
    with storage.atomic_folder(out) as temporary:
        tensors.write(temporary / WEIGHTS, lazy)
        storage.write(temporary / CONFIG, json.dumps(_config(lm, found, sorted(pairs), most), indent=2).encode())
        mark(lm, stack, temporary, _USE.format(rank=vllm_rank(most)), written, stored)
    return ExportReport(out, stored, written)


def checked_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")


def _padded(t: Tensor, sides: tuple[int, ...]) -> Iterator[Tensor]:
    yield torch.nn.functional.pad(t, sides)


def _others(lm: LM, found: list[WeightDelta]) -> dict[str, tuple[int, int]]:
    """Path -> sizes of the linears that have the same place in other blocks."""
    prefix, out = f"{lm.family.blocks}.", {}
    for place_ in {change.path.removeprefix(prefix).partition(".")[2] for change in found}:
        for block, module in enumerate(lm.blocks):
            path = f"{prefix}{block}.{place_}"
            with contextlib.suppress(AttributeError):  # blocks of another make, as in hybrid models
                if path not in {change.path for change in found}:
                    out[path] = linear_sizes(resolve(module, place_))
    return out


def vllm_rank(rank: int) -> int:
    """The least of vLLM's choices for ``--max-lora-rank`` that holds it."""
    return next((r for r in RANKS if r >= rank), rank)


def _config(lm: LM, found: list[WeightDelta], paths: list[str], rank: int) -> dict[str, Any]:
    """PEFT's `LoraConfig` with every choice that matters spelt out.

    Modules are named by their full paths, which no other module's path ends in.
    """
    base = base_folder(lm)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()) if base is not None else lm.name or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": paths,
        "fan_in_fan_out": any(change.transposed for change in found),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def factors(change: WeightDelta, limit: int | None, dtype: torch.dtype) -> Op:
    """One low-rank op for a linear, of the least rank that loses nothing, or of ``limit``."""
    (inner, outer), site = change.sizes, Site(0, change.path)
    if change.rank:
        t = {n: torch.cat([op.tensors[n].detach().cpu().double() for op in change.ops], a) for n, a in (("down", 0), ("up", 1))}
        op, tolerance = Op("low_rank", site, t), max(inner, outer) * torch.finfo(torch.float64).eps
    else:
        op, tolerance = (
            Op("dense", site, {"weight": sum((delta_weight(op) for op in change.ops), torch.zeros((), dtype=torch.float64))}),
            EXACT,
        )
    left, values, right = spectrum(op)
    true = rank_of(values, tolerance)
    if change.rank and true >= change.rank and (limit is None or limit >= change.rank):
        return Op("low_rank", site, {n: t.to(dtype).contiguous() for n, t in op.tensors.items()})  # the factors as they were made
    if limit is None and not change.rank and true * (inner + outer) > inner * outer:
        raise PatchError(
            f"the change of {change.path} is dense and of rank {true}: as LoRA it would be larger than the matrix; bake it into a "
            f"checkpoint, or accept a loss with rank=N (--rank N): {_HINT} would lose {_beyond(values, _HINT):.1%} of its norm"
        )
    return low_rank(site, left, values, right, min(true, limit or true), dtype)


def _beyond(values: Tensor, rank: int) -> float:
    """Share of the Frobenius norm that the singular values after ``rank`` hold."""
    return float(values[rank:].norm() / values.norm()) if values.any() else 0.0


def lost_of(change: WeightDelta, op: Op) -> float:
    """The share of a linear's change that its factors lack."""
    error = size = 0.0
    for exact, got in zip(change.rows(), WeightDelta(change.path, change.module, (op,)).rows(), strict=True):
        error += float((exact - got).square().sum())
        size += float(exact.square().sum())
    return share(error, size)
