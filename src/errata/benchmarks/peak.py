"""PEAK (Ma et al. 2024): a further object is appended to a relation that has several; the others must not be disturbed.

``target_true`` is one object the subject has and keeps, so nothing is called old.  The lists of true and false objects
(``postive_list``, ``negtive_list``: the file's spelling), over which the paper weighs probabilities, are not used.
"""

from __future__ import annotations

from errata.benchmarks.counterfact import filled, requested
from errata.benchmarks.drafts import Draft
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record


def _appended(record: Record) -> Draft:
    edit = requested(record)
    subject = edit.text("subject")
    draft = Draft(filled(edit, edit.text("prompt"), subject), edit.inner("target_new").text("str"), subject)
    for prompt in record.texts("para_add_prompts"):
        draft.ask("rephrase", prompt, draft.target)
    for i, pair in enumerate(record.rows("neighborhood_prompts")):
        if len(pair) != 2:
            raise record.fail(f"neighborhood_prompts[{i}] must be a pair of prompt and answer")
        draft.ask("neighbour", *pair)
    return draft


class PEAK(FileBenchmark):
    """Knowledge appending."""

    name = "peak"
    version = "1"
    source = "PEAK_counter.json and PEAK_time.json of mjy1111/PEAK"
    licence = "none stated"
    citation = "Ma et al. 2024 (PEAK, Neighboring Perturbations of Knowledge Editing)"
    probes = ("rewrite", "rephrase", "neighbour")
    splits = ("time", "counter")
    forms = (
        RecordFormat.of(
            "PEAK",
            _appended,
            "case_id requested_rewrite para_add_prompts neighborhood_prompts postive_list",
            unused="negtive_list negtive_random_list",
        ),
    )
