"""The command line: guardmw check | demo | eval | calibrate | bench | info | serve-model | train."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from pydantic import BaseModel

from guardmw.backends.cascade import Cascade
from guardmw.conversation import ROLES, Conversation
from guardmw.errors import BackendError, ConversationError, GuardmwError, nearest
from guardmw.evaluate import datasets, rows
from guardmw.guard import Guard
from guardmw.policy import THRESHOLD, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardmw.backends import Backend
    from guardmw.evaluate.report import Report
    from guardmw.verdict import Verdict

ALLOWED, WITHHELD, FAILED = 0, 1, 2
# What a shell reports of a program ended by SIGINT or SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141

# One call of the backend: enough to fill its batches, and a bound on memory.
CHUNK_LINES, CHUNK_BYTES = 64, 4 * 2**20

_PARTS = ("guardmw", "onnxruntime", "tokenizers", "numpy", "pydantic")
# What each recipe imports, and no plain installation has.
_TRAINING = ("torch", "transformers", "onnx")

_CHECK_STATUS = """\
exit status:
  0    allowed (allow or flag)
  1    withheld (block or review), or a line of several was
  2    error: bad usage, an unreadable file, no such backend, or a line that is not valid (the others are judged)
"""
_LINES = """\
lines of --jsonl, each one conversation whose last turn is judged:
  "text"
  {"role": "user", "content": "text"}
  [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
  {"messages": [{"role": "user", "content": "…"}]}
  {"text": "…", "role": "tool_result", "context": "what the user said before"}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        # A path or a tool's name may hold what the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        status: int = args.command(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as stop:
        # argparse ends so, with 0 after --help and 2 after bad usage; and rich, with 1 where a pipe is closed.
        return {0: ALLOWED, 1: PIPE_CLOSED}.get(stop.code, FAILED) if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else error)
        return FAILED
    except (GuardmwError, ImportError) as error:
        _complain(error)
        return FAILED
    return status


class _Parser(argparse.ArgumentParser):
    """Says how a command is used, and never repeats an argument: it may be the text to judge."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        options = re.findall(r"(?<!\S)--[a-z][a-z-]{0,30}(?![\w-])", message)
        if message.startswith("the following arguments are required"):
            told = message
        elif "unrecognized arguments" in message and options:
            told = f"unknown option {options[0]}"
        elif "unrecognized arguments" in message:
            told = "more than one TEXT; one with spaces goes in quotes"
        elif "COMMAND" in message:
            told = "unknown command"
        else:
            told = "bad usage"
        self.exit(FAILED, f"{self.format_usage()}{self.prog}: {told}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="guardmw",
        description="Guardrails for LLM agents: judge what goes into a model and what comes out, on this CPU.",
        epilog="Start with: guardmw demo",
    )
    parser.add_argument("--version", action="version", version=f"guardmw {version('guardmw')}")
    parser.set_defaults(command=lambda _: _help(parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    guard = _Parser(add_help=False)
    guard.add_argument(
        "--backend", default="embedded", metavar="SPEC", help="what judges: embedded (the default), onnx:FOLDER, …"
    )
    guard.add_argument("--policy", metavar="FILE", help="YAML or JSON; thresholds it leaves open are the backend's")

    check = commands.add_parser(
        "check",
        parents=[guard],
        help="judge a text, or every line of a JSONL file",
        description="Judge a text, or every line of a JSONL file. No text is ever repeated in the output.",
        epilog=f"{_CHECK_STATUS}\n{_LINES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("text", nargs="?", metavar="TEXT", help="what to judge; - reads standard input")
    check.add_argument("--jsonl", metavar="FILE", help="one conversation a line, gzip'd or not; - reads standard input")
    check.add_argument(
        "--role",
        default="user",
        help=f"whose text it is, where that is not said: {', '.join(_roles())} (default: user)",
    )
    check.add_argument("--json", action="store_true", help="one verdict a line, as JSON")
    check.set_defaults(command=_check)

    demo = commands.add_parser("demo", parents=[guard], help="a tour: what guardmw says of nine conversations")
    demo.set_defaults(command=_demo)

    evaluate = commands.add_parser(
        "eval",
        parents=[guard],
        help="measure a guard on labelled files",
        description="Screen every row of labelled JSONL files, one at a time, and tell how right and how fast it was.",
    )
    evaluate.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl or .jsonl.gz with text, label, role, …; or hub:NAME"
    )
    evaluate.add_argument("--json", action="store_true", help="all figures as one JSON object")
    evaluate.add_argument("--against", metavar="SPEC", help="another backend, on the same rows, under the same policy")
    evaluate.add_argument("--html", metavar="FILE", help="a report with curves, as one HTML file; replaces FILE")
    evaluate.add_argument("--show-text", action="store_true", help="the texts of the worst rows, in the HTML file")
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap intervals (default: 0)")
    evaluate.set_defaults(command=_eval)

    _add_calibrate(commands)
    _add_bench(commands, guard)

    info = commands.add_parser("info", parents=[guard], help="versions, the model's card, the policy in force")
    info.add_argument("--json", action="store_true", help="all of it as one JSON object")
    info.add_argument("--schema", action="store_true", help="only the JSON schema of a policy file")
    info.set_defaults(command=_info)

    serve_model = commands.add_parser(
        "serve-model",
        help="the command that serves a guard model with vLLM",
        description="Print the command that serves a guard model with vLLM, flags for this machine among it.",
    )
    serve_model.add_argument("model", metavar="MODEL", help="a folder, or OWNER/NAME of the Hugging Face hub")
    serve_model.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1)")
    serve_model.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve_model.add_argument("--run", action="store_true", help="run it, in the place of this process")
    serve_model.set_defaults(command=_serve_model)

    train = commands.add_parser("train", help="train a model of your own (needs guardmw[train])")
    train.add_argument("recipe", choices=["tinysafe", "miniguard"], help="what to train")
    train.add_argument("options", nargs=argparse.REMAINDER, help="of the recipe: guardmw train tinysafe --help")
    train.set_defaults(command=_train)
    return parser


def _add_calibrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="fit temperatures and thresholds on labelled files",
        description="Fit a temperature and a threshold for each stage on half of the rows, and tell what they do on "
        "the other half. Without --out, --card or --html, nothing is written.",
    )
    calibrate.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl or .jsonl.gz with text, label, role, …; or hub:NAME"
    )
    calibrate.add_argument("--backend", default="embedded", metavar="SPEC", help="whose scores: as for check")
    calibrate.add_argument(
        "--target-fpr", type=float, default=0.02, metavar="RATE", help="safe rows that may be acted on (default: 0.02)"
    )
    calibrate.add_argument(
        "--between",
        nargs=2,
        type=float,
        default=(0.5, 0.9),
        metavar=("LOW", "HIGH"),
        help="what thresholds are held between, on calibrated scores (default: 0.5 0.9)",
    )
    calibrate.add_argument("--out", metavar="FILE", help="write the thresholds as a policy, .yaml or .json")
    calibrate.add_argument("--card", action="store_true", help="enter both into the card of --backend onnx:FOLDER")
    calibrate.add_argument("--html", metavar="FILE", help="reliability diagrams, as one HTML file; replaces FILE")
    calibrate.add_argument("--json", action="store_true", help="all figures as one JSON object")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="of the two halves (default: 0)")
    cascade = calibrate.add_argument_group("the band of a cascade instead")
    cascade.add_argument("--escalate", metavar="SPEC", help="who is asked in doubt: a spec, or the URL of a server")
    cascade.add_argument("--policy", metavar="FILE", help="that is in force, and that --out adds the band to")
    target = cascade.add_mutually_exclusive_group()
    target.add_argument("--at-most", type=float, metavar="RATE", help="rows that may be escalated, a family as one")
    target.add_argument(
        "--lose",
        type=float,
        metavar="RATE",
        help="unsafe rows that may be missed, and safe ones withheld, against always asking (default: 0.01)",
    )
    cascade.add_argument(
        "--confidence", type=float, default=0.95, metavar="RATE", help="of what is promised (default: 0.95)"
    )
    cascade.add_argument("--by-stage", action="store_true", help="a band for each stage that has enough rows")
    calibrate.set_defaults(command=_calibrate)


def _add_bench(commands: argparse._SubParsersAction[_Parser], guard: _Parser) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[guard],
        help="measure how fast a guard is on this machine",
        description="Measure latency by length and by concurrency, throughput, memory, cost and how cost grows. It "
        "ends by itself, and tells how noisy the machine was. No text is ever repeated in the output.",
    )
    bench.add_argument("--lengths", default="32,128,512", metavar="N,N,…", help="tokens of texts (default: 32,128,512)")
    bench.add_argument(
        "--concurrency", default="1,2,4,8,16,32,64", metavar="N,N,…", help="callers at once (default: 1,2,4,…,64)"
    )
    bench.add_argument("--traffic", metavar="FILE", help="conversations of yours, in lines as check --jsonl reads them")
    bench.add_argument("--price", metavar="USD", help="of this machine for an hour: tells what a million requests cost")
    bench.add_argument("--seconds", default="60", metavar="N", help="about how long it may take (default: 60)")
    bench.add_argument("--html", metavar="FILE", help="a report with plots, as one HTML file; replaces FILE")
    bench.add_argument("--json", action="store_true", help="all figures as one JSON object")
    bench.set_defaults(command=_bench)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return FAILED


def _complain(what: object) -> None:
    # YAML's and onnxruntime's messages have several lines.
    print("guardmw:", " ".join(str(what).split()) or type(what).__name__, file=sys.stderr)


def _guard(args: argparse.Namespace) -> Guard:
    return Guard(args.backend, policy=Policy.load(args.policy) if args.policy else None)


def _roles() -> tuple[str, ...]:
    return (*ROLES, "tool_call", "tool_result")


def _check(args: argparse.Namespace) -> int:
    if (args.text is None) == (args.jsonl is None):
        raise GuardmwError("check takes either TEXT (- for standard input) or --jsonl FILE")
    if args.role not in _roles():
        raise ConversationError(f"unknown role {args.role!r}: {nearest(args.role, _roles())}")
    if args.jsonl is not None:
        return _check_lines(args)
    text = _standard_input() if args.text == "-" else args.text
    verdict = _guard(args).screen(rows.conversation(text, role=args.role))
    _verdicts(args)(None, verdict)
    return _status(verdict)


def _check_lines(args: argparse.Namespace) -> int:
    """Judge line after line; what is not valid is told of, and the others are judged all the same."""
    tally: Counter[str] = Counter()
    name = "standard input" if args.jsonl == "-" else args.jsonl
    with _opened(args.jsonl) as file, _advance(file) as advance:
        guard, show = _guard(args), _verdicts(args)
        for chunk in _chunks(file, name, args.role):
            for number, judged in _judged(guard, chunk):
                if not isinstance(judged, str):
                    tally["withheld" if _status(judged) else "allowed"] += 1
                    show(number, judged)
                    continue
                tally["not valid"] += 1
                _complain(f"{name}, line {number}: {judged}")
                if args.json:
                    print(json.dumps({"line": number, "error": judged}))
            sys.stdout.flush()
            advance(sum(tally.values()))
    if not tally:
        raise GuardmwError(f"{name} holds no lines")
    if not args.json:
        counts = ", ".join(f"{tally[kind]:,} {kind}" for kind in ("allowed", "withheld", "not valid") if tally[kind])
        print(counts, file=sys.stderr)
    if tally["not valid"]:
        return FAILED
    return WITHHELD if tally["withheld"] else ALLOWED


def _chunks(file: BinaryIO, name: str, role: str) -> Iterator[list[tuple[int, Conversation | str]]]:
    """Line numbers with a conversation, or with what is wrong, a few at a time."""
    chunk: list[tuple[int, Conversation | str]] = []
    size = 0
    failure = None
    lines = rows.lines(file)
    while True:
        try:
            number, line = next(lines, (0, b""))
        except rows.UNREADABLE as error:
            failure = error
            break
        if not number:
            break
        if not line.strip():
            continue
        chunk.append((number, _read(line, role)))
        size += len(line)
        if len(chunk) == CHUNK_LINES or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
    if failure:
        raise GuardmwError(f"{name} cannot be read on: {failure}")


def _read(line: bytes, role: str) -> Conversation | str:
    try:
        return rows.conversation(rows.loads(line), role=role)
    except ConversationError as error:
        return str(error)


def _judged(guard: Guard, chunk: Sequence[tuple[int, Conversation | str]]) -> list[tuple[int, Verdict | str]]:
    """Line numbers with a verdict, or with what is wrong."""
    try:
        verdicts = iter(guard.screen_many(one for _, one in chunk if isinstance(one, Conversation)))
        return [(number, next(verdicts) if isinstance(one, Conversation) else one) for number, one in chunk]
    except ConversationError as error:
        # What is nested as deep as Python goes can be read, and yet not be written out: then all fail, for one.
        if len(chunk) == 1:
            return [(chunk[0][0], str(error))]
        return [judged for one in chunk for judged in _judged(guard, [one])]


def _status(verdict: Verdict) -> int:
    return WITHHELD if verdict.action in ("review", "block") else ALLOWED


def _verdicts(args: argparse.Namespace) -> Callable[[int | None, Verdict], None]:
    """What prints a verdict, with the number of its line if it has one."""
    if args.json:
        return lambda number, verdict: print(json.dumps(({"line": number} if number else {}) | verdict.to_dict()))
    if sys.stdout is None or not sys.stdout.isatty():
        return lambda number, verdict: print(_line(number, verdict))
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it

    show = terminal.verdict_printer()
    return lambda number, verdict: show(_line(number, verdict), verdict.action)


def _line(number: int | None, verdict: Verdict) -> str:
    line = f"{verdict.action:<6}  {verdict.stage:<11}  {_found(verdict)}"
    if verdict.coverage.windows > 1:
        line += f"  {verdict.coverage.windows} windows"
    # A verdict among several has the time of all of them.
    return f"{number}: {line}" if number else f"{line}  {verdict.elapsed_ms:.1f} ms"


def _found(verdict: Verdict) -> str:
    if verdict.violations or verdict.reason:
        return verdict.summary
    if verdict.scores is None:
        return "nothing to judge"
    return f"unsafe {verdict.scores.unsafe:.2f}, injection {verdict.scores.injection:.2f}"


def _standard_input() -> str:
    """All of it as text; bytes that are no UTF-8 become U+FFFD, and that is told."""
    given = _binary_stdin().read(rows.LONGEST_LINE + 1)
    if not given:
        raise GuardmwError("standard input is empty: nothing was judged")
    if len(given) > rows.LONGEST_LINE:
        raise GuardmwError(f"standard input is longer than {rows.LONGEST_LINE // 2**20} MiB")
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError:
        _complain("standard input is not UTF-8: what could not be read is judged as U+FFFD")
        return given.decode("utf-8-sig", errors="replace")


def _binary_stdin() -> BinaryIO:
    if sys.stdin is None:
        raise GuardmwError("standard input is closed")
    return sys.stdin.buffer


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield _binary_stdin()
        return
    with Path(path).open("rb") as file:
        yield file


@contextmanager
def _advance(file: BinaryIO) -> Iterator[Callable[[int], None]]:
    """A progress bar by the bytes read, for who looks at a terminal that the verdicts do not go to."""
    if sys.stdout is None or sys.stdout.isatty() or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it

    stat = os.fstat(file.fileno())
    with terminal.progress(stat.st_size if S_ISREG(stat.st_mode) else None) as bar:
        yield lambda lines: bar(f"{lines:,} lines", file.tell() if S_ISREG(stat.st_mode) else lines)


def _demo(args: argparse.Namespace) -> int:
    from guardmw import demo  # noqa: PLC0415 - costly, and only this command needs it

    return demo.tour(lambda: _guard(args))


def _eval(args: argparse.Namespace) -> int:
    _check_eval(args)
    # A bad row is told of before the long work, not after.
    files = _labelled(args.files)
    specs = [args.backend] + [args.against] * (args.against is not None)
    policy = Policy.load(args.policy) if args.policy else None
    guards = {spec: Guard(spec, policy=policy) for spec in specs}
    from guardmw.evaluate import page  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate.compare import compare  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate.published import standings  # noqa: PLC0415 - costly, and only this command needs it

    report, *others = _reports(guards, files, args.seed)
    comparison = compare(report, others[0], seed=args.seed) if others else None
    places = standings(report)
    if args.html is not None:
        html = page.evaluation(report, comparison=comparison, standings=places, show_text=args.show_text)
        Path(args.html).write_text(html, encoding="utf-8")
    if args.json:
        told = report.to_dict() | {"published": [place.to_dict() for place in places]}
        print(json.dumps(told | ({"against": comparison.to_dict()} if comparison else {}), indent=2))
    else:
        from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it

        terminal.print_report(report, comparison=comparison, standings=places)
    for one in (report, *others):
        total, whose = one.all.figures, f"{one.backend}: " if others else ""
        if total.degraded:
            rest = f"rows were not judged in full; most often: {one.reason}"
            _complain(f"{whose}{total.degraded:,} of {total.rows:,} {rest}")
    return 0


def _check_eval(args: argparse.Namespace) -> None:
    """Tell of options that do not go together before the long work."""
    if args.against is not None and _same(args.backend, args.against):
        raise GuardmwError("--against takes another backend than --backend: a guard does not differ from itself")
    if args.show_text and args.html is None:
        raise GuardmwError("--show-text puts texts into the HTML report: it needs --html FILE")
    _writable(args.html, args.files)


def _reports(guards: Mapping[str, Guard], files: Mapping[str, Sequence[rows.Row]], seed: int) -> list[Report]:
    """What each guard, by its spec, did with the rows."""
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate.report import evaluate  # noqa: PLC0415 - costly, and only this command needs it

    reports: list[Report] = []
    count = sum(map(len, files.values()))
    with terminal.progress(count * len(guards)) as bar:
        for guard in guards.values():
            before = count * len(reports)
            # Called only within this turn of the loop.
            reports.append(evaluate(guard, files, done=lambda name, n: bar(name, before + n), seed=seed))  # noqa: B023
    if len({report.backend for report in reports}) < len(reports):
        # Two models may have one name in their cards.
        return [replace(report, backend=spec) for report, spec in zip(reports, guards, strict=True)]
    return reports


def _calibrate(args: argparse.Namespace) -> int:
    if args.escalate is not None or args.backend.startswith("cascade:"):
        return _calibrate_band(args)
    if args.policy is not None or args.at_most is not None or args.lose is not None or args.by_stage:
        raise GuardmwError("--policy, --at-most, --lose and --by-stage are for a band: they need --escalate SPEC")
    if args.out is not None and args.card:
        raise GuardmwError("either --out or --card: a policy's thresholds are for the scores as they are without it")
    folder = Path(args.backend.removeprefix("onnx:"))
    if args.card and not (args.backend.startswith("onnx:") and (folder / "card.json").is_file()):
        raise GuardmwError("--card needs --backend onnx:FOLDER, where FOLDER holds a card.json")
    for path in (args.out, args.html):
        _writable(path, args.files)
    labelled = [row for file in _labelled(args.files).values() for row in file]
    backend = Guard(args.backend).backend
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate import calibrate, page  # noqa: PLC0415 - costly, and only this command needs it

    with terminal.progress(len(labelled)) as bar:
        found = calibrate.calibrate(
            backend,
            labelled,
            args.target_fpr,
            bounds=tuple(args.between),
            seed=args.seed,
            done=lambda count: bar("calibrating", count),
        )
    if args.html is not None:
        Path(args.html).write_text(page.calibration(found), encoding="utf-8")
    if args.out is not None:
        found.policy().dump(args.out)
    if args.card:
        calibrate.enter(found, folder)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.print_calibration(found)
    return 0


def _bench(args: argparse.Namespace) -> int:
    _writable(args.html, [args.traffic] if args.traffic else [])
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate.bench import machine, options, page, run, traffic  # noqa: PLC0415 - the same
    from guardmw.evaluate.bench.times import Clock  # noqa: PLC0415 - the same

    settings = options.settings(
        lengths=args.lengths, concurrency=args.concurrency, price=args.price, seconds=args.seconds
    )
    if args.policy:
        Policy.load(args.policy)  # a bad one is told of before the long work
    if args.traffic:
        settings = replace(settings, conversations=traffic.read(args.traffic))
    with terminal.progress(int(settings.seconds)) as bar:
        bar("fresh processes", 0)
        clock = Clock()
        began = clock.now()
        cold = machine.cold(args.backend, args.policy, settings.seconds / 5, clock)
        spent = clock.now() - began
        settings = replace(settings, cold=cold, seconds=max(settings.seconds - spent, settings.seconds / 2))
        found = run.benchmark(_guard(args), settings, done=lambda name, so_far: bar(name, int(spent) + so_far))
    if args.html is not None:
        Path(args.html).write_text(page.benchmark(found), encoding="utf-8")
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.print_benchmark(found)
    degraded, calls = found.degraded
    if degraded:
        _complain(f"{degraded:,} of {calls:,} calls were not judged in full: their times may be those of a failure")
    return 0


def _calibrate_band(args: argparse.Namespace) -> int:
    if args.card or args.html is not None:
        raise GuardmwError("--card and --html are for temperatures and thresholds: a band goes into a policy, --out")
    _writable(args.out, args.files)
    labelled = [row for file in _labelled(args.files).values() for row in file]
    policy = Policy.load(args.policy) if args.policy else Policy()
    guard = Guard(args.backend, policy=policy, escalate=args.escalate)
    cascade = guard.backend
    assert isinstance(cascade, Cascade)  # noqa: S101 - both ways to come here make one
    from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it
    from guardmw.evaluate import bands  # noqa: PLC0415 - costly, and only this command needs it

    lose = 0.01 if args.lose is None and args.at_most is None else args.lose
    with terminal.progress(len(labelled)) as bar:
        found = bands.fit(
            cascade,
            guard.policy,
            labelled,
            bands.Target(escalated=args.at_most, lost=lose),
            confidence=args.confidence,
            by_stage=args.by_stage,
            seed=args.seed,
            done=lambda count: bar("asking both tiers", count),
        )
    if args.out is not None:
        found.policy(policy).dump(args.out)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        terminal.print_bands(found)
    return 0


def _same(one: str, other: str) -> bool:
    """Whether two specs name one backend, as far as words and folders tell."""
    places = []
    for spec in (one, other):
        name, _, rest = spec.partition(":")
        places.append((name, str(Path(rest).resolve()) if rest and os.path.lexists(rest) else rest))
    return places[0] == places[1]


def _writable(path: str | None, inputs: Sequence[str]) -> None:
    """Tell before the long work that a file cannot be written after it."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise GuardmwError(f"{path} cannot be written: it is a folder, or its folder is not there")
    if any(target.resolve() == Path(given).resolve() for given in inputs):
        raise GuardmwError(f"{path} is one of the files to read: give another name for what is to be written")


def _labelled(given: Sequence[str]) -> dict[str, list[rows.Row]]:
    """The rows of files by their names, and of public data sets."""
    named = _named([path for path in given if not path.startswith(datasets.PREFIX)])
    public = (spec for spec in given if spec.startswith(datasets.PREFIX))
    return {name: list(rows.read(path)) for name, path in named.items()} | {
        spec.removeprefix(datasets.PREFIX): datasets.load(spec) for spec in public
    }


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """Files by their stem; where two have the same, by their folder's name too."""
    named: dict[str, Path] = {}
    for path in {Path(path).resolve(): Path(path) for path in paths}.values():
        stem, absolute = rows.stem(path), path.absolute()
        candidates = (stem, f"{absolute.parent.name}/{stem}", str(absolute))
        named[next(name for name in candidates if name not in named)] = path
    return named


def _info(args: argparse.Namespace) -> int:
    if args.schema:
        print(json.dumps(Policy.model_json_schema(), indent=2))
        return 0
    versions = {"python": python_version()} | {part: version(part) for part in _PARTS}
    guard, failure = None, None
    try:
        guard = _guard(args)
    except BackendError as error:
        # Versions are what a report of this very failure needs.
        failure = error
    facts = {
        "versions": versions,
        "backend": guard and guard.backend.name,
        "card": guard and _card(guard.backend),
        "policy": guard and _settings(guard.policy),
        "fingerprint": guard and guard.policy.fingerprint,
    }
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        from guardmw import terminal  # noqa: PLC0415 - costly, and only this command needs it

        terminal.print_info(facts)
    if failure:
        _complain(failure)
        return FAILED
    return 0


def _card(backend: Backend) -> dict[str, Any] | None:
    """What a backend's model says of itself, where it says anything."""
    card = getattr(backend, "card", None)
    return card.model_dump(mode="json") if isinstance(card, BaseModel) else None


def _settings(policy: Policy) -> dict[str, Any]:
    """Every setting of a policy in force, the ones it leaves to the defaults included."""
    settings = policy.model_dump(mode="json", exclude_none=True)
    stages = policy.model_dump(mode="json", exclude_defaults=True).get("stages", {})
    return {"threshold": THRESHOLD, "injection": THRESHOLD} | settings | {"stages": stages}


def _serve_model(args: argparse.Namespace) -> int:
    from guardmw.backends import _command  # noqa: PLC0415 - only this command needs it
    from guardmw.backends._artefact import told_dialect  # noqa: PLC0415

    dialect = told_dialect(Path(args.model))
    made = _command.command(args.model, _command.gpu(), host=args.host, port=args.port)
    if args.run:
        _become(_command.program(), made.words, made.environment)
    for reason in made.why:
        print(f"# {reason}")
    print(shlex.join([*(f"{name}={value}" for name, value in made.environment.items()), *made.words]))
    asked = f"?dialect={dialect}" if dialect else ""
    print(f"# then: --backend vllm:http://{args.host}:{args.port}/v1#{_command.served(args.model)}{asked}")
    return 0


def _become(program: str | None, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    if program is None:
        raise GuardmwError(
            "vllm is not on the PATH: pip install 'guardmw[vllm]', or run what this prints without --run"
        )
    os.execve(program, list(words), {**os.environ, **environment})  # noqa: S606 - no shell is what is wanted


def _train(args: argparse.Namespace) -> int:
    missing = [module for module in _TRAINING if find_spec(module) is None]
    if missing:
        raise GuardmwError(f"training needs {', '.join(missing)}: pip install 'guardmw[train]'")
    recipe = import_module(f"guardmw.train.{args.recipe}")
    parser = _Parser(prog=f"guardmw train {args.recipe}", description=recipe.__doc__)
    recipe.add_arguments(parser)
    status: int = recipe.main(parser.parse_args(args.options))
    return status
