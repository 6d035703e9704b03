"""Commands that look and change nothing: ``inspect``, ``patch show``, ``methods``, ``benchmarks``, ``almanac check``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, export, files, hub
from errata.commands.screen import Screen, finite

if TYPE_CHECKING:
    from errata.core.patch import Patch

QUICK = 20  # facts of each relation that `almanac check --quick` asks


def add(commands: common.Subparsers) -> None:
    common.parser(commands, "inspect", inspect, "show where a model's parts were found")
    common.parser(commands, "methods", methods, "list the editing methods and their hyper-parameters", model=False)
    common.parser(commands, "benchmarks", benchmarks, "list the benchmarks, their sources and licences", model=False)
    group = _group(commands, "patch", "look at patches, and write them for programs without errata")
    out = common.parser(group, "show", patch, "show what a patch edits and where it attaches", model=False)
    out.add_argument("folder", metavar="DIR", help="a patch folder")
    export.add(group)
    hub.add(group)
    check = _group(commands, "almanac", "the model in the package")
    out = common.parser(check, "check", almanac, "ask the almanac everything it should know", model=False)
    out.add_argument("--model", default="almanac", metavar="PATH", help="another model to ask (the one in the package)")
    out.add_argument("--quick", action="store_true", help=f"ask about {QUICK} facts of each relation")
    common.model_options(out)


def _group(commands: common.Subparsers, name: str, about: str) -> common.Subparsers:
    inner: common.Subparsers = common.subparser(commands, name, about).add_subparsers(
        metavar="COMMAND", required=True, dest=f"{name}_command"
    )
    return inner


def inspect(args: argparse.Namespace, screen: Screen) -> None:
    from errata.core.describe import describe, linears, points
    from errata.core.families import also_takes
    from errata.core.roles import ranges

    lm = common.load(args)
    there = linears(lm)
    screen.say(describe(lm))
    screen.say("Linears of the blocks, where patches can attach:")
    rows = [(path, f"{i:,}", f"{o:,}", ranges(blocks)) for (path, i, o), blocks in there.items()]
    screen.table(("path", "in", "out", "blocks"), rows)
    family = dataclasses.asdict(lm.family)
    screen.document(
        {
            "model": lm.name,
            "class": type(lm.hf).__name__,
            "fingerprint": lm.fingerprint,
            "parameters": sum(p.numel() for p in lm.hf.parameters()),
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "depth": lm.depth,
            "width": lm.width,
            "vocabulary": int(lm.config.vocab_size),
            "family": family,
            "also_takes": also_takes(lm.hf),
            "points": points(lm),
            "linears": [{"path": path, "in": i, "out": o, "blocks": blocks} for (path, i, o), blocks in there.items()],
        }
    )


def patch(args: argparse.Namespace, screen: Screen) -> None:
    """A patch, or every patch of a result of ``errata edit --out``."""
    found = files.load_patches([args.folder])
    for each in found:
        _tell(each, screen)
    screen.document(_patch(found[0]) if len(found) == 1 else {"patches": [_patch(each) for each in found]})


def _tell(found: Patch, screen: Screen) -> None:
    screen.say(found.describe())
    if found.replaces:
        screen.say(f"went on from (and replaces) {', '.join(found.replaces)}")
    screen.table(("setting", "value"), [(k, v) for k, v in found.settings.items()])
    if found.notes:
        screen.table(("note", "value"), [(k, v) for k, v in found.notes.items()])


def _patch(found: Patch) -> dict[str, Any]:
    return {
        "id": found.id,
        "method": found.method,
        "base": found.base,
        "parameters": found.parameters,
        "replaces": list(found.replaces),
        "settings": dict(found.settings),
        "notes": dict(found.notes),
        "ops": [
            {"kind": o.kind, "block": o.site.block, "point": o.site.point, "shapes": {k: list(t.shape) for k, t in o.tensors.items()}}
            for o in found.ops
        ],
        "requests": [r.to_dict() for r in found.requests],
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return None
    return list(value) if isinstance(value, tuple) else finite(value)


def methods(args: argparse.Namespace, screen: Screen) -> None:
    document = []
    for name in registry.names("method"):
        kind = registry.get("method", name)
        rows = [{"name": f.name, "type": str(f.type), "default": _default(f)} for f in dataclasses.fields(kind)]
        presets = {k: dict(v) for k, v in getattr(kind, "PRESETS", {}).items()}
        document.append({"name": name, "paper": kind.paper, "needs": sorted(kind.needs), "settings": rows, "presets": presets})
    screen.document({"methods": document})
    for row in document:
        screen.say(f"{row['name']}: {row['paper']}")
        if row["needs"]:
            screen.say(f"needs of a request: {', '.join(row['needs'])} (a ? marks what is used where given)")
        screen.table(
            ("setting", "type", "default"),
            [(s["name"], s["type"], "–" if s["default"] is None else repr(s["default"])) for s in row["settings"]],
        )
        if row["presets"]:
            screen.say(f"presets, by the model's name or by --set preset=NAME: {', '.join(row['presets'])}")
        screen.say()


def benchmarks(args: argparse.Namespace, screen: Screen) -> None:
    document = []
    for name in registry.names("benchmark"):
        kind = registry.get("benchmark", name)
        forms = [form.name for form in getattr(kind, "forms", ())]
        row = {key: getattr(kind, key) for key in ("kind", "version", "source", "licence", "citation")}
        document.append(
            {
                "name": name,
                **row,
                "probes": list(getattr(kind, "probes", ())),
                "splits": list(kind.splits),
                "forms": forms,
                "needs_data": kind.needs_data,
            }
        )
    screen.document({"benchmarks": document})
    for row in document:
        screen.say(f"{row['name']} ({row['kind']}{', needs --data' if row['needs_data'] else ', in the package'}): {row['source']}")
        if row["probes"]:
            screen.say(f"  probes: {', '.join(row['probes'])}")
        screen.say(f"  {row['citation']}. Licence: {row['licence']}.")


def almanac(args: argparse.Namespace, screen: Screen) -> None:
    from errata.almanac import check

    lm = common.load(args)
    with screen.progress() as progress:
        result = check.check(lm, QUICK if args.quick else None, lambda done, total: progress("asking", done, total))
    screen.document(result)
    screen.say(check.text(result).rstrip("\n"))
