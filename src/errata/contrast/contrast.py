"""`find`: contrast for one request, in two halves that never mix.  `fill`: the training half into requests.

An edit of one subject easily moves the answers about others.  So an editor is shown some of them (`EditRequest.contrast`), and others,
which no editor is ever shown, are asked before and after (`errata.score.neighbours`).  A hash of the name decides which half it is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from errata.contrast.names import COUNT, Names, may_train, of_model
from errata.contrast.nearest import Candidate, Nearest
from errata.core.bank import Stack
from errata.core.model import LM
from errata.request import EditRequest
from errata.subjects import names_in

_CONFIDENT = 0.15  # probability of the base's first token
_DOUBTFUL = 0.05  # the least, where too few are answered with confidence
_TOKENS = 4  # of an answer


@dataclass(frozen=True)
class Neighbour:
    """Another subject in the edited prompt, and what the base says there.

    similarity, confidence   see `errata.contrast.nearest`
    """

    subject: str
    prompt: str
    answer: str
    similarity: float
    confidence: float


@dataclass(frozen=True)
class Contrast:
    """``training`` may be shown to an editor, ``watch`` is only ever asked; nearest first.  ``looked_at``: candidates there were."""

    training: tuple[Neighbour, ...]
    watch: tuple[Neighbour, ...]
    looked_at: int


def find(lm: LM, request: EditRequest, *, count: int = COUNT, names: Names | None = None, exclude: Iterable[str] = ()) -> Contrast:
    """Up to ``count`` neighbours in each half: the nearest of those that the base answers with confidence (`_CONFIDENT`, `_DOUBTFUL`).

    ``exclude``: texts whose subjects are no neighbours (probes; what other requests write).  Empty for a request without a subject.
    """
    if request.subject is None:
        return Contrast((), (), 0)
    names = names or of_model(lm.name)
    banned = tuple(dict.fromkeys(text for text in (*exclude, *_shown(request)) if text))
    key = ("contrast", request.prompt, request.subject, request.target, count, names.digest, hash(banned))
    if key not in lm.base_cache:
        lm.base_cache[key] = _find(lm, request, count, names, banned)
    out: Contrast = lm.base_cache[key]
    return out


def _shown(request: EditRequest) -> tuple[str, ...]:
    """What an editor is shown of a request beside its prompt."""
    return (*request.paraphrases, *request.aliases, *(p for p, _ in (*request.unrelated, *request.contrast)))


def _find(lm: LM, request: EditRequest, count: int, names: Names, banned: Sequence[str]) -> Contrast:
    near = Nearest(lm, request, names, banned)
    halves = [_chosen([c for c in near.found if may_train(c.name) == training], count) for training in (True, False)]
    shown = [c.name for c in halves[0]]  # "Guinea" may train and "Papua New Guinea" not: then it is no witness either
    halves[1] = [c for c in halves[1] if not names_in(c.name, shown) and not names_in("\n".join(shown), [c.name])]
    both = [c for half in halves for c in half]
    said = dict(zip((c.prompt for c in both), near.answers(both, _TOKENS), strict=True))
    training, watch = ([_neighbour(c, said[c.prompt]) for c in half if _tells(said[c.prompt], request.target)][:count] for half in halves)
    return Contrast(tuple(training), tuple(watch), len(near.found))


def _chosen(half: Sequence[Candidate], count: int) -> list[Candidate]:
    """The nearest that are answered with confidence, or with some where those are too few; a few to spare, as some answers tell nothing."""
    sure = [c for c in half if c.confidence >= _CONFIDENT]
    rest = sorted((c for c in half if _DOUBTFUL <= c.confidence < _CONFIDENT), key=lambda c: -c.confidence)
    return sorted([*sure, *rest[: max(0, count - len(sure))]], key=lambda c: -c.similarity)[: count + count // 4]


def _neighbour(c: Candidate, answer: str) -> Neighbour:
    return Neighbour(c.name, c.prompt, answer.strip(), round(c.similarity, 4), round(c.confidence, 4))


def _tells(answer: str, target: str) -> bool:
    """Whether an answer says something, and not what the edit will say."""
    return bool(answer.strip()) and not names_in(answer, [target.strip()]) and not names_in(target, [answer.strip()])


def fill(
    lm: LM,
    requests: Sequence[EditRequest],
    count: int,
    *,
    on: Stack = (),
    exclude: Iterable[str] = (),
    names: Names | None = None,
) -> list[EditRequest]:
    """Requests with up to ``count`` pairs of the training half each; one that brings ``unrelated`` or ``contrast``, or that names no
    subject, stays as it is.

    No pair is about a subject that ``exclude``, another of the requests or a patch of ``on`` is about: it would undo what those write.
    """
    if count < 1 or all(r.subject is None or r.unrelated or r.contrast for r in requests):
        return list(requests)
    given, out = ("\n".join(exclude), "\n".join(r.prompt for patch in on for r in patch.requests)), []
    prompts = [r.prompt for r in requests]
    for request in requests:
        if request.subject is None or request.unrelated or request.contrast:
            out.append(request)
            continue
        others = [p for p in prompts if p != request.prompt]
        found = find(lm, request, count=count, names=names, exclude=(*given, "\n".join(others)))
        out.append(replace(request, contrast=tuple((n.prompt, n.answer) for n in found.training)))
    return out
