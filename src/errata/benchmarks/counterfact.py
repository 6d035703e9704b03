"""CounterFact (Meng et al. 2022): facts of Wikidata edited to a wrong object of the same relation.

Original form: two paraphrases behind an unrelated sentence; ten neighbourhood prompts, other subjects whose true object is the
edited one's old object; ten prompts to go on from (fluency; consistency needs the reference texts of ROME, which are no part of
the file).  Flattened form (EasyEdit): one paraphrase without the sentence, one neighbour.

Some files of "Editing Large Language Models" (Yao et al. 2023) add to the original form: a question through the new object
(two_hop), the subject under another name (alias), another fact of the subject (same_subject), and the neighbours again behind the
edited fact (distracting).  ``attribute_prompts``, subjects that truly have the new object, are no probes: published scores do not
use them.
"""

from __future__ import annotations

from errata.benchmarks.drafts import Draft, ask_two_hop
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record
from errata.request import Case


def filled(record: Record, template: str, subject: str) -> str:
    """A prompt template with its one {} filled."""
    if template.count("{}") != 1:
        raise record.fail(f"the prompt {template!r} must hold {{}} once, where the subject goes")
    return template.replace("{}", subject)


def requested(record: Record) -> Record:
    """The ``requested_rewrite`` of CounterFact's records and PEAK's."""
    return record.inner("requested_rewrite").only("prompt", "relation_id", "target_new", "target_true", "subject")


def rewrite(record: Record) -> Draft:
    """The edit of a ``requested_rewrite`` object, CounterFact's and MQuAKE's."""
    new, true = record.inner("target_new").only("str", "id"), record.inner("target_true").only("str", "id")
    subject = record.text("subject")
    return Draft(filled(record, record.text("prompt"), subject), new.text("str"), subject, true.text("str"))


def _original(record: Record) -> Draft:
    edit = requested(record)
    draft = rewrite(edit)
    true = edit.inner("target_true").text("str")
    for prompt in record.texts("paraphrase_prompts"):
        draft.ask("rephrase", prompt, draft.target)
    for prompt in record.texts("neighborhood_prompts"):
        draft.ask("neighbour", prompt, true)
    draft.openings = record.texts("generation_prompts")
    ask_two_hop(draft, record)
    if "alternative_subject" in record:
        draft.ask("alias", filled(edit, edit.text("prompt"), record.text("alternative_subject")), draft.target)
    if "unrelated_relation" in record:
        other = record.inner("unrelated_relation").only("relation_id", "object", "question")
        draft.ask("same_subject", other.text("question"), *other.answers("object"))
    for prompt in record.texts("distracting_neighborhood_prompts") if "distracting_neighborhood_prompts" in record else ():
        draft.ask("distracting", prompt, true)
    return draft


def _flattened(record: Record) -> Draft:
    draft = Draft(record.text("prompt"), record.text("target_new"), record.text("subject"), record.text("ground_truth"))
    draft.ask("rephrase", record.text("rephrase_prompt"), draft.target)
    draft.ask("neighbour", record.text("locality_prompt"), *record.answers("locality_ground_truth"))
    return draft


class CounterFact(FileBenchmark):
    """Counterfactual edits with neighbours that share the old object."""

    name = "counterfact"
    only_known = True
    version = "1"
    source = "counterfact.json of ROME and MEMIT (original form); counterfact-edit.json of EasyEdit (flattened form)"
    licence = "MIT"
    citation = "Meng et al. 2022 (ROME, arXiv 2202.05262); Yao et al. 2023 (portability, distracting neighbours)"
    probes = ("rewrite", "rephrase", "neighbour", "same_subject", "distracting", "two_hop", "alias")
    splits = ("edit", "val", "train")
    forms = (
        RecordFormat.of(
            "original",
            _original,
            "case_id requested_rewrite paraphrase_prompts neighborhood_prompts generation_prompts",
            optional="portability alternative_subject unrelated_relation distracting_neighborhood_prompts",
            unused="pararel_idx attribute_prompts",
        ),
        RecordFormat.of(
            "flattened",
            _flattened,
            "prompt target_new subject ground_truth rephrase_prompt locality_prompt locality_ground_truth",
            unused="case_id",
        ),
    )

    def generation(self, case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(prompts to go on from, no reference texts); nothing in the flattened form."""
        return self.openings.get(case.id, ()), ()

    def collection(self) -> tuple[str, ...]:
        """No reference text is part of the file."""
        return ()
