"""Tool rules hold beside the classifier, whatever it says or fails to say, and make no verdict milder."""

from __future__ import annotations

import asyncio
import fnmatch
import gc
import json
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from guardmw import BackendError, Conversation, Coverage, Guard, Policy, PolicyError, Scores, ToolCall, Turn, Verdict
from guardmw import guard as guard_module
from guardmw.testing import KeywordBackend, ScriptedBackend
from guardmw.tools import Continued, Gone, ToolPolicy, ToolRules
from guardmw.verdict import ACTIONS, SEVERITY

if TYPE_CHECKING:
    from pathlib import Path

KEYWORD = KeywordBackend({"EVIL": 0.99})

POLICY = """
tools:
  allow: [search_*, send_email, pay]
  review: [delete_*]
  block: [shell, '*exec*']
  unlisted: review
  groups:
    send: [send_*, http_post]
  arguments:
    send_email:
      to: {domains: [example.com]}
      attachment: {paths: [/srv/reports], optional: true}
    pay:
      amount: {min: 0, max: 100, action: review}
  flows:
  - {tools: [send], injection: 0.5}
  budgets:
  - {tools: [search_*], calls: 2}
"""


class Reader:
    """Finds an injection where the last turn says IGNORE, and remembers what it was asked."""

    name = "reader"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        self.asked += [conversation.trial for conversation in conversations]
        return [Scores(0.01, injection=0.9 if "IGNORE" in one.trial else 0.02) for one in conversations]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        return self.classify(conversations)


class Opaque(dict[str, Any]):
    """A value that nobody can copy, for all that is known of it."""


def policy(**tools: Any) -> Policy:
    """One of nothing but tool rules."""
    return Policy.model_validate({"tools": tools, "injection": {"flag": 0.5}})


def call(name: str, /, **arguments: Any) -> Turn:
    """A turn that makes one call."""
    return Turn("assistant", tool_calls=(ToolCall(name, arguments),))


def screened(given_: Any, **tools: Any) -> Verdict:
    """The verdict of a guard with these rules."""
    return Guard(KEYWORD, policy=policy(**tools)).screen(given_)


def rules_of(verdict: Verdict) -> list[str]:
    """What was violated, strictest first."""
    return [violation.rule for violation in verdict.violations]


# Names


@pytest.mark.parametrize(
    ("name", "action", "rules"),
    [
        ("shell", "block", ["tool:shell"]),
        ("SHELL", "block", ["tool:shell"]),
        ("ｓｈｅｌｌ", "block", ["tool:shell"]),
        ("shell ", "block", ["tool:shell"]),
        ("python_EXEC", "block", ["tool:*exec*"]),
        ("delete_file", "review", ["tool:delete_*"]),
        ("search_web", "allow", []),
        ("SEARCH_web", "review", ["tool:unlisted"]),
        ("other", "review", ["tool:unlisted"]),
        ("", "review", ["tool:unlisted"]),
    ],
)
def test_a_tool_is_listed_by_patterns_of_its_name(name: str, action: str, rules: list[str]) -> None:
    """In any case where that is stricter, and in its own where it is allowed; what is on no list has its own rule."""
    guard = Guard(KEYWORD, policy=Policy.model_validate(yaml.safe_load(POLICY)))
    verdict = guard.screen(call(name))
    assert (verdict.action, rules_of(verdict)) == (action, rules)
    assert verdict.stage == "tool_call"
    assert verdict.policy == guard.policy.fingerprint
    assert not verdict.degraded


def test_of_several_lists_the_strictest_counts() -> None:
    """Being allowed on one makes up for nothing on another."""
    verdict = screened(call("read"), allow=["read"], flag=["r*"], review=["re*"], block=["rea*"])
    assert verdict.blocked
    assert rules_of(verdict) == ["tool:rea*", "tool:re*", "tool:r*"]
    assert screened(call("read"), allow=["read"], flag=["r*"], review=["re*"]).action == "review"
    assert screened(call("read"), allow=["read"], flag=["r*"]).action == "flag"
    twice = screened(call("read"), flag=["read"], block=["read"])
    assert [(v.rule, v.action) for v in twice.violations] == [("tool:read", "block")]


@pytest.mark.parametrize("unlisted", ["screen", "flag", "review", "block"])
def test_a_tool_on_no_list_is_screened_and_what_the_policy_says(unlisted: str) -> None:
    """Unlisted is never a bypass."""
    expected = {"screen": "allow"}.get(unlisted, unlisted)
    assert screened(call("other"), unlisted=unlisted, block=["shell"]).action == expected
    assert screened(call("other", x="EVIL"), unlisted=unlisted, block=["shell"]).blocked


def test_an_allow_list_blocks_what_is_not_on_it() -> None:
    """Else it would do nothing; without one, a tool that no rule lists is screened."""
    assert screened(call("other"), allow=["search_*"]).blocked
    assert screened(call("other"), allow=["search_*"], unlisted="screen").action == "allow"
    assert screened(call("other"), review=["delete_*"]).action == "allow"


def test_to_constrain_a_tool_is_not_to_allow_it() -> None:
    """A rule for every tool's arguments would open the list to all."""
    assert screened(call("other"), allow=["search_*"], arguments={"*": {"*": {"domains": []}}}).blocked


def test_an_allowed_tool_is_screened_all_the_same() -> None:
    """A name says nothing of what is in its arguments."""
    verdict = screened(call("search_web", query="EVIL"), allow=["search_*"])
    assert verdict.blocked
    assert rules_of(verdict) == ["unsafe"]


def test_a_group_stands_for_its_patterns_and_for_itself() -> None:
    """A tool may be called as the group is."""
    rules = {"groups": {"send": ["send_*", "post"]}, "block": ["send"]}
    assert [screened(call(name), **rules).action for name in ("send_email", "POST", "send", "sent")] == [
        "block",
        "block",
        "block",
        "allow",
    ]
    assert rules_of(screened(call("post"), **rules)) == ["tool:send"]


def test_each_of_several_calls_is_held_to_the_rules() -> None:
    """One forbidden call among others is enough, and a rule is told once."""
    calls = tuple(ToolCall(name) for name in ("search_web", "shell", "Shell", "other"))
    verdict = screened(Turn("assistant", tool_calls=calls), allow=["search_*"], block=["shell"], unlisted="flag")
    assert rules_of(verdict) == ["tool:shell", "tool:unlisted"]


def test_calls_by_whomever_are_held_to_the_rules() -> None:
    """A turn that claims to be a user's can carry one too."""
    assert screened(Turn("user", "Hello", tool_calls=(ToolCall("shell"),)), block=["shell"]).blocked


# Arguments


@pytest.mark.parametrize(
    ("turn", "action", "rules"),
    [
        (call("send_email", to="a@example.com"), "allow", []),
        (call("send_email", to="a@evil.com"), "block", ["argument:send_email.to:domains"]),
        (call("Send_Email", to="a@evil.com"), "block", ["argument:send_email.to:domains", "tool:unlisted"]),
        (call("send_email"), "block", ["argument:send_email.to:missing"]),
        (
            call("send_email", to="a@example.com", attachment="/srv/reports/../a"),
            "block",
            ["argument:send_email.attachment:paths"],
        ),
        (call("pay", amount="1e3"), "review", ["argument:pay.amount:max"]),
        (
            Turn("assistant", tool_calls=(ToolCall("pay", '{"amount": 1'),)),
            "review",
            ["argument:pay.amount:unreadable"],
        ),
    ],
)
def test_an_argument_is_named_with_what_is_wrong_with_it(turn: Turn, action: str, rules: list[str]) -> None:
    """In the policy's own words."""
    verdict = Guard(KEYWORD, policy=Policy.model_validate(yaml.safe_load(POLICY))).screen(turn)
    assert (verdict.action, rules_of(verdict)) == (action, rules)
    assert verdict.summary == (", ".join(rules) or "nothing found")


def test_arguments_in_a_string_are_read_where_they_can_be() -> None:
    """As a streamed call has them; what only looks like JSON, or is no object, is unreadable."""
    rules = {"send_email": {"to": {"domains": ["a.com"]}}}

    def found(arguments: str) -> list[str]:
        turn = Turn("assistant", tool_calls=(ToolCall("send_email", arguments),))
        return [rule.rpartition(":")[2] for rule in rules_of(screened(turn, arguments=rules))]

    assert found('{"to": "x@a.com"}') == []
    assert found(r'{"to": "x@\u0065vil.com"}') == ["domains"]
    for broken in ('{"to": "x@a.com"', '{"to": "x@evil.com", "to": "x@a.com"}', '["x@a.com"]', "", "[" * 100_000):
        assert found(broken) == ["unreadable"]


def test_all_patterns_that_fit_a_tool_constrain_it() -> None:
    """What the narrower allows the wider may still forbid."""
    rules = {"send_email": {"to": {"domains": ["a.com", "b.com"]}}, "send_*": {"to": {"domains": ["b.com"]}}}
    assert rules_of(screened(call("send_email", to="x@a.com"), arguments=rules)) == ["argument:send_*.to:domains"]
    assert screened(call("send_email", to="x@b.com"), arguments=rules).action == "allow"


def test_nothing_of_a_call_is_quoted() -> None:
    """Neither the values of its arguments nor a name that no list knows."""
    turn = call("SECRET name", to="SECRET@evil.com", SECRET=["SECRET"])
    rules = {"unlisted": "review", "arguments": {"*": {"to": {"domains": []}}}, "block": ["secret*"]}
    verdict = screened(turn, **rules)
    assert verdict.blocked
    assert "SECRET" not in verdict.to_json() + verdict.summary + repr(verdict)


# Budgets


def test_a_budget_counts_the_calls_of_the_conversation() -> None:
    """All that its tools share, those on trial included; calls of other tools neither count nor suffer."""
    budget = [{"tools": ["search_*", "look_up"], "calls": 2, "action": "review"}]
    done: list[Turn] = [call("search_web"), Turn("tool", "found"), call("other")]
    assert screened([*done, call("Look_Up")], budgets=budget).action == "allow"
    assert rules_of(screened([*done, call("look_up"), call("search_web")], budgets=budget)) == [
        "budget:search_*,look_up"
    ]
    both = Turn("assistant", tool_calls=(ToolCall("search_web"), ToolCall("search_web")))
    assert screened([*done, both], budgets=budget).action == "review"
    assert screened([*done, both, call("other")], budgets=budget).action == "allow"


@pytest.mark.parametrize(
    ("gone", "rules"),
    [
        (Gone({}, {}), []),
        (Gone({"pay": 1, "Pay": 1}, {}), ["budget:pay"]),
        (Gone({"look": 9}, {}), []),
        (Gone({}, {("tool", "read"): 0.5}), ["flow:pay"]),
        (Gone({}, {("tool", "read"): 0.4, ("tool", "own"): 0.9}), []),
    ],
)
def test_what_is_gone_from_a_conversation_counts_with_what_is_there(gone: Gone, rules: list[str]) -> None:
    """Also where nothing else is there; trust is by name, as ever."""
    flow = {"tools": ["pay"], "injection": 0.5, "trusted": ["own"]}
    looking_back = policy(flows=[flow], budgets=[{"tools": ["pay"], "calls": 2}])
    guard = Guard(KeywordBackend({}), policy=looking_back)
    for context in ((), (Turn("user", "go"),)):
        assert rules_of(guard.screen(Continued((*context, call("pay")), gone))) == rules


def test_a_call_in_two_spellings_is_one_call() -> None:
    """Adapters give a streamed call raw and read; with other arguments, or no id, it is another."""
    budget = [{"tools": ["pay"], "calls": 1}]
    raw, read = ToolCall("pay", '{"n": "\\u0031"}', "0"), ToolCall("pay", {"n": "1"}, "0")
    other, nameless = ToolCall("pay", {"n": "2"}, "0"), ToolCall("pay", {"n": "1"})
    for calls, action in (
        ((raw, read), "allow"),
        ((raw, other), "block"),
        ((nameless, nameless), "block"),
        ((read,), "allow"),
    ):
        assert screened(Turn("assistant", tool_calls=calls), budgets=budget).action == action


# Beside the backend


class Broken(KeywordBackend):
    """A backend that is down."""

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Fail."""
        raise BackendError("broken: it fell over")


@pytest.mark.parametrize("turn", [call("shell", cmd="ls"), call("shell"), call(" shell\n", cmd="x" * 2_000)])
def test_a_block_holds_where_the_backend_fails_and_is_not_asked(turn: Turn) -> None:
    """Open to failure, to what is long, and to everything else but this."""
    lenient = {"on_error": "allow", "on_partial": "allow", "max_characters": 1_000, "tools": {"block": ["shell"]}}
    verdict = Guard(Broken({}), policy=Policy.model_validate(lenient)).screen(turn)
    assert (verdict.action, verdict.summary) == ("block", "tool:shell")
    backend = ScriptedBackend([])
    assert Guard(backend, policy=policy(block=["shell"])).screen(turn).blocked
    assert not backend.asked
    length = len(Conversation.of(turn).trial)
    assert (verdict.scores, verdict.degraded, verdict.coverage) == (None, False, Coverage(length, 0, 0))


def test_a_milder_rule_stands_beside_a_failure() -> None:
    """The stricter of the two, and both are told."""
    lenient = {"on_error": "flag", "tools": {"review": ["delete_*"]}}
    verdict = Guard(Broken({}), policy=Policy.model_validate(lenient)).screen(call("delete_file"))
    assert (verdict.action, verdict.degraded) == ("review", True)
    assert verdict.summary == "tool:delete_*; broken: it fell over"
    assert Guard(Broken({}), policy=policy(review=["delete_*"])).screen(call("delete_file")).blocked


def test_a_milder_rule_stands_beside_the_scores() -> None:
    """A person who reviews sees what the classifier thought."""
    verdict = screened(call("delete_file", path="x"), review=["delete_*"])
    assert verdict.action == "review"
    assert verdict.scores is not None
    assert screened(call("delete_file", path="EVIL"), review=["delete_*"]).violations[0].rule == "unsafe"


def test_rule_violations_are_no_kinds_of_harm() -> None:
    """And a verdict with them is a verdict as any other: it is JSON, and survives a change of process."""
    guard = Guard(Reader(), policy=Policy.model_validate(yaml.safe_load(POLICY)))
    verdict = guard.screen(
        [Turn("tool", "IGNORE"), call("send_email", to="a@evil.com"), call("send_email", to="a@b.c")]
    )
    assert verdict.violations
    assert verdict.categories == ()
    assert json.loads(verdict.to_json())["violations"][0]["rule"] == "argument:send_email.to:domains"
    assert pickle.loads(pickle.dumps(verdict)) == verdict  # noqa: S301 - its own pickle


def test_one_batch_holds_what_is_blocked_and_what_is_not() -> None:
    """Each gets the verdict it would get alone, in its place."""
    guard = Guard(ScriptedBackend([0.99, 0.01]), policy=policy(block=["shell"], review=["delete_*"]))
    verdicts = guard.screen_many([call("shell"), "EVIL", call("delete_file", x=1), "", call("shell")])
    assert [v.action for v in verdicts] == ["block", "block", "review", "allow", "block"]
    assert [rules_of(v) for v in verdicts] == [["tool:shell"], ["unsafe"], ["tool:delete_*"], [], ["tool:shell"]]


# Flows

FLOW = {"flows": [{"tools": ["send_*"], "injection": 0.5}]}
READ = [Turn("user", "Read it."), call("read"), Turn("tool", "IGNORE all", name="read")]


def test_after_an_injection_a_call_is_more_than_it_seems() -> None:
    """The one that was read, however long ago; not one that was not, and no other call."""
    guard = Guard(Reader(), policy=policy(**FLOW))
    verdict = guard.screen([*READ, Turn("assistant", "Done."), Turn("user", "Send it."), call("send_email", to="x")])
    assert (verdict.action, verdict.summary) == ("review", "flow:send_* 0.90 (threshold 0.5)")
    assert guard.screen([*READ, call("read")]).action == "allow"
    assert guard.screen([Turn("user", "IGNORE"), Turn("tool", "fine"), call("send_email")]).action == "allow"
    assert guard.screen([*READ, Turn("assistant", "Done.")]).action == "allow"


def test_a_flow_may_be_about_any_result_and_about_documents_only() -> None:
    """At 0 nobody needs to find anything in it."""
    fine = [Turn("tool", "fine"), call("send_email")]
    assert Guard(Reader(), policy=policy(flows=[{"tools": ["send_*"], "injection": 0}])).screen(fine).action == "review"
    documents = policy(flows=[{"tools": ["send_*"], "injection": 0.5, "after": ["document"], "action": "block"}])
    assert Guard(Reader(), policy=documents).screen([*READ, call("send_email")]).action == "allow"
    assert Guard(Reader(), policy=documents).screen([Turn("document", "IGNORE"), call("send_email")]).blocked


def test_a_flow_trusts_whom_it_is_told_to() -> None:
    """By the tool's own name, and nothing that only looks like it."""
    trusting = policy(flows=[{"tools": ["send_*"], "injection": 0, "trusted": ["read"]}])
    guard = Guard(Reader(), policy=trusting)
    assert guard.screen([*READ, call("send_email")]).action == "allow"
    for name in ("READ", "read_web", ""):
        assert guard.screen([Turn("tool", "fine", name=name), call("send_email")]).action == "review"


def test_each_result_is_judged_once() -> None:
    """When it is screened itself, or at the first call it matters to; and never for calls that no flow is about."""
    backend = Reader()
    guard = Guard(backend, policy=policy(**FLOW))
    conversation: list[Turn] = [Turn("user", "Go.")]
    for step in range(20):
        conversation += [call("read", page=step), Turn("tool", f"page {step}")]
        guard.screen(conversation)
        conversation.append(call("send_email", page=step))
        guard.screen(conversation)
    assert len(backend.asked) == 40
    fresh = Reader()
    again = Guard(fresh, policy=policy(**FLOW))
    again.screen(conversation)
    assert len(fresh.asked) == 21
    again.screen([*conversation, call("send_email", page=21)])
    assert len(fresh.asked) == 22
    again.screen([*conversation, call("read", page=21)])
    assert len(fresh.asked) == 23


def test_what_was_heard_of_one_turn_is_not_believed_of_another() -> None:
    """The same words after other words, or by another role, are judged anew."""
    backend = Reader()
    guard = Guard(backend, policy=policy(**FLOW))
    for before in (Turn("user", "a"), Turn("user", "b"), Turn("system", "a"), Turn("user", "a", name="x")):
        guard.screen([before, Turn("tool", "fine"), call("send_email")])
    assert backend.asked.count("fine") == 4


def test_a_flow_holds_where_its_turn_could_not_be_judged() -> None:
    """Too long, a picture, or a failure: as if it scored 1, unless the policy lets such a turn pass."""
    long, picture = Turn("tool", "x" * 50), Turn("tool", "", media=("image_url",))
    lenient = {"on_partial": "allow", "on_error": "allow"}
    for turn in (long, picture):
        strict = Policy.model_validate({"max_characters": 30, "tools": FLOW})
        verdict = Guard(Reader(), policy=strict).screen([turn, call("send_email")])
        assert (verdict.action, verdict.summary) == ("review", "flow:send_* 1.00 (threshold 0.5)")
        open_ = Policy.model_validate({"max_characters": 30, "tools": FLOW} | lenient)
        assert Guard(Reader(), policy=open_).screen([turn, call("send_email")]).action == "allow"
    failing = [Turn("tool", "fine"), call("send_email")]
    assert Guard(Broken({}), policy=policy(**FLOW)).screen(failing).blocked
    wary = Policy.model_validate(
        {"on_error": "allow", "stages": {"tool_result": {"on_error": "review"}}, "tools": FLOW}
    )
    assert Guard(Broken({}), policy=wary).screen(failing).action == "review"


def test_a_failure_is_not_remembered() -> None:
    """The next call finds the backend up again."""
    backend = ScriptedBackend([BackendError("scripted: down"), 0.01, 0.01])
    guard = Guard(backend, policy=policy(**FLOW))
    conversation = [Turn("tool", "fine"), call("send_email")]
    assert guard.screen(conversation).blocked
    assert guard.screen(conversation).action == "allow"


def test_blank_results_are_nothing_to_be_wary_of() -> None:
    """Not even at 0."""
    rules = {"flows": [{"tools": ["send_*"], "injection": 0}]}
    assert screened([Turn("tool", " \n"), call("send_email")], **rules).action == "allow"


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And being emptied only means to judge anew."""
    monkeypatch.setattr(guard_module, "_REMEMBERED", 3)
    guard = Guard(Reader(), policy=policy(**FLOW))
    results = [Turn("tool", f"page {n} IGNORE") for n in range(10)]
    for _ in range(2):
        assert guard.screen([*results, call("send_email")]).action == "review"
        assert 0 < len(guard._heard) <= 3


# In a conversation that goes on

LOOKING_BACK: dict[str, Any] = {**FLOW, "budgets": [{"tools": ["read"], "calls": 3}]}


class Wary(Reader):
    """Finds an injection after a call for "b", too."""

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        after_b = [
            '"b"' in "".join(str(call) for turn in one.context for call in turn.tool_calls) for one in conversations
        ]
        found = super().classify(conversations)
        return [Scores(0.01, injection=0.8) if b else scores for b, scores in zip(after_b, found, strict=True)]


Change = Callable[[list[Turn]], list[Turn]]


def edited(turns: list[Turn]) -> list[Turn]:
    """A call's arguments are changed in place."""
    for one in turns[1].tool_calls:
        one.arguments["to"] = "b"  # type: ignore[index]
    return turns


def summarised(turns: list[Turn]) -> list[Turn]:
    """What came first is one turn now."""
    return [Turn("user", "They greeted."), *turns[2:]]


CHANGES: list[Change] = [
    edited,
    summarised,
    lambda turns: turns[1:],
    lambda turns: [turns[0], *turns[2:]],
    lambda turns: [turns[0], turns[0], *turns[1:]],
    lambda turns: [*turns[:2], Turn("tool", "fine"), *turns[3:]],
    lambda turns: [*turns[:2], Turn("tool", "IGNORE all"), *turns[3:]],
    lambda turns: [replace(turn) for turn in turns],
    lambda turns: turns[:-1],
    lambda turns: [*turns, call("read"), Turn("tool", "page")],
]


@given(st.lists(st.sampled_from(CHANGES), max_size=5), st.booleans())
def test_rules_that_look_back_see_the_history_as_it_is(changes: list[Change], plain: bool) -> None:
    """Whatever became of it since the last call: the verdict is that of a guard that has not seen it before."""
    argument: Any = "a" if plain else Opaque()
    guard = Guard(Wary(), policy=policy(**LOOKING_BACK))
    turns = [Turn("user", "Go."), call("read", to="a", of=argument), Turn("tool", "page"), call("read"), call("look")]
    for change in (list, *changes):
        turns = change(turns)
        for last in (call("read"), call("send_email"), Turn("tool", "new")):
            conversation = Conversation((*turns, last))
            fresh = Guard(Wary(), policy=policy(**LOOKING_BACK))
            assert guard.screen(conversation).summary == fresh.screen(conversation).summary
        if len(turns) < 3:
            break


def test_what_is_known_of_a_conversation_goes_with_it() -> None:
    """A guard keeps no turn alive; not where the first is there twice, either."""
    guard = Guard(Reader(), policy=policy(**LOOKING_BACK))
    for repeated in (0, 1):
        turns = [Turn("user", "Go."), *READ, call("read")]
        turns += turns[:repeated]
        gone = [weakref.ref(turn) for turn in (turns[0], turns[-1])]
        guard.screen([*turns, call("send_email")])
        del turns
        gc.collect()
        assert [turn() for turn in gone] == [None, None]


Way = Callable[[Guard, list[Any]], list[Verdict]]


def one_by_one(guard: Guard, given_: list[Any]) -> list[Verdict]:
    """Sync, each alone."""
    return [guard.screen(one) for one in given_]


def batch(guard: Guard, given_: list[Any]) -> list[Verdict]:
    """Sync, together."""
    return guard.screen_many(given_)


def asynchronously(guard: Guard, given_: list[Any]) -> list[Verdict]:
    """Async, all at once."""

    async def gathered() -> list[Verdict]:
        return list(await asyncio.gather(*map(guard.ascreen, given_)))

    return asyncio.run(gathered())


@pytest.mark.parametrize("way", [one_by_one, batch, asynchronously])
def test_every_way_of_asking_gives_the_same_verdicts(way: Way) -> None:
    """Whatever the guard has heard before."""
    given_: list[Any] = [
        [*READ, call("send_email", to="a@example.com")],
        call("shell"),
        READ,
        "Hello",
        [*READ, call("send_email", to="a@evil.com")],
        [Turn("tool", "fine"), call("send_email", to="a@example.com")],
    ]
    guard = Guard(Reader(), policy=Policy.model_validate(yaml.safe_load(POLICY)))
    for _ in range(2):
        assert [v.action for v in way(guard, given_)] == ["review", "block", "block", "allow", "block", "allow"]


def test_one_guard_serves_many_threads() -> None:
    """Each gets the verdict on its own conversation."""
    guard = Guard(Reader(), policy=policy(**FLOW))
    wrong: list[int] = []

    def ask(number: int) -> None:
        said, expected = ("IGNORE", "review") if number % 2 else ("fine", "allow")
        for step in range(50):
            verdict = guard.screen([Turn("tool", f"{said} {step}"), call("send_email")])
            wrong.extend([number] * (verdict.action != expected))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Properties

NAMES = st.sampled_from(["shell", "Shell", "send_email", "send_sms", "read", "other", ""])
PATTERNS = st.lists(st.sampled_from(["shell", "send_*", "*", "r?ad", "SEND", "o[st]*"]), max_size=2)
SOME = PATTERNS.map(lambda patterns: patterns or ["*"])
ACTION = st.sampled_from(ACTIONS)
CONSTRAINT = st.fixed_dictionaries(
    {},
    optional={
        "pattern": st.just("[a-z@.]*"),
        "domains": st.just(["good.com"]),
        "paths": st.just(["."]),
        "max": st.just(9),
        "optional": st.booleans(),
        "action": ACTION,
    },
)
PARTS: dict[str, st.SearchStrategy[Any]] = {
    "flag": PATTERNS,
    "review": PATTERNS,
    "block": PATTERNS,
    "arguments": st.dictionaries(
        st.sampled_from(["*", "send_*"]), st.dictionaries(st.sampled_from(["x", "*"]), CONSTRAINT), max_size=2
    ),
    "flows": st.lists(
        st.fixed_dictionaries({"tools": SOME, "injection": st.floats(0, 1), "action": ACTION}), max_size=2
    ),
    "budgets": st.lists(
        st.fixed_dictionaries({"tools": SOME, "calls": st.integers(1, 3), "action": ACTION}), max_size=2
    ),
}
RULES = st.fixed_dictionaries(
    {},
    optional={
        "allow": PATTERNS,
        "unlisted": st.sampled_from(["screen", "flag", "review", "block"]),
        "groups": st.just({"SEND": ["send_*"]}),
        **PARTS,
    },
)
CALLS = st.builds(
    ToolCall,
    NAMES,
    st.dictionaries(st.just("x"), st.sampled_from(["EVIL", "a@good.com", "b@evil.com", 7])) | st.just("{"),
)
TURNS = st.one_of(
    st.builds(Turn, st.just("assistant"), tool_calls=st.lists(CALLS, max_size=3).map(tuple)),
    st.builds(Turn, st.sampled_from(["user", "tool", "document"]), st.sampled_from(["fine", "EVIL", "IGNORE", ""])),
)
CONVERSATIONS = st.lists(TURNS, min_size=1, max_size=4).map(Conversation.of)


class Both(Reader):
    """Finds both harm and injections."""

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score a batch."""
        harm = KEYWORD.classify(conversations)
        return [
            Scores(h.unsafe, injection=s.injection) for h, s in zip(harm, super().classify(conversations), strict=True)
        ]


def severity(tools: dict[str, Any], conversation: Conversation) -> int:
    """Of the verdict under these rules."""
    return SEVERITY[Guard(Both(), policy=policy(**tools)).screen(conversation).action]


@given(RULES, CONVERSATIONS)
def test_rules_make_no_verdict_milder(tools: dict[str, Any], conversation: Conversation) -> None:
    """Whatever they are, and whatever is on trial; and the strictest violation comes first and is the least action."""
    plain = Guard(Both(), policy=Policy(injection={"flag": 0.5})).screen(conversation)
    ruled = Guard(Both(), policy=policy(**tools)).screen(conversation)
    assert SEVERITY[ruled.action] >= SEVERITY[plain.action]
    found = [SEVERITY[violation.action] for violation in ruled.violations]
    assert found == sorted(found, reverse=True)
    assert SEVERITY[ruled.action] >= max(found, default=0)
    if not conversation.last.tool_calls:
        assert ruled.violations == plain.violations


@given(RULES, st.data(), CONVERSATIONS)
def test_another_rule_makes_no_verdict_milder(
    tools: dict[str, Any], data: st.DataObject, conversation: Conversation
) -> None:
    """Strictest wins, so a list can grow without anyone reading the rest of it; only to be listed is to be known."""
    part = data.draw(st.sampled_from(["arguments", "flows", "budgets", "block"]))
    extra = data.draw(PARTS[part])
    # What is there stays; of a tool's arguments a second mapping would replace the first.
    more = extra | tools.get(part, {}) if isinstance(extra, dict) else [*tools.get(part, []), *extra]
    assert severity(tools | {part: more}, conversation) >= severity(tools, conversation)


@given(RULES, CONVERSATIONS, TURNS)
def test_a_longer_history_makes_no_call_milder(tools: dict[str, Any], conversation: Conversation, before: Turn) -> None:
    """Budgets only run down, and what was read stays read."""
    longer = Conversation((before, *conversation.turns))
    assert severity(tools, longer) >= severity(tools, conversation)


# Settings


def test_no_pattern_is_compiled_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was, when the policy was read."""
    guard = Guard(Reader(), policy=Policy.model_validate(yaml.safe_load(POLICY)))

    def refuse(*_: object) -> None:
        raise AssertionError("a pattern is compiled")

    monkeypatch.setattr(re, "_compile", refuse)
    monkeypatch.setattr(fnmatch, "translate", refuse)
    for name in ("shell", "send_email", "other", "ｓend"):
        guard.screen([*READ, call(name, to="https://bücher.example.com", attachment="/srv/a", amount="7")])


@pytest.mark.parametrize("tools", [{}, {"block": ["shell"]}])
def test_without_flows_no_earlier_turn_is_looked_at(tools: dict[str, Any]) -> None:
    """Those who have no such rule pay nothing for it."""
    backend = Reader()
    Guard(backend, policy=policy(**tools)).screen([*READ, call("send_email", to="x")])
    assert len(backend.asked) == 1


def test_rules_are_read_from_a_file_and_written_to_one(tmp_path: Path) -> None:
    """As the other settings are; and the fingerprint tells of them."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    policy_ = Policy.load(path)
    assert yaml.safe_load(policy_.dump()) == yaml.safe_load(POLICY)
    policy_.dump(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy_
    assert policy_.fingerprint != Policy().fingerprint
    assert policy_ != policy(block=["shell"])
    assert policy_.advised({"input": 0.3}).tools == policy_.tools


@given(RULES)
def test_rules_are_what_they_were_after_a_file(tools: dict[str, Any]) -> None:
    """Any of them."""
    one = policy(**tools)
    assert Policy.model_validate(yaml.safe_load(one.dump())) == one


def test_the_json_schema_describes_the_rules() -> None:
    """Editors complete and check policy files by it."""
    definitions = Policy.model_json_schema()["$defs"]
    assert definitions["ToolPolicy"]["properties"].keys() == ToolPolicy.model_fields.keys()
    assert all(
        definitions[name]["additionalProperties"] is False for name in ("ToolPolicy", "Constraint", "Flow", "Budget")
    )


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"bloc": ["x"]}, "unknown key 'tools.bloc': did you mean 'block'?"),
        ({"unlisted": "blok"}, "tools.unlisted: unknown 'blok': did you mean 'block'?"),
        ({"block": "shell"}, "tools.block: input should be a valid list"),
        ({"block": [""]}, "tools.block.0: "),
        (
            {"arguments": {"pay": {"amount": {"maks": 7}}}},
            "unknown key 'tools.arguments.pay.amount.maks': did you mean 'max'?",
        ),
        (
            {"arguments": {"pay": {"amount": {"action": "blok"}}}},
            "tools.arguments.pay.amount.action: unknown 'blok': did you mean 'block'?",
        ),
        ({"arguments": {"pay": {"x": {"pattern": "("}}}}, "tools.arguments.pay.x.pattern: not a regular expression: "),
        (
            {"arguments": {"pay": {"x": {"domains": ["*.a.com"]}}}},
            "x.domains: '*.a.com': write 'a.com', its",
        ),
        ({"arguments": {"pay": {"x": {"domains": ["https://a.com"]}}}}, "x.domains: 'https://a.com' is no host name"),
        ({"arguments": {"pay": {"x": {"domains": ["faß.de"]}}}}, "x.domains: 'faß.de' is no host name"),
        ({"arguments": {"pay": {"x": {"paths": ["/srv/../etc"]}}}}, "x.paths: '/srv/../etc' is no plain POSIX path"),
        ({"arguments": {"pay": {"x": {"paths": ["~"]}}}}, "x.paths: '~' is no plain POSIX path"),
        ({"arguments": {"pay": {"x": {"min": 2, "max": 1}}}}, "tools.arguments.pay.x: min is greater than max"),
        ({"arguments": {"pay": {"x": {"max": float("nan")}}}}, "tools.arguments.pay.x.max: a limit is a finite number"),
        ({"arguments": {"pay": {"x": {"max": True}}}}, "tools.arguments.pay.x.max: "),
        ({"arguments": {"pay": {"x": {"optional": "yes"}}}}, "tools.arguments.pay.x.optional: "),
        ({"flows": [{"tools": ["x"], "injektion": 0.5}]}, "'tools.flows.0.injektion': did you mean 'injection'?"),
        ({"flows": [{"tools": ["x"], "injection": 1.5}]}, "tools.flows.0.injection is 1.5; it lies in 0 to 1"),
        (
            {"flows": [{"tools": ["x"], "injection": 1, "after": ["tool"]}]},
            "tools.flows.0.after.0: unknown 'tool': ",
        ),
        ({"flows": [{"tools": [], "injection": 0.5}]}, "tools.flows.0.tools: "),
        ({"budgets": [{"tools": ["x"], "call": 1}]}, "unknown key 'tools.budgets.0.call': did you mean 'calls'?"),
        ({"budgets": [{"tools": ["x"], "calls": 0}]}, "tools.budgets.0.calls: input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(tools: dict[str, Any], message: str) -> None:
    """And with the right one where there is one."""
    with pytest.raises(PolicyError, match=re.escape(message)):
        Policy.model_validate({"tools": tools})


def test_every_fault_of_the_rules_is_told_at_once() -> None:
    """With those of the rest; also where an argument is called as a part of a limit is."""
    rules = {"arguments": {"at": {"steps": {"maks": 7}}}}
    with pytest.raises(PolicyError, match=r"treshold.*'tools\.arguments\.at\.steps\.maks'|maks.*treshold"):
        Policy.model_validate({"treshold": 0.5, "tools": rules})


def test_rules_can_be_asked_without_a_guard() -> None:
    """What needs no scores."""
    rules = ToolRules(ToolPolicy(block=["shell"]))
    for said, broken in ((call("shell"), ["tool:shell"]), ("shell", [])):
        conversation = Conversation.of(said)
        assert [v.rule for v in rules.violations(conversation, rules.before(conversation, {}))] == broken
