"""OpenAI's completions: what to send, and what an answer says. Nothing here sends."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guardmw.dialects import Reply, Token
from guardmw.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardmw.dialects import Request

# OpenAI's and vLLM's limit.
_MOST_ALTERNATIVES = 20
# What other servers and older versions allow.
_FEWER_ALTERNATIVES = 5
# vLLM's and OpenAI's words, then TGI's. An answer that was filtered or aborted is none.
_WHOLE = ("stop", "eos_token", "stop_sequence", None)
_CUT = "length"
# exp() of it is nothing, and vLLM's own least is -9999.
_LEAST = -1e6
# How vLLM, OpenAI, SGLang, llama.cpp and TGI say that a prompt is too long.
_TOO_LONG = (
    "context length",
    "context_length",
    "context size",
    "context_size",
    "maximum model length",
    "max_model_len",
    "max_new_tokens",
    "prompt is too long",
)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a server wants to be asked, as far as it has shown.

    Attributes:
        alternatives: for each token; 0 where it tells no logprobs.
        limit: what it calls the most tokens of an answer.
        temperature: whether it takes one.
        prefill: whether it goes on from the beginning of an answer.
        lead: what the model's template puts before an answer, and leaves out before the beginning of one.
    """

    alternatives: int = _MOST_ALTERNATIVES
    limit: str = "max_tokens"
    temperature: bool = True
    prefill: bool = True
    lead: str = ""

    def after(self, refusal: str) -> Manner | None:
        """What to try once it refused to be asked in this manner; None where the manner is not at fault."""
        if self.limit == "max_tokens" and "max_completion_tokens" in refusal:
            return replace(self, limit="max_completion_tokens")
        if self.prefill and ("continue_final_message" in refusal or "add_generation_prompt" in refusal):
            return replace(self, prefill=False)
        if self.alternatives and "logprobs" in refusal:
            return replace(self, alternatives=_FEWER_ALTERNATIVES if self.alternatives > _FEWER_ALTERNATIVES else 0)
        if self.temperature and "temperature" in refusal:
            return replace(self, temperature=False)
        return None


def body(model: str, request: Request, manner: Manner, salt: str) -> tuple[str, dict[str, Any]]:
    """Where to send a request, and what. Words before those on trial are always the same: servers remember them."""
    prefilled = manner.prefill or not request.messages
    # No token is shorter than a character, none of those that matter here.
    tokens = request.max_tokens + (0 if prefilled else len(request.prefill))
    sent: dict[str, Any] = {"model": model, manner.limit: tokens}
    if manner.temperature:
        sent["temperature"] = 0.0
    if salt:
        sent["cache_salt"] = salt
    alternatives = min(request.top_logprobs, manner.alternatives)
    if not request.messages:
        sent["prompt"] = request.prompt + request.prefill
        return "completions", sent | ({"logprobs": alternatives} if alternatives else {})
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    if request.prefill and prefilled:
        messages.append({"role": "assistant", "content": manner.lead + request.prefill})
        sent |= {"add_generation_prompt": False, "continue_final_message": True}
    if alternatives:
        sent |= {"logprobs": True, "top_logprobs": alternatives}
    if request.template:
        sent["chat_template_kwargs"] = dict(request.template)
    return "chat/completions", sent | {"messages": messages}


def shown(request: Request, lead: str | None) -> dict[str, Any]:
    """What asks vLLM for the tokens that a model is shown, of some other text; ``lead`` as Manner's, None for none.

    It is None where the model is to begin the answer itself.
    """
    messages = [{"role": "user", "content": "x"}]
    if lead is not None:
        messages.append({"role": "assistant", "content": lead + request.prefill})
    begins = {"add_generation_prompt": lead is None, "continue_final_message": lead is not None}
    return {"messages": messages, "chat_template_kwargs": dict(request.template), **begins}


def encoded(sent: Mapping[str, Any]) -> bytes:
    """JSON. Half of a surrogate pair is no character, and servers refuse what holds one."""
    text = json.dumps(sent, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def too_long(refusal: str) -> bool:
    """Whether a server said, in lower case, that a prompt is longer than its model takes."""
    return any(words in refusal for words in _TOO_LONG)


def value(given: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """The JSON value of an answer.

    Raises:
        BackendError: it is none.
    """
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        pass
    raise BackendError("the answer is no JSON")


def told(given: bytes, key: str) -> Any:  # noqa: ANN401 - any JSON value
    """One value of an answer that is a JSON object; None where it is not there."""
    try:
        answer = value(given)
    except BackendError:
        return None
    return answer.get(key) if isinstance(answer, dict) else None


def read(answer: object) -> Reply:
    """The reply in an answer.

    Raises:
        BackendError: it is not whole, or not of the form that it should have.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BackendError("the answer has no single choice")
    choice = choices[0]
    ended = choice.get("finish_reason")
    if ended != _CUT and ended not in _WHOLE:
        raise BackendError("the answer was broken off")
    message = choice.get("message", choice)
    # A refusal, or nothing but reasoning, has the content null.
    text = (message.get("content", message.get("text")) or "") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise BackendError("the answer's text is none")
    return Reply(text, _tokens(choice.get("logprobs")), cut=ended == _CUT)


def ran_out(answer: object, reply: Reply, most: int) -> bool:
    """Whether an answer was cut before ``most`` tokens: vLLM makes do with what a long prompt leaves of the context."""
    used = answer.get("usage") if isinstance(answer, dict) else None
    wrote = used.get("completion_tokens") if isinstance(used, dict) else None
    return reply.cut and isinstance(wrote, int) and wrote < most


def begins_anew(reply: Reply, prefill: str) -> bool:
    """Whether a server did not go on from the beginning of an answer: one that does not know how just ignores it."""
    start = reply.text.lstrip()
    return bool(start) and (prefill.startswith(start) or start.startswith(prefill))


def without(reply: Reply, prefill: str, most: int) -> Reply:
    """What a whole answer adds to the beginning that it should have, ``most`` tokens of it where they can be counted.

    Raises:
        BackendError: it begins otherwise.
    """
    if not reply.text.lstrip().startswith(prefill):
        raise BackendError("the server does not go on from the beginning of an answer, and the model begins otherwise")
    left = len(reply.text) - len(reply.text.lstrip()) + len(prefill)
    text, tokens = reply.text[left:], []
    for token in reply.tokens:
        begun, said = token.text[:left], token.text[left:]
        left -= len(begun)
        if said:
            others = {one[len(begun) :]: p for one, p in token.alternatives.items() if one.startswith(begun)}
            tokens.append(Token(said, token.logprob, others))
    added = "".join(token.text for token in tokens[:most])
    if len(tokens) > most and text.startswith(added):
        return Reply(added, tuple(tokens[:most]), cut=True)
    return Reply(text, tuple(tokens), cut=reply.cut)


def models(answer: object) -> dict[str, str]:
    """What a server serves: what each model was loaded from, by its name.

    Raises:
        BackendError: the answer is not of the form that it should have.
    """
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("id"), str) for one in listed
    ):
        raise BackendError("the answer lists no models")
    return {one["id"]: one["root"] if isinstance(one.get("root"), str) else one["id"] for one in listed}


def _tokens(given: object) -> tuple[Token, ...]:
    """From either form: a chat's is a list of tokens, that of a plain completion several lists."""
    if given is None:
        return ()
    if isinstance(given, dict) and "content" not in given:
        texts, logprobs = given.get("tokens"), given.get("token_logprobs")
        if isinstance(texts, list) and isinstance(logprobs, list):
            others = given.get("top_logprobs") or [{}] * len(texts)
            if isinstance(others, list) and len(texts) == len(logprobs) == len(others):
                return tuple(_token(text, p, more or {}) for text, p, more in zip(texts, logprobs, others, strict=True))
    elif isinstance(given, dict):
        content = given["content"] or []
        if isinstance(content, list) and all(isinstance(one, dict) for one in content):
            return tuple(_token(one.get("token"), one.get("logprob"), _listed(one)) for one in content)
    raise BackendError("the answer's logprobs are not of the form that they should have")


def _listed(token: Mapping[str, Any]) -> dict[Any, Any]:
    others = token.get("top_logprobs") or []
    if not isinstance(others, list) or not all(isinstance(one, dict) for one in others):
        raise BackendError("the answer's logprobs are not of the form that they should have")
    found: dict[Any, Any] = {}
    for one in others:
        # Several tokens may be spelled alike: pieces of a character are. The likeliest comes first.
        if isinstance(one.get("token"), str):
            found.setdefault(one["token"], one.get("logprob"))
    return found


def _token(text: object, logprob: object, others: object) -> Token:
    if not isinstance(text, str) or not isinstance(others, dict):
        raise BackendError("the answer's logprobs are not of the form that they should have")
    found = {one: _logprob(p) for one, p in others.items()}
    chosen = _logprob(logprob)
    return Token(text, chosen, {text: chosen} | found)


def _logprob(given: object) -> float:
    # Rounding may leave a little more than nothing.
    if isinstance(given, bool) or not isinstance(given, int | float) or not given < 1e-3:  # noqa: PLR2004 - see above
        raise BackendError("the answer's logprobs are no logarithms of probabilities")
    return min(float(max(given, _LEAST)), 0.0)
