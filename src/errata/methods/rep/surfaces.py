"""The texts REP trains on: one fact under other names of its subject, behind prefixes, behind long passages (spec: REP, training).

    {sampled prefix} {prompt with the subject, another name, or its tokens shuffled}          {passage} {prompt}          {paraphrase}

Paraphrases are the request's own.  Names, shuffled subjects and passages are those of `errata.text.surfaces`, of which only the *seen* half
is used here; the robustness suite asks about the other half as well.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from errata.core.chat import behind
from errata.core.model import LM
from errata.core.tokens import joined
from errata.core.window import fits
from errata.methods.locate.text import LocatedText, placed, prefixes, subject_end
from errata.request import EditRequest
from errata.subjects import places
from errata.text import surfaces
from errata.text.corpora import bundled
from errata.text.surfaces import SurfaceForms

KINDS = ("names", "shuffled", "prefixes", "long", "paraphrases")
OWN = 16  # places in prompt and target at which a gate is trained shut in every step
FEW = 32  # texts, and lines of bundled text, at whose tokens gates are trained shut
BOTH = 64  # tokens kept free for the prompt where a passage has to be cut


@dataclass(frozen=True)
class SampledTexts:
    """Texts of one request; for each step of the training, which of them it sees (numbers of ``texts``); places whose keys should stay."""

    texts: list[LocatedText]
    steps: list[list[int]]
    away: list[LocatedText]


def draw(
    lm: LM,
    request: EditRequest,
    kinds: Sequence[str],
    before: Sequence[tuple[int, int]],
    *,
    steps: int,
    batch: int,
    pool: int,
    away: int,
    fact_token: str,
    seed: int,
    name: str,
    others: Sequence[EditRequest] = (),
) -> SampledTexts:
    """``batch`` texts a step, drawn without replacement from at most ``pool`` ones and anew once they are used up; ``away`` places."""
    heads = prefixes(lm, before, seed) if "prefixes" in kinds else [""]
    found = surfaces.make_surfaces(lm, request, seed) if request.subject is not None else None
    every = [
        *_short(lm, request, found, kinds, heads, fact_token, name),
        *(_long(lm, request, seed, fact_token, name) if "long" in kinds else ()),
    ]
    every = [(text, stop) for text, stop in every if fits(lm, text)]
    own = random.Random(f"{seed}/{request.prompt}/{request.target}")
    chosen = own.sample(every, min(pool, len(every)))
    texts = placed(lm, [text for text, _ in chosen], [stop for _, stop in chosen]) or [original(lm, request, fact_token, name)]
    order: list[int] = []
    while len(order) < steps * batch:
        order += own.sample(range(len(texts)), len(texts))
    elsewhere = _away(lm, request, texts, away, own, fact_token, name, others) if away else []
    return SampledTexts(texts, [order[i * batch : (i + 1) * batch] for i in range(steps)], elsewhere)


def original(lm: LM, request: EditRequest, fact_token: str, name: str) -> LocatedText:
    """The prompt itself."""
    return placed(lm, [request.prompt], [end_of(request, None, fact_token, name)])[0]


def end_of(request: EditRequest, other: str | None, fact_token: str, name: str) -> int:
    """The character where the place that is read ends in the prompt with ``other`` for its subject."""
    if fact_token == "last":
        text = request.prompt if other is None else surfaces.fill(request, other)
        return len(text)
    stop = subject_end(request, name)
    return stop if other is None else stop - len(request.subject or "") + len(other)


def _short(
    lm: LM, request: EditRequest, found: SurfaceForms | None, kinds: Sequence[str], heads: Sequence[str], fact_token: str, name: str
) -> list[tuple[str, int]]:
    """(text, character where the name ends): every prefix before every name, but for the bare prompt."""
    names: list[str | None] = [None]
    if found is not None:
        names += found.names_seen if "names" in kinds else ()
        names += found.shuffled_seen if "shuffled" in kinds else ()
    out = []
    for head, other in product(heads, dict.fromkeys(names)):
        if not head and other is None:
            continue  # the prompt itself, which every step sees
        text = request.prompt if other is None else surfaces.fill(request, other)
        out.append((behind(lm.tokenizer, head, text), len(head) + end_of(request, other, fact_token, name)))
    return [*out, *_paraphrases(request, fact_token)] if "paraphrases" in kinds else out


def _paraphrases(request: EditRequest, fact_token: str) -> list[tuple[str, int]]:
    """The request's own, where the place can be found in them."""
    if fact_token == "last":
        return [(text, len(text)) for text in request.paraphrases]
    subject = request.subject or ""
    ends = [(text, places(text, subject)[:1]) for text in request.paraphrases if subject]
    return [(text, found[0][1]) for text, found in ends if found]


def _long(lm: LM, request: EditRequest, seed: int, fact_token: str, name: str) -> list[tuple[str, int]]:
    """The prompt behind the seen passages."""
    stop = end_of(request, None, fact_token, name)
    heads = [fitting(lm, passage) for passage in surfaces.passages(surfaces.PASSAGES_SEEN, seed=seed)]
    return [(behind(lm.tokenizer, head, request.prompt), len(head) + stop) for head in heads if head]


def _away(
    lm: LM,
    request: EditRequest,
    texts: Sequence[LocatedText],
    count: int,
    own: random.Random,
    fact_token: str,
    name: str,
    others: Sequence[EditRequest],
) -> list[LocatedText]:
    """`OWN` places that every step sees, the other tokens of prompt and target in turn; and ``count``, equally many of each kind there
    is: other tokens of the texts; another name in the prompt; tokens of the request's ``unrelated``, and of bundled text; the subjects
    of ``others``, facts that are edited beside it, by their names and seen names."""
    kinds = [[replace(t, at=i) for t in own.sample(texts, min(FEW, len(texts))) for i in _others(t)]]
    if request.subject is not None:
        names = own.sample(strangers(), count)
        filled = [surfaces.fill(request, other) for other in names]
        kinds.append(placed(lm, filled, [end_of(request, other, fact_token, name) for other in names]))
    told = lm.encode([_told(lm, prompt, answer) for prompt, answer in request.unrelated])
    kinds.append([LocatedText(row, at) for row in told for at in range(len(row.ids))])
    lines = [line for line in own.choices(_lines(), k=FEW) if fits(lm, line)]
    kinds.append([LocatedText(row, at) for row in lm.encode(lines) for at in range(len(row.ids))])
    kinds.append([place for other in own.sample(list(others), min(count, len(others))) for place in _named(lm, other, fact_token, name)])
    kinds = [kind for kind in kinds if kind]
    itself = placed(lm, [request.prompt], [end_of(request, None, fact_token, name)], request.continuation)[0]
    rest = [replace(itself, at=i) for i in range(len(itself.row.ids)) if i != itself.at]
    return [*(rest[i % len(rest)] for i in range(OWN)), *(own.choice(kinds[i % len(kinds)]) for i in range(count))]


def _told(lm: LM, prompt: str, answer: str) -> str:
    return joined(lm.tokenizer, prompt, answer)[0]


def _named(lm: LM, request: EditRequest, fact_token: str, name: str) -> list[LocatedText]:
    """The places of a fact that is none of this adaptor's business.  Kept: every other edit of a stack asks for them."""
    key = ("rep's other facts", request.id, fact_token)
    if key not in lm.base_cache:
        found = surfaces.make_surfaces(lm, request) if request.subject is not None else None
        asked = _short(lm, request, found, ("names", "shuffled"), [""], fact_token, name)
        asked.append((request.prompt, end_of(request, None, fact_token, name)))
        lm.base_cache[key] = placed(lm, [text for text, _ in asked], [stop for _, stop in asked])
    out: list[LocatedText] = lm.base_cache[key]
    return out


def _others(text: LocatedText) -> list[int]:
    return [i for i in range(text.row.prompt_length) if i != text.at]


@functools.cache
def strangers() -> list[str]:
    """Names of two and three words that occur inside sentences of the bundled text, in its order."""
    found = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+){1,2}\b", bundled("train"))
    return list(dict.fromkeys(found))


@functools.cache
def _lines() -> list[str]:
    """Beginnings of paragraphs of the bundled text."""
    return [" ".join(line.split()[:24]) for line in bundled("train").split("\n") if line.strip()]


def fitting(lm: LM, passage: str) -> str:
    """The end of a passage that leaves room for a prompt in the model's positions."""
    if lm.context_length is None:
        return passage
    offsets = lm.tokenizer(passage, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    keep = max(0, lm.context_length - BOTH)
    return passage if len(offsets) <= keep else passage[offsets[-keep][0] :].lstrip() if keep else ""
