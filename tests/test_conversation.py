"""What can be read as a conversation, what its last turn is, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw import Conversation, ConversationError, ToolCall, Turn
from guardmw.conversation import ROLES, unescaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXTS = st.text(st.characters())  # every code point, halves of surrogate pairs too
CALLS = st.builds(ToolCall, st.text(), st.dictionaries(st.text(), st.text()) | st.text(), st.text())
TURNS = st.builds(Turn, st.sampled_from(ROLES), TEXTS, st.lists(CALLS, max_size=2).map(tuple))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from((*ROLES, "ai")) | JSON,
        "content": JSON | st.lists(st.fixed_dictionaries({"type": JSON}, optional={"text": JSON}), max_size=2),
        "tool_calls": JSON | st.lists(st.fixed_dictionaries({}, optional={"name": JSON, "args": JSON}), max_size=2),
        "function_call": JSON,
        "name": JSON,
    },
)


def test_a_str_is_what_a_user_says() -> None:
    """The shortest form there is."""
    conversation = Conversation.of("How do I bake bread?")
    assert conversation.turns == (Turn("user", "How do I bake bread?"),)
    assert conversation.stage == "input"


def test_dicts_and_turns_may_be_mixed() -> None:
    """A history of dicts can be continued with a Turn."""
    conversation = Conversation.of([{"role": "user", "content": "Hello"}, Turn("assistant", "Good day.")])
    assert conversation.last == Turn("assistant", "Good day.")
    assert conversation.context == (Turn("user", "Hello"),)


@pytest.mark.parametrize(
    ("turn", "stage"),
    [
        (Turn("system"), "input"),
        (Turn("user"), "input"),
        (Turn("assistant"), "output"),
        (Turn("assistant", tool_calls=(ToolCall("shell"),)), "tool_call"),
        (Turn("user", tool_calls=(ToolCall("shell"),)), "input"),
        (Turn("tool"), "tool_result"),
        (Turn("document"), "document"),
    ],
)
def test_the_stage_follows_from_the_last_turn(turn: Turn, stage: str) -> None:
    """Whoever spoke last, and whether it is a call, says which surface is on trial."""
    assert Conversation.of([Turn("user", "Hello"), turn]).stage == stage


@pytest.mark.parametrize(
    ("alias", "role"), [("human", "user"), ("ai", "assistant"), ("developer", "system"), ("function", "tool")]
)
def test_the_roles_of_other_libraries_are_known(alias: str, role: str) -> None:
    """A history taken from elsewhere is read as it is."""
    assert Conversation.of({"role": alias, "content": "Hello"}).last.role == role


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("shell", {"cmd": "ls"}, "1"),
        {"name": "shell", "arguments": {"cmd": "ls"}, "id": "1"},
        {"name": "shell", "args": {"cmd": "ls"}, "id": "1", "type": "tool_call"},
        {"id": "1", "type": "function", "function": {"name": "shell", "arguments": '{"cmd": "ls"}'}},
    ],
)
def test_a_tool_call_is_read_in_every_form(call: Any) -> None:
    """Ours, plain, LangChain's and OpenAI's are one call."""
    conversation = Conversation.of({"role": "assistant", "content": None, "tool_calls": [call]})
    assert conversation.last.tool_calls == (ToolCall("shell", {"cmd": "ls"}, "1"),)
    assert conversation.trial == 'shell {"cmd": "ls"}'


def test_the_older_form_of_a_call_is_on_trial_too() -> None:
    """OpenAI's function_call, from before tool_calls, is not passed over."""
    message = {"role": "assistant", "content": "", "function_call": {"name": "shell", "arguments": '{"cmd": "ls"}'}}
    assert Conversation.of(message).trial == 'shell {"cmd": "ls"}'
    assert Conversation.of(message | {"content": None}).stage == "tool_call"


@pytest.mark.parametrize("arguments", ['{"cmd": ', "[1, 2]", "rm", "", "[" * 100_000])
def test_arguments_that_are_no_object_stay_as_they_were_written(arguments: str) -> None:
    """What a model wrote is judged as it stands, even where it does not parse."""
    call = {"name": "shell", "arguments": arguments}
    assert Conversation.of({"role": "assistant", "tool_calls": [call]}).trial == f"shell {arguments}"


def circle() -> dict[str, Any]:
    """A dict that holds itself."""
    made: dict[str, Any] = {"cmd": "EVIL"}
    made["self"] = made
    return made


def nested() -> dict[str, Any]:
    """A dict too deep to walk."""
    made: dict[str, Any] = {"cmd": "EVIL"}
    for _ in range(100_000):
        made = {"inner": made}
    return made


class Wrapped(Mapping[str, Any]):
    """A mapping that is no dict, and prints as an address."""

    def __getitem__(self, key: str) -> Any:
        return {"cmd": "EVIL"}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["cmd"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"cmd": {"EVIL"}},
        {"cmd": float("nan"), "x": "EVIL"},
        Wrapped(),
        {"inner": Wrapped()},
        {"cmd": np.array(["ls"] * 3000 + ["EVIL"] + ["ls"] * 3000)},
        {"cmd": Path("EVIL")},
    ],
)
def test_arguments_made_in_process_are_on_trial_too(arguments: Any) -> None:
    """What is no JSON, but says plainly what it holds, is read in full."""
    assert "EVIL" in Conversation.of(Turn("assistant", tool_calls=(ToolCall("shell", arguments),))).trial


@pytest.mark.parametrize("arguments", [{("a", 1): "EVIL"}, circle(), nested(), {"cmd": object()}, {"n": 10**5000}])
def test_arguments_nobody_can_read_are_refused(arguments: Any) -> None:
    """The error is ours, and does not quote them."""
    conversation = Conversation.of(Turn("assistant", tool_calls=(ToolCall("shell", arguments),)))
    with pytest.raises(ConversationError, match="plain JSON values") as caught:
        _ = conversation.trial
    assert "EVIL" not in str(caught.value)


def test_escapes_do_not_glue_to_words() -> None:
    """A line break written as backslash and n would make "rm" a word nobody knows."""
    call = ToolCall("shell", {"cmd": "cd x\nrm y", "path": "C:\\new"})
    assert str(call) == 'shell {"cmd": "cd x\nrm y", "path": "C:\\new"}'


@pytest.mark.parametrize(
    "call",
    [
        {"name": "shell", "input": {"cmd": "EVIL"}},
        {"name": "shell", "parameters": {"cmd": "EVIL"}},
        {"function": {"name": "shell", "parameters": {"cmd": "EVIL"}}},
        {"function": {"name": "shell"}, "arguments": {"cmd": "EVIL"}},
        {"name": "shell", "arguments": None, "args": {"cmd": "EVIL"}},
        {"name": "shell", "arguments": '{"cmd": "EVIL", "cmd": "ls"}'},
    ],
)
def test_arguments_are_found_under_every_providers_key(call: Any) -> None:
    """Arguments under a key nobody looks at would run unjudged; so would the first of two under one key."""
    assert "EVIL" in Conversation.of({"role": "assistant", "tool_calls": [call]}).trial


def test_a_call_has_its_arguments_once() -> None:
    """Of two sets, nobody knows which will run."""
    with pytest.raises(ConversationError, match="arguments once"):
        Conversation.of({"role": "assistant", "tool_calls": [{"name": "f", "args": {"a": 1}, "input": {"a": 2}}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "refusal"])
def test_text_beside_the_content_is_on_trial(key: str) -> None:
    """Providers put what a model thinks beside what it says."""
    assert Conversation.of({"role": "assistant", "content": "Hello", key: "EVIL"}).trial == "EVIL\nHello"


@pytest.mark.parametrize("key", ["attachments", "audio", "files", "images"])
def test_media_beside_the_content_are_told(key: str) -> None:
    """What nothing can judge makes the verdict partial."""
    assert Conversation.of({"role": "user", "content": "Hello", key: [{"data": "…"}]}).last.media == (key,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Turn("my password is hunter2", "user"),  # type: ignore[arg-type]
        lambda: Turn("assistant", "", ToolCall("x")),  # type: ignore[arg-type]
        lambda: Turn("user", "", (), "", "image"),  # type: ignore[arg-type]
        lambda: Conversation("hunter2"),  # type: ignore[arg-type]
        lambda: Conversation(({"role": "user", "content": "hunter2"},)),  # type: ignore[arg-type]
        lambda: Conversation.of({"role": "user", "content": "hunter2", "text": "hello"}),
    ],
)
def test_a_part_of_the_wrong_type_is_told_without_quoting_it(make: Callable[[], object]) -> None:
    """Swapped arguments put text where an error might repeat it."""
    with pytest.raises(ConversationError) as caught:
        make()
    assert "hunter2" not in str(caught.value)


def test_a_kind_of_media_is_a_word() -> None:
    """A verdict tells the kind, and so must not tell what a sender wrote there."""
    block = {"type": "my secret \x1b[31m password"}
    assert Conversation.of({"role": "user", "content": [block]}).last.media == ("unknown",)


def test_text_and_calls_are_on_trial_together() -> None:
    """Neither hides behind the other."""
    turn = Turn("assistant", "Let me look.", (ToolCall("shell", {"cmd": "ls"}), ToolCall("read", "notes.txt")))
    assert Conversation.of(turn).trial == 'Let me look.\nshell {"cmd": "ls"}\nread notes.txt'


def test_blocks_of_text_are_joined_and_other_media_named() -> None:
    """A picture cannot be judged, so a verdict has to know of it."""
    content = ["Look:", {"type": "text", "text": "a loaf"}, {"type": "image_url", "image_url": {"url": "data:…"}}]
    last = Conversation.of({"role": "user", "content": content}).last
    assert last.text == "Look:\na loaf"
    assert last.media == ("image_url",)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"role": "usr", "content": "Hello"}, "unknown role 'usr': did you mean 'user'?"),
        ({"role": 7, "content": "Hello"}, "a role is a str, not int"),
        ({"content": "Hello"}, "a turn needs a role"),
        ({"role": "user"}, "a turn needs content"),
        ({"role": "user", "content": None}, "a turn needs content"),
        ({"role": "user", "content": 7}, "not int"),
        ({"role": "user", "content": b"Hello"}, "not bytes"),
        ({"role": "user", "content": [7]}, "a content block is a str or a dict"),
        ({"role": "assistant", "tool_calls": 7}, "tool_calls is a list, not int"),
        ({"role": "assistant", "tool_calls": ["ls"]}, "a tool call is a ToolCall or a dict, not str"),
        ({"role": "assistant", "tool_calls": [{}]}, "a tool call needs a name"),
        ({"role": "assistant", "tool_calls": [{"name": "ls", "args": 7}]}, "arguments are a dict or a str, not int"),
        ([], "at least one turn"),
        ([[]], "not list"),
        (7, "cannot read a int as a conversation"),
        (b"Hello", "cannot read a bytes as a conversation"),
        (None, "cannot read a NoneType as a conversation"),
    ],
)
def test_what_cannot_be_read_is_named(given_: Any, message: str) -> None:
    """The message says what is wrong, and what would be right."""
    with pytest.raises(ConversationError, match=message):
        Conversation.of(given_)


@pytest.mark.parametrize("role", ["usr", None, 7, ["user"]])
def test_a_turn_has_one_of_five_roles(role: Any) -> None:
    """Made by hand or read, a turn is checked alike."""
    with pytest.raises(ConversationError, match="unknown role"):
        Turn(role)


def test_the_text_of_a_turn_is_a_str() -> None:
    """Bytes would be judged as nothing at all."""
    with pytest.raises(ConversationError, match="not bytes"):
        Turn("user", b"Hello")  # type: ignore[arg-type]


def test_an_error_says_which_turn_it_was() -> None:
    """A long history has one bad turn somewhere."""
    with pytest.raises(ConversationError, match=r"turn 2 of 2: a turn needs content"):
        Conversation.of([Turn("user", "Hello"), {"role": "user"}])


@given(TEXTS)
def test_text_is_kept_to_the_letter(text: str) -> None:
    """Nothing is stripped, normalised or replaced before it is judged."""
    assert Conversation.of(text).trial == text
    assert Conversation.of({"role": "user", "content": text}).trial == text
    assert Conversation.of({"role": "user", "content": [{"type": "text", "text": text}]}).trial == text


@given(st.lists(TURNS, min_size=1, max_size=3))
def test_reading_twice_is_reading_once(turns: list[Turn]) -> None:
    """A Conversation is its own reading, and turns are what they were."""
    conversation = Conversation.of(turns)
    assert conversation.turns == tuple(turns)
    assert Conversation.of(conversation) is conversation


@given(TURNS)
def test_everything_the_last_turn_says_is_on_trial(turn: Turn) -> None:
    """Its text, and each call's name and arguments."""
    trial = Conversation.of([Turn("user", "Hello"), turn]).trial
    assert trial.startswith(turn.text)
    for call in turn.tool_calls:
        assert call.name in trial
        if isinstance(call.arguments, str):
            assert call.arguments in trial
        else:
            assert unescaped(json.dumps(call.arguments, ensure_ascii=False)) in trial


@given(MESSAGES | JSON | st.lists(MESSAGES, max_size=2))
def test_anything_is_a_conversation_or_a_conversation_error(given_: Any) -> None:
    """No JSON that arrives makes a library underneath raise."""
    try:
        conversation = Conversation.of(given_)
    except ConversationError:
        return
    assert isinstance(conversation.trial, str)
    assert conversation.stage


def test_anthropics_blocks_are_calls_and_answers() -> None:
    """A call is no media, and what a tool answered is not what the user said."""
    use = {"type": "tool_use", "id": "1", "name": "shell", "input": {"cmd": "ls"}}
    asked = Conversation.of({"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, use]})
    assert asked.stage == "tool_call"
    assert asked.last.tool_calls == (ToolCall("shell", {"cmd": "ls"}, "1"),)
    assert asked.last.media == ()
    once = {"role": "assistant", "content": [use], "tool_calls": [{"id": "1", "name": "shell", "args": {"cmd": "ls"}}]}
    assert len(Conversation.of(once).last.tool_calls) == 1
    inner = [{"type": "text", "text": "a.txt"}, {"type": "image", "source": {}}]
    answered = Conversation.of(
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": inner}]}
    )
    assert (answered.stage, answered.trial, answered.last.media) == ("tool_result", "a.txt", ("image",))


def test_answers_within_answers_without_end_are_refused() -> None:
    """The error is ours, and not Python's about its stack."""
    content: Any = "EVIL"
    for _ in range(2_000):
        content = [{"type": "tool_result", "content": content}]
    with pytest.raises(ConversationError, match="nested too deeply"):
        Conversation.of({"role": "user", "content": content})


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [
        (r"\u0065vil", "evil"),
        (r"a\nb \"c\" \\n", 'a\nb "c" \\n'),
        (r"\ud83d\udc4d", "\U0001f44d"),
        (r"\ud83d", "\ufffd"),
        (r"\u12 C:\x", r"\u12 C:\x"),
    ],
)
def test_escapes_are_what_they_stand_for(escaped: str, plain: str) -> None:
    """Tools that write ASCII escape every other letter, and whoever hides a word any."""
    assert unescaped(escaped) == plain
