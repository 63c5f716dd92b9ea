"""The page beside a model's weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardmw.train.miniguard import card

if TYPE_CHECKING:
    from pathlib import Path


def told(**metrics: Any) -> dict[str, Any]:
    """As little as a card holds."""
    return {
        "name": "mine",
        "base": "a base",
        "serve": card.serving("mine", 1024, "my run/artefact"),
        "target_fpr": 0.05,
        "stages": {},
        "metrics": {"held_out": {"rows": 40}, "unread": 0, **metrics},
        "training": {
            "rows": 9,
            "digest": "0",
            "held_out": 40,
            "too_long": 0,
            "of_benchmarks": 0,
            "reason": {},
            "target": {},
            "soup": {"refused": False, "taken": [1], "best": 0.5, "soup": None},
        },
        "data": {},
        "recipe": {},
    }


@pytest.mark.parametrize(("unread", "guard"), [(0, True), (39, True), (40, False)])
def test_a_model_that_says_nothing_readable_is_called_no_guard(unread: int, guard: bool) -> None:
    """Its figures alone might pass for those of a cautious one."""
    page = card.page(told(unread=unread))
    assert f"count as unsafe: {unread}." in page
    assert ("It is no guard" in page) is not guard


@pytest.mark.parametrize("trained", [0, 3])
def test_benchmarks_that_were_trained_on_are_called_so(trained: int) -> None:
    """Nobody else could tell."""
    given = told(bench={"chat": {"rows": 9, "unsafe": 4}})
    given["training"]["of_benchmarks"] = trained
    page = card.page(given)
    assert ("Nothing was trained, chosen or fitted on these" in page) is not bool(trained)
    assert ("3 rows of them, or near to them, were trained on" in page) is bool(trained)


def test_a_step_that_was_left_out_is_named() -> None:
    """Of a recipe whose every step counts."""
    page = card.page(told())
    assert "there was no teacher" in page
    assert "None were made." in page


def test_figures_are_rounded_and_settings_are_not(tmp_path: Path) -> None:
    """A learning rate would read as another one, or as none."""
    given = told(ece=0.123456, intervals={"f1": [0.123456, 0.5]}) | {"recipe": {"tune": {"learning_rate": 0.00002}}}
    card.write(tmp_path, given)
    held = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert held["metrics"]["ece"] == 0.1235
    assert held["metrics"]["intervals"]["f1"] == [0.1235, 0.5]
    assert held["recipe"] == given["recipe"]
    assert json.dumps(given["recipe"], indent=2) in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_card_comes_after_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a card is whole, wherever the making was ended."""
    monkeypatch.setattr(card, "page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        card.write(tmp_path, told())
    assert not (tmp_path / "card.json").exists()
    monkeypatch.undo()
    (tmp_path / "card.json.part").mkdir()
    with pytest.raises(IsADirectoryError):
        card.write(tmp_path, told())
    assert (tmp_path / "MODEL_CARD.md").exists()


def test_the_commands_take_a_folder_of_any_name() -> None:
    """As a shell reads them; the dialect is told where the model's name does not tell it."""
    served, asked, _ = card.serving("mine", 1024, "my run/artefact")
    assert served.startswith("vllm serve 'my run/artefact' --served-model-name mine ")
    assert "'vllm:http://127.0.0.1:8000/v1#mine?dialect=nemotron' --policy 'my run/artefact/policy.yaml'" in asked
    assert "?dialect" not in card.serving("my-miniguard", 1024, "artefact")[1]
