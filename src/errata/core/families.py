"""Where each Hugging Face architecture keeps its parts: one row a family, and a structural search for the rest.

The rows are data, in ``families.json`` beside this file: the paths of a family's parts, and what was verified on it (by
``scripts/verify_families.py``).  A path is dotted, from the causal-LM object.  Inside a block, ``mlp_down`` and ``attn_out`` are the
two linears that write to the residual stream.  To support a family by name, add a row with its paths; a family without is searched.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from errata.errors import ModelError

FILE = Path(__file__).with_name("families.json")


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of the parts; ``found`` says whether they come from the table or from the search."""

    name: str
    blocks: str
    mlp_down: str
    attn_out: str
    embedding: str
    final_norm: str
    found: str = "table"

    def linear_path(self, point: str) -> str:
        """Path inside a block of the linear named by a site's point (``mlp_down``, ``attn_out``, or a path itself)."""
        return {"mlp_down": self.mlp_down, "attn_out": self.attn_out}.get(point, point)


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
    """The hidden states in what a module gives back; blocks of some families give a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def text_config(config: Any) -> Any:
    """The language part of a (possibly multi-modal) config."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find(hf: nn.Module) -> Family:
    """The family of a model, from the table or by its structure; `ModelError` with what was looked for."""
    model_type = str(hf.config.model_type)  # type: ignore[union-attr]
    paths = rows().get(model_type, {}).get("paths")
    if paths is not None:
        family = Family(model_type, **paths)
        try:
            for path in (family.blocks, family.embedding, family.final_norm):
                resolve(hf, path)
            return family
        except AttributeError:
            pass  # a class that shares the model_type but not the layout: search it
    return search(hf, model_type)


def search(hf: nn.Module, name: str) -> Family:
    """Find the parts by shape: the one list of blocks, the linears in it that write ``hidden_size``."""
    config = text_config(hf.config)
    depth, width = config.num_hidden_layers, config.hidden_size
    lists = [(path, m) for path, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ModelError(
            f"{name}: found {len(lists)} lists of {depth} blocks, need exactly one; add a row to errata/core/families.json "
            "with the paths of the blocks, the two output linears, the embedding and the last norm"
        )
    blocks, modules = lists[0]
    down = _writer(modules[0], width, r"mlp|ffn|feed_forward|fc")
    out = _writer(modules[0], width, r"attn|attention")
    embedding_module = hf.get_input_embeddings()  # type: ignore[operator]
    embedding = next((path for path, m in hf.named_modules() if m is embedding_module), None)
    parent = blocks.rpartition(".")[0]
    norms = [path for path, m in hf.named_modules() if path.startswith(parent + ".") and not path.startswith(blocks + ".") and _is_norm(m)]
    if down is None or out is None or embedding is None or not norms:
        raise ModelError(
            f"{name}: blocks are at {blocks}, "
            "but an output linear, the embedding or the last norm was not recognised; add a row to errata/core/families.json"
        )
    return Family(name, blocks, down, out, embedding, norms[-1], found="search")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _writer(block: nn.Module, width: int, pattern: str) -> str | None:
    """Path of the last linear under a matching name whose output is as wide as the residual stream."""
    hits = [p for p, m in block.named_modules() if re.search(pattern, p) and is_linear(m) and linear_sizes(m)[1] == width]
    return hits[-1] if hits else None


def is_linear(module: nn.Module) -> bool:
    """Linear-like: torch's Linear, GPT-2's Conv1D, and quantised stand-ins that keep in_features/out_features."""
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(input size, output size)."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(rows), int(columns)
