"""Holding a stream back: nothing unjudged goes out, nothing is lost, and the cost stays linear."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardmw.stream import CARRY, SENTENCE, STEP, Hold, Piece

# Sentences, scripts without spaces, code, half surrogate pairs: whatever a model may write.
texts = st.one_of(
    st.text(max_size=2_000),
    st.text(alphabet="ab .!?\n", max_size=3_000),
    st.lists(st.sampled_from(["Yes. ", "a word ", "3.14", "\n", "。", "x" * 90, "EVIL ", "👩‍👩‍👧 "]), max_size=200).map(
        "".join
    ),
)


def chopped(draw: st.DrawFn, text: str) -> list[str]:
    """The text in pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=60)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def chunked(draw: st.DrawFn) -> tuple[str, list[str], list[str]]:
    """A text, and two ways of chopping it."""
    text = draw(texts)
    return text, chopped(draw, text), chopped(draw, text)


@dataclass
class Watched:
    """Runs one text through a Hold, and notes what a bad word or a leak would show."""

    hold: Hold[str, str] = field(default_factory=Hold)
    bad: str = "EVIL"
    pieces: list[str] = field(default_factory=list)
    out: str = ""
    worst: int = 0
    """The most characters that were out before they had passed."""

    def run(self, chunks: list[str]) -> Watched:
        """Feed, judge and release, chunk by chunk."""
        passed = 0
        asked = 0
        for chunk in [*chunks, None]:
            if chunk is None:
                self.hold.end()
            else:
                self.hold.feed(chunk, {"text": chunk})
            answers = []
            for piece in self.hold.due():
                self.pieces.append(piece.text)
                asked += len(piece.text) - min(asked, CARRY)
                answers.append(self.bad not in piece.text)
                if all(answers):
                    passed = asked
            self.hold.take(answers)
            for item in self.hold.released():
                self.out += item
                self.worst = max(self.worst, len(self.out) - passed)
        return self


def without_carry(pieces: list[str]) -> str:
    """What was judged, each character once."""
    judged = ""
    for piece in pieces:
        carried = min(len(judged), CARRY)
        assert judged.endswith(piece[:carried])
        judged += piece[carried:]
    return judged


@given(chunked())
def test_a_safe_text_comes_out_as_it_went_in(drawn: tuple[str, list[str], list[str]]) -> None:
    """Every character is released, in order, and each was judged."""
    text, chunks, _ = drawn
    run = Watched(bad="\0no such word\0").run(chunks)
    assert run.out == text
    assert without_carry(run.pieces) == text
    assert not run.hold.blocked


@given(chunked(), st.integers(0, 300))
def test_no_more_than_the_leak_is_out_unjudged(drawn: tuple[str, list[str], list[str]], leak: int) -> None:
    """At no time do the released characters outnumber those that passed by more than the leak."""
    _, chunks, _ = drawn
    assert Watched().run(chunks).worst <= 0
    assert Watched(Hold(leak=leak)).run(chunks).worst <= leak


@given(chunked())
def test_the_same_text_is_judged_the_same_way_however_it_is_chopped(drawn: tuple[str, list[str], list[str]]) -> None:
    """The pieces, and how far a stream of single characters comes before a block, depend on the text alone."""
    _, one, other = drawn
    first, second = Watched(bad="\0").run(one), Watched(bad="\0").run(other)
    assert first.pieces == second.pieces
    by_character = list("".join(one))
    stopped, stopped_too = Watched().run(by_character), Watched().run(list("".join(other)))
    assert stopped.out == stopped_too.out
    assert stopped.hold.blocked == ("EVIL" in "".join(one))
    # Larger chunks only hold back more: a chunk goes out whole or not at all.
    assert stopped.out.startswith(Watched().run(one).out)


@given(chunked())
def test_the_cost_is_linear(drawn: tuple[str, list[str], list[str]]) -> None:
    """At most three times the text is judged (twice and one carried text, if it is long), in pieces of bounded size."""
    text, chunks, _ = drawn
    pieces = Watched(bad="\0").run(chunks).pieces
    judged = sum(map(len, pieces))
    assert judged <= 3 * len(text)
    assert judged <= 2 * len(text) + CARRY
    assert all(len(piece) <= CARRY + STEP + SENTENCE for piece in pieces)


def test_the_property_tests_notice_a_hold_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold that lets everything go is caught by the same watch."""
    monkeypatch.setattr(Hold, "_may_go", lambda *_: True)
    assert Watched().run(["one two ", "three EVIL "]).worst > 0


def test_the_first_sentence_is_due_at_once() -> None:
    """As soon as it is complete, however short, and not before."""
    hold: Hold[str, str] = Hold()
    hold.feed("It is 3.14", {"text": "It is 3.14"})
    assert hold.due() == []
    hold.feed(". ", {"text": ". "})
    assert hold.due() == [Piece("text", "It is 3.14. ")]


@pytest.mark.parametrize("end", ["! ", "?\n", '." ', "…\t", "。", "！", "\n"])
def test_sentences_end_in_many_ways(end: str) -> None:
    """Latin stops with a space after them, full-width ones without, and lines."""
    hold: Hold[int, int] = Hold()
    hold.feed(0, {0: f"Good morning{end}And"})
    assert [piece.text for piece in hold.due()] == [f"Good morning{end}"]


def test_later_pieces_are_longer_and_carry_what_came_before() -> None:
    """Judging sentence by sentence to the end would cost a model call each."""
    sentence = "A sentence of thirty letters. "
    pieces = Watched(bad="\0").run([sentence] * 100).pieces
    assert pieces[0] == sentence
    assert pieces[1].startswith(sentence)
    assert len(pieces) <= 12
    assert all(piece.endswith(". ") for piece in pieces)


def test_endless_sentences_are_cut_at_a_space_or_anywhere() -> None:
    """A model that never ends a sentence is not held back for ever."""
    words = Watched(bad="\0").run(["word "] * 300)
    assert len(words.pieces) > 2
    assert all(piece.endswith(" ") for piece in words.pieces)
    assert len(Watched(bad="\0").run(["x"] * 3_000).pieces) > 2


def test_a_word_across_two_pieces_is_seen_whole() -> None:
    """The carried text and the new make it one again."""
    run = Watched(bad="EVIL").run([*("x" * 200), "E", "V", "I", "L", *("x" * 900)])
    assert run.hold.blocked


def test_what_passed_before_a_block_still_goes_out() -> None:
    """And nothing after it, not even an item without text."""
    hold: Hold[str, str] = Hold()
    hold.feed("safe", {"text": "Safe. "})
    hold.feed("empty", {})
    hold.feed("bad", {"text": "x" * 200 + " EVIL. "})
    hold.feed("usage", {})
    hold.end()
    hold.take(["EVIL" not in piece.text for piece in hold.due()])
    assert list(hold.released()) == ["safe", "empty"]
    hold.feed("more", {"text": "More. "})
    assert hold.due() == []
    assert list(hold.released()) == []
    assert hold.blocked


def test_nothing_after_a_block_goes_out_though_it_passed() -> None:
    """A later piece of the same text may be harmless by itself."""
    hold: Hold[str, str] = Hold()
    for item in ("One. ", "x" * 99 + ". ", "y" * 200 + ". "):
        hold.feed(item, {"text": item})
    assert len(hold.due()) == 3
    hold.take([True, False, True])
    assert list(hold.released()) == ["One. "]


def test_leaking_ends_with_a_block() -> None:
    """The leak is for text that nobody has judged yet, not for text that did not pass."""
    hold: Hold[str, str] = Hold(leak=1_000)
    hold.feed("bad", {"text": "EVIL. "})
    hold.take([False] * len(hold.due()))
    hold.feed("more", {"text": "more"})
    assert list(hold.released()) == []


def test_the_leak_counts_over_all_channels() -> None:
    """Two channels do not leak twice."""
    hold: Hold[str, str] = Hold(leak=4)
    hold.feed("a", {"one": "abc"})
    hold.feed("b", {"two": "xyz"})
    assert list(hold.released()) == ["a"]


def test_items_without_text_keep_their_place() -> None:
    """They wait for the text before them, and go at once where there is none."""
    hold: Hold[str, str] = Hold()
    hold.feed("start", {})
    assert list(hold.released()) == ["start"]
    hold.feed("text", {"text": "No end yet"})
    hold.feed("usage", {"text": ""})
    assert list(hold.released()) == []
    hold.end()
    hold.take([True] * len(hold.due()))
    assert list(hold.released()) == ["text", "usage"]


def test_whole_channels_are_judged_at_the_end_and_never_leak() -> None:
    """Half a tool call means nothing."""
    hold: Hold[str, str] = Hold(leak=1_000)
    hold.feed("half", {"call": 'shell {"cmd": "rm. '}, whole=["call"])
    hold.feed("text", {"text": "Done. "})
    assert hold.due() == [Piece("text", "Done. ")]
    hold.take([True])
    assert list(hold.released()) == []
    hold.feed("rest", {"call": 'Then. "}'}, whole=["call"])
    hold.end()
    assert hold.due() == [Piece("call", 'shell {"cmd": "rm. Then. "}')]
    hold.take([True])
    assert list(hold.released()) == ["half", "text", "rest"]


def test_a_whole_channel_may_turn_out_to_be_a_stream() -> None:
    """Then it is cut like any other, from its beginning."""
    hold: Hold[int, str] = Hold()
    hold.feed(1, {"text": "One. "}, whole=["text"])
    assert hold.due() == []
    hold.feed(2, {"text": "Two"})
    assert hold.due() == [Piece("text", "One. ")]


def test_a_settled_channel_is_due_as_it_is() -> None:
    """Others need not wait for a text that is complete."""
    hold: Hold[int, str] = Hold()
    hold.feed(1, {"title": "No full stop"}, whole=["title"])
    hold.feed(2, {"text": "Next"})
    hold.settle("title")
    assert hold.due() == [Piece("title", "No full stop")]
    hold.take([True])
    assert list(hold.released()) == [1]


def test_a_silent_channel_does_not_hold_up_the_others() -> None:
    """One of two models answers in short, without a space after its full stop."""
    hold: Hold[int, str] = Hold()
    hold.feed(0, {"short": "Yes."})
    out: list[int] = []
    for at in range(1, 100):
        hold.feed(at, {"long": "A sentence of some length. "})
        hold.take([True] * len(hold.due()))
        out += hold.released()
    assert out[0] == 0
    assert len(out) > 50


def test_an_answer_for_each_piece_or_none_counts() -> None:
    """A short answer must not pass for a safe one."""
    hold: Hold[int, str] = Hold()
    hold.feed(1, {"text": "One. "})
    assert len(hold.due()) == 1
    with pytest.raises(ValueError, match=re.escape("zip()")):
        hold.take([])
    assert list(hold.released()) == []


def test_a_piece_is_given_once() -> None:
    """Asking again does not judge twice, nor release anything."""
    hold: Hold[int, str] = Hold()
    hold.feed(1, {"text": "One. "})
    assert len(hold.due()) == 1
    assert hold.due() == []
    assert list(hold.released()) == []
    hold.take([True])
    assert list(hold.released()) == [1]
