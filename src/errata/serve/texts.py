"""Texts of requests as token ids: what is certainly too long is refused unread, the rest is read in one thread.

That is never the thread where connections are served, and it reads the shortest text first, so that who sends much waits for himself.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import PROMPT
from errata.core.tokens import Encoded, encode
from errata.serve.api_errors import APIError, late, stopping
from errata.serve.options import Limits

T = TypeVar("T")
CHARACTERS = 16  # of a token, on the average of a text: English has 4 to 5, and a text of more is mostly blanks or lines


@dataclass(order=True)
class _Step:
    size: int
    number: int
    work: Callable[[], Any] = field(compare=False)
    future: Future[Any] = field(compare=False, default_factory=Future)


class TextReader:
    """The thread that reads texts, and what may be asked of one."""

    def __init__(self, lm: LM, limits: Limits) -> None:
        self.lm, self.limits = lm, limits
        self._steps: list[_Step] = []
        self._count = 0
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="errata-reading", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """No more texts; who waits is told so."""
        with self._news:
            self._closing = True
            for step in self._steps:
                _fail(step, stopping())
            self._steps = []
            self._news.notify()

    # -- what is refused unread --------------------------------------------------------------------------------

    @property
    def most(self) -> int:
        """Characters of the longest text that may fit."""
        window = self.lm.context_length
        return CHARACTERS * (self.limits.prompt if window is None else min(window, self.limits.prompt))

    def allow(self, tokens: int, answers: int) -> None:
        """`APIError` where a request asks for more than this server gives."""
        if tokens > self.limits.tokens:
            raise APIError(400, f"max_tokens is {tokens}, this server gives {self.limits.tokens} at most", "too_many_tokens", "max_tokens")
        if answers > self.limits.rows:
            raise APIError(400, f"{answers} answers (prompts × n) are too many; {self.limits.rows} a request", "too_many_answers", "n")

    def bound(self, texts: Iterable[str], param: str = "prompt") -> None:
        """`APIError` for a text that is too long to be read at all."""
        for text in texts:
            self.bound_size(len(text), param)

    def bound_size(self, size: int, param: str = "prompt") -> None:
        """`bound` of a text by its characters."""
        if size > self.most:
            raise APIError(
                400,
                f"{size} characters are more than this server takes in one text: {self.most}, {CHARACTERS} for each token that fits",
                "context_length_exceeded",
                param,
            )

    def fit(self, rows: Iterable[Encoded], tokens: int, stacks: Iterable[Stack] = (), param: str = "prompt") -> None:
        """`APIError` for a prompt that is too long, by itself or with ``tokens`` behind it and what a stack may put in front."""
        context, window = max(map(_in_front, stacks), default=0), self.lm.context_length
        for row in rows:
            length = len(row.ids)
            if length > self.limits.prompt:
                raise APIError(
                    400, f"a prompt has {length} tokens, this server takes {self.limits.prompt}", "context_length_exceeded", param
                )
            if window is not None and length + tokens + context > window:
                more = f", {context} that the stack may put in front" if context else ""
                raise APIError(
                    400,
                    f"{length} tokens of prompt{more} and {tokens} of answer do not fit the model's {window} positions; shorten one",
                    "context_length_exceeded",
                    param,
                )

    def room(self, conversation: Encoded, stack: Stack) -> int:
        """Tokens that an answer may have where the request does not say; `APIError` where there is no room for one."""
        limit, window = self.limits.tokens, self.lm.context_length
        if window is None:
            return limit
        used = len(conversation.ids) + _in_front(stack)
        if used >= window:
            raise APIError(
                400,
                f"the conversation has {used} tokens, which leaves none of the model's {window} positions for an answer; shorten it",
                "context_length_exceeded",
                "messages",
            )
        return min(limit, window - used)

    # -- what is read ------------------------------------------------------------------------------------------

    async def encode(
        self, prompts: Sequence[str], targets: Sequence[str] | None = None, until: float = float("inf"), param: str = "prompt"
    ) -> list[Encoded]:
        """`errata.core.tokens.encode`, text by text."""
        pairs = [(p, None) for p in prompts] if targets is None else [(p, [t]) for p, t in zip(prompts, targets, strict=True)]
        self.bound([*prompts, *(targets or ())], param)
        return [await self.run(len(p), functools.partial(self._read, p, target), until) for p, target in pairs]

    def _read(self, prompt: str, target: list[str] | None) -> Encoded:
        return encode(self.lm.tokenizer, [prompt], target)[0]  # `fit` says what does not fit, in the words of a server

    async def run(self, size: int, work: Callable[[], T], until: float = float("inf")) -> T:
        """The result of ``work``, which reads about ``size`` characters, in the thread; `APIError` where it is too late at ``until``
        (`time.monotonic`), or where too much waits and this is the longest of it."""
        future: Future[T] = Future()
        with self._news:
            if self._closing:
                raise stopping()
            self._count += 1
            bisect.insort(self._steps, _Step(size, self._count, work, future))
            if len(self._steps) > self.limits.queue:
                full = APIError(429, "too many texts wait to be read; try again later", "queue_full", headers={"Retry-After": "1"})
                _fail(self._steps.pop(), full)
            self._news.notify()
        try:
            seconds = min(self.limits.seconds, until - time.monotonic())
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except asyncio.TimeoutError:
            raise late(self.limits.seconds) from None

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            with self._news:
                self._news.wait_for(lambda: self._steps or self._closing)
                if not self._steps:
                    return
                step = self._steps.pop(0)
            if step.future.set_running_or_notify_cancel():
                try:
                    step.future.set_result(step.work())
                except BaseException as error:
                    step.future.set_exception(error)


def _in_front(stack: Stack) -> int:
    """Tokens that a stack may put in front of a prompt."""
    return sum(int(op.settings["budget"]) for patch in stack for op in patch.ops if op.site == PROMPT)


def _fail(step: _Step, error: APIError) -> None:
    if step.future.set_running_or_notify_cancel():
        step.future.set_exception(error)
