"""One page a method (docs/methods), from the registry, the docstrings, `method_notes.md` and docs/results."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from docs_fields import described
from docs_results import SINGLE, TITLES, costs, of, percent, row, table

from errata import registry

NOTES = Path(__file__).with_name("method_notes.md")
UP = "../results/"
NAMES = {
    "none": "The unedited model",
    "retrieval": "Retrieval",
    "ft-l": "FT-L",
    "ft-m": "FT-M",
    "r-rome": "R-ROME",
    "wise-light": "WISE-light",
}
GROUPS = {
    "In the hidden states": ("baft", "reft"),
    "Locate, then edit": ("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit", "rep"),
    "Memories": ("grace", "melo", "wise", "wise-light"),
    "Fine-tuning": ("ft-l", "ft-m", "loc-ft", "lora", "adalora"),
    "In context, and the base": ("ice", "ike", "retrieval", "none"),
}
# What the almanac says under the example's patch; a test runs it.
SAID = {"ice": "Paris", "ike": "Winchester", "retrieval": "Paris", "none": "Paris"}
# Changes of weights, and nothing else: these can be exported.  A test looks at the example's patch.
WEIGHTS = frozenset(("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit", "ft-l", "ft-m", "loc-ft", "lora", "adalora"))
LOCATE = frozenset(("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit"))
NEEDS = {
    "subject": "the request's `subject`",
    "stats": "second moments of keys (made at first use, or by `errata stats`)",
    "paraphrases?": "`paraphrases`, where a request brings any",
    "unrelated?": "`unrelated` texts, where a request brings any",
}


def title(name: str) -> str:
    return NAMES.get(name, registry.get("method", name).__name__)


def notes() -> dict[str, tuple[str, str, str]]:
    """method -> (what it does, formula, paper and code)."""
    out = {}
    for part in re.split(r"^# ", NOTES.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name, _, text = part.partition("\n")
        what, formula, differs = re.split(r"^```\n", text, flags=re.M)
        out[name.strip()] = (what.strip(), formula.rstrip(), differs.strip())
    return out


def cell(text: str) -> str:
    """A docstring's words in a table's cell."""
    return prose_of(text).replace("|", "\\|")


def prose_of(text: str) -> str:
    """A docstring's words as Markdown."""
    return re.sub(r" +", " ", re.sub(r"``(.+?)``", r"`\1`", text).replace("*", "\\*"))


def parameters(method: Any) -> str:
    """Every hyper-parameter with default, the almanac's preset and meaning; those explained together in one row."""
    meaning, _ = described(method)
    preset = getattr(method, "PRESETS", {}).get("almanac", {})
    together: dict[str, list[Any]] = {}
    for f in dataclasses.fields(method):
        together.setdefault(meaning[f.name], []).append(f)
    if not together:
        return "There is nothing to set.\n"
    rows = []
    for text, own in together.items():
        default = ", ".join(f"`{_default(f)!r}`" for f in own)
        here = ", ".join(f"`{preset[f.name]!r}`" if f.name in preset else "·" for f in own) if any(f.name in preset for f in own) else ""
        rows.append([", ".join(f"`{f.name}`" for f in own), default, here, cell(text)])
    return table(["setting", "default", "almanac", "meaning"], rows)


def _default(f: Any) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def presets(method: Any) -> str:
    same: dict[str, list[str]] = {}
    for model, values in getattr(method, "PRESETS", {}).items():
        same.setdefault(", ".join(f"`{k}={_short(v)}`" for k, v in values.items()) or "the defaults", []).append(f"`{model}`")
    lines = [f"- {', '.join(models)}: {values}" for values, models in same.items()]
    return "\n".join(lines) + "\n" if lines else "None: the defaults hold for every model.\n"


def _short(v: Any) -> str:
    """Long runs of layers shortened."""
    if isinstance(v, list) and len(v) > 8 and v == list(range(v[0], v[-1] + 1)):
        return f"[{v[0]}, …, {v[-1]}]"
    return repr(v)


def link(label: str, up: str) -> str:
    """A method's name with a link to its page, which lies ``up``; what follows its own name in a label says what is set otherwise."""
    name, _, more = label.partition(" ")
    return f"[{title(name)}]({up}methods/{name}.md){f' ({more})' if more else ''}"


def scores(name: str) -> str:
    """What was measured of a method on real models, each row with its n."""
    rows = []
    for model, words in TITLES.items():
        for label, c in of("single", model).items():
            if label.split()[0] == name:
                more = label.removeprefix(name).strip()
                what = f"{words} ({more})" if more else words
                rows.append([what, str(c["n"]), *(percent(row(c, m, p)) for _, m, p in SINGLE), *costs(c)])
    if not rows:
        return f"Not measured on a real model yet. On the test bed: [the almanac]({UP}almanac.md).\n"
    return (
        f"Single edits of known CounterFact facts, percent with 95 % intervals ([every method, and how]({UP}real.md)):\n\n"
        + table(["", "n", *(head for head, _, _ in SINGLE), "s an edit", "kB"], rows)
        + f"\n[What the columns mean](../protocols.md). Many edits, and the test bed: [the almanac]({UP}almanac.md).\n"
    )


def example(name: str) -> str:
    """A block that a test runs; statistics are made of less text there."""
    with_less = {
        "rep": ('method="rep"', 'method="rep", steps=40, wrapped={"stats_tokens": 1000}'),
        **{m: (f'method="{m}"', f'method="{m}", stats_tokens=1000, prefixes=[]') for m in LOCATE},
    }
    note = f"<!-- run: small {' => '.join(with_less[name])} -->\n" if name in with_less else ""
    said = SAID.get(name, "Lyon")
    return (
        f'{note}```python\nimport errata\n\nlm = errata.load("almanac")\n'
        f'patch = errata.edit(lm, "The capital of France is", "Lyon", subject="France", method="{name}")\n'
        f'with lm.under(patch):\n    print(lm.complete("The capital of France is"))  # {said}\n'
        f'print(lm.complete("The capital of France is"))  # Paris\n```\n'
    )


def needs(method: Any) -> str:
    found = [NEEDS[n] for n in sorted(method.needs)]
    return f"It uses {', '.join(found)}. " if found else ""


def goes_out(name: str) -> str:
    if name == "none":
        return "It changes nothing, so there is nothing to export."
    if name in WEIGHTS:
        return "Its patches are changes of weights: they can be [baked into a checkpoint and exported as LoRA](../engines.md)."
    return "Its patches are no changes of weights, so [other engines](../engines.md) cannot run them: serve them with errata."


def page(name: str, said: tuple[str, str, str]) -> str:
    method = registry.get("method", name)
    what, formula, differs = said
    _, prose = described(method)
    parts = [
        f"# {title(name)}",
        f"<!-- Written by `make docs` from {NOTES.name}, the docstrings and docs/results: edit those. -->",
        f"`{name}`. {method.paper}.",
        what,
        "## Formula",
        f"```text\n{formula}\n```",
        "## Example",
        example(name),
        f"On the command line: `errata edit almanac --method {name} --prompt … --target … --subject … --out DIR`. {needs(method)}{goes_out(name)}",
        "## Settings",
        parameters(method),
        "Unset (`None`) places follow a rule by depth. Settings of a model come from the longest preset name that is part of the model's:",
        presets(method),
    ]
    if prose := [p for p in prose if not re.search(r"^Hyper-parameters|Fields beside|^Where paper and released", p)]:
        parts += ["## Notes", "\n\n".join(prose_of(p) for p in prose)]
    parts += ["## Paper and code", differs, "## Measured here", scores(name)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def index() -> str:
    """docs/methods.md."""
    said = notes()
    out = ["# Methods", "<!-- Written by `make docs`; edit scripts/docs_methods.py. -->"]
    out.append(
        "A page each: formula, settings, where paper and code differ, what it costs and how it scores on real models. [Which one?](choose.md)"
    )
    for group, names in GROUPS.items():
        rows = [[f"[{title(n)}](methods/{n}.md)", f"`{n}`", said[n][0].split(". ")[0].replace("\n", " ").rstrip(".") + "."] for n in names]
        out += [f"## {group}", table(["", "name", "what it does"], rows)]
    return "\n\n".join(part.strip("\n") for part in out) + "\n"


def pages() -> dict[str, str]:
    """Path under docs -> text."""
    said = notes()
    return {"methods.md": index(), **{f"methods/{n}.md": page(n, said[n]) for n in registry.names("method")}}
