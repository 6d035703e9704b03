"""Questions about what edits do, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from errata.errors import InputError
from errata.serve.api_errors import late
from errata.serve.bodies import ParsedRoute
from errata.serve.schemas import BlameRequest, CompareRequest, NeighboursRequest, NoFields, TraceRequest
from errata.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Of questions that compare states, and of the server's own state."""
    router = APIRouter(tags=["questions"], route_class=ParsedRoute)
    asking, texts, seconds = service.analysis, service.texts, service.options.limits.seconds
    _server(router, service)

    async def asked(question: Callable[[], Any], until: float) -> Any:
        future = asking.submit(question, until)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), until - time.monotonic())
        except asyncio.TimeoutError:
            raise late(seconds) from None

    @router.post("/v1/compare")
    async def compare(body: CompareRequest) -> dict[str, Any]:
        """Greedy answers under two stacks, side by side."""
        until = time.monotonic() + seconds
        answers = [(a.old, a.new) if a is not None else (None, None) for a in body.answers or [None] * len(body.prompts)]
        pairs = [(p, text) for p, pair in zip(body.prompts, answers, strict=True) for text in pair if text is not None]
        texts.allow(body.max_tokens, len(body.prompts))
        texts.bound([*body.prompts, *(text for _, text in pairs)])
        sides = (await asyncio.to_thread(service.models.find, body.before), await asyncio.to_thread(service.models.find, body.after))
        texts.fit(await texts.encode(body.prompts, until=until), body.max_tokens, sides)
        texts.fit(await texts.encode([p for p, _ in pairs], [text for _, text in pairs], until), 0, sides, "answers")
        found = await asked(lambda: asking.compare(body.prompts, sides, body.max_tokens, answers), until)
        return {"before": body.before, "after": body.after, "answers": found}

    @router.post("/v1/blame")
    async def blame(body: BlameRequest) -> Any:
        """Which live edits change an answer, found by switching them off."""
        until = time.monotonic() + seconds
        texts.allow(body.max_tokens, 1)
        live = await asyncio.to_thread(service.models.find, "live")
        texts.fit(await texts.encode([body.prompt], until=until), body.max_tokens, [live])
        return await asked(lambda: asking.blame(body.prompt, body.max_tokens), until)

    @router.post("/v1/check")
    async def check(body: NoFields | None = None) -> Any:
        """Every live edit asked again."""
        return await asked(asking.check, time.monotonic() + seconds)

    async def told(body: TraceRequest | NeighboursRequest, until: float) -> None:
        """`APIError` where a prompt, or it with its answer, does not fit."""
        texts.fit(await texts.encode([body.prompt], until=until), 2)
        if body.target is not None:
            texts.fit(await texts.encode([body.prompt], [body.target], until, "target"), 0, param="target")
        if body.subject not in body.prompt:
            raise InputError(f"subject {body.subject!r} does not occur in prompt {body.prompt!r}; spell it as the prompt does")

    @router.post("/v1/trace")
    async def trace(body: TraceRequest) -> Any:
        """Causal tracing in the base: how much of the answer's probability comes back where one state is restored."""
        until = time.monotonic() + seconds
        await told(body, until)
        return await asked(lambda: asking.trace(body.prompt, body.subject, body.target), until)

    @router.post("/v1/neighbours")
    async def neighbours(body: NeighboursRequest) -> Any:
        """Prompts that show whether an edit reaches further than it should."""
        until = time.monotonic() + seconds
        texts.bound(body.paraphrases, "paraphrases")
        await told(body, until)
        return await asked(lambda: asking.neighbours(body.prompt, body.subject, body.target, body.paraphrases, body.count), until)

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
