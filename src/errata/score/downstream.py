"""What a model can still do under a stack of patches, by benchmarks without edits: choices by likelihood, questions by free text.

A record, one an item, has kind "choice" or "question"; `errata.score.metrics.summarise` makes rows of the metrics `choices`
(likelihood) and `questions` (free text) of them, with the base's share as ``before``.

    nll_before, nll_after     of each choice: −1/|a| Σ_t log p(a_t | prompt, a_<t), the mean over the choice's tokens, in nats
    right_before, right_after the right choice has the lowest of them (of equal ones the first counts)

The mean makes long and short choices comparable.  (Yao et al. 2023 take the mean over prompt and choice together, which weighs the
length of a choice otherwise: their figures and these are not the same quantity.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from errata.benchmarks.downstream import MultipleChoice, Question
from errata.core.bank import Stack
from errata.core.model import LM
from errata.score import match
from errata.score.evaluator import AnswerCache, Progress, ask, key, teacher_force, tokens_to_ask


def _case(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def choices(
    lm: LM, items: Sequence[MultipleChoice], stack: Stack, method: str, answers: AnswerCache | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A record an item.  ``answers``: keep one between calls and the base is asked once."""
    answers = answers if answers is not None else AnswerCache()
    teacher_force(lm, [(s, item.prompt, text) for item in items for text in item.choices for s in ((), stack)], answers, progress)
    out = []
    for item in items:
        record: dict[str, Any] = {
            "method": method,
            "case": _case(item.prompt, *item.choices),
            "kind": "choice",
            "prompt": item.prompt,
            "target": item.choices[item.answer],
            "choices": list(item.choices),
        }
        for when, name in (("before", ""), ("after", key(stack))):
            nll = [answers.forced[name, item.prompt, text].nll for text in item.choices]
            record |= {f"nll_{when}": nll, f"right_{when}": nll.index(min(nll)) == item.answer}
        out.append(record)
    return out


def questions(
    lm: LM, items: Sequence[Question], stack: Stack, method: str, answers: AnswerCache | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A record an item; a free answer that begins with one of the accepted ones is right (beside it: equals one, contains one)."""
    answers = answers if answers is not None else AnswerCache()
    tokens = [tokens_to_ask(lm, item.answers) for item in items]
    ask(lm, [(s, item.prompt, (), n) for item, n in zip(items, tokens, strict=True) for s in ((), stack)], answers, progress)
    out = []
    for item, n in zip(items, tokens, strict=True):
        record: dict[str, Any] = {
            "method": method,
            "case": _case(item.prompt),
            "kind": "question",
            "prompt": item.prompt,
            "target": item.answers[0],
            "also": list(item.answers[1:]),
        }
        for when, name in (("before", ""), ("after", key(stack))):
            said, _ = answers.said(lm, (name, item.prompt), n)
            record[f"gen_{when}"] = said
            for field, same in (("gen_match", match.exact_match), ("starts", match.starts), ("contains", match.contains)):
                record[f"{field}_{when}"] = any(same(said, a) for a in item.answers)
        out.append({**record, "gen_agree": record["gen_before"] == record["gen_after"]})
    return out
