"""Answers in two states of a ledger: the base, what is live, or what was live after an event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.core.bank import Stack
from errata.errors import ConfigError
from errata.ledger.state import LedgerState
from errata.score.compare import compare


@dataclass(frozen=True)
class AnswerDiff:
    """moved: see `errata.score.compare.Comparison`."""

    prompt: str
    before: str
    after: str
    moved: float

    @property
    def changed(self) -> bool:
        return self.before != self.after


def state(ledger: LedgerState, name: str | int) -> Stack:
    """ "base", "live", or the number of an event."""
    if name == "base":
        return ()
    if name == "live":
        return ledger.stack()
    if isinstance(name, str) and not name.isdecimal():
        raise ConfigError(f"state {name!r} is neither base, live nor the number of an event (`errata ledger log`)")
    return ledger.stack(int(name))


def diff(ledger: LedgerState, prompts: Sequence[str], before: str | int, after: str | int, tokens: int) -> list[AnswerDiff]:
    found = compare(ledger.lm, prompts, (state(ledger, before), state(ledger, after)), tokens)
    return [AnswerDiff(c.prompt, c.before.text, c.after.text, c.moved) for c in found]
