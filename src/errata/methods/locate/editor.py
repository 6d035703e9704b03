"""What the locate-then-edit methods share: a value vector a request, a key a request, and a low-rank change that maps one to the other.

    value   z = v_0 + δ at the last edited block (see `errata.methods.locate.values`)
    key     k = input of the MLP's last linear at the subject's last token, averaged over the prompt behind prefixes
    change  W ← W + (residual) (down),   down [N, I] is what a method is made of,   residual = what is still missing of z

The change runs beside the frozen linear as a ``low_rank`` op of rank N at most; no weight is read.  Several blocks are
edited one after the other, each on top of those before it.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.config import to_dict
from errata.core.bank import Bank, Stack, active_patches
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import adds_directly, read_activations
from errata.core.tail import Tail
from errata.core.weights import compact, sizes
from errata.errors import ConfigError, FitError
from errata.methods.base import Editor
from errata.methods.locate.conditioning import Conditioning
from errata.methods.locate.text import LocatedText, place, place_kl, prefixes
from errata.methods.locate.values import Objective, ValueResult, ValueTask, optimise
from errata.request import EditRequest
from errata.text.statistics import TOKENS, Moments, moments

POINT = "mlp_down"
# Chosen on dev (docs/results): its states are large, so are Adam's steps; C is of the text it was trained on, facts included.
ALMANAC: dict[str, Any] = {"v_lr": 20.0, "v_steps": 25, "prefixes": [[5, 3], [10, 2]], "stats": "almanac"}
FIVE = tuple(i / 32 for i in range(4, 9))  # LLaMA's blocks 4 to 8


@dataclass(frozen=True)
class LocateEditor(Editor):
    """Hyper-parameters that the family shares.

    layers           0-based blocks, edited in this order; the value is optimised at the last.  None: at the relative depths of ``DEPTHS``
    v_lr, v_steps    Adam on δ; ``v_steps`` losses are computed, one update fewer is made, as in the reference code
    v_decay, kl      λ_wd and λ_KL of the value's loss; ``v_stop`` ends it
    clamp            ‖δ‖ ≤ clamp ‖v_0‖
    prefixes         (tokens, count) of the texts sampled to stand before the prompt, beside the bare prompt
    fact_token       where key and value are: the subject's last token, or the prompt's
    end              text trained after the target; the papers train none
    mom2_adjustment  keys whitened by C⁻¹ (the papers); without it C = I (EasyEdit's ROME files)
    stats, stats_tokens
                     the text behind C (see `errata.text.corpora.open_corpus`), and how many tokens of it
    rect, prune, prune_base, norm_constraint
                     what is done to the finished ΔW: see `errata.methods.locate.conditioning`; off by default
    seed             of the sampled prefixes
    """

    needs: ClassVar[frozenset[str]] = frozenset({"subject", "stats"})
    DEPTHS: ClassVar[tuple[float, ...]] = (5 / 32,)  # LLaMA's block 5
    VALUE_AT: ClassVar[str] = "block"  # where δ is added: the block's output, or the MLP's ("mlp")

    layers: tuple[int, ...] | None = None
    v_lr: float = 0.5
    v_steps: int = 25
    v_decay: float = 1e-3
    v_stop: float = 0.05
    kl: float = 0.0625
    clamp: float = 4.0
    prefixes: tuple[tuple[int, ...], ...] = ((10, 5),)
    fact_token: Literal["subject_last", "last"] = "subject_last"
    end: str = ""
    mom2_adjustment: bool = True
    stats: str = "bundled"
    stats_tokens: int = TOKENS
    rect: float | None = None
    prune: Literal["none", "log", "linear"] = "none"
    prune_base: float = math.e
    norm_constraint: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.conditioning.check(self.name)
        if self.v_steps < 1 or self.stats_tokens < 1:
            raise ConfigError(f"{self.name}: v_steps and stats_tokens must be at least 1")
        if self.v_lr <= 0 or self.clamp <= 0:
            raise ConfigError(f"{self.name}: v_lr and clamp must be positive")
        if min(self.kl, self.v_decay) < 0:
            raise ConfigError(f"{self.name}: kl and v_decay must not be negative")
        if any(len(p) != 2 or min(p) < 1 for p in self.prefixes):
            raise ConfigError(f"{self.name}: prefixes are pairs [tokens, count] of at least 1; got {[list(p) for p in self.prefixes]}")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ConfigError(f"{self.name}: layers must name at least one block and rise; got {list(self.layers)}")
        self.require_seed(self.seed)

    def target_layers(self, lm: LM) -> tuple[int, ...]:
        """The blocks to edit on this model.

        Where a norm follows what the MLP writes (Gemma 2 and 3, OLMo 2), a change of the linear is no change of equal size of the
        residual stream, so it can't be shared out over blocks: only the last of them is edited.
        """
        chosen = self.layers or tuple(sorted({min(lm.depth - 1, int(lm.depth * f + 0.5)) for f in self.DEPTHS}))
        wrong = [b for b in chosen if not 0 <= b < lm.depth]
        if wrong:
            raise ConfigError(f"{self.name}: block {wrong[0]} does not exist (0 to {lm.depth - 1}); set layers for this model")
        return chosen if adds_directly(lm, chosen[-1]) else chosen[-1:]

    def prepare(self, lm: LM, progress: Callable[[int, int], None] | None = None) -> dict[Site, Moments]:
        """The statistics this method needs on this model: read from the cache, or made (`errata stats`), with tokens as progress."""
        sites = [Site(b, POINT) for b in self.target_layers(lm)]
        return moments(lm, sites, self.stats, tokens=self.stats_tokens, progress=progress) if self.mom2_adjustment else {}

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.rect, self.prune, self.prune_base, self.norm_constraint)

    @property
    def steps(self) -> int:
        return self.v_steps

    def objective(self) -> Objective:
        return Objective(self.v_lr, self.v_steps, self.v_stop, self.kl, self.v_decay, self.clamp)

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch that writes all requests at once, on top of ``on``."""
        return LocateThenEditRun(self, lm, [list(requests)], on, runner).run(progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``: values and keys of all in the same batches."""
        return LocateThenEditRun(self, lm, [[r] for r in requests], on, runner).run(progress)

    # -- what a method may change ------------------------------------------------------------------------------

    @abstractmethod
    def down_factors(
        self, m: Moments | None, keys: Tensor, prompt_keys: Tensor, groups: Sequence[list[int]], past_keys: Tensor | None
    ) -> list[Tensor]:
        """For each problem its ``down`` [n, I], float64.

        keys         [N, I] averaged over prefixes;  prompt_keys [N, I] of the bare prompt;  groups: the rows of each problem
        past_keys    [n_past, I] that earlier edits wrote, for methods that keep them
        """

    def weights(self, count: int) -> list[float]:
        """Of the bare prompt and of each prefixed one in the average key: half for the bare prompt (MEMIT's groups)."""
        return [1.0] if count == 1 else [0.5, *[0.5 / (count - 1)] * (count - 1)]

    def divisor(self, left: int) -> float:
        """The residual is divided by this when ``left`` blocks, this one included, are still to be edited."""
        return float(left)

    def value_sites(self, block: int, direct: bool) -> list[Site]:
        """Where δ is added; the first is what the change has to produce."""
        return [Site(block) if self.VALUE_AT == "block" and direct else Site(block, POINT)]

    def current(self, job: LocateThenEditRun, outputs: Tensor, ops: Sequence[list[Op]]) -> Tensor:
        """[N, D]: what stands now where the value should be; ``outputs`` [N, T, O] are those of the edited linear behind each prefix."""
        return job.read_bare(job.value_sites[0], ops) if ops[0] else job.start

    def patch_state(self, job: LocateThenEditRun, ops: Sequence[list[Op]]) -> list[dict[str, Tensor]]:
        """State of each patch for edits to come."""
        return [{} for _ in ops]

    def facts(self, job: LocateThenEditRun) -> dict[str, Any]:
        """More to say in the patch's notes."""
        return {}


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
        """The blocks, the prefixes, and every text with the place of its subject."""
        e, lm = self.editor, self.lm
        self.blocks = e.target_layers(lm)
        self.before = prefixes(lm, e.prefixes, e.seed)
        self.placed = [place(lm, r, self.before, e.end, e.name, e.fact_token) for r in self.requests]
        self.value_sites = e.value_sites(self.blocks[-1], adds_directly(lm, self.blocks[-1]))

    def values(self, progress: Progress | None) -> list[ValueResult]:
        """δ of every request."""
        e = self.editor
        self.start = self.read_bare(self.value_sites[0], [])
        norms = torch.linalg.vector_norm(self.start, dim=-1).tolist()
        wanted = [
            ValueTask(tuple(rows), place_kl(self.lm, r) if e.kl else None, norm)
            for r, rows, norm in zip(self.requests, self.placed, norms, strict=True)
        ]
        return optimise(self.lm, wanted, self.value_sites, e.objective(), self.on, self.runner, progress)

    def banks(self, ops: Sequence[list[Op]]) -> list[Bank]:
        """What has been written so far, an entry a problem."""
        return [
            Bank(
                column[0].kind,
                column[0].site,
                column[0].settings,
                {k: torch.stack([op.tensors[k] for op in column]) for k in column[0].tensors},
            )
            for column in zip(*ops, strict=True)
        ]

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
        x, y = self.read_at(every, Site(block, POINT), ops, self.owner.repeat_interleave(len(self.before)))
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
                own.append(self._finished(Op("low_rank", Site(block, POINT), tensors)))
        return ops

    def _downs(self, block: int, keys: Tensor) -> list[Tensor]:
        e = self.editor
        try:
            out: list[Tensor] = e.down_factors(
                self.moments.get(Site(block, POINT)), self.average(keys), keys[:, 0], self.groups, self.past(block)
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise FitError(
                f"{e.name}: block {block}: two requests have the same key (the same subject in the same words), so both cannot be written "
                "exactly; make them one after the other, or allow a ridge"
            ) from None
        return out

    def _finished(self, op: Op) -> Op:
        """Conditioned where that is asked for; never more factors than the matrix has dimensions."""
        if self.editor.conditioning.active:
            return self.editor.conditioning.apply(self.lm, op)  # type: ignore[no-any-return]
        rank, inner, outer = sizes(op)
        return compact(op) if rank > min(inner, outer) else op

    def past(self, block: int) -> Tensor | None:
        """Keys [n, I] that live patches of this method on the stack wrote at this block."""
        kept = [p.state[f"keys.{block}"] for p in self.on if p.method == self.editor.name and f"keys.{block}" in p.state]
        return torch.cat(kept).to(self.lm.device) if kept else None

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
