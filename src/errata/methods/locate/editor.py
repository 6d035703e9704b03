"""What the locate-then-edit methods share: a value vector a request, a key a request, and a low-rank change that maps one to the other.

    value   z = v_0 + δ at the last edited block (see `errata.methods.locate.values`)
    key     k = input of the MLP's last linear at the subject's last token, averaged over the prompt behind prefixes
    change  W ← W + (residual) (down),   down [N, I] is what a method is made of,   residual = what is still missing of z

The change runs beside the frozen linear as a ``low_rank`` op of rank N at most; no weight is read.  Several blocks are
edited one after the other, each on top of those before it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from errata.core.bank import Stack
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import adds_directly
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.base import Editor
from errata.methods.locate.conditioning import Conditioning
from errata.methods.locate.run import POINT, LocateThenEditRun
from errata.methods.locate.values import Objective
from errata.request import EditRequest
from errata.text.statistics import TOKENS, Moments, moments

# Chosen on dev (docs/results): its states are large, so are Adam's steps; C is of the text it was trained on, facts included.
ALMANAC: dict[str, Any] = {"v_lr": 20.0, "v_steps": 25, "prefixes": [[5, 3], [10, 2]], "stats": "almanac"}
_CLAMP, _CLAMP_BEFORE_NORM = 4.0, 0.5
RIDGE_ALONE = 0.01  # of a ridge, where no later block writes what it leaves unwritten
FIVE = tuple(i / 32 for i in range(4, 9))  # LLaMA's blocks 4 to 8


@dataclass(frozen=True)
class LocateEditor(Editor):
    """Hyper-parameters that the family shares.

    layers           0-based blocks, edited in this order; the value is optimised at the last.  None: at the relative depths of ``DEPTHS``,
                     and where one block can be edited only (see `target_layers`), at ``ALONE``
    v_lr, v_steps    Adam on δ; ``v_steps`` losses are computed, one update fewer is made, as in the reference code
    v_decay, kl      λ_wd and λ_KL of the value's loss; ``v_stop`` ends it
    clamp            ‖δ‖ ≤ clamp ‖v_0‖; None: 4, and 0.5 where a norm follows what the MLP writes (Gemma 2 and 3, OLMo 2).  v_0 is the
                     MLP's output there, and what a longer δ adds is scaled away again, while its change of the matrix reaches others
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
    ALONE: ClassVar[float] = 5 / 32  # where one block can be edited only
    EXPERTS: ClassVar[bool] = False  # whether a mixture's experts are edited where a block has no last linear
    VALUE_AT: ClassVar[str] = "block"  # where δ is added: the block's output, or the MLP's ("mlp")

    TUNES: ClassVar[dict[str, Any]] = {
        "v_steps": (60,), "layers": ("trace", 3 / 30, 8 / 30, 12 / 30), "clamp": (1.0, 10.0), "v_lr": (0.2,), "kl": (0.5,)
    }  # fmt: skip

    layers: tuple[int, ...] | None = None
    v_lr: float = 0.5
    v_steps: int = 25
    v_decay: float = 1e-3
    v_stop: float = 0.05
    kl: float = 0.0625
    clamp: float | None = None
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
        if self.v_lr <= 0 or (self.clamp is not None and self.clamp <= 0):
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
        residual stream, so it can't be shared out over blocks: only one is edited, at the depth of ``ALONE`` or the last of ``layers``.
        """
        chosen = self.layers or self.layers_at(lm, self.DEPTHS)
        self.require_blocks(lm, chosen)
        if adds_directly(lm, self.site(lm, chosen[-1])):
            return chosen
        return chosen[-1:] if self.layers else self.layers_at(lm, (self.ALONE,))

    def site(self, lm: LM, block: int) -> Site:
        """What is edited in a block: the MLP's last linear or, by methods that know how, its experts; `ModelError` where neither is."""
        site = lm.mlp_site(block) if self.EXPERTS else Site(block, POINT)
        lm.linear_path(site)
        return site

    def alone(self, lm: LM) -> Self:
        """The editor where a norm follows the MLP: what a ridge leaves unwritten in the one block, no later block makes up for."""
        return self

    def prepare(self, lm: LM, progress: Callable[[int, int], None] | None = None) -> dict[Site, Moments]:
        """The statistics this method needs on this model: read from the cache, or made (`errata stats`), with tokens as progress."""
        sites = [self.site(lm, b) for b in self.target_layers(lm)]
        return moments(lm, sites, self.stats, tokens=self.stats_tokens, progress=progress) if self.mom2_adjustment else {}

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.rect, self.prune, self.prune_base, self.norm_constraint)

    @property
    def steps(self) -> int:
        return self.v_steps

    def clamp_on(self, lm: LM) -> float:
        """‖δ‖ / ‖v_0‖ at most, on this model."""
        if self.clamp is not None:
            return self.clamp
        return _CLAMP if adds_directly(lm, self.site(lm, self.target_layers(lm)[-1])) else _CLAMP_BEFORE_NORM

    def objective(self, lm: LM) -> Objective:
        return Objective(self.v_lr, self.v_steps, self.v_stop, self.kl, self.v_decay, self.clamp_on(lm))

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

    def value_sites(self, site: Site, direct: bool) -> list[Site]:
        """Where δ is added; the first is what the change has to produce.  ``site`` is the last that is edited."""
        return [Site(site.block) if self.VALUE_AT == "block" and direct else site]

    def current(self, job: LocateThenEditRun, outputs: Tensor, ops: Sequence[list[Op]]) -> Tensor:
        """[N, D]: what stands now where the value should be; ``outputs`` [N, T, O] are those of the edited linear behind each prefix."""
        return job.read_bare(job.value_sites[0], ops) if ops[0] else job.start

    def patch_state(self, job: LocateThenEditRun, ops: Sequence[list[Op]]) -> list[dict[str, Tensor]]:
        """State of each patch for edits to come."""
        return [{} for _ in ops]

    def facts(self, job: LocateThenEditRun) -> dict[str, Any]:
        """More to say in the patch's notes."""
        return {}
