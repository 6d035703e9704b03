"""MELO: low-rank blocks that are switched on by where a prompt's key falls.

    vector store: clusters (centre, radius, label) of points (key, block);   edit batch i trains block i:  ΔW = s² B_i A_i,  s² = blocks
    in use: the last prompt token's key picks a block (`errata.methods.codebook.op`), which acts on every token of the row; the base
            where none

The rule for a new key is GRACE's (`errata.methods.codebook.store.KeyStore.place`); a key near one of its own label joins that cluster:
centre ← mean of the points, radius ← the farthest of them, at least a new one's; a split drops what is outside the older cluster's
new radius.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.core.bank import Stack
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError
from errata.methods.codebook.editor import CodebookEditor, check_site, read_keyed_texts
from errata.methods.codebook.store import Clusters
from errata.methods.codebook.training import routed, train_blocks
from errata.request import EditRequest

Sites = tuple[Site, tuple[Site, ...]]


@dataclass(frozen=True)
class MELO(CodebookEditor):
    """Hyper-parameters (the authors' repository; EasyEdit's GPT-2-XL file is the same):

    layer, point      the linear whose ``reads`` ("input", or "output" as the released code takes it) at the last prompt token is the key;
                      None: by depth, 35/48 of it as for GPT-2-XL, low enough for two blocks above
    lora_layers, lora_point   the linears the blocks change; None: the next two blocks.  They must lie above the key's
    radius            of a new cluster; ``unit`` "norm": as a share of the key's own norm, "absolute" as published
    blocks            how many there may be; they set the scale s = √blocks of both factors (√(max_rank / rank_block) in the source)
    rank              of a block
    edits_per_block   requests of one `edit` that share a block; each `edit` begins a new one
    lr, steps         Adam's; the rate is multiplied by ``decay`` every ``decay_every`` updates (StepLR).  ``stop``: end of a block below
                      that mean loss a token (0: never, as published)
    end               text trained after the target
    rounding          what a comparison with a radius allows for last bits, as a share of the query's norm; None: by the model's dtype
    seed              of new blocks

    No file for LLaMA-like models was published, and none but GPT-2-XL's for decoders.  The rule for other models is ours: keys are the
    inputs of ``mlp_down``, blocks change ``mlp_down`` of the next two blocks, the radius is half the key's norm (published radii are
    lengths in the space of one model, and the size of keys differs by orders of magnitude between models and blocks).

    Where the source is silent or differs: the nearest point is sought within the nearest cluster, and a cluster that lost all its points
    routes to the base (both as released); labels are the target's token ids, compared exactly (released: their sum); requests of one
    `edit` are put in one after another, each seeing those before it (released: all compared with the store as it was); in training a row
    runs its own block.  A block acts on all tokens of a text by what its prompt's last token says, so nothing of the prompt can be
    computed apart under such a patch (`non_causal`).

    On a stack whose last live patch is MELO's with the same sites and shapes the edit goes on from it and replaces it.
    """

    name: ClassVar[str] = "melo"
    paper: ClassVar[str] = "Yu et al., AAAI 2024 (MELO)"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "gpt2-xl": {
            "layer": 35, "point": "mlp.c_fc", "reads": "output", "lora_layers": [36, 37], "lora_point": "mlp.c_fc", "radius": 0.5,
            "unit": "absolute",
        },
        # keys chosen on dev as for GRACE; lr, blocks, rank and steps are the published ones
        "almanac": {"layer": 5, "point": "mlp.gate_proj", "lora_layers": [6, 7], "radius": 0.65, "end": "."},
    }  # fmt: skip

    TUNES: ClassVar[dict[str, Any]] = {"radius": (0.15, 0.25, 0.35, 0.7), "layer": (8 / 30, 16 / 30, 22 / 30), "contrast": (16,)}

    layer: int | None = None
    point: str = "mlp_down"
    reads: Literal["input", "output"] = "input"
    lora_layers: tuple[int, ...] | None = None
    lora_point: str = "mlp_down"
    radius: float = 0.5
    unit: Literal["absolute", "norm"] = "norm"
    blocks: int = 350
    rank: int = 2
    edits_per_block: int = 4
    lr: float = 1e-3
    steps: int = 50
    decay: float = 0.5
    decay_every: int = 20
    stop: float = 0.0
    rounding: float | None = None
    end: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.radius < 0 or (self.rounding or 0) < 0:
            raise ConfigError("melo: radius and rounding must not be negative")
        if min(self.blocks, self.rank, self.edits_per_block, self.steps, self.decay_every) < 1:
            raise ConfigError("melo: blocks, rank, edits_per_block, steps and decay_every must be at least 1")
        if self.lr <= 0 or not 0 < self.decay <= 1:
            raise ConfigError("melo: lr must be positive and decay above 0 and at most 1")
        self.require_seed(self.seed)
        self.require_contrast()
        if self.lora_layers is not None and (not self.lora_layers or len(set(self.lora_layers)) != len(self.lora_layers)):
            raise ConfigError(f"melo: lora_layers must name at least one block, none twice; got {list(self.lora_layers)}")

    @property
    def scale(self) -> float:
        """s, by which both factors of a block are multiplied."""
        return math.sqrt(self.blocks)

    def target_sites(self, lm: LM) -> Sites:
        """(where keys are read, where blocks act); `ConfigError` where this model has no such place or the order is wrong."""
        key = lm.nearest_block(min(lm.depth - 3, int(lm.depth * 35 / 48 + 0.5))) if self.layer is None else self.layer
        lora = self.lora_layers or tuple(b for b in range(key + 1, lm.depth) if b not in lm.family.idle)[:2]
        if not lora or min(lora) <= key:
            raise ConfigError(f"melo: blocks are chosen at layer {key}, so lora_layers must lie above it; got {list(lora)}")
        return check_site(lm, self.name, key, self.point), tuple(check_site(lm, self.name, b, self.lora_point) for b in sorted(lora))

    def can_resume(self, last: Patch) -> bool:
        return all(op.tensors["down"].shape[1] == self.rank and op.settings["scale"] == self.scale for op in last.ops[1:])

    def _make(self, lm: LM, problems: Sequence[list[EditRequest]], on: Stack, runner: Any, progress: Progress | None) -> list[Patch]:
        self.require_requests(problems)
        began, (site, sites), rounding = time.perf_counter(), self.target_sites(lm), self.tolerance(lm)
        settings = {"reads": self.reads, "rounding": rounding}
        before, under = self.resume_from(on, (site, *sites), settings)
        used = len(before.ops[1].tensors["up"]) if before else 0
        most = used + max((-(-len(requests) // self.edits_per_block) for requests in problems), default=0)
        if most > self.blocks:
            raise ConfigError(f"melo: {most} blocks are needed and there are {self.blocks}; set blocks higher from the first edit on")
        stores = [
            Clusters(self, before, texts, rounding) for texts in read_keyed_texts(lm, problems, self.end, site, under, self.contrast > 0)
        ]
        made = train_blocks(self, lm, stores, sites, under, runner, progress)
        seconds, out = (time.perf_counter() - began) / max(1, len(problems)), []
        resolved = {"layer": site.block, "lora_layers": [s.block for s in sites]}
        for store, blocks, requests in zip(stores, made, problems, strict=True):
            ops = [Op("router", site, store.tensors(), settings), *routed(sites, blocks, before, self.scale)]
            loss, steps = sum(loss for _, loss, _ in blocks) / len(blocks), sum(steps for _, _, steps in blocks) / len(blocks)
            notes = {
                "steps": steps,
                "loss": round(loss, 6),
                "seconds": round(seconds, 4),
                "clusters": len(store.book.radii),
                **store.counts,
            }
            out.append(self.packed(lm, before, requests, ops, store.book, resolved, notes))
        return out
