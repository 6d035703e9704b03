"""Names of base models: which one a patch was made for."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from errata.core import offload


def fingerprint(hf: Any) -> str:
    """16 hex digits from every parameter's name and shape and up to 64 of its values, rounded to bfloat16 so that the dtype
    it was loaded in does not matter.  Parameters whose values nobody holds (meta) count by name and shape."""
    digest = hashlib.sha256(str(hf.config.model_type).encode())
    for name, p in offload.parameters(hf):
        digest.update(f"{name}{tuple(p.shape)}".encode())
        if p.device.type != "meta":
            flat = p.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
