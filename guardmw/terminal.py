"""What a person at a terminal sees: verdicts, tables and progress bars."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardmw.evaluate.bands import Bands
    from guardmw.evaluate.bench.run import Benchmark
    from guardmw.evaluate.bench.times import Latency
    from guardmw.evaluate.calibrate import Calibration
    from guardmw.evaluate.compare import Compared, Comparison
    from guardmw.evaluate.intervals import Interval
    from guardmw.evaluate.published import Standing
    from guardmw.evaluate.report import Figures, Kind, Part, Report
    from guardmw.verdict import Action

STYLES: dict[Action, str] = {"allow": "green", "flag": "yellow", "review": "magenta", "block": "bold red"}

NONE = "-"
"""Where there is no figure."""


# Figures by their heading.
_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "rows": lambda f: f"{f.rows:,}",
    "unsafe": lambda f: f"{f.unsafe:,}",
    "thr.": lambda f: _number(f.threshold),
    "prec.": lambda f: _number(f.precision),
    "recall": lambda f: _number(f.recall),
    "F1": lambda f: _number(f.f1),
    "macro": lambda f: _number(f.macro_f1),
    "FPR": lambda f: _number(f.fpr),
    "AUPRC": lambda f: _number(f.auprc),
    "AUROC": lambda f: _number(f.auroc),
    "R@1%": lambda f: _number(f.recall_at_fpr_1),
    "R@5%": lambda f: _number(f.recall_at_fpr_5),
    "ECE": lambda f: _number(f.ece),
    "p50 ms": lambda f: _number(f.p50_ms, 1),
    "p95 ms": lambda f: _number(f.p95_ms, 1),
}
# Where a terminal is narrow, the first goes first.
_DROPPED = ("thr.", "R@5%", "macro", "p95 ms", "ECE", "AUROC", "R@1%", "unsafe")
# What a reader asks a model's card first, besides its metrics; --json has all of it.
_CARD = ("name", "labels", "max_tokens", "thresholds", "temperature", "license")
_CARD_DROPPED = ("macro_f1", "auroc", "unsafe", "ece_before", "ece", "precision", "rows", "f1")
_BENCH_DROPPED = ("mean ms", "of a core", "lost", "at once", "calls")
# What has an interval, by its heading.
_RANGES = {"recall": "recall", "f1": "F1", "macro_f1": "macro", "fpr": "FPR", "auprc": "AUPRC"}
_RANGES_DROPPED = ("macro", "recall", "AUPRC", "FPR")
_METRICS = {"f1": "F1", "best_f1": "best F1", "auprc": "AUPRC", "fpr": "FPR"}
# A smaller p is told by its order of magnitude.
_SMALL = 0.01
# Enough for every column.
_FILE_WIDTH = 160


def table(*headings: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns hold words, and the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for at, heading in enumerate(headings):
        made.add_column(heading, justify="left" if at < left else "right", no_wrap=at >= left, overflow="fold")
    return made


def verdict_printer() -> Callable[[str, Action], None]:
    """What prints a line that tells of an action, that word in its colour."""
    console = Console(highlight=False, soft_wrap=True)

    def show(line: str, action: Action) -> None:
        at = line.index(action)
        text = Text(line)
        text.stylize(STYLES[action], at, at + len(action))
        console.print(text)

    return show


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error, where that is a terminal; moved by calling with a word and how much is done.

    Args:
        total: None where nobody knows.
    """
    console = Console(stderr=True)
    word = TextColumn("{task.description:<20}", markup=False)
    columns = (word, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # What is printed meanwhile must not end up on standard error.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda said, done: bar.update(task, description=said, completed=done)


def print_report(report: Report, *, comparison: Comparison | None = None, standings: Sequence[Standing] = ()) -> None:
    """The figures of an evaluation: a row a file, then the parts of all; then those of another guard, and of others."""
    console = _console()
    total = report.all
    facts = f"  policy {report.policy}  {total.figures.rows:,} rows\n"
    console.print(Text.assemble((report.backend, "bold"), facts))
    blocks = {name: part.figures for name, part in report.files.items()}
    _print_figures(console, "file", blocks, total.figures if len(blocks) > 1 else None)
    _print_intervals(console, report)
    if len(total.stages) > 1:
        _print_figures(console, "stage", total.stages)
    if total.sources.keys() != blocks.keys():
        _print_figures(console, "source", total.sources)
    if total.categories:
        _print_kinds(console, total.categories)
    if total.attacks:
        attacks = table("attack", "rows", "caught")
        for name, kind in total.attacks.items():
            attacks.add_row(name, f"{kind.rows:,}", _number(kind.caught))
        console.print(attacks, "")
    if comparison:
        _print_comparison(console, comparison)
    _print_standings(console, report, standings)
    console.print(
        f"Acted on: block or review. FPR: safe rows acted on. R@1%: recall where FPR is at most 1 %. {NONE}: no such "
        "figure with one class only. Rows rank by the higher of unsafe and injection; ECE is of unsafe. Caught: acted "
        "on by any rule; the other figures of a category: how well verdicts name it.",
        style="dim",
    )


def _print_intervals(console: Console, report: Report) -> None:
    """Where the figures lie: of recall and FPR at 0 or 1 by Clopper and Pearson, else by bootstrap."""
    blocks: list[tuple[str, Part]] = [*report.files.items()]
    cells = [(name, _ranges(part.intervals)) for name, part in blocks]
    total = _ranges(report.all.intervals) if len(blocks) > 1 else None
    if any(cells for _, cells in cells):
        _print_fitting(console, "95 % interval", cells, total=total, dropped=_RANGES_DROPPED)


def _ranges(intervals: Mapping[str, Interval]) -> dict[str, str]:
    return {
        _RANGES[name]: f"{interval.low:.2f}-{interval.high:.2f}"
        for name in _RANGES
        if (interval := intervals.get(name))
    }


def _print_comparison(console: Console, comparison: Comparison) -> None:
    """The other guard's figures, and the differences; a star where an interval leaves out 0."""
    second, blocks = comparison.second, {name: part.figures for name, part in comparison.second.files.items()}
    console.print(Text.assemble("against ", (second.backend, "bold"), f"  policy {second.policy}\n"))
    _print_figures(console, "file", blocks, second.all.figures if len(blocks) > 1 else None)
    cells = [(name, _differences(one)) for name, one in comparison.files.items()]
    total = _differences(comparison.all) if len(cells) > 1 else None
    _print_fitting(console, "difference", cells, total=total, dropped=("macro", "+/-"))
    console.print(
        f"Difference: {comparison.first.backend} less {second.backend}; * where the paired 95 % interval leaves out 0 "
        "(--json and --html have it). +/-: rows that only the first, only the second decided rightly; p: McNemar's "
        "exact test of these.\n",
        style="dim",
    )


def _differences(one: Compared) -> dict[str, str]:
    cells = {}
    for name, heading in _RANGES.items():
        found = one.difference.get(name)
        if found:
            sure = found.interval and not found.interval.low <= 0 <= found.interval.high
            cells[heading] = f"{found.value:+.3f}{'*' if sure else ' '}"
    cells["+/-"] = f"{one.mcnemar.only_first:,}/{one.mcnemar.only_second:,}"
    cells["p"] = f"{one.mcnemar.p:.1g}" if one.mcnemar.p < _SMALL else f"{one.mcnemar.p:.2f}"
    return cells


def _print_standings(console: Console, report: Report, standings: Sequence[Standing]) -> None:
    """A line a benchmark and metric: this guard, its place, and the others, best first."""
    sources = list(dict.fromkeys(one.harness.source for one in standings))
    shown = None
    for one in standings:
        if (one.file, one.benchmark, one.extent) != shown:
            shown = (one.file, one.benchmark, one.extent)
            console.print(Text.assemble((one.benchmark, "bold"), f"  {one.extent}", f"  ({one.file})"))
        named = [f"{guard} {value:.2f}" for guard, value in one.others.items()]
        if one.value is not None:
            better = (value < one.value if one.metric == "fpr" else value > one.value for value in one.others.values())
            # The others come best first.
            named.insert(sum(better), f">>> {report.backend} {one.value:.2f} <<<")
        line = Table.grid(padding=(0, 1))
        line.add_row(f"  {_METRICS[one.metric]} [{sources.index(one.harness.source) + 1}]:", ", ".join(named))
        console.print(line)
    if standings:
        console.print()
        notes = {one.harness.source: one.harness.note for one in standings}
        for at, source in enumerate(sources):
            console.print(f"[{at + 1}] {source}. {notes[source]}", style="dim")
        console.print(
            "Published figures are of whole benchmarks and of other harnesses; one measured on a part is no "
            "more than a hint of where a guard stands.\n",
            style="dim",
        )


def print_calibration(found: Calibration) -> None:
    """What was fitted: a row a stage, and the figures on the half that it was not fitted on."""
    console = _console()
    console.print(Text.assemble((found.backend, "bold"), f"  {found.rows:,} rows, target FPR {found.target_fpr:g}\n"))
    rows = [
        (
            name,
            {
                "rows": f"{one.rows:,}",
                "unsafe": f"{one.unsafe:,}",
                "temp.": _number(one.temperature),
                "thr.": _number(one.threshold, 4),
                "policy": _number(one.raw_threshold, 4),
                "recall": _number(one.recall),
                "FPR": _number(one.fpr, 3),
                "ECE": f"{one.ece_before:.3f}",
                "after": f"{one.ece_after:.3f}",
            },
        )
        for name, one in found.stages.items()
    ]
    _print_fitting(console, "stage", rows, dropped=("rows", "unsafe", "temp."))
    console.print(
        "Fitted on one half of the rows; all figures are of the other. thr.: on calibrated scores, for a card; policy: "
        "the same on the scores as they are, for a policy file. ECE: before and after.",
        style="dim",
    )


def print_benchmark(found: Benchmark) -> None:
    """What was measured, a table a question, and how noisy the machine was."""
    console = _console()
    facts, noise = found.facts, found.noise
    machine = f"  {facts['cores']} cores, {facts['system']}, Python {facts['python']}, {found.seconds:.0f} s"
    console.print(Text.assemble((found.backend, "bold"), f"  policy {found.policy}{machine}"))
    load = f", load a core {noise.load[0]:.2f} to {noise.load[1]:.2f}" if noise.load else ""
    told = f"{noise.told}: the same work took {noise.spread:.0%} longer at its p90, and waited {noise.idle:.0%} of it"
    console.print(f"machine {told}{load}\n", style="" if noise.told == "quiet" else "yellow")
    _print_cold(console, found)
    _print_fitting(console, found.unit, [(f"{size:,}", _times(one)) for size, one in found.lengths.items()], dropped=())
    callers = [
        (
            f"{one.concurrency} caller{'s' * (one.concurrency > 1)}",
            _times(one.latency) | {"per s": _number(one.per_second, 1), "of a core": _number(one.per_core, 1)},
        )
        for one in found.closed
    ]
    _print_fitting(console, f"closed ({found.asked})", callers, dropped=_BENCH_DROPPED)
    arrivals = [
        (
            f"{one.load:.0%} of it",
            {"arrive": f"{one.rate:.1f}"}
            | _times(one.latency)
            | {"per s": _number(one.per_second, 1), "at once": f"{one.most:,}", "lost": f"{one.unfinished:,}"},
        )
        for one in found.open
    ]
    _print_fitting(console, f"open ({found.asked})", arrivals, dropped=_BENCH_DROPPED)
    _print_traffic(console, found)
    _print_cost(console, found)
    curves = [
        (
            one.name if one.model else f"{one.name} *",
            {
                "from": f"{one.sizes[0]:,}",
                "to": f"{one.sizes[-1]:,}",
                "ms": f"{one.ms[0]:.3f}",
                "ms then": f"{one.ms[-1]:.3f}",
                "power": _number(one.exponent),
                "last 3": _number(one.last),
            },
        )
        for one in found.scaling
    ]
    _print_fitting(console, "what grows", curves, dropped=("last 3",))
    left_out = f"No time was left for: {', '.join(found.left_out)}. " if found.left_out else ""
    console.print(
        f"{left_out}Closed: each caller asks again when answered. Open: arrivals wait for nobody, and count from when "
        "they were due. Of a core: answers by the CPU time of this process. Power: 1 is linear; last 3: of the three "
        f"largest sizes; *: guardmw alone. {NONE}: too few calls to tell (p95: 20, p99: 100).",
        style="dim",
    )


def print_bands(found: Bands) -> None:
    """What was fitted: for all stages and for each, the band, what it promises and what was seen, and the curve."""
    console = _console()
    console.print(Text.assemble((found.backend, "bold"), f"  {found.rows:,} rows, confidence {found.confidence:g}\n"))
    for name, one in found.parts.items():
        told = ", ".join(
            f"{what} at most {rate:.2%} (seen {one.seen[what]:.2%})" for what, rate in one.promised.items()
        )
        console.print(Text.assemble((name, "bold"), f": band {_band(one.band)}, promised: {told}"))
        points = [*one.curve[:-1], one.point, one.curve[-1]]
        labels = ["first tier alone", *("" for _ in one.curve[1:-1]), "this band", "always both"]
        rows = [
            (
                label,
                {
                    "band": _band(point.band),
                    "escalated": f"{point.escalated:.1%}",
                    "recall": _number(point.recall, 3),
                    "FPR": _number(point.fpr, 3),
                    "F1": _number(point.f1, 3),
                    "ms": _number(point.ms, 2),
                },
            )
            for label, point in zip(labels, points, strict=True)
        ]
        _print_fitting(console, "", rows, dropped=("F1", "ms"))
    if found.unread:
        console.print(f"{found.unread:,} texts have no scores of the second tier: on_degraded decided on them.")
    console.print(
        "Fitted on one half of the rows; all figures are of the other. What is promised counts rows that belong "
        "together as one, the table each of them. missed: unsafe rows that always asking the second tier would have "
        "caught; alarmed: safe ones that it would have let pass. ms: mean time of a text in both tiers.",
        style="dim",
    )


def _print_cold(console: Console, found: Benchmark) -> None:
    if found.cold is None:
        return
    cold = found.cold
    console.print(
        f"a fresh process: {cold.total_s:.2f} s to its end (import {cold.import_s:.2f}, load {cold.load_s:.2f}, first "
        f"check {cold.first_ms:.1f} ms), {_number(cold.resident_mb, 0)} MB, "
        f"{_number(cold.peak_mb, 0)} MB at its highest\n"
    )


def _print_traffic(console: Console, found: Benchmark) -> None:
    seen = found.traffic
    if seen is None:
        return
    rows = [
        (name or "nobody", {"share": f"{one.share:.1%}"} | _times(one.latency)) for name, one in seen.judges.items()
    ]
    total = {"share": "100%"} | _times(seen.latency)
    _print_fitting(console, "traffic, judged by", rows, total=total, dropped=_BENCH_DROPPED)
    escalated = "" if seen.escalated is None else f"escalated: {seen.escalated:.1%}; "
    console.print(f"{escalated}{seen.latency.calls:,} of {seen.conversations:,} conversations, one at a time\n")


def _print_cost(console: Console, found: Benchmark) -> None:
    cost = found.cost
    if cost is None:
        return
    made = table("a million requests", "USD")
    made.add_row(f"{found.backend}, ${cost.price:g} an hour, by the p95 of 16 callers", _number(cost.by_p95))
    made.add_row("the same, always at its best throughput", _number(cost.by_throughput))
    for name, usd in cost.published.items():
        made.add_row(f"{name}, published, H200 at $3.50 an hour", f"{usd:.2f}", style="dim")
    console.print(made, "")


def _times(one: Latency) -> dict[str, str]:
    figures = {"mean": one.mean_ms, "p50": one.p50_ms, "p95": one.p95_ms, "p99": one.p99_ms}
    return {"calls": f"{one.calls:,}"} | {f"{name} ms": _number(ms, 3) for name, ms in figures.items()}


def _band(band: tuple[float, float] | None) -> str:
    return NONE if band is None else f"{band[0]:.4g}-{band[1]:.4g}"


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_FILE_WIDTH)


def _print_figures(console: Console, heading: str, blocks: Mapping[str, Figures], total: Figures | None = None) -> None:
    cells = [(name, _cells(figures)) for name, figures in blocks.items()]
    _print_fitting(console, heading, cells, total=_cells(total) if total else None, dropped=_DROPPED)


def _cells(figures: Figures) -> dict[str, str]:
    return {heading: show(figures) for heading, show in _COLUMNS.items()}


def _print_fitting(
    console: Console,
    heading: str,
    rows: Sequence[tuple[str, Mapping[str, str]]],
    *,
    dropped: Sequence[str],
    total: Mapping[str, str] | None = None,
) -> None:
    """A table of as many columns as there is room for; those in ``dropped`` are the first to go."""
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    for gone in ("", *(column for column in dropped if column in columns)):
        columns = [column for column in columns if column != gone]
        made = table(heading, *columns)
        for name, cells in rows:
            made.add_row(name, *(cells.get(column, NONE) for column in columns))
        if total:
            made.add_section()
            made.add_row("all", *(total.get(column, NONE) for column in columns), style="bold")
        if console.measure(made, options=console.options.update(width=10_000)).maximum <= console.width:
            break
    console.print(made, "")


def _print_kinds(console: Console, kinds: Mapping[str, Kind]) -> None:
    made = table("category", "rows", "caught", "prec.", "recall", "F1", "AUPRC")
    for name, kind in kinds.items():
        numbers = (kind.caught, kind.precision, kind.recall, kind.f1, kind.auprc)
        made.add_row(name, f"{kind.rows:,}", *map(_number, numbers))
    console.print(made, "")


def print_info(facts: Mapping[str, Any]) -> None:
    """Versions, the model's card and the policy, the latter as YAML that a policy file may hold."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print("  ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    if facts["backend"] is None:
        return
    console.print(f"\nbackend {facts['backend']}", style="bold")
    card = facts["card"] or {}
    short = {key: card[key] for key in _CARD if card.get(key)}
    if short:
        console.print(yaml.safe_dump(short, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip())
    console.print(f"\n# policy {facts['fingerprint']}", style="bold")
    console.print(yaml.safe_dump(facts["policy"], sort_keys=False))
    metrics = card.get("metrics")
    for name, figures in metrics.items() if isinstance(metrics, dict) else ():
        _print_metrics(name, figures)


def _print_metrics(name: str, figures: object) -> None:
    """What a card says was measured: a table, where it is one."""
    if isinstance(figures, dict) and figures and all(isinstance(row, dict) for row in figures.values()):
        rows = [(part, {key: _cell(figure) for key, figure in row.items()}) for part, row in figures.items()]
        _print_fitting(_console(), name, rows, dropped=_CARD_DROPPED)
        return
    _console().print(yaml.safe_dump({name: figures}, sort_keys=False))


def _cell(figure: object) -> str:
    if figure is None or isinstance(figure, float):
        return _number(figure)
    return f"{figure:,}" if isinstance(figure, int) else str(figure)


def _number(figure: float | None, digits: int = 2) -> str:
    return NONE if figure is None else f"{figure:.{digits}f}"
