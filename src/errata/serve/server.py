"""From a service to a process that listens, and to its end.

The first SIGTERM or Ctrl-C: nothing new is begun (503), answers that run and the edit in work may go on for the grace time, then are
ended; the ledger rolls back what was not committed.  A second one ends the grace time at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from errata.errors import ConfigError
from errata.serve.app import make
from errata.serve.connections import BURST, Connection, Connections, trouble
from errata.serve.service import Service

LOG = logging.getLogger("errata.serve")
LINGER = 1.0  # seconds for answers to be written once they are made
_WAIT_IN_LINE = 1024  # connections that the system holds until they are accepted


class Server(uvicorn.Server):
    """uvicorn, ended by errata's own signals: an orderly end is an exit code of 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; `ConfigError` where that cannot be."""
    out = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        out = socket.socket(family, socket.SOCK_STREAM)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if out is not None:
            out.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{host}, port {port}: cannot listen there ({why}); choose another with --host and --port") from None
    return out


class ServerRunner:
    """A server in this process: `run` in the main thread, or `start` and `stop` around it in tests."""

    def __init__(self, service: Service, ready: Callable[[str], None] = lambda url: None, listening: socket.socket | None = None) -> None:
        self.service, self.ready = service, ready
        self.grace, options = service.options.grace, service.options
        self.socket = listening or bind_socket(options.host, options.port)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.connections, application = Connections(options.limits), make(service)
        config = uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            http=functools.partial(Connection, self.connections),  # type: ignore[arg-type]
            ws="none",
            backlog=BURST,
            timeout_keep_alive=math.ceil(options.limits.idle),
            limit_concurrency=None,
            timeout_graceful_shutdown=None,
            h11_max_incomplete_event_size=65_536,
        )
        self.server = Server(config)
        self.ending = False

    def run(self) -> bool:
        """Until a signal; whether everything ended by itself (else `leave`)."""
        before = {s: signal.signal(s, self._signalled) for s in (signal.SIGTERM, signal.SIGINT)}
        sys.setswitchinterval(0.001)  # seconds that threads which compute may keep the one that serves connections waiting
        gc.collect()
        gc.freeze()  # the model and its programs stay: to look through them again and again would stop every thread for a moment each time
        try:
            return self._serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _serve(self) -> bool:
        self.service.start()
        return asyncio.run(self._main())

    async def _main(self) -> bool:
        asyncio.get_running_loop().set_exception_handler(trouble)
        watching = asyncio.ensure_future(self.connections.watch())
        serving = asyncio.ensure_future(self.server.serve(sockets=[self.socket]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.005)
        if self.server.started:
            self.socket.listen(_WAIT_IN_LINE)  # uvicorn's backlog is also how many it accepts before it does anything else
            LOG.info("listening on %s", self.url)
            self.ready(self.url)
        while not self.ending and not serving.done():
            await asyncio.sleep(0.05)
        LOG.info("stopping")
        self.service.stopping = True  # from here on nothing new is begun, and whoever asks is told so
        began = asyncio.get_running_loop().time()
        closing = asyncio.ensure_future(asyncio.to_thread(self.service.editor.close, lambda: self.grace))
        await self._within(began, lambda: closing.done() and not self.service.engine.num_unfinished)
        self.server.should_exit = True
        await self._within(began, serving.done)
        if not serving.done():  # what still runs is told that it ends here
            self.service.texts.close()
            await asyncio.to_thread(self.service.engine.close)
            await asyncio.sleep(LINGER)
        self.service.texts.close()
        await asyncio.to_thread(self.service.engine.close)
        whole = await closing
        self.server.force_exit = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(serving, LINGER + 4)
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # its client reads no more: closing would wait for what is still to be sent
        watching.cancel()
        await asyncio.sleep(0)
        idle = self.service.analysis.close()
        LOG.info("stopped")
        return whole and idle

    async def _within(self, began: float, done: Callable[[], bool]) -> None:
        """Until it is done, or the grace time is over."""
        while not done() and asyncio.get_running_loop().time() - began < self.grace:
            await asyncio.sleep(0.05)

    def _signalled(self, *_: object) -> None:
        if self.ending:
            self.grace = 0.0
        self.ending = True

    # -- beside other work, in tests ---------------------------------------------------------------------------

    def start(self) -> None:
        """In a thread of its own; returns once it listens."""
        up = threading.Event()
        self.ready = lambda url: up.set()
        self.thread = threading.Thread(target=self._serve, name="errata-serve", daemon=True)
        self.thread.start()
        if not up.wait(30):
            raise ConfigError("the server did not start within 30 seconds")

    def stop(self, grace: float | None = None) -> None:
        """End a server that was started with `start`."""
        self.grace = self.service.options.grace if grace is None else grace
        self.ending = True
        self.thread.join(self.grace + 30)


def leave(code: int) -> None:
    """End the process at once, where a thread that edits is in a step too long to wait for, or a question still runs: the ledger takes that
    as a kill."""
    for stream in ("stdout", "stderr"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            getattr(sys, stream).flush()
    os._exit(code)
