"""What a request sends: read as far as it is not too much, and parsed once, before any route sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from errata.documents import check_depth, once
from errata.errors import InputError
from errata.request import no_constant
from errata.serve.api_errors import APIError
from errata.serve.options import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
DOCUMENT = "what the body says"  # its key in a scope
_FIELDS = 100  # of one object; no request has as many
_BYTES = 16  # of the largest body for each comma and bracket: a million of them are a second's work in a few hundred kilobytes
SHORT = 16_384  # bytes of a body that is taken and parsed at once
_PIECE = 0.02  # seconds between two pieces of long bodies, up to 256 KiB each
_ALWAYS = 10_000  # of them may be in any body


class BodyReader:
    """Reads the bodies of one server's requests."""

    def __init__(self, limits: Limits) -> None:
        self.most, self.arriving = limits.body, 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A body; `APIError` where it is too much.

        A long one is read a piece at a time, with pauses that are as many times as long as there are long ones: altogether they get a part
        of the server's time, and short requests are not kept waiting.
        """
        told = dict(scope["headers"]).get(b"content-length", b"0")
        length = int(told) if told.isdigit() else 0
        large = APIError(413, f"the request is larger than {self.most} bytes", "too_large")
        if length > self.most:
            raise large
        if length > SHORT:
            await self._pause()
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most:
                raise large
            more = message.get("more_body", False)
            if more or size > SHORT:
                await self._pause()
        return b"".join(parts)

    async def _pause(self) -> None:
        self.arriving += 1
        try:
            await asyncio.sleep(_PIECE * self.arriving)
        finally:
            self.arriving -= 1


def require_json(scope: Scope) -> None:
    """`APIError` for what is not said to be JSON.

    A page of another site cannot say so without the browser asking this server first; so a POST without a body must say it, too.
    """
    kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise APIError(
            415,
            f"a POST is application/json, not {kind or 'without a type'}; send Content-Type: application/json",
            "unsupported_media_type",
        )


def parse(body: bytes, most: int) -> Any:
    """What a body says; ``most``: bytes that any may have.  `APIError` for what is not JSON, or of too many parts to be a request."""
    allowed = max(_ALWAYS, most // _BYTES)
    if (parts := sum(map(body.count, b",[{"))) > allowed:
        raise APIError(400, f"the body has {parts} commas and brackets, {allowed} are taken; send less at once", "too_large")
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=_object)
        check_depth(found)
        return found
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not UTF-8 at byte {error.start}", "invalid_json") from None
    except RecursionError:
        raise APIError(400, "the body is nested too deeply", "invalid_json") from None
    except (ValueError, InputError) as error:
        raise APIError(400, f"the body is not valid JSON: {error}", "invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _FIELDS:
        raise APIError(400, f"an object has {len(pairs)} fields; no request has more than {_FIELDS}", "invalid_value")
    return once(pairs)


def again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes."""
    told = [False]

    async def out() -> Message:
        if told[0]:
            return await receive()
        told[0] = True
        return {"type": "http.request", "body": body, "more_body": False}

    return out


class _ReadRequest(Request):
    """One whose body is parsed already."""

    async def json(self) -> Any:
        return self.scope[DOCUMENT]


class ParsedRoute(APIRoute):
    """A route that takes the document which `errata.serve.middleware` has parsed."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_ReadRequest(request.scope, request.receive))

        return handler
