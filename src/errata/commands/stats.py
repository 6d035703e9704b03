"""``errata stats``: second moments of MLP keys, which the locate-then-edit methods need, from any text."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from errata import registry, storage
from errata.commands import common
from errata.commands.screen import Screen
from errata.errors import ConfigError, PatchError

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.text.statistics import Moments

_THRESHOLD = 2e-2  # AlphaEdit's


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "stats", run, "read a text once and keep the second moments of MLP keys, which rome and its kin need")
    out.add_argument("--text", default="bundled", metavar="SOURCE", help="bundled, a .txt or .jsonl file, a folder, or hub:NAME (bundled)")
    out.add_argument("--tokens", type=common.positive, default=100_000, metavar="N", help="tokens to read (100000)")
    out.add_argument("--layers", metavar="A,B,…", help="blocks; without it those that the methods edit in this model")
    out.add_argument("--batch-tokens", type=common.positive, default=4096, metavar="N", help="tokens at once: a cap on memory (4096)")
    out.add_argument("--threshold", type=float, default=_THRESHOLD, help="eigenvalues below it count as AlphaEdit's null space (0.02)")


def _numbers(layers: str | None) -> list[int] | None:
    """The blocks that were asked for; None where none were."""
    try:
        return layers if layers is None else sorted({int(part) for part in layers.split(",")})
    except ValueError:
        raise ConfigError(f"--layers {layers!r}: write block numbers with commas, like 4,5,6") from None


def _blocks(lm: LM, asked: list[int] | None) -> list[int]:
    """The blocks asked for, which must exist; without any those that the methods edit in this model."""
    if asked is None:
        from errata.methods.locate.editor import LocateEditor

        kinds = [registry.get("method", name) for name in registry.names("method")]
        return sorted({b for kind in kinds if issubclass(kind, LocateEditor) for b in kind.for_model(lm).target_layers(lm)})
    from errata.core.sites import check_block

    try:
        for block in asked:
            check_block(lm, block)
    except PatchError as error:
        raise ConfigError(f"--layers: {error}") from None
    return asked


def run(args: argparse.Namespace, screen: Screen) -> None:
    from errata.text.corpora import open_corpus

    asked, text = _numbers(args.layers), open_corpus(args.text)
    lm = common.load(args)
    from errata.text.statistics import moments

    sites = [lm.mlp_site(b) for b in _blocks(lm, asked)]
    began = time.perf_counter()
    with screen.progress() as progress:
        found = moments(
            lm, sites, text, tokens=args.tokens, batch_tokens=args.batch_tokens, progress=lambda done, of: progress("tokens", done, of)
        )
    rows = [_row(found[site], args.threshold) for site in sites]
    seconds = round(time.perf_counter() - began, 3)
    folder = str(storage.cache_folder() / "stats")
    about = {"model": lm.name, "base": lm.fingerprint, "text": args.text, "threshold": args.threshold}
    screen.document({**about, "blocks": rows, "folder": folder, "seconds": seconds})
    screen.table(
        ("block", "tokens", "key size", "mean square", "smallest", "median", "largest", "null space"),
        [_cells(r) for r in rows],
        right=(0, -1),
    )
    screen.say(f"Null space: directions with an eigenvalue below {args.threshold:g}. Kept in {folder}; {seconds:.1f} s.")


def _row(m: Moments, threshold: float) -> dict[str, Any]:
    values = m.eigen()[0].flatten().sort().values
    return {
        "block": m.site.block,
        "tokens": m.tokens,
        "size": len(values),
        "mean": float(values.mean()),
        "smallest": float(values[0]),
        "median": float(values[len(values) // 2]),
        "largest": float(values[-1]),
        "null_share": sum(u.shape[1] for u in m.null_spaces(threshold)) / len(values),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = (f"{row[k]:.3g}" for k in ("mean", "smallest", "median", "largest"))
    return (str(row["block"]), f"{row['tokens']:,}", f"{row['size']:,}", *spread, f"{row['null_share']:.1%}")
