"""The tables of docs/choose.md, computed from docs/results: what to take for which need, and the figures it follows from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from docs_methods import GROUPS, LOCATE, ROBUST, WEIGHTS, title
from docs_results import FREE, LATENCY, MARKS, Source, batched, continual, measured, perplexity, shown, single, suite, table, value

UP = "results/"
THREE = ("reliability", "generality", "locality_agreement")
METHODS = tuple(name for names in GROUPS.values() for name in names)
SUITES = tuple(sorted(p.name.removeprefix("suite-").removesuffix(".json") for p in suite("x").path.parent.glob("suite-*.json")))
BEST = 2  # methods named for a need


def link(name: str) -> str:
    plain = "rep" if name.startswith("rep-") else name
    return f"[{title(plain)}{f' on {title(name[4:])}' if plain != name else ''}](methods/{plain}.md)"


def harmonic(*values: float | None) -> float:
    """Of shares; 0 where one is 0 or missing."""
    return len(values) / sum(1 / v for v in values if v) if all(values) else 0.0


def figures() -> dict[str, dict[str, float]]:
    """Method -> the numbers decisions are made on.  Generated answers throughout, S from likelihoods."""
    out: dict[str, dict[str, float]] = {}
    for name in METHODS:
        found: dict[str, float | None] = {}
        one, joint, many = measured(single(name)), measured(batched(name)), measured(continual(name))
        if one is not None:
            found |= {m: value(one, m, FREE) for m in THREE} | {"S": value(one, "S", "likelihood")}
            found |= {"alone": one["seconds_alone"], "together": one["seconds_per_edit"], "kB": one["bytes"] / 1000}
        for t in MARKS:
            found |= {f"{m} at {t}": value(many, m, FREE, t) for m in THREE}
        found |= {f"{m} by 50": value(joint, m, FREE, 50) for m in THREE}
        out[name] = {k: float(v) for k, v in found.items() if v is not None}
    for name in SUITES:
        asked = measured(suite(name))
        out.setdefault(name, {}).update({m: float(value(asked, m, FREE) or 0) for m, _ in ROBUST})
        out[name].setdefault("reliability", float(value(asked, "reliability", FREE) or 0))
    return out


def best(
    found: Mapping[str, Mapping[str, float]],
    allowed: Callable[[str, Mapping[str, float]], bool],
    by: Callable[[Mapping[str, float]], float],
) -> list[str]:
    """Names of the methods with the largest ``by`` among those allowed."""
    fit = [name for name, f in found.items() if name != "none" and allowed(name, f) and by(f) > float("-inf")]
    return sorted(fit, key=lambda n: (-by(found[n]), n))[:BEST]


def _at(suffix: str) -> Callable[[Mapping[str, float]], float]:
    return lambda f: harmonic(*(f.get(f"{m} {suffix}") for m in THREE)) or float("-inf")


def _three(f: Mapping[str, float], suffix: str = "") -> str:
    found = [f.get(f"{m} {suffix}".strip()) for m in THREE]
    return " / ".join(map(shown, found)) if any(v is not None for v in found) else "–"


def _robust(f: Mapping[str, float]) -> float:
    return sum(f[m] for m, _ in ROBUST) / len(ROBUST) if all(m in f for m, _ in ROBUST) else float("-inf")


def _sure(f: Mapping[str, float], least: float = 0.99) -> bool:
    return f.get("reliability", 0) >= least


def decisions() -> str:
    """Need -> methods, with the rule and the figures."""
    found = figures()
    unknown = float("-inf")
    needs: list[tuple[str, str, Any, Any, Callable[[Mapping[str, float]], str]]] = [
        ("one fact, everything else untouched", "reliability ≥ 0.99, locality ≥ 0.95; highest S",
         lambda n, f: _sure(f) and f.get("locality_agreement", 0) >= 0.95, lambda f: f.get("S", unknown), lambda f: f"S {shown(f['S'])}, locality {shown(f['locality_agreement'])}"),
        ("one fact that must hold in other words", "reliability ≥ 0.99; highest generality",
         lambda n, f: _sure(f), lambda f: f.get("generality", unknown), lambda f: f"generality {shown(f['generality'])}, locality {shown(f['locality_agreement'])}"),
        ("a change of weights, for [another engine](engines.md)", "changes weights only, reliability ≥ 0.9; highest S",
         lambda n, f: n in WEIGHTS and _sure(f, 0.9), lambda f: f.get("S", unknown), lambda f: f"S {shown(f['S'])}, locality {shown(f['locality_agreement'])}"),
        ("the same, of the locate-then-edit family", "reliability ≥ 0.9; highest S",
         lambda n, f: n in LOCATE and _sure(f, 0.9), lambda f: f.get("S", unknown), lambda f: f"S {shown(f['S'])}, locality {shown(f['locality_agreement'])}"),
        ("a hundred facts at once", "joint patches of 50; highest harmonic mean", lambda n, f: True, _at("by 50"), lambda f: _three(f, "by 50")),
        ("a hundred facts, one after another", "T = 100; highest harmonic mean", lambda n, f: True, _at("at 100"), lambda f: _three(f, "at 100")),
        ("a thousand facts, one after another", "T = 1,000; highest harmonic mean", lambda n, f: True, _at("at 1000"), lambda f: _three(f, "at 1000")),
        ("other names, shuffled words, long contexts, questions", "reliability ≥ 0.9; highest mean of the four",
         lambda n, f: _sure(f, 0.9), _robust, lambda f: " / ".join(shown(f[m]) for m, _ in ROBUST)),
        ("an answer in no time", "reliability ≥ 0.99; fewest seconds for an edit alone",
         lambda n, f: _sure(f), lambda f: -f.get("alone", -unknown), lambda f: f"{shown(f['alone'])} s, locality {shown(f['locality_agreement'])}"),
        ("small files", "reliability ≥ 0.9; fewest kB", lambda n, f: _sure(f, 0.9), lambda f: -f.get("kB", -unknown), lambda f: f"{shown(f['kB'], 1)} kB"),
    ]  # fmt: skip
    rows = []
    for need, rule, allowed, by, said in needs:
        names = best(found, allowed, by)
        rows.append([need, rule, "; ".join(f"**{link(n)}** ({said(found[n])})" for n in names)])
    return table(["you need", "chosen by", "take"], rows)


def _sources(sources: Iterable[Source]) -> str:
    """The commands with the files they wrote."""
    by: dict[str, list[str]] = {}
    for source in sources:
        if source.path.exists():
            by.setdefault(source.command, []).append(source.link(UP))
    return "\n".join(f"- `{command}`: {', '.join(files)}" for command, files in by.items()) + "\n"


def singles() -> str:
    found, speed = figures(), measured(LATENCY)
    assert speed is not None
    rows = [
        [link(n), *(shown(f[m]) for m in (*THREE, "S")), shown(f["alone"]), shown(f["together"], 3), shown(f["kB"], 1), shown(speed["rows"][n]["ratio"])]
        for n, f in found.items() if "S" in f
    ]  # fmt: skip
    heads = ["", "reliability", "generality", "locality", "S", "s alone", "s of 200 together", "kB", "decoding"]
    return table(heads, rows) + "\n" + _sources([*map(single, METHODS), LATENCY])


def many() -> str:
    found = figures()
    rows = []
    for n in METHODS:
        if f"{THREE[0]} at 100" in found[n]:
            run = measured(continual(n))
            rows.append([link(n), *(_three(found[n], f"at {t}") for t in MARKS), shown(perplexity(run, 100), 0), _three(found[n], "by 50")])
    heads = ["", *(f"T = {t:,}" for t in MARKS), "perplexity at T = 100", "100 at once, by 50"]
    return table(heads, rows) + "\n" + _sources([*map(continual, METHODS), *map(batched, METHODS)])


def robust() -> str:
    found = figures()
    rows = [
        [
            link(n),
            shown(value(measured(suite(n)), "reliability", FREE)),
            *(shown(found[n][m]) for m, _ in ROBUST),
            shown(_robust(found[n])),
        ]
        for n in SUITES
    ]
    heads = ["", "reliability", *(label for _, label in ROBUST), "mean of the four"]
    return table(heads, rows) + "\n" + _sources(map(suite, SUITES))


def parts() -> dict[str, str]:
    """Name of a computed part of choose.md -> its text."""
    return {"decisions": decisions(), "singles": singles(), "many": many(), "robust": robust()}
