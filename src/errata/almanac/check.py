"""What the almanac knows: every fact asked in every way, free greedy answers compared exactly."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from errata.almanac import corpus
from errata.benchmarks.facts import Sentence, facts, relations, sentences
from errata.core.model import LM
from errata.score.evaluator import AnswerCache, teacher_force
from errata.score.perplexity import perplexity

Progress = Callable[[int, int], None]


def asked(per_relation: int | None = None) -> list[Sentence]:
    """Everything that can be asked (of the first ``per_relation`` facts of each relation)."""
    taken: collections.Counter[str] = collections.Counter()
    out: list[Sentence] = []
    for fact in facts():
        taken[fact.relation] += 1
        if per_relation is None or taken[fact.relation] <= per_relation:
            out += sentences(fact)
    return out


def check(lm: LM, facts_per_relation: int | None = None, progress: Progress | None = None, tokens: int = 40_000) -> dict[str, Any]:
    """Exact match of the true answer and its full stop, by relation and by kind of question; perplexity on ``tokens`` of held-out text.

    A right answer is one that greedy decoding would give: every token of "answer." is the argmax, the ones before being right.
    """
    items = asked(facts_per_relation)
    answers = AnswerCache()
    teacher_force(lm, [((), s.prompt, s.answer + ".") for s in items], answers, progress)
    table: dict[str, dict[str, list[bool]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    known: dict[tuple[str, str], list[bool]] = collections.defaultdict(list)
    for s in items:
        right = all(answers.forced["", s.prompt, s.answer + "."].right)
        for group in ("all", s.fact.relation):
            table[group][s.kind].append(right)
            if s.kind in ("training", "held_out"):
                form = "question" if s.prompt.endswith("?") else "declarative"
                table[group][form].append(right)
                table[group][f"{s.kind} {form}"].append(right)
        if s.kind == "training":
            known[s.fact.subject, s.fact.relation].append(right)
    share = {
        group: {kind: {"n": len(v), "right": round(sum(v) / len(v), 4)} for kind, v in kinds.items()} for group, kinds in table.items()
    }
    return {
        "model": lm.fingerprint,
        "facts": len(known),
        "facts_known_on_every_training_template": sum(all(v) for v in known.values()),
        "facts_known_on_most_training_templates": sum(sum(v) * 2 > len(v) for v in known.values()),
        "exact_match": share,
        **language(lm, tokens),
    }


def language(lm: LM, tokens: int = 40_000) -> dict[str, Any]:
    """Perplexity of the base on the bundled held-out encyclopaedic text, and bits per byte, which compare across tokenizers."""
    (found,) = perplexity(lm, corpus.text("heldout"), tokens=tokens)
    return {"perplexity": round(found.value, 2), "bits_per_byte": round(found.bits_per_byte, 3), "text_tokens": found.tokens}


def text(result: dict[str, Any]) -> str:
    """The result as a table, a relation a line."""
    kinds = ["training", "held_out", "declarative", "question", "held_out question", "alias", "reverse", "chain", "chain_held_out"]
    heads = ["train", "held out", "statement", "question", "held-out q.", "alias", "reverse", "2 hops", "2 hops new"]
    lines = ["exact match, %".ljust(20) + "".join(h.rjust(12) for h in heads)]
    for group in ["all", *[r for r in relations() if r in result["exact_match"]]]:
        row = result["exact_match"][group]
        lines.append(group.ljust(20) + "".join((f"{100 * row[k]['right']:.1f}" if k in row else "-").rjust(12) for k in kinds))
    lines.append("asked".ljust(20) + "".join(str(result["exact_match"]["all"].get(k, {"n": 0})["n"]).rjust(12) for k in kinds))
    lines.append(
        f"{result['facts']:,} facts; {result['facts_known_on_most_training_templates']:,} known on most of their training templates, "
        f"{result['facts_known_on_every_training_template']:,} on every one"
    )
    lines.append(
        f"perplexity on {result['text_tokens']:,} tokens of held-out text {result['perplexity']}, {result['bits_per_byte']} bits per byte"
    )
    return "\n".join(lines)
