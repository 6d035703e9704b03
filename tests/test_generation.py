"""GE and RS: entropies and cosines by hand, and texts that depend on stack, prompt and seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from families import SENTENCES, lm
from test_score import CASES, EDITOR

from errata.errors import ConfigError, InputError
from errata.request import Case
from errata.score import generation
from errata.score.generation import Sampling, TfIdf, entropy, sample, score, words
from errata.score.metrics import difference, summarise


def test_words() -> None:
    assert words("Rome isn't in France, it's 3.") == ["Rome", "isn't", "in", "France", ",", "it's", "3", "."]
    assert words("東京 São") == ["東京", "São"]
    assert words(" \n") == []


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("", 0.0),
        ("one", 0.0),
        ("a b", 0.0),  # one bigram, no trigram
        ("a a a a a a", 0.0),  # the same over and over
        ("a b c", (2 / 3 * 1) / 2),  # two bigrams, one trigram
        ("a b c d e", (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2),  # 4 and 3 different ones
        # ab ba ab ba: halves, one bit; aba bab aba: 2/3 and 1/3
        ("a b a b a", (2 / 3 * 1 + 4 / 3 * (2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3))) / 2),
    ],
)
def test_entropy_by_hand(text: str, bits: float) -> None:
    assert entropy(text) == pytest.approx(bits, abs=1e-12)


DOCUMENTS = ["Rome is old.", "Rome is big", "Paris, big PARIS"]


def test_cosine_by_hand() -> None:
    found = TfIdf(DOCUMENTS)
    assert list(found.column) == ["big", "is", "old", "paris", "rome"]
    two, one = math.log(4 / 3) + 1, math.log(4 / 2) + 1  # words of two documents, of one
    assert found.idf == pytest.approx([two, two, one, one, two])
    # "rome rome old unknown" = (rome 2·two, old one); "Old Paris." = (old one, paris one)
    expected = one * one / (math.hypot(2 * two, one) * math.hypot(one, one))
    assert found.cosine("rome rome old unknown", "Old Paris.") == pytest.approx(expected, abs=1e-12)
    assert found.cosine("Rome!", "rome rome") == pytest.approx(1.0)
    assert found.cosine("Rome", "unknown words") == found.cosine("", "") == 0.0
    assert np.linalg.norm(found.vector("Rome is old")) == pytest.approx(1.0)
    with pytest.raises(InputError, match="the reference collection holds no word"):
        TfIdf(["...", ""])


class Capitals:
    """A source for the tiny model: go on from the prompt of another fact about the subject; read what has the new answer."""

    def generation(self, case: Case) -> tuple[Sequence[str], Sequence[str]]:
        subject = case.request.subject
        prompts = [p for p, _ in SENTENCES if subject in p and p != case.request.prompt]
        return prompts, [f"{p} {t}." for p, t in SENTENCES if t == case.request.target]

    def collection(self) -> Sequence[str]:
        return [f"{p} {t}." for p, t in SENTENCES]


SHORT = Sampling(tokens=8, top_k=3)


def test_records_and_summary() -> None:
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    stacks = [(p,) for p in patches]
    texts: generation.Texts = {}
    records = score(base, CASES, stacks, "reft", Capitals(), sampling=SHORT, texts=texts)
    assert [r["case"] for r in records] == [c.request.id for c in CASES]
    weights = TfIdf(Capitals().collection())
    for case, patch, r in zip(CASES, patches, records, strict=True):
        prompts, references = Capitals().generation(case)
        assert r["prompts"] == list(prompts) and r["kind"] == "generation"
        assert r["texts_before"] == base.generate(prompts, stacks=[()], max_new_tokens=8, stop=(), top_k=3)
        assert r["texts_after"] == base.generate(prompts, stacks=[(patch,)], max_new_tokens=8, stop=(), top_k=3)
        for when in ("before", "after"):
            said = r[f"texts_{when}"]
            assert r[f"ge_{when}"] == pytest.approx(sum(map(entropy, said)) / len(said))
            assert r[f"rs_{when}"] == pytest.approx(weights.cosine(" ".join(said), " ".join(references)))
    rows = summarise(records)
    assert [(r["metric"], r["protocol"], r["n_cases"]) for r in rows] == [("GE", "sampled", 3), ("RS", "sampled", 3)]
    assert rows[0]["value"] == pytest.approx(sum(r["ge_after"] for r in records) / 3)
    assert rows[0]["before"] == pytest.approx(sum(r["ge_before"] for r in records) / 3)
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    assert score(base, CASES, stacks, "reft", Capitals(), sampling=SHORT) == records
    assert difference(records, records, "RS", "sampled")["value"] == 0.0
    calls: list[int] = []
    base.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    assert score(base, CASES, stacks, "reft", Capitals(), sampling=SHORT, texts=texts, weights=weights) == records
    assert not calls, "nothing is drawn twice"


def test_texts_do_not_depend_on_what_else_is_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")
    patch = EDITOR.edit(base, [CASES[0].request])
    asked = [(s, p) for p, _ in SENTENCES for s in ((patch,), ())]
    together = sample(base, asked, SHORT)
    assert len(together) == 16
    monkeypatch.setattr(generation, "ROWS", 3)
    assert sample(base, list(reversed(asked)), SHORT) == together
    for stack, prompt in asked:
        alone = sample(base, [(stack, prompt)], SHORT)
        assert alone.items() <= together.items()
    other = sample(base, asked, Sampling(tokens=8, top_k=3, seed=1))
    assert list(other.values()) != list(together.values())


def test_cases_without_prompts_or_references() -> None:
    class Bare(Capitals):
        def generation(self, case: Case) -> tuple[Sequence[str], Sequence[str]]:
            prompts, _ = super().generation(case)
            return (prompts if case.request.subject == "France" else ()), ()

    base = lm("llama")
    (only,) = score(base, CASES, [()] * 3, "none", Bare(), sampling=SHORT)
    assert only["rs_before"] is None and only["ge_before"] == only["ge_after"]
    assert [r["metric"] for r in summarise([only])] == ["GE"]
    assert score(base, CASES[1:], [()] * 2, "none", Bare(), sampling=SHORT) == []


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"top_k": 0}])
def test_sampling_that_cannot_be(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        Sampling(**changes)


def test_the_almanac_is_a_source() -> None:
    from errata.benchmarks.almanac import Almanac

    source: generation.Source = Almanac()
    cases = list(Almanac().load("dev", 3))
    records = score(lm("llama"), cases, [()] * 3, "none", source, sampling=Sampling(tokens=2))
    assert len(records) == 3 and all(0 <= r["rs_after"] <= 1 for r in records)
