"""What was found where in a model, in plain words (`errata inspect`)."""

from __future__ import annotations

from errata.core.families import also_takes, is_linear, linear_sizes
from errata.core.model import LM
from errata.core.patch import POINTS, Site
from errata.core.roles import ranges
from errata.errors import ModelError


def describe(lm: LM) -> str:
    """A few lines: class, size, and the parts of every block."""
    f = lm.family
    total = sum(p.numel() for p in lm.hf.parameters())
    how = "known family" if f.found == "table" else "not in the table; parts found by structure and by trying"
    others = also_takes(lm.hf)
    norm = f.final_norm or lm.roles.final_norm or "no place that was found"
    return "\n".join(
        [
            f"{lm.name or type(lm.hf).__name__}: {type(lm.hf).__name__}, {f.name} ({how}), fingerprint {lm.fingerprint}",
            f"{total:,} parameters, {next(lm.hf.parameters()).dtype}, on {lm.device}",
            f"{lm.depth} blocks of width {lm.width} at {f.blocks}",
            *([f"takes {', '.join(others)} beside text: its language part is edited, the rest is left as it is"] if others else []),
            *_parts(lm),
            f"embedding at {f.embedding}, last norm at {norm}, vocabulary {int(lm.config.vocab_size):,}",
        ]
    )


def _parts(lm: LM) -> list[str]:
    """A line for all blocks of one make."""
    said: dict[str, list[int]] = {}
    for block, found in enumerate(points(lm)):
        if block in lm.family.idle:
            said.setdefault("runs beside an image only, so no patch attaches there", []).append(block)
            continue
        down, out = found["mlp_down"], found["attn_out"]
        keys = linear_sizes(lm.module(Site(block, "mlp_down")))[0] if down else 0
        mlp = f"MLP keys of size {keys} go through {down}" if down else f"no mlp_down ({lm.roles.missing(block, 'mlp_down')})"
        attention = f"attention writes through {out}" if out else f"no attn_out ({lm.roles.missing(block, 'attn_out')})"
        said.setdefault(f"{mlp}; {attention}", []).append(block)
    return [text if len(said) == 1 else f"block {ranges(own)}: {text}" for text, own in said.items()]


def points(lm: LM) -> list[dict[str, str | None]]:
    """Of each block the paths of the linears that have a name by their role; None where there is none."""

    def path(site: Site) -> str | None:
        try:
            return lm.linear_path(site)
        except ModelError:
            return None

    return [{point: path(Site(block, point)) for point in POINTS} for block in range(lm.depth)]


def linears(lm: LM) -> dict[tuple[str, int, int], list[int]]:
    """{(path, input size, output size): the blocks that have it} of every linear inside the blocks."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for number, block in enumerate(lm.blocks):
        for path, module in block.named_modules():
            if is_linear(module):
                found.setdefault((path, *linear_sizes(module)), []).append(number)
    return found
