"""Rows that are decoded together: each under its own stack, a token a step; done ones leave, new ones join between two steps.

A batch begins with one pass over its prompts, padded on the left.  What its ops decided there
(`errata.core.bank.ForwardContext.decisions`), its keys and values and its mask are kept by row, so that rows can be taken out, and two
batches put together, without any row seeing a difference beyond the last bits: padding is what differs, and nothing attends to it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.decode import select_cache_rows
from errata.core.greedy import argmax
from errata.core.model import LM
from errata.errors import PatchError
from errata.serve.plans import PlanCache, join
from errata.serve.rows import Row

LOG = logging.getLogger("errata.serve")
_SLACK = 16  # columns that are padding in every row before they are cut off


class DecodeBatch:
    def __init__(self, lm: LM, plans: PlanCache, rows: Sequence[Row]) -> None:
        self.lm, self.plans, self.rows = lm, plans, list(rows)
        batch = lm.batch([row.encoded for row in rows]).to(lm.device)
        self.ids, self.mask = batch.ids, batch.mask
        self.cache: Any = None
        self.plan = plans.of([row.stack for row in rows])
        self.plan.prompt_lengths = batch.prompt_lengths

    @torch.no_grad()
    def step(self, ends: set[int]) -> list[Row]:
        """A token for every row; the rows that ended, which have left.  A row whose token cannot be drawn or told fails alone."""
        with self.lm.running(self.plan):
            out = self.lm.forward(self.ids, self.mask, past_key_values=self.cache, use_cache=True, **self.lm.last_logits_kwargs)
        self.cache, last = out.past_key_values, out.logits[:, -1]
        chosen, broken = argmax(last).tolist(), last.isnan().any(-1).tolist()
        done: list[Row] = []
        failed: list[Row] = []
        for i, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            try:
                if broken[i]:
                    raise PatchError(
                        "the model gives NaN under this stack, so there is no answer; ask under another, or undo the edit that does it"
                    )
                if row.params.temperature > 0:
                    chosen[i] = row.draw(last[i])
                row.take(chosen[i], last[i], ends)
            except Exception as error:
                LOG.exception("an answer failed")
                row.fail(error)
                failed.append(row)
            else:
                done += [row] if row.finish_reason else []
        self.ids = torch.tensor(chosen, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], 1)
        self.leave([*done, *failed])
        return done

    def leave(self, gone: Sequence[Row]) -> None:
        """Take rows out.  (Where the model's cache cannot be cut they stay, and what they say is dropped.)"""
        if not gone or not (self.cache is None or cuts(self.cache)):
            return
        stay = [i for i, row in enumerate(self.rows) if not any(row is g for g in gone)]
        self.rows = [self.rows[i] for i in stay]
        if not stay:
            return
        index = torch.tensor(stay)
        self.ids, self.mask, self.plan = self.ids[index], self.mask[index], self.plan.select(index)
        if self.cache is None:
            return
        self.cache = select_cache_rows(self.cache, index)
        lead = int(self.mask.argmax(1).min())
        if lead >= _SLACK and self.plain:
            self.mask = self.mask[:, lead:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, lead:], layer.values[:, :, lead:]

    @property
    def plain(self) -> bool:
        """Whether keys and values are simply one a token of the mask: no sliding window, nothing put in front of the prompt."""
        layers = () if self.cache is None else self.cache.layers
        return self.plan.inserter is None and all(type(layer).__name__ == "DynamicLayer" for layer in layers)

    @property
    def running(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in self.rows if row.finish_reason is None]

    def fits(self, other: DecodeBatch, rows: int, width: int) -> bool:
        """Whether the two can be one batch of at most ``rows`` rows and ``width`` tokens."""
        count = len(self.rows) + len(other.rows)
        if self.cache is None or other.cache is None or not (self.plain and other.plain) or count > rows:
            return False
        return count * max(self.mask.shape[1], other.mask.shape[1]) <= width

    def join(self, other: DecodeBatch) -> None:
        """Take the other's rows in; both have run a step."""
        wide = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_left(mine.keys, wide - 1), _left(theirs.keys, wide - 1)])
            mine.values = torch.cat([_left(mine.values, wide - 1), _left(theirs.values, wide - 1)])
        pad = torch.nn.functional.pad
        self.mask = torch.cat([pad(m, (wide - m.shape[1], 0)) for m in (self.mask, other.mask)])
        self.ids = torch.cat([self.ids, other.ids])
        self.rows += other.rows
        self.plan = join(self.plans.of([row.stack for row in self.rows]), self.plan, other.plan)


def _left(states: Tensor, wide: int) -> Tensor:
    """[B, H, wide, D] with zeros in front, where the mask is 0."""
    padded: Tensor = torch.nn.functional.pad(states, (0, 0, wide - states.shape[2], 0))
    return padded


def prompts_that_fit(rows: Sequence[Row], most: int, width: int) -> int:
    """How many of the rows, in their order, make a batch of at most ``most`` rows and ``width`` tokens; at least one."""
    longest = count = 0
    for row in rows[:most]:
        longest = max(longest, len(row.encoded.ids))
        if count and (count + 1) * longest > width:
            break
        count += 1
    return count


def cuts(cache: Any) -> bool:
    """Whether rows can be taken out of a cache."""
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))
