"""What the cards of trained models have in common: their data, their figures, and where they fail, as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from guardmw.evaluate.rows import Row

# A benchmark is named among the failures from these on.
_MISSES, _ALARMS = 0.6, 0.2


def sources(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The data sets behind the rows, with their licences and how many rows each gave."""
    counts = Counter(row.source for row in rows)
    licences: dict[str, set[str]] = {source: set() for source in counts}
    for row in rows:
        licences[row.source].add(row.license or "unknown")
    return {
        source: {"rows": count, "license": ", ".join(sorted(licences[source]))}
        for source, count in sorted(counts.items())
    }


def rounded(given: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The same with its floats at 4 places, but for a recipe's: a learning rate of 0.00002 would be none."""
    if isinstance(given, dict):
        return {key: value if key == "recipe" else rounded(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [rounded(value) for value in given]
    return round(given, 4) if isinstance(given, float) else given


def failures(bench: Mapping[str, Any]) -> str:
    """Benchmarks that a guard does badly on, as a list."""
    lines = []
    for name, of in bench.items():
        if name != "all" and of.get("recall") is not None and of["recall"] < _MISSES:
            lines.append(f"- {name}: misses {1 - of['recall']:.0%} of {of['unsafe']} unsafe rows")
        if name != "all" and of.get("fpr") is not None and of["fpr"] > _ALARMS:
            lines.append(f"- {name}: takes {of['fpr']:.0%} of {of['rows'] - of['unsafe']} safe rows for unsafe")
    return "\n".join(lines) or f"No benchmark with a recall under {_MISSES} or a false-positive rate over {_ALARMS}."


def figures(by_name: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> str:
    """A table of figures by name."""
    rows = ((name, *(number(figures.get(key)) for key in keys)) for name, figures in by_name.items())
    return table(("", *(key.replace("_", " ") for key in keys)), rows)


def number(value: float | None) -> str:
    """A figure in a cell."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
