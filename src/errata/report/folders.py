"""What `errata run` and `errata score --out` left in folders, as one kind of thing: a `Result` is one method scored in one way.

    RUN/manifest.json, RUN/cells/CELL/{cell,summary,cost}.json, records.jsonl   of `errata run`; a CELL alone is read as well
    DIR/summary.json, DIR/records.jsonl                                         of `errata score --out` and `errata demo --out`
    …/gates.json, …/reproduce.json                                              of `errata analyse gates`, in either or alone

Only what is there is read: a run that was stopped shows the cells it has, and a folder without records has no cases to browse.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata import storage
from errata.errors import InputError

Record = Mapping[str, Any]
Row = Mapping[str, Any]
RIGHT_AFTER = "right after its own"  # ``edits`` of a record that was made when its own edit was the last
GATES = ("gates.json", "reproduce.json")
_NEEDED = ("method", "case", "kind", "prompt", "target")
SAMPLED = "generation"  # of some cases only, and no question: no part of what was asked


@dataclass(frozen=True)
class Result:
    """One method of one run, scored in one way.

    asked      names what was asked: the digest a run declares, and that of the cases with their probes; who share one are comparable
    run        the folder of the run it belongs to
    document   what summary.json says of it: summary, retention, right_after, forgetting, health, undone, micro_averages, known
    """

    where: Path
    run: Path
    method: str
    model: str
    fingerprint: str
    benchmark: str
    scenario: str
    seed: int | None
    asked: frozenset[str]
    document: Mapping[str, Any]
    cost: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: Records | None = None
    dtype: str | None = None  # None: a folder that does not say

    @property
    def versions(self) -> dict[str, int]:
        """Metric -> version of its definition."""
        return {str(r["metric"]): int(r.get("version", 1)) for r in self.document["summary"]}


@dataclass(frozen=True)
class Folder:
    """``missing``: cells without a result, and why."""

    path: Path
    results: tuple[Result, ...]
    manifest: Mapping[str, Any]
    missing: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[Mapping[str, Any], ...] = ()


class Records:
    """A records.jsonl by method and by when it was scored; lines are read when they are asked for, since there may be millions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[str, Any], array[int]] = {}
        asked: dict[tuple[str, Any], dict[str, list[Any]]] = {}
        for place, record in self._scan():
            key = (str(record["method"]), record.get("edits"))
            self.places.setdefault(key, array("Q")).append(place)
            if record["kind"] != SAMPLED:
                asked.setdefault(key, {}).setdefault(str(record["case"]), []).append([record["kind"], record["prompt"], record["target"]])
        self.asked = {key: _digest([[case, sorted(map(json.dumps, probes))] for case, probes in of.items()]) for key, of in asked.items()}

    def _scan(self) -> Iterator[tuple[int, Record]]:
        place = 0
        try:
            with open(self.path, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield place, _record(line, f"{self.path}:{number}")
                    place += len(line)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

    def last(self, method: str) -> Any:
        """When the final records of a method were made: the greatest T; None where records say no T."""
        return max((when for name, when in self.places if name == method and isinstance(when, int)), default=None)

    def of(self, method: str, when: Any) -> Iterator[Record]:
        """Records of that method and time; with the final ones come those of no time (sampled text)."""
        keys = [(method, when), *([(method, None)] if when is not None and when == self.last(method) else [])]
        with open(self.path, "rb") as stream:
            for place in sorted(p for key in keys for p in self.places.get(key, ())):
                stream.seek(place)
                yield _record(stream.readline(), str(self.path))


def _record(line: bytes, where: str) -> Record:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON ({error}); was the run stopped while it was written? run it again") from None
    if not isinstance(found, dict) or (lacking := [k for k in _NEEDED if k not in found]):
        what = "not a record" if not isinstance(found, dict) else f"a record without {lacking[0]!r}"
        raise InputError(f"{where}: {what}; it was not written by errata's scorer")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _document(path: Path) -> dict[str, Any]:
    return storage.read_document(path, InputError)


def _summary(folder: Path) -> tuple[dict[str, Any], Records | None]:
    """The folder's summary, and its records where it has any; `InputError` unless the summary's rows can be shown."""
    path, records = folder / "summary.json", folder / "records.jsonl"
    document = _document(path)
    for part in ("summary", "retention", "right_after"):
        rows = document.get(part, [])
        if part not in document and part == "summary":
            raise InputError(f"{path}: has no 'summary'; give a folder of `errata run` or `errata score --out`")
        for i, row in enumerate(rows):
            if lacking := [k for k in ("method", "metric", "protocol", "value", "low", "high") if k not in row]:
                raise InputError(f"{path}: row {i} of {part!r} has no {lacking[0]!r}; it is not a summary of errata")
    return document, Records(records) if records.is_file() else None


def read(path: Path) -> Folder:
    """What the folder holds; `InputError` where it is none of errata's."""
    if (path / "manifest.json").is_file() and (path / "cells").is_dir():
        return _run(path)
    if (path / "cell.json").is_file():
        return Folder(path, (_cell(path, path.parent.parent),), _beside(path), {}, _gates(path))
    if (path / "summary.json").is_file():
        return _scored(path)
    if any((path / name).is_file() for name in GATES):
        return Folder(path, (), {}, {}, _gates(path))
    why = "is not there" if not path.exists() else "is not a folder" if not path.is_dir() else "has no manifest.json and no summary.json"
    raise InputError(f"{path}: {why}; give a folder of `errata run` or `errata score --out`")


def _beside(cell: Path) -> dict[str, Any]:
    """The manifest of the run that a cell belongs to."""
    path = cell.parent.parent / "manifest.json"
    return _document(path) if path.is_file() else {}


def _gates(*folders: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(_document(path) for folder in folders for name in GATES if (path := folder / name).is_file())


def _run(path: Path) -> Folder:
    manifest = _document(path / "manifest.json")
    there = sorted(p.name for p in (path / "cells").iterdir() if p.is_dir())
    names = [str(name) for name in manifest.get("cells") or there]
    results, missing = [], {}
    for name in names:
        cell = path / "cells" / name
        if (cell / "summary.json").is_file() and (cell / "cell.json").is_file():
            results.append(_cell(cell, path))
        else:
            missing[name] = _why(cell)
    return Folder(path, tuple(results), manifest, missing, _gates(path, *(path / "cells" / name for name in names)))


def _why(cell: Path) -> str:
    if not (cell / "error.txt").is_file():
        return "not begun" if not cell.is_dir() else "not complete"
    last = (cell / "error.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"failed: {last[-1]}" if last else "failed"


def _cell(path: Path, run: Path) -> Result:
    (document, records), begun = _summary(path), _document(path / "cell.json")
    cell = begun.get("cell", {})
    try:
        method, model, benchmark, scenario = str(cell["method"]["label"]), str(cell["model"]["name"]), cell["benchmark"], cell["scenario"]
        kind = str(scenario["kind"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'cell.json'}: does not say its {error}; it was damaged or changed by hand") from None
    order = cell.get("seed") if benchmark.get("seed") is None else benchmark["seed"]
    return Result(
        path,
        run,
        method,
        model,
        str(begun.get("fingerprint", "unknown")),
        _benchmark(benchmark["name"], None, benchmark.get("data") or benchmark.get("split") or "test", document.get("n"), order),
        f"batched({scenario['size']})" if kind == "batched" else kind,
        cell.get("seed"),
        frozenset({f"declared {begun['cases']}"} if "cases" in begun else ()) | _asked(records, method),
        document,
        _document(path / "cost.json") if (path / "cost.json").is_file() else {},
        begun.get("settings", {}),
        records,
        begun.get("dtype"),
    )


def _asked(records: Records | None, method: str) -> frozenset[str]:
    found = records.asked.get((method, records.last(method))) if records is not None else None
    return frozenset({f"asked {found}"} if found else ())


def _benchmark(name: object, version: object, where: object, n: object, order: object) -> str:
    said = [str(name) + (f" version {version}" if version is not None else ""), str(where), f"{n} cases"]
    return ", ".join([*said, "the file's order" if order in (None, "file") else f"order of seed {order}"])


def _scored(path: Path) -> Folder:
    document, records = _summary(path)
    results = _of_document(path, document, records)
    told = ("summary", "retention", "right_after", "differences", "micro_averages", "settings")
    return Folder(path, tuple(results), {k: v for k, v in document.items() if k not in told}, {}, _gates(path))


def _of_document(path: Path, document: Mapping[str, Any], records: Records | None) -> list[Result]:
    """The methods of a document that `errata score` writes."""
    mode = str(document.get("mode", "single"))
    where = document.get("data") or document.get("split") or "test"
    named = (document.get("benchmark", "unknown"), document.get("version"), where, document.get("n", "?"), document.get("seed"))
    benchmark = _benchmark(*named)
    out = []
    for method in dict.fromkeys(str(r["method"]) for r in document["summary"]):
        seconds = document.get("seconds_an_edit", {}).get(method)
        asked = _asked(records, method) or frozenset({f"named {_digest([*map(str, named)])}"})
        out.append(
            Result(
                path,
                path,
                method,
                str(document.get("model") or "unnamed"),
                str(document.get("base", "unknown")),
                benchmark,
                f"batched({document.get('batch_size', '?')})" if mode == "batched" else mode,
                None,
                asked,
                {**_of(document, method), "known": document.get("known")},
                {} if seconds is None else {"seconds_an_edit": seconds},
                document.get("settings", {}).get(method, {}),
                records,
                document.get("dtype"),
            )
        )
    return out


def _of(document: Mapping[str, Any], method: str) -> dict[str, Any]:
    parts: dict[str, Sequence[Row]] = {
        part: document[part] for part in ("summary", "retention", "right_after", "micro_averages") if part in document
    }
    return {part: [row for row in rows if row["method"] == method] for part, rows in parts.items()}
