"""Everyday facts, to be changed on any model: in the package, so that a first try and a test need no download.

Each case has the edited prompt and two other ways to ask.  It brings no neighbours: `errata.score.neighbours` finds them on the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from errata.benchmarks.facts import share
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe

_FACTS = Path(__file__).parent / "data" / "everyday" / "facts.tsv"
_SPLIT = "all"


@functools.cache
def _cases() -> tuple[Case, ...]:
    rows = [line.split("\t") for line in _FACTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    out = []
    for prompt, subject, old, new, *ways in rows:
        asked = [Probe("rephrase", way.replace("\\n", "\n"), new) for way in ways]
        out.append(Case(EditRequest(prompt, new, subject, old), (Probe("rewrite", prompt, new), *asked)))
    return tuple(out)


class Everyday:
    """Facts that most language models know, with a wrong answer to write."""

    name = "everyday"
    version = "1"
    source = "written for errata"
    licence = "CC0"
    citation = "errata"
    splits = (_SPLIT,)
    kind = "edits"
    probes = ("rewrite", "rephrase")
    needs_data = False

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        """``n`` cases (all without ``n``) in an order by ``seed``, or for None in the file's."""
        if split not in (None, _SPLIT):
            raise InputError(f"everyday has no split {split!r}; it has {_SPLIT}")
        cases = _cases()
        if isinstance(n, bool) or not isinstance(n, int | None) or (n is not None and not 1 <= n <= len(cases)):
            raise InputError(f"everyday has 1 to {len(cases)} cases, not {n!r}; ask for a number in between")
        order = cases if seed is None else sorted(cases, key=lambda c: share("everyday", str(seed), c.request.prompt))
        return itertools.islice(iter(order), n)
