"""Indirect effects averaged by token role, and the blocks that they suggest to edit.

Each token has one role; tokens before the subject have none (their states are clean in every run, so their effect is 0):

    subject_first, subject_middle, subject_last   the subject's tokens; a subject of one token is a last one
    next, further                                 the first token after the subject, and later ones
    last                                          the prompt's final token, also where one of the above would fit: there the answer is read

A fact counts once for a role (the mean over its tokens of that role), so long subjects do not weigh more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from errata.errors import ConfigError, InputError
from errata.trace.facts import TraceResult, around

ROLES: Final = ("subject_first", "subject_middle", "subject_last", "next", "further", "last")
_NORMAL: Final = 1.96  # standard errors either side of a mean: 95 %
_ENOUGH: Final = 10  # facts with a last subject token, below which blocks cannot be told apart
_HARM: Final = 0.05  # total effect below which noise hardly disturbs the answer
_RECOVERED: Final = 0.1  # share of the total effect that the peak should bring back
_HALF: Final = 0.5  # blocks of a range have at least this share of the peak
_SHARE: Final = 6 / 28  # a range's largest share of the depth: MEMIT edits six of GPT-J's 28 blocks


def roles(length: int, span: tuple[int, int]) -> list[str | None]:
    """The role of each of ``length`` tokens, the subject's being [start, end)."""
    start, end = span

    def role(i: int) -> str | None:
        if i == length - 1:
            return "last"
        if i < start:
            return None
        if i < end:
            return "subject_last" if i == end - 1 else "subject_first" if i == start else "subject_middle"
        return "next" if i == end else "further"

    return [role(i) for i in range(length)]


@dataclass(frozen=True)
class AverageEffects:
    """``values[role]`` [n, K, L]: the indirect effects of the n facts that have the role.  high, low: means over all facts."""

    kinds: tuple[str, ...]
    depth: int
    facts: int
    high: float
    low: float
    values: Mapping[str, Tensor]

    @property
    def total(self) -> float:
        """The average total effect, high − low."""
        return self.high - self.low

    def count(self, role: str) -> int:
        return len(self.values[role])

    def mean(self, role: str) -> Tensor:
        """[K, L] average indirect effect; NaN where no fact has the role."""
        return self.values[role].mean(0)

    def error(self, role: str) -> Tensor:
        """[K, L] standard error of the mean over facts; NaN below two facts."""
        n = self.count(role)
        return self.values[role].std(0) / math.sqrt(n) if n > 1 else torch.full(self.values[role].shape[1:], math.nan)


def average(traces: TraceResult) -> AverageEffects:
    """Average indirect effects over the traced facts."""
    if not traces.facts:
        raise InputError("there is no traced fact to average")
    kinds, empty = traces.settings.kinds, torch.empty((0, len(traces.settings.kinds), traces.depth), dtype=torch.float64)
    values: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for fact in traces.facts:
        of = roles(len(fact.tokens), fact.span)
        for role in ROLES:
            where = [i for i, r in enumerate(of) if r == role]
            if where:
                values[role].append(fact.effects[:, where].mean(1))
    count = len(traces.facts)
    high, low = (sum(getattr(f, name) for f in traces.facts) / count for name in ("high", "low"))
    return AverageEffects(kinds, traces.depth, count, high, low, {r: torch.stack(v) if v else empty for r, v in values.items()})


@dataclass(frozen=True)
class Suggestion:
    """Blocks to edit, and what led to them.

    block    the peak of ``effects``: average indirect effect of the mlp at the last subject token
    range    (first, last) blocks for an edit of several: ends at the peak
    effects, errors   [L] averages and their standard errors (NaN below two facts)
    alike    blocks whose effect cannot be told from the peak's (95 %, paired by fact)
    window   the blocks [begin, end) that were restored together at the peak
    until    the last block after which the token's hidden state still has half of its largest effect; None if not traced, or no effect
    reasons  why the evidence is weak; empty where it is not
    """

    block: int
    range: tuple[int, int]
    effects: tuple[float, ...]
    errors: tuple[float, ...]
    alike: tuple[int, ...]
    facts: int
    total: float
    window: tuple[int, int]
    until: int | None
    reasons: tuple[str, ...]

    @property
    def weak(self) -> bool:
        return bool(self.reasons)

    def text(self) -> str:
        """A few plain lines."""
        first, last = self.range
        several = f"blocks {first} to {last}" if first < last else f"block {first} alone"
        begin, end = self.window
        together = f"blocks {begin} to {end - 1} together" if end - begin > 1 else f"block {begin} alone"
        lines = [
            f"Suggested for an edit of one block: {self.block}; of several: {several}.",
            f"There restoring the MLP output at the last subject token ({together}) brings back "
            f"{self.effects[self.block]:.3f} of the {self.total:.3f} that the noise takes from the answer ({self.facts} facts).",
        ]
        if self.until is not None:
            state = f"Its hidden state matters up to block {self.until} (at least half of its largest effect)"
            lines.append(f"{state}; what an edit writes there later is read less.")
        return "\n".join(lines + [f"Weak evidence: {reason}." for reason in self.reasons])


def suggest_layers(traces: TraceResult) -> Suggestion | None:
    """The blocks where MLPs at the last subject token matter most; None where no prompt goes on after its subject.

    One block: the peak of the average indirect effect.  Several: the unbroken run of blocks with at least half of the peak's effect that
    ends at the peak, no longer than MEMIT's share of the depth (6 of 28, rounded, at least 2).  A window blurs the peak by its own width.
    """
    found = average(traces)
    if "mlp" not in found.kinds:
        raise ConfigError("blocks are suggested from the kind 'mlp', which was not traced; add it to the kinds")
    values = found.values["subject_last"][:, found.kinds.index("mlp")]
    if not len(values):
        return None
    effects, errors = (t[found.kinds.index("mlp")] for t in (found.mean("subject_last"), found.error("subject_last")))
    peak = int(effects.argmax())
    start, longest = peak, max(2, round(found.depth * _SHARE))
    while start > 0 and peak - start + 1 < longest and effects[start - 1] >= _HALF * effects[peak] > 0:
        start -= 1
    alike = _alike(values, peak)
    window = around(peak, traces.window, traces.depth)
    # A block whose window overlaps the peak's shares MLPs with it, so it says nothing against the peak.
    away = [b for b in alike if not start <= b <= peak and abs(b - peak) >= traces.window]
    reasons = _doubts(found, effects, errors, peak, len(values), away, window)
    curves = tuple(effects.tolist()), tuple(errors.tolist())
    return Suggestion(peak, (start, peak), *curves, alike, len(values), found.total, window, _until(found), reasons)


def _until(found: AverageEffects) -> int | None:
    """The last block at whose output the hidden state of the last subject token has at least half of its largest effect."""
    if "hidden" not in found.kinds:
        return None
    effects = found.mean("subject_last")[found.kinds.index("hidden")]
    return int((effects >= _HALF * effects.max()).nonzero().max()) if effects.max() > 0 else None


def _alike(values: Tensor, peak: int) -> tuple[int, ...]:
    """Blocks (not the peak) whose difference to the peak, paired by fact, has a 95 % interval that reaches 0.  values [n, L]."""
    n = len(values)
    if n < 2:
        return tuple(b for b in range(values.shape[1]) if b != peak)
    gap = values[:, peak : peak + 1] - values
    lower = gap.mean(0) - _NORMAL * gap.std(0) / math.sqrt(n)
    return tuple(b for b, low in enumerate(lower.tolist()) if b != peak and low <= 0)


def _doubts(
    found: AverageEffects, effects: Tensor, errors: Tensor, peak: int, n: int, away: Sequence[int], window: tuple[int, int]
) -> tuple[str, ...]:
    """``away``: blocks outside the suggested range that do as well as the peak."""
    best, out = float(effects[peak]), []
    if n < _ENOUGH:
        out.append(f"only {n} fact(s) with a last subject token; at least {_ENOUGH} are needed to tell blocks apart")
    if found.total < _HARM:
        out.append(f"the noise takes only {found.total:.3f} from the answer's probability; raise the noise")
    elif best < _RECOVERED * found.total:
        out.append(f"the peak brings back only {best / found.total:.0%} of what the noise takes; the MLPs there may not hold these facts")
    if n > 1 and best - _NORMAL * float(errors[peak]) <= 0:
        out.append(f"the peak, {best:.3f}, is not clear of 0 at 95 %")
    if window[0] == 0:  # its MLP reads little but the noised embedding, so putting its output back partly takes the noise away again
        out.append("the peak includes the MLP of block 0, which reads the noised token itself: it may name the token, not recall the fact")
    if n >= _ENOUGH and away:
        out.append(f"outside the range, block(s) {', '.join(map(str, away))} cannot be told from the peak at 95 %")
    return tuple(out)
