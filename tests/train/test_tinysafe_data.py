"""Rows become examples: split so that nothing held out is known, and shown as serving shows them."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from guardmw import DataError
from guardmw.backends._artefact import Card
from guardmw.backends._windows import Window, Windows
from guardmw.evaluate.rows import Row, read
from guardmw.train import split as splitting
from guardmw.train.tinysafe import data
from guardmw.train.tinysafe.recipe import FORM, Training

if TYPE_CHECKING:
    from pathlib import Path

TRAINING = Training(encoder="tiny", batch_tokens=64, long_share=1)
HELD_OUT = 0.3


def rows(count: int = 200) -> list[dict[str, Any]]:
    """Distinct rows, half of them unsafe."""
    return [
        {"id": f"r{i}", "text": f"{'evil' if i % 2 else 'bread'} number {i}", "label": "unsafe" if i % 2 else "safe"}
        for i in range(count)
    ]


def split(path: Path, given: list[dict[str, Any]]) -> tuple[list[Row], list[Row]]:
    """Both sides of a file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return splitting.split(read(path), HELD_OUT)


def test_sides_do_not_depend_on_the_company(tmp_path: Path) -> None:
    """More data later must not move a row from one side to the other."""
    few = split(tmp_path / "few.jsonl", rows(60))
    many = split(tmp_path / "many.jsonl", rows(200)[::-1])
    for before, after in zip(few, many, strict=True):
        assert {row.id for row in before} <= {row.id for row in after}


def test_a_repeated_text_is_one_row(tmp_path: Path) -> None:
    """Case and spaces make no other text."""
    again = [row | {"id": f"again-{row['id']}", "text": f" {row['text'].upper()}  "} for row in rows()]
    assert sum(map(len, split(tmp_path / "rows.jsonl", rows() + again))) == len(rows())


def test_nothing_held_out_is_known_from_training(tmp_path: Path) -> None:
    """A wrapped copy of a training text, or another answer to its prompt, would measure memory."""
    wrapped = [{**row, "id": f"w-{row['id']}", "origin": row["id"], "text": f"note: {row['text']}"} for row in rows()]
    answers = [
        {**row, "id": f"a-{row['id']}", "role": "assistant", "context": f"About {i // 4}?"}
        for i, row in enumerate(rows())
    ]
    training, held_out = split(tmp_path / "rows.jsonl", rows() + wrapped + answers)
    known = {row.id for row in training} | {row.origin for row in training}
    said = {row.conversation.context[0].text for row in training if row.conversation.context}
    assert held_out
    assert all(row.id not in known and (not row.origin or row.origin not in known) for row in held_out)
    assert all(row.conversation.context[0].text not in said for row in held_out if row.conversation.context)


@pytest.mark.parametrize("label", ["safe", "unsafe"])
def test_rows_of_one_label_are_refused_before_any_work(tmp_path: Path, label: str) -> None:
    """There is nothing to learn from them."""
    with pytest.raises(DataError, match="needs both"):
        split(tmp_path / "rows.jsonl", [row | {"label": label} for row in rows()])


def test_too_few_rows_to_fit_and_to_measure_are_refused_before_any_work(tmp_path: Path) -> None:
    """A threshold cannot be found where no row is safe."""
    given = [row for row in rows(400) if row["label"] == "unsafe"]
    _, held_out = split(tmp_path / "many.jsonl", rows(400))
    alone = next(row for row in rows(400) if row["id"] in {one.id for one in held_out if not one.unsafe})
    trained = next(row for row in rows(400) if row["label"] == "safe" and row["id"] not in {one.id for one in held_out})
    with pytest.raises(DataError, match="a larger held_out"):
        split(tmp_path / "few.jsonl", [*given, alone, trained])


def test_another_label_or_source_is_another_training(tmp_path: Path, tokenizer_json: str) -> None:
    """Though the words are the same."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(6)), encoding="utf-8")
    given = list(read(tmp_path / "rows.jsonl"))
    changes = ({}, {"unsafe": True}, {"source": "other"}, {"attack": "jailbreak"}, {"categories": None})
    names = [data.traced(data.encode([replace(given[0], **more), *given[1:]], windows)) for more in changes]  # type: ignore[arg-type]
    assert len(set(names)) == len(changes)
    assert names[0] == data.traced(data.encode(given, windows))


def test_examples_are_cut_as_serving_cuts_them(tmp_path: Path, tokenizer_json: str) -> None:
    """The bytes that are trained on are the bytes that are judged."""
    windows = Windows(
        Tokenizer.from_str(tokenizer_json),
        Card(name="tiny", max_tokens=24, overlap=4, form=FORM.model_copy(update={"context_tokens": 6})),
    )
    given = [{"text": "bread " * 60, "role": "assistant", "context": "evil?", "label": "safe", "cat_source": "none"}]
    training, held_out = split(tmp_path / "rows.jsonl", rows() + given)
    long = next(row for row in training + held_out if row.conversation.context)
    (example,) = data.encode([long], windows)
    assert list(example.windows) == windows.cut([long.conversation])[0][0]
    assert len(example.windows) > 1
    assert sum(example.bare[0].segments) == 0 < sum(example.windows[0].segments)
    assert example.window(random.Random(0), TRAINING.model_copy(update={"context_dropout": 1.0})) in example.bare  # noqa: S311 - a draw, not a secret


def test_an_epoch_shows_every_row_once_in_bounded_batches(tmp_path: Path, tokenizer_json: str) -> None:
    """In an order that seed and epoch decide."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    training, _ = split(tmp_path / "rows.jsonl", rows())
    examples = data.encode(training, windows)
    shown = list(data.batches(examples, TRAINING, 0, seed=0))
    assert sorted(id(example) for batch in shown for example, _ in batch) == sorted(map(id, examples))
    assert all(len(batch) * max(len(w.ids) for _, w in batch) <= TRAINING.batch_tokens for batch in shown)
    assert shown == list(data.batches(examples, TRAINING, 0, seed=0))
    assert shown != list(data.batches(examples, TRAINING, 1, seed=0))


def test_a_shortened_window_keeps_its_context_and_its_end() -> None:
    """Only the text on trial loses its tail."""
    window = Window([2, *range(10, 40), 3, 7, 8, 3], [0] * 32 + [1] * 3)
    short = data.shortened(window, 20)
    assert short.ids == [2, *range(10, 25), 3, 7, 8, 3]
    assert short.segments == [0] * 17 + [1] * 3
    assert data.shortened(window, 35) == window


def test_shares_show_a_source_more_or_less_often(tmp_path: Path, tokenizer_json: str) -> None:
    """Twice and a half is twice, and for half of the rows once more."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    given = [row | {"source": "often" if i < 100 else "never"} for i, row in enumerate(rows())]
    training, _ = split(tmp_path / "rows.jsonl", given)
    examples = data.encode(training, windows)
    shares = TRAINING.model_copy(update={"source_shares": {"often": 2.5, "never": 0.0}})
    times = Counter(example.key for batch in data.batches(examples, shares, 0, seed=0) for example, _ in batch)
    assert times.keys() == {example.key for example in examples if example.source == "often"}
    assert set(times.values()) == {2, 3}


def test_batches_go_by_rows_where_asked(tmp_path: Path, tokenizer_json: str) -> None:
    """Whatever their length."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    training, _ = split(tmp_path / "rows.jsonl", rows())
    by_rows = TRAINING.model_copy(update={"batch_rows": 16})
    sizes = [len(batch) for batch in data.batches(data.encode(training, windows), by_rows, 0, seed=0)]
    assert max(sizes) == 16
    assert sum(size < 16 for size in sizes) <= 1


def test_halves_of_the_held_out_rows_share_no_family(tmp_path: Path) -> None:
    """What is fitted on one is measured on the other."""
    answers = [
        {**row, "id": f"a-{row['id']}", "role": "assistant", "context": f"About {i // 4}?"}
        for i, row in enumerate(rows())
    ]
    one, other = splitting.halves(split(tmp_path / "rows.jsonl", answers)[0])
    said = [{row.conversation.context[0].text for row in side} for side in (one, other)]
    assert one
    assert other
    assert said[0].isdisjoint(said[1])


def long_row(tmp_path: Path, tokenizer_json: str, **more: str) -> data.Example:
    """An unsafe text of several windows."""
    windows = Windows(Tokenizer.from_str(tokenizer_json), Card(name="tiny", max_tokens=24, overlap=4))
    path = tmp_path / "long.jsonl"
    given = {"text": "bread " * 60 + "evil", "label": "unsafe", "cat_source": "none", **more}
    path.write_text(json.dumps(given), encoding="utf-8")
    return data.encode(list(read(path)), windows)[0]


def test_a_long_row_is_shown_where_it_tells(tmp_path: Path, tokenizer_json: str) -> None:
    """What is planted at its end makes nothing else of it unsafe."""
    example = long_row(tmp_path, tokenizer_json)
    last = len(example.windows) - 1
    draw = random.Random(0)  # noqa: S311 - a draw, not a secret
    pointed = replace(example, telling=last)
    assert {id(pointed.window(draw, TRAINING)) for _ in range(20)} == {id(example.windows[last])}
    assert len({id(example.window(draw, TRAINING)) for _ in range(200)}) == len(example.windows)


def test_results_of_tools_are_never_shown_in_part(tmp_path: Path, tokenizer_json: str) -> None:
    """An instruction may stand at their end."""
    short = TRAINING.model_copy(update={"long_share": 0.0, "short_tokens": 16})
    draw = random.Random(0)  # noqa: S311 - a draw, not a secret
    said, told = (long_row(tmp_path, tokenizer_json, role=role) for role in ("user", "tool_result"))
    assert max(len(said.window(draw, short).ids) for _ in range(50)) == 16
    assert {id(told.window(draw, short)) for _ in range(200)} == {id(window) for window in told.windows}
