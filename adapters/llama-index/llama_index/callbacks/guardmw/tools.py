"""Tools of which every call is judged before it runs, and every result before the model reads it; the run goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llama_index.callbacks.guardmw._parts import turn_of_result
from llama_index.callbacks.guardmw._step import NOTHING, Said, Step, WaitingForEvent
from llama_index.callbacks.guardmw._verdicts import Judge, blocked_by, said_by, tell, withholds
from llama_index.core.tools import AsyncBaseTool, BaseTool, FunctionTool, ToolOutput, adapt_to_async_tool
from pydantic_core import PydanticSerializationError, to_jsonable_python

from guardmw import Conversation, ConversationError, ToolCall, Turn

if TYPE_CHECKING:
    from llama_index.callbacks.guardmw._gate import Gate
    from llama_index.core.workflow import HumanResponseEvent

    from guardmw import Backend, Guard, Verdict

    # The mixin stands before the class of a tool, whatever that is. A real base would record each call twice.
    _Tool = AsyncBaseTool
else:
    _Tool = object


class Screen(NamedTuple):
    """What a plan yields to have something judged."""

    conversation: Conversation


class Ask(NamedTuple):
    """What a plan yields to have a person decide; it is sent a HumanResponseEvent, or None where nobody was there."""

    verdict: Verdict


class Run(NamedTuple):
    """What a plan yields to have the tool run; it is sent what the tool gave, or thrown what it raised."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Plan = Generator[Screen | Ask | Run, Any, ToolOutput]


def guard_tool(tool: BaseTool | Callable[..., Any], g: Guard | Backend | str | None = None) -> AsyncBaseTool:
    """A tool like this one, with the same metadata, that runs only what a guard lets it.

    A call that is withheld does not run, and a result that is withheld is not shown: in its place comes a ToolOutput
    with ``is_error`` that tells the model so, and whose ``exception`` is Blocked. What is allowed stays as it is. What
    a tool raises is judged as its result.

    Where the policy wants a call reviewed, a workflow waits: it streams an InputRequiredEvent with ``review``,
    ``tool_name``, ``tool_kwargs`` and ``reason``, and goes on at ``HumanResponseEvent(review=…, response=…)``:
    "approve", "edit" with new ``tool_kwargs``, which are judged too, or "reject"; anything else rejects. Without a
    workflow, and in sync calls, nobody can be asked, and the call is withheld. So is a result that wants a review.

    Args:
        tool: of any kind, or a function to make one of. Its own state is shared with the tool that is returned.
        g: a Guard, a Backend, a spec for ``guardmw.load``, or None for the embedded model, loaded at the first call.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: it is neither tool nor function, or g is none of these.
    """
    return _guarded(tool, Judge.of(g))


# Agents ask for a list[BaseTool | Callable], LLMs for a Sequence[BaseTool]: no other list is both.
def guard_tools(tools: Iterable[BaseTool | Callable[..., Any]], g: Guard | Backend | str | None = None) -> list[Any]:
    """``guard_tool`` for several, with one guard.

    Raises: as guard_tool.
    """
    if not isinstance(tools, Iterable):
        raise TypeError(f"give a list of tools, not one {type(tools).__name__}: guard_tool() takes a single one")
    judge = Judge.of(g)
    return [_guarded(tool, judge) for tool in tools]


def names_of_guarded(tools: Iterable[BaseTool], gate: Gate) -> frozenset[str]:
    """The names that only tools have which the guard of a gate guards, too: they see to reviews."""
    sees_to = [(tool.metadata.get_name(), any(map(gate.judges_like, _judges(tool)))) for tool in tools]
    return frozenset(name for name, guarded in sees_to if guarded) - {name for name, guarded in sees_to if not guarded}


def _judges(tool: object) -> Iterator[Judge]:
    while isinstance(tool, _Guarded):
        yield tool._judge  # noqa: SLF001 - its own class's
        tool = tool._inner  # noqa: SLF001


class _Guarded(_Tool):
    """What stands before a tool's own class in a guarded tool."""

    _inner: AsyncBaseTool
    _judge: Judge

    def __call__(self, *args: Any, **kwargs: Any) -> ToolOutput:  # noqa: ANN401 - as the tool's own
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> ToolOutput:  # noqa: ANN401 - as the tool's own
        """Judge the call, run the tool, judge what it gave."""
        guard = self._judge.ready()
        plan = _plan(self, _read(self, args, kwargs), args, kwargs)
        try:
            wanted = next(plan)
            while True:
                if isinstance(wanted, Run):
                    try:
                        answer: Any = self._inner.call(*wanted.args, **wanted.kwargs)
                    except Exception as error:  # noqa: BLE001 - the plan raises it again, once it has been judged
                        wanted = plan.throw(error)
                        continue
                elif isinstance(wanted, Screen):
                    answer = guard.screen(wanted.conversation)
                else:
                    answer = None
                wanted = plan.send(answer)
        except StopIteration as stop:
            return cast("ToolOutput", stop.value)

    async def acall(self, *args: Any, **kwargs: Any) -> ToolOutput:  # noqa: ANN401 - as the tool's own
        """``call``, without blocking the event loop; in an agent in the light of what was said before."""
        guard = await self._judge.aready()
        step = Step.current()
        turn = _read(self, args, kwargs, step.call_id if step else "")
        if step is None:
            return await self._run(_plan(self, turn, args, kwargs), guard)
        call = turn.tool_calls[0]
        said = await step.said(call, whole=guard.policy.tools is not None)
        key = step.key(call)
        known = await step.recall(key)
        plan = _plan(self, turn, args, kwargs, said=said, known=known)
        return await self._run(plan, guard, _Waiting(step, key, call, known))

    async def _run(self, plan: Plan, guard: Guard, waiting: _Waiting | None = None) -> ToolOutput:
        try:
            wanted = next(plan)
            while True:
                if isinstance(wanted, Run):
                    try:
                        answer: Any = await self._inner.acall(*wanted.args, **wanted.kwargs)
                    except WaitingForEvent:
                        # The tool itself waits for something; it runs again from its beginning, its call judged.
                        if waiting:
                            await waiting.remember()
                        raise
                    except Exception as error:  # noqa: BLE001 - the plan raises it again, once it has been judged
                        wanted = plan.throw(error)
                        continue
                elif isinstance(wanted, Screen):
                    answer = await guard.ascreen(wanted.conversation)
                    if waiting and waiting.verdict is None:
                        waiting.verdict = answer
                else:
                    answer = await waiting.ask() if waiting else None
                wanted = plan.send(answer)
        except StopIteration as stop:
            return cast("ToolOutput", stop.value)


@dataclass(slots=True)
class _Waiting:
    """A call in a workflow, for which a person can be asked.

    Attributes:
        verdict: on the call, as soon as it is known.
    """

    step: Step
    key: str
    call: ToolCall
    verdict: Verdict | None

    async def remember(self) -> None:
        if self.verdict is not None:
            await self.step.remember(self.key, self.verdict)

    async def ask(self) -> HumanResponseEvent | None:
        await self.remember()
        assert self.verdict is not None  # noqa: S101 - it is what the person is asked about
        return await self.step.ask(self.key, self.call, self.verdict)


def _plan(
    tool: _Guarded,
    call: Turn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    said: Said = NOTHING,
    known: Verdict | None = None,
) -> Plan:
    """One call, as args and kwargs read, from its judgement to that of its result, with or without an event loop.

    It is not judged again where its step has begun again, and the verdict is ``known``.
    """
    verdict = known
    if verdict is None:
        verdict = yield Screen(said.asking(call))
        tell([verdict])
    if verdict.action == "review":
        decision = _decision((yield Ask(verdict)))
        if decision.refusal:
            return _refused(tool, verdict, decision.refusal)
        if decision.arguments is not None:
            args, kwargs = (), _with_context(tool, decision.arguments, kwargs)
            call, said = _read(tool, args, kwargs, call.tool_calls[0].id), said._replace(turn=None)
            verdict = yield Screen(said.asking(call))
            tell([verdict])
    if verdict.blocked:
        return _refused(tool, verdict, "was blocked by a policy")
    name = tool.metadata.get_name()
    try:
        output = yield Run(args, kwargs)
    except Exception as error:
        # Agents show the model what a tool raises, and whoever logs it what that came of.
        verdict = yield Screen(said.answered(call, Turn("tool", said_by(error), name=name)))
        tell([verdict])
        if withholds(verdict):
            return _withheld(tool, verdict, {})
        raise
    verdict = yield Screen(said.answered(call, turn_of_result(output, name)))
    tell([verdict])
    return _withheld(tool, verdict, getattr(output, "raw_input", {})) if withholds(verdict) else output


class _Decision(NamedTuple):
    """What a person decided.

    Attributes:
        refusal: why the call does not run; empty where it does.
        arguments: to be given in place of the model's.
    """

    refusal: str = ""
    arguments: Mapping[str, Any] | None = None


def _decision(response: HumanResponseEvent | None) -> _Decision:
    """Read what a person said: only what is clearly a yes is one."""
    if response is None:
        return _Decision("needs the consent of a person, and there was none to ask")
    said = response.get("response")
    if said == "approve":
        return _Decision()
    arguments = response.get("tool_kwargs")
    if said == "edit" and isinstance(arguments, Mapping):
        return _Decision(arguments=arguments)
    return _Decision("was rejected by a person")


def _refused(tool: AsyncBaseTool, verdict: Verdict, why: str) -> ToolOutput:
    return _error(tool, verdict, f"This call {why} and did not run", {})


def _withheld(tool: AsyncBaseTool, verdict: Verdict, given: dict[str, Any]) -> ToolOutput:
    return _error(tool, verdict, "The tool ran, but its result was withheld by a policy", given)


def _error(tool: AsyncBaseTool, verdict: Verdict, text: str, given: dict[str, Any]) -> ToolOutput:
    """What the model reads in place of a result. A backend's own words may tell of this machine, and stay out."""
    rules = ", ".join(violation.rule for violation in verdict.violations)
    return ToolOutput(
        tool_name=tool.metadata.get_name(),
        content=f"{text} ({rules})." if rules else f"{text}.",
        raw_input=given,
        is_error=True,
        exception=blocked_by(verdict),
    )


def _read(tool: AsyncBaseTool, args: tuple[Any, ...], kwargs: Mapping[str, Any], call_id: str = "") -> Turn:
    """A call as a turn: what the model gave, by name. The tool's own ``partial_params`` are not the model's."""
    name = tool.metadata.get_name()
    given = _by_name(tool, args, kwargs) if args else dict(kwargs)
    given.pop(_context_name(tool), None)
    call = ToolCall(name, given, call_id)
    try:
        str(call)
    except ConversationError:
        return _made_plain(call)
    return Turn("assistant", tool_calls=(call,))


def _made_plain(call: ToolCall) -> Turn:
    """A call whose arguments are not plain JSON values; what cannot be read makes the verdict partial."""
    opaque: list[str] = []

    def name_of(value: object) -> str:
        opaque.append(type(value).__name__)
        return f"<{opaque[-1]}>"

    arguments: Any
    try:
        arguments = to_jsonable_python(call.arguments, fallback=name_of)
        str(ToolCall(call.name, arguments))
    except (ConversationError, PydanticSerializationError, RecursionError, ValueError):
        arguments, opaque = "", ["arguments"]
    return Turn("assistant", tool_calls=(ToolCall(call.name, arguments, call.id),), media=tuple(opaque))


def _by_name(tool: AsyncBaseTool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names, as rules know them; those that have none come as a list."""
    if isinstance(tool, FunctionTool):
        names = [
            name
            for name, parameter in inspect.signature(tool.real_fn).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    else:
        names = list(tool.metadata.get_parameters_dict()["properties"])
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return given | ({"*": list(args[len(names) :])} if len(args) > len(names) else {})


def _with_context(tool: AsyncBaseTool, arguments: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    name = _context_name(tool)
    return {**arguments, name: kwargs[name]} if name in kwargs else dict(arguments)


def _context_name(tool: AsyncBaseTool) -> str:
    """The parameter by which a tool takes a workflow's Context; empty where it takes none."""
    return getattr(tool, "ctx_param_name", None) or ""


def _guarded(tool: BaseTool | Callable[..., Any], judge: Judge) -> _Guarded:
    if not isinstance(tool, BaseTool):
        if not callable(tool):
            raise TypeError(f"give a tool or a function, not {type(tool).__name__}")
        tool = FunctionTool.from_defaults(tool)
    tool = adapt_to_async_tool(tool)
    guarded = object.__new__(type(tool) if isinstance(tool, _Guarded) else _guarded_class(type(tool)))
    # What else the tool has and does is as it was; agents ask for more than its metadata.
    guarded.__dict__.update(tool.__dict__, _inner=tool, _judge=judge)
    return guarded


@cache
def _guarded_class(of: type[AsyncBaseTool]) -> type[_Guarded]:
    """Agents ask what a tool is an instance of: only a FunctionTool is given a Context."""
    return cast(
        "type[_Guarded]", type(f"Guarded{of.__name__}", (_Guarded, of), {"__doc__": of.__doc__, "__module__": __name__})
    )
