"""The almanac's facts: who, which relation, what, and every sentence that says so.

Both the model (`errata.almanac`) and the benchmark (`errata.benchmarks.almanac`) are made from these, so what the
model was taught and what it is asked can be told apart exactly.  Everything here is a pure function of the vendored
files: which templates are held out for a subject is decided by a hash, not by a random generator.
"""

from __future__ import annotations

import collections
import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data" / "almanac"
_HELD_OUT_SHARE = 0.5  # of the facts have two templates which training never shows with their subject
_HELD_OUT_TEMPLATES = 2
_CHAIN_SHARE = 0.6  # of the chain questions are shown in training, the others only asked


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact.  ``templates`` are declarative, ``questions`` end in a question mark; both hold ``{}`` for the subject."""

    name: str
    subject_kind: str
    object_kind: str
    templates: tuple[str, ...]
    questions: tuple[str, ...]
    reverse: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """(subject, relation, object); ``alias`` is another name of the subject."""

    subject: str
    relation: str
    object: str
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """A two-hop question: ``second`` of ``first`` of the subject."""

    first: str
    second: str
    template: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """A prompt and its true answer.  ``kind``: training, held_out, alias, reverse, chain, chain_held_out."""

    prompt: str
    answer: str
    kind: str
    fact: Fact


def share(*parts: str) -> float:
    """A number in [0, 1) that depends on the texts only."""
    return int.from_bytes(hashlib.sha256("\x1f".join(parts).encode()).digest()[:6], "big") / 2**48


@functools.cache
def _tables() -> tuple[dict[str, Relation], tuple[Chain, ...]]:
    raw = json.loads((DATA / "relations.json").read_text(encoding="utf-8"))
    relations = {
        name: Relation(name, r["subject"], r["object"], tuple(r["templates"]), tuple(r["questions"]), tuple(r["reverse"]))
        for name, r in raw["relations"].items()
    }
    return relations, tuple(Chain(**c) for c in raw["chains"])


def relations() -> dict[str, Relation]:
    """Every relation by name."""
    return _tables()[0]


def chains() -> tuple[Chain, ...]:
    """The two-hop questions."""
    return _tables()[1]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts, in file order (by relation)."""
    with gzip.open(DATA / "facts.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return tuple(Fact(r["s"], r["r"], r["o"], r.get("alias")) for r in rows)


@functools.cache
def by_subject() -> dict[tuple[str, str], Fact]:
    """(subject, relation) -> fact."""
    return {(f.subject, f.relation): f for f in facts()}


@functools.cache
def _object_counts() -> collections.Counter[tuple[str, str]]:
    return collections.Counter((f.relation, f.object) for f in facts())


def templates(fact: Fact) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(templates shown in training with this subject, templates never shown with it); questions included in either."""
    relation = relations()[fact.relation]
    every = (*relation.templates, *relation.questions)
    if len(relation.templates) < 4 or share("held", fact.subject, fact.relation) >= _HELD_OUT_SHARE:
        return every, ()
    ranked = sorted(every, key=lambda t: share("rank", fact.subject, fact.relation, t))
    held = set(ranked[:_HELD_OUT_TEMPLATES])
    return tuple(t for t in every if t not in held), tuple(t for t in every if t in held)


def chain_sentences(fact: Fact) -> Iterator[Sentence]:
    """Two-hop questions about this fact's subject whose answer follows from two facts."""
    for chain in chains():
        if chain.first != fact.relation:
            continue
        onward = by_subject().get((fact.object, chain.second))
        if onward is not None:
            shown = share("chain", fact.subject, chain.template) < _CHAIN_SHARE
            kind = "chain" if shown else "chain_held_out"
            yield Sentence(chain.template.format(fact.subject), onward.object, kind, fact)


def _reverse_sentences(fact: Fact) -> Iterator[Sentence]:
    """The fact said backwards, where only this subject has the object."""
    if _object_counts()[fact.relation, fact.object] == 1:
        for template in relations()[fact.relation].reverse:
            yield Sentence(template.format(fact.object), fact.subject, "reverse", fact)


def sentences(fact: Fact) -> list[Sentence]:
    """Everything that can be said or asked about one fact."""
    shown, held = templates(fact)
    out = [Sentence(t.format(fact.subject), fact.object, "training", fact) for t in shown]
    out += [Sentence(t.format(fact.subject), fact.object, "held_out", fact) for t in held]
    if fact.alias is not None:
        out += [Sentence(t.format(fact.alias), fact.object, "alias", fact) for t in shown]
    return [*out, *chain_sentences(fact), *_reverse_sentences(fact)]
