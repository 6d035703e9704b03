"""REP: a locate-then-edit patch whose keys are made robust.

An edit of this family fires where a key k looks like the edited one, β(k, k*) = kᵀC⁻¹k* (Lemma 4.6 wants that of every way to say the
fact, Lemma 4.7 of nothing else), and native keys do not: other names, shuffled subjects and long contexts move them.  REP trains a small
gated map k̂ = k + g(k) ∘ B A k at each edited linear that moves the keys of such surfaces to where the edit fires.
Source: Yan et al., ACL 2025 (REP), arXiv 2410.09338, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from errata import registry
from errata.core.bank import Stack, active_patches
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.base import Editor
from errata.methods.locate.editor import LocateEditor
from errata.methods.rep.run import REPRun
from errata.methods.rep.surfaces import KINDS
from errata.request import EditRequest


@dataclass(frozen=True)
class REP(Editor):
    """wraps, wrapped   the method whose patch is made robust (rome, r-rome, memit, pmet, emmet, alphaedit) and settings for it
    scope        "edit": an adaptor set an edit (the paper); of those at one linear the one whose gate is most open acts, also across the
                 patches of a stack.  "shared": one set for all edits of a patch, each row with its own edit's target; an edit on top of
                 such a patch goes on from it and replaces it, rehearsing ``rehearse`` kept keys of each earlier edit (ours)
    target       t of the loss (`errata.methods.rep.training`): "whitened" C⁻¹k*/‖·‖, "key" k* as it is, or "published": whitened for ROME
                 and R-ROME, the bare key for the others, as released
    surfaces     which are trained on: names, shuffled, prefixes, long, paraphrases (the request's own; the paper trains on none)
    prefixes, pool   (tokens, count) of sampled texts as in ROME; texts a request at most
    batch        texts drawn a step beside the prompt itself
    steps, lr, weight_decay   Adam's
    rank, dropout, hidden   of the projection; ``hidden``: the gate's width as a share of the key's
    tau          the gate acts above it
    aggregation, consistency, match, closing   weights of the loss.  The preset "published" has the first two; the default has the last
                 two, which are ours, and little of the second.  ``match`` wants a surface's whole key where the prompt's is.
                 ``closing`` trains the gate, on which no published term acts: open at surfaces, shut at ``away`` kept places (other
                 tokens of the prompt, other names in it, the request's ``unrelated``, bundled text)
    gate, projection, normalise   ablations: no gate; ‖k‖ times a learned vector in place of B A k; ⟨k̂, t⟩ without ‖k̂‖
    seed         of the start, the drawn texts and the shuffles

    The paper prints −|⟨k̂/‖k̂‖, C⁻¹k*⟩|; the code has neither the absolute value nor, by default, a C⁻¹ beyond the target's, and is
    followed.  Its soft gate in training and hard gate at use are kept, its dropout that stays on at use is not.  ΔW of other edits on
    the stack reads k, not k̂, so that a patch can be taken back without touching another.
    """

    name: ClassVar[str] = "rep"
    paper: ClassVar[str] = "Yan et al., ACL 2025 (REP), arXiv 2410.09338"
    needs: ClassVar[frozenset[str]] = frozenset({"subject", "stats"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # no published term trains the gate: on real models it stays shut, and every answer is the wrapped method's
        "published": {"steps": 10, "lr": 5e-4, "aggregation": 1.0, "consistency": 50_000.0, "match": 0.0, "closing": 0.0, "tau": 0.9},
    }

    TUNES: ClassVar[dict[str, Any]] = {"closing": (0.1, 1.0), "steps": (100,), "consistency": (10.0,), "tau": (0.6, 0.9)}

    wraps: str = "rome"
    wrapped: Mapping[str, Any] = field(default_factory=dict)
    scope: Literal["edit", "shared"] = "edit"
    target: Literal["published", "whitened", "key"] = "published"
    surfaces: tuple[str, ...] = KINDS
    prefixes: tuple[tuple[int, ...], ...] = ((5, 10), (10, 10))
    pool: int = 150
    batch: int = 15
    steps: int = 200
    lr: float = 2e-3
    weight_decay: float = 0.0
    rank: int = 32
    dropout: float = 0.1
    hidden: float = 0.1
    tau: float = 0.8
    aggregation: float = 0.0
    consistency: float = 100.0
    match: float = 1.0
    closing: float = 0.3
    away: int = 768
    gate: bool = True
    projection: Literal["low_rank", "constant"] = "low_rank"
    normalise: bool = True
    rehearse: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        method = registry.get("method", self.wraps)
        if not issubclass(method, LocateEditor):
            known = [m for m in registry.names("method") if issubclass(registry.get("method", m), LocateEditor)]
            raise ConfigError(f"rep adapts keys of an edited linear; {self.wraps} edits none: wraps is one of {', '.join(known)}")
        if odd := [s for s in self.surfaces if s not in KINDS]:
            raise ConfigError(f"rep: no surface {odd[0]!r}; there are {', '.join(KINDS)}")
        if min(self.pool, self.batch, self.steps, self.rank) < 1 or min(self.away, self.rehearse) < 0:
            raise ConfigError("rep: pool, batch, steps and rank must be at least 1, away and rehearse not negative")
        if not 0 < self.tau < 1 or not 0 <= self.dropout < 1 or not 0 < self.hidden <= 1 or self.lr <= 0:
            raise ConfigError("rep: tau lies between 0 and 1, dropout from 0 to below 1, hidden above 0 to 1, lr above 0")
        if min(self.aggregation, self.consistency, self.match, self.closing) < 0:
            raise ConfigError("rep: aggregation, consistency, match and closing must not be negative")
        if self.closing and self.gate and not self.away:
            raise ConfigError("rep: closing needs places at which the gate should be shut; set away above 0")

    def inner(self, lm: LM) -> LocateEditor:
        """The wrapped editor, with its own preset for this model."""
        made: LocateEditor = registry.get("method", self.wraps).for_model(lm, **self.wrapped)
        return made

    def prepare(self, lm: LM, progress: Any = None) -> Mapping[Site, Any]:
        """The wrapped method's statistics."""
        return self.inner(lm).prepare(lm, progress)

    def whitened(self) -> bool:
        """Whether the target is whitened."""
        return self.target == "whitened" or (self.target == "published" and self.wraps in ("rome", "r-rome"))

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch for all requests, on top of ``on``."""
        return REPRun(self, lm, active_patches(tuple(on)), runner).run([list(requests)], progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``; all adaptors are trained in one batch."""
        return REPRun(self, lm, active_patches(tuple(on)), runner).run([[r] for r in requests], progress)

    def adapt(self, lm: LM, patches: Sequence[Patch], *, on: Stack = (), progress: Progress | None = None) -> list[Patch]:
        """Each of the wrapped method's patches, made on ``on``, with adaptors: `edit_each` where each holds one request."""
        wrong = next(
            (p for p in patches if p.method != self.wraps or p.settings.get("layers") != list(self.inner(lm).target_layers(lm))), None
        )
        if wrong is not None:
            made = f"was made with {wrong.method}, blocks {wrong.settings.get('layers')}"
            raise ConfigError(f"rep: patch {wrong.id} {made}; set wraps and wrapped accordingly")
        return REPRun(self, lm, active_patches(tuple(on)), Tail).run([list(p.requests) for p in patches], progress, patches)
