"""Probes for what an edit should survive: `add_robustness_probes` adds them to the cases of any benchmark, whatever the method.

Kinds (`errata.request.ROBUST_KINDS`; metrics of the same names in `errata.score.metrics`), "_seen" for surfaces an editor may have
trained on, "_unseen" for others of the same making (`errata.text.surfaces`):

    paraphrase_seen              the request's paraphrases; unseen ones are the benchmark's own probes of kind "rephrase"
    subject_seen, _unseen        the prompt under other names of the subject
    shuffled_seen, _unseen       the prompt with the subject's tokens in another order
    long_seen, _unseen           the prompt behind 300 words; long_tokens_…: behind at most 512 tokens, which begin with the same words
    question_form                a sentence to complete, asked as a question (a rephrase of the case that is one, else by rule)
    completion_form              a question, asked as a sentence to complete
    chat                         the prompt in the tokenizer's chat template
    statement_true, _false       "… True or false? Answer:" after the prompt with the new answer, and with the old one
    negation                     the prompt denied

The right answer to all but the last two is the new one.  A true statement wants "True", the old fact "False".  After a negated prompt
many answers are right and one is wrong, the new one: the score counts that it is not said, and an edit that did not work passes.

A probe that cannot be asked is not added and counts nowhere: no subject, no old answer (statements), a question to negate, no chat
template, a text longer than the model's window (less the budget of an in-context editor, for all methods of a run).  A case that
brings probes of a kind keeps them and gets no more of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from errata.core.model import LM
from errata.core.window import fits
from errata.request import SURFACE_KINDS, Case, EditRequest, Probe, fill
from errata.score.evaluator import MAX_NEW_TOKENS
from errata.text import surfaces
from errata.text.surfaces import PASSAGES_SEEN, PASSAGES_UNSEEN

_COPULAS: Final = frozenset({"is", "was", "are", "were"})
SMALL: Final = frozenset(
    {"The", "A", "An", "In", "On", "At", "By", "From", "To", "For", "Where", "What", "Which", "Who"}
)  # at a sentence's start
_MARGIN: Final = MAX_NEW_TOKENS + 32  # tokens kept free of the window: for answer and chat template

# The names of REP's evaluation -> the kind of probe they count.
PAPER: Final[dict[str, str]] = {
    "success": "rewrite",
    "paraphrase": "rephrase",
    "rephrase_id": "subject_seen",
    "rephrase_od": "subject_unseen",
    "shuffle_id": "shuffled_seen",
    "shuffle_od": "shuffled_unseen",
    "long_held_acc": "long_seen",
    "long_acc": "long_unseen",
}


def room_of(lm: LM, editors: Iterable[Any]) -> int:
    """The longest context that any of the editors may put in front."""
    return max(editor.context_budget(lm) if hasattr(editor, "context_budget") else 0 for editor in editors)


def add_robustness_probes(lm: LM, cases: Iterable[Case], seed: int = 0, long_seen: int = 1, room: int = 0) -> list[Case]:
    """The cases with robustness probes behind their own.

    A case is asked behind ``long_seen`` of the five seen passages, in turn from case to case: long texts cost most of the time, and
    the mean over cases is that of all five.  ``room``: tokens of the model's window that an in-context editor fills.
    """
    return [replace(case, probes=(*case.probes, *_probes(lm, case, i, seed, long_seen, room))) for i, case in enumerate(cases)]


def unasked(cases: Iterable[Case]) -> list[str]:
    """The long contexts that no case is asked behind: they do not fit the model's window."""
    there = {probe.kind for case in cases for probe in case.probes}
    return [kind for kind in SURFACE_KINDS if kind.startswith("long_") and kind not in there]


def _probes(lm: LM, case: Case, index: int, seed: int, long_seen: int, room: int) -> list[Probe]:
    request, own = case.request, {probe.kind for probe in case.probes}
    asked = [*_names(lm, request, seed), *_contexts(lm, request, index, seed, long_seen), *_forms(lm, case), *_logic(request)]
    trained = {request.prompt, *(prompt for prompt, _ in request.unrelated)}
    seen = {p.prompt for p in (*case.probes, *asked) if p.kind.endswith("_seen")} | set(request.paraphrases)
    out: dict[tuple[str, str], Probe] = {}
    for probe in asked:
        known = probe.kind != "chat" and (probe.prompt in trained or (not probe.kind.endswith("_seen") and probe.prompt in seen))
        if probe.kind not in own and not known and _fits(lm, probe, room):
            out.setdefault((probe.kind, probe.prompt), probe)
    return list(out.values())


def _names(lm: LM, request: EditRequest, seed: int) -> list[Probe]:
    out = [Probe("paraphrase_seen", prompt, request.target) for prompt in request.paraphrases]
    if request.subject is None:
        return out
    found = surfaces.make_surfaces(lm, request, seed)
    for kind, names in (
        ("subject_seen", found.names_seen),
        ("subject_unseen", found.names_unseen),
        ("shuffled_seen", found.shuffled_seen),
        ("shuffled_unseen", found.shuffled_unseen),
    ):
        out += [Probe(kind, fill(request, name), request.target) for name in names]
    return out


def _contexts(lm: LM, request: EditRequest, index: int, seed: int, long_seen: int) -> list[Probe]:
    count = PASSAGES_SEEN + PASSAGES_UNSEEN
    key = ("robustness passages", seed)
    if key not in lm.base_cache:
        lm.base_cache[key] = (("long", surfaces.passages(count, seed=seed)), ("long_tokens", surfaces.token_passages(lm, count, seed=seed)))
    out = []
    for kind, texts in lm.base_cache[key]:
        seen = [texts[(index + i) % PASSAGES_SEEN] for i in range(min(long_seen, PASSAGES_SEEN))]
        out += [Probe(f"{kind}_seen", text + request.prompt, request.target) for text in seen]
        out += [Probe(f"{kind}_unseen", text + request.prompt, request.target) for text in texts[PASSAGES_SEEN:]]
    return out


def _forms(lm: LM, case: Case) -> list[Probe]:
    request = case.request
    prompt = request.prompt.rstrip()
    if prompt.endswith("?"):
        out = [Probe("completion_form", f'The answer to the question "{prompt}" is', request.target)]
    else:
        natural = [p.prompt for p in case.probes if (p.kind, p.target) == ("rephrase", request.target) and p.prompt.rstrip().endswith("?")]
        out = [Probe("question_form", natural[0] if natural else f"{prompt} what?", request.target)]
    if getattr(lm.tokenizer, "chat_template", None):
        out.append(Probe("chat", request.prompt, request.target))
    return out


def _logic(request: EditRequest) -> list[Probe]:
    prompt = request.prompt.rstrip()
    out = []
    if request.old is not None:
        for kind, answer, verdict in (("statement_true", request.target, "True"), ("statement_false", request.old, "False")):
            out.append(Probe(kind, f"{prompt} {answer.strip()}. True or false? Answer:", verdict))
    if (denied := negated(prompt, request.subject)) is not None:
        out.append(Probe("negation", denied, request.target))
    return out


def negated(prompt: str, subject: str | None = None) -> str | None:
    """The prompt denied: "… is not", or "It is not true that …" where it does not end in a form of "be"; None for a question."""
    prompt = prompt.rstrip()
    if prompt.endswith("?"):
        return None
    if prompt.rpartition(" ")[2] in _COPULAS:
        return f"{prompt} not"
    small = prompt.partition(" ")[0] in SMALL and not (subject is not None and prompt.startswith(subject))
    return f"It is not true that {prompt[0].lower() + prompt[1:] if small else prompt}"


def _fits(lm: LM, probe: Probe, room: int) -> bool:
    return fits(lm, f"{probe.prompt} {probe.target}", _MARGIN + room)


def micro_averages(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """REP's own averages, to set beside its tables: {"method", "score", "value", "successes", "n"} in the order of `PAPER`, then locality.

        value = Σ_items 1[every token of the target is the argmax, the target being fed] / items, over all records alike

    A case with more names, shuffles or paraphrases weighs more, and no interval can be had from a sum over dependent items: the
    metrics of `errata.score.metrics` average within a case first.  Locality is the mean share of tokens answered as before.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(str(record["method"]), []).append(record)
    out = []
    for method, mine in by_method.items():
        for score, kind in PAPER.items():
            if hits := [float(r["tf_after"]) == 1.0 for r in mine if r["kind"] == kind]:
                out.append(_micro(method, score, hits))
        if kept := [float(r["tf_agree"]) for r in mine if r["kind"] in ("neighbour", "unrelated")]:
            out.append(_micro(method, "locality", kept))
    return out


def _micro(method: str, score: str, items: Sequence[float]) -> dict[str, Any]:
    return {"method": method, "score": score, "value": sum(items) / len(items), "successes": float(sum(items)), "n": len(items)}
