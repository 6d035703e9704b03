"""What a base may be: a model itself, whose parts are its own and whose calls run the hooks that stand on it now."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from errata.errors import EditWarning, ModelError


def check_bare(hf: Any) -> None:
    """`ModelError` for what is wrapped around a model, or stands inside it, so that an edit would be read or run where it is not.

    Also tells `torch.compile` to look at hooks: by itself it goes on as it was compiled, and a patch that is attached later has no effect.
    """
    if hasattr(hf, "_orig_mod"):
        raise ModelError("this is a compiled model; load the model itself, and compile `lm.hf` then: it follows what is attached")
    if isinstance(getattr(hf, "module", None), nn.Module):
        kind = type(hf).__name__
        raise ModelError(f"this is a {kind} around a model; load the model itself (`.module`), on one device or by a device_map")
    if hasattr(hf, "peft_config") or hasattr(hf, "get_base_model") or getattr(hf, "_hf_peft_config_loaded", False):
        raise ModelError(
            "this model carries adapters, which are no part of its base; put them into its weights (`merge_and_unload()`), or take them "
            "off, and load the result"
        )
    import torch._dynamo as dynamo  # transformers has loaded it

    dynamo.config.skip_nnmodule_hook_guards = False
    dynamo.reset()  # what was compiled before did not look


def tell_on_saving(hf: Any, patched: bool) -> None:
    """While patches are attached, the model's own ``save_pretrained`` warns that it saves the base."""
    vars(hf).pop("save_pretrained", None)
    if not patched or not hasattr(hf, "save_pretrained"):
        return
    own = hf.save_pretrained

    @functools.wraps(own)
    def save(*args: Any, **how: Any) -> Any:
        warnings.warn(
            "save_pretrained saves the base; the patches that are attached are not in it.  `errata.export.bake` writes the "
            "edited weights where a patch changes weights, `Patch.save` a patch",
            EditWarning,
            stacklevel=2,
        )
        return own(*args, **how)

    hf.save_pretrained = save
