"""Theorem 2.3: its inequalities hold for what was trained and for any affine map, and the command draws it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import leftovers

from errata.analyse import theorem
from errata.cli import main
from errata.errors import ConfigError


@pytest.fixture(scope="module")
def shown() -> theorem.Shown:
    return theorem.demonstrate(seed=3, steps=250)


def test_the_bounds_hold_for_the_trained_reft(shown: theorem.Shown) -> None:
    f = shown.facts
    assert f["sigma(H)"] <= f["eps_t"] / f["eps_0"] + 1 + 1e-9
    assert all(p["reft"] >= p["bound"] - 1e-9 for p in shown.points)
    assert f["eps_ir below"] > 0
    near = [p for p in shown.points if p["distance"] - f["eps_0"] < f["eps_ir below"]]
    assert near and all(p["reft leaves"] for p in near)


def test_the_gated_edit_does_both_and_the_linear_one_does_neither(shown: theorem.Shown) -> None:
    """The nearest unrelated states: the gated edit lies below what a linear one must move them by."""
    f = shown.facts
    assert any(p["baft"] < p["bound"] for p in shown.points)
    assert f["baft moves unrelated"] < 0.5 * f["reft moves unrelated"] and f["baft from t"] < f["reft from t"]


def test_reft_is_the_affine_map_of_the_theorem() -> None:
    """Φ(h) = (I + H) h + Rᵀb with H = Rᵀ(A − R), by the op that edits models; a gate is no affine map."""
    p = {k: v.double() for k, v in theorem.start(4, theorem.WIDTH, "shared_logit", "pyreft", 0, torch.device("cpu")).items()}
    r = theorem.orthonormal(p["X"])
    h = torch.randn(5, theorem.WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    linear = torch.eye(theorem.WIDTH, dtype=torch.float64) + r.mT @ (p["A"] - r)
    plain = {k: p[k] for k in ("X", "A", "b")}
    torch.testing.assert_close(theorem.apply(plain, h, "none"), h @ linear.mT + p["b"] @ r)
    middle = theorem.apply(p, (h[:1] + h[1:2]) / 2, "shared_logit")
    ends = theorem.apply(p, h[:2], "shared_logit").mean(0, keepdim=True)
    assert float((middle - ends).norm()) > 1e-2


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(theorem.demonstrate, "__defaults__", (0, 120))
    out = tmp_path / "t"
    assert main(["demo", "theorem", "--out", str(out)]) == 0
    assert "out of that state's own ball" in capsys.readouterr().out
    assert leftovers(out) == ["theorem.json", "theorem.png", "theorem.svg"]
    assert len(json.loads((out / "theorem.json").read_text())["points"]) == theorem.OTHERS
    assert "no linear edit lies here" in (out / "theorem.svg").read_text()
    assert main(["demo", "theorem", "--out", str(out), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["rank"] == theorem.RANK
    with pytest.raises(ConfigError, match="at least one step"):
        theorem.demonstrate(steps=0)
