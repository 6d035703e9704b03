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
from errata.core.patch import PROMPT
from errata.core.tokens import Encoded, trim
from errata.serve.api_errors import APIError, to_api_error
from errata.serve.openai_responses import OpenAIResponse
from errata.serve.rows import OutputChunk, Row, SamplingParams
from errata.serve.schemas import ChatRequest, CompletionRequest, Sampled
from errata.serve.service import Service

_DEFAULT = 16  # tokens of a completion where the request does not say (OpenAI's own)


def routes(service: Service) -> APIRouter:
    router = APIRouter()

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
        stack = await asyncio.to_thread(service.models.find, body.model)
        encoded = [(_encode(service, p), p[len(trim(service.lm.tokenizer, p)) :][:1]) for p in body.prompts]
        limit = body.max_tokens or min(_DEFAULT, service.options.limits.tokens)
        return await _answer(service, request, body, stack, encoded, _wanted(body, limit, body.logprobs), OpenAIResponse(body.model, False))

    @router.post("/v1/chat/completions", tags=["answers"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation; needs a model whose tokenizer has a chat template."""
        stack = await asyncio.to_thread(service.models.find, body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        encoded = [(_conversation(service, body), "")]
        limit = body.max_completion_tokens or body.max_tokens or _room(service, encoded[0][0], stack)
        wanted = _wanted(body, limit, (body.top_logprobs or 0) if body.logprobs else None)
        return await _answer(service, request, body, stack, encoded, wanted, OpenAIResponse(body.model, True))

    return router


def _wanted(body: Sampled, tokens: int, alike: int | None) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(tokens, temperature, 1.0 if body.top_p is None else body.top_p, body.stops, body.seed, alike)


def _encode(service: Service, prompt: str) -> Encoded:
    (encoded,) = service.lm.encode([prompt])
    return encoded


def _conversation(service: Service, body: ChatRequest) -> Encoded:
    tokenizer = service.lm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise APIError(400, "this model's tokenizer has no chat template; ask through /v1/completions", "no_chat_template", "messages")
    messages = [{"role": m.role, "content": m.text} for m in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of others, and refuse in their own ways
        raise APIError(400, f"the model's chat template does not take these messages: {error}", "invalid_messages", "messages") from None
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise APIError(400, "these messages make an empty text", "invalid_messages", "messages")
    return Encoded(ids, len(ids))


def _room(service: Service, conversation: Encoded, stack: Stack) -> int:
    """Tokens that an answer may have where the request does not say; `APIError` where there is no room for one."""
    limit, window = service.options.limits.tokens, service.lm.context_length
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


def _in_front(stack: Stack) -> int:
    """Tokens that a stack may put in front of a prompt."""
    return sum(int(op.settings["budget"]) for patch in stack for op in patch.ops if op.site == PROMPT)


def _check(service: Service, encoded: Sequence[Encoded], tokens: int, n: int, stack: Stack) -> None:
    """`APIError` where a limit is passed."""
    limits = service.options.limits
    if tokens > limits.tokens:
        raise APIError(400, f"max_tokens is {tokens}, this server gives {limits.tokens} at most", "too_many_tokens", "max_tokens")
    if len(encoded) * n > limits.rows:
        raise APIError(400, f"{len(encoded)} prompts × n = {n} are too many; {limits.rows} answers a request", "too_many_answers", "n")
    context, room = _in_front(stack), service.lm.context_length
    for row in encoded:
        length = len(row.ids)
        if length > limits.prompt:
            raise APIError(400, f"a prompt has {length} tokens, this server takes {limits.prompt}", "context_length_exceeded", "prompt")
        if room is not None and length + tokens + context > room:
            more = f", {context} that the stack may put in front" if context else ""
            raise APIError(
                400,
                f"{length} tokens of prompt{more} and {tokens} of answer do not fit the model's {room} positions; shorten one",
                "context_length_exceeded",
                "prompt",
            )


async def _answer(
    service: Service,
    request: Request,
    body: Sampled,
    stack: Stack,
    encoded: list[tuple[Encoded, str]],
    wanted: SamplingParams,
    document: OpenAIResponse,
) -> Response:
    n = body.n or 1
    _check(service, [e for e, _ in encoded], wanted.max_tokens, n, stack)
    loop, news = asyncio.get_running_loop(), asyncio.Queue[OutputChunk]()

    def tell(piece: OutputChunk) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.put_nowait, piece)

    until = time.monotonic() + service.options.limits.seconds
    pairs = [pair for pair in encoded for _ in range(n)]
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
