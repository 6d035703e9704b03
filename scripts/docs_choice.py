"""The table of docs/choose.md, computed from docs/results/real: what to take for which need, and the figures it follows from."""

from __future__ import annotations

import math
from collections.abc import Callable

from docs_methods import WEIGHTS, link
from docs_results import MODELS, TITLES, Cell, of, seconds, table, value

SURE, KEPT = 0.95, 0.8  # least reliability and least share of neighbours kept, where a rule asks for them
BEST = 2  # methods named for a need

Choice = tuple[str, str, Callable[[str, Cell], bool], Callable[[Cell], float], Callable[[Cell], str]]


def _of(metric: str, protocol: str = "starts") -> Callable[[Cell], float]:
    return lambda cell: value(cell, metric, protocol)


_reliability, _generality, _kept, _s = _of("reliability"), _of("generality"), _of("locality_first_word"), _of("S", "likelihood")


def _sure(cell: Cell) -> bool:
    return _reliability(cell) >= SURE


def _safe(cell: Cell) -> bool:
    return _sure(cell) and _kept(cell) >= KEPT


CHOICES: tuple[Choice, ...] = (
    ("one fact, everything else untouched", f"reliability ≥ {SURE:.0%}; most neighbours that keep their first word",
     lambda _, c: _sure(c), _kept, lambda c: f"kept {_kept(c):.0%}, generality {_generality(c):.0%}"),
    ("one fact that must hold in other words", f"reliability ≥ {SURE:.0%}, kept ≥ {KEPT:.0%}; highest generality",
     lambda _, c: _safe(c), _generality, lambda c: f"generality {_generality(c):.0%}, kept {_kept(c):.0%}"),
    ("both", f"reliability ≥ {SURE:.0%}; highest S", lambda _, c: _sure(c), _s, lambda c: f"S {100 * _s(c):.0f}"),
    ("a change of weights, for [another engine](engines.md)", f"changes weights only, reliability ≥ {SURE:.0%}; highest S",
     lambda n, c: n in WEIGHTS and _sure(c), _s, lambda c: f"S {100 * _s(c):.0f}, kept {_kept(c):.0%}"),
    ("an answer in no time", f"reliability ≥ {SURE:.0%}, kept ≥ {KEPT:.0%}; fewest seconds",
     lambda _, c: _safe(c), lambda c: -seconds(c), lambda c: f"{seconds(c):.1f} s, generality {_generality(c):.0%}"),
    ("small files", f"reliability ≥ {SURE:.0%}, kept ≥ {KEPT:.0%}; fewest kB",
     lambda _, c: _safe(c), lambda c: -c["patch_bytes"], lambda c: f"{c['patch_bytes'] / 1000:,.0f} kB, generality {_generality(c):.0%}"),
)  # fmt: skip


def best(model: str, choice: Choice) -> str:
    """The first methods of a model by a rule, with their figures; settings by another name than a method's own are not looked at."""
    _, _, allowed, by, said = choice
    found = {n: c for n, c in of("single", model).items() if " " not in n}
    fit = sorted((n for n, c in found.items() if allowed(n, c) and not math.isnan(by(c))), key=lambda n: (-by(found[n]), n))
    return "; ".join(f"**{link(n, '')}** ({said(found[n])})" for n in fit[:BEST]) or "none"


def decisions() -> str:
    """Need -> methods, with the rule and the figures, a column a model."""
    heads = ["you need", "chosen by", *(f"{TITLES[m]}, of {len(of('single', m))} rows" for m in MODELS)]
    return table(heads, [[choice[0], choice[1], *(best(m, choice) for m in MODELS)] for choice in CHOICES])


def parts() -> dict[str, str]:
    """Name of a computed part of choose.md -> its text."""
    return {"decisions": decisions()}
