"""A text that is longer than the model's window is refused where it is encoded, wherever it comes from, and never cut."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm
from pairwise import some

from errata import registry
from errata.cli import main
from errata.core.model import LM
from errata.core.window import fits
from errata.errors import ErrataError, InputError
from errata.request import Case, EditRequest, Probe
from errata.score.wanted import ask
from errata.score.windows import editable, fitting, say

FRANCE = EditRequest("The capital of France is", "Rome", "France")
LONG = "It is a long story that somebody once told in Rome. " * 40
FAMILIES = ("llama", "gpt2", "gemma3_text")
METHODS = [name for name in registry.names("method") if name != "none"]


def window(family: str, size: int = 64) -> LM:
    """A tiny model that takes ``size`` tokens: of positions that are learnt, there are no more."""
    found = lm(family)
    found.config.max_position_embeddings = min(size, found.config.max_position_embeddings)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_does_not_fit_is_refused_wherever_it_is_asked(family: str) -> None:
    model = window(family)
    for call in (
        lambda: model.complete(LONG),
        lambda: model.encode([LONG], ["Rome"]),
        lambda: ask(model, [(LONG, (), "Rome")]),
        lambda: model.logits(model.batch([replace(model.encode(["Rome"])[0], ids=(5,) * 65)])),
    ):
        with pytest.raises(InputError, match=r"this model takes 64|window of 64"):
            call()


# of each method one text that all read and one that not all do
WHERE = {"prompt": "own", "target": "own", "paraphrases": "beside", "unrelated": "beside", "contrast": "beside"}


@pytest.mark.parametrize(("method", "where", "kind"), some(((m, w, kind) for m in METHODS for w, kind in WHERE.items()), [(0, 2), (1,)]))
def test_no_method_trains_on_a_part_that_does_not_fit(method: str, where: str, kind: str) -> None:
    """Every text of a request that a method reads; one that it does not read need not fit."""
    model = window("llama")
    given = {
        "prompt": {"prompt": LONG + FRANCE.prompt},
        "target": {"target": LONG},
        "paraphrases": {"paraphrases": (LONG + "France",)},
        "unrelated": {"unrelated": ((LONG, "Rome"),)},
        "contrast": {"contrast": ((LONG, "Rome"),)},
    }[where]
    made_by = registry.get("method", method)
    few = {name: 2 for name in ("steps", "v_steps") if name in made_by.__dataclass_fields__}
    editor = made_by.for_model(model, **few)
    read = kind == "own"
    seen: list[int] = []
    inner = model.hf.forward

    def listening(*args: object, **more: object) -> object:
        ids = more.get("input_ids", args[0] if args else None)
        mask = more.get("attention_mask")
        seen.append(int(mask.sum(1).max()) if isinstance(mask, torch.Tensor) else ids.shape[1])  # type: ignore[union-attr]
        return inner(*args, **more)

    model.hf.forward = listening
    try:
        patch = editor.edit(model, [replace(FRANCE, **given)])
    except ErrataError as error:
        assert "64" in str(error) or "context" in str(error), error
    else:
        assert not (read and few), f"{method} trained on a {where} that does not fit"
        assert patch.ops
    assert max(seen, default=0) <= 64


def test_a_text_that_cannot_fit_is_not_even_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = window("llama")

    def never(*args: object, **more: object) -> object:
        raise AssertionError("tokenised")

    monkeypatch.setattr(type(model.tokenizer), "__call__", never)
    began = time.process_time()
    with pytest.raises(InputError, match="characters, far more than this model's 64 tokens"):
        model.complete("a b " * 2_500_000)
    assert time.process_time() - began < 5


def test_an_answer_ends_where_the_window_does_and_the_others_go_on() -> None:
    model = window("llama", 16)
    prompt = "The capital of France is"
    room = 16 - len(model.encode([prompt])[0].ids)
    long, short = "The capital of France is the capital of", "Rome"
    ids = model.generate_ids([prompt], max_new_tokens=99, stop=())[0]
    assert len(ids) <= room
    both = model.generate_ids([long, short], max_new_tokens=99, stop=())
    alone = [model.generate_ids([p], max_new_tokens=99, stop=())[0] for p in (long, short)]
    assert both == alone and len(both[1]) > len(both[0])


def test_what_fits_exactly_is_taken() -> None:
    model = window("llama", 16)
    row = model.encode(["The capital of France is"])[0]
    model.config.max_position_embeddings = len(row.ids)
    assert fits(model, "The capital of France is") and not fits(model, "The capital of France is", 1)
    assert model.encode(["The capital of France is"])[0] == row
    with pytest.raises(InputError, match="this model takes"):
        model.encode(["The capital of France is"], ["Rome"])
    with pytest.raises(InputError, match="this model takes"):
        registry.get("method", "rome").for_model(model, v_steps=2).edit(model, [EditRequest("The capital of France is", "Rome", "France")])


def test_what_a_benchmark_asks_and_no_window_holds_is_left_out_and_counted() -> None:
    """A run is not lost for a probe; a case whose own edit does not fit makes none."""
    model = window("llama")
    short, long = Probe("rephrase", "France has the capital", "Rome"), Probe("rephrase", LONG, "Rome")
    own, bare = Probe("rewrite", FRANCE.prompt, "Rome"), Probe("neighbour", LONG)
    cases = [Case(FRANCE, (own, short, long, bare)), Case(replace(FRANCE, prompt=LONG + FRANCE.prompt), ())]
    left_out: Counter[str] = Counter()
    (kept,) = fitting(model, cases, left_out)
    assert list(editable(model, cases, Counter())) == cases[:1]
    assert kept.probes == (own, short) and left_out == {"rephrase probe": 1, "neighbour probe": 1, "case": 1}
    said = "left out 1 case, 1 neighbour probe, 1 rephrase probe: longer than this model's window of 64 tokens"
    assert say(left_out, model.context_length) == said
    with pytest.raises(InputError, match="no case fits: left out 1 case"):
        fitting(model, cases[1:], Counter())


@pytest.mark.parametrize("known", ["true", "false"])
def test_a_run_and_a_score_say_what_they_left_out(known: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case that does not fit, and a probe, among two that do; also where the model is asked first which facts it knows."""
    short = [record(i, land, old, long="") for i, (land, old) in enumerate((("France", "Paris"), ("Spain", "Madrid")))]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record(7, "Italy", "Rome", LONG), {**short[0], "neighborhood_prompts": [LONG]}, short[1]]))
    config = f"model: {tiny}\nmethods: [none]\nbenchmark: {{name: counterfact, data: {data}, n: 3}}\nscenario: single\nthreads: 1\n"
    (tmp_path / "run.yaml").write_text(config + f"score: {{known: {known}, watch: 0, latency: false}}\n")
    said = "eft out 1 case, 1 neighbour probe: longer than this model's window of 64 tokens"
    assert main(["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0 and said in capsys.readouterr().out
    (summary,) = (json.loads(path.read_text()) for path in (tmp_path / "run").glob("cells/*/summary.json"))
    assert summary["left_out"] == {"case": 1, "neighbour probe": 1} and summary["window"] == 64
    line = ["score", tiny, "--benchmark", "counterfact", "--data", str(data), "--n", "3", "--method", "none", "--watch", "0"]
    assert main([*line, "--known" if known == "true" else "--no-known"]) == 0 and said in capsys.readouterr().out


def record(number: int, land: str, old: str, long: str) -> dict[str, Any]:
    """One of CounterFact's original form."""
    rewrite = {"prompt": f"{long}The capital of {{}} is", "relation_id": "P36", "subject": land}
    rewrite |= {"target_new": {"str": "Tokyo", "id": "Q1"}, "target_true": {"str": old, "id": "Q2"}}
    lists = {name: [] for name in ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")}
    return {"case_id": number, "pararel_idx": number, "requested_rewrite": rewrite, **lists}
