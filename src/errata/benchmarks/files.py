"""What benchmarks in files have in common: forms told apart by their fields, cases, a report of what was left out, order by seed.

    file, folder or hub ─► Record ─► Form.draft ─► Draft ─► Case      (one file a benchmark says only what its fields mean)

Nothing is dropped in silence: `Report` counts by reason what could not be used.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from errata import registry
from errata.benchmarks.facts import share
from errata.benchmarks.records import SUFFIXES, Record, locate, read_records, unknown_field
from errata.errors import InputError
from errata.request import LOCAL_KINDS, SENTIMENT, Case, EditRequest, Probe

Item = TypeVar("Item")


class Unusable(Exception):
    """A record that is well formed but makes no case; the message is the reason it is counted under."""


@dataclass(slots=True)
class Draft:
    """What a record says, before it is checked.  ``more``: further edits that belong to the same change."""

    prompt: str
    target: str
    subject: str | None = None
    old: str | None = None
    probes: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    more: tuple[Draft, ...] = ()

    def ask(self, kind: str, prompt: str, *answers: str) -> None:
        """One probe; ``answers`` best first, all accepted."""
        self.probes.append((kind, prompt, answers))


@dataclass(frozen=True, slots=True)
class Form(Generic[Item]):
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
    def of(cls, name: str, make: Callable[[Record], Item], required: str, optional: str = "", unused: str = "") -> Form[Item]:
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


@dataclass(slots=True)
class Report:
    """What became of the records of a file.

    dropped    reason -> records that made no case
    probes     kind -> probes of all cases
    left_out   "kind: reason" -> probes that were not taken
    remarks    what is odd about what was taken
    """

    form: str
    records: int
    cases: int = 0
    joined: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    probes: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    remarks: collections.Counter[str] = field(default_factory=collections.Counter)

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        out = [f"{self.records} records ({self.form}), {self.cases} cases"]
        if self.joined:
            out.append(f"{self.joined} records of an edit that an earlier record also asks for: their probes joined its case")
        out += [f"dropped {count} records: {reason}" for reason, count in self.dropped.most_common()]
        out += [f"left out {count} probes: {reason}" for reason, count in self.left_out.most_common()]
        return out + [f"{count} cases: {remark}" for remark, count in self.remarks.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        counts = {name: dict(getattr(self, name)) for name in ("dropped", "probes", "left_out", "remarks")}
        return {"form": self.form, "records": self.records, "cases": self.cases, "joined": self.joined, **counts}


class FileData(Generic[Item]):
    """Records of one form, from a file, a folder (one file of the split in it) or the hub."""

    name: ClassVar[str]
    version: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]  # of the published files; the first is the one to score on
    forms: ClassVar[tuple[Form[Any], ...]]
    needs_data: ClassVar[bool] = True

    def __init__(self, data: str | Path) -> None:
        self.data = data
        self._read: dict[str | None, tuple[Form[Any], list[Record]]] = {}

    def records(self, split: str | None = None) -> tuple[Form[Any], list[Record]]:
        """(the form, every record, each of that form)."""
        if split not in self._read:
            path = locate(self.data)
            self._read[split] = self._within(path, split) if path.is_dir() else self._alone(path, split)
        return self._read[split]

    def _alone(self, path: Path, split: str | None) -> tuple[Form[Any], list[Record]]:
        if split is not None:
            raise InputError(f"{path} is one file, which has no splits; leave out the split {split!r}, or give the folder")
        found = read_records(path)
        form = self.form_of(found[0])
        for record in found:
            form.check(record)
        return form, found

    def _within(self, folder: Path, split: str | None) -> tuple[Form[Any], list[Record]]:
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

    def form_of(self, record: Record) -> Form[Any]:
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

    report: Report

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        """``n`` cases (all without ``n``) in the order of ``seed``; None: the file's own, by which papers make T edits."""
        cases = self._cases(split)
        return self.dealt(cases, [case.id for case in cases], n, seed)

    def drafts(self, form: Form[Any], records: Sequence[Record]) -> Iterator[Callable[[], Draft]]:
        """How to make the draft of each record; what needs the other records overrides this."""
        for record in records:
            yield lambda record=record: form.make(record)  # type: ignore[misc]

    def _cases(self, split: str | None) -> list[Case]:
        form, records = self.records(split)
        self.report = report = Report(form.name, len(records))
        found: dict[tuple[EditRequest, ...], list[Probe]] = {}
        for record, make in zip(records, self.drafts(form, records), strict=True):
            try:
                draft = make()
                requests = tuple(_request(part) for part in (draft, *draft.more))
            except Unusable as reason:
                report.dropped[str(reason)] += 1
                continue
            except InputError as error:
                raise error if str(error).startswith(record.where) else record.fail(str(error)) from None
            report.joined += requests in found
            _take(_probes(draft, requests, record, report), found.setdefault(requests, []), report)
        cases = [Case(requests[0], tuple(probes), requests[1:]) for requests, probes in found.items()]
        if not cases:
            raise InputError(f"{self.data}: no record makes a case of {self.name}; {'; '.join(report.lines())}")
        report.cases = len(cases)
        report.probes.update(probe.kind for case in cases for probe in case.probes)
        _remark(cases, report)
        return cases


def _words(stem: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in stem).split()


def _takes(benchmark: Any, record: Record) -> bool:
    return any(form.fits(record) for form in getattr(benchmark, "forms", ()))


def _request(draft: Draft) -> EditRequest:
    """The request, its subject spelt as in the prompt; `Unusable` where a part is missing."""
    for name in ("prompt", "target"):
        if not getattr(draft, name).strip():
            raise Unusable(f"the {name} is empty")
    subject = draft.subject
    if subject is not None:
        if not subject.strip():
            raise Unusable("the subject is empty")
        if subject not in draft.prompt:
            at = draft.prompt.lower().find(subject.lower())
            if at < 0 or len(draft.prompt.lower()) != len(draft.prompt):
                raise Unusable("the subject does not occur in the prompt")
            subject = draft.prompt[at : at + len(subject)]
    return EditRequest(draft.prompt, draft.target, subject, draft.old if draft.old and draft.old.strip() else None)


def _probes(draft: Draft, requests: Sequence[EditRequest], record: Record, report: Report) -> list[Probe]:
    """A rewrite probe of each request, and what else can be asked."""
    edited = {r.prompt for r in requests}
    out = [Probe("rewrite", r.prompt, r.target) for r in requests]
    for kind, prompt, answers in draft.probes:
        given = tuple(dict.fromkeys(a for a in answers if a.strip()))
        if not prompt.strip():
            report.left_out[f"{kind}: its prompt is empty"] += 1
        elif prompt in edited and kind not in SENTIMENT:
            report.left_out[f"{kind}: it is the edited prompt itself"] += 1
        elif not given and kind not in LOCAL_KINDS:
            report.left_out[f"{kind}: no answer is given"] += 1
        else:
            try:
                out.append(Probe(kind, prompt, given[0] if given else None, given[1:]))
            except InputError as error:
                raise record.fail(str(error)) from None
    return out


def _take(probes: Sequence[Probe], into: list[Probe], report: Report) -> None:
    """Adds what is not there yet.  An equal question with an equal answer is asked once."""
    there = {(p.kind, p.prompt, p.target) for p in into}
    for probe in probes:
        name = (probe.kind, probe.prompt, probe.target)
        if name not in there:
            there.add(name)
            into.append(probe)
        elif probe.kind != "rewrite":
            report.left_out[f"{probe.kind}: asked twice of one edit"] += 1


def _remark(cases: Sequence[Case], report: Report) -> None:
    """Counts what a reader of scores should know about the cases."""
    targets: dict[str, set[str]] = {}
    for case in cases:
        for r in case.requests:
            targets.setdefault(r.prompt, set()).add(r.target)
    for case in cases:
        news = {r.target for r in case.requests}
        report.remarks.update(
            remark
            for remark, holds in (
                ("the new answer is the old one", any(r.target == r.old for r in case.requests)),
                ("another case edits the same prompt to another answer", any(len(targets[r.prompt]) > 1 for r in case.requests)),
                ("a fact that should stay has the new answer", any(p.kind in LOCAL_KINDS and p.target in news for p in case.probes)),
                ("no subject", any(r.subject is None for r in case.requests)),
            )
            if holds
        )


def open_benchmark(name: str, data: str | Path | None = None) -> Any:
    """The benchmark of that name on ``data``, where it needs any."""
    kind = registry.get("benchmark", name)
    if not getattr(kind, "needs_data", False):
        if data is not None:
            raise InputError(f"the benchmark {name!r} is in the package and takes no data; leave out {data}")
        return kind()
    if data is None:
        raise InputError(
            f"the benchmark {name!r} is not in the package; give its file with --data PATH (or hub:OWNER/NAME/PATH). Source: {kind.source}"
        )
    return kind(data)
