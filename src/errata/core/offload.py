"""Models whose weights lie elsewhere between calls: accelerate keeps them on CPU or disk and leaves *meta* tensors in their place.

errata reads no weight to run a patch; it needs to know only where such a model computes, and a few values for its fingerprint.
Everything is read off the hooks that accelerate leaves on the modules, so that accelerate is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _hooks(module: Any) -> tuple[Any, ...]:
    """accelerate's hooks on one module; several stand in a sequence."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


def device(hf: Any) -> torch.device:
    """Where inputs belong and patches compute: at the embedding, or where it is brought for a call."""
    module = hf.get_input_embeddings()
    found: torch.device = module.weight.device
    if found.type == "meta":
        for hook in _hooks(module):
            where = getattr(hook, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return found


def parameters(hf: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by name, with its values wherever they are kept (read one at a time); on meta only where nobody keeps them."""
    for name, p in sorted(hf.named_parameters(), key=lambda item: item[0]):
        if p.device.type != "meta":
            yield name, p
        elif name not in tied_weights_keys(hf):  # moving a shared weight to meta has made two parameters of one
            owner, _, leaf = name.rpartition(".")
            maps = [hook.weights_map for hook in _hooks(hf.get_submodule(owner)) if getattr(hook, "weights_map", None) is not None]
            yield name, maps[0][leaf] if maps else p


def tied_weights_keys(hf: Any) -> frozenset[str]:
    """Names that transformers fills from another parameter."""
    if hasattr(hf, "all_tied_weights_keys"):  # transformers 5; knows the config
        return frozenset(hf.all_tied_weights_keys)
    return frozenset(getattr(hf, "_tied_weights_keys", None) or ()) if getattr(hf.config, "tie_word_embeddings", False) else frozenset()
