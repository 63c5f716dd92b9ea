"""The training loop: bf16, focal loss, teachers, early stopping, and a checkpoint that outlives any kill."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from guardmw.errors import DataError
from guardmw.evaluate import metrics
from guardmw.taxonomy import CATEGORIES
from guardmw.train.tinysafe.data import Batch, Example, batches
from guardmw.train.tinysafe.model import Classifier, asymmetric, focal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from guardmw.backends._windows import Window
    from guardmw.train.tinysafe.recipe import Training

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
DONE = "done.json"


def fit(
    model: Classifier,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    training: Training,
    *,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train, leaving the best weights in ``folder``/best.pt and loaded in the model.

    A run that finds its own checkpoint in the folder goes on from there; one that finds itself done takes what it made.
    A network that has learned before shows of long rows the window that it finds most telling.

    Returns:
        The best evaluation: what it is judged by ("auprc" or "recall"), its epoch and step.
    """
    device = _device()
    model.to(device)
    if (folder / DONE).exists():
        return _taken(model, folder)
    balance = balanced(examples, training.category_balance)
    watched = random.Random(seed).sample(held_out, min(training.watched, len(held_out)))  # noqa: S311 - no secret
    plan = _plan(model, examples, training, seed)
    total = max(1, min(round(training.epochs * len(plan[0])), sum(map(len, plan))))
    optimizer = torch.optim.AdamW(_groups(model, training), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, training))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema)) if training.ema else None
    kept: Classifier = averaged.module if averaged else model
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule} | (
        {"ema": averaged} if averaged else {}
    )
    step, best, stale = 0, {training.watch: -1.0, "epoch": 0.0, "step": 0.0}, 0
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        step, best, stale = _resumed(checkpoint, parts, device)
        say(f"resuming at step {step} of {total}")
    every = max(1, len(plan[0]) // training.evaluations)
    started, first, losses = time.perf_counter(), step, []
    done = 0
    for epoch, groups in enumerate(plan):
        for batch in groups:
            done += 1
            if done <= step or done > total or stale >= training.patience:
                continue
            model.train()
            losses.append(_learn(model, batch, training, balance, optimizer))
            schedule.step()
            if averaged:
                averaged.update_parameters(model)
            step = done
            if step % 50 == 0:
                left = (time.perf_counter() - started) / (step - first) * (total - step)
                loss_now = np.mean(losses[-50:])
                say(f"epoch {epoch + 1}, step {step} of {total}, loss {loss_now:.4f}, {left / 60:.0f} min left")
            if step % every and step != total:
                continue
            value = _GOOD[training.watch](logits(kept, watched, training.short_tokens)[:, 0], watched)
            say(f"step {step}: held-out {training.watch} {value:.4f} (best so far {max(best[training.watch], 0):.4f})")
            stale += 1
            if value >= best[training.watch]:
                best, stale = {training.watch: value, "epoch": float(epoch + 1), "step": float(step)}, 0
                _save(folder / BEST, kept.state_dict())
            states = {name: part.state_dict() for name, part in parts.items()}
            _save(checkpoint, states | {"step": step, "best": best, "stale": stale})
    draft = folder / f"{DONE}.part"
    draft.write_text(json.dumps(best) + "\n", encoding="utf-8")
    draft.replace(folder / DONE)
    checkpoint.unlink(missing_ok=True)
    return _taken(model, folder)


def _plan(model: Classifier, examples: Sequence[Example], training: Training, seed: int) -> list[list[Batch]]:
    """The batches of each epoch."""
    if training.start:
        examples = pointed(model, examples)
    plan = [list(batches(examples, training, epoch, seed)) for epoch in range(math.ceil(training.epochs))]
    if not plan[0]:
        raise DataError("source_shares leave no row to train on")
    return plan


def _resumed(checkpoint: Path, parts: dict[str, Any], device: torch.device) -> tuple[int, dict[str, float], int]:
    state = torch.load(checkpoint, weights_only=True, map_location=device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["best"], state["stale"]


def _taken(model: Classifier, folder: Path) -> dict[str, float]:
    """What a training that is done has made."""
    device = next(model.parameters()).device
    model.load_state_dict(torch.load(folder / BEST, weights_only=True, map_location=device))
    best: dict[str, float] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    return best


def logits(model: Classifier, examples: Sequence[Example], tokens: int) -> metrics.Floats:
    """What a network says of the window that tells most, in ``tokens``: unsafe, injection and CATEGORIES, (n, 9)."""
    found: metrics.Floats = _said(model, [example.read(tokens) for example in examples])
    return found


def pointed(model: Classifier, examples: Sequence[Example]) -> list[Example]:
    """The examples, with the most telling window of each long unsafe one, as a network sees it."""
    long = [at for at, example in enumerate(examples) if example.unsafe and len(example.windows) > 1]
    said = iter(_said(model, [window for at in long for window in examples[at].windows])[:, :2].max(axis=1))
    found = list(examples)
    for at in long:
        found[at] = replace(found[at], telling=int(np.argmax([next(said) for _ in found[at].windows])))
    return found


@torch.inference_mode()
def _said(model: Classifier, windows: Sequence[Window]) -> metrics.Floats:
    device = _device()
    model.to(device).eval()
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    found = np.empty((len(windows), 2 + len(CATEGORIES)))
    for start in range(0, len(order), 64):
        group = order[start : start + 64]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            unsafe, kinds, attack = model(*_tensors([windows[i] for i in group], device))
        found[group] = torch.cat((unsafe, attack, kinds), dim=1).float().cpu().numpy()
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def balanced(examples: Sequence[Example], beta: float) -> list[float]:
    """What each of CATEGORIES weighs in the loss: the less, the more rows have it; 1 on the mean."""
    counts = [sum(bool(e.categories and e.categories[at]) for e in examples) for at in range(len(CATEGORIES))]
    # By the effective number of samples; a category of which there is nothing to learn gains nothing.
    weights = [(1 - beta) / (1 - beta**count) if count else 1 - beta for count in counts]
    return [weight * len(weights) / sum(weights) for weight in weights]


def _learn(
    model: Classifier, batch: Batch, training: Training, balance: list[float], optimizer: torch.optim.Optimizer
) -> float:
    """One step; the loss it began with."""
    device = next(model.parameters()).device
    tensors = _tensors([window for _, window in batch], device)
    optimizer.zero_grad(set_to_none=True)

    def backward() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            said = model(*tensors)
        loss = _loss(said, batch, training, balance)
        loss.backward()
        return float(loss.detach())

    loss = backward()
    if training.fgm:
        words = model.encoder.get_input_embeddings().weight
        step = training.fgm * words.grad / words.grad.norm().clamp(min=1e-12)
        with torch.no_grad():
            words.add_(step)
        backward()
        with torch.no_grad():
            words.sub_(step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def _tensors(windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(window.ids) for window in windows)
    ids = torch.zeros((len(windows), length), dtype=torch.long)  # whichever token 0 is, it is masked
    mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, window in enumerate(windows):
        n = len(window.ids)
        ids[row, :n] = torch.tensor(window.ids)
        segments[row, :n] = torch.tensor(window.segments)
        mask[row, :n] = 1
    return ids.to(device), mask.to(device), segments.to(device)


def _loss(said: tuple[Tensor, Tensor, Tensor], batch: Batch, training: Training, balance: list[float]) -> Tensor:
    unsafe, categories, injection = (part.float() for part in said)
    examples = [example for example, _ in batch]

    def tensor(values: list[float] | list[tuple[float, ...]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float, device=unsafe.device)

    smooth = training.label_smoothing
    weight = tensor([training.source_weights.get(example.source, 1.0) for example in examples])
    labels = tensor([abs(example.unsafe - smooth) for example in examples])
    attacks = tensor([abs(example.injection - smooth) for example in examples])
    known = tensor([float(example.categories is not None) for example in examples])
    kinds = tensor([example.categories or (0.0,) * len(CATEGORIES) for example in examples])
    by_kind = (
        asymmetric(categories, kinds)
        if training.category_loss == "asymmetric"
        else cross_entropy(categories, kinds, reduction="none")
    )
    losses = (
        focal(unsafe[:, 0], labels, training.focal_gamma)
        + training.category_weight * (by_kind * tensor(balance)).mean(1) * known
        + training.injection_weight * focal(injection[:, 0], attacks, training.focal_gamma)
    )
    if training.distillation and examples[0].taught:
        heat = training.distillation_temperature
        taught = torch.sigmoid(tensor([example.taught for example in examples]) / heat)
        own = torch.cat((unsafe, injection, categories), dim=1) / heat
        # The gradients of softened targets shrink with the square of the temperature.
        each = cross_entropy(own, taught, reduction="none") * heat**2
        learned = each[:, 0] + training.injection_weight * each[:, 1] + training.category_weight * each[:, 2:].mean(1)
        losses = (1 - training.distillation) * losses + training.distillation * learned
    # A batch may hold nothing but rows that weigh nothing.
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)


def _groups(model: Classifier, training: Training) -> list[dict[str, object]]:
    """Parameters with weight decay, and vectors (biases, layer norms) without."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rate(step: int, total: int, training: Training) -> float:
    """Linear up, then down."""
    up = max(1, int(total * training.warmup))
    if step < up:
        return (step + 1) / up
    done = (step - up) / max(1, total - up)
    return 1 - done if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _auprc(scores: metrics.Floats, examples: Sequence[Example]) -> float:
    """The mean over stages: most rows are user turns, and the other surfaces count as much."""
    labels = np.array([example.unsafe for example in examples])
    stages = np.array([example.stage for example in examples])
    values = [metrics.auprc(labels[stages == stage], scores[stages == stage]) for stage in set(stages)]
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else metrics.auprc(labels, scores) or 0.0


def _recall(scores: metrics.Floats, examples: Sequence[Example]) -> float:
    """At even odds."""
    labels = np.array([example.unsafe for example in examples])
    return float((scores[labels] > 0).mean()) if labels.any() else 0.0


_GOOD = {"auprc": _auprc, "recall": _recall}


def _save(path: Path, state: dict[str, object]) -> None:
    # Written beside and moved over, so that a kill in the middle leaves the last whole one.
    draft = path.with_suffix(".part")
    torch.save(state, draft)
    draft.replace(path)
