"""A chat model behind an OpenAI-compatible HTTP interface, asked for lists of texts.  Standard library only."""

from __future__ import annotations

import http.client
import json
import os
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


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key goes where the user said and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """``url`` with or without "/chat/completions".  The API key is the value of the environment variable ``key``; unset, none is sent."""

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
        opener = urllib.request.build_opener(_Stay)
        for attempt in range(1, TRIES + 1):
            try:
                with opener.open(request, timeout=self.seconds) as response:
                    return bytes(response.read(_LARGEST))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.reason}: {_beginning(error.read(_LARGEST))}"
                passing = error.code in AGAIN
                error.close()
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
