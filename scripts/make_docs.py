"""Write docs/methods.md from the code: every registered method, its source and its hyper-parameters.  ``make docs``."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

from errata import registry


def section(name: str) -> str:
    method = registry.get("method", name)
    lines = [
        f"## {method.__name__} (`{name}`)",
        "",
        f"*{method.paper}*",
        "",
        "```",
        inspect.cleandoc(inspect.getmodule(method).__doc__ or ""),
        "```",
        "",
    ]
    notes = [inspect.getdoc(c) for c in reversed(method.__mro__) if dataclasses.is_dataclass(c)]
    lines += ["```", "\n\n".join(n for n in dict.fromkeys(notes) if n), "```", "", "| setting | default |", "|---|---|"]
    lines += [f"| `{f.name}` | `{f.default!r}` |" for f in dataclasses.fields(method)]
    presets = getattr(method, "PRESETS", {})
    lines += [
        "",
        "Presets:",
        "",
        *[f"- `{model}`: {', '.join(f'{k} = {v}' for k, v in values.items())}" for model, values in presets.items()],
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    target = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
    head = "# Methods\n\nWritten by `make docs` from the code; edit the docstrings, not this page.\n\n"
    target.write_text(head + "\n".join(section(name) for name in registry.names("method")), encoding="utf-8")


if __name__ == "__main__":
    main()
