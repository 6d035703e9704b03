"""How LoRA and AdaLoRA are trained: one batch over all independent edits, every token of a row active.

A *problem* is one patch to make: one request (`edit_each`), or several that share one patch (`edit`).  Parameters of all linears of one
shape are one tensor [E, S, …], so that an update is a few calls however many linears there are.

    loss = NLL + the method's penalty + contrast_weight · KL of the contrast pairs (`errata.core.keep`); all but the penalty meets the stop
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.config import to_dict
from errata.core.bank import Bank, Stack
from errata.core.fit import AdamW, FitResult, fit
from errata.core.keep import find_kept
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.problems import Chosen, RowsInTurns, WorstOfTurns, mean_per_problem, row_nll
from errata.core.tail import split_rows_at
from errata.core.tokens import pad_id
from errata.methods.adapters.op import DropoutMask
from errata.methods.texts import ways_to_ask
from errata.request import EditRequest


@dataclass
class Training:
    """One run of the optimiser over E problems."""

    editor: Any
    lm: LM
    problems: list[list[EditRequest]]
    on: Stack
    before: Patch | None
    runner_class: Any
    evaluations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.editor.require_requests(self.problems)
        self.groups: dict[tuple[int, int], list[Site]] = {}
        for site, sizes in self.editor.shapes(self.lm).items():
            self.groups.setdefault(sizes, []).append(site)
        sites = [site for own in self.groups.values() for site in own]
        texts = [[(text, r.continuation) for r in rs for text in ways_to_ask(self.lm, r, self.editor.prefixes)] for rs in self.problems]
        rows = [row for own in texts for row in own]
        device = self.lm.device
        encoded = self.lm.encode([text for text, _ in rows], [target + self.editor.end for _, target in rows])
        cut_rows = split_rows_at(encoded, [0] * len(rows), pad_id(self.lm.tokenizer), device, final=False)
        owner = torch.tensor([i for i, own in enumerate(texts) for _ in own], device=device)
        self.place = torch.tensor([j for own in texts for j in range(len(own))], device=device)
        self.even, self.most = len({len(own) for own in texts}) == 1, max(map(len, texts))
        runner = self.runner_class(self.lm, cut_rows, min(site.block for site in sites), self.on)
        self.chosen = Chosen(runner)
        # a prompt and its paraphrases train at every step, the prompt behind short texts in turns: a step costs what its tokens do
        turns = [[-1] * (len(own) - self.editor.prefixes) + list(range(self.editor.prefixes)) for own in texts]
        self.owned = RowsInTurns(owner, len(self.problems), torch.tensor([t for own in turns for t in own], device=device))
        self.worst = WorstOfTurns(len(self.owned.rows), len(self.problems), device)
        self.sites = len(sites)
        first, start = min(site.block for site in sites), None
        if self.before is not None:  # what the last patch changed is to stay, too
            start = functools.partial(self._banks, self._start(), drop=None)
        self.kept = find_kept(self.editor, self.lm, self.problems, self.runner_class, first, self.on, start=start)

    def run(self, progress: Progress | None = None) -> list[Patch]:
        """Train and pack."""
        began, e = time.perf_counter(), self.editor
        fitted = fit(
            self._start(),
            self._loss,
            steps=e.steps,
            optimizer=AdamW(e.lr),
            stop=e.stop or None,
            progress=progress,
            after_step=e.after_step(self.sites),
        )
        return self._pack(fitted, (time.perf_counter() - began) / len(self.problems))

    def _start(self) -> dict[str, Tensor]:
        """Parameters ``name.group`` [E, S, …]: those of the patch gone on from, else fresh ones, the same for every problem."""
        precision = torch.promote_types(torch.float32, self.lm.dtype)  # float32, or wider where the model is
        out: dict[str, Tensor] = {}
        for g, (sizes, sites) in enumerate(self.groups.items()):
            if self.before is None:
                each = [self.editor.initial(*sizes, generator_of(self.editor.seed, site)) for site in sites]
                own = {k: torch.stack([one[k] for one in each]) for k in each[0]}
            else:
                own = self.editor.resumed(g, sites, self.before)
            out |= {f"{k}.{g}": t.to(self.lm.device, precision).expand(len(self.problems), *t.shape) for k, t in own.items()}
        return out

    def per_group(self, p: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The parameters of each shape, {"A": [E, S, R, I], "B": [E, S, O, R], …}."""
        out: list[dict[str, Tensor]] = [{} for _ in self.groups]
        for name, t in p.items():
            k, _, g = name.partition(".")
            out[int(g)][k] = t
        return out

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        e, count = self.editor, len(alive)
        owner, kept = self.owned.of(alive, self.evaluations)
        runner = self.chosen(kept)
        self.evaluations += 1
        drop = DropoutMask(e.dropout, e.seed, self.evaluations, self.place[kept], self.most) if e.dropout else None
        summed, number = row_nll(
            runner.logits(self._banks(p, None if self.even else owner, drop)), runner.rows.labels, runner.rows.label_mask
        )
        nll = mean_per_problem(summed, owner, count, number.to(summed.dtype))
        if self.kept is not None:
            beside = self.kept.of(alive, self.evaluations)
            nll = nll + e.contrast_weight * beside.divergence(self._banks(p, None if beside.even else beside.owner, None))
        compared = self.worst(nll, alive, e.stop)
        if e.held(self.evaluations - 1):
            compared = compared.clamp_min(e.stop)
        return nll + e.penalty(self.per_group(p)), compared

    def _banks(self, p: Mapping[str, Tensor], owner: Tensor | None, drop: DropoutMask | None) -> list[Bank]:
        """The branches; ``owner`` None: equally many rows of each problem stand side by side."""
        banks = []
        for own, sites in zip(self.per_group(p), self.groups.values(), strict=True):
            parts = {"down": own["A"].unbind(1), "up": own["B"].unbind(1), "gain": self.editor.scaling(own).unbind(1)}
            for i, site in enumerate(sites):
                banks.append(Bank("adapter", site, {"drop": drop}, {k: t[i] for k, t in parts.items()}, owner))
        return banks

    def _pack(self, fitted: FitResult, seconds: float) -> list[Patch]:
        e, old, patches = self.editor, self.before, []
        settings = to_dict(e) | e.resolved(self.lm)
        for i, requests in enumerate(self.problems):
            groups = self.per_group({k: t[i] for k, t in fitted.params.items()})
            state = {f"{k}.{g}": t.clone() for g, own in enumerate(groups) for k, t in e.state(own).items()}
            notes = {"steps": int(fitted.steps[i]), "loss": round(float(fitted.loss[i]), 6), "seconds": round(seconds, 4)}
            patches.append(Patch.continued_from(old, e.name, settings, self.lm.fingerprint, requests, self._ops(groups), state, notes))
        return patches

    def _ops(self, groups: list[dict[str, Tensor]]) -> tuple[Op, ...]:
        """One problem's change, scaling folded into ``up``.  Factors with scaling 0 add nothing and are left out, all but one."""
        ops = []
        for own, sites in zip(groups, self.groups.values(), strict=True):
            scaling = self.editor.scaling({k: t[None] for k, t in own.items()})[0]
            for s, site in enumerate(sites):
                on = scaling[s].nonzero()[:, 0]
                ops.append(Op("low_rank", site, {"down": own["A"][s][on], "up": own["B"][s][:, on] * scaling[s, on]}))
        kept = [op for op in ops if len(op.tensors["down"])]
        if not kept:  # nothing was trained: the answer was known
            site, own = next(iter(self.groups.values()))[0], groups[0]
            kept = [Op("low_rank", site, {"down": own["A"][0, :1].clone(), "up": torch.zeros_like(own["B"][0, :, :1])})]
        return tuple(sorted(kept, key=lambda op: op.site))


def generator_of(seed: int, site: Site) -> torch.Generator:
    """Of a site's first values: neither the other sites nor the other problems play a part."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{site.block}/{site.point}".encode()))  # it reads 32 bits
