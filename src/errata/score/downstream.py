"""What a model can still do under a stack of patches, by benchmarks without edits: choices by likelihood, questions by free text.

A record, one an item, has kind "choice" or "question"; `errata.score.metrics.summarise` makes rows of the metrics `choices`
(likelihood) and `questions` (generated) of them, with the base's share as ``before``.

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
from errata.score.evaluator import AnswerCache, Progress, generate, key, teacher_force
from errata.score.match import exact_match


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
    """A record an item; a free answer that equals one of the accepted ones is right."""
    answers = answers if answers is not None else AnswerCache()
    generate(lm, [(s, item.prompt) for item in items for s in ((), stack)], answers, progress)
    out = []
    for item in items:
        record: dict[str, Any] = {
            "method": method,
            "case": _case(item.prompt),
            "kind": "question",
            "prompt": item.prompt,
            "target": item.answers[0],
            "also": list(item.answers[1:]),
        }
        for when, name in (("before", ""), ("after", key(stack))):
            said = answers.text[name, item.prompt]
            record |= {f"gen_{when}": said, f"gen_match_{when}": any(exact_match(said, a) for a in item.answers)}
        out.append({**record, "gen_agree": record["gen_before"] == record["gen_after"]})
    return out
