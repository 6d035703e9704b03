"""What a command shows: text and tables on stdout, progress on stderr, or one JSON document in place of both.

Texts come from models and files, so control characters (which could drive a terminal) are never passed on.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

# progress(stage, done, total), as in `errata.run`
Progress = Callable[[str, int, int], None]
_PIPE_WIDTH = 10_000  # a pipe has no edge: nothing is wrapped there


def clean(text: object) -> str:
    """A text that a terminal only shows: control characters (but line breaks and tabs) and lone surrogates become "�"."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in str(text))


def write(stream: TextIO, text: str) -> None:
    """Write what the stream's encoding can hold; the rest as "?"."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))


def said(text: str | None) -> str:
    """An answer in a table: an empty one must not look like a missing one."""
    return "–" if text is None else text or "(nothing)"


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def finite(value: Any) -> Any:
    """Plain JSON values: NaN and infinity, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any, encoding: str = "utf-8", indent: int | None = 1) -> str:
    """One document; characters that the encoding lacks (and lone surrogates) are escaped."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(finite(value), indent=indent, allow_nan=False)
    return text


def json_lines(values: Iterable[Any]) -> str:
    """One document a line."""
    return "".join(as_json(value, indent=None) + "\n" for value in values)


@dataclass
class Screen:
    """``json``: `say` and `table` are silent and `document` prints; otherwise the other way round."""

    json: bool = False

    def say(self, text: str = "") -> None:
        if not self.json:
            write(sys.stdout, clean(text) + "\n")

    def flush(self) -> None:
        """What was said is with the reader: a pipe holds nothing back."""
        sys.stdout.flush()

    def document(self, value: Any) -> None:
        if self.json:
            write(sys.stdout, as_json(value, getattr(sys.stdout, "encoding", None) or "utf-8") + "\n")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
        """Aligned columns, wrapped to a terminal's width.  ``right``: columns set flush right (-1: all but the first)."""
        if self.json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        terminal = _is_terminal(sys.stdout)
        console = Console(file=sys.stdout, highlight=False, width=None if terminal else _PIPE_WIDTH)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, heading in enumerate(headings):
            flush = i in right or (-1 in right and i > 0)
            table.add_column(Text(clean(heading)), justify="right" if flush else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(clean(cell).replace("\n", " ")) for cell in row))
        with console.capture() as captured:
            console.print(table)
        write(sys.stdout, "\n".join(line.rstrip() for line in captured.get().split("\n")))

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on stderr with rate and time left, one a stage, gone at the end; nothing where stderr is no terminal."""
        if not _is_terminal(sys.stderr):
            yield lambda stage, done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.1f}/s" if task.speed else "")

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        bars = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False, refresh_per_second=4
        )
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(clean(stage), total=total)
            elif done < bars.tasks[bars.task_ids.index(tasks[stage])].completed:  # the stage came round again
                bars.reset(tasks[stage], total=total)
            bars.update(tasks[stage], completed=min(done, total), total=total)

        with bars:
            yield show


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Libraries neither log, warn nor draw bars inside; as before afterwards.  ``debug`` lets them."""
    if debug:
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
