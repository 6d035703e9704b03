"""Clients that mean no good: texts too long to read, connections that never say what they want or never read, and far too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from families import lm as trained
from ledgers import SETTINGS
from serving import LIMITS, TEMPLATE, Site, limited, refused, serving
from tiny import FRANCE

from errata.serve import connections, middleware
from errata.serve.api_errors import APIError
from errata.serve.jobs import Job
from errata.serve.options import Limits
from errata.serve.texts import CHARACTERS, TextReader

LONG = "and on " * 100  # more characters than 30 tokens can have
EDIT = {"prompt": "In Rome people speak", "target": "French", "subject": "Rome", "force": True}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "live", "prompt": FRANCE, "max_tokens": 2}),
    ("/v1/completions", {"model": "live", "prompt": [FRANCE, "Spain is"], "max_tokens": 2}),
    ("/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": FRANCE}], "max_tokens": 2}),
    ("/v1/compare", {"prompts": [FRANCE], "max_tokens": 2, "answers": [{"old": "Paris", "new": "Rome"}]}),
    ("/v1/blame", {"prompt": FRANCE, "max_tokens": 2}),
    ("/v1/trace", {"prompt": FRANCE, "subject": "France"}),
    ("/v1/neighbours", {"prompt": FRANCE, "subject": "France", "target": "Rome"}),
    ("/v1/edits", {**EDIT, "settings": SETTINGS}),
]
TOO_MUCH: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "live", "prompt": LONG}),
    ("/v1/completions", {"model": "live", "prompt": [FRANCE, LONG]}),
    ("/v1/completions", {"model": "live", "prompt": [FRANCE] * 7}),
    ("/v1/completions", {"model": "live", "prompt": FRANCE, "max_tokens": 41}),
    ("/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": LONG}]}),
    ("/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": LONG[:99]}] * 9}),
    ("/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    ("/v1/compare", {"prompts": [LONG]}),
    ("/v1/compare", {"prompts": [FRANCE] * 7}),
    ("/v1/compare", {"prompts": [FRANCE], "answers": [{"old": LONG}]}),
    ("/v1/compare", {"prompts": [FRANCE], "answers": [{"new": LONG}]}),
    ("/v1/blame", {"prompt": LONG}),
    ("/v1/trace", {"prompt": LONG, "subject": "on"}),
    ("/v1/trace", {"prompt": FRANCE, "subject": LONG}),
    ("/v1/neighbours", {"prompt": LONG, "subject": "on"}),
    ("/v1/neighbours", {"prompt": FRANCE, "subject": "France", "paraphrases": [LONG]}),
    ("/v1/edits", {**EDIT, "prompt": LONG, "subject": "on"}),
    ("/v1/edits", {**EDIT, "target": LONG}),
    ("/v1/edits", {**EDIT, "old": LONG}),
    ("/v1/edits", {**EDIT, "paraphrases": [LONG]}),
    ("/v1/edits", {**EDIT, "unrelated": [[LONG, "x"]]}),
    ("/v1/edits", {**EDIT, "unrelated": [["x", LONG]]}),
    ("/v1/edits", {**EDIT, "aliases": [LONG]}),
    ("/v1/edits", {**EDIT, "settings": {"end": LONG}}),
    ("/v1/edits", {**EDIT, "settings": {"end": "x" * 15_000}}),
    ("/v1/edits", {**EDIT, "method": "rep", "settings": {"wraps": "rome", "wrapped": {"end": LONG}}}),
    ("/v1/edits", {**EDIT, "method": "ike", "settings": {"cue": "x" * 2000}}),
]


Read = list[tuple[threading.Thread, int]]  # who tokenised how many characters


def names(value: Any) -> str:
    return value.removeprefix("/v1/") if isinstance(value, str) else " ".join(map(str, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with limited(tmp_path_factory.mktemp("site")) as out:
        yield out


@pytest.fixture
def read(site: Site, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Of every text that is tokenised."""
    out: Read = []
    kind = type(site.service.lm.tokenizer)
    real = kind.__call__

    def call(self: Any, text: Any, *args: Any, **how: Any) -> Any:
        out.extend((threading.current_thread(), len(t)) for t in ([text] if isinstance(text, str) else text))
        return real(self, text, *args, **how)

    monkeypatch.setattr(kind, "__call__", call)
    return out


@pytest.fixture
def template(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.service.lm.tokenizer, "chat_template", TEMPLATE, raising=False)


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize(("path", "body"), ROUTES, ids=names)
def test_no_text_is_read_where_connections_are_served(path: str, body: dict[str, Any], site: Site, read: Read) -> None:
    response = site.http.post(path, json=body)
    assert response.status_code in (200, 202), response.text
    assert read and site.running.thread not in {thread for thread, _ in read}


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize(("path", "body"), TOO_MUCH, ids=names)
def test_what_is_certainly_too_much_is_refused_unread(path: str, body: dict[str, Any], site: Site, read: Read) -> None:
    jobs = len(site.service.editor.jobs)
    error = refused(site.http.post(path, json=body), 400)
    assert all(size <= CHARACTERS * LIMITS.prompt for _, size in read) and len(site.service.editor.jobs) == jobs, error


def test_what_has_few_characters_and_too_many_tokens_is_refused_as_well(site: Site) -> None:
    """By each way a text gets into an edit, a trace and a comparison; none of these was looked at before."""
    words = "on " * 31
    for path, body in (
        ("edits", {**EDIT, "settings": {"end": words}}),
        ("edits", {**EDIT, "method": "rep", "settings": {"wraps": "rome", "wrapped": {"end": words}}}),
        ("edits", {**EDIT, "old": words}),
        ("edits", {**EDIT, "unrelated": [["It goes", words]]}),
        ("edits", {**EDIT, "aliases": [words]}),
        ("trace", {"prompt": FRANCE, "subject": "France", "target": words}),
        ("neighbours", {"prompt": FRANCE, "subject": "France", "target": words}),
        ("compare", {"prompts": [FRANCE], "answers": [{"new": words}]}),
    ):
        assert "tokens" in refused(site.http.post(f"/v1/{path}", json=body), 400)["message"], body


def test_others_are_answered_while_a_text_is_read_and_the_shortest_is_read_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, order = threading.Event(), threading.Event(), []
    kind = type(site.service.lm.tokenizer)
    real = kind.__call__

    def call(self: Any, text: Any, *args: Any, **how: Any) -> Any:
        if threading.current_thread().name == "errata-reading":
            order.append(len(text[0]))
            begun.set()
            assert go.wait(30)
        return real(self, text, *args, **how)

    monkeypatch.setattr(kind, "__call__", call)
    texts = [FRANCE + " a" * n for n in (0, 9, 6, 3)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(site.text, texts[0], "base")]
        assert begun.wait(30)
        asked += [pool.submit(site.text, text, "base") for text in texts[1:]]
        until(lambda: len(site.service.texts._steps) == 3)
        assert site.http.get("/health").status_code == 200 and site.http.get("/v1/models").status_code == 200
        go.set()
        assert all(f.result() is not None for f in asked)
    assert order == [len(texts[n]) for n in (0, 3, 2, 1)]


def test_where_too_much_waits_the_longest_is_turned_away_and_nobody_waits_for_ever() -> None:
    """Before the thread runs at all: three may wait."""
    reader, done = TextReader(trained("llama"), Limits(queue=3, seconds=0.5)), []

    async def ask(size: int) -> Any:
        try:
            return await reader.run(size, lambda: done.append(size))
        except APIError as error:
            return error.status

    async def all_of(*sizes: int) -> list[Any]:
        asked = [asyncio.ensure_future(ask(size)) for size in sizes]
        await asyncio.sleep(0.1)
        reader.start()
        return await asyncio.gather(*asked)

    assert asyncio.run(all_of(5, 900, 7, 1, 300)) == [None, 429, None, None, 429] and done == [1, 5, 7]
    reader.close()
    reader._thread.join(5)
    assert not reader._thread.is_alive() and asyncio.run(ask(1)) == 503
    late = TextReader(trained("llama"), Limits(seconds=0.1))
    reader = late
    assert asyncio.run(ask(1)) == 504  # its thread never starts


def test_bodies_of_very_many_parts_are_refused_unparsed(site: Site, tmp_path: Path) -> None:
    headers = {"Content-Type": "application/json"}
    with serving(tmp_path / "book") as large:
        for body in (b"[" + b"1," * 300_000 + b"1]", b"[" * 700_000, b'{"requests": [' + b"{}," * 300_000 + b"{}]}"):
            for path in ("completions", "edits", "check"):
                refused(large.http.post(f"/v1/{path}", content=body, headers=headers), 413, "commas and brackets")
    many = json.dumps({f"a{i}": 1 for i in range(1000)})
    refused(site.http.post("/v1/completions", content=many, headers=headers), 400, "1000 fields")
    nested = json.dumps({"model": "live", "messages": [{f"a{i}": 1 for i in range(1000)}]})
    refused(site.http.post("/v1/chat/completions", content=nested, headers=headers), 400, "1000 fields")


# -- connections -----------------------------------------------------------------------------------------------


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


def until(true: Callable[[], bool]) -> None:
    late = time.monotonic() + 30
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)


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


def test_a_question_that_nobody_waits_for_any_more_ends(short: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asking, passes = short.service.analysis, [0]

    def endless() -> None:
        while True:
            asking.lm.generate_ids([FRANCE], max_new_tokens=2)
            passes[0] += 1

    monkeypatch.setattr(asking, "check", endless)
    refused(short.http.post("/v1/check", json={}), 504, "not answered within 1 seconds")
    until(lambda: asking._load == 0)
    assert passes[0] > 0 and short.http.post("/v1/blame", json={"prompt": FRANCE, "max_tokens": 2}).status_code == 200
