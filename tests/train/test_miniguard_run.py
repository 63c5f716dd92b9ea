"""The recipe, from rows to a model folder that answers in its dialect, on models of two layers."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from guardmw import Cascade, Conversation
from guardmw.cli import main
from guardmw.errors import GuardmwError
from guardmw.evaluate import rows
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.torch

WORDS = ("bread", "flour", "water", "salt", "yeast", "oven", "rest", "bake")


def texts() -> list[str]:
    """What a tokenizer is trained on."""
    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard.form import asked

    said = [answer({"user": u, "assistant": a}, ["Violence"]) for u in (False, True) for a in (False, True)]
    return [asked(Conversation.of(" ".join(WORDS))).messages[0].content, f"{' '.join(WORDS)} evil", *said] * 4


def build(writers: Any, folder: Path, kind: str, template: str | None, *, merged: tuple[str, ...] = ()) -> Path:
    """A folder with a random model that knows the words of the task."""
    made: Path = writers.make(folder, writers.tokenizer(texts(), template, merged=merged), kind)
    return made


@pytest.fixture(scope="module", params=["qwen", "llama"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, writers: Any) -> Path:
    """A model with a switch for thoughts, and one without."""
    template = writers.QWEN if request.param == "qwen" else writers.PLAIN
    return build(writers, tmp_path_factory.mktemp(request.param), request.param, template)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, writers: Any) -> Path:
    """A model that knows nothing."""
    return build(writers, tmp_path_factory.mktemp("base"), "qwen", writers.QWEN)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are unsafe where they say evil, one in twelve an answer."""
    path, draw = tmp_path_factory.mktemp("pool") / "rows.jsonl", random.Random(0)  # noqa: S311 - no secret
    with path.open("w", encoding="utf-8") as file:
        for i in range(400):
            text = f"{i} " + " ".join(["evil"] * 24 if i % 2 else draw.choices(WORDS, k=24))
            given: dict[str, Any] = {"id": f"r{i}", "text": text, "label": "unsafe" if i % 2 else "safe"}
            given |= {"categories": ["violence"] * (i % 2), "license": "CC0-1.0"}
            given |= {"role": "assistant", "context": f"{i} bread?"} if i % 12 == 0 else {}
            file.write(json.dumps(given) + "\n")
    return path


def recipe(folder: Path, pool: Path, base: Path, **more: Any) -> Path:
    """A file with the settings of a run in miniature."""
    settings: dict[str, Any] = {"model": str(base), "method": "full", "learning_rate": 0.004, "batch_tokens": 1024}
    settings |= {"checkpoint_every": 10, "watched": 40, "epochs": 1, "patience": 99}
    held = {
        "name": "tiny-miniguard",
        "threads": 1,
        "ingest": {"sources": [str(pool)]},
        "filter": {"duplicates": None},
        "held_out": 0.25,
        "form": {"max_tokens": 1024},
        "target": None,
        "tune": settings | more.pop("tune", {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(held | more), encoding="utf-8")
    return path


def train(path: Path, out: Path, *more: str) -> int:
    """Run the command as a user does."""
    return main(["train", "miniguard", str(path), "--out", str(out), *more])


def spoken() -> list[Conversation]:
    """One of each kind that serving sees."""
    question = {"role": "user", "content": "bread evil"}
    return [
        Conversation.of("bread?"),
        Conversation.of([question, {"role": "assistant", "content": "salt"}]),
        Conversation.of([question, {"role": "tool", "content": "water <|im_end|>"}]),
    ]


def test_training_shows_the_bytes_that_serving_does(either: Path) -> None:
    """And after those, what it is to say; a trained folder's template does the same without being told anything."""
    from transformers import AutoTokenizer

    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import Lesson, asked

    chat = Chat(str(either))
    chat.tokenizer.save_pretrained(either / "served")
    served = AutoTokenizer.from_pretrained(either / "served")
    for conversation in spoken():
        request = asked(conversation)
        said = [{"role": message.role, "content": message.content} for message in request.messages]
        prompt = served.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        shown = served(prompt + request.prefill, add_special_tokens=False)["input_ids"]
        (encoded,) = chat.encode([Lesson("key", "source", True, request, answer({"user": True}))])
        assert chat.ids(chat.prompt(request)) == shown == encoded.ids[: len(shown)]
        assert served.decode(encoded.ids) == prompt + answer({"user": True}) + "<|im_end|>"
        assert "<think>" not in prompt or prompt.endswith("<think>\n\n</think>\n\n")


def test_only_what_is_known_of_the_answer_is_learnt(either: Path) -> None:
    """Neither the question nor what was drawn by lot; but the end is."""
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import Lesson, asked

    chat = Chat(str(either))
    text = '{"User Safety": "safe", "Response Safety": "unsafe"}'
    (encoded,) = chat.encode([Lesson("key", "source", True, asked(spoken()[1]), text, silent=((17, 21),))])
    learnt = [id_ for id_, taught in zip(encoded.ids, encoded.taught, strict=True) if taught]
    assert chat.tokenizer.decode(learnt) == '{"User Safety": "", "Response Safety": "unsafe"}<|im_end|>'
    assert chat.tokenizer.decode(encoded.ids[-encoded.answer :]) == f"{text}<|im_end|>"


def test_the_shared_start_learns_as_if_each_row_had_its_own(base: Path, tmp_path: Path) -> None:
    """The same loss and gradients, to rounding, as of rows that are computed one by one and whole."""
    import torch
    from torch.nn.functional import cross_entropy

    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard import tune
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import Lesson, asked
    from guardmw.train.miniguard.recipe import Tune

    chat = Chat(str(base))
    given = [
        tune.Example(*chat.encode([Lesson("key", "source", True, asked(one), answer({"user": True}), silent)]), weight)
        for one, silent, weight in zip(spoken(), (((2, 13),), (), ()), (1.0, 0.5, 1.0), strict=True)
    ]
    settings = Tune(model=str(base), method="full")
    run = tune._Run(tmp_path, given, [], settings, chat, keep=1, seed=0, say=lambda _: None)
    assert len(run._prefix) > 100
    with torch.autocast("cpu", enabled=False):
        run._loss(given).backward()
    shared = {name: weight.grad for name, weight in run._model.named_parameters()}
    run._model.zero_grad(set_to_none=True)
    for one, weight in given:
        logits = run._model(input_ids=torch.tensor([one.ids])).logits[0, :-1]
        labels = torch.tensor([i if taught else -100 for i, taught in zip(one.ids, one.taught, strict=True)])[1:]
        (cross_entropy(logits, labels) * weight).backward()
    for name, weight in run._model.named_parameters():
        assert torch.nn.functional.cosine_similarity(weight.grad.ravel(), shared[name].ravel(), dim=0) > 0.999, name


def test_a_task_counts_by_its_weight_in_a_step_of_its_own_too(base: Path, tmp_path: Path) -> None:
    """Traces are long, so that rows with one come together: there as well they have half of what the others have."""
    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard import tune
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import Lesson, asked
    from guardmw.train.miniguard.recipe import Tune

    chat = Chat(str(base))
    said = [Lesson("key", "source", True, asked(one), answer({"user": True})) for one in spoken()]
    settings = Tune(model=str(base), method="full")

    def began_with(weight: float) -> float:
        given = [tune.Example(one, weight) for one in chat.encode(said)]
        return tune._Run(tmp_path, given, [], settings, chat, keep=1, seed=0, say=lambda _: None)._learn([given])

    assert began_with(0.5) == pytest.approx(began_with(1.0) / 2)


def test_a_trace_is_a_task_of_its_own(either: Path) -> None:
    """It begins otherwise than serving does, so that nothing served begins a thought."""
    from dataclasses import replace

    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import lessons

    chat = Chat(str(either))
    (plain,) = lessons([rows.row({"text": "bread evil", "label": "unsafe", "categories": ["violence"]}, "s")])
    ids = next(chat.encode([replace(plain, trace="It is evil.")])).ids
    text = chat.tokenizer.decode(ids)
    assert text.endswith(
        f"/think<|im_end|>\n<|im_start|>assistant\n<think>\nIt is evil.\n</think>\n\n{plain.answer}<|im_end|>"
    )
    shown = chat.ids(chat.prompt(replace(plain.request, prefill="")))
    assert ids[: len(shown)] != shown


def test_a_template_that_is_quiet_by_itself_thinks_where_a_trace_is_learnt(tmp_path: Path, writers: Any) -> None:
    """One thought, and none that was closed before it; and what is learnt by thousands is what is learnt by one."""
    from guardmw.dialects.nemotron import answer
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.form import Lesson, asked

    quiet = writers.QWEN.replace("enable_thinking is defined and enable_thinking is false", "not enable_thinking")
    chat = Chat(str(build(writers, tmp_path / "quiet", "qwen", quiet)))
    some = [
        Lesson("key", "source", True, asked(Conversation.of("bread " * i)), answer({"user": True}), trace="x" * (i % 2))
        for i in range(1, 1003)
    ]
    found = list(chat.encode(some))
    for at in (0, 1, 999, 1000, 1001):
        assert found[at] == next(chat.encode(some[at : at + 1])), at
        assert chat.tokenizer.decode(found[at].ids).count("<think>") == 1, at


@pytest.mark.parametrize(
    ("template", "merged", "said"),
    [
        (None, (), "chat template"),
        ("QWEN", ('"safe', '"unsafe'), "'safe' and 'unsafe'"),
        ("PLAIN{{ strftime_now('%d') }}", (), "date"),
        ("{% for message in messages %}{{ message.role }}{{ message.text }}{% endfor %}", (), "does not show"),
        ("{{ raise_exception('no') }}", (), "TemplateError"),
    ],
)
def test_a_model_that_could_not_be_served_is_refused_at_once(
    template: str | None,
    merged: tuple[str, ...],
    said: str,
    writers: Any,
    pool: Path,
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a template, with verdicts that no one token tells, with another prompt every day, with no question."""
    spoken = template and template.replace("QWEN", writers.QWEN).replace("PLAIN", writers.PLAIN)
    odd = build(writers, tmp_path / "odd", "llama", spoken, merged=merged)
    assert train(recipe(tmp_path, pool, odd), tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tune": {"method": "lora", "targets": ["no_proj"]}}, "tune.targets"),
        ({"form": {"max_tokens": 5000}}, "5000"),
        ({"form": {"max_tokens": 100}}, "takes"),
        ({"target": {"writer": {"service": "openai", "model": "w", "key_env": "NO_SUCH_KEY"}}}, "NO_SUCH_KEY"),
        ({"bench": ["missing*.jsonl"]}, "missing*.jsonl"),
        ({"reason": {}}, "teacher"),
        ({"quantise": ["FP8_DYNAMIC"]}, "llmcompressor"),
        ({"tune": {"epochs": 0}}, "tune.epochs"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_any_work(
    settings: dict[str, Any],
    said: str,
    pool: Path,
    base: Path,
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours are not spent first."""
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    assert train(recipe(tmp_path, pool, base, **settings), tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_told_of_before_any_work(
    pool: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all checkpoints and models that the recipe keeps; what an earlier run has left there counts."""
    from guardmw.train.miniguard import room

    weights = (base / "model.safetensors").stat().st_size
    path, out = recipe(tmp_path, pool, base, soup={"k": 2}), tmp_path / "run"
    # Two checkpoints and a draft, two states of Adam's, two models of half the size.
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(weights * 9.5)))
    assert train(path, out, "--until", "form") == 0
    assert train(path, out) == 2
    assert "make room" in capsys.readouterr().err
    assert not (out / "tune").exists()
    (out / "left").write_bytes(bytes(weights))
    assert train(path, out, "--until", "soup") == 0


def test_rows_of_one_label_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is learnt from them."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"bread {i},safe\n" for i in range(50)), encoding="utf-8")
    assert train(recipe(tmp_path, path, base), tmp_path / "run") == 2
    assert "training needs both" in capsys.readouterr().err


def test_rows_of_which_one_label_is_too_long_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a teacher is paid for them."""
    from guardmw.train.miniguard.chat import Chat

    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{i} bread,safe\n{i} {'evil ' * 300},unsafe\n" for i in range(60)))
    form = {"max_tokens": Chat(str(base)).least + 60}
    assert train(recipe(tmp_path, path, base, form=form), tmp_path / "run") == 2
    assert f"within form.max_tokens ({form['max_tokens']}) there are 0 unsafe" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tune").exists()


def test_scores_do_not_depend_on_the_batch(base: Path) -> None:
    """Nor on what other questions begin with."""
    from guardmw.train.miniguard.ask import Asked
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.network import loaded

    model = loaded(str(base))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "layers" in name:
            # As it is made, it hardly minds what it reads.
            weight.data.mul_(10)
    asked = Asked("base", Sure(model), Chat(str(base)), 4096)
    some = [Conversation.of(" ".join(WORDS[: i + 1])) for i in range(6)]
    alone = [asked.scores([one])[0] for one in some]
    assert asked.scores(some) == pytest.approx(alone, abs=0.05)
    assert max(alone) - min(alone) > 0.2
    assert asked.unread == 0


class Sure:
    """A model that says nothing but safe or unsafe, as its base would."""

    def __init__(self, model: Any) -> None:
        from guardmw.train.miniguard.chat import Chat

        self._model = model
        chat = Chat(model.config._name_or_path)
        self._words = [chat.ids(word)[0] for word in ("safe", "unsafe")]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def to(self, device: Any) -> Sure:
        """As modules do."""
        self._model.to(device)
        return self

    def __call__(self, **given: Any) -> Any:
        """Its logits, those of the two words far apart, and the others' much lower."""
        found = self._model(**given)
        said = found.logits[..., self._words] * 50
        found.logits -= 200
        found.logits[..., self._words] = said
        return found


def test_what_cannot_be_read_is_as_good_as_unsafe(base: Path) -> None:
    """And is counted, a text in many pieces once: a guard that fails is closed."""
    from guardmw.train.miniguard.ask import Asked
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.network import loaded

    asked = Asked("base", loaded(str(base)), Chat(str(base)), 4096)
    assert asked.scores(spoken()[:2]).tolist() == [1.0, 1.0]
    assert asked.unread == 2
    assert asked.scores([Conversation.of("bread salt water " * 1000)]).tolist() == [1.0]
    assert asked.unread == 3


def test_a_text_longer_than_the_context_is_read_in_pieces(base: Path) -> None:
    """Of which the worst counts."""
    from guardmw.train.miniguard.ask import Asked
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.network import loaded

    asked = Asked("base", Sure(loaded(str(base))), Chat(str(base)), 4096)
    asked.scores([Conversation.of("bread salt water " * 1000)])
    assert asked.unread == 0


def test_a_model_is_made_and_says_where_it_comes_from(
    pool: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns its word, with traces and targeted rows; the table tells each step; a second run makes nothing anew."""
    from guardmw.backends.transformers import GenerativeBackend

    bench = tmp_path / "bench.jsonl"
    bench.write_text(
        "".join(f"{line}\n" for line in pool.read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8"
    )
    (tmp_path / "more").mkdir()
    shutil.copy(bench, tmp_path / "more")
    benches = [str(bench), str(tmp_path / "more" / bench.name)]
    settings = {"reason": {"templated": True, "rows": 20}, "target": {"contrast": 2}, "bench": benches}
    path = recipe(tmp_path, pool, base, tune={"epochs": 4, "checkpoint_every": 30}, **settings)
    out = tmp_path / "run"
    assert train(path, out, "--ablate") == 0
    card = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))
    assert card["metrics"]["held_out"]["macro_f1"] > 0.7
    assert {name: of["rows"] for name, of in card["metrics"]["bench"].items()} == {"bench": 20, "bench (2)": 20}
    # They are the pool's own.
    assert 0 < card["training"]["of_benchmarks"] <= 20
    assert card["training"]["reason"]["traces"] == 20
    assert card["training"]["target"]["rows"] == 4
    assert card["data"]["rows"]["license"] == "CC0-1.0"
    assert str(tmp_path) not in json.dumps(card)
    shown = (out / "artefact" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "templated rationales" in shown
    assert "the figures flatter" in shown
    assert "vllm serve artefact --served-model-name tiny-miniguard" in shown
    assert (out / "artefact" / "policy.yaml").read_text(encoding="utf-8").startswith("stages:")
    table = (out / "ablate" / "ablation.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert lines[:6] == ["step", "---", "base", "+ SFT", "+ think SFT", "+ targeted data"]
    assert "Left out: FP8" in table
    evil, bread = "7 evil" + " evil" * 23, "7 bread" + " salt" * 23
    assert answered(out / "artefact", evil) > 0.5 > answered(out / "artefact", bread)
    # Its card tells how it is asked, where its folder's name does not.
    mine = GenerativeBackend(str(out / "artefact"))
    cascade = Cascade(KeywordBackend({"evil": 0.5, "bread": 0.5}), mine, band=(0.2, 0.8))
    for backend in (mine, cascade):
        found = backend.classify([Conversation.of(text) for text in (evil, bread)])
        assert [one.unsafe for one in found] == pytest.approx(
            [answered(out / "artefact", text) for text in (evil, bread)], abs=0.1
        )
        assert {one.backend for one in found} == {"artefact"}
    assert f"vllm serve {out / 'artefact'} --served-model-name" in capsys.readouterr().err

    before = (out / "train.log").read_text(encoding="utf-8")
    assert train(path, out, "--ablate") == 0
    after = (out / "train.log").read_text(encoding="utf-8").removeprefix(before)
    assert "macro-F1" in before
    assert "held-out macro-F1" not in after
    assert "ablation: " not in after


def answered(folder: Path, text: str) -> float:
    """P(unsafe) by a plain reading of a model folder, as anybody would ask it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from guardmw.train.miniguard.form import asked

    request = asked(Conversation.of(text))
    spoken, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = [{"role": message.role, "content": message.content} for message in request.messages]
    prompt = spoken.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + request.prefill
    with torch.inference_mode():
        logits = model(torch.tensor([spoken(prompt, add_special_tokens=False)["input_ids"]])).logits[0, -1].float()
    words = [spoken(word, add_special_tokens=False)["input_ids"][0] for word in ("safe", "unsafe")]
    return float(torch.softmax(logits[words], dim=0)[1])


def test_a_writer_is_shown_the_errors_of_a_student_on_rows_that_nobody_trains_on(
    pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student comes first, and the model that ships learns from what is written."""
    from dataclasses import replace

    from guardmw.train.miniguard import run

    shown: list[Any] = []

    def write(found: Any, *_: Any, **__: Any) -> Any:
        shown.extend(found)
        made = [replace(one.row, id=f"{one.row.id}-new", source="synthetic_errors") for one in found]
        return made, {"errors": len(found), "written": len(made)}

    monkeypatch.setattr(run.target, "write", write)
    writer = {"service": "compatible", "model": "writer", "base_url": "http://127.0.0.1:9/v1"}
    settings = {"writer": writer, "contrast": 0, "probe": 0.2, "errors": 6}
    path = recipe(tmp_path, pool, base, target=settings, tune={"epochs": 0.1})
    assert train(path, tmp_path / "run", "--until", "tune") == 0
    # A model that knows nothing answers nothing that could be read: false alarms all.
    assert len(shown) == 6
    trained = (tmp_path / "run" / "form" / "report.json").read_text(encoding="utf-8")
    assert json.loads(trained)["train"]["rows"] < 400 * 0.65
    assert (tmp_path / "run" / "tune" / "sft" / "done.json").exists()
    assert (tmp_path / "run" / "tune" / "targeted" / "done.json").exists()
    assert train(path, tmp_path / "run", "--until", "tune") == 0
    assert len(shown) == 6


def test_a_killed_training_goes_on_to_the_same_end(
    pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: with a LoRA and its dropout."""
    import torch

    from guardmw.train.miniguard import network

    path = recipe(tmp_path, pool, base, tune={"method": "lora", "rank": 2, "dropout": 0.3, "checkpoint_every": 5})
    save, saved = network.save, []

    def killed(*args: Any) -> None:
        save(*args)
        saved.append(args)
        # After the first state, in the middle of what comes next.
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(network, "save", killed)
    assert train(path, tmp_path / "killed", "--until", "tune") == 130
    monkeypatch.undo()
    assert train(path, tmp_path / "killed", "--until", "tune") == 0
    assert "resuming at step 5" in (tmp_path / "killed" / "train.log").read_text(encoding="utf-8")
    assert train(path, tmp_path / "whole", "--until", "tune") == 0
    killed_at, whole_at = (tmp_path / run / "tune" / "sft" for run in ("killed", "whole"))
    assert (killed_at / "done.json").read_text() == (whole_at / "done.json").read_text()
    names = sorted(file.name for file in whole_at.glob("step-*.pt"))
    assert names == sorted(file.name for file in killed_at.glob("step-*.pt"))
    for name in names:
        one, other = (torch.load(at / name, weights_only=True) for at in (killed_at, whole_at))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_chance_is_kept_of_where_the_training_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU draws dropout by itself: with the processor's state alone, a training resumed there would end elsewhere."""
    import torch

    from guardmw.train.miniguard import network, tune

    for name, drawn_by in (("cpu", torch.random), ("cuda", torch.cuda), ("mps", torch.mps)):
        monkeypatch.setattr(network, "device", partial(torch.device, name))
        assert tune._dice() is drawn_by


def test_a_checkpoint_that_was_taken_away_or_spoilt_is_named(
    pool: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to do about it."""
    path, out = recipe(tmp_path, pool, base, tune={"epochs": 0.1}), tmp_path / "run"
    assert train(path, out, "--until", "tune") == 0
    (checkpoint,) = (out / "tune" / "sft").glob("step-*.pt")
    for spoil in (partial(checkpoint.write_bytes, b"half"), checkpoint.unlink):
        spoil()
        assert train(path, out) == 2
        said = capsys.readouterr().err
        assert f"{checkpoint} cannot be read" in said
        assert "trained anew" in said
    shutil.rmtree(out / "tune" / "sft")
    assert train(path, out, "--until", "soup") == 0


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file can grow over so many bytes: a write fails in its middle, as on a full disk."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_half_written(
    pool: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a checkpoint nor a model; with room again, the run goes on."""
    path, out = recipe(tmp_path, pool, base), tmp_path / "run"
    assert train(path, out, "--until", "target") == 0
    with little_room(60_000):
        assert train(path, out, "--until", "tune") == 2
    assert "room" in capsys.readouterr().err
    assert [file.name for file in (out / "tune" / "sft").iterdir()] == ["settings.json"]
    assert train(path, out, "--until", "tune") == 0
    with little_room(60_000):
        assert train(path, out) == 2
    assert "room" in capsys.readouterr().err
    assert not (out / "artefact").exists()
    assert not (out / "artefact.part").exists()
    assert train(path, out) == 0
    assert (out / "artefact" / "card.json").exists()


def test_a_folder_of_another_run_is_refused(pool: Path, base: Path, tmp_path: Path) -> None:
    """Its checkpoints know other settings."""
    few = {"epochs": 0.1}
    assert train(recipe(tmp_path, pool, base, tune=few), tmp_path / "run", "--until", "tune") == 0
    more = recipe(tmp_path, pool, base, tune=few | {"learning_rate": 0.1})
    assert train(more, tmp_path / "run", "--until", "tune") == 2


def test_a_soup_is_the_mean_of_whole_models(base: Path, tmp_path: Path) -> None:
    """The mean of two LoRA matrices' products is no product of their means."""
    import torch

    from guardmw.train.miniguard import network
    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.recipe import Tune
    from guardmw.train.miniguard.soup import Pot
    from guardmw.train.miniguard.tune import Checkpoint, _path

    settings = Tune(model=str(base), rank=2, targets=("q_proj",))
    model = network.fitted(settings)
    for step in (1, 2):
        torch.manual_seed(step)
        network.save(_path(tmp_path, step), {name: torch.randn_like(w) for name, w in network.learning(model).items()})
    both = [Checkpoint(0.5, 1), Checkpoint(0.4, 2)]
    pot = Pot(tmp_path, settings, Chat(str(base)), [])
    mixed, one, other = (pot.model(some).state_dict() for some in (both, both[:1], both[1:]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(one[name], other[name])
    assert torch.allclose(mixed[name], (one[name] + other[name]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "values", "taken", "refused"),
    [
        ("uniform", {(1,): 0.8, (1, 2, 3): 0.9}, [1, 2, 3], False),
        ("uniform", {(1,): 0.8, (1, 2, 3): 0.7}, [1], True),
        ("greedy", {(1,): 0.8, (1, 2): 0.7, (1, 3): 0.85}, [1, 3], False),
        ("greedy", {(1,): 0.8, (1, 2): 0.7, (1, 3): 0.7}, [1], True),
    ],
)
def test_a_soup_that_is_worse_is_refused(
    way: Any, values: dict[tuple[int, ...], float], taken: list[int], refused: bool
) -> None:
    """Then the best checkpoint goes alone."""
    from guardmw.train.miniguard.recipe import Soup
    from guardmw.train.miniguard.soup import soup
    from guardmw.train.miniguard.tune import Checkpoint

    pot: Any = SimpleNamespace(model=lambda some: tuple(one.step for one in some), value=values.__getitem__)
    checkpoints = [Checkpoint(1 - step / 10, step) for step in (1, 2, 3, 4)]
    model, told = soup(pot, checkpoints, Soup(k=3, way=way), lambda _: None)
    assert (list(model), told["taken"], told["refused"]) == (taken, taken, refused)  # type: ignore[call-overload]


def test_eight_bits_that_decide_otherwise_are_refused(
    pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for llmcompressor, which leaves one scheme's weights as they are, and spoils the other's."""
    from guardmw.train.miniguard import run

    asked: list[Any] = []

    def compressed(save: Any, folder: str, *, save_compressed: bool) -> None:
        assert save_compressed
        save(folder)

    def oneshot(*, model: Any, recipe: Any) -> None:
        asked.append(recipe)
        model.save_pretrained = partial(compressed, model.save_pretrained)
        if recipe["scheme"] == "W8A8":
            for weight in model.parameters():
                weight.data.zero_()

    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["llmcompressor"], "oneshot", oneshot, raising=False)
    quantization = sys.modules["llmcompressor.modifiers.quantization"]
    monkeypatch.setattr(quantization, "QuantizationModifier", dict, raising=False)
    monkeypatch.setattr(run.soup.Pot, "value", lambda *_: 1.0)
    settings = {"quantise": ["FP8_DYNAMIC", "W8A8"], "tune": {"epochs": 3}}
    out = tmp_path / "run"
    assert train(recipe(tmp_path, pool, base, **settings), out) == 0
    assert asked[0] == {"targets": "Linear", "scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}
    told = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))["metrics"]["quantised"]
    assert told["FP8_DYNAMIC"]["agreement"] == 1
    assert not told["FP8_DYNAMIC"]["refused"]
    assert told["W8A8"]["refused"]
    assert (out / "artefact-fp8" / "tokenizer.json").exists()
    assert not (out / "artefact-int8").exists()
    assert "W8A8" in (out / "artefact" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert json.loads((out / "artefact-fp8" / "card.json").read_text(encoding="utf-8"))["scheme"] == "FP8_DYNAMIC"
    assert "vllm serve artefact-fp8" in (out / "artefact-fp8" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert (out / "artefact-fp8" / "policy.yaml").exists()


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="llmcompressor is not installed")
@pytest.mark.filterwarnings("ignore")
def test_eight_bits_are_loaded_again_and_decide_alike(pool: Path, base: Path, tmp_path: Path) -> None:
    """By llmcompressor itself; a folder that was taken away is made anew, and none stays of a model before."""
    from safetensors import safe_open

    from guardmw.backends.transformers import GenerativeBackend

    settings: dict[str, Any] = {"quantise": ["FP8_DYNAMIC", "W8A8"], "least_agreement": 0.9}
    out, path = tmp_path / "run", recipe(tmp_path, pool, base, **settings, tune={"epochs": 4, "checkpoint_every": 30})
    assert train(path, out) == 0
    told = json.loads((out / "artefact" / "card.json").read_text(encoding="utf-8"))["metrics"]["quantised"]
    evil, bread = (Conversation.of(text) for text in ("7 evil" + " evil" * 23, "7 bread" + " salt" * 23))
    for scheme, folder, kind in (("FP8_DYNAMIC", "artefact-fp8", "F8_E4M3"), ("W8A8", "artefact-int8", "I8")):
        assert told[scheme]["macro_f1_before"] > 0.7
        assert not told[scheme]["refused"]
        with safe_open(out / folder / "model.safetensors", "pt") as held:
            assert held.get_slice("model.layers.0.mlp.up_proj.weight").get_dtype() == kind
        bad, good = GenerativeBackend(str(out / folder)).classify([evil, bread])
        assert bad.unsafe > 0.5 > good.unsafe
    shutil.rmtree(out / "artefact-fp8")
    assert train(path, out, "--until", "quantise") == 0
    assert (out / "artefact-fp8").is_dir()
    shutil.rmtree(out / "artefact")
    assert train(path, out, "--until", "soup") == 0
    assert not (out / "artefact-int8").exists()


def test_a_loss_that_is_no_number_ends_the_training(pool: Path, base: Path, tmp_path: Path) -> None:
    """Hours are not spent on it."""
    from guardmw.train.miniguard import run
    from guardmw.train.miniguard.recipe import read

    spoilt = read(str(recipe(tmp_path, pool, base, tune={"learning_rate": 1e30})))
    with pytest.raises(GuardmwError, match="learning_rate"):
        run.run(spoilt, tmp_path / "run", until="tune")


@pytest.mark.parametrize("preset", ["miniguard", "miniature"])
def test_presets_are_valid_once_rows_are_named(preset: str) -> None:
    """Rows and model are the user's to name."""
    from guardmw.train.miniguard.recipe import presets, read

    assert preset in presets()
    assert read(preset, rows=["rows.jsonl"], model="mine").tune.model == "mine"
    with pytest.raises(GuardmwError, match="--rows"):
        read(preset)


def test_the_card_tells_no_path_and_no_address(tmp_path: Path) -> None:
    """They are of the machine that trained, and its owner's."""
    from guardmw.train.miniguard import run
    from guardmw.train.miniguard.recipe import Recipe

    here = {"service": "compatible", "model": "judge", "base_url": "http://secret.example/v1", "key_env": "SECRET"}
    told = run._told(
        Recipe.model_validate(
            {
                "name": "tiny",
                "ingest": {"sources": ["secret.csv"]},
                "filter": {"contamination": {"against": ["secret/*.jsonl"]}, "folds": {"file": "secret.jsonl"}},
                "reason": {"teacher": here},
                "target": {"writer": here},
                "tune": {"model": "secret/mini"},
                "bench": ["secret.jsonl"],
            }
        )
    )
    assert "secret" not in json.dumps(told).lower()
    assert told["reason"]["teacher"] == {"service": "compatible", "model": "judge"}
