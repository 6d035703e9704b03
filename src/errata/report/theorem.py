"""BaFT's Theorem 2.3 as an image file: how far unrelated states are moved, over their distance from the edited one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.report import figures


def draw(points: Sequence[Mapping[str, Any]], facts: Mapping[str, float], paths: Sequence[str | Path]) -> None:
    """ReFT's and BaFT's states, the line below which no linear edit can stay, and the radius of each state's own ball."""
    made, (axes,) = figures.figure(6.4, 4.4)
    x = [p["distance"] for p in points]
    top = 1.45 * max(*(p["reft"] for p in points), facts["shift"])
    least = facts["shift"] - (facts["eps_t"] / facts["eps_0"] + 1) * x[0]
    crossing = facts["shift"] / (facts["eps_t"] / facts["eps_0"] + 1)
    axes.fill_between(
        [x[0], crossing], [0, 0], [max(0.0, least), 0], color="#999999", alpha=0.3, linewidth=0, label="no linear edit lies here"
    )
    axes.plot(
        [facts["eps_0"], x[-1]], [0, x[-1] - facts["eps_0"]], color="black", linewidth=1, linestyle="--", label="radius of its own ball"
    )
    axes.plot(x, [p["reft"] for p in points], color="#d55e00", marker="s", markersize=4, linestyle="none", label="ReFT (linear)")
    axes.plot(x, [p["baft"] for p in points], color="#0072b2", marker="o", markersize=4, linestyle="none", label="BaFT (gated)")
    if facts["eps_ir below"] > 0:
        reach = facts["eps_0"] + facts["eps_ir below"]
        axes.axvline(reach, color="black", linewidth=0.8, linestyle=":", label="the theorem: nearer ones leave their ball")
    axes.set_xlim(0, 1.02 * x[-1])
    axes.set_ylim(-0.03 * top, top)
    axes.set_xlabel("distance of an unrelated state from the edited one, ‖h − h₀‖")
    axes.set_ylabel("moved by the edit, ‖Φ(h) − h‖")
    axes.set_title(f"d = {facts['width']:g}, rank {facts['rank']:g}, ε₀ = {facts['eps_0']:g}, ε_t = {facts['eps_t']:.2f}", fontsize=10)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=7, loc="upper right")
    figures.save(made, paths)
