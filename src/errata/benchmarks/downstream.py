"""Benchmarks without edits, to ask of a model before and after: PIQA (choose), Natural Questions (answer), known1000 (facts to trace)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from errata.benchmarks.files import FileData, RecordFormat
from errata.benchmarks.records import Record, locate
from errata.errors import InputError
from errata.request import read_bytes

_UNKNOWN = -1  # the answer of a choice whose label stands beside it


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """A prompt and ways to go on, of which number ``answer`` is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its accepted answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A fact as a model is known to tell it."""

    prompt: str
    subject: str
    answer: str


def _whole(record: Record, key: str) -> str:
    text = record.text(key)
    if not text.strip():
        raise record.fail(f"{key} is empty; remove the record")
    return text


def _choice(record: Record) -> MultipleChoice:
    label = record.values.get("label", _UNKNOWN)
    if "label" in record and (isinstance(label, bool) or label not in (0, 1)):
        raise record.fail(f"label must be 0 or 1, not {label!r}")
    return MultipleChoice(_whole(record, "goal"), (_whole(record, "sol1"), _whole(record, "sol2")), label)


def _question(record: Record) -> Question:
    answers = record.answers("answer")
    if not answers:
        raise record.fail("answer is empty; remove the record")
    return Question(_whole(record, "question"), answers)


def _known(record: Record) -> Known:
    prompt, subject = _whole(record, "prompt"), _whole(record, "subject")
    if subject not in prompt:
        raise record.fail(f"subject {subject!r} does not occur in prompt {prompt!r}")
    return Known(prompt, subject, _whole(record, "attribute"))


class PIQA(FileData[MultipleChoice]):
    """Physical commonsense: which of two solutions reaches a goal.  The labels stand beside valid.jsonl, or in the records (hub)."""

    kind = "choices"
    name = "piqa"
    version = "1"
    source = "valid.jsonl and valid-labels.lst of yonatanbisk.com/piqa"
    licence = "AFL-3.0"
    citation = "Bisk et al. 2020 (PIQA, arXiv 1911.11641)"
    splits = ("valid", "train")
    forms = (RecordFormat.of("PIQA", _choice, "goal sol1 sol2", "label", "id"),)

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[MultipleChoice]:
        """As `FileBenchmark.load`; ids are the goals."""
        form, records = self.records(split)
        items = [form.make(record) for record in records]
        if any("label" not in record for record in records):
            items = self._labelled(items, Path(records[0].where.rpartition(": record ")[0]))
        return self.dealt(items, [c.prompt for c in items], n, seed)

    def _labelled(self, items: list[MultipleChoice], path: Path) -> list[MultipleChoice]:
        beside = path.with_name(f"{path.stem}-labels.lst")
        if not beside.exists() and str(self.data).startswith("hub:"):
            beside = locate(str(self.data).replace(f"{path.name}", beside.name))
        if not beside.exists():
            raise InputError(f"{path}: has no labels; put {beside.name} (0 or 1 a line) beside it")
        lines = read_bytes(beside).decode("utf-8", "replace").split()
        if len(lines) != len(items):
            raise InputError(f"{beside}: {len(lines)} labels for {len(items)} records of {path.name}; both must be whole")
        for i, line in enumerate(lines):
            if line not in ("0", "1"):
                raise InputError(f"{beside}:{i + 1}: a label must be 0 or 1, not {line!r}")
        return [MultipleChoice(item.prompt, item.choices, int(line)) for item, line in zip(items, lines, strict=True)]


class _Each(FileData[Any]):
    """Records that are items by themselves."""

    id_field: ClassVar[str]

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[Any]:
        """As `FileBenchmark.load`."""
        form, records = self.records(split)
        return self.dealt([form.make(record) for record in records], [record.text(self.id_field) for record in records], n, seed)


class NQOpen(_Each):
    """Questions people asked a search engine, with short answers."""

    kind = "questions"
    name = "nq-open"
    version = "1"
    source = "NQ-open.dev.jsonl of google-research-datasets/natural-questions"
    licence = "CC BY-SA 3.0"
    citation = "Kwiatkowski et al. 2019 (Natural Questions); Lee et al. 2019 (open form)"
    splits = ("dev", "train")
    forms = (RecordFormat.of("NQ-open", _question, "question answer"),)
    id_field = "question"


class Known1000(_Each):
    """Facts that GPT-2 XL tells, for causal tracing."""

    kind = "facts"
    name = "known1000"
    version = "1"
    source = "known_1000.json of ROME"
    licence = "MIT"
    citation = "Meng et al. 2022 (ROME, arXiv 2202.05262)"
    splits = ("known",)
    forms = (RecordFormat.of("known1000", _known, "subject attribute prompt", unused="known_id template prediction relation_id"),)
    id_field = "prompt"
