"""Questions about what edits do, health and metrics."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from errata.core.bank import Stack
from errata.errors import InputError
from errata.serve.api_errors import late
from errata.serve.bodies import ParsedRoute
from errata.serve.schemas import BlameRequest, CompareRequest, NeighboursRequest, NoFields, TraceRequest
from errata.serve.service import Service


class _Questions:
    """What is asked of a service's model, in the time of a request."""

    def __init__(self, service: Service) -> None:
        self.service, self.seconds = service, service.options.limits.seconds

    def until(self) -> float:
        """When a question that comes now is given up."""
        return time.monotonic() + self.seconds

    async def answer(self, question: Callable[[], Any], until: float) -> Any:
        """Its answer; `APIError` where that takes too long."""
        future = self.service.analysis.submit(question, until)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), until - time.monotonic())
        except asyncio.TimeoutError:
            raise late(self.seconds) from None

    async def stack(self, name: str) -> Stack:
        """What a model's name stands for."""
        return await asyncio.to_thread(self.service.models.find, name)

    async def fits(self, prompts: Sequence[str], tokens: int, stacks: Sequence[Stack] = (), until: float = math.inf) -> None:
        """`APIError` where one of the prompts is too long, with as many tokens of answer."""
        texts = self.service.texts
        texts.fit(await texts.encode(prompts, until=until), tokens, stacks)

    async def pairs_fit(self, pairs: Sequence[tuple[str, str]], param: str, stacks: Sequence[Stack] = (), until: float = math.inf) -> None:
        """`APIError` where a prompt and a given answer are too long together."""
        texts = self.service.texts
        rows = await texts.encode([p for p, _ in pairs], [answer for _, answer in pairs], until, param)
        texts.fit(rows, 0, stacks, param)

    async def subject_fits(self, body: TraceRequest | NeighboursRequest, until: float) -> None:
        """`APIError` where a prompt, or it with its answer, is too long; `InputError` where its subject does not occur in it."""
        await self.fits([body.prompt], 2, until=until)
        if body.target is not None:
            await self.pairs_fit([(body.prompt, body.target)], "target", until=until)
        if body.subject not in body.prompt:
            raise InputError(f"subject {body.subject!r} does not occur in prompt {body.prompt!r}; spell it as the prompt does")


def routes(service: Service) -> APIRouter:
    """Of questions that compare states, and of the server's own state."""
    router = APIRouter(tags=["questions"], route_class=ParsedRoute)
    asking, texts, questions = service.analysis, service.texts, _Questions(service)
    _server(router, service)

    @router.post("/v1/compare")
    async def compare(body: CompareRequest) -> dict[str, Any]:
        """Greedy answers under two stacks, side by side."""
        until = questions.until()
        answers = [(a.old, a.new) if a is not None else (None, None) for a in body.answers or [None] * len(body.prompts)]
        pairs = [(p, text) for p, pair in zip(body.prompts, answers, strict=True) for text in pair if text is not None]
        texts.allow(body.max_tokens, len(body.prompts))
        texts.bound([*body.prompts, *(text for _, text in pairs)])
        sides = (await questions.stack(body.before), await questions.stack(body.after))
        await questions.fits(body.prompts, body.max_tokens, sides, until)
        await questions.pairs_fit(pairs, "answers", sides, until)
        found = await questions.answer(lambda: asking.compare(body.prompts, sides, body.max_tokens, answers), until)
        return {"before": body.before, "after": body.after, "answers": found}

    @router.post("/v1/blame")
    async def blame(body: BlameRequest) -> Any:
        """Which live edits change an answer, found by switching them off."""
        until = questions.until()
        texts.allow(body.max_tokens, 1)
        texts.bound([body.prompt])
        await questions.fits([body.prompt], body.max_tokens, [await questions.stack("live")], until)
        return await questions.answer(lambda: asking.blame(body.prompt, body.max_tokens), until)

    @router.post("/v1/check")
    async def check(body: NoFields | None = None) -> Any:
        """Every live edit asked again."""
        return await questions.answer(asking.check, questions.until())

    @router.post("/v1/trace")
    async def trace(body: TraceRequest) -> Any:
        """Causal tracing in the base: how much of the answer's probability comes back where one state is restored."""
        until = questions.until()
        await questions.subject_fits(body, until)
        return await questions.answer(lambda: asking.trace(body.prompt, body.subject, body.target), until)

    @router.post("/v1/neighbours")
    async def neighbours(body: NeighboursRequest) -> Any:
        """Prompts that show whether an edit reaches further than it should."""
        until = questions.until()
        texts.bound(body.paraphrases, "paraphrases")
        await questions.subject_fits(body, until)
        question = functools.partial(asking.neighbours, body.prompt, body.subject, body.target, body.paraphrases, body.count)
        return await questions.answer(question, until)

    @router.get("/v1/watch")
    def watch() -> dict[str, Any]:
        """Prompts that show what else has moved."""
        return {"prompts": asking.watch()}

    return router


def _server(router: APIRouter, service: Service) -> None:
    own = ThreadPoolExecutor(1, "errata-health")  # it waits for no other route

    @router.get("/health", tags=["server"])
    async def health() -> dict[str, Any]:
        """Whether the server takes requests, and what waits."""
        return await asyncio.get_running_loop().run_in_executor(own, service.health)

    @router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
