"""OpenAI's own client, unchanged, against a running server; and the examples of docs/serving.md."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import Site, serving

from errata import registry
from errata.request import EditRequest

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site") / "book", template=True) as out:
        assert out.edit(FRANCE, "Rome", subject="France")["status"] == "done"
        yield out


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as out:
        yield out


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["base", "live", "edit:1"]
    assert client.models.retrieve("edits:1").owned_by == "errata"
    with pytest.raises(openai.NotFoundError, match="there is no edit 4") as error:
        client.models.retrieve("edit:4")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_completions(client: openai.OpenAI) -> None:
    for model, wanted in (("base", " Paris"), ("live", " Rome"), ("edit:1", " Rome")):
        found = client.completions.create(model=model, prompt=[FRANCE, JAPAN], temperature=0, max_tokens=8, stop=[".", "\n"], logprobs=2)
        assert [c.text for c in found.choices] == [wanted, " Tokyo"] and [c.finish_reason for c in found.choices] == ["stop"] * 2
        assert found.usage is not None and found.usage.completion_tokens >= 8 and found.usage.prompt_tokens == 12
        said = found.choices[1].logprobs
        assert said is not None and "".join(said.tokens or []) == " Tokyo"
        assert said.text_offset == [len("".join((said.tokens or [])[:i])) for i in range(len(said.tokens or []))]
        assert all(
            len(top) == 2 and max(top.values()) == own for top, own in zip(said.top_logprobs or [], said.token_logprobs or [], strict=True)
        )
    drawn = client.completions.create(model="live", prompt=JAPAN, temperature=2, n=4, seed=1, max_tokens=6)
    again = client.completions.create(model="live", prompt=JAPAN, temperature=2, n=4, seed=1, max_tokens=6)
    assert [c.text for c in drawn.choices] == [c.text for c in again.choices] and len({c.text for c in drawn.choices}) > 1
    assert client.completions.create(model="live", prompt=JAPAN + " ", temperature=0, max_tokens=8, stop=".").choices[0].text == "Tokyo"


def test_streams(client: openai.OpenAI) -> None:
    how = {"model": "live", "prompt": [JAPAN, FRANCE], "temperature": 0, "max_tokens": 8, "stop": "."}
    chunks = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices and c.choices[0].index == i) for i in range(2)]
    assert texts == [" Tokyo", " Rome"] and chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 12
    assert len(chunks) > 5 and sorted(c.choices[0].index for c in chunks[:-1] if c.choices[0].finish_reason == "stop") == [0, 1]


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "The capital"}, {"role": "user", "content": [{"type": "text", "text": "of France is"}]}]
    how = {"model": "live", "messages": messages, "temperature": 0, "stop": "."}
    found = client.chat.completions.create(**how, max_completion_tokens=8, logprobs=True, top_logprobs=3)
    text = found.choices[0].message.content
    assert text and found.choices[0].message.role == "assistant" and found.choices[0].finish_reason in ("stop", "length")
    said = found.choices[0].logprobs
    assert said is not None and said.content and len(said.content[0].top_logprobs) == 3 and said.content[0].bytes
    chunks = list(client.chat.completions.create(**how, max_tokens=8, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and "".join(c.choices[0].delta.content or "" for c in chunks) == text
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.chat.completions.create(**how, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_a_conversation_that_fills_the_window_is_refused(site: Site, client: openai.OpenAI) -> None:
    """Where the request does not say how long an answer may be: what is left of the window, with what the stack may put in front."""
    window = site.service.lm.context_length
    assert window == 64

    def ask(tokens: int, model: str = "base") -> int:
        text = "is" + " is" * (tokens - 1)
        assert len(site.service.lm.tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens
        found = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], temperature=0)
        assert found.usage is not None and found.usage.total_tokens <= window
        return found.usage.completion_tokens

    site.service.models.given["told"] = (registry.get("method", "ice")(budget=24).edit(site.service.lm, [EditRequest(FRANCE, "Rome")]),)
    assert ask(window - 1) == 1 and ask(window - 25, "told") == 1
    for tokens, model in ((window, "base"), (window + 200, "base"), (window - 24, "told")):
        with pytest.raises(openai.BadRequestError, match="shorten it") as error:
            ask(tokens, model)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "book") as site,
        openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="no chat template; ask through /v1/completions"),
    ):
        client.chat.completions.create(model="live", messages=[{"role": "user", "content": FRANCE}])


def test_many_at_once_and_each_under_its_own(site: Site) -> None:
    async def ask() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="any") as client:

            async def one(model: str) -> tuple[str, str]:
                found = await client.completions.create(model=model, prompt=FRANCE, temperature=0, max_tokens=8, stop=".")
                return model, found.choices[0].text.strip()

            return await asyncio.gather(*(one(("base", "live")[i % 2]) for i in range(24)))

    assert set(asyncio.run(ask())) == {("base", "Paris"), ("live", "Rome")}


def test_a_client_that_goes_away_takes_its_rows_along(site: Site) -> None:
    body = {"model": "base", "prompt": FRANCE, "temperature": 2, "max_tokens": 55, "n": 16}
    for stream in (True, False):
        try:
            with site.http.stream("POST", "/v1/completions", json={**body, "stream": stream}, timeout=None if stream else 0.02) as response:
                next(response.iter_lines())
        except Exception as error:
            assert "timed out" in str(error)
    assert site.text(FRANCE) == "Rome"
    ended = site.service.metrics.registry.get_sample_value("errata_answers_total")
    tokens = site.service.metrics.registry.get_sample_value("errata_tokens_total")
    assert site.service.engine.num_unfinished == 0 and ended is not None and tokens is not None


def test_the_examples_of_the_page(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example.replace("http://127.0.0.1:8377", site.url), "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out.startswith("base  Paris\nlive  Rome\n Tokyo")
    for command in re.findall(r"curl (http://127[^\n]*completions[^\n]*\\\n[^\n]*)", PAGE):
        (body,) = re.findall(r"-d '(.*?)'", command)
        assert site.http.post("/v1/completions", json=json.loads(body)).json()["choices"][0]["text"] == " Rome"
