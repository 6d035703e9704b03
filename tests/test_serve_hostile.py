"""Requests that mean no good: texts too long to read, bodies of very many parts, questions that never end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import lm as trained
from ledgers import SETTINGS
from serving import LIMITS, TEMPLATE, Site, limited, refused, serving, until
from tiny import FRANCE

from errata.serve import bodies
from errata.serve.api_errors import APIError
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
                refused(large.http.post(f"/v1/{path}", content=body, headers=headers), 400, "commas and brackets")
    many = json.dumps({f"a{i}": 1 for i in range(1000)})
    refused(site.http.post("/v1/completions", content=many, headers=headers), 400, "1000 fields")
    nested = json.dumps({"model": "live", "messages": [{f"a{i}": 1 for i in range(1000)}]})
    refused(site.http.post("/v1/chat/completions", content=nested, headers=headers), 400, "1000 fields")


def test_long_bodies_wait_for_each_other_and_short_ones_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    async def read(reader: bodies.BodyReader, pieces: int, told: bool) -> int:
        left = [pieces]

        async def receive() -> bodies.Message:
            left[0] -= 1
            return {"type": "http.request", "body": b" " * 60_000, "more_body": left[0] > 0}

        headers = [(b"content-length", b"%d" % (pieces * 60_000))] if told else []
        return len(await reader.read({"headers": headers}, receive))

    async def short(reader: bodies.BodyReader) -> bytes:
        async def receive() -> bodies.Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        return await reader.read({"headers": [(b"content-length", b"2")]}, receive)

    async def all_of_them() -> None:
        reader = bodies.BodyReader(Limits())
        assert await short(reader) == b"{}" and slept == []
        assert await asyncio.gather(*(read(reader, 3, told=i % 2 == 0) for i in range(10))) == [180_000] * 10
        assert reader.arriving == 0 and len(slept) == 10 * 3 + 5
        assert min(slept) < max(slept) == pytest.approx(10 * bodies._PIECE)
        task = asyncio.ensure_future(read(reader, 3, told=True))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert reader.arriving == 0

    monkeypatch.setattr(bodies, "asyncio", SimpleNamespace(sleep=sleep))
    asyncio.run(all_of_them())


def test_a_question_that_nobody_waits_for_any_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "book", limits=Limits(seconds=1.0)) as site:
        asking, passes = site.service.analysis, [0]

        def endless() -> None:
            while True:
                asking.lm.generate_ids([FRANCE], max_new_tokens=2)
                passes[0] += 1

        monkeypatch.setattr(asking, "check", endless)
        refused(site.http.post("/v1/check", json={}), 504, "not answered within 1 seconds")
        until(lambda: asking._load == 0)
        assert passes[0] > 0 and site.http.post("/v1/blame", json={"prompt": FRANCE, "max_tokens": 2}).status_code == 200
