"""Any GGUF file as a model: read once through transformers, kept as safetensors in the cache under the file's sha256.

What is in the cache is read only when it is whole: written beside and renamed, by one process at a time, with a list of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata import storage
from errata.errors import DiskError, ModelError, first_line, out_of_memory

Progress = Callable[[str, int, int], None]  # (stage, done, total)
_MARK = "errata.json"  # in a converted folder: its files with size and sha256
_MAGIC = b"GGUF"
_NEEDED = ("gguf", "accelerate")  # by transformers, for any GGUF
_LARGE = 1 << 26  # bytes of a file whose content is only compared when loading it failed
_STEPS = 4  # of a conversion
_FAST = {"amx_bf16", "avx512_bf16"}  # a CPU's flags


@dataclass(frozen=True)
class Source:
    """A GGUF by the name that was asked for: its file, or the pieces that a file was cut into.

    ``sha256``: where it is known beforehand; ``missing``: what to say where there are no pieces and the cache has nothing.
    """

    label: str
    pieces: tuple[Path, ...]
    sha256: str | None = None
    missing: str = ""


def find(name: str, revision: str | None = None) -> Source | None:
    """``model.gguf`` or ``repository:model.gguf``, a repository on the hub (or a folder); None where the name is neither."""
    if not name.lower().endswith(".gguf") or Path(name).is_dir():
        return None
    repository, _, file = name.rpartition(":")
    if Path(name).is_file() or len(repository) < 2:  # a Windows drive is one letter
        if not Path(name).is_file():
            raise ModelError(f"{name}: there is no such file; give a GGUF file, or HUB/REPOSITORY:FILE.gguf")
        return Source(name, (Path(name),))
    from transformers.utils import cached_file

    try:
        found = cached_file(repository, file, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {file} of {repository} cannot be had: {first_line(error)}") from error
    return Source(name, (Path(str(found)),))


def fast_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """bfloat16 where the CPU multiplies in it (AMX or AVX512-BF16, as Linux says), else float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "bfloat16" if _FAST & set(flags.split()) else "float32"


# -- the cache ---------------------------------------------------------------------------------------------------


def models_folder() -> Path:
    return storage.cache_folder() / "models"


def digest(pieces: Sequence[Path], tell: Callable[[int, int], None] | None = None) -> str:
    """sha256 of the pieces as one file."""
    total, done, out = sum(p.stat().st_size for p in pieces), 0, hashlib.sha256()
    for piece in pieces:
        with open(piece, "rb") as stream:
            while block := stream.read(1 << 22):
                out.update(block)
                done += len(block)
                if tell is not None:
                    tell(done >> 20, total >> 20)
    return out.hexdigest()


def whole(folder: Path, *, deep: bool = False) -> bool:
    """Whether a converted model is as it was written; ``deep``: the content of large files too."""
    try:
        files = json.loads((folder / _MARK).read_text(encoding="utf-8"))["files"]
        for name, (size, sha256) in files.items():
            path = folder / name
            if path.stat().st_size != size or ((deep or size < _LARGE) and digest([path]) != sha256):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(files)


def converted(source: Source, progress: Progress | None = None, *, deep: bool = False) -> Path:
    """The folder of a GGUF's safetensors, made where the cache has none (``deep``: or a damaged one)."""
    tell = progress or _unseen
    home = models_folder()
    if source.sha256 is not None and not deep and whole(home / source.sha256):
        return home / source.sha256
    if not source.pieces:
        raise ModelError(source.missing)
    found = _checked(source, tell)
    final = home / found
    if not deep and whole(final):
        return final
    with storage.turn(home / f".{found}.lock") as alone:
        if not whole(final, deep=deep):
            for left in home.glob(f".{found}.*") if alone else ():  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with storage.atomic_folder(final) as folder:
                _convert(source, folder, tell)
                _seal(source, folder)
    return final


def _checked(source: Source, tell: Progress) -> str:
    """The sha256 of a file that begins as a GGUF does and is the one that was meant."""
    shown = source.pieces[0]
    try:
        with open(shown, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{source.label}: {shown} is no GGUF file (it does not begin with {_MAGIC.decode()!r}); give another")
        found = digest(source.pieces, lambda done, total: tell(f"reading {source.label}, MiB", done, total))
    except OSError as error:
        raise ModelError(f"{source.label}: {error.filename or shown} cannot be read ({error.strerror})") from None
    if source.sha256 not in (None, found):
        raise ModelError(
            f"{source.label}: {shown} is damaged or not the file that is known (sha256 {found[:12]}…); remove it and bring it again"
        )
    return found


# -- the conversion ----------------------------------------------------------------------------------------------


def _convert(source: Source, folder: Path, tell: Progress) -> None:
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ModelError(f"{source.label}: to read a GGUF the package {absent[0]} is needed; pip install 'errata[gguf]'")
    stage = f"converting {source.label} (once), step"
    tell(stage, 0, _STEPS)
    file = source.pieces[0] if len(source.pieces) == 1 else joined(source.pieces, folder / "joined.gguf")
    tell(stage, 1, _STEPS)
    try:
        with _bars(source, tell):
            hf, tokenizer = _read(file, lambda: tell(stage, 2, _STEPS))
    except ModelError as error:
        raise ModelError(f"{source.label}: {source.pieces[0]} {error}") from error
    except Exception as error:  # a damaged file makes the readers stumble in any way
        if out_of_memory(error):
            raise
        why = first_line(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{source.label}: {source.pieces[0]} cannot be read, it is damaged or of an unknown kind: {why}") from error
    tell(stage, 3, _STEPS)
    if file.parent == folder:
        file.unlink()
    try:
        _save(hf, tokenizer, folder)
    except Exception as error:  # safetensors and tokenizers have types of their own for a full disk
        if "os error 28" not in str(error) and "No space left" not in str(error):
            raise
        raise DiskError(f"{folder}: nothing was written (the disk is full); free space, or set ERRATA_CACHE to another place") from None
    tell(stage, 4, _STEPS)


def _unseen(stage: str, done: int, total: int) -> None:
    """Nobody wants to know: transformers shows its own bars."""


@contextlib.contextmanager
def _bars(source: Source, tell: Progress) -> Iterator[None]:
    """``tell`` in place of the bar that transformers always draws while it unpacks weights."""
    from transformers.utils import logging

    try:
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:  # a version that reads GGUFs elsewhere, and may draw what it likes
        yield
        return

    def counted(items: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        listed = list(items)
        for i, item in enumerate(listed):
            tell(f"unpacking {source.label}, tensors", i, len(listed))
            yield item

    real = getattr(reader, "tqdm", None)
    if real is None or (tell is _unseen and logging.is_progress_bar_enabled()):
        yield
        return
    vars(reader)["tqdm"] = counted
    try:
        yield
    finally:
        vars(reader)["tqdm"] = real


def joined(pieces: Sequence[Path], out: Path) -> Path:
    """The pieces of a file as one."""
    with open(out, "wb") as stream:
        for piece in pieces:
            with open(piece, "rb") as part:
                shutil.copyfileobj(part, stream, 1 << 22)
    return out


def _read(file: Path, half: Callable[[], None]) -> tuple[Any, Any]:
    """(model in float32, tokenizer); `ModelError` where transformers would go on with numbers of its own."""
    import torch
    import transformers

    unpack = getattr(transformers, "GgufConfig", None)  # newer versions keep some kinds packed unless told not to
    more = {"quantization_config": unpack(dequantize=True)} if unpack is not None else {}
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        file.resolve().parent, gguf_file=file.resolve().name, output_loading_info=True, **{keyword: torch.float32}, **more
    )
    if info["missing_keys"] or info.get("mismatched_keys"):
        name = sorted(info["missing_keys"] or (str(k) for k in info["mismatched_keys"]))[0]
        raise ModelError(f"lacks the weights {name!r}; it is damaged, or one part of a split file (join the parts first)")
    for name, parameter in hf.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"holds numbers that are not finite in {name!r}; it is damaged")
    half()
    return hf, transformers.AutoTokenizer.from_pretrained(file.resolve().parent, gguf_file=file.resolve().name)


def _save(hf: Any, tokenizer: Any, folder: Path) -> None:
    hf.hf_quantizer = None  # the weights are plain numbers now; with it transformers refuses to save them
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json as it is, in any version of transformers
    for name in ("is_local", "local_files_only"):
        told.pop(name, None)
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


def _seal(source: Source, folder: Path) -> None:
    """List the files, and put them on the disk."""
    files = {path.name: (path.stat().st_size, digest([path])) for path in sorted(folder.iterdir())}
    storage.write(folder / _MARK, json.dumps({"files": files, "source": source.label}, indent=1).encode())
    for name in files:  # safetensors keeps its files to the user; they are as open as the umask has it, like this one
        shutil.copymode(folder / _MARK, folder / name)
    storage.flush([folder])
