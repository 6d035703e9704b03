"""The metrics there are: which probes each averages over, in which protocols, of which fields of a record (see `errata.score.metrics`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from errata.request import LOCAL_KINDS

PROTOCOLS: Final = ("starts", "generated", "contains", "teacher_forced", "free_tokens", "likelihood", "sampled")


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means.  ``version`` rises when a change makes it incomparable with numbers published before.

    kinds     probe kinds it averages over
    after     protocol -> record field
    before    protocol -> record field of the unedited model; empty where that is 1 by definition
    known     restricted to probes the unedited model answered truly (version 2: its text begins with the answer; 1: equals it)
    true      restricted to probes with an answer of their own: "as before" is no truth
    by_kind   a case's number is the mean over its kinds of probe of each kind's mean (EasyEdit's script), not the mean over all its probes
    harmonic  the harmonic mean over ``kinds`` of each kind's mean over cases; there is none unless every kind occurs
    share     each probe's number is a share, from 0 to 1: its interval is one for shares (`errata.score.intervals`)
    """

    name: str
    version: int
    kinds: tuple[str, ...]
    after: Mapping[str, str]
    before: Mapping[str, str]
    known: bool = False
    true: bool = False
    by_kind: bool = False
    harmonic: bool = False
    share: bool = True
    note: str = ""


_FREE_AFTER: Final = {"starts": "starts_after", "generated": "gen_match_after", "contains": "contains_after"}
_FREE_BEFORE: Final = {"starts": "starts_before", "generated": "gen_match_before", "contains": "contains_before"}
AFTER: Final = {**_FREE_AFTER, "teacher_forced": "tf_after", "free_tokens": "free_after"}
_BEFORE: Final = {**_FREE_BEFORE, "teacher_forced": "tf_before", "free_tokens": "free_before"}
_AGREE: Final = {"starts": "answer_agree", "generated": "gen_agree", "teacher_forced": "tf_agree", "free_tokens": "free_agree"}
_LAST_NAMES: Final = (("starts", "starts"), ("generated", "gen_match"), ("contains", "contains"))
_LAST: Final = (
    {protocol: f"{name}_last_after" for protocol, name in _LAST_NAMES},
    {protocol: f"{name}_last_before" for protocol, name in _LAST_NAMES},
)
_LOCAL: Final = LOCAL_KINDS
_PORTABLE: Final = ("two_hop", "multi_hop", "reverse", "alias", "logical")
_FORCED: Final = ({"teacher_forced": "tf_after"}, {"teacher_forced": "tf_before"})
_WINS: Final = ({"likelihood": "nll_wins_after"}, {"likelihood": "nll_wins_before"})
_MARGIN: Final = ({"likelihood": "nll_margin_after"}, {"likelihood": "nll_margin_before"})
_SURFACE: Final = ({**AFTER, **_WINS[0]}, {**_BEFORE, **_WINS[1]})
_AVOIDED: Final = (
    {
        "starts": "starts_not_after",
        "generated": "gen_not_after",
        "contains": "contains_not_after",
        "teacher_forced": "tf_not_after",
        **_WINS[0],
    },
    {
        "starts": "starts_not_before",
        "generated": "gen_not_before",
        "contains": "contains_not_before",
        "teacher_forced": "tf_not_before",
        **_WINS[1],
    },
)

ROBUST: Final = (
    Metric("paraphrase_seen", 1, ("paraphrase_seen",), *_SURFACE, note="the request's own paraphrases, which the editor was given"),
    Metric("subject_seen", 1, ("subject_seen",), *_SURFACE, note="the prompt under names of the subject that may have been trained on"),
    Metric("subject_unseen", 1, ("subject_unseen",), *_SURFACE, note="the same under names that were not"),
    Metric("shuffled_seen", 1, ("shuffled_seen",), *_SURFACE, note="the subject's tokens in orders that may have been trained on"),
    Metric("shuffled_unseen", 1, ("shuffled_unseen",), *_SURFACE, note="the same in orders that were not"),
    Metric("long_seen", 1, ("long_seen",), *_SURFACE, note="behind 300 words of text that may have been trained with"),
    Metric("long_unseen", 1, ("long_unseen",), *_SURFACE, note="the same behind text that was not"),
    Metric("long_tokens_seen", 1, ("long_tokens_seen",), *_SURFACE, note="behind 512 tokens of text, the first 300 words as in long_seen"),
    Metric("long_tokens_unseen", 1, ("long_tokens_unseen",), *_SURFACE, note="the same behind text that was not trained with"),
    Metric("question_form", 1, ("question_form",), *_SURFACE, note="a fact edited as a sentence to complete, asked as a question"),
    Metric("completion_form", 1, ("completion_form",), *_SURFACE, note="a fact edited as a question, asked as a sentence to complete"),
    Metric("chat", 1, ("chat",), *_SURFACE, note="the edited prompt as the user's turn of the chat template (reliability is without)"),
    Metric(
        *("true_false", 1, ("statement_true", "statement_false"), *_SURFACE),
        note="of the fact with the new answer and with the old one, each stated once, True or False: saying one always gives a half",
    ),
    Metric(
        *("negation", 1, ("negation",), *_AVOIDED),
        note="after the negated prompt the new answer is not said (likelihood: less likely than the old one); an edit that failed "
        "also passes, so read it beside reliability",
    ),
)

METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("reliability", 1, ("rewrite",), AFTER, _BEFORE, note="the edited prompt gives the new answer"),
        Metric("generality", 1, ("rephrase",), AFTER, _BEFORE, note="other ways to ask give the new answer"),
        Metric("reliability_last", 1, ("rewrite",), *_LAST, note="the edited prompt gives what was last written of the fact"),
        Metric("generality_last", 1, ("rephrase",), *_LAST, note="other ways to ask give what was last written of the fact"),
        Metric(
            *("reliability_ceiling", 1, ("rewrite",), {"starts": "is_last"}, {"starts": "is_last"}),
            note="no later edit has written the fact otherwise: what reliability an editor that generalises perfectly ends at",
        ),
        Metric("portability", 1, _PORTABLE, AFTER, _BEFORE, note="what follows from the new answer holds too"),
        Metric(
            *("portability_by_kind", 1, _PORTABLE, AFTER, _BEFORE), by_kind=True, note="the same, a case's kinds of probe weighed alike"
        ),
        Metric("two_hop", 1, ("two_hop",), AFTER, _BEFORE, note="a question through the new answer"),
        Metric("reverse", 1, ("reverse",), AFTER, _BEFORE, note="the fact said backwards"),
        Metric("alias", 1, ("alias",), AFTER, _BEFORE, note="the subject under another name"),
        Metric("multi_hop", 1, ("multi_hop",), AFTER, _BEFORE, note="a question through a longer chain of facts"),
        Metric("logical", 1, ("logical",), AFTER, _BEFORE, note="what must hold with the new fact"),
        Metric("sub_fact", 1, ("sub_fact",), AFTER, _BEFORE, note="a part of a long answer, asked for by itself"),
        Metric("out_of_domain", 1, ("out_of_domain",), _FORCED[0], _FORCED[1], note="another text about the subject goes on as it does"),
        Metric("locality_agreement", 1, _LOCAL, _AGREE, {}, note="other facts are answered as before, right or wrong"),
        Metric(
            *("locality_agreement_by_kind", 1, _LOCAL, _AGREE, {}), by_kind=True, note="the same, a case's kinds of probe weighed alike"
        ),
        Metric(
            *("locality_first_word", 1, _LOCAL, {"starts": "first_word_agree"}, {}),
            note="other facts are answered with the same first word as before",
        ),
        Metric(
            *("watch", 1, ("watch",), {**_AGREE, "starts": "first_word_agree"}, {}),
            note="the nearest subjects, found on the model and shown to no editor, are answered with the same first word as before",
        ),
        Metric("locality_correct", 1, _LOCAL, AFTER, _BEFORE, true=True, note="other facts are answered truly"),
        Metric(
            "locality_correct_known",
            2,
            _LOCAL,
            AFTER,
            _BEFORE,
            known=True,
            true=True,
            note="other facts known before are still answered truly",
        ),
        Metric("same_subject", 1, ("same_subject",), _AGREE, {}, note="other facts of the subject are answered as before"),
        Metric("forgetfulness", 1, ("forgetfulness",), _AGREE, {}, note="the older answers of a relation with several stay"),
        Metric("distracting", 1, ("distracting",), AFTER, _BEFORE, note="neighbours keep their answers with the new fact in front"),
        Metric(
            "choices", 1, ("choice",), {"likelihood": "right_after"}, {"likelihood": "right_before"}, note="the right choice is likeliest"
        ),
        Metric("questions", 1, ("question",), _FREE_AFTER, _FREE_BEFORE, note="right answers"),
        Metric(
            "sentiment",
            1,
            ("sentiment",),
            {"likelihood": "sentiment_after"},
            {"likelihood": "sentiment_before"},
            share=False,
            note="ConvSent's ES",
        ),
        Metric("S", 1, ("rewrite", "rephrase", "neighbour"), *_WINS, harmonic=True, note="harmonic mean of ES, PS and NS"),
        Metric("ES", 1, ("rewrite",), *_WINS, note="the new answer is likelier than the old one after the edited prompt"),
        Metric("PS", 1, ("rephrase",), *_WINS, note="the same after other ways to ask"),
        Metric("NS", 1, ("neighbour",), *_WINS, note="a neighbour's own answer is likelier than the edit's new one"),
        Metric("EM", 1, ("rewrite",), *_MARGIN, share=False, note="how much more probable the new answer is than the old one"),
        Metric("PM", 1, ("rephrase",), *_MARGIN, share=False, note="the same after other ways to ask"),
        Metric(
            "NM",
            1,
            ("neighbour",),
            *_MARGIN,
            share=False,
            note="how much more probable a neighbour's own answer is than the edit's new one",
        ),
        Metric(
            "GE",
            1,
            ("generation",),
            {"sampled": "ge_after"},
            {"sampled": "ge_before"},
            share=False,
            note="n-gram entropy of sampled text, bits",
        ),
        Metric(
            "RS",
            1,
            ("generation",),
            {"sampled": "rs_after"},
            {"sampled": "rs_before"},
            share=False,
            note="likeness to texts with the new answer",
        ),
        *ROBUST,
    )
}
