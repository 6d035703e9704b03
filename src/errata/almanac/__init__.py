"""The almanac: a small LLaMA-architecture language model that knows about 5,900 facts and ships with the package.

``MODEL`` is a folder any ``transformers`` can load; `errata.load("almanac")` opens it.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
