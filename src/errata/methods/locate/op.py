"""The op that a value runs as while it is optimised; what is kept of an edit is ``low_rank`` or ``dense`` (`errata.core.weights`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errata.core.patch import OpContext, Site


class Shift:
    """Registered as ``shift``: adds ``delta`` [B, D] to the output at the one position ``at`` [B] of each row."""

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor:
        here = context.position == p["at"][:, None]
        return y + here.unsqueeze(-1) * p["delta"].unsqueeze(1).to(y.dtype)
