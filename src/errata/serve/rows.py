"""One answer in the making: what was asked, how its tokens are drawn, how its text comes out and where it ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Stack
from errata.core.greedy import argmax
from errata.core.tokens import Encoded
from errata.serve.api_errors import to_api_error

_CONTEXT = 4  # tokens of the prompt that new ones are read after: what a token says can depend on those before it
_BROKEN = "�"  # stands where the bytes of a character are not all there yet


@dataclass(frozen=True)
class SamplingParams:
    """How to answer.

    stops     texts that end the answer and are not part of it
    seed      None: drawn
    logprobs  how many of the likeliest tokens to name with each token; None: say nothing of likelihoods
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token that was said: its log-probability (of the model's own distribution), the likeliest ones, where its text begins."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True)
class OutputChunk:
    """News of one row.  ``finish_reason``: stop or length, once it ended; ``error``: why it could not."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    error: BaseException | None = None


class IncrementalDetokenizer:
    """Text from tokens one at a time: whole characters only, nothing of what may turn out to be a stop."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], skip: str = "") -> None:
        self.tokenizer, self.stops, self.skip = tokenizer, stops, skip
        self.ids = list(prompt[-_CONTEXT:])
        self.begin, self.read = 0, len(self.ids)
        self.text, self.told, self.stopped = "", 0, False

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._take(whole=False)

    def _take(self, whole: bool) -> None:
        """Move what is certain from ids to text."""
        before, now = self._decode(self.ids[self.begin : self.read]), self._decode(self.ids[self.begin :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not whole):
            return
        fresh = now[len(before) :]
        if not self.text and self.skip and fresh.startswith(self.skip):
            fresh, self.skip = fresh[len(self.skip) :], ""
        seam = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += fresh
        self.begin, self.read = self.read, len(self.ids)
        if places := [at for s in self.stops if (at := self.text.find(s, seam)) >= 0]:
            self.text, self.stopped = self.text[: min(places)], True

    def news(self, ended: bool) -> str:
        """What may be said since the last call; all of it once the answer has ended."""
        if ended and not self.stopped:
            self._take(whole=True)
        end = len(self.text) if ended or self.stopped else len(self.text) - self._held()
        out = self.text[self.told : end]
        self.told = max(self.told, end)
        return out

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = max((len(s) for s in self.stops), default=1) - 1
        tails = range(min(longest, len(self.text) - self.told), 0, -1)
        return next((n for n in tails if any(s.startswith(self.text[-n:]) for s in self.stops)), 0)


@dataclass(eq=False)
class Row:
    """An answer that waits or runs.

    tell     takes its pieces, in the thread that answers; ``stream``: as they come, else only the last with everything
    until    `time.monotonic` when it is given up; cancelled: nobody waits for it any more
    """

    index: int
    encoded: Encoded
    stack: Stack
    params: SamplingParams
    tell: Callable[[OutputChunk], None]
    stream: bool = False
    deadline: float = float("inf")
    skip: str = ""
    cancelled: bool = False
    arrival_time: float = field(default_factory=time.monotonic)
    count: int = 0  # tokens so far
    first: float | None = None  # seconds to the first token
    finish_reason: str | None = None

    def begin(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.spoken = IncrementalDetokenizer(tokenizer, self.encoded.ids, self.params.stops, self.skip)
        self.tokens: list[Token] = []
        self.generator = torch.Generator()
        seed = os.urandom(8).hex() if self.params.seed is None else self.params.seed
        digest = hashlib.sha256(f"{seed} {self.index}".encode()).digest()
        self.generator.manual_seed(int.from_bytes(digest[:6], "big"))

    def draw(self, logits: Tensor) -> int:
        """A token from logits [V]."""
        if self.params.temperature == 0:
            return int(argmax(logits))
        likely = logits.double().cpu()
        likely -= likely.max()  # first: a quotient by a tiny temperature would be infinite
        p = torch.softmax(likely / self.params.temperature, -1)
        if self.params.top_p < 1:
            values, order = p.sort(descending=True)
            values[values.cumsum(-1) - values >= self.params.top_p] = 0.0
            return int(order[torch.multinomial(values, 1, generator=self.generator)])
        return int(torch.multinomial(p, 1, generator=self.generator))

    def fail(self, error: BaseException) -> None:
        """End with an error; whoever waited may be gone."""
        self.finish_reason = "error"
        with contextlib.suppress(Exception):
            self.tell(OutputChunk(self.index, "", (), "error", to_api_error(error)))

    def take(self, token: int, logits: Tensor, ends: set[int]) -> None:
        """The next token; sets ``finish_reason`` where the answer ends with it."""
        if self.first is None:
            self.first = time.monotonic() - self.arrival_time
        self.count += 1
        if token in ends:
            self.finish_reason = "stop"
        else:
            if self.params.logprobs is not None:
                self.tokens.append(self._likely(token, logits))
            self.spoken.add(token)
            if self.spoken.stopped:
                self.finish_reason = "stop"
                self.tokens = [t for t in self.tokens if t.offset < len(self.spoken.text)]
            elif self.count >= self.params.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None or self.stream:
            text = self.spoken.news(self.finish_reason is not None)
            if self.finish_reason is not None or text:
                told, self.tokens = tuple(self.tokens), []
                self.tell(OutputChunk(self.index, text, told, self.finish_reason))

    def _likely(self, token: int, logits: Tensor) -> Token:
        said = torch.log_softmax(logits.double(), -1)
        top = said.topk(min(self.params.logprobs or 0, len(said)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        named = tuple((self.tokenizer.decode([i]), value) for i, value in likeliest)
        return Token(self.tokenizer.decode([token]), float(said[token]), named, len(self.spoken.text))
