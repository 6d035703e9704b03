"""A plugin of pytest: which test runs which line of the source, and how long it takes, for `mutate.py`.

    PYTHONPATH=scripts pytest -p lines_of_tests -n 2 --dist loadgroup --lines-of-tests lines

Each worker writes lines/PID.json: {"seconds": {test: s}, "lines": {file in src/errata: {line: [which of these tests]}}}.  All is counted in memory: tests that
stand in for SQLite would else meet the counter's own database.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "errata"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines-of-tests", type=Path, metavar="FOLDER")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--lines-of-tests")
    if folder is not None:
        config.pluginmanager.register(_Lines(folder))


class _Lines:
    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, dict[str, float]()
        self.counter = coverage.Coverage(data_file=None, source=[str(SOURCE)], config_file=False, messages=False)
        self.counter.start()
        self.counter.switch_context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        """xdist adds ``@group`` to an id."""
        name, began = re.sub(r"@[^@\]]*$", "", item.nodeid), time.perf_counter()
        self.counter.switch_context(name)
        try:
            return (yield)
        finally:
            self.counter.switch_context("")
            self.seconds[name] = round(time.perf_counter() - began, 4)

    def pytest_sessionfinish(self) -> None:
        self.counter.stop()
        if not self.seconds:  # xdist's own process runs no test
            return
        data, which = self.counter.get_data(), {name: i for i, name in enumerate(self.seconds)}
        lines = {
            Path(file).relative_to(SOURCE).as_posix(): {
                n: [which[t] for t in tests if t] for n, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps({"seconds": self.seconds, "lines": lines}))
