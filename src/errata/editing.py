"""`edit`: one fact, in one call, and a word where it did not take."""

from __future__ import annotations

import warnings
from typing import Any

from errata import registry
from errata.core.bank import active_patches
from errata.core.chat import request_in_chat
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import EditWarning
from errata.request import EditRequest
from errata.score import wanted


def edit(
    lm: LM,
    prompt: str,
    target: str,
    subject: str | None = None,
    *,
    method: str = "baft",
    chat: bool = False,
    occurrence: int = 1,
    join: str = "auto",
    **settings: Any,
) -> Patch:
    """Make one edit and return its patch (not attached).

    ``chat``: the prompt is the user's turn of the tokenizer's chat template, as in ``lm.complete(prompt, chat=True)``.
    ``occurrence``, ``join``: which of the subject's places is meant, and what stands before the target (`errata.request.EditRequest`).
    ``settings`` are the method's hyper-parameters; what is not given comes from the method's settings for this model.

    The prompt is then asked under the patch.  An `EditWarning` says so where the free answer does not begin with the target.
    """
    editor = registry.get("method", method).for_model(lm, **settings)
    request = EditRequest(prompt, target, subject, occurrence=occurrence, join=join)
    on = active_patches(lm.stack)
    shown = request_in_chat(lm.tokenizer, request) if chat else request
    patch: Patch = editor.edit(lm, [shown], on=on)
    (answer,) = wanted.ask(lm, [(shown.prompt, (*on, patch), target)], short=True)
    if not answer.as_wanted:
        said = f"the edit did not take: {prompt!r} is answered {answer.text!r}, not {target!r}"
        advice = f"give it more steps, try another method, or look for settings with `errata tune {lm.name or 'MODEL'} --method {method}`"
        warnings.warn(f"{said}; {advice}", EditWarning, stacklevel=2)
    return patch
