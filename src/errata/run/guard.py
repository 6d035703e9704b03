"""The health guard: what edits did to everything that is not the edit, looked at every n edits; warn, stop, or take back the culprit.

Held-out text is foretold under the stack and under the base.  Healthy means: perplexity at most ``perplexity`` times the base's, and
(where set) the mean KL divergence of next-token distributions, KL(base ‖ edited), at most ``kl`` nats.  Numbers that are not finite are not
healthy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import ConfigError
from errata.score.perplexity import perplexity_and_kl
from errata.text.corpora import open_corpus


@dataclass(frozen=True)
class GuardSpec:
    """When and how to look, and what to do about it.

    every       edits between two looks (there is one at each mark too)
    action      warn: say so and go on; stop: score what there is and end; rollback: take back the edit that broke the model, go on without
    perplexity  most times the base's; kl: most nats, None for no limit
    text        held-out text, as `errata.text.corpora.open_corpus` names it; the first ``tokens`` tokens in rows of ``length``
                (None: 256, or what the model takes)
    """

    every: int = 100
    action: Literal["warn", "stop", "rollback"] = "warn"
    perplexity: float = 2.0
    kl: float | None = None
    text: str = "heldout"
    tokens: int = 2048
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "tokens", "perplexity"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"guard.{name} must be positive, not {getattr(self, name)}")
        if self.kl is not None and self.kl <= 0:
            raise ConfigError(f"guard.kl must be positive, not {self.kl}; leave it out for no limit")


@dataclass(frozen=True)
class Health:
    """What one look found; None stands for a number that is not finite."""

    perplexity: float | None
    base: float | None
    kl: float | None
    healthy: bool

    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "perplexity_base": self.base, "kl": self.kl, "healthy": self.healthy}

    def __str__(self) -> str:
        edited, base, kl = ("not finite" if v is None else f"{v:.4g}" for v in (self.perplexity, self.base, self.kl))
        return f"perplexity {edited} (base {base}), KL {kl}"


class HealthGuard:
    """Looks at stacks of one model."""

    def __init__(self, lm: LM, limits: GuardSpec) -> None:
        self.lm, self.limits = lm, limits
        self.text = "\n".join(open_corpus(limits.text).texts)
        self.length = limits.length or min(256, 256 if lm.context_length is None else lm.context_length - 1, limits.tokens)

    def __call__(self, stack: Stack) -> Health:
        base, edited, kl = perplexity_and_kl(self.lm, self.text, stack, self.limits.tokens, self.length)
        ratio = edited.nll - base.nll
        broken = not (ratio <= math.log(self.limits.perplexity)) or (self.limits.kl is not None and not (kl <= self.limits.kl))
        return Health(_finite(edited.value), _finite(base.value), _finite(kl), not broken)

    def first_broken(self, stacks: list[Stack]) -> int:
        """Index of the first stack that is not healthy, given that the last is not and that what came before the first was: by bisection,
        in log₂ looks.  (Should health come and go, it is one that follows a healthy stack.)"""
        low, high = -1, len(stacks) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self(stacks[middle]).healthy:
                low = middle
            else:
                high = middle
        return high


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
