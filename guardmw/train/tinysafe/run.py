"""The recipe from labelled rows to a folder that ``guardmw`` loads, stage after stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from guardmw.backends._artefact import Card
from guardmw.backends._windows import Windows
from guardmw.backends.onnx import OnnxBackend
from guardmw.errors import GuardmwError
from guardmw.evaluate import calibrate, page, rows
from guardmw.evaluate.report import evaluate
from guardmw.guard import Guard
from guardmw.train import contrast, split, telling
from guardmw.train.ingest import by_file, check
from guardmw.train.relabel import reach
from guardmw.train.stages import REPORT, SETTINGS, Line, digest, keep_settings, log, made_of
from guardmw.train.synthesise import Synthesise, synthesise
from guardmw.train.tinysafe import card as model_card
from guardmw.train.tinysafe import data, export
from guardmw.train.tinysafe.fit import BEST, fit, logits, pointed
from guardmw.train.tinysafe.model import Classifier, build, keep
from guardmw.train.tinysafe.tokenizer import harden

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from guardmw.evaluate.rows import Row
    from guardmw.train.ingest import FileSource, HubSource
    from guardmw.train.stages import Say
    from guardmw.train.tinysafe.recipe import Recipe, Training

    Taught = Mapping[str, tuple[float, ...]]

# Times belong to a machine, not to a model.
FIGURES = ("rows", "unsafe", "precision", "recall", "f1", "macro_f1", "fpr", "auprc", "auroc", "ece")

LOGITS = "logits.npz"
CALIBRATION = "calibration.html"


def run(recipe: Recipe, out: Path, *, until: str = "card") -> None:
    """Go through STAGES, the last one being ``until``.

    Each leaves what it made in ``out``, with a report; one that is already there, made from the same rows and settings,
    is not made again, and a training that was killed goes on where its last checkpoint was. The artefact lands in
    ``out``/artefact.

    Raises:
        GuardmwError: the rows, an encoder or the folder cannot be used.
    """
    _check(recipe)
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with log(out) as say:
        found = _rows(recipe, out, until, say)
        if until in ("ingest", "synthesise", "reread", "relabel", "filter"):
            return
        training, held_out = split.split(found, recipe.held_out)
        say(f"{len(training)} rows to train on, {len(held_out)} held out")
        taught = _teach(recipe, out / "teachers", training, held_out, say)
        if until == "teach":
            return
        desk = _Desk(recipe, recipe.train, training, held_out, say)
        best = desk.fit(out / "train", {"teachers": digest(taught)}, taught, out / "teachers")
        if recipe.soup:
            _mix(desk.model, recipe.soup, out / "teachers")
        if until == "train":
            return
        say("exporting")
        whole = export.write(out / "artefact", desk.model, desk.tokenizer, desk.card)
        if until == "compress":
            return
        say("calibrating")
        stated = {
            **_calibrated(out / "artefact", whole, held_out, recipe),
            **recipe.about,
            "recipe": _told(recipe),
            "data": telling.sources(training),
            "training": {"rows": len(training), "held_out": len(held_out), "digest": split.digest(training), **best},
        }
        export.complete(out / "artefact", stated)
        if until == "card":
            _introduce(out / "artefact", stated, recipe, say)


def _check(recipe: Recipe) -> None:
    """What cannot be loaded, read or cut is known before hours are spent."""
    for benchmark in (*recipe.filter.contamination.against, *recipe.bench):
        check(benchmark)
    folds = recipe.filter.folds
    if folds and not folds.file.is_file():
        raise GuardmwError(f"filter.folds: there is no file {folds.file}")
    shapes: dict[str, dict[str, Any]] = {}
    for name, training in (*recipe.teachers.items(), ("train", recipe.train)):
        Windows(harden(training.encoder, training.revision), _card(recipe))
        model = build(training)
        positions = _positions(model)
        if positions and recipe.max_tokens > positions:
            raise GuardmwError(f"max_tokens is {recipe.max_tokens}; the encoder {training.encoder} has {positions}")
        shapes[name] = _shapes(model)
        for start in training.starts:
            if shapes[start] != _shapes(build(_whole(training))):
                raise GuardmwError(f"start: the teacher {start} has another encoder, or fewer layers")
    if other := [name for name in recipe.soup if shapes[name] != shapes["train"]]:
        raise GuardmwError(f"soup: {', '.join(other)}: of another shape than the network that ships")


def _card(recipe: Recipe) -> Card:
    return Card(name=recipe.name, max_tokens=recipe.max_tokens, overlap=recipe.overlap, form=recipe.form)


def _positions(model: Classifier) -> int | None:
    """How many tokens the encoder can read; None where it only sees how far apart two are, as DeBERTa does."""
    config = model.encoder.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions if getattr(config, "position_biased_input", True) else None


def _whole(training: Training) -> Training:
    return training.model_copy(update={"layers": ()})


def _shapes(model: Classifier) -> dict[str, Any]:
    return {name: weight.shape for name, weight in model.state_dict().items()}


def _introduce(artefact: Path, stated: dict[str, Any], recipe: Recipe, say: Say) -> None:
    """Measure the artefact, and write the page that tells of it."""
    if recipe.bench:
        say("measuring")
        stated["metrics"]["bench"] = _measured(artefact, recipe.bench)
        export.complete(artefact, stated)
    model_card.write(artefact)
    say(f"done: {artefact}")


def _rows(recipe: Recipe, out: Path, until: str, say: Say) -> list[Row]:
    """The stages that are about rows."""
    written = contrast.rows(recipe.seed) if recipe.contrast else []
    line = Line(out, say, written)
    line.ingest(recipe.ingest)
    if until == "ingest":
        return line.rows
    before = line.rows
    if recipe.relabel and until not in ("synthesise", "reread") and not made_of(out / "relabel" / REPORT):
        reach(recipe.relabel, out / "relabel")
    line.stage(
        "synthesise", recipe.synthesise, lambda folder: _synthesised(recipe.synthesise, before, written, folder, say)
    )
    if until == "synthesise":
        return line.rows
    if recipe.readings:
        line.reread()
    if until == "reread":
        return line.rows
    if recipe.relabel:
        line.relabel(recipe.relabel)
    if until == "relabel":
        return line.rows
    line.filter(recipe.filter)
    return line.rows


def _synthesised(
    settings: Synthesise | None, before: Sequence[Row], written: Sequence[Row], folder: Path, say: Say
) -> tuple[list[Row], dict[str, Any]]:
    """The rows with the hand-written pairs and those a model wrote."""
    told = {"hand_written": len(written)}
    if not settings:
        return [*before, *written], told
    made = synthesise(settings, folder, [*before, *written], say=say)
    return [*before, *written, *made.rows], told | made.report


class _Desk:
    """What one network is trained with: its tokenizer, and the rows as it reads them."""

    def __init__(
        self, recipe: Recipe, training: Training, rows: Sequence[Row], held_out: Sequence[Row], say: Say
    ) -> None:
        self.tokenizer = harden(training.encoder, training.revision)
        self.card = _card(recipe)
        windows = Windows(self.tokenizer, self.card)
        self.examples, self.held_out = (data.encode(some, windows) for some in (rows, held_out))
        self.model = build(training)
        self._recipe, self._training, self._say = recipe, training, say

    def fit(self, folder: Path, made_from: dict[str, Any], taught: Taught, teachers: Path) -> dict[str, float]:
        """Train in a folder, or take what it holds, beginning with what lies in the folders of teachers.

        Raises:
            GuardmwError: the folder is of other settings or rows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        made_from |= {"training": self._training.model_dump(mode="json"), "seed": self._recipe.seed}
        made_from |= {"windows": self.card.model_dump(mode="json", include={"max_tokens", "overlap", "form"})}
        made_from |= {"rows": data.traced(self.examples), "held_out": data.traced(self.held_out)}
        keep_settings(folder / SETTINGS, made_from)
        if self._training.start:
            _begin(self.model, _mixed(self._training.starts, teachers), self._training)
        examples = data.teach(self.examples, taught) if taught else self.examples
        seed = self._recipe.seed
        return fit(self.model, examples, self.held_out, self._training, seed=seed, folder=folder, say=self._say)


def _teach(recipe: Recipe, folder: Path, training: Sequence[Row], held_out: Sequence[Row], say: Say) -> Taught:
    """Train the teachers, one after the other; the mean of their logits, by row."""
    said: list[np.ndarray] = []
    keys = [rows.key(row) for row in training]

    def taught() -> Taught:
        return dict(zip(keys, map(tuple, np.mean(said, axis=0).tolist()), strict=True)) if said else {}

    for name, settings in recipe.teachers.items():
        say(f"teacher {name}")
        mine, made = folder / name, folder / name / LOGITS
        desk = _Desk(recipe, settings, training, held_out, say)
        heard = taught() if settings.learns else {}
        desk.fit(mine, {"teachers": digest(heard)}, heard, folder)
        if not settings.teaches:
            continue
        if not made.exists():
            told = logits(desk.model, pointed(desk.model, desk.examples), settings.short_tokens)
            np.savez(made, logits=told, keys=np.array(keys))
        said.append(np.load(made)["logits"])
    return taught()


def _begin(model: Classifier, state: Mapping[str, torch.Tensor], training: Training) -> None:
    """Load teachers' weights, less the layers that are not kept; that they fit has been looked at."""
    whole = build(_whole(training))
    whole.load_state_dict(state)
    keep(whole, training.layers)
    model.load_state_dict(whole.state_dict())


def _mixed(shares: Mapping[str, float], teachers: Path) -> dict[str, torch.Tensor]:
    """The sum of teachers' weights, each times its share."""
    states = {name: torch.load(teachers / name / BEST, weights_only=True, map_location="cpu") for name in shares}
    names = next(iter(states.values()))
    return {weight: sum(share * states[name][weight] for name, share in shares.items()) for weight in names}


def _mix(model: Classifier, soup: Mapping[str, float], teachers: Path) -> None:
    """Average a network with teachers of its shape, weight by weight."""
    rest = _mixed(soup, teachers)
    own = 1 - sum(soup.values())
    model.load_state_dict({name: own * weight.cpu() + rest[name] for name, weight in model.state_dict().items()})


def _calibrated(artefact: Path, whole: Path, held_out: Sequence[Row], recipe: Recipe) -> dict[str, Any]:
    """Temperatures and thresholds from one half of the held-out rows, and figures from the other."""
    fitting, reporting = split.halves(held_out)
    backend = OnnxBackend(artefact)
    found = calibrate.between(
        recipe.name, calibrate.measure(backend, fitting), calibrate.measure(backend, reporting), recipe.target_fpr
    )
    (artefact.parent / CALIBRATION).write_text(page.calibration(found), encoding="utf-8")
    fitted = {"temperature": found.temperatures, "thresholds": found.thresholds}
    for folder in (artefact, whole):
        export.complete(folder, fitted)
    conversations = [row.conversation for row in reporting]
    before, after = (OnnxBackend(folder).classify(conversations) for folder in (whole, artefact))
    return {
        **fitted,
        "metrics": {
            "held_out": {stage: figures.to_dict() for stage, figures in found.stages.items()},
            "int8": export.parity(before, after, reporting, found.thresholds),
        },
    }


def _measured(artefact: Path, bench: Sequence[FileSource | HubSource]) -> dict[str, Any]:
    """The figures ``guardmw eval`` gives, by file, without their parts."""
    files = {name: found for source in bench for name, found in by_file(source).items()}
    report = evaluate(Guard(OnnxBackend(artefact)), files).to_dict()
    parts = {**report["files"], "all": report["all"]}
    return {name: {key: figures[key] for key in FIGURES} for name, figures in parts.items()}


def _told(recipe: Recipe) -> dict[str, Any]:
    """The settings that are not defaults, without where things lie on this machine."""
    # Where a model answers is no part of what it wrote.
    server = {"base_url", "key_env"}
    places: dict[str, Any] = {
        "about": True,
        "ingest": True,
        "bench": True,
        "filter": {"contamination": {"against"}, "folds": {"file"}},
        "relabel": {"labeller": server, "second": server},
        "synthesise": {"writer": server},
    }
    told = recipe.model_dump(mode="json", exclude_defaults=True, exclude=places)
    for training in (told["train"], *told.get("teachers", {}).values()):
        training["encoder"] = training["encoder"].rstrip("/").rpartition("/")[2]
    return told
