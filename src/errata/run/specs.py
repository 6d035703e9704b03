"""What a run file says of scoring, and of how results are put on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from errata.errors import ConfigError


@dataclass(frozen=True)
class JudgeSpec:
    """Who says whether an answer is right: see `errata.score.judges`."""

    name: str
    endpoint: str | None = None
    model: str | None = None
    key_env: str | None = None


@dataclass(frozen=True)
class ScoreSpec:
    """What is measured beside the protocols of every record, and whether each case is scored right after its own edit too.

    known   only cases whose fact the base knows (`errata.score.known`); None: as the benchmark has it
    watch   neighbours found on the model (`errata.score.neighbours`); None: 16 where the benchmark asks nothing that should stay
    """

    right_after: bool = True
    free_tokens: bool = False
    fluency: bool = False
    robustness: bool = False
    watch: int | None = None
    latency: bool = True
    known: bool | None = None
    judges: tuple[JudgeSpec, ...] = ()


@dataclass(frozen=True)
class StoreSpec:
    """group    edits of a growing stack put on disk together: what a kill costs at most
    chunk    cases scored and put on disk together at a mark; single edits that train together
    patches  keep those of single edits and those of each mark, or drop what a resumed run does not need
    """

    group: int = 16
    chunk: int = 256
    patches: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.group < 1 or self.chunk < 1:
            raise ConfigError("store.group and store.chunk must be at least 1")
