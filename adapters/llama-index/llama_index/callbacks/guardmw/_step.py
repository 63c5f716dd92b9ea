"""Where a tool is called: what an agent said and read before, and the person who can be asked."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_index.callbacks.guardmw._parts import merged, parts_of_message
from llama_index.core.agent.react.types import ActionReasoningStep, ObservationReasoningStep
from llama_index.core.agent.workflow import ToolCall as ToolCallEvent
from llama_index.core.memory import BaseMemory
from llama_index.core.workflow import Context, HumanResponseEvent, InputRequiredEvent
from workflows.errors import WorkflowRuntimeError

# Both are what Context itself goes by; the agents of LlamaIndex import the second from here too.
from workflows.runtime.types.results import StepWorkerStateContextVar, WaitingForEvent

from guardmw import Conversation, ToolCall, Turn, Verdict
from guardmw.verdict import Coverage, Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llama_index.core.base.llms.types import ChatMessage

__all__ = ["NOTHING", "Said", "Step", "WaitingForEvent"]

# A guard reads a few turns of context. Rules over the conversation need all of it.
_CONTEXT_MESSAGES = 10
# As FunctionAgent and ReActAgent call, by default, what they did since the user spoke.
_SCRATCHPAD, _REASONING = "scratchpad", "current_reasoning"


class Said(NamedTuple):
    """What came before a call.

    Attributes:
        before: the turns before the one that makes the call.
        turn: the model's turn that makes it, perhaps among others; None where it is not known.
        at: which of that turn's calls it is.
    """

    before: tuple[Turn, ...] = ()
    turn: Turn | None = None
    at: int = 0

    def asking(self, trial: Turn) -> Conversation:
        """A call on trial. Those that the model made before it in the same turn have been made, for a budget."""
        if self.turn is None or not self.at:
            return Conversation((*self.before, trial))
        earlier = replace(self.turn, tool_calls=self.turn.tool_calls[: self.at])
        return Conversation((*self.before, earlier, trial))

    def answered(self, call: Turn, result: Turn) -> Conversation:
        """A result on trial, as it will stand in the conversation later: so a guard knows it again."""
        return Conversation((*self.before, self.turn or call, result))


NOTHING = Said()


@dataclass(frozen=True, slots=True)
class Step:
    """The step of a workflow that runs.

    Attributes:
        event: what the agent wants to be called; None in a workflow that is no agent.
        item: tells the step from others that run beside it, and is the same when it runs again.
    """

    context: Context
    event: ToolCallEvent | None
    item: str

    @classmethod
    def current(cls) -> Step | None:
        """None outside of workflows."""
        try:
            context = Context.get_step_context()
            state = StepWorkerStateContextVar.get()
        except (WorkflowRuntimeError, LookupError):
            return None
        event = state.event if isinstance(state.event, ToolCallEvent) else None
        return cls(context, event, str(getattr(state.state, "work_item_id", "")))

    @property
    def call_id(self) -> str:
        """That the model gave to the call; empty in a workflow that is no agent."""
        return self.event.tool_id if self.event else ""

    async def said(self, call: ToolCall, *, whole: bool) -> Said:
        """What the agent said and read before this call, ``whole`` or only the last of it."""
        if self.event is None:
            return NOTHING
        store = self.context.store
        memory = await store.get("memory", default=None)
        messages = await memory.aget_all() if isinstance(memory, BaseMemory) else []
        messages = [*messages, *await store.get(_SCRATCHPAD, default=[])]
        if not whole:
            messages = messages[-_CONTEXT_MESSAGES:]
        turns = [*_named(messages), *_reasoned(await store.get(_REASONING, default=[]))]
        if not turns or turns[-1].role != "assistant" or not turns[-1].tool_calls:
            return Said(tuple(turns))
        at = _place(turns[-1].tool_calls, call)
        return Said(tuple(turns)) if at is None else Said(tuple(turns[:-1]), turns[-1], at)

    def key(self, call: ToolCall) -> str:
        """Tells a call from all others of the run, and is the same when the step runs again."""
        # Some models give no ids, or the same to all calls.
        spelled = repr((self.item, call.id, str(call)))
        return f"guardmw_{blake2b(spelled.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"

    async def remember(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict while the step waits: it runs again from its beginning, perhaps in another process."""
        # A state of the user's own type may have no place for it; the call is then judged again.
        with suppress(AttributeError, TypeError, ValueError):
            await self.context.store.set(key, verdict.to_dict())

    async def recall(self, key: str) -> Verdict | None:
        """A verdict that was kept, once."""
        kept = await self.context.store.get(key, default=None)
        if kept is None:
            return None
        await self.context.store.set(key, None)
        violations = tuple(Violation(**violation) for violation in kept["violations"])
        return Verdict(kept["action"], kept["stage"], violations, None, Coverage(0, 0, 0), reason=kept["reason"])

    async def ask(self, key: str, call: ToolCall, verdict: Verdict) -> HumanResponseEvent | None:
        """What a person says to a call; None where nobody does in time.

        Raises:
            WaitingForEvent: nobody has yet. The workflow runs the step again when somebody has.
        """
        told: dict[str, Any] = {
            "prefix": f"May the agent call {call.name}? ",
            "review": key,
            "tool_name": call.name,
            "tool_id": call.id,
            "tool_kwargs": call.arguments,
            "reason": verdict.summary,
        }
        try:
            return await self.context.wait_for_event(
                HumanResponseEvent, waiter_event=InputRequiredEvent(**told), waiter_id=key, requirements={"review": key}
            )
        except TimeoutError:
            return None


def _named(messages: Sequence[ChatMessage]) -> list[Turn]:
    """A chat's turns, in which a tool's result has the tool's name: messages have only the id of the call."""
    names: dict[str, str] = {}
    turns: list[Turn] = []
    for message in messages:
        if not (parts := parts_of_message(message)):
            continue
        turn = merged(parts)
        names |= {call.id: call.name for call in turn.tool_calls}
        name = names.get(str(message.additional_kwargs.get("tool_call_id") or ""))
        turns.append(replace(turn, name=name) if name and turn.role == "tool" and not turn.name else turn)
    return turns


def _reasoned(steps: Iterable[Any]) -> list[Turn]:
    """What a ReAct agent thought, called and read."""
    turns: list[Turn] = []
    name = ""
    for step in steps:
        if isinstance(step, ActionReasoningStep):
            name = step.action
            turns.append(Turn("assistant", step.thought, (ToolCall(name, step.action_input),)))
        elif isinstance(step, ObservationReasoningStep):
            turns.append(Turn("tool", step.observation, name=name))
    return turns


def _place(calls: Sequence[ToolCall], call: ToolCall) -> int | None:
    """Which of these calls it is; None where it is none of them, such as one that another tool makes."""
    # Some models give no ids, or the same to all calls.
    alike = [at for at, one in enumerate(calls) if one.name == call.name]
    for same in (
        [at for at in alike if calls[at].id and calls[at].id == call.id],
        [at for at in alike if calls[at].arguments == call.arguments],
        alike,
    ):
        if len(same) == 1:
            return same[0]
    return alike[0] if alike else None
