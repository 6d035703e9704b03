"""What stands around a model, or is called of it: an edit acts there, or there is one clear word that it does not."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, lm, tokenizer
from pairwise import some

from errata.core.model import LM
from errata.errors import EditWarning, ModelError
from errata.methods.codebook.grace import GRACE
from errata.methods.in_context.ice import ICE
from errata.methods.locate.rome import ROME
from errata.methods.subspace.baft import BaFT
from errata.methods.wise.wise import WISE
from errata.request import EditRequest

FRANCE, SPAIN = EditRequest("The capital of France is", "Rome", "France"), EditRequest("The capital of Spain is", "Rome", "Spain")
METHODS = {"rome": ROME, "baft": BaFT, "grace": GRACE, "wise": WISE}


@pytest.fixture
def base() -> LM:
    return lm("llama")


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def call(hf: Any, base: LM, prompt: str) -> torch.Tensor:
    batch = base.batch(base.encode([prompt]))
    with torch.no_grad():
        out: torch.Tensor = hf(batch.ids, attention_mask=batch.mask).logits
    return out


# What is attached one after the other: every method in one model that is compiled once, or, slower, each alone, for either fact and both.
TURNS = {
    "all": [["rome"], [], ["wise", "grace", "baft of Spain"]],
    **{name: [[name], [], [f"{name} of Spain"], [name, f"{name} of Spain"], []] for name in METHODS},
}


@pytest.mark.parametrize("turns", [t if t == "all" else pytest.param(t, marks=pytest.mark.slow) for t in TURNS])
@pytest.mark.parametrize("how", ["wrapped", "in place", "before it was loaded"])
def test_a_model_that_was_compiled_and_ran_follows_what_is_attached(how: str, turns: str) -> None:
    plain = shallow()
    hf = copy.deepcopy(plain.hf)
    model: LM | None = None if how == "before it was loaded" else LM(hf, tokenizer(), "llama")
    compiled = hf if how == "in place" else torch.compile(hf, backend="eager")
    if how == "in place":
        hf.compile(backend="eager")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        compiled(ids, attention_mask=torch.ones_like(ids))
    model = model or LM(hf, tokenizer(), "llama")
    bare = call(plain.hf, plain, FRANCE.prompt)
    for number, names in enumerate(TURNS[turns]):
        methods = [(METHODS[name.split()[0]].for_model(plain), SPAIN if "Spain" in name else FRANCE) for name in names]
        plain.detach()
        attached = [method.edit(plain, [request]) for method, request in methods]
        model.detach()
        model.attach(*attached)
        plain.attach(*attached)
        wanted = call(plain.hf, plain, FRANCE.prompt)
        assert names == [] or names[0].endswith("Spain") or not torch.allclose(wanted, bare, atol=1e-3), "there is something to follow"
        torch.testing.assert_close(call(compiled, model, FRANCE.prompt), wanted, atol=1e-4, rtol=1e-4)
        if turns != "all" or number == len(TURNS[turns]) - 1:  # another length is traced anew
            for prompt in (SPAIN.prompt, "Rome is a city in"):
                torch.testing.assert_close(call(compiled, model, prompt), call(plain.hf, plain, prompt), atol=1e-4, rtol=1e-4)


def shallow() -> LM:
    """Of two blocks, which are traced in half the time of four."""
    hf = build("llama", num_hidden_layers=2)
    hf.load_state_dict(lm("llama").hf.state_dict(), strict=False)
    return LM(hf.eval(), tokenizer(), "llama")


def wrappers() -> dict[str, Callable[[Any], Any]]:
    def adapted(hf: Any) -> Any:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own age
            return peft.get_peft_model(hf, peft.LoraConfig(target_modules=["q_proj"]))

    def carrying(hf: Any) -> Any:
        peft = pytest.importorskip("peft")
        hf.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        return hf

    return {
        "a compiled model": lambda hf: torch.compile(hf, backend="eager"),
        "DataParallel around a model": torch.nn.DataParallel,
        "around a model|carries adapters": adapted,
        "adapters, which are no part": carrying,
    }


@pytest.mark.parametrize("said", wrappers())
def test_what_is_around_a_model_or_in_it_is_refused_by_name(said: str) -> None:
    with pytest.raises(ModelError, match=said):
        LM(wrappers()[said](build("llama")), tokenizer())


@pytest.mark.parametrize(
    ("family", "method"), some(itertools.product(["llama", "gpt2", "gpt_neox", "gemma3_text"], ["rome", "baft", "grace"]))
)
def test_the_model_inside_runs_edited_when_it_is_called_by_itself(family: str, method: str) -> None:
    """Also after a call of the whole with another text: nothing is left of that."""
    model = lm(family)
    model.attach(METHODS[method].for_model(model).edit(model, [FRANCE]))
    inner = getattr(model.hf, model.hf.base_model_prefix)
    for prompt in (FRANCE.prompt, "Rome is", SPAIN.prompt):
        batch = model.batch(model.encode([prompt]))
        with torch.no_grad():
            whole = model.hf(batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states[-1]
            model.hf(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), attention_mask=torch.ones(1, 7, dtype=torch.long))
            alone = inner(batch.ids, attention_mask=batch.mask).last_hidden_state
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    assert len(FAMILIES) > 4


def test_a_call_that_ends_in_an_error_leaves_the_next_one_alone(base: LM) -> None:
    base.attach(BaFT.for_model(base).edit(base, [FRANCE]))
    want = call(base.hf, base, FRANCE.prompt)
    with pytest.raises(Exception):  # noqa: B017 - whatever the model says to a text that is none
        base.hf(torch.tensor([[10**6]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    assert torch.equal(call(base.hf, base, FRANCE.prompt), want)


def test_text_in_front_needs_the_whole_model(base: LM) -> None:
    base.attach(ICE.for_model(base).edit(base, [FRANCE]))
    with pytest.raises(ModelError, match="needs the whole model"):
        base.hf.model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3, dtype=torch.long))


def test_arguments_by_place_are_understood_as_by_name(base: LM) -> None:
    base.attach(GRACE.for_model(base).edit(base, [FRANCE]))
    rows = base.encode([FRANCE.prompt, "Rome is a city in the land of"])
    width = max(len(r.ids) for r in rows)
    ids = torch.tensor([[*r.ids, *[0] * (width - len(r.ids))] for r in rows])
    mask = torch.tensor([[*[1] * len(r.ids), *[0] * (width - len(r.ids))] for r in rows])
    with torch.no_grad():
        assert torch.equal(base.hf(ids, mask).logits, base.hf(input_ids=ids, attention_mask=mask).logits)
    at = len(rows[0].ids) - 1
    assert torch.allclose(base.hf(ids, mask).logits[0, at], base.logits(base.batch(rows[:1]))[0, -1], atol=1e-4)


def test_saving_the_model_itself_says_that_it_saves_the_base(base: LM, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        base.hf.save_pretrained(tmp_path / "bare")
    base.attach(ROME.for_model(base).edit(base, [FRANCE]))
    with pytest.warns(EditWarning, match=r"saves the base.*errata\.export\.bake"):
        base.hf.save_pretrained(tmp_path / "patched")
    base.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        base.hf.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bare", "patched", "after")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(("method", "mode"), some(itertools.product(METHODS, ["no_grad", "inference_mode"])))
def test_an_edit_can_be_made_where_gradients_are_off(method: str, mode: str, base: LM) -> None:
    want = METHODS[method].for_model(base).edit(base, [FRANCE])
    with getattr(torch, mode)():
        assert METHODS[method].for_model(base).edit(base, [FRANCE]).id == want.id
    assert threading.active_count() < 50
