"""``guard_tool()``: a tool that is called with nothing unjudged, and of which nobody sees what it may not tell."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.messages import ToolMessage
from langchain_core.messages.tool import ToolOutputMixin
from langchain_core.tools import BaseTool, StructuredTool, Tool

from guardmw import Blocked, Conversation, ToolCall, Turn
from langchain_guardmw.gate import Gate, admit, as_guard
from langchain_guardmw.outcome import strictest
from langchain_guardmw.parts import called, parts, within

if TYPE_CHECKING:
    from guardmw import Backend, Guard, Verdict

    _Tool = BaseTool
else:
    _Tool = object

T = TypeVar("T", bound=BaseTool)

CALL_WITHHELD = "This call was not made: it is not allowed"
RESULT_WITHHELD = "The tool was called, but what it returned is withheld: it is not allowed"


def guard_tool(tool: T, g: Guard | Backend | str | None = None) -> T:
    """The tool, called only with what the guard allows, and returning only that; a copy of its own class.

    A call, and then its result (content, artifact, messages of a Command, the text of an exception), is judged before
    anybody sees it, callbacks and events included. Where a model called it (``tool.invoke(tool_call)``, an agent, a
    ToolNode), it is told of a block by an error ToolMessage. Other code gets Blocked.

    A verdict of review withholds: nobody stands beside a tool whom it could ask; ToolGuardMiddleware asks. A call is
    judged by itself: rules on the conversation before it (flows, budgets) are for ToolGuardMiddleware, too.

    Args:
        tool: any tool; for a function, ``tool(function)`` of langchain-core makes one.
        g: as in ``guard()``.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: it is no tool.
    """
    if not isinstance(tool, BaseTool):
        raise TypeError(f"give a tool, not a {type(tool).__name__}; tool() of langchain_core.tools makes one")
    gate = Gate(as_guard(g), "tool_result")
    guarded: T = object.__new__(_guarded(type(tool)))
    # As model_copy() does, which does not change the class.
    object.__setattr__(guarded, "__dict__", dict(tool.__dict__))
    object.__setattr__(guarded, "__pydantic_extra__", tool.__pydantic_extra__)
    object.__setattr__(guarded, "__pydantic_fields_set__", set(tool.__pydantic_fields_set__))
    object.__setattr__(guarded, "__pydantic_private__", {**(tool.__pydantic_private__ or {}), "_gate": gate})
    return guarded


def call_of(name: str, arguments: object, id_: str | None) -> Turn:
    """A call as a turn; what in it cannot be read makes a verdict partial."""
    given = arguments if isinstance(arguments, str | Mapping) else {"": arguments}
    return called([ToolCall(name, given, id_ or "")])


def results(result: object, name: str, context: tuple[Turn, ...] = ()) -> list[Conversation]:
    """What is to be judged in what a tool returned (a message, a Command, a list of them, anything) or raised.

    All of it is this tool's, whatever name a message gives itself.
    """
    if isinstance(result, Exception):
        # What code reads, and what a ToolNode tells the model.
        texts = dict.fromkeys((str(result), repr(result)))
        found = [Conversation((Turn("tool", text),)) for text in texts]
    else:
        found = [part.conversation for value in _values(result) for part in parts(value, "tool_result")]
    return [within(context, _named(conversation, name)) for conversation in found]


def refused(call: Mapping[str, Any], verdict: Verdict | None, text: str = CALL_WITHHELD) -> ToolMessage:
    """What the model is told in place of a result; without a verdict it is one that nobody knows any more."""
    why, noted = "it was blocked before", {}
    if verdict is not None:
        # Rules are named in the policy's words; nothing of what was screened is in them.
        broken = dict.fromkeys(violation.rule for violation in verdict.violations)
        why, noted = ", ".join(broken) or "it could not be judged", {"guardmw": verdict.to_dict()}
    return ToolMessage(
        f"{text} ({why}).",
        tool_call_id=call["id"] or "",
        name=call["name"],
        status="error",
        response_metadata=noted,
    )


def _values(result: object) -> list[object]:
    """What a result is made of."""
    if isinstance(result, list) and any(isinstance(one, ToolMessage) or _is_command(one) for one in result):
        return [value for one in result for value in _values(one)]
    if not _is_command(result):
        return [result]
    goto = getattr(result, "goto", ())
    sent = [one.arg for one in (goto if isinstance(goto, Sequence) else [goto]) if hasattr(one, "arg")]
    return [getattr(result, "update", None), getattr(result, "resume", None), *sent]


def _is_command(result: object) -> bool:
    """Whether it is one of LangGraph's, which need not be installed."""
    return isinstance(result, _of_langgraph("types", "Command"))


def is_control_flow(error: BaseException) -> bool:
    """Whether LangGraph raised it to interrupt or to leave a graph, and not because anything failed."""
    return isinstance(error, _of_langgraph("errors", "GraphBubbleUp"))


def _of_langgraph(module: str, name: str) -> type | tuple[type, ...]:
    # Nobody can have made one before the module was imported.
    found: type | tuple[type, ...] = getattr(sys.modules.get(f"langgraph.{module}"), name, ())
    return found


# The tool whose asynchronous run is judged: that run may be made of the synchronous one, in a thread.
_judged: ContextVar[Any] = ContextVar("_judged", default=None)


class _Guarded(_Tool):
    """What a guarded tool does before and after what its own class does."""

    _gate: Gate

    def run(self, tool_input: Any, *args: Any, tool_call_id: str | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        token = _judged.set(None)
        try:
            admit(self._gate.ready().screen_many([self._asked(tool_input, tool_call_id)]))
            return super().run(tool_input, *args, tool_call_id=tool_call_id, **kwargs)
        except Blocked as blocked:
            return self._told(blocked, tool_call_id)
        finally:
            _judged.reset(token)

    async def arun(self, tool_input: Any, *args: Any, tool_call_id: str | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        token = _judged.set(None)
        try:
            guard = await self._gate.aready()
            admit(await guard.ascreen_many([self._asked(tool_input, tool_call_id)]))
            return await super().arun(tool_input, *args, tool_call_id=tool_call_id, **kwargs)
        except Blocked as blocked:
            return self._told(blocked, tool_call_id)
        finally:
            _judged.reset(token)

    def _asked(self, given: object, id_: str | None) -> Conversation:
        if isinstance(given, dict):
            # Injected by a graph: its state, its store. What is plain may be a model's forgery, and is judged.
            own = self._filter_injected_args(given)
            given = {key: value for key, value in given.items() if key in own or _is_plain(value)}
        return Conversation((call_of(self.name, given, id_),))

    def _answers(self, response: object) -> list[Conversation]:
        """What is to be judged in what the tool's own code returned or raised."""
        if isinstance(response, Exception) and (isinstance(response, Blocked) or is_control_flow(response)):
            return []
        pair = self.response_format == "content_and_artifact" and isinstance(response, tuple)
        asked = []
        values: tuple[object, ...] = response if pair else (response,)  # type: ignore[assignment]
        for at, value in enumerate(values):
            found = results(value, self.name)
            opaque = any(one.last.media for one in found) and not isinstance(value, ToolMessage | Sequence)
            if opaque:
                found = [one for one in found if not one.last.media]
            # What a model gets to read of an object; an artifact it does not.
            words = str(value) if opaque else "" if at else _as_text(value)
            asked += found + (results(words, self.name) if words else [])
        return asked

    def _told(self, blocked: Blocked, id_: str | None) -> ToolMessage:
        if id_ is None:
            raise blocked
        text = CALL_WITHHELD if blocked.verdict.stage == "tool_call" else RESULT_WITHHELD
        return refused({"id": id_, "name": self.name}, blocked.verdict, text)


@cache
def _guarded(kind: type[BaseTool]) -> type[Any]:
    """The class of the guarded tools of this class."""
    own_run, own_arun = kind._run, kind._arun  # noqa: SLF001 - what is overridden

    # langchain-core reads off their signatures what to call them with.
    @wraps(own_run)
    def _run(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if _judged.get() is self:
            return own_run(self, *args, **kwargs)
        guard = self._gate.ready()
        try:
            response = own_run(self, *args, **kwargs)
        except Exception as error:
            verdict = strictest(guard.screen_many(self._answers(error)))
            if verdict is None:
                raise
            raise Blocked(verdict) from None
        admit(guard.screen_many(self._answers(response)))
        return response

    # langchain-core's own runs the other in a thread.
    @wraps(own_run if own_arun is BaseTool._arun else own_arun)  # noqa: SLF001 - what is overridden
    async def _arun(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        guard = await self._gate.aready()
        token = _judged.set(self)
        try:
            response = await own_arun(self, *args, **kwargs)
        except Exception as error:
            verdict = strictest(await guard.ascreen_many(self._answers(error)))
            if verdict is None:
                raise
            raise Blocked(verdict) from None
        finally:
            _judged.reset(token)
        admit(await guard.ascreen_many(self._answers(response)))
        return response

    body: dict[str, Any] = {"__annotations__": {"_gate": Any}, "__module__": __name__, "_run": _run, "_arun": _arun}
    # Those of functions have all of it done in a thread, judging too, where nobody could cancel it.
    if kind.ainvoke in (StructuredTool.ainvoke, Tool.ainvoke):
        body["ainvoke"] = BaseTool.ainvoke
    return type(f"Guarded{kind.__name__}", (_Guarded, kind), body)


def _is_plain(value: object) -> bool:
    """Whether a model could have written it."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


def _as_text(value: object) -> str:
    """What langchain-core makes of a result that is neither a message nor JSON; nothing where it makes no text."""
    outputs = value if isinstance(value, list) and value else [value]
    # What has an exception say more is judged with it.
    if isinstance(value, Exception) or all(isinstance(one, ToolOutputMixin) for one in outputs):
        return ""
    try:
        return "" if _is_plain(value) else str(value)
    except RecursionError:
        # It is nothing that could be read, either, and that has been said.
        return ""


def _named(conversation: Conversation, name: str) -> Conversation:
    last = conversation.last
    if last.role != "tool" or last.name == name:
        return conversation
    return Conversation((*conversation.context, replace(last, name=name)))
