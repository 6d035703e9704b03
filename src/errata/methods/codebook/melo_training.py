"""MELO's two halves of an edit: which clusters and points there are (rules), and what the blocks are (training)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Bank, Stack
from errata.core.families import linear_sizes
from errata.core.fit import AdamW, fit
from errata.core.lanes import Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.problems import Owned, per_problem, row_nll
from errata.core.read import module_at
from errata.core.tail import cut_at
from errata.core.tokens import pad_id
from errata.methods.codebook.lookup import SEAM, Asked, Book, unpack


class Clusters:
    """The vector store of one patch: that of ``before`` (or nothing) and then ``texts``, one after another.

    Text t of request i belongs to block ``first + i // per_block``.
    """

    def __init__(self, editor: Any, before: Patch | None, texts: Sequence[Asked], rounding: float) -> None:
        self.editor, self.rounding, self.texts = editor, rounding, texts
        old = before.ops[0].tensors if before else None
        keys = [t.read if editor.reads == "input" else t.gave for t in texts]
        like = keys[0]
        self.first = len(before.ops[1].tensors["up"]) if before else 0  # blocks there are already
        self.book = Book(
            old["centres"].to(like) if old else like.new_empty((0, len(like))),
            old["radii"].tolist() if old else [], unpack(before.state["labels"]) if before else [], len(texts),
        )  # fmt: skip
        self.members: list[list[tuple[Tensor, int]]] = [[] for _ in self.book.radii]  # (key, block) of each cluster's points
        if old:
            for key, cluster, block in zip(old["points"].to(like), old["cluster"].tolist(), old["block"].tolist(), strict=True):
                self.members[cluster].append((key, block))
        self.counts = dict.fromkeys(("added", "split", "taken", "joined", "forgotten"), 0)
        for text, key in zip(texts, keys, strict=True):
            self._put(key, text.row.target, self.first + text.request // editor.edits_per_block)

    def _put(self, key: Tensor, label: tuple[int, ...], block: int) -> None:
        e = self.editor
        radius = e.radius * (float(torch.linalg.vector_norm(key)) if e.unit == "norm" else 1.0)
        how, cluster, near, _ = self.book.place(key, label, radius, self.rounding, SEAM)
        if how in ("added", "split"):
            self.members.append([])
        if how in ("split", "taken"):
            self._forget(near, everything=how == "taken")
        self.members[cluster].append((key, block))
        if how == "near":
            self._centre(cluster, radius)
        self.counts["joined" if how == "near" else how] += 1

    def _centre(self, cluster: int, least: float) -> None:
        """The centre is the mean of the points, the radius reaches the farthest of them and is ``least`` at least."""
        keys = torch.stack([key for key, _ in self.members[cluster]])
        self.book.keys[cluster] = keys.mean(0)
        away = torch.linalg.vector_norm(keys - self.book.keys[cluster], dim=1)
        self.book.radii[cluster] = max(float(away.max()), least)

    def _forget(self, cluster: int, everything: bool) -> None:
        """Points outside what is left of the cluster are dropped."""
        centre, radius, own = self.book.keys[cluster], self.book.radii[cluster], self.members[cluster]
        kept = [] if everything else [(k, b) for k, b in own if float(torch.linalg.vector_norm(k - centre)) <= radius]
        self.counts["forgotten"] += len(own) - len(kept)
        self.members[cluster] = kept

    def tensors(self) -> dict[str, Tensor]:
        """The router's."""
        keys = self.book.keys
        points = [(key, c, block) for c, own in enumerate(self.members) for key, block in own]
        cluster, block = (torch.tensor([p[i] for p in points], dtype=torch.long, device=keys.device) for i in (1, 2))
        return {
            "centres": keys.clone(), "radii": torch.tensor(self.book.radii, dtype=keys.dtype, device=keys.device),
            "points": torch.stack([p[0] for p in points]), "cluster": cluster, "block": block,
        }  # fmt: skip


def fresh(editor: Any, lm: LM, sites: Sequence[Site], number: int, like: Tensor) -> dict[str, Tensor]:
    """A new block: A ~ U(±1/√(rank of all blocks)), so that s A ~ U(±1/√rank), and B = 0; drawn for its number alone."""
    out = {}
    bound = (editor.blocks * editor.rank) ** -0.5
    generator = torch.Generator().manual_seed((editor.seed << 24) + number)
    for i, site in enumerate(sites):
        inner, outer = linear_sizes(module_at(lm, site))
        out[f"down.{i}"] = torch.empty(editor.rank, inner).uniform_(-bound, bound, generator=generator).to(like)
        out[f"up.{i}"] = like.new_zeros((outer, editor.rank))
    return out


Trained = tuple[dict[str, Tensor], float, int]


def train(
    editor: Any, lm: LM, stores: Sequence[Clusters], sites: Sequence[Site], on: Stack, runner: Any, progress: Progress | None
) -> list[list[Trained]]:
    """New blocks of each patch, (factors, last loss, steps) each; all of them independent problems."""
    todo: list[tuple[int, list[Asked]]] = []
    for store in stores:
        own: dict[int, list[Asked]] = {}
        for text in store.texts:
            own.setdefault(store.first + text.request // editor.edits_per_block, []).append(text)
        todo += sorted(own.items(), key=lambda item: item[0])

    def work(model: LM, members: list[int], told: Progress) -> list[Trained]:
        chosen = [todo[m] for m in members]
        start = [fresh(editor, model, sites, number, texts[0].read) for number, texts in chosen]
        return _Blocks(editor, model, [texts for _, texts in chosen], sites, on, runner).run(start, told)

    done = iter(in_lanes(lm, [sum(len(t.row.ids) for t in texts) for _, texts in todo], work, progress))
    return [[next(done) for _ in range(-(-(1 + store.texts[-1].request) // editor.edits_per_block))] for store in stores]


class _Blocks:
    """One batch of `train`.  A row trains the block that its edit was given, wherever the router would send it; the frozen stack runs
    underneath.  A block that is on is a plain low-rank change, at every token of the row."""

    def __init__(self, editor: Any, lm: LM, problems: Sequence[Sequence[Asked]], sites: Sequence[Site], on: Stack, runner: Any) -> None:
        self.editor, self.sites = editor, sites
        pairs = [(i, text.row) for i, texts in enumerate(problems) for text in texts]
        rows = cut_at([row for _, row in pairs], [0] * len(pairs), pad_id(lm.tokenizer), lm.device, final=False)
        owner = torch.tensor([i for i, _ in pairs], device=lm.device)
        self.owned = Owned(runner(lm, rows, min(s.block for s in sites), on), owner, len(problems))

    def run(self, start: Sequence[Mapping[str, Tensor]], told: Progress) -> list[Trained]:
        e = self.editor
        params = {k: torch.stack([block[k] for block in start]) for k in start[0]}
        rule = AdamW(e.lr, schedule=lambda step: e.decay ** ((step - 1) // e.decay_every))
        fitted = fit(params, self._loss, steps=e.steps, rule=rule, stop=e.stop or None, progress=told)
        blocks = [{k: t[i] for k, t in fitted.params.items()} for i in range(len(start))]
        return list(zip(blocks, fitted.loss.tolist(), fitted.steps.tolist(), strict=True))

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the target tokens of all rows of a block."""
        runner, owner, _ = self.owned.of(alive)
        straight = len(owner) == len(alive)
        banks = []
        for i, site in enumerate(self.sites):
            factors = {k: self.editor.scale * p[f"{k}.{i}"] for k in ("down", "up")}
            banks.append(Bank("low_rank", site, {}, factors, None if straight else owner))
        logits = runner.logits(banks)
        summed, number = row_nll(logits, runner.rows.labels, runner.rows.labelled)
        loss = per_problem(summed, owner, len(alive), number.to(summed.dtype))
        return loss, loss
