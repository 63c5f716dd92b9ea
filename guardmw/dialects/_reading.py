"""How answers become scores: a verdict is one known word in its place, and anything else is an error."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from guardmw.conversation import loads
from guardmw.errors import BackendError
from guardmw.taxonomy import CATEGORIES, categories_of
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from guardmw.dialects import Reply, Token

TOP_LOGPROBS = 20  # what vLLM gives unless told otherwise (--max-logprobs)
# From here on it is worth asking what kind of harm it is.
DOUBTFUL = 0.5

SAFE_UNSAFE: Mapping[str, float] = {"safe": 0.0, "unsafe": 1.0}
YES_NO: Mapping[str, float] = {"no": 0.0, "yes": 1.0}

# A guard model puts nearly all on its verdict words. One that does not was asked wrongly, or is another model.
_LEAST_COVERED = 0.5
# Rounding may make a probability of 1 a little more.
_MOST_LOGPROB = 0.01
_SIGN = re.compile(r"<\|[^|<>]{1,30}\|>|</s>|<eos>|<end_of_turn>")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
# "unsafe" holds "safe" and "unharmful" holds "harmful"; "Safety" is how fields are called.
_VERDICT = re.compile(r"safe(?!ty)|controversial|harmful|\b(?:yes|no)\b", re.IGNORECASE)
_CODE = re.compile(r"\AS\d{1,2}\b[ :.]*", re.IGNORECASE)
# How chat models set JSON off.
_FENCED = re.compile(r"```(?:json)?(.*)```", re.DOTALL | re.IGNORECASE)
# How models say that there is none of a kind.
_NONE = ("", "none", "null", "n/a")


class Reading(NamedTuple):
    """What an answer says.

    Attributes:
        unsafe: P(unsafe) among the words that a verdict can be.
        covered: how much of the probability those words have; 1 where the server tells none.
    """

    unsafe: float
    covered: float = 1.0


def unread(dialect: str, why: str) -> BackendError:
    """An answer that is no verdict; the message never quotes it."""
    return BackendError(f"{dialect}: the answer cannot be read: {why}")


def plain(dialect: str, reply: Reply) -> str:
    """The text of a whole answer, without signs of turns and without thoughts.

    Raises:
        BackendError: it is empty or cut, or a thought does not end.
    """
    if reply.cut:
        raise unread(dialect, "it was cut")
    text = _THOUGHT.sub("", _SIGN.sub("", reply.text))
    if "<think>" in text.lower():
        raise unread(dialect, "a thought in it has no end")
    # vLLM leaves the start of a thought to the prompt where the template has it there.
    text = text.rpartition("</think>")[2].strip()
    if not text:
        raise unread(dialect, "it is empty")
    return text


def fields(dialect: str, text: str, names: Iterable[str]) -> dict[str, str]:
    """The values of lines ``Name: value``, by name as given, case-folded.

    Raises:
        BackendError: a name comes twice, or there is a verdict beside the lines.
    """
    found: dict[str, str] = {}
    rest = text
    for name in names:
        label = re.compile(rf"{re.escape(name)}\s*:", re.IGNORECASE)
        if len(label.findall(text)) > 1:
            raise unread(dialect, f"it gives {name!r} twice")
        line = re.search(rf"^[ \t\"']*{label.pattern}(.*)$", text, re.IGNORECASE | re.MULTILINE)
        if line:
            found[name] = line[1].strip(" \t\r\"'.").casefold()
            rest = rest.replace(line[0], "")
    refuse_more_verdicts(dialect, rest)
    return found


def keyed(dialect: str, text: str, names: Iterable[str]) -> dict[str, Any]:
    """The values of a JSON object by key, case-folded; the object may be fenced, as code in Markdown is.

    Raises:
        BackendError: it is none, or one of the names comes twice in it, at whatever depth and in whatever case.
    """
    fenced = _FENCED.fullmatch(text)
    try:
        given = loads(fenced[1] if fenced else text)
    except ValueError:
        # Outside, as the error inside quotes the answer.
        given = None
    if not isinstance(given, dict):
        raise unread(dialect, "it is not one JSON object")
    keys = _keys(given)
    if twice := [name for name in names if keys.count(name) > 1]:
        raise unread(dialect, f"it gives {twice[0]!r} twice")
    return {_key(key): value for key, value in given.items()}


def refuse_more_verdicts(dialect: str, rest: str) -> None:
    """Make sure that what is left of an answer beside its verdicts holds none.

    Raises:
        BackendError: it does.
    """
    if _VERDICT.search(rest):
        raise unread(dialect, "it gives more than one verdict")


def weigh(dialect: str, reply: Reply, said: str, words: Mapping[str, float], *, after: str = "") -> Reading:
    """What a verdict means, by the probabilities of the words that it could have been.

    Where the server tells no logprobs, or those of other tokens than the verdict's, the word alone counts: 1 or 0.
    Where it tells none of a word of the other meaning, what it did not tell counts as that. A word that means harm
    comes to 0.5 at least, whatever the logprobs are.

    Args:
        dialect: who asks, for messages.
        reply: with the tokens, among which the verdict's is found by what stands before it, and never by its index.
        said: the verdict.
        words: how unsafe each is. No two begin with the same letter: then the first piece of a word tells it, but for a
            letter alone, which begins too much else to stand for a harmless word that was not said, unless harm was.
        after: pattern of what stands before the verdict; nothing where it comes first. Of several the last counts.

    Raises:
        BackendError: ``said`` is no such word, the tokens say another, or the words are improbable altogether.
    """
    if said not in words:
        raise unread(dialect, f"its verdict is none of {', '.join(words)}")
    place = _place(reply.tokens, after)
    if place is None:
        return Reading(words[said])
    token, prefix = place
    told = {token.text: token.logprob, **token.alternatives}
    if not all(logprob <= _MOST_LOGPROB for logprob in told.values()):
        raise unread(dialect, "its logprobs are none")
    likely = {text: math.exp(min(logprob, 0.0)) for text, logprob in told.items()}
    shares = dict.fromkeys(words, 0.0)
    for text, share in likely.items():
        piece = first_word(text.removeprefix(prefix))
        word = _begun(piece, words)
        if word and (words[word] or words[said] or text == token.text or len(piece) > 1):
            shares[word] += share
    if _begun(first_word(token.text.removeprefix(prefix)), words) != said:
        raise unread(dialect, "its tokens say something else than its text")
    covered = min(sum(shares.values()), 1.0)
    if covered < _LEAST_COVERED:
        raise unread(dialect, f"only {covered:.0%} of the probability is on {', '.join(words)}: is it the right model?")
    # A server may tell fewer alternatives than it was asked for, all of them spellings of one word.
    untold = max(1.0 - sum(likely.values()), 0.0)
    harm = sum(words[word] * share for word, share in shares.items()) or untold
    harmless = sum((1.0 - words[word]) * share for word, share in shares.items()) or untold
    return Reading(max(harm / (harm + harmless), DOUBTFUL * words[said]), covered)


def only_word(text: str) -> str:
    """The one word that a text is, without the signs around it; else ""."""
    found = re.fullmatch(r"[\W_]*([^\W_]+)[\W_]*", text)
    return found[1].lower() if found else ""


def first_word(text: str) -> str:
    """The first word of a text, or as much of it as there is; else ""."""
    found = re.match(r"[\W_]*([^\W_]+)", text)
    return found[1].lower() if found else ""


def labels(text: str, codes: Mapping[str, str] | None = None) -> list[str]:
    """Names of kinds of harm in a list with commas: "Violence", "S17: Malware", or with ``codes`` "S1" too."""
    found = []
    for part in text.split(","):
        label = part.strip(" \t\r\n\"'[]{}.`")
        named = _CODE.sub("", label)
        found.append(named or (codes or {}).get(label.upper(), ""))
    return [label for label in found if not is_none(label)]


def listed(dialect: str, given: object) -> list[str]:
    """Names of kinds of harm in a JSON value.

    Raises:
        BackendError: it is no list of names, and not nothing.
    """
    if not given:
        return []
    if not isinstance(given, list) or not all(isinstance(kind, str) for kind in given):
        raise unread(dialect, "its categories are no list of names")
    return [kind for kind in given if not is_none(kind)]


def is_none(label: str) -> bool:
    """Whether a label says that there is none."""
    return label.strip().casefold() in _NONE


def scores(unsafe: float, kinds: Iterable[str] | None = None, *, injection: float = 0.0) -> Scores:
    """Scores of a verdict.

    Args:
        unsafe: P(unsafe).
        kinds: a model's names for the harm: each as probable as the verdict, and the others not at all. None where the
            model tells no kinds.
        injection: P(injection).
    """
    if kinds is None:
        return Scores(unsafe, injection=injection)
    ours = {category for kind in kinds for category in categories_of(kind) or ()}
    return Scores(unsafe, {name: unsafe if name in ours else 0.0 for name in CATEGORIES}, injection)


def _key(key: str) -> str:
    return key.strip().casefold()


def _keys(value: object) -> list[str]:
    """All keys of a JSON value, at whatever depth."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found += map(_key, one)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return found


def _place(tokens: tuple[Token, ...], after: str) -> tuple[Token, str] | None:
    """The token in which a verdict begins, and what of it comes before the verdict."""
    start = 0
    if after:
        found = list(re.finditer(after, "".join(token.text for token in tokens), re.IGNORECASE))
        if not found:
            return None
        start = found[-1].end()
    at = 0
    for token in tokens:
        prefix = token.text[: max(start - at, 0)]
        if any(map(str.isalnum, token.text[len(prefix) :])) and not _SIGN.fullmatch(token.text.strip()):
            return token, prefix
        at += len(token.text)
    return None


def _begun(piece: str, words: Mapping[str, float]) -> str:
    """The word that a piece of one is, or begins; else ""."""
    return next((word for word in words if piece and word.startswith(piece)), "")
