"""One run of a locate-then-edit method: texts placed, values found, keys read, the change solved and written block by block.

Several blocks are edited one after the other, each on top of those before it; all requests of all problems share every pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from errata.config import to_dict
from errata.core import experts
from errata.core.bank import Bank, Stack, active_patches
from errata.core.experts import Experts
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import adds_directly, read_activations
from errata.core.weights import compact, sizes
from errata.errors import ConfigError, FitError
from errata.methods.locate.text import LocatedText, place, place_kl, prefixes
from errata.methods.locate.values import ValueResult, ValueTask, optimise
from errata.request import EditRequest

POINT = "mlp_down"


@dataclass
class LocateThenEditRun:
    """One run: all requests of all problems together."""

    editor: Any
    lm: LM
    problems: list[list[EditRequest]]
    on: Stack
    runner: Any
    start: Tensor = field(init=False)  # [N, D] what stood where the value is written
    goal: Tensor = field(init=False)  # [N, D] the value

    def __post_init__(self) -> None:
        self.editor.require_requests(self.problems)
        self.blocks = self.editor.target_layers(self.lm)
        self.sites = {block: self.editor.site(self.lm, block) for block in self.blocks}
        if not adds_directly(self.lm, self.sites[self.blocks[-1]]):
            self.editor = self.editor.alone(self.lm)
        self.on = active_patches(tuple(self.on))
        self.requests = [r for rs in self.problems for r in rs]
        self.owner = torch.tensor([i for i, rs in enumerate(self.problems) for _ in rs], device=self.lm.device)
        ends = torch.tensor([0, *map(len, self.problems)]).cumsum(0).tolist()
        self.groups = [list(range(a, b)) for a, b in pairwise(ends)]

    def run(self, progress: Progress | None = None) -> list[Patch]:
        if not self.problems:
            return []
        began, e = time.perf_counter(), self.editor
        self.moments = e.prepare(self.lm)
        self.place()
        found = self.values(progress)
        ops = self._write(torch.stack([f.delta[: self.lm.width] for f in found]))
        state = e.patch_state(self, ops)
        return self._pack(ops, state, found, (time.perf_counter() - began) / len(self.problems))

    def place(self) -> None:
        """The prefixes, and every text with the place of its subject."""
        e, lm = self.editor, self.lm
        self.before = prefixes(lm, e.prefixes, e.seed)
        self.placed = [place(lm, r, self.before, e.end, e.name, e.fact_token) for r in self.requests]
        last = self.sites[self.blocks[-1]]
        self.value_sites = e.value_sites(last, adds_directly(lm, last))

    def values(self, progress: Progress | None) -> list[ValueResult]:
        """δ of every request."""
        e = self.editor
        self.start = self.read_bare(self.value_sites[0], [])
        norms = torch.linalg.vector_norm(self.start, dim=-1).tolist()
        wanted = [
            ValueTask(tuple(rows), place_kl(self.lm, r) if e.kl else None, norm)
            for r, rows, norm in zip(self.requests, self.placed, norms, strict=True)
        ]
        return optimise(self.lm, wanted, self.value_sites, e.objective(self.lm), self.on, self.runner, progress)

    def banks(self, ops: Sequence[list[Op]]) -> list[Bank]:
        """What has been written so far, an entry a problem."""
        out = []
        for column in zip(*ops, strict=True):
            first, tensors = column[0], {k: [op.tensors[k] for op in column] for k in column[0].tensors}
            apart = first.kind == "experts"  # each has its own
            params = Experts.stack_params(column, self.lm.device) if apart else {k: torch.stack(own) for k, own in tensors.items()}
            out.append(Bank(first.kind, first.site, first.settings, params))
        return out

    def read_bare(self, site: Site, ops: Sequence[list[Op]]) -> Tensor:
        """[N, O] output of the site at the subject of the bare prompt, under ``on`` and ``ops``."""
        first = [placed[0] for placed in self.placed]
        return self.read_at(first, site, ops, self.owner)[1]

    def read_at(self, places: Sequence[LocatedText], site: Site, ops: Sequence[list[Op]], owner: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs, outputs) of the site at these places, under ``on`` and the ops of each place's problem (``owner``)."""
        rows, at = [p.row for p in places], [p.at for p in places]
        return read_activations(self.lm, rows, [site], at=at, on=self.on, banks=self.banks(ops), owner=owner)[site]

    def read_keys(self, block: int, ops: Sequence[list[Op]]) -> tuple[Tensor, Tensor]:
        """(inputs [N, T, I], outputs [N, T, O]) of the edited linear at the subject behind each of T prefixes."""
        every = [p for placed in self.placed for p in placed]
        x, y = self.read_at(every, self.sites[block], ops, self.owner.repeat_interleave(len(self.before)))
        count = len(self.requests)
        return x.unflatten(0, (count, -1)), y.unflatten(0, (count, -1))

    def average(self, values: Tensor) -> Tensor:
        """[N, T, ·] -> [N, ·] with the method's weights of the prefixes."""
        weights = torch.tensor(self.editor.weights(values.shape[1]), device=values.device, dtype=values.dtype)
        return torch.einsum("ntd,t->nd", values, weights)

    def _write(self, delta: Tensor) -> list[list[Op]]:
        """Ops of each problem, a block at a time, each on top of the ones before."""
        e, self.goal = self.editor, self.start + delta
        ops: list[list[Op]] = [[] for _ in self.problems]
        for i, block in enumerate(self.blocks):
            x, y = self.read_keys(block, ops)
            residual = (self.goal - e.current(self, y, ops)) / e.divisor(len(self.blocks) - i)
            downs = self._downs(block, x)
            for own, group, down in zip(ops, self.groups, downs, strict=True):
                tensors = {"down": down.to(delta.dtype).contiguous(), "up": residual[group].T.contiguous()}
                if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
                    raise FitError(
                        f"{e.name}: the change of block {block} is not finite; lower v_lr, or make the statistics from more text"
                    )
                own.append(self._finished(self.sites[block], tensors))
        return ops

    def _downs(self, block: int, keys: Tensor) -> list[Tensor]:
        e = self.editor
        try:
            out: list[Tensor] = e.down_factors(
                self.moments.get(self.sites[block]), self.average(keys), keys[:, 0], self.groups, self.past(block)
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise FitError(
                f"{e.name}: block {block}: two requests have the same key (the same subject in the same words), so both cannot be written "
                "exactly; make them one after the other, or allow a ridge"
            ) from None
        return out

    def _finished(self, site: Site, tensors: dict[str, Tensor]) -> Op:
        """Conditioned where that is asked for; never more factors than the matrix has dimensions.  Of experts, those that a key reaches."""
        if site.point == experts.POINT:
            if self.editor.conditioning.active:
                raise ConfigError(f"{self.editor.name}: rect, prune and norm_constraint are not for experts; leave them off, or set layers")
            chosen, down = experts.pack(tensors["down"], experts.sizes(self.lm.module(site))[0])
            return Op("experts", site, {"experts": chosen, "down": down, "up": tensors["up"]})
        op = Op("low_rank", site, tensors)
        if self.editor.conditioning.active:
            return self.editor.conditioning.apply(self.lm, op)  # type: ignore[no-any-return]
        rank, inner, outer = sizes(op)
        return compact(op) if rank > min(inner, outer) else op

    def past(self, block: int) -> Tensor | None:
        """Keys [n, I] that live patches of this method on the stack wrote at this block."""
        kept = [self._keys_of(p, block) for p in self.on if p.method == self.editor.name and f"keys.{block}" in p.state]
        return torch.cat(kept).to(self.lm.device) if kept else None

    def state_of(self, block: int, keys: Tensor) -> dict[str, Tensor]:
        """Keys [n, I] of a patch at a block as its state; of experts, the part that is not 0."""
        if self.sites[block].point != experts.POINT:
            return {f"keys.{block}": keys.contiguous()}
        chosen, packed = experts.pack(keys, experts.sizes(self.lm.module(self.sites[block]))[0])
        return {f"keys.{block}": packed, f"experts.{block}": chosen}

    def _keys_of(self, patch: Patch, block: int) -> Tensor:
        name, site = f"keys.{block}", self.sites[block]
        if site.point != experts.POINT:
            return patch.running(name, None, self.lm.check_site(site)[0])
        count, inner, _ = experts.sizes(self.lm.module(site))
        chosen = patch.running(f"experts.{block}", None, whole=True)
        return experts.unpack(chosen, patch.running(name, None, len(chosen) * inner), count)

    def _pack(
        self, ops: Sequence[list[Op]], state: Sequence[dict[str, Tensor]], found: Sequence[ValueResult], seconds: float
    ) -> list[Patch]:
        e = self.editor
        settings = to_dict(e) | {"layers": list(self.blocks)}
        patches = []
        for requests, group, own, kept in zip(self.problems, self.groups, ops, state, strict=True):
            losses, steps = [found[i].loss for i in group], [found[i].steps for i in group]
            notes = {
                "steps": max(steps),
                "loss": round(sum(losses) / len(losses), 6),
                "values stopped": sum(loss < e.v_stop for loss in losses),
                "seconds": round(seconds, 4),
                **e.facts(self),
            }
            patches.append(Patch(e.name, settings, self.lm.fingerprint, tuple(requests), tuple(own), kept, (), notes))
        return patches
