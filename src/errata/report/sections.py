"""Which results are comparable: a section holds methods that were asked the same of one model, in one scenario, by the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.report.folders import RIGHT_AFTER, Folder, Record, Result
from errata.report.tables import methods

Row = Mapping[str, Any]
Read = Callable[[], Iterable[Record]]


def of(records: Sequence[Record]) -> dict[str, Read]:
    """Records in memory as a section wants them: how to read those of each method."""

    def reader(name: str) -> Read:
        return lambda: (r for r in records if r["method"] == name)

    return {name: reader(name) for name in methods(records)}


@dataclass
class Section:
    """What is shown together.  Rows name the method by its label here.

    records       label -> how to read its final records; ``right_after_records``: those right after each edit
    differences   filled in by who may compute them (this floor knows no metric)
    costs         label -> cost.json, or what else is known
    apart         why it is not in one table with earlier sections
    """

    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    retention: Sequence[Row] = ()
    right_after: Sequence[Row] = ()
    forgetting: Sequence[Row] = ()
    differences: Sequence[Row] = ()
    micro: Sequence[Row] = ()
    health: Sequence[Row] = ()
    undone: Sequence[Row] = ()
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    records: Mapping[str, Read] = field(default_factory=dict)
    right_after_records: Mapping[str, Read] = field(default_factory=dict)
    edits: int | None = None
    apart: Sequence[str] = ()
    results: Sequence[Result] = ()


@dataclass
class _Group:
    results: list[Result]
    asked: set[str]
    versions: dict[str, int]


def gather(folders: Iterable[Folder]) -> list[Section]:
    """Results of all folders, those that may stand in one table together; in the order they were given."""
    groups: list[_Group] = []
    seen = set()
    for result in (r for folder in folders for r in folder.results):
        if (name := (result.where.resolve(), result.method)) in seen:  # the same folder given twice
            continue
        seen.add(name)
        for group in groups:
            if not _differences(group, result):
                group.results.append(result)
                group.asked |= result.asked
                group.versions |= result.versions
                break
        else:
            groups.append(_Group([result], set(result.asked), result.versions))
    return [_section(group, groups[:i]) for i, group in enumerate(groups)]


def _differences(group: _Group, result: Result) -> list[str]:
    """Why a result may not stand in one table with the group; [] where it may."""
    first, out = group.results[0], []
    if result.fingerprint != first.fingerprint:
        out.append(f"another model ({result.model} {result.fingerprint}, not {first.model} {first.fingerprint})")
    if result.scenario != first.scenario:
        out.append(f"another scenario ({result.scenario}, not {first.scenario})")
    if not result.asked & group.asked:
        out.append(f"other cases or probes (digest {_names(result.asked)}, not {_names(group.asked)})")
    dtypes = {r.dtype for r in group.results if r.dtype is not None}
    if result.dtype is not None and dtypes and result.dtype not in dtypes:
        out.append(f"another dtype ({result.dtype}, not {', '.join(sorted(dtypes))})")
    ends = {r.document["edits"] for r in (*group.results, result) if "edits" in r.document and not r.document.get("stopped")}
    if len(ends) > 1:  # a run that its guard stopped stays, and is labelled
        out.append(f"another number of edits ({', '.join(map(str, sorted(ends)))})")
    changed = [m for m, version in result.versions.items() if group.versions.get(m, version) != version]
    out += [f"another version of the metric {m} ({result.versions[m]}, not {group.versions[m]})" for m in changed]
    return out


def _names(asked: Iterable[str]) -> str:
    return " ".join(sorted(name.split()[-1] for name in asked)) or "no digest"


def _section(group: _Group, earlier: Sequence[_Group]) -> Section:
    labels, first = _labels(group.results), group.results[0]
    pairs = list(zip(labels, group.results, strict=True))

    def every(part: str) -> list[dict[str, Any]]:
        return [{**row, "method": label} for label, r in pairs for row in r.document.get(part, ())]

    edits = [int(r.document["edits"]) for r in group.results if isinstance(r.document.get("edits"), int)]
    facts = {
        "model": f"{first.model} (fingerprint {first.fingerprint})",
        "benchmark": f"{first.benchmark} (digest {_names(first.asked)})",
        "scenario": first.scenario,
        **_known(first.document.get("known")),
        "runs": ", ".join(dict.fromkeys(str(r.run) for r in group.results)),
    }
    return Section(
        f"{first.scenario}: {first.benchmark.rpartition(', ')[0]}; model {first.model}",
        facts,
        every("summary"),
        every("retention"),
        every("right_after"),
        every("forgetting"),
        (),
        every("micro_averages"),
        every("health"),
        every("undone"),
        {label: r.cost for label, r in pairs if r.cost},
        {label: r.settings for label, r in pairs if r.settings},
        {label: _reader(r, label, r.records.last(r.method)) for label, r in pairs if r.records is not None},
        {label: _reader(r, label, RIGHT_AFTER) for label, r in pairs if r.records and (r.method, RIGHT_AFTER) in r.records.places},
        max(edits, default=None),
        [f"section {i}: {'; '.join(_differences(other, first))}" for i, other in enumerate(earlier, 1)],
        group.results,
    )


def _known(known: Mapping[str, Any] | None) -> dict[str, object]:
    """Whether only facts were edited that the base knows; nothing where that is not written."""
    if not known or (not known["only"] and known["known"] is None):
        return {}
    if known["only"]:
        return {"known": f"only facts that the base knows: {known['cases']} of {known['looked_at']} cases looked at"}
    return {"known": f"all {known['cases']} cases, of which the base knows the fact in {known['known']}"}


def _reader(result: Result, label: str, when: Any) -> Read:
    def read() -> Iterable[Record]:
        assert result.records is not None
        return ({**record, "method": label} for record in result.records.of(result.method, when))

    return read


def _labels(results: Sequence[Result]) -> list[str]:
    """The methods' names; where one occurs twice, with what tells them apart: the seed, the run, or a number.

    A run that was stopped says so.
    """
    ends = [r.document.get("edits") for r in results]
    names = [
        f"{r.method} (stopped at T = {end})" if r.document.get("stopped") and isinstance(end, int) else r.method
        for r, end in zip(results, ends, strict=True)
    ]
    for extra in (lambda r: f"seed {r.seed}", lambda r: r.run.name, lambda r: r.where.name):
        said = [extra(r) for r in results]
        twice = {n for n in names if names.count(n) > 1 and len({s for m, s in zip(names, said, strict=True) if m == n}) == names.count(n)}
        names = [f"{n} ({s})" if n in twice else n for n, s in zip(names, said, strict=True)]
    found: dict[str, int] = {}
    for i, name in enumerate(names):
        found[name] = found.get(name, 0) + 1
        names[i] = f"{name} ({found[name]})" if names.count(name) > 1 or found[name] > 1 else name
    return names
