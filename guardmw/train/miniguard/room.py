"""Room on the disk for all that a run will leave, missed before hours are spent."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from guardmw.errors import GuardmwError
from guardmw.train.miniguard import network

if TYPE_CHECKING:
    from pathlib import Path

    from guardmw.train.miniguard.recipe import Recipe

_GB = 1e9
# Bytes for each weight. Checkpoints are of fp32; Adam's state holds two numbers more, and the old state stays until the
# new one is whole.
_CHECKPOINT, _STATE, _MODEL = 4, 2 * 3 * 4, 2


def check(recipe: Recipe, out: Path, model: Any, *, ablated: bool) -> None:  # noqa: ANN401 - see network.fitted
    """Look for room beside what an earlier run has left.

    Args:
        recipe: says how many checkpoints stay.
        out: where the run lives, or will.
        model: as it is trained.
        ablated: whether steps are trained apart.

    Raises:
        GuardmwError: there is too little.
    """
    learnt = sum(weight.numel() for weight in network.learning(model).values())
    whole = sum(weight.numel() for weight in model.parameters())
    aimed = recipe.target is not None and (ablated or recipe.target.writer is not None)
    trainings = 1 + aimed + (ablated and recipe.reason is not None)
    need = learnt * (_CHECKPOINT * (trainings * recipe.soup.k + 1) + _STATE)
    need += whole * _MODEL * (2 + len(recipe.quantise))
    held = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if need > held + free:
        raise GuardmwError(
            f"{out} needs {need / _GB:.1f} GB for checkpoints and models; it holds {held / _GB:.1f}, and the disk has "
            f"room for {free / _GB:.1f}: make room, or give another --out, a lower soup.k, or `method: lora`"
        )
