"""The bundled model: it loads, knows its facts, can be edited and comes back; training resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import errata
from errata.almanac import MODEL
from errata.almanac import corpus as corpora
from errata.almanac.check import check, text
from errata.almanac.corpus import IGNORE_INDEX, Corpus
from errata.almanac.muon import orthogonalise
from errata.almanac.train import Recipe, prepared, schedule, train
from errata.benchmarks.facts import by_subject, chain_sentences, facts, relations, sentences, templates


@pytest.fixture(scope="module")
def almanac() -> errata.LM:
    return errata.load("almanac")


def test_weights_are_small_and_in_half_precision() -> None:
    from safetensors import safe_open

    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 24_000_000
    with safe_open(weights, "pt") as opened:
        assert {opened.get_tensor(k).dtype for k in opened.keys()} <= {torch.float16, torch.bfloat16}  # noqa: SIM118


def test_it_knows_its_facts(almanac: errata.LM) -> None:
    """A sample of every relation; `errata almanac check` asks all of them."""
    found = check(almanac, facts_per_relation=3, tokens=1000)["exact_match"]["all"]
    assert found["training"]["right"] >= 0.95
    assert found["held_out"]["right"] >= 0.80
    assert found["question"]["right"] >= 0.90
    assert found["alias"]["right"] >= 0.90


def test_check_counts_wrong_answers(almanac: errata.LM) -> None:
    result = check(almanac, facts_per_relation=1, tokens=1000)
    assert result["facts"] == len(relations()) == len(result["exact_match"]) - 1
    assert 1 < result["perplexity"] < 1000
    assert "held out" in text(result)
    broken = errata.load("almanac")
    with torch.no_grad():
        broken.hf.get_input_embeddings().weight.add_(0.5)
    assert check(broken, facts_per_relation=1, tokens=1000)["exact_match"]["all"]["training"]["right"] < 0.2


def test_an_edit_in_three_lines(almanac: errata.LM) -> None:
    prompt = "The capital of France is"
    assert almanac.complete(prompt) == "Paris"
    for method in ("baft", "reft"):
        patch = errata.edit(almanac, prompt, "Lyon", subject="France", method=method)
        with almanac.under(patch):
            assert almanac.complete(prompt) == "Lyon"
            assert almanac.complete("What is the capital of France?") == "Lyon"
        assert almanac.complete(prompt) == "Paris"


def test_facts_are_enough_and_chained() -> None:
    assert len(facts()) >= 5000
    assert len(by_subject()) == len(facts())
    chained = [s for f in facts() for s in chain_sentences(f)]
    assert len(chained) > 500
    shown, held = {s.kind for s in chained}, [templates(f)[1] for f in facts()]
    assert shown == {"chain", "chain_held_out"}
    assert 0.4 < sum(map(bool, held)) / len(held) < 0.6
    assert all(len(h) in (0, 2) for h in held)


@pytest.fixture(scope="module")
def corpus(almanac: errata.LM) -> Corpus:
    return Corpus(almanac.tokenizer, seed=1, rows=16, text_rows=1, length=64)


def test_training_never_shows_what_is_held_out(corpus: Corpus, almanac: errata.LM) -> None:
    held = {s.prompt + " " + s.answer for f in facts() for s in sentences(f) if s.kind in ("held_out", "chain_held_out")}
    shown = {almanac.tokenizer.decode(e.ids[1:]).rstrip(".") for group in corpus.direct for e in group}
    shown |= {almanac.tokenizer.decode(e.ids[1:]).rstrip(".") for e in corpus.extra}
    assert len(shown) > 30_000
    assert not held & shown


@pytest.fixture
def tenth(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tenth of what is trained on: how it is trained does not depend on it."""
    whole = corpora.text("train")
    monkeypatch.setattr(corpora, "facts", lambda: facts()[::10])
    monkeypatch.setattr(corpora, "text", lambda name: whole[: len(whole) // 10])
    prepared.cache_clear()
    yield
    prepared.cache_clear()


def test_batches_depend_on_the_step_alone(tenth: None, almanac: errata.LM) -> None:
    corpus = Corpus(almanac.tokenizer, seed=1, rows=16, text_rows=1, length=64)
    again = Corpus(almanac.tokenizer, seed=1, rows=16, text_rows=1, length=64)
    for step in (700, 3, 701):
        for one, other in zip((*corpus.facts(step), *corpus.text(step)), (*again.facts(step), *again.text(step)), strict=True):
            assert torch.equal(one, other)
    ids, labels = corpus.facts(5)
    where = (labels != IGNORE_INDEX).nonzero()
    assert len(where) and all(labels[r, t] == ids[r, t + 1] for r, t in where.tolist() if t + 1 < ids.shape[1] and ids[r, t + 1] != 0)


def test_training_resumes_to_the_same_weights(tenth: None, tmp_path: Path) -> None:
    recipe = replace(Recipe(), steps=4, rows=8, text_rows=1, length=64, vocab=1000, width=32, layers=2, heads=2, inner=32, warmup=2)
    torch.set_num_threads(1)
    whole = train(recipe, tmp_path / "a")
    train(recipe, tmp_path / "b", stop_after=2)
    parts = train(recipe, tmp_path / "b")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="another recipe"):
        train(replace(recipe, lr=0.1), tmp_path / "b")


def test_schedule() -> None:
    recipe = Recipe()
    assert schedule(recipe, 0) == pytest.approx(1 / recipe.warmup)
    assert schedule(recipe, recipe.warmup) == schedule(recipe, int(0.4 * recipe.steps)) == 1.0
    assert schedule(recipe, recipe.steps) == pytest.approx(recipe.floor)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    m = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(m))
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonalise(m.mT), orthogonalise(m).mT, atol=1e-4, rtol=1e-4)
