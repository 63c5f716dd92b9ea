"""What a verdict does to the value it was given on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatResult

from guardmw import Blocked
from langchain_guardmw.parts import as_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.messages import BaseMessage

    from guardmw import Verdict

log = logging.getLogger("guardmw")

REFUSAL = "I can't help with that."


def withholds(verdict: Verdict) -> bool:
    """Whether the value may not go on. Review counts: nobody stands beside a chain whom it could ask."""
    return verdict.action in ("block", "review")


def strictest(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict that withholds, the first that blocks if there are several; None where none does.

    Flags, and verdicts that let through though they are degraded, go to the log ``guardmw``.
    """
    withheld = [verdict for verdict in verdicts if withholds(verdict)]
    if withheld:
        return max(withheld, key=lambda verdict: verdict.blocked)
    for verdict in verdicts:
        if verdict.action == "flag" or verdict.degraded:
            log.warning("%s at %s: %s", verdict.action, verdict.stage, verdict.summary)
    return None


def is_failure(chosen: tuple[type[BaseException], ...] | Callable[[BaseException], bool]) -> Callable[..., bool]:
    """Which errors are to be tried again, of those that were chosen: a verdict is none, and stays as it is."""
    wanted = chosen if callable(chosen) else lambda error: isinstance(error, chosen)
    return lambda error: not isinstance(error, Blocked) and wanted(error)


def refusal_metadata(verdict: dict[str, Any]) -> dict[str, Any]:
    """What a refusal says of itself."""
    # The verdict quotes nothing of what was screened.
    return {"finish_reason": "content_filter", "guardmw": verdict}


def refuses(message: BaseMessage) -> bool:
    """Whether the message is a refusal of ours, or ends in one."""
    return "guardmw" in message.response_metadata


def refusal(value: object, verdict: Verdict, *, text: str = REFUSAL) -> Any:  # noqa: ANN401 - of the value's own type
    """What stands in for a withheld answer: a value of its type, as whatever follows in the chain expects it.

    Raises:
        Blocked: the value is no answer but a prompt, documents, a dict, …; a refusal in its place would be put to the
            model as a prompt, or break the step that follows.
    """
    metadata = refusal_metadata(verdict.to_dict())
    if isinstance(value, AIMessageChunk):
        return AIMessageChunk(content=text, id=as_mark(value.id), response_metadata=metadata, chunk_position="last")
    if isinstance(value, AIMessage):
        return AIMessage(
            content=text, id=as_mark(value.id), response_metadata=metadata, usage_metadata=value.usage_metadata
        )
    if isinstance(value, str):
        return text
    if isinstance(value, ChatGeneration):
        return type(value)(message=refusal(value.message, verdict, text=text))
    if isinstance(value, ChatResult):
        # Without llm_output, the provider's own: the usage is in the messages, and nobody knows what else it holds.
        return ChatResult(generations=[refusal(one, verdict, text=text) for one in value.generations])
    raise Blocked(verdict)
