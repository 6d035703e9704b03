"""What a prompt is about, as one vector: from the frozen base's own states, or from a sentence encoder.

    e = h / ‖h‖          h [D] the state of the prompt's last token after a block (or the mean over its tokens)

Two vectors are compared by their product, the cosine.  (Tried on the almanac: whitening, and taking off the mean state of other
prompts, gain nothing at the late blocks that serve best; the mean state of ordinary text spoils it.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.core.families import Family, by_row, hidden_of, resolve
from errata.core.forward import StopForward, hooks_disabled
from errata.core.patch import Site
from errata.errors import ConfigError, ModelError


@torch.no_grad()
def states(hf: Any, family: Family, ids: Tensor, position: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """{block: its output [B, T, D]} of the unedited base; ``position`` [B, T] is -1 where there is padding."""
    seen: dict[int, Tensor] = {}
    left = set(blocks)

    def keep(block: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[block] = by_row(hidden_of(output), len(ids), None, Site(block)).detach()
            left.discard(block)
            if not left:
                raise StopForward

        return hook

    modules = resolve(hf, family.blocks)
    with hooks_disabled(hf):
        handles = [modules[b].register_forward_hook(keep(b)) for b in left.copy()]
        try:
            hf(input_ids=ids, attention_mask=(position >= 0).long(), position_ids=position.clamp_min(0), use_cache=False)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _pooled(h: Tensor, position: Tensor, lengths: Tensor, pool: str) -> Tensor:
    """[B, D], float32 or wider, of the prompt's last token or the mean over its tokens but the first (BOS, where there is one).

    h [B, T, D]; lengths [B] tokens of the prompts.
    """
    last = position == lengths[:, None] - 1
    inside = (position > 0) & (position < lengths[:, None])
    where = last if pool == "last" else torch.where(inside.any(1, keepdim=True), inside, last)
    h = torch.where(where.unsqueeze(-1), h.to(torch.promote_types(torch.float32, h.dtype)), 0.0)  # padding may hold NaN
    return h.sum(1) / where.sum(1, keepdim=True)


def embed(hf: Any, family: Family, tokenizer: Any, ids: Tensor, position: Tensor, lengths: Tensor, how: Mapping[str, Any]) -> Tensor:
    """Unit vectors [B, D] of the prompts (the first ``lengths`` tokens of each row).

    how   ``encoder`` (a sentence encoder's name, or None), else ``block`` and ``pool`` of the base's own states
    """
    if how["encoder"] is not None:
        rows = zip(ids.tolist(), position.tolist(), lengths.tolist(), strict=True)
        prompts = [[t for t, p in zip(row, at, strict=True) if 0 <= p < n] for row, at, n in rows]
        return encode([tokenizer.decode(row, skip_special_tokens=True) for row in prompts], how["encoder"], ids.device)
    h = _pooled(states(hf, family, ids, position, [how["block"]])[how["block"]], position, lengths, how["pool"])
    return F.normalize(h, dim=-1)


@functools.cache
def _encoder(name: str) -> Any:
    """Loaded once a process: it is read only."""
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            f"encoder {name!r} needs the package sentence-transformers; pip install 'errata[encoder]', or leave encoder out: "
            "the model's own states serve then"
        ) from None
    try:
        return SentenceTransformer(name, device="cpu")
    except Exception as error:  # the library raises many kinds, also for no network
        raise ModelError(f"encoder {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def encode(texts: Sequence[str], name: str, device: torch.device) -> Tensor:
    """Unit vectors [B, D] of texts by a sentence encoder."""
    out: Tensor = _encoder(name).encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return F.normalize(out.to(device).float(), dim=-1)
