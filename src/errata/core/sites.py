"""Sites of a model: which of its blocks a text runs, and the sizes of what goes into and comes out of a site."""

from __future__ import annotations

from typing import Any

from torch import nn

from errata.core import experts
from errata.core.families import is_linear, linear_sizes
from errata.core.patch import PROMPT, Site
from errata.errors import ModelError, PatchError


def check_block(lm: Any, block: int) -> None:
    """`PatchError` for a block that does not exist, or that no text runs, so that an edit there would do nothing."""
    if not 0 <= block < lm.depth:
        raise PatchError(f"block {block} does not exist (0 to {lm.depth - 1})")
    if block in lm.family.idle:
        raise PatchError(f"block {block} runs beside an image only, not for text (the nearest that does is {lm.nearest_block(block)})")


def site_sizes(lm: Any, site: Site) -> tuple[int, int]:
    """See `errata.core.model.LM.check_site`."""
    if site == PROMPT:
        return lm.width, lm.width
    check_block(lm, site.block)
    if site.point == "block":
        return lm.width, lm.width
    try:
        module = lm.module(site)
        if site.point == experts.POINT:
            count, inner, outer = experts.sizes(module)
            return count * inner, outer
    except ModelError as error:
        raise PatchError(str(error)) from None
    except (AttributeError, TypeError, LookupError):  # also where a part of the path is no list, or a short one
        module = None
    if not isinstance(module, nn.Module) or not is_linear(module):
        raise PatchError(f"block {site.block} has no linear {site.point!r}; `errata inspect` lists what there is")
    return linear_sizes(module)
