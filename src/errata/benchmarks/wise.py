"""WISE's two sets of long answers (Wang et al. 2024): hallucination (SelfCheckGPT) and temporal (new entities).

Both ask for a text about the subject and check locality on a passage of web text cut in two (``unrelated``; the cut may fall inside
a word, and errata joins prompt and answer with one space).  Hallucination is a stream of the sentences of each biography: the
prompt holds the passage so far.

Temporal adds ``ood_rephrase``, another text about the entity that is no answer to the prompt.  WISE scores how well the edited
model foretells its tokens; here its first sentence is the prompt and the rest the answer of an ``out_of_domain`` probe, to be read
teacher-forced or by likelihood.
"""

from __future__ import annotations

import re

from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_FIELDS = "prompt target_new subject locality_prompt locality_ground_truth"


def halves(text: str) -> tuple[str, str]:
    """(first sentence, the rest); of a single sentence, its halves by words."""
    first, *rest = _SENTENCE.split(text.strip(), maxsplit=1)
    if rest and rest[0].strip():
        return first, rest[0]
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _text(record: Record) -> Draft:
    draft = Draft(record.text("prompt"), record.text("target_new"), record.text("subject"))
    if "ood_rephrase" in record:
        draft.ask("out_of_domain", *halves(record.text("ood_rephrase")))
    draft.ask("unrelated", record.text("locality_prompt"), record.text("locality_ground_truth"))
    return draft


class WISEHallucination(FileBenchmark):
    """Passages that GPT-3 made up, put right sentence by sentence."""

    name = "wise-hallucination"
    version = "1"
    source = "EasyEdit, data/wise/hallucination/hallucination-edit.json; passages from SelfCheckGPT, locality from RedPajama"
    licence = "MIT (EasyEdit, SelfCheckGPT); its locality is web text of unclear licence"
    citation = "Wang et al. 2024 (WISE, arXiv 2405.14768); Manakul et al. 2023 (SelfCheckGPT)"
    probes = ("rewrite", "unrelated")
    splits = ("edit", "train")
    forms = (RecordFormat.of("hallucination", _text, _FIELDS),)


class WISETemporal(FileBenchmark):
    """Texts about entities that came up after a model's training."""

    name = "wise-temporal"
    version = "1"
    source = "EasyEdit, data/wise/temporal/temporal-edit.json; locality from web text"
    licence = "MIT (EasyEdit); its locality is web text of unclear licence"
    citation = "Wang et al. 2024 (WISE, arXiv 2405.14768)"
    probes = ("rewrite", "out_of_domain", "unrelated")
    splits = WISEHallucination.splits
    forms = (RecordFormat.of("temporal", _text, f"{_FIELDS} ood_rephrase"),)
