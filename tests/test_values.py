"""Value vectors: rows that look at one token may run apart from the longer ones, to the same end."""

from __future__ import annotations

import pytest
import torch
from families import lm
from test_locate import REQUESTS, SHARED

from errata.config import build
from errata.core.tail import FullForward, Tail
from errata.methods.locate import values
from errata.methods.locate.editor import LocateThenEditRun
from errata.methods.locate.memit import PMET
from errata.methods.locate.rome import ROME


@pytest.mark.parametrize("runner", [Tail, FullForward])
@pytest.mark.parametrize("cls", [ROME, PMET])
def test_kl_rows_apart_or_together_give_the_same_values(monkeypatch: pytest.MonkeyPatch, cls: type, runner: type) -> None:
    base, found, passes = lm("llama", torch.float64), {}, {}
    editor = build(cls, {**SHARED, "layers": [1], "kl": 0.5, "v_stop": 0.0})
    for most in (10**6, -1):  # padding that is suffered: any, none
        monkeypatch.setattr(values, "FIXED_TOKENS_ALONE", most)
        job = LocateThenEditRun(editor, base, [[r] for r in REQUESTS], (), runner)
        job.place()
        before = [0]
        handle = base.hf.register_forward_pre_hook(lambda *_, n=before: n.__setitem__(0, n[0] + 1))
        found[most] = torch.stack([f.delta for f in job.values(None)])
        handle.remove()
        passes[most] = before[0]
    assert passes[-1] > passes[10**6]  # a pass more a step
    torch.testing.assert_close(found[-1], found[10**6], atol=1e-9, rtol=1e-9)
