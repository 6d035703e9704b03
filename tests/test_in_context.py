"""Retrieval, ICE, IKE and `none`: what is put in front of which prompt, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from families import SENTENCES, each_family, lm, tokenizer
from test_context import PARIS, PLAIN, PROMPTS, ROME, alone, base, close, front, ices

import errata
from errata import registry
from errata.core.context import nearest
from errata.core.embed import _encoder
from errata.core.forward import hooks_disabled
from errata.core.model import LM
from errata.core.patch import PROMPT, Op, Patch, Site
from errata.core.tokens import pieces
from errata.core.weights import merge
from errata.errors import ConfigError, InputError, ModelError, PatchError
from errata.export.changes import weight_deltas
from errata.methods.in_context.demonstrations import requests_of
from errata.methods.in_context.ice import ICE
from errata.methods.in_context.ike import IKE
from errata.methods.in_context.retrieval import Retrieval
from errata.methods.in_context.text import vectors
from errata.methods.none import Unedited
from errata.request import EditRequest, write_requests

# -- retrieval ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@each_family
def test_retrieval_puts_the_near_fact_in_front_and_nothing_else(family: str, side: str) -> None:
    model = base(family)
    store = Retrieval(**PLAIN, threshold=0.99, pool="mean").edit(model, [ROME, PARIS])
    encoded = model.encode(PROMPTS)
    batch = model.batch(encoded, side)
    got = model.logits(batch, [(store,)])
    for i, row in enumerate(encoded):
        hit = next((r for r in (ROME, PARIS) if r.prompt == PROMPTS[i]), None)
        more = () if hit is None else pieces(model.tokenizer, [f"{hit.prompt} {hit.target}."])[0]
        torch.testing.assert_close(got[i][batch.mask[i].bool()], alone(model, row, more), **close(family))


def test_the_query_is_the_prompt_not_what_follows() -> None:
    """Uncached, with the prompt's length given, a longer text finds the fact of its prompt; other hooks see nothing of the search."""
    model = base()
    store = Retrieval(**PLAIN, threshold=0.999).edit(model, [ROME])
    row = model.encode([ROME.prompt], ["Madrid Madrid Madrid"])[0]
    got = model.logits(model.batch([row]), [(store,)])[0]
    torch.testing.assert_close(got, alone(model, row, front(model, store)), **close("llama"))
    seen: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda _, __, out: seen.append(1))
    try:
        model.logits(model.batch([row]), [(store,)])
        assert len(seen) == 1
        with hooks_disabled(model.hf):
            model.logits(model.batch([row]), [()])
        assert len(seen) == 1 and model.blocks[0]._forward_hooks
    finally:
        handle.remove()


def test_nearest_k_threshold_nan_and_paraphrases() -> None:
    keys = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    how = {"k": 2, "threshold": 0.6, "encoder": None, "block": 0, "pool": "last"}

    def op(**more: object) -> Op:
        tensors = {"texts": torch.zeros(2, 1, dtype=torch.long), "lengths": torch.ones(2), "keys": keys, "owner": torch.tensor([0, 1, 1])}
        return Op("context", PROMPT, tensors, {"retrieval": {**how, **more}})

    asked = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [torch.nan, 0.0]])
    assert nearest(asked, op()) == [[1, 0], [1], [], []]  # the nearest last; a fact by its second key; far; NaN
    assert nearest(asked, op(k=1)) == [[0], [1], [], []]
    assert nearest(asked, op(threshold=0.8)) == [[0], [1], [], []]
    assert nearest(asked, op(threshold=-1.0, k=9))[2] == [0, 1]


def test_a_store_grows_and_replaces() -> None:
    model = base()
    editor = Retrieval(**PLAIN, threshold=0.999)
    a = editor.edit(model, [ROME, EditRequest("The capital of Spain is", "Tokyo", paraphrases=("Spain's capital is",))])
    b = editor.edit(model, [PARIS, EditRequest(ROME.prompt, "Madrid")], on=(a,))
    assert b.replaces == (a.id,) and [r.target for r in b.requests] == ["Tokyo", "French", "Madrid"]
    once = editor.edit(model, [*a.requests[1:], *b.requests[1:]])
    for name, tensor in once.ops[0].tensors.items():
        torch.testing.assert_close(b.ops[0].tensors[name], tensor, msg=name)
    for prompt, text in ((ROME.prompt, "Madrid"), ("Spain's capital is", "Tokyo"), (PARIS.prompt, "French")):
        fact = f"{next(r.prompt for r in b.requests if r.target == text)} {text}."
        row = model.encode([prompt])[0]
        want = alone(model, row, pieces(model.tokenizer, [fact])[0])
        torch.testing.assert_close(model.logits(model.batch([row]), [(a, b)])[0], want, **close("llama"))
    other = Retrieval(**PLAIN, threshold=0.9).edit(model, [PARIS], on=(a,))
    assert not other.replaces and len(other.requests) == 1  # another threshold is another store


def test_a_fact_is_shown_only_where_its_subject_is_named() -> None:
    """Whatever the likeness and the case; a fact without a subject by likeness alone, as every fact of a store without names."""
    model = base()
    facts = [ROME, EditRequest("People of Spain speak", "Italian", "Spain"), EditRequest("The language of Japan is", "French")]
    store, old = (Retrieval(**PLAIN, threshold=-1.0, only_named=named).edit(model, facts) for named in (True, False))
    for prompt, want in (("The capital of Italy is", 2), ("In SPAIN, what do people speak?", 1), ("The capital of France is", 0)):
        (row,) = model.encode([prompt])
        batch = model.batch([row], "left")
        inside = model.tokenizer.decode(row.ids)
        assert ("Spain".casefold() in inside.casefold()) == (want == 1)
        found = nearest(vectors(model, [prompt], store.ops[0].settings["retrieval"]), store.ops[0], [inside])[0]
        assert want in found and set(found) <= {want, 2}
        if found == [want]:
            fact = f"{facts[want].prompt} {facts[want].target}."
            torch.testing.assert_close(
                model.logits(batch, [(store,)])[0], alone(model, row, pieces(model.tokenizer, [fact])[0]), **close("llama")
            )
    only = Retrieval(**PLAIN, threshold=-1.0).edit(model, facts[:2])
    unnamed = model.batch(model.encode(["The capital of Italy is"]))
    assert torch.equal(model.logits(unnamed, [(only,)]), model.logits(unnamed, [()]))  # bit for bit
    assert not torch.equal(model.logits(unnamed, [(old,)]), model.logits(unnamed, [()]))
    grown = Retrieval(**PLAIN, threshold=-1.0).edit(model, facts[1:], on=(only,))
    assert grown.replaces == (only.id,) and grown.ops[0].tensors["named"].tolist() == [6, 5, 0]
    assert not Retrieval(**PLAIN, threshold=-1.0).edit(model, facts[1:], on=(old,)).replaces  # a store without names stands by itself


def test_a_name_is_sought_in_the_prompt_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers tidy spaces away when they decode, and with them the name."""
    model = base()
    fact = EditRequest("The language of Who , me ? is", "French", "Who , me ?")
    store = Retrieval(**PLAIN, threshold=-1.0).edit(model, [fact])
    batch = model.batch(model.encode([fact.prompt]))
    want = model.logits(batch, [(store,)])
    assert not torch.equal(want, model.logits(batch, [()]))
    for name in ("", "_for_bpe_even_though_it_will_corrupt_output"):
        monkeypatch.setattr(model.tokenizer, f"clean_up_tokenization_spaces{name}", True, raising=False)
    assert "Who , me ?" not in model.tokenizer.decode(model.encode([fact.prompt])[0].ids)
    assert torch.equal(model.logits(batch, [(store,)]), want)


def test_states_that_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is not made of NaN, and a prompt whose state is NaN finds nothing."""
    model = lm("llama")
    store = Retrieval(**PLAIN, threshold=0.5).edit(model, [ROME])
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[model.encode(["In Rome people"])[0].ids[-1]] = torch.nan
    store = Patch(store.method, store.settings, LM(model.hf, model.tokenizer).fingerprint, store.requests, store.ops)
    model = LM(model.hf, model.tokenizer)
    with pytest.raises(ModelError, match="NaN for 'In Rome people'"):
        Retrieval(**PLAIN).edit(model, [EditRequest("In Rome people", "French")])
    batch = model.batch(model.encode(["In Rome people"]))
    assert torch.equal(model.logits(batch, [(store,)]).isnan(), model.logits(batch, [()]).isnan())


def test_a_sentence_encoder_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    _encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'errata\[encoder\]'"):
        Retrieval(**PLAIN, encoder="all-MiniLM-L6-v2").edit(model, [ROME])

    class Letters:
        """Counts letters: prompts of the same letters are near."""

        def __init__(self, name: str, device: str) -> None:
            if name == "absent":
                raise OSError("no such model\nmore")

        def encode(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.tensor([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts]).float()

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Letters))
    with pytest.raises(ModelError, match=r"'absent' cannot be loaded: no such model$"):
        Retrieval(**PLAIN, encoder="absent").edit(model, [ROME])
    store = Retrieval(**PLAIN, encoder="letters", threshold=0.999).edit(model, [ROME])
    for prompt, hit in ((ROME.prompt, True), (PARIS.prompt, False)):
        row = model.encode([prompt])[0]
        want = alone(model, row, front(model, store) if hit else ())
        torch.testing.assert_close(model.logits(model.batch([row]), [(store,)])[0], want, **close("llama"))
    _encoder.cache_clear()


# -- ICE, IKE, none ----------------------------------------------------------------------------------------------------------------------


def shown(patch: Patch) -> list[str]:
    op = patch.ops[0]
    return [tokenizer().decode(t[:n]) for t, n in zip(op.tensors["texts"], op.tensors["lengths"].tolist(), strict=True)]


def test_the_wording_and_where_the_cue_stands() -> None:
    model = base()
    a = ICE().edit(model, [ROME])
    assert shown(a) == ["New Fact: The capital of France is Rome\n"]
    text = "New Fact: The capital of France is Rome\nNew Fact: In Rome people speak French\nPrompt: "
    row = model.encode([ROME.prompt])[0]
    want = alone(model, row, pieces(model.tokenizer, [text])[0])
    got = model.logits(model.batch([row]), [(*ICE(budget=90).edit_each(model, [ROME]), *ICE(budget=90).edit_each(model, [PARIS]))])[0]
    torch.testing.assert_close(got, want, **close("llama"))


def test_the_newest_facts_that_fit_are_shown() -> None:
    model = base()
    a, b, c = ICE(**PLAIN, budget=24).edit_each(model, [ROME, PARIS, EditRequest("The language of Spain is", "Italian")])
    lengths = [len(front(model, p)) for p in (a, b, c)]
    assert lengths[1] + lengths[2] <= 24 < sum(lengths)
    row = model.encode([ROME.prompt])[0]
    got = model.logits(model.batch([row]), [(a, b, c)])[0]
    torch.testing.assert_close(got, alone(model, row, front(model, b, c)), **close("llama"))
    with pytest.raises(ConfigError, match="over the budget of 3 tokens"):
        ICE(**PLAIN, budget=3).edit(model, [ROME])


def test_ike_shows_the_nearest_demonstrations_in_its_mix(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = base()
    others = [
        EditRequest(p, t, paraphrases=(f"I say {p.lower()}", f"Say: {p}", f"{p} now"), unrelated=((q, u), (f"Ask {q}", u)))
        for (p, t), (q, u) in zip(SENTENCES[1:5], SENTENCES[4:8], strict=True)
    ]
    write_requests(tmp_path / "d.jsonl", others)
    style = {**PLAIN, "shot": "{prompt} {target}|{query} {answer};", "budget": 10_000}
    patch = IKE(**style, k=8, demonstrations=str(tmp_path / "d.jsonl")).edit(model, [ROME])
    texts = shown(patch)
    assert len(texts) == 9 and texts[-1] == "The capital of France is Rome." and patch.ops[0].settings["demonstrations"] == 8
    copies = [t for t in texts[:-1] if len(set(t.rstrip(";").split("|"))) == 1]
    unrelated = [t for t in texts[:-1] if any(f"|{q} {u};" in t for r in others for q, u in r.unrelated)]
    assert (len(copies), len(unrelated), len(texts) - 1 - len(copies) - len(unrelated)) == (1, 4, 3)
    assert copies == ["The capital of France is Rome|The capital of France is Rome;"]  # its own, which is nearest
    plain = IKE(**style, k=3, mix=(), demonstrations=str(tmp_path / "d.jsonl")).edit(model, [ROME])
    assert len(shown(plain)) == 4
    none = IKE(**style, k=0, demonstrations=str(tmp_path / "d.jsonl")).edit(model, [ROME])
    assert shown(none) == shown(ICE(**PLAIN).edit(model, [ROME]))
    later = IKE(**style, k=8).edit(model, [PARIS], on=(ICE(**PLAIN).edit(model, [others[0]]),))  # earlier edits demonstrate too
    assert any(others[0].paraphrases[0] in t for t in shown(later))
    row = model.encode([ROME.prompt])[0]
    few = IKE(**{**style, "budget": 45}, k=8, demonstrations=str(tmp_path / "d.jsonl")).edit(model, [ROME])
    got = model.logits(model.batch([row]), [(few,)])[0]  # of demonstrations, too, the nearest that fit
    sizes = [len(t) for t in pieces(model.tokenizer, shown(few))]
    kept = next(n for n in range(len(sizes)) if sum(sizes[n:]) <= 45)
    assert 0 < kept < 8
    torch.testing.assert_close(got, alone(model, row, tuple(t for p in pieces(model.tokenizer, shown(few)[kept:]) for t in p)))
    with pytest.raises(InputError, match="no such file"):
        IKE(demonstrations=str(tmp_path / "x.jsonl")).edit(model, [ROME])


def test_packaged_demonstrations_hold_nothing_that_is_asked() -> None:
    """They are of the dev split's later cases; no test case's request, nor any probe of test or of the dev cases tuned on."""
    benchmark = registry.get("benchmark", "almanac")()
    told = requests_of("almanac")
    said = {p for r in told for p in (r.prompt, *r.paraphrases, *(q for q, _ in r.unrelated))}
    subjects = {r.subject for r in told}
    assert len(told) == 64 and all(len(r.paraphrases) == 3 and r.unrelated for r in told)
    for cases in (benchmark.load("test"), benchmark.load("dev", 200)):
        for case in cases:
            assert case.request.subject not in subjects and case.request.prompt not in said
            assert not said & {p.prompt for p in case.probes}


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("ice", {"fact": "{prompt}"}, r"must have the blanks \{prompt\}, \{target\}"),
        ("ice", {"fact": "{prompt} {target} {"}, "is no template"),
        ("ice", {"budget": 0}, "at least 1 token"),
        ("ike", {"mix": [1, 2]}, "three shares"),
        ("ike", {"k": -1}, "must not be negative"),
        ("ike", {"shot": "{prompt}"}, "blanks"),
        ("retrieval", {"k": 0}, "at least 1"),
        ("retrieval", {"threshold": 1.5}, "from -1 to 1"),
        ("none", {"seed": 1}, "no setting 'seed'"),
    ],
)
def test_bad_settings(method: str, settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.get("method", method).for_model(base(), **settings)


def test_blocks_and_empty_edits() -> None:
    model = base()
    for cls in (IKE, Retrieval):
        with pytest.raises(ConfigError, match="block 9 does not exist"):
            cls(block=9).edit(model, [ROME])
    for cls in (ICE, IKE, Retrieval, Unedited):
        with pytest.raises(ConfigError, match="nothing to edit"):
            cls().edit(model, [])
        assert cls().edit_each(model, []) == []


def test_none_and_context_are_no_change_of_weights() -> None:
    model = base()
    nothing, a = Unedited().edit(model, [ROME]), ices("llama")[0]
    assert not nothing.ops and "changes nothing" in nothing.describe() and "in front of the prompt" in a.describe()
    with pytest.raises(PatchError, match="changes nothing"):
        weight_deltas(model, (nothing,))
    with pytest.raises(PatchError, match="'context' op"):
        weight_deltas(model, (nothing, a))
    linear = Op("low_rank", Site(0, "mlp_down"), {"down": torch.zeros(1, 64), "up": torch.zeros(32, 1)})
    both = (nothing, Patch("test", {}, model.fingerprint, (), (linear,)))
    assert len(weight_deltas(model, both)) == 1
    assert merge(both).ops == (linear,)
    with pytest.raises(PatchError, match="cannot stand at"):
        Op("context", Site(0), {})
    with pytest.raises(PatchError, match="cannot stand at"):
        Op("dense", PROMPT, {})


def test_on_the_almanac_through_scores(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Scenarios take every one of them, and `none` leaves all answers as they were."""
    from errata.run import batched, continual, single

    model = errata.load("almanac")
    write_requests(tmp_path / "d.jsonl", requests_of("almanac")[:4])
    few = {"ike": {"k": 4, "demonstrations": str(tmp_path / "d.jsonl")}}
    cases = [dataclasses.replace(c, probes=c.probes[:2]) for c in registry.get("benchmark", "almanac")().load("dev", 3)]
    for name in ("none", "ice", "ike", "retrieval"):
        editor = registry.get("method", name).for_model(model, **few.get(name, {}))
        _, records = single(model, editor, cases)
        assert {r["method"] for r in records} == {name}
        if name == "none":
            assert all(r["gen_agree"] and r["tf_agree"] == 1 and r["nll_before"] == r["nll_after"] for r in records)
        stack, _ = batched(model, editor, cases, 2)
        assert len(stack) == (1 if name == "retrieval" else 2)
        stack, at, _ = continual(model, editor, cases, [1, 3])
        assert sum(len(p.requests) for p in stack) == 3 and set(at) == {1, 3}
