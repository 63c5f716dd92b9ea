"""A model folder is understood as it is, ours or a published one, and a fault in it is named with its file."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import ArtefactError
from guardmw.backends import _artefact
from guardmw.backends._artefact import CARD, Card, Form
from guardmw.conversation import STAGES
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from pathlib import Path


def folder_with(folder: Path, *names: str, **contents: object) -> Path:
    """A folder with empty files of these names, and JSON files of these contents."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that lacks nothing but a card."""
    return folder_with(tmp_path / "model", "model.onnx", "tokenizer.json")


def test_our_card_says_everything(folder: Path) -> None:
    """What a backend needs, and whatever else its recipe wrote down."""
    card = {
        "name": "ours",
        "labels": list(CATEGORIES),
        "max_tokens": 256,
        "overlap": 32,
        "form": {"prefixes": {"output": "assistant:"}, "context_tokens": 64, "context_stages": ["output"]},
        "temperature": {"input": 1.5},
        "thresholds": {"input": 0.4, "injection": 0.6},
        "metrics": {"auprc": 0.9},
    }
    read = _artefact.read(folder_with(folder, card=card))
    assert read.graph == folder / "model.onnx"
    assert read.tokenizer == folder / "tokenizer.json"
    assert read.card.form == Form(prefixes={"output": "assistant:"}, context_tokens=64, context_stages=("output",))
    assert read.card.model_dump(mode="json") == card


@pytest.mark.parametrize("graph", ["model_int8.onnx", "onnx/model_int8.onnx", "exported/model_int8.onnx"])
def test_the_graph_made_for_a_cpu_is_preferred(folder: Path, graph: str) -> None:
    """Beside its original, wherever an export leaves it."""
    other = _artefact.read(folder_with(folder, graph)).graph
    assert other == folder / (graph if graph.startswith("model") else "model.onnx")
    (folder / "model.onnx").unlink()
    assert _artefact.read(folder).graph == folder / graph


def test_another_graph_can_be_named(folder: Path) -> None:
    """Where a folder has several, the choice is the caller's."""
    folder_with(folder, "model_int8.onnx")
    assert _artefact.read(folder, graph="model.onnx").graph.name == "model.onnx"
    with pytest.raises(ArtefactError, match=r"holds none of: fp16\.onnx"):
        _artefact.read(folder, graph="fp16.onnx")


def test_tinysafe_1_is_known_by_having_no_card(tmp_path: Path) -> None:
    """Its threshold is in its source, and config.json, if there is one, is the encoder's."""
    folder = folder_with(
        tmp_path, "exported/model.onnx", "exported/model_int8.onnx", "exported/tokenizer/tokenizer.json"
    )
    for _ in range(2):
        read = _artefact.read(folder)
        assert read.graph == folder / "exported/model_int8.onnx"
        assert read.tokenizer == folder / "exported/tokenizer/tokenizer.json"
        assert read.card.labels == CATEGORIES
        assert read.card.max_tokens == 512
        assert read.card.thresholds == dict.fromkeys(STAGES, 0.45)
        folder_with(folder, config={"model_type": "deberta-v2", "hidden_size": 384})


TINYSAFE_2 = {
    "model_path": "model.onnx",
    "model_int8_path": "model_int8.onnx",
    "tokenizer_path": "tokenizer",
    "max_length": 512,
    "binary_threshold": 0.30,
    "category_thresholds": dict.fromkeys(CATEGORIES, 0.5),
    "categories": list(CATEGORIES),
}


@pytest.mark.parametrize("place", ["", "exported/"])
def test_tinysafe_2_states_its_own_threshold(tmp_path: Path, place: str) -> None:
    """In the config.json of its export; another one beside it does not hide it."""
    folder = folder_with(tmp_path, f"{place}model_int8.onnx", f"{place}tokenizer/tokenizer.json")
    if place:
        folder_with(folder, config={"model_type": "deberta-v2"})
    folder_with(folder / place, config=TINYSAFE_2)
    card = _artefact.read(folder).card
    assert card.thresholds == dict.fromkeys(STAGES, 0.30)
    assert (card.labels, card.max_tokens) == (CATEGORIES, 512)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.onnx", r"model holds none of: .*model\.onnx"),
        ("tokenizer.json", r"model holds none of: tokenizer\.json"),
    ],
)
def test_a_missing_file_is_named(folder: Path, missing: str, message: str) -> None:
    """With every name it could have had."""
    (folder / missing).unlink()
    with pytest.raises(ArtefactError, match=message):
        _artefact.read(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """And so is what it should have been."""
    with pytest.raises(ArtefactError, match="nowhere is not a folder; a model is a folder with"):
        _artefact.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("", "cannot be read"),
        ('{"name": ', "cannot be read"),
        ("[]", "holds a list instead of an object"),
        ("{}", "name: Field required"),
        ('{"name": "x", "max_tokens": "long"}', "max_tokens: "),
        ('{"name": "x", "temperature": {"input": 0}}', r"temperature\.input: "),
        ('{"name": "x", "thresholds": {"input": 1.5}}', r"thresholds\.input: "),
        ('{"name": "x", "thresholds": {"imput": 0.5}}', r"thresholds\.imput"),
        ('{"name": "x", "temperature": {"imput": 0.5}}', r"temperature\.imput"),
        ('{"name": "x", "form": {"prefix": {}}}', r"form\.prefix: "),
    ],
)
def test_a_broken_card_is_named(folder: Path, card: str, message: str) -> None:
    """With the place in it, and never as pydantic's own error."""
    (folder / CARD).write_text(card, encoding="utf-8")
    with pytest.raises(ArtefactError, match=rf"card\.json:? {message}"):
        _artefact.read(folder)


def test_a_card_that_is_no_text_is_named(folder: Path) -> None:
    """Cut off, or of another format."""
    (folder / CARD).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError, match=r"card\.json cannot be read"):
        _artefact.read(folder)


@pytest.mark.parametrize(
    "fault",
    [{"binary_threshold": "high"}, {"binary_threshold": 30}, {"max_length": 0}, {"categories": 7}, {"categories": [7]}],
)
def test_a_broken_published_config_is_named(folder: Path, fault: dict[str, Any]) -> None:
    """It is checked like a card."""
    folder_with(folder, config=TINYSAFE_2 | fault)
    with pytest.raises(ArtefactError, match=r"config\.json: "):
        _artefact.read(folder)


def test_a_slow_tokenizer_without_its_library_names_the_line_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting one is the only thing that takes sentencepiece."""
    (folder / "tokenizer.json").unlink()
    folder_with(folder, "tokenizer/spm.model")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(
        ArtefactError, match=r"spm\.model belongs to a slow tokenizer; .* pip install 'guardmw\[tinysafe\]'"
    ):
        _artefact.read(folder)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ('"nemtron"', "unknown dialect 'nemtron': did you mean 'nemotron'"),
        ('""', "unknown dialect ''"),
        ("[]", "dialect is a list instead of a name"),
        ("3", "dialect is a int instead of a name"),
    ],
)
def test_a_dialect_that_is_none_is_named(tmp_path: Path, told: str, message: str) -> None:
    """With the card that tells it, whose model would be asked in another way else."""
    (tmp_path / CARD).write_text(f'{{"name": "x", "dialect": {told}}}', encoding="utf-8")
    with pytest.raises(ArtefactError, match=rf"card\.json: {message}"):
        _artefact.told_dialect(tmp_path)


@pytest.mark.parametrize("card", ['{"name": "x"}', '{"name": "x", "dialect": null}'])
def test_a_card_need_not_tell_a_dialect(tmp_path: Path, card: str) -> None:
    """That of an encoder has none."""
    (tmp_path / CARD).write_text(card, encoding="utf-8")
    assert _artefact.told_dialect(tmp_path) is None


def test_a_card_forgets_nothing() -> None:
    """Keys that are not for guardmw are the recipe's, and stay."""
    assert Card.model_validate({"name": "x", "recipe": {"seed": 7}}).model_dump()["recipe"] == {"seed": 7}
