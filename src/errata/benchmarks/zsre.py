"""ZsRE: questions about relations, edited to a wrong answer.

MEND form (Mitchell et al. 2022; so used by WISE and BaFT): ``src`` asks, ``alt`` is the new answer, ``answers`` the true ones,
``rephrase`` one other question, ``loc`` a question of Natural Questions with its answer.  ``pred`` is what MEND's BART said before
an edit and is not used: whether the model at hand knew the fact is asked of that model.  Portability (Yao et al. 2023) is a
question through the new answer; two files of EasyEdit ask with another subject or backwards instead and have no ``loc``.

ROME, and MEMIT after it, read the same file another way: they edit to the first of ``answers``, which is true, put "?" behind ``loc``,
and count how many tokens of ``loc_ans`` are right, not how many stay.  Their zsRE figures are not comparable with figures of this class.

KnowEdit form (Zhang et al. 2024): see `errata.benchmarks.knowedit`.
"""

from __future__ import annotations

from errata.benchmarks.drafts import Draft, ask_two_hop
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.knowedit import ZSRE_FORM
from errata.benchmarks.records import Record


def _mend(record: Record) -> Draft:
    draft = Draft(record.text("src"), record.text("alt"), record.text("subject"), next(iter(record.answers("answers")), None))
    draft.ask("rephrase", record.text("rephrase"), draft.target)
    if "loc" in record:
        draft.ask("unrelated", record.text("loc"), *record.answers("loc_ans"))
    ask_two_hop(draft, record)
    if "alter_subject_question" in record:
        draft.ask("alias", record.text("alter_subject_question"), draft.target)
    if "inverse question" in record:
        draft.ask("reverse", record.text("inverse question"), record.text("subject"))
    return draft


class ZsRE(FileBenchmark):
    """Zero-shot relation extraction."""

    name = "zsre"
    version = "1"
    source = "zsre_mend_eval.json and zsre_mend_edit.json of MEND, ROME and EasyEdit (WISE), or KnowEdit's ZsRE-test-all.json"
    licence = "none stated for zsRE; its locality questions (Natural Questions) CC BY-SA 3.0; KnowEdit MIT"
    citation = "Levy et al. 2017; De Cao et al. 2021; Mitchell et al. 2022 (MEND); Zhang et al. 2024 (KnowEdit)"
    probes = ("rewrite", "rephrase", "unrelated", "same_subject", "two_hop", "alias", "reverse", "logical")
    splits = ("test", "edit", "eval", "train")
    forms = (
        RecordFormat.of(
            "MEND",
            _mend,
            "subject src rephrase alt answers",
            optional="loc loc_ans portability alter_subject_question inverse~question",
            unused="pred cond alternative_subject",
        ),
        ZSRE_FORM,
    )
