"""What WISE and WISE-light share as editors: the linear, its activation, one patch or many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from errata.core.bank import Stack, active_patches
from errata.core.lanes import Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.errors import ConfigError, PatchError
from errata.methods.base import ContrastEditor
from errata.methods.wise.memory import Memories
from errata.methods.wise.op import activation
from errata.methods.wise.run import WISERun
from errata.request import EditRequest

DEPTH = 27 / 32  # LLaMA's block 27
NUMBERS, TOKENS = 1 << 28, 1 << 13  # of one batch: written-out ΔW and its gradient; tokens of all texts


class WISEEditor(ContrastEditor):
    """The entry points; the hyper-parameters are `errata.methods.wise.wise.WISE`'s."""

    layer: int | None
    point: str
    activation: str

    def target_site(self, lm: LM) -> Site:
        """The linear to edit on this model; `ConfigError` for one that does not exist."""
        layer = lm.nearest_block(int(lm.depth * DEPTH + 0.5)) if self.layer is None else self.layer
        if not 0 <= layer < lm.depth or self.point == "block":
            raise ConfigError(f"{self.name}: no linear {self.point!r} at block {layer}; blocks are 0 to {lm.depth - 1}")
        try:
            lm.check_site(Site(layer, self.point))
        except PatchError as error:
            raise ConfigError(f"{self.name}: {error}; set layer, or point to another linear") from None
        return Site(layer, self.point)

    def act(self, lm: LM) -> str:
        """The name of σ."""
        if self.activation == "input":
            return "linear"
        names = (getattr(lm.config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function", "activation"))
        name = next((n for n in names if isinstance(n, str)), "")
        try:
            activation(name)
        except KeyError:
            raise ConfigError(f"{self.name}: this model's config names no hidden activation; set activation=input") from None
        return name

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch; requests are written one after the other."""
        self.require_requests([requests])
        requests = self.contrasted(lm, requests, on)
        began, job = time.perf_counter(), WISERun(self, lm, active_patches(tuple(on)), runner)
        memories, notes = job.memories, []
        for request in requests:
            [(memories, facts)] = job.train(lm, [job.texts(request)], memories, progress)
            notes.append(facts)
        mean = {k: round(sum(n[k] for n in notes) / len(notes), 6) for k in ("loss", "act")}
        return job.patch(requests, memories, {"steps": max(n["steps"] for n in notes), **mean}, time.perf_counter() - began)

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``; trained together, in batches of like length."""
        if not requests:
            return []
        requests = self.contrasted_each(lm, requests, on)
        began, job = time.perf_counter(), WISERun(self, lm, active_patches(tuple(on)), runner)
        texts = [job.texts(r) for r in requests]
        tokens = [t.tokens for t in texts]
        most = max(1, min(NUMBERS // (2 * job.memories.size), TOKENS // max(tokens)))

        def work(model: LM, members: list[int], progress: Progress) -> list[tuple[Memories, dict[str, Any]]]:
            return job.train(model, [texts[i] for i in members], job.memories, progress)

        made = in_lanes(lm, tokens, work, progress, most=most)
        seconds = (time.perf_counter() - began) / len(requests)
        return [job.patch([r], memories, facts, seconds) for r, (memories, facts) in zip(requests, made, strict=True)]
