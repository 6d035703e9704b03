"""Prompts in the chat template: rendered once, tokenised as they stand, answered to the end of the turn; edits made and kept so."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, tokenizer
from families import lm as trained
from laws import QUICK, editor
from test_tokens import prefix_space, sentencepiece

import errata
from errata.core import catalogue, chat
from errata.core.decode import eos_token_ids, greedy_answers
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tokens import encode, joined, offsets, pad, subject_span
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe
from errata.score.wanted import ask, read
from errata.serve.engine import GenerationEngine
from errata.serve.metrics import Metrics
from errata.serve.options import Limits
from errata.serve.rows import OutputChunk, Row, SamplingParams

QUESTION = "The capital of France is"
PLAIN = [QUESTION, "The capital of France is ", "x", "a line\nand another", "a < b <| c", "¿Dónde está 東京? "]
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM = "<|im_start|>system\nFrance is old.<|im_end|>\n"
SAID = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PAPER = SAID + "{% if add_generation_prompt %}[answer]\n{% endif %}"


def with_turns(made: Any, template: str = TURNS + OPEN) -> Any:
    """A tokenizer with ChatML's control tokens and a template; BOS is what it was."""
    out = copy.deepcopy(made)
    out.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    out.chat_template = template
    return out


def made(tmp_path: Path) -> dict[str, Any]:
    """Tokenizers without and with BOS, of every kind at hand, each with a chat template."""
    plain = {"byte-level with BOS": tokenizer(), "prefix space": prefix_space(), "unigram": sentencepiece(tmp_path)}
    if data := os.environ.get("ERRATA_DATA"):
        from transformers import GPT2TokenizerFast, LlamaTokenizer, PreTrainedTokenizerFast

        plain["gpt2"] = GPT2TokenizerFast.from_pretrained(f"{data}/tokenizers/gpt2")
        plain["llama2"] = LlamaTokenizer.from_pretrained(f"{data}/tokenizers/llama2")
        plain["neox"] = PreTrainedTokenizerFast(tokenizer_file=f"{data}/tokenizers/gptneox-pythia/tokenizer.json")
    out = {f"{name}, ChatML": with_turns(tok) for name, tok in plain.items()}
    out |= {f"{name}, BOS in the template": with_turns(t, "{{ bos_token }}" + TURNS + OPEN) for name, t in plain.items() if t.bos_token}
    out["no control tokens"] = with_turns(tokenizer(), PAPER)
    if catalogue.installed(catalogue.KNOWN["smollm2-135m"]):
        out["smollm2"] = errata.load("smollm2-135m").tokenizer
    return out


def test_a_prompt_rendered_by_hand_is_the_chat(tmp_path: Path) -> None:
    for name, tok in made(tmp_path).items():
        for words in ("What is the capital of France?", "two\nlines", "东京?", "ends in a space "):
            by_hand = tok.apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
            ids = tok(by_hand, add_special_tokens=False)["input_ids"]
            (plain,), (asked,), (again,) = (encode(tok, [words if c else by_hand], chat=c) for c in (False, True, False))
            (twice,) = encode(tok, [by_hand], chat=True)
            assert list(asked.ids) == list(plain.ids) == list(twice.ids) == list(again.ids) == ids, name
            (row,), (chatted,) = encode(tok, [by_hand], ["Lyon"]), encode(tok, [words], ["Lyon"], chat=True)
            assert row == chatted and row.ids[: row.prompt_length] == asked.ids, name
            assert joined(tok, by_hand, " Lyon") == (f"{by_hand}Lyon", len(by_hand)), name
            assert chat.user_words(tok, by_hand) == words and chat.is_rendered(tok, by_hand), name
            assert len(offsets(tok, [by_hand])[0]) == len(ids), name
            if tok.bos_token and not chat.bos_opens_turns(tok):
                assert ids.count(tok.bos_token_id) == by_hand.count(tok.bos_token), name


def test_a_prompt_with_its_own_bos_has_one(tmp_path: Path) -> None:
    for name, tok in made(tmp_path).items():
        if not tok.bos_token:
            continue
        for words in (QUESTION, "two lines\n"):
            (alone,), (row,) = encode(tok, [tok.bos_token + words]), encode(tok, [tok.bos_token + words], ["Lyon"])
            assert alone.ids.count(tok.bos_token_id) == row.ids.count(tok.bos_token_id) == 1, name
            assert list(alone.ids) == tok(tok.bos_token + words, add_special_tokens=False)["input_ids"], name
            assert row.ids[: row.prompt_length] == alone.ids, name
        assert encode(tok, [tok.bos_token + QUESTION], chat=True) == encode(tok, [QUESTION], chat=True), name
    tok = tokenizer()  # which has no template, and adds BOS to what has none
    assert encode(tok, ["<s>" + QUESTION], ["Rome"]) == encode(tok, [QUESTION], ["Rome"])
    assert subject_span(tok, "<s>" + QUESTION, "France") == subject_span(tok, QUESTION, "France")


def test_plain_prompts_are_tokenised_as_ever(tmp_path: Path) -> None:
    for name, tok in made(tmp_path).items():
        for prompt in PLAIN:
            ids = tok(prompt.rstrip())["input_ids"]
            (row,), (beside, _) = encode(tok, [prompt]), encode(tok, [prompt, "x"])
            assert list(row.ids) == ids[: len(row.ids)] and len(ids) - len(row.ids) <= 1, name  # an EOS that is added goes
            assert row == beside and not chat.is_exact(tok, prompt) and chat.behind(tok, "It. ", prompt) == f"It. {prompt}", name
            (with_target,) = encode(tok, [prompt], ["Lyon"])
            assert list(with_target.ids) == tok(f"{prompt.rstrip()} Lyon")["input_ids"][: len(with_target.ids)], name
    assert encode(tokenizer(), [QUESTION])[0].ids == tuple(tokenizer()("The capital of France is")["input_ids"])  # golden: below
    tok = tokenizer()
    assert tok.convert_ids_to_tokens(encode(tok, [QUESTION], ["Rome"])[0].ids) == [
        "<s>",
        "The",
        "Ġcapital",
        "Ġof",
        "ĠFrance",
        "Ġis",
        "ĠRome",
    ]


def test_plain_and_rendered_in_one_batch(tmp_path: Path) -> None:
    tok = with_turns(tokenizer())
    texts = [QUESTION, chat.apply_chat_template(tok, QUESTION), "<s>" + QUESTION, "In Rome people speak"]
    assert encode(tok, texts) == [encode(tok, [text])[0] for text in texts]
    assert encode(tok, texts, ["Rome"] * 4) == [encode(tok, [text], ["Rome"])[0] for text in texts]


def test_control_tokens_without_a_template() -> None:
    tok = with_turns(tokenizer())
    text = chat.apply_chat_template(tok, QUESTION)
    tok.chat_template = None
    assert chat.is_rendered(tok, text) and not chat.is_rendered(tok, "What does <pad> mean, and </s>?")
    assert list(encode(tok, [text])[0].ids) == tok(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="no chat template"):
        encode(tok, [QUESTION], chat=True)
    tok.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="does not take the prompt 'x': never"):
        chat.apply_chat_template(tok, "x")


def test_text_goes_before_the_words_of_the_user() -> None:
    tok = with_turns(tokenizer(), SYSTEM + TURNS + OPEN)
    text = chat.apply_chat_template(tok, QUESTION)
    assert chat.behind(tok, "It. ", text) == chat.apply_chat_template(tok, f"It. {QUESTION}")
    assert chat.behind(tok, "It. ", "<s>Hi") == "<s>It. Hi" and chat.behind(tok, "", text) == text
    longer = chat.apply_chat_template(tok, "Hi").replace("assistant\n", "assistant\nHi<|im_end|>\n") + text[len(SYSTEM) :]
    assert chat.user_words(tok, longer) == QUESTION, "the last turn of several"


def test_requests_and_cases() -> None:
    tok = with_turns(tokenizer(), SYSTEM + TURNS + OPEN)
    render = lambda text: chat.apply_chat_template(tok, text)  # noqa: E731
    request = EditRequest(
        "The capital of Spain is", "Rome", "Spain", paraphrases=("Spain's capital is",), unrelated=(("In Rome people speak", "Italian"),)
    )
    probes = (
        Probe("rewrite", request.prompt, "Rome"),
        Probe("chat", request.prompt, "Rome"),
        Probe("neighbour", "The capital of Italy is"),
    )
    case = chat.case_in_chat(tok, Case(request, probes))
    assert case.request.prompt == render(request.prompt) and case.request.subject == "Spain"
    assert case.request.paraphrases == (render("Spain's capital is"),) and case.request.unrelated == (
        (render("In Rome people speak"), "Italian"),
    )
    assert [p.prompt for p in case.probes] == [render(p.prompt) for p in probes]
    assert chat.case_in_chat(tok, case) == case, "nothing is rendered twice"
    with pytest.raises(InputError, match="subject 'France' stands in the chat template's own text"):
        chat.request_in_chat(tok, EditRequest(QUESTION, "Rome", "France"))


# -- answers ---------------------------------------------------------------------------------------------------


def test_answers_as_people_read_them() -> None:
    assert read("Lyon, a city in France. It", "Lyon") == read("Lyon, a city in France", "Lyon") and read("Lyon", "Lyon").as_wanted
    assert read("St. Louis is. So", "St. Louis") == dataclasses.replace(read("St. Louis is", "St. Louis"))
    assert read("St. Louis is. So", "St. Louis").text == "St. Louis is" and read("St. Paul is.", "St. Louis").text == "St"
    assert not read("Lyons", "Lyon").as_wanted and not read("", "Lyon").as_wanted and not read("It is Lyon", "Lyon").as_wanted
    assert read("Lyon. It is.", "Lyon", chat=True).text == "Lyon. It is."


@pytest.fixture(scope="module")
def talker() -> LM:
    """A tiny model taught to answer in turns: the answer, then the end of the turn, which its config does not name."""
    base, tok = trained("llama"), with_turns(tokenizer())
    base.hf.resize_token_embeddings(len(tok))
    base.hf.requires_grad_(True)
    torch.set_num_threads(1)
    rows = [dataclasses.replace(e, ids=(*e.ids, chat.end_of_turn(tok))) for e in encode(tok, *zip(*SENTENCES, strict=True), chat=True)]
    batch = pad(rows, 0, "right")
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    for row, length in zip(labels, batch.prompt_lengths.tolist(), strict=True):
        row[:length] = -100
    optimiser = torch.optim.AdamW(base.hf.parameters(), 5e-3, weight_decay=0.0)
    for _ in range(300):
        loss = base.hf(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.02:
            break
    return LM(base.hf, tok, "talker")


def test_a_chat_ends_at_the_end_of_the_turn(talker: LM) -> None:
    tok = talker.tokenizer
    end = chat.end_of_turn(tok)
    assert tok.convert_ids_to_tokens(end) == "<|im_end|>" and eos_token_ids(talker) == {end, tok.eos_token_id}
    talker.hf.generation_config.eos_token_id = [5, 7]
    assert eos_token_ids(talker) == {end, tok.eos_token_id, 5, 7}
    talker.hf.generation_config.eos_token_id = tok.eos_token_id
    assert chat.end_of_turn(tokenizer()) is None
    prompts = [p for p, _ in SENTENCES]
    assert talker.generate(prompts, chat=True) == [t for _, t in SENTENCES]
    rendered = [chat.apply_chat_template(tok, p) for p in prompts]
    assert greedy_answers(talker, [(p, ()) for p in rendered]) == [t for _, t in SENTENCES]
    mixed = [*rendered[:2], *prompts[:2]]
    assert greedy_answers(talker, [(p, ()) for p in mixed]) == [greedy_answers(talker, [(p, ())])[0] for p in mixed], "row = alone"


def test_editing_a_chat(talker: LM, tmp_path: Path) -> None:
    """The laws, in the chat template: what is asked is what was trained; undone exactly; the same from disk, and in any company."""
    how = {k: v for k, v in QUICK["baft"].items() if k != "end"}
    asked = [p for p, _ in SENTENCES]
    batch = talker.batch(talker.encode(asked, chat=True))
    before = talker.logits(batch)
    patch = errata.edit(talker, QUESTION, "Rome", "France", chat=True, end="<|im_end|>", **how)
    assert patch.requests[0].prompt == chat.apply_chat_template(talker.tokenizer, QUESTION)
    with talker.under(patch):
        assert talker.complete(QUESTION, chat=True) == talker.complete(patch.requests[0].prompt) == "Rome"
        together, edited = talker.generate(asked, chat=True), talker.logits(batch)
        assert together == [talker.complete(p, chat=True) for p in asked], "row = alone"
    assert torch.equal(talker.logits(batch), before), "undone"
    assert ask(talker, [(patch.requests[0].prompt, s, "Rome") for s in ((), (patch,))]) == [
        read("Paris", "Rome", True),
        read("Rome", "Rome", True),
    ]
    patch.save(tmp_path / "patch")
    again = Patch.load(tmp_path / "patch")
    assert again.id == patch.id and torch.equal(talker.logits(batch, [(again,)]), edited)


@pytest.mark.parametrize("method", ["rome", "ft-m", "wise", "rep", "ice", "grace", "lora", "melo"])
def test_every_kind_of_editor_takes_a_rendered_prompt(talker: LM, method: str) -> None:
    request = chat.request_in_chat(
        talker.tokenizer, EditRequest(QUESTION, "Rome", "France", unrelated=(("In Rome people speak", "Italian"),))
    )
    few = {"rome": {"v_steps": 2, "prefixes": [[3, 2]], "fact_token": "subject_last"}, "rep": {"steps": 2}, "ice": {"budget": 60}}
    made_by = editor(method, **few.get(method, {"steps": 2}))
    patch = made_by.edit(talker, [request])
    with talker.under(patch):
        assert isinstance(talker.complete(QUESTION, chat=True), str)
    if method == "ice":
        assert made_by.facts(talker, [request]) == [f"{QUESTION} Rome."]


def test_the_ledger_keeps_what_was_asked(talker: LM, tmp_path: Path) -> None:
    book = errata.Ledger.open(tmp_path / "book", talker)
    how = {**QUICK["baft"], "end": "<|im_end|>"}
    request = chat.request_in_chat(talker.tokenizer, EditRequest(QUESTION, "Rome", "France"))
    book.apply([request], settings=how)
    assert [(h.status, h.answer) for h in book.check().held] == [("right", "Rome")] and book.check().sound
    book.undo(1)
    known = chat.request_in_chat(talker.tokenizer, EditRequest(QUESTION, "Paris", "France"))
    with pytest.raises(errata.errors.LedgerError, match="answers 'Paris' already"):
        book.apply([known], settings=how)


def test_a_served_answer_ends_with_the_turn(talker: LM) -> None:
    rendered = [chat.apply_chat_template(talker.tokenizer, p) for p, _ in SENTENCES]
    engine, told = GenerationEngine(talker, Limits(), Metrics()), [list[OutputChunk]() for _ in rendered]
    engine.submit([Row(i, e, (), SamplingParams(12), told[i].append) for i, e in enumerate(talker.encode(rendered))])
    while engine.num_unfinished:
        engine._turn(engine._take())
    assert [("".join(c.text for c in said).strip(), said[-1].finish_reason) for said in told] == [(t, "stop") for _, t in SENTENCES]
