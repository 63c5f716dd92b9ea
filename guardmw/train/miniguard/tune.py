"""The training loop: the loss on answers alone, early stopping by macro-F1, and checkpoints that outlive any kill."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from guardmw.errors import DataError, GuardmwError
from guardmw.train.miniguard import network
from guardmw.train.miniguard.ask import Asked
from guardmw.train.miniguard.chat import shared
from guardmw.train.miniguard.measure import macro_f1
from guardmw.train.stages import SETTINGS, keep_settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from guardmw.evaluate.rows import Row
    from guardmw.train.miniguard.chat import Chat, Encoded
    from guardmw.train.miniguard.form import Lesson
    from guardmw.train.miniguard.recipe import Tune
    from guardmw.train.stages import Say

STATE = "state.pt"
DONE = "done.json"
# What cross entropy takes no notice of.
_IGNORED = -100
_DIVERGED = "the loss is no number any more: lower tune.learning_rate"


class Checkpoint(NamedTuple):
    """A model on its way, and how good it is.

    Attributes:
        macro_f1: on the watched rows.
    """

    macro_f1: float
    step: int


class Example(NamedTuple):
    """What one pass shows of a lesson.

    Attributes:
        weight: of its task.
    """

    encoded: Encoded
    weight: float


def examples(lessons: Sequence[Lesson], tune: Tune, chat: Chat, max_tokens: int) -> tuple[list[Example], int]:
    """Both tasks of each lesson, those that are too long left out, with their number."""
    tasks = []
    for lesson in lessons:
        tasks.append((replace(lesson, trace=""), tune.plain_weight))
        if lesson.trace and tune.trace_weight:
            tasks.append((lesson, tune.trace_weight))
    encoded = chat.encode([task for task, _ in tasks])
    made = [Example(one, weight) for one, (_, weight) in zip(encoded, tasks, strict=True) if len(one.ids) <= max_tokens]
    return made, len(tasks) - len(made)


def tune_(
    folder: Path,
    given: Sequence[Example],
    watched: Sequence[Row],
    settings: Tune,
    chat: Chat,
    *,
    keep: int,
    seed: int,
    say: Say,
) -> list[Checkpoint]:
    """Train in a folder, or take what it holds; the best checkpoints, the best one first.

    A run that finds its own state in the folder goes on from there, to the same end.

    Args:
        folder: where checkpoints are left: of the best ones their weights, and of the last one all.
        given: what to learn.
        watched: rows that an evaluation looks at.
        settings: of the training.
        chat: how to speak with the model.
        keep: checkpoints, the best.
        seed: of everything drawn.
        say: hears of progress.

    Raises:
        GuardmwError: the folder is of another training, the disk is full, or the loss is no number.
    """
    if not given:
        raise DataError("form.max_tokens leaves no row to train on: raise it")
    keep_settings(folder / SETTINGS, _made_from(given, watched, settings, keep, seed))
    if (folder / DONE).exists():
        return [Checkpoint(*one) for one in json.loads((folder / DONE).read_text(encoding="utf-8"))]
    torch.manual_seed(seed)
    run = _Run(folder, given, watched, settings, chat, keep=keep, seed=seed, say=say)
    run.resume()
    best = run.go()
    draft = folder / f"{DONE}.part"
    draft.write_text(json.dumps(best) + "\n", encoding="utf-8")
    draft.replace(folder / DONE)
    (folder / STATE).unlink(missing_ok=True)
    return best


def best(folder: Path) -> Checkpoint:
    """The best one of a training that is done."""
    return Checkpoint(*json.loads((folder / DONE).read_text(encoding="utf-8"))[0])


def weights(folder: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Of a checkpoint that was kept."""
    return network.kept(_path(folder, checkpoint.step))


class _Run:
    """One training."""

    def __init__(
        self,
        folder: Path,
        given: Sequence[Example],
        watched: Sequence[Row],
        settings: Tune,
        chat: Chat,
        *,
        keep: int,
        seed: int,
        say: Say,
    ) -> None:
        self._folder, self._given, self._watched, self._settings, self._say = folder, given, watched, settings, say
        self._keep, self._seed = keep, seed
        self._model = network.fitted(settings).to(network.device())
        self._asked = Asked("student", self._model, chat, settings.batch_tokens)
        self._pad = chat.ends
        questions = [one.encoded.ids[: -one.encoded.answer] for one in given]
        self._prefix = questions[0][: shared(questions)]
        self._plan = [step for epoch in range(math.ceil(settings.epochs)) for step in self._steps(epoch)]
        whole = len(self._steps(0))
        self._total = max(1, min(round(settings.epochs * whole), len(self._plan)))
        self._optimizer = torch.optim.AdamW(
            network.learning(self._model).values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._step = 0
        self._stale = 0
        self._best: list[Checkpoint] = []

    def resume(self) -> None:
        """Go back to where the last state was left."""
        path = self._folder / STATE
        if not path.exists():
            return
        # Each part goes to the device by itself, but for AdamW's counts, which a GPU would be asked for one by one.
        state = network.kept(path)
        network.restore(self._model, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._step, self._stale = state["step"], state["stale"]
        self._best = [Checkpoint(*one) for one in state["best"]]
        _dice().set_rng_state(state["drawn"])
        self._say(f"resuming at step {self._step} of {self._total}")

    def go(self) -> list[Checkpoint]:
        """All steps that are left."""
        started, first, losses = time.perf_counter(), self._step, []
        while self._step < self._total and self._stale < self._settings.patience:
            losses.append(self._learn(self._plan[self._step]))
            if not math.isfinite(losses[-1]):
                raise GuardmwError(_DIVERGED)
            self._step += 1
            if self._step % 20 == 0:
                left = (time.perf_counter() - started) / (self._step - first) * (self._total - self._step)
                loss = sum(losses[-20:]) / len(losses[-20:])
                self._say(f"step {self._step} of {self._total}, loss {loss:.4f}, {left / 60:.0f} min left")
            if self._step % self._settings.checkpoint_every == 0 or self._step == self._total:
                self._look()
        return self._best

    def _look(self) -> None:
        """Evaluate, and leave a checkpoint."""
        lost = -self._asked.unread
        value = macro_f1(self._watched, self._asked.scores([row.conversation for row in self._watched]))
        lost += self._asked.unread
        before = self._best[0].macro_f1 if self._best else -1.0
        unread = f"; of {len(self._watched)} answers {lost} cannot be read" if lost else ""
        self._say(f"step {self._step}: held-out macro-F1 {value:.4f} (best so far {max(before, 0):.4f}){unread}")
        self._stale = 0 if value > before else self._stale + 1
        mine = Checkpoint(value, self._step)
        # Of equals the earlier one.
        ranked = sorted([*self._best, mine], key=lambda one: (-one.macro_f1, one.step))
        self._best, dropped = ranked[: self._keep], ranked[self._keep :]
        trained = {name: weight.detach().cpu() for name, weight in network.learning(self._model).items()}
        if mine in self._best:
            network.save(_path(self._folder, self._step), trained)
        state = {
            "weights": trained,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "step": self._step,
            "stale": self._stale,
            "best": [tuple(one) for one in self._best],
            "drawn": _dice().get_rng_state(),
        }
        network.save(self._folder / STATE, state)
        for one in dropped:
            _path(self._folder, one.step).unlink(missing_ok=True)

    def _steps(self, epoch: int) -> list[list[list[Example]]]:
        """The batches of each step of an epoch, in an order that follows from seed and epoch."""
        draw = random.Random(f"{self._seed}/{epoch}")  # noqa: S311 - an order, not a secret
        shown = draw.sample(self._given, len(self._given))
        batches: list[list[Example]] = []
        # Of like length, but not all short ones of a source together.
        for start in range(0, len(shown), 2048):
            batch: list[Example] = []
            for one in sorted(shown[start : start + 2048], key=lambda one: len(one.encoded.ids)):
                new = len(one.encoded.ids) - len(self._prefix)
                if batch and (len(batch) + 1) * new > self._settings.batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(one)
            batches.append(batch)
        draw.shuffle(batches)
        size = self._settings.accumulate
        return [batches[at : at + size] for at in range(0, len(batches), size)]

    def _learn(self, step: Sequence[Sequence[Example]]) -> float:
        """One step; the loss it began with."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        # Not the sum of weights: rows with a trace are long and come together, and their weight would cancel out.
        shown = sum(map(len, step))
        total = 0.0
        for batch in step:
            loss = self._loss(batch) / shown
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(network.learning(self._model).values(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return total

    def _loss(self, batch: Sequence[Example]) -> Tensor:
        """The sum over examples of the mean over an answer's tokens, by the weight of the task."""
        device = network.device()
        same = len(self._prefix)
        rows = [one.encoded.ids[same:] for one in batch]
        longest, answers = max(map(len, rows)), max(one.encoded.answer for one in batch)
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[1] * same + [0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        taught = torch.tensor([[False] * (answers - e.answer) + e.taught[-e.answer :] for e, _ in batch], device=device)
        labels = ids[:, -answers:].masked_fill(~taught, _IGNORED)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cache = self._begun(len(batch))
            # Padded on the left, answers stand together at the end, and no other logits are computed.
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, same:],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=answers + 1,
            ).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
        )
        known = (labels != _IGNORED).sum(1).clamp(min=1)
        weight = torch.tensor([weight for _, weight in batch], device=device)
        return (each.sum(1) / known * weight).sum()

    def _begun(self, times: int) -> DynamicCache | None:
        """The prefix, computed once, for so many rows that go on from it and teach it; None where there is none."""
        if not self._prefix:
            return None
        given = torch.tensor([self._prefix], device=network.device())
        cache = DynamicCache()
        self._model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(times)
        return cache

    def _rate(self, step: int) -> float:
        """Linear up, then down."""
        up = max(1, int(self._total * self._settings.warmup))
        if step < up:
            return (step + 1) / up
        done = (step - up) / max(1, self._total - up)
        return 1 - done if self._settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _dice() -> Any:  # noqa: ANN401 - one of torch's modules
    """Where dropout's chance comes from: a GPU has its own."""
    at = network.device()
    return torch.random if at.type == "cpu" else torch.get_device_module(at)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06}.pt"


def _made_from(
    given: Sequence[Example], watched: Sequence[Row], settings: Tune, keep: int, seed: int
) -> dict[str, Any]:
    shown = hashlib.sha256()
    # All at once they would be gigabytes.
    for at, one in enumerate(given):
        shown.update(b"\n" * bool(at) + repr(one).encode())
    seen = hashlib.sha256("\n".join(f"{row.conversation} {row.unsafe}" for row in watched).encode("utf-8", "replace"))
    return {
        "tune": settings.model_dump(mode="json"),
        "examples": shown.hexdigest()[:16],
        "watched": seen.hexdigest()[:16],
        "keep": keep,
        "seed": seed,
    }
