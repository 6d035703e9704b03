"""Metrics: the arithmetic by hand, the interval against a known distribution, and nothing that is ever NaN."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from errata.errors import InputError, UnknownNameError
from errata.score import intervals
from errata.score.match import contains, exact_match, normalise
from errata.score.metrics import METRICS, PROTOCOLS, case_values, difference, get_metric, summarise


def record(kind: str = "rewrite", case: str = "c0", method: str = "m", **changes: Any) -> dict[str, Any]:
    base = {
        "method": method, "case": case, "kind": kind, "prompt": "p", "target": "t",
        "tf_before": 0.0, "tf_after": 1.0, "tf_agree": 0.5, "gen_before": "x", "gen_after": "t",
        "gen_match_before": False, "gen_match_after": True, "gen_agree": False, "known": True,
    }  # fmt: skip
    return {**base, **changes}


def value(rows: list[dict[str, Any]], metric: str, protocol: str, key: str = "value") -> Any:
    (row,) = (r for r in rows if r["metric"] == metric and r["protocol"] == protocol)
    return row[key]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Eiffel Tower. ", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("São Paulo!", "são paulo"),
        ("Сент-Луис", "сент луис"),
        ("東京", "東京"),
        ("Cote d'Ivoire", "cote divoire"),
        ("Cote d’Ivoire", "cote divoire"),
        ("e\u0301", "é"),
        ("U.S.", "u s"),
        ("The The", "the the"),
        ("3.5", "3 5"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(normalise(text)) == expected


def test_exact_match_and_contains() -> None:
    assert exact_match("the Paris.", "paris")
    assert not exact_match("Paris, France", "Paris")
    assert not exact_match("", "")
    assert not exact_match("...", "!")
    assert contains("It is in Paris, France.", "paris france")
    assert not contains("Parisian", "Paris")
    assert not contains("anything", "")


def test_each_metric_reads_its_kinds_and_fields() -> None:
    rows = summarise(
        [
            record("rewrite", tf_after=1.0, gen_match_after=True),
            record("rephrase", tf_after=0.5, gen_match_after=False, tf_before=0.25),
            record("two_hop", tf_after=0.0, gen_match_after=False),
            record("reverse", tf_after=0.3, gen_match_after=False),
            record("alias", tf_after=0.6, gen_match_after=True),
            record("neighbour", tf_after=0.8, tf_agree=0.9, gen_match_after=True, gen_agree=True, known=True),
            record("unrelated", tf_after=0.2, tf_agree=0.7, gen_match_after=False, gen_agree=True, known=False),
        ]
    )
    forced = {r["metric"]: r["value"] for r in rows if r["protocol"] == "teacher_forced"}
    generated = {r["metric"]: r["value"] for r in rows if r["protocol"] == "generated"}
    assert forced == pytest.approx(
        {
            "reliability": 1.0, "generality": 0.5, "portability": 0.3, "two_hop": 0.0, "reverse": 0.3, "alias": 0.6,
            "locality_agreement": 0.8, "locality_correct": 0.5, "locality_correct_known": 0.8,
        }
    )  # fmt: skip
    assert generated == pytest.approx(
        {
            "reliability": 1.0, "generality": 0.0, "portability": 1 / 3, "two_hop": 0.0, "reverse": 0.0, "alias": 1.0,
            "locality_agreement": 1.0, "locality_correct": 0.5, "locality_correct_known": 1.0,
        }
    )  # fmt: skip
    assert value(rows, "generality", "teacher_forced", "before") == 0.25
    assert value(rows, "locality_agreement", "generated", "before") == 1.0
    asked = {"rewrite", "rephrase", "two_hop", "reverse", "alias", "neighbour", "unrelated"}
    assert set(forced) == {
        name for name, metric in METRICS.items() if "teacher_forced" in metric.after and asked & set(metric.kinds) and not metric.by_kind
    }


def test_a_case_counts_once_however_many_probes_it_has() -> None:
    rows = summarise([record("rephrase", "a", tf_after=0.0) for _ in range(9)] + [record("rephrase", "b", tf_after=1.0)])
    assert value(rows, "generality", "teacher_forced") == 0.5
    assert value(rows, "generality", "teacher_forced", "n_cases") == 2
    assert value(rows, "generality", "teacher_forced", "n_probes") == 10


def test_both_averages_of_a_case_by_hand() -> None:
    """Nine neighbours and an unrelated fact; a second case with one kind alone."""
    mine = [record("neighbour", "a", tf_agree=1.0, gen_agree=False) for _ in range(9)] + [record("unrelated", "a", tf_agree=0.0)]
    mine += [record("neighbour", "b", tf_agree=0.5), record("alias", "a", tf_after=1.0), record("reverse", "a", tf_after=0.0)]
    rows = summarise(mine)
    assert value(rows, "locality_agreement", "teacher_forced") == pytest.approx((0.9 + 0.5) / 2)
    assert value(rows, "locality_agreement_by_kind", "teacher_forced") == pytest.approx((0.5 + 0.5) / 2)
    assert value(rows, "locality_agreement_by_kind", "teacher_forced", "before") == 1.0
    assert value(rows, "locality_agreement_by_kind", "teacher_forced", "n_probes") == 11
    assert not any(r["metric"] == "portability_by_kind" for r in rows)  # one probe a kind: both averages are the same
    other = [{**r, "method": "n", "tf_agree": 0.0} for r in mine]
    assert difference(mine, other, "locality_agreement_by_kind", "teacher_forced")["value"] == pytest.approx(0.5)
    assert case_values(mine, "locality_agreement_by_kind", "teacher_forced") == {"a": 0.5, "b": 0.5}
    assert case_values(mine, "locality_agreement", "teacher_forced", by_kind=True) == {"a": 0.5, "b": 0.5}


def test_interval_is_over_cases_not_probes() -> None:
    """Ten equal probes a case tell no more than one: the interval must not shrink."""
    few = [record("rephrase", f"c{i}", tf_after=float(i % 2)) for i in range(40)]
    (one, ten) = ([value(summarise(rows), "generality", "teacher_forced", k) for k in ("low", "high")] for rows in (few, few * 10))
    assert one == pytest.approx(ten)
    assert one[1] - one[0] > 0.25


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 samples of 60 draws from Beta(2, 3), mean 0.4: coverage of a 95 % interval is 0.95 ± 0.04 (3 s.e.)."""
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(300):
        low, high = intervals.bootstrap(rng.beta(2, 3, size=60), seed=i, resamples=500)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_interval_width_matches_theory() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = intervals.bootstrap(values, seed=0, resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_chunked_resampling_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few indices at a time must still make all resamples."""
    sizes: list[int] = []
    real = np.quantile

    def counted(means: Any, q: Any) -> Any:
        sizes.append(len(means))
        return real(means, q)

    monkeypatch.setattr(np, "quantile", counted)
    for chunk in (7, 64, 1 << 21):
        monkeypatch.setattr(intervals, "CHUNK", chunk)
        intervals.bootstrap(np.linspace(0, 1, 10), seed=0, resamples=101)
    assert sizes == [101, 101, 101]


def test_order_of_records_and_seed() -> None:
    rows = [record("rephrase", f"c{i}", tf_after=(i % 7) / 7) for i in range(50)]
    mixed = rows[:]
    random.Random(0).shuffle(mixed)
    assert summarise(rows) == summarise(mixed)
    one, two = (value(summarise(rows, seed=seed), "generality", "teacher_forced", "low") for seed in (1, 2))
    assert one != two


def test_one_row_a_method_and_none_for_what_was_not_asked() -> None:
    rows = summarise([record("rewrite", method="b"), record("rewrite", method="a"), record("alias", method="a")])
    assert list(dict.fromkeys(r["method"] for r in rows)) == ["b", "a"]
    assert {(r["method"], r["metric"]) for r in rows} == {("b", "reliability"), ("a", "reliability"), ("a", "portability"), ("a", "alias")}
    assert {r["protocol"] for r in rows} == {"teacher_forced", "generated"}, "no likelihood without its fields"
    assert all(r["version"] == METRICS[r["metric"]].version for r in rows)


def test_never_nan() -> None:
    assert summarise([]) == []
    assert summarise([record("neighbour", known=False)], resamples=10)[-1]["metric"] == "locality_correct"
    rows = summarise([record("rewrite", tf_after=None), record("rephrase", tf_before=None)], resamples=10)
    assert not [r for r in rows if r["metric"] == "reliability" and r["protocol"] == "teacher_forced"]
    assert value(rows, "reliability", "generated") == 1.0
    assert value(rows, "generality", "teacher_forced", "before") is None
    assert all(math.isfinite(r[key]) for r in rows for key in ("value", "low", "high"))


def test_difference_is_paired_on_common_cases() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.8, size=80)
    a = [record("rewrite", f"c{i}", "a", tf_after=float(h + 0.1)) for i, h in enumerate(hard)]
    b = [record("rewrite", f"c{i}", "b", tf_after=float(h)) for i, h in enumerate(hard)] + [record("rewrite", "only b", "b", tf_after=0.0)]
    found = difference(a, b, "reliability", "teacher_forced")
    assert found == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1, "n_cases": 80})
    turned = difference(b, a, "reliability", "teacher_forced")
    assert turned["value"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([record()], [record(case="other")], "reliability", "generated"), InputError, "no case has reliability on both sides"),
        (([], [], "reliability", "generated"), InputError, "no case has reliability"),
        (([record()], [record()], "reliabilty", "generated"), UnknownNameError, "no metric named 'reliabilty'; did you mean 'reliability'"),
        (([record()], [record()], "zzz", "generated"), UnknownNameError, "there are reliability, "),
        (
            ([record()], [record()], "reliability", "free"),
            InputError,
            "there are starts, generated, contains, teacher_forced, free_tokens, likelihood and sampled",
        ),
        (
            ([record()], [record()], "reliability", "likelihood"),
            InputError,
            "it is as starts and generated and contains and teacher_forced and free_tokens",
        ),
        (([record()], [record()], "ES", "likelihood"), InputError, "no case has ES on both sides"),
        (([record()], [record()], "S", "likelihood"), InputError, "no case has S on both sides"),
        (([record(), record(method="n")], [record()], "reliability", "generated"), InputError, "one method on each side, not of m, n"),
    ],
)
def test_bad_difference(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        difference(*arguments)


def test_begins_with_stands_beside_equals_and_contains() -> None:
    """Golden values by hand: four cases that say the answer and go on, say it and stop, say it later, and do not say it."""
    said = [(True, False, True), (True, True, True), (False, False, True), (False, False, False)]
    mine = [
        record(case=f"c{i}", starts_after=s, gen_match_after=g, contains_after=c, starts_before=False, contains_before=False)
        for i, (s, g, c) in enumerate(said)
    ]
    mine += [record("neighbour", f"c{i}", answer_agree=i < 3, first_word_agree=True, gen_agree=i < 1, tf_agree=0.5) for i in range(4)]
    mine += [record("negation", f"c{i}", starts_before=True, starts_after=s, contains_after=c) for i, (s, _, c) in enumerate(said)]
    rows = summarise(mine)
    assert [value(rows, "reliability", p) for p in ("starts", "generated", "contains")] == [0.5, 0.25, 0.75]
    assert value(rows, "reliability", "starts", "before") == 0.0
    assert [value(rows, "locality_agreement", p) for p in ("starts", "generated", "teacher_forced")] == [0.75, 0.25, 0.5]
    assert value(rows, "locality_first_word", "starts") == 1.0
    assert value(rows, "negation", "starts") == 0.5 and value(rows, "negation", "contains") == 0.25
    assert value(rows, "negation", "starts", "before") == 0.0 and value(rows, "negation", "contains", "before") is None
    assert next(r["protocol"] for r in rows) == "starts", "the headline comes first"


def test_bad_records_and_settings() -> None:
    broken = record()
    del broken["tf_after"]
    with pytest.raises(InputError, match="a record of case 'c0' has no 'tf_after'"):
        summarise([broken])
    with pytest.raises(InputError, match="resamples must be at least 1, not 0"):
        summarise([record()], resamples=0)


def test_every_metric_says_what_it_means() -> None:
    for name, metric in METRICS.items():
        assert get_metric(name) is metric
        assert metric.after and set(metric.before) <= set(metric.after) <= set(PROTOCOLS)
        assert metric.note
        assert metric.version >= 1
