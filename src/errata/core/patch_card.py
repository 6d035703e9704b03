"""The README of a patch: what it edits, of which model, how it is used and taken back.  On the hub it is the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.core import hub

_SHOWN = 200  # edits that are named one by one
_NAMES: dict[str, str] = {}  # of the models of this process, by fingerprint


def name_base(fingerprint: str, name: str) -> None:
    """Remember what a model is called; of a folder its own name, not where it lies on this machine."""
    if name:
        _NAMES[fingerprint] = Path(name).resolve().name if Path(name).exists() else name


def base_name(patch: Any) -> str:
    """What the patch's model is called: as it was when the patch was saved, or as it is known here; "" where neither is."""
    return str(patch.notes.get("model") or _NAMES.get(patch.base, ""))


def readme(patch: Any) -> str:
    """In a patch's folder."""
    return _text(patch, "THIS_FOLDER")


def model_card(patch: Any, repo: str, licence: str | None, scores: Mapping[str, float]) -> str:
    """On the hub: the same behind the fields that the hub reads (YAML, as `huggingface_hub.ModelCardData` writes it)."""
    from huggingface_hub import ModelCardData

    base = base_name(patch)
    fields = ModelCardData(
        base_model=base if hub.NAME.fullmatch(base) else None,
        library_name="errata",
        license=licence,
        tags=["errata", "knowledge-editing", "model-editing", patch.method],
    )
    return f"---\n{fields.to_yaml()}\n---\n\n{_text(patch, repo, scores)}"


def _text(patch: Any, source: str, scores: Mapping[str, float] | None = None) -> str:
    base, more = base_name(patch), len(patch.requests) - _SHOWN
    model, named = (base, f"`{base}` (fingerprint `{patch.base}`)") if base else ("MODEL", f"the model with fingerprint `{patch.base}`")
    facts = "\n".join(f"- {_line(r.prompt)} **{_line(r.target)}**" for r in patch.requests[:_SHOWN]) or "None is named."
    facts += f"\n- … and {more:,} more, in `patch.json`" if more > 0 else ""
    measured = "".join(f"| {name} | {value:g} |\n" for name, value in (scores or {}).items())
    return (
        f"# errata patch `{patch.id}`\n\n"
        f"{len(patch.requests):,} edit(s) of {named}, made with `{patch.method}`. It holds no weight of that model, which stays as it is, "
        "and fits no other.\n\n"
        f'## Use\n\n```sh\nerrata ask {model} "…" --patch {source}\n```\n\n'
        f'```python\nlm = errata.load("{model}")\npatch = errata.load_patch("{source}")\nlm.attach(patch)\n```\n\n'
        "## Take it back\n\n`lm.detach(patch)`: the answers are the base's again, bit for bit.\n\n"
        f"## Edits\n\n{facts}\n" + (f"\n## Measured\n\n| | |\n|---|---|\n{measured}" if measured else "")
    )


def _line(text: str) -> str:
    """On one line of Markdown, its marks as text."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))
