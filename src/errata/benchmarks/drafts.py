"""From what a record says (`Draft`) to requests and probes, with a count by reason of what could not be used (`LoadReport`)."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.benchmarks.records import Record
from errata.benchmarks.streams import overwritten
from errata.errors import InputError
from errata.request import LOCAL_KINDS, SENTIMENT, Case, EditRequest, Probe, fill
from errata.subjects import spell


class UnusableRecord(Exception):
    """A record that is well formed but makes no case; the message is the reason it is counted under."""


@dataclass(slots=True)
class Draft:
    """What a record says, before it is checked.

    more      further edits that belong to the same change
    openings  prompts to go on from at length, where generation is measured
    aliases   other names of the subject, on which an editor may train
    """

    prompt: str
    target: str
    subject: str | None = None
    old: str | None = None
    probes: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    more: tuple[Draft, ...] = ()
    openings: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def ask(self, kind: str, prompt: str, *answers: str) -> None:
        """One probe; ``answers`` best first, all accepted."""
        self.probes.append((kind, prompt, answers))


def ask_two_hop(draft: Draft, record: Record) -> None:
    """EasyEdit's ``portability``, where the record has it: a question through the new answer."""
    if "portability" in record:
        hop = record.inner("portability").only("Recalled Relation", "New Question", "New Answer")
        draft.ask("two_hop", hop.text("New Question"), *hop.answers("New Answer"))


@dataclass(slots=True)
class LoadReport:
    """What became of the records of a file.

    repeated   cases left out because an earlier one edits the same fact (``consistent``)
    dropped    reason -> records that made no case
    probes     kind -> probes of all cases
    left_out   "kind: reason" -> probes that were not taken
    remarks    what is odd about what was taken
    """

    form: str
    records: int
    cases: int = 0
    joined: int = 0
    repeated: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    probes: collections.Counter[str] = field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    remarks: collections.Counter[str] = field(default_factory=collections.Counter)

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        out = [f"{_many(self.records, 'record')} ({self.form}), {_many(self.cases, 'case')}"]
        if self.joined:
            out.append(f"{_many(self.joined, 'record')} of an edit that an earlier record also asks for: the probes joined its case")
        if self.repeated:
            out.append(f"left out {_many(self.repeated, 'case')} of a fact that an earlier case edits (consistent)")
        out += [f"dropped {_many(count, 'record')}: {reason}" for reason, count in self.dropped.most_common()]
        out += [f"left out {_many(count, 'probe')}: {reason}" for reason, count in self.left_out.most_common()]
        return out + [f"{_many(count, 'case')}: {remark}" for remark, count in self.remarks.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        counts = {name: dict(getattr(self, name)) for name in ("dropped", "probes", "left_out", "remarks")}
        repeated = {"repeated": self.repeated} if self.repeated else {}
        return {"form": self.form, "records": self.records, "cases": self.cases, "joined": self.joined, **repeated, **counts}


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def request(draft: Draft) -> EditRequest:
    """The request, its subject spelt as in the prompt; `UnusableRecord` where a part is missing."""
    for name in ("prompt", "target"):
        if not getattr(draft, name).strip():
            raise UnusableRecord(f"the {name} is empty")
    subject = draft.subject
    if subject is not None:
        if not subject.strip():
            raise UnusableRecord("the subject is empty")
        try:
            subject = spell(draft.prompt, subject)
        except InputError:
            raise UnusableRecord("the subject does not occur in the prompt") from None
    old = draft.old if draft.old and draft.old.strip() else None
    return EditRequest(draft.prompt, draft.target, subject, old, aliases=draft.aliases)


def probes(draft: Draft, requests: Sequence[EditRequest], record: Record, report: LoadReport) -> list[Probe]:
    """A rewrite probe of each request, and what else can be asked."""
    edited = {r.prompt for r in requests}
    renamed = {fill(r, name) for r in requests for name in r.aliases}
    out = [Probe("rewrite", r.prompt, r.target) for r in requests]
    for kind, prompt, answers in draft.probes:
        given = tuple(dict.fromkeys(a for a in answers if a.strip()))
        if not prompt.strip():
            report.left_out[f"{kind}: its prompt is empty"] += 1
        elif prompt in edited and kind not in SENTIMENT:
            report.left_out[f"{kind}: it is the edited prompt itself"] += 1
        elif prompt in renamed:
            report.left_out[f"{kind}: it is the prompt under an alias, which may be trained on"] += 1
        elif not given and kind not in LOCAL_KINDS:
            report.left_out[f"{kind}: no answer is given"] += 1
        else:
            try:
                out.append(Probe(kind, prompt, given[0] if given else None, given[1:]))
            except InputError as error:
                raise record.fail(str(error)) from None
    return out


def take(probes: Sequence[Probe], into: list[Probe], report: LoadReport) -> None:
    """Adds what is not there yet.  An equal question with an equal answer is asked once."""
    there = {(p.kind, p.prompt, p.target) for p in into}
    for probe in probes:
        name = (probe.kind, probe.prompt, probe.target)
        if name not in there:
            there.add(name)
            into.append(probe)
        elif probe.kind != "rewrite":
            report.left_out[f"{probe.kind}: asked twice of one edit"] += 1


def remark(cases: Sequence[Case], report: LoadReport) -> None:
    """Counts what a reader of scores should know about the cases."""
    targets: dict[str, set[str]] = {}
    for case in cases:
        for r in case.requests:
            targets.setdefault(r.prompt, set()).add(r.target)
    if late := overwritten(cases):
        report.remarks["a later case writes the same fact otherwise (`consistent` leaves one case a fact)"] = len(late)
    for case in cases:
        news = {r.target for r in case.requests}
        report.remarks.update(
            words
            for words, holds in (
                ("the new answer is the old one", any(r.target == r.old for r in case.requests)),
                ("another case edits the same prompt to another answer", any(len(targets[r.prompt]) > 1 for r in case.requests)),
                (
                    "a fact that should stay is edited by another case",
                    any(p.kind in LOCAL_KINDS and targets.get(p.prompt, set()) - {p.target} for p in case.probes),
                ),
                ("a fact that should stay has the new answer", any(p.kind in LOCAL_KINDS and p.target in news for p in case.probes)),
                ("no subject", any(r.subject is None for r in case.requests)),
            )
            if holds
        )
