"""What an argument of a tool call may be: constraints that are read once, cheap to check, and closed on doubt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from guardmw.settings import Part
from guardmw.verdict import Action, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Name = Annotated[str, Field(min_length=1)]
EVERYTHING = "*"
"""In place of an argument: all of them, as one object."""

# A pattern's author rarely thinks of the text on which it takes minutes; short texts forgive more patterns.
_LONGEST_FOR_A_PATTERN = 1_000
_LONGEST = 10_000
_MOST_PARTS = 10_000
_WIDEST_NUMBER = 100


def _finite(number: float) -> float:
    if not isfinite(number):
        raise ValueError("a limit is a finite number")
    return number


Number = Annotated[float, Field(strict=True), AfterValidator(_finite)]


class Constraint(Part):
    """What one argument of a tool may be. It must be given, and every string and number in it must keep to all of this.

    Attributes:
        pattern: a regular expression that the whole of it matches.
        domains: the hosts, with their sub-domains, that URLs and e-mail addresses in it may name.
        paths: the folders or files (POSIX) that it may lie in; absolute ones hold absolute paths, relative ones
            relative.
        min: the least number.
        max: the greatest number.
        json_schema: a JSON schema that it fits; needs the extra "schema".
        max_length: characters; longer is a violation. None: 1,000 with a pattern, else 10,000.
        optional: whether it may be left out.
        action: what breaking it means.
    """

    pattern: str | None = None
    domains: list[Name] | None = None
    paths: list[Name] | None = None
    min: Number | None = None
    max: Number | None = None
    json_schema: dict[str, Any] | None = None
    max_length: Annotated[int, Field(strict=True, gt=0)] | None = None
    optional: Annotated[bool, Field(strict=True)] = False
    action: Action = "block"

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, given: str | None) -> str | None:
        try:
            re.compile(given or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return given

    @field_validator("domains")
    @classmethod
    def _are_domains(cls, given: list[str] | None) -> list[str] | None:
        for domain in given or ():
            if domain.startswith("*."):
                raise ValueError(f"{domain!r}: write {domain[2:]!r}, its sub-domains are included")
            if _host(domain) is None:
                raise ValueError(f"{domain!r} is no host name, such as 'example.com' or, in doubt, its punycode")
        return given

    @field_validator("paths")
    @classmethod
    def _are_paths(cls, given: list[str] | None) -> list[str] | None:
        for path in given or ():
            if _steps(path) is None:
                raise ValueError(f"{path!r} is no plain POSIX path, such as '/srv/reports' or 'reports'")
        return given

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            _fits(given)
        return given

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is greater than max")
        return self


class Argument:
    """A constraint on one argument, in the form that is fast to check.

    Args:
        rule: how a violation is called; what is wrong is added to it.
        path: the argument's name; dots lead into objects, and through lists to each of their items.
    """

    __slots__ = ("_action", "_checks", "_fits", "_longest", "_names", "_optional", "_rule")

    def __init__(self, rule: str, path: str, constraint: Constraint) -> None:
        self._rule = rule
        self._names = () if path == EVERYTHING else tuple(path.split("."))
        self._action = constraint.action
        self._optional = constraint.optional
        default = _LONGEST if constraint.pattern is None else _LONGEST_FOR_A_PATTERN
        self._longest = constraint.max_length or default
        self._fits = None if constraint.json_schema is None else _fits(constraint.json_schema)
        self._checks = tuple(_checks(constraint))

    def violation(self, arguments: Mapping[str, Any] | str) -> Violation | None:
        """What is wrong with it in these arguments of a call; a str is what a model wrote and nobody could parse."""
        fault = self._fault(arguments)
        return Violation(f"{self._rule}:{fault}", 1.0, 1.0, self._action) if fault else None

    def _fault(self, arguments: Mapping[str, Any] | str) -> str:
        if isinstance(arguments, str):
            return "unreadable"
        values = _values(arguments, self._names) if self._names else [arguments]
        if values is None:
            return "unreadable"
        for value in values:
            fault = ("" if self._optional else "missing") if value is None else self._fault_of(value)
            if fault:
                return fault
        return ""

    def _fault_of(self, value: object) -> str:
        # The names of parameters are not the model's to choose, the keys of an object in one of them are.
        parts = _parts(value, keys=bool(self._names))
        if parts is None:
            return "length"
        # An empty list often means what leaving it out does: everything.
        if not parts and self._checks and self._names and not self._optional:
            return "missing"
        for part in parts:
            fault = self._size(part) or next((name for name, holds in self._checks if not holds(part)), "")
            if fault:
                return fault
        return "json_schema" if self._fits and not self._fits(value) else ""

    def _size(self, part: object) -> str:
        if isinstance(part, str):
            return "length" if len(part) > self._longest else ""
        if isinstance(part, int):
            # Python refuses to write out numbers of thousands of digits.
            return "length" if part.bit_length() > _WIDEST_NUMBER * 4 else ""
        return "" if part is None or isinstance(part, float | Decimal) else "unreadable"


def _checks(constraint: Constraint) -> Iterator[tuple[str, Callable[[object], bool]]]:
    """What every string and number in the argument must pass, by name."""
    if constraint.pattern is not None:
        matches = re.compile(constraint.pattern).fullmatch
        yield "pattern", lambda part: (text := _written(part)) is not None and matches(text) is not None
    if constraint.domains is not None:
        allowed = frozenset(host for domain in constraint.domains if (host := _host(domain)))
        yield "domains", lambda part: not isinstance(part, str) or _names_only(part, allowed)
    if constraint.paths is not None:
        roots = [steps for path in constraint.paths if (steps := _steps(path))]
        yield "paths", lambda part: isinstance(part, str) and _lies_in(part, roots)
    if (least := constraint.min) is not None:
        yield "min", lambda part: (number := _number(part)) is not None and number >= least
    if (most := constraint.max) is not None:
        yield "max", lambda part: (number := _number(part)) is not None and number <= most


# Where an argument is

_MISSHAPEN = object()


def _values(arguments: Mapping[str, Any], names: tuple[str, ...]) -> list[object] | None:
    """Everything that is called so; None stands for one that is not there, and in place of all for what is too much."""
    found: list[object] = []
    waiting: list[tuple[object, tuple[str, ...]]] = [(arguments, names)]
    for _ in range(_MOST_PARTS):
        if not waiting:
            return found
        value, left = waiting.pop()
        if not left or value is None:
            found.append(value)
        elif isinstance(value, Mapping):
            # A key that holds a dot may stand beside the objects that the dots lead into: both are meant.
            keys = [".".join(left[: end + 1]) for end in range(len(left))]
            inner = [(value[key], left[end + 1 :]) for end, key in enumerate(keys) if key in value]
            waiting += inner
            if not inner:
                found.append(None)
        elif isinstance(value, list | tuple):
            waiting += [(item, left) for item in value]
            if not value:
                found.append(None)
        else:
            # Text in place of an object: perhaps the tool will parse it, and nobody here did.
            found.append(_MISSHAPEN)
    return None


def _parts(value: object, *, keys: bool) -> list[object] | None:
    """The strings and numbers in a value, keys included; None where they are too many."""
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return [value]
    found: list[object] = list(value) if keys and isinstance(value, Mapping) else []
    waiting: list[object] = list(value.values() if isinstance(value, Mapping) else value)
    for _ in range(_MOST_PARTS):
        if not waiting:
            return found
        part = waiting.pop()
        if isinstance(part, Mapping):
            found += part
            waiting += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += part
        else:
            found.append(part)
    return None


def _readings(text: str) -> tuple[str, ...]:
    """A text as it is and, if that is another, as software that folds look-alike characters reads it."""
    return (text,) if text.isascii() or (folded := unicodedata.normalize("NFKC", text)) == text else (text, folded)


# Text and numbers


def _written(part: object) -> str | None:
    if isinstance(part, str):
        return part
    return None if part is None or isinstance(part, bool) else str(part)


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)


def _number(part: object) -> float | Decimal | None:
    """A finite number, exactly; None where it is none, as True is none."""
    if isinstance(part, str):
        return Decimal(part) if len(part) <= _WIDEST_NUMBER and _NUMBER.fullmatch(part) else None
    if isinstance(part, Decimal):
        return part if part.is_finite() else None
    if isinstance(part, bool) or not isinstance(part, int | float):
        return None
    # An int may be too large to be asked whether it is finite.
    return part if isinstance(part, int) or isfinite(part) else None


def _fits(schema: Mapping[str, Any]) -> Callable[[object], bool]:
    """Whether a value fits a JSON schema.

    Raises:
        ValueError: it is no JSON schema, or the library is not installed.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415 - an extra
        from jsonschema.validators import validator_for  # noqa: PLC0415 - an extra
        from referencing import Registry  # noqa: PLC0415 - an extra
    except ImportError:
        raise ValueError("needs jsonschema: pip install 'guardmw[schema]'") from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from None
    # An empty registry: a $ref to somewhere else is an error and not a download.
    validator = kind(schema, registry=Registry())

    def fits(value: object) -> bool:
        try:
            return bool(validator.is_valid(value))
        except Exception:  # noqa: BLE001 - a $ref that leads nowhere, nesting too deep: what is not understood does not fit
            return False

    return fits


# Paths

_ODD_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\\]|%2e|%2f|%5c|^[~$\s]|\s$|^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def _steps(path: str) -> tuple[str, ...] | None:
    """A path's names, "/" before those of an absolute one; None where what it leads to depends on who reads it."""
    # "..": where a folder is a link, no reading of the text alone tells what lies above it.
    if not path or _ODD_IN_PATHS.search(path) or ".." in (names := path.split("/")):
        return None
    return ("/" if path.startswith("/") else ".", *(name for name in names if name not in ("", ".")))


def _lies_in(path: str, roots: list[tuple[str, ...]]) -> bool:
    return all(
        (steps := _steps(reading)) is not None and any(steps[: len(root)] == root for root in roots)
        for reading in _readings(path)
    )


# Hosts

# Slashes either way, and as many or few as browsers put up with.
_URL_BEGINS = r"""(?:(?P<sure>:[/\\]{2,})|(?:https?|wss?|ftps?):[/\\]?(?![/\\])|(?<![^\s"'=(<>,;\[{])[/\\]{2,})"""
# Userinfo and port are still in it.
_URL = re.compile(_URL_BEGINS + r"""(?P<authority>[^\s/\\?#]*)""", re.IGNORECASE)
_QUOTED_URL = re.compile(_URL_BEGINS + r"""(?P<authority>[^\s/\\?#"'<>`]*)""", re.IGNORECASE)
# What stands before "@" is looked back at: it may end the host of another address.
_MAIL = re.compile(r"""(?:^|(?<=(?P<before>.)))@(?P<host>\[[^\]\s]{0,64}\]|[^\s@/\\?#:,;<>"()\[\]]*)""", re.DOTALL)
_BARE = re.compile(r"""(?<![\w@/\\-])(?<![\w-]\.)(?P<host>(?:[\w-]+\.)+[\w-]+)(?=\.?(?:[/\\?#]|:\d))""")
_BEGINS_AS_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:|[/\\]{2})", re.IGNORECASE)
_BEGINS_AS_WEB = re.compile(r"\s*(?:(?:https?|wss?|ftps?|file):|[/\\]{2})", re.IGNORECASE)
_SEPARATORS = re.compile(r"[/\\?#]")
_NAMED_PORT = re.compile(r"[a-z][a-z0-9-]*:\d+", re.IGNORECASE)
_PORT = re.compile(r":\d*$", re.ASCII)
_PLAIN = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII)
# Left out by URL parsers: WHATWG's tab and newline, and what IDNA maps to nothing.
_IGNORED = re.compile("[\x00-\x1f\x7f\u00ad\u200b-\u200f\u2060\ufeff]")
_DOTS = str.maketrans("\u3002\uff0e\uff61", "...")
# Letters that two standards lead to two places, and signs that one of them leaves out.
_DEVIANT = re.compile("[\u00df\u03c2\u1e9e\u00ad\u200b-\u200f\u2060\ufeff]")
_TRAILING = "\"'`<>(){},;.!*_|=&"
_LONGEST_HOST = 253


def _names_only(text: str, allowed: frozenset[str]) -> bool:
    """Whether every URL, e-mail address and host name in a text leads to an allowed host or below one."""
    for reading in _readings(text):
        shrunk = _IGNORED.sub("", reading)
        whole = bool(_BEGINS_AS_URL.match(reading) or _BEGINS_AS_WEB.match(shrunk))
        for spelling in {reading, shrunk} if whole else {reading}:
            if not all(_is_allowed(host, allowed) for host in _hosts(spelling, whole=whole)):
                return False
    return True


def _hosts(text: str, *, whole: bool) -> Iterator[str]:
    """The hosts a text names, as they are written. Quotes end a URL, unless it is the whole of the text."""
    for found in (_URL if whole else _QUOTED_URL).finditer(text):
        authority = found["authority"]
        if authority or found["sure"]:
            yield _PORT.sub("", authority.rpartition("@")[2].rstrip(_TRAILING))
    for found in _MAIL.finditer(text):
        host = found["host"].rstrip(_TRAILING)
        # "@user" in prose and in paths is a handle.
        if "." in host or (found["before"] and not found["before"].isspace() and found["before"] not in "/("):
            yield host
    for found in _BARE.finditer(text):
        yield found["host"]
    word = text.strip()
    if "@" in word or "://" in word or word.split(maxsplit=1) != [word]:
        return
    # One word that is no URL: a client may take it for one that lacks its "https://".
    authority = _SEPARATORS.split(word, maxsplit=1)[0].rstrip(_TRAILING).translate(_DOTS)
    host = _PORT.sub("", authority)
    if ("." in host and not host.startswith(".")) or _NAMED_PORT.fullmatch(authority):
        yield host


def _is_allowed(host: str, allowed: frozenset[str]) -> bool:
    plain = _host(host)
    while plain:
        if plain in allowed:
            return True
        plain = plain.partition(".")[2]
    return False


def _host(written: str) -> str | None:
    """A host name as the network knows it; None where it is none, or which it is depends on who reads it."""
    host = written.translate(_DOTS).removesuffix(".")
    if len(host) > _LONGEST_HOST:
        return None
    if not host.isascii():
        try:
            host = "" if _DEVIANT.search(host) else host.encode("idna").decode()
        except UnicodeError:
            return None
    host = host.lower()
    if host.startswith("[") and host.endswith("]"):
        return host
    return host if _PLAIN.fullmatch(host) else None
