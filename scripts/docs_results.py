"""What was measured, out of docs/results: one place that knows which file and which command a figure comes from."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.report import tables

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# Continual runs that other scripts made on the same cases; where editors/ has a file of its own, that one counts.
ELSEWHERE = {
    **{m: f"locate-continual-{m}" for m in ("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit")},
    "baft": "continual-baft",
    "reft": "continual-reft",
}
MARKS = (10, 100, 1000)


@dataclass(frozen=True)
class Source:
    """A file under docs/results and the command that wrote it."""

    file: str
    command: str

    @property
    def path(self) -> Path:
        return RESULTS / self.file

    def link(self, root: str) -> str:
        """As Markdown; ``root``: from the page to docs/results."""
        return f"[{Path(self.file).name}]({root}{self.file})"


def single(name: str) -> Source:
    return Source(f"editors/single-{name}.json", "python scripts/evidence_editors.py single --threads 1")


def batched(name: str) -> Source:
    return Source(f"editors/batched-{name}.json", "python scripts/evidence_editors.py batched --n 100 --threads 1")


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return label.replace(", ", "-").replace(" ", "-")


def continual_file(name: str) -> str:
    """Under docs/results."""
    own = f"editors/continual-{slug(name)}.json"
    return own if name not in ELSEWHERE or (RESULTS / own).exists() else f"{ELSEWHERE[name]}.json"


def continual(name: str) -> Source:
    file = continual_file(name)
    if not file.startswith("editors/"):
        return Source(file, f"python scripts/{'evidence_locate.py' if file.startswith('locate') else 'evidence.py'} continual")
    found = measured(Source(file, "")) or {"n": 1000}
    if "from" in found:
        return Source(file, f"errata run docs/results/grid/{'continual' if found['n'] >= 1000 else 'methods'}.yaml")
    return Source(file, "python scripts/evidence_editors.py continual --threads 1" + f" --n {found['n']}" * (found["n"] < 1000))


def suite(name: str) -> Source:
    return Source(f"rep/suite-{name}.json", f"python scripts/evidence_rep.py suite --threads 1 --only {name.removeprefix('rep-')}")


LATENCY = Source("editors/latency-all.json", "python scripts/evidence_editors.py latency")


@functools.cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def measured(source: Source) -> dict[str, Any] | None:
    """The file's document; None where this was not measured."""
    return _read(source.path) if source.path.exists() else None


FREE = "free text"  # the headline protocol of a file


def headline(found: Mapping[str, Any] | None) -> str:
    """How free text is read in this file: files that were measured before there was "starts" have "generated"."""
    return tables.headline((found or {}).get("rows", ()))


def row(found: Mapping[str, Any] | None, metric: str, protocol: str, t: int | None = None) -> dict[str, Any] | None:
    """One number with its interval; ``protocol`` may be `FREE`."""
    protocol = headline(found) if protocol == FREE else protocol
    for r in (found or {}).get("rows", ()):
        if r["metric"] == metric and r["protocol"] == protocol and r.get("T") == t:
            return dict(r)
    return None


def value(found: Mapping[str, Any] | None, metric: str, protocol: str, t: int | None = None) -> float | None:
    r = row(found, metric, protocol, t)
    return None if r is None else float(r["value"])


def perplexity(found: Mapping[str, Any] | None, t: int) -> float | None:
    """Of the final stack after ``t`` edits."""
    at = (found or {}).get("perplexity")
    v = at.get(str(t)) if isinstance(at, dict) else None
    v = v[0] if isinstance(v, list) else v
    return None if v is None else float(v)


def shown(v: float | None, digits: int = 2) -> str:
    return "–" if v is None else f"{v:,.{digits}f}"


def interval(r: Mapping[str, Any] | None) -> str:
    return "–" if r is None else f"{r['value']:.3f} [{r['low']:.2f}, {r['high']:.2f}]"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)) + "\n"
