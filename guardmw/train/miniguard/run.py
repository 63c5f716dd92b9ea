"""The recipe from labelled rows to a model folder that vLLM serves, stage after stage."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig

from guardmw.backends._artefact import CARD
from guardmw.errors import DataError, GuardmwError
from guardmw.evaluate import calibrate, page, rows
from guardmw.evaluate.rows import key
from guardmw.train import llm, split, telling
from guardmw.train.contamination import contaminated
from guardmw.train.ingest import both_labels, by_file, check
from guardmw.train.miniguard import ablate, card, form, measure, network, quantise, reason, room, soup, target, tune
from guardmw.train.miniguard.ablate import Step
from guardmw.train.miniguard.ask import Asked
from guardmw.train.miniguard.chat import Chat
from guardmw.train.stages import REPORT, ROWS, Line, digest, log, made_of, read_by

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from guardmw.evaluate.metrics import Floats
    from guardmw.evaluate.rows import Row
    from guardmw.train.miniguard.form import Lesson
    from guardmw.train.miniguard.recipe import Recipe
    from guardmw.train.miniguard.tune import Checkpoint
    from guardmw.train.stages import Say

ARTEFACT = "artefact"
CALIBRATION = "calibration.html"
_BEFORE_TRAINING = ("ingest", "filter", "form", "reason")


def run(recipe: Recipe, out: Path, *, until: str = "card", ablated: bool = False) -> None:
    """Go through the stages, the last one being ``until``.

    Each leaves what it made in ``out``, with a report; one that is already there, made from the same rows and settings,
    is not made again, and a training that was killed goes on where its last checkpoint was. The model lands in
    ``out``/artefact.

    Args:
        recipe: the settings.
        out: where the run lives.
        until: a stage.
        ablated: also train and measure without each of the steps.

    Raises:
        GuardmwError: the rows, the model, a server or the folder cannot be used.
    """
    chat, context = _check(recipe, out, until, ablated=ablated)
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with log(out) as say:
        line = Line(out, say)
        line.ingest(recipe.ingest)
        if until == "ingest":
            return
        line.filter(recipe.filter)
        if until == "filter":
            return
        kitchen = _Kitchen(recipe, out, chat, _sides(line.rows, recipe), say)
        stages: dict[str, Callable[[], None]] = {
            "form": kitchen.form,
            "reason": kitchen.reason,
            "target": lambda: kitchen.target(ablated=ablated),
            "tune": kitchen.tune,
            "soup": kitchen.soup,
            "quantise": kitchen.quantise,
            "ablate": kitchen.ablate if ablated else lambda: None,
            "card": lambda: kitchen.introduce(context),
        }
        for name, stage in stages.items():
            stage()
            if name == until:
                return


def _check(recipe: Recipe, out: Path, until: str, *, ablated: bool) -> tuple[Chat, int]:
    """What cannot be loaded, read, spoken, asked or kept is known before hours are spent; the chat, and its context."""
    for benchmark in (*recipe.filter.contamination.against, *recipe.bench):
        check(benchmark)
    folds = recipe.filter.folds
    if folds and not folds.file.is_file():
        raise GuardmwError(f"filter.folds: there is no file {folds.file}")
    if recipe.quantise and until in ("quantise", "ablate", "card"):
        quantise.check()
    asked = {"reason": recipe.reason and recipe.reason.teacher, "target": recipe.target and recipe.target.writer}
    for stage, model in asked.items():
        if model and until not in _BEFORE_TRAINING and not made_of(out / stage / REPORT):
            llm.usable(model)
    base = recipe.tune.model
    chat = Chat(base, recipe.tune.revision)
    try:
        config = AutoConfig.from_pretrained(base, revision=recipe.tune.revision or "main")
    except (OSError, ValueError) as error:
        raise GuardmwError(f"{base} cannot be loaded: {error}") from None
    context: int = getattr(config, "max_position_embeddings", None) or recipe.form.max_tokens
    if recipe.form.max_tokens > context:
        raise GuardmwError(f"form.max_tokens is {recipe.form.max_tokens}; {base} reads {context}")
    if (least := chat.least) > recipe.form.max_tokens:
        raise GuardmwError(
            f"form.max_tokens is {recipe.form.max_tokens}, and the shortest question with its answer takes {least} of "
            f"{base}'s tokens: raise it, or take a base model that reads more"
        )
    if until not in _BEFORE_TRAINING:
        # That its layers are called what the LoRA's targets are, too.
        room.check(recipe, out, network.fitted(recipe.tune), ablated=ablated)
    return chat, context


class _Sides(NamedTuple):
    """Rows, no family of which is on two sides.

    Attributes:
        probe: in which the student's errors are looked for.
        watched: by which checkpoints, soup and thresholds are chosen.
        reported: on which nothing is.
    """

    training: list[Row]
    probe: list[Row]
    watched: list[Row]
    reported: list[Row]


def _sides(given: Sequence[Row], recipe: Recipe) -> _Sides:
    training, held_out = split.split(given, recipe.held_out)
    probe: list[Row] = []
    if recipe.target and recipe.target.writer:
        # By the digits that held out the others: a wider share takes the next ones.
        training, probe = split.split(training, recipe.held_out + recipe.target.probe)
    watched, reported = split.halves(held_out)
    training = form.drawn(training, recipe.form.rows)
    return _Sides(training, probe, form.drawn(watched, recipe.tune.watched), reported)


class _Kitchen:
    """What is made of the rows, stage after stage; each takes what those before it left."""

    def __init__(self, recipe: Recipe, out: Path, chat: Chat, sides: _Sides, say: Say) -> None:
        self._recipe, self._out, self._chat, self._sides, self._say = recipe, out, chat, sides, say
        self._lessons: list[Lesson] = []
        self._short: set[str] = set()
        self._more: list[Lesson] = []
        self._added: list[Row] = []
        self._told: dict[str, dict[str, Any]] = {"reason": {}, "target": {}, "soup": {}, "quantised": {}}
        self._too_long = self._spoilt = 0
        self._best: tuple[Path, list[Checkpoint]] = (out, [])

    def form(self) -> None:
        """Rows become conversations."""
        sides, most = self._sides, self._recipe.form.max_tokens
        self._lessons = form.lessons(sides.training)
        encoded = self._chat.encode(self._lessons)
        short = [lesson for lesson, one in zip(self._lessons, encoded, strict=True) if len(one.ids) <= most]
        both_labels(short, f"within form.max_tokens ({most}) there are")
        self._short = {lesson.key for lesson in short}

        def make(folder: Path) -> dict[str, Any]:
            held_out = form.lessons([*sides.watched, *sides.reported], sides.training)
            return form.write(folder / form.FILE, {"train": self._lessons, "held_out": held_out})

        self._stage("form", {"rows": [split.digest(side) for side in sides]}, make)
        self._spoilt = self._of_benchmarks(sides.training)
        if self._spoilt:
            self._say(
                f"{self._spoilt} rows to train on are of `bench`, or near to it, and will flatter the figures: name "
                "its files under filter.contamination.against, too"
            )
        self._say(
            f"{len(sides.training)} rows to train on, {len(sides.watched)} to choose by, {len(sides.reported)} kept"
        )

    def reason(self) -> None:
        """A teacher writes why."""
        settings = self._recipe.reason
        if not settings:
            self._say("reason: no teacher, left out")
            return

        # What is too long to be learnt would be paid for in vain.
        given = [row for row in form.drawn(self._sides.training, settings.rows) if key(row) in self._short]

        def make(folder: Path) -> dict[str, Any]:
            return reason.reason(given, settings, folder, self._say)[1]

        # Where a teacher answers is no part of what it says.
        stated = settings.model_dump(mode="json", exclude={"teacher": {"base_url", "key_env"}})
        depends = {"settings": stated, "rows": split.digest(given)}
        self._told["reason"] = self._stage("reason", depends, make)
        traces = reason.read(self._out / "reason")
        self._lessons = [replace(lesson, trace=traces.get(lesson.key, "")) for lesson in self._lessons]

    def target(self, *, ablated: bool) -> None:
        """Rows aimed at the student's errors, which must exist first."""
        settings = self._recipe.target
        if ablated and self._told["reason"]:
            self._tuned("sft", [replace(lesson, trace="") for lesson in self._lessons])
        if not settings:
            return
        writes = settings.writer is not None
        folder, best = self._tuned(self._first, self._lessons) if writes or ablated else (self._out, [])

        def make(mine: Path) -> dict[str, Any]:
            sides, written_here = self._sides, target.pairs(settings.contrast, self._recipe.seed)
            held = [*sides.probe, *sides.watched, *sides.reported]
            by_hand = target.apart(written_here, self._recipe.filter, held)
            found: list[target.Error] = []
            if writes:
                asked = self._asked(network.merged(self._recipe.tune, tune.weights(folder, best[0])))
                scores = asked.scores([row.conversation for row in sides.probe])
                found = target.errors(sides.probe, scores, settings.errors)
            known = [*sides.training, *by_hand, *sides.watched, *sides.reported]
            written, told = target.write(found, settings, self._recipe.filter, known, mine, say=self._say)
            rows.write(mine / ROWS, [*by_hand, *written])
            return told | {"rows": len(by_hand) + len(written), "left_out": len(written_here) - len(by_hand)}

        stated = settings.model_dump(mode="json", exclude={"writer": {"base_url", "key_env"}})
        against = self._recipe.filter
        depends = {
            "settings": stated,
            "rows": [split.digest(side) for side in self._sides],
            "student": [list(one) for one in best],
            "seed": self._recipe.seed,
            "filter": [against.contamination.model_dump(mode="json"), against.seed, read_by(against)],
        }
        self._told["target"] = told = self._stage("target", depends, make)
        self._added = list(rows.read(self._out / "target" / ROWS)) if told["rows"] else []
        self._more = form.lessons(self._added, self._sides.training)

    def tune(self) -> None:
        """The model that ships."""
        name = "targeted" if self._more else self._first
        self._best = self._tuned(name, [*self._lessons, *self._more])

    def soup(self) -> None:
        """The best checkpoints become one, in a model folder."""
        folder, best = self._best
        recipe, artefact = self._recipe, self._out / ARTEFACT

        def make(_: Path) -> dict[str, Any]:
            pot = soup.Pot(folder, recipe.tune, self._chat, self._sides.watched)
            model, told = soup.soup(pot, best, recipe.soup, self._say)
            network.write(artefact, model, self._chat)
            for name in quantise.FOLDERS.values():
                # Made of the model before.
                shutil.rmtree(self._out / name, ignore_errors=True)
            return told

        depends = {"settings": recipe.soup.model_dump(), "of": [list(one) for one in best], "at": folder.name}
        depends["training"] = _content(folder)
        if not artefact.is_dir():
            (self._out / "soup" / REPORT).unlink(missing_ok=True)
        self._told["soup"] = self._stage("soup", depends, make)

    def quantise(self) -> None:
        """Folders of eight bits beside the model's."""
        reported = self._sides.reported
        spoken = [row.conversation for row in reported]

        @cache
        def scores(at: Path) -> Floats:
            return self._asked(network.loaded(str(at))).scores(spoken)

        for scheme in self._recipe.quantise:
            folder = self._out / quantise.FOLDERS[scheme]

            def make(_: Path, scheme: str = scheme, folder: Path = folder) -> dict[str, Any]:
                quantise.quantise(self._out / ARTEFACT, folder, scheme, self._chat)
                told = quantise.parity(scores(self._out / ARTEFACT), scores(folder), reported)
                refused = told["agreement"] < self._recipe.least_agreement
                if refused:
                    shutil.rmtree(folder)
                self._say(f"{scheme}: {told['agreement']:.1%} same decisions{'; refused' if refused else ''}")
                return told | {"refused": refused}

            depends = {"model": self._told["soup"]["made_from"], "rows": split.digest(reported)}
            depends["least_agreement"] = self._recipe.least_agreement
            name = f"quantise/{scheme}"
            told = self._stage(name, depends, make)
            if not told["refused"] and not folder.is_dir():
                # Somebody took it away.
                (self._out / name / REPORT).unlink()
                told = self._stage(name, depends, make)
            self._told["quantised"][scheme] = told

    def ablate(self) -> None:
        """Measure every step, on rows of the pool and on benchmarks."""
        sets = {ablate.POOL: self._sides.reported, **self._benchmarks()}
        name = digest({name: split.digest(some) for name, some in sets.items()})
        steps, skipped = self._steps()
        found = ablate.told([ablate.measure(one, sets, name, self._out / "ablate", self._say) for one in steps], sets)
        text = ablate.page(found, skipped)
        (self._out / "ablate" / REPORT).write_text(
            json.dumps(telling.rounded(found), indent=2) + "\n", encoding="utf-8"
        )
        (self._out / "ablate" / ablate.PAGE).write_text(text, encoding="utf-8")
        self._say(text)

    def introduce(self, context: int) -> None:
        """Calibrate and measure the model, and write the card that tells of it."""
        recipe, artefact = self._recipe, self._out / ARTEFACT
        # The card is written last, so that a folder with one is whole.
        for folder in (artefact, *(self._out / name for name in quantise.FOLDERS.values())):
            (folder / CARD).unlink(missing_ok=True)
        asked = self._asked(network.loaded(str(artefact)))
        self._say("calibrating")
        watched, reported = (calibrate.measure(asked, side) for side in (self._sides.watched, self._sides.reported))
        found = calibrate.between(recipe.name, watched, reported, recipe.target_fpr)
        # The model tells of no injections.
        for known in (found.stages, found.temperatures, found.thresholds):
            known.pop("injection", None)
        found.policy().dump(artefact / card.POLICY)
        (self._out / CALIBRATION).write_text(page.calibration(found), encoding="utf-8")
        self._say("measuring")
        before = asked.unread
        scores = asked.scores([row.conversation for row in self._sides.reported])
        unread = asked.unread - before
        if unread >= len(self._sides.reported):
            self._say("not one answer can be read, so that all is taken for unsafe: this is no guard. Train it longer")
        benches = {
            name: measure.figures(some, asked.scores([row.conversation for row in some]))
            for name, some in self._benchmarks().items()
        }
        training = [*self._sides.training, *self._added]
        context = min(context, _SERVED)
        stated = {
            "name": recipe.name,
            "dialect": form.DIALECT,
            "base": recipe.tune.model.rstrip("/").rpartition("/")[2],
            **recipe.about,
            "serve": card.serving(recipe.name, context, ARTEFACT),
            "target_fpr": recipe.target_fpr,
            "stages": {name: fitted.to_dict() for name, fitted in found.stages.items()},
            "temperature": found.temperatures,
            "thresholds": found.thresholds,
            "metrics": {
                "held_out": measure.figures(self._sides.reported, scores),
                "unread": unread,
                "bench": benches,
                "quantised": self._told["quantised"],
            },
            "training": {
                "rows": len(training),
                "held_out": len(self._sides.watched) + len(self._sides.reported),
                "too_long": self._too_long,
                "of_benchmarks": self._spoilt + self._of_benchmarks(self._added),
                "digest": split.digest(training),
                **{name: self._told[name] for name in ("reason", "target", "soup")},
            },
            "data": telling.sources(training),
            "recipe": _told(recipe),
        }
        for scheme, told in self._told["quantised"].items():
            if not told["refused"]:
                folder = self._out / quantise.FOLDERS[scheme]
                found.policy().dump(folder / card.POLICY)
                serve = card.serving(recipe.name, context, folder.name)
                card.write(folder, stated | {"scheme": scheme, "serve": serve})
        card.write(artefact, stated)
        self._say("\n".join((f"done: {artefact}", *card.serving(recipe.name, context, str(artefact)))))

    @property
    def _first(self) -> str:
        """The training without targeted rows."""
        return "think" if any(lesson.trace for lesson in self._lessons) else "sft"

    def _tuned(self, name: str, given: Sequence[Lesson]) -> tuple[Path, list[Checkpoint]]:
        recipe, folder = self._recipe, self._out / "tune" / name
        shown, self._too_long = tune.examples(given, recipe.tune, self._chat, recipe.form.max_tokens)
        self._say(f"tune, {name}: {len(shown)} examples, {self._too_long} too long for form.max_tokens")
        return folder, tune.tune_(
            folder,
            shown,
            self._sides.watched,
            recipe.tune,
            self._chat,
            keep=recipe.soup.k,
            seed=recipe.seed,
            say=self._say,
        )

    def _stage(self, name: str, depends: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What a stage tells, made anew only where something that it depends on is new."""
        folder = self._out / name
        made_from, report = digest(depends), folder / REPORT
        if made_of(report) != made_from:
            folder.mkdir(parents=True, exist_ok=True)
            report.unlink(missing_ok=True)
            self._say(name)
            told = {"made_from": made_from, **make(folder)}
            report.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found

    def _asked(self, model: Any) -> Asked:  # noqa: ANN401 - see network.fitted
        return Asked(self._recipe.name, model, self._chat, self._recipe.tune.batch_tokens)

    def _benchmarks(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for name, some in (one for source in self._recipe.bench for one in by_file(source).items()):
            # Files of one name in several folders are several benchmarks, whatever sources they are of.
            alike = sum(name == other.partition(" (")[0] for other in found)
            found[f"{name} ({alike + 1})" if alike else name] = some
        return found

    def _of_benchmarks(self, given: Sequence[Row]) -> int:
        """How many rows are those that the model is measured on, or near to them."""
        settings = self._recipe.filter
        measured = settings.contamination.model_copy(update={"against": self._recipe.bench})
        return len(contaminated(given, measured, settings.seed))

    def _steps(self) -> tuple[list[Step], dict[str, str]]:
        """The steps that were taken, and why others were not."""
        settings, skipped = self._recipe.tune, {}

        def checkpoint(name: str, folder: str) -> Step:
            at = self._out / "tune" / folder
            best = tune.best(at)
            return Step(name, _content(at), lambda: self._asked(network.merged(settings, tune.weights(at, best))))

        def whole(name: str, folder: str, made_from: str) -> Step:
            return Step(name, made_from, lambda: self._asked(network.loaded(str(self._out / folder))))

        base = digest([settings.model, settings.revision])
        steps = [
            Step("base", base, lambda: self._asked(network.loaded(settings.model, settings.revision))),
            checkpoint("+ SFT", "sft"),
        ]
        if self._first == "think":
            steps.append(checkpoint("+ think SFT", "think"))
        else:
            skipped["think SFT"] = "for there are no traces" if self._told["reason"] else "for there was no teacher"
        if self._more:
            steps.append(checkpoint("+ targeted data", "targeted"))
        else:
            skipped["targeted data"] = "for the recipe has none"
        steps.append(whole("+ soup", ARTEFACT, self._told["soup"]["made_from"]))
        for scheme, name in (("FP8_DYNAMIC", "+ FP8"), ("W8A8", "+ INT8")):
            told = self._told["quantised"].get(scheme)
            if told and not told["refused"]:
                steps.append(whole(name, quantise.FOLDERS[scheme], f"{scheme} {told['made_from']}"))
            else:
                skipped[name.strip("+ ")] = "refused" if told else "for the recipe has none"
        return steps, skipped


# As long as what a guard is to judge at once; longer text comes in pieces.
_SERVED = 8192


def _content(folder: Path) -> str:
    """A name for a training that is done."""
    try:
        return hashlib.sha256((folder / "settings.json").read_bytes() + (folder / tune.DONE).read_bytes()).hexdigest()[
            :16
        ]
    except OSError as error:
        raise DataError(f"{folder} holds no training that is done: {error.strerror}") from None


def _told(recipe: Recipe) -> dict[str, Any]:
    """The settings that are not defaults, without where things lie on this machine."""
    server = {"base_url", "key_env"}
    places: dict[str, Any] = {
        "about": True,
        "ingest": True,
        "bench": True,
        "filter": {"contamination": {"against"}, "folds": {"file"}},
        "reason": {"teacher": server},
        "target": {"writer": server},
    }
    told = recipe.model_dump(mode="json", exclude_defaults=True, exclude=places)
    told["tune"]["model"] = told["tune"]["model"].rstrip("/").rpartition("/")[2]
    return told
