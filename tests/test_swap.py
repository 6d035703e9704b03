"""A change of what runs that fails, wherever it fails, leaves everything as it was: stack, hooks, answers, and what comes next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import PROMPTS, model, patches

from errata.core import model as model_module
from errata.core.hooks import Hooks
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import PatchError


def hooks(base: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.hf.modules())


def raw(base: LM) -> torch.Tensor:
    with torch.no_grad():
        return base.hf(**base.tokenizer(PROMPTS[0], return_tensors="pt")).logits


def when_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory for the banks")

    monkeypatch.setattr(model_module, "compile_plan", full)


def when_looking_for_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second site is not there any more: the first one has its hook by then, if hooks are put on one by one."""
    from errata.core import hooks as hooks_module

    real = hooks_module.Hooks.__init__

    def init(self: Any, hf: Any, family: Any, module_of: Callable[[Any], Any], plan: Any) -> None:
        seen: list[Any] = []

        def gone(site: Any) -> Any:
            seen.append(site)
            if len(seen) > 1:
                raise AttributeError(site)
            return module_of(site)

        real(self, hf, family, gone, plan)

    monkeypatch.setattr(hooks_module.Hooks, "__init__", init)


def stacked() -> tuple[LM, Patch, Patch]:
    """The model, a patch to have on it, and one of several sites to fail with."""
    base = model("llama")
    return base, patches("baft", "llama")[0], patches("melo", "llama")[1]


CHANGES: dict[str, Callable[[LM, Patch, Patch], object]] = {
    "attach": lambda base, first, second: base.attach(second),
    "attach two": lambda base, first, second: base.attach(second, patches("rome", "llama")[2]),
    "under": lambda base, first, second: base.under(second).__enter__(),
    "detach": lambda base, first, second: base.detach(first.id),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("fails", [when_compiling, when_looking_for_a_module])
def test_a_change_that_fails_changes_nothing(change: str, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    base, first, second = stacked()
    plain = raw(base)
    base.attach(first, patches("rome", "llama")[1])
    try:
        before, count = raw(base), hooks(base)
        assert not torch.equal(before, plain)
        if fails is when_looking_for_a_module and change == "detach":  # what is left has one site: let it have several
            base.detach()
            base.attach(first, second)
            before, count = raw(base), hooks(base)
        with monkeypatch.context() as patched:
            fails(patched)
            with pytest.raises((torch.OutOfMemoryError, AttributeError)):
                CHANGES[change](base, first, second)
        assert first in base.stack and len(base.stack) == 2
        assert hooks(base) == count and torch.equal(raw(base), before)
        assert torch.equal(base.logits(base.batch(base.encode(PROMPTS))), base.logits(base.batch(base.encode(PROMPTS)), [base.stack]))
        base.attach(patches("lora", "llama")[2])  # what comes next works
    finally:
        base.detach()
    assert hooks(base) == 0 and torch.equal(raw(base), plain)


def test_a_refused_patch_leaves_what_was_attached() -> None:
    base, first, second = stacked()
    base.attach(first)
    try:
        before = raw(base)
        bad = dataclasses.replace(second, ops=tuple(dataclasses.replace(op, settings={"x": 1}) for op in second.ops))
        for use in (lambda: base.attach(bad), lambda: base.attach(second, bad), lambda: base.attach(second, second)):
            with pytest.raises(PatchError):
                use()
            assert base.stack == (first,) and torch.equal(raw(base), before)
    finally:
        base.detach()


def test_the_end_of_under_needs_nothing_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short at the end of the block, what was on before is on again all the same."""
    base, first, second = stacked()
    base.attach(first)
    try:
        before, count = raw(base), hooks(base)
        with monkeypatch.context() as patched, base.under(patches("ft-m", "llama")[1]):
            when_compiling(patched)
            assert not torch.equal(raw(base), before)
        assert base.stack == (first,) and hooks(base) == count and torch.equal(raw(base), before)
        with base.under(second):
            base.detach()
            base.attach(second)
        assert base.stack == (first,) and hooks(base) == count and torch.equal(raw(base), before)
    finally:
        base.detach()
    assert hooks(base) == 0


def test_hooks_that_cannot_be_put_on_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, second = stacked()
    plan = base.plan([(second,)], None, 1)
    when_looking_for_a_module(monkeypatch)
    with pytest.raises(AttributeError):
        Hooks(base.hf, base.family, base.module, plan)
    assert hooks(base) == 0
