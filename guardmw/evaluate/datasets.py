"""The public data sets that guards are trained and measured on, by name: where they are, and what their columns mean.

Nothing here was run against the hub. Ids, splits and columns are those that data set cards and public loaders show;
where only one of them did, or a column's values could not be seen, a comment says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from guardmw.dialects import nemotron
from guardmw.errors import DataError, GuardmwError, nearest
from guardmw.evaluate.columns import Choice, Columns, Kinds, Label
from guardmw.taxonomy import categories_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from guardmw.evaluate.columns import Record
    from guardmw.evaluate.rows import Row
    from guardmw.taxonomy import Category

PREFIX = "hub:"
INSTALL = "pip install 'guardmw[train]', or no more than: pip install datasets"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a data set.

    Attributes:
        name: as the hub calls it.
        config: the hub's word for a set within the set; "" where there is none.
    """

    name: str
    config: str = ""


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A data set on the hub.

    Attributes:
        id: owner/name.
        revision: the commit that is read; "" where none could be established, and whoever reads it gives one.
        columns: the rows that one record makes, one for each map.
        splits: by our names for them: train, and test for what is measured on. A benchmark has test only.
        gated: its owners want to be asked first.
        unfold: makes of a record one that has such columns; None where it has them.
    """

    id: str
    revision: str
    license: str
    columns: tuple[Columns, ...]
    splits: Mapping[str, Split] = field(default_factory=lambda: {"test": Split("test")})
    gated: bool = False
    unfold: Callable[[Record], Record] | None = None


_WILDGUARD_KINDS = Kinds(
    column="subcategory",
    named={
        "benign": (),
        "others": (),
        "violence_and_physical_harm": ("violence",),
        "toxic_language_hate_speech": ("hate",),
        "social_stereotypes_and_unfair_discrimination": ("hate",),
        "sexual_content": ("sexual",),
        "mental_health_over-reliance_crisis": ("self_harm",),
        "cyberattack": ("illegal_activity", "dangerous_info"),
        "fraud_assisting_illegal_activities": ("illegal_activity",),
        "private_information_individual": ("illegal_activity",),
        "sensitive_information_organization_government": ("illegal_activity",),
        "defamation_encouraging_unethical_or_unsafe_actions": ("harassment",),
        "copyright_violations": (),
        "causing_material_harm_by_disseminating_misinformation": (),
        "disseminating_false_or_misleading_information_encouraging_disinformation_campaigns": (),
    },
    # The names are those of the test split; the train split need not spell them the same way.
    unknown="none",
)
# Records on which annotators did not agree have no label, most records of the train split no answer.
_WILDGUARD_PROMPT = Columns(
    text="prompt",
    label=Label(column="prompt_harm_label", unlabelled="skip"),
    categories=_WILDGUARD_KINDS,
    attack=Choice(column="adversarial", named={"true": "jailbreak"}, otherwise=""),
    empty="skip",
)
_WILDGUARD_ANSWER = Columns(
    text="response",
    role="assistant",
    context="prompt",
    label=Label(column="response_harm_label", unlabelled="skip"),
    categories=_WILDGUARD_KINDS,
    empty="skip",
)
_WILDGUARD_SPLITS = {"train": Split("train", "wildguardtrain"), "test": Split("test", "wildguardtest")}
_WILDGUARD_REVISION = "d29c47f41c8b51348b5c8e8c81c039b3132b66d1"

_BEAVERTAILS = Columns(
    text="response",
    role="assistant",
    context="prompt",
    label=Label(column="is_safe", unsafe=(False,), safe=(True,)),
    categories=Kinds(
        column="category",
        named={
            "animal_abuse": ("violence",),
            "child_abuse": ("sexual", "illegal_activity"),
            "controversial_topics,politics": (),
            "discrimination,stereotype,injustice": ("hate",),
            "drug_abuse,weapons,banned_substance": ("illegal_activity", "dangerous_info"),
            "financial_crime,property_crime,theft": ("illegal_activity",),
            "hate_speech,offensive_language": ("hate", "harassment"),
            "misinformation_regarding_ethics,laws_and_safety": (),
            "non_violent_unethical_behavior": (),
            "privacy_violation": ("illegal_activity",),
            "self_harm": ("self_harm",),
            "sexually_explicit,adult_content": ("sexual",),
            "terrorism,organized_crime": ("violence", "illegal_activity"),
            "violence,aiding_and_abetting,incitement": ("violence",),
        },
    ),
)

# "Physical Harm" and the rest as GuardBench lists them; the card calls the column harm_area.
_SIMPLE_KINDS = Kinds(
    column="harm_area",
    named={
        "Suicide, Self-Harm, and Eating Disorders": ("self_harm",),
        "Physical Harm": ("violence",),
        "Illegal and Highly Regulated Items": ("illegal_activity",),
        "Scams and Fraud": ("illegal_activity",),
        "Child Abuse": ("sexual", "illegal_activity"),
    },
    unknown="none",
)

_MODERATION_KINDS: dict[str, tuple[Category, ...]] = {
    "S": ("sexual",),
    "S3": ("sexual",),
    "H": ("hate",),
    "H2": ("hate", "violence"),
    "V": ("violence",),
    "V2": ("violence",),
    "HR": ("harassment",),
    "SH": ("self_harm",),
}

_HARMBENCH_KINDS = Kinds(
    column="category",
    named={
        "chemical_biological": ("dangerous_info",),
        "illegal": ("illegal_activity",),
        "cybercrime_intrusion": ("illegal_activity", "dangerous_info"),
        "harassment_bullying": ("harassment",),
        "harmful": (),
        "misinformation_disinformation": (),
        "copyright": (),
    },
    unknown="none",
)

_CIVIL_KINDS: dict[str, tuple[Category, ...]] = {
    "identity_attack": ("hate",),
    "insult": ("harassment",),
    "threat": ("violence",),
    "sexual_explicit": ("sexual",),
}

_PROMPT_SAFE = Columns(text="prompt", label="safe")
_PROMPT_UNSAFE = Columns(text="prompt", label="unsafe")
# The owners' second upload; the full commit of the first could not be established.
_ORBENCH = ("orbench-llm/or-bench", "6f776f103b6439a6d8180b20f64b55f491223233", "CC-BY-4.0")

# The kinds are those of both turns. Prompts that may not be passed on are "REDACTED".
_NEMOTRON_KINDS = Kinds(
    column="violated_categories",
    separator=",",
    named={name: categories_of(name) or () for name in nemotron.CATEGORIES},
    unknown="none",
)
_NEMOTRON: Mapping[str, Any] = {
    "categories": _NEMOTRON_KINDS,
    "where": {"language": "en"},
    "unless": {"prompt": "REDACTED"},
    "empty": "skip",
}
_NEMOTRON_TURNS = (
    Columns(text="prompt", label=Label(column="prompt_label", unlabelled="skip"), **_NEMOTRON),
    Columns(
        text="response",
        role="assistant",
        context="prompt",
        label=Label(column="response_label", unlabelled="skip"),
        **_NEMOTRON,
    ),
)


def _lesson(record: Record) -> Record:
    """Of MiniGuard's training data, what its prompt and answer tell; nothing where they are of another form."""
    said = record.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise DataError("no column 'conversations' of role/content objects")
    told = nemotron.taught(*(str(turn.get("content")) for turn in said)) if len(said) == 2 else None  # noqa: PLR2004
    fields = ("prompt", "prompt_label", "response", "response_label", "violated_categories")
    return {**dict.fromkeys(fields), "language": record.get("language"), **(told or {})}


SETS: Mapping[str, PublicSet] = {
    # Splits besides train were seen with one loader only.
    "nemotron_safety_guard": PublicSet(
        "nvidia/Nemotron-Safety-Guard-Dataset-v3",
        "",
        "CC-BY-4.0",
        _NEMOTRON_TURNS,
        {name: Split(name) for name in ("train", "validation", "test")},
    ),
    # Its licence is not stated. Spelling and spaces of its prompts could not be seen.
    "miniguard": PublicSet(
        "prem-research/MiniGuard-Safety-Dataset",
        "",
        "",
        _NEMOTRON_TURNS,
        {
            "train": Split("train_en"),
            "thinking": Split("train_thinking_en"),
            "synthetic": Split("train_synthetic"),
            "test": Split("validation_en"),
        },
        unfold=_lesson,
    ),
    "wildguardmix": PublicSet(
        "allenai/wildguardmix",
        _WILDGUARD_REVISION,
        "ODC-BY",
        (_WILDGUARD_PROMPT, _WILDGUARD_ANSWER),
        _WILDGUARD_SPLITS,
        gated=True,
    ),
    # The two tasks that papers report of it one by one.
    "wildguardmix_prompt": PublicSet(
        "allenai/wildguardmix",
        _WILDGUARD_REVISION,
        "ODC-BY",
        (_WILDGUARD_PROMPT,),
        _WILDGUARD_SPLITS,
        gated=True,
    ),
    "wildguardmix_response": PublicSet(
        "allenai/wildguardmix",
        _WILDGUARD_REVISION,
        "ODC-BY",
        (_WILDGUARD_ANSWER,),
        _WILDGUARD_SPLITS,
        gated=True,
    ),
    "beavertails": PublicSet(
        "PKU-Alignment/BeaverTails",
        "8401fe609d288129cc684a9b3be6a93e41cfe678",
        "CC-BY-NC-4.0",
        (_BEAVERTAILS,),
        {"train": Split("30k_train"), "test": Split("30k_test")},
    ),
    "beavertails_330k": PublicSet(
        "PKU-Alignment/BeaverTails",
        "8401fe609d288129cc684a9b3be6a93e41cfe678",
        "CC-BY-NC-4.0",
        (_BEAVERTAILS,),
        {"train": Split("330k_train"), "test": Split("330k_test")},
    ),
    "toxigen": PublicSet(
        # Once skg/toxigen-data. Whether its texts are clean, or Python bytes in words as they once were, is not known.
        "toxigen/toxigen-data",
        "ea082a8973a287097b17973343576e0c8da8eb3b",
        "MIT",
        (
            Columns(
                text="text",
                # "> 5.5" in microsoft/TOXIGEN, toxigen/utils.py; the two scores are whole numbers and thirds.
                label=Label(column=("toxicity_ai", "toxicity_human"), at_least=5.51),
                categories=("hate",),
            ),
        ),
        {"train": Split("train", "annotated"), "test": Split("test", "annotated")},
        gated=True,
    ),
    "toxicchat": PublicSet(
        "lmsys/toxic-chat",
        "3e0319203c7162b9c9f8015b594441f979c199bc",
        "CC-BY-NC-4.0",
        (
            Columns(
                text="user_input",
                # As it is scored everywhere: a jailbreak that is not toxic is no positive.
                label=Label(column="toxicity"),
                attack=Choice(column="jailbreaking", named={"1": "jailbreak", "0": ""}),
                id="conv_id",
            ),
        ),
        {"train": Split("train", "toxicchat0124"), "test": Split("test", "toxicchat0124")},
    ),
    "harmbench": PublicSet(
        "walledai/HarmBench",
        "71c5e5411366e2ffff9b3a55fc47493d3aa56dfb",
        "MIT",
        (Columns(text="prompt", label="unsafe", categories=_HARMBENCH_KINDS),),
        {"test": Split("train", "standard")},
        gated=True,
    ),
    "harmbench_contextual": PublicSet(
        "walledai/HarmBench",
        "71c5e5411366e2ffff9b3a55fc47493d3aa56dfb",
        "MIT",
        (Columns(text=("context", "prompt"), label="unsafe", categories=_HARMBENCH_KINDS),),
        {"test": Split("train", "contextual")},
        gated=True,
    ),
    "xstest": PublicSet(
        "walledai/XSTest",
        "f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        "CC-BY-4.0",
        (Columns(text="prompt", label=Label(column="label")),),
        gated=True,
    ),
    "xstest_response": PublicSet(
        "allenai/xstest-response",
        "",
        "ODC-BY",
        (Columns(text="response", role="assistant", context="prompt", label=Label(column="label", unlabelled="skip")),),
        {"test": Split("response_harmfulness")},
        gated=True,
    ),
    "sorrybench": PublicSet(
        "sorry-bench/sorry-bench-202503",
        "612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
        "custom (sorry-bench)",
        # Without its 20 rewordings of each. Its categories are numbers whose names are not in the set.
        (Columns(text="turns", label="unsafe", where={"prompt_style": "base"}),),
        {"test": Split("train")},
        gated=True,
    ),
    "civil_comments": PublicSet(
        "google/civil_comments",
        "994595bdffb914eb2891c903a8552b3bd4c69526",
        "CC0-1.0",
        (
            Columns(
                text="text",
                # Shares of annotators. Between a few and half of them is nobody's label.
                label=Label(column="toxicity", at_least=0.5, safe_below=0.1),
                categories=Kinds(columns=_CIVIL_KINDS),
                empty="skip",
            ),
        ),
        {"train": Split("train"), "test": Split("test")},
    ),
    "openai_moderation": PublicSet(
        # A mirror of openai/moderation-api-release.
        "mmathys/openai-moderation-api-evaluation",
        "84e5cf3bcd6acb3dfc70b6760451645872218a3e",
        "MIT",
        (
            Columns(
                text="prompt",
                label=Label(column=tuple(_MODERATION_KINDS), unlabelled="skip"),
                categories=Kinds(columns=_MODERATION_KINDS),
            ),
        ),
        {"test": Split("train")},
    ),
    "orbench": PublicSet(*_ORBENCH, (_PROMPT_SAFE,), {"test": Split("train", "or-bench-80k")}),
    "orbench_hard": PublicSet(*_ORBENCH, (_PROMPT_SAFE,), {"test": Split("train", "or-bench-hard-1k")}),
    "orbench_toxic": PublicSet(*_ORBENCH, (_PROMPT_UNSAFE,), {"test": Split("train", "or-bench-toxic")}),
    "simplesafetytests": PublicSet(
        "Bertievidgen/SimpleSafetyTests",
        "98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5",
        # So the hub; the paper says CC-BY-4.0.
        "CC-BY-2.0",
        (Columns(text="prompt", label="unsafe", categories=_SIMPLE_KINDS, id="id"),),
    ),
    "jailbreakbench": PublicSet(
        "JailbreakBench/JBB-Behaviors",
        "886acc352a31533ffbcf4ef22c744658688086fc",
        "MIT",
        (Columns(text="Goal", label="unsafe"),),
        {"test": Split("harmful", "behaviors")},
    ),
    "jailbreakbench_benign": PublicSet(
        "JailbreakBench/JBB-Behaviors",
        "886acc352a31533ffbcf4ef22c744658688086fc",
        "MIT",
        (Columns(text="Goal", label="safe"),),
        {"test": Split("benign", "behaviors")},
    ),
}


def load(spec: str) -> list[Row]:
    """The rows of a public data set: hub:NAME, its test split, or hub:NAME:SPLIT, or either with @COMMIT after it.

    Raises:
        DataError: there is no such set or split, it cannot be had, or its columns are not those that are known.
    """
    name, split, revision = parsed(spec)
    known, part = find(name, split or "test")
    return list(read(replace(known, revision=revision or known.revision), part, source=name))


def parsed(spec: str) -> tuple[str, str, str]:
    """Name, split and revision of hub:NAME:SPLIT@COMMIT; "" for what is not said."""
    named, _, revision = spec.removeprefix(PREFIX).partition("@")
    name, _, split = named.partition(":")
    return name, split, revision


def find(name: str, split: str) -> tuple[PublicSet, Split]:
    """A public data set and its split, by our names for them.

    Raises:
        DataError: there is none; the message says which there are.
    """
    if name not in SETS:
        raise DataError(f"unknown data set {name!r}: {nearest(name, SETS)}")
    known = SETS[name]
    if split not in known.splits and split == "train":
        raise DataError(f"{name} is a benchmark, without a train split; to train on it all the same, say split: test")
    if split not in known.splits:
        raise DataError(f"{name} has no split {split!r}: {nearest(split, known.splits)}")
    return known, known.splits[split]


def read(given: PublicSet, split: Split, *, source: str) -> Iterator[Row]:
    """The rows of a data set, one by one; ``source`` is what they are told to be from.

    Raises:
        DataError: it cannot be had, a record is not what the columns say, or no record makes a row.
    """
    count = 0
    for number, record in enumerate(records(given, split), 1):
        try:
            told = given.unfold(record) if given.unfold else record
            made = [columns.row(told, source=source, license=given.license) for columns in given.columns]
        except GuardmwError as error:
            raise DataError(f"{given.id}, record {number}: {error}") from None
        found = [row for row in made if row is not None]
        count += len(found)
        yield from found
    if not count:
        raise DataError(f"{given.id} holds no rows, or its columns leave all of them out")


def records(given: PublicSet, split: Split) -> Iterator[Record]:
    """The records of a data set.

    Raises:
        DataError: the library is missing, the revision is no commit, or the hub does not answer, or does not have or
            give the set.
    """
    check(given.id, given.revision)
    load_dataset = _library()
    try:
        found = load_dataset(given.id, split.config or None, split=split.name, revision=given.revision)
    # Whatever the hub, its client, the cache and the file formats raise, of which no list is complete.
    except Exception as error:  # noqa: BLE001
        raise DataError(_why(given, split, error)) from None
    yield from found


def check(set_id: str, revision: str) -> None:
    """Raise a DataError for what shows before anything is fetched: no commit is named, or the library is missing."""
    if not _COMMIT.fullmatch(revision):
        given = f"{revision!r} can change" if revision else "none is known"
        raise DataError(
            f"{set_id} needs a revision, the 40 digits of a commit ({given}): "
            "the data set's page lists them under Files and versions, History"
        )
    _library()


def _library() -> Any:  # noqa: ANN401 - the function load_dataset, whose library may be missing
    try:
        from datasets import load_dataset  # noqa: PLC0415 - costly, and not everyone's
    except ImportError:
        raise DataError(f"data sets on the hub need a library: {INSTALL}") from None
    return load_dataset


def _why(given: PublicSet, split: Split, error: Exception) -> str:
    """What went wrong and what helps, with no more than a line of the library's own words."""
    said = " ".join(str(error).split())[:300]
    if "gated" in said or (given.gated and "cannot be accessed" in said):
        return (
            f"{given.id} is gated: ask for access on its page on the hub, then run 'hf auth login', or set HF_TOKEN to "
            "a token that may read it"
        )
    if "Revision" in said and "doesn't exist" in said:
        return f"{given.id} has no revision {given.revision}"
    if "doesn't exist on the Hub" in said:
        return f"there is no data set {given.id} on the hub, or it is private"
    if "Unknown split" in said or "BuilderConfig" in said:
        config = f" of {split.config}" if split.config else ""
        return f"{given.id} has no split {split.name}{config} at revision {given.revision}: {said}"
    if isinstance(error, OSError):
        return (
            f"{given.id} cannot be fetched: {said}. Where the hub cannot be reached, bring the data set's files here, "
            "and give them as a file source"
        )
    return f"{given.id} cannot be loaded: {type(error).__name__}: {said}"
