"""Prompts in a tokenizer's chat template: rendering them, telling that one is rendered already, finding the user's words in one.

A rendered prompt is a text like any other.  Requests and probes that hold one need nothing further to be trained on, kept and asked again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.errors import InputError
from errata.request import Case, EditRequest

_OF_CHATS = re.compile(r"im_start|im_end|_turn|header_id|\binst\b|user|assistant|system|role", re.IGNORECASE)  # names of control tokens
_WORDS = ("errata asks", "errata answers")  # stand for a question and its answer in a template


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a tokenizer's chat template puts around the user's words.

    controls        special tokens that the template writes; without one, those that are named as such tokens are
    before, after   around the user's words; ``after`` ends where the answer begins
    opening         the part of ``before`` from its last control token on, which is the same whatever the system text says
    end             the control token that ends an answer
    parts           whether the template takes a message's text as a part among images, and shows nothing of one that is plain
    """

    controls: tuple[str, ...]
    before: str = ""
    after: str = ""
    opening: str = ""
    end: str | None = None
    parts: bool = False


def _shape(tokenizer: Any) -> _Shape:
    return _found(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""), tuple(tokenizer.all_special_tokens))


@functools.lru_cache(maxsize=16)
def _found(tokenizer: Any, template: str, named_special: tuple[str, ...]) -> _Shape:
    """``template`` and ``named_special`` are the tokenizer's own: what was found before a change of them is not taken for what is now.

    Its size would tell of a change too, but for Gemma's 262,144 tokens counting takes .3 ms, and every text that is encoded asks.
    """
    special = sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens))
    named = _Shape(tuple(t for t in special if _OF_CHATS.search(t)))
    if not template:
        return named
    asked, answered = _WORDS
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    for parts in (False, True):
        try:
            before, found, after = _render(tokenizer, messages[:1], True, parts).partition(asked)
            tail = _render(tokenizer, messages, False, parts).rpartition(answered)[2]
        except Exception:  # templates are programs of others; one that refuses these words may take the user's
            continue
        if found:
            break
    else:
        return named
    controls = tuple(t for t in special if t in before + after + tail)
    last = max((before.rfind(c) for c in controls), default=-1)
    ends = sorted((tail.find(c), c) for c in controls if c in tail)
    return _Shape(controls, before, after, before[max(last, 0) :], ends[0][1] if ends else None, parts)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], generate: bool, parts: bool) -> str:
    given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if parts else messages
    return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generate))


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Messages {role, content} in the tokenizer's chat template, ready for the answer; the template's own error where it takes none."""
    return _render(tokenizer, messages, True, _shape(tokenizer).parts)


def _has_own_bos(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt begins with the text of the tokenizer's BOS, so that none is to be added."""
    bos = tokenizer.bos_token
    return bool(bos) and prompt.startswith(bos)


def is_rendered(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt holds a chat: a control token of the tokenizer behind its beginning, or all that its template puts around."""
    shape = _shape(tokenizer)
    rest = prompt[len(tokenizer.bos_token) :] if _has_own_bos(tokenizer, prompt) else prompt
    return any(c in rest for c in shape.controls) or (prompt.startswith(shape.before) and _user_span(tokenizer, prompt) is not None)


def is_exact(tokenizer: Any, prompt: str) -> bool:
    """Whether the prompt is tokenised as it stands: it is a rendered chat, or brings its own BOS."""
    return _has_own_bos(tokenizer, prompt) or is_rendered(tokenizer, prompt)


def _user_span(tokenizer: Any, prompt: str) -> tuple[int, int] | None:
    """Characters [start, end) of the user's (last) words in a rendered prompt; None where the template's shape is not found."""
    shape = _shape(tokenizer)
    if not (shape.opening or shape.after) or not prompt.endswith(shape.after):
        return None
    end = len(prompt) - len(shape.after)
    start = prompt.rfind(shape.opening, 0, end) if shape.opening else 0
    return None if start < 0 else (start + len(shape.opening), end)


def user_words(tokenizer: Any, prompt: str) -> str:
    """What the user says in a rendered prompt; any other prompt without its trailing whitespace."""
    span = _user_span(tokenizer, prompt) if is_rendered(tokenizer, prompt) else None
    return prompt.rstrip() if span is None else prompt[slice(*span)]


def behind(tokenizer: Any, text: str, prompt: str) -> str:
    """The prompt with a text in front: before the user's words in a rendered one, and never before a BOS of its own."""
    span = _user_span(tokenizer, prompt) if is_rendered(tokenizer, prompt) else None
    at = span[0] if span else len(tokenizer.bos_token) if _has_own_bos(tokenizer, prompt) else 0
    return prompt[:at] + text + prompt[at:]


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None where there is no such token."""
    end = _shape(tokenizer).end
    found = None if end is None else tokenizer.convert_tokens_to_ids(end)
    return found if isinstance(found, int) else None


def bos_opens_turns(tokenizer: Any) -> bool:
    """Whether the template opens every turn with BOS, which then is no sign of a text's beginning (SmolLM2)."""
    return bool(tokenizer.bos_token) and tokenizer.bos_token in _shape(tokenizer).after


def apply_chat_template(tokenizer: Any, prompt: str) -> str:
    """The prompt as the user's turn of the tokenizer's chat template, ready for the answer; one that is rendered stays as it is."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template; leave chat off, or take a model that was tuned to chat")
    if is_rendered(tokenizer, prompt):
        return prompt
    words = prompt[len(tokenizer.bos_token) :] if _has_own_bos(tokenizer, prompt) else prompt
    try:
        return render(tokenizer, [{"role": "user", "content": words}])
    except Exception as error:  # templates are programs of others, and refuse in their own ways
        raise InputError(f"the chat template does not take the prompt {prompt!r}: {error}") from None


def request_in_chat(tokenizer: Any, request: EditRequest) -> EditRequest:
    """The request with every prompt of it rendered, so that an editor trains on what a chat model is asked."""
    prompt = apply_chat_template(tokenizer, request.prompt)
    span = _user_span(tokenizer, prompt)
    rendered = replace(
        request,
        prompt=prompt,
        paraphrases=tuple(apply_chat_template(tokenizer, p) for p in request.paraphrases),
        unrelated=tuple((apply_chat_template(tokenizer, p), answer) for p, answer in request.unrelated),
        contrast=tuple((apply_chat_template(tokenizer, p), answer) for p, answer in request.contrast),
    )
    if request.subject is not None and span is not None and not span[0] <= rendered.place()[0] < span[1]:
        raise InputError(
            f"subject {request.subject!r} stands in the chat template's own text around the question {request.prompt!r}, where an edit "
            "would take it; spell the subject in another way, or leave chat off"
        )
    return rendered


def case_in_chat(tokenizer: Any, case: Case) -> Case:
    """The case with its requests and probes rendered: what is edited and what is asked."""
    probes = tuple(replace(p, prompt=apply_chat_template(tokenizer, p.prompt)) for p in case.probes)
    first, *more = (request_in_chat(tokenizer, r) for r in case.requests)
    return Case(first, probes, tuple(more))
