"""Fluency (GE) and consistency (RS) of longer sampled text, the two generation metrics of ROME (Meng et al. 2022, arXiv 2202.05262).

A benchmark that can be measured so is a `Source`: it names prompts to go on from and texts about things that truly have the
case's new answer.  Records are of kind "generation", one a case, and `errata.score.metrics.summarise` makes rows of protocol
"sampled" of them: mean and bootstrap interval over cases, ``before`` from the unedited model, n.

    ge_before, ge_after    mean over the case's texts of `entropy`, in bits (the papers print it times 100, and so do the tables)
    rs_before, rs_after    `TfIdf` cosine of the case's texts, joined, with its references, joined; None without references
    texts_before, _after   the texts

Choices where papers are silent or differ: only the continuation is measured, not the prompt (ROME's texts hold both, which moves
its GE); ``tokens`` counts new tokens; a text may end earlier, at EOS, and a short text has a low entropy: where an edit changes
when the model stops, GE says so too.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import ConfigError, InputError
from errata.request import Case
from errata.score.evaluator import Progress, distinct, key

ROWS = 64  # of a batch: each keeps a cache of prompt and new tokens
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class Source(Protocol):
    """What a benchmark offers to have generation measured."""

    def generation(self, case: Case) -> tuple[Sequence[str], Sequence[str]]:
        """(prompts to go on from, reference texts about things that have the new answer)."""

    def collection(self) -> Sequence[str]:
        """Every reference text there is, one a thing: what word weights are fitted on."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How texts are drawn: up to ``tokens`` new tokens, each among the ``top_k`` likeliest, the draws fixed by ``seed``."""

    tokens: int = 100
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


Texts = dict[tuple[str, str, Sampling], str]  # (stack key, prompt, sampling) -> text


def words(text: str) -> list[str]:
    """Words (runs of letters, digits and underscores, apostrophes inside) and single punctuation marks, case kept.

    Near to nltk's word tokens, which the papers use and errata does not need: nltk also splits contractions ("do", "n't") and
    keeps some marks together ("...").
    """
    return _WORD.findall(text)


def entropy(text: str) -> float:
    """GE = ½ (⅔ H₂ + 4⁄3 H₃) in bits, H_n = −Σ_g p(g) log₂ p(g) over the text's word n-grams g, p their relative frequency.

    Repetition lowers it.  A text of fewer than n words has H_n = 0: it says nothing, so it is not diverse.
    """
    said = words(text)
    return (2 / 3 * _entropy(said, 2) + 4 / 3 * _entropy(said, 3)) / 2


def _entropy(said: Sequence[str], n: int) -> float:
    counts = collections.Counter(zip(*(said[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(c / total * math.log2(total / c) for c in counts)


class TfIdf:
    """Word weights of a collection of N documents.

    A text's vector [W] has count(w) · (ln((1 + N) / (1 + df(w))) + 1) for each of the W words of the collection, df the
    number of documents with w, and is scaled to length 1.  Words are `words` in lower case without punctuation; those that no
    document holds count nowhere.  (Smoothed idf, raw counts, no stop words.)
    """

    def __init__(self, documents: Iterable[str]) -> None:
        found: collections.Counter[str] = collections.Counter()
        count = 0
        for document in documents:
            found.update(set(self.words(document)))
            count += 1
        if not found:
            raise InputError("the reference collection holds no word; a consistency score needs reference texts")
        self.column = {word: i for i, word in enumerate(sorted(found))}
        df = np.array([found[word] for word in self.column], dtype=np.float64)
        self.idf: NDArray[np.float64] = np.log((1 + count) / (1 + df)) + 1

    @staticmethod
    def words(text: str) -> list[str]:
        return [word.casefold() for word in words(text) if word[0].isalnum() or word[0] == "_"]

    def vector(self, text: str) -> NDArray[np.float64]:
        """[W], of length 1; all zeros for a text without any known word."""
        out = np.zeros(len(self.idf))
        for word, n in collections.Counter(self.words(text)).items():
            if word in self.column:
                out[self.column[word]] = n
        out *= self.idf
        length = float(np.linalg.norm(out))
        return out / length if length else out

    def cosine(self, a: str, b: str) -> float:
        """RS of two texts, in [0, 1]; 0 where one has no known word."""
        return min(1.0, float(self.vector(a) @ self.vector(b)))


def sample(
    lm: LM, asked: Sequence[tuple[Stack, str]], sampling: Sampling, texts: Texts | None = None, progress: Progress | None = None
) -> Texts:
    """Texts after (stack, prompt), each asked once, into ``texts``.

    `LM.generate` counts how often a prompt stood before in its batch, so a prompt stands in a batch once: a text then depends
    on its stack, its prompt and the seed alone (up to the rounding of batches of other sizes), and base and edited
    model draw with the same random numbers.
    """
    texts = {} if texts is None else texts
    new = {(key(s), p, sampling): s for s, p in asked if (key(s), p, sampling) not in texts}
    turns: dict[int, list[tuple[str, str, Sampling]]] = {}
    seen: collections.Counter[str] = collections.Counter()
    for name in new:
        turns.setdefault(seen[name[1]], []).append(name)
        seen[name[1]] += 1
    done = 0
    for turn in turns.values():
        turn.sort(key=lambda name: (-len(name[1]), name[:2]))
        for start in range(0, len(turn), ROWS):
            batch = turn[start : start + ROWS]
            stacks, rows = distinct([new[name] for name in batch])
            said = lm.generate(
                [name[1] for name in batch],
                stacks=stacks,
                rows=rows,
                max_new_tokens=sampling.tokens,
                stop=(),
                top_k=sampling.top_k,
                seed=sampling.seed,
            )
            texts.update(zip(batch, said, strict=True))
            done += len(batch)
            if progress:
                progress(done, len(new))
    return texts


def score(
    lm: LM,
    cases: Sequence[Case],
    stacks: Sequence[Stack],
    method: str,
    source: Source,
    *,
    sampling: Sampling | None = None,
    texts: Texts | None = None,
    weights: TfIdf | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A record for each case with a prompt, case i under ``stacks[i]``.

    ``texts``: keep one between calls and the base is asked once for all methods; ``weights``: likewise, fitted on
    ``source.collection()``.
    """
    sampling = sampling or Sampling()
    offered = [(case, stack, *source.generation(case)) for case, stack in zip(cases, stacks, strict=True)]
    offered = [row for row in offered if row[2]]
    if not offered:
        return []
    texts = sample(lm, [(s, p) for _, stack, prompts, _ in offered for p in prompts for s in ((), stack)], sampling, texts, progress)
    if weights is None and any(references for *_, references in offered):
        weights = TfIdf(source.collection())
    out = []
    for case, stack, prompts, references in offered:
        record: dict[str, Any] = {"method": method, "case": case.id, "kind": "generation", "prompts": list(prompts)}
        for when, name in (("before", ""), ("after", key(stack))):
            said = [texts[name, prompt, sampling] for prompt in prompts]
            record[f"texts_{when}"] = said
            record[f"ge_{when}"] = sum(map(entropy, said)) / len(said)
            record[f"rs_{when}"] = weights.cosine(" ".join(said), " ".join(references)) if weights and references else None
        out.append(record)
    return out
