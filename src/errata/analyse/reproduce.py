"""A published table measured again on any model (`errata reproduce`): which methods, cases and protocol, and how far the figures lie apart.

A figure counts as *within* where the published one lies in the measured interval widened by the spread between the paper's own prints
of one row (`published.SPREAD`); else it is above or below.  On another model or benchmark that says how the settings differ, not who erred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from errata import published, registry
from errata.analyse import gates, protocols
from errata.analyse.protocols import Measured, Measurement
from errata.benchmarks.files import open_benchmark
from errata.config import to_dict
from errata.core.model import LM
from errata.errors import ConfigError, InputError
from errata.methods.base import PUBLISHED, preset
from errata.request import LOCAL_KINDS, Case

Settings = Callable[[str], dict[str, Any]]  # of the command line, for a method

_BASIC: dict[str, tuple[str, dict[str, Any]]] = {"reft": ("reft", {}), "baft": ("baft", {})}
_ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "reft": ("reft", {}),
    "ss-w": ("baft", {"gate": "subspace", "balance": False, "locality": False}),
    "ba-w": ("baft", {"locality": False}),
    "ss-w & lr": ("baft", {"gate": "subspace", "balance": False}),
    "baft": ("baft", {}),
}
WITHOUT = {"reft": ("reft", {}), "baft": ("baft", {"locality": False})}  # Table 1's data bring no unrelated texts
ROBUST: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("rome", "memit")},
    **{f"rep on {name}": ("rep", {"wraps": name}) for name in ("rome", "memit")},
}
VARIANTS: dict[str, Mapping[str, tuple[str, dict[str, Any]]]] = {
    "baft-table1": WITHOUT,
    "baft-table2": _BASIC,
    "baft-table4": _ABLATION,
    "baft-batched": _BASIC,
    "baft-table8": _BASIC,
    "baft-fig1": {"reft": ("reft", {})},
    "baft-fig2": {"baft": ("baft", {})},
    "rep-main": ROBUST,
}
_FIXED = ("baft-table4", "baft-fig2", "rep-main")  # whose methods are the point
_FALLBACK = "almanac"
_SILENT = ("gate", "rescale", "stop_on", "loss", "weight_decay", "end")  # settings of BaFT and ReFT that the paper does not state
WINDOW = 10  # edits, of Fig. 2


@dataclass(frozen=True)
class ReproduceOptions:
    """What the command line says: methods (None: the table's), settings, files {benchmark: path}, cases, split and order of the almanac."""

    name: str
    methods: Sequence[str] | None
    settings: Settings
    data: Mapping[str, str]
    n: int | None
    most: int
    split: str | None
    seed: int


def check(asked: ReproduceOptions) -> published.PublishedTable:
    """The table; `ConfigError` before a model is loaded for what has no meaning with it."""
    table = published.get(asked.name)
    if asked.methods and asked.name in _FIXED:
        raise ConfigError(f"--method: {asked.name} compares {', '.join(VARIANTS[asked.name])}; leave it out")
    needed = list(table.protocol.get("benchmark", ["zsre"]))
    if odd := [name for name in asked.data if name not in needed]:
        raise ConfigError(f"--data {odd[0]}=…: {asked.name} is measured on {', '.join(needed)}")
    if asked.split and len(asked.data) == len(needed):
        raise ConfigError("--split chooses of the almanac, and no part of this table falls back on it; leave it out")
    return table


def cases_of(asked: ReproduceOptions, benchmark: str) -> tuple[list[Case], str]:
    """(cases, the benchmark they are from): the given file in its own order, else the almanac."""
    if benchmark not in asked.data:
        almanac = registry.get("benchmark", _FALLBACK)().load(asked.split, asked.n, asked.seed)
        return list(itertools.islice(almanac, asked.n or asked.most)), _FALLBACK
    opened = open_benchmark(benchmark, asked.data[benchmark])
    if asked.n:
        list(opened.load(None, asked.n, None))  # says how many there are where n is too large
    every = list(opened.load(None, None, None))
    count = asked.n or asked.most
    return (with_unrelated(every[:count], every[count:]) if benchmark == "zsre" else every[:count]), benchmark


def with_unrelated(cases: Sequence[Case], others: Sequence[Case]) -> list[Case]:
    """The cases, each edit with a locality question of a record that is not edited, for BaFT's locality term.

    The paper trains with each record's own (it does not say that another is asked when it is scored); what trains is not what scores, so
    the question of the records behind the edited ones is taken, over again where these are few, and none that any case asks.
    """
    asked = {probe.prompt for case in cases for probe in case.probes}
    pairs = [(p.prompt, p.target) for c in others for p in c.probes if p.kind in LOCAL_KINDS and p.target and p.prompt not in asked]
    if not pairs:
        return list(cases)
    given = zip(cases, itertools.cycle(dict.fromkeys(pairs)))
    return [c if c.request.unrelated else replace(c, request=replace(c.request, unrelated=(pair,))) for c, pair in given]


def editors(lm: LM, asked: ReproduceOptions) -> dict[str, Any]:
    """{row: editor}; statistics a method needs are made."""
    base = VARIANTS[asked.name]
    chosen = base if asked.methods is None else {m: base.get(m, (m, {})) for m in asked.methods}
    out = {}
    for label, (method, own) in chosen.items():
        kind = registry.get("method", method)
        stated = PUBLISHED in kind.PRESETS and not preset(kind, lm.name)  # a model's own preset goes before what the paper states
        values = {**({"preset": PUBLISHED} if stated else {}), **own, **asked.settings(method)}
        if asked.name == "baft-fig2" and "layers" not in values:
            blocks = kind.for_model(lm, **values).target_layers(lm)
            values["layers"] = [blocks[len(blocks) // 2]]
        out[label] = kind.for_model(lm, **values)
        if hasattr(out[label], "prepare"):
            out[label].prepare(lm)
    return out


def measure(job: Measurement, table: published.PublishedTable, asked: ReproduceOptions, made: Mapping[str, Any]) -> Measured:
    """The table's protocol on what is given."""
    name, protocol = table.name, table.protocol
    parts = list(protocol.get("benchmark", ["zsre"]))
    cases, used = cases_of(asked, parts[0])
    row = {"part": parts[0], "benchmark": used}
    if name == "baft-table1":
        for part in parts:
            cases, used = cases_of(asked, part)
            if used == _FALLBACK and part != parts[0]:
                continue  # the almanac once
            protocols.single(job, made, cases, (part, used) == ("convsent", "convsent"), part=part, benchmark=used)
    elif name in ("baft-table2", "baft-table4"):
        marks = [t for t in protocol["T"] if t <= len(cases)]
        own = [] if len(cases) in marks else [len(cases)]  # where the paper has no row
        protocols.sequential(job, made, cases, sorted({*protocol["T"], *own}), **row)
    elif name == "baft-batched":
        for size in protocol["batch"]:
            part = {"part": f"{parts[0]}, batches of {size}", "benchmark": used}
            protocols.sequential(job, made, cases, protocol["T"][str(size)], size, **part)
    elif name == "baft-table8":
        items, source = _choices(asked, cases)
        protocols.choosing(job, made, cases, items, part="piqa", benchmark=source)
    elif name == "baft-fig1":
        protocols.redundancy(job, made, cases)
    elif name == "baft-fig2":
        _weights(job, made, cases, row)
    else:
        protocols.robust(job, made, cases, **row)
    if not job.into.rows and not job.into.redundancy:
        raise InputError(f"{len(cases)} cases are too few for any row of {name}; {'; '.join(job.into.left_out)}")
    return job.into


def _choices(asked: ReproduceOptions, cases: Sequence[Case]) -> tuple[list[Any], str]:
    if "piqa" in asked.data:
        return list(open_benchmark("piqa", asked.data["piqa"]).load(None, None, None)), "piqa"
    return protocols.choices_of(cases), f"{_FALLBACK}'s facts that should stay, each against the edit's new answer"


def _weights(job: Measurement, made: Mapping[str, Any], cases: Sequence[Case], row: Mapping[str, Any]) -> None:
    for name, editor in made.items():
        if len(cases) < WINDOW:
            job.into.left_out.append(f"T = {WINDOW} needs {WINDOW} cases, there are {len(cases)}")
            return
        parts = protocols.windows(job, name, editor, cases, WINDOW, **row)
        job.into.weights = gates.summary(gates.read(job.lm, [gates.of_case(c, s) for part, s in parts for c in part]))


def compare(table: published.PublishedTable, model: str, found: Measured) -> tuple[list[dict[str, Any]], str | None, bool]:
    """(a row a figure: measured, low, high, published, gap, flag, misprint; the paper's model beside it; whether it is this model)."""
    reference, same = table.nearest(model)
    keys = ("method", "part", "T", "batch")
    at = {tuple(r.get(k) for k in keys): r for r in (table.of(reference) if reference else ())}
    out = []
    for row in found.rows:
        printed = at.get(tuple(row.get(k) for k in keys))
        for column, figure in row["figures"].items():
            value = None if printed is None else printed.get(column)
            misprint = None if printed is None else table.misprint(printed, column)
            line = {k: v for k, v in row.items() if k != "figures"}
            line |= {"column": column, "measured": figure["value"], "low": figure["low"], "high": figure["high"], "published": value}
            line["gap"] = None if value is None else figure["value"] - value
            line["flag"] = None if value is None else flag(figure, value if misprint is None else misprint["mean"])
            line["misprint"] = None if misprint is None else f"printed {value:g}, the mean of its row is {misprint['mean']:g}"
            out.append(line)
    return out, reference, same


def flag(figure: Mapping[str, Any], value: float) -> str:
    """ "within", or where the measured figure lies against the published one."""
    low = figure["value"] if figure["low"] is None else figure["low"]
    high = figure["value"] if figure["high"] is None else figure["high"]
    if low - published.SPREAD - 1e-9 <= value <= high + published.SPREAD + 1e-9:
        return "within"
    return "above" if value < low else "below"


def differences(
    lm: LM, table: published.PublishedTable, asked: ReproduceOptions, made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], n: int
) -> list[str]:
    """What is not as in the paper, in words."""
    reference, same = table.nearest(lm.name)
    out = (
        []
        if same
        else [f"model: {lm.name or 'this one'} ({lm.depth} blocks of width {lm.width}), the paper's is {reference or 'not stated'}"]
    )
    for benchmark in table.protocol.get("benchmark", ["zsre"]):
        if benchmark not in asked.data:
            taken = "" if "benchmark" in table.protocol else ", which is taken as the paper's (it is not stated)"
            out.append(f"benchmark: the almanac stands in for {benchmark}{taken}: no file was given (--data {benchmark}=PATH)")
    if "zsre" in asked.data and any(getattr(e, "locality", False) for e in made.values()):
        out.append("locality term: trained with locality questions of records that are not edited, the paper with each record's own")
    if n != table.protocol.get("n"):
        out.append(f"cases: {n}, the paper's are {table.protocol.get('n', 'not stated')}")
    if "T" in table.protocol:
        out.append("averaging: over disjoint windows of T edits, as many as fit; the paper does not say how it averaged")
    for label, editor in made.items():
        if away := _away(editor, VARIANTS[asked.name].get(label, ("", {}))[1]):
            out.append(f"settings of {label} that are not the method's published ones: {away}")
    for name, title in (("baft", "BaFT"), ("reft", "ReFT")):
        silent = made.get(name) or next((e for e in made.values() if e.name == name), None)
        if silent is not None:
            how = ", ".join(f"{k}={getattr(silent, k)!r}" for k in _SILENT if hasattr(silent, k))
            out.append(f"where the paper is silent on {title}: {how}")
    run = {row["method"] for row in rows}
    missing = sorted({r["method"] for r in (table.of(reference) if reference else ())} - run)
    if missing:
        out.append(f"not run here: {', '.join(missing)}" + ("" if asked.name in _FIXED else " (add them with --method)"))
    return out


def _away(editor: Any, own: Mapping[str, Any]) -> str:
    """The fields that differ from the class' defaults (the published values), but for those that make the row (``own``)."""
    if editor.name not in ("baft", "reft"):  # the others' defaults are of the papers that they come from
        return ""
    values, kind = to_dict(editor), type(editor)
    plain = {f.name: f.default for f in fields(kind)}
    return ", ".join(f"{k}={v}" for k, v in values.items() if k not in own and k not in _SILENT and v != plain[k])
