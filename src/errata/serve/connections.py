"""Connections: how many there may be, and how long each may keep the server waiting.

uvicorn closes a connection that is idle after an answer; one that never finishes its headers, or never reads, it keeps for ever, and its
own limit refuses whoever comes last, which under attack is everyone else.  Here the limit closes the one that has kept the server waiting
longest.
"""

from __future__ import annotations

import asyncio
import errno
import http
import json
import logging
import os
import time
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from errata.serve.api_errors import APIError
from errata.serve.options import Limits

LOG = logging.getLogger("errata.serve.connections")
BURST = 16  # connections that are accepted at once, before those that are too many are closed
_OTHER = 128  # descriptors for the ledger, patches and connections that are about to be closed, beside those open at the start
_PIPED = 0.01  # seconds between two requests that were not waited for, altogether
_LINGER = 5.0  # seconds a connection that is closed may take to read what it was sent
_SELDOM = 60.0  # seconds between two lines about the same thing
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connections:
    """The connections of one server.

    A connection *waits for its client* until a request of it is there as a whole, between two requests, and while what it was sent is not
    read; then ``idle`` seconds are its time, and it is closed before others where there are too many: the longest wait first, those that
    were never answered before those that were.  A request in work is never cut off.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.most = limits, _most(limits.connections)
        self.open: set[Connection] = set()
        self._waiting: tuple[OrderedDict[Connection, None], ...] = (OrderedDict(), OrderedDict())  # never answered; answered
        self.piped = 0  # that have sent their next request too soon
        self._closing: dict[Connection, float] = {}

    def begin(self, connection: Connection) -> None:
        self.open.add(connection)
        self.wait(connection)
        while len(self.open) > self.most:
            late = next((c for waiting in self._waiting for c in waiting), connection)
            LOG.warning("too many connections (%d): those that have waited longest for their clients are closed", self.most)
            late.transport.abort()
            self.end(late)

    def wait(self, connection: Connection) -> None:
        """It waits for its client from now on."""
        self.work(connection)
        connection.since = time.monotonic()
        self._waiting[connection.answered][connection] = None

    def work(self, connection: Connection) -> None:
        """It waits for nobody."""
        for waiting in self._waiting:
            waiting.pop(connection, None)

    def end(self, connection: Connection) -> None:
        self.work(connection)
        self.open.discard(connection)
        self._closing.pop(connection, None)

    def look(self) -> None:
        """Close what has kept the server waiting too long."""
        now = time.monotonic()
        for waiting in self._waiting:
            for connection in [c for c in waiting if now - c.since > self.limits.idle]:
                connection.late()
        for connection in [c for c in self.open if c.transport.is_closing()]:
            if now - self._closing.setdefault(connection, now) > _LINGER:
                connection.transport.abort()

    async def watch(self) -> None:
        """`look`, again and again."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle / 4))
            self.look()


class Connection(H11Protocol):
    """uvicorn's, which tells `Connections` what it waits for."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.all, self.since, self.answered = connections, 0.0, False

    @property
    def _begun(self) -> bool:
        """Whether there is the beginning of a request's headers."""
        return bool(self.conn.trailing_data[0])

    @property
    def _arriving(self) -> bool:
        """Whether a request's headers are there, and its body not yet."""
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    @property
    def _working(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.all.begin(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.end(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not (self._begun or self._working or self._arriving):
            self.all.wait(self)
        super().data_received(data)
        if self._working and not self.flow.write_paused:
            self.all.work(self)
        elif self._arriving:
            self.flow.pause_reading()  # until the next piece is asked for: `errata.serve.bodies`

    def on_response_complete(self) -> None:
        """Then the next request; where it was sent before this answer was there, after others have had a turn."""
        self.answered = True
        self.all.wait(self)
        if self._begun:
            self.all.piped += 1
            self.loop.call_later(_PIPED * self.all.piped, self._next)
        else:
            super().on_response_complete()

    def _next(self) -> None:
        self.all.piped -= 1
        super().on_response_complete()  # which begins with it
        if self._working and not self.flow.write_paused:
            self.all.work(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.all.wait(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._working:
            self.all.work(self)

    def late(self) -> None:
        """It waits too long.  A body has a time of its own (`errata.serve.middleware`)."""
        if self.flow.write_paused:
            self.transport.abort()
        elif self._arriving or self.transport.is_closing():
            return
        elif self._begun:
            seconds = self.all.limits.idle
            self._refuse(APIError(408, f"the request's headers took longer than {seconds:g} seconds to arrive", "timeout"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, in the shape of any error."""
        self._refuse(APIError(400, msg, "invalid_http"))

    def _refuse(self, refused: APIError) -> None:
        """Say why and close, where nothing was answered yet."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(refused.document).encode()
            first = f"HTTP/1.1 {refused.status} {http.HTTPStatus(refused.status).phrase}"
            head = (first, "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close", "", "")
            self.transport.write("\r\n".join(head).encode() + body)
        self.transport.close()


def _most(wanted: int) -> int:
    """As many connections as are wanted, or as this process may have descriptors for."""
    try:
        import resource

        allowed, there = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not on this system
        return wanted
    if allowed == resource.RLIM_INFINITY:
        return wanted
    room = max(1, allowed - there - _OTHER)
    if room < wanted:
        LOG.warning("%d connections at once, not %d: this process may open %d files (ulimit -n)", room, wanted, allowed)
    return min(wanted, room)


def trouble(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the loop does with an error of its own: a line now and then where descriptors are used up (it tries again by itself)."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        LOG.warning("a connection cannot be accepted: %s; allow more files (ulimit -n) or fewer connections", error.strerror)
    else:
        loop.default_exception_handler(context)


class _Seldom(logging.Filter):
    """Lets a warning through once a minute: what anyone can bring about again and again must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        about, now = str(record.msg), time.monotonic()
        last, more = self._told.get(about, (-_SELDOM, 0))
        if now - last < _SELDOM:
            self._told[about] = (last, more + 1)
            return False
        self._told[about] = (now, 0)
        record.msg = f"{about} ({more} more times since it was told)" if more else about
        return True


_seldom = _Seldom()
for _logger in (LOG, logging.getLogger("uvicorn.error")):
    _logger.addFilter(_seldom)
