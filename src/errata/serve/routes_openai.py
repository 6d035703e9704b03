"""OpenAI's routes: models, completions, chat completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from errata.core.bank import Stack
from errata.core.chat import render
from errata.core.tokens import Encoded, trim
from errata.serve.api_errors import APIError, to_api_error
from errata.serve.bodies import ParsedRoute
from errata.serve.openai_responses import OpenAIResponse
from errata.serve.rows import OutputChunk, Row, SamplingParams
from errata.serve.schemas import ChatRequest, CompletionRequest, Sampled
from errata.serve.service import Service

_DEFAULT = 16  # tokens of a completion where the request does not say (OpenAI's own)


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=ParsedRoute)

    def model(name: str, about: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(service.began), "owned_by": "errata", "description": about}

    @router.get("/v1/models", tags=["answers"])
    def models() -> dict[str, Any]:
        """The names a request may give as ``model``."""
        return {"object": "list", "data": [model(n.id, n.about) for n in service.models.list()]}

    @router.get("/v1/models/{name:path}", tags=["answers"])
    def one_model(name: str) -> dict[str, Any]:
        """Whether a name stands for something; also ``edits:1,3`` and ``event:7``, which the list leaves out."""
        service.models.find(name)
        about = {n.id: n.about for n in service.models.list()}
        return model(name, about.get(name, "a state of the ledger"))

    @router.post("/v1/completions", tags=["answers"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Texts that go on from the prompts."""
        until = _until(service)
        limit = body.max_tokens or min(_DEFAULT, service.options.limits.tokens)
        service.texts.allow(limit, len(body.prompts) * (body.n or 1))
        service.texts.bound(body.prompts)
        stack = await asyncio.to_thread(service.models.find, body.model)
        encoded = await service.texts.encode(body.prompts, until=until)
        rows = [(e, p[len(trim(service.lm.tokenizer, p)) :][:1]) for e, p in zip(encoded, body.prompts, strict=True)]
        document = OpenAIResponse(body.model, False)
        return await _answer(service, request, body, stack, rows, _wanted(body, limit, body.logprobs), document, until)

    @router.post("/v1/chat/completions", tags=["answers"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation; needs a model whose tokenizer has a chat template."""
        until = _until(service)
        if body.top_logprobs is not None and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        service.texts.allow(body.max_completion_tokens or body.max_tokens or 1, body.n or 1)
        size = sum(len(m.text) for m in body.messages)
        service.texts.bound_size(size, "messages")
        stack = await asyncio.to_thread(service.models.find, body.model)
        encoded = await service.texts.run(size, lambda: _conversation(service, body), until)
        limit = body.max_completion_tokens or body.max_tokens or service.texts.room(encoded, stack)
        wanted = _wanted(body, limit, (body.top_logprobs or 0) if body.logprobs else None)
        return await _answer(service, request, body, stack, [(encoded, "")], wanted, OpenAIResponse(body.model, True), until)

    return router


def _wanted(body: Sampled, tokens: int, alike: int | None) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(tokens, temperature, 1.0 if body.top_p is None else body.top_p, body.stops, body.seed, alike)


def _until(service: Service) -> float:
    """When a request that begins now is given up."""
    return time.monotonic() + service.options.limits.seconds


def _conversation(service: Service, body: ChatRequest) -> Encoded:
    tokenizer = service.lm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise APIError(400, "this model's tokenizer has no chat template; ask through /v1/completions", "no_chat_template", "messages")
    messages = [{"role": m.role, "content": m.text} for m in body.messages]
    try:
        text = render(tokenizer, messages)
    except Exception as error:  # templates are programs of others, and refuse in their own ways
        raise APIError(400, f"the model's chat template does not take these messages: {error}", "invalid_messages", "messages") from None
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise APIError(400, "these messages make an empty text", "invalid_messages", "messages")
    return Encoded(ids, len(ids))


async def _answer(
    service: Service,
    request: Request,
    body: Sampled,
    stack: Stack,
    encoded: list[tuple[Encoded, str]],
    wanted: SamplingParams,
    document: OpenAIResponse,
    until: float,
) -> Response:
    service.texts.fit((e for e, _ in encoded), wanted.max_tokens, [stack])
    loop, news = asyncio.get_running_loop(), asyncio.Queue[OutputChunk]()

    def tell(piece: OutputChunk) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.put_nowait, piece)

    pairs = [pair for pair in encoded for _ in range(body.n or 1)]
    rows = [Row(i, e, stack, wanted, tell, bool(body.stream), until, skip) for i, (e, skip) in enumerate(pairs)]
    service.engine.submit(rows)
    if body.stream:
        more = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(rows, news, document, more), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    gone = asyncio.ensure_future(_left(request))
    try:
        pieces: list[OutputChunk] = []
        while len(pieces) < len(rows):
            getting = asyncio.ensure_future(news.get())
            await asyncio.wait({getting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                return Response(status_code=499)  # nobody reads it
            piece = getting.result()
            if piece.error is not None:
                raise piece.error
            pieces.append(piece)
        return JSONResponse(document.whole(rows, pieces))
    finally:
        gone.cancel()
        for row in rows:
            row.cancelled = True


async def _left(request: Request) -> None:
    """Until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(rows: Sequence[Row], news: asyncio.Queue[OutputChunk], document: OpenAIResponse, more: bool) -> AsyncIterator[str]:
    """Server-sent events; where the client goes away, its rows are dropped."""
    try:
        if document.chat:
            for row in rows:
                yield _event(document.begin(row.index))
        left = len(rows)
        while left:
            piece = await news.get()
            if piece.error is not None:
                yield _event(to_api_error(piece.error).document)
                return
            yield _event(document.chunk(rows[piece.index], piece))
            left -= piece.finish_reason is not None
        if more:
            yield _event(document.usage(rows))
        yield "data: [DONE]\n\n"
    finally:
        for row in rows:
            row.cancelled = True


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
