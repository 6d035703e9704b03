"""ConvSent (Mitchell et al. 2022, SERAC; as in KnowEdit): make a dialogue model speak well, or badly, of something.

A record names a thing (``ent``) and has replies of either sentiment.  The wanted sentiment is drawn by a hash of the thing.  The
edit's target is one wanted reply; the other wanted replies and those of the opposite sentiment are ``same_sentiment`` and
``opposite_sentiment`` probes of the edited question, from whose likelihoods before and after the published metric is made

    ES = σ(ℓ_same,after − ℓ_opposite,after) · min(1, exp(ℓ_same,after − ℓ_same,before)),   ℓ = mean log-probability of a token

A tenth of the things, by hash, is never edited: the question about two of these should be answered as before (``unrelated``,
without an answer), however many edits are made.  No answer of the model is known beforehand, so nothing is called old.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from errata.benchmarks.drafts import Draft, UnusableRecord
from errata.benchmarks.facts import share
from errata.benchmarks.files import FileBenchmark, RecordFormat
from errata.benchmarks.records import Record

QUESTION = "What do you think of {}?"
OTHERS = 2  # bystanders asked about in each case
BYSTANDERS = 0.1  # of the things
SENTIMENTS = ("pos", "neg")


def _stays(thing: str) -> bool:
    return share("bystander", thing) < BYSTANDERS


def _replies(record: Record) -> Draft:
    thing = record.text("ent")
    if _stays(thing):
        raise UnusableRecord("set aside as a bystander, whose replies should stay")
    wanted = SENTIMENTS[share("sentiment", thing) < 0.5]
    same, opposite = (
        list(dict.fromkeys(text.strip() for text in record.texts(side) if text.strip())) for side in (wanted, *({*SENTIMENTS} - {wanted}))
    )
    same = [text for text in same if text not in opposite]
    if len(same) < 2 or not opposite:
        raise UnusableRecord("fewer than two replies of the wanted sentiment, or none of the opposite")
    same.sort(key=lambda text: share("reply", thing, text))
    draft = Draft(QUESTION.format(thing), same[0], thing)
    for kind, replies in (("same_sentiment", same[1:]), ("opposite_sentiment", opposite)):
        for reply in replies:
            draft.ask(kind, draft.prompt, reply)
    return draft


class ConvSent(FileBenchmark):
    """Conversational sentiment."""

    name = "convsent"
    version = "1"
    source = "blender_test.json, blender_val.json, blender_train.json of SERAC; KnowEdit, benchmark/Convsent"
    licence = "MIT"
    citation = "Mitchell et al. 2022 (SERAC, arXiv 2206.06520); Zhang et al. 2024 (KnowEdit, arXiv 2401.01286)"
    probes = ("rewrite", "same_sentiment", "opposite_sentiment", "unrelated")
    splits = ("test", "val", "train")
    forms = (RecordFormat.of("KnowEdit", _replies, "ent pos neg"),)

    def draft(self, form: RecordFormat[Any], records: Sequence[Record], i: int) -> Draft:
        draft = super().draft(form, records, i)
        others = itertools.chain(records[i + 1 :], records[:i])
        stay = (thing for record in others if _stays(thing := record.text("ent")))
        for thing in itertools.islice(stay, OTHERS):
            draft.ask("unrelated", QUESTION.format(thing))
        return draft
