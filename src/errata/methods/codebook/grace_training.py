"""GRACE's two halves of an edit: which entries there are (rules), and what their values are (training)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Bank, Stack
from errata.core.fit import AdamW, fit
from errata.core.lanes import Progress, in_lanes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.problems import Owned, per_problem, row_nll
from errata.core.tail import cut_at
from errata.core.tokens import pad_id
from errata.methods.codebook.lookup import Asked, Book, hit, unpack


class Filled:
    """The codebook of one patch: ``before`` (or nothing) and then ``texts``, one after another.

    ``values`` a tensor an entry, new ones at their start; ``trains`` {entry: the texts that hit it and have its label}.
    """

    def __init__(self, editor: Any, before: Patch | None, texts: Sequence[Asked], rounding: float) -> None:
        self.editor, self.rounding, self.done = editor, rounding, []  # type: ignore[var-annotated]
        old = before.ops[0].tensors if before else None
        like = texts[0].read
        keys = old["keys"].to(like) if old else like.new_empty((0, len(like)))
        labels = unpack(before.state["labels"]) if before else []
        self.book = Book(keys, old["radii"].tolist() if old else [], labels, len(texts))
        self.values = list(old["values"].to(like)) if old else []
        self.counts = dict.fromkeys(("added", "split", "taken", "joined", "expanded"), 0)
        for text in texts:
            self._put(text)
        self.radii = torch.tensor(self.book.radii, dtype=like.dtype, device=like.device)
        found = hit(self.book.keys, self.radii, torch.stack([t.read for t in texts]), rounding).tolist()
        self.trains: dict[int, list[Asked]] = {}
        for text, entry in zip(texts, found, strict=True):
            if entry >= 0 and self.book.labels[entry] == text.row.target:
                self.trains.setdefault(entry, []).append(text)
        self.lost = len(texts) - sum(map(len, self.trains.values()))

    def _put(self, text: Asked) -> None:
        e, query = self.editor, text.read
        radius = e.eps * (float(torch.linalg.vector_norm(query)) if e.unit == "norm" else 1.0)
        how, entry, _, rho = self.book.place(query, text.row.target, radius, self.rounding, 0.0)
        if how == "near":
            reach = self.book.radii[entry] + self.rounding * float(torch.linalg.vector_norm(query))
            how = "expanded" if rho > reach else "joined"
            if how == "expanded":
                self.book.radii[entry] = rho
                if e.expand == "moving_average":
                    self.book.keys[entry] = (self.book.keys[entry] + query) / 2
        else:
            start = text.gave.clone() if e.value == "warm" else _cold(e.seed, entry, text.gave)
            self.values[entry:] = [start] if how != "taken" else [start, *self.values[entry + 1 :]]
        self.counts[how] += 1

    def notes(self) -> dict[str, Any]:
        """How entries came about, and the last loss and steps, averaged over those that trained."""
        count = max(1, len(self.done))
        loss, steps = (sum(d[i] for d in self.done) / count for i in (0, 1))
        return {"steps": steps, "loss": round(loss, 6), "entries": len(self.values), **self.counts, "lost": self.lost}


def _cold(seed: int, entry: int, like: Tensor) -> Tensor:
    """U[0, 1), drawn for this entry alone, so that it does not matter what else is edited."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed((seed << 24) + entry)).to(like)


def train(editor: Any, lm: LM, books: Sequence[Filled], site: Site, on: Stack, runner: Any, progress: Progress | None) -> None:
    """The values of all books' entries that train, each an independent problem; they are put into the books."""
    todo = [(book, entry, rows) for book in books for entry, rows in sorted(book.trains.items())]

    def work(model: LM, members: list[int], told: Progress) -> list[tuple[Tensor, float, int]]:
        chosen = [todo[m] for m in members]
        return _Values(editor, model, [rows for _, _, rows in chosen], site, on, runner).run(
            torch.stack([book.values[entry] for book, entry, _ in chosen]), told
        )

    long = [sum(len(t.row.target) if editor.replace == "last" else len(t.row.ids) for t in rows) for _, _, rows in todo]
    for (book, entry, _), (value, loss, steps) in zip(todo, in_lanes(lm, long, work, progress), strict=True):
        book.values[entry] = value
        book.done.append((loss, steps))


class _Values:
    """One batch of `train`.  A row's key does not change while values do (nothing the key depends on is replaced), so what it hits is
    known: in training every row has a codebook of one entry that is always hit."""

    def __init__(self, editor: Any, lm: LM, problems: Sequence[Sequence[Asked]], site: Site, on: Stack, runner: Any) -> None:
        self.editor, self.site, self.slot = editor, site, len(on)
        pairs = [(i, text.row) for i, texts in enumerate(problems) for text in texts]
        starts = [row.prompt_length - 1 if editor.replace == "last" else 0 for _, row in pairs]
        rows = cut_at([row for _, row in pairs], starts, pad_id(lm.tokenizer), lm.device, final=False)
        owner = torch.tensor([i for i, _ in pairs], device=lm.device)
        self.owned = Owned(runner(lm, rows, site.block, on), owner, len(problems))
        self.inner = len(problems[0][0].read)

    def run(self, values: Tensor, told: Progress) -> list[tuple[Tensor, float, int]]:
        e = self.editor
        fitted = fit({"value": values}, self._loss, steps=e.steps, rule=AdamW(e.lr), stop=e.stop or None, progress=told)
        return list(zip(fitted.params["value"], fitted.loss.tolist(), fitted.steps.tolist(), strict=True))

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over a problem's rows of the mean loss of their target tokens."""
        runner, owner, _ = self.owned.of(alive)
        value = p["value"][owner][:, None]  # [B, 1, O]
        book = {"keys": value.new_zeros((len(owner), 1, self.inner)), "values": value, "radii": value.new_full((len(owner), 1), torch.inf)}
        settings = {"replace": self.editor.replace, "rounding": 0.0}
        logits = runner.logits([Bank("codebook", self.site, settings, book, slot=self.slot)])
        summed, number = row_nll(logits, runner.rows.labels, runner.rows.labelled)
        loss = per_problem(summed / number, owner, len(alive))
        return loss, loss
