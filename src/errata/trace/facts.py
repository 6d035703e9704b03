"""What goes into a trace and what comes out: `Fact` and `TraceConfig`; `FactTrace`, `Skipped` and `TraceResult`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from errata.errors import ConfigError, InputError
from errata.request import EditRequest

KINDS: Final = ("hidden", "mlp", "attn")


@dataclass(frozen=True, slots=True)
class Fact:
    """``prompt`` holds ``subject``, in whole words; ``answer``: what the model must say for the fact to be traced.

    occurrence  which of the subject's places in the prompt counts: 1 the first, -1 the last
    """

    prompt: str
    subject: str
    answer: str | None = None
    occurrence: int = 1

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("subject", self.subject), ("answer", self.answer)):
            if (value is not None or name != "answer") and not (isinstance(value, str) and value.strip()):
                raise InputError(f"the {name} of a fact to trace must be a text of at least one word, not {value!r}")
            if value is not None and not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
                raise InputError(f"the {name} of a fact to trace holds half a character (a lone surrogate); write it as UTF-8 text")
        asked = EditRequest(self.prompt, self.answer or "?", self.subject, occurrence=self.occurrence)
        object.__setattr__(self, "subject", asked.subject)

    @classmethod
    def of(cls, request: EditRequest) -> Fact:
        """The fact as it stands before the edit: the expected answer is ``old``."""
        if request.subject is None:
            raise InputError(f"the request {request.prompt!r} has no subject; tracing needs to know what the fact is about, add one")
        return cls(request.prompt, request.subject, request.old, request.occurrence)


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """How to trace.

    samples  noise samples a fact; the same for every cell
    noise    in multiples of σ
    window   blocks restored at once for mlp and attn; None: `default_window`
    seed     of the noise, drawn anew for each fact: a fact's noise does not depend on the others (σ does)
    rows     of a batch at most: a cap on memory that does not change the numbers
    """

    kinds: tuple[str, ...] = KINDS
    samples: int = 10
    noise: float = 3.0
    window: int | None = None
    seed: int = 1
    rows: int = 256

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or set(self.kinds) - set(KINDS):
            raise ConfigError(f"kinds must be some of {', '.join(KINDS)}, each once, not {', '.join(map(str, self.kinds)) or 'none'}")
        for name in ("samples", "rows", *(("window",) if self.window is not None else ())):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not math.isfinite(self.noise) or self.noise < 0:
            raise ConfigError(f"noise must be a number of at least 0, not {self.noise!r}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number from 0 to 2^63 − 1, not {self.seed!r}")


@dataclass(frozen=True)
class FactTrace:
    """One traced fact.

    tokens   the prompt's tokens as text; ``span`` = [start, end) is the subject's
    answer   the likeliest next token of the clean run, as text
    scores   [K, T, L] float64: mean probability of the answer with one cell restored, for each kind, token and block
    """

    fact: Fact
    tokens: tuple[str, ...]
    span: tuple[int, int]
    answer: str
    high: float
    low: float
    scores: Tensor

    @property
    def effects(self) -> Tensor:
        """[K, T, L] indirect effects: score − low."""
        return self.scores - self.low


@dataclass(frozen=True, slots=True)
class Skipped:
    """A fact that was not traced, and why."""

    fact: Fact
    reason: str


@dataclass(frozen=True)
class TraceResult:
    """What `trace` found.  ``deviation`` is σ, ``window`` the blocks restored at once for mlp and attn."""

    settings: TraceConfig
    window: int
    depth: int
    deviation: float
    facts: tuple[FactTrace, ...]
    skipped: tuple[Skipped, ...]


def default_window(depth: int) -> int:
    """The paper's share of the depth, 10 of GPT-2-XL's 48 blocks, rounded; at least 1.  8 blocks: 2; 32 blocks: 7."""
    return max(1, round(depth * 10 / 48))


def around(block: int, window: int, depth: int) -> tuple[int, int]:
    """The blocks [b − ⌊w/2⌋, b + ⌈w/2⌉) that are restored together for ``block``, as far as they exist."""
    begin = block - window // 2
    return max(0, begin), min(depth, begin + window)
