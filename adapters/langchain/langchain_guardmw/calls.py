"""Tool calls of a model's answer, judged by whoever guards the tools, before anybody sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.messages import AIMessage, AIMessageChunk, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_guardmw.parts import Beside, is_plain, spoken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence

    from langchain_core.messages import BaseMessage
    from langchain_core.tools import BaseTool

    from guardmw import Conversation, Guard, Verdict
    from langchain_guardmw.history import Reads
    from langchain_guardmw.parts import Part

BLOCKED_CALLS = "guardmw_calls"
"""Where the message of a model holds the verdicts on those of its calls that were blocked, by their ids.

Anybody can write it into a history: it is for people to read, and believed only where it forbids.
"""

# What else a message may hold of a call that is blocked.
_COPIES = ("function_call", "tool_calls")
_TEXTUAL = ("text", "reasoning", "thinking", "redacted_thinking")


class Asked(NamedTuple):
    """A call on trial.

    Attributes:
        key: by which the call is known again, in the same context.
    """

    conversation: Conversation
    key: bytes


@dataclass(slots=True)
class ToolGuard:
    """Who judges the calls that an agent's model makes.

    Attributes:
        state: the agent's, by which others know whether their tools are meant.
        tools: gives the names of those that the agent has.
        answers: gives names of tools that are none, but structured output.
        asking: what is to be judged of an answer, one for each of its calls.
        keep: is given the verdicts on what is left of them.
    """

    guard: Guard
    state: object
    tools: Callable[[], frozenset[str]]
    answers: Callable[[], frozenset[str]]
    asking: Callable[[AIMessage], list[Asked]]
    keep: Callable[[Sequence[Asked], Sequence[Verdict]], None]


TOOL_GUARD: ContextVar[ToolGuard | None] = ContextVar("TOOL_GUARD", default=None)


@dataclass(slots=True)
class Calls:
    """The calls of one answer.

    Attributes:
        reads: reads the answer, which others read too.
        judged: they have been, all of them.
        blocked: some of them have been.
    """

    by: ToolGuard
    reads: Reads
    judged: bool = field(default=False, init=False)
    blocked: bool = field(default=False, init=False)

    def run(self, run: Callable[[], ChatResult]) -> ChatResult:
        """A model's answer, without what is blocked of its calls."""
        result = run()
        asked = self._asked(*[one.message for one in result.generations])
        if not asked:
            return result
        return self._settled(result, asked, self.by.guard.screen_many(_conversations(asked)))

    async def arun(self, run: Callable[[], Coroutine[Any, Any, ChatResult]]) -> ChatResult:
        """``run``, without blocking the event loop."""
        result = await run()
        asked = self._asked(*[one.message for one in result.generations])
        if not asked:
            return result
        return self._settled(result, asked, await self.by.guard.ascreen_many(_conversations(asked)))

    def chunks(self, run: Callable[[], Iterator[ChatGenerationChunk]]) -> Iterator[ChatGenerationChunk]:
        """An answer as it comes; from its first call on all of it waits until it is complete."""
        out: list[ChatGenerationChunk] = []
        tail: list[ChatGenerationChunk] = []
        for chunk in run():
            if tail or _calls(chunk.message):
                tail.append(chunk)
            else:
                out.append(chunk)
                yield chunk
        if tail:
            message = _whole([*out, *tail])
            asked = self._asked(message)
            if asked:
                tail = self._rest(tail, message, asked, self.by.guard.screen_many(_conversations(asked)))
            yield from tail

    async def achunks(
        self, run: Callable[[], AsyncIterator[ChatGenerationChunk]]
    ) -> AsyncIterator[ChatGenerationChunk]:
        """``chunks``, without blocking the event loop."""
        out: list[ChatGenerationChunk] = []
        tail: list[ChatGenerationChunk] = []
        async for chunk in run():
            if tail or _calls(chunk.message):
                tail.append(chunk)
            else:
                out.append(chunk)
                yield chunk
        if not tail:
            return
        message = _whole([*out, *tail])
        asked = self._asked(message)
        if asked:
            tail = self._rest(tail, message, asked, await self.by.guard.ascreen_many(_conversations(asked)))
        for chunk in tail:
            yield chunk

    def _asked(self, *answers: BaseMessage) -> list[Asked]:
        """What its tools' guard has to judge; nothing where there are calls that no tool is going to answer."""
        self.judged = self.blocked = False
        if len(answers) != 1:
            # Candidates, of which an agent takes the first, and callbacks see all.
            return []
        (message,) = answers
        if not isinstance(message, AIMessage) or not message.tool_calls:
            return []
        ids = {call["id"] for call in message.tool_calls if call["id"]}
        forms = self.by.answers()
        structured = any(call["name"] in forms for call in message.tool_calls)
        calls = _calls_in(self.reads.read(message).parts)
        if structured or not len(ids) == len(message.tool_calls) == calls:
            return []
        return self.by.asking(message)

    def _blocked(self, message: AIMessage, asked: list[Asked], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        self.judged = True
        blocked = {
            call["id"] or "": verdict.to_dict()
            for call, verdict in zip(message.tool_calls, verdicts, strict=True)
            if verdict.blocked
        }
        self.blocked = bool(blocked)
        asked = self.by.asking(self._emptied(message, blocked)) if blocked else asked
        # By another guard, or when it was said first: a verdict on what is left of a call is none on the call.
        if emptied := _noted(message):
            left = [call["id"] not in emptied for call in message.tool_calls]
            asked, verdicts = list(compress(asked, left)), list(compress(verdicts, left))
        self.by.keep(asked, verdicts)
        return blocked

    def _settled(self, result: ChatResult, asked: list[Asked], verdicts: Sequence[Verdict]) -> ChatResult:
        message: Any = result.generations[0].message
        blocked = self._blocked(message, asked, verdicts)
        if not blocked:
            return result
        return ChatResult(generations=[ChatGeneration(message=self._emptied(message, blocked))])

    def _rest(
        self, tail: list[ChatGenerationChunk], message: AIMessage, asked: list[Asked], verdicts: Sequence[Verdict]
    ) -> list[ChatGenerationChunk]:
        blocked = self._blocked(message, asked, verdicts)
        if not blocked:
            return tail
        emptied = self._emptied(_whole(tail), blocked)
        pieces: list[Any] = [
            {"name": call["name"], "args": json.dumps(call["args"]), "id": call["id"], "index": at}
            for at, call in enumerate(emptied.tool_calls)
        ]
        rest = AIMessageChunk(
            content=emptied.content,
            additional_kwargs=emptied.additional_kwargs,
            response_metadata={key: value for key, value in emptied.response_metadata.items() if key != BLOCKED_CALLS},
            usage_metadata=emptied.usage_metadata,
            id=emptied.id,
        )
        # By themselves: in the name of a provider they would have to be written as that one does.
        calls = AIMessageChunk(
            content="",
            response_metadata={BLOCKED_CALLS: {**_noted(message), **blocked}},
            tool_call_chunks=pieces,
            id=emptied.id,
            chunk_position="last",
        )
        return [ChatGenerationChunk(message=rest), ChatGenerationChunk(message=calls)]

    def _emptied(self, message: AIMessage, blocked: dict[str, Any]) -> AIMessage:
        """The message with nothing left of what is blocked but which call it was."""
        content: Any = message.content
        tools = self.by.tools()
        if isinstance(content, list):
            content = [one for one in content if isinstance(one, str) or one.get("type") in _TEXTUAL]
        return AIMessage(
            content,
            additional_kwargs={key: value for key, value in message.additional_kwargs.items() if key not in _COPIES},
            response_metadata={**message.response_metadata, BLOCKED_CALLS: {**_noted(message), **blocked}},
            usage_metadata=message.usage_metadata,
            tool_calls=[
                # The name of no tool is the model's own text.
                {**call, "name": call["name"] if call["name"] in tools else "tool", "args": {}}
                if call["id"] in blocked
                else call
                for call in message.tool_calls
            ],
            id=message.id,
            name=message.name,
        )


def _noted(message: AIMessage) -> Mapping[str, Any]:
    """The verdicts on calls of it that were blocked before, by their ids."""
    noted = message.response_metadata.get(BLOCKED_CALLS)
    return noted if isinstance(noted, Mapping) else {}


def names_of(tools: Iterable[BaseTool | dict[str, Any]]) -> frozenset[str]:
    """The names of tools, in whatever form a model is told of them."""
    return frozenset(map(_name_of, tools))


def _name_of(given: BaseTool | dict[str, Any]) -> str:
    """The name of a tool, in whatever form a model is told of it."""
    if isinstance(given, dict):
        function = given.get("function")
        return str((function if isinstance(function, dict) else given).get("name") or "")
    return given.name


def _calls(message: BaseMessage) -> int:
    """How many calls it makes, in whatever form."""
    return 0 if not isinstance(message, AIMessage) or is_plain(message) else _calls_in(spoken(message)[0])


def _calls_in(parts: Iterable[Part]) -> int:
    return sum(len(part.turn.tool_calls) for part in parts if part.channel[-1] is Beside.CALLS)


def _conversations(asked: list[Asked]) -> list[Conversation]:
    return [one.conversation for one in asked]


def _whole(chunks: list[ChatGenerationChunk]) -> AIMessage:
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    message: Any = message_chunk_to_message(merged.message)
    return message  # type: ignore[no-any-return]
