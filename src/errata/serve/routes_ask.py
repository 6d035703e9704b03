"""Questions about what edits do, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from errata.serve.api_errors import APIError
from errata.serve.schemas import BlameRequest, CompareRequest, NeighboursRequest, NoFields, TraceRequest
from errata.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Of questions that compare states, and of the server's own state."""
    router = APIRouter(tags=["questions"])
    asking = service.analysis
    _server(router, service)

    async def asked(question: Callable[[], Any]) -> Any:
        future = asking.submit(question)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), service.options.limits.seconds)
        except asyncio.TimeoutError:
            raise APIError(504, f"not answered within {service.options.limits.seconds:g} seconds", "timeout") from None

    def fits(prompts: list[str], more: int) -> None:
        limits, window = service.options.limits, service.lm.context_length
        for prompt, row in zip(prompts, service.lm.encode(prompts), strict=True):
            if len(row.ids) > limits.prompt or (window is not None and len(row.ids) + more > window):
                raise APIError(400, f"{prompt[:80]!r} has {len(row.ids)} tokens, too many", "context_length_exceeded", "prompt")

    @router.post("/v1/compare")
    async def compare(body: CompareRequest) -> dict[str, Any]:
        """Greedy answers under two stacks, side by side."""
        answers = [(a.old, a.new) if a is not None else (None, None) for a in body.answers or [None] * len(body.prompts)]
        fits(body.prompts, body.max_tokens)
        for prompt, pair in zip(body.prompts, answers, strict=True):
            fits([f"{prompt} {text}" for text in pair if text is not None], 0)
        sides = (await asyncio.to_thread(service.models.find, body.before), await asyncio.to_thread(service.models.find, body.after))
        found = await asked(lambda: asking.compare(body.prompts, sides, body.max_tokens, answers))
        return {"before": body.before, "after": body.after, "answers": found}

    @router.post("/v1/blame")
    async def blame(body: BlameRequest) -> Any:
        """Which live edits change an answer, found by switching them off."""
        fits([body.prompt], body.max_tokens)
        return await asked(lambda: asking.blame(body.prompt, body.max_tokens))

    @router.post("/v1/check")
    async def check(body: NoFields | None = None) -> Any:
        """Every live edit asked again."""
        return await asked(asking.check)

    @router.post("/v1/trace")
    async def trace(body: TraceRequest) -> Any:
        """Causal tracing in the base: how much of the answer's probability comes back where one state is restored."""
        fits([body.prompt], 2)
        return await asked(lambda: asking.trace(body.prompt, body.subject, body.target))

    @router.post("/v1/neighbours")
    async def neighbours(body: NeighboursRequest) -> Any:
        """Prompts that show whether an edit reaches further than it should."""
        fits([body.prompt], 0)
        return await asked(lambda: asking.neighbours(body.prompt, body.subject, body.target, body.paraphrases, body.count))

    @router.get("/v1/watch")
    def watch() -> dict[str, Any]:
        """Prompts that show what else has moved."""
        return {"prompts": asking.watch()}

    return router


def _server(router: APIRouter, service: Service) -> None:
    @router.get("/health", tags=["server"])
    def health() -> dict[str, Any]:
        """Whether the server takes requests, and what waits."""
        return service.health()

    @router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
