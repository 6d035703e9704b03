"""How fine-tuning editors train: ΔW beside frozen MLP matrices, in mini-batches, independent edits side by side.

    y + ΔW x  at every token,   ΔW [E, O, I] from zero,   Adam,   |ΔW_ij| ≤ ε after each update where a bound is set
    loss of a mini-batch = mean over its rows of the objective + contrast_weight · KL of its requests' contrast pairs (`errata.core.keep`)

A *problem* is one patch to make: one request (`edit_each`), or several that share one patch (`edit`).  ΔW is what this edit adds:
an earlier edit runs underneath, as part of the frozen stack, so training goes on from the weights it left, and each is undone by itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from errata.config import to_dict
from errata.core.bank import Bank, Stack
from errata.core.fit import AdamW, FitResult, fit_epochs
from errata.core.keep import KeptRows, find_kept
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.problems import row_nll
from errata.core.tail import SplitRows, split_rows_at
from errata.core.tokens import Encoded, pad_id
from errata.core.weights import low_rank, spectrum
from errata.methods.texts import ways_to_ask
from errata.request import EditRequest

TOKENS_KEPT = 2**16  # padded tokens whose frozen states are kept; with more, each mini-batch makes its own anew


class Objective(Protocol):
    """What the rows are and what each row's loss is: ``loss(logits [M, V], rows, their numbers [b])`` -> [b]."""

    rows: SplitRows

    def loss(self, logits: Tensor, rows: SplitRows, numbers: Tensor) -> Tensor: ...


class TargetNew:
    """−1/m Σ_t log p(o_t | prompt, o_<t): each target token behind those before it."""

    def __init__(self, lm: LM, encoded: Sequence[Encoded]) -> None:
        self.rows = split_rows_at(encoded, [0] * len(encoded), pad_id(lm.tokenizer), lm.device, final=False)

    def loss(self, logits: Tensor, rows: SplitRows, numbers: Tensor) -> Tensor:
        summed, number = row_nll(logits, rows.labels, rows.label_mask)
        return summed / number


class PromptLast:
    """−1/m Σ_t log p(o_t | prompt): every target token under the one distribution behind the prompt, which alone is read."""

    def __init__(self, lm: LM, encoded: Sequence[Encoded], targets: Sequence[Sequence[int]]) -> None:
        prompts = [Encoded(e.ids[: e.prompt_length], e.prompt_length) for e in encoded]
        self.rows = split_rows_at(prompts, [0] * len(prompts), pad_id(lm.tokenizer), lm.device)
        for i, prompt in enumerate(prompts):
            self.rows.labels[i, prompt.prompt_length - 1] = 0  # not a target: it marks the place whose prediction counts
        self.ids = torch.zeros((len(targets), max(map(len, targets))), dtype=torch.long, device=lm.device)
        self.real = torch.zeros_like(self.ids, dtype=torch.bool)
        for i, ids in enumerate(targets):
            self.ids[i, : len(ids)], self.real[i, : len(ids)] = torch.tensor(list(ids), device=lm.device), True

    def loss(self, logits: Tensor, rows: SplitRows, numbers: Tensor) -> Tensor:
        log_p = logits.to(torch.promote_types(torch.float32, logits.dtype)).log_softmax(-1)
        real = self.real[numbers]
        return -(log_p.gather(1, self.ids[numbers]) * real).sum(1) / real.sum(1)


@dataclass(frozen=True)
class _View:
    """A mini-batch: its rows' numbers [b], their problems among those running [b], rows of each of these [e].

    ``entries`` as in `Bank.rows`: None where a product for the one problem, or one a problem, needs no routing.  ``kept``: the contrast
    pairs of its requests by turns, none without the output term.
    """

    runner: Any  # None: to be made for the occasion
    numbers: Tensor
    owner: Tensor
    entries: Tensor | None
    count: Tensor
    kept: list[KeptRows]


@dataclass
class DenseTraining:
    """One run of the optimiser over E problems."""

    editor: Any
    lm: LM
    problems: list[list[EditRequest]]
    on: Stack
    runner_class: Any
    owner: Tensor = field(init=False)  # [B] the problem of each row
    batches: int = field(init=False, default=0)  # of a pass

    def __post_init__(self) -> None:
        self.editor.require_requests(self.problems)
        self.blocks = self.editor.target_layers(self.lm)
        requests = [(i, r) for i, rs in enumerate(self.problems) for r in rs]
        asked = [(n, i, r, text) for n, (i, r) in enumerate(requests) for text in ways_to_ask(self.lm, r, self.editor.prefixes)]
        pairs = [(i, text, r.continuation) for _, i, r, text in asked]
        self.sizes = [sum(1 for j, _, _ in pairs if j == i) for i in range(len(self.problems))]
        self.owner = torch.tensor([i for i, _, _ in pairs], device=self.lm.device)
        self.batches = max((-(-n // self.editor.batch_size) for n in self.sizes), default=0)
        self.views: tuple[tuple[int, int], dict[int, _View]] = ((-1, -1), {})
        if pairs:
            self.objective: Objective = self.editor.objective(self.lm, [p for _, p, _ in pairs], [t for _, _, t in pairs])
            kept = self.objective.rows.active.numel() <= TOKENS_KEPT
            self.runner = self._runner(self.objective.rows) if kept else None
            self.request = torch.tensor([n for n, _, _, _ in asked], device=self.lm.device)
            self.kept = find_kept(self.editor, self.lm, self.problems, self.runner_class, min(self.blocks), self.on)

    def _runner(self, rows: SplitRows) -> Any:
        return self.runner_class(self.lm, rows, min(self.blocks), self.on)

    def run(self, progress: Progress | None = None) -> list[Patch]:
        """Train and pack; an empty list of problems is an empty list of patches."""
        if not self.problems:
            return []
        e, began = self.editor, time.perf_counter()
        precision = torch.promote_types(torch.float32, self.lm.dtype)
        zeros = {
            str(block): torch.zeros((len(self.problems), outer, inner), device=self.lm.device, dtype=precision)
            for block, (inner, outer) in e.sizes(self.lm, self.blocks).items()
        }
        fitted = fit_epochs(
            zeros,
            self._loss,
            epochs=e.steps,
            batches=self.batches,
            optimizer=AdamW(e.lr),
            stop=e.stop,
            progress=progress,
            project=self._clamp,
        )
        return self._pack(fitted, (time.perf_counter() - began) / len(self.problems))

    def _clamp(self, p: Mapping[str, Tensor], alive: Tensor) -> None:
        """ΔW is counted from the weights at the start of this edit, so the bound is one on ΔW itself."""
        if self.editor.norm_constraint is not None:
            for t in p.values():
                t.clamp_(-self.editor.norm_constraint, self.editor.norm_constraint)

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor, *, number: int, batch: int) -> tuple[Tensor, Tensor]:
        view = self._view(alive, number, batch)
        if not len(view.numbers):
            return torch.zeros(len(alive), device=alive.device), view.count
        runner = view.runner or self._runner(self.objective.rows.select(view.numbers))
        row = self.objective.loss(runner.logits(self._banks(p, view.entries)), runner.rows, view.numbers)
        summed = torch.zeros(len(alive), device=row.device, dtype=row.dtype).index_add(0, view.owner, row)
        loss = summed / view.count.clamp_min(1)
        if view.kept:
            kept = view.kept[number % len(view.kept)]
            loss = loss + self.editor.contrast_weight * kept.divergence(self._banks(p, None if len(alive) == 1 else kept.owner))
        return loss, view.count

    def _banks(self, p: Mapping[str, Tensor], entries: Tensor | None) -> list[Bank]:
        return [Bank("dense", Site(b, self.editor.point), {}, {"weight": p[str(b)]}, entries) for b in self.blocks]

    def _view(self, alive: Tensor, number: int, batch: int) -> _View:
        """A mini-batch's rows whose problems still run; made once where it stays the same."""
        key = (len(alive), number if self.editor.shuffle and self.batches > 1 else 0)  # ``alive`` only ever shrinks
        if self.views[0] != key:
            self.views = (key, {})
        if batch not in self.views[1]:
            position = torch.full((len(self.problems),), -1, device=alive.device)
            position[alive] = torch.arange(len(alive), device=alive.device)
            numbers = ((position[self.owner] >= 0) & (self._batch_of(number) == batch)).nonzero().squeeze(1)
            owner = position[self.owner[numbers]]
            runner = None
            if self.runner is not None and len(numbers):
                runner = self.runner if len(numbers) == len(self.owner) else self.runner.select(numbers)
            straight = len(alive) == 1 or torch.equal(owner, torch.arange(len(alive), device=owner.device))
            count = torch.bincount(owner, minlength=len(alive))
            kept = self._kept(numbers, position, len(alive))
            self.views[1][batch] = _View(runner, numbers, owner, None if straight else owner, count, kept)
        return self.views[1][batch]

    def _kept(self, numbers: Tensor, position: Tensor, count: int) -> list[KeptRows]:
        """The contrast pairs of the requests that have a row among ``numbers``, those of each turn."""
        if self.kept is None:
            return []
        here = torch.zeros(int(self.request.max()) + 1, dtype=torch.bool, device=numbers.device).index_fill(0, self.request[numbers], True)
        turns = [(here[self.kept.request] & self.kept.now(turn)).nonzero().squeeze(1) for turn in range(self.kept.turns)]
        return [self.kept.select(rows, position[self.kept.owner[rows]], count) for rows in turns]

    def _batch_of(self, number: int) -> Tensor:
        """[B]: the mini-batch of each row, problem by problem: in order, or in one drawn anew for pass ``number``."""
        out = []
        for size in self.sizes:  # each with a generator of its own: what else is in the batch does not matter
            places = torch.arange(size)
            if self.editor.shuffle:
                places = torch.randperm(size, generator=torch.Generator().manual_seed(self.editor.seed * 2**20 + number))
            out.append(places // self.editor.batch_size)
        return torch.cat(out).to(self.owner.device)

    def _pack(self, fitted: FitResult, seconds: float) -> list[Patch]:
        e, patches = self.editor, []
        settings = to_dict(e) | {"layers": list(self.blocks)}
        for i, requests in enumerate(self.problems):
            ops = [Op("dense", Site(b, self.editor.point), {"weight": fitted.params[str(b)][i].clone()}) for b in self.blocks]
            notes = {"steps": int(fitted.steps[i]), "loss": round(float(fitted.loss[i]), 6), "seconds": round(seconds, 4)}
            if e.rank is not None:
                ops, lost = truncated(ops, e.rank)
                notes |= lost
            patches.append(Patch(e.name, settings, self.lm.fingerprint, tuple(requests), tuple(ops), notes=notes))
        return patches


def truncated(ops: Sequence[Op], rank: int) -> tuple[list[Op], dict[str, float]]:
    """Dense ops as the first ``rank`` terms of their SVDs, and what that loses: ‖ΔW − ΔW_r‖_F over all of them and its share of ‖ΔW‖_F."""
    out, lost, whole = [], 0.0, 0.0
    for op in ops:
        left, values, right = spectrum(op)
        out.append(low_rank(op.site, left, values, right, rank, op.tensors["weight"].dtype))
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
    return out, {"lost_norm": lost**0.5, "lost_share": (lost / whole) ** 0.5 if whole else 0.0}
