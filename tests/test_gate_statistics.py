"""Statistics of gate weights: numbers by hand, and p-values that are right when nothing differs."""

from __future__ import annotations

import numpy as np
import pytest

from errata.analyse import gate_statistics as s
from errata.errors import InputError


def test_variation_is_what_a_constant_leaves_over() -> None:
    w = np.array([[0.2, 0.4], [0.4, 0.4], [0.6, 0.4]])
    assert s.variation(w) == pytest.approx((0.08 / 2) / ((0.04 + 0.16 + 0.36 + 3 * 0.16) / 3))
    assert s.variation(np.full((5, 3), 0.7)) == pytest.approx(0, abs=1e-15) and s.variation(np.zeros((5, 3))) == 0


def test_variation_takes_a_constant_a_patch() -> None:
    """Patches whose own weights are constant have collapsed, however different they are from each other."""
    w = np.repeat([[0.1], [0.9]], 3, axis=0)
    assert s.variation(w, list("aaabbb")) == pytest.approx(0, abs=1e-15) and s.variation(w) > 0.1
    assert np.isnan(s.variation(w, list("abcdef")))


@pytest.mark.parametrize(
    ("means", "count"), [([1, 0, 0, 0], 1), ([0.85, 0.05, 0.05, 0.05], 2), ([0.25] * 4, 4), ([0.9, 0.1, 0, 0], 1), ([0.0] * 4, 4)]
)  # fmt: skip
def test_carriers(means: list[float], count: int) -> None:
    assert s.carriers(np.array(means, float)) == count


def test_effective_number_few_and_unevenness() -> None:
    assert s.participation_ratio(np.array([0.3] * 5)) == pytest.approx(5) and s.participation_ratio(np.array([0.3, 0, 0])) == pytest.approx(
        1
    )
    assert [s.few(r) for r in (1, 2, 4, 12, 16)] == [0, 1, 1, 3, 4]
    variance, ratio = s.unevenness(np.array([0.2, 0.4]))
    assert variance == pytest.approx(0.02) and ratio == pytest.approx(0.02 / 0.09) and s.unevenness(np.array([0.2])) == (0.0, 0.0)


def test_paired_p_by_hand() -> None:
    """Three differences of one sign: 2 of the 8 flips are as large."""
    a = np.array([[0.5], [0.6], [0.7]])
    found = s.paired(a, a - np.array([[0.1], [0.2], [0.3]]))
    assert found == {"n": 3, "p": 0.25, "gap": pytest.approx(0.2)}
    assert s.paired(a, a)["p"] == 1.0 and s.paired(a[:1], a[:1])["p"] is None
    with pytest.raises(InputError, match="as many cases"):
        s.paired(a, a[:2])


@pytest.mark.parametrize("n", [8, 30])
def test_paired_p_is_uniform_under_the_null(n: int) -> None:
    """Correlated, skewed-in-scale weights of which both sides have the same law: P(p ≤ x) ≤ x, and near it (exact and drawn signs)."""
    rng = np.random.default_rng(1)
    found = []
    draws, s.DRAWS = s.DRAWS, 199
    try:
        for i in range(600):
            shared = rng.normal(size=(n, 1)) + rng.normal(size=(n, 4))
            sides = [shared + rng.exponential(size=(n, 1)) * rng.normal(size=(n, 4)) for _ in range(2)]
            found.append(s.paired(*sides, seed=i)["p"])
    finally:
        s.DRAWS = draws
    p = np.array(found)
    for level in (0.05, 0.2, 0.5):
        spread = 3 * np.sqrt(level * (1 - level) / len(p))
        assert level - spread - 1 / min(2**n, 200) <= (p <= level).mean() <= level + spread


def test_paired_sees_a_difference_in_one_of_many_weights() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 12))
    a[:, 3] += 1.5
    assert s.paired(a, b)["p"] < 0.01
    assert s.paired(a, b) == s.paired(a, b)


def test_holm() -> None:
    assert s.holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert s.holm([0.9, 0.8]) == [1.0, 1.0] and s.holm([]) == []


def test_pareto() -> None:
    assert s.pareto_front([(1, 0), (0, 1), (0.5, 0.5), (0.4, 0.5), (0.5, 0.5)]) == [True, True, True, False, True]
