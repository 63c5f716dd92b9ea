"""Weights of eight bits by llmcompressor, kept where they decide as the whole ones do."""

# Run with llmcompressor 0.14.0.1 (transformers 5.17, torch 2.13 on a CPU). Both schemes need no data: weights are
# rounded by their own range, and what flows through the layers as it comes.

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForCausalLM

from guardmw.errors import GuardmwError
from guardmw.train.miniguard import network
from guardmw.train.miniguard.measure import EVEN, macro_f1

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardmw.evaluate.metrics import Floats
    from guardmw.evaluate.rows import Row
    from guardmw.train.miniguard.chat import Chat

FOLDERS = {"FP8_DYNAMIC": "artefact-fp8", "W8A8": "artefact-int8"}
_INSTALL = (
    "pip install 'guardmw[train]' llmcompressor, in one command, for it is particular about transformers; "
    "or leave it out"
)


def check() -> None:
    """Fail where ``quantise`` would for want of a library.

    Raises:
        GuardmwError: llmcompressor is not installed, or does not go with what is.
    """
    _library()


def quantise(source: Path, folder: Path, scheme: str, chat: Chat) -> None:
    """Write a model folder of eight bits, made of another; it is there whole or not at all.

    Raises:
        GuardmwError: llmcompressor is not installed or fails, or the disk is full.
    """
    oneshot, modifier = _library()
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype="auto")
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        oneshot(model=model, recipe=modifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
        model.save_pretrained(str(draft), save_compressed=True)
        chat.tokenizer.save_pretrained(str(draft))
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        why = network.told(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise GuardmwError(f"{folder.name}: {scheme} failed ({why})") from error


def _library() -> tuple[Any, Any]:
    """What quantises, and what says how."""
    try:
        from llmcompressor import oneshot  # noqa: PLC0415 - nothing else needs it
        from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name == "llmcompressor":
            raise GuardmwError(f"quantise needs llmcompressor: {_INSTALL}") from None
        raise GuardmwError(f"llmcompressor does not load here ({error}): {_INSTALL}") from None
    # It keeps to narrow ranges of transformers, and fails in other ways beside them.
    except Exception as error:  # noqa: BLE001
        raise GuardmwError(f"llmcompressor does not load here ({type(error).__name__}: {error}): {_INSTALL}") from None
    return oneshot, QuantizationModifier


def parity(before: Floats, after: Floats, rows: Sequence[Row]) -> dict[str, Any]:
    """How far eight bits moved scores and decisions of rows."""
    return {
        "rows": len(rows),
        "agreement": float(((before >= EVEN) == (after >= EVEN)).mean()),
        "mean_difference": float(np.abs(before - after).mean()),
        "macro_f1_before": macro_f1(rows, before),
        "macro_f1_after": macro_f1(rows, after),
    }
