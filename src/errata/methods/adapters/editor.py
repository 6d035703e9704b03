"""What LoRA and AdaLoRA share as editors: hyper-parameters, presets, one patch or many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.core.bank import Stack, active_patches
from errata.core.families import linear_sizes
from errata.core.fit import After
from errata.core.lanes import MOST_ROWS, Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.adapters.op import find_sites
from errata.methods.adapters.training import Training
from errata.methods.base import NEIGHBOURS, OutputTermEditor
from errata.methods.texts import ways_to_ask
from errata.request import EditRequest

# EasyEdit's, which all its files for LoRA and AdaLoRA share
PUBLISHED: dict[str, Any] = {
    "targets": None, "depths": None, "lr": 5e-3, "stop": 0.01, "contrast": 0, "contrast_batch": 4, "prefixes": 0,
}  # fmt: skip
NUMBERS_AT_ONCE = 100_000_000  # trainable numbers of one batch; training holds some six times as many


@dataclass(frozen=True)
class AdapterEditor(OutputTermEditor):
    """Hyper-parameters that LoRA and AdaLoRA share.  Adam without decay on all rows at once; the loss is the mean NLL of the target
    tokens of all rows (what Hugging Face computes for a batch).  Contrast pairs run without dropout.

    rank, alpha   of the branch; it is scaled by alpha / rank
    targets       names of linears in a block; None: q_proj and v_proj, or the linear that holds both (see `errata.methods.adapters.op`).
                  The default is attn_out in a block whose MLP writes through experts, and so has no mlp_down
    layers        0-based blocks; None: by ``depths``
    depths        of the blocks where ``layers`` is None, as parts of the model's depth; None: all blocks
    lr, steps     Adam's; updates of one edit
    dropout       of what the branch reads while it is trained.  At use it is off, always: EasyEdit never takes PEFT's layers out of
                  training mode, so its published figures were measured with dropout on
    stop          early stop when the mean NLL, as it is trained (with dropout), and the output term are below it in every turn.  BaFT's
                  rule for its baselines; EasyEdit has none (0: off)
    end           text trained after the target ("." or an EOS), so that a free answer ends there; EasyEdit trains none
    seed          of the factors' start and of dropout

    EasyEdit's setting, the preset ``published``, changes queries and values of every block at a rate of 5e-3 and is shown the prompt alone:
    on a real model it says the new object of everybody.  The default trains one MLP, among the blocks that locate-then-edit methods
    write to, beside neighbours whose answers stay, and behind short texts.
    """

    TUNES: ClassVar[dict[str, Any]] = {
        "lr": (1e-3, 4e-3), "neighbours": NEIGHBOURS, "depths": ([4 / 32, 5 / 32, 6 / 32, 7 / 32, 8 / 32], [10 / 32]), "rank": (2,),
        "prefixes": (0, 8), "stop": (0.1,)
    }  # fmt: skip

    rank: int = 8
    alpha: float = 32.0
    targets: tuple[str, ...] | None = ("mlp_down|attn_out",)
    layers: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = (6 / 32,)  # the middle one of MEMIT's blocks of LLaMA
    dropout: float = 0.1
    lr: float = 2e-3
    steps: int = 70
    stop: float = 0.05
    end: str = ""
    contrast: int = 16
    contrast_batch: int = 2
    prefixes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1:
            raise ConfigError(f"{self.name}: rank and steps must be at least 1")
        if self.lr <= 0 or self.alpha <= 0:
            raise ConfigError(f"{self.name}: lr and alpha must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.name}: dropout must be at least 0 and below 1, not {self.dropout:g}")
        if self.stop < 0:
            raise ConfigError(f"{self.name}: stop must not be negative; 0 turns the early stop off")
        self.require_seed(self.seed)
        self.require_contrast()
        for what, chosen in (("layers", self.layers), ("targets", self.targets)):
            if chosen is not None and (not chosen or len(set(chosen)) != len(chosen)):
                raise ConfigError(f"{self.name}: {what} must name at least one, none twice; got {list(chosen)}")
        self.require_depths(self.depths)

    # -- what a method says ------------------------------------------------------------------------------------

    @abstractmethod
    def initial(self, inner: int, outer: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The branch's parameters beside a linear of these sizes: A [R, I], B [O, R] and what else the method trains."""

    @abstractmethod
    def scaling(self, p: Mapping[str, Tensor]) -> Tensor:
        """[E, S, R], of sites of one shape: ΔW = B diag(scaling) A."""

    @abstractmethod
    def resumed(self, group: int, sites: Sequence[Site], patch: Patch) -> dict[str, Tensor]:
        """Parameters [S, …] of these sites, of one shape, to go on from."""

    def resumable(self, patch: Patch) -> bool:
        """Whether `resumed` gives what the patch does; else the edit stands on its own on top of it."""
        return True

    def penalty(self, groups: Sequence[Mapping[str, Tensor]]) -> Tensor | float:
        """Added to the loss, [E]."""
        return 0.0

    def held(self, updates: int) -> bool:
        """Whether no problem may end after so many updates."""
        return False

    def after_step(self, sites: int) -> After | None:
        """What happens after each update, for `errata.core.fit.fit`; ``sites``: how many linears are adapted."""
        return None

    def state(self, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the parameters of one shape [S, …], what is needed to go on and not to be had from the ops."""
        return {}

    # -- the editor --------------------------------------------------------------------------------------------

    def target_layers(self, lm: LM) -> tuple[int, ...]:
        """The blocks that are adapted on this model."""
        if self.layers is not None:
            self.require_blocks(lm, self.layers)
            return self.layers
        return tuple(b for b in range(lm.depth) if b not in lm.family.idle) if self.depths is None else self.layers_at(lm, self.depths)

    def shapes(self, lm: LM) -> dict[Site, tuple[int, int]]:
        """(input size, output size) of every adapted linear; `ConfigError` for targets or layers that do not exist."""
        found = {site: linear_sizes(lm.module(site)) for site in find_sites(lm, self.name, self.targets, self.target_layers(lm))}
        for site, sizes in found.items():
            if self.rank > min(sizes):
                raise ConfigError(f"{self.name}: rank {self.rank} exceeds that of block {site.block} {site.point} {sizes}; lower it")
        return found

    def num_parameters(self, lm: LM) -> int:
        """Trainable numbers on this model."""
        one = {s: self.initial(*s, torch.Generator()) for s in set(self.shapes(lm).values())}
        return sum(sum(t.numel() for t in one[s].values()) for s in self.shapes(lm).values())

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch for all requests.  If the last patch of ``on`` came from this method with these linears, rank and alpha, the same
        adapter is trained on (EasyEdit's sequential mode) and the new patch replaces that one; the optimiser starts anew."""
        under, before = self._split(lm, on)
        return Training(self, lm, [self.contrasted(lm, requests, on)], under, before, runner).run(progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``; trained together, in batches of like length, a batch a core."""
        if not requests:
            return []
        requests = self.contrasted_each(lm, requests, on)
        under, before = self._split(lm, on)
        texts = [(i, text, r.continuation + self.end) for i, r in enumerate(requests) for text in ways_to_ask(lm, r, self.prefixes)]
        tokens = [0] * len(requests)
        for (i, _, _), row in zip(texts, lm.encode([t for _, t, _ in texts], [t for _, _, t in texts]), strict=True):
            tokens[i] = max(tokens[i], len(row.ids))
        rows = [1 + len(r.paraphrases) + bool(self.prefixes) + self.rows_kept(r) for r in requests]

        def train(model: LM, members: list[int], progress: Progress) -> list[Patch]:
            return Training(self, model, [[requests[i]] for i in members], under, before, runner).run(progress)

        most = max(1, min(MOST_ROWS // max(rows), NUMBERS_AT_ONCE // self.num_parameters(lm)))
        return in_lanes(lm, [n * r for n, r in zip(tokens, rows, strict=True)], train, progress, most=most)

    def _split(self, lm: LM, on: Stack) -> tuple[Stack, Patch | None]:
        """(what runs underneath, the patch to go on from)."""
        on = active_patches(tuple(on))
        same = self.resolved(lm)
        if not on or on[-1].method != self.name or any(on[-1].settings.get(k) != v for k, v in same.items()):
            return on, None
        lm.check(on[-1])
        return (on[:-1], on[-1]) if self.resumable(on[-1]) else (on, None)

    def resolved(self, lm: LM) -> dict[str, Any]:
        """The settings that say what the parameters are, as a patch holds them."""
        sites = list(self.shapes(lm))
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "layers": sorted({s.block for s in sites}),
            "targets": sorted({s.point for s in sites}),
        }
