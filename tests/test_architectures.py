"""The table of architectures: it holds what the script finds, every cell is right or one clear refusal, and the script can find faults."""

from __future__ import annotations

import json
from pathlib import Path

import docs_families
import pytest
import verify_architectures as matrix
from architectures import EVERY

from errata.core.model import LM

DATA = matrix.read()
SMALL = ["starcoder2", "qwen3_moe", "opt"]


def test_sixty_architectures_and_no_fault() -> None:
    assert list(DATA["architectures"]) == list(EVERY) and len(EVERY) >= 60
    for name, row in DATA["architectures"].items():
        assert tuple(row) == matrix.CELLS, name
        for key, found in row.items():
            assert set(found) <= {"refused"}, (name, key, found)
            assert "\n" not in found.get("refused", "")


def test_whoever_has_an_mlp_is_edited_by_every_method() -> None:
    """Refusals are for what is not there: mixtures, running states, blocks with several states a token, a model that reads padding."""
    odd = {name for name, row in DATA["architectures"].items() if any(row.values())}
    assert odd.isdisjoint({"gpt2", "opt", "falcon", "deepseek_v3", "llama4_text", "jamba", "bamba", "lfm2", "recurrent_gemma"})
    for name, row in DATA["architectures"].items():
        if name not in ("rwkv", "paligemma"):  # one reads padding, one reads ahead
            assert not any(row[cell] for cell in ("inspect", "padding", "cache", "lora")), name
            assert not row["baft"] or name == "gemma3n_text", name


@pytest.mark.parametrize("name", SMALL)
def test_the_file_says_what_the_script_finds(name: str) -> None:
    assert matrix.verify(name) == DATA["architectures"][name]


def test_a_fault_is_found_and_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LM, "detach", lambda self, *ids: None)
    out = tmp_path / "out.json"
    assert matrix.main(["--only", "gpt2", "--out", str(out)]) == 1
    row = json.loads(out.read_text(encoding="utf-8"))["architectures"]["gpt2"]
    assert row["rome"] == {"fault": "undo: the logits are not as before"} and row["cache"] == {}
    monkeypatch.setattr(LM, "generate_ids", lambda self, prompts, **how: 1 / 0)
    assert matrix.verify("gpt2", ())["cache"] == {"fault": "ZeroDivisionError: division by zero"}


def test_the_page_shows_refusals_by_number_and_faults() -> None:
    rows = {"a": {cell: {} for cell in matrix.CELLS}, "b": {cell: {} for cell in matrix.CELLS}}
    rows["a"] |= {"rome": {"refused": "a: block 0 has no mlp_down: why"}, "grace": {"refused": "grace: a: block 0 has no mlp_down: why"}}
    rows["b"] |= {"wise": {"fault": "KeyError: 1"}}
    data = {"torch": "1", "transformers": "2", "architectures": rows}
    table = docs_families.architectures(data).splitlines()
    assert table[2] == "| `a` | right | right | right | right | refused (1) | right | right | refused (1) | right |"
    assert table[3].endswith("| **fault** |")
    assert docs_families.refusals(data).splitlines()[2:] == ["1. block 0 has no mlp_down: why", "- `b`, wise: **fault**. KeyError: 1"]
