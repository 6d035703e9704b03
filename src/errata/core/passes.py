"""A call of the model as errata makes it: positions from the mask, any kind of cache, no padding where it would be read as text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from errata.core.decode import TokenCache
from errata.core.forward import PlainAttention, contiguous_input, hooks_disabled
from errata.core.tokens import Encoded, pad
from errata.errors import ModelError

_ROUNDING = 0.1  # of the largest logit; where the mask is looked at, other padding moves one by nothing, or by the last bits (experts)


def forward(lm: Any, ids: Tensor, mask: Tensor, **more: Any) -> Any:
    """See `errata.core.model.LM.forward`."""
    if not lm.base_cache.get("cacheless", not lm.accepts("past_key_values")):
        out = _forward(lm, ids, mask, **more)
        if not more.get("use_cache") or getattr(out, "past_key_values", None) is not None:
            return out
        lm.base_cache["cacheless"] = True
    return _whole(lm, ids, mask, **more)


def _whole(lm: Any, ids: Tensor, mask: Tensor, past_key_values: Any = None, use_cache: bool = False, **more: Any) -> Any:
    """`forward` of a model without a cache to go on from: all tokens run again, and the logits of ``ids`` are kept."""
    whole = ids if past_key_values is None else torch.cat([past_key_values.ids, ids], 1)
    out = _forward(lm, whole, mask, use_cache=False, **more)
    out.logits, out.past_key_values = out.logits[:, -ids.shape[1] :], TokenCache(whole) if use_cache else None
    return out


def _forward(lm: Any, ids: Tensor, mask: Tensor, **more: Any) -> Any:
    if lm.family.found == "search" and not bool(mask.all()) and not _masks(lm):
        raise ModelError(
            f"{lm.family.name} reads padding as text whatever the attention mask says, so texts of unlike lengths cannot run in one "
            "batch; give one prompt at a time, to a method that needs no other texts beside it"
        )
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    last = contiguous_input(lm.hf.get_output_embeddings()) if more.get("logits_to_keep") else nullcontext()
    slow = torch.is_grad_enabled() and lm.device.type == "cpu" and lm.dtype in (torch.bfloat16, torch.float16)
    with last, PlainAttention() if slow else nullcontext():
        return lm.hf(input_ids=ids, attention_mask=mask, position_ids=positions, **more)


def _masks(lm: Any) -> bool:
    """Whether a text's logits are the same whatever token the padding is; found by trying."""
    if "masks" not in lm.base_cache:
        lm.base_cache["masks"] = True  # for what runs here
        with torch.no_grad(), hooks_disabled(lm.hf):
            lm.base_cache["masks"] = all(_alike(lm, side) for side in ("left", "right"))
    return bool(lm.base_cache["masks"])


def _alike(lm: Any, side: str) -> bool:
    found = []
    for fill in (0, 6):
        batch = pad([Encoded((1, 2, 3), 3), Encoded((1, 2, 3, 4, 5), 5)], fill, side).to(lm.device)
        logits = _forward(lm, batch.ids, batch.mask, use_cache=False).logits[0, batch.mask[0].bool()]
        found.append(logits.float().nan_to_num())  # NaN is the model's own affair (BLOOM in float64)
    return bool((found[0] - found[1]).abs().max() < _ROUNDING * found[0].abs().max())
