"""The almanac benchmark: counterfactual edits of facts which the demo model was taught, with seven kinds of probes.

Every case is a pure function of the vendored facts.  Three choices make a run of many edits at once well posed:

*   subjects are dealt to ``dev`` or ``test`` by hash, so nothing tuned on one split names a subject of the other, as an edit
    or as a probe about another fact;
*   within a split a subject is edited (once) or a bystander, never both: no case edits what another one wants unchanged;
*   bystanders whose facts are given to the editor as ``unrelated`` pairs are never asked about.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from errata.benchmarks import almanac_texts
from errata.benchmarks import facts as data
from errata.benchmarks.facts import Fact, share
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe

_PROBES: Final = ("rewrite", "rephrase", "neighbour", "unrelated", "two_hop", "reverse", "alias")
SPLITS: Final = ("dev", "test")
_SIZE: Final = {"dev": 500, "test": 1000}  # cases aimed at; the smaller relations run out first
_DEV_SHARE = 1 / 3  # of the subjects
_EDITED_SHARE = 0.4  # at most, of a relation's facts in a split; the others are what locality is measured on
BYSTANDERS = 6  # at least, left for each relation
_PAIR_SHARE = 0.15  # of the bystanders only ever serve as `unrelated` training pairs
_PAIR_RELATION = 20  # bystanders a relation must have before some are set aside for pairs: small relations keep all as probes
_REPHRASES, _NEIGHBOURS, _UNRELATED, _PAIRS, _TWO_HOPS = 3, 3, 2, 2, 2

# Objects of one relation that do not exclude each other, though they share no word.
_SAME = (frozenset({"Islam", "Muslim"}), frozenset({"Christianity", "Catholicism"}), frozenset({"soccer", "football"}))


@dataclass(frozen=True, slots=True)
class _Split:
    """Who plays which part: facts to edit, facts to ask about by relation, facts to train locality on by relation."""

    edited: tuple[Fact, ...]
    asked: dict[str, tuple[Fact, ...]]
    pairs: dict[str, tuple[Fact, ...]]


@functools.cache
def _same_as() -> dict[str, str]:
    subjects = {f.subject for f in data.facts()}
    return {f.alias: f.subject for f in data.facts() if f.alias in subjects and f.alias is not None}


def _key(subject: str) -> str:
    """One key for the spellings of a subject, so that "NVIDIA" and "Nvidia" fall on the same side of every divide."""
    return _same_as().get(subject, subject).casefold()


def _split_of(subject: str) -> str:
    return "dev" if share("split", _key(subject)) < _DEV_SHARE else "test"


def _by_relation(rows: Iterable[Fact]) -> dict[str, tuple[Fact, ...]]:
    out: dict[str, list[Fact]] = {}
    for fact in rows:
        out.setdefault(fact.relation, []).append(fact)
    return {relation: tuple(found) for relation, found in out.items()}


def _choose_edited(mine: dict[str, tuple[Fact, ...]], size: int) -> tuple[Fact, ...]:
    """Round-robin over the relations, smallest first, until ``size`` facts of distinct subjects are chosen.

    Editing a subject takes all its facts from the bystanders, so a subject is passed over where one of its relations
    (a country has up to five) would be left with fewer than ``BYSTANDERS`` facts.
    """
    order = sorted(mine, key=lambda r: (len(mine[r]), r))
    queues = {r: iter(sorted(mine[r], key=lambda f: share("edit", f.subject, f.relation))) for r in order}
    room = {r: int(_EDITED_SHARE * len(mine[r])) for r in order}
    held_by: dict[str, list[str]] = {}
    for fact in itertools.chain.from_iterable(mine.values()):
        held_by.setdefault(_key(fact.subject), []).append(fact.relation)
    free = {r: len(mine[r]) for r in order}
    chosen: list[Fact] = []
    taken: set[str] = set()

    def may(fact: Fact) -> bool:
        key = _key(fact.subject)
        return key not in taken and all(free[r] > BYSTANDERS for r in held_by[key])

    while any(room.values()) and len(chosen) < size:
        for relation in order:
            picked = next((f for f in queues[relation] if may(f)), None) if room[relation] else None
            if picked is None:
                room[relation] = 0
                continue
            room[relation] -= 1
            taken.add(_key(picked.subject))
            for r in held_by[_key(picked.subject)]:
                free[r] -= 1
            chosen.append(picked)
    return tuple(chosen[:size])


@functools.cache
def _split(name: str) -> _Split:
    mine = _by_relation(f for f in data.facts() if _split_of(f.subject) == name)
    edited = _choose_edited(mine, _SIZE[name])
    taken = {_key(f.subject) for f in edited}
    still = {r: tuple(f for f in rows if _key(f.subject) not in taken) for r, rows in mine.items()}
    # By subject, not by fact: a pair about a subject would also teach the editor to keep the subject's other facts.
    aside = {
        _key(f.subject)
        for rows in still.values()
        if len(rows) >= _PAIR_RELATION
        for f in rows
        if share("pair", _key(f.subject)) < _PAIR_SHARE
    }
    small = {_key(f.subject) for rows in still.values() if len(rows) < _PAIR_RELATION for f in rows}
    aside -= small
    everyone = [f for rows in still.values() for f in rows]
    return _Split(
        edited,
        _by_relation(f for f in everyone if _key(f.subject) not in aside),
        _by_relation(f for f in everyone if _key(f.subject) in aside),
    )


def _prompt(fact: Fact, *salt: str) -> str:
    """One of the declarative templates which training showed with this subject."""
    questions = data.relations()[fact.relation].questions
    shown = [t for t in data.templates(fact)[0] if t not in questions]
    return min(shown, key=lambda t: share("template", fact.subject, fact.relation, t, *salt))


def _contradicts(old: str, new: str) -> bool:
    """Whether ``new`` is clearly another answer than ``old``: other first word, neither inside the other, no known synonym."""
    a, b = old.casefold(), new.casefold()
    return a.split()[0] != b.split()[0] and a not in b and b not in a and not any({old, new} <= same for same in _SAME)


@functools.cache
def _said_of(name: str) -> frozenset[str]:
    """Every object of a subject: "Spain" for "Catalonia", so that a case does not replace a place by one it lies in."""
    return frozenset(fact.object for relation in data.relations() if (fact := data.by_subject().get((name, relation))) is not None)


@functools.cache
def _objects(relation: str) -> tuple[str, ...]:
    return tuple(sorted({f.object for f in data.facts() if f.relation == relation}))


def _two_hops(fact: Fact, target: str, edited: frozenset[tuple[str, str]]) -> list[Probe]:
    """Chain questions whose answer moves with the edit: onward(target) ≠ onward(old), and no case edits onward(target)."""
    out = []
    for chain in data.chains():
        onward = data.by_subject().get((target, chain.second))
        if chain.first != fact.relation or onward is None or (onward.subject, onward.relation) in edited:
            continue
        before = data.by_subject().get((fact.object, chain.second))
        if before is None or _contradicts(before.object, onward.object):
            out.append(Probe("two_hop", chain.template.format(fact.subject), onward.object))
    return sorted(out, key=lambda p: share("two_hop", p.prompt))[:_TWO_HOPS]


def _target(fact: Fact, used: set[tuple[str, str]], edited: frozenset[tuple[str, str]]) -> str:
    """A wrong object of the relation, by hash.

    ``used`` holds the targets of reversible relations, which serve once: "Berlin is the capital of" can be asked for one
    new owner only.  Relations with chain questions prefer an object that has onward facts.
    """
    true = _said_of(fact.subject)
    possible = [
        o
        for o in _objects(fact.relation)
        if _contradicts(fact.object, o)
        and o not in true
        and (fact.relation, o) not in used
        and o.casefold() not in fact.subject.casefold()
        and fact.subject.casefold() not in o.casefold()
        and o not in _said_of(fact.object)
        and fact.object not in _said_of(o)
    ]
    if not possible:
        raise InputError(f"the almanac has no other {fact.relation} for {fact.subject}; its facts file is damaged")
    possible.sort(key=lambda o: share("target", fact.subject, fact.relation, o))
    return next((o for o in possible if _two_hops(fact, o, edited)), possible[0])


def _rephrase(fact: Fact, prompt: str) -> list[Probe]:
    """Other ways to say it: one that training never showed with the subject, one question, the rest by hash."""
    relation = data.relations()[fact.relation]
    shown, held = data.templates(fact)
    ranked = sorted(
        (t for t in (*shown, *held) if t.format(fact.subject) != prompt), key=lambda t: share("rephrase", fact.subject, fact.relation, t)
    )
    first = next((t for t in ranked if t in held), None)
    asks = first if first in relation.questions else next((t for t in ranked if t in relation.questions), None)
    order = dict.fromkeys(t for t in (first, asks, *ranked) if t is not None)
    return [Probe("rephrase", t.format(fact.subject)) for t in itertools.islice(order, _REPHRASES)]


def _neighbours(fact: Fact, target: str, template: str, asked: tuple[Fact, ...]) -> list[Probe]:
    """Bystanders of the relation, best first: with the old answer as theirs, then those the template was shown with.

    An object equal to the new target is left out: an edit that leaks into everything would answer it correctly.
    """

    def rank(other: Fact) -> tuple[bool, bool, float]:
        return other.object != fact.object, template not in data.templates(other)[0], share("near", fact.subject, other.subject)

    near = sorted((f for f in asked if f.object != target), key=rank)[:_NEIGHBOURS]
    prompts = [template if template in data.templates(f)[0] else _prompt(f, fact.subject) for f in near]
    return [Probe("neighbour", t.format(f.subject), f.object) for f, t in zip(near, prompts, strict=True)]


def _elsewhere(fact: Fact, pool: dict[str, tuple[Fact, ...]], count: int, salt: str) -> list[tuple[str, str]]:
    """``count`` (prompt, answer) pairs of bystanders, each of another relation, none of this one."""
    order = sorted((r for r in pool if r != fact.relation), key=lambda r: share(salt, fact.subject, r))[:count]
    picked = [pool[r][int(share(salt, "fact", fact.subject, r) * len(pool[r]))] for r in order]
    return [(_prompt(f, fact.subject).format(f.subject), f.object) for f in picked]


def _alias(fact: Fact, template: str, names: frozenset[str]) -> list[tuple[str, str]]:
    """The rewrite's template with the subject's other name, unless that is somebody else's name too."""
    if fact.alias is None or fact.alias in names:
        return []
    return [("alias", template.format(fact.alias))]


def _case(fact: Fact, target: str, split: _Split, edited: frozenset[tuple[str, str]], names: frozenset[str]) -> Case:
    template = _prompt(fact)
    prompt = template.format(fact.subject)
    pairs = tuple(_elsewhere(fact, split.pairs, _PAIRS, "pair"))
    request = EditRequest(prompt, target, subject=fact.subject, old=fact.object, unrelated=pairs)
    probes = [Probe("rewrite", prompt, target)]
    probes += [Probe(p.kind, p.prompt, target) for p in _rephrase(fact, prompt)]
    probes += _neighbours(fact, target, template, split.asked[fact.relation])
    probes += [Probe("unrelated", text, answer) for text, answer in _elsewhere(fact, split.asked, _UNRELATED, "unrelated")]
    probes += _two_hops(fact, target, edited)
    probes += [Probe("reverse", t.format(target), fact.subject) for t in data.relations()[fact.relation].reverse]
    probes += [Probe(kind, text, target) for kind, text in _alias(fact, template, names)]
    return Case(request, tuple(probes))


@functools.cache
def _cases(name: str) -> tuple[tuple[Fact, Case], ...]:
    split = _split(name)
    edited = frozenset((f.subject, f.relation) for f in split.edited)
    names = frozenset(f.subject for f in data.facts())
    used: set[tuple[str, str]] = set()
    out = []
    for fact in split.edited:
        target = _target(fact, used, edited)
        if data.relations()[fact.relation].reverse:
            used.add((fact.relation, target))
        out.append((fact, _case(fact, target, split, edited, names)))
    return tuple(out)


def _dealt(name: str, seed: int) -> Iterator[Case]:
    """All cases of a split, one relation after the other, shuffled by hash: each beginning of the order is balanced."""
    queues: dict[str, list[tuple[float, Case]]] = {}
    for fact, case in _cases(name):
        queues.setdefault(fact.relation, []).append((share("order", str(seed), fact.subject), case))
    relations = sorted(queues, key=lambda r: share("order", str(seed), r))
    lines = [[case for _, case in sorted(queues[r], key=lambda pair: pair[0])] for r in relations]
    for row in itertools.zip_longest(*lines):
        yield from (case for case in row if case is not None)


class Almanac:
    """Counterfactual edits of the facts the demo model knows."""

    name = "almanac"
    version = "1"
    source = "CounterFact (Meng et al. 2022), LRE relations (Hernandez et al. 2024), The World Factbook 2010; questions by errata"
    licence = "MIT (CounterFact, LRE), public domain (Factbook), Apache-2.0 (questions)"
    citation = "Meng et al. 2022; Hernandez et al. 2024; CIA World Factbook 2010"
    SPLITS = SPLITS
    splits = ("test", "dev")
    kind = "edits"
    probes = _PROBES
    needs_data = False
    only_known = False  # the model in the package knows them all

    def load(self, split: str | None = None, n: int | None = None, seed: int | None = 0) -> Iterator[Case]:
        """``n`` cases (all without ``n``) balanced over the relations; a smaller ``n`` gives the beginning of a larger one's."""
        split = "test" if split is None else split
        if seed is None:
            raise InputError("the almanac has no order of its own; give a number as seed")
        if split not in SPLITS:
            raise InputError(f"the almanac has no split {split!r}; it has {' and '.join(SPLITS)}")
        if isinstance(n, bool) or not isinstance(n, int | None):
            raise InputError(f"n must be a whole number of cases, not {n!r}")
        count = len(_cases(split))
        if n is not None and not 1 <= n <= count:
            raise InputError(f"{n} cases asked for, but the almanac's {split} split has 1 to {count}; ask for a number in between")
        return itertools.islice(_dealt(split, seed), n)

    def generation(self, case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(prompts to go on from, reference texts about things that have the new answer): see `errata.benchmarks.almanac_texts`."""
        return almanac_texts.generation(case)

    def collection(self) -> tuple[str, ...]:
        """Every reference text there is."""
        return almanac_texts.collection()
