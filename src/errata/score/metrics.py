"""From probe records to numbers with intervals.  Pure functions; nothing here has seen a model.

A record is one probe of one method, as plain JSON values:

    method, case, kind, prompt, target     what was asked (kind as in `errata.request.PROBE_KINDS`)
    tf_before, tf_after                    share of the target's tokens that are the argmax, the target being fed (teacher forcing)
    tf_agree                               share of those positions with the same argmax before and after
    gen_before, gen_after                  the model's own greedy text up to its natural stop
    gen_match_before, gen_match_after      that text equals the target after `normalise`
    gen_agree                              both texts are equal
    known                                  the model answered this probe truly before the edit

Teacher forcing shows the model the beginning of the answer and its length; free text does not.  The two are therefore two
columns (`PROTOCOLS`), never averaged.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from errata.errors import InputError, UnknownName

Record = Mapping[str, Any]
Floats = NDArray[np.float64]

PROTOCOLS: Final = ("teacher_forced", "generated")
LEVEL = 0.95
CHUNK = 1 << 21  # resampled indices held at once: 16 MB


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means.  ``version`` rises when a change makes it incomparable with numbers published before.

    kinds     probe kinds it averages over
    after     protocol -> record field
    before    protocol -> record field of the unedited model; empty where that is 1 by definition
    known     restricted to probes the unedited model answered truly
    """

    name: str
    version: int
    kinds: tuple[str, ...]
    after: Mapping[str, str]
    before: Mapping[str, str]
    known: bool = False
    note: str = ""


_AFTER: Final = {"teacher_forced": "tf_after", "generated": "gen_match_after"}
_BEFORE: Final = {"teacher_forced": "tf_before", "generated": "gen_match_before"}
_AGREE: Final = {"teacher_forced": "tf_agree", "generated": "gen_agree"}
_LOCAL: Final = ("neighbour", "unrelated")

METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("reliability", 1, ("rewrite",), _AFTER, _BEFORE, note="the edited prompt gives the new answer"),
        Metric("generality", 1, ("rephrase",), _AFTER, _BEFORE, note="other ways to ask give the new answer"),
        Metric("portability", 1, ("two_hop", "reverse", "alias"), _AFTER, _BEFORE, note="what follows from the new answer holds too"),
        Metric("two_hop", 1, ("two_hop",), _AFTER, _BEFORE, note="a question through the new answer"),
        Metric("reverse", 1, ("reverse",), _AFTER, _BEFORE, note="the fact said backwards"),
        Metric("alias", 1, ("alias",), _AFTER, _BEFORE, note="the subject under another name"),
        Metric("locality_agreement", 1, _LOCAL, _AGREE, {}, note="other facts are answered as before, right or wrong"),
        Metric("locality_correct", 1, _LOCAL, _AFTER, _BEFORE, note="other facts are answered truly"),
        Metric("locality_correct_known", 1, _LOCAL, _AFTER, _BEFORE, known=True, note="other facts known before are still answered truly"),
    )
}


_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """Lower case, NFKC, without punctuation and articles, single spaces.  Letters and digits of any script stay.

    A text of articles only ("The The", "A") stays as it is: it would otherwise equal every empty answer.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Apostrophes join ("cote divoire"), everything else that is no letter, mark or number separates.
    folded = re.sub(r"['’`]", "", folded)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words)


def exact_match(a: str, b: str) -> bool:
    """Whether two answers are the same after `normalise`; an empty answer matches nothing."""
    left, right = normalise(a), normalise(b)
    return bool(left) and left == right


def contains(text: str, answer: str) -> bool:
    """Whether the words of ``answer`` stand next to each other in ``text``, after `normalise`."""
    inner = normalise(answer)
    return bool(inner) and f" {inner} " in f" {normalise(text)} "


def get_metric(name: str) -> Metric:
    """The metric of that name; `UnknownName` otherwise."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        raise UnknownName(f"no metric named {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METRICS)}"))
    return METRICS[name]


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol {protocol!r}; there are {' and '.join(PROTOCOLS)}")


def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise InputError(f"a record of case {record.get('case', '?')!r} has no {name!r}; it was not written by errata's scorer")
    return record[name]


def _chosen(records: Iterable[Record], which: Metric, protocol: str) -> list[Record]:
    """The records a metric counts.  A probe whose field is None (it could not be asked) counts nowhere."""
    return [
        r
        for r in records
        if _field(r, "kind") in which.kinds and _field(r, which.after[protocol]) is not None and (not which.known or _field(r, "known"))
    ]


def _case_means(records: Iterable[Record], field: str) -> dict[str, float]:
    """case -> mean over its probes, in the order of the case names: records may come in any order."""
    found: dict[str, list[float]] = {}
    for record in records:
        if (value := _field(record, field)) is not None:
            found.setdefault(str(_field(record, "case")), []).append(float(value))
    return {case: sum(values) / len(values) for case, values in sorted(found.items())}


def _interval(values: Floats, seed: int, resamples: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean over cases.  values [cases].

    The generator starts anew for each call, so all metrics and methods with as many cases see the same resamples.
    """
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    rng = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, CHUNK // n)
    means = [values[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1) for start in range(0, resamples, rows)]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summarise(records: Iterable[Record], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """One row for each method, metric and protocol that has a probe.

    value = mean over cases of the mean over the case's probes; [low, high] = 95 % interval of it, bootstrapped over cases,
    because the probes of one case rise and fall together.  ``before`` is the same mean of the unedited model, None where
    that was not measured.
    """
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(str(_field(record, "method")), []).append(record)
    rows = []
    for method, mine in by_method.items():
        for which in METRICS.values():
            for protocol in PROTOCOLS:
                if chosen := _chosen(mine, which, protocol):
                    rows.append({"method": method, **_row(chosen, which, protocol, seed, resamples)})
    return rows


def _row(chosen: Sequence[Record], which: Metric, protocol: str, seed: int, resamples: int) -> dict[str, Any]:
    means = np.array(list(_case_means(chosen, which.after[protocol]).values()))
    low, high = _interval(means, seed, resamples)
    before: float | None = 1.0  # a model agrees with itself
    if which.before:
        unedited = list(_case_means(chosen, which.before[protocol]).values())
        before = float(np.mean(unedited)) if unedited else None
    return {
        "metric": which.name,
        "version": which.version,
        "protocol": protocol,
        "value": float(means.mean()),
        "low": low,
        "high": high,
        "n_cases": len(means),
        "n_probes": len(chosen),
        "before": before,
    }


def difference(
    records_a: Iterable[Record], records_b: Iterable[Record], metric: str, protocol: str, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """value = mean over common cases of (case mean of a − case mean of b), with its 95 % interval.

    Paired: each resample draws cases, not answers, so what makes a case hard for both methods cancels.  An interval
    that leaves out 0 says that the two differ.
    """
    which = get_metric(metric)
    _check_protocol(protocol)
    sides = []
    for records in (records_a, records_b):
        rows = list(records)
        methods = {str(_field(r, "method")) for r in rows}
        if len(methods) > 1:
            raise InputError(f"a difference needs the records of one method on each side, not of {', '.join(sorted(methods))}")
        sides.append(_case_means(_chosen(rows, which, protocol), which.after[protocol]))
    a, b = sides
    common = [case for case in a if case in b]
    if not common:
        raise InputError(f"no case has {metric} on both sides; score both methods on the same benchmark, split and seed")
    gaps = np.array([a[case] - b[case] for case in common])
    low, high = _interval(gaps, seed, resamples)
    return {"value": float(gaps.mean()), "low": low, "high": high, "n_cases": len(common)}
