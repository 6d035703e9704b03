"""Workers of xdist: a file's tests, or a family's laws, run in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from groups import group_of, turn_of

HERE = Path(__file__).parent


def test_groups() -> None:
    assert group_of("tests/test_cli.py::test_demo") == "test_cli" == group_of("test_cli.py::test_x[llama]")
    assert group_of("tests/test_laws.py::test_rows[rome-gpt2-float32]") == "laws gpt2"
    assert group_of("tests/test_laws.py::test_tail[gemma3_text-2]") == "laws gemma3_text"
    assert group_of("tests/test_laws.py::test_determinism[rome]") == "laws llama" == group_of("tests/test_swap.py::test_x[gpt2]")
    assert turn_of("tests/test_pages.py::test_x") < turn_of("tests/test_bare.py::test_x") < turn_of("tests/test_cli.py::test_x")


def test_who_takes_patches_of_the_laws_is_in_their_group() -> None:
    taking = [
        path for path in HERE.glob("test_*.py") if "patches," in path.read_text().partition("from laws import")[2].partition("\n\n")[0]
    ]
    taking += [path for path in HERE.glob("test_*.py") if "import PROMPTS, model, patches\n" in path.read_text()]
    assert len(taking) >= 4
    assert {group_of(f"{path.name}::test_x") for path in taking} == {"laws llama"}


def test_xdist_keeps_a_group_together(tmp_path: Path) -> None:
    """The versions that are installed here, with this folder's scheduler."""
    for name in ("test_one", "test_two"):
        (tmp_path / f"{name}.py").write_text(
            "import os, pathlib, pytest\n@pytest.mark.parametrize('n', range(6))\ndef test_it(n):\n"
            "    (pathlib.Path(__file__).parent / f'{pathlib.Path(__file__).stem}-{os.environ[\"PYTEST_XDIST_WORKER\"]}').touch()\n"
        )
    (tmp_path / "conftest.py").write_text("from groups import pytest_xdist_make_scheduler\n")
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env={**own, "PYTHONPATH": str(HERE)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = [path.name.split("-") for path in tmp_path.glob("test_*-gw*")]
    assert sorted(name for name, _ in workers) == ["test_one", "test_two"], workers
