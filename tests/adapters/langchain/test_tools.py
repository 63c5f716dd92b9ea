"""guard_tool(): a tool of which nobody sees what is withheld, and which is otherwise the tool that it was."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForToolRun
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig  # noqa: TC002 - langchain-core reads the annotation
from langchain_core.tools import BaseTool, InjectedToolArg, InjectedToolCallId, Tool, ToolException, tool
from langchain_guardmw import guard, guard_tool
from langchain_guardmw.tools import CALL_WITHHELD, RESULT_WITHHELD
from langchain_tests.unit_tests import ToolsUnitTests
from pydantic import BaseModel, computed_field

from guardmw import Blocked, Guard, Policy
from guardmw.testing import KeywordBackend, ScriptedBackend

BOTH = pytest.mark.parametrize("asynchronous", [False, True])
KEYWORD = KeywordBackend({"EVIL": 0.99})


class Watch(BaseCallbackHandler):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr((args, kwargs)))

    def on_tool_end(self, output: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr(output))

    def on_tool_error(self, error: BaseException, **kwargs: Any) -> None:
        """Keep it."""
        self.told.append(repr(error))


class Own(BaseTool):
    """A tool as a class."""

    name: str = "note"
    description: str = "Note something."
    made: list[str] = []
    result: Any = "fine"

    def _run(self, text: str, run_manager: CallbackManagerForToolRun | None = None) -> Any:
        assert run_manager is not None
        self.made.append(text)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class OwnAsync(Own):
    """A tool as a class that has both ways."""

    async def _arun(self, text: str, config: RunnableConfig) -> Any:
        assert config
        return self._run(text, run_manager=CallbackManagerForToolRun.get_noop_manager())


def made_of(kind: str, result: Any) -> tuple[BaseTool, list[str]]:
    """A tool of this kind, and the texts that it was called with."""
    made: list[str] = []

    def note(text: str) -> Any:
        """Note something."""
        made.append(text)
        if isinstance(result, Exception):
            raise result
        return result

    async def anote(text: str) -> Any:
        """Note something."""
        return note(text)

    if kind in ("class", "async class"):
        own = (Own if kind == "class" else OwnAsync)(result=result, made=made)
        return own, own.made
    if kind == "async function":
        made_async: BaseTool = tool("note")(anote)
        made_async.func = note
        return made_async, made
    if kind == "single argument":
        return Tool("note", note, "Note something."), made
    return tool("note")(note), made


KINDS = pytest.mark.parametrize("kind", ["function", "async function", "class", "async class", "single argument"])


def ask(one: BaseTool, given: Any, asynchronous: bool, **config: Any) -> Any:
    """Call it."""
    return asyncio.run(one.ainvoke(given, config or None)) if asynchronous else one.invoke(given, config or None)  # type: ignore[arg-type]


def call(text: str, name: str = "note") -> dict[str, Any]:
    """A call as a model makes it."""
    return {"name": name, "args": {"text": text}, "id": "1", "type": "tool_call"}


class TestUnit(ToolsUnitTests):
    """What LangChain holds every tool to."""

    @property
    def tool_constructor(self) -> BaseTool:
        """A guarded one."""
        return guard_tool(made_of("class", "fine")[0], KEYWORD)

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        """Its arguments."""
        return {"text": "ok"}


@BOTH
@KINDS
def test_what_is_safe_passes_unchanged(kind: str, asynchronous: bool) -> None:
    """To code the very object, to a model a message."""
    one, made = made_of(kind, "fine")
    guarded = guard_tool(one, KEYWORD)
    assert isinstance(guarded, type(one))
    assert (guarded.name, guarded.description, guarded.args) == (one.name, one.description, one.args)
    assert ask(guarded, {"text": "ok"}, asynchronous) == "fine"
    told = ask(guarded, call("ok"), asynchronous)
    assert isinstance(told, ToolMessage)
    assert (told.text, told.status, told.tool_call_id) == ("fine", "success", "1")
    assert made == ["ok", "ok"]


@BOTH
@KINDS
@pytest.mark.parametrize("bad", ["call", "result", "error"])
def test_nobody_sees_what_is_withheld(kind: str, bad: str, asynchronous: bool) -> None:
    """Not the caller, nor callbacks; a model is told so, and code gets an exception."""
    result = {"call": "fine", "result": "EVIL", "error": KeyError("EVIL")}[bad]
    one, made = made_of(kind, result)
    guarded, watch, text = guard_tool(one, KEYWORD), Watch(), "EVIL" if bad == "call" else "ok"
    with pytest.raises(Blocked) as blocked:
        ask(guarded, {"text": text}, asynchronous, callbacks=[watch])
    assert blocked.value.verdict.stage == ("tool_call" if bad == "call" else "tool_result")
    told = ask(guarded, call(text), asynchronous, callbacks=[watch])
    assert told.status == "error"
    assert told.text.startswith(CALL_WITHHELD if bad == "call" else RESULT_WITHHELD)
    assert made == ([] if bad == "call" else ["ok", "ok"])
    assert "EVIL" not in repr(told) + repr(watch.told)


@BOTH
def test_the_check_notices_a_guard_that_leaks(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads nothing in what a tool returns."""
    monkeypatch.setattr("langchain_guardmw.tools.results", lambda *_: [])
    watch = Watch()
    told = ask(guard_tool(made_of("function", "EVIL")[0], KEYWORD), call("ok"), asynchronous, callbacks=[watch])
    assert "EVIL" in told.text
    assert "EVIL" in repr(watch.told)


@BOTH
@KINDS
def test_a_call_and_its_result_are_judged_once(kind: str, asynchronous: bool) -> None:
    """However the tool's class makes one way of running of the other."""
    backend = ScriptedBackend([0.0, 0.0])
    ask(guard_tool(made_of(kind, "fine")[0], backend), call("ok"), asynchronous)
    assert [one.stage for one in backend.asked] == ["tool_call", "tool_result"]


@BOTH
@pytest.mark.parametrize("artifact", ["EVIL", {"deep": ["EVIL"]}, [b"bytes"]])
def test_artifacts_are_judged(artifact: Any, asynchronous: bool) -> None:
    """And where nobody can read one, the policy has to decide."""

    @tool(response_format="content_and_artifact")
    def look(text: str) -> Any:
        """Look something up."""
        return "seen", artifact

    told = ask(guard_tool(look, KEYWORD), call("ok", "look"), asynchronous)
    assert told.status == "error"
    assert told.artifact is None


class Record:
    """An object of a class that nobody knows."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@BOTH
@pytest.mark.parametrize("text", ["EVIL", "fine"])
def test_an_object_is_judged_by_what_a_model_reads_of_it(text: str, asynchronous: bool) -> None:
    """That is its str()."""
    told = ask(guard_tool(made_of("function", Record(text))[0], KEYWORD), call("ok"), asynchronous)
    assert told.status == ("error" if text == "EVIL" else "success")


class Page(BaseModel):
    """Something that has more to say than its fields."""

    body: str = "sentence"

    @computed_field
    def shown(self) -> str:
        """More."""
        return f"EVIL {self.body}"


class Titled(BaseModel):
    """Something that makes up its own text."""

    def __str__(self) -> str:
        return "EVIL sentence"


@dataclass
class Card:
    """Something that makes up its own text, and is no model."""

    body: str = "sentence"

    def __str__(self) -> str:
        return f"EVIL {self.body}"


class Word(Enum):
    """A key that is no str."""

    ONE = "EVIL sentence"


SAYING = [Page(), Titled(), Card(), {("EVIL sentence",): 1}, {Word.ONE: 1}, {"in": {("EVIL sentence",): 1}}]


@BOTH
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["function", "async class"])
@pytest.mark.parametrize("value", SAYING, ids=repr)
def test_an_object_is_judged_by_all_that_its_text_says(value: Any, kind: str, listed: bool, asynchronous: bool) -> None:
    """Which may be more than its fields hold."""
    guarded = guard_tool(made_of(kind, [value] if listed else value)[0], KEYWORD)
    told = ask(guarded, call("ok"), asynchronous)
    assert (told.status, "EVIL" in told.content) == ("error", False)


@pytest.mark.parametrize("value", SAYING, ids=repr)
def test_a_chain_lets_no_object_pass_that_says_more_than_its_fields(value: Any) -> None:
    """A prompt that it is put into would say it."""
    for given in (value, [value], HumanMessage("hi", additional_kwargs={"beside": value})):
        with pytest.raises(Blocked):
            guard(KEYWORD, stage="output").invoke(given)


@pytest.mark.parametrize("result", [{"a": [1, None, "fine"]}, ["fine"], "fine", {1: 2.0, "b": True}])
def test_json_is_judged_once(result: Any) -> None:
    """The text that a model reads of it says no more."""
    judged: list[str] = []

    class Witness(KeywordBackend):
        def classify(self, conversations: Any) -> Any:
            judged.extend(one.trial for one in conversations if one.stage == "tool_result")
            return super().classify(conversations)

    guarded = guard_tool(made_of("function", result)[0], Witness({"EVIL": 0.99}))
    assert ask(guarded, call("ok"), asynchronous=False).status == "success"
    assert judged == (["fine"] if "fine" in repr(result) else [])


@BOTH
def test_a_tools_own_errors_stay_what_they_are(asynchronous: bool) -> None:
    """Those that it handles, and those that it raises."""
    error = ToolException("try again")
    one = made_of("function", error)[0]
    with pytest.raises(ToolException) as raised:
        ask(guard_tool(one, KEYWORD), call("ok"), asynchronous)
    assert raised.value is error
    one.handle_tool_error = True
    assert ask(guard_tool(one, KEYWORD), call("ok"), asynchronous).text == "try again"
    one = made_of("function", ToolException("EVIL"))[0]
    one.handle_tool_error = True
    assert ask(guard_tool(one, KEYWORD), call("ok"), asynchronous).text.startswith(RESULT_WITHHELD)


@BOTH
def test_a_guarded_tool_inside_another_is_judged_as_well(asynchronous: bool) -> None:
    """What judges the outer one does not excuse the inner one."""
    inner = guard_tool(made_of("function", "EVIL")[0], KEYWORD)
    seen = []

    @tool
    async def outer(text: str) -> str:
        """Call another tool."""
        seen.append(await inner.ainvoke(call(text)))
        return "done"

    async def run() -> Any:
        return await guard_tool(outer, KEYWORD).ainvoke(call("ok", "outer"))

    assert asyncio.run(run()).text == "done"
    assert "EVIL" not in repr(seen)


@BOTH
def test_injected_arguments_reach_the_tool_and_forged_ones_are_judged(asynchronous: bool) -> None:
    """A graph's state is no model's text; what could be is read."""

    @tool
    def note(text: str, state: Annotated[Any, InjectedToolArg], id_: Annotated[str, InjectedToolCallId]) -> str:
        """Note something."""
        return f"{text} {id_} {type(state).__name__}"

    guarded = guard_tool(note, KEYWORD)
    given = {**call("ok"), "args": {"text": "ok", "state": Record("EVIL")}}
    assert ask(guarded, given, asynchronous).text == "ok 1 Record"
    given = {**call("ok"), "args": {"text": "ok", "state": ["EVIL"]}}
    assert ask(guarded, given, asynchronous).status == "error"


@BOTH
@pytest.mark.parametrize("action", ["block", "review", "allow"])
def test_a_backend_that_fails_gets_the_policys_action(action: Any, asynchronous: bool) -> None:
    """Nobody can be asked, so that review withholds."""
    one, made = made_of("function", "fine")
    told = ask(guard_tool(one, Guard(ScriptedBackend([]), policy=Policy(on_error=action))), call("ok"), asynchronous)
    assert made == (["ok"] if action == "allow" else [])
    assert told.status == ("success" if action == "allow" else "error")


def test_the_tool_given_stays_as_it_was() -> None:
    """It is a copy that is guarded."""
    one = made_of("function", "EVIL")[0]
    guard_tool(one, KEYWORD)
    assert one.invoke({"text": "ok"}) == "EVIL"


def test_what_is_no_tool_is_an_error() -> None:
    """That names the fix."""
    wrong: Any = len
    with pytest.raises(TypeError, match="makes one"):
        guard_tool(wrong)
