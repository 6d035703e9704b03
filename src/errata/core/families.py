"""Where each Hugging Face architecture keeps its parts: one row a family, and a structural search for the rest.

The rows are data, in ``families.json`` beside this file: the paths of a family's parts, and what was verified on it (by
``scripts/verify_families.py``).  A path is dotted, from the causal-LM object.  Inside a block, ``mlp_down`` and ``attn_out`` are the
two linears that write to the residual stream.  To support a family by name, add a row with its paths; a family without is searched.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errata.core import offload
from errata.core.forward import hooks_disabled
from errata.errors import ModelError

FILE = Path(__file__).with_name("families.json")
_TAKEN = {"images": r"\b(image_)?pixel_values\b|image_patches", "video": r"video", "sound": r"audio|input_(features|values)\b"}
_AHEAD = 0.02  # of the difference between two texts: what rounding may make of their beginnings, which are the same, in half precision


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of the parts; ``found`` says whether they come from the table or from the search.

    ``mlp_down`` and ``attn_out`` are paths inside a block; a block may lack what is named.  None: found by trying (`errata.core.roles`).
    ``idle``: blocks that text alone does not run (Mllama's, which look at an image).
    """

    name: str
    blocks: str
    mlp_down: str | None
    attn_out: str | None
    embedding: str
    final_norm: str | None
    found: str = "table"
    idle: tuple[int, ...] = ()


@functools.cache
def rows() -> dict[str, dict[str, Any]]:
    """model_type -> its row: ``paths`` of the parts (None where the search finds them) and what was ``verified``."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["families"]
    return found


def resolve(root: Any, path: str) -> Any:
    """The module behind a dotted path; AttributeError when there is none."""
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


def hidden_of(output: Any) -> Any:
    """The hidden states in what a module gives back; blocks of some families give a tuple, or a list, that begins with them."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """What a module gave back, with other hidden states in it."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden


def by_row(states: Any, rows: int, tokens: int | None, site: Any) -> Any:
    """States as [B, T, ·] (``tokens`` None: whatever T is); some linears are given the tokens of all rows in one, [B·T, ·] (OPT).

    `ModelError` for what is neither: an expert of a list sees some tokens only, blocks of Gemma 3n hand on several states a token.
    """
    shape = tuple(states.shape)
    if len(shape) == 2 and shape[0] % rows == 0 and tokens in (None, shape[0] // rows):
        return states.reshape(rows, -1, shape[1])
    if len(shape) != 3 or shape[0] != rows or tokens not in (None, shape[1]):
        asked = f"[{rows}, {'T' if tokens is None else tokens}, ·]"
        where = f"states at block {site.block} ({site.point}) have shape {list(shape)}, not {asked}"
        raise ModelError(f"{where}, so nothing can be edited there; choose another place")
    return states


def text_config(config: Any) -> Any:
    """The language part of a (possibly multi-modal) config."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def also_takes(hf: Any) -> list[str]:
    """What the model takes beside text, by the arguments of its call."""
    names = " ".join(inspect.signature(type(hf).forward).parameters)
    return [what for what, pattern in _TAKEN.items() if re.search(pattern, names)]


def find(hf: nn.Module) -> Family:
    """The family of a model, from the table or by its structure; `ModelError` with what was looked for."""
    model_type = str(hf.config.model_type)  # type: ignore[union-attr]
    paths = rows().get(model_type, {}).get("paths")
    if paths is not None:
        family = Family(model_type, **paths)
        try:
            for path in (family.blocks, family.embedding):
                resolve(hf, path)
            return family
        except AttributeError:
            pass  # a class that shares the model_type but not the layout: search it
    return search(hf, model_type)


def search(hf: nn.Module, name: str) -> Family:
    """Find the one list of blocks and the embedding; the parts of a block are found by trying, where a method asks for them.

    Of several lists those count that run for text alone: blocks that look at an image do not.
    """
    depth = text_config(hf.config).num_hidden_layers
    lists = [path for path, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth and _holds_linears(m)]
    ran: dict[str, set[int]] = {}
    if len(lists) > 1 or text_config(hf.config) is not hf.config or also_takes(hf):
        ran = _run_by_text(hf, name, lists)
        lists = [path for path in lists if path in ran]
    if len(lists) != 1:
        which = f" ({', '.join(lists)})" if lists else ""
        raise ModelError(
            f"{name}: found {len(lists)} lists of {depth} blocks{which}, need exactly one; add a row to errata/core/families.json "
            "with the paths of the blocks, the two output linears, the embedding and the last norm"
        )
    embedding_module = hf.get_input_embeddings()  # type: ignore[operator]
    embedding = next((path for path, m in hf.named_modules() if m is embedding_module), "")
    idle = tuple(sorted(set(range(depth)) - ran[lists[0]])) if ran else ()
    return Family(name, lists[0], None, None, embedding, None, found="search", idle=idle)


@torch.no_grad()
def _run_by_text(hf: nn.Module, name: str, lists: Sequence[str]) -> dict[str, set[int]]:
    """Of each list that runs for text alone the modules that do; `ModelError` where none can, or where a text is read ahead.

    Two texts that begin alike are run: what the model says at the beginning may not depend on what comes after (PaliGemma's prompts do).
    """
    ran: dict[str, set[int]] = {}
    with hooks_disabled(hf), ExitStack() as exits:
        for path in lists:
            for number, module in enumerate(resolve(hf, path)):
                hook = module.register_forward_pre_hook(lambda *_, path=path, number=number: ran.setdefault(path, set()).add(number))
                exits.callback(hook.remove)
        try:
            ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 6, 5, 4, 3]], device=offload.device(hf))
            found = [hf(input_ids=row[None], use_cache=False).logits[0] for row in ids]
        except Exception as error:  # a model that asks for more than text, in its own words
            raise ModelError(f"{name}: does not run for text alone, so it cannot be edited ({_first_line(error)})") from error
    moved = (found[0] - found[1]).abs()
    if bool(moved[:2].max() > min(_AHEAD, 100 * torch.finfo(moved.dtype).eps) * moved.max()):
        raise ModelError(
            f"{name}: what it says of a text's beginning depends on what follows (a prefix language model), and errata edits models that "
            "read a text from left to right; take such a one"
        )
    return ran


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _holds_linears(blocks: nn.ModuleList) -> bool:
    """Whether every element holds linears; a list of linears is no list of blocks (Gemma 3n's projections, as many as there are planes)."""
    return all(any(is_linear(m) for m in block.modules()) and not is_linear(block) for block in blocks)


def has_linear(block: nn.Module, path: str) -> bool:
    """Whether the block has a linear at this path."""
    try:
        return is_linear(resolve(block, path))
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def is_linear(module: nn.Module) -> bool:
    """Linear-like: torch's Linear, GPT-2's Conv1D, and quantised stand-ins that keep in_features/out_features."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(input size, output size)."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)
