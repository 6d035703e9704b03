"""What stands before the routes: who may call by which name, how much may be sent and how slowly, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from errata.documents import parse_json
from errata.errors import InputError
from errata.request import no_constant
from errata.serve.api_errors import APIError, stopping, to_api_error
from errata.serve.service import Service

LOG = logging.getLogger("errata.serve")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
LINGER = 2.0  # seconds a client that sends too much is listened to after it has been refused
_ROUTES = ("completions", "chat", "models", "edits", "jobs", "compare", "blame", "check", "watch", "neighbours", "trace", "log")
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'"),
)


def require_token(token: str) -> Callable[[Request], None]:
    """A dependency: 401 without the token."""

    def check(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise APIError(
                401,
                "this changes the ledger and needs the server's token: Authorization: Bearer TOKEN",
                "invalid_token",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _host_of(header: str) -> str:
    """The name in a Host header, without the port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


class GuardMiddleware:
    """An ASGI application around another."""

    def __init__(self, app: App, service: Service) -> None:
        self.app, self.service, self.limits = app, service, service.options.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), [0]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                names = {name for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(pair for pair in _SAFE if pair[0] not in names)]
            await send(message)

        try:
            self._allowed(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.limits.seconds)
            await self.app(scope, _again(body, receive), answer)
        except Exception as error:
            if status[0]:
                raise
            await _refuse(scope, receive, answer, error)
        except asyncio.CancelledError:
            if not self.service.stopping:  # at the end nobody is left to be answered, and it is nothing to log
                raise
        finally:
            route = _route(scope["path"])
            self.service.metrics.requests.labels(route, _method(scope["method"]), str(status[0] or 499)).inc()
            LOG.debug("%s %s %s %.3f s", scope["method"], scope["path"], status[0], time.monotonic() - began)

    def _allowed(self, scope: Scope) -> None:
        hosts = self.service.options.hosts
        header = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"host"), "")
        if hosts and _host_of(header).lower() not in hosts:
            raise APIError(403, f"this server is not called {_host_of(header)!r}; start it with --allow-host to let it be", "wrong_host")
        if self.service.stopping and scope["method"] == "POST":
            raise stopping()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of it, as far as it is not too much; `APIError` also for what is not JSON."""
        headers = dict(scope["headers"])
        length, most = headers.get(b"content-length", b"0"), self.limits.body
        large = APIError(413, f"the request is larger than {most} bytes", "too_large")
        if length.isdigit() and int(length) > most:
            raise large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise large
            more = message.get("more_body", False)
        body = b"".join(parts)
        if (body or scope["method"] == "POST") and scope["path"].startswith("/v1/"):
            _json(body, headers.get(b"content-type", b"").decode("latin-1"))
        return body


def _json(body: bytes, kind: str) -> None:
    """`APIError` for what is not JSON, or not said to be.

    A page of another site cannot say so without the browser asking this server first; so a POST without a body must say it, too.
    """
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise APIError(
            415,
            f"a POST is application/json, not {kind or 'without a type'}; send Content-Type: application/json",
            "unsupported_media_type",
        )
    if not body:
        return
    try:
        parse_json(body.decode("utf-8"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not UTF-8 at byte {error.start}", "invalid_json") from None
    except (ValueError, InputError) as error:
        raise APIError(400, f"the body is not valid JSON: {error}", "invalid_json") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes."""
    told = [False]

    async def out() -> Message:
        if told[0]:
            return await receive()
        told[0] = True
        return {"type": "http.request", "body": body, "more_body": False}

    return out


async def _refuse(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
    if isinstance(error, asyncio.TimeoutError):
        error = APIError(408, "the request took too long to arrive", "timeout")
    refused = to_api_error(error)
    if refused.code == "internal":
        LOG.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
    if refused.status not in (408, 413):
        await JSONResponse(refused.document, refused.status, refused.headers)(scope, receive, send)
        return
    answer = JSONResponse(refused.document, refused.status, {**refused.headers, "Connection": "close"})
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    # To close while the client still sends resets the connection, and a reset takes the answer away again before it is read.
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), LINGER)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    """Read and forget what a client still sends."""
    more = True
    while more:
        message = await receive()
        more = message["type"] != "http.disconnect" and message.get("more_body", False)


def _route(path: str) -> str:
    """A label that strangers cannot make new ones of."""
    first, _, rest = path.strip("/").partition("/")
    name = rest.partition("/")[0]
    if first == "v1":
        return name if name in _ROUTES else "other"
    return first if first in ("health", "metrics") else "page" if path == "/" else "other"


def _method(name: str) -> str:
    return name if name in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH") else "other"
