"""A user's script under ``mypy --strict`` sees real types: the package is marked as typed, and its public face hides none of them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import errata

SCRIPT = """\
import errata

lm = errata.load("almanac")
request = errata.EditRequest("The capital of France is", "Lyon", "France")
patch = errata.edit(lm, request.prompt, request.target, request.subject, method="rome")
with lm.under(patch):
    answer = lm.complete(request.prompt)
ledger = errata.Ledger.open("book", lm)
edits = ledger.apply([request], method="rome")
reveal_type((lm, request, patch, answer, ledger, edits))
"""
PUBLIC = "\n".join(f"reveal_type(errata.{name})" for name in errata.__all__)
TYPES = (
    "errata.core.model.LM",
    "errata.request.EditRequest",
    "errata.core.patch.Patch",
    "str",
    "errata.ledger.ledger.Ledger",
    "list[errata.ledger.database.Edit]",
)


# Reading torch's own sources takes most of the time and says nothing about errata's types: that is done by the slow one of the two.
LIBRARIES = "[mypy-torch.*,transformers.*,numpy.*]\nfollow_imports = skip\nignore_missing_imports = true\n"


@pytest.mark.parametrize("libraries", [LIBRARIES, pytest.param("", marks=pytest.mark.slow)], ids=["errata", "and torch"])
def test_a_strict_user_script_has_real_types(tmp_path: Path, libraries: str) -> None:
    assert (resources.files("errata") / "py.typed").is_file()
    (tmp_path / "script.py").write_text(SCRIPT + PUBLIC + "\n")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{libraries}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"), "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rest = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert first == f"tuple[{', '.join(TYPES)}]"
    assert len(rest) == len(errata.__all__) and "Any" not in rest, rest
