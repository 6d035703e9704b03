"""Connections that never say what they want, never read what they are told, or are far too many."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import Site, serving, until

from errata.serve import connections, middleware
from errata.serve.jobs import Job
from errata.serve.options import Limits


def hold(site: Site, sent: bytes = b"") -> socket.socket:
    """A connection on which something was sent."""
    host, port = site.url.removeprefix("http://").split(":")
    out = socket.create_connection((host, int(port)), timeout=20)
    out.sendall(sent)
    return out


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    out = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            out += part
    return out


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with little patience and few connections."""
    with serving(tmp_path_factory.mktemp("short") / "book", limits=Limits(idle=0.4, connections=6, seconds=1.0, streams=3)) as out:
        yield out


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-Long: " + b"x" * 30_000], ids=["nothing", "a letter", "a head", "a field"])
def test_who_never_finishes_headers_is_hung_up_on(short: Site, sent: bytes) -> None:
    said = rest(hold(short, sent))
    assert not said if not sent else said.startswith(b"HTTP/1.1 408 ")
    if sent:
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
    until(lambda: not short.running.connections.open)


def test_headers_that_drip_are_no_sign_of_life(short: Site) -> None:
    connection, given = hold(short, HEAD), 0
    with contextlib.suppress(OSError):
        while given < 400:
            connection.sendall(b"X: y\r\n")
            given += 1
            time.sleep(0.05)
    assert given < 200
    connection.close()


def test_an_idle_connection_is_closed_after_its_answer_and_so_is_the_beginning_of_a_second_request(short: Site) -> None:
    whole = HEAD + b"\r\n"
    for more, last in ((b"", b"200"), (HEAD, b"408"), (whole + HEAD, b"408")):
        said = rest(hold(short, whole + more))
        assert said.count(b"HTTP/1.1 200 OK") == 1 + more.count(b"\r\n\r\n") and said.rpartition(b"HTTP/1.1 ")[2][:3] == last
    until(lambda: not short.running.connections.open)


def test_a_body_that_never_comes_has_the_time_of_a_request(short: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LINGER", 0.1)
    head = b"POST /v1/check HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    assert rest(hold(short, head + b"{")).startswith(b"HTTP/1.1 408 ")


def test_who_does_not_read_is_hung_up_on(short: Site) -> None:
    connection = hold(short)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.suppress(OSError):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
    until(lambda: not short.running.connections.open)
    connection.close()


def test_a_request_in_work_is_never_cut_off(short: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by time nor by others who come."""
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setattr(short.service.analysis, "watch", lambda: begun.set() or [str(go.wait(30))])
    working = hold(short, HEAD.replace(b"/health", b"/v1/watch") + b"\r\n")
    assert begun.wait(30)
    crowd = [hold(short) for _ in range(30)]
    time.sleep(1.0)  # more than `idle`
    assert all(rest(connection) == b"" for connection in crowd)
    go.set()
    assert b'{"prompts":["True"]}' in rest(working)


def test_a_crowd_that_says_nothing_keeps_nobody_out(short: Site) -> None:
    """Connections that wait make room, the oldest first; those that were answered stay longer."""
    kept = httpx.Client(base_url=short.url)
    assert kept.get("/health").status_code == 200
    crowd = []
    for _ in range(5):
        crowd += [hold(short, HEAD) for _ in range(20)]
        assert httpx.get(f"{short.url}/health").status_code == 200 and len(short.running.connections.open) <= 6
        assert kept.get("/health").status_code == 200
    for connection in crowd:
        connection.close()
    kept.close()


def test_requests_that_were_not_waited_for_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HEAD + b"\r\n"
    with serving(tmp_path / "book") as site:
        with hold(site, whole * 5) as connection:
            said = b""
            while said.count(b'"status":"ok"') < 5:
                part = connection.recv(65_536)
                assert part
                said += part
        assert site.running.connections.piped == 0
        monkeypatch.setattr(connections, "_PIPED", 600.0)
        with hold(site, whole * 5) as connection:
            until(lambda: site.running.connections.piped == 1)
            for _ in range(3):  # on a connection that is kept, and on new ones
                assert site.http.get("/health").status_code == httpx.get(f"{site.url}/health").status_code == 200
            connection.settimeout(0.2)
            assert connection.recv(65_536).count(b"200 OK") == 1
            with pytest.raises(TimeoutError):
                connection.recv(1)


def test_health_waits_for_no_other_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests in work than there are threads for all routes together."""
    go = threading.Event()
    with serving(tmp_path / "book") as site:
        monkeypatch.setattr(site.service.analysis, "watch", lambda: [str(go.wait(60))])
        with contextlib.ExitStack() as crowd:
            for _ in range(60):
                crowd.enter_context(hold(site, HEAD.replace(b"/health", b"/v1/watch") + b"\r\n"))
            until(lambda: len(site.running.connections.open) >= 60)
            assert httpx.get(f"{site.url}/health", timeout=20).json()["status"] == "ok"
            go.set()


def test_streams_that_begin_at_once_are_counted(short: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(None, lambda job: None)
    monkeypatch.setitem(short.service.editor.jobs, job.id, job)

    async def begin() -> list[bytes]:
        host, port = short.url.removeprefix("http://").split(":")
        pairs = [await asyncio.open_connection(host, int(port)) for _ in range(6)]
        for _, writer in pairs:
            writer.write(HEAD.replace(b"/health", f"/v1/jobs/{job.id}/events".encode()) + b"\r\n")
        said = [await reader.read(12) for reader, _ in pairs]
        for _, writer in pairs:
            writer.close()
        return said

    assert sorted(asyncio.run(begin())) == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 429"] * 3
    until(lambda: not short.running.connections.open)
    assert sorted(asyncio.run(begin()))[0] == b"HTTP/1.1 200"  # those that left are not counted for ever


def test_what_anyone_can_bring_about_is_logged_once(short: Site, caplog: pytest.LogCaptureFixture) -> None:
    connections._seldom._told.clear()
    for _ in range(10):
        said = rest(hold(short, b"\x16\x03\x01 this is not HTTP\r\n\r\n"))
        assert said.startswith(b"HTTP/1.1 400 ") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(connections.trouble)
    for code in (errno.EMFILE, errno.ENFILE) * 20:
        loop.call_exception_handler({"message": "socket.accept() failed", "exception": OSError(code, "Too many open files")})
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2 and "Invalid HTTP" in told[0] and "cannot be accepted: Too many open files" in told[1]
    assert not any(r.exc_info for r in caplog.records)
    loop.call_exception_handler({"message": "something else", "exception": ValueError("x")})
    loop.close()
    assert caplog.records[-1].levelno == logging.ERROR and caplog.records[-1].exc_info
