"""A benchmark of what the tiny models know, and editors of one's own, named in run files as "own:…"."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from families import SENTENCES

from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import FitError
from errata.methods.subspace.reft import ReFT
from errata.request import Case, EditRequest, Probe

ANSWERS = ("Rome", "Madrid", "Tokyo", "Paris")


class Tiny:
    """Sixteen edits: each sentence gets two new answers."""

    name = "tiny"
    version = "1"

    def load(self, split: str | None = "test", n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        made = []
        for turn, (i, (prompt, old)) in itertools.product(range(2), enumerate(SENTENCES)):
            target = [a for a in ANSWERS if a != old][(i + turn) % 3]
            others = [(p, a) for p, a in SENTENCES if p != prompt][i % 3 : i % 3 + 2]
            probes = (Probe("rewrite", prompt, target), *(Probe("neighbour", p, a) for p, a in others), Probe("unrelated", f"The {old}"))
            made.append(Case(EditRequest(prompt, target, old=old), probes))
        random.Random(seed).shuffle(made)
        return iter(made[:n])


class Deadly(Tiny):
    """Kills the process that loads it, once for each line of the file it is given."""

    def __init__(self, data: str) -> None:
        self.path = Path(data)

    def load(self, split: str = "test", n: int | None = None, seed: int = 0) -> Iterator[Case]:
        lives = self.path.read_text()
        if lives:
            self.path.write_text(lives[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(split, n, seed)


class Separated(Tiny):
    """Asks, of each case, a prompt with the line separators that `str.splitlines` knows and JSON Lines does not."""

    def load(self, split: str | None = "test", n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        for case in super().load(split, n, seed):
            yield dataclasses.replace(case, probes=(*case.probes, Probe("unrelated", "In Rome\u2028people\u2029speak\u0085")))


class Talkative(Tiny):
    """Offers prompts to sample from, which it learns while it loads, as CounterFact does."""

    def load(self, split: str | None = "test", n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        cases = list(super().load(split, n, seed))
        self.openings = {case.id: (case.request.prompt,) for case in cases}
        return iter(cases)

    def generation(self, case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.openings.get(case.id, ()), ()

    def collection(self) -> tuple[str, ...]:
        return ()


class Mute(Talkative):
    """Could, but its file holds none."""

    def generation(self, case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()


@dataclass(frozen=True)
class Vandal(ReFT):
    """ReFT, but edits number ``breaks`` (from 1, in `Tiny`'s first order) put noise into the last block; ``fails`` cannot be made."""

    name: ClassVar[str] = "vandal"

    breaks: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()

    def edit(self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), **how: Any) -> Patch:
        wanted = list(Tiny().load())
        number = 1 + next(i for i, c in enumerate(wanted) if c.request == requests[0])
        if number in self.fails:
            raise FitError(f"edit {number} went to NaN")
        if number in self.breaks:
            noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
            return Patch("test", {}, lm.fingerprint, tuple(requests), (Op("dense", Site(3, "mlp_down"), {"weight": 5 * noise}),))
        plain = ReFT(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ReFT)})
        return plain.edit(lm, requests, on=on, **how)


def shouts(question: str, wanted: str, answer: str) -> bool:
    """A judge of one's own."""
    return answer.upper() == wanted.upper()
