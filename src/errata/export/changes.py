"""What a stack changes, linear by linear, and where the result may be written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import __version__, storage
from errata.core import experts
from errata.core.bank import Stack, active_patches
from errata.core.families import linear_sizes, resolve
from errata.core.model import LM
from errata.core.patch import WEIGHT_LIKE, Op
from errata.core.weights import sizes
from errata.errors import ConfigError, PatchError, StorageError

_MARK = "errata.json"  # says that errata wrote the folder, and from what
AT_ONCE = 4_000_000  # numbers handled at a time


@dataclass(frozen=True)
class WeightDelta:
    """What a stack adds to one linear, or to the last matrices of fused experts: its path from the model, the module, the ops."""

    path: str
    module: Any
    ops: tuple[Op, ...]

    @property
    def fused(self) -> bool:
        """Whether it changes experts, which keep their weights in one tensor [E, O, I]."""
        return self.ops[0].kind == experts.POINT

    @property
    def transposed(self) -> bool:
        """GPT-2's Conv1D, and some experts, keep a weight as [I, O]."""
        return bool(self.module.is_transposed) if self.fused else type(self.module).__name__ == "Conv1D"

    @property
    def sizes(self) -> tuple[int, int]:
        """(input size, output size)."""
        return experts.sizes(self.module)[1:] if self.fused else linear_sizes(self.module)

    @property
    def rank(self) -> int:
        """Of the factors together; 0 where a dense op is among them."""
        ranks = [op.tensors["up"].shape[1] if self.fused else sizes(op)[0] for op in self.ops]
        return sum(ranks) if all(ranks) else 0

    def rows(self, transposed: bool = False) -> Iterator[Tensor]:
        """ΔW [O, I] (or its transpose) in float64, some rows at a time; of experts [1, O, I], one after another."""
        if self.fused:
            yield from self._experts(transposed)
            return
        low = [op.tensors for op in self.ops if op.kind == "low_rank"]
        dense = [_wide(op.tensors["weight"]) for op in self.ops if op.kind == "dense"]
        inner, outer = self.sizes
        left = torch.cat([_wide(t["up"]) for t in low], 1) if low else torch.zeros(outer, 0, dtype=torch.float64)
        right = torch.cat([_wide(t["down"]) for t in low]) if low else torch.zeros(0, inner, dtype=torch.float64)
        if transposed:
            left, right, dense = right.mT, left.mT, [t.mT for t in dense]
        step = slice_of(right.shape[1])
        for start in range(0, len(left), step):
            part = left[start : start + step] @ right
            for weight in dense:
                part = part + weight[start : start + step]
            yield part

    def _experts(self, transposed: bool) -> Iterator[Tensor]:
        count, inner, outer = experts.sizes(self.module)
        for expert in range(count):
            delta = torch.zeros(outer, inner, dtype=torch.float64)
            for op in self.ops:
                if (slot := (op.tensors["experts"].cpu() == expert).nonzero()).numel():
                    begin = int(slot) * inner
                    delta += _wide(op.tensors["up"]) @ _wide(op.tensors["down"][:, begin : begin + inner])
            yield (delta.mT if transposed else delta)[None]


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def share(error: float, size: float) -> float:
    """‖lost‖ / ‖whole‖ of two sums of squares."""
    return math.sqrt(error / size) if size else 0.0


def slice_of(numbers: int) -> int:
    """Rows of that many numbers to handle at a time."""
    return max(1, AT_ONCE // max(1, numbers))


def weight_deltas(lm: LM, stack: Stack) -> list[WeightDelta]:
    """The stack by linear and by block's experts.

    `PatchError` when it is empty or changes nothing, is of another base, or not a change of weights.
    """
    if not stack:
        raise PatchError("no patch to export; name at least one")
    found: dict[str, list[Op]] = {}
    for patch in active_patches(stack):
        lm.check(patch)
        for op in patch.ops:
            if op.kind not in (*WEIGHT_LIKE, experts.POINT):
                raise PatchError(
                    f"patch {patch.id} was made with {patch.method}, whose {op.kind!r} op is no change of weights; serve it "
                    "with errata (attach it, or `errata ask --patch`), or make the edit again with a method that changes weights "
                    "(rome, memit …; `errata methods` lists them)"
                )
            if op.site.point == "block":
                raise PatchError(
                    f"patch {patch.id}: its {op.kind!r} op runs beside block {op.site.block}, not beside a linear; serve it with errata"
                )
            path = f"{lm.family.blocks}.{op.site.block}.{lm.linear_path(op.site)}"  # two points may name one linear
            found.setdefault(path, []).append(op)
    if not found:
        raise PatchError("the stack changes nothing (no patch of it holds an op); there is nothing to export")
    return [WeightDelta(path, resolve(lm.hf, path), tuple(ops)) for path, ops in found.items()]


@dataclass(frozen=True)
class Written:
    """One linear as written.  ``lost`` = ‖ΔW written − ΔW‖ / ‖ΔW‖ (Frobenius), by rounding and truncation; ``rank`` 0 is dense."""

    path: str
    rank: int
    lost: float


@dataclass(frozen=True)
class ExportReport:
    """What was written where: a folder, or a file."""

    path: Path
    dtype: str
    linears: tuple[Written, ...]

    @property
    def lost(self) -> float:
        """The largest share of a linear's change that was lost."""
        return max(w.lost for w in self.linears)


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating dtype that weights are stored in."""
    known = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[return-value]
    if dtype not in known:
        raise ConfigError(f"dtype {str(dtype)!r} cannot hold exported weights; there are {', '.join(known)}")
    return known[str(dtype)]


def _source(lm: LM) -> str:
    return str(getattr(lm.hf.config, "_name_or_path", "") or "")


def base_folder(lm: LM) -> Path | None:
    """The folder that the model was loaded from, where it is one."""
    name = _source(lm)
    return Path(name) if name and Path(name).is_dir() else None


def base_file(lm: LM, name: str) -> Path | None:
    """A file of the base: in its folder, or in the hub's cache (nothing is fetched)."""
    folder = base_folder(lm)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    where = _source(lm)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        return None
    found = try_to_load_from_cache(where, name)
    return Path(found) if isinstance(found, str) else None


def place(lm: LM, folder: Path, force: bool, what: str, names: str, head: str) -> None:
    """`StorageError` unless ``folder`` is free, or ``force`` and it holds nothing but files that match ``names``, ``head`` among them.

    ``what``: those files in words.
    """
    base = base_folder(lm)
    if base is not None and folder.exists() and folder.resolve() == base.resolve():
        raise StorageError(f"{folder} is the base model itself, which is never written; give another name")
    storage.no_dangling_link(folder)
    if folder.exists():
        entries = list(folder.iterdir()) if folder.is_dir() else []
        ours = (folder / head).is_file() and all(e.is_file() and re.fullmatch(names, e.name) for e in entries)
        if not folder.is_dir() or (entries and not ours):
            raise StorageError(f"{folder} exists and is not {what}; it is left alone, give another name")
        if entries and not force:
            raise StorageError(f"{folder} exists already; give another name, or force=True (--force) to replace it")
    storage.within_reach(folder)


def mark(lm: LM, stack: Stack, folder: Path, use: str, written: Sequence[Written], dtype: str) -> None:
    """``errata.json`` and ``README.md``: from what the folder was made, and how to use it."""
    patches = [{"id": p.id, "method": p.method, "edits": len(p.requests)} for p in active_patches(stack)]
    head: dict[str, Any] = {"errata": __version__, "base": lm.fingerprint, "model": lm.name, "dtype": dtype, "patches": patches}
    head["linears"] = [{"path": w.path, "rank": w.rank, "lost": w.lost} for w in written]
    facts = [f"- {r.prompt} **{r.target}**" for p in active_patches(stack) for r in p.requests]
    shown = facts[:100] + ([f"- … {len(facts) - 100} more"] if len(facts) > 100 else [])
    text = f"# {lm.name or 'A model'}, edited by errata\n\n{use}\n\n## Edits\n\n" + "\n".join(shown) + "\n"
    storage.write(folder / _MARK, json.dumps(head, ensure_ascii=False, indent=1).encode())
    storage.write(folder / "README.md", text.encode("utf-8", "replace"))
