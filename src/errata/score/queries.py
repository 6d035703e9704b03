"""From cases to records with as few forward passes as possible.

Every probe becomes a *query* (stack, prompt, target).  Queries that ask the same of the same stack are asked once; the
unedited model's answers are found once for all methods.  Queries are sorted by length and run in batches whose rows may
run under different stacks: scoring N single edits takes as many passes as scoring one edit with N times the probes.

One forced pass gives both the argmax and the likelihood of an answer; a probe with a rival answer adds one row for the rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from errata.bank import Stack
from errata.decode import text_of
from errata.model import LM, STOPS
from errata.request import LOCAL_KINDS, SURFACE_KINDS, Case, Probe
from errata.score.match import exact_match
from errata.tokens import Encoded

Progress = Callable[[int, int], None]
ROWS = 192  # of a batch; more gains nothing on two cores and holds more memory
TOKENS = 1 << 14  # of a batch: long contexts run in smaller ones
MAX_NEW_TOKENS = 12
NUMBERS = 1 << 24  # of the logits that are held in float32 at once: 64 MB
STATEMENTS = {"statement_true": "False", "statement_false": "True"}  # kind -> the wrong answer
WORST = 1e3  # nats of a token that has no probability, or of a model that says NaN: records hold finite numbers


@dataclass(frozen=True)
class Forced:
    """Teacher forcing of one target: its tokens, what the argmax was at each, whether it was right, and its likelihood.

    nll = −1/n Σ_t ln p(target_t | prompt, target_<t) over the n tokens of the target, in nats.
    """

    target: tuple[int, ...]
    argmax: tuple[int, ...]
    right: tuple[bool, ...]
    nll: float

    @property
    def share(self) -> float:
        """The papers' accuracy: the fraction of target tokens that are the argmax."""
        return sum(self.right) / len(self.right)


@dataclass
class Answers:
    """What stacks said, kept by (stack key, prompt[, target]) so that nothing is asked twice; free answers as text and as token ids.

    free_tokens  records made with these answers also hold the fields of that protocol
    chat         prompts are asked in the tokenizer's chat template; ``in_chat`` are the answers to such probes (kind "chat")
    """

    forced: dict[tuple[str, str, str], Forced] = field(default_factory=dict)
    text: dict[tuple[str, str], str] = field(default_factory=dict)
    ids: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    free_tokens: bool = False
    chat: bool = False
    in_chat: Answers | None = None

    def to(self, probe: Probe) -> Answers:
        """Where the probe's answers are kept."""
        if probe.kind != "chat":
            return self
        self.in_chat = self.in_chat or Answers(free_tokens=self.free_tokens, chat=True)
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


@torch.no_grad()
def force(lm: LM, asked: Sequence[tuple[Stack, str, str]], answers: Answers, progress: Progress | None = None) -> None:
    """Teacher-forced answers to (stack, prompt, target), into ``answers``."""
    new = {(key(s), p, t): s for s, p, t in asked if (key(s), p, t) not in answers.forced}
    encoded = lm.encode([p for _, p, _ in new], [t for _, _, t in new], chat=answers.chat)
    todo = list(zip(new.items(), encoded, strict=True))
    done = 0
    for indices in _batches(todo):
        rows = [todo[i][1] for i in indices]
        stacks, which = distinct([todo[i][0][1] for i in indices])
        said, nats = _read(lm, rows, stacks, which)
        for i, row in zip(indices, rows, strict=True):
            n = len(row.target)
            best, lost = tuple(said[:n]), nats[:n]
            said, nats = said[n:], nats[n:]
            right = tuple(a == b for a, b in zip(best, row.target, strict=True))
            answers.forced[todo[i][0][0]] = Forced(tuple(row.target), best, right, sum(lost) / n)
        done += len(indices)
        if progress:
            progress(done, len(todo))


def _read(lm: LM, rows: Sequence[Encoded], stacks: list[Stack], which: list[int]) -> tuple[list[int], list[float]]:
    """(argmax, −ln p of the target's token) at each target position, the rows' one after another."""
    batch = lm.batch(rows).to(lm.device)
    plan = lm.plan(stacks, which, len(rows))
    plan.prompt_lengths = batch.prompt_lengths
    # the head is the widest matrix: it runs from the first position that any row needs
    keep = max(len(r.target) for r in rows) + 1
    more = {"logits_to_keep": keep} if lm.takes("logits_to_keep") else {}
    with lm.running(plan):
        logits = lm.forward(batch.ids, batch.mask, use_cache=False, **more).logits[:, -keep:]
    # left-padded rows end together: token t of n targets is foretold at position t − n − 1, counted from the end
    where = [(i, keep - len(r.target) - 1 + t, token) for i, r in enumerate(rows) for t, token in enumerate(r.target)]
    best, nats = [], []
    step = max(1, NUMBERS // logits.shape[-1])
    for start in range(0, len(where), step):
        row, column, token = torch.tensor(where[start : start + step], device=logits.device).unbind(1)
        picked = logits[row, column]  # [m, V]
        best.append(picked.argmax(-1))
        picked = picked.float() if picked.dtype.itemsize < 4 else picked
        nats.append(picked.logsumexp(-1) - picked.gather(1, token[:, None]).squeeze(1))
    return torch.cat(best).tolist(), torch.cat(nats).nan_to_num(WORST, WORST, WORST).tolist()


def generate(lm: LM, asked: Sequence[tuple[Stack, str]], answers: Answers, progress: Progress | None = None) -> None:
    """Greedy free answers to (stack, prompt), into ``answers``."""
    new = {(key(s), p): s for s, p in asked if (key(s), p) not in answers.text}
    todo = list(zip(new.items(), lm.encode([p for _, p in new], chat=answers.chat), strict=True))
    done = 0
    for indices in _batches(todo):
        stacks, which = distinct([todo[i][0][1] for i in indices])
        prompts = [todo[i][0][0][1] for i in indices]
        said = lm.continuations(prompts, stacks=stacks, rows=which, max_new_tokens=MAX_NEW_TOKENS, chat=answers.chat)
        for i, ids in zip(indices, said, strict=True):
            answers.ids[todo[i][0][0]], answers.text[todo[i][0][0]] = tuple(ids), text_of(lm.tokenizer, ids, STOPS)
        done += len(indices)
        if progress:
            progress(done, len(todo))


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
    answers: Answers | None = None,
) -> list[dict[str, Any]]:
    """A record (see `errata.score.metrics`) for each probe of each case, case i under ``stacks[i]``.

    ``answers``: keep one between calls and the base is asked once for all methods and marks.
    """
    answers = answers if answers is not None else Answers()
    ask_base(lm, cases, answers, progress)
    probes = [(case, probe, stack) for case, stack in zip(cases, stacks, strict=True) for probe in case.probes]
    for mine in _apart(probes):
        said = answers.to(mine[0][1])
        force(lm, [(s, p.prompt, text) for c, p, s in mine for text in _texts(c, p, said)], said, progress)
        generate(lm, [(s, p.prompt) for _, p, s in mine], said, progress)
    known = _known(lm, cases, answers)
    out = []
    for case, probe, stack in probes:
        said = answers.to(probe)
        target = _target(probe, said)
        record = _record(method, case, probe, stack, target, said, known) | _likelihood(probe, stack, _against(case, probe, target), said)
        out.append(record | (_free_tokens(probe, stack, target, said) if answers.free_tokens else {}))
    return out


def ask_base(lm: LM, cases: Sequence[Case], answers: Answers, progress: Progress | None = None) -> None:
    """What the unedited model says to everything that `score` will ask about these cases, into ``answers``; what is there is not asked."""
    for mine in _apart([(case, probe) for case in cases for probe in case.probes]):
        said = answers.to(mine[0][1])
        generate(lm, [((), p.prompt) for _, p in mine], said, progress)
        force(lm, [((), p.prompt, text) for c, p in mine for text in _texts(c, p, said)], said, progress)


def _apart(probes: Sequence[Any]) -> list[list[Any]]:
    """(case, probe, …): those asked plainly, and those asked as a chat."""
    parts = [[p for p in probes if (p[1].kind == "chat") == chat] for chat in (False, True)]
    return [part for part in parts if part]


def _texts(case: Case, probe: Probe, answers: Answers) -> list[str]:
    """Every answer whose likelihood a probe's record holds."""
    target = _target(probe, answers)
    return [text for text in (target, *_against(case, probe, target)) if text is not None]


def _target(probe: Probe, answers: Answers) -> str:
    """The probe's answer; where it has none, what the unedited model said."""
    return probe.target or answers.text["", probe.prompt].strip() or "?"


def _against(case: Case, probe: Probe, target: str) -> tuple[str, str | None]:
    """(answer, rival) whose likelihoods are compared; rival None where there is none to compare with.

    The edited prompt and its rephrases: the new object against the old one.  A neighbour: its own true object against the
    edit's new one.  In CounterFact every neighbour's object is the edited subject's old one; in other benchmarks (the
    almanac) it may be any other object of the relation, so NS asks there as here whether the *new* object spilled over.
    A surface (`errata.score.robustness`) is as a rephrase; a negated prompt has the old object against the new one, a statement
    "True" against "False" or the other way round.
    """
    request = next((r for r in case.requests if r.target == probe.target), case.request)
    own, rival = target, None
    if probe.kind in ("rewrite", "rephrase", *SURFACE_KINDS):
        own, rival = request.target, request.old
    elif probe.kind == "neighbour" and probe.target is not None:
        rival = case.request.target
    elif probe.kind == "negation" and request.old is not None:
        own, rival = request.old, request.target
    elif probe.kind in STATEMENTS:
        rival = STATEMENTS[probe.kind]
    return own, None if rival is None or exact_match(own, rival) else rival


def _likelihood(probe: Probe, stack: Stack, pair: tuple[str, str | None], answers: Answers) -> dict[str, Any]:
    own, rival = pair
    out: dict[str, Any] = {"rival": rival}
    for when, name in (("before", ""), ("after", key(stack))):
        out[f"nll_{when}"] = answers.forced[name, probe.prompt, own].nll
        out[f"nll_rival_{when}"] = None if rival is None else answers.forced[name, probe.prompt, rival].nll
    return out


def _free_tokens(probe: Probe, stack: Stack, target: str, answers: Answers) -> dict[str, Any]:
    """How far the free answer goes along with the target, token by token; past its end it has no token."""
    wanted = answers.forced["", probe.prompt, target].target
    before, after = ([*answers.ids[name, probe.prompt], *[None] * len(wanted)][: len(wanted)] for name in ("", key(stack)))

    def share(a: Sequence[int | None], b: Sequence[int | None]) -> float:
        return sum(x == y for x, y in zip(a, b, strict=True)) / len(wanted)

    return {"free_before": share(before, wanted), "free_after": share(after, wanted), "free_agree": share(before, after)}


def _known(lm: LM, cases: Sequence[Case], answers: Answers) -> dict[str, bool]:
    """Whether the base gave each case's old answers on their own prompts (True where no old answer is named)."""
    return {c.id: all(r.old is None or exact_match(answers.text.get(("", r.prompt), ""), r.old) for r in c.requests) for c in cases}


def _record(method: str, case: Case, probe: Probe, stack: Stack, target: str, answers: Answers, known: dict[str, bool]) -> dict[str, Any]:
    before, after = answers.forced["", probe.prompt, target], answers.forced[key(stack), probe.prompt, target]
    text_before, text_after = answers.text["", probe.prompt], answers.text[key(stack), probe.prompt]
    accepted = (target, *probe.also)
    matched = any(exact_match(text_before, answer) for answer in accepted)
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
        "gen_match_before": matched,
        "gen_match_after": any(exact_match(text_after, answer) for answer in accepted),
        "gen_agree": text_before == text_after,
        # a neighbour's own answer; for the rest, the fact that was edited
        "known": matched if probe.kind in LOCAL_KINDS else known[case.id],
    }
