"""RobustKeyEdit, the records REP is trained and scored on (Yan et al. 2025): edits with ten other names of the subject.

One form for CounterFact and ZsRE.  The first half of ``subject_rephrase``, rounded up, are aliases an editor may train on; the
prompt under each name of the second half is a probe (subject_unseen), as in the paper.  With `errata score --robustness` the aliases
are asked too (subject_seen), and what else `errata.score.robustness` makes.  ``rephrase_prompt`` is null in ZsRE's files.

The names were written by a chat model and hold what it said besides ("… cinemaPlease let me know if you need further assistance!"):
such endings are cut off.  Names that are empty, the subject itself, a repetition or that give the new answer away are left out and
counted (`LoadReport`), after the halves were told apart, so that a name is seen here as it is in the paper.  Of the prompts, repetitions
and the edited prompt itself are left out; those that do not name the subject ("Her mother tongue is") stay, as in the paper, and
are counted as a remark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from errata.benchmarks import drafts
from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record
from errata.request import EditRequest, fill

NQ = "nq question:"  # begins ZsRE's locality questions: other facts altogether, no neighbours
_CHATTER = re.compile(
    r"(?<=\S)\s*\(?(?:Please (?:let|note)|If (?:you|there|[\"“])|These (?:variations|phrases)|Note(?: that|:)|Each of these).*", re.S
)
_ADVICE = "a name ended in words of the chat model that wrote it, which were cut off"
UNNAMED = "a rephrase does not name the subject as the prompt does"


def _draft(record: Record) -> Draft:
    draft = Draft(record.text("prompt"), record.text("target_new").strip(), record.text("subject"), record.text("target_true"))
    for prompt in () if record.values["rephrase_prompt"] is None else record.texts("rephrase_prompt"):
        draft.ask("rephrase", prompt, draft.target)
    for prompt in record.texts("locality_prompt"):
        kind = "unrelated" if prompt.startswith(NQ) else "neighbour"
        draft.ask(kind, prompt, record.text("locality_ground_truth"))
    return draft


def without_chatter(name: str) -> str:
    """A name in single spaces, without what a chat model says behind it."""
    return " ".join(_CHATTER.sub("", name).split())


class RobustKey(FileBenchmark):
    """Counterfactual edits under other names of their subjects."""

    name = "robustkey"
    only_known = True
    version = "1"
    source = "*_para_prompt_para_subject*.json of ElliottYan/RobustKeyEdit"
    licence = "none stated for the data; code MIT"
    citation = "Yan et al. 2025 (REP, Robust Edit Pathway, ACL 2025, arXiv 2410.09338)"
    probes = ("rewrite", "rephrase", "subject_unseen", "neighbour", "unrelated")
    splits = ("test", "valid", "zsre")
    forms = (
        RecordFormat.of(
            "RobustKeyEdit",
            _draft,
            "prompt target_new target_true subject rephrase_prompt locality_prompt locality_ground_truth subject_rephrase",
            unused="case_id rephrase_target",
        ),
    )

    def draft(self, form: RecordFormat[Any], records: Sequence[Record], i: int) -> Draft:
        """With the names, those that are left out being counted."""
        record = records[i]
        draft = _draft(record)
        request = drafts.request(draft)
        written = record.texts("subject_rephrase")
        names = [without_chatter(name) for name in written]
        asked = [prompt for kind, prompt, _ in draft.probes if kind == "rephrase"]
        if any(_CHATTER.search(name) for name in written):
            self.report.remarks[_ADVICE] += 1
        if any(str(request.subject) not in prompt for prompt in asked):
            self.report.remarks[UNNAMED] += 1
        middle = (len(names) + 1) // 2
        draft.aliases = self._kept("subject_seen", names[:middle], request, ())
        for name in self._kept("subject_unseen", names[middle:], request, draft.aliases):
            draft.ask("subject_unseen", fill(request, name), draft.target)
        return draft

    def _kept(self, kind: str, names: Sequence[str], request: EditRequest, taken: Sequence[str]) -> tuple[str, ...]:
        subject, target = str(request.subject).casefold(), request.target.casefold()
        out: list[str] = []
        for name in names:
            if not name:
                reason = "the name is empty"
            elif name.casefold() == subject:
                reason = "the name is the subject itself"
            elif name in (*taken, *out):
                reason = "the name stands there twice"
            elif target in name.casefold() and target not in subject:
                reason = "the name gives the new answer away"
            else:
                out.append(name)
                continue
            self.report.left_out[f"{kind}: {reason}"] += 1
        return tuple(out)
