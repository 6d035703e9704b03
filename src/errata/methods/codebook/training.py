"""How GRACE's values and MELO's blocks are trained.

Which entry or block a row trains is known beforehand, so each is a problem of its own, and those of all patches train in one batch.
"""

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
from errata.core.patch import Op, Patch, Site
from errata.core.problems import ProblemRows, mean_per_problem, row_nll
from errata.core.tail import split_rows_at
from errata.core.tokens import pad_id
from errata.methods.codebook.store import Clusters, FilledCodebook, KeyedText

Trained = tuple[dict[str, Tensor], float, int]  # (factors of a block, last loss, steps)


def train_values(
    editor: Any, lm: LM, books: Sequence[FilledCodebook], site: Site, on: Stack, runner: Any, progress: Progress | None
) -> None:
    """The values of all books' entries that train, each an independent problem; they are put into the books."""
    todo = [(book, entry, rows) for book in books for entry, rows in sorted(book.trains.items())]

    def work(model: LM, members: list[int], progress: Progress) -> list[tuple[Tensor, float, int]]:
        chosen = [todo[m] for m in members]
        return _Values(editor, model, [rows for _, _, rows in chosen], site, on, runner).run(
            torch.stack([book.values[entry] for book, entry, _ in chosen]), progress
        )

    long = [sum(len(t.row.target) if editor.replace == "last" else len(t.row.ids) for t in rows) for _, _, rows in todo]
    for (book, entry, _), (value, loss, steps) in zip(todo, in_lanes(lm, long, work, progress), strict=True):
        book.values[entry] = value
        book.done.append((loss, steps))


def _rows(lm: LM, problems: Sequence[Sequence[KeyedText]], last: bool, first: int, on: Stack, runner: Any) -> ProblemRows:
    """The texts of each problem as rows, active from the prompt's ``last`` token on or from the first; block ``first`` is the lowest
    to run."""
    pairs = [(i, text.row) for i, texts in enumerate(problems) for text in texts]
    starts = [row.prompt_length - 1 if last else 0 for _, row in pairs]
    rows = split_rows_at([row for _, row in pairs], starts, pad_id(lm.tokenizer), lm.device, final=False)
    return ProblemRows(runner(lm, rows, first, on), torch.tensor([i for i, _ in pairs], device=lm.device), len(problems))


class _Values:
    """One batch of `train_values`.  A row's key does not change while values do (nothing the key depends on is replaced), so what it hits
    is known: in training every row has a codebook of one entry that is always hit."""

    def __init__(self, editor: Any, lm: LM, problems: Sequence[Sequence[KeyedText]], site: Site, on: Stack, runner: Any) -> None:
        self.editor, self.site, self.patch_index = editor, site, len(on)
        self.owned = _rows(lm, problems, editor.replace == "last", site.block, on, runner)
        self.inner = len(problems[0][0].read)

    def run(self, values: Tensor, progress: Progress) -> list[tuple[Tensor, float, int]]:
        e = self.editor
        fitted = fit({"value": values}, self._loss, steps=e.steps, optimizer=AdamW(e.lr), stop=e.stop or None, progress=progress)
        return list(zip(fitted.params["value"], fitted.loss.tolist(), fitted.steps.tolist(), strict=True))

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over a problem's rows of the mean loss of their target tokens."""
        runner, owner, _ = self.owned.of(alive)
        value = p["value"][owner][:, None]  # [B, 1, O]
        book = {"keys": value.new_zeros((len(owner), 1, self.inner)), "values": value, "radii": value.new_full((len(owner), 1), torch.inf)}
        settings = {"replace": self.editor.replace, "rounding": 0.0}
        logits = runner.logits([Bank("codebook", self.site, settings, book, patch_index=self.patch_index)])
        summed, number = row_nll(logits, runner.rows.labels, runner.rows.label_mask)
        loss = mean_per_problem(summed / number, owner, len(alive))
        return loss, loss


def fresh(editor: Any, lm: LM, sites: Sequence[Site], number: int, like: Tensor) -> dict[str, Tensor]:
    """A new block: A ~ U(±1/√(rank of all blocks)), so that s A ~ U(±1/√rank), and B = 0; drawn for its number alone."""
    out = {}
    bound = (editor.blocks * editor.rank) ** -0.5
    generator = torch.Generator().manual_seed((editor.seed << 24) + number)
    for i, site in enumerate(sites):
        inner, outer = linear_sizes(lm.module(site))
        out[f"down.{i}"] = torch.empty(editor.rank, inner).uniform_(-bound, bound, generator=generator).to(like)
        out[f"up.{i}"] = like.new_zeros((outer, editor.rank))
    return out


def train_blocks(
    editor: Any, lm: LM, stores: Sequence[Clusters], sites: Sequence[Site], on: Stack, runner: Any, progress: Progress | None
) -> list[list[Trained]]:
    """New blocks of each patch, (factors, last loss, steps) each; all of them independent problems."""
    todo: list[tuple[int, list[KeyedText]]] = []
    for store in stores:
        own: dict[int, list[KeyedText]] = {}
        for text in store.texts:
            own.setdefault(store.first + text.request // editor.edits_per_block, []).append(text)
        todo += sorted(own.items(), key=lambda item: item[0])

    def work(model: LM, members: list[int], progress: Progress) -> list[Trained]:
        chosen = [todo[m] for m in members]
        start = [fresh(editor, model, sites, number, texts[0].read) for number, texts in chosen]
        return _Blocks(editor, model, [texts for _, texts in chosen], sites, on, runner).run(start, progress)

    done = iter(in_lanes(lm, [sum(len(t.row.ids) for t in texts) for _, texts in todo], work, progress))
    return [[next(done) for _ in range(-(-(1 + store.texts[-1].request) // editor.edits_per_block))] for store in stores]


def routed(sites: Sequence[Site], made: Sequence[Trained], before: Patch | None, scale: float) -> list[Op]:
    """The ops of new blocks, behind those of the patch gone on from, at each site."""
    ops = []
    for i, site in enumerate(sites):
        new = {k: torch.stack([factors[f"{k}.{i}"] for factors, _, _ in made]) for k in ("down", "up")}
        if before:
            new = {k: torch.cat([before.ops[i + 1].tensors[k].to(t), t]) for k, t in new.items()}
        ops.append(Op("routed", site, new, {"scale": scale}))
    return ops


class _Blocks:
    """One batch of `train_blocks`.  A row trains the block that its edit was given, wherever the router would send it; the frozen stack
    runs underneath.  A block that is on is a plain low-rank change, at every token of the row."""

    def __init__(self, editor: Any, lm: LM, problems: Sequence[Sequence[KeyedText]], sites: Sequence[Site], on: Stack, runner: Any) -> None:
        self.editor, self.sites = editor, sites
        self.owned = _rows(lm, problems, False, min(s.block for s in sites), on, runner)

    def run(self, start: Sequence[Mapping[str, Tensor]], progress: Progress) -> list[Trained]:
        e = self.editor
        params = {k: torch.stack([block[k] for block in start]) for k in start[0]}
        rule = AdamW(e.lr, schedule=lambda step: e.decay ** ((step - 1) // e.decay_every))
        fitted = fit(params, self._loss, steps=e.steps, optimizer=rule, stop=e.stop or None, progress=progress)
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
        summed, number = row_nll(logits, runner.rows.labels, runner.rows.label_mask)
        loss = mean_per_problem(summed, owner, len(alive), number.to(summed.dtype))
        return loss, loss
