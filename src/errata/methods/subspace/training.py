"""How ReFT and BaFT are trained: one batch over all independent edits, through the tail.

A *problem* is one patch to make: one request (`edit_each`), or several that share one patch (`edit`).  A *sample* is one request, its
paraphrases with it: the mean gate weights of a patch run over samples, so that a joint patch of ten counts as ten edits do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import to_dict
from errata.core.bank import Bank, Stack
from errata.core.fit import AdamW, FitResult, fit
from errata.core.keep import Kept, KeptRows, find_kept
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.problems import Chosen, RowsInTurns, WorstOfTurns, mean_per_problem, row_nll
from errata.core.read import read_activations
from errata.core.tail import join_rows, split_rows_at
from errata.core.tokens import Encoded, pad_id
from errata.methods.subspace.gate_start import ridge_gates, set_gates
from errata.methods.subspace.gating import gate
from errata.methods.subspace.op import Frame, frame, orthonormal, start, turned
from errata.methods.subspace.other_facts import other_facts
from errata.methods.texts import names, subject_ends, ways_to_ask, what_stays
from errata.request import EditRequest


@dataclass(frozen=True)
class _Step:
    """What runs at a step: the edit's own rows, and behind them those of the other facts.

    owner [b]   the problem of each of the edit's rows, among those that run; rows [b]: their numbers
    valid, open [b, A, 1]   their active tokens, and those of them whose gates are to be open
    """

    runner: Any
    owner: Tensor
    rows: Tensor
    others: KeptRows | None
    valid: Tensor
    open: Tensor

    @property
    def every(self) -> Tensor:
        """The problem of each row, of both kinds."""
        return self.owner if self.others is None else torch.cat([self.owner, self.others.owner])


@dataclass
class Training:
    """One run of the optimiser over E problems."""

    editor: Any
    lm: LM
    problems: list[list[EditRequest]]
    on: Stack
    before: Patch | None
    runner_class: Any
    owner: Tensor = field(init=False)  # [B] the problem of each row
    frame: Frame | None = field(init=False, default=None)  # of R at the start, [blocks, …], for the Householder parametrisation
    irrelevant: tuple[dict[int, Tensor], Tensor, Tensor] | None = field(init=False, default=None)
    sample: Tensor = field(init=False)  # [B] the sample of each row
    sample_owner: Tensor = field(init=False)  # [S] the problem of each sample
    samples: Tensor = field(init=False)  # [E] samples of each problem
    runner: Any = field(init=False, default=None)
    running: _Step = field(init=False)
    solved: dict[str, Tensor] = field(init=False, default_factory=dict)  # of gates that stay as they were solved, [E, blocks, …]
    gate_sums: dict[int, Tensor] = field(init=False, default_factory=dict)  # Σ over samples of their mean weights, [E, r], detached
    current_sums: dict[int, Tensor] = field(init=False, default_factory=dict)  # of those that run [e, r], with this step's gradient

    def __post_init__(self) -> None:
        self.editor.require_requests(self.problems)
        self.blocks = self.editor.target_layers(self.lm)
        samples = [(i, r) for i, rs in enumerate(self.problems) for r in rs]
        rows = [(s, r, text) for s, (_, r) in enumerate(samples) for text in ways_to_ask(self.lm, r, self.editor.prefixes)]
        device = self.lm.device
        self.sample = torch.tensor([s for s, _, _ in rows], dtype=torch.long, device=device)
        self.sample_owner = torch.tensor([i for i, _ in samples], dtype=torch.long, device=device)
        self.samples = torch.tensor([float(len(rs)) for rs in self.problems], device=device)
        self.owner = self.sample_owner[self.sample]
        self.encoded = encoded = self.lm.encode([text for _, _, text in rows], [r.continuation + self.editor.end for _, r, _ in rows])
        gated = self.editor.gate_kind != "none"  # gates are looked at on every output token, also on the last, which predicts nothing
        starts, self.opens = self._places(rows, encoded)  # opens: of each row, the tokens whose gates are to be open
        cut_rows = split_rows_at(encoded, starts, pad_id(self.lm.tokenizer), device, final=gated)
        self.open = torch.zeros_like(cut_rows.valid)  # [B, A]
        for row, cut, tokens in zip(self.open, starts, self.opens, strict=True):
            row[[t - cut for t in tokens if t - cut < len(row)]] = True  # without gates a target's last token is not run
        self.owned = RowsInTurns(self.owner, len(self.problems), self._turns(samples))
        self.worst = WorstOfTurns(len(self.owned.rows), len(self.problems), device)
        self.kept, self.others, self.evaluations = None, None, 0
        if self.problems:
            first, start = min(self.blocks) + 1, self._before_banks if self.before is not None else None
            how = {"start": start, "last": self.editor.reach}
            self.kept = find_kept(self.editor, self.lm, self.problems, self.runner_class, first, self.on, **how)
            self.others = self._other_facts([r for _, r in samples], first)
            if self.others is not None:  # in one batch with the edit's own: a step then reads the weights once
                cut_rows = join_rows(cut_rows, self.others.rows, pad_id(self.lm.tokenizer))
                self.open = functional.pad(self.open, (0, cut_rows.active.shape[1] - self.open.shape[1]))
            self.runner = self.runner_class(self.lm, cut_rows, first, self.on)
            self.chosen = Chosen(self.runner)
            if self.others is not None:
                self.others.stand_in(self.runner, len(self.owner))

    def _other_facts(self, requests: Sequence[EditRequest], first: int) -> Kept | None:
        """The output term on other facts of the subjects, and on what should stay and names a subject, where no gate can be shut; None
        where it is off or nothing is asked."""
        e = self.editor
        if not (e.at_subject and e.other_facts_weight):
            return None
        asked = other_facts(self.lm, requests, e.other_facts, self.on)  # only a pair's prompt is looked at
        texts = [[*self._named(r), *((p, ".") for p in own)] for r, own in zip(requests, asked, strict=True)]
        if not any(texts):
            return None
        starts = [subject_ends(self.lm, r, p)[0] for r, own in zip(requests, texts, strict=True) for p, _ in own]
        kept = Kept(self.lm, self.problems, self.runner_class, first, self.on, texts=texts, starts=starts)
        kept.in_turns(e.other_facts_batch)
        return kept

    @staticmethod
    def _named(request: EditRequest) -> list[tuple[str, str]]:
        """What should stay and names the subject."""
        return [pair for pair in (*request.unrelated, *request.contrast) if names(request, pair[0])]

    def _first(self, text: Encoded) -> int:
        """The first token that ops act on."""
        return 0 if self.editor.reach is None else max(0, text.prompt_length - self.editor.reach)

    def _places(self, rows: Sequence[tuple[int, EditRequest, str]], encoded: Sequence[Encoded]) -> tuple[list[int], list[Sequence[int]]]:
        """Of each row, the first token that is trained, and those whose gates are to be open: with a ridge start each last one of the
        subject, or from there to the target's last but one (behind the target the text is the model's own again); else every one."""
        starts: list[int] = []
        opens: list[Sequence[int]] = []
        if not self.editor.ridge:
            starts = [self._first(e) for e in encoded]
            return starts, [range(s, len(e.ids)) for s, e in zip(starts, encoded, strict=True)]
        for (_, request, text), e in zip(rows, encoded, strict=True):
            ends = subject_ends(self.lm, request, text)
            if self.editor.at_subject and ends:  # what stands before is left as it is: its gates are shut
                starts.append(ends[0])
                opens.append(ends)
            else:
                starts.append(max(0, e.prompt_length - self.editor.last))
                opens.append(range(max([starts[-1], *ends]), len(e.ids) - 1))
        return starts, opens

    def _turns(self, samples: Sequence[tuple[int, EditRequest]]) -> Tensor:
        """[B] −1 for a prompt and its paraphrases, which train at every step; else which short text stands before (they take turns)."""
        n = self.editor.prefixes
        own = [[-1] * (1 + len(r.paraphrases)) + list(range(n)) for _, r in samples]
        return torch.tensor([turn for each in own for turn in each], dtype=torch.long, device=self.lm.device)

    def run(self, progress: Progress | None = None) -> list[Patch]:
        """Train and pack; an empty list of problems is an empty list of patches."""
        if not self.problems:
            return []
        began, e = time.perf_counter(), self.editor
        joint = max(map(len, self.problems)) > 1
        rule = AdamW(e.batched_lr if joint else e.lr, e.weight_decay)
        steps = e.batched_steps if joint else e.steps
        fitted = fit(self._start(), self._loss, steps=steps, optimizer=rule, stop=e.stop or None, progress=progress)
        return self._pack(fitted, (time.perf_counter() - began) / len(self.problems))

    def _start(self) -> dict[str, Tensor]:
        """Parameters [E, blocks, …]: those of the patch gone on from, else fresh ones (the same for every problem)."""
        e, blocks = self.editor, []
        precision = torch.promote_types(torch.float32, self.lm.dtype)  # float32, or wider where the model is
        for i, block in enumerate(self.blocks):
            if self.before is None:
                blocks.append(start(e.rank, self.lm.width, e.gate_kind, e.init, e.seed * 1000 + block, self.lm.device))
            else:
                blocks.append({("X" if k == "R" else k): t.to(self.lm.device) for k, t in self.before.ops[i].tensors.items()})
        stacked = {k: torch.stack([own[k] for own in blocks]).to(precision) for k in blocks[0]}
        if e.parametrisation == "householder":
            self.frame = frame(stacked["X"])
            stacked["X"] = torch.zeros_like(stacked["X"])
        every = {k: t.expand(len(self.problems), *t.shape) for k, t in stacked.items()}
        if self.before is not None or not e.ridge:
            return every
        every = set_gates(every, ridge_gates(self), self.blocks)
        if e.keeps_gates:
            self.solved = {k: every.pop(k) for k in ("V", "g")}
        return every

    def per_block(self, p: Mapping[str, Tensor], alive: Tensor | None = None) -> dict[int, dict[str, Tensor]]:
        """{block: the op's parameters [e, …]} of the problems ``alive`` (None: all), with R made orthonormal; all blocks in one call."""
        made = {"R": orthonormal(p["X"]) if self.frame is None else turned(p["X"], self.frame)}
        made |= {k: t if alive is None else t[alive] for k, t in self.solved.items()}
        own = {k: t.unbind(1) for k, t in {**p, **made}.items() if k != "X"}
        return {b: {k: t[i] for k, t in own.items()} for i, b in enumerate(self.blocks)}

    def _loss(self, p: Mapping[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        e = self.editor
        turn = self.evaluations
        step = self.running = self._step(alive, turn)
        owner, own = step.owner, len(step.owner)
        self.evaluations += 1
        recorded: dict[Any, Tensor] = {}
        straight = len(step.every) == len(alive)  # a row a problem, in order: no gathering
        per_block = self.per_block(p, alive)
        logits = step.runner.logits(self._banks(per_block, None if straight else step.every), recorded)
        where = step.runner.rows.label_mask[:own]
        logits, beside = logits.tensor_split([int(where.sum())])
        summed, number = row_nll(logits, step.runner.rows.labels[:own], where)
        mean = summed / number
        task = mean_per_problem(summed if e.loss == "sum" else mean, owner, len(alive))
        compared = mean_per_problem(summed if e.stop_on == "sum" else mean, owner, len(alive))
        gates = {}
        if e.gate_kind != "none":
            valid = step.valid.to(summed.dtype)
            for b in self.blocks:
                gates[b] = recorded[Site(b), "gate"][:own]
                self._note(b, (gates[b] * valid).sum(1), valid.sum(1), self.sample[step.rows], alive)
        extra = e.regularise(self, per_block, gates, alive)
        if self.kept is not None:
            kept = self.kept.of(alive, turn)
            extra = extra + e.contrast_weight * kept.divergence(self._banks(per_block, kept.owner))
        worst = self.worst(compared + extra if e.stop_on == "total" else compared, alive, e.stop)
        if step.others is not None:  # not compared with the stop: what is said of other facts may never come quite back
            extra = extra + e.other_facts_weight * step.others.divergence_of(beside)
        return task + extra, worst

    def _step(self, alive: Tensor, turn: int) -> _Step:
        owner, rows = self.owned.of(alive, turn)
        others = None if self.others is None else self.others.of(alive, turn)
        numbers = rows if others is None else torch.cat([rows, len(self.owner) + others.numbers])
        runner = self.chosen(numbers)
        valid = runner.rows.valid[: len(rows)].unsqueeze(-1)
        return _Step(runner, owner, rows, others, valid, valid & self.open[rows].unsqueeze(-1))

    def _banks(self, per_block: Mapping[int, dict[str, Tensor]], owner: Tensor | None) -> list[Bank]:
        """The ops of all blocks; ``owner`` None: a row a problem, in order."""
        return [Bank("subspace", Site(b), self.editor.op_settings, per_block[b], owner) for b in self.blocks]

    def _before_banks(self, owner: Tensor) -> list[Bank]:
        """What is gone on from, which the output term compares with."""
        return self._banks(self.per_block(self._start()), owner)

    def _note(self, block: int, weights: Tensor, positions: Tensor, sample: Tensor, alive: Tensor) -> None:
        """Keep Σ over a problem's samples of their mean gate weights, from rows' summed weights [B, r] and positions [B, 1]."""
        total = weights.new_zeros(len(self.sample_owner), weights.shape[1]).index_add(0, sample, weights)
        number = positions.new_zeros(len(self.sample_owner), 1).index_add(0, sample, positions)  # 0: its problem has ended
        means = total / number.clamp_min(1)
        sums = means.new_zeros(len(self.problems), means.shape[1]).index_add(0, self.sample_owner, means)[alive]
        self.current_sums[block] = sums
        if block not in self.gate_sums:
            self.gate_sums[block] = torch.zeros(len(self.problems), sums.shape[1], device=sums.device, dtype=sums.dtype)
        self.gate_sums[block][alive] = sums.detach()

    def irrelevant_states(self) -> tuple[dict[int, Tensor], Tensor, Tensor] | None:
        """States of ``unrelated`` and ``contrast`` texts under ``on``, at the prompt tokens that ops act on and at the answer.

        ({block: [P, N, d]}, where [P, N, 1], owner [P]), a row a problem that has such texts; None without any.
        """
        if self.irrelevant is None:
            named = not self.editor.at_subject
            pairs = [(i, *pair) for i, rs in enumerate(self.problems) for pair in what_stays(self.lm, rs, self.editor.prefixes, named)]
            if not pairs:
                return None
            encoded = self.lm.encode([p for _, p, _ in pairs], [a for _, _, a in pairs])
            states, row = self.states_from(encoded, [self._first(e) for e in encoded])
            of = torch.tensor([i for i, _, _ in pairs], device=row.device)[row]  # [n] the problem of each state
            owner, which, count = of.unique(return_inverse=True, return_counts=True)  # sorted, as the states are
            where = torch.arange(int(count.max()), device=row.device) < count[:, None]
            found = {b: h.new_zeros(*where.shape, h.shape[-1]) for b, h in states.items()}
            order = which.argsort(stable=True)
            for b, h in states.items():
                found[b][where] = h[order]
            self.irrelevant = found, where.unsqueeze(-1), owner
        return self.irrelevant

    def states_from(self, encoded: Sequence[Encoded], starts: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        """({block: [n, d]}, text [n]): the states of each text from token ``starts[i]`` to its end, under ``on``."""
        places = [(i, t) for i, (e, start) in enumerate(zip(encoded, starts, strict=True)) for t in range(start, len(e.ids))]
        sites = [Site(b) for b in self.blocks]
        found = read_activations(self.lm, [encoded[i] for i, _ in places], sites, at=[t for _, t in places], on=self.on)
        return {site.block: found[site][1] for site in sites}, torch.tensor([i for i, _ in places], device=self.lm.device)

    def _pack(self, fitted: FitResult, seconds: float) -> list[Patch]:
        e, patches = self.editor, []
        with torch.no_grad():
            blocks = self.per_block(fitted.params)
        old = self.before
        for i, requests in enumerate(self.problems):
            ops = tuple(Op("subspace", Site(b), {k: t[i].clone() for k, t in blocks[b].items()}, dict(e.op_settings)) for b in self.blocks)
            state = {}
            for b, sums in self.gate_sums.items():
                state[f"weights.{b}"] = self.past_weights(b) + sums[i]
                state["edits"] = torch.tensor([self.past_samples + len(requests)])
            notes = {"steps": int(fitted.steps[i]), "loss": round(float(fitted.loss[i]), 6), "seconds": round(seconds, 4)}
            settings = to_dict(e) | {"layers": list(self.blocks)}
            patches.append(Patch.continued_from(old, e.name, settings, self.lm.fingerprint, requests, ops, state, notes))
        return patches

    @property
    def past_samples(self) -> float:
        """Samples already counted in the running gate means.  The state ``edits`` of a patch made before joint patches counted as many
        is less than its requests."""
        return max(self._counted, float(len(self.before.requests))) if self.before and self._counted else 0.0

    @property
    def _counted(self) -> float:
        return float(self.before.running("edits", 1)[0]) if self.before and "edits" in self.before.state else 0.0

    def past_weights(self, block: int) -> Tensor | float:
        """Running sum over past samples of their mean gate weights [r]; a patch that counted fewer has their mean for each other one."""
        if self.before is None:
            return 0.0
        weights = 1 if self.editor.gate_kind == "subspace" else self.editor.rank
        return self.before.running(f"weights.{block}", weights).to(self.lm.device) * (self.past_samples / max(self._counted, 1.0))


def gate_on(p: Mapping[str, Tensor], kind: str, states: Tensor, owner: Tensor) -> Tensor:
    """Gate weights of problem ``owner[u]`` at the given states [U, T, d]."""
    return gate({k: p[k][owner] for k in ("V", "g") if k in p}, kind, states)
