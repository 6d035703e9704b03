"""Which tests run in one worker of xdist, and which of them first.

Said by our own scheduler: xdist's `loadgroup` writes groups into the ids of tests, where pytest 9.2 no longer reads them, and then gives
every test to any worker, each of which makes the fixtures of each file.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

# They take `laws.patches` of the tiny llama: a patch of every method, made once for all of them.
_PATCHES = ("test_laws", "test_fresh_process", "test_fuzz", "test_op_schema", "test_swap")
# What takes long: at the end, one of them would keep one worker busy and the other idle.
_FIRST = ("laws llama", "test_pages", "test_real_model", "test_run", "test_page_history", "test_page", "test_bare")


def group_of(nodeid: str) -> str:
    """A file; of the laws, which take a tenth of the time, a family."""
    path, _, name = nodeid.partition("::")
    stem = path.rpartition("/")[2].removesuffix(".py")
    if stem not in _PATCHES:
        return stem
    if stem != "test_laws":
        return "laws llama"
    from families import FAMILIES

    return f"laws {next((part for part in re.split(r'[][-]', name) if part in FAMILIES), 'llama')}"


def turn_of(nodeid: str) -> int:
    """Tests run in this order, those of one number as they were collected."""
    group = group_of(nodeid)
    return _FIRST.index(group) if group in _FIRST else len(_FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`: a group runs in one worker.  For conftest.py."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
