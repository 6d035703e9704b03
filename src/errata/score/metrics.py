"""From probe records to numbers with intervals.  Pure functions; nothing here has seen a model.

A record is one probe of one method, as plain JSON values:

    method, case, kind, prompt, target     what was asked (kind as in `errata.request`: PROBE_KINDS, ROBUST_KINDS)
    tf_before, tf_after                    share of the target's tokens that are the argmax, the target being fed (teacher forcing)
    tf_agree                               share of those positions with the same argmax before and after
    gen_before, gen_after                  the model's own greedy text up to its natural stop
    starts_before, starts_after            that text begins with the target (`errata.score.match.starts`): the headline
    gen_match_before, gen_match_after      it equals the target after `normalise`
    contains_before, contains_after        the target stands somewhere in it
    answer_agree                           both texts are alike in as many tokens as the target has (without one: as the text before has)
    first_word_agree                       both have the same first word
    gen_agree                              both texts are equal
    free_before, free_after, free_agree    share of the target's tokens that stand at the same place of that text; alike in both texts
    known                                  the model answered this probe truly before the edit: its text began with the truth
    nll_before, nll_after                  mean negative log-likelihood of the answer's tokens, in nats
    also                                   other accepted answers, where there are any: free text that equals one is a match
    rival, nll_rival_before, …_after       the answer it is weighed against and its NLL; None where there is none
    ge_…, rs_…                             of records of kind "generation" only, see `errata.score.generation`
    last_target, is_last, …_last_…         where the stream contradicts itself, see `errata.score.last_written`
    judged                                 {judge@version: [before, after]}: what a judge says of the two texts (`errata.score.judges`)

A base model says the answer and goes on, so its text is read as people read it: it begins with the answer (`starts`).  That it ends
there too (`generated`) and that the answer stands anywhere in it (`contains`) are protocols beside it.
Teacher forcing shows the model the beginning of the answer and its length; free text does not; a likelihood compares two given
answers and does not ask whether the model would say either; free tokens (EasyEdit's "vanilla generation", by which GRACE was
published; only where asked for) give half an answer half a point.  They are therefore separate columns (`PROTOCOLS`), never averaged;
so is what each judge says ("judged NAME@VERSION").
Records written before a field existed are summarised without the metrics that need it.

The likelihood metrics are those of ROME (Meng et al. 2022, arXiv 2202.05262) and MEMIT.  With NLL(a) = −1/|a| Σ log p(a_t | prompt, a_<t):

    ES, PS, NS     share of probes (rewrite, rephrase, neighbour) with NLL(answer) < NLL(rival)
    EM, PM, NM     mean of exp(−NLL(answer)) − exp(−NLL(rival)): a difference of geometric-mean token probabilities, in [−1, 1]
    S              3 / (1/ES + 1/PS + 1/NS)

Answer and rival are the new and the old object after a rewrite or a rephrase, so more is better for the edit.  After a
neighbour's prompt they are the neighbour's own true object and the edit's new one, so more is better for what should stay.

A case counts once.  Its portability and locality are the mean over all its probes; ``…_by_kind``, where some case has unlike numbers of
probes of several kinds, is the mean over kinds of each kind's mean, as EasyEdit's script and the tables made with it average a record.

Robustness metrics (`ROBUST`; probes by `errata.score.robustness`) have their likelihood wins under their own name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from errata.errors import InputError, UnknownNameError, near
from errata.score import intervals, sentiment
from errata.score.intervals import Floats, Limits
from errata.score.metric_table import AFTER, METRICS, PROTOCOLS, Metric

Record = Mapping[str, Any]
JUDGED: Final = "judged "  # a judge's protocol is this and its name


def get_metric(name: str) -> Metric:
    """The metric of that name; `UnknownNameError` otherwise."""
    if name not in METRICS:
        raise UnknownNameError(f"no metric named {name!r}; {near(name, METRICS, 'there are')}")
    return METRICS[name]


def _under(which: Metric, protocol: str) -> Metric:
    """The metric with the fields of a judge's protocol; itself under any other."""
    if not protocol.startswith(JUDGED) or which.after is not AFTER:
        return which
    return dataclasses.replace(which, after={protocol: f"{protocol} 1"}, before={protocol: f"{protocol} 0"})


def _judged(record: Record, name: str) -> Any:
    judge, _, at = name.removeprefix(JUDGED).rpartition(" ")
    found = record.get("judged", {}).get(judge)
    return None if found is None else found[int(at)]


def _check_protocol(which: Metric, protocol: str) -> None:
    if protocol not in PROTOCOLS and not protocol.startswith(JUDGED):
        raise InputError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS[:-1])} and {PROTOCOLS[-1]}")
    if protocol not in which.after:
        raise InputError(f"{which.name} is not measured as {protocol!r}; it is as {' and '.join(which.after)}")


def _field(record: Record, name: str) -> Any:
    if name.startswith(JUDGED):
        return _judged(record, name)
    if name in _DERIVED:
        return _DERIVED[name](record)
    if name in _OPTIONAL:
        return record.get(name)
    if name not in record:
        raise InputError(f"a record of case {record.get('case', '?')!r} has no {name!r}; it was not written by errata's scorer")
    return record[name]


def _pair(record: Record, when: str) -> tuple[float, float] | None:
    """(NLL of the answer, of its rival); None without a rival and in records older than these fields."""
    own, rival = record.get(f"nll_{when}"), record.get(f"nll_rival_{when}")
    return None if own is None or rival is None else (float(own), float(rival))


def _wins(record: Record, when: str) -> bool | None:
    return None if (pair := _pair(record, when)) is None else pair[0] < pair[1]


def _margin(record: Record, when: str) -> float | None:
    return None if (pair := _pair(record, when)) is None else math.exp(-pair[0]) - math.exp(-pair[1])


def _not(record: Record, field: str) -> bool | None:
    return None if (value := record.get(field)) is None else not value


_DERIVED: Final[dict[str, Callable[[Record], Any]]] = {
    "nll_wins_before": lambda r: _wins(r, "before"),
    "nll_wins_after": lambda r: _wins(r, "after"),
    "nll_margin_before": lambda r: _margin(r, "before"),
    "nll_margin_after": lambda r: _margin(r, "after"),
    "starts_not_before": lambda r: _not(r, "starts_before"),
    "starts_not_after": lambda r: _not(r, "starts_after"),
    "contains_not_before": lambda r: _not(r, "contains_before"),
    "contains_not_after": lambda r: _not(r, "contains_after"),
    "tf_not_before": lambda r: 1 - float(_field(r, "tf_before")),
    "tf_not_after": lambda r: 1 - float(_field(r, "tf_after")),
    "gen_not_before": lambda r: not _field(r, "gen_match_before"),
    "gen_not_after": lambda r: not _field(r, "gen_match_after"),
}


_OPTIONAL: Final = (
    *("free_before", "free_after", "free_agree", "answer_agree", "first_word_agree"),
    *("starts_before", "starts_after", "contains_before", "contains_after"),
    *("is_last", *(f"{name}_last_{when}" for name in ("starts", "gen_match", "contains") for when in ("before", "after"))),
)


def _chosen(records: Iterable[Record], which: Metric, protocol: str) -> list[Record]:
    """The records a metric counts.  A probe whose field is None (it could not be asked) counts nowhere."""
    if which.kinds == (sentiment.KIND,):
        records = sentiment.scores(records)
    found = [
        r
        for r in records
        if _field(r, "kind") in which.kinds
        and _field(r, which.after[protocol]) is not None
        and (not which.known or _field(r, "known"))
        and not (which.true and r.get("target", "") is None)
    ]
    whole = not which.harmonic or {r["kind"] for r in found} == set(which.kinds)
    return found if whole else []


def _case_means(records: Iterable[Record], field: str) -> dict[str, float]:
    """case -> mean over its probes, in the order of the case names: records may come in any order."""
    found: dict[str, list[float]] = {}
    for record in records:
        if (value := _field(record, field)) is not None:
            found.setdefault(str(_field(record, "case")), []).append(float(value))
    return {case: sum(values) / len(values) for case, values in sorted(found.items())}


def _means_by_kind(records: Sequence[Record], which: Metric, field: str) -> list[dict[str, float]]:
    """`_case_means` of each of the metric's kinds of probe alone."""
    return [_case_means((r for r in records if r["kind"] == kind), field) for kind in which.kinds]


def case_values(records: Iterable[Record], metric: str, protocol: str, by_kind: bool = False) -> dict[str, float]:
    """case -> mean over its probes, as `summarise` takes it; ``by_kind``: the mean over its kinds of probe of the mean over each kind's,
    as the papers' scripts average portability and locality.  Not for S, which no case has of its own."""
    which = get_metric(metric)
    _check_protocol(which, protocol)
    chosen, field = _chosen(records, which, protocol), which.after[protocol]
    return _kind_means(chosen, which, field) if by_kind or which.by_kind else _case_means(chosen, field)


def _kind_means(records: Sequence[Record], which: Metric, field: str) -> dict[str, float]:
    """case -> mean over its kinds of probe of each kind's mean."""
    columns = _means_by_kind(records, which, field)
    cases = sorted({case for means in columns for case in means})
    return {case: float(np.mean([means[case] for means in columns if case in means])) for case in cases}


def _uneven(records: Iterable[Record]) -> bool:
    """Whether some case has unlike numbers of probes of its kinds, without which both averages are one."""
    found: dict[Any, dict[str, int]] = {}
    for record in records:
        own = found.setdefault(record["case"], {})
        own[record["kind"]] = own.get(record["kind"], 0) + 1
    return any(len(set(own.values())) > 1 for own in found.values())


def _columns(records: Sequence[Record], which: Metric, field: str) -> dict[str, list[float]]:
    """case -> its means: one number, or for a harmonic metric one a kind (NaN where the case has no such probe)."""
    if not which.harmonic:
        means = _kind_means(records, which, field) if which.by_kind else _case_means(records, field)
        return {case: [mean] for case, mean in means.items()}
    parts = _means_by_kind(records, which, field)
    return {case: [means.get(case, math.nan) for means in parts] for case in sorted({c for means in parts for c in means})}


def _harmonic(drawn: Floats) -> Floats:
    """[…, cases, kinds] -> […]: K / Σ_k 1/m_k with m_k the mean over the cases that have kind k.

    0 where a mean is 0; NaN where no case has one of the kinds.
    """
    there = ~np.isnan(drawn)
    count = there.sum(axis=-2)
    means = np.where(there, drawn, 0.0).sum(axis=-2) / np.maximum(count, 1)
    inverse = np.divide(1.0, means, out=np.full_like(means, np.inf), where=means > 0)
    out: Floats = np.where((count > 0).all(axis=-1), drawn.shape[-1] / inverse.sum(axis=-1), np.nan)
    return out


def summarise(records: Iterable[Record], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """One row for each method, metric and protocol that has a probe.

    value = mean over cases of the mean over the case's probes (for S: the harmonic mean of three such); [low, high] = 95 %
    interval of it over cases, because the probes of one case rise and fall together: see `errata.score.intervals`.  ``before`` is the same
    of the unedited model, None where that was not measured.
    """
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(str(_field(record, "method")), []).append(record)
    rows = []
    for method, mine in by_method.items():
        judges = [JUDGED + judge for judge in sorted({judge for r in mine for judge in r.get("judged", ())})]
        for metric in METRICS.values():
            for protocol in (*metric.after, *(judges if metric.after is AFTER else ())):
                which = _under(metric, protocol)
                chosen = _chosen(mine, which, protocol)
                if chosen and (not which.by_kind or _uneven(chosen)):
                    rows.append({"method": method, **_row(chosen, which, protocol, seed, resamples)})
    return rows


def _row(chosen: Sequence[Record], which: Metric, protocol: str, seed: int, resamples: int) -> dict[str, Any]:
    statistic = _harmonic if which.harmonic else intervals.mean
    means = _array(_columns(chosen, which, which.after[protocol]).values(), which)
    low, high = _limits(means, which, seed, resamples)
    before: float | None = 1.0  # a model agrees with itself
    if which.before:
        unedited = _columns(chosen, which, which.before[protocol])
        found = float(statistic(_array(unedited.values(), which))) if unedited else math.nan
        before = None if math.isnan(found) else found
    return {
        "metric": which.name,
        "version": which.version,
        "protocol": protocol,
        "value": float(statistic(means)),
        "low": low,
        "high": high,
        "n_cases": len(means),
        "n_probes": len(chosen),
        "before": before,
    }


def _limits(means: Floats, which: Metric, seed: int, resamples: int) -> Limits:
    """The interval that suits the metric (see `errata.score.intervals`)."""
    if not which.share:
        return intervals.bootstrap(means, seed, resamples)
    if not which.harmonic:
        return intervals.share(means, seed, resamples)
    found = intervals.bootstrap(means, seed, resamples, _harmonic)
    return intervals.at_the_edge(found, *means.T, statistic=lambda limits: float(_harmonic(limits[None])))


def _array(rows: Iterable[Sequence[float]], which: Metric) -> Floats:
    """[cases], or [cases, kinds] of a harmonic metric."""
    out = np.array(list(rows), dtype=np.float64)
    return out if which.harmonic else out[:, 0]


def difference(
    records_a: Iterable[Record], records_b: Iterable[Record], metric: str, protocol: str, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """value = mean over common cases of (case mean of a − case mean of b), with its 95 % interval; for S the difference of the two S.

    Paired by case, so what makes a case hard for both methods cancels (`errata.score.intervals`: Newcombe's interval where every case is
    right or wrong on both sides, else a bootstrap).  An interval that leaves out 0 says that the two differ.
    """
    which = _under(get_metric(metric), protocol)
    _check_protocol(which, protocol)
    sides = []
    for records in (records_a, records_b):
        rows = list(records)
        methods = {str(_field(r, "method")) for r in rows}
        if len(methods) > 1:
            raise InputError(f"a difference needs the records of one method on each side, not of {', '.join(sorted(methods))}")
        sides.append(_columns(_chosen(rows, which, protocol), which, which.after[protocol]))
    a, b = sides
    common = [case for case in a if case in b]
    nothing = f"no case has {metric} on both sides; score both methods on the same benchmark, split and seed"
    if not common:
        raise InputError(nothing)
    left, right = (_array((side[case] for case in common), which) for side in sides)
    if not which.harmonic:
        value, (low, high) = float((left - right).mean()), intervals.paired(left, right, seed, resamples, which.share)
    else:
        both, k = np.concatenate([left, right], axis=1), len(which.kinds)

        def gap(drawn: Floats) -> Floats:
            return _harmonic(drawn[..., :k]) - _harmonic(drawn[..., k:])

        value = float(gap(both))
        if math.isnan(value):  # the common cases lack a kind
            raise InputError(nothing)
        low, high = intervals.bootstrap(both, seed, resamples, gap)
    return {"value": value, "low": low, "high": high, "n_cases": len(common)}
