"""From measurements to tables and JSON. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contestant under load for a while. None: does not apply to it.

    In `seconds` it acknowledges `events`; it was seen to store `rows`, some of which were not acknowledged
    in time. CPU is counted until all of them were stored.
    """

    who: str
    events: int
    seconds: float
    rows: int
    requests: int | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    server_cpu_s: float | None = None  # Or of the client that inserts in a server's place.
    database_cpu_s: float | None = None
    peak_mb: float | None = None  # 10**6 bytes
    resident_mb: float | None = None

    @property
    def events_per_s(self) -> float:
        return self.events / self.seconds

    @property
    def requests_per_s(self) -> float | None:
        return None if self.requests is None else self.requests / self.seconds

    @property
    def server_cpu_per_million(self) -> float | None:
        """CPU seconds of the server per million events."""
        return None if self.server_cpu_s is None else self.server_cpu_s / self.rows * 1e6

    @property
    def database_cpu_per_million(self) -> float | None:
        """CPU seconds of PostgreSQL per million events."""
        return None if self.database_cpu_s is None else self.database_cpu_s / self.rows * 1e6


Round = Mapping[str, Measurement]  # By contestant, one measured directly after the other.


# --- Figures ------------------------------------------------------------------
# What is computed from a round, and what is required of it.


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure has to be."""

    sign: str  # >=, <= or <
    limit: float

    def is_met(self, value: float) -> bool:
        """Return whether a figure is as required."""
        if self.sign == ">=":
            return value >= self.limit
        return value <= self.limit if self.sign == "<=" else value < self.limit

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Formula:
    """How to compute a number from a round, and the contestants that it takes."""

    whom: frozenset[str]
    of: Callable[[Round], float]

    def __sub__(self, other: Formula) -> Formula:
        return Formula(self.whom | other.whom, lambda one: self.of(one) - other.of(one))


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that each round gives; `panel` is the part of the plot it belongs to."""

    name: str
    formula: Formula
    bound: Bound | None = None
    panel: str | None = None
    worst: bool = False  # The largest of all rounds counts, not the median: memory.

    def values(self, rounds: Sequence[Round]) -> list[float]:
        """Return the figure of each round."""
        return [self.formula.of(one) for one in rounds]

    def result(self, rounds: Sequence[Round]) -> float:
        """Return what counts, over all rounds."""
        return (max if self.worst else median)(self.values(rounds))

    def verdict(self, rounds: Sequence[Round]) -> str:
        """Return whether the bound, if there is one, was kept."""
        if self.bound is None:
            return ""
        return "ok" if self.bound.is_met(self.result(rounds)) else "missed"


def value(measurement: Measurement, field: str) -> float:
    """Return a field that was measured."""
    number = getattr(measurement, field)
    if not isinstance(number, int | float):
        raise TypeError(f"{measurement.who} has no {field}")
    return float(number)


def only(who: str, field: str) -> Formula:
    """Return how to take one contestant's field."""
    return Formula(frozenset([who]), lambda one: value(one[who], field))


def ratio(who: str, peer: str, field: str) -> Formula:
    """Return how to compute one contestant's field divided by another's."""
    return Formula(frozenset([who, peer]), lambda one: value(one[who], field) / value(one[peer], field))


def difference(who: str, peer: str, field: str) -> Formula:
    """Return how to compute one contestant's field minus another's."""
    return only(who, field) - only(peer, field)


# --- Results ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """All rounds of a scenario."""

    id: str
    title: str
    figures: Sequence[Figure]
    rounds: Sequence[Round]


MEDIANS = (
    "events_per_s",
    "requests_per_s",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "server_cpu_per_million",
    "database_cpu_per_million",
)
LARGEST = ("peak_mb", "resident_mb")


def summary(measurements: Sequence[Measurement]) -> dict[str, float | None]:
    """Return the medians of one contestant's measurements, and its largest memory."""
    found: dict[str, float | None] = {}
    for field in (*MEDIANS, *LARGEST):
        numbers = [n for n in (getattr(m, field) for m in measurements) if n is not None]
        combine = max if field in LARGEST else median
        found[field] = combine(numbers) if numbers else None
    return found


def contestants(result: Result) -> dict[str, dict[str, float | None]]:
    """Return each contestant's summary, in the order of the first round."""
    return {who: summary([one[who] for one in result.rounds]) for who in result.rounds[0]}


# --- Tables -------------------------------------------------------------------


def shown(number: float | None) -> str:
    """Return a number with three digits, or all before the point."""
    if number is None:
        return ""
    size = abs(number)
    return f"{number:,.0f}" if size >= 100 else f"{number:.1f}" if size >= 10 else f"{number:.2f}"


FIGURES_HEAD = ("scenario", "figure", "median", "smallest to largest", "required", "")
NUMBERS_HEAD = (
    "scenario",
    "contestant",
    "events/s",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "max ms",
    "server CPU s",
    "database CPU s",
    "memory MB",
)


def figures_rows(result: Result) -> list[list[str]]:
    rows = []
    for number, figure in enumerate(result.figures):
        values = figure.values(result.rounds)
        span = f"{shown(min(values))} to {shown(max(values))}"
        required = str(figure.bound) if figure.bound else ""
        name = result.title if number == 0 else ""
        middle = shown(figure.result(result.rounds))
        rows.append([name, figure.name, middle, span, required, figure.verdict(result.rounds)])
    return rows


def numbers_rows(result: Result) -> list[list[str]]:
    fields = (*MEDIANS, "peak_mb")
    return [
        [result.title if number == 0 else "", who, *(shown(numbers[field]) for field in fields)]
        for number, (who, numbers) in enumerate(contestants(result).items())
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned so that it reads well as text too; numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |\n"

    return "".join(line(cells) for cells in (head, rule, *rows))


def tables(results: Sequence[Result]) -> str:
    """Return the ratios with what is required of them, and the numbers behind them."""
    figures = [row for result in results for row in figures_rows(result)]
    numbers = [row for result in results for row in numbers_rows(result)]
    return f"{markdown(FIGURES_HEAD, figures)}\n{markdown(NUMBERS_HEAD, numbers)}"


# --- JSON ---------------------------------------------------------------------


def figure_json(figure: Figure, rounds: Sequence[Round]) -> dict[str, object]:
    values = figure.values(rounds)
    return {
        "name": figure.name,
        "panel": figure.panel,
        "result": figure.result(rounds),
        "smallest": min(values),
        "largest": max(values),
        "rounds": values,
        "required": {"sign": figure.bound.sign, "limit": figure.bound.limit} if figure.bound else None,
        "verdict": figure.verdict(rounds),
    }


def result_json(result: Result) -> dict[str, object]:
    """Return everything about a scenario for the JSON file."""
    return {
        "id": result.id,
        "title": result.title,
        "figures": [figure_json(figure, result.rounds) for figure in result.figures],
        "contestants": contestants(result),
        "rounds": [{who: asdict(measurement) for who, measurement in one.items()} for one in result.rounds],
    }
