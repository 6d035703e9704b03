"""IKE's demonstrations: where they come from and which are shown."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.core.chat import user_words
from errata.core.model import LM
from errata.methods.in_context.text import beside, block_for, vectors
from errata.request import EditRequest, read_requests
from errata.writing import NO_SPACE

KINDS = ("copy", "paraphrase", "unrelated")
PACKAGED = {"almanac": Path(__file__).parent / "almanac_demonstrations.jsonl"}
DIGITS = 4  # of a cosine that count, so that rounding does not decide between equal texts


def requests_of(source: str | None) -> list[EditRequest]:
    """The requests that demonstrations are made of; `InputError` names file and line."""
    return [] if source is None else read_requests(PACKAGED.get(source, Path(source)))


def shots(lm: LM, shot: str, requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """(kind, text), each text once."""
    out: dict[str, str] = {}
    words = functools.partial(user_words, lm.tokenizer)
    for r in requests:
        pairs = [("copy", r.prompt, r.continuation), *(("paraphrase", p, r.continuation) for p in r.paraphrases)]
        pairs += [("unrelated", prompt, answer) for prompt, answer in r.unrelated]
        for kind, query, answer in pairs:
            own = beside(beside(shot, ("prompt", "target"), words(r.prompt), r.continuation), ("query", "answer"), words(query), answer)
            answer = answer.lstrip(NO_SPACE).strip()
            text = own.format(prompt=words(r.prompt), target=r.target.strip(), query=words(query), answer=answer)
            out.setdefault(text, kind)
    return [(kind, text) for text, kind in out.items()]


def choose(lm: LM, editor: Any, requests: Sequence[EditRequest], earlier: Sequence[EditRequest]) -> list[str]:
    """The demonstrations of one patch: for each of its facts the ``k`` nearest in the editor's mix, nearest last, none twice."""
    if not editor.k:
        return []
    how = {"encoder": editor.encoder, "block": block_for(lm, editor), "pool": editor.pool}
    common = shots(lm, editor.shot, requests_of(editor.demonstrations))
    key = ("demonstrations", tuple(text for _, text in common), *how.values())
    if common and key not in lm.base_cache:
        lm.base_cache[key] = vectors(lm, [text for _, text in common], how)
    known = {text: vector for (_, text), vector in zip(common, lm.base_cache.get(key, ()), strict=True)}
    store = list(dict(((text, kind) for kind, text in shots(lm, editor.shot, [*earlier, *requests])), **{t: k for k, t in common}).items())
    fresh = [text for text, _ in store if text not in known]
    known |= dict(zip(fresh, vectors(lm, fresh, how), strict=True)) if fresh else {}
    asked = [f + editor.cue + user_words(lm.tokenizer, r.prompt) for f, r in zip(editor.facts(lm, requests), requests, strict=True)]
    chosen: dict[str, None] = {}
    for vector in vectors(lm, asked, how):
        ranked = sorted(store, key=lambda pair: -round(float(vector @ known[pair[0]]), DIGITS))
        picked = [text for text in _mixed(ranked, editor.k, editor.mix) if text not in chosen]
        chosen |= dict.fromkeys(reversed(picked))
    return list(chosen)


def _mixed(ranked: Sequence[tuple[str, str]], k: int, mix: Sequence[int]) -> list[str]:
    """The first ``k`` texts, of each kind its share of them (largest remainders); fewer where a kind has fewer."""
    if not mix:
        return [text for text, _ in ranked[:k]]
    exact = [k * share / sum(mix) for share in mix]
    left = [int(x) for x in exact]
    for i in sorted(range(len(mix)), key=lambda i: left[i] - exact[i])[: k - sum(left)]:
        left[i] += 1
    quota = dict(zip(KINDS, left, strict=True))
    out = []
    for text, kind in ranked:
        if quota[kind]:
            quota[kind] -= 1
            out.append(text)
    return out
