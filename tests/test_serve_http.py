"""What the server says to requests that are wrong, too large, too many or not allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import json
import time
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import TOKEN, Site, limited, refused
from tiny import FRANCE

from errata import registry
from errata.serve import middleware
from errata.serve.jobs import Job
from errata.serve.routes_edits import FILES

ASK = {"model": "live", "prompt": FRANCE, "temperature": 0}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with limited(tmp_path_factory.mktemp("site")) as out:
        yield out


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "nobody"}, 404, "model", "there is no model 'nobody'"),
        ({"model": "edit:9"}, 404, "model", "there is no edit 9"),
        ({"model": "edits:1,9"}, 404, "model", "there is no edit 9"),
        ({"model": "event:99"}, 404, "model", "there is no event 99"),
        ({"model": "edit:1; drop"}, 404, "model", "base, live, edit:N"),
        ({"model": None}, 400, "model", "model"),
        ({"prompt": ""}, 400, "prompt", "prompt"),
        ({"prompt": "  \n"}, 400, "prompt", "prompt"),
        ({"prompt": []}, 400, "prompt", "prompt"),
        ({"prompt": [1, 2]}, 400, "prompt", "prompt"),
        ({"prompt": "a " * 40}, 400, "prompt", "tokens, this server takes 30"),
        ({"prompt": "The capital of " * 9, "max_tokens": 39}, 400, "prompt", "do not fit the model's 64 positions"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 41}, 400, "max_tokens", "this server gives 40"),
        ({"max_tokens": "5"}, 400, "max_tokens", "integer"),
        ({"max_tokens": True}, 400, "max_tokens", "integer"),
        ({"temperature": -1}, 400, "temperature", "greater"),
        ({"top_p": 0}, 400, "top_p", "greater"),
        ({"n": 7}, 400, "n", "too many"),
        ({"n": 4, "prompt": [FRANCE, FRANCE]}, 400, "n", "too many"),
        ({"stop": ["a"] * 5}, 400, "stop", "stop"),
        ({"stop": ""}, 400, "stop", "stop"),
        ({"logprobs": 6}, 400, "logprobs", "less than or equal to 5"),
        ({"echo": True}, 400, "echo", "not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"tempature": 1}, 400, "tempature", "not a field"),
    ],
)
def test_wrong_questions(site: Site, change: dict[str, Any], status: int, param: str, words: str) -> None:
    error = refused(site.http.post("/v1/completions", json={**ASK, **change}), status, words)
    assert (error["param"] or "").split(".")[0] == param


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "required"),
        (b"[1]", 400, ""),
        (b"null", 400, ""),
        (b'{"model": "live", "prompt": "a", "temperature": NaN}', 400, "NaN is not a JSON value"),
        (b'{"model": "live", "prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"model": "live", "prompt": "\xff"}', 400, "not UTF-8"),
        (b'{"model": "live", "prompt": "half \\ud800 a character"}', 400, "prompt"),
        (b"[" * 9000, 400, "nested"),
        (b'{"model": "live", "max_tokens": ' + b"9" * 5000 + b', "prompt": "a"}', 400, ""),
        (b'{"prompt": "' + b"a" * 21_000 + b'"}', 413, "larger than 20000 bytes"),
    ],
)
def test_wrong_bodies(site: Site, body: bytes, status: int, words: str) -> None:
    refused(site.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), status, words)


@pytest.mark.parametrize("told", [True, False], ids=["with its length", "without"])
def test_who_sends_too_much_is_told_so_even_when_reading_only_after_all_was_sent(site: Site, told: bool) -> None:
    """Bodies larger than the sockets' buffers: to hang up on them would take the answer away before it is read."""
    parts = 200

    def body() -> Iterator[bytes]:
        for _ in range(parts):
            yield b" " * 65_536

    headers = {"Content-Type": "application/json", **({"Content-Length": str(parts * 65_536)} if told else {})}
    for _ in range(3):
        response = site.http.post("/v1/completions", content=body(), headers=headers)
        refused(response, 413, "larger")
        assert response.headers["Connection"] == "close"
    assert site.text(FRANCE) == "Rome"


def test_who_never_ends_is_hung_up_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LINGER", 0.3)
    until = time.monotonic() + 30

    def endless() -> Iterator[bytes]:
        while time.monotonic() < until:
            yield b" " * 65_536

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        refused(site.http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"}), 413, "larger")
    assert time.monotonic() < until - 15


def test_a_form_is_no_json(site: Site) -> None:
    refused(site.http.post("/v1/completions", data={"model": "live"}), 415, "application/json")


def test_another_site_cannot_begin_anything(site: Site) -> None:
    """What a page may send to a foreign server without being asked: no type, or that of a form; a body or none."""
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        headers = {"Sec-Fetch-Site": "cross-site", **({} if kind is None else {"Content-Type": kind})}
        refused(site.http.post("/v1/check", headers=headers), 415, "send Content-Type: application/json")
    assert site.http.post("/v1/check", headers={"Content-Type": "application/json"}).json()["sound"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "give prompt and target"),
        ({"subject": "Germany"}, "does not occur in prompt"),
        ({"requests": []}, "requests"),
        ({"requests": [{"prompt": "a", "target": "b"}]}, "exclude each other"),
        ({"prompt": None, "target": None, "requests": [{"prompt": f"a{i}", "target": "b"} for i in range(4)]}, "exclude each other"),
        ({"method": "beft"}, "no method named"),
        ({"settings": {"rnak": 2}}, "rank"),
        ({"settings": {"lm": 2}}, "no setting 'lm'"),
        ({"settings": {"cls": 2}}, "no setting 'cls'"),
        ({"method": "rep", "subject": "Rome", "settings": {"wrapped": {"lm": 2}}}, "no setting 'lm'"),
        ({"settings": {"rank": "two"}}, "rank"),
        ({"mode": "often"}, "mode"),
        ({"batch_size": 3}, "no meaning"),
        ({"prompt": "a " * 50}, "tokens"),
        ({"unrelated": [["x"]]}, "unrelated"),
        ({"aliases": ["Gaul"]}, "has none"),
        ({"why": "because"}, "not a field"),
    ],
)
def test_wrong_edits(site: Site, change: dict[str, Any], words: str) -> None:
    refused(site.http.post("/v1/edits", json={"prompt": "In Rome people speak", "target": "French", **change}), 400, words)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ike", {"demonstrations": "/etc/shadow"}),
        ("retrieval", {"encoder": "all-MiniLM-L6-v2"}),
        ("rome", {"stats": "hub:wikitext"}),
        ("rep", {"wrapped": {"stats": "/etc/passwd"}}),
        ("rome", {"stats": ["bundled"]}),
    ],
)
def test_settings_that_name_files_or_downloads_need_the_servers_consent(
    site: Site, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    monkeypatch.setattr(site.service.editor, "apply", lambda plan: begun.append(plan) or Job(plan, lambda job: None))
    edit = {"prompt": "In Rome people speak", "target": "French", "subject": "Rome", "method": method}
    error = refused(site.http.post("/v1/edits", json={**edit, "settings": settings}), 403, "--allow-files")
    assert (error["code"], error["param"], begun) == ("files_not_allowed", "settings", [])
    own = {"stats": "almanac"} if method == "rome" else {"wrapped": {"stats": "heldout"}} if method == "rep" else {"encoder": None}
    assert site.http.post("/v1/edits", json={**edit, "settings": own}).status_code == 202
    if isinstance(settings.get("stats"), list):
        return  # of the wrong type, whoever asks
    monkeypatch.setattr(site.service, "options", dataclasses.replace(site.service.options, files=True))
    assert site.http.post("/v1/edits", json={**edit, "settings": settings}).status_code == 202 and len(begun) == 2


def test_every_setting_of_free_text_is_known_to_open_nothing_or_needs_that_consent() -> None:
    """A method with a new one has to be looked at: here, and in `routes_edits.FILES` where it opens a file or downloads."""
    opens_nothing = {"end", "fact", "cue", "shot", "point", "lora_point", "wraps"}
    found = set()
    for method in map(functools.partial(registry.get, "method"), registry.names("method")):
        kinds = typing.get_type_hints(method)
        found |= {f.name for f in dataclasses.fields(method) if kinds[f.name] is str or str in typing.get_args(kinds[f.name])}
    assert found - opens_nothing - {"wrapped", "surfaces"} == set(FILES)  # these two hold settings, and names of a list


def test_what_nobody_foresaw_has_the_shape_of_any_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.service.analysis, "watch", lambda: 1 / 0)
    for _ in range(5):  # the connection ends with such an answer, and says so: what comes next takes another
        response = site.http.get("/v1/watch")
        error = refused(response, 500, "not foreseen: ZeroDivisionError")
        assert (error["code"], error["type"]) == ("internal", "server_error") and response.headers["connection"] == "close"
        assert site.http.get("/health").status_code == 200


def test_too_many_facts(site: Site) -> None:
    facts = [{"prompt": f"a{i}", "target": "b"} for i in range(4)]
    refused(site.http.post("/v1/edits", json={"requests": facts}), 400, "4 facts are too many")


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ü"])
def test_what_edits_needs_the_token(site: Site, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode("utf-8")}
    bare = httpx.Client(base_url=site.url)
    edit = {"prompt": FRANCE, "target": "Rome", "force": True}
    for response in (
        bare.post("/v1/edits", json=edit, headers=headers),
        bare.delete("/v1/edits/1", headers=headers),
        bare.delete("/v1/jobs/none", headers=headers),
    ):
        refused(response, 401, "token")
        assert response.headers["www-authenticate"] == "Bearer"
    bare.close()
    assert [e["number"] for e in site.http.get("/v1/edits").json()["edits"]] == [1]


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8377", "127.0.0.1.evil.example", "[::2]", ""])
def test_other_names_of_the_server_are_refused(site: Site, name: str) -> None:
    refused(site.http.get("/health", headers={"Host": name}), 403, "not called")
    assert site.http.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_paths_and_methods(site: Site) -> None:
    refused(site.http.get("/v1/nothing"), 404, "/v1/nothing")
    refused(site.http.get("/../../etc/passwd"), 404, "there is no")
    response = site.http.put("/v1/edits", json={})
    refused(response, 405, "PUT")
    assert set(response.headers["allow"].split(", ")) >= {"GET", "POST"}
    refused(site.http.get("/v1/edits/2"), 404, "there is no edit 2")
    refused(site.http.get("/v1/edits/x"), 400, "number")
    refused(site.http.get("/v1/jobs/job-1"), 404, "no job")
    refused(site.http.get("/v1/jobs/job-1/events"), 404, "no job")
    refused(site.http.delete("/v1/edits/7"), 404, "there is no edit 7")


def test_pipelines_of_requests_on_one_connection(site: Site) -> None:
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=30)
    for body in (b"{", json.dumps({**ASK, "stop": "."}).encode(), b"{"):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == (400 if body == b"{" else 200) and response.read()
    connection.close()
