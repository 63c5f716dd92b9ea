"""The recipe, from rows to an artefact that loads, in miniature."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import Guard, load
from guardmw.cli import main
from guardmw.errors import GuardmwError
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


def recipe(folder: Path, pool: Path, encoder: Path, **more: Any) -> Path:
    """A file with the settings of a run in miniature."""
    # Few steps find the word; the others, past the best AUPRC there is, make it certain.
    training = {"encoder": str(encoder), "epochs": 8, "batch_tokens": 1024, "learning_rate": 0.003, "patience": 99}
    settings = {
        "name": "tiny",
        "threads": 1,
        "contrast": False,
        "ingest": {"sources": [str(pool)]},
        "filter": {"duplicates": None},
        "train": training | more.pop("train", {}),
        "teachers": {name: training | teacher for name, teacher in more.pop("teachers", {}).items()},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings | more), encoding="utf-8")
    return path


def train(path: Path, out: Path, *more: str) -> int:
    """Run the command as a user does."""
    return main(["train", "tinysafe", str(path), "--out", str(out), *more])


def test_a_trained_artefact_judges_and_says_where_it_comes_from(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """It learns its word, in int8, and its card has recipe, data, licences and metrics; then it is not made again."""
    out = tmp_path / "run"
    path = recipe(tmp_path, pool, encoder)
    assert train(path, out, "--bench", str(pool)) == 0
    guard = Guard(load(f"onnx:{out / 'artefact'}"))
    assert guard.screen("bread evil water").blocked
    assert guard.screen("bread salt water").action == "allow"
    long = guard.screen("bread salt water oven " * 400 + "evil evil " + "bread salt water oven " * 400)
    assert long.blocked
    assert long.coverage.windows > 1
    card = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))
    assert card["recipe"]["train"]["epochs"] == 8
    assert str(tmp_path) not in json.dumps(card)
    assert card["data"]["rows"]["license"] == "CC0-1.0"
    assert card["metrics"]["bench"]["rows"]["rows"] == len(list(rows.read(pool)))
    assert card["metrics"]["int8"]["agreement"] > 0.95
    assert card["thresholds"].keys() == {"injection", "input", "output", "tool_call", "tool_result", "document"}

    graph = (out / "artefact" / "model.onnx").read_bytes()
    assert b"/guardmw/" not in graph
    assert b"site-packages" not in graph
    page = (out / "artefact" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "CC0-1.0" in page
    assert "| input |" in page

    before = (out / "train.log").read_text(encoding="utf-8")
    assert train(path, out) == 0
    after = (out / "train.log").read_text(encoding="utf-8")
    assert 0 < before.count("held-out auprc") == after.count("held-out auprc")


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
    path = recipe(tmp_path, pool, encoder)
    assert train(path, tmp_path / "killed") == 130
    monkeypatch.undo()
    assert train(path, tmp_path / "killed") == 0
    assert train(path, tmp_path / "whole") == 0
    cards = [json.loads((tmp_path / run / "artefact" / "card.json").read_text()) for run in ("killed", "whole")]
    assert cards[0]["training"]["step"] == cards[1]["training"]["step"]
    assert cards[0]["training"]["auprc"] == pytest.approx(cards[1]["training"]["auprc"], abs=0.05)


def test_each_stage_leaves_a_file_and_the_last_one_can_be_named(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """Rows and a report, that one can open before any training."""
    out = tmp_path / "run"
    path = recipe(tmp_path, pool, encoder, contrast=True)
    assert train(path, out, "--until", "filter") == 0
    assert {folder.name for folder in out.iterdir()} == {"train.log", "ingest", "synthesise", "reread", "filter"}
    made = ("ingest", "synthesise", "filter")
    ingested, joined, kept = (list(rows.read(out / name / "rows.jsonl.gz")) for name in made)
    assert ingested == list(rows.read(pool))
    assert {row.source for row in joined} > {"contrast_triggers", "contrast_answers"}
    report = json.loads((out / "synthesise" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"] == len(joined) == report["hand_written"] + len(ingested)
    assert 0 < len(kept) <= len(joined)


def test_a_student_learns_from_teachers_with_fewer_layers(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """It starts from some of them, mixed, and comes out smaller."""
    path = recipe(
        tmp_path,
        pool,
        encoder,
        teachers={"early": {"epochs": 1}, "late": {"start": "early", "learns": True, "teaches": False}},
        train={
            "start": {"early": 0.25, "late": 0.75},
            "layers": [1],
            "epochs": 1,
            "distillation": 1.0,
            "ema": 0.9,
            "fgm": 0.1,
        },
    )
    out = tmp_path / "run"
    assert train(path, out) == 0
    assert Guard(load(f"onnx:{out / 'artefact'}")).screen("bread evil water").blocked
    card = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))
    assert card["recipe"]["teachers"]["late"]["start"] == "early"
    assert "layer.0." in " ".join(torch_names(out / "train" / "best.pt"))
    assert "layer.1." not in " ".join(torch_names(out / "train" / "best.pt"))


def torch_names(path: Path) -> list[str]:
    """Of the weights in a file."""
    import torch

    return list(torch.load(path, weights_only=True))


def test_every_setting_of_the_presets_runs(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """Smoothed labels, asymmetric loss, many dropout masks, the first token's state, batches by rows."""
    settings = {"pooling": "cls", "dropout_samples": 3, "batch_rows": 64, "label_smoothing": 0.05, "schedule": "linear"}
    settings |= {"category_loss": "asymmetric", "watch": "recall", "epochs": 1, "injection_weight": 0}
    assert train(recipe(tmp_path, pool, encoder, train=settings), tmp_path / "run", "--until", "train") == 0


@pytest.mark.parametrize("preset", ["distilled", "guardmw", "tinysafe-1", "tinysafe-2"])
def test_presets_are_valid_once_rows_are_named(preset: str) -> None:
    """Rows and encoder are the user's to name."""
    from guardmw.train.tinysafe.recipe import presets, read

    assert preset in presets()
    assert read(preset, rows=["rows.jsonl"], encoder="mine").train.encoder == "mine"


def test_a_preset_without_rows_says_how_to_name_them() -> None:
    """None can come with rows of its own."""
    from guardmw.train.tinysafe.recipe import read

    with pytest.raises(GuardmwError, match="--rows"):
        read("guardmw")


def test_rows_may_be_named_whatever_a_recipe_ingests(tmp_path: Path) -> None:
    """Nothing of what it says there is left."""
    from guardmw.train.tinysafe.recipe import read

    (tmp_path / "recipe.yaml").write_text("name: mine\ningest: [a.csv]\ntrain: {encoder: mine}\n", encoding="utf-8")
    (source,) = read(str(tmp_path / "recipe.yaml"), rows=["b.csv"]).ingest.sources
    assert source.name == "b.csv"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": {"start": "nobody"}}, "no teacher before it"),
        ({"teachers": {"one": {}}, "train": {"start": {"one": 0.5, "two": 0.5}}}, "no teacher before it"),
        ({"teachers": {"one": {}}, "train": {"start": {"one": 0.5}}}, "do not come to 1"),
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"trian": {}}, "trian"),
        ({"ingest": {"sources": ["missing.jsonl"]}}, "missing.jsonl"),
        ({"train": {"layers": [7]}}, "0 to 1"),
        ({"teachers": {"small": {"layers": [0]}}, "train": {"start": "small"}}, "fewer layers"),
        ({"teachers": {"small": {"layers": [0]}}, "soup": {"small": 0.5}}, "another shape"),
        ({"soup": {"nobody": 0.5}}, "no teacher of that name"),
        ({"teachers": {"one": {}}, "soup": {"one": 1.0}}, "soup"),
        ({"bench": ["missing*.jsonl"]}, "missing*.jsonl"),
        ({"filter": {"contamination": {"against": ["missing.csv"]}}}, "missing.csv"),
        ({"filter": {"folds": {"file": "missing.jsonl"}}}, "missing.jsonl"),
        ({"max_tokens": 600}, "600"),
        ({"overlap": 250}, "leaves no room"),
        ({"about": {"thresholds": "0.5"}}, "about: thresholds"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_any_work(
    settings: dict[str, Any],
    said: str,
    pool: Path,
    encoder: Path,
    tmp_path: Path,
    *,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hours are not spent first."""
    assert train(recipe(tmp_path, pool, encoder, **settings), tmp_path / "run") == 2
    assert said in capsys.readouterr().err


def test_a_labeller_without_its_key_is_named_before_the_writer_is_paid(
    pool: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer's key is there, and would be used."""
    pytest.importorskip("httpx")
    monkeypatch.delenv("OUR_KEY", raising=False)
    silent = {"service": "compatible", "model": "writer", "base_url": "http://127.0.0.1:9/v1", "deadline_s": 61}
    asked = {"service": "openai", "model": "labeller", "key_env": "OUR_KEY"}
    path = recipe(tmp_path, pool, encoder, synthesise={"writer": silent}, relabel={"labeller": asked})
    assert train(path, tmp_path / "run") == 2
    assert "OUR_KEY" in capsys.readouterr().err
    assert not (tmp_path / "run" / "synthesise").exists()


def test_a_folder_of_another_run_is_refused(pool: Path, encoder: Path, tmp_path: Path) -> None:
    """Its checkpoint knows other settings, or other rows."""
    assert train(recipe(tmp_path, pool, encoder, train={"epochs": 1}), tmp_path / "run", "--until", "train") == 0
    assert train(recipe(tmp_path, pool, encoder, train={"epochs": 2}), tmp_path / "run", "--until", "train") == 2
    relabelled = tmp_path / "rows.jsonl"
    relabelled.write_text(pool.read_text(encoding="utf-8").replace('"jailbreak"', "null"), encoding="utf-8")
    assert train(recipe(tmp_path, relabelled, encoder, train={"epochs": 1}), tmp_path / "run", "--until", "train") == 2


def test_rows_that_weigh_nothing_do_not_spoil_a_network() -> None:
    """A batch may hold no other."""
    import torch

    from guardmw.train.tinysafe import fit
    from guardmw.train.tinysafe.data import Example
    from guardmw.train.tinysafe.recipe import Training

    noisy = Example("key", (), (), "input", "noisy", unsafe=True, injection=False, categories=None)
    said = (torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 7), torch.zeros(1, 1))
    loss = fit._loss(said, [(noisy, None)], Training(encoder="tiny", source_weights={"noisy": 0}), [1.0] * 7)  # type: ignore[list-item]
    assert float(loss.detach()) == 0


def test_a_network_points_to_the_window_that_tells() -> None:
    """Of long unsafe rows; by harm or by injection, whichever is the clearer."""
    import torch

    from guardmw.backends._windows import Window
    from guardmw.train.tinysafe import fit
    from guardmw.train.tinysafe.data import Example

    class Seer(torch.nn.Module):
        """Sees harm in token 5 and an injection in token 7."""

        def forward(self, ids: Any, mask: Any, segments: Any) -> Any:
            """As a classifier's."""
            seen = [(ids == token).sum(1, keepdim=True).float() for token in (5, 7)]
            return seen[0], torch.zeros(len(ids), 7), 2 * seen[1]

    def example(*windows: list[int], unsafe: bool = True) -> Example:
        cut = tuple(Window(ids, [0] * len(ids)) for ids in windows)
        return Example("key", cut, (), "tool_result", "pond", unsafe=unsafe, injection=False, categories=None)

    given = [
        example([1, 2], [1, 5, 5, 1], [1]),
        example([1], [5], [7, 1]),
        example([5]),
        example([1], [5], unsafe=False),
    ]
    pointed = fit.pointed(Seer(), given)  # type: ignore[arg-type]
    assert [each.telling for each in pointed] == [1, 2, None, None]
    assert fit.logits(Seer(), pointed, 64)[:, 0].tolist() == [2, 0, 1, 0]  # type: ignore[arg-type]


def test_a_soup_is_the_mean_of_its_branches(tmp_path: Path, pool: Path, encoder: Path) -> None:
    """Weight by weight, each with its share."""
    import torch

    from guardmw.train.tinysafe import run
    from guardmw.train.tinysafe.model import build
    from guardmw.train.tinysafe.recipe import Training

    branch = build(Training(encoder=str(encoder)))
    trunk = build(Training(encoder=str(encoder)))
    (tmp_path / "branch").mkdir()
    torch.save(branch.state_dict(), tmp_path / "branch" / "best.pt")
    expected = {name: 0.75 * weight + 0.25 * branch.state_dict()[name] for name, weight in trunk.state_dict().items()}
    run._mix(trunk, {"branch": 0.25}, tmp_path)
    assert all(torch.allclose(weight, expected[name]) for name, weight in trunk.state_dict().items())
    settings = {"teachers": {"branch": {"encoder": str(encoder), "epochs": 1}}, "soup": {"branch": 0.5}}
    assert train(recipe(tmp_path, pool, encoder, **settings), tmp_path / "run", "--until", "compress") == 0


def test_rarer_categories_weigh_more_by_their_effective_number_of_rows() -> None:
    """After Cui et al. 2019; the mean weight stays 1, and a kind without rows gains nothing."""
    from guardmw.train.tinysafe.data import Example
    from guardmw.train.tinysafe.fit import balanced

    def rows(at: int, count: int) -> list[Example]:
        kinds = tuple(float(i == at) for i in range(7))
        return [
            Example(str(i), (), (), "input", "s", unsafe=True, injection=False, categories=kinds) for i in range(count)
        ]

    common, rare, missing, *_ = weights = balanced([*rows(0, 900), *rows(1, 9)], 0.99)
    assert rare / common == pytest.approx((1 - 0.99**900) / (1 - 0.99**9))
    assert missing < common < rare
    assert sum(weights) == pytest.approx(7)
    assert balanced(rows(0, 9), 0.0) == [1.0] * 7


def test_the_card_names_every_licence_of_a_source() -> None:
    """And counts all of its rows."""
    from guardmw.evaluate.rows import Row, conversation
    from guardmw.train import telling

    one = [Row(conversation("bread"), False, frozenset(), source="mixed", license=name) for name in ("MIT", "", "MIT")]
    assert telling.sources(one) == {"mixed": {"rows": 3, "license": "MIT, unknown"}}


def test_the_card_tells_no_path_and_no_address() -> None:
    """They are of the machine that trained, and its owner's."""
    from guardmw.train.tinysafe import run
    from guardmw.train.tinysafe.recipe import Recipe

    here = {"service": "compatible", "model": "judge", "base_url": "http://secret.example/v1", "key_env": "SECRET"}
    told = run._told(
        Recipe.model_validate(
            {
                "name": "tiny",
                "ingest": {"sources": ["secret.csv"]},
                "filter": {"contamination": {"against": ["secret/*.jsonl"]}, "folds": {"file": "secret.jsonl"}},
                "relabel": {"labeller": here, "second": here},
                "synthesise": {"writer": here},
                "train": {"encoder": "secret/mini"},
                "bench": ["secret.jsonl"],
            }
        )
    )
    assert "secret" not in json.dumps(told).lower()
    assert told["relabel"]["labeller"] == {"service": "compatible", "model": "judge"}
    assert told["train"]["encoder"] == "mini"


def test_encoders_of_other_families_keep_their_dropout_elsewhere(tmp_path: Path) -> None:
    """What BERT calls hidden_dropout_prob is dropout to DistilBERT."""
    from transformers import DistilBertConfig, DistilBertModel

    from guardmw.train.tinysafe.model import build
    from guardmw.train.tinysafe.recipe import Training

    DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)).save_pretrained(
        tmp_path
    )
    config = build(Training(encoder=str(tmp_path), dropout=0.3)).encoder.config
    assert (config.dropout, config.attention_dropout) == (0.3, 0.0)


def test_an_encoder_without_a_tokenizer_is_named(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before hours are spent."""
    assert train(recipe(tmp_path, pool, tmp_path), tmp_path / "run") == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
