"""Answers in two states of a ledger: the base, what is live, or what was live after an event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from errata import decode
from errata.bank import Stack
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.ledger.book import Ledger


@dataclass(frozen=True)
class Difference:
    """moved: total variation ½ Σ |p − q| of the two next-token distributions, from 0 (the same) to 1."""

    prompt: str
    before: str
    after: str
    moved: float

    @property
    def changed(self) -> bool:
        return self.before != self.after


def state(ledger: Ledger, name: str | int) -> Stack:
    """ "base", "live", or the number of an event."""
    if name == "base":
        return ()
    if name == "live":
        return ledger.stack()
    if isinstance(name, str) and not name.isdecimal():
        raise ConfigError(f"state {name!r} is neither base, live nor the number of an event (`errata ledger log`)")
    return ledger.stack(int(name))


def diff(ledger: Ledger, prompts: Sequence[str], before: str | int, after: str | int, tokens: int) -> list[Difference]:
    lm, sides = ledger.lm, [state(ledger, before), state(ledger, after)]
    texts = decode.answers(lm, [(p, side) for p in prompts for side in sides], tokens)
    out = []
    for start in range(0, len(prompts), decode.AT_ONCE):
        part = list(prompts[start : start + decode.AT_ONCE])
        encoded = lm.encode(part)
        rows = [0] * len(part) + [1] * len(part)
        logits = lm.logits(lm.batch([*encoded, *encoded]), stacks=sides, rows=rows)[:, -1]  # left-padded: the last token is the prompt's
        p = torch.softmax(logits.double(), -1)
        moved = 0.5 * (p[: len(part)] - p[len(part) :]).abs().sum(-1)
        for i, prompt in enumerate(part):
            place = 2 * (start + i)
            out.append(Difference(prompt, texts[place].strip(), texts[place + 1].strip(), float(moved[i])))
    return out
