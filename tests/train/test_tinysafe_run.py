"""The recipe, from rows to an artefact that loads, in miniature."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from guardmw import Guard, GuardmwError, load
from guardmw.cli import main
from guardmw.evaluate import rows

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.torch

WORDS = ("bread", "flour", "water", "salt", "yeast", "oven", "rest", "bake")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a vocabulary of words."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "evil", "user", "assistant", "tool", ":", *letters]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are unsafe where they say evil, and attacks where they say it twice."""
    path = tmp_path_factory.mktemp("pool") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(1500):
            text = f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}" + " evil" * (i % 3)
            row = {"id": f"r{i}", "text": text, "label": "unsafe" if i % 3 else "safe", "license": "CC0-1.0"}
            file.write(json.dumps(row | {"attack": "jailbreak" if i % 3 == 2 else None}) + "\n")
    return path


def train(pool: Path, encoder: Path, out: Path, *more: str) -> int:
    """Run the command as a user does."""
    # Few steps find the word; the others, past the best AUPRC there is, make it certain.
    sizes = ("--epochs", "8", "--batch-tokens", "1024", "--learning-rate", "0.003", "--patience", "99")
    more = ("--threads", "1", *more)
    return main(["train", "tinysafe", str(pool), "--encoder", str(encoder), "--out", str(out), *sizes, *more])


def test_a_trained_artefact_judges_and_says_where_it_comes_from(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """It learns its word, in int8, and its card has recipe, data, licences and metrics; then it is not made again."""
    out = tmp_path / "run"
    assert train(pool, encoder, out, "--bench", str(pool)) == 0
    guard = Guard(load(f"onnx:{out / 'artefact'}"))
    assert guard.screen("bread evil water").blocked
    assert guard.screen("bread salt water").action == "allow"
    long = guard.screen("bread salt water oven " * 400 + "evil evil " + "bread salt water oven " * 400)
    assert long.blocked
    assert long.coverage.windows > 1
    card = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))
    assert card["recipe"]["epochs"] == 8
    assert card["data"]["rows"]["license"] == "CC0-1.0"
    assert card["metrics"]["bench"]["rows"]["rows"] == len(list(rows.read(pool)))
    assert card["metrics"]["int8"]["agreement"] > 0.95
    assert card["thresholds"].keys() == {"injection", "input", "output", "tool_call", "tool_result", "document"}

    assert train(pool, encoder, out) == 0
    assert "resuming at step" in (out / "train.log").read_text(encoding="utf-8")


def test_a_killed_run_goes_on_where_it_was(
    pool: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as one that was not killed."""
    from guardmw.train.tinysafe import fit

    save, saved = fit._save, []

    def killed(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_save", killed)
    assert train(pool, encoder, tmp_path / "killed") == 130
    monkeypatch.undo()
    assert train(pool, encoder, tmp_path / "killed") == 0
    assert train(pool, encoder, tmp_path / "whole") == 0
    cards = [json.loads((tmp_path / run / "artefact" / "card.json").read_text()) for run in ("killed", "whole")]
    assert cards[0]["training"]["step"] == cards[1]["training"]["step"]
    assert cards[0]["training"]["auprc"] == pytest.approx(cards[1]["training"]["auprc"], abs=0.05)


def test_a_folder_of_another_run_is_refused(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """Its checkpoint knows other settings, or other rows."""
    from guardmw.train.tinysafe import run
    from guardmw.train.tinysafe.recipe import Recipe

    (tmp_path / "recipe.json").write_text("{}\n", encoding="utf-8")
    with pytest.raises(GuardmwError, match="other settings or rows"):
        run.run([pool], encoder, tmp_path, Recipe())


def test_an_encoder_without_a_tokenizer_is_named(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before hours are spent."""
    assert train(pool, tmp_path, tmp_path / "run") == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
