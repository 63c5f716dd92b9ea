"""TinySafe v3 is sent one text, and answers with one object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from guardmw import BackendError
from guardmw.dialects.tinysafe3 import TinySafe3
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Callable

GUARD = TinySafe3()


def test_the_text_on_trial_stands_alone(asked: Callable[..., Any]) -> None:
    """Whoever said it; the system prompt names the kinds of harm, which are ours."""
    (request,) = asked(GUARD, [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    assert [message.role for message in request.messages] == ["system", "user"]
    assert request.messages[1].content == "A"
    assert f"Categories (only if unsafe): {', '.join(CATEGORIES)}\n" in request.messages[0].content


def test_answers_of_the_card_are_read(scored: Callable[..., Any]) -> None:
    """Reasons may say anything."""
    safe = '{"safe":true,"categories":[],"reasoning":"Not unsafe: it is about drives, \\"safe\\":false is no verdict."}'
    assert scored(GUARD, "Q", safe).unsafe == 0.0
    assert scored(GUARD, "Q", '```json\n{"safe":true,"categories":["none"]}\n```').unsafe == 0.0
    scores = scored(GUARD, "Q", '{"safe":false,"categories":["violence","dangerous_info"],"reasoning":"A bomb."}')
    assert scores.unsafe == 1.0
    assert {name for name, score in scores.categories.items() if score} == {"violence", "dangerous_info"}


def test_the_score_is_the_verdicts(scored: Callable[..., Any], replied: Callable[..., Any]) -> None:
    """True or false."""
    reply = replied('{"', "safe", '":', {"true": 0.9, "false": 0.1}, ',"categories":[],"reasoning":"Fine."}')
    assert scored(GUARD, "Q", reply).unsafe == pytest.approx(0.1)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "true",
        "{}",
        '{"safe":"true"}',
        '{"safe":1}',
        '{"safe":true,"safe":false}',
        '{"safe":true}{"safe":false}',
        '{"safe":true,"Safe":false}',
        '{"safe":true,"verdict":{"safe":false}}',
        '{"safe":true,"Categories":["violence"]}',
        '{"safe":true,"categories":["violence"]}',
        '{"safe":false,"categories":"violence"}',
        '{"safe":false,"categories":[["violence"]]}',
        '{"safe":true,"categories":[]',
    ],
)
def test_anything_else_is_an_error(answer: str, scored: Callable[..., Any]) -> None:
    """Contradictions too."""
    with pytest.raises(BackendError):
        scored(GUARD, "Q", answer)
