"""Records of someone else's data become rows, by a map that says which column means what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from guardmw.errors import DataError, nearest
from guardmw.evaluate import rows
from guardmw.settings import Part
from guardmw.taxonomy import Category

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guardmw.evaluate.rows import Row

Record = Mapping[str, object]
Value = bool | int | float | str

# How data sets spell the two labels. Numbers are compared by what they are, words whatever their case.
UNSAFE: tuple[Value, ...] = (True, 1, "true", "yes", "unsafe", "harmful", "toxic")
SAFE: tuple[Value, ...] = (False, 0, "false", "no", "safe", "unharmful", "harmless", "benign")

# What a message may repeat of a column that was to hold labels: it may be a text, where the map is wrong.
_LONGEST_LABEL = 30

_Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Label(Part):
    """Which records are unsafe.

    Attributes:
        column: one, or several: then any that says unsafe decides, and of numbers the sum is compared.
        unsafe, safe: the values that mean so; one that is in neither is an error.
        at_least: instead, the number from which on a record is unsafe.
        safe_below: records from here up to ``at_least`` are doubtful, and left out.
        unlabelled: what becomes of a record without a label.
    """

    column: str | _Names
    unsafe: tuple[Value, ...] = UNSAFE
    safe: tuple[Value, ...] = SAFE
    at_least: float | None = None
    safe_below: float | None = None
    unlabelled: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.safe_below is not None and (self.at_least is None or self.safe_below > self.at_least):
            raise ValueError("'safe_below' needs an 'at_least' that is no lower")
        if self.at_least is not None and {"unsafe", "safe"} & self.model_fields_set:
            raise ValueError("a label is read either by 'at_least' or by the values 'unsafe' and 'safe'")
        both = {_plain(v) for v in self.unsafe} & {_plain(v) for v in self.safe}
        if both and {"unsafe", "safe"} <= self.model_fields_set:
            raise ValueError(f"{', '.join(sorted(both))}: either 'unsafe' or 'safe', not both")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads."""
        return _names(self.column)

    def of(self, record: Record) -> bool | None:
        """Whether a record is unsafe; None where it is to be left out.

        Raises:
            DataError: a column is missing, or holds no label.
        """
        values = [(name, value) for name in self.columns if (value := _value(record, name)) is not None]
        if not values:
            if self.unlabelled == "skip":
                return None
            raise DataError(f"no label in {self.columns[0]!r}; to leave such records out, say `unlabelled: skip`")
        if self.at_least is not None:
            total = sum(_number(name, value) for name, value in values)
            doubtful = self.safe_below is not None and self.safe_below <= total < self.at_least
            return None if doubtful else total >= self.at_least
        # All are read, also after the first that says unsafe: an unknown value is an error wherever it stands.
        said = [self._says_unsafe(name, value) for name, value in values]
        return any(said)

    def _says_unsafe(self, name: str, value: object) -> bool:
        unsafe, safe = ({_plain(one) for one in given} for given in (self.unsafe, self.safe))
        word = _plain(value)
        # Of values and of defaults the values that were given go first.
        if word in unsafe and (word not in safe or "unsafe" in self.model_fields_set):
            return True
        if word in safe:
            return False
        raise DataError(f"column {name!r}: unknown label{_told(word)}; list it under 'unsafe' or 'safe'")


class Kinds(Part):
    """Which kinds of harm an unsafe record is of.

    Attributes:
        column: holds a kind, a list of kinds, or an object of kinds and whether they apply.
        separator: what stands between several kinds in one text.
        named: our categories for each of the set's own; with none, a kind that we do not have.
        columns: instead, our categories for each column that says so by a number.
        at_least: the number from which on it does.
        unknown: what a kind that is not named is: an error, or one of no category.
    """

    column: str | None = None
    separator: str = ""
    named: Mapping[str, tuple[Category, ...]] = {}
    columns: Mapping[str, tuple[Category, ...]] = {}
    at_least: float = 0.5
    unknown: Literal["error", "none"] = "error"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.column) == bool(self.columns):
            raise ValueError("kinds are read either from a 'column', as 'named', or from 'columns'")
        return self

    @property
    def read(self) -> tuple[str, ...]:
        """The columns it reads."""
        return (self.column,) if self.column else tuple(self.columns)

    def of(self, record: Record) -> set[Category]:
        """Our categories of a record; none where they are not known.

        Raises:
            DataError: a column is missing, or holds a kind that is not named.
        """
        if self.column is None:
            held = [
                ours
                for name, ours in self.columns.items()
                if (value := _value(record, name)) is not None and _number(name, value) >= self.at_least
            ]
        else:
            value = _value(record, self.column)
            if self.separator and isinstance(value, str):
                value = [kind.strip() for kind in value.split(self.separator) if kind.strip()]
            held = [self._ours(kind) for kind in _kinds(value, self.column)]
        return {category for ours in held for category in ours}

    def _ours(self, kind: str) -> tuple[Category, ...]:
        if kind not in self.named and self.unknown == "error":
            raise DataError(
                f"column {self.column!r}: unknown kind{_told(kind)}; list it under 'named', with [] for none of ours"
            )
        return self.named.get(kind, ())


class Choice(Part):
    """A field that follows from a column: the value for each of the column's.

    Attributes:
        named: what is not in it is an error, unless there is an ``otherwise``.
    """

    column: str
    named: Mapping[str, str]
    otherwise: str | None = None

    def of(self, record: Record) -> str:
        """The value for a record.

        Raises:
            DataError: the column is missing, or holds a value that is not named.
        """
        word = _plain(_value(record, self.column))
        found = next((value for one, value in self.named.items() if _plain(one) == word), self.otherwise)
        if found is None:
            raise DataError(f"column {self.column!r}: unknown value{_told(word)}; list it under 'named'")
        return found


class Columns(Part):
    """What the columns of a data set mean.

    Attributes:
        text: what is on trial; several are joined by a blank line.
        empty: what becomes of a record without text.
        messages: instead of text, a column of role/content objects, the last of them on trial.
        role: of the text: user, assistant, tool_call, tool_result, system or document.
        context: a column, what the user said before.
        label: "safe" or "unsafe" where all records are, else how to read it.
        attack: "jailbreak" or "prompt_injection"; it counts for unsafe records only.
        where: only records whose columns hold these values.
        unless: and none of these.
        weak: the labels are by construction or by machine.
    """

    text: str | _Names | None = None
    messages: str | None = None
    role: str | Choice = "user"
    context: str | None = None
    label: Literal["safe", "unsafe"] | Label
    categories: Kinds | tuple[Category, ...] | None = None
    attack: str | Choice | None = None
    id: str | None = None
    confidence: str | None = None
    where: Mapping[str, Value] = {}
    unless: Mapping[str, Value] = {}
    weak: bool = False
    empty: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if bool(self.text) == bool(self.messages):
            raise ValueError("give either 'text' or 'messages'")
        return self

    @property
    def read(self) -> tuple[str, ...]:
        """The columns it reads, each once."""
        parts = (self.role, self.attack)
        named = (
            *_names(self.text or ()),
            *filter(None, (self.messages, self.context, self.id, self.confidence)),
            *(part.column for part in parts if isinstance(part, Choice)),
            *(self.label.columns if isinstance(self.label, Label) else ()),
            *(self.categories.read if isinstance(self.categories, Kinds) else ()),
            *self.where,
            *self.unless,
        )
        return tuple(dict.fromkeys(named))

    def check(self, held: Iterable[str]) -> None:
        """Raise a DataError that names the columns which are not held."""
        held = list(held)
        missing = [name for name in self.read if name not in held]
        if missing:
            raise DataError(f"no column {', '.join(map(repr, missing))}: {nearest(missing[0], held)}")

    def row(self, record: Record, *, source: str, license: str = "") -> Row | None:  # noqa: A002 - as a Row calls it
        """The row of a record; None where it is to be left out.

        Raises:
            DataError, ConversationError: a column is missing, or does not hold what the map says.
        """
        if any(_plain(_value(record, name)) != _plain(value) for name, value in self.where.items()):
            return None
        if any(_plain(_value(record, name)) == _plain(value) for name, value in self.unless.items()):
            return None
        unsafe = self.label == "unsafe" if isinstance(self.label, str) else self.label.of(record)
        if unsafe is None:
            return None
        spoken = self._spoken(record)
        if spoken is None:
            return None
        categories = self._categories(record) if unsafe else set()
        attack = self.attack.of(record) if isinstance(self.attack, Choice) else self.attack
        return rows.row(
            {
                **spoken,
                "label": "unsafe" if unsafe else "safe",
                "categories": sorted(categories),
                "attack": attack if unsafe else None,
                "id": _text(_value(record, self.id), self.id) if self.id else None,
                "confidence": _number(self.confidence, _value(record, self.confidence)) if self.confidence else None,
                "source": source,
                "license": license,
                "weak": self.weak,
            },
            source,
        )

    def _spoken(self, record: Record) -> dict[str, object] | None:
        if self.messages:
            return {"messages": _value(record, self.messages)}
        texts = [_text(_value(record, name), name) for name in _names(self.text or ())]
        if not all(text.strip() for text in texts):
            if self.empty == "skip":
                return None
            raise DataError(f"no text in {_names(self.text or ())[0]!r}; to leave such records out, say `empty: skip`")
        return {
            "text": "\n\n".join(texts),
            "role": self.role if isinstance(self.role, str) else self.role.of(record),
            "context": _text(_value(record, self.context), self.context) if self.context else "",
        }

    def _categories(self, record: Record) -> Iterable[Category]:
        return self.categories.of(record) if isinstance(self.categories, Kinds) else self.categories or ()


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def _value(record: Record, name: str) -> object:
    """What a record holds in a column; None for nothing."""
    if name not in record:
        raise DataError(f"no column {name!r}: {nearest(name, record)}")
    value = record[name]
    # pyarrow and pandas write an absent number so; CSV knows no other way to leave a cell out.
    absent = value == "" or (isinstance(value, float) and math.isnan(value))
    return None if absent else value


def _text(value: object, name: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, bool | int):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {name!r} holds {type(value).__name__}, not text")
    return value


def _number(name: str, value: object) -> float:
    try:
        # Of a bool, 1 or 0.
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise DataError(f"column {name!r} holds no number")
    return number


def _kinds(value: object, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (str(kind) for kind, holds in value.items() if holds)
    elif isinstance(value, list | tuple):
        yield from map(str, value)
    elif isinstance(value, str | int):
        yield str(value)
    elif value is not None:
        raise DataError(f"column {name!r} holds {type(value).__name__}, not kinds")


def _plain(value: object) -> str:
    """A value as labels are compared: 1, 1.0, "1" and True are four ways to say the same."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    word = "" if value is None else str(value).strip().lower()
    return {"true": "1", "false": "0"}.get(word, word)


def _told(word: str) -> str:
    """A value as a message may repeat it; a longer one may be a text."""
    short = len(word) <= _LONGEST_LABEL and len(word.split()) <= 2  # noqa: PLR2004 - a text has more words
    return f" {word!r}" if word and short else ""
