"""Text in front of the prompt: the same numbers as the base has for the longer text, on every way the model is called."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types

import pytest
import torch
from families import FAMILIES, SENTENCES, lm, tokenizer

import errata
from errata import registry
from errata.bank import looks_ahead
from errata.context import nearest
from errata.embed import _encoder, bare
from errata.errors import ConfigError, InputError, ModelError, PatchError
from errata.export.changes import changes
from errata.methods.baft import BaFT
from errata.methods.demonstrations import requests_of
from errata.methods.in_context import ICE, IKE
from errata.methods.none import Nothing
from errata.methods.retrieval import Retrieval
from errata.model import LM
from errata.patch import PROMPT, Op, Patch, Site
from errata.read import read
from errata.request import EditRequest, write_requests
from errata.tail import Tail, Whole, capture, cut
from errata.tokens import Encoded, pieces
from errata.weights import merge

each_family = pytest.mark.parametrize("family", list(FAMILIES))
PLAIN = {"fact": "{prompt} {target}.", "cue": ""}
ROME = EditRequest("The capital of France is", "Rome", "France")
PARIS = EditRequest("In Rome people speak", "French", "Rome")
PROMPTS = [p for p, _ in SENTENCES]


def dtype_of(family: str) -> torch.dtype:
    """float64 for identities; Gemma-2's eager attention makes NaN of its lowest mask value there."""
    return torch.float32 if family == "gemma2" else torch.float64


@functools.cache
def base(family: str = "llama", dtype: torch.dtype | None = None) -> LM:
    return lm(family, dtype or dtype_of(family))


@functools.cache
def ices(family: str, dtype: torch.dtype | None = None) -> tuple[Patch, ...]:
    return tuple(ICE(**PLAIN).edit_each(base(family, dtype), [ROME, PARIS]))


def close(family: str) -> dict[str, float]:
    return {"atol": 1e-4, "rtol": 1e-4} if family == "gemma2" else {"atol": 1e-9, "rtol": 1e-7}


def front(model: LM, *patches: Patch) -> tuple[int, ...]:
    """The tokens that patches put in front, read off their requests and settings."""
    return tuple(t for p in patches for r in p.requests for t in pieces(model.tokenizer, [f"{r.prompt} {r.target}."])[0])


def longer(row: Encoded, more: tuple[int, ...]) -> Encoded:
    return Encoded((row.ids[0], *more, *row.ids[1:]), row.prompt_length + len(more))


def alone(model: LM, row: Encoded, more: tuple[int, ...]) -> torch.Tensor:
    """[T, V]: the base's logits for the concatenated tokens of one row, at the row's own places (BOS's: the last context token's)."""
    whole = longer(row, more)
    return model.logits(model.batch([whole]), [()])[0, len(more) :]


@pytest.mark.parametrize("side", ["left", "right"])
@each_family
def test_logits_are_the_base_s_for_the_longer_text(family: str, side: str) -> None:
    model = base(family)
    a, b = ices(family)
    encoded = model.encode(PROMPTS)
    stacks = [(), (a,), (b,), (a, b)]
    which = [i % 4 for i in range(len(encoded))]
    batch = model.batch(encoded, side)
    got = model.logits(batch, stacks, which)
    assert got.shape[:2] == batch.ids.shape
    for i, row in enumerate(encoded):
        want = alone(model, row, front(model, *stacks[which[i]]))
        torch.testing.assert_close(got[i][batch.mask[i].bool()], want, **close(family))
    assert not torch.allclose(got[1], model.logits(batch, [()])[1], atol=1e-3)


@each_family
def test_generation_is_the_base_s_behind_the_longer_text(family: str) -> None:
    """Ours, cached, with rows of different context; and raw `hf.generate`, with and without a cache, token for token."""
    model = base(family, torch.float32)
    a, b = ices(family, torch.float32)
    encoded = model.encode(PROMPTS)
    stacks = [(), (a,), (b,), (a, b)]
    which = [i % 4 for i in range(len(encoded))]
    want = []
    for row, s in zip(encoded, which, strict=True):
        whole = longer(row, front(model, *stacks[s]))
        ids = torch.tensor([whole.ids])
        out = model.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        want.append(model.tokenizer.decode(out[0, len(whole.ids) :], skip_special_tokens=True).strip())
    assert model.generate(PROMPTS, stacks=stacks, rows=which, max_new_tokens=5, stop=()) == want
    batch = model.batch(encoded)
    with model.under(a, b):
        for cached in (True, False):
            out = model.hf.generate(
                input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=5, do_sample=False, use_cache=cached
            )  # fmt: skip
            texts = [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, batch.ids.shape[1] :]]
            assert [t for t, s in zip(texts, which, strict=True) if s == 3] == [t for t, s in zip(want, which, strict=True) if s == 3]
        beams = model.hf.generate(input_ids=batch.ids[3:4], attention_mask=batch.mask[3:4], max_new_tokens=3, num_beams=3, do_sample=False)
    whole = longer(encoded[3], front(model, a, b))
    same = model.hf.generate(
        input_ids=torch.tensor([whole.ids]), attention_mask=torch.ones(1, len(whole.ids), dtype=torch.long), max_new_tokens=3, num_beams=3,
        do_sample=False,
    )  # fmt: skip
    assert beams[0, batch.ids.shape[1] :].tolist() == same[0, len(whole.ids) :].tolist()


@each_family
def test_raw_calls_of_every_shape(family: str) -> None:
    """Ids by place or by name, without mask and positions, in two chunks, the last logits only, hidden states, the loss."""
    model = base(family)
    a = ices(family)[0]
    more = front(model, a)
    row = model.encode([f"{ROME.prompt} Paris"])[0]
    ids = torch.tensor([row.ids])
    want = alone(model, row, more)
    whole = torch.tensor([longer(row, more).ids])
    labels = ids.clone()
    plain = model.hf(input_ids=whole, output_hidden_states=True)
    hidden = plain.hidden_states[2][:, len(more) :]
    told = torch.full_like(whole, -100)
    told[:, len(more) + 1 :] = ids[:, 1:]
    loss = model.hf(input_ids=whole, labels=told).loss
    with model.under(a):
        for got in (
            model.hf(ids).logits,
            model.hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
            model.hf(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits,
        ):
            torch.testing.assert_close(got[0], want, **close(family))
        torch.testing.assert_close(model.hf(input_ids=ids, logits_to_keep=2).logits[0], want[-2:], **close(family))
        picked = model.hf(input_ids=ids, logits_to_keep=torch.tensor([1, 3])).logits[0]
        torch.testing.assert_close(picked, want[[1, 3]], **close(family))
        torch.testing.assert_close(model.hf(input_ids=ids, output_hidden_states=True).hidden_states[2], hidden, **close(family))
        torch.testing.assert_close(model.hf(input_ids=ids, labels=labels).loss, loss, **close(family))
        first = model.hf(input_ids=ids[:, :3], use_cache=True)
        second = model.hf(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        both = torch.cat([first.logits, second.logits], 1)[0]
        torch.testing.assert_close(both, want, **close(family))
    torch.testing.assert_close(model.hf(ids).logits[0], alone(model, row, ()), atol=0, rtol=0)


def test_without_bos_and_with_a_bos_alone() -> None:
    model = base("gpt2")
    a = ices("gpt2")[0]
    more = front(model, a)
    ids = torch.tensor([model.encode([ROME.prompt])[0].ids[1:]])
    with model.under(a):
        bare_ids = model.hf(input_ids=ids).logits
        only = model.hf(input_ids=torch.tensor([[1]])).logits
    torch.testing.assert_close(bare_ids, model.hf(input_ids=torch.tensor([[*more, *ids[0].tolist()]])).logits[:, len(more) :])
    torch.testing.assert_close(only, model.hf(input_ids=torch.tensor([[1, *more]])).logits[:, len(more) :])


@each_family
def test_undo_and_rows_without_context_are_exact(family: str) -> None:
    model = base(family)
    a, b = ices(family)
    batch = model.batch(model.encode(PROMPTS))
    before = model.logits(batch)
    model.attach(a, b)
    assert not torch.equal(model.logits(batch), before)
    model.detach(a.id)
    model.detach(b.id)
    assert torch.equal(model.logits(batch), before)
    far = Retrieval(**PLAIN, threshold=1.0).edit(model, [EditRequest("A prompt that nobody asks", "Rome")])
    assert torch.equal(model.logits(batch, [(far,)]), before)
    assert torch.equal(model.logits(batch, [(Nothing().edit(model, [ROME]),)]), before)


def test_what_cannot_be_widened_is_refused() -> None:
    model = base()
    a = ices("llama")[0]
    ids = torch.tensor([model.encode([ROME.prompt])[0].ids])
    shape = ids.shape
    with model.under(a):
        for wrong, said in (
            ({"inputs_embeds": model.hf.get_input_embeddings()(ids)}, "input_ids, not inputs_embeds"),
            ({"input_ids": ids, "attention_mask": torch.ones(1, 1, shape[1], shape[1])}, "attention_mask"),
            ({"input_ids": ids, "return_dict": False}, "return_dict"),
            ({"input_ids": ids, "token_type_ids": torch.zeros(shape)}, "token_type_ids"),
        ):
            with pytest.raises(ModelError, match=said):
                model.hf(**wrong)
        long = torch.full((1, 60), 5)
        with pytest.raises(ModelError, match="do not fit the model's 64 places"):
            model.hf(input_ids=long)
        room = 64 - len(front(model, a))
        cache = model.hf(input_ids=long[:, :room], use_cache=True).past_key_values  # fits to the last place
        with pytest.raises(ModelError, match="do not fit"):
            model.hf(input_ids=long[:, :1], past_key_values=cache)


def test_positions_of_other_ops_are_the_caller_s() -> None:
    """BaFT above a context patch acts on the last three tokens of the prompt, and on them only; its fit sees the context."""
    model = base()
    a = ices("llama")[0]
    request = EditRequest("The language of Italy is", "French", unrelated=(("The capital of Japan is", "Tokyo"),))
    on_top = BaFT(rank=4, lr=0.02, end=".").edit(model, [request], on=(a,))
    with model.under(a, on_top):
        assert model.complete(request.prompt) == "French"
    row, more = model.encode([request.prompt])[0], front(model, a)
    whole = longer(row, more)
    want = model.logits(model.batch([whole]), [(on_top,)])[0, len(more) :]
    torch.testing.assert_close(model.logits(model.batch([row]), [(a, on_top)])[0], want, **close("llama"))
    # the state that the op leaves alone, and those it does not
    block = on_top.ops[0].site.block
    (under, at, _), (over, _, _) = (capture(model, [row], [block], on) for on in ((a,), (a, on_top)))
    early = at[0] < row.prompt_length - 3
    assert torch.equal(under[block][0][early], over[block][0][early]) and not torch.allclose(
        under[block][0][~early], over[block][0][~early]
    )
    raw = model.batch(model.encode(PROMPTS))
    with model.under(a, on_top):
        texts = model.generate(PROMPTS, max_new_tokens=4, stop=())
        out = model.hf.generate(input_ids=raw.ids, attention_mask=raw.mask, max_new_tokens=4, do_sample=False)
    assert texts == [model.tokenizer.decode(r, skip_special_tokens=True).strip() for r in out[:, raw.ids.shape[1] :]]


def test_context_baft_and_memit_on_one_stack() -> None:
    model = lm("llama", torch.float64)
    a = ICE(**PLAIN).edit(model, [ROME])
    b = BaFT(rank=4, lr=0.02, end=".").edit(model, [EditRequest("The capital of Spain is", "Tokyo")], on=(a,))
    from test_laws import QUICK  # the settings with which locate-then-edit methods edit models this small

    memit = registry.get("method", "memit").for_model(model, **QUICK["memit"])
    wanted = EditRequest("The language of Italy is", "Spanish", "Italy")
    c = memit.edit(model, [wanted], on=(a, b))
    with model.under(a, b, c):
        assert model.complete(wanted.prompt).startswith("Spanish")
    row, more = model.encode(["The capital of Japan is"])[0], front(model, a)
    want = model.logits(model.batch([longer(row, more)]), [(b, c)])[0, len(more) :]
    torch.testing.assert_close(model.logits(model.batch([row]), [(a, b, c)])[0], want, **close("llama"))


@each_family
def test_tail_capture_and_read_see_the_caller_s_tokens(family: str) -> None:
    model = base(family)
    on = ices(family)
    more = front(model, *on)
    assert looks_ahead(on)
    encoded = model.encode([ROME.prompt, "In Rome people"], ["Rome", "Madrid"])
    whole = [longer(row, more) for row in encoded]
    rows, want_rows = (cut(e, 2, 0, model.device) for e in (encoded, whole))
    noted: dict[object, torch.Tensor] = {}
    tape: dict[object, torch.Tensor] = {}
    from test_laws import random_bank

    bank = [random_bank(model, 2, 2, model.dtype)]
    for runner, under, cut_rows, kept in ((Tail, on, rows, tape), (Whole, (), want_rows, noted)):
        logits = runner(model, cut_rows, 2, under).logits(bank, kept)
        if under:
            got = logits
    torch.testing.assert_close(got, logits, **close(family))
    for key in noted:
        valid = rows.valid
        torch.testing.assert_close(tape[key][valid], noted[key][want_rows.valid], **close(family))
    states, at, lengths = capture(model, encoded, [1], on)
    for i, row in enumerate(whole):
        alone_states, _, _ = capture(model, [row], [1])
        torch.testing.assert_close(states[1][i][at[i] >= 0], alone_states[1][0, len(more) :], **close(family))
    assert lengths.tolist() == [e.prompt_length for e in encoded]
    site = Site(1, "mlp_down")
    for got, want in zip(read(model, encoded, [site], on=on)[site], read(model, whole, [site])[site], strict=True):
        torch.testing.assert_close(got, want, **close(family))


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
        with bare(model.hf):
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
    for cls in (ICE, IKE, Retrieval, Nothing):
        with pytest.raises(ConfigError, match="nothing to edit"):
            cls().edit(model, [])
        assert cls().edit_each(model, []) == []


def test_none_and_context_are_no_change_of_weights() -> None:
    model = base()
    nothing, a = Nothing().edit(model, [ROME]), ices("llama")[0]
    assert not nothing.ops and "changes nothing" in nothing.describe() and "in front of the prompt" in a.describe()
    with pytest.raises(PatchError, match="changes nothing"):
        changes(model, (nothing,))
    with pytest.raises(PatchError, match="'context' op"):
        changes(model, (nothing, a))
    linear = Op("low_rank", Site(0, "mlp_down"), {"down": torch.zeros(1, 64), "up": torch.zeros(32, 1)})
    both = (nothing, Patch("test", {}, model.fingerprint, (), (linear,)))
    assert len(changes(model, both)) == 1
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
