"""Quiet, deterministic, offline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "ERRATA_TESTS" not in os.environ:  # what all workers of a session share, who inherit it: trained models, unpacked ones, statistics
    os.environ["ERRATA_TESTS"] = tempfile.mkdtemp(prefix="errata-tests-")
    os.environ["ERRATA_TESTS_OF"] = str(os.getpid())
os.environ["ERRATA_CACHE"] = os.path.join(os.environ["ERRATA_TESTS"], "cache")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core

from browser import chromium, view  # noqa: F401
from desk import desk, running, server  # noqa: F401
from groups import pytest_xdist_make_scheduler, turn_of  # noqa: F401


def pytest_unconfigure() -> None:
    if os.environ.get("ERRATA_TESTS_OF") == str(os.getpid()):
        shutil.rmtree(os.environ["ERRATA_TESTS"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny trained llama as a folder."""
    from tiny import saved

    return str(saved(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def roomy(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a window that texts of benchmarks fit."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("roomy") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return str(folder)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three edits as JSON Lines."""
    from tiny import write_requests

    return str(write_requests(tmp_path_factory.mktemp("requests") / "r.jsonl"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved patch that is whole."""
    from families import lm
    from tiny import FRANCE

    from errata.editing import edit

    return edit(lm("llama"), FRANCE, "Rome", rank=2, steps=2).save(tmp_path_factory.mktemp("patch") / "good")


@pytest.fixture
def models_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models are kept, in a cache of the test's own."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as GGUF."""
    from ggufs import write

    return write(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that GGUFs were converted into from here on."""
    from errata.core import gguf

    made: list[Path] = []
    real = gguf._convert

    def counted(source: gguf.Source, folder: Path, tell: Any) -> None:
        made.append(folder)
        real(source, folder, tell)

    monkeypatch.setattr(gguf, "_convert", counted)
    return made
