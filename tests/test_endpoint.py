"""Servers that are asked and do not answer well: byte by byte, elsewhere, or more than anyone wants."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errata import endpoint
from errata.endpoint import Endpoint
from errata.errors import JudgeError, ModelError
from errata.score.judges import EndpointJudge

ANSWER = json.dumps({"choices": [{"message": {"content": "CORRECT"}}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % len(ANSWER)


@contextlib.contextmanager
def served(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """(a server's address, the keys it was given)"""
    keys: list[str] = []
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(OSError):
                answer(self)

        do_GET = do_POST

        def drip(self, text: bytes) -> None:
            for byte in text:
                self.wfile.write(bytes([byte]))
                if over.wait(0.05):
                    return

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/v1", keys
    finally:
        over.set()
        made.shutdown()
        made.server_close()
        thread.join()


def drips_all(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.drip(HEAD + ANSWER)  # type: ignore[attr-defined]


def drips_body(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(HEAD)
    handler.drip(ANSWER)  # type: ignore[attr-defined]


def drips_refusal(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(HEAD.replace(b"200 OK", b"401 No"))
    handler.drip(ANSWER)  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", [drips_all, drips_body, drips_refusal])
def test_the_time_is_that_of_the_whole_answer(
    answer: Callable[[http.server.BaseHTTPRequestHandler], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte comes well within the time, the answer does not: dripped, it takes three seconds and more."""
    monkeypatch.setattr(endpoint, "WAIT", 0.0)
    with served(answer) as (url, keys):
        with pytest.raises(JudgeError, match=r"could not be asked: its reply was not there as a whole within 0\.3 seconds"):
            EndpointJudge("gpt@1", url, "m", tmp_path, tries=2, seconds=0.3, wait=0.0)("q", "a", "b")
        with pytest.raises(ModelError, match=r"no answer \(3 tries\): its reply was not there as a whole within 0\.3 seconds"):
            Endpoint(url, "m", seconds=0.3).ask("x")
        assert len(keys) == 5 and not list(tmp_path.iterdir())


def test_a_judges_key_goes_nowhere_else(tmp_path: Path) -> None:
    def elsewhere(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % other.encode())

    with served(lambda h: None) as (other, stolen), served(elsewhere) as (url, keys):
        with pytest.raises(JudgeError, match="could not be asked: 302 Found"):
            EndpointJudge("gpt@1", url, "m", tmp_path, "secret", wait=0.0)("q", "a", "b")
        assert keys == ["Bearer secret"] and stolen == []


def test_a_reply_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_LARGEST", 1000)

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        began = time.monotonic()
        while time.monotonic() - began < 20:
            handler.wfile.write(b" " * 65_536)

    with served(endless) as (url, _), pytest.raises(JudgeError, match="not a chat completion"):
        EndpointJudge("gpt@1", url, "m", tmp_path, tries=1)("q", "a", "b")
