"""What the almanac offers to measure longer text: beginnings about an edited subject, and texts about things that have the new answer.

Pure functions of the vendored facts, like the cases themselves.
"""

from __future__ import annotations

import functools

from errata.benchmarks import facts as data
from errata.benchmarks.facts import Fact, share
from errata.errors import InputError
from errata.request import Case

_TEMPLATES = 2  # beginnings besides the bare name


def _fact_of(case: Case) -> Fact:
    """The fact that a case edits, found again from its request."""
    request = case.request
    for name, relation in data.relations().items():
        fact = data.by_subject().get((request.subject or "", name))
        if fact is not None and fact.object == request.old and any(t.format(fact.subject) == request.prompt for t in relation.templates):
            return fact
    raise InputError(f"request {request.prompt!r} is not a case of the almanac; its generation prompts are made from the almanac's facts")


@functools.cache
def _documents() -> dict[str, str]:
    """subject -> every sentence that training showed about it, in file order: one text a thing."""
    said: dict[str, list[str]] = {}
    for fact in data.facts():
        said.setdefault(fact.subject, []).extend(f"{s.prompt} {s.answer}." for s in data.sentences(fact) if s.kind == "training")
    return {subject: " ".join(lines) for subject, lines in said.items()}


@functools.cache
def _having(relation: str, answer: str) -> tuple[str, ...]:
    return tuple(f.subject for f in data.facts() if f.relation == relation and f.object == answer)


def collection() -> tuple[str, ...]:
    """Every reference text, one a subject."""
    return tuple(_documents().values())


def generation(case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts, references).

    prompts     the subject's name, and a declarative template each of up to `_TEMPLATES` other relations that it has or that
                are about its kind of thing; those it has come first, the rest by hash.  Never the edited prompt, another
                probe's or a training pair's.
    references  the training texts of all subjects whose object of the edited relation truly is the new one
    """
    fact, request = _fact_of(case), case.request
    kind = data.relations()[fact.relation].subject_kind
    taken = {request.prompt, *request.paraphrases, *(p for p, _ in request.unrelated), *(p.prompt for p in case.probes)}
    ranked = sorted(
        ((fact.subject, name) not in data.by_subject(), share("generation", fact.subject, name), name) for name in data.relations()
    )
    prompts = [fact.subject]
    for strange, _, name in ranked:
        relation = data.relations()[name]
        if name == fact.relation or (strange and relation.subject_kind != kind):
            continue
        order = sorted(relation.templates, key=lambda t: share("generation", fact.subject, name, t))
        prompts += [p for t in order if (p := t.format(fact.subject)) not in taken][:1]
        if len(prompts) > _TEMPLATES:
            break
    documents = _documents()
    return tuple(prompts), tuple(documents[subject] for subject in _having(fact.relation, request.target))
