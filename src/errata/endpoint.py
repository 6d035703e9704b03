"""A chat model behind an OpenAI-compatible HTTP interface, asked for lists of texts.  Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

from errata.errors import ConfigError, ModelError

PATH: Final = "/chat/completions"
AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may pass
TRIES: Final = 3
WAIT: Final = 1.0  # seconds before the second try; twice as long before the third
_LARGEST: Final = 1 << 24  # bytes of a reply


@dataclass(frozen=True)
class Reply:
    """What came back, whatever its status."""

    status: int
    reason: str
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status // 100 == 2


def exchange(request: urllib.request.Request, seconds: float) -> Reply:
    """The whole reply to a request; `TimeoutError` where it is not there after ``seconds``.

    Python's own limits are of one step each: a server that says a byte now and then would be listened to for ever.  So a thread listens,
    which is left alone when it is late.  `OSError` or `http.client.HTTPException` where there is no reply, or not all of it.
    """
    said: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

    def listen() -> None:
        try:
            said.put(_listened(request, seconds))
        except Exception as error:
            said.put(error)

    threading.Thread(target=listen, name="errata-endpoint", daemon=True).start()
    try:
        found = said.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"its reply was not there as a whole within {seconds:g} seconds") from None
    if isinstance(found, Exception):
        raise found
    return found


def _listened(request: urllib.request.Request, seconds: float) -> Reply:
    until = time.monotonic() + seconds
    try:
        response = urllib.request.build_opener(_Stay).open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        body = b""
        while len(body) < _LARGEST and time.monotonic() < until and (part := response.read1(_LARGEST - len(body))):
            body += part
        if left := getattr(response, "length", None):
            raise http.client.IncompleteRead(body, left)
        return Reply(response.status, response.reason, body)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key goes where the user said and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """``url`` with or without "/chat/completions".  The API key is the value of the environment variable ``key``; unset, none is sent.
    ``seconds``: of a whole answer; a later one is asked for again."""

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    seconds: float = 120.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"endpoint {self.url!r} is no http or https address; give one like http://localhost:8000/v1")
        if not self.model.strip():
            raise ConfigError("the endpoint's model has no name; give --endpoint-model NAME")

    @property
    def address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith(PATH) else base + PATH

    def ask(self, text: str) -> str:
        """The answer to one message.  `ModelError` where there is none, after `TRIES` where trying again may help."""
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": text}]}).encode()
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.key, "").strip():
            headers["Authorization"] = f"Bearer {secret}"
        reply = self._post(urllib.request.Request(self.address, body, headers, method="POST"))
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise ModelError(f"{self.address}: the reply is no chat completion: {_beginning(reply)}")
        return content

    def listed(self, text: str) -> list[str]:
        """The answer as a list of texts: a JSON list, bare or in a code block."""
        said = self.ask(text)
        try:
            found = json.loads(said[said.index("[") : said.rindex("]") + 1])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
            raise ModelError(f"{self.address}: {self.model} was asked for a JSON list of texts and said: {_beginning(said.encode())}")
        return [part.strip() for part in found]

    def _post(self, request: urllib.request.Request) -> bytes:
        for attempt in range(1, TRIES + 1):
            try:
                reply = exchange(request, self.seconds)
                if reply.ok:
                    return reply.body
                why, passing = f"HTTP {reply.status} {reply.reason}: {_beginning(reply.body)}", reply.status in AGAIN
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, a broken reply
                why, passing = str(getattr(error, "reason", "") or error) or type(error).__name__, True
            if not passing or attempt == TRIES:
                tries = f" ({attempt} tries)" if attempt > 1 else ""
                raise ModelError(f"{self.address}: no answer{tries}: {why}; check the address, the model's name and ${self.key}")
            time.sleep(WAIT * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def _beginning(reply: bytes) -> str:
    text = " ".join(reply.decode("utf-8", "replace").split())
    return text[:200] + ("…" if len(text) > 200 else "") or "(nothing)"
