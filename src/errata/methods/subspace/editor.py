"""What ReFT and BaFT share as editors: hyper-parameters, presets, the rule for layers, one patch or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from errata.core.bank import Stack, active_patches
from errata.core.lanes import MOST_ROWS, Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.base import NEIGHBOURS, OutputTermEditor
from errata.methods.subspace.op import start
from errata.methods.subspace.training import Training
from errata.request import EditRequest

PAPER_DEPTHS = (9 / 32, 18 / 32, 24 / 32, 28 / 32)  # the paper's LLaMA layers


@dataclass(frozen=True)
class SubspaceEditor(OutputTermEditor):
    """Hyper-parameters that ReFT and BaFT share (BaFT Table 5).

    rank        r, dimensions of the edited subspace a block
    layers      0-based block numbers (the paper does not say from what it counts; pyreft counts from 0); None: by ``depths``
    depths      of the edited blocks where ``layers`` is None, as parts of the model's depth; the paper's are those of its LLaMA layers.
                None: by the method's rule
    last        how many last prompt tokens are edited, besides every output token
    resume      an edit on top of this method's own last patch goes on from its parameters and replaces it; False: it stands by itself
    contrast, contrast_weight   neighbours a request is shown with, and the weight of the output term on them (`errata.core.keep`)
    lr, steps   for one request; ``batched_lr``, ``batched_steps`` for several in one patch
    stop        early stop when the "training loss" is below it: ``stop_on`` says whether that is the task loss as mean or as sum
                over target tokens, or the total with the regularisers (mean task loss + R_bal + R_loc); the paper does not say
    loss        the task loss is the printed sum over target tokens, or the mean
    weight_decay   of AdamW; the paper does not say
    init        "pyreft" (A, b random) or "identity" (A ← R, b ← 0: Φ(h) = h at the start)
    parametrisation   how R stays orthonormal while it is trained: "cholesky" (see `errata.methods.subspace.op.orthonormal`) or, as pyreft,
                "householder" (`turned`), where a step of the same rate moves R about twice as far, and weight decay pulls R back to
                where the edit began.  ``lr`` of papers that use pyreft is meant for the latter
    end         text trained after the target ("." or an EOS), so that a free answer ends there; the paper does not say whether y holds one
    seed        of the start
    """

    gate_kind: ClassVar[str] = "none"
    ridge: ClassVar[bool] = False  # whether gates begin at `errata.methods.subspace.gate_start`
    at_subject: ClassVar[bool] = False  # whether they are to open where the subject is named, and nowhere else

    TUNES: ClassVar[dict[str, Any]] = {
        "neighbours": NEIGHBOURS, "prefixes": (4,), "lr": (1e-3,), "stop": (0.1,), "rank": (4,)
    }  # fmt: skip

    rank: int = 12
    layers: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = PAPER_DEPTHS
    last: int = 3
    lr: float = 3e-4
    steps: int = 40
    batched_lr: float = 1e-4
    batched_steps: int = 70
    stop: float = 0.01
    stop_on: Literal["mean", "sum", "total"] = "mean"
    loss: Literal["sum", "mean"] = "sum"
    weight_decay: float = 0.0
    init: Literal["pyreft", "identity"] = "pyreft"
    parametrisation: Literal["cholesky", "householder"] = "cholesky"
    end: str = ""
    resume: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.last < 1 or self.steps < 1 or self.batched_steps < 1:
            raise ConfigError(f"{self.name}: rank, last and steps must be at least 1")
        self.require_seed(self.seed)
        self.require_contrast()
        if self.lr <= 0 or self.batched_lr <= 0:
            raise ConfigError(f"{self.name}: a learning rate must be positive")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ConfigError(f"{self.name}: layers must name at least one block, none twice; got {list(self.layers)}")
        self.require_depths(self.depths)

    def target_layers(self, lm: LM) -> tuple[int, ...]:
        """The blocks to edit on this model; `ConfigError` for one that does not exist."""
        chosen = self.layers_at(lm, self.depths or self.own_depths) if self.layers is None else self.layers
        self.require_blocks(lm, chosen)
        self.require(self.rank <= lm.width, f"rank {self.rank} exceeds the width {lm.width}; set rank for this model")
        return chosen

    @property
    def own_depths(self) -> tuple[float, ...]:
        """The method's rule for the blocks to edit."""
        return PAPER_DEPTHS

    @property
    def reach(self) -> int | None:
        """How many last prompt tokens the ops act on; None: all."""
        return None if self.at_subject else self.last

    @property
    def op_settings(self) -> dict[str, Any]:
        """Of every op, beside its parameters."""
        return {"gate": self.gate_kind, "last": self.reach}

    def suited(self, requests: Sequence[EditRequest]) -> Self:
        """The editor for one patch of these requests."""
        return self

    def apart(self, requests: Sequence[EditRequest]) -> list[list[int]]:
        """The requests of one patch, by their places, in groups that have ops of their own: one for each subject where gates open there."""
        if not self.at_subject or any(r.subject is None for r in requests):
            return [list(range(len(requests)))]
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.subject, []).append(i)
        return list(groups.values())

    def num_parameters(self, lm: LM) -> int:
        """Trainable numbers on this model, counted as the paper does (Table 3): every stored entry, R as r·d."""
        one = start(self.rank, lm.width, self.gate_kind, self.init, self.seed, torch.device("cpu"))
        return len(self.target_layers(lm)) * sum(t.numel() for t in one.values())

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch for all requests.  If the last patch of ``on`` came from this method with these layers, rank and gate, the edit
        goes on from its parameters and replaces it (BaFT §2.4, continual editing; see ``resume``); the optimiser starts anew.

        Where gates open at the subject, the requests of each subject have ops of their own, trained as if they were alone."""
        on, requests = active_patches(tuple(on)), list(requests)
        self.require_requests([requests])
        requests = list(self.contrasted(lm, requests, on))
        groups = self.apart(requests)
        made = self._each(lm, [[requests[i] for i in group] for group in groups], on, runner, progress)
        if len(made) == 1:
            return made[0]
        notes = {
            "steps": max(p.notes["steps"] for p in made),
            "loss": max(p.notes["loss"] for p in made),
            "seconds": round(sum(p.notes["seconds"] for p in made), 4),
        }
        return Patch(self.name, made[0].settings, lm.fingerprint, tuple(requests), tuple(op for p in made for op in p.ops), notes=notes)

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``; trained together, in batches of like length, a batch a core."""
        on = active_patches(tuple(on))
        return self._each(lm, [[r] for r in self.contrasted_each(lm, requests, on)], on, runner, progress)

    def _each(self, lm: LM, groups: Sequence[Sequence[EditRequest]], on: Stack, runner: Any, progress: Progress | None) -> list[Patch]:
        """A patch for each group of requests, trained together, in batches of like length, a batch a core."""
        encoded = [lm.encode([r.prompt for r in group], [r.continuation + self.end for r in group]) for group in groups]
        suited = [self.suited(group) for group in groups]
        kinds = [(editor.at_subject, len(group) > 1) for editor, group in zip(suited, groups, strict=True)]

        def train(model: LM, members: list[int], progress: Progress) -> list[Patch]:
            made: dict[int, Patch] = {}
            for kind in dict.fromkeys(kinds[i] for i in members):
                own = [i for i in members if kinds[i] == kind]
                editor = suited[own[0]]
                before = on[-1] if on and editor._can_resume(lm, on[-1]) else None
                training = Training(editor, model, [list(groups[i]) for i in own], on[:-1] if before else on, before, runner)
                made |= zip(own, training.run(progress), strict=True)
            return [made[i] for i in members]

        rows = [sum(1 + len(r.paraphrases) + self.prefixes for r in group) for group in groups]
        acted = [
            max(len(e.ids) - max(0, e.prompt_length - (editor.reach or e.prompt_length)) for e in own)
            for own, editor in zip(encoded, suited, strict=True)
        ]
        tokens = [many * n for many, n in zip(acted, rows, strict=True)]
        return in_lanes(lm, tokens, train, progress, most=max(1, MOST_ROWS // max(rows, default=1)))

    def _can_resume(self, lm: LM, patch: Patch) -> bool:
        blocks = tuple(op.site.block for op in patch.ops)
        if not self.resume or patch.method != self.name or blocks != self.target_layers(lm):
            return False
        return all(op.settings == self.op_settings and op.tensors["R"].shape[0] == self.rank for op in patch.ops)

    def regularise(self, training: Training, p: Mapping[str, Tensor], gates: Mapping[int, Tensor], alive: Tensor) -> Tensor:
        """Terms added to the task loss, [e]; none for ReFT."""
        return torch.zeros(len(alive), device=alive.device)
