"""What else the model can be asked: states compared, blame, check, causal traces; and which prompts are worth watching.

These run one at a time on a replica of their own, beside answering and editing.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from errata.contrast.contrast import find
from errata.contrast.names import general
from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import InputError
from errata.ledger import Ledger
from errata.request import EditRequest
from errata.score.compare import Comparison, Completion, compare
from errata.score.neighbours import in_other_forms
from errata.serve.api_errors import APIError, late
from errata.serve.options import Limits
from errata.trace import Fact, TraceConfig, trace

T = TypeVar("T")
KINDS = {"hidden": "block", "mlp": "mlp", "attn": "attention"}
Answers = tuple[str | None, str | None]  # (old, new)


class AnalysisWorker:
    """``ledger``: with a model of its own, which nothing else runs.  ``watched``: prompts and, where known, their subjects."""

    def __init__(self, ledger: Ledger, limits: Limits, watched: Sequence[tuple[str, str | None]], threads: int = 1) -> None:
        self.ledger, self.limits, self.watched = ledger, limits, list(watched)
        self._pool = ThreadPoolExecutor(1, "errata-asking", lambda: torch.set_num_threads(threads))
        self._load, self._lock = 0, threading.Lock()
        until = self._until = [float("inf")]

        def asked(*_: Any) -> None:  # before every pass; a plain function, as that of `errata.serve.edit_worker`
            if time.monotonic() > until[0]:
                raise late(limits.seconds)

        self.lm.hf.register_forward_pre_hook(asked)

    @property
    def lm(self) -> LM:
        return self.ledger.lm

    def submit(self, question: Callable[[], T], until: float) -> Future[T]:
        """Run in the one thread that may run this model; `APIError` where too many wait.  At ``until`` (`time.monotonic`) nobody waits for
        it any more, and it ends at the model's next pass."""

        def work() -> T:
            self._until[0] = until
            return question()

        with self._lock:
            if self._load >= self.limits.questions:
                raise APIError(429, f"{self._load} questions wait; try again later", "queue_full", headers={"Retry-After": "2"})
            self._load += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._less)
        return future

    def _less(self, _: Any) -> None:
        with self._lock:
            self._load -= 1

    def close(self) -> bool:
        """No more questions; those that wait are cancelled.  Whether none runs: one that does cannot be stopped, and its thread would keep
        the process from ending."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        return self._load == 0

    # -- questions ---------------------------------------------------------------------------------------------

    def compare(self, prompts: Sequence[str], sides: tuple[Stack, Stack], tokens: int, answers: Sequence[Answers]) -> list[dict[str, Any]]:
        """Greedy answers of two stacks, how far the next token's distribution moved, and how likely given answers are."""
        asked = [[text for text in pair if text is not None] for pair in answers]
        found = compare(self.lm, prompts, sides, tokens, asked)
        return [self._compared(one, pair) for one, pair in zip(found, answers, strict=True)]

    def _compared(self, one: Comparison, pair: Answers) -> dict[str, Any]:
        def side(said: Completion) -> dict[str, Any]:
            tokens = zip(said.ids, said.logprobs, strict=True)
            return {"text": said.text, "tokens": [{"text": self.lm.tokenizer.decode([t]), "logprob": value} for t, value in tokens]}

        out = {"prompt": one.prompt, "before": side(one.before), "after": side(one.after), "changed": one.changed, "moved": one.moved}
        likely = {
            name: {"before": one.before.likely[text], "after": one.after.likely[text]}
            for name, text in zip(("old", "new"), pair, strict=True)
            if text is not None
        }
        return {**out, "likelihood": likely} if likely else out

    def blame(self, prompt: str, tokens: int) -> dict[str, Any]:
        return dataclasses.asdict(self.ledger.blame(prompt, tokens=tokens))

    def check(self) -> dict[str, Any]:
        return self.ledger.check().to_dict()

    def trace(self, prompt: str, subject: str, target: str | None) -> dict[str, Any]:
        """Causal tracing in the base; see `errata.trace`."""
        found = trace(self.lm, [Fact(prompt, subject, target)], TraceConfig()).facts[0]
        kinds = {KINDS[name]: found.scores[k].tolist() for k, name in enumerate(KINDS)}
        return {
            "tokens": list(found.tokens),
            "span": list(found.span),
            "answer": found.answer,
            "kinds": kinds,
            "high": found.high,
            "low": found.low,
        }

    # -- prompts -----------------------------------------------------------------------------------------------

    def watch(self) -> list[str]:
        """Those the server was told to watch; else those of live edits, and some general ones."""
        if self.watched:
            return [prompt for prompt, _ in self.watched]
        own = [r.prompt for edit in self.ledger.edits() for r in edit.requests]
        return list(dict.fromkeys([*own, *general(self.lm.name)]))

    def neighbours(self, prompt: str, subject: str, target: str | None, paraphrases: Sequence[str], count: int) -> dict[str, Any]:
        """Rephrasings given, then the same of the subject's nearest neighbours, which no editor is shown (`errata.contrast`); a few of them
        as questions, and one free paragraph.  What live edits write is no neighbour.  ``looked_at``: candidates there were."""
        if subject not in prompt:
            raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r}; spell it as the prompt does")
        request = EditRequest(prompt, target or "?", subject)
        known = [*self.watched, *((r.prompt, r.subject) for edit in self.ledger.edits() for r in edit.requests)]
        written = [text for text, about in known if about != subject and subject not in text]
        found = find(self.lm, request, count=count, exclude=("\n".join(written),))
        near = [(n.subject, n.prompt) for n in found.watch]
        other = in_other_forms(near)
        return {
            "prompts": list(dict.fromkeys(t for t in (*paraphrases, *(p for _, p in near)) if t != prompt))[:count],
            "questions": [text for _, text, form in other if form == "question"],
            "paragraphs": [text for _, text, form in other if form == "paragraph"],
            "looked_at": found.looked_at,
        }
