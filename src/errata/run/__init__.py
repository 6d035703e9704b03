"""Runs: the scenarios (`scenarios`), and a grid of them that survives a kill (`grid`, `preflight`, `folder`, `cell`, `executors`)."""

from errata.run.scenarios import batched, continual, single

__all__ = ["batched", "continual", "single"]
