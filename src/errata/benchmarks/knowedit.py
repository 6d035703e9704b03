"""The factual parts of KnowEdit (Zhang et al. 2024, arXiv 2401.01286): WikiData-recent, WikiData-counterfact, WikiBio, ZsRE.

Their portability and locality come from RippleEdits (Cohen et al. 2024) and are mapped so:

    Reasoning               two_hop        a question through the new answer
    Subject_Aliasing        alias          the subject under another name
    Logical_Generalization  logical        what must hold with the new fact: symmetry, inverse, family
    Relation_Specificity    same_subject   another fact of the same subject
    Forgetfulness           forgetfulness  the older answer of a relation with several, the new one excluded by name

A probe's ground truth is a text, a list, or a list of answers each a list of spellings.  The first is what is forced (as in
EasyEdit); a free answer may be any of them.  Probes without any answer are left out and counted, as are facts to be kept.
"""

from __future__ import annotations

from typing import Final

from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record

KINDS: Final = {
    "portability": {"Reasoning": "two_hop", "Subject_Aliasing": "alias", "Logical_Generalization": "logical"},
    "locality": {"Relation_Specificity": "same_subject", "Forgetfulness": "forgetfulness"},
}


def _ripples(draft: Draft, record: Record) -> Draft:
    """The draft with the record's portability and locality."""
    for field, kinds in KINDS.items():
        if field in record:
            found = record.inner(field).only(*kinds)
            for key, kind in kinds.items():
                for each in found.inners(key) if key in found else ():
                    each.only("prompt", "ground_truth")
                    draft.ask(kind, each.text("prompt"), *each.answers("ground_truth"))
    return draft


def _fact(record: Record) -> Draft:
    old = next(iter(record.answers("ground_truth")), None) if "ground_truth" in record else None
    draft = Draft(record.text("prompt"), record.text("target_new"), record.text("subject"), old)
    for field in ("rephrase_prompt", "rephrase"):
        if field in record:
            draft.ask("rephrase", record.text(field), draft.target)
    for prompt in record.texts("generate_prompt") if "generate_prompt" in record else ():
        draft.ask("rephrase", prompt, draft.target)
    return _ripples(draft, record)


def _biography(record: Record) -> Draft:
    return _ripples(Draft(record.text("text"), record.text("labels"), record.text("concept")), record)


_COMMON = "subject prompt target_new portability locality"
_REPHRASED = "rephrase rephrase_prompt generate_prompt"
ZSRE_FORM: Final = RecordFormat.of("KnowEdit", _fact, f"{_COMMON} ground_truth rephrase_prompt cond", "generate_prompt", "")


class _KnowEdit(FileBenchmark):
    version = "1"
    licence = "MIT"
    citation = "Zhang et al. 2024 (KnowEdit, arXiv 2401.01286)"
    splits = ("test", "train")


class WikiRecent(_KnowEdit):
    """Facts that came into Wikidata after July 2022: something is added, no answer is replaced."""

    name = "wiki-recent"
    source = "KnowEdit, benchmark/wiki_recent (hub: zjunlp/KnowEdit); facts and probes from RippleEdits"
    citation = "Zhang et al. 2024 (KnowEdit, arXiv 2401.01286); Cohen et al. 2024 (RippleEdits, arXiv 2307.12976)"
    probes = ("rewrite", "rephrase", "same_subject", "forgetfulness", "two_hop", "alias", "logical")
    forms = (RecordFormat.of("KnowEdit", _fact, _COMMON, _REPHRASED),)


class WikiCounterfact(_KnowEdit):
    """Popular facts of Wikidata, edited to a wrong answer."""

    name = "wiki-counterfact"
    source = "KnowEdit, benchmark/wiki_counterfact (hub: zjunlp/KnowEdit); facts and probes from RippleEdits"
    citation = WikiRecent.citation
    probes = ("rewrite", "rephrase", "same_subject", "forgetfulness", "two_hop", "alias", "logical")
    forms = (RecordFormat.of("KnowEdit", _fact, f"{_COMMON} ground_truth", _REPHRASED),)


class WikiBio(_KnowEdit):
    """Biographies that GPT-3 made up, put right: the next true sentence after a passage.  There is no rephrase."""

    name = "wikibio"
    source = "KnowEdit, benchmark/WikiBio (hub: zjunlp/KnowEdit); passages of Wikipedia as in SelfCheckGPT"
    licence = "MIT (KnowEdit); text of Wikipedia CC BY-SA"
    citation = "Zhang et al. 2024 (KnowEdit, arXiv 2401.01286); Manakul et al. 2023 (SelfCheckGPT)"
    probes = ("rewrite", "same_subject")
    forms = (RecordFormat.of("KnowEdit", _biography, "text labels concept locality"),)
