"""How WISE trains a side memory: E independent edits in one batch, the inputs of the site read once.

    L = L_edit + [Δ(x_u) − α]₊ + [β − Δ(x_e)]₊ + [γ + Δ(x_u) − Δ(x_e)]₊

L_edit is the mean over contexts of the target's summed NLL over its m tokens (``edit_mean``: or over m + 1); each hinge is the mean
over its positive entries (texts x_e and x_u, pairs of them), 0 without any.  Nothing below the site changes, so its inputs x are
read once; a step is one product ΔW x for all texts of an edit, from which both Δ and, through the blocks above, L_edit follow.  At
the last block no other token reads what a token's MLP wrote, so there only the tokens that predict the target run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padding

from errata.core.bank import Bank, Stack
from errata.core.fit import SGD, fit
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.problems import ProblemRows, mean_per_problem, row_nll
from errata.core.read import activation_hooks, adds_to_block
from errata.core.tail import split_rows_at
from errata.core.tokens import pad_id
from errata.methods.wise.memory import Memories
from errata.methods.wise.op import activation
from errata.methods.wise.texts import Texts


def _positive_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the positive among ``values`` [e, …] at ``where``; 0 without any, [e]."""
    positive = values.clamp_min(0) * where
    number = (positive > 0).flatten(1).sum(1)
    return positive.flatten(1).sum(1) / number.clamp_min(1)


def margins(edit: Tensor, unrelated: Tensor, given: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """The three hinges of edits' Δ(x_e) [e, K] and Δ(x_u) [e, U], of which those at ``given`` [e, U] exist; their sum [e]."""
    pairs = gamma + unrelated[:, None] - edit[:, :, None]
    return (
        _positive_mean(unrelated - alpha, given)
        + _positive_mean(beta - edit, torch.ones_like(edit, dtype=torch.bool))
        + _positive_mean(pairs, given[:, None].expand_as(pairs))
    )


@dataclass
class Training:
    """One run of the optimiser over E edits that all go on from the same memories.

    What is read once, by edit: x [E, N, I], σ(o) and o [E, N, O] at the N tokens of its texts, one text after another;
    ``row`` [E, N] the text of each token, ``share`` [E, N] what the token counts for in its text's Δ (0: it does not).
    """

    editor: Any
    lm: LM
    texts: Sequence[Texts]
    memories: Memories
    site: Site
    shape: tuple[int, int]
    act: str
    on: Stack
    runner_class: Any
    acts: Tensor = field(init=False)  # [E] Δ(x_e) at the last step of each, or before it (``least``)
    seen: int = field(init=False, default=0)  # losses computed so far: one before each update, and one after the last
    fronted: bool = field(init=False)  # whether context stands in front of the texts

    def __post_init__(self) -> None:
        self.many = len(self.texts[0].edit)
        self.precision = torch.promote_types(torch.float32, self.lm.dtype)
        self.sigma = activation(self.act)
        self.begin = self.memories.begin(self.lm.device, self.precision)
        self._read()
        self._tail()
        self._view = (len(self.texts), self.read)

    def _read(self) -> None:
        """The site's inputs and outputs under ``on``, at every token of every text."""
        rows = [row for texts in self.texts for row in (*texts.edit, *texts.unrelated)]
        batch = self.lm.batch(rows, "right").to(self.lm.device)
        plan = self.lm.plan([self.on], None, len(rows))
        plan.prompt_lengths = batch.prompt_lengths
        seen: list[tuple[Tensor, Tensor]] = []
        watched = activation_hooks(self.lm, [self.site], len(rows), lambda _, x, y: seen.append((x, y)))
        with torch.no_grad(), self.lm.running(plan), watched:
            self.lm.forward(batch.ids, batch.mask, use_cache=False, **self.lm.last_logits_kwargs)
        x, y = (t.to(self.precision) for t in seen[0])
        self.fronted = x.shape[1] != batch.ids.shape[1]
        if self.fronted and plan.context is not None:  # context stands behind BOS: our tokens are found by their positions
            column = (plan.context.position[:, None] == torch.arange(batch.ids.shape[1], device=x.device)[:, None]).long().argmax(2)
            x, y = (t.gather(1, column.unsqueeze(-1).expand(-1, -1, t.shape[-1])) for t in (x, y))
        place, row, share, start = [], [], [], 0
        for texts in self.texts:
            own = (*texts.edit, *texts.unrelated)
            counted = [len(r.ids) if self.editor.act_on == "text" else r.prompt_length for r in own]
            place.append([(start + i) * x.shape[1] + t for i, r in enumerate(own) for t in range(len(r.ids))])
            row.append([i for i, r in enumerate(own) for _ in r.ids])
            share.append([1 / c if t < c else 0.0 for r, c in zip(own, counted, strict=True) for t in range(len(r.ids))])
            start += len(own)
        places = _table(place, x.device)
        o = y.flatten(0, 1)[places]
        self.read = {
            "x": x.flatten(0, 1)[places],
            "o": o,
            "before": self.sigma(o),
            "row": _table(row, x.device),
            "share": _table(share, x.device, self.precision),
            "given": _table([[True] * len(t.unrelated) for t in self.texts], x.device, torch.bool),
        }

    def _tail(self) -> None:
        """The rows with targets, cut where the first token that counts is; ``local`` [B, A] numbers their active tokens among an edit's."""
        lm, last = self.lm, self.site == Site(self.lm.depth - 1, "mlp_down")
        rows = [row for texts in self.texts for row in texts.edit]
        starts = [row.prompt_length - 1 if last else 0 for row in rows]
        cut = split_rows_at(rows, starts, pad_id(lm.tokenizer), lm.device, final=False)
        wide = cut.active.shape[1]
        local: list[list[int]] = []
        for texts in self.texts:
            begins = torch.tensor([0, *(len(r.ids) for r in texts.edit[:-1])]).cumsum(0)
            for begin, row in zip(begins.tolist(), texts.edit, strict=True):
                first = starts[len(local)]
                local.append([begin + min(first + t, len(row.ids) - 1) for t in range(wide)])
        self.local, self.starts = torch.tensor(local, device=lm.device), torch.tensor(starts, device=lm.device)
        self.at = Site(self.site.block) if adds_to_block(lm, self.site, self.on) else self.site
        first = self.site.block + (self.at.point == "block")
        owner = torch.arange(len(self.texts), device=lm.device).repeat_interleave(self.many)
        self.owned = ProblemRows(self.runner_class(lm, cut, first, self.on), owner, len(self.texts))

    def run(self, progress: Progress | None) -> list[tuple[Memories, dict[str, Any]]]:
        """The memories after each edit, and facts about its making."""
        e, count = self.editor, len(self.texts)
        self.acts = torch.zeros(count, dtype=self.precision, device=self.lm.device)
        start = {"values": self.begin.values.expand(count, -1)}
        rule = SGD(e.lr, e.weight_decay)
        fitted = fit(
            start, self._loss, steps=e.steps, optimizer=rule, stop=e.stop, max_change=e.settled, progress=progress, project=self._clamp
        )
        made = zip(fitted.params["values"], self.acts.tolist(), fitted.steps.tolist(), fitted.loss.tolist(), strict=True)
        return [
            (
                self.memories.after(replace(self.begin, values=values.clone()), act),
                {"steps": steps, "loss": round(loss, 6), "act": round(act, 4)},
            )
            for values, act, steps, loss in made
        ]

    def _of(self, alive: Tensor) -> dict[str, Tensor]:
        """What was read of the edits that still run; cut anew when one has left."""
        if self._view[0] != len(alive):
            self._view = (len(alive), {k: t[alive] for k, t in self.read.items()})
        return self._view[1]

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        read, e, count = self._of(alive), self.editor, len(alive)
        flat = torch.zeros((count, self.memories.size), dtype=self.precision, device=alive.device)
        delta = flat.index_copy(1, self.begin.where, p["values"]).view(count, *self.shape)
        moved = read["x"] @ delta.mT  # [e, N, O]
        runner, owner, kept = self.owned.of(alive)
        by = moved.flatten(0, 1)[owner[:, None] * moved.shape[1] + self.local[kept]]
        where = {"start": self.starts[kept]} if self.fronted else {}
        logits = runner.logits([Bank("moved", self.at, {}, {"by": by, **where})])
        summed, number = row_nll(logits, runner.rows.labels, runner.rows.label_mask)
        task = mean_per_problem(summed / (number + (e.edit_mean == "m+1")), owner, count)
        size = torch.linalg.vector_norm(self.sigma(read["o"] + moved) - read["before"], dim=-1) * read["share"]
        act = size.new_zeros(count, self.many + read["given"].shape[1]).scatter_add(1, read["row"], size)
        self.seen += 1
        if e.least == "after" or self.seen <= e.steps:
            self.acts[alive] = act[:, : self.many].detach().mean(1)
        scaled = act / e.unit
        total = task + margins(scaled[:, : self.many], scaled[:, self.many :], read["given"], e.alpha, e.beta, e.gamma)
        return total, total

    def _clamp(self, p: Mapping[str, Tensor], alive: Tensor) -> None:
        bound = self.editor.norm_constraint
        if bound is not None:
            p["values"].clamp_(-bound, bound)


def _table(lists: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Lists of unequal length as one tensor, zeros behind."""
    most = max(map(len, lists))
    return torch.stack([padding(torch.tensor(own, dtype=dtype), (0, most - len(own))) for own in lists]).to(device)
