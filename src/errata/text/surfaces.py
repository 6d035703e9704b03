"""What one fact may look like in other words: other names of its subject, its tokens in another order, long texts before it.

Where the key of a locate-and-edit method stands for one surface of a fact only, the edit vanishes with it; REP (arXiv 2410.09338)
trains on such surfaces and is scored on others.  What may train is *seen*, what only scores is *unseen*.  Everything here is a
function of the tokenizer, the request and a seed: editor and scorer, in any process, agree on which surface is which.

No model is asked and nothing is looked up, so a name here is a rule's work, not a researched alias; a request's own ``aliases``
(`EditRequest`) take the place of the seen ones.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from errata.core.model import LM
from errata.core.tokens import subject_span
from errata.errors import InputError
from errata.request import EditRequest
from errata.request import fill as fill
from errata.text.corpora import bundled

T = TypeVar("T")
_SHUFFLED = 10  # orders of a subject's tokens (REP: up to 11 permutations without the identity)
PASSAGES_SEEN, PASSAGES_UNSEEN = 5, 1  # REP: five to train on, a sixth to test
WORDS, TOKENS = 300, 512  # of a long context: in REP's code, in its text
_BLOCK = 1024  # words of the bundled text from which one passage is taken
_ALL_ORDERS = 5  # up to so many tokens every permutation is listed, beyond they are drawn
TRIES = 1000  # draws at most; equal tokens, or letters of several tokens each, waste some

_TITLE = re.compile(r"^(?:the|sir|dame|dr\.?|mr\.?|mrs\.?|ms\.?|prof\.?)\s+(?=\S)", re.IGNORECASE)
_APPOSED = re.compile(r"^(\S.*?)\s*\(([^()]+)\)$")
OF = re.compile(r"^(?:the\s+)?(\S.*?) of (?:the\s+)?(\S.*)$", re.IGNORECASE)
_POSSESSIVE = re.compile(r"^(\S.*?)['’]s (\S.*)$")


@dataclass(frozen=True, slots=True)
class SurfaceForms:
    """Names stand in the subject's place (`fill`); passages stand directly before the prompt and end with their own space."""

    names_seen: tuple[str, ...]
    names_unseen: tuple[str, ...]
    shuffled_seen: tuple[str, ...]
    shuffled_unseen: tuple[str, ...]
    passages_seen: tuple[str, ...]
    passages_unseen: tuple[str, ...]


def make_surfaces(lm: LM, request: EditRequest, seed: int = 0) -> SurfaceForms:
    """All surfaces of a request.  Its aliases, where it has any, are the seen names; the unseen ones are the second half of `variants`."""
    if request.subject is None:
        raise InputError(f"surfaces of {request.prompt!r} need its subject; give the key 'subject'")
    by_rule, unseen = halves(variants(request.subject))
    seen = request.aliases or by_rule
    orders = tuple(text for text in shuffled(lm, request.subject, seed=seed) if text not in seen)
    long = passages(PASSAGES_SEEN + PASSAGES_UNSEEN, seed=seed)
    others = tuple(name for name in unseen if name not in seen)
    return SurfaceForms(seen, others, *halves(orders), long[:PASSAGES_SEEN], long[PASSAGES_SEEN:])


def halves(items: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """(seen, unseen): the first half, rounded up, and the rest."""
    middle = (len(items) + 1) // 2
    return tuple(items[:middle]), tuple(items[middle:])


def shuffled(lm: LM, subject: str, most: int = _SHUFFLED, seed: int = 0) -> tuple[str, ...]:
    """Texts of the subject's n tokens, as they stand inside a prompt, in other orders: at most min(most, n! − 1), all different.

    Orders that read alike (equal tokens) or as the subject itself are left out, and those that take a character of several bytes
    apart: their letters are not the subject's.  A subject of one token has none.
    """
    sentence = f"the {subject}"
    start, end = subject_span(lm.tokenizer, sentence, subject, occurrence=-1)
    ids = lm.tokenizer(sentence)["input_ids"][start:end]
    draw = random.Random(f"shuffled {seed} {subject}")
    orders: Iterable[Sequence[int]]
    if len(ids) <= _ALL_ORDERS:
        listed = list(itertools.permutations(ids))
        draw.shuffle(listed)
        orders = listed
    else:
        orders = (draw.sample(ids, len(ids)) for _ in range(TRIES))
    found: dict[str, None] = {}
    for order in orders:
        if len(found) == min(most, math.factorial(len(ids)) - 1):
            break
        text = lm.tokenizer.decode(list(order)).strip()
        if text != subject and _letters(text) == _letters(subject):
            found[text] = None
    return tuple(found)


def _letters(text: str) -> list[str]:
    return sorted("".join(text.split()))


def variants(subject: str) -> tuple[str, ...]:
    """Other names for the same thing by rule, all different from the subject; dealt so that both `halves` have rules of each kind.

    Of 60 single edits of the almanac (dev) ROME's survive 0.63 of the seen names and 0.65 of the unseen, MEMIT's 0.54 and 0.58.

    The rules do not know what the subject is, so none says more of it than its name does (a title would):

    rearranged   last word first ("Darrieux, Danielle"); first words as initials ("D. Darrieux"), last word as one ("Danielle D.");
                 "X of Y" as "Y's X" and back; "X (Y)" as "X, the Y"; without article or title; words joined by hyphens
    surrounded   "the one named X", "X, as it is called,", "what is known as X" …; in quotes, in capitals, in small letters
    """
    name = " ".join(subject.split())
    plain = re.sub(r"^the\s+(?=\S)", "", name, flags=re.IGNORECASE)
    surrounded = [
        f"the one named {name}",
        f"the well-known {plain}",
        f"{name}, as it is called,",
        f"{name}, so named,",
        f'"{name}"',
        name.lower(),
        f"{name} (the very same)",
        name.upper(),
        f"the aforementioned {plain}",
        f"what is known as {name}",
    ]
    rearranged = _rearranged(name)
    dealt = [*rearranged[::2], *surrounded[::2], *rearranged[1::2], *surrounded[1::2]]
    return tuple(text for text in dict.fromkeys(dealt) if text not in (subject, name))


def _rearranged(name: str) -> list[str]:
    """Rules on the words of the name itself."""
    out = []
    bare = _TITLE.sub("", name)
    words = bare.split()
    if (match := _APPOSED.match(name)) is not None:
        out.append(f"{match[1]}, the {match[2]}")
    elif (match := OF.match(name)) is not None:
        out.append(f"{match[2]}'s {match[1]}")
    elif (match := _POSSESSIVE.match(name)) is not None:
        out.append(f"the {match[2]} of {match[1]}")
    elif len(words) > 1 and words[0][0].isalpha() and words[-1][0].isalpha():
        *first, last = words
        initials = " ".join(map(_initial, first))
        out += [f"{last}, {' '.join(first)}", f"{initials} {last}", f"{' '.join(first)} {_initial(last)}", f"{last}, {initials}"]
    if bare != name:
        out.append(bare)
    if len(words) > 1 and "(" not in bare:
        out.append("-".join(words))
    return out


def _initial(word: str) -> str:
    return f"{word[0].upper()}."


def templated(request: EditRequest, relations: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Other prompts with the same answer: the request's subject in the other templates of the relation whose template its prompt is.

    relations: for each the templates that say it, ``{}`` standing for the subject; ones that end in a question mark are questions.
    """
    if request.subject is None:
        return ()
    begin, end = request.place()
    own = f"{request.prompt[:begin]}{{}}{request.prompt[end:]}".strip()
    found = next((templates for templates in relations if own in templates), ())
    return tuple(t.replace("{}", request.subject) for t in dict.fromkeys(found) if t != own)


def passages(count: int, words: int = WORDS, seed: int = 0) -> tuple[str, ...]:
    """``count`` passages of so many whitespace words of the bundled text, each closed by a full stop and a space.

    Passage i comes from the i-th of the seed's blocks of 1,024 words, of whatever length it is: passages of different places in the
    list never overlap, and a longer list begins as a shorter one.
    """
    if not 1 <= words <= _BLOCK:
        raise InputError(f"a passage has 1 to {_BLOCK} words, not {words}")
    return tuple(_closed(" ".join(block[:words])) for block in _blocks(count, seed))


def token_passages(lm: LM, count: int, tokens: int = TOKENS, seed: int = 0) -> tuple[str, ...]:
    """The same blocks, of whole words as far as ``tokens`` tokens of the model's tokenizer reach."""
    if not 1 < tokens <= _BLOCK:
        raise InputError(f"a passage has 2 to {_BLOCK} tokens, not {tokens}")
    out = []
    for block in _blocks(count, seed):
        ids = lm.tokenizer(" ".join(block), add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
        whole = lm.tokenizer.decode(ids[: tokens - 1]).strip().rpartition(" ")[0]  # the last word may be cut; a token is left for the stop
        out.append(_closed(whole))
    return tuple(out)


def _closed(text: str) -> str:
    return f"{text} " if text.endswith((".", "!", "?")) else f"{text.rstrip(',;:')}. "


def _blocks(count: int, seed: int) -> list[list[str]]:
    """``count`` blocks of the bundled text, drawn without repetition; a larger count goes on from a smaller one."""
    words = _words()
    order = list(range(len(words) // _BLOCK))
    if not 0 <= count <= len(order):
        raise InputError(f"{count} passages asked for, but the bundled text has {len(order)}")
    random.Random(f"passages {seed}").shuffle(order)
    return [words[i * _BLOCK : (i + 1) * _BLOCK] for i in order[:count]]


@functools.cache
def _words() -> list[str]:
    return bundled("train").split()
