"""What the model said, case by case, as compact JSON for the page's browser: every text once, a probe a short list.

texts       every prompt and answer; others point here
sections    [{columns: [[method, when]], cases: [case]}]
case        [name: prompt, new answer (−1: none), probes: [probe]]
probe       [kind, prompt, wanted (−1: as before; see ``not``), before, marks, answers, fed]
marks       a letter for "before" and one a column: y as wanted, n not, - no verdict, space not asked
answers     one a column (−1 not asked, −2 no text);  fed: percent of the wanted answer's tokens that are likeliest when it is fed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from errata.report.layout import UNHOLDABLE

Record = Mapping[str, Any]

KINDS: Final[dict[str, str]] = {
    "rewrite": "prompt",
    "rephrase": "rephrase",
    "two_hop": "two hops",
    "reverse": "reverse",
    "alias": "alias",
    "multi_hop": "longer chain",
    "logical": "consequence",
    "sub_fact": "part of the answer",
    "out_of_domain": "another text",
    "same_sentiment": "wanted sentiment",
    "opposite_sentiment": "opposite sentiment",
    "neighbour": "neighbour",
    "unrelated": "unrelated",
    "same_subject": "same subject",
    "forgetfulness": "older answer",
    "distracting": "distracted neighbour",
    "question": "question",
    "paraphrase_seen": "given paraphrase",
    "subject_seen": "other name (seen)",
    "subject_unseen": "other name",
    "shuffled_seen": "shuffled (seen)",
    "shuffled_unseen": "shuffled",
    "long_seen": "behind 300 words (seen)",
    "long_unseen": "behind 300 words",
    "long_tokens_seen": "behind 512 tokens (seen)",
    "long_tokens_unseen": "behind 512 tokens",
    "question_form": "as a question",
    "completion_form": "as a sentence",
    "chat": "chat template",
    "statement_true": "true or false",
    "statement_false": "true or false",
    "negation": "negated",
}
_AVOIDED: Final = frozenset({"negation"})  # kinds where the target is the one wrong answer
_UNSAID: Final = frozenset({"generation", "choice"})  # no question with an answer: long sampled texts, likelihoods
_SAID: Final = {True: "y", False: "n", None: "-"}
LONGEST: Final = 400  # characters of a prompt that are shown; the whole is in the records
AFTER, SOON = "after all edits", "right after its own edit"


class Texts:
    """Every text once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._at: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        text = UNHOLDABLE.sub("�", text)
        if text not in self._at:
            self._at[text] = len(self.all)
            self.all.append(text)
        return self._at[text]


def shortened(prompt: str) -> str:
    """A long prompt without its middle: what stands before the question is context."""
    return prompt if len(prompt) <= LONGEST else f"{prompt[: LONGEST // 4]} […] {prompt[-LONGEST // 2 :]}"


def browser(columns: Sequence[tuple[str, str, Iterable[Record]]], texts: Texts, most: int | None = None) -> dict[str, Any]:
    """The data of one section; columns (method, when, records).  ``most``: cases beyond it are left out."""
    cases: dict[str, dict[tuple[str, str, str], list[Any]]] = {}
    left_out: set[str] = set()
    for c, (_, _, records) in enumerate(columns):
        for record in records:
            name = str(record["case"])
            if record["kind"] in _UNSAID:
                continue
            if name not in cases and most is not None and len(cases) >= most:
                left_out.add(name)
                continue
            key = (str(record["kind"]), str(record["prompt"]), str(record["target"]))
            probes = cases.setdefault(name, {})
            if key not in probes:
                probes[key] = _probe(record, texts, len(columns))
            _answer(probes[key], record, c, texts)
    return {
        "columns": [[method, when] for method, when, _ in columns],
        "cases": [_case(name, probes, texts) for name, probes in cases.items()],
        "left_out": len(left_out),
    }


def _probe(record: Record, texts: Texts, columns: int) -> list[Any]:
    target = record["target"]
    before = record.get("gen_before")
    wanted = -1 if target is None else texts(f"not {target}" if record["kind"] in _AVOIDED else str(target))
    mark = "-" if target is None else _mark(record, "before")
    return [
        *(str(record["kind"]), texts(shortened(str(record["prompt"]))), wanted, -2 if before is None else texts(str(before))),
        *([mark, *" " * columns], [-1] * columns, [-1] * columns),
    ]


def _answer(probe: list[Any], record: Record, column: int, texts: Texts) -> None:
    after, fed = record.get("gen_after"), record.get("tf_after")
    probe[4][column + 1] = _SAID[_first(record, "answer_agree", "gen_agree")] if record["target"] is None else _mark(record, "after")
    probe[5][column] = -2 if after is None else texts(str(after))
    probe[6][column] = -1 if fed is None or record["target"] is None else round(100 * float(fed))


def _mark(record: Record, when: str) -> str:
    found = _first(record, f"starts_{when}", f"gen_match_{when}")
    return _SAID[found if found is None else found != (record["kind"] in _AVOIDED)]


def _first(record: Record, *fields: str) -> bool | None:
    """The first of these fields that the record has: older ones lack the first."""
    return next((bool(record[field]) for field in fields if record.get(field) is not None), None)


def _case(name: str, probes: Mapping[tuple[str, str, str], list[Any]], texts: Texts) -> list[Any]:
    order = {kind: i for i, kind in enumerate(KINDS)}
    ranked = sorted(probes.values(), key=lambda probe: order.get(probe[0], len(order)))
    edit = next((probe for probe in ranked if probe[0] == "rewrite"), None)
    head = [texts(f"Case {name}"), -1] if edit is None else [edit[1], edit[2]]
    return [*head, [[*probe[:4], "".join(probe[4]), *probe[5:]] for probe in ranked]]
