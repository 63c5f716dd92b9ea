"""The language model: loaded, fitted with small matrices or not, its checkpoints kept and turned into whole models."""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from guardmw.errors import GuardmwError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from guardmw.train.miniguard.chat import Chat
    from guardmw.train.miniguard.recipe import Tune


def device() -> torch.device:
    """Where to compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def loaded(model: str, revision: str | None = None) -> PreTrainedModel:
    """A model with weights of fp32, from which bf16 is made as it computes.

    Raises:
        GuardmwError: it cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model, revision=revision or "main", dtype=torch.float32)
    # Of ImportErrors, that of the library which reads a quantised one.
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise GuardmwError(f"{model} cannot be loaded: {error}") from None


def fitted(tune: Tune) -> Any:  # noqa: ANN401 - a PreTrainedModel, or peft's around it, which mypy does not see
    """The base model as it is trained: with a LoRA, whose matrices alone learn, or whole.

    Raises:
        GuardmwError: it cannot be loaded, lacks the layers that are named, or peft is not installed.
    """
    model = loaded(tune.model, tune.revision)
    if tune.method == "full":
        return model
    try:
        import peft  # noqa: PLC0415 - full fine-tuning needs none
    except ImportError:
        raise GuardmwError("a LoRA needs peft: pip install 'guardmw[train]', or say `method: full`") from None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        target_modules=list(tune.targets),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own use of what transformers deprecates
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise GuardmwError(f"tune.targets: {error}") from None


def learning(model: Any) -> dict[str, Tensor]:  # noqa: ANN401 - see fitted
    """The weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def restore(model: Any, weights: Mapping[str, Tensor]) -> None:  # noqa: ANN401 - see fitted
    """Load what ``learning`` gave."""
    mine = learning(model)
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(weights[name])


def merged(tune: Tune, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A whole model, as if it had been trained whole."""
    model = fitted(tune)
    restore(model, weights)
    return model if tune.method == "full" else model.merge_and_unload()


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that is there whole or not at all.

    Raises:
        GuardmwError: it cannot be written.
    """
    draft = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), draft)
        draft.replace(path)
    # torch makes a RuntimeError of a full disk.
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise GuardmwError(
            f"{path} cannot be written ({told(error)}): is there room? What came before is whole"
        ) from None


def kept(path: Path) -> dict[str, Any]:
    """What ``save`` left, in main memory.

    Raises:
        GuardmwError: it is not there any more, or not whole.
    """
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    # torch raises what it likes of a file that is none of its own.
    except Exception as error:
        raise GuardmwError(
            f"{path} cannot be read ({told(error)}): take {path.parent} away, and it is trained anew"
        ) from error
    return found


def write(folder: Path, model: PreTrainedModel, chat: Chat) -> None:
    """Write a model folder in bf16, with its chat template; it is there whole or not at all.

    Raises:
        GuardmwError: it cannot be written.
    """
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    # The base model's own settings may sample.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=chat.ends, pad_token_id=chat.tokenizer.pad_token_id
    )
    model.config.use_cache = True
    try:
        model.to(torch.bfloat16).save_pretrained(draft)
        chat.tokenizer.save_pretrained(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise GuardmwError(f"{folder} cannot be written ({told(error)}): is there room?") from error


def told(error: Exception) -> str:
    """What went wrong, without a path."""
    return getattr(error, "strerror", None) or type(error).__name__
