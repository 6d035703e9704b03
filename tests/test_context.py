"""Text in front of the prompt: the same numbers as the base has for the longer text, on every way the model is called."""

from __future__ import annotations

import functools

import pytest
import torch
from families import SENTENCES, dtype_of, each_family, lm
from states import capture

from errata import registry
from errata.core.bank import non_causal
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.read import read_activations
from errata.core.tail import FullForward, Tail, split_rows
from errata.core.tokens import Encoded, pieces
from errata.errors import ModelError
from errata.methods.in_context.ice import ICE
from errata.methods.in_context.retrieval import Retrieval
from errata.methods.none import Unedited
from errata.methods.subspace.baft import BaFT
from errata.request import EditRequest

PLAIN = {"fact": "{prompt} {target}.", "cue": ""}
ROME = EditRequest("The capital of France is", "Rome", "France")
PARIS = EditRequest("In Rome people speak", "French", "Rome")
PROMPTS = [p for p, _ in SENTENCES]


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
    assert torch.equal(model.logits(batch, [(Unedited().edit(model, [ROME]),)]), before)


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
    from laws import QUICK  # the settings with which locate-then-edit methods edit models this small

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
    assert non_causal(on)
    encoded = model.encode([ROME.prompt, "In Rome people"], ["Rome", "Madrid"])
    whole = [longer(row, more) for row in encoded]
    rows, want_rows = (split_rows(e, 2, 0, model.device) for e in (encoded, whole))
    noted: dict[object, torch.Tensor] = {}
    recorded: dict[object, torch.Tensor] = {}
    from laws import random_bank

    bank = [random_bank(model, 2, 2, model.dtype)]
    for runner, under, cut_rows, kept in ((Tail, on, rows, recorded), (FullForward, (), want_rows, noted)):
        logits = runner(model, cut_rows, 2, under).logits(bank, kept)
        if under:
            got = logits
    torch.testing.assert_close(got, logits, **close(family))
    for key in noted:
        valid = rows.valid
        torch.testing.assert_close(recorded[key][valid], noted[key][want_rows.valid], **close(family))
    states, at, lengths = capture(model, encoded, [1], on)
    for i, row in enumerate(whole):
        alone_states, _, _ = capture(model, [row], [1])
        torch.testing.assert_close(states[1][i][at[i] >= 0], alone_states[1][0, len(more) :], **close(family))
    assert lengths.tolist() == [e.prompt_length for e in encoded]
    site = Site(1, "mlp_down")
    for got, want in zip(read_activations(model, encoded, [site], on=on)[site], read_activations(model, whole, [site])[site], strict=True):
        torch.testing.assert_close(got, want, **close(family))


def test_what_is_attached_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And calls of errata and raw ones between them do not read each other's texts."""
    import errata.core.model

    base, made = lm("llama"), []
    compiled = errata.core.model.compile_plan
    monkeypatch.setattr(errata.core.model, "compile_plan", lambda *args: made.append(args) or compiled(*args))
    a, b = ICE(**PLAIN).edit(base, [ROME]), Retrieval(**PLAIN).edit(base, [EditRequest("In Rome people speak", "French")])
    want = base.generate(PROMPTS, stacks=[(a, b)])
    raw = base.batch(base.encode(["The language of Spain is"]))
    made.clear()
    with base.under(a, b):
        first = base.forward(raw.ids, raw.mask, use_cache=True)
        mask = torch.cat([raw.mask, raw.mask[:, :1]], 1)
        token = first.logits[:, -1:].argmax(-1)
        assert base.generate(PROMPTS) == want and torch.equal(base.logits(raw), first.logits)
        then = base.forward(token, mask, past_key_values=first.past_key_values, use_cache=True).logits
        whole = base.logits(base.batch([Encoded((*raw.ids[0].tolist(), int(token)), raw.ids.shape[1])]))
        assert len(made) == 1
    torch.testing.assert_close(then[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    assert len(made) == 1
    assert base.generate(PROMPTS) == base.generate(PROMPTS, stacks=[()])
