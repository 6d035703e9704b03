"""The metrics there are: which probes each averages over, in which protocols, of which fields of a record (see `errata.score.metrics`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from errata.request import LOCAL_KINDS

PROTOCOLS: Final = ("teacher_forced", "generated", "free_tokens", "likelihood", "sampled")


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means.  ``version`` rises when a change makes it incomparable with numbers published before.

    kinds     probe kinds it averages over
    after     protocol -> record field
    before    protocol -> record field of the unedited model; empty where that is 1 by definition
    known     restricted to probes the unedited model answered truly
    true      restricted to probes with an answer of their own: "as before" is no truth
    harmonic  the harmonic mean over ``kinds`` of each kind's mean over cases; there is none unless every kind occurs
    """

    name: str
    version: int
    kinds: tuple[str, ...]
    after: Mapping[str, str]
    before: Mapping[str, str]
    known: bool = False
    true: bool = False
    harmonic: bool = False
    note: str = ""


AFTER: Final = {"teacher_forced": "tf_after", "generated": "gen_match_after", "free_tokens": "free_after"}
_BEFORE: Final = {"teacher_forced": "tf_before", "generated": "gen_match_before", "free_tokens": "free_before"}
_AGREE: Final = {"teacher_forced": "tf_agree", "generated": "gen_agree", "free_tokens": "free_agree"}
_LOCAL: Final = LOCAL_KINDS
_PORTABLE: Final = ("two_hop", "multi_hop", "reverse", "alias", "logical")
_FORCED: Final = ({"teacher_forced": "tf_after"}, {"teacher_forced": "tf_before"})
_WINS: Final = ({"likelihood": "nll_wins_after"}, {"likelihood": "nll_wins_before"})
_MARGIN: Final = ({"likelihood": "nll_margin_after"}, {"likelihood": "nll_margin_before"})

METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("reliability", 1, ("rewrite",), AFTER, _BEFORE, note="the edited prompt gives the new answer"),
        Metric("generality", 1, ("rephrase",), AFTER, _BEFORE, note="other ways to ask give the new answer"),
        Metric("portability", 1, _PORTABLE, AFTER, _BEFORE, note="what follows from the new answer holds too"),
        Metric("two_hop", 1, ("two_hop",), AFTER, _BEFORE, note="a question through the new answer"),
        Metric("reverse", 1, ("reverse",), AFTER, _BEFORE, note="the fact said backwards"),
        Metric("alias", 1, ("alias",), AFTER, _BEFORE, note="the subject under another name"),
        Metric("multi_hop", 1, ("multi_hop",), AFTER, _BEFORE, note="a question through a longer chain of facts"),
        Metric("logical", 1, ("logical",), AFTER, _BEFORE, note="what must hold with the new fact"),
        Metric("sub_fact", 1, ("sub_fact",), AFTER, _BEFORE, note="a part of a long answer, asked for by itself"),
        Metric("out_of_domain", 1, ("out_of_domain",), _FORCED[0], _FORCED[1], note="another text about the subject goes on as it does"),
        Metric("locality_agreement", 1, _LOCAL, _AGREE, {}, note="other facts are answered as before, right or wrong"),
        Metric("locality_correct", 1, _LOCAL, AFTER, _BEFORE, true=True, note="other facts are answered truly"),
        Metric(
            "locality_correct_known",
            1,
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
        Metric("questions", 1, ("question",), {"generated": "gen_match_after"}, {"generated": "gen_match_before"}, note="right answers"),
        Metric("sentiment", 1, ("sentiment",), {"likelihood": "sentiment_after"}, {"likelihood": "sentiment_before"}, note="ConvSent's ES"),
        Metric("S", 1, ("rewrite", "rephrase", "neighbour"), *_WINS, harmonic=True, note="harmonic mean of ES, PS and NS"),
        Metric("ES", 1, ("rewrite",), *_WINS, note="the new answer is likelier than the old one after the edited prompt"),
        Metric("PS", 1, ("rephrase",), *_WINS, note="the same after other ways to ask"),
        Metric("NS", 1, ("neighbour",), *_WINS, note="a neighbour's own answer is likelier than the edit's new one"),
        Metric("EM", 1, ("rewrite",), *_MARGIN, note="how much more probable the new answer is than the old one"),
        Metric("PM", 1, ("rephrase",), *_MARGIN, note="the same after other ways to ask"),
        Metric("NM", 1, ("neighbour",), *_MARGIN, note="how much more probable a neighbour's own answer is than the edit's new one"),
        Metric("GE", 1, ("generation",), {"sampled": "ge_after"}, {"sampled": "ge_before"}, note="n-gram entropy of sampled text, bits"),
        Metric("RS", 1, ("generation",), {"sampled": "rs_after"}, {"sampled": "rs_before"}, note="likeness to texts with the new answer"),
    )
}
