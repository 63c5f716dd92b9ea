"""What is in a model folder: ours describe themselves in card.json, TinySafe's published ones are recognised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guardmw import dialects
from guardmw.conversation import STAGES, Stage, loads
from guardmw.errors import ArtefactError, nearest
from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CARD = "card.json"
# The graphs an export may leave, the one to prefer first: int8 is the form meant for CPUs.
GRAPHS = ("model_int8.onnx", "model.onnx", "onnx/model_int8.onnx", "onnx/model.onnx", "exported/model_int8.onnx",
          "exported/model.onnx")  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer/tokenizer.json", "exported/tokenizer/tokenizer.json")
# Written by slow tokenizers only; see `_converted`.
SLOW_TOKENIZERS = ("spm.model", "tokenizer/spm.model", "exported/tokenizer/spm.model")

TINYSAFE_THRESHOLD = 0.45  # jdleo/tinysafe-1, configs/config.json; version 2 states its own in config.json

_Calibrated = Stage | Literal["injection"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Threshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Form(BaseModel):
    """How a conversation becomes a model's input.

    Attributes:
        prefixes: words put before the text on trial, by stage.
        context_tokens: how many tokens of the user's last turn follow as the second segment; 0 leaves it out.
        context_stages: the stages at which it follows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefixes: dict[Stage, str] = {}
    context_tokens: Annotated[int, Field(ge=0)] = 0
    context_stages: tuple[Stage, ...] = ("output", "tool_call", "tool_result")


class Card(BaseModel):
    """What a model folder says of itself in card.json. Keys it does not name here (recipe, metrics, …) are kept.

    Attributes:
        labels: the categories, in the order of ``category_logits``.
        max_tokens: the longest window, special tokens included.
        overlap: tokens that two neighbouring windows share.
        temperature: what a logit is divided by before the sigmoid: the unsafe one by stage, and "injection".
        thresholds: the score to act at, by stage, or "injection".
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    labels: tuple[str, ...] = CATEGORIES
    max_tokens: Annotated[int, Field(ge=16)] = 512
    overlap: Annotated[int, Field(ge=0)] = 64
    form: Form = Form()
    temperature: dict[_Calibrated, _Positive] = {}
    thresholds: dict[_Calibrated, _Threshold] = {}


@dataclass(frozen=True, slots=True)
class Artefact:
    """A model folder that has been read."""

    graph: Path
    tokenizer: Path
    card: Card


def read(folder: Path, *, graph: str | None = None) -> Artefact:
    """Find what a model needs in its folder.

    Raises:
        ArtefactError: names the file that is missing or broken.
    """
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is not a folder; a model is a folder with model.onnx and tokenizer.json")
    card = folder / CARD
    return Artefact(
        graph=_one_of(folder, (graph,) if graph else GRAPHS),
        tokenizer=_tokenizer(folder),
        card=_card(card, _json(card)) if card.exists() else _tinysafe(folder),
    )


def told_dialect(folder: Path) -> str | None:
    """How a model that writes its verdicts is asked, by its card; None without a card, or one that tells.

    Raises:
        ArtefactError: the card is broken, or names no dialect that there is.
    """
    card = folder / CARD
    told = _json(card).get("dialect") if card.is_file() else None
    if told is None:
        return None
    if not isinstance(told, str):
        raise ArtefactError(f"{card}: dialect is a {type(told).__name__} instead of a name, such as 'nemotron'")
    if told not in dialects.NAMES:
        raise ArtefactError(f"{card}: unknown dialect {told!r}: {nearest(told, dialects.NAMES)}")
    return told


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ArtefactError(f"{folder} holds none of: {', '.join(names)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds a {type(content).__name__} instead of an object")
    return content


def _card(path: Path, content: dict[str, Any]) -> Card:
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if len(set(card.labels)) < len(card.labels):
        raise ArtefactError(f"{path}: labels: one comes twice")
    return card


def _tinysafe(folder: Path) -> Card:
    """The card that jdleo/tinysafe-1 and -2 do not have."""
    configs = [folder / name for name in ("config.json", "exported/config.json") if (folder / name).exists()]
    stated = {path: _json(path) for path in configs}
    # A config.json may also be the encoder's, which says nothing of the heads.
    path = next((path for path, config in stated.items() if "binary_threshold" in config), folder)
    config = stated.get(path, {})
    threshold = config.get("binary_threshold", TINYSAFE_THRESHOLD)
    return _card(
        path,
        {
            "name": folder.name,
            "labels": config.get("categories", CATEGORIES),
            "max_tokens": config.get("max_length", 512),
            "thresholds": dict.fromkeys(STAGES, threshold),
        },
    )


def _tokenizer(folder: Path) -> Path:
    fast = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if fast:
        return fast
    slow = next((folder / name for name in SLOW_TOKENIZERS if (folder / name).is_file()), None)
    if slow:
        return _converted(slow)
    raise ArtefactError(f"{folder} holds none of: {', '.join((*TOKENIZERS, *SLOW_TOKENIZERS))}")


def _converted(slow: Path) -> Path:
    """Convert a slow DeBERTa tokenizer, once: tokenizer.json is left beside it.

    Piece by piece from the sentencepiece model: transformers 5 leaves out its normalisation, and so would give a model
    other tokens than it learned.
    """
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # noqa: PLC0415 - only this conversion needs it
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: PLC0415
    except ImportError:
        raise ArtefactError(
            f"{slow} belongs to a slow tokenizer; to convert it, once: pip install 'guardmw[tinysafe]'"
        ) from None
    fast, partial = slow.with_name("tokenizer.json"), slow.with_name("tokenizer.partial")
    try:
        model = ModelProto.FromString(slow.read_bytes())
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=model.trainer_spec.unk_id))
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
                normalizers.Strip(),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.save(str(partial))
        partial.replace(fast)
    except Exception as error:  # noqa: BLE001 - a broken file makes transformers raise anything
        raise ArtefactError(f"{slow} cannot be converted: {type(error).__name__}: {error}") from None
    return fast
