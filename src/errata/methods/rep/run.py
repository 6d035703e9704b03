"""One run of REP: the wrapped method's patches, the keys of every surface, the adaptors, and the patches that hold both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from errata.config import to_dict
from errata.core.bank import Stack
from errata.core.forward import hooks_disabled
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.weights import delta_weight, sum_ops
from errata.methods.locate.run import POINT, LocateThenEditRun
from errata.methods.locate.solve import whitened
from errata.methods.locate.text import LocatedText
from errata.methods.rep.surfaces import SampledTexts, draw
from errata.methods.rep.training import TRAINED, Keys, initial, together, train
from errata.request import EditRequest

STATE = "rep."


def split_patch(patch: Patch) -> Stack:
    """A patch of REP as (the wrapped method's patch, the adaptors): what the wrapped method finds on the stack."""
    if patch.method != "rep":
        return (patch,)
    adaptors = tuple(op for op in patch.ops if op.kind == "key_adaptor")
    weights = tuple(op for op in patch.ops if op.kind != "key_adaptor")
    state = {k: t for k, t in patch.state.items() if not k.startswith(STATE)}
    own = replace(
        patch, method=patch.settings["wraps"], settings=patch.settings["wrapped"], ops=weights, state=state, replaces=(), notes={}
    )
    return own, replace(patch, ops=adaptors, state={}, replaces=(), notes={})


def _own(t: Tensor) -> Tensor:
    """A copy in plain order: a stride of 0, which a single number may keep from `expand`, cannot be hashed."""
    return t.detach().clone(memory_format=torch.contiguous_format)


@dataclass
class REPRun:
    """All requests of all problems together, on top of ``on``."""

    editor: Any
    lm: LM
    on: Stack
    runner: Any
    ops: list[list[Op]] = field(init=False)  # of each problem: what the wrapped method wrote, then the adaptors
    adaptor_state: list[dict[str, Tensor]] = field(init=False)  # of each problem: what shared adaptors are trained further from

    def run(
        self, problems: Sequence[list[EditRequest]], progress: Progress | None = None, made: Sequence[Patch] | None = None
    ) -> list[Patch]:
        """A patch a problem; ``made``: the wrapped method's, where they are there already."""
        if not problems:
            return []
        self.editor.require_requests(problems)
        began, e, lm = time.perf_counter(), self.editor, self.lm
        inner, under = e.inner(lm), tuple(q for p in self.on for q in split_patch(p))
        self.before = self._resume_from(inner.target_layers(lm))
        if len(problems) > 1 and (self.before is not None or len({*map(len, problems)}) > 1):  # each goes on by itself; unequal sizes
            each = [None] * len(problems) if made is None else [[p] for p in made]
            runs = (REPRun(e, lm, self.on, self.runner).run([rs], progress, own) for rs, own in zip(problems, each, strict=True))
            return [patch for run in runs for patch in run]
        given = {"on": under, "runner": self.runner, "progress": progress}
        if made is None:
            joint = len(problems) == 1
            made = [inner.edit(lm, problems[0], **given)] if joint else inner.edit_each(lm, [rs[0] for rs in problems], **given)
        # the adaptors gone on from are the ones that are trained: keys are read without them
        self.job = LocateThenEditRun(inner, lm, list(problems), under[:-1] if self.before else under, self.runner)
        self.job.place()
        self.moments = inner.prepare(lm)
        self.ops, self.adaptor_state = [list(p.ops) for p in made], [{} for _ in made]
        # an adaptor of its own must stay shut at the facts edited beside it; a shared one serves them all
        earlier = [r for p in self.on for r in p.requests] if e.scope == "edit" else []
        self.drawn = [self._draw(r, [*earlier, *(q for q in rs if q is not r and e.scope == "edit")]) for rs in problems for r in rs]
        losses = [self._adapt(block, progress) for block in self.job.blocks]
        return self._pack(made, torch.stack(losses).sum(0), (time.perf_counter() - began) / len(problems))

    def _draw(self, request: EditRequest, others: Sequence[EditRequest]) -> SampledTexts:
        e, inner = self.editor, self.job.editor
        return draw(
            self.lm, request, e.surfaces, e.prefixes, steps=e.steps, batch=e.batch, pool=e.pool,
            away=e.away if e.closing and e.gate else 0, fact_token=inner.fact_token, seed=e.seed, name=e.name, others=others,
        )  # fmt: skip

    def _resume_from(self, blocks: Sequence[int]) -> Patch | None:
        """The patch whose shared adaptors are trained further."""
        last = self.on[-1] if self.on else None
        if self.editor.scope == "edit" or last is None or last.method != self.editor.name:
            return None
        return last if self.editor.made_with(last.settings, self._settings(blocks)) else None

    def _read(self, places: Sequence[LocatedText], block: int, owner: Tensor) -> Tensor:
        """[n, I] inputs of the edited linear, under what is written and adapted so far."""
        return self.job.read_at(places, Site(block, POINT), self.ops, owner)[0]

    def _adapt(self, block: int, progress: Progress | None) -> Tensor:
        """Train the adaptors of a block and put them among the ops; the last losses [adaptors]."""
        e, lm, constant = self.editor, self.lm, self.editor.projection == "constant"
        keys = self._keys(block)
        inner = keys.own.shape[1]
        if self.before is None:
            start = initial(inner, e.rank, max(1, int(e.hidden * inner)), constant, e.seed * 1000 + block)
        else:
            was, edits, at = self.before, len(self.before.requests), f"{STATE}{block}."
            held = next((op.tensors for op in was.ops if op.kind == "key_adaptor" and op.site == Site(block, POINT)), {})
            shapes = {k: t.shape[1:] for k, t in held.items()} | {"b": (inner, held["a"].shape[1] if held else None)}
            start = {k: was.running(at + k, *shapes.get(k, (0,))) for k in TRAINED}
            rehearsed = {k: was.running(at + k, edits, None, inner) for k in ("surfaces", "away")}
            rehearsed |= {k: was.running(at + k, edits, inner) for k in ("own", "target")}
            keys = together(rehearsed, keys, e.seed + len(self.before.requests))
        units = len(self.ops) if e.scope == "shared" else len(keys.own)
        fitted, loss = train(e, keys, {k: t.to(lm.device).expand(units, *t.shape) for k, t in start.items()}, units, progress)
        per, site = units // len(self.ops), Site(block, POINT)
        through = self._through(site, fitted["b"])
        for i, own in enumerate(self.ops):
            part = slice(i * per, (i + 1) * per)
            mine = {k: _own(t[part]) for k, t in fitted.items()}
            up = self._up(site, mine["b"], through[part], own)
            tensors = {k: t for k, t in mine.items() if k != "b"} | {"u": up}
            own.append(Op("key_adaptor", site, tensors, {"tau": e.tau, "gate": e.gate, "constant": constant}))
            self.adaptor_state[i][f"{STATE}{block}.b"] = mine["b"]  # folded into u; kept so that moved keys can be looked at
        if e.scope == "shared":
            each = len(keys.own) // len(self.ops)
            for i, kept in enumerate(self.adaptor_state):
                few = keys.of(slice(i * each, (i + 1) * each), e.rehearse)
                kept |= {f"{STATE}{block}.{k}": t for k, t in ({k: _own(fitted[k][i]) for k in TRAINED} | few).items()}
        return loss

    def _keys(self, block: int) -> Keys:
        e, job, lm = self.editor, self.job, self.lm
        every, _ = job.read_keys(block, self.ops)
        mean, own = job.average(every), every[:, 0]
        target = normalize(whitened(self.moments.get(Site(block, POINT)), mean), dim=-1).to(own) if e.whitened() else mean
        counts = torch.tensor([len(d.texts) for d in self.drawn])
        surfaces = self._read([t for d in self.drawn for t in d.texts], block, job.owner.repeat_interleave(counts.to(lm.device)))
        first = counts.cumsum(0) - counts
        steps = torch.tensor([d.steps for d in self.drawn]) + first[:, None, None]  # [n, S, m]
        places = [place for d in self.drawn for place in d.away]
        away = own[:, None, :][:, :0]
        if places:
            away = self._read(places, block, job.owner.repeat_interleave(len(places) // len(own))).unflatten(0, (len(own), -1))
        return Keys(surfaces, steps.transpose(0, 1).to(lm.device), own, target, away)

    def _through(self, site: Site, b: Tensor) -> Tensor:
        """W B of all adaptors, [U, r, O]: the frozen linear is asked, not read."""
        module, rows = self.lm.module(site), b.mT
        with torch.no_grad(), hooks_disabled(self.lm.hf):
            zero = module(torch.zeros(1, rows.shape[-1], dtype=self.lm.dtype, device=self.lm.device))
            out = module(rows.flatten(0, 1).to(self.lm.dtype)).to(b.dtype) - zero.to(b.dtype)
        moved: Tensor = out.unflatten(0, rows.shape[:2])
        return moved

    def _up(self, site: Site, b: Tensor, through: Tensor, ops: Sequence[Op]) -> Tensor:
        """U = (W + ΔW) B, [n, O, r]."""
        written = [op for op in (*(self.before.ops if self.before else ()), *ops) if op.site == site and op.kind != "key_adaptor"]
        return (through + (b.mT.double().cpu() @ delta_weight(sum_ops(written)).T).to(through)).mT.contiguous()

    def _settings(self, blocks: Sequence[int]) -> dict[str, Any]:
        e = self.editor
        return to_dict(e) | {"layers": list(blocks)}

    def _pack(self, made: Sequence[Patch], loss: Tensor, seconds: float) -> list[Patch]:
        out, old = [], self.before
        for patch, ops, kept in zip(made, self.ops, self.adaptor_state, strict=True):
            notes = {**patch.notes, "seconds": round(seconds, 4), "adaptor loss": round(float(loss.mean()), 6)}
            state = dict(patch.state)
            if old is not None:
                adaptors = [op for op in ops if op.kind == "key_adaptor"]
                weights = [op for op in (*old.ops, *ops) if op.kind != "key_adaptor"]
                ops = [*(sum_ops([w for w in weights if w.site == a.site]) for a in adaptors), *adaptors]
                state = {k: torch.cat([old.state[k].cpu(), t.cpu()]) for k, t in state.items()}
            how = (self.editor.name, self._settings(self.job.blocks), self.lm.fingerprint)
            out.append(Patch.continued_from(old, *how, patch.requests, ops, state | kept, notes))
        return out
