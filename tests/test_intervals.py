"""Intervals of shares and of their paired differences: published values, laws, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.score import intervals
from errata.score.metrics import difference, summarise

BITS = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda bits: np.array(bits, dtype=float))


def table(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [1.0] * both + [1.0] * first + [0.0] * second + [0.0] * neither
    b = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    return np.array(a), np.array(b)


def test_wilson_by_hand() -> None:
    """z²/(n + z²) is what 0 of n reaches, and Newcombe 1998 (Statistics in Medicine 17, 857) prints 81 of 263 as 0.2553 to 0.3662."""
    z = 1.959963984540054
    assert intervals.wilson(24, 24) == pytest.approx((24 / (24 + z * z), 1.0))
    assert intervals.wilson(0, 24) == pytest.approx((0.0, z * z / (24 + z * z)))
    assert intervals.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert intervals.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_all_right_is_not_certain() -> None:
    rewrites = [
        {"method": "m", "case": f"c{i}", "kind": kind, "known": True, "tf_before": 0.0, "tf_after": 1.0, "tf_agree": 1.0}
        | {"gen_match_before": False, "gen_match_after": True, "gen_agree": True, "starts_before": False, "starts_after": True}
        for i in range(24)
        for kind in ("rewrite", "rephrase", "rephrase")
    ]
    for row in summarise(rewrites):
        assert (row["value"], row["high"]) == (1.0, 1.0) and row["low"] == pytest.approx(0.862, abs=5e-4)
    same = difference(rewrites, [{**r, "method": "n"} for r in rewrites], "reliability", "starts")
    assert same["value"] == 0 and same["low"] == pytest.approx(-0.138, abs=5e-4) and same["high"] == pytest.approx(0.138, abs=5e-4)


def test_S_of_cases_that_are_all_right() -> None:
    mine = [
        {"method": "m", "case": f"c{i}", "kind": kind, "known": True, "tf_before": 0.0, "tf_after": 1.0, "tf_agree": 1.0}
        | {"gen_match_before": 0, "gen_match_after": 1, "gen_agree": 1, "target": "t"}
        | {"nll_before": 2.0, "nll_rival_before": 1.0, "nll_after": 1.0, "nll_rival_after": 2.0}
        for i in range(24)
        for kind in ("rewrite", "rephrase", "neighbour")
    ]
    (row,) = (r for r in summarise(mine) if r["metric"] == "S")
    assert (row["value"], row["high"]) == (1.0, 1.0) and row["low"] == pytest.approx(0.862, abs=5e-4)
    (margin,) = (r for r in summarise(mine) if r["metric"] == "EM")
    assert margin["low"] == margin["high"] == pytest.approx(margin["value"]), "margins are no shares"


@pytest.mark.parametrize(("truth", "n"), [(0.95, 24), (0.95, 100), (0.5, 24), (0.99, 50)])
def test_wilson_holds_the_truth_where_the_bootstrap_does_not(truth: float, n: int) -> None:
    drawn = np.random.default_rng(7).binomial(n, truth, size=2000)
    found = [intervals.wilson(int(k), n) for k in drawn]
    assert np.mean([low <= truth <= high for low, high in found]) >= 0.9


def test_a_bootstrap_at_the_edge_holds_the_truth() -> None:
    """Cases of four probes each, of which one in twenty-five is hard: most samples of 24 are at the edge, or all but a case."""
    rng, hits, plain = np.random.default_rng(3), 0, 0
    for i in range(400):
        hard = rng.random(24) < 0.04
        values = np.where(hard, rng.binomial(4, 0.5, 24) / 4, 1.0)
        low, high = intervals.share(values, i, 400)
        hits += low <= 0.98 <= high
        low, high = intervals.bootstrap(values, i, 400)
        plain += low <= 0.98 <= high
    assert hits / 400 >= 0.95 > 0.9 > plain / 400


def test_fractions_off_the_edge_keep_the_bootstrap() -> None:
    values = np.random.default_rng(0).beta(2, 3, size=60)
    assert intervals.share(values, 0) == intervals.bootstrap(values, 0)


def test_newcombe_by_hand() -> None:
    """a 4, b 2, c 1, d 3: p 0.6, q 0.5, Wilson (0.3127, 0.8318) and (0.2366, 0.7634), ad − bc − n/2 = 5 over √(6·4·5·5) is φ 0.2041."""
    low, high = intervals.newcombe(*table(4, 2, 1, 3))
    x, y = 0.6 - 0.31267, 0.76340 - 0.5
    assert low == pytest.approx(0.1 - np.sqrt(x * x - 2 * 0.20412 * x * y + y * y), abs=1e-4)
    x, y = 0.83182 - 0.6, 0.5 - 0.23660
    assert high == pytest.approx(0.1 + np.sqrt(x * x - 2 * 0.20412 * x * y + y * y), abs=1e-4)


@given(BITS, st.randoms(use_true_random=False))
def test_newcombe_is_a_difference(a: np.ndarray, random: object) -> None:
    b = np.array([float(random.random() < 0.5) for _ in a])  # type: ignore[attr-defined]
    low, high = intervals.newcombe(a, b)
    assert -1 - 1e-12 <= low <= a.mean() - b.mean() <= high <= 1 + 1e-12
    assert (-high, -low) == pytest.approx(intervals.newcombe(b, a)), "the other way round, the other sign"
    assert low < high


@pytest.mark.parametrize(("p", "gap", "n"), [(0.95, 0.0, 24), (0.9, 0.1, 50), (0.5, 0.2, 100)])
def test_newcombe_holds_the_truth(p: float, gap: float, n: int) -> None:
    """Both sides agree on most cases, as two methods on one benchmark do."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(600):
        ease = rng.random(n)
        other = np.where(rng.random(n) < 0.5, ease, rng.random(n))
        low, high = intervals.newcombe((ease < p).astype(float), (other < p - gap).astype(float))
        hits += low <= gap <= high
    assert hits / 600 >= 0.93


def test_bad_resamples_raise() -> None:
    with pytest.raises(Exception, match="resamples must be at least 1"):
        intervals.bootstrap(np.ones(3), 0, 0)
