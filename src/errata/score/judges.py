"""Judges of generated answers: each says whether an answer means the wanted one, and is a protocol of its own ("judged NAME@VERSION").

    exact             equal after `errata.score.match.normalise`: what every record's gen_match holds already, so it adds nothing
    contains          the wanted words stand in the answer, as in every record's own protocol "contains" (version 2: at the ends of words in
                      any script, numbers whole)
    module:function   any callable (question, wanted, answer) -> bool; its attribute ``version`` is part of the protocol's name
    endpoint          any server that speaks OpenAI's chat completions; what it said is kept on disk, a question is asked once

A judge that fails raises `JudgeError`; no other verdict takes its place.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from errata import registry, storage
from errata.endpoint import AGAIN, exchange
from errata.errors import ConfigError, JudgeError
from errata.score import match

_INSTRUCTION = (
    "You grade answers. You are given a question (maybe the beginning of a sentence), the expected answer and an answer that was given. "
    "Reply with the single word CORRECT if the given answer states the expected one (other wording is fine, another fact beside it that "
    "contradicts it is not), else with the single word INCORRECT."
)
_VERDICTS = {"CORRECT": True, "INCORRECT": False}


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, question: str, wanted: str, answer: str) -> bool: ...


@dataclass(frozen=True)
class FunctionJudge:
    """A plain function as a judge."""

    name: str
    function: Callable[[str, str, str], Any]

    def __call__(self, question: str, wanted: str, answer: str) -> bool:
        try:
            said = self.function(question, wanted, answer)
        except Exception as error:  # it is somebody else's code
            raise JudgeError(f"judge {self.name}: {type(error).__name__}: {error} (on the question {question!r})") from error
        if not isinstance(said, bool):
            raise JudgeError(f"judge {self.name}: said {said!r} of the question {question!r}; it must return True or False")
        return said


@dataclass(frozen=True)
class EndpointJudge:
    """A server at ``url`` (".../v1") with ``model``, asked greedily.

    cache    a folder, a file a question
    seconds  of a whole answer; a later one is asked for again, ``tries`` times in all
    """

    name: str
    url: str
    model: str
    cache: Path
    key: str | None = field(default=None, repr=False)
    tries: int = 4
    seconds: float = 60.0
    wait: float = 2.0

    def __call__(self, question: str, wanted: str, answer: str) -> bool:
        if not answer.strip():
            return False
        asked = {"model": self.model, "temperature": 0, "max_tokens": 8, "messages": self._messages(question, wanted, answer)}
        known = self.cache / f"{hashlib.sha256(json.dumps([self.url, asked], sort_keys=True).encode()).hexdigest()}.json"
        if known.exists():
            try:
                return bool(json.loads(known.read_text(encoding="utf-8"))["verdict"])
            except (ValueError, KeyError, TypeError):
                pass  # torn: asked again
        said = self._ask(asked)
        verdict = _VERDICTS.get(said.strip().strip(".!\"'*").upper())
        if verdict is None:
            raise JudgeError(f"judge {self.name}: {self.url} said {said!r} where CORRECT or INCORRECT was asked for")
        storage.write_atomic(known, json.dumps({"verdict": verdict, "said": said, **asked}, ensure_ascii=True).encode())
        return verdict

    def _messages(self, question: str, wanted: str, answer: str) -> list[dict[str, str]]:
        text = f"Question: {question}\nExpected answer: {wanted}\nGiven answer: {answer}"
        return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": text}]

    def _ask(self, asked: Mapping[str, Any]) -> str:
        """The reply; `JudgeError` when there is none after a few tries."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers)
        why = ""
        for turn in range(self.tries):
            if turn:
                time.sleep(self.wait * 2 ** (turn - 1))
            try:
                reply = exchange(request, self.seconds)
                if reply.ok:
                    return str(json.loads(reply.body)["choices"][0]["message"]["content"])
                why = f"{reply.status} {reply.reason}"
                if reply.status not in AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
                why = f"its reply is not a chat completion ({type(error).__name__})"
        raise JudgeError(f"judge {self.name}: {self.url} could not be asked: {why}; nothing was put in its place, run again to go on")


def make(name: str, cache: Path, endpoint: str | None = None, model: str | None = None, key_env: str | None = None) -> Judge | None:
    """A judge by name; None for "exact", which every record holds already.

    ``endpoint``, ``model``, ``key_env``: of a server, and the environment variable that holds its key.
    """
    if endpoint is not None:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"judge {name!r}: endpoint must be an http(s) address, not {endpoint!r}")
        if not model:
            raise ConfigError(f"judge {name!r}: an endpoint needs model, the name it knows the model by")
        if key_env and not os.environ.get(key_env):
            raise ConfigError(f"judge {name!r}: the environment variable {key_env} is not set; put the key there")
        return EndpointJudge(f"{name}@1", endpoint, model, cache, os.environ.get(key_env) if key_env else None)
    if model or key_env:
        raise ConfigError(f"judge {name!r}: model and key_env belong to an endpoint; give one")
    if name == "exact":
        return None
    if name == "contains":
        return FunctionJudge("contains@2", lambda question, wanted, answer: match.contains(answer, wanted))
    if ":" not in name:
        raise ConfigError(f"no judge named {name!r}; there are exact, contains, module:function, or give an endpoint")
    function = registry.own("judge", name)
    if not callable(function):
        raise ConfigError(f"judge {name!r} is not a function but {type(function).__name__}")
    return FunctionJudge(f"{name}@{getattr(function, 'version', 1)}", function)


def judge(records: Sequence[dict[str, Any]], judges: Sequence[Judge]) -> list[dict[str, Any]]:
    """The records with what each judge says of the answers before and after; a probe without an answer of its own is not judged."""
    if not judges:
        return list(records)
    return [
        {**r, "judged": {j.name: [_says(j, r, when) for when in ("before", "after")] for j in judges}} if r.get("target") is not None else r
        for r in records
    ]


def _says(judge: Judge, record: Mapping[str, Any], when: str) -> bool:
    """Whether the answer means one of those that are accepted."""
    return any(judge(record["prompt"], wanted, record[f"gen_{when}"]) for wanted in (record["target"], *record.get("also", ())))
