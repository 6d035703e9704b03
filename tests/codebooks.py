"""What a book of keys is asked, made by hand."""

from __future__ import annotations

import torch

from errata.core.tokens import Encoded
from errata.methods.codebook.store import KeyedText


def text(key: torch.Tensor, *label: int, request: int = 0) -> KeyedText:
    """A text of two tokens and its label, read at ``key``."""
    return KeyedText(request, Encoded((1, 2, *label), 2), key, 10 * key[:3])
