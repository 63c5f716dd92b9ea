"""Rows become examples: split so that nothing held out is known, and shown as serving shows them."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from guardmw import DataError
from guardmw.backends._artefact import Card
from guardmw.backends._windows import Windows
from guardmw.train.tinysafe import data
from guardmw.train.tinysafe.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = Recipe(held_out=0.3, batch_tokens=64)


def rows(count: int = 200) -> list[dict[str, Any]]:
    """Distinct rows, half of them unsafe."""
    return [
        {"id": f"r{i}", "text": f"{'evil' if i % 2 else 'bread'} number {i}", "label": "unsafe" if i % 2 else "safe"}
        for i in range(count)
    ]


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def test_sides_do_not_depend_on_the_company(tmp_path: Path) -> None:
    """More data later must not move a row from one side to the other."""
    few = data.load([write(tmp_path / "few.jsonl", rows(60))], RECIPE)
    many = data.load([write(tmp_path / "many.jsonl", rows(200)[::-1])], RECIPE)
    for before, after in zip(few, many, strict=True):
        assert {row.id for row in before} <= {row.id for row in after}


def test_a_repeated_text_is_one_row(tmp_path: Path) -> None:
    """Case and spaces make no other text."""
    again = [row | {"id": f"again-{row['id']}", "text": f" {row['text'].upper()}  "} for row in rows()]
    path = write(tmp_path / "rows.jsonl", rows() + again)
    assert sum(map(len, data.load([path], RECIPE))) <= len(rows())


def test_nothing_held_out_is_known_from_training(tmp_path: Path) -> None:
    """A wrapped copy of a training text, or another answer to its prompt, would measure memory."""
    wrapped = [{**row, "id": f"w-{row['id']}", "origin": row["id"], "text": f"note: {row['text']}"} for row in rows()]
    answers = [
        {**row, "id": f"a-{row['id']}", "role": "assistant", "context": f"About {i // 4}?"}
        for i, row in enumerate(rows())
    ]
    training, held_out = data.load([write(tmp_path / "rows.jsonl", rows() + wrapped + answers)], RECIPE)
    known = {row.id for row in training} | {row.origin for row in training}
    said = {row.conversation.context[0].text for row in training if row.conversation.context}
    assert held_out
    assert all(row.id not in known and (not row.origin or row.origin not in known) for row in held_out)
    assert all(row.conversation.context[0].text not in said for row in held_out if row.conversation.context)


@pytest.mark.parametrize("label", ["safe", "unsafe"])
def test_rows_of_one_label_are_refused_before_any_work(tmp_path: Path, label: str) -> None:
    """There is nothing to learn from them."""
    path = write(tmp_path / "rows.jsonl", [row | {"label": label} for row in rows()])
    with pytest.raises(DataError, match="needs both"):
        data.load([path], RECIPE)


def test_examples_are_cut_as_serving_cuts_them(tmp_path: Path, tokenizer_json: str) -> None:
    """The bytes that are trained on are the bytes that are judged."""
    windows = Windows(
        Tokenizer.from_str(tokenizer_json),
        Card(name="tiny", max_tokens=24, overlap=4, form=RECIPE.form.model_copy(update={"context_tokens": 6})),
    )
    given = [{"text": "bread " * 60, "role": "assistant", "context": "evil?", "label": "safe", "cat_source": "none"}]
    training, held_out = data.load([write(tmp_path / "rows.jsonl", rows() + given)], RECIPE)
    long = next(row for row in training + held_out if row.conversation.context)
    (example,) = data.encode([long], windows, RECIPE)
    assert list(example.windows) == windows.cut([long.conversation])[0][0]
    assert len(example.windows) > 1
    assert sum(example.bare[0].segments) == 0 < sum(example.windows[0].segments)
    assert example.window(random.Random(0), 1.0) in example.bare  # noqa: S311 - a draw, not a secret


def test_an_epoch_shows_every_row_once_in_bounded_batches(tmp_path: Path, tokenizer_json: str) -> None:
    """In an order that seed and epoch decide."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    training, _ = data.load([write(tmp_path / "rows.jsonl", rows())], RECIPE)
    examples = data.encode(training, windows, RECIPE)
    shown = list(data.batches(examples, RECIPE, 0))
    assert sorted(id(example) for batch in shown for example, _ in batch) == sorted(map(id, examples))
    assert all(len(batch) * max(len(w.ids) for _, w in batch) <= RECIPE.batch_tokens for batch in shown)
    assert shown == list(data.batches(examples, RECIPE, 0))
    assert shown != list(data.batches(examples, RECIPE, 1))
