"""TinySafe: a small encoder with a head for safe or unsafe, one for the kinds of harm, one for injections."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from guardmw.train.tinysafe.recipe import Recipe

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

_SETTINGS = (
    "name",
    "max_tokens",
    "epochs",
    "batch_tokens",
    "learning_rate",
    "patience",
    "target_fpr",
    "threads",
    "seed",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Describe the command ``guardmw train tinysafe``."""
    parser.add_argument("pool", nargs="+", type=Path, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER", help="a pretrained BERT-like encoder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the run lives and resumes")
    parser.add_argument(
        "--bench", nargs="+", type=Path, metavar="FILE", help="rows to measure the result on, for its card"
    )
    defaults = {field.name: field.default for field in fields(Recipe)}
    for name in _SETTINGS:
        default = defaults[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")


def main(args: Namespace) -> int:
    """Run the command."""
    from guardmw.train.tinysafe.run import run  # noqa: PLC0415 - torch takes seconds to import

    recipe = Recipe(**{name: getattr(args, name) for name in _SETTINGS})
    run(args.pool, args.encoder, args.out, recipe, bench=args.bench or ())
    return 0
