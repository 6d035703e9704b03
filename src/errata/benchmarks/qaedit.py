"""QAEdit (Yang et al. 2025, arXiv 2502.11177): questions of NQ, TriviaQA and SimpleQA with their true answers as targets.

An edit puts a true answer in; what the model said before is not part of the file, so nothing is called old.  Five questions of
other facts with answers are ``unrelated``.
"""

from __future__ import annotations

from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record


def _question(record: Record) -> Draft:
    draft = Draft(record.text("prompt"), record.text("target"), record.text("subject"))
    draft.ask("rephrase", record.text("rephrase"), draft.target)
    for other in record.inners("locality"):
        other.only("loc", "loc_ans")
        draft.ask("unrelated", other.text("loc"), *other.answers("loc_ans"))
    return draft


class QAEdit(FileBenchmark):
    """Question answering as editing, for realistic evaluation."""

    name = "qaedit"
    version = "1"
    source = "WanliYoung/Revisit-Editing-Evaluation, data/QAEdit.json and QAEdit_inter_1k.json"
    licence = "Apache-2.0"
    citation = "Yang et al. 2025 (The Mirage of Model Editing, arXiv 2502.11177)"
    probes = ("rewrite", "rephrase", "unrelated")
    splits = ("QAEdit",)
    forms = (RecordFormat.of("QAEdit", _question, "prompt target subject rephrase locality", unused="id source"),)
