"""Stages leave files, and one that was made from the same rows, settings and files is not made again."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from guardmw.errors import GuardmwError
from guardmw.evaluate import rows
from guardmw.train import readings, split
from guardmw.train.filter import filter_
from guardmw.train.ingest import ingest, paths
from guardmw.train.readings import reread
from guardmw.train.relabel import relabel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from guardmw.evaluate.rows import Row
    from guardmw.settings import Part
    from guardmw.train.filter import Filter
    from guardmw.train.ingest import Ingest
    from guardmw.train.relabel import Relabel

    Say = Callable[[str], None]

LOG = "train.log"
ROWS = "rows.jsonl.gz"
REPORT = "report.json"
SETTINGS = "settings.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def log(out: Path) -> Iterator[Say]:
    """Says lines on the screen and in a folder's train.log; the folder is made.

    Raises:
        GuardmwError: the disk is full.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # What a full disk did not take is tried once more as the file is closed.
        with (out / LOG).open("a", encoding="utf-8") as file:

            def say(line: str) -> None:
                stamped = f"{time.strftime('%H:%M:%S')} {line}"
                for stream in (sys.stderr, file):
                    print(stamped, file=stream, flush=True)

            yield say
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise GuardmwError(
            f"{out}: the disk is full. What is whole there is kept: make room, and run the same command again"
        ) from None


class Line:
    """Rows on their way through stages, each with a folder of its own.

    Args:
        out: where the folders are.
        say: hears of what is done.
        written: rows that join on the way, whatever stage adds them.

    Attributes:
        rows: as the last stage left them.
    """

    def __init__(self, out: Path, say: Say, written: Sequence[Row] = ()) -> None:
        self.rows: list[Row] = []
        self._out = out
        self._say = say
        self._written = split.digest(written)
        self._held = ""

    def stage(
        self,
        name: str,
        settings: Part | None,
        make: Callable[[Path], tuple[list[Row], dict[str, Any]]],
        beside: Sequence[str] = (),
    ) -> None:
        """Make rows of those before, with a report, or take those that are there.

        Args:
            name: of the stage and its folder.
            settings: that what it makes depends on.
            make: given the folder, makes the rows, and tells of it.
            beside: more that it depends on.
        """
        folder = self._out / name
        stated = settings.model_dump(mode="json") if settings else {}
        # The whole rows count, and not only what they say: sources, licences, confidences and origins matter too.
        made_from = digest({"settings": stated, "rows": self._held, "written": self._written, "beside": beside})
        report = folder / REPORT
        # Files and data sets are read anew: what is in them is known only then, and takes seconds.
        if name == "ingest" or made_of(report) != made_from:
            folder.mkdir(exist_ok=True)
            # Killed between rows and report, the two would not be of one making.
            report.unlink(missing_ok=True)
            self._say(name)
            self.rows, told = make(folder)
            rows.write(folder / ROWS, self.rows)
            told = {"made_from": made_from, "rows": len(self.rows), **told}
            report.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
            self._say(f"{name}: {len(self.rows)} rows")
        else:
            self.rows = list(rows.read(folder / ROWS))
        self._held = content(folder / ROWS)

    def ingest(self, settings: Ingest) -> None:
        """Read the sources."""
        self.stage("ingest", settings, lambda _: (ingest(settings), {}))

    def reread(self) -> None:
        """Take the labels of rows that were read again."""
        given = self.rows

        def make(_: Path) -> tuple[list[Row], dict[str, Any]]:
            return reread(given, readings.read())

        self.stage("reread", None, make, [content(readings.FILE)])

    def relabel(self, settings: Relabel) -> None:
        """Have an LLM give labels anew."""
        given = self.rows
        self.stage("relabel", settings, lambda folder: relabel(given, settings, folder, say=self._say))

    def filter(self, settings: Filter) -> None:
        """Drop what is not worth learning, and leave a list of it."""
        given = self.rows

        def make(folder: Path) -> tuple[list[Row], dict[str, Any]]:
            kept, dropped = filter_(given, settings)
            dropped.write(folder / "dropped.jsonl")
            return kept, dropped.to_dict()

        self.stage("filter", settings, make, read_by(settings))


def read_by(settings: Filter) -> list[str]:
    """The content of the files on this machine that a filter reads."""
    files = [path for source in settings.contamination.against for path in paths(source)]
    return [content(path) for path in (*files, *([settings.folds.file] if settings.folds else ()))]


def made_of(report: Path) -> str:
    """What a stage was made from; nothing where there is no whole report."""
    try:
        return str(json.loads(report.read_text(encoding="utf-8"))["made_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write what a training depends on beside its checkpoint; a checkpoint of another one is not to be resumed.

    Raises:
        GuardmwError: there is one of other settings.
    """
    text = json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise GuardmwError(
            f"{path.parent} holds a training with other settings or rows; give another --out, or the same ones"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def digest(value: object) -> str:
    """A name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def content(path: Path) -> str:
    """A name for what is in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
