"""What benchmarks in files have in common: forms told apart by their fields, cases, a report of what was left out, order by seed.

    file, folder or hub ─► Record ─► Form.draft ─► Draft ─► Case      (one file a benchmark says only what its fields mean)

Nothing is dropped in silence: `LoadReport` counts by reason what could not be used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from errata import registry
from errata.benchmarks import drafts
from errata.benchmarks.drafts import Draft, LoadReport, UnusableRecord
from errata.benchmarks.facts import share
from errata.benchmarks.records import SUFFIXES, Record, locate, read_records, unknown_field
from errata.benchmarks.streams import one_a_fact
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RecordFormat(Generic[Item]):
    """One way the records of a benchmark are written.

    required   fields every record of the form has, by which it is known
    optional   fields it may have
    unused     fields that are known and not used
    make       record -> what it is: a `Draft` of a case, or an item of a benchmark without edits
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    unused: frozenset[str]
    make: Callable[[Record], Item]

    @classmethod
    def of(cls, name: str, make: Callable[[Record], Item], required: str, optional: str = "", unused: str = "") -> RecordFormat[Item]:
        """Fields as words; "~" stands for a space."""
        needed, may, idle = (frozenset(word.replace("~", " ") for word in words.split()) for words in (required, optional, unused))
        return cls(name, needed, may, idle, make)

    def fits(self, record: Record) -> bool:
        return self.required <= set(record.values) and set(record.values) <= self.known

    @property
    def known(self) -> frozenset[str]:
        return self.required | self.optional | self.unused

    def check(self, record: Record) -> None:
        """`InputError` for a missing or unknown field."""
        keys = set(record.values)
        if missing := sorted(self.required - keys):
            raise record.fail(f"field {missing[0]!r} is missing; the {self.name} form has {', '.join(sorted(self.required))}")
        if unknown := sorted(keys - self.known):
            raise record.fail(unknown_field(unknown[0], self.known))


class FileData(Generic[Item]):
    """Records of one form, from a file, a folder (one file of the split in it) or the hub."""

    name: ClassVar[str]
    version: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]  # of the published files; the first is the one to score on
    forms: ClassVar[tuple[RecordFormat[Any], ...]]
    needs_data: ClassVar[bool] = True
    kind: ClassVar[str] = "edits"  # or choices, questions, facts: without edits
    only_known: ClassVar[bool] = False  # its edits deny an old answer: scored on those that the base knows, unless told otherwise

    def __init__(self, data: str | Path) -> None:
        self.data = data
        self._read: dict[str | None, tuple[RecordFormat[Any], list[Record]]] = {}

    def records(self, split: str | None = None) -> tuple[RecordFormat[Any], list[Record]]:
        """(the form, every record, each of that form)."""
        if split not in self._read:
            path = locate(self.data)
            self._read[split] = self._within(path, split) if path.is_dir() else self._alone(path, split)
        return self._read[split]

    def _alone(self, path: Path, split: str | None) -> tuple[RecordFormat[Any], list[Record]]:
        if split is not None:
            raise InputError(f"{path} is one file, which has no splits; leave out the split {split!r}, or give the folder")
        found = read_records(path)
        form = self.form_of(found[0])
        for record in found:
            form.check(record)
        return form, found

    def _within(self, folder: Path, split: str | None) -> tuple[RecordFormat[Any], list[Record]]:
        """The one file of the folder that is of this benchmark and whose name holds the split as a word."""
        split = split or self.splits[0]
        files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
        ours, broken = [], []
        for path in (path for path in files if split in _words(path.stem)):
            try:
                ours += [path] if any(form.fits(read_records(path)[0]) for form in self.forms) else []
            except InputError as error:  # perhaps another benchmark's; told only where none is found
                broken.append(f"; not read: {error}")
        if len(ours) != 1:
            what = f"several files ({', '.join(p.name for p in ours)})" if ours else "no file"
            raise InputError(f"{folder} holds {what} of {self.name} with {split!r} in the name; give one file{''.join(broken)}")
        return self._alone(ours[0], None)

    def form_of(self, record: Record) -> RecordFormat[Any]:
        """The form by which a file's first record is read."""
        for form in self.forms:
            if form.fits(record):
                return form
        others = [n for n in registry.names("benchmark") if n != self.name and _takes(registry.get("benchmark", n), record)]
        if not others:
            keys = set(record.values)
            nearest = max(self.forms, key=lambda f: len(f.required & keys) - len(f.required - keys))
            if len(nearest.required & keys) * 2 >= len(nearest.required):
                nearest.check(record)
        hint = f"it is written like {' or '.join(others)}" if others else f"it has {', '.join(sorted(record.values)) or 'no fields'}"
        raise record.fail(f"not a record of {self.name} ({' or '.join(f.name for f in self.forms)} form); {hint}")

    def dealt(self, items: Sequence[Item], ids: Sequence[str], n: int | None, seed: int | None) -> Iterator[Item]:
        """``n`` items (all without ``n``) in the order of ``seed``; a smaller ``n`` gives the beginning of a larger one's."""
        if isinstance(n, bool) or not isinstance(n, int | None):
            raise InputError(f"n must be a whole number, not {n!r}")
        if n is not None and not 1 <= n <= len(items):
            raise InputError(f"{n} asked for, but {self.data} has 1 to {len(items)} of {self.name}; ask for a number in between")
        order = range(len(items))
        if seed is not None:
            order = sorted(order, key=lambda i: (share("order", str(seed), ids[i]), i))  # type: ignore[assignment]
        return itertools.islice((items[i] for i in order), n)


class FileBenchmark(FileData[Case]):
    """A benchmark of edits.  ``report`` says what became of the records that the last `load` read."""

    probes: ClassVar[tuple[str, ...]]  # kinds that may occur
    report: LoadReport
    openings: Mapping[str, tuple[str, ...]]  # of cases by id, likewise
    consistent: bool = False  # one case a fact, the first in the file (`errata.benchmarks.streams`)

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        """``n`` cases (all without ``n``) in the order of ``seed``; None: the file's own, by which papers make T edits."""
        cases = self._cases(split)
        return self.dealt(cases, [case.id for case in cases], n, seed)

    def draft(self, form: RecordFormat[Any], records: Sequence[Record], i: int) -> Draft:
        """The draft of record i; what needs the other records overrides this."""
        draft: Draft = form.make(records[i])
        return draft

    def _cases(self, split: str | None) -> list[Case]:
        form, records = self.records(split)
        self.report = report = LoadReport(form.name, len(records))
        found: dict[tuple[EditRequest, ...], list[Probe]] = {}
        openings: dict[tuple[EditRequest, ...], tuple[str, ...]] = {}
        for i, record in enumerate(records):
            try:
                draft = self.draft(form, records, i)
                requests = tuple(drafts.request(part) for part in (draft, *draft.more))
            except UnusableRecord as reason:
                report.dropped[str(reason)] += 1
                continue
            except InputError as error:
                raise error if str(error).startswith(record.where) else record.fail(str(error)) from None
            report.joined += requests in found
            openings[requests] = tuple(dict.fromkeys((*openings.get(requests, ()), *draft.openings)))
            drafts.take(drafts.probes(draft, requests, record, report), found.setdefault(requests, []), report)
        cases = [Case(requests[0], tuple(probes), requests[1:]) for requests, probes in found.items()]
        if self.consistent:
            report.repeated = len(cases) - len(cases := one_a_fact(cases))
        if not cases:
            raise InputError(f"{self.data}: no record makes a case of {self.name}; {'; '.join(report.lines())}")
        report.cases = len(cases)
        report.probes.update(probe.kind for case in cases for probe in case.probes)
        self.openings = {case.id: openings[case.requests] for case in cases}
        drafts.remark(cases, report)
        return cases


def _words(stem: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in stem).split()


def _takes(benchmark: Any, record: Record) -> bool:
    return any(form.fits(record) for form in getattr(benchmark, "forms", ()))


def open_benchmark(name: str, data: str | Path | None = None, consistent: bool = False) -> Any:
    """The benchmark of that name on ``data``, where it needs any.  ``consistent``: with one case a fact."""
    kind = registry.get("benchmark", name)
    if consistent and not issubclass(kind, FileBenchmark):
        raise InputError(f"the benchmark {name!r} has no edits from a file, of which one a fact could be taken; leave out consistent")
    if not getattr(kind, "needs_data", False):
        if data is not None:
            raise InputError(f"the benchmark {name!r} is in the package and takes no data; leave out {data}")
        return kind()
    if data is None:
        raise InputError(
            f"the benchmark {name!r} is not in the package; give its file with --data PATH (or hub:OWNER/NAME/PATH). Source: {kind.source}"
        )
    found = kind(data)
    if consistent:
        found.consistent = True
    return found
