"""From cases to records with as few forward passes as possible.

Every probe becomes a *query* (stack, prompt, target).  Queries that ask the same of the same stack are asked once; the
unedited model's answers are found once for all methods.  Queries are sorted by length and run in batches whose rows may
run under different stacks: scoring N single edits takes as many passes as scoring one edit with N times the probes.

A prompt runs once: its answers, the rival ones and the free one all go on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from errata.core.bank import Stack
from errata.core.decode import PrefilledBatch, decode, detokenize
from errata.core.model import LM, STOPS
from errata.core.tokens import Encoded
from errata.request import LOCAL_KINDS, SURFACE_KINDS, Case, EditRequest, Probe
from errata.score import match, teacher_forcing
from errata.score.teacher_forcing import TeacherForced

Progress = Callable[[int, int], None]
ROWS = 192  # of a batch; more gains nothing on two cores and holds more memory
TOKENS = 1 << 14  # of a batch: long contexts run in smaller ones
MAX_NEW_TOKENS = 12  # of a free answer; more where an answer it is compared with is longer (`tokens_to_ask`)
_BEHIND = 4  # tokens asked behind the longest of those: whether a word ends there
_STATEMENTS = {"statement_true": "False", "statement_false": "True"}  # kind -> the wrong answer


@dataclass
class AnswerCache:
    """What stacks said, kept by (stack key, prompt[, target]) so that nothing is asked twice; free answers as text and as token ids.

    free_tokens  records made with these answers also hold the fields of that protocol
    chat         prompts are asked in the tokenizer's chat template; ``in_chat`` are the answers to such probes (kind "chat")
    limits       so many tokens were asked of a free answer.  One prompt may be asked for short and for long answers: `said` cuts what it
                 returns to the tokens that its probe asks, so that no record depends on what else was asked
    """

    forced: dict[tuple[str, str, str], TeacherForced] = field(default_factory=dict)
    text: dict[tuple[str, str], str] = field(default_factory=dict)
    ids: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    free_tokens: bool = False
    chat: bool = False
    in_chat: AnswerCache | None = None
    limits: dict[tuple[str, str], int] = field(default_factory=dict)

    def has(self, name: tuple[str, str], tokens: int) -> bool:
        """Whether a free answer of so many tokens is there: it ended before, or as many were asked."""
        limit = self.limits.get(name, MAX_NEW_TOKENS)
        return name in self.text and (limit >= tokens or len(self.ids.get(name, ())) < limit)

    def said(self, lm: LM, name: tuple[str, str], tokens: int) -> tuple[str, tuple[int, ...]]:
        """(text, ids) of a free answer of at most so many tokens."""
        text, ids = self.text[name], self.ids.get(name, ())
        if len(ids) <= tokens:
            return text, ids
        return detokenize(lm.tokenizer, ids[:tokens], STOPS), ids[:tokens]

    def to(self, probe: Probe) -> AnswerCache:
        """Where the probe's answers are kept."""
        if probe.kind != "chat":
            return self
        self.in_chat = self.in_chat or AnswerCache(free_tokens=self.free_tokens, chat=True)
        return self.in_chat


def key(stack: Stack) -> str:
    return "+".join(p.id for p in stack)


def _batches(todo: Sequence[tuple[Any, Encoded]]) -> Iterable[list[int]]:
    """Indices in batches of like length, longest first (so that a batch that does not fit fails at once, not after an hour)."""
    order = sorted(range(len(todo)), key=lambda i: -len(todo[i][1].ids))
    while order:
        rows = max(1, min(ROWS, TOKENS // len(todo[order[0]][1].ids)))
        yield order[:rows]
        order = order[rows:]


def teacher_force(lm: LM, asked: Sequence[tuple[Stack, str, str]], answers: AnswerCache, progress: Progress | None = None) -> None:
    """Teacher-forced answers to (stack, prompt, target), into ``answers``."""
    ask(lm, [(s, p, (t,), False) for s, p, t in asked], answers, progress)


def tokens_to_ask(lm: LM, compared: Iterable[str]) -> int:
    """How many tokens a free answer needs, to be compared with these answers: room to begin with each, and to see what follows."""
    long = [text for text in compared if len(text.encode()) + _BEHIND > MAX_NEW_TOKENS]  # a token is at least a byte
    lengths: dict[str, int] = lm.base_cache.setdefault("tokens of answers", {})
    if new := [text for text in long if text not in lengths]:
        lengths.update(zip(new, map(len, lm.tokenizer(new, add_special_tokens=False)["input_ids"]), strict=True))
    return max([MAX_NEW_TOKENS, *(lengths[text] + _BEHIND for text in long)])


def ask(lm: LM, asked: Sequence[tuple[Stack, str, Sequence[str], int]], answers: AnswerCache, progress: Progress | None = None) -> None:
    """What stacks make of (stack, prompt, targets to force, tokens of a free answer, 0 for none), into ``answers``.

    A prompt runs once; each target, and the free answer, goes on from it.  That is the forward pass over prompt and target in one text
    (up to rounding), because the model is causal and ops decide on the prompt.  A prompt whose tokens change with what follows runs whole.
    """
    wanted: dict[tuple[str, str], _Question] = {}
    for stack, prompt, targets, free in asked:
        name = key(stack), prompt
        new = [t for t in targets if (*name, t) not in answers.forced]
        tokens = 0 if not free or answers.has(name, free) else free
        if new or tokens:
            question = wanted.setdefault(name, _Question(stack, prompt))
            question.targets.update(dict.fromkeys(new))
            question.free = max(question.free, tokens)
    todo, whole = _encoded(lm, list(wanted.values()), answers.chat)
    done = 0
    for indices in _batches(whole):
        stacks, which = distinct([whole[i][0].stack for i in indices])
        for i, forced in zip(indices, teacher_forcing.score_full_texts(lm, [whole[i][1] for i in indices], stacks, which), strict=True):
            question = whole[i][0]
            answers.forced[key(question.stack), question.prompt, next(iter(question.targets))] = forced
    for indices in _batches(todo):
        _ask(lm, [todo[i] for i in indices], answers)
        done += len(indices)
        if progress:
            progress(done, len(todo))


@dataclass
class _Question:
    """What is asked of one stack after one prompt; targets with their tokens, once they have been found."""

    stack: Stack
    prompt: str
    targets: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    free: int = 0


def _encoded(lm: LM, wanted: Sequence[_Question], chat: bool) -> tuple[list[tuple[_Question, Encoded]], list[tuple[_Question, Encoded]]]:
    """(questions with their prompts, targets that need a text of their own): the latter where prompt and target share a token, or the
    prompt's last tokens are others before this target."""
    alone = lm.encode([q.prompt for q in wanted], chat=chat)
    pairs = [(q, e, t) for q, e in zip(wanted, alone, strict=True) for t in q.targets]
    both = lm.encode([q.prompt for q, _, _ in pairs], [t for _, _, t in pairs], chat=chat)
    whole = []
    for (question, prompt, target), text in zip(pairs, both, strict=True):
        if text.ids[: text.prompt_length] == prompt.ids:
            question.targets[target] = text.target
        else:
            whole.append((_Question(question.stack, question.prompt, {target: text.target}), text))
    todo = [(q, e) for q, e in zip(wanted, alone, strict=True) if q.free or any(q.targets.values())]
    return todo, whole


@torch.no_grad()
def _ask(lm: LM, part: Sequence[tuple[_Question, Encoded]], answers: AnswerCache) -> None:
    """A batch of questions."""
    questions = [q for q, _ in part]
    stacks, which = distinct([q.stack for q in questions])
    prefilled = PrefilledBatch.prefill(lm, lm.batch([e for _, e in part]).to(lm.device), lm.plan(stacks, which, len(part)))
    rows = [(i, text, ids) for i, q in enumerate(questions) for text, ids in q.targets.items() if ids is not None]
    for start in range(0, len(rows), len(part)):  # what goes on takes as much memory as the prompts at most
        some = rows[start : start + len(part)]
        found = teacher_forcing.score_continuations(prefilled, [i for i, _, _ in some], [ids for _, _, ids in some])
        for (i, text, _), forced in zip(some, found, strict=True):
            answers.forced[key(questions[i].stack), questions[i].prompt, text] = forced
    free = [i for i, q in enumerate(questions) if q.free]
    if free:
        prefilled = prefilled if len(free) == len(part) else prefilled.select(torch.tensor(free, device=lm.device))
        for i, ids in zip(free, decode(prefilled, [questions[i].free for i in free], STOPS), strict=True):
            name = key(questions[i].stack), questions[i].prompt
            answers.ids[name], answers.text[name] = tuple(ids), detokenize(lm.tokenizer, ids, STOPS)
            answers.limits[name] = questions[i].free


def distinct(stacks: Sequence[Stack]) -> tuple[list[Stack], list[int]]:
    """(each stack once, the index of every row's)."""
    seen: dict[str, int] = {}
    out: list[Stack] = []
    rows = []
    for stack in stacks:
        name = key(stack)
        if name not in seen:
            seen[name] = len(out)
            out.append(stack)
        rows.append(seen[name])
    return out, rows


def score(
    lm: LM,
    cases: Sequence[Case],
    stacks: Sequence[Stack],
    method: str,
    progress: Progress | None = None,
    answers: AnswerCache | None = None,
) -> list[dict[str, Any]]:
    """A record (see `errata.score.metrics`) for each probe of each case, case i under ``stacks[i]``.

    ``answers``: keep one between calls and the base is asked once for all methods and marks.
    """
    answers = answers if answers is not None else AnswerCache()
    cache_base_answers(lm, cases, answers, progress)
    probes = [(case, probe, stack) for case, stack in zip(cases, stacks, strict=True) for probe in case.probes]
    for mine in _apart(probes):
        said = answers.to(mine[0][1])
        ask(lm, [(s, p.prompt, _texts(lm, c, p, said), _tokens(lm, c, p)) for c, p, s in mine], said, progress)
    known = {case.id: knows(lm, case, answers) for case in cases}
    out = []
    for case, probe, stack in probes:
        said = answers.to(probe)
        target = _target(lm, probe, said)
        record = _record(lm, method, case, probe, stack, target, said, known)
        record |= _likelihood(probe, stack, _against(case, probe, target), said)
        out.append(record | (_free_tokens(lm, case, probe, stack, target, said) if answers.free_tokens else {}))
    return out


def cache_base_answers(lm: LM, cases: Sequence[Case], answers: AnswerCache, progress: Progress | None = None) -> None:
    """What the unedited model says to everything that `score` will ask about these cases, into ``answers``; what is there is not asked."""
    for mine in _apart([(case, probe) for case in cases for probe in case.probes]):
        said = answers.to(mine[0][1])
        # what it says freely is the answer to probes that name none
        ask(lm, [((), p.prompt, _texts(lm, c, p, said) if p.target else (), _tokens(lm, c, p)) for c, p in mine], said, progress)
        ask(lm, [((), p.prompt, _texts(lm, c, p, said), 0) for c, p in mine], said, progress)


def _apart(probes: Sequence[Any]) -> list[list[Any]]:
    """(case, probe, …): those asked plainly, and those asked as a chat."""
    parts = [[p for p in probes if (p[1].kind == "chat") == chat] for chat in (False, True)]
    return [part for part in parts if part]


def _texts(lm: LM, case: Case, probe: Probe, answers: AnswerCache) -> list[str]:
    """Every answer whose likelihood a probe's record holds."""
    target = _target(lm, probe, answers)
    return [text for text in (target, *_against(case, probe, target)) if text is not None]


def _tokens(lm: LM, case: Case, probe: Probe) -> int:
    """How many tokens a free answer to the probe has at most; the same for all stacks."""
    if not probe.target:
        return MAX_NEW_TOKENS
    return tokens_to_ask(lm, [text for text in (*probe.also, probe.target, *_against(case, probe, probe.target)) if text is not None])


def _target(lm: LM, probe: Probe, answers: AnswerCache) -> str:
    """The probe's answer; where it has none, what the unedited model said."""
    return probe.target or answers.said(lm, ("", probe.prompt), MAX_NEW_TOKENS)[0].strip() or "?"


def _against(case: Case, probe: Probe, target: str) -> tuple[str, str | None]:
    """(answer, rival) whose likelihoods are compared; rival None where there is none to compare with.

    The edited prompt and its rephrases: the new object against the old one.  A neighbour: its own true object against the
    edit's new one.  In CounterFact every neighbour's object is the edited subject's old one; in other benchmarks (the
    almanac) it may be any other object of the relation, so NS asks there as here whether the *new* object spilled over.
    A surface (`errata.score.robustness`) is as a rephrase; a negated prompt has the old object against the new one, a statement
    "True" against "False" or the other way round.
    """
    by_prompt = (r for r in case.requests if r.prompt == probe.prompt)
    request = next(by_prompt, None) or next((r for r in case.requests if r.target == probe.target), case.request)
    own, rival = target, None
    if probe.kind in ("rewrite", "rephrase", *SURFACE_KINDS):
        own, rival = request.target, request.old
    elif probe.kind == "neighbour" and probe.target is not None:
        rival = case.request.target
    elif probe.kind == "negation" and request.old is not None:
        own, rival = request.old, request.target
    elif probe.kind in _STATEMENTS:
        rival = _STATEMENTS[probe.kind]
    return own, None if rival is None or match.exact_match(own, rival) else rival


def _likelihood(probe: Probe, stack: Stack, pair: tuple[str, str | None], answers: AnswerCache) -> dict[str, Any]:
    own, rival = pair
    out: dict[str, Any] = {"rival": rival}
    for when, name in (("before", ""), ("after", key(stack))):
        out[f"nll_{when}"] = answers.forced[name, probe.prompt, own].nll
        out[f"nll_rival_{when}"] = None if rival is None else answers.forced[name, probe.prompt, rival].nll
    return out


def _free_tokens(lm: LM, case: Case, probe: Probe, stack: Stack, target: str, answers: AnswerCache) -> dict[str, Any]:
    """How far the free answer goes along with the target, token by token; past its end it has no token."""
    wanted, tokens = answers.forced["", probe.prompt, target].target, _tokens(lm, case, probe)
    said = (answers.said(lm, (name, probe.prompt), tokens)[1] for name in ("", key(stack)))
    before, after = ([*ids, *[None] * len(wanted)][: len(wanted)] for ids in said)

    def share(a: Sequence[int | None], b: Sequence[int | None]) -> float:
        return sum(x == y for x, y in zip(a, b, strict=True)) / len(wanted)

    return {"free_before": share(before, wanted), "free_after": share(after, wanted), "free_agree": share(before, after)}


def knows(lm: LM, case: Case, answers: AnswerCache) -> bool:
    """Whether the base's free answer to each edited prompt begins with the old answer; True where no old answer is named."""
    return all(r.old is None or match.starts(_base_said(lm, r, answers), r.old) for r in case.requests)


def _base_said(lm: LM, request: EditRequest, answers: AnswerCache) -> str:
    name = "", request.prompt
    tokens = tokens_to_ask(lm, [text for text in (request.target, request.old) if text is not None])
    return answers.said(lm, name, tokens)[0] if name in answers.text else ""


def ask_edited_prompts(lm: LM, cases: Iterable[Case], answers: AnswerCache, progress: Progress | None = None) -> None:
    """What the unedited model says freely to the edited prompts, into ``answers``: all that `knows` looks at."""
    requests = [request for case in cases for request in case.requests]
    asked = [((), r.prompt, (), tokens_to_ask(lm, [t for t in (r.target, r.old) if t is not None])) for r in requests]
    ask(lm, asked, answers, progress)


def _record(
    lm: LM, method: str, case: Case, probe: Probe, stack: Stack, target: str, answers: AnswerCache, known: dict[str, bool]
) -> dict[str, Any]:
    before, after = answers.forced["", probe.prompt, target], answers.forced[key(stack), probe.prompt, target]
    tokens = _tokens(lm, case, probe)
    text_before, ids_before = answers.said(lm, ("", probe.prompt), tokens)
    text_after, ids_after = answers.said(lm, (key(stack), probe.prompt), tokens)
    accepted = (target, *probe.also)
    right = {
        f"{name}_{when}": any(same(text, answer) for answer in accepted)
        for name, same in (("gen_match", match.exact_match), ("starts", match.starts), ("contains", match.contains))
        for when, text in (("before", text_before), ("after", text_after))
    }
    answer = len(before.target) if probe.target else _until_stop(lm, ids_before, text_before)
    return {
        "method": method,
        "case": case.id,
        "kind": probe.kind,
        "prompt": probe.prompt,
        "target": probe.target,
        **({"also": list(probe.also)} if probe.also else {}),
        "tf_before": before.share,
        "tf_after": after.share,
        "tf_agree": sum(a == b for a, b in zip(before.argmax, after.argmax, strict=True)) / len(after.argmax),
        "gen_before": text_before,
        "gen_after": text_after,
        **right,
        "gen_agree": text_before == text_after,
        "answer_agree": ids_before[:answer] == ids_after[:answer],
        "first_word_agree": match.first_word(text_before) == match.first_word(text_after),
        # a neighbour's own answer; for the rest, the fact that was edited
        "known": right["starts_before"] if probe.kind in LOCAL_KINDS else known[case.id],
    }


def _until_stop(lm: LM, ids: Sequence[int], text: str) -> int:
    """How many tokens say the whole text, without those that only end it; at least one."""
    return next((n for n in range(1, len(ids)) if detokenize(lm.tokenizer, ids[:n], STOPS) == text), max(1, len(ids)))
