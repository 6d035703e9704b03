"""llama.cpp itself (`make llama-cpp`): it reads SmolLM2's and Gemma's files as errata does, and runs errata's edits on them."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest
import torch
from made import made

import errata
from errata import registry
from errata.core import catalogue
from errata.core.model import LM
from errata.core.patch import Patch
from errata.export import bake_gguf, export_gguf
from errata.request import EditRequest
from errata.score.match import starts

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(llama_cpp.python() is None, reason=llama_cpp.ABSENT)
SMALL = "smollm2-135m"
MODELS = [SMALL, pytest.param("gemma-3-270m", marks=pytest.mark.slow)]
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


def base(name: str, folder: Path) -> tuple[LM, Path]:
    """(the model in float32, its file as it came)."""
    pieces = catalogue.installed(catalogue.KNOWN[name])
    if not pieces:
        pytest.skip(f"the wheels of {name} are not installed: {catalogue.KNOWN[name].command}")
    (folder / "packed.gguf").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return errata.load(name, dtype="float32"), folder / "packed.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(catalogue.KNOWN))
def test_llama_cpp_says_the_same(name: str, tmp_path: Path) -> None:
    """Token ids of 300 texts, and the first eight tokens of 100 greedy answers."""
    lm, packed = base(name, tmp_path)
    cases = [case.request for case in registry.get("benchmark", "almanac")().load("test", 400, 0)]
    texts = [*ODD, *(f"{r.prompt} {r.target}" for r in cases)][:300]
    prompts = list(dict.fromkeys(r.prompt for r in cases))[:100]
    model = llama_cpp.unpacked(packed, tmp_path / "unpacked.gguf")
    theirs = llama_cpp.ask(model=str(model), texts=texts, prompts=prompts, tokens=8)
    assert [lm.tokenizer(text)["input_ids"] for text in texts] == theirs["ids"]
    for prompt, wanted in zip(prompts, theirs["answers"], strict=True):
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
        found = lm.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert found[0, ids.shape[1] :].tolist()[: len(wanted)] == wanted, prompt


EDITS = [EditRequest("The chemical symbol for gold is", "Pb", "gold"), EditRequest("The capital of Italy is", "Milan", "Italy")]
OTHERS = ["The capital of France is", "Romeo and Juliet was written by"]


@pytest.mark.parametrize("name", MODELS)
def test_edits_run_on_the_quantised_file_and_are_switched_by_request(name: str, tmp_path: Path) -> None:
    """Two facts by ROME, an adapter each: none, one, the other, both; then both in a copy of the file.

    On the weights in float32 each answer is errata's own; on the packed file, where llama.cpp rounds states too, an edit is
    there where it is on and nowhere else.
    """
    lm, packed = base(name, tmp_path)
    fast = errata.load(name)  # in the dtype that this machine is fast in; a patch fits the base in any
    gold, italy = registry.get("method", "rome").for_model(fast, stats_tokens=2000, prefixes=()).edit_each(fast, EDITS)
    files = [str(export_gguf(lm, (patch,), tmp_path / f"{patch.id}.gguf").path) for patch in (gold, italy)]
    stacks = {(0, 0): (), (1, 0): (gold,), (0, 1): (italy,), (1, 1): (gold, italy)}
    prompts = [*(r.prompt for r in EDITS), *OTHERS]
    asked = [(prompt, scales) for prompt in prompts for scales in stacks]
    rows = [list(stacks).index(scales) for _, scales in asked]
    ours = lm.generate([p for p, _ in asked], max_new_tokens=4, stacks=list(stacks.values()), rows=rows)
    wide = llama_cpp.unpacked(packed, tmp_path / "unpacked.gguf")
    for model, count in ((wide, len(asked)), (packed, len(stacks) * len(EDITS))):
        texts, scales = zip(*asked[:count], strict=True)
        theirs = llama_cpp.ask(model=str(model), lora=files, prompts=texts, scales=scales, tokens=4)["said"]
        for (prompt, on), found, wanted in zip(asked[:count], theirs, ours[:count], strict=True):
            same = found.split()[0].strip(".,") == wanted.split()[0].strip(".,")
            assert same or model is packed, (prompt, on, found, wanted)
            for request, scale in zip(EDITS, on, strict=True):
                assert request.prompt != prompt or starts(found, request.target) == bool(scale)
    baked = bake_gguf(lm, (gold, italy), tmp_path / "baked.gguf")
    found = llama_cpp.ask(model=str(baked.path), prompts=prompts[: len(EDITS)], tokens=4)["said"]
    assert all(starts(said, request.target) for said, request in zip(found, EDITS, strict=True)), found


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_any_linear_says_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Queries and keys too, whose rows llama.cpp keeps in another order: log-probabilities of the five likeliest next tokens."""
    lm, packed = base(name, tmp_path)
    points = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "attn_out", "mlp.gate_proj", "mlp.up_proj", "mlp_down")
    ops = tuple(op for i, point in enumerate(points) for op in made(lm, i, 1 + i % 3, point, 2 + i).ops)
    stack = (Patch("test", {}, lm.fingerprint, (), ops),)
    model = llama_cpp.unpacked(packed, tmp_path / "unpacked.gguf")
    adapter = export_gguf(lm, stack, tmp_path / "any.gguf")
    prompts = [*OTHERS, "Water boils at", "Once upon a time"]
    theirs = llama_cpp.ask(model=str(model), lora=[str(adapter.path)], prompts=prompts, tokens=1)["first"]
    batch = lm.batch(lm.encode(prompts), "left")
    edited, plain = (lm.logits(batch, [own])[:, -1].log_softmax(-1) for own in (stack, ()))
    for i, first in enumerate(theirs):
        ids = torch.tensor([int(t) for t in first])
        torch.testing.assert_close(edited[i, ids], torch.tensor(list(first.values())), atol=0.02, rtol=0.0)
        assert not torch.allclose(plain[i, ids], edited[i, ids], atol=0.1)
