"""TinySafe: a small encoder with a head for safe or unsafe, one for the kinds of harm, one for injections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

STAGES = ("ingest", "synthesise", "reread", "relabel", "filter", "teach", "train", "compress", "calibrate", "card")


def add_arguments(parser: ArgumentParser) -> None:
    """Describe the command ``guardmw train tinysafe``."""
    parser.add_argument("recipe", help="a YAML file, or the name of a preset (see docs/training.md)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the run lives and resumes")
    parser.add_argument(
        "--rows", nargs="+", metavar="FILE", help="labelled rows, instead of those that the recipe ingests"
    )
    parser.add_argument("--encoder", help="a folder or a name on the hub, instead of the recipe's for what ships")
    parser.add_argument(
        "--bench", nargs="+", metavar="FILE", help="labelled rows to measure the result on, for its card"
    )
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run (default: all)")


def main(args: Namespace) -> int:
    """Run the command."""
    from guardmw.train.tinysafe.recipe import read  # noqa: PLC0415 - torch takes seconds to import
    from guardmw.train.tinysafe.run import run  # noqa: PLC0415

    recipe = read(args.recipe, rows=args.rows, encoder=args.encoder, bench=args.bench)
    run(recipe, args.out, until=args.until)
    return 0
