"""Data of any shape becomes rows of one form, or an error that says which line to mend."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from guardmw.errors import DataError, GuardmwError, nearest
from guardmw.evaluate import datasets, rows
from guardmw.evaluate.columns import Columns
from guardmw.settings import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from guardmw.evaluate.columns import Record
    from guardmw.evaluate.datasets import PublicSet, Split
    from guardmw.evaluate.rows import Row

_FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# What a cell of a CSV file in the row form holds where JSON has a list, a flag or a number.
_NO = ("0", "false", "no")


class FileSource(Part):
    """Files on this machine.

    Attributes:
        file: a path or a pattern, or several; .jsonl, .csv, .tsv, each also with .gz, or .parquet.
        columns: what the columns mean; left out, they are those of the row form.
        source: what the rows are told to be from; by default each file's name.
        rows: at most so many, chosen by their content.
    """

    file: str | Annotated[tuple[str, ...], Field(min_length=1)]
    columns: Columns | None = None
    source: str = ""
    license: str = ""
    rows: Annotated[int, Field(gt=0)] | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.file if isinstance(self.file, str) else ", ".join(self.file)


class HubSource(Part):
    """A data set on the hub.

    Attributes:
        hub: the name of one that guardmw knows, or owner/name of any other.
        revision: a commit; only a known set has one by default.
        split: train or test of a known set, by default train; the hub's own word for that of another.
        config: for a set that guardmw does not know, its set within the set.
        columns: what the columns mean; a known set has its own.
        rows: at most so many, chosen by their content.
    """

    hub: str
    revision: str = ""
    split: str = "train"
    config: str = ""
    columns: Columns | None = None
    source: str = ""
    license: str = ""
    rows: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        foreign = "/" in self.hub
        if not foreign and self.hub not in datasets.SETS:
            raise ValueError(f"unknown data set {self.hub!r}: {nearest(self.hub, datasets.SETS)}, or give owner/name")
        if foreign and self.columns is None:
            raise ValueError(f"{self.hub} needs 'columns': which of its columns is the text, which the label")
        if not foreign and self.config:
            raise ValueError(f"{self.hub} has no 'config' to choose; its splits are: {', '.join(self._splits())}")
        return self

    def _splits(self) -> Iterable[str]:
        return datasets.SETS[self.hub].splits

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{datasets.PREFIX}{self.hub}"

    def resolved(self) -> tuple[PublicSet, Split]:
        """The data set that it names, as these settings want it.

        Raises:
            DataError: there is no such split.
        """
        if "/" in self.hub:
            known = datasets.PublicSet(self.hub, "", "", (), {self.split: datasets.Split(self.split, self.config)})
            part = known.splits[self.split]
        else:
            known, part = datasets.find(self.hub, self.split)
        return (
            replace(
                known,
                revision=self.revision or known.revision,
                license=self.license or known.license,
                columns=(self.columns,) if self.columns else known.columns,
            ),
            part,
        )


def _kind(given: object) -> str:
    return "hub" if isinstance(given, HubSource) or (isinstance(given, dict) and "hub" in given) else "file"


def _spelled_out(given: object) -> object:
    """A source that is given as a word: a file, or hub:NAME:SPLIT@COMMIT, of which the name is enough."""
    if not isinstance(given, str):
        return given
    if not given.startswith(datasets.PREFIX):
        return {"file": given}
    name, split, revision = datasets.parsed(given)
    return {"hub": name, "revision": revision} | ({"split": split} if split else {})


def _as_benchmark(given: object) -> object:
    """The same, but what is measured on is the test split."""
    spelled = _spelled_out(given)
    return {"split": "test"} | spelled if isinstance(spelled, dict) and "hub" in spelled else spelled


_Either = Annotated[
    Annotated[FileSource, Tag("file")] | Annotated[HubSource, Tag("hub")],
    Discriminator(_kind),
]
# What is trained on, and what is measured on; either as a mapping, or as a word.
Source = Annotated[_Either, BeforeValidator(_spelled_out)]
Benchmark = Annotated[_Either, BeforeValidator(_as_benchmark)]


class Labelled(Protocol):
    """A row, or what was made of one."""

    @property
    def unsafe(self) -> bool:
        """Its label."""


class Ingest(Part):
    """What is trained on.

    Attributes:
        sources: files and data sets; a word is a file, or hub:NAME:SPLIT@COMMIT, of which the name is enough.
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]


def ingest(settings: Ingest) -> list[Row]:
    """The rows of all sources, in their order, each with an id.

    What can be wrong with a source is looked for in all of them before the first one is read whole.

    Raises:
        DataError: names the source, the line and the column, and what to do; or all rows have the same label.
    """
    for source in settings.sources:
        check(source)
    found = [row for source in settings.sources for row in read(source)]
    both_labels(found, "the sources hold")
    return found


def both_labels(given: Iterable[Labelled], held: str) -> None:
    """Raise a DataError, which begins with ``held``, where rows are not of both labels: nothing is learnt from one."""
    labels = Counter(row.unsafe for row in given)
    if not labels[True] or not labels[False]:
        raise DataError(f"{held} {labels[True]:,} unsafe and {labels[False]:,} safe rows; training needs both")


def check(source: FileSource | HubSource) -> None:
    """Raise a DataError for what is wrong with a source as far as its beginning shows; the hub is not asked."""
    if isinstance(source, HubSource):
        known, _ = source.resolved()
        datasets.check(known.id, known.revision)
        return
    for path in paths(source):
        next(_rows(path, source))


def by_file(source: FileSource | HubSource) -> dict[str, list[Row]]:
    """The rows of a source by the names of its files, or by its own where it is on the hub.

    Raises:
        DataError: it cannot be had, or is not as its columns say.
    """
    if isinstance(source, HubSource):
        return {source.hub: read(source)}
    found: dict[str, list[Row]] = {}
    for path in paths(source):
        # Files of one name in several folders are several benchmarks.
        name = _stem(path) if _stem(path) not in found else str(path)
        found[name] = read(source.model_copy(update={"file": str(path)}))
    return found


def read(source: FileSource | HubSource) -> list[Row]:
    """The rows of a source, each with an id.

    Raises:
        DataError: it cannot be had, or is not as its columns say.
    """
    found = _hub_rows(source) if isinstance(source, HubSource) else _file_rows(source)
    named = (row if row.id else replace(row, id=f"{row.source}/{rows.key(row)[:12]}") for row in found)
    if source.rows is None:
        return list(named)
    # Which rows are taken depends on what they say, so that other rows beside them change nothing.
    given = list(named)
    taken = set(sorted(range(len(given)), key=lambda at: _lot(given[at]))[: source.rows])
    return [row for at, row in enumerate(given) if at in taken]


def _lot(row: Row) -> str:
    return hashlib.sha256(f"{rows.key(row)}{row.id}".encode("utf-8", "replace")).hexdigest()


def paths(source: FileSource | HubSource) -> list[Path]:
    """The files of a source; none where it is on the hub.

    Raises:
        DataError: there is no such file, or it is of no known form.
    """
    if isinstance(source, HubSource):
        return []
    found: list[Path] = []
    for pattern in (source.file,) if isinstance(source.file, str) else source.file:
        # A name may hold a bracket.
        some = [Path(pattern)] if Path(pattern).exists() else [Path(one) for one in sorted(glob(pattern))]  # noqa: PTH207
        if not some:
            raise DataError(f"there is no file {pattern}")
        for path in some:
            if _format(path) not in _FORMATS:
                raise DataError(f"{path}: the name ends in none of {', '.join(_FORMATS)}, nor in one of these and .gz")
        found += some
    return list(dict.fromkeys(found))


def _hub_rows(source: HubSource) -> Iterator[Row]:
    known, part = source.resolved()
    return datasets.read(known, part, source=source.source or source.hub.rpartition("/")[2])


def _file_rows(source: FileSource) -> Iterator[Row]:
    for path in paths(source):
        yield from _rows(path, source)


def _rows(path: Path, source: FileSource) -> Iterator[Row]:
    """The rows of a file, or an error that names its line."""
    name, seen, count = source.source or _stem(path), 0, 0
    try:
        with _records(path) as records:
            for where, record in records:
                seen += 1
                with _told_of(where):
                    row = _row(record, path, source, name)
                if row is not None:
                    count += 1
                    yield row
    except rows.UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except GuardmwError as error:
        raise DataError(f"{path}, {error}") from None
    if not count:
        raise DataError(f"{path} holds no rows{': its columns leave all of them out' if seen else ''}")


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Say of an error where it is."""
    try:
        yield
    except GuardmwError as error:
        raise DataError(f"{where}: {error}") from None


def _row(record: Record, path: Path, source: FileSource, name: str) -> Row | None:
    if source.columns:
        return source.columns.row(record, source=name, license=source.license)
    given = _typed(record) if _format(path) in _SEPARATORS else record
    if isinstance(given, dict) and given.get("label") not in rows.LABELS:
        if "label" not in record:
            raise DataError(f"no column 'label': {nearest('label', given)}. Say under 'columns' which column is what")
        raise DataError("'label' is 'safe' or 'unsafe'; say under 'columns' which other words mean that")
    row = rows.row(given, name)
    return replace(row, source=source.source or row.source, license=row.license or source.license)


def _typed(record: Record) -> dict[str, object]:
    """Cells in the row form, which are words all, as the types they stand for; an empty one is none."""
    typed: dict[str, object] = {name: value for name, value in record.items() if value != ""}
    if "categories" in typed:
        typed["categories"] = [word for word in str(typed["categories"]).replace(",", " ").split() if word]
    if "weak" in typed:
        typed["weak"] = str(typed["weak"]).lower() not in _NO
    if "confidence" in typed:
        try:
            typed["confidence"] = float(str(typed["confidence"]))
        except ValueError:
            raise DataError("'confidence' is a number from 0 to 1") from None
    return typed


def _format(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix)


@contextmanager
def _records(path: Path) -> Iterator[Iterator[tuple[str, Record]]]:
    """The records of a file, each with its place in it."""
    kind = _format(path)
    with path.open("rb") as file:
        if kind == ".parquet":
            yield _parquet(file)
        elif kind == ".jsonl":
            yield _objects(rows.lines(file))
        else:
            yield _cells(rows.lines(file), _SEPARATORS[kind])


def _objects(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[str, Record]]:
    for number, line in lines:
        if not line.strip():
            continue
        with _told_of(f"line {number}"):
            given = rows.loads(line)
            if not isinstance(given, dict):
                raise DataError(f"a row is an object, not {type(given).__name__}")
        yield f"line {number}", given


def _cells(lines: Iterable[tuple[int, bytes]], separator: str) -> Iterator[tuple[str, Record]]:
    """The lines of a CSV file under its header."""
    reader = csv.DictReader(_decoded(lines), delimiter=separator, strict=True)
    try:
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1 and name]
        if twice:
            raise DataError(f"line 1: several columns are called {twice[0]!r}")
        for record in reader:
            if None in record or None in record.values():
                odd = "more" if None in record else "fewer"
                raise DataError(f"line {reader.line_num}: {odd} cells than the header")
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"line {reader.reader.line_num}: {error}") from None


def _decoded(lines: Iterable[tuple[int, bytes]]) -> Iterator[str]:
    for number, line in lines:
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"line {number}: not UTF-8") from None


def _parquet(file: BinaryIO) -> Iterator[tuple[str, Record]]:
    try:
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415 - only for files of this kind
    except ImportError:
        raise DataError(f"Parquet needs a library: {datasets.INSTALL}") from None
    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=1024)
        records = (record for batch in batches for record in batch.to_pylist())
        yield from ((f"row {number}", record) for number, record in enumerate(records, 1))
    except ArrowInvalid:
        raise DataError("which is no Parquet file, or a broken one") from None
