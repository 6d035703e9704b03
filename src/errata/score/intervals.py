"""95 % intervals over cases: Wilson's and Newcombe's where every case is right or wrong, elsewhere a bootstrap, with its blind spot closed.

    shares      case values in [0, 1].  All of them 0 or 1 (a proportion): Wilson's score interval.  Else the percentile bootstrap; where
                it reaches 0 or 1, too few cases lie off that edge for resamples to tell how many others do, and the interval is widened to
                Wilson's limits of ⌊Σx⌋ and ⌈Σx⌉ of n.  These hold for any values in [0, 1] with that sum, since their variance is at most
                p (1 − p): 24 cases that were all right are not "100 [100, 100]" but 100 [86.2, 100]
    paired      differences of two such on the same cases.  All 0 or 1 on both sides: Newcombe's hybrid score interval for paired
                proportions (Statistics in Medicine 17, 1998, 2635–2650, method 10); else the bootstrap of the differences
    bootstrap   anything else: margins, entropies, differences of fractions

With p, q the two proportions, l, u their Wilson limits and φ the correlation of the two sides, Newcombe's interval of p − q is

    low  = p − q − √((p − l_p)² − 2 φ (p − l_p)(u_q − q) + (u_q − q)²)
    high = p − q + √((u_p − p)² − 2 φ (u_p − p)(q − l_q) + (q − l_q)²)

where φ > 0 is taken with its continuity correction (max(ad − bc − n/2, 0) in place of ad − bc), and φ = 0 where a side has one value only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from errata.errors import InputError

Floats = NDArray[np.float64]
Limits = tuple[float, float]

_LEVEL = 0.95
CHUNK = 1 << 21  # resampled indices held at once: 16 MB


def mean(drawn: Floats) -> Floats:
    """[…, cases] -> […]"""
    out: Floats = drawn.mean(axis=-1)
    return out


def bootstrap(values: Floats, seed: int, resamples: int = 2000, statistic: Callable[[Floats], Floats] = mean) -> Limits:
    """Percentile bootstrap over cases.  values [cases] or [cases, …], ``statistic`` [resamples, cases, …] -> [resamples].

    Several columns of a case are drawn together.  The generator starts anew for each call, so all metrics and methods with
    as many cases see the same resamples.
    """
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, CHUNK // values.size)
    drawn = (values[rng.integers(0, n, size=(min(rows, resamples - start), n))] for start in range(0, resamples, rows))
    found = np.concatenate([statistic(d) for d in drawn])
    found = found[~np.isnan(found)]  # a resample without any probe of a kind says nothing
    if not len(found):
        found = statistic(values[None])
    low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=4096)
def wilson(right: int, of: int) -> Limits:
    """Wilson's score interval of ``right`` out of ``of``."""
    from scipy.stats import binomtest

    found = binomtest(right, of).proportion_ci(_LEVEL, "wilson")
    # rounding may leave the limit that is 0 or 1 a last bit inside
    return (0.0 if right == 0 else float(found.low)), (1.0 if right == of else float(found.high))


def binary(values: Floats) -> bool:
    """Whether every case is right or wrong."""
    return bool(((values == 0) | (values == 1)).all())


def share(values: Floats, seed: int, resamples: int = 2000) -> Limits:
    """Of the mean of case values [cases] in [0, 1]."""
    found = bootstrap(values, seed, resamples)
    return wilson(round(float(values.sum())), len(values)) if binary(values) else at_the_edge(found, values)


def at_the_edge(found: Limits, *columns: Floats, statistic: Callable[[Floats], float] = lambda limits: float(limits[0])) -> Limits:
    """A bootstrap's limits, widened where they reach 0 or 1 to what ``statistic`` makes of each column's Wilson limits (NaN: not asked)."""
    if found[0] > 0 and found[1] < 1:
        return found
    there = [column[~np.isnan(column)] for column in columns]
    sums = [math.fsum(column) for column in there]
    lows = [wilson(math.floor(total + 1e-9), len(column))[0] for total, column in zip(sums, there, strict=True)]
    highs = [wilson(math.ceil(total - 1e-9), len(column))[1] for total, column in zip(sums, there, strict=True)]
    return min(found[0], statistic(np.array(lows))), max(found[1], statistic(np.array(highs)))


def paired(a: Floats, b: Floats, seed: int, resamples: int = 2000, share: bool = True) -> Limits:
    """Of the mean of a − b over the same cases; ``share``: both are in [0, 1]."""
    found = bootstrap(a - b, seed, resamples)
    return newcombe(a, b) if share and binary(a) and binary(b) else found


def newcombe(a: Floats, b: Floats) -> Limits:
    """Newcombe's hybrid score interval of the difference of two paired proportions, cases [n] of 0 and 1."""
    n, p, q = len(a), float(a.mean()), float(b.mean())
    (low_p, high_p), (low_q, high_q) = wilson(round(float(a.sum())), n), wilson(round(float(b.sum())), n)
    phi = _correlation(a, b)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - reach(p - low_p, high_q - q), p - q + reach(high_p - p, q - low_q)


def _correlation(a: Floats, b: Floats) -> float:
    """Newcombe's φ of the table of the two."""
    both, first, second = float((a * b).sum()), float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    neither = len(a) - both - first - second
    spread = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    if not spread:
        return 0.0
    lean = both * neither - first * second
    return (max(lean - len(a) / 2, 0.0) if lean > 0 else lean) / spread
