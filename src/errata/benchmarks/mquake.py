"""MQuAKE (Zhong et al. 2023): chains of facts of which one or more are edited, and questions through the whole chain.

A record's edits belong to one change: they are written together (`Case.more`) before anything is asked.

    requested_rewrite  cloze prompt with subject: the edits; ``question`` asks for the same (rephrase)
    questions          three ways to ask through the chain: two_hop for chains of two facts, multi_hop for longer ones
    new_single_hops    the chain after the edits; its facts that no edit changes should stay (unrelated)

The alias lists are accepted as free answers.  Records that several edits belong to share edits with others in CF: `Report.remarks`
counts what contradicts what, which matters when many cases are edited at once.
"""

from __future__ import annotations

from errata.benchmarks.counterfact import rewrite
from errata.benchmarks.drafts import Draft, UnusableRecord
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record

_EDIT = ("prompt", "relation_id", "target_new", "target_true", "subject", "question")
_UNSTRUCTURED = ("fact_new", "fact_new_uns", "verify_unsfact_GPT", "unsfact_triplets_GPT")  # added by AKEW; not used


def _chain(record: Record) -> Draft:
    edits = [edit.only(*_EDIT, *_UNSTRUCTURED) for edit in record.inners("requested_rewrite")]
    if not edits:
        raise UnusableRecord("it names no edit")
    drafts = [rewrite(edit) for edit in edits]
    draft = drafts[0]
    draft.more = tuple(drafts[1:])
    for edit, made in zip(edits, drafts, strict=True):
        draft.ask("rephrase", edit.text("question"), made.target)
    hops = [hop.only("question", "cloze", "answer", "answer_alias") for hop in record.inners("new_single_hops")]
    for question in record.texts("questions"):
        draft.ask("two_hop" if len(hops) == 2 else "multi_hop", question, record.text("new_answer"), *record.texts("new_answer_alias"))
    edited = {made.prompt for made in drafts} | {edit.text("question") for edit in edits}
    for hop in hops:
        if not {hop.text("cloze"), hop.text("question")} & edited:
            draft.ask("unrelated", hop.text("cloze"), hop.text("answer"), *hop.texts("answer_alias"))
    return draft


class MQuAKE(FileBenchmark):
    """Multi-hop questions for knowledge editing: the files CF, CF-3k, T and hard, and AKEW's extension of CF."""

    name = "mquake"
    only_known = True
    version = "1"
    source = "MQuAKE-CF.json, MQuAKE-CF-3k.json, MQuAKE-T.json of princeton-nlp/MQuAKE; MQuAKE-hard.json; AKEW's MQuAKE-CF.json"
    licence = "MIT"
    citation = "Zhong et al. 2023 (MQuAKE, arXiv 2305.14795); Wang et al. 2024 (hard); Wu et al. 2024 (AKEW)"
    probes = ("rewrite", "rephrase", "two_hop", "multi_hop", "unrelated")
    splits = ("CF", "T", "hard")
    forms = (
        RecordFormat.of(
            "MQuAKE",
            _chain,
            "case_id requested_rewrite questions new_answer new_answer_alias new_single_hops",
            unused="answer answer_alias single_hops orig",
        ),
    )
