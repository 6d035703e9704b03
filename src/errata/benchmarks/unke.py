"""UnKE (Deng et al. 2024, arXiv 2405.15349): long unstructured answers, paraphrased questions, and questions about parts of the answer.

No subject is named, so methods that need one refuse.  There is no locality in the file (the paper asks MMLU).
"""

from __future__ import annotations

from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record


def _answer(record: Record) -> Draft:
    draft = Draft(record.text("question"), record.text("answer"))
    draft.ask("rephrase", record.text("para_question"), draft.target)
    questions, answers = record.texts("sub_question"), record.texts("sub_answer")
    if len(questions) != len(answers):
        raise record.fail(f"{len(questions)} sub_question but {len(answers)} sub_answer; each question needs its answer")
    for question, answer in zip(questions, answers, strict=True):
        draft.ask("sub_fact", question, answer)
    return draft


class UnKE(FileBenchmark):
    """Unstructured knowledge editing."""

    name = "unke"
    version = "1"
    source = "final_data_v2.json (or v3) of TrustedLLM/UnKE"
    licence = "none stated"
    citation = "Deng et al. 2024 (UnKE, arXiv 2405.15349)"
    probes = ("rewrite", "rephrase", "sub_fact")
    splits = ("final",)
    forms = (RecordFormat.of("UnKE", _answer, "question para_question answer sub_question sub_answer", unused="id"),)
