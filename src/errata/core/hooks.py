"""A plan as forward hooks on the frozen model: every site's banks behind its module, positions from the mask in front of the first block.

The base's weights are neither read nor written; taking the hooks off leaves the model as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from errata.core.bank import ForwardContext, Plan
from errata.core.context import named
from errata.core.experts import inputs
from errata.core.families import Family, by_row, hidden_of, resolve, with_hidden
from errata.core.patch import Site
from errata.core.tokens import IGNORE_INDEX, positions
from errata.errors import ModelError


class Hooks(AbstractContextManager["Hooks"]):
    """The plan's banks as forward hooks, for as long as the context (or until `close`)."""

    def __init__(self, hf: Any, family: Family, module_of: Callable[[Site], Any], plan: Plan) -> None:
        self.plan, self._exit = plan, ExitStack()
        if not (plan.banks or plan.inserter):
            return
        self.family, self._hf = family, hf
        self._begun_by: Any = None  # the module whose call is on
        modules = [(site, module_of(site)) for site in sorted(plan.banks)]
        callable_ = _callable(hf, family)
        for module in callable_:  # from here on nothing fails
            self._hold(module.register_forward_pre_hook(_uncompiled(self._begin), with_kwargs=True))
        if plan.inserter is not None:
            self._hold(hf.register_forward_hook(_uncompiled(self._trim)))
        for site, module in modules:
            self._hold(module.register_forward_hook(_uncompiled(self._after(site))))
        for module in callable_:
            self._hold(module.register_forward_hook(_uncompiled(self._end), always_call=True))

    def _hold(self, handle: Any) -> None:
        self._exit.callback(handle.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.plan.enabled or self._begun_by is not None:
            return None
        out = self._before(module, args, kwargs)
        self._begun_by = module
        return out

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._begun_by is module:
            self._begun_by = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.plan
        if len(args) > 1 or plan.inserter is not None:
            args, kwargs = (), named(module, args, kwargs)
        if plan.inserter is None:
            plan.context, _ = _context(plan, args, kwargs)
            return None
        if module is not self._hf:
            raise ModelError("a patch that puts text in front of the prompt needs the whole model; call it, and not the model inside it")
        context, mask = _context(plan, (), kwargs)
        plan.context = context
        if context.is_prefill:
            plan.inserter.choose(module, self.family, kwargs, context.position, context.prompt_lengths)
        kwargs = plan.inserter.insert(module, kwargs, mask, context.is_prefill)
        if plan.inserter.placed is not None and context.is_prefill:
            nowhere = torch.full_like(plan.inserter.placed.ids, -1)
            context.position = plan.inserter.placed.widen(context.position, nowhere, -1)
        return (), kwargs

    def _trim(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self.plan.inserter is not None
        return self.plan.inserter.trim(output) if self.plan.enabled else None

    def _after(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            context = self.plan.context
            if context is None or not self.plan.enabled:
                return None
            own = hidden_of(output)
            rows, tokens = context.position.shape
            y = by_row(own, rows, tokens, site)
            x = inputs(module, args, rows, tokens, site) if args else y
            for bank in self.plan.banks[site]:
                y = bank.apply(x, y, context)
            return with_hidden(output, y.reshape(own.shape))

        return hook

    def close(self) -> None:
        self._exit.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _callable(hf: Any, family: Family) -> list[nn.Module]:
    """The model and what of it may be called by itself: the model without its head, and the part that holds the blocks, whatever is
    around it (the language part of one that takes images too)."""
    inner = getattr(hf, getattr(hf, "base_model_prefix", "") or "_", None)
    holder = family.blocks.rpartition(".")[0]
    found = [hf, inner, resolve(hf, holder) if holder else None]
    return list({id(m): m for m in found if isinstance(m, nn.Module)}.values())


def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that `torch.compile` does not trace: what it does depends on the plan as it is now."""
    return torch.compiler.disable(hook)  # type: ignore[no-any-return, unused-ignore]


def _told_by_call(plan: Plan, kwargs: Mapping[str, Any], mask: Tensor, position: Tensor, past: int, width: int) -> Tensor:
    """[B] where each row's prompt ends in a raw call: before the first label that counts, or where the mask ends; later chunks are output.

    A call without either, or one that brings more than a token behind what ran before, may hold prompt and output alike.  `ModelError`
    where an op has to know.
    """
    labels, masked = kwargs.get("labels"), isinstance(kwargs.get("attention_mask"), Tensor) and kwargs["attention_mask"].ndim == 2
    said = masked or isinstance(labels, Tensor) or kwargs.get("past_key_values") is not None  # an empty cache: `generate` begins
    lengths = mask.long().sum(1)
    if plan.reads_prompt_end and ((width > 1) if past else not said):
        part = "more tokens of a text that was begun" if past else "no attention_mask"
        raise ModelError(
            f"a patch that is attached decides at the prompt's end, and a call with {part} does not say where that is; give attention_mask "
            "(the prompt ends where it does) or labels (where they begin), tell it with `lm.prompt_ends(lengths)`, or use lm.generate and "
            "lm.logits; for lm-evaluation-harness errata.score.harness.HarnessLM"
        )
    if past:
        return torch.zeros_like(lengths)
    if isinstance(labels, Tensor):
        counts = (labels.to(mask.device) != IGNORE_INDEX) & (position > 0)  # a text's first token has nothing before it
        lengths = torch.where(counts.any(1), position.gather(1, counts.long().argmax(1, keepdim=True))[:, 0], lengths)
    return lengths


def _context(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[ForwardContext, Tensor]:
    """Positions of this chunk in unpadded coordinates, from the attention mask and the cache's length; and that mask [B, past + T]."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    rows, width = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    if past and plan.inserter is not None:
        past -= plan.inserter.width  # of which the caller knows nothing
    if past == 0:
        plan.decisions = {}
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        mask = torch.ones((rows, past + width), dtype=torch.long, device=tokens.device)
    mask = mask[:, : past + width]
    position = positions(mask)
    lengths = plan.prompt_lengths
    if lengths is None:
        lengths = _told_by_call(plan, kwargs, mask, position, past, width)
    return ForwardContext(
        position[:, -width:].to(tokens.device), lengths.to(tokens.device), plan.recorded, past == 0, plan.decisions, None, rows
    ), mask
