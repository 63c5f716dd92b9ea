"""``ToolGuardMiddleware``: no tool of an agent runs unjudged, and its model reads no result that was not judged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NotRequired, Self, cast

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelResponse
from langchain.agents.middleware.types import PrivateStateAttr
from langchain.agents.structured_output import AutoStrategy, ToolStrategy
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langgraph.types import interrupt

from guardmw import Conversation, Guard, Turn
from guardmw.running import Running
from guardmw.tools import Continued, Gone
from langchain_guardmw.calls import BLOCKED_CALLS, TOOL_GUARD, Asked, ToolGuard, names_of
from langchain_guardmw.gate import Gate, as_guard
from langchain_guardmw.gone import Noted, Notes, gone
from langchain_guardmw.history import Reads, held
from langchain_guardmw.hooks import signed, unhooked
from langchain_guardmw.outcome import refusal, strictest
from langchain_guardmw.parts import CONTEXT_TURNS, parts, spoken, unsaid, within
from langchain_guardmw.tools import RESULT_WITHHELD, call_of, is_control_flow, refused, results

if TYPE_CHECKING:
    from langchain.agents.middleware import ModelRequest, ToolCallRequest
    from langgraph.runtime import Runtime
    from langgraph.types import Command

    from guardmw import Backend, Verdict
    from langchain_guardmw.parts import Part

    Result = ToolMessage | Command[Any]
    Route = Generator["ToolCallRequest | list[Conversation]", Any, Result]

REJECTED = "A person has rejected this call; it was not made. Do not try it again unless you are asked to."
EDITED = "A person has changed the arguments of this call before it was made: this is the result of the changed call."

# How often the model may try again, for one answer, to give it in another form.
_RETRIES = 2
# Calls under review whose verdicts are kept: a reviewer may take days.
_REMEMBERED = 4_096


class NotedState(AgentState[Any]):
    """What a guard of tools keeps in the agent's state, where no input can put it; who may write the state can.

    Attributes:
        guardmw_noted: what rules have to know of messages that others may take out of the history.
    """

    guardmw_noted: NotRequired[Annotated[Noted, PrivateStateAttr]]


class ToolGuardMiddleware(AgentMiddleware[Any, Any, Any]):
    """Judges each tool call before it runs, and each result before the model reads it.

    In place of what is blocked the model is told so, by a ToolMessage with status "error", and the run goes on. Other
    calls of the same turn are not affected. Tools that the agent does not know are judged like any others, and so is
    structured output: it is withheld, the model may try twice more, and then the run ends with a refusal.

    A call under review waits for a person, by an ``interrupt``, which needs a checkpointer. Its value and its answers
    are those of LangChain's HumanInTheLoopMiddleware (``"per_call"``), with the verdict: ``{"type": "approve"}``,
    ``{"type": "reject", "message": …}`` or ``{"type": "edit", "edited_action": {"name": …, "args": {…}}}``. An edited
    call is judged anew, and made unless that blocks it. Anything else is no answer, and the question is put again. A
    result under review is withheld, as to ask about it would run the tool twice.

    Put it first among an agent's middlewares: outside of those that retry, cache or change tool calls, and before those
    that take messages out of the history, of which it keeps what flow rules and budgets have to know. In LangGraph
    without an agent: ``ToolNode(tools, wrap_tool_call=m.wrap_tool_call, awrap_tool_call=m.awrap_tool_call)``, always
    with both, for a ToolNode that has only the second is not guarded when it is invoked synchronously.

    Args:
        g: as in ``guard()``.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
    """

    def __new__(cls, g: object = None, *_: object, **__: object) -> Self:
        """Make one that has no more hooks than it needs: each is a node of the graph, dearer than a verdict."""
        noting: type[Any] = Noting
        looks_back = isinstance(g, Guard) and _needs_all(g) and cls is ToolGuardMiddleware
        made: Self = super().__new__(noting if looks_back else cls)
        return made

    def __init__(self, g: Guard | Backend | str | None = None) -> None:
        super().__init__()
        self.tools = ()
        self._notes: Notes | None = None
        self._gate = Gate(as_guard(g), "output", "refuse")
        self._listener = _Listener()
        self._desk = _Desk()

    @signed
    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Result]) -> Result:  # noqa: D102
        guard = self._gate.ready()
        route = self._route(guard, request)
        try:
            step = next(route)
            while True:
                if isinstance(step, list):
                    step = route.send(guard.screen_many(step))
                    continue
                try:
                    result = handler(step)
                except Exception as error:  # noqa: BLE001 - the route judges it, and raises it again
                    step = route.throw(error)
                else:
                    step = route.send(result)
        except StopIteration as stop:
            return cast("Result", stop.value)

    @unhooked
    async def awrap_tool_call(  # noqa: D102
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Result]]
    ) -> Result:
        guard = await self._gate.aready()
        route = self._route(guard, request)
        try:
            step = next(route)
            while True:
                if isinstance(step, list):
                    step = route.send(await guard.ascreen_many(step))
                    continue
                try:
                    result = await handler(step)
                except Exception as error:  # noqa: BLE001 - the route judges it, and raises it again
                    step = route.throw(error)
                else:
                    step = route.send(result)
        except StopIteration as stop:
            return cast("Result", stop.value)

    @signed
    def wrap_model_call(  # noqa: D102
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        token = TOOL_GUARD.set(self._tool_guard(request, self._gate.ready()))
        try:
            response = handler(request)
        finally:
            TOOL_GUARD.reset(token)
        if response.structured_response is None:
            return response
        asked = _structured(request, response)
        return self._settled(request, response, self._gate.ready().screen_many(asked))

    @unhooked
    async def awrap_model_call(  # noqa: D102
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        guard = await self._gate.aready()
        token = TOOL_GUARD.set(self._tool_guard(request, guard))
        try:
            response = await handler(request)
        finally:
            TOOL_GUARD.reset(token)
        if response.structured_response is None:
            return response
        return self._settled(request, response, await guard.ascreen_many(_structured(request, response)))

    def _tool_guard(self, request: ModelRequest[Any], guard: Guard) -> ToolGuard:
        """How GuardMiddleware has the calls of its model judged."""

        def asking(message: AIMessage) -> list[Asked]:
            before = self._listener.heard(request.messages, whole=_needs_all(guard))
            turn, earlier = self._listener.read(message).turn, gone(request.state)
            return [_Said(before, turn, at, gone=earlier).asking(call) for at, call in enumerate(message.tool_calls)]

        def keep(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> None:
            for one, verdict in zip(asked, verdicts, strict=True):
                self._desk.expect(one, verdict)

        tools, answers = partial(names_of, request.tools), partial(_structured_names, request.response_format)
        return ToolGuard(guard, request.state, tools, answers, asking, keep)

    def _route(self, guard: Guard, request: ToolCallRequest) -> Route:
        """Yields what is to be judged, and the call to make, if any."""
        said = _Said.of(request, self._listener, whole=_needs_all(guard))
        admitted = yield from self._admitted(said, request)
        if isinstance(admitted, ToolMessage):
            return self._noting(admitted)
        call = admitted.tool_call
        try:
            result = yield admitted
        except Exception as error:
            if is_control_flow(error):
                raise
            verdict = strictest((yield results(error, call["name"])))
            if verdict is None:
                raise
        else:
            verdicts = yield results(result, call["name"], said.before_result(call))
            verdict = strictest(verdicts)
            if verdict is None:
                result = _as_called(result, call["name"], edited=admitted is not request)
                return self._noting(result, verdicts)
        return self._noting(refused(call, verdict, RESULT_WITHHELD))

    def _noting(self, result: Result, verdicts: Sequence[Verdict] = ()) -> Result:
        if self._notes and isinstance(result, ToolMessage):
            self._notes.hear(result, verdicts)
        return result

    def _admitted(
        self, said: _Said, request: ToolCallRequest
    ) -> Generator[list[Conversation], Any, ToolCallRequest | ToolMessage]:
        """The call that may be made, or what the model is told in its place."""
        edited = False
        while True:
            call = request.tool_call
            asked = said.asking(call)
            verdict = self._desk.recall(request, asked)
            if verdict is None:
                known = self._desk.expected(asked)
                if known is None and said.blocked:
                    return refused(call, None)
                verdict = strictest([known] if known is not None else (yield [asked.conversation]))
            if verdict is None:
                return request
            if verdict.action != "review":
                return refused(call, verdict)
            # Who changed the call has decided on it: rules that have a tool reviewed would never end to ask.
            if edited:
                return request
            self._desk.keep(request, asked, verdict)
            answer = self._desk.ask(request, verdict, shared=said.shares_task)
            if answer is None:
                return refused(call, verdict)
            if answer["type"] == "approve":
                return request
            if answer["type"] == "reject":
                return _rejected(call, answer.get("message"))
            request, edited = request.override(tool_call={**call, "args": answer["edited_action"]["args"]}), True

    def _settled(
        self, request: ModelRequest[Any], response: ModelResponse[Any], verdicts: Sequence[Verdict]
    ) -> ModelResponse[Any]:
        """The response, without structured output that is not allowed."""
        verdict = strictest(verdicts)
        if verdict is None:
            return response
        names = {message.name for message in response.result if isinstance(message, ToolMessage)}
        if not names or _refusals(request.messages, names) >= _RETRIES:
            said = next((message for message in response.result if isinstance(message, AIMessage)), AIMessage(""))
            return ModelResponse(result=[refusal(said, verdict)])
        told: list[BaseMessage] = [
            refused({"id": one.tool_call_id, "name": one.name or ""}, verdict) if isinstance(one, ToolMessage) else one
            for one in response.result
        ]
        return ModelResponse(result=told)


class Noting(ToolGuardMiddleware):
    """The middleware whose rules are about all that was said: it makes notes, as others may shorten the history."""

    state_schema = NotedState

    def __init__(self, g: Guard) -> None:
        super().__init__(g)
        rules = g.policy.tools
        self._notes: Notes = Notes(self._listener, flows=bool(rules and rules.flows))

    @property
    def name(self) -> str:
        """What the agent knows it by."""
        return ToolGuardMiddleware.__name__

    def before_model(self, state: NotedState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Make notes of what is new."""
        unheard = self._notes.unheard(state)
        verdicts = self._gate.ready().screen_many(one for each in unheard for one in each.asked) if unheard else []
        noted = self._notes.noted(state, unheard, verdicts)
        return {"guardmw_noted": noted} if noted else None

    async def abefore_model(self, state: NotedState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """``before_model``, without blocking the event loop."""
        unheard = self._notes.unheard(state)
        asked = [one for each in unheard for one in each.asked]
        verdicts = await (await self._gate.aready()).ascreen_many(asked) if asked else []
        noted = self._notes.noted(state, unheard, verdicts)
        return {"guardmw_noted": noted} if noted else None


class _Before(NamedTuple):
    """What was said before a message, and a digest of it."""

    turns: tuple[Turn, ...] = ()
    digest: bytes = b""


_NOTHING = _Before()


class _Listener(Reads):
    """Reads what was said before a message, and of all of it only what is new."""

    def __init__(self) -> None:
        super().__init__()
        self._running = Running(_NOTHING, held, frozen=False)

    def heard(self, messages: Sequence[BaseMessage], *, whole: bool) -> _Before:
        """All that these messages say, or what the last of them do."""
        if whole:
            return self._running.after(messages, self._step, lambda before: before)
        last = [self.read(message) for message in messages[-CONTEXT_TURNS:]]
        return _Before(tuple(read.turn for read in last), b"".join(read.digest for read in last))

    def _step(self, before: _Before, message: BaseMessage) -> _Before:
        read = self.read(message)
        digest = blake2b(before.digest + read.digest, digest_size=16)
        return _Before((*before.turns, read.turn), digest.digest())


@dataclass(frozen=True, slots=True)
class _Said:
    """What was said before a call.

    Attributes:
        before: what the messages before the one that holds it say.
        turn: that message; None where it is not to be found.
        position: of the call among that message's.
        blocked: that message says it was, before anybody saw it; what was said to forge that only forbids.
        shares_task: other calls of the message may run in the same task of a graph, and its interrupts be theirs.
        gone: what is known of messages that are no longer there.
    """

    before: _Before = _NOTHING
    turn: Turn | None = None
    position: int = 0
    blocked: bool = False
    shares_task: bool = False
    gone: Gone | None = None

    @classmethod
    def of(cls, request: ToolCallRequest, listener: _Listener, *, whole: bool) -> _Said:
        """Read it off the state of a graph: all of it, or a few turns."""
        id_ = request.tool_call["id"]
        for messages in _histories(request.state):
            for at in range(len(messages) - 1, -1, -1):
                message = messages[at]
                ids = [call["id"] for call in message.tool_calls] if isinstance(message, AIMessage) else []
                if id_ in ids:
                    earlier = messages[:at] if whole else messages[max(at - CONTEXT_TURNS, 0) : at]
                    before = listener.heard(_only_messages(earlier), whole=whole)
                    noted = message.response_metadata.get(BLOCKED_CALLS)
                    blocked = isinstance(noted, Mapping) and id_ in noted
                    shares_task = len(ids) > 1 and not _is_sent(request)
                    turn, known = listener.read(message).turn, gone(request.state) if whole else None
                    return cls(before, turn, ids.index(id_), blocked, shares_task, known)
        return cls()

    def asking(self, call: Mapping[str, Any]) -> Asked:
        """The call on trial, after the text and the calls before it in its message."""
        own: tuple[Turn, ...] = (call_of(call["name"], call["args"], call["id"]),)
        if self.turn and (self.position or self.turn.text):
            # An agent with a name puts it on what its model says, later.
            own = (replace(self.turn, tool_calls=self.turn.tool_calls[: self.position], name="", media=()), *own)
        digest = blake2b(repr(own).encode(errors="surrogatepass"), digest_size=16)
        digest.update(self.before.digest)
        turns = (*self.before.turns, *own)
        if self.gone is None:
            return Asked(Conversation(turns), digest.digest())
        digest.update(repr(self.gone).encode(errors="surrogatepass"))
        return Asked(Continued(turns, self.gone), digest.digest())

    def before_result(self, call: Mapping[str, Any]) -> tuple[Turn, ...]:
        """What leads to the result of a call."""
        return (*self.before.turns, self.turn or call_of(call["name"], call["args"], call["id"]))


class _Desk:
    """Where calls wait for a person.

    A graph runs a task again from its beginning when a person has answered, so that verdicts are kept: they might
    differ the second time. Where calls share a task, so do their answers, in the order in which they happen to ask.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._verdicts: OrderedDict[tuple[str, str], dict[bytes, Verdict]] = OrderedDict()
        self._answers: OrderedDict[str, _Answers] = OrderedDict()
        self._expected: OrderedDict[bytes, Verdict] = OrderedDict()

    def expect(self, asked: Asked, verdict: Verdict) -> None:
        """Remember the verdict on a call that is going to be made."""
        with self._lock:
            self._expected[asked.key] = verdict
            _forget(self._expected)

    def expected(self, asked: Asked) -> Verdict | None:
        """The verdict that the call has had on its way here, once."""
        return self._expected.pop(asked.key, None)

    def keep(self, request: ToolCallRequest, asked: Asked, verdict: Verdict) -> None:
        """Remember the verdict on a call under review."""
        with self._lock:
            self._verdicts.setdefault(_key(request), {})[asked.key] = verdict
            _forget(self._verdicts)

    def recall(self, request: ToolCallRequest, asked: Asked) -> Verdict | None:
        """The verdict that this task has had on it already."""
        kept = self._verdicts.get(_key(request))
        return kept.get(asked.key) if kept else None

    def ask(self, request: ToolCallRequest, verdict: Verdict, *, shared: bool) -> dict[str, Any] | None:
        """What a person decided; None where there is no graph whose users could be asked.

        Raises:
            GraphInterrupt: nobody has answered yet.
        """
        call = request.tool_call
        id_ = call["id"] or ""
        question = _question(call, verdict, shared=shared)
        # Nobody waits for long: `interrupt` either returns or raises.
        with self._lock:
            given = self._given(request)
            while True:
                mine = given.by_call.get(id_)
                if mine:
                    return mine.pop(0)
                try:
                    answer = interrupt(question)
                except (KeyError, RuntimeError):
                    return None
                if _is_answer(answer, call["name"]) and (answer.get("tool_call_id") or not shared):
                    given.by_call.setdefault(answer.get("tool_call_id") or id_, []).append(answer)
                else:
                    question = {**question, "problem": "that was no answer to this question"}

    def _given(self, request: ToolCallRequest) -> _Answers:
        """The answers that this run of a task was given so far."""
        run = getattr(request.runtime, "execution_info", None)
        task = _key(request)[0]
        given = self._answers.get(task)
        if given is None or given.run is not run or not task:
            given = self._answers[task] = _Answers(run)
            _forget(self._answers)
        return given


@dataclass(slots=True)
class _Answers:
    run: object
    by_call: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def _structured_names(form: object) -> frozenset[str]:
    """The names of the tools that a model calls to give structured output."""
    if isinstance(form, AutoStrategy):
        form = ToolStrategy(form.schema)
    return frozenset(spec.name for spec in form.schema_specs) if isinstance(form, ToolStrategy) else frozenset()


def _needs_all(guard: Guard) -> bool:
    """Whether rules are about all that was said, and not only about what a backend takes for context."""
    rules = guard.policy.tools
    return bool(rules and (rules.flows or rules.budgets))


def _histories(state: object) -> Iterable[Sequence[Any]]:
    """The lists of messages in the state of a graph, the usual one first."""
    if isinstance(state, list):
        return [state]
    held = state if isinstance(state, Mapping) else getattr(state, "__dict__", {})
    usual = held.get("messages")
    others = (value for key, value in held.items() if key != "messages" and isinstance(value, list))
    return [usual, *others] if isinstance(usual, list) else others


def _only_messages(values: Sequence[Any]) -> Sequence[BaseMessage]:
    """The messages among the values of a state, which are almost always all of them."""
    if all(issubclass(kind, BaseMessage) for kind in set(map(type, values))):
        return values
    return [value for value in values if isinstance(value, BaseMessage)]


def _is_sent(request: ToolCallRequest) -> bool:
    """Whether the call was sent to a task of its own, as agents do."""
    path = (_config(request).get("metadata") or {}).get("langgraph_path") or ("",)
    return bool(path[0] == "__pregel_push")


def _config(request: ToolCallRequest) -> Mapping[str, Any]:
    return getattr(request.runtime, "config", None) or {}


def _key(request: ToolCallRequest) -> tuple[str, str]:
    """The task, which is the same when it is run again, and the call."""
    return (_config(request).get("configurable") or {}).get("checkpoint_ns") or "", request.tool_call["id"] or ""


def _forget(remembered: OrderedDict[Any, Any]) -> None:
    while len(remembered) > _REMEMBERED:
        remembered.popitem(last=False)


def _question(call: Mapping[str, Any], verdict: Verdict, *, shared: bool) -> dict[str, Any]:
    told = ", with its tool_call_id" if shared else ""
    return {
        "type": "tool_approval",
        "tool_call_id": call["id"],
        "name": call["name"],
        "args": call["args"],
        "description": f"Approve, edit or reject this call{told}. {verdict.summary}",
        "verdict": verdict.to_dict(),
    }


def _is_answer(answer: object, name: str) -> bool:
    if not isinstance(answer, dict):
        return False
    if answer.get("type") != "edit":
        return answer.get("type") in ("approve", "reject")
    action = answer.get("edited_action")
    # Another tool than the one that was asked about is another question.
    return isinstance(action, dict) and action.get("name", name) == name and isinstance(action.get("args"), dict)


def _rejected(call: Mapping[str, Any], reason: object) -> ToolMessage:
    text = f"{REJECTED} Reason: {reason}" if reason else REJECTED
    return ToolMessage(text, tool_call_id=call["id"] or "", name=call["name"], status="error")


def _as_called(result: Result, name: str, *, edited: bool) -> Result:
    """The result, in its tool's own name, by which rules trust it; of an edited call it says so."""
    if not isinstance(result, ToolMessage):
        return result
    changes: dict[str, Any] = {"name": name} if result.name not in (None, name) else {}
    if edited:
        content = result.content
        blocks = [{"type": "text", "text": EDITED}, *content] if isinstance(content, list) else None
        changes["content"] = blocks or f"{EDITED}\n\n{content}"
    return result.model_copy(update=changes) if changes else result


def _structured(request: ModelRequest[Any], response: ModelResponse[Any]) -> list[Conversation]:
    """What is to be judged in structured output: the call that it was, or the answer."""
    context = tuple(spoken(one)[1] for one in request.messages[-CONTEXT_TURNS:])
    answered = {message.tool_call_id for message in response.result if isinstance(message, ToolMessage)}
    asked = []
    said: list[Part] = []
    called = False
    for message in response.result:
        if not isinstance(message, AIMessage):
            continue
        calls = [call for call in message.tool_calls if call["id"] in answered]
        asked += [Conversation((*context, call_of(call["name"], call["args"], call["id"]))) for call in calls]
        said += parts(message) if not calls else []
        called = called or bool(calls)
    made = [] if called else unsaid(response.structured_response, (part.turn.text for part in said))
    return asked + [within(context, part.conversation) for part in (*said, *made)]


def _refusals(messages: Sequence[BaseMessage], names: set[str | None]) -> int:
    """How often structured output has been withheld since a person spoke."""
    count = 0
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            break
        if isinstance(message, ToolMessage) and message.name in names:
            count += "guardmw" in message.response_metadata
    return count
