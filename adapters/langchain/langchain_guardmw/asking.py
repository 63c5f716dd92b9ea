"""One call of an agent's model: what it is asked once that has been judged, and what comes of its answer."""

from __future__ import annotations

import zlib
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from uuid import uuid4

from langchain.agents.middleware import ModelResponse
from langchain.agents.middleware.types import ExtendedModelResponse
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.types import Command

from guardmw import Blocked, Verdict
from guardmw.identifiers import is_mark
from guardmw.verdict import Coverage
from langchain_guardmw.calls import TOOL_GUARD, Calls, names_of
from langchain_guardmw.gate import Around, Gate, quoted
from langchain_guardmw.model import stand_in
from langchain_guardmw.outcome import log, refusal, refuses, strictest
from langchain_guardmw.parts import as_mark, is_role, unsaid, within
from langchain_guardmw.source import Again, Kept, Telling

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from langchain.agents.middleware import ModelRequest
    from langchain.agents.structured_output import StructuredOutputError

    from guardmw import Conversation, Turn
    from langchain_guardmw.gate import Source
    from langchain_guardmw.history import History

    Request = ModelRequest[Any]
    Response = ModelResponse[Any]
    Extended = ExtendedModelResponse[Any]

T = TypeVar("T")

OnBlock = Literal["raise", "end", "replace", "review"]

WITHHELD = "[Withheld by policy.]"
# In the place of an answer that is held: the run is over. A jump would not last through the nodes after the model.
ENDED = b""
# Of a refusal that is another's: what such a message says of itself anybody may have written.
_UNTOLD = Verdict("block", "output", (), None, Coverage(0, 0), reason="a refusal that ended the run")

# Who is asking this model already: another guard of the same agent, if any.
_OUTER: ContextVar[Asking | None] = ContextVar("_OUTER", default=None)


@dataclass(frozen=True)
class Told(Around):
    """Tells the history of every answer that it lets out."""

    history: History = field(kw_only=True)

    def read(self, value: Any) -> tuple[list[Conversation], tuple[Turn, ...]]:  # noqa: ANN401 - messages
        """Nothing is judged that goes in: it has been."""
        return [], self.history.context(value)

    def wants_object(self) -> Around:
        """The same: of a refusal the agent learns otherwise."""
        return self

    def spoken(self, answer: object, before: tuple[Turn, ...]) -> list[Conversation]:
        """What is to be judged of an answer, which the history reads anyway."""
        if not isinstance(answer, ChatResult):
            return super().spoken(answer, before)
        judged = self.calls is not None and self.calls.judged
        return [
            within(before, conversation)
            for generation in answer.generations
            for conversation in self.history.read(generation.message).conversations
            if not (judged and conversation.last.tool_calls)
        ]

    def told(self, result: T) -> T:
        """An answer, or the refusal that stands for it."""
        if isinstance(result, ChatResult):
            for generation in result.generations:
                self.history.let_out(generation.message)
        return result


class Pending(NamedTuple):
    """An answer that a refusal stands for until a person has decided.

    Attributes:
        answer: with the id of the refusal.
        verdict: on it, as ``to_dict`` tells it.
        structured: the agent makes an object of its model's answer, and asks again until it has one.
        beside: other guards have an answer to judge, too.
        decided: this is what a person said is the answer.
    """

    answer: AIMessage
    verdict: dict[str, Any]
    structured: bool
    beside: bool
    decided: bool = False

    def packed(self) -> bytes:
        """As it is kept in the state: streams show that to everybody, and this is not for everybody to read.

        Raises:
            TypeError: it holds an object that no checkpoint could keep.
        """
        return zlib.compress(JsonPlusSerializer().dumps_typed(tuple(self))[1])

    @classmethod
    def unpacked(cls, packed: bytes) -> Pending:
        """What is kept in the state."""
        return cls(*JsonPlusSerializer().loads_typed(("msgpack", zlib.decompress(packed))))


class Asking:
    """One call of an agent's model.

    Attributes:
        asked: what is to be judged before it; ``take`` waits for the verdicts.
        refusal: the answer where the model is not to be asked.
        kept: keeps what is withheld of the model's answer, if a person is to decide.
    """

    def __init__(self, request: Request, gate: Gate, history: History, on_block: OnBlock, name: str) -> None:
        self.refusal: AIMessage | None = None
        self.kept: Kept | None = None
        self._request = request
        self._messages: list[Any] = request.messages
        by = TOOL_GUARD.get()
        # An agent that runs within another's model call has tools of its own.
        calls = self._calls = Calls(by, history) if by is not None and by.state is request.state else None
        self._verdict = _UNTOLD
        self._outer = outer = _OUTER.get()
        inside = getattr(request.model, "around", None)
        # Other middlewares may go to a thread between guards, or put something around the model.
        beside = outer is not None or isinstance(inside, Told)
        same = outer is not None and outer._request.state is request.state  # noqa: SLF001 - of the same class
        # Only one of an agent's guards may end its run: LangGraph takes no second jump.
        self._ends = not (same or isinstance(inside, Told))
        for one in (outer and outer.kept, inside and getattr(inside, "source", None)):
            if isinstance(one, Kept):
                one.beside = True
        if on_block == "review":
            self.kept = Kept(calls, beside=beside)
        self._gate = gate
        self._history = history
        self._on_block = on_block
        self._name = name
        state: Any = request.state
        self._approved: list[str] = state.get("guardmw_approved", ())
        held: dict[str, bytes] = state.get("guardmw_held") or {}
        self._holds = name in held
        self._decided: AIMessage | None = None
        self._said: AIMessage | None = None
        self._streamed = b""
        self._place: str | None = None
        self._before: list[BaseMessage] = []
        if held:
            self._go_on(held)
        # In another process than the one in which a person approved it, a call in the history is judged again.
        self._trial = history.trial(self._messages, self._approved, calls_reviewed=calls is not None)
        # By itself, or a prompt that tells the time would have all that follows judged anew.
        self._prompt = history.trial([request.system_message]) if request.system_message else None
        self.asked = [*self._prompt.asked, *self._trial.asked] if self._prompt else self._trial.asked
        self._instead: dict[int, BaseMessage] = {}

    def ask(self, handler: Callable[[Request], T]) -> T:
        """What the model answers, and whoever stands between."""
        token = _OUTER.set(self)
        try:
            return handler(self.request())
        finally:
            _OUTER.reset(token)

    async def aask(self, handler: Callable[[Request], Awaitable[T]]) -> T:
        """``ask``, without blocking the event loop."""
        token = _OUTER.set(self)
        try:
            return await handler(self.request())
        finally:
            _OUTER.reset(token)

    def take(self, verdicts: list[Verdict]) -> None:
        """The verdicts on what was asked.

        Raises:
            Blocked: the model is not to be asked, and the middleware is to raise.
        """
        of_prompt = {}
        if self._prompt:
            count = len(self._prompt.asked)
            self._prompt.take(verdicts[:count])
            verdicts, of_prompt = verdicts[count:], self._prompt.withheld
        self._trial.take(verdicts)
        self._stop()
        withheld = self._trial.withheld
        if not withheld and not of_prompt:
            return
        begin = len(self._messages) if self._on_block == "replace" else self._trial.begin()
        failed = self._trial.failed
        decisive = [verdict for at, verdict in withheld.items() if at >= begin or failed(verdict)]
        decisive += of_prompt.values()
        messages = self._messages
        tools = names_of(self._request.tools)
        self._instead = {at: instead(messages[at], tools) for at, verdict in withheld.items() if not failed(verdict)}
        verdict = strictest(decisive)
        if verdict is None:
            for verdict in withheld.values():
                log.warning("%s at %s, replaced: %s", verdict.action, verdict.stage, verdict.summary)
        elif self._on_block == "raise":
            raise Blocked(verdict)
        else:
            self._hear(verdict)
            self.refusal = refusal(AIMessage(""), verdict, text=self._gate.refusal)

    def _stop(self) -> None:
        """Ask nobody again where a refusal was to end the run: LangChain forgets that behind other middlewares' nodes.

        Raises:
            Blocked: one has been given in this run, and no user has spoken since.
        """
        state: Any = self._request.state
        id_, verdict = state.get("guardmw_over") or ("", _UNTOLD)
        if id_ and any(message.id == id_ for message in self._messages[self._trial.begin() :]):
            raise Blocked(verdict)

    def _hear(self, verdict: Verdict) -> None:
        """A verdict that withholds, of this guard or of one that it has around its model."""
        self._verdict = verdict
        if self._outer is not None:
            self._outer._hear(verdict)  # noqa: SLF001 - of the same class

    def _tell(self, verdict: Verdict) -> None:
        self._hear(verdict)
        if self.kept:
            self.kept.withhold()

    def request(self) -> Request:
        """What the model is asked, and by whom."""
        messages = self._messages
        if self._instead:
            messages = [self._seen(at, message) for at, message in enumerate(messages)]
        asked: Request = object.__new__(type(self._request))
        # `override` gives the same, and warns of each of nine attributes, which is dear also where nobody hears it.
        vars(asked).update(vars(self._request), model=stand_in(self._request.model, self._around()), messages=messages)
        return asked

    def _around(self) -> Told:
        gate, history, calls, kept = self._gate, self._history, self._calls, self.kept
        within_another = isinstance(getattr(self._request.model, "around", None), Told)
        if self._said and within_another:
            # That one says it, and lets nothing out that it has not judged; its Blocked stays one.
            return Told(replace(gate, on_block="raise"), "off", output=False, history=history)
        if self._said:
            return Told(gate, "off", output=False, source=Again(self._said), history=history)
        if kept or self._request.response_format is not None:
            gate = Telling(gate.guard, gate.stage, gate.on_block, gate.mode, gate.leak, gate.refusal, tell=self._tell)
        source: Source | None = kept or calls
        if self._decided and not within_another:
            source = Again(self._decided, source)
        return Told(gate, "off", calls=calls, source=source, history=history)

    def _seen(self, at: int, message: BaseMessage) -> BaseMessage:
        told = self._instead.get(at, message)
        # The state knows it by that, whatever it says.
        return told if told is message or is_mark(told.id) else told.model_copy(update={"id": None})

    def context(self) -> tuple[Turn, ...]:
        """What an answer is judged in the light of."""
        return self._trial.context()

    def strays(self, response: Response) -> list[tuple[int, AIMessage]]:
        """Answers that did not come from the guarded model: another middleware put its own in its place."""
        return [
            (at, message)
            for at, message in enumerate(response.result)
            if isinstance(message, AIMessage)
            and not self._history.was_let_out(message)
            and not self._is_approved(message)
        ]

    def screened(self, response: Response, at: int, verdicts: list[Verdict]) -> None:
        """The verdicts on a stray.

        Raises:
            Blocked: it is withheld, and the middleware is to raise.
        """
        verdict = strictest(verdicts)
        if verdict is not None:
            stray: Any = response.result[at]
            self._hear(verdict)
            response.result[at] = self._gate.withheld(stray, verdict)
            if self.kept:
                self.kept.answer = stray

    def made(self, response: Response, error: StructuredOutputError | None) -> list[Conversation]:
        """What is to be judged of the object that was made of an answer, or of the error that quotes it.

        Nothing where it is that of a call, where it says no more than the answer did, or where a person has decided.
        """
        value = quoted(error) if error else response.structured_response
        if value is None or self._said:
            return []
        answers = [message for message in response.result if isinstance(message, AIMessage)]
        if any(map(refuses, answers)):
            return []
        answered = {message.tool_call_id for message in response.result if isinstance(message, ToolMessage)}
        if any(call["id"] in answered for message in answers for call in message.tool_calls):
            return []
        said = (part.turn.text for message in answers for part in self._history.read(message).parts)
        return [within(self.context(), part.conversation) for part in unsaid(value, said)]

    def refuse_made(self, response: Response, verdicts: list[Verdict]) -> None:
        """The verdicts on what was made of an answer.

        Raises:
            Blocked: it is withheld, and the middleware is to raise.
        """
        at = next((at for at, message in enumerate(response.result) if isinstance(message, AIMessage)), None)
        if at is None:
            response.result[:0] = [AIMessage("")]
        self.screened(response, at or 0, verdicts)

    def answered(self, response: Response, error: StructuredOutputError | None) -> Response | Extended:
        """The answer as the agent gets it, and what changes in its state.

        Raises:
            StructuredOutputError: the agent could not read it, and it is no refusal.
        """
        for message in response.result:
            if isinstance(message, AIMessage) and refuses(message):
                response = ModelResponse(result=[_silenced(message)])
                break
        else:
            if error is not None:
                raise error
        update: dict[str, Any] = {}
        for message in response.result[:1]:
            if isinstance(message, AIMessage):
                if self._place:
                    # Events of the third version give it another.
                    message.id = self._place
                if not self._is_approved(message):
                    self._trial.passes(message)
                if self._calls and self._calls.blocked and self._history.was_let_out(message):
                    # In another process, or after other messages, a rule might still be against what is left of them.
                    update["guardmw_approved"] = [self._history.approval_anywhere(message)]
        return self._with_changes(response, update)

    def refused(self) -> Response | Extended:
        """The refusal instead of an answer."""
        return self._with_changes(ModelResponse(result=[self.refusal] if self.refusal else []), {})

    def _with_changes(self, response: Response, update: dict[str, Any]) -> Response | Extended:
        state: Any = self._request.state
        if self._instead:
            # What is not in the state was added on the way here, and is not to be put into it.
            ids = {message.id for message in state["messages"]}
            update["messages"] = [message for message in self._instead.values() if message.id in ids]
        if self._holds:
            update["guardmw_held"] = {self._name: None}
        refused = next((one for one in response.result if isinstance(one, AIMessage) and refuses(one)), None)
        if refused is not None:
            refused.id = refused.id or str(uuid4())
        if refused is not None and (packed := self._pending(refused)):
            update["guardmw_held"] = {self._name: packed}
        elif self._request.response_format is not None and (refused is not None or self._says_no_more(response)):
            # An agent without tools asks its model until it has an object, and a refusal is none.
            if self._on_block == "review":
                update["guardmw_held"] = {self._name: ENDED}
            elif self._ends or refused is None:
                update["jump_to"] = "end"
                if refused is not None:
                    update["guardmw_over"] = (refused.id, self._verdict)
        return ExtendedModelResponse(response, Command(update=update)) if update else response

    def _go_on(self, held: dict[str, bytes]) -> None:
        """Take what a person said is the answer, to this guard or another, unless the user went on."""
        state: Any = self._request.state
        messages = state["messages"]
        for name, packed in held.items():
            pending = Pending.unpacked(packed) if packed else None
            at = _position(messages, pending.answer) if pending and pending.decided else None
            if pending is None or at is None or at < self._history.said(messages).begin:
                continue
            # It stands where its refusal does, and is judged in the light of what came before that.
            self._place, self._before = pending.answer.id, messages[:at]
            self._decided = pending.answer
            self._messages = self._messages[: _position(self._messages, pending.answer)]
            if name == self._name or self._is_approved(pending.answer):
                self._said = pending.answer
                # At once, as others may change it in place.
                self._streamed = self._history.read(Again(pending.answer).streamed).nameless

    def _is_approved(self, message: AIMessage) -> bool:
        """Whether it is an answer on which a person has decided for this guard."""
        if not self._place:
            return False
        if self._history.approval([*self._before, message], len(self._before)) in self._approved:
            return True
        return self._said is not None and self._history.read(message).nameless == self._streamed

    def _pending(self, refused: AIMessage) -> bytes | None:
        """The answer that a refusal stands for, if a person is to decide on it."""
        if self.kept is None or self.kept.answer is None:
            return None
        answer = self.kept.answer
        answer = answer.model_copy(update={"id": refused.id, "name": refused.name or answer.name})
        structured = self._request.response_format is not None
        try:
            return Pending(answer, refused.response_metadata["guardmw"], structured, self.kept.beside).packed()
        except TypeError:
            log.warning("a withheld answer holds an object that no checkpoint keeps, and nobody is asked about it")
            return None

    def _says_no_more(self, response: Response) -> bool:
        """Whether what a person said is the answer leaves the agent nothing to do."""
        if self._said is None or response.structured_response is not None:
            return False
        return not any(isinstance(message, AIMessage) and message.tool_calls for message in response.result)


def _position(messages: Sequence[BaseMessage], answer: AIMessage) -> int | None:
    return next((at for at, message in enumerate(messages) if message.id == answer.id), None)


def instead(message: BaseMessage, tools: Collection[str] = (), text: str = WITHHELD) -> BaseMessage:
    """The message with nothing of it left but what holds the conversation together, and the names of these tools."""
    emptied: dict[str, Any] = {
        "content": text,
        "additional_kwargs": {},
        "response_metadata": {},
        # Of a FunctionMessage it has to have one.
        "name": message.name if message.name in tools else ("tool" if message.type == "function" else None),
    }
    given = message.__dict__
    if given.get("artifact") is not None:
        emptied["artifact"] = None
    if not is_role(given.get("role", "user")):
        emptied["role"] = "user"
    for calls in ("invalid_tool_calls", "tool_call_chunks"):
        if given.get(calls):
            emptied[calls] = []
    if given.get("tool_calls"):
        # The results that follow belong to them.
        emptied["tool_calls"] = [
            {
                "type": "tool_call",
                "name": call["name"] if call["name"] in tools else "tool",
                "args": {},
                "id": as_mark(call["id"]),
            }
            for call in given["tool_calls"]
        ]
    if not is_mark(given.get("tool_call_id")):
        emptied["tool_call_id"] = as_mark(given["tool_call_id"])
    copy = message.model_copy(update=emptied)
    if copy.model_extra:
        copy.model_extra.clear()
    return copy


def _silenced(message: AIMessage) -> AIMessage:
    """A refusal without the calls that were let out before it: the run is over."""
    if not message.tool_calls:
        return message
    return AIMessage(
        message.text,
        id=message.id,
        name=message.name,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
    )
