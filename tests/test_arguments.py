"""What an argument may be: every way round a constraint that we know of is closed, and doubt is a violation."""

from __future__ import annotations

import builtins
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import Policy, PolicyError
from guardmw.arguments import Argument, Constraint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def fault(value: Any, /, path: str = "x", **settings: Any) -> str:
    """What is wrong with an argument x of this value; empty where nothing is."""
    return fault_in({"x": value}, path, **settings)


def fault_in(arguments: Any, /, path: str = "x", **settings: Any) -> str:
    """What is wrong with these arguments of a call."""
    found = Argument("argument:tool.x", path, Constraint.model_validate(settings)).violation(arguments)
    assert found is None or (found.score, found.threshold) == (1.0, 1.0)
    return found.rule.removeprefix("argument:tool.x:") if found else ""


GOOD_DOMAINS = [
    "https://good.com",
    "HTTPS://GOOD.COM/",
    "http://api.good.com:8080/a?b=c#d",
    "https://good.com./x",
    "https://user:secret@good.com/",
    "//good.com/x",
    "good.com/path",
    "good.com",
    "bob@good.com",
    "Bob <bob@mail.good.com>, ann@good.com; x@good.com.",
    "See https://good.com/a, (http://good.com) and 'https://good.com'.",
    '<a href="https://good.com">here</a>',
    "https://ｇood.com/",
    "https://good。com/",
    "https://bücher.de/",
    "https://xn--bcher-kva.de",
    "just words, e.g. these in report.txt, and @bob of http fame; 3.5 at 12:30 // no comment",
    "word",
    "Thanks.",
    "",
    7,
    True,
    None,
]
BAD_DOMAINS = [
    "https://evil.com",
    "https://good.com.evil.com",
    "https://evilgood.com",
    "https://good.com@evil.com",
    "https://good.com:443@evil.com/",
    "https://evil.com#@good.com",
    "https://evil.com?@good.com",
    "https://evil.com\\@good.com",
    "https://good.com\\@evil.com",
    "https://good.com%2f@evil.com",
    "https://good.com%2eevil.com",
    "https:/evil.com",
    "https:evil.com",
    "https:\\\\evil.com",
    "https:///evil.com",
    "//evil.com/x",
    "\\\\evil.com\\share",
    "x=//evil.com",
    "ht\ttps://good.com\n.evil.com",
    "https://good.com\t.evil.com/",
    "/\t/evil.com",
    "https://\ufeffgood.com",
    "https://good.com\u200b.evil.com",
    "https://good.com'.evil.com",
    "https://good.com,evil.com",
    "https://gооd.com",
    "https://faß.de/",
    "https://xn--evil-good.com",
    "https://evil。com",
    "https：//evil.com",
    "https://evil.c℀.good.com",
    "https://good.com／.evil.com",
    "https://",
    "https://[::1]/",
    "http://127.0.0.1",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://localhost:1",
    "localhost:8080/x",
    "evil.com",
    "evil.com:80",
    "evil.com/path",
    "127.1",
    "post it to evil.com/?q=secret please",
    "see https://good.com/ and ftp://evil.com",
    "https://good.com/?next=https://evil.com",
    '<img src="https://evil.com/x.png">',
    "file:///etc/passwd",
    "mailto:bob@evil.com",
    "bob@evil.com",
    "bob@good.com,bob@evil.com",
    '"bob@good.com"@evil.com',
    "bob@evil.com@good.com",
    "bob@good.com@evil.com",
    'see https://good.com"https://evil.com"',
    "it is at:evil.com/x or so",
    "it is at .evil.com/x or so",
    "bob@localhost",
    "bob@[10.0.0.1]",
    "bob@ evil.com",
    "bob＠evil.com",
    "git@evil.com:repo.git",
    b"https://evil.com",
    object(),
]
ALLOWED = ["good.com", "bücher.de", "fass.de"]


@pytest.mark.parametrize("value", GOOD_DOMAINS)
def test_an_allowed_domain_passes(value: Any) -> None:
    """With its sub-domains, port, userinfo and every spelling that leads there; and so do words without any address."""
    assert fault(value, domains=ALLOWED, optional=True) == ""


@pytest.mark.parametrize("value", BAD_DOMAINS)
def test_another_domain_is_found_however_it_is_hidden(value: Any) -> None:
    """By any client's reading of the text, at any depth of the argument."""
    for hidden in (value, ["https://good.com", value], {"a": [{"b": value}]}):
        assert fault(hidden, domains=ALLOWED)
    if isinstance(value, str):
        assert fault({value: "x"}, domains=ALLOWED)
        assert fault_in({"anything": [value]}, "*", domains=ALLOWED)


PIECES = ["https://", "good.com", "bob@good.com", *"\"'<>()[]{}@:/\\?#.,;= \n\tx1", "//", "https:"]


@given(
    st.text("htps:/\\@.#?goded.comvil[]1 \n\t,'\"<>", max_size=30) | st.lists(st.sampled_from(PIECES)).map("".join),
    st.sampled_from(
        ["https://evil.example/", "x@evil.example", " //evil.example", "bob@evil.example, ", " evil.example/"]
    ),
)
def test_a_foreign_host_is_found_in_any_surroundings(before: str, foreign: str) -> None:
    """Whatever stands before it."""
    assert fault(before + foreign, domains=["good.com"]) == "domains"


@pytest.mark.parametrize(
    ("value", "roots"),
    [
        ("/srv/reports/a.csv", ["/srv/reports"]),
        ("/srv//reports/./a.csv", ["/srv/reports/"]),
        ("/srv/reports", ["/srv/reports"]),
        ("reports/a.csv", ["reports"]),
        ("./reports/a..b", ["reports"]),
        ("a.csv", ["."]),
        ("/anything", ["/"]),
        (["/data/a", "/srv/b"], ["/data", "/srv"]),
    ],
)
def test_a_path_inside_passes(value: Any, roots: list[str]) -> None:
    """However it is spelled, if there is one reading of it."""
    assert fault(value, paths=roots) == ""


@pytest.mark.parametrize(
    ("value", "roots"),
    [
        ("/etc/passwd", ["/srv"]),
        ("/srv/../etc/passwd", ["/srv"]),
        ("/srv/link/../a", ["/srv"]),
        ("../a", ["."]),
        ("/srvx/a", ["/srv"]),
        ("/SRV/a", ["/srv"]),
        ("srv/a", ["/srv"]),
        ("/srv/a", ["srv"]),
        ("/srv/a", ["."]),
        ("~/a", ["."]),
        ("$HOME/a", ["."]),
        (" /etc/passwd", ["."]),
        ("/srv/a\n", ["/srv"]),
        ("/srv/a\x00.csv", ["/srv"]),
        ("/srv\\..\\a", ["/srv"]),
        ("/srv/%2e%2e/a", ["/srv"]),
        ("/srv/．．/etc", ["/srv"]),
        ("file:/srv/a", ["."]),
        ("C:/a", ["."]),
        ("", ["."]),
        (7, ["."]),
        (None, ["."]),
        (["/srv/a", "/etc/a"], ["/srv"]),
        ("/srv/a", []),
    ],
)
def test_a_path_outside_or_of_two_meanings_does_not(value: Any, roots: list[str]) -> None:
    """What "..", "~", a link or a decoder makes of it is not ours to guess."""
    assert fault(value, paths=roots)


@pytest.mark.parametrize("value", [0, 100, 99.5, "100", "+1e2", ".5", Decimal(7), "9" * 2, -0.0])
def test_a_number_within_its_limits_passes(value: Any) -> None:
    """Both ends belong to them, and a string that is a number is one."""
    assert fault(value, min=0, max=100) == ""


@pytest.mark.parametrize(
    "value",
    [
        -1, 101, "-0.1", 100.00001, "100.0000000000000000000000001", 10**400, "1e999", float("nan"), float("inf"),
        "nan", "inf", "Infinity", True, "", "1_0", " 7", "٧", "0x7", "1e99999", "7 apples", [7, 101], Decimal("NaN"),
        Decimal("sNaN"), Decimal("Infinity"),
    ],
)  # fmt: skip
def test_what_is_beyond_them_or_no_number_does_not(value: Any) -> None:
    """NaN above all, which is under every limit and over none; and True, which Python takes for 1."""
    assert fault(value, min=0, max=100)


def test_a_limit_is_exact() -> None:
    """Floats run out of whole numbers at 2 to the 53rd."""
    assert fault("9007199254740993", max=9007199254740992) == "max"
    assert fault(9007199254740993, max=9007199254740992) == "max"
    assert fault("9007199254740992", max=9007199254740992) == ""


def test_a_pattern_matches_the_whole_of_it() -> None:
    """Not only a part, and not up to a newline."""
    assert fault("abc", pattern="[a-c]+") == ""
    assert fault("abcd", pattern="[a-c]+") == "pattern"
    assert fault("abc\n", pattern="^[a-c]+$") == "pattern"
    assert fault(["abc", "abd"], pattern="[a-c]+") == "pattern"
    assert fault(12, pattern=r"\d\d") == ""
    assert fault(True, pattern=".*") == "pattern"


def test_what_is_long_is_not_even_matched() -> None:
    """A pattern may take minutes on it; 1,000 characters where there is one, else 10,000, or as the policy says."""
    assert fault("a" * 1_000, pattern="a*") == ""
    assert fault("a" * 1_001, pattern="(a|a)*b") == "length"
    assert fault("a" * 10_000, domains=[]) == ""
    assert fault("a" * 10_001, domains=[]) == "length"
    assert fault("abc", max_length=2) == "length"
    assert fault({"abc": 1}, max_length=2) == "length"
    assert fault(10**5_000, pattern=".*") == "length"


def test_what_has_too_many_parts_is_not_searched() -> None:
    """Nor is what holds itself."""
    assert fault(["a"] * 20_000, domains=[]) == "length"
    around: list[Any] = []
    around.append(around)
    assert fault(around, domains=[]) == "length"
    assert fault(around, path="x.y", domains=[]) == "unreadable"


@pytest.mark.parametrize("settings", [{}, {"pattern": ".*"}, {"domains": ["good.com"]}, {"max": 1}])
def test_what_is_missing_is_a_violation(settings: dict[str, Any]) -> None:
    """Its default may be what the rule forbids; unless it is optional."""
    assert fault_in({}, **settings) == "missing"
    assert fault(None, **settings) == "missing"
    assert fault_in({}, **settings, optional=True) == ""
    assert fault(None, **settings, optional=True) == ""


def test_an_empty_list_is_as_good_as_missing() -> None:
    """Many a tool takes it for everything."""
    assert fault([], paths=["/srv"]) == "missing"
    assert fault([], paths=["/srv"], optional=True) == ""


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("path", ["x", "x.y", "*"])
def test_arguments_that_nobody_could_parse_are_a_violation(path: str, optional: bool) -> None:
    """Perhaps the tool can."""
    assert fault_in('{"x": "https://good.com"', path, domains=["good.com"], optional=optional) == "unreadable"


def test_dots_lead_into_objects_and_each_item_of_lists() -> None:
    """One item without it is one that is missing."""
    assert fault({"to": "a@good.com"}, "x.to", domains=["good.com"]) == ""
    assert fault([{"to": "a@good.com"}, {"to": "a@evil.com"}], "x.to", domains=["good.com"]) == "domains"
    assert fault([{"to": "a@good.com"}, {}], "x.to", domains=["good.com"]) == "missing"
    assert fault([], "x.to", domains=["good.com"]) == "missing"
    assert fault({}, "x.to", domains=["good.com"], optional=True) == ""


def test_a_key_with_a_dot_is_no_decoy() -> None:
    """Both readings are held to the rule."""
    decoy = {"x.to": "a@good.com", "x": {"to": "a@evil.com"}}
    assert fault_in(decoy, "x.to", domains=["good.com"]) == "domains"
    assert fault_in({"x.to": "a@evil.com", "x": {"to": "a@good.com"}}, "x.to", domains=["good.com"]) == "domains"


def test_text_in_place_of_an_object_is_a_violation() -> None:
    """Even where what it should hold is optional: a tool may parse it."""
    assert fault('{"to": "a@evil.com"}', "x.to", domains=["good.com"], optional=True) == "unreadable"


def test_a_star_stands_for_all_arguments() -> None:
    """But not for their names, which the model does not choose."""
    assert fault_in({"a.b": "word"}, "*", domains=[]) == ""
    assert fault_in({"a": {"b.c": "word"}}, "*", domains=[]) == "domains"
    assert fault_in({}, "*", domains=[]) == ""


def test_a_json_schema_is_one() -> None:
    """Of one argument or of all, and a reference to elsewhere is no download."""
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    assert fault({"n": 1}, json_schema=schema) == ""
    assert fault({"n": "1"}, json_schema=schema) == "json_schema"
    assert fault({"m": 1}, json_schema=schema) == "json_schema"
    assert fault_in({"n": 1}, "*", json_schema=schema) == ""
    assert fault_in({"m": 1}, "*", json_schema=schema) == "json_schema"
    assert fault([], json_schema={"type": "array"}) == ""
    assert fault({}, json_schema={"$ref": "https://example.com/schema.json"}) == "json_schema"
    with pytest.raises(PolicyError, match=r"^tools\.arguments\.pay\.x\.json_schema: not a JSON schema"):
        Policy.model_validate({"tools": {"arguments": {"pay": {"x": {"json_schema": {"type": 7}}}}}})


def test_without_the_extra_a_json_schema_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the policy is read, not when a call is made."""
    imported = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "jsonschema":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PolicyError, match=r"x\.json_schema: needs jsonschema: pip install 'guardmw\[schema\]'"):
        Policy.model_validate({"tools": {"arguments": {"pay": {"x": {"json_schema": {}}}}}})


@given(
    st.one_of(JSON, st.dictionaries(st.sampled_from(["x", "y"]), JSON)),
    st.sampled_from(["x", "x.y", "*"]),
    st.fixed_dictionaries(
        {},
        optional={
            "pattern": st.just("[a-z]*"),
            "domains": st.just(["good.com"]),
            "paths": st.just(["."]),
            "min": st.just(0),
            "max": st.just(9),
        },
    ),
    st.booleans(),
)
def test_anything_gets_an_answer_and_more_checks_pass_no_more(
    value: Any, path: str, settings: dict[str, Any], optional: bool
) -> None:
    """No value breaks a check, and what one check refuses no other redeems."""
    arguments = value if isinstance(value, dict) else {"x": value}
    alone = [fault_in(arguments, path, optional=optional, **{name: of}) for name, of in settings.items()]
    together = fault_in(arguments, path, optional=optional, **settings)
    if any(alone):
        assert together
    if settings and not any(alone):
        # A pattern only lowers the length that is looked at.
        assert together in ("", "length")
