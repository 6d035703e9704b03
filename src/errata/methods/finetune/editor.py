"""What fine-tuning editors share: hyper-parameters, the rule for the matrix, one patch or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errata.core.bank import Stack, active_patches
from errata.core.families import linear_sizes
from errata.core.lanes import MOST_ROWS, Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.core.tokens import Encoded
from errata.errors import ConfigError, PatchError
from errata.methods.base import NEIGHBOURS, OutputTermEditor
from errata.methods.finetune.training import DenseTraining, Objective, TargetNew
from errata.request import EditRequest

NUMBERS_AT_ONCE = 2**25  # entries of ΔW trained in one batch; each takes five: itself, its gradient, two moments, the result


@dataclass(frozen=True)
class FineTuneEditor(OutputTermEditor):
    """Hyper-parameters that fine-tuning editors share.

    layers, depth    0-based blocks whose MLP's last matrix is trained; None: the one at this relative depth (21/32: LLaMA's block 21)
    point            which linear: ``mlp_down``, ``attn_out`` or a path inside the block
    lr, steps        Adam, without weight decay; passes over the requests (EasyEdit's num_steps, epochs)
    stop             a mini-batch whose loss is below it makes no update; a pass whose mean loss is, is the last
    batch_size       rows of a mini-batch; ``shuffle``: in an order drawn anew for each pass (EasyEdit keeps that of the requests)
    norm_constraint  |ΔW_ij| ≤ this after each update, from the weights at the start of this edit
    rank             keep the first terms of ΔW's SVD only, as a `low_rank` op; the patch's notes say what that lost
    seed             of the order, where it is drawn

    A request's paraphrases, where it brings any, are rows of their own (EasyEdit trains on the prompt alone).  A new edit on a stack starts
    from the weights the stack makes and is a patch of its own on top: weights add, so this is training on, with a new optimiser.
    ΔW is float32 or wider and runs beside the base; the released code changes the weights in their own dtype.  A mini-batch holds the
    contrast pairs of its requests.
    """

    TUNES: ClassVar[dict[str, Any]] = {
        "layers": (6 / 30, 12 / 30, 27 / 30), "lr": (1e-4, 2e-3), "neighbours": NEIGHBOURS
    }  # fmt: skip

    layers: tuple[int, ...] | None = None
    point: str = "mlp_down"
    depth: float = 21 / 32
    lr: float = 5e-4
    steps: int = 25
    stop: float = 1e-2
    batch_size: int = 1
    shuffle: bool = False
    norm_constraint: float | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.rank is not None and self.rank < 1):
            raise ConfigError(f"{self.name}: steps, batch_size and rank must be at least 1")
        if self.lr <= 0 or (self.norm_constraint is not None and self.norm_constraint <= 0):
            raise ConfigError(f"{self.name}: lr and norm_constraint must be positive")
        if self.stop < 0:
            raise ConfigError(f"{self.name}: stop must not be negative")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ConfigError(f"{self.name}: layers must name at least one block, none twice; got {list(self.layers)}")
        self.require(self.point != "block", "what is trained is a linear, so the point is mlp_down, attn_out or a path, not 'block'")
        self.require_depths([self.depth])
        self.require_seed(self.seed)
        self.require_contrast()

    def target_layers(self, lm: LM) -> tuple[int, ...]:
        """The blocks to train on this model; `ConfigError` for one that does not exist or a rank that its matrix does not have."""
        chosen = self.layers_at(lm, [self.depth]) if self.layers is None else self.layers
        self.require_blocks(lm, chosen)
        full = min(min(sizes) for sizes in self.sizes(lm, chosen).values())
        if self.rank is not None and self.rank > full:
            raise ConfigError(f"{self.name}: rank {self.rank} exceeds that of the matrix, {full}; lower it or leave it off")
        return chosen

    def sizes(self, lm: LM, blocks: Sequence[int]) -> dict[int, tuple[int, int]]:
        """{block: (input size, output size)} of the trained matrices; `ConfigError` for a block that has none."""
        try:
            for block in blocks:
                lm.check_site(Site(block, self.point))
        except PatchError as error:
            raise ConfigError(f"{self.name}: {error}; set layers, or point to another linear") from None
        return {block: linear_sizes(lm.module(Site(block, self.point))) for block in blocks}

    def num_parameters(self, lm: LM) -> int:
        """Trainable numbers on this model (BaFT Table 3)."""
        return sum(inner * outer for inner, outer in self.sizes(lm, self.target_layers(lm)).values())

    def encode(self, lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> list[Encoded]:
        """Prompt and target as they are trained."""
        return lm.encode(prompts, targets)

    def objective(self, lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
        """The rows of all problems and their loss: cross-entropy of the target."""
        return TargetNew(lm, self.encode(lm, prompts, targets))

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch for all requests, on top of ``on``."""
        return DenseTraining(self, lm, [self.contrasted(lm, requests, on)], active_patches(tuple(on)), runner).run(progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``; trained together, in batches of like length, a batch a core."""
        on = active_patches(tuple(on))
        requests = self.contrasted_each(lm, requests, on)
        encoded = self.encode(lm, [r.prompt for r in requests], [r.continuation for r in requests])

        def train(model: LM, members: list[int], progress: Progress) -> list[Patch]:
            return DenseTraining(self, model, [[requests[i]] for i in members], on, runner).run(progress)

        beside = [self.rows_kept(r) for r in requests]
        lengths = [len(e.ids) * (1 + len(r.paraphrases) + self.prefixes + n) for e, r, n in zip(encoded, requests, beside, strict=True)]
        most = min(MOST_ROWS // (1 + max(beside, default=0)), NUMBERS_AT_ONCE // self.num_parameters(lm))
        return in_lanes(lm, lengths, train, progress, most=max(1, most))
