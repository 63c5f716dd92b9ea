"""``GuardMiddleware``: an agent that is told only what may be said to it, and says only what may be said."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Self, TypedDict, cast, get_args
from uuid import uuid4

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelResponse, hook_config
from langchain.agents.middleware.types import PrivateStateAttr
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.messages import AIMessage
from langgraph.channels import UntrackedValue
from langgraph.func import task
from langgraph.types import interrupt

from langchain_guardmw.asking import ENDED, Asking, OnBlock, Pending, instead
from langchain_guardmw.gate import Gate, as_guard
from langchain_guardmw.history import History
from langchain_guardmw.hooks import signed, unhooked
from langchain_guardmw.outcome import REFUSAL, refusal_metadata

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence

    from langchain_core.messages import BaseMessage
    from langgraph.runtime import Runtime

    from guardmw import Backend, Guard
    from langchain_guardmw.asking import Extended, Request, Response
    from langchain_guardmw.held import Mode
    from langchain_guardmw.history import Trial


class Doubt(TypedDict):
    """A message on which a person is to decide.

    Attributes:
        about: what is approved: this message, in its context, to this guard.
        failed: nothing but a backend's failure withholds it.
        verdict: as ``to_dict`` tells it.
    """

    at: int
    about: str
    failed: bool
    verdict: dict[str, Any]


class Step(TypedDict):
    """What is to stay as it is when a review is run again; streams show it.

    Attributes:
        guardmw_run: which run of the node it comes from.
        guardmw_asked: what a person is asked.
        guardmw_early: an answer was there before that.
    """

    guardmw_run: str
    guardmw_asked: NotRequired[list[Doubt]]
    guardmw_early: NotRequired[bool]


class GuardState(AgentState[Any]):
    """What a guard keeps in the agent's state, where no input of a run can put it; who may write the state can.

    Attributes:
        guardmw_approved: the keys of messages on which it has been decided: by a person who approved them, or by the
            guard that took blocked calls out of them.
        guardmw_over: the id of the refusal that was to end this run, and the verdict; no checkpoint keeps it.
    """

    guardmw_approved: NotRequired[Annotated[list[str], PrivateStateAttr, operator.add]]
    # Of two guards that refuse, either may have its say.
    guardmw_over: NotRequired[Annotated[tuple[str, Any], UntrackedValue(tuple, guard=False), PrivateStateAttr]]


def _updated(held: dict[str, bytes], changes: dict[str, bytes | None]) -> dict[str, bytes]:
    """Several guards may make changes at once; with None they let go of what they held."""
    return {name: packed for name, packed in {**held, **changes}.items() if packed is not None}


class ReviewState(GuardState):
    """What a review keeps in the agent's state, too.

    Attributes:
        guardmw_held: by guard the answer on which a person is to decide, packed; empty where the run is over.
    """

    guardmw_held: NotRequired[Annotated[dict[str, bytes], PrivateStateAttr, _updated]]


class GuardMiddleware(AgentMiddleware[Any, Any, Any]):
    """Judges what an agent's model is told and what it answers, in every way of running the agent.

    Put it last in the list: then it sees what the model sees, whatever other middlewares add, and no other swaps the
    model that it guards. Every message of the conversation and the system prompt is judged before the model is asked,
    each once: what has been judged in the same context is not judged again. The answer, its reasoning and its tool
    calls are judged as they come, and nobody sees them before. Where a ToolGuardMiddleware comes before it, that one's
    guard judges the calls instead, and a blocked call does not end the run.

    The current turn begins with the user's last message. What a policy withholds of earlier turns is taken out of the
    model's sight and out of the state, whatever ``on_block`` says, and the run goes on: it was dealt with in its turn.

    A verdict of review withholds as one of block does; with ``on_block="review"`` a person decides on both.

    Args:
        g: as in ``guard()``.
        on_block: "raise" Blocked; "end" the run with a refusal, and take what was withheld out of the state;
            "replace" a withheld message and go on, or a withheld answer by a refusal, which ends the run too;
            "review": ask a person through ``interrupt()``, who says "approve", "reject" or
            ``{"type": "edit", "content": "…"}`` (needs a checkpointer; answers come in one piece).
        stream: as in ``guard()``.
        leak: as in ``guard()``.
        name: what the agent knows it by; two in one agent need two names.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        ValueError: on_block, stream or leak is none of those that there are.
    """

    state_schema = GuardState

    def __new__(cls, *_: object, on_block: OnBlock = "raise", **__: object) -> Self:
        """Make one that has no more hooks than it needs: each is a node of the graph, dearer than a verdict."""
        reviewing: type[Any] = Reviewing
        made: Self = super().__new__(reviewing if on_block == "review" and cls is GuardMiddleware else cls)
        return made

    def __init__(
        self,
        g: Guard | Backend | str | None = None,
        *,
        on_block: OnBlock = "raise",
        stream: Mode = "hold",
        leak: int = 0,
        name: str = "GuardMiddleware",
    ) -> None:
        super().__init__()
        if on_block not in get_args(OnBlock):
            raise ValueError(f"on_block is one of {', '.join(map(repr, get_args(OnBlock)))}")
        self._name = name
        self._on_block = on_block
        self._gate = Gate(as_guard(g), "output", "raise" if on_block == "raise" else "refuse", stream, leak)
        if on_block == "review":
            self._gate = replace(self._gate, mode="buffer", leak=0)
        self._known: History | None = None

    @property
    def name(self) -> str:
        """What the agent knows it by."""
        return self._name

    @signed
    def wrap_model_call(self, request: Request, handler: Callable[[Request], Response]) -> Response | Extended:
        """Judge, ask the guarded model, and judge what did not come from it."""
        guard = self._gate.ready()
        asking = self._asking(request, guard)
        asking.take(guard.screen_many(asking.asked) if asking.asked else [])
        if asking.refusal:
            return asking.refused()
        failed = None
        try:
            response = asking.ask(handler)
        except StructuredOutputError as error:
            # It quotes an answer that may be another model's, and is judged with it.
            response, failed = ModelResponse(result=[error.ai_message]), error
        for at, answer in asking.strays(response):
            asking.screened(response, at, guard.screen_many(self._gate.asked(answer, asking.context())))
        if made := asking.made(response, failed):
            asking.refuse_made(response, guard.screen_many(made))
        return asking.answered(response, failed)

    @unhooked
    async def awrap_model_call(
        self, request: Request, handler: Callable[[Request], Awaitable[Response]]
    ) -> Response | Extended:
        """``wrap_model_call``, without blocking the event loop."""
        guard = await self._gate.aready()
        asking = self._asking(request, guard)
        asking.take(await guard.ascreen_many(asking.asked) if asking.asked else [])
        if asking.refusal:
            return asking.refused()
        failed = None
        try:
            response = await asking.aask(handler)
        except StructuredOutputError as error:
            response, failed = ModelResponse(result=[error.ai_message]), error
        for at, answer in asking.strays(response):
            asking.screened(response, at, await guard.ascreen_many(self._gate.asked(answer, asking.context())))
        if made := asking.made(response, failed):
            asking.refuse_made(response, await guard.ascreen_many(made))
        return asking.answered(response, failed)

    def _asking(self, request: Request, guard: Guard) -> Asking:
        return Asking(request, self._gate, self._history(guard), self._on_block, self.name)

    def _history(self, guard: Guard) -> History:
        if self._known is None:
            # Two threads may each make one; what the loser remembers is judged again.
            self._known = History(guard.policy.max_characters, (self.name, guard.policy.fingerprint))
        return self._known


class Reviewing(GuardMiddleware):
    """The middleware that asks a person: about what the model is to be told, and about what it answered."""

    state_schema = ReviewState

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: ReviewState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Ask about what is withheld of the current turn."""
        guard = self._gate.ready()
        trial = self._history(guard).trial(state["messages"], state.get("guardmw_approved", ()))
        trial.take(guard.screen_many(trial.asked) if trial.asked else [])
        route = self._decided(state, trial)
        try:
            step = next(route)
            while True:
                step = route.send(_kept(step).result())
        except StopIteration as stop:
            return cast("dict[str, Any] | None", stop.value)

    @hook_config(can_jump_to=["end"])
    async def abefore_model(self, state: ReviewState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """``before_model``, without blocking the event loop."""
        guard = await self._gate.aready()
        trial = self._history(guard).trial(state["messages"], state.get("guardmw_approved", ()))
        trial.take(await guard.ascreen_many(trial.asked) if trial.asked else [])
        route = self._decided(state, trial)
        try:
            step = next(route)
            while True:
                step = route.send(await _akept(step))
        except StopIteration as stop:
            return cast("dict[str, Any] | None", stop.value)

    @hook_config(can_jump_to=["end", "model"])
    def after_model(self, state: ReviewState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Ask about an answer that is withheld; a refusal stands in its place until then, and if it is rejected."""
        packed = self._held(state)
        if packed is None:
            return None
        gone: dict[str, Any] = {"guardmw_held": {self.name: None}}
        if packed == ENDED:
            # Unless another guard has somebody decide first.
            others = (held for name, held in state["guardmw_held"].items() if name != self.name)
            return gone if any(others) else gone | {"jump_to": "end"}
        pending, messages = Pending.unpacked(packed), state["messages"]
        id_ = pending.answer.id
        at = next((at for at, message in enumerate(messages) if message.id == id_), None)
        if at is None:
            # Somebody took the refusal out, and there is no place for an answer.
            return gone
        history = self._history(self._gate.ready())
        about = history.approval([*messages[:at], pending.answer], at)
        decision, text = _decision(next(_answers(pending.answer, about, pending.verdict)))
        if decision == "reject":
            return gone | ({"jump_to": "end"} if pending.structured else {})
        answer = pending.answer
        if decision == "edit":
            answer = AIMessage(text, id=id_, name=answer.name)
            about = history.approval([*messages[:at], answer], at)
        approved: dict[str, Any] = {"guardmw_approved": [about]}
        if not (pending.structured or pending.beside):
            return gone | approved | {"messages": [answer]}
        # The agent reads an object from what its model says, and other guards judge that, and nothing else: it is said
        # there.
        decided = pending._replace(answer=answer, decided=True)
        return approved | {"guardmw_held": {self.name: decided.packed()}, "jump_to": "model"}

    def _held(self, state: ReviewState) -> bytes | None:
        return (state.get("guardmw_held") or {}).get(self.name)

    def _decided(self, state: ReviewState, trial: Trial) -> Generator[Step, Step, dict[str, Any] | None]:
        """Yields what a person is asked, and is sent what one was asked when this ran first: that is what they saw."""
        run = uuid4().hex
        shown: Sequence[BaseMessage] = state["messages"]
        messages = list(shown)
        history = self._history(self._gate.ready())
        open_ = _doubts(trial, history, shown)
        decided: set[int] = set()
        approved: list[int] = []
        rejected: list[Doubt] = []
        while doubts := [one for one in open_ if one["at"] not in decided]:
            asked = yield Step(guardmw_run=run, guardmw_asked=doubts)
            # An answer that is there before its question was to one of a state that somebody has changed since.
            early = Step(guardmw_run=run, guardmw_early=asked["guardmw_run"] == run)
            for doubt in asked["guardmw_asked"]:
                at = doubt["at"]
                answers = _answers(shown[at], doubt["about"], doubt["verdict"])
                given = next(answers)
                while (yield early)["guardmw_early"]:
                    given = next(answers)
                decision, text = _decision(given)
                if decision == "approve":
                    if doubt["about"] != history.approval(shown, at):
                        # It was another policy that withheld it.
                        continue
                    approved.append(at)
                elif decision == "edit":
                    messages[at] = instead(shown[at], text=text)
                else:
                    rejected.append(doubt)
                    messages[at] = shown[at] if doubt["failed"] else instead(shown[at])
                decided.add(at)
        # An edit changes the context of what follows it.
        approvals = [history.approval(messages, at) for at in approved]
        changed = [new for new, old in zip(messages, shown, strict=True) if new is not old]
        update: dict[str, Any] = {"guardmw_approved": approvals} if approvals else {}
        packed = self._held(state)
        if packed is not None and (packed == ENDED or not Pending.unpacked(packed).decided):
            # Nobody has decided on it, and the user went on: its refusal stands.
            update["guardmw_held"] = {self.name: None}
        if rejected:
            answer = AIMessage(REFUSAL, response_metadata=refusal_metadata(rejected[0]["verdict"]))
            return update | {"messages": [*changed, answer], "jump_to": "end"}
        return (update | {"messages": changed} if changed else update) or None


def _same(step: Step) -> Step:
    return step


async def _asame(step: Step) -> Step:
    return step


# A graph runs a node again when a person has answered, perhaps in another process, and hands it the answers by their
# order alone. What a task of the node gave stays as it was, so that each goes to the question that was put.
_task: Any = task(name="guardmw")
_kept, _akept = _task(_same), _task(_asame)


def _doubts(trial: Trial, history: History, messages: Sequence[BaseMessage]) -> list[Doubt]:
    """What is withheld of the current turn, or not judged at all."""
    begin, failed = trial.begin(), trial.failed
    return [
        Doubt(at=at, about=history.approval(messages, at), failed=failed(verdict), verdict=verdict.to_dict())
        for at, verdict in sorted(trial.withheld.items())
        if at >= begin or failed(verdict)
    ]


def _answers(message: BaseMessage, about: str, verdict: dict[str, Any]) -> Iterator[object]:
    """What a person says to it; to ask again, go on."""
    question = {
        "guardmw": verdict,
        "about": about,
        "role": message.type,
        "content": message.content,
        "tool_calls": getattr(message, "tool_calls", []),
        "decisions": ["approve", "edit", "reject"],
    }
    while True:
        given = interrupt(question)
        # One that names another question is for that.
        if not isinstance(given, dict) or given.get("about", about) == about:
            yield given
        question = {**question, "problem": "that was an answer to another question"}


def _decision(given: object) -> tuple[str, str]:
    """What a person decided, with the text of an edit; what cannot be understood rejects."""
    said = given if isinstance(given, dict) else {"type": given}
    kind, text = said.get("type"), said.get("content")
    if kind == "edit" and isinstance(text, str):
        return "edit", text
    return ("approve" if kind == "approve" else "reject"), ""
