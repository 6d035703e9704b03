"""What gate weights say, from the weights alone: BaFT's failure signs, and a test that inputs are told apart.

w [inputs, r] are the weights of one block's bases, each row the mean over the tokens of one input that the patch acts on.

    collapse   Σ_k Var(w_k) / Σ_k E[w_k²]: the share of the weights' squares that a constant weight leaves over.  With a constant w
               Φ(h) = h + Rᵀ(A'h + b' − Rh), A' = R + diag(w)(A − R), b' = w ∘ b: BaFT is a ReFT again.
    balance    the fewest bases that carry `CARRIED` of the mean weights, and the effective number (Σ w̄_k)² / Σ w̄_k²

The paper names the signs, not the bounds; the bounds are this module's constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errata.errors import InputError

Floats = NDArray[np.float64]

CARRIED = 0.9  # of the weight
FEW = 0.25  # of the bases: so few carrying that much are an imbalance
COLLAPSED = 0.01  # a constant leaves no more of the weights' squares: a coefficient of variation of 10 %
FALL = 0.05  # of locality
EXACT = 12  # pairs up to which all 2^n signs are tried
DRAWS = 9999  # of signs beyond that
_ALPHA = 0.05
CHUNK = 1 << 22  # signs held at once


def variation(w: Floats, group: Sequence[object] | None = None) -> float:
    """Share of the weights' squares that a constant leaves over, in [0, 1]; 0 for weights that are all 0.

    ``group``: which inputs were read under one patch.  Each patch has gates of its own, so a constant a patch is subtracted, and the
    variance has as many degrees of freedom less; NaN where no patch was read on two inputs.
    """
    names = [0] * len(w) if group is None else list(group)
    squares, free = 0.0, len(w)
    for name in dict.fromkeys(names):
        mine = w[[n == name for n in names]]
        squares += float(((mine - mine.mean(0)) ** 2).sum())
        free -= 1
    if free < 1:
        return float("nan")
    whole = float((w**2).sum()) / len(w)
    return 0.0 if whole == 0 else min(1.0, squares / free / whole)


def carriers(means: Floats) -> int:
    """The fewest bases that together carry `CARRIED` of the mean weights [r]."""
    order = np.sort(means)[::-1]
    total = float(order.sum())
    if total <= 0:
        return len(means)
    return int(np.searchsorted(np.cumsum(order) / total, CARRIED - 1e-12) + 1)


def participation_ratio(means: Floats) -> float:
    """(Σ w̄)² / Σ w̄²: r for equal weights, 1 where one basis has it all."""
    squares = float((means**2).sum())
    return float(means.sum()) ** 2 / squares if squares > 0 else float(len(means))


def few(rank: int) -> int:
    """So many bases, or fewer, carrying `CARRIED` are an imbalance; 0 where a patch has too few to be out of balance."""
    return 0 if rank < 2 else max(1, int(FEW * rank))


def unevenness(means: Floats) -> tuple[float, float]:
    """(variance, its ratio to the mean squared) over bases of mean weights [r], with r − 1 in the denominator as in R_bal."""
    if len(means) < 2:
        return 0.0, 0.0
    variance, mean = float(means.var(ddof=1)), float(means.mean())
    return variance, variance / max(mean**2, 1e-16)


def paired(a: Floats, b: Floats, seed: int = 0) -> dict[str, Any]:
    """Sign-flip test that two inputs of the same case have the same gate weights; a and b are [cases, weights].

    Where they do, each difference d_i = a_i − b_i is as likely as −d_i, all weights of a case flipping together.  Statistic:
    Σ_k (Σ_i d_ik)² / Σ_i d_ik², whose denominators no flip changes.  p counts flips that reach it: all 2^n up to `EXACT` cases, else
    `DRAWS` drawn ones and the one seen, (1 + hits) / (1 + draws), which is valid at any n.  ``gap``: mean difference of the mean weight.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"a paired test needs as many cases and weights on both sides, not {a.shape} and {b.shape}")
    d = a - b
    n = len(d)
    if n < 2:
        return {"n": n, "p": None, "gap": float(d.mean()) if n else None}
    scale = (d**2).sum(0)
    d, gap = d[:, scale > 0], float(d.mean())
    scale = scale[scale > 0]
    if not len(scale):
        return {"n": n, "p": 1.0, "gap": gap}

    def statistic(signs: Floats) -> Floats:
        out: Floats = ((signs @ d) ** 2 / scale).sum(-1)
        return out

    seen = float(statistic(np.ones((1, n)))[0]) * (1 - 1e-9)  # a flip of equal size reaches it whatever rounding did
    if n <= EXACT:
        every = np.asarray(1 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1), np.float64)
        return {"n": n, "p": float((statistic(every) >= seen).mean()), "gap": gap}
    rng, hits, done = np.random.default_rng(seed), 0, 0
    while done < DRAWS:
        count = min(DRAWS - done, max(1, CHUNK // n))
        some = np.asarray(1 - 2.0 * rng.integers(0, 2, (count, n)), np.float64)
        hits += int((statistic(some) >= seen).sum())
        done += count
    return {"n": n, "p": (1 + hits) / (1 + DRAWS), "gap": gap}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many they are (Holm 1979): the chance of any false one is held at the level.  None stays None."""
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: float(values[i] or 0.0))
    out: list[float | None] = [None] * len(values)
    top = 0.0
    for place, i in enumerate(order):
        top = max(top, min(1.0, (len(order) - place) * float(values[i] or 0.0)))
        out[i] = top
    return out


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (more is better in both) no other point beats: none is as good in both and better in one."""
    return [not any(x >= a and y >= b and (x > a or y > b) for x, y in points) for a, b in points]
