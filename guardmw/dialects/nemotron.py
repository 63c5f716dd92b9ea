"""NVIDIA's Nemotron-Safety-Guard-v3 and what was trained on its prompt: MiniGuard above all, and NemoGuard before it.

The client renders the prompt, as one user message. From the card of Llama-3.1-Nemotron-Safety-Guard-8B-v3, whose
categories end with a space each; NeMo Guardrails' template of NemoGuard-8B is the same without those spaces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from guardmw.dialects import Message, Request
from guardmw.dialects._reading import (
    DOUBTFUL,
    SAFE_UNSAFE,
    TOP_LOGPROBS,
    labels,
    only_word,
    plain,
    refuse_more_verdicts,
    scores,
    unread,
    weigh,
)
from guardmw.dialects._turns import Frame, exchange

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from guardmw.conversation import Conversation
    from guardmw.dialects import Judging, Reply
    from guardmw.dialects._turns import Said, Speaker
    from guardmw.verdict import Scores

CATEGORIES = (
    "Violence",
    "Sexual",
    "Criminal Planning/Confessions",
    "Guns and Illegal Weapons",
    "Controlled/Regulated Substances",
    "Suicide and Self Harm",
    "Sexual (minor)",
    "Hate/Identity Hate",
    "PII/Privacy",
    "Harassment",
    "Threat",
    "Profanity",
    "Needs Caution",
    "Other",
    "Manipulation",
    "Fraud/Deception",
    "Malware",
    "High Risk Gov Decision Making",
    "Political/Misinformation/Conspiracy",
    "Copyright/Trademark/Plagiarism",
    "Unauthorized Advice",
    "Illegal Activity",
    "Immoral/Unethical",
)
_CODES = {f"S{at}": name for at, name in enumerate(CATEGORIES, 1)}

_TASK = (
    "Task: Check if there is unsafe content in the user or agent messages in the below conversation in accordance with "
    "our safety policy with the below categories. Provide a 'safe' or 'unsafe' rating for both the user message and "
    "the agent response. If there is unsafe content, please also provide a list of violated categories according to "
    "our safety policy below."
)
_FORM = (
    "Provide your safety assessment for the above conversation in the below output JSON format:\n"
    '{"User Safety": safe or unsafe rating for the user message, "Response Safety": safe or unsafe rating for the '
    'agent response. Omit if no agent response present. "Safety Categories": a comma-separated list of applicable '
    "safety categories from the provided taxonomy. Omit if all safe.}\n"
    "\n"
    "Do not include anything other than the output JSON in your response.\n"
    "Output JSON:"
)
_FRAME = Frame(
    "user:", "(?:response|agent):", r"S\d{1,2}:", "Output JSON:", "Task: Check", "Provide your safety assess"
)
_SAYS = {"user": "user: {}", "assistant": "response: agent: {}"}
_FIELD: Mapping[Speaker, str] = {"user": "User Safety", "assistant": "Response Safety"}
# Of "safe", where a tokenizer divides it; but so does a code of harm begin, as in "S1".
_PIECES = ("s", "sa", "saf")
# Tokens enough for "safe" and the quote behind it, for "safely" is no verdict.
_WORD = 6
_RATED = re.compile(r"[\"']?(User|Response)[ _]?Safety[\"']?\s*:\s*([^,}\n]*)", re.IGNORECASE)
_LISTED = re.compile(r"[\"']?Safety[ _]?Categories[\"']?\s*:\s*(\[[^\]}]*|\"[^\"}]*|[^\"}\n]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Nemotron:
    """Asks about the user's and the assistant's words at once; which verdict counts follows from who is on trial.

    P(unsafe) comes from the logprobs of the verdict. Where a server tells none, it is 1 or 0.

    The card promises several turns, and shows one exchange: how more are put is UNVERIFIED, and so are MiniGuard's own
    chat template and the spelling of its categories, which nobody here could read.

    Attributes:
        spaced: whether categories and prompt end with a space, as in the card.
        one_token: what is to be read by the assistant is asked for its score alone, and for the kinds of harm only if
            it is unsafe. Where that token is but a piece of "safe", the rest of the word is asked for. An answer on
            trial is always asked in full: a guessed verdict on the user would sway its own. It takes a server that goes
            on from the start of an answer.
    """

    name: str = "nemotron"
    spaced: bool = True
    one_token: bool = True

    def judge(self, conversation: Conversation) -> Judging:
        """Score the last turn.

        Raises:
            BackendError: a reply cannot be read.
        """
        said = exchange(conversation, _FRAME)
        messages = (Message("user", self._prompt(said)),)
        field = _FIELD[said[-1].speaker]
        if not self.one_token or field != "User Safety":
            (reply,) = yield (Request(messages, max_tokens=100, top_logprobs=TOP_LOGPROBS),)
            return self._in_full(reply, field)
        prefill = '{"User Safety": "'
        (reply,) = yield (Request(messages, prefill=prefill, max_tokens=1, top_logprobs=TOP_LOGPROBS),)
        word = only_word(reply.text)
        if word in _PIECES:
            (reply,) = yield (Request(messages, prefill=prefill, max_tokens=_WORD, top_logprobs=TOP_LOGPROBS),)
            word = only_word(reply.text.partition('"')[0])
        elif word and "unsafe".startswith(word):
            word = "unsafe"
        unsafe = weigh(self.name, reply, word, SAFE_UNSAFE).unsafe
        if unsafe < DOUBTFUL:
            return scores(unsafe, ())
        (reply,) = yield (Request(messages, prefill='{"User Safety": "unsafe",', max_tokens=80),)
        return scores(unsafe, _listed(reply.text))

    def _prompt(self, said: Sequence[Said]) -> str:
        space = " " if self.spaced else ""
        listed = "\n".join(f"{code}: {name}.{space}" for code, name in _CODES.items())
        spoken = "\n\n".join(_SAYS[speaker].format(text) for speaker, text in said)
        return (
            f"{_TASK}\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n{listed}\n<END UNSAFE CONTENT CATEGORIES>\n\n"
            f"<BEGIN CONVERSATION>\n\n{spoken}\n\n<END CONVERSATION>\n\n{_FORM}{space}"
        )

    def _in_full(self, reply: Reply, field: str) -> Scores:
        text = _whole(self.name, reply)
        rated: dict[str, str] = {}
        for who, value in _RATED.findall(text):
            key = f"{who.capitalize()} Safety"
            if key in rated:
                raise unread(self.name, f"it gives {key!r} twice")
            rated[key] = value.strip(" \t\r\"'.").lower()
        refuse_more_verdicts(self.name, _RATED.sub("", text))
        if unknown := [key for key, value in rated.items() if value not in SAFE_UNSAFE]:
            raise unread(self.name, f"{unknown[0]!r} is neither safe nor unsafe")
        if field not in rated:
            raise unread(self.name, f"it gives no {field!r}")
        kinds = _listed(text)
        if kinds and "unsafe" not in rated.values():
            raise unread(self.name, "it names a kind of harm, and none")
        reading = weigh(self.name, reply, rated[field], SAFE_UNSAFE, after=rf"{field}[\"']?\s*:")
        return scores(reading.unsafe, kinds if reading.unsafe >= DOUBTFUL else ())


def answer(verdicts: Mapping[Speaker, bool], kinds: Iterable[str] = ()) -> str:
    """What a model of this family says, where it says this; in the form and order that the card shows.

    Args:
        verdicts: whether what each speaker says is unsafe.
        kinds: names of CATEGORIES, for harm of either.
    """
    said = {_FIELD[who]: ("safe", "unsafe")[verdicts[who]] for who in ("user", "assistant") if who in verdicts}
    named = {*kinds}
    listed = ", ".join(name for name in CATEGORIES if name in named)
    return json.dumps(said | ({"Safety Categories": listed} if listed else {}))


def taught(prompt: str, said: str) -> dict[str, str] | None:
    """What a lesson in this family's form tells, as Nemotron's own data set has it; None where it is of another form.

    Args:
        prompt: the whole of it.
        said: the answer, after a thought or without one.

    Returns:
        ``prompt``, ``prompt_label`` and ``violated_categories``; ``response`` and ``response_label`` where an answer is
        on trial too.
    """
    spoken = prompt.partition("<BEGIN CONVERSATION>")[2].rpartition("<END CONVERSATION>")[0].strip()
    try:
        told = json.loads(said.rpartition("</think>")[2])
    except (ValueError, RecursionError):
        return None
    label, opened, between = "User Safety", _SAYS["user"].format("").strip(), f"\n\n{_SAYS['assistant'].format('')}"
    if not isinstance(told, dict) or label not in told or not spoken.startswith(opened):
        return None
    found = {"prompt": spoken.removeprefix(opened), "prompt_label": told[label]}
    if _FIELD["assistant"] in told:
        question, _, response = found["prompt"].partition(between)
        found |= {"prompt": question, "response": response, "response_label": told[_FIELD["assistant"]]}
    # A turn more, or words that look like one: who said what cannot be told.
    if any(between in found.get(name, "") for name in ("prompt", "response")):
        return None
    found["violated_categories"] = told.get("Safety Categories", "")
    return {name: value.strip() for name, value in found.items()} if all(map(_is_text, found.values())) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _whole(dialect: str, reply: Reply) -> str:
    """The text of an answer, if it is a whole object."""
    # At the limit, but with all that was asked for, is not cut.
    whole = reply.text.rstrip().endswith("}")
    text = plain(dialect, replace(reply, cut=False) if whole else reply)
    if "\\u" in text:
        raise unread(dialect, "it holds escapes, and is read as it stands")
    if text.count("{") != 1 or text.count("}") != 1 or text.index("{") > text.index("}"):
        raise unread(dialect, "it is not one JSON object")
    return text


def _listed(text: str) -> list[str]:
    """Kinds of harm, from a part of an answer or the whole; none where it gives none."""
    found = _LISTED.search(text)
    return labels(found[1], _CODES) if found else []
