"""Plans of batches whose rows come and go: compiled once for the stacks in use, then only told which row runs under which."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from errata.core.bank import Plan, Stack, compile_plan
from errata.core.model import LM

KEPT = 24  # stacks whose parameters stay in one set of banks


def join(plan: Plan, one: Plan, other: Plan) -> Plan:
    """``plan``, compiled for the rows of both, with what was decided for the rows of ``one`` and then of ``other``."""
    assert one.prompt_lengths is not None and other.prompt_lengths is not None
    plan.prompt_lengths = torch.cat([one.prompt_lengths, other.prompt_lengths])
    sizes = len(one.prompt_lengths), len(other.prompt_lengths)
    for key in {**one.decisions, **other.decisions}:
        like = one.decisions.get(key, other.decisions.get(key))
        assert like is not None
        parts = [p.decisions[key] if key in p.decisions else like.new_zeros(n) for p, n in zip((one, other), sizes, strict=True)]
        plan.decisions[key] = torch.cat(parts)
    return plan


class PlanCache:
    """Compiled banks of the stacks that were used last.  A stack is known by the ids of its patches."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._stacks: OrderedDict[tuple[str, ...], Stack] = OrderedDict()
        self._place: dict[tuple[str, ...], int] = {}
        self._plan = Plan()

    def of(self, stacks: Sequence[Stack]) -> Plan:
        """The plan of a batch, a stack a row."""
        keys = [tuple(p.id for p in stack) for stack in stacks]
        wanted = OrderedDict(self._stacks)
        for key, stack in zip(keys, stacks, strict=True):
            wanted.setdefault(key, stack)
            wanted.move_to_end(key)
        while len(wanted) > max(KEPT, len(set(keys))):
            wanted.popitem(last=False)
        if not wanted.keys() <= self._place.keys():
            every = list(wanted.values())  # what is kept changes only once this is done: a stack that cannot be compiled leaves no trace
            self._plan = compile_plan(every, torch.arange(len(every)), self.lm.device, self.lm.tokenizer)
            self._place = {key: i for i, key in enumerate(wanted)}
        self._stacks = wanted
        return self._plan.select(torch.tensor([self._place[key] for key in keys], device=self.lm.device))
