"""A guard model on a server is asked in its dialect, in the server's manner, and about every character."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, EntryPoints
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import guardmw.backends
from guardmw import BackendError, Conversation, Guard, ToolCall, Turn, dialects, load
from guardmw.backends import _completions, _http, _pieces
from guardmw.backends._completions import Manner
from guardmw.backends.chat import ChatBackend, openai, vllm
from guardmw.dialects import Message, Reply, Request, Token
from guardmw.testing import SAMPLES, backend_contract
from guardmw.verdict import Coverage, Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = st.text('abc{}" \\', max_size=6)


@pytest.fixture(autouse=True)
def _dialects(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """One family, which every model is of."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01 * low)
    monkeypatch.setattr(dialects, "of_model", lambda _: fake.OneWord(), raising=False)
    monkeypatch.setattr(dialects, "named", lambda name: fake.OneWord(**json.loads(name)), raising=False)
    points = EntryPoints(
        EntryPoint(name, f"guardmw.backends.chat:{name}", guardmw.backends.GROUP) for name in ("vllm", "openai")
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points.select(group=group))


@pytest.fixture
def backend(server: Any, fake: Any) -> Iterator[Callable[..., ChatBackend]]:
    """Makes backends for the server, and closes them."""
    with contextlib.ExitStack() as closed:

        def make(url: str | None = None, **changed: Any) -> ChatBackend:
            settings: dict[str, Any] = {"model": fake.MODEL, "deadline": 60.0}
            made = ChatBackend(url or server.url, **(settings | changed))
            closed.callback(made.close)
            return made

        yield make


def test_the_contract(backend: Any) -> None:
    """As every backend keeps it."""
    backend_contract(backend)()


def test_a_text_is_sent_as_it_is(server: Any, backend: Any, fake: Any) -> None:
    """In the form that chats have, always in the same order; half of a surrogate pair is no character."""
    backend().classify([Conversation.of("Zażółć 👍 \ud83d")])
    assert server.asked[0].path == "/v1/chat/completions"
    assert server.asked[0].body == {
        "model": fake.MODEL,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
        "messages": [{"role": "user", "content": "Is this safe?\nZażółć 👍 \ufffd"}],
    }
    assert "authorization" not in server.asked[0].headers


def test_what_comes_before_the_text_is_always_the_same(server: Any, backend: Any) -> None:
    """To the byte: so the server need not read it again."""
    backend().classify([Conversation.of("one"), Conversation.of("another, which is longer")])
    # They are sent at the same time, and arrive in any order.
    one, other = sorted((seen.raw for seen in server.asked), key=len)
    assert one.partition(b"one")[0] == other.partition(b"another")[0]
    assert one.partition(b"one")[0].endswith(b"Is this safe?\\n")


@pytest.mark.parametrize("way", ["sync", "async"])
def test_every_loop_and_thread_shares_the_connections(server: Any, backend: Any, way: str) -> None:
    """However many there are."""
    guard = Guard(backend(connections=3))

    def screen(at: int) -> str:
        text = "EVIL" if at % 2 else "good"
        return (asyncio.run(guard.ascreen(text)) if way == "async" else guard.screen(text)).action

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(screen, range(32))) == ["allow", "block"] * 16
    assert server.most <= 3


def test_a_batch_is_under_way_at_once(server: Any, backend: Any, fake: Any) -> None:
    """And its scores come in its order."""
    together = asyncio.Event()

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        if len(server.asked) == 4:
            together.set()
        await together.wait()
        await fake.well(seen, writer)

    server.behave = behave
    scores = backend().classify([Conversation.of(text) for text in ("a", "EVIL", "b", "EVIL")])
    assert [score.unsafe > 0.5 for score in scores] == [False, True, False, True]
    assert {score.backend for score in scores} == {fake.MODEL}


def test_requests_of_one_conversation_are_under_way_at_once(server: Any, backend: Any, fake: Any) -> None:
    """A dialect that asks several questions gets the answers in their order."""
    together = asyncio.Event()

    async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
        if len(server.asked) == 3:
            together.set()
        await together.wait()
        writer.write(fake.whole(200, fake.completion(seen.text)))

    class Three:
        name = "three"

        def judge(self, conversation: Conversation) -> dialects.Judging:
            replies = yield [Request((Message("user", word),)) for word in "abc"]
            assert [reply.text for reply in replies] == ["a", "b", "c"]
            [last] = yield [Request((Message("user", "d"),))]
            return Scores(0.5 if last.text == "d" else 0.0)

    server.behave = behave
    assert backend(dialect=Three()).classify([Conversation.of("x")])[0].unsafe == 0.5


@pytest.mark.parametrize("wrong", [ValueError("the text"), BackendError("cannot be read"), None])
def test_what_a_dialect_does_wrong_is_a_failure(backend: Any, wrong: Exception | None) -> None:
    """Of which only a BackendError is quoted."""

    class Wrong:
        name = "wrong"

        def judge(self, conversation: Conversation) -> Any:
            yield [Request((Message("user", "x"),))]
            if wrong:
                raise wrong
            return 0.0

    with pytest.raises(BackendError) as caught:
        backend(dialect=Wrong()).classify([Conversation.of("x")])
    assert "the text" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_plain_completion_is_asked_where_the_dialect_wants_one(server: Any, backend: Any, fake: Any) -> None:
    """Markers, beginning of the answer and all."""
    told = {"tokens": ["unsafe"], "token_logprobs": [-0.5], "top_logprobs": [{"unsafe": -0.5, "safe": -1.0}]}
    server.behave = fake.answering(200, {"choices": [{"text": "unsafe", "logprobs": told, "finish_reason": "length"}]})
    got = []

    class Plain(fake.OneWord):  # type: ignore[misc]
        def judge(self, conversation: Conversation) -> dialects.Judging:
            [reply] = yield [Request(prompt=f"<s>{conversation.trial}", prefill="{", max_tokens=1, top_logprobs=3)]
            got.append(reply)
            return Scores(0.5)

    backend(dialect=Plain()).classify([Conversation.of("x")])
    assert server.asked[0].path == "/v1/completions"
    sent = server.asked[0].body
    assert (sent["prompt"], sent["logprobs"], sent["max_tokens"]) == ("<s>x{", 3, 1)
    assert got == [Reply("unsafe", (Token("unsafe", -0.5, {"unsafe": -0.5, "safe": -1.0}),), cut=True)]


class TestFeatures:
    """What a server cannot do is found out, worked around where that is sound, and remembered."""

    def test_fewer_alternatives(self, server: Any, backend: Any, fake: Any) -> None:
        """Five where twenty are too many."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if seen.body["top_logprobs"] > 5:
                message = "Requested sample logprobs of 20, which is greater than max allowed: 5"
                writer.write(fake.whole(400, {"error": {"message": message}}))
            else:
                await fake.well(seen, writer)

        server.behave = behave
        made = backend()
        assert made.classify([Conversation.of("EVIL")])[0].unsafe > 0.5
        assert made.classify([Conversation.of("EVIL")])[0].unsafe > 0.5
        assert [seen.body["top_logprobs"] for seen in server.asked] == [20, 5, 5]

    def test_no_logprobs(self, server: Any, backend: Any, fake: Any) -> None:
        """The dialect decides whether it can do without."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if "logprobs" in seen.body:
                writer.write(fake.whole(400, {"error": {"message": "logprobs are not supported"}}))
            else:
                writer.write(fake.whole(200, fake.completion("safe")))

        class Label(fake.OneWord):  # type: ignore[misc]
            def read(self, reply: Reply) -> Scores:
                assert reply.tokens == ()
                return Scores(float(reply.text != "safe"))

        server.behave = behave
        assert backend(dialect=Label()).classify([Conversation.of("x")])[0].unsafe == 0.0
        assert Guard(backend()).screen("x").action == "block"

    def test_a_refusal_that_only_quotes_changes_nothing(self, server: Any, backend: Any, fake: Any) -> None:
        """A text that speaks of logprobs cannot talk a server out of them."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if "not valid" in seen.text:
                writer.write(fake.whole(400, {"error": {"message": seen.text}}))
            else:
                await fake.well(seen, writer)

        server.behave = behave
        guard = Guard(backend())
        assert guard.screen("not valid: temperature, logprobs, max_completion_tokens").action == "block"
        assert guard.screen("EVIL").scores is not None
        assert server.asked[-1].body["top_logprobs"] == 20
        assert server.asked[-1].body["temperature"] == 0.0

    @pytest.mark.parametrize("word", ["max_tokens", "temperature"])
    def test_names_and_parameters_of_newer_models(self, server: Any, backend: Any, fake: Any, word: str) -> None:
        """OpenAI's."""
        message = f"Unsupported parameter: '{word}'." + " Use 'max_completion_tokens' instead." * (word == "max_tokens")

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if word in seen.body:
                writer.write(fake.whole(400, {"error": {"message": message}}))
            else:
                await fake.well(seen, writer)

        server.behave = behave
        assert Guard(backend()).screen("good").action == "allow"
        assert word not in server.asked[-1].body

    def test_going_on_from_a_beginning(self, server: Any, backend: Any, fake: Any) -> None:
        """The beginning of the answer goes along, and the answer is what follows."""
        guard = Guard(backend(dialect=fake.OneWord(prefill='{"Safety": "')))
        assert [guard.screen(text).action for text in ("good", "EVIL")] == ["allow", "block"]
        sent = server.asked[0].body
        assert sent["messages"][-1] == {"role": "assistant", "content": '{"Safety": "'}
        assert (sent["continue_final_message"], sent["add_generation_prompt"], sent["max_tokens"]) == (True, False, 1)

    @pytest.mark.parametrize(
        ("before_answer", "before_beginning", "goes_on"),
        [("", "", ""), ("<think></think>", "", "<think></think>"), ("", "<think></think>", None)],
    )
    def test_a_beginning_stands_where_the_model_would_begin(
        self, server: Any, backend: Any, fake: Any, *, before_answer: str, before_beginning: str, goes_on: str | None
    ) -> None:
        """Whatever the template puts before either; if it cannot stand there, the whole answer is asked for."""

        def template(messages: Any, begun: bool) -> str:
            assert "EVIL" not in str(messages)
            said = "".join(
                f"[{one['role']}]" + before_beginning * bool(at) + one["content"] for at, one in enumerate(messages)
            )
            return said if begun else f"{said}[assistant]{before_answer}"

        server.template = template
        made = backend(dialect=fake.OneWord(prefill="{"))
        for _ in range(2):
            made.classify([Conversation.of("EVIL")] * 3) if goes_on is not None else Guard(made).screen("EVIL")
        sent = server.asked[-1].body["messages"][1:]
        assert sent == ([] if goes_on is None else [{"role": "assistant", "content": goes_on + "{"}])
        assert len([seen for seen in server.seen if seen.path == "/tokenize"]) == (2 if goes_on == "" else 3)

    def test_a_server_that_is_busy_shows_its_template_later(self, server: Any, backend: Any, fake: Any) -> None:
        """And is not taken for one that has none."""
        status = [503]

        def template(messages: Any, begun: bool) -> str:
            return "".join(f"[{one['role']}]{one['content']}" for one in messages) + "[assistant]:" * (not begun)

        real = type(server)._shown
        fake.patch.setattr(
            type(server), "_shown", lambda self, body: fake.whole(status.pop(), {}) if status else real(self, body)
        )
        server.template = template
        made = backend(dialect=fake.OneWord(prefill="{"))
        for _ in range(2):
            made.classify([Conversation.of("EVIL")])
        assert [seen.body["messages"][1]["content"] for seen in server.asked] == ["{", ":{"]

    @pytest.mark.parametrize("told", [{}, {"tokens": []}, {"tokens": [1]}, [], b"no JSON"])
    def test_what_a_server_does_not_show_is_taken_to_be_right(
        self, server: Any, backend: Any, fake: Any, told: object
    ) -> None:
        """Other servers have something else of that name, or nothing."""
        fake.patch.setattr(type(server), "_shown", lambda *_: fake.whole(200, told))
        made = backend(dialect=fake.OneWord(prefill="{"))
        for _ in range(2):
            made.classify([Conversation.of("EVIL")])
        assert server.asked[-1].body["messages"][1]["content"] == "{"
        assert len([seen for seen in server.seen if "tokenize" in seen.path]) <= 2

    @pytest.mark.parametrize("refuses", [True, False])
    def test_a_server_that_does_not_go_on(self, server: Any, backend: Any, fake: Any, refuses: bool) -> None:
        """Whether it says so or begins anew: it is asked for the whole answer, and the beginning taken off."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if refuses and "continue_final_message" in seen.body:
                message = "Unrecognized request argument supplied: continue_final_message"
                writer.write(fake.whole(400, {"error": {"message": message}}))
                return
            if seen.body["max_tokens"] == 1:
                writer.write(fake.whole(200, fake.completion('{"', {'{"': -0.01}, "length")))
                return
            evil = "EVIL" in seen.text
            content = [
                {"token": '{"', "logprob": -0.1, "top_logprobs": [{"token": '{"', "logprob": -0.1}]},
                {"token": "Safety", "logprob": -0.1, "top_logprobs": []},
                {"token": '": ', "logprob": -0.1, "top_logprobs": []},
                {
                    "token": '"unsafe' if evil else '"safe',
                    "logprob": -0.1,
                    "top_logprobs": [
                        {"token": '"safe', "logprob": -3.0 if evil else -0.1},
                        {"token": '"unsafe', "logprob": -0.1 if evil else -3.0},
                        {"token": "other", "logprob": -9.0},
                    ],
                },
                {"token": '"}', "logprob": -0.1, "top_logprobs": []},
            ]
            text = "".join(one["token"] for one in content)
            answer = fake.completion(text)
            answer["choices"][0]["logprobs"] = {"content": content}
            writer.write(fake.whole(200, answer))

        class Begun(fake.OneWord):  # type: ignore[misc]
            def read(self, reply: Reply) -> Scores:
                assert reply.text in ("safe", "unsafe")
                assert reply.cut
                assert [token.text for token in reply.tokens] == [reply.text]
                assert set(reply.tokens[0].alternatives) == {"safe", "unsafe"}
                return super().read(reply)

        server.behave = behave
        guard = Guard(backend(dialect=Begun(prefill='{"Safety": "', max_tokens=1)))
        assert [guard.screen(text).action for text in ("good", "EVIL")] == ["allow", "block"]
        assert len(server.asked) == 3

    def test_a_model_that_begins_otherwise(self, server: Any, backend: Any, fake: Any) -> None:
        """Is not understood."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            word = '{"' if "continue_final_message" in seen.body else "safe"
            writer.write(fake.whole(200, fake.completion(word, {word: -0.1})))

        server.behave = behave
        verdict = Guard(backend(dialect=fake.OneWord(prefill='{"Safety": "'))).screen("x")
        assert (verdict.action, "begins otherwise" in verdict.reason) == ("block", True)

    def test_a_template_that_is_not_taken_is_not_left_out(self, server: Any, backend: Any, fake: Any) -> None:
        """Without it the answer would be to another question."""
        server.behave = fake.answering(400, {"error": {"message": "Unrecognized argument: chat_template_kwargs"}})
        made = backend(dialect=fake.OneWord(template={"enable_thinking": False}))
        assert Guard(made).screen("x").action == "block"
        assert server.asked[0].body["chat_template_kwargs"] == {"enable_thinking": False}
        assert len(server.asked) == 1


class TestLongText:
    """A prompt that is longer than the model takes is judged in pieces."""

    @pytest.fixture(autouse=True)
    def _short(self, server: Any, fake: Any) -> None:
        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if len(seen.text) > 3_000:
                message = f"This model's maximum context length is 512 tokens. However, you gave: {seen.text}"
                writer.write(fake.whole(400, {"error": {"message": message}}))
            else:
                await fake.well(seen, writer)

        server.behave = behave

    @pytest.mark.parametrize("place", [0, 2_960, 4_990, 5_000, 19_996])
    def test_wherever_it_is_evil_is_found(self, backend: Any, place: int) -> None:
        """Where the text is cut, too."""
        text = "x" * place + "EVIL" + "y" * (20_000 - 4 - place)
        verdict = Guard(backend()).screen(text)
        assert (verdict.action, verdict.degraded) == ("block", False)
        assert verdict.coverage.windows == 8
        assert verdict.coverage.judged == verdict.coverage.characters == 20_000

    def test_what_is_safe_all_through_is_allowed(self, backend: Any) -> None:
        """Not everything long is bad."""
        verdicts = Guard(backend()).screen_many(["good " * 1_000, "good", "good " * 3_000])
        assert [verdict.action for verdict in verdicts] == ["allow"] * 3
        assert [verdict.coverage.windows for verdict in verdicts] == [2, 1, 8]

    @pytest.mark.parametrize("words", ["Request Entity Too Large", ""])
    def test_a_proxy_may_say_so_too(self, server: Any, backend: Any, fake: Any, words: str) -> None:
        """With 413."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if len(seen.text) > 3_000:
                writer.write(fake.whole(413, words.encode()))
            else:
                await fake.well(seen, writer)

        server.behave = behave
        assert Guard(backend()).screen("good " * 1_000).action == "allow"

    @pytest.mark.parametrize(("wrote", "windows"), [(3, 2), (100, 0), (None, 0)])
    def test_an_answer_for_which_there_was_no_room_is_no_answer(
        self, server: Any, backend: Any, fake: Any, wrote: int | None, windows: int
    ) -> None:
        """Servers cut it short where the prompt just fits; one that used all that it was allowed has no such excuse."""

        async def behave(seen: Any, writer: asyncio.StreamWriter) -> None:
            if len(seen.text) < 3_000:
                await fake.well(seen, writer)
                return
            answer = fake.completion("saf", ended="length")
            writer.write(fake.whole(200, answer | {"usage": {"completion_tokens": wrote} if wrote else None}))

        server.behave = behave
        [verdict] = Guard(backend(dialect=fake.OneWord(max_tokens=100))).screen_many(["good " * 1_000])
        assert verdict.action == ("allow" if windows else "block")
        assert verdict.coverage.windows == windows

    def test_a_model_that_takes_nothing_lets_nothing_through(self, server: Any, backend: Any, fake: Any) -> None:
        """The pieces end somewhere, and so do the tries."""
        server.behave = fake.answering(400, {"error": {"code": "context_length_exceeded"}})
        verdict = Guard(backend()).screen("good " * 2_000)
        assert (verdict.action, verdict.degraded) == ("block", True)
        assert verdict.reason.endswith("the text is longer than the model takes, even in pieces")
        assert len(server.asked) < 64

    def test_a_long_conversation_keeps_what_is_on_trial(self, server: Any, backend: Any) -> None:
        """Its context goes before any of the text does."""

        class Whole:
            name = "whole"

            def judge(self, conversation: Conversation) -> dialects.Judging:
                said = "\n".join(turn.text for turn in conversation.turns)
                [reply] = yield [Request((Message("user", said),), top_logprobs=20)]
                return Scores(float("unsafe" in reply.text))

        turns = [Turn("user", "early " * 1_000), Turn("user", "hello"), Turn("assistant", "EVIL " * 3)]
        verdict = Guard(backend(dialect=Whole())).screen(turns)
        assert (verdict.action, verdict.stage, verdict.coverage.windows) == ("block", "output", 1)
        assert server.asked[-1].text == "hello\n" + "EVIL " * 3

    @given(
        st.lists(st.sampled_from(["user", "assistant", "tool", "document"]), min_size=1, max_size=4),
        st.integers(0, 9_000),
        st.booleans(),
    )
    def test_pieces_hold_every_character(self, roles: list[Any], length: int, calls: bool) -> None:
        """Of every stage, and they end."""
        text = "".join(map(str, range(length)))[:length]
        called = (ToolCall("shell", {"cmd": text}), ToolCall("other", {})) if calls and roles[-1] == "assistant" else ()
        turns = [Turn(role, "before " * 500) for role in roles[:-1]]
        whole = Conversation((*turns, Turn(roles[-1], text, called)))
        waiting, left, rounds = [whole], [], 0
        while waiting:
            rounds += 1
            one = waiting.pop()
            smaller = _pieces.smaller(one)
            assert one.stage == whole.stage
            if smaller:
                waiting += reversed(smaller)
            else:
                left.append(one.trial)
        assert rounds < 200
        assert all(len(piece) <= 1_020 for piece in left)
        trial, read = whole.trial, "\n".join(left)
        assert all(trial[at : at + 90] in read for at in range(0, len(trial), 45))

    def test_the_worst_counts(self) -> None:
        """Of every score, whichever of the pieces has it; and what any left out is left out."""
        scores = _pieces.joined(
            Conversation.of("x" * 100),
            [
                Scores(0.1, {"violence": 0.2}, 0.9, coverage=Coverage(60, 50, 1, 2)),
                Scores(0.8, {"hate": 0.7, "violence": 0.1}),
            ],
        )
        assert scores == Scores(0.8, {"violence": 0.2, "hate": 0.7}, 0.9, coverage=Coverage(100, 90, 2, 2))


class TestSpecs:
    """What a spec says is what is asked."""

    def test_a_spec_names_server_and_model(self, server: Any) -> None:
        """And nothing else is needed."""
        made = load(f"vllm:{server.url}/#acme/Guard-2")
        assert isinstance(made, ChatBackend)
        assert Guard(made).screen("EVIL").blocked
        assert made.name == server.asked[0].body["model"] == "acme/Guard-2"
        made.close()

    def test_options_go_before_or_behind_the_model(self, server: Any, fake: Any) -> None:
        """A dialect, a deadline and the like."""
        for spec in (f"{server.url}?dialect={{}}&deadline=9#m", f"{server.url}#m?dialect={{}}&deadline=9"):
            made = vllm(spec)
            assert Guard(made).screen("x").action == "allow"
            made.close()

    def test_the_one_model_of_a_server_is_found(self, server: Any, backend: Any, fake: Any) -> None:
        """Once, however many ask."""
        made = backend(model=None)
        made.classify(SAMPLES)
        made.classify(SAMPLES)
        assert [seen.path for seen in server.seen].count("/v1/models") == 1
        assert {seen.body["model"] for seen in server.asked} == {fake.MODEL}

    def test_a_model_of_another_name_is_known_by_what_it_was_loaded_from(
        self, server: Any, backend: Any, monkeypatch: pytest.MonkeyPatch, fake: Any
    ) -> None:
        """As vLLM tells."""
        asked = []
        monkeypatch.setattr(dialects, "of_model", lambda name: asked.append(name) or fake.OneWord())
        server.models = {"data": [{"id": "guard", "root": "acme/Guard-1", "max_model_len": 4096}]}
        backend(model=None).classify(SAMPLES)
        assert asked == ["acme/Guard-1"]
        assert server.asked[0].body["model"] == "guard"

    @pytest.mark.parametrize("models", [{"data": []}, {"data": [{"id": "a"}, {"id": "b"}]}, {}, [], {"data": [{}]}])
    def test_a_server_of_several_models_needs_a_name(self, server: Any, backend: Any, models: object) -> None:
        """None is guessed."""
        server.models = models
        verdict = Guard(backend(model=None)).screen("x")
        assert (verdict.action, "models" in verdict.reason) == ("block", True)
        assert server.asked == []

    def test_the_key_comes_from_the_environment(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the name that each kind of server has for it, or another."""
        monkeypatch.setenv("VLLM_API_KEY", "first ")
        monkeypatch.setenv("OPENAI_API_KEY", "second")
        monkeypatch.setenv("OTHER", "third")
        for make, more in ((vllm, ""), (openai, ""), (vllm, "?key_env=OTHER")):
            made = make(f"{server.url}{more}#m")
            made.classify([Conversation.of("x")])
            made.close()
        sent = [seen.headers["authorization"] for seen in server.asked]
        assert sent == ["Bearer first", "Bearer second", "Bearer third"]

    def test_openai_needs_no_address(self) -> None:
        """It has one."""
        made = openai("gpt-4.1-mini?deadline=20")
        assert (made.name, repr(made)) == (
            "gpt-4.1-mini",
            "ChatBackend('https://api.openai.com/v1', name='gpt-4.1-mini')",
        )

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "host:8000",
            "ftp://host/v1#m",
            "http://#m",
            "http://user:secret@host/v1#m",
            "http://host:99999/v1",
            "http://host/v1 #m",
            "http://host/v1?deadline=soon#m",
            "http://host/v1?deadline=nan#m",
            "http://host/v1?deadline=0#m",
            "http://host/v1?connections=0#m",
            "http://host/v1?dialekt=x#m",
        ],
    )
    def test_a_spec_that_is_not_valid_is_refused(self, spec: str) -> None:
        """Before anything is asked, and no password is repeated."""
        with pytest.raises(BackendError) as caught:
            vllm(spec)
        assert "secret" not in str(caught.value)

    def test_a_typo_among_the_options_is_corrected(self) -> None:
        """By the nearest."""
        with pytest.raises(BackendError, match=r"unknown option 'dialekt': did you mean 'dialect'\?"):
            vllm("http://host/v1?dialekt=x#m")

    @pytest.mark.parametrize("key", ["two words", "zażółć", "line\nbreak"])
    def test_a_key_that_no_header_takes_is_refused(self, key: str) -> None:
        """Without repeating it."""
        with pytest.raises(BackendError, match="API key") as caught:
            ChatBackend("http://host/v1", model="m", api_key=key)
        assert key not in str(caught.value)

    def test_a_missing_library_is_named(self) -> None:
        """With what installs it."""
        code = (
            "import sys; sys.modules['httpx'] = None\n"
            "from guardmw.backends.chat import ChatBackend\n"
            "from guardmw import BackendUnavailable\n"
            "try:\n    ChatBackend('http://host/v1', dialect=object())\n"
            "except BackendUnavailable as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "pip install 'guardmw[chat]'" in done.stdout


def test_tenants_have_caches_of_their_own(server: Any, backend: Any) -> None:
    """A salt, or what says it for each call; none is sent where there is none."""
    tenant = "one"
    made = backend(cache_salt=lambda: tenant)
    made.classify([Conversation.of("x")])
    tenant = "two"
    asyncio.run(made.aclassify([Conversation.of("x")]))
    backend(cache_salt="always").classify([Conversation.of("x")])
    backend().classify([Conversation.of("x")])
    assert [seen.body.get("cache_salt") for seen in server.asked] == ["one", "two", "always", None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_connections_of_its_own(server: Any, backend: Any) -> None:
    """A server of an application may be loaded before its workers are."""
    guard = Guard(backend())
    assert guard.screen("EVIL").blocked
    child = os.fork()
    if not child:
        try:
            fine = guard.screen("EVIL").blocked and guard.screen("good").action == "allow"
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert guard.screen("good").action == "allow"
    assert threading.active_count() < 10


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "content",
                    "logprobs",
                    "token",
                    "logprob",
                    "top_logprobs",
                    "tokens",
                    "token_logprobs",
                    "text",
                    "finish_reason",
                    "data",
                    "id",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(ANYTHING)
def test_any_json_is_read_or_refused(answer: object) -> None:
    """Nothing else is raised, and what is read are logarithms of probabilities."""
    wrapped = [answer, {"choices": [answer]}, {"choices": [{"message": {"content": "safe"}, "logprobs": answer}]}]
    for one in wrapped:
        with contextlib.suppress(BackendError):
            reply = _completions.read(one)
            assert isinstance(reply.text, str)
            for token in reply.tokens:
                assert all(0 <= math.exp(p) <= 1 for p in (token.logprob, *token.alternatives.values()))
    with contextlib.suppress(BackendError):
        _completions.models(answer)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(given_: bytes) -> None:
    """As JSON."""
    with contextlib.suppress(BackendError):
        _completions.value(given_)


@given(NAMES, st.lists(NAMES, max_size=6))
def test_the_beginning_comes_off_text_and_tokens_alike(prefill: str, words: list[str]) -> None:
    """Or the answer is refused."""
    tokens = tuple(Token(word, -1.0, {word: -1.0}) for word in words)
    text = "".join(words)
    if not text.startswith(prefill):
        with contextlib.suppress(BackendError):
            _completions.without(Reply(text, tokens), prefill, 99)
        return
    if text.lstrip() != text:
        return
    reply = _completions.without(Reply(text, tokens), prefill, 99)
    assert prefill + reply.text == text
    assert "".join(token.text for token in reply.tokens) == reply.text
    assert all(token.text in token.alternatives for token in reply.tokens)


@given(st.text(max_size=30))
def test_any_retry_after_is_a_time_or_none(text: str) -> None:
    """Never less than nothing."""
    wait = _http.retry_after(text)
    assert wait is None or wait >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("nan", 0.0),
        ("", None),
        ("soon", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
    ],
)
def test_a_retry_after_in_either_form(text: str, seconds: float | None) -> None:
    """Seconds or a date."""
    assert _http.retry_after(text) == seconds


def test_every_manner_is_given_up_once() -> None:
    """A server that finds fault with everything is soon told so."""
    manner: Manner | None = Manner()
    for _ in range(10):
        if manner is None:
            return
        manner = manner.after("logprobs temperature max_completion_tokens continue_final_message")
    pytest.fail("there is always another manner")
