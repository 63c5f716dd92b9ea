"""The training loop: bf16, focal loss, early stopping, and a checkpoint that any kill can be survived from."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from guardmw.evaluate import metrics
from guardmw.taxonomy import CATEGORIES
from guardmw.train.tinysafe.data import Batch, Example, batches
from guardmw.train.tinysafe.model import Classifier, focal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from guardmw.train.tinysafe.recipe import Recipe

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"


def fit(
    model: Classifier,
    training: Sequence[Example],
    held_out: Sequence[Example],
    recipe: Recipe,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train, leaving the best weights in ``folder``/best.pt and loaded in the model.

    A run that finds its own checkpoint in the folder goes on from there.

    Returns:
        The best evaluation: held-out AUPRC ("auprc"), its epoch and step.
    """
    device = torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    model.to(device)
    plan = [list(batches(training, recipe, epoch)) for epoch in range(math.ceil(recipe.epochs))]
    total = min(round(recipe.epochs * len(plan[0])), sum(map(len, plan)))
    optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, recipe.warmup))
    step, best, stale = 0, {"auprc": -1.0, "epoch": 0.0, "step": 0.0}, 0
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best, stale = state["step"], state["best"], state["stale"]
        say(f"resuming at step {step} of {total}")
    every = max(1, len(plan[0]) // recipe.evaluations)
    started, first, losses = time.perf_counter(), step, []
    done = 0
    for epoch, groups in enumerate(plan):
        for batch in groups:
            done += 1
            if done <= step or done > total or stale >= recipe.patience:
                continue
            model.train()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = model(*_tensors(batch, device))
            loss = _loss(logits, batch, recipe)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step = done
            losses.append(loss.item())
            if step % 50 == 0:
                left = (time.perf_counter() - started) / (step - first) * (total - step)
                loss_now = np.mean(losses[-50:])
                say(f"epoch {epoch + 1}, step {step} of {total}, loss {loss_now:.4f}, {left / 60:.0f} min left")
            if step % every and step != total:
                continue
            auprc = _auprc(_scores(model, held_out), held_out)
            say(f"step {step}: held-out AUPRC {auprc:.4f} (best so far {max(best['auprc'], 0):.4f})")
            stale += 1
            if auprc >= best["auprc"]:
                best, stale = {"auprc": auprc, "epoch": float(epoch + 1), "step": float(step)}, 0
                torch.save(model.state_dict(), folder / BEST)
            _save(checkpoint, model, optimizer, schedule, {"step": step, "best": best, "stale": stale})
    model.load_state_dict(torch.load(folder / BEST, weights_only=True))
    return best


@torch.inference_mode()
def _scores(model: Classifier, examples: Sequence[Example]) -> metrics.Floats:
    """Unsafe logits (n,), as serving finds them: of every window, the highest."""
    model.eval()
    device = next(model.parameters()).device
    flat = [(i, window) for i, example in enumerate(examples) for window in example.windows]
    flat.sort(key=lambda pair: len(pair[1].ids))
    highest = np.full(len(examples), -np.inf)
    for start in range(0, len(flat), 64):
        group = flat[start : start + 64]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            unsafe, _, _ = model(*_tensors([(examples[i], window) for i, window in group], device))
        for (i, _), logit in zip(group, unsafe[:, 0].float().tolist(), strict=True):
            highest[i] = max(highest[i], logit)
    return highest


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(window.ids) for _, window in batch)
    ids = torch.zeros((len(batch), length), dtype=torch.long)  # [PAD] is 0 in every BERT-like vocabulary, and masked
    mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (_, window) in enumerate(batch):
        n = len(window.ids)
        ids[row, :n] = torch.tensor(window.ids)
        segments[row, :n] = torch.tensor(window.segments)
        mask[row, :n] = 1
    return ids.to(device), mask.to(device), segments.to(device)


def _loss(logits: tuple[Tensor, Tensor, Tensor], batch: Batch, recipe: Recipe) -> Tensor:
    unsafe, categories, injection = (part.float() for part in logits)
    examples = [example for example, _ in batch]
    device = unsafe.device
    weight = torch.tensor([example.weight for example in examples], device=device)
    labels = torch.tensor([example.unsafe for example in examples], dtype=torch.float, device=device)
    attacks = torch.tensor([example.injection for example in examples], dtype=torch.float, device=device)
    known = torch.tensor([example.categories is not None for example in examples], dtype=torch.float, device=device)
    kinds = torch.tensor([example.categories or (0.0,) * len(CATEGORIES) for example in examples], device=device)
    by_kind = torch.nn.functional.binary_cross_entropy_with_logits(categories, kinds, reduction="none").mean(1)
    losses = (
        focal(unsafe[:, 0], labels, recipe.focal_gamma)
        + recipe.category_weight * by_kind * known
        + recipe.injection_weight * focal(injection[:, 0], attacks, recipe.focal_gamma)
    )
    return (losses * weight).sum() / weight.sum()


def _groups(model: Classifier, recipe: Recipe) -> list[dict[str, object]]:
    """Parameters with weight decay, and vectors (biases, layer norms) without."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rate(step: int, total: int, warmup: float) -> float:
    """Linear up, cosine down."""
    up = max(1, int(total * warmup))
    if step < up:
        return (step + 1) / up
    return 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, total - up)))


def _auprc(scores: metrics.Floats, examples: Sequence[Example]) -> float:
    """The mean over stages: most rows are user turns, and the other surfaces count as much."""
    labels = np.array([example.unsafe for example in examples])
    stages = np.array([example.stage for example in examples])
    values = [metrics.auprc(labels[stages == stage], scores[stages == stage]) for stage in set(stages)]
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else metrics.auprc(labels, scores) or 0.0


def _save(
    path: Path,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: dict[str, object],
) -> None:
    # Written beside and moved over, so that a kill in the middle leaves the last whole one.
    draft = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state | progress, draft)
    draft.replace(path)
