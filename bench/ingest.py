"""Measures Attolytics beside the same service in FastAPI and asyncpg, psql's \\copy and a commit per row,
and beside another copy of itself.

    python bench/ingest.py [--rounds 5] [--seconds 5] [--only keepalive,batch100] [--json PATH] [--plot PATH]
    python bench/ingest.py --against /elsewhere/attolytics.py --no_peers

Starts a private PostgreSQL and the servers, in turn, on this machine; drives them with wrk; checks that
what was acknowledged is in the tables; prints medians of ratios. Nothing of it remains afterwards.
README.md says what is measured and how to read it.

The parts: rig.py (processes, PostgreSQL), load.py (what is sent), direct.py (what goes into the database
without a server), servers.py (what is compared), report.py (tables), plot.py. Here: Measuring, Scenarios,
Command line.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from direct import Inserted, fill_table, run_commits, run_copy, run_pgbench, trim_table, write_rows
from load import MIXED, Load, Traffic, big_bodies, check_load, run_wrk, send_all, write_script
from report import (
    Bound,
    Figure,
    Formula,
    Measurement,
    Result,
    Round,
    difference,
    only,
    ratio,
    result_json,
    tables,
)
from rig import (
    BENCH,
    STOP_S,
    BenchError,
    Postgres,
    another_database,
    cpu_s,
    find_program,
    memory_mb,
    private_postgres,
    progress,
)
from servers import (
    ATTOLYTICS,
    FASTAPI,
    MIX_JOB,
    ONE_TABLE,
    OTHER,
    PEER_MODULES,
    Running,
    Server,
    behind_nginx,
    other_copy,
    serving,
)

MEMORY_EVENTS = 1_000_000
IDLE_LOOK_S = 0.1
IDLE_SHARE = 0.2  # Of a CPU; a server that used less has nothing to do.
DIGEST_CHARS = 12
DEFAULT_ROUNDS = 5
DEFAULT_SECONDS = 5  # All scenarios together then take about 13 minutes.
DEFAULT_GROWTH_ROWS = 10_000_000


# --- Measuring ----------------------------------------------------------------
# One contestant under load, and the check that what was acknowledged is in the table.


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a run share."""

    postgres: Postgres
    mix: Postgres  # The same server, another database.
    home: Path
    seconds: int
    growth_rows: int

    def database(self, traffic: Traffic) -> Postgres:
        """Return where the events of a kind of traffic go."""
        return self.mix if traffic.mixed else self.postgres

    @property
    def rows_file(self) -> Path:
        return self.home / "rows.copy"


def check_rows(who: str, rows: int, acknowledged: int, unanswered: int) -> None:
    """Raise BenchError unless the table has what was acknowledged, and no more than was sent.

    wrk cuts the requests that are under way when its time is over; their events may be stored.
    """
    if not acknowledged <= rows <= acknowledged + unanswered:
        raise BenchError(
            f"{who}: {acknowledged} events were acknowledged, at most {unanswered} more were under way,"
            f" but the table has {rows} rows"
        )


def say(found: Measurement) -> Measurement:
    progress(f"    {found.who}: {found.events_per_s:,.0f} events/s")
    return found


class Meter:
    """What servers and PostgreSQL use from here on."""

    def __init__(self, running: Running, postgres: Postgres) -> None:
        self._running = running
        self._postgres = postgres
        self._server_before = cpu_s(*running.pids)
        self._database_before = cpu_s(postgres.pid)

    def read(self, who: str, load: Load, events_per_request: int) -> Measurement:
        """Return what a load came to, but for the rows; blocks until the servers have nothing to do."""
        server_cpu_s = self._server_cpu_s_when_idle()
        pids = [child.process.pid for child in self._running.servers]
        return Measurement(
            who=who,
            events=load.requests * events_per_request,
            seconds=load.seconds,
            rows=0,
            requests=load.requests,
            p50_ms=load.p50_us / 1e3,
            p99_ms=load.p99_us / 1e3,
            max_ms=load.max_us / 1e3,
            server_cpu_s=server_cpu_s - self._server_before,
            database_cpu_s=cpu_s(self._postgres.pid) - self._database_before,
            peak_mb=max(memory_mb(pid, "VmHWM") for pid in pids),
        )

    def _server_cpu_s_when_idle(self) -> float:
        """Wait for the requests that were under way when the load ended: they cost CPU and become rows."""
        deadline = time.monotonic() + STOP_S
        used = cpu_s(*self._running.pids)
        while time.monotonic() < deadline:
            time.sleep(IDLE_LOOK_S)
            before, used = used, cpu_s(*self._running.pids)
            if used - before < IDLE_LOOK_S * IDLE_SHARE:
                break
        return used


def measure(
    bench: Bench,
    who: str,
    traffic: Traffic,
    start: AbstractContextManager[Running],
    before: Mapping[str, int] | None = None,
) -> Measurement:
    """Start what `start` starts, put load on it, stop it, and check the tables. Raises BenchError.

    `before` is how many rows the tables have at first; else none.
    """
    postgres = bench.database(traffic)
    script = write_script(bench.home, traffic)
    with start as running:
        meter = Meter(running, postgres)
        load = run_wrk(running.port, script, bench.seconds, traffic.clients)
        found = meter.read(who, load, traffic.events_per_request)
    check_load(who, load)
    # The server has ended, so nothing is under way any more.
    rows = {table: postgres.rows(table) - (before or {}).get(table, 0) for table in traffic.per_table}
    for table, events in traffic.per_table.items():
        check_rows(who, rows[table], load.requests * events, traffic.clients * events)
    return say(replace(found, rows=sum(rows.values())))


def measure_server(server: Server, traffic: Traffic, bench: Bench) -> Measurement:
    """Measure a server on empty tables."""
    job = MIX_JOB if traffic.mixed else ONE_TABLE
    start = serving(server, job, bench.database(traffic), bench.home)
    return measure(bench, server.name, traffic, start)


def measure_nginx(who: str, instances: int, traffic: Traffic, bench: Bench) -> Measurement:
    """Measure instances of Attolytics behind nginx."""
    return measure(bench, who, traffic, behind_nginx(instances, ONE_TABLE, bench.postgres, bench.home))


def measure_direct(
    who: str, insert: Callable[[Bench], Inserted], bench: Bench, clear: bool = True
) -> Measurement:
    """Measure what inserts without a server, which must have inserted what it says. Raises BenchError."""
    postgres = bench.postgres
    if clear:
        postgres.clear()
    before = postgres.rows()
    postgres.settle()
    database_before = cpu_s(postgres.pid)
    done = insert(bench)
    database_cpu_s = cpu_s(postgres.pid) - database_before
    check_rows(who, postgres.rows() - before, done.rows, 0)
    found = Measurement(
        who, done.rows, done.seconds, done.rows, server_cpu_s=done.cpu_s, database_cpu_s=database_cpu_s
    )
    if done.latencies_s:
        percentile = [done.latencies_s[len(done.latencies_s) * n // 100] * 1e3 for n in (50, 99)]
        found = replace(found, p50_ms=percentile[0], p99_ms=percentile[1], max_ms=done.latencies_s[-1] * 1e3)
    return say(found)


def copy(bench: Bench) -> Inserted:
    return run_copy(bench.postgres, bench.rows_file, bench.seconds)


def pgbench(clients: int, bench: Bench) -> Inserted:
    return run_pgbench(bench.postgres, bench.home, clients, bench.seconds)


def commits(bench: Bench) -> Inserted:
    return run_commits(bench.postgres.connection, bench.seconds)


def measure_beside_big_bodies(who: str, server: Server, traffic: Traffic, bench: Bench) -> Measurement:
    """Measure small requests while one client sends the largest there are. Raises BenchError."""
    postgres = bench.postgres
    script = write_script(bench.home, traffic)
    with serving(server, ONE_TABLE, postgres, bench.home) as running:
        meter = Meter(running, postgres)
        with big_bodies(running.port) as acknowledged:
            load = run_wrk(running.port, script, bench.seconds, traffic.clients)
        found = meter.read(who, load, traffic.events_per_request)
    check_load(who, load)
    big_events = acknowledged()
    if not big_events:
        raise BenchError(f"{who}: no large request was answered")
    rows = postgres.rows()
    check_rows(who, rows, load.requests + big_events, traffic.clients)
    return say(replace(found, rows=rows))


def measure_memory(server: Server, bench: Bench) -> Measurement:
    """Send a server MEMORY_EVENTS events and return its memory. Raises BenchError."""
    traffic = Traffic(100)
    requests = MEMORY_EVENTS // traffic.events_per_request
    with serving(server, ONE_TABLE, bench.postgres, bench.home) as running:
        start = time.monotonic()
        send_all(running.port, requests, traffic)
        seconds = time.monotonic() - start
        [pid] = running.pids
        resident_mb, peak_mb = memory_mb(pid, "VmRSS"), memory_mb(pid, "VmHWM")
    # Every answer was received, so here the numbers must be equal.
    check_rows(server.name, bench.postgres.rows(), MEMORY_EVENTS, 0)
    return say(
        Measurement(
            who=server.name,
            events=MEMORY_EVENTS,
            seconds=seconds,
            rows=MEMORY_EVENTS,
            requests=requests,
            resident_mb=resident_mb,
            peak_mb=peak_mb,
        )
    )


# --- Scenarios ----------------------------------------------------------------
# Who is measured with what load, and what the rounds are to show.

Contestants = dict[str, Callable[[Bench], Measurement]]


def alternate(contestants: Contestants, bench: Bench, title: str, count: int) -> list[Round]:
    """Measure all contestants `count` times; who goes first changes, as the machine's mood does."""
    rounds: list[Round] = []
    for number in range(count):
        progress(f"{title}, round {number + 1} of {count}")
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        found = {who: contestants[who](bench) for who in order}
        rounds.append({who: found[who] for who in contestants})
    return rounds


@dataclass(frozen=True, slots=True)
class Scenario:
    """One or more contestants under the same load."""

    id: str
    title: str
    contestants: Contestants
    figures: Sequence[Figure]
    programs: Mapping[str, str]  # That it needs, and the Debian packages that have them.
    measure: Callable[[Contestants, Bench, str, int], list[Round]] = alternate

    def without_peers(self) -> Scenario:
        """Return the scenario with copies of Attolytics only."""
        kept = {who: measure for who, measure in self.contestants.items() if who not in PEERS}
        return replace(self, contestants=kept, programs={})

    def result(self, bench: Bench, rounds: int) -> Result:
        """Measure, and keep the figures of those who were measured. Raises BenchError."""
        measured = self.measure(self.contestants, bench, self.title, rounds)
        figures = [figure for figure in self.figures if figure.formula.whom <= measured[0].keys()]
        return Result(self.id, self.title, figures, measured)


OURS, PEER = ATTOLYTICS.name, FASTAPI.name
COPY, COMMIT = "psql \\copy", "pg8000, a commit per row"
PGBENCH_64, PGBENCH_1 = "pgbench, a commit per row, 64 clients", "pgbench, a commit per row, 1 client"
PEERS = frozenset([PEER, COPY, COMMIT, PGBENCH_64, PGBENCH_1])
PSQL_PACKAGE = {"psql": "postgresql-client"}
PGBENCH_PACKAGE = {"pgbench": "postgresql-contrib"}
TIMES_PEER = "Events per second, times those of FastAPI + asyncpg"
SHARE_OF_COPY = "Events per second, times the rows per second of psql \\copy"
TIMES_COMMITS = "Events per second, times the commits per second of pgbench"
TIMES_LATENCY = "Median latency of a lone client, times that of others (less is better)"
TIMES_OTHER = f"Speed, times that of {OTHER}"
TIMES_DIRECT = "Requests per second, times those of one instance without nginx"


def copies(other: Server | None) -> list[Server]:
    return [ATTOLYTICS, other] if other else [ATTOLYTICS]


def servers(traffic: Traffic, other: Server | None) -> Contestants:
    contestants = [*copies(other), FASTAPI]
    return {server.name: partial(measure_server, server, traffic) for server in contestants}


def direct(who: str, insert: Callable[[Bench], Inserted]) -> Contestants:
    return {who: partial(measure_direct, who, insert)}


def times_peer(at_least: float | None = None) -> Figure:
    bound = Bound(">=", at_least) if at_least else None
    return Figure(f"events/s, times {PEER}", ratio(OURS, PEER, "events_per_s"), bound, TIMES_PEER)


def times_other(at_least: float | None = None) -> Figure:
    bound = Bound(">=", at_least) if at_least else None
    return Figure(f"events/s, times {OTHER}", ratio(OURS, OTHER, "events_per_s"), bound, TIMES_OTHER)


def share_of_copy(at_least: float) -> Figure:
    share = ratio(OURS, COPY, "events_per_s")
    return Figure(f"events/s, times rows/s of {COPY}", share, Bound(">=", at_least), SHARE_OF_COPY)


def peak_memory(below: float, who: str = OURS) -> Figure:
    return Figure("peak memory, MB", only(who, "peak_mb"), Bound("<", below), worst=True)


def plain_scenarios(other: Server | None) -> list[Scenario]:
    """Return the scenarios in which Attolytics, another copy of it and its peers get the same load."""
    one = Traffic()
    hundred, thousand = Traffic(100), Traffic(1_000)
    return [
        Scenario(
            "keepalive",
            "1 event per request, keep-alive",
            servers(one, other)
            | direct(PGBENCH_64, partial(pgbench, one.clients))
            | direct(PGBENCH_1, partial(pgbench, 1)),
            (
                times_peer(5.5),
                times_other(0.93),
                Figure(
                    "events/s, times commits/s of pgbench with 64 clients",
                    ratio(OURS, PGBENCH_64, "events_per_s"),
                    panel=TIMES_COMMITS,
                ),
                peak_memory(60),
            ),
            PGBENCH_PACKAGE,
        ),
        Scenario(
            "newconn",
            "1 event per request, a new connection each",
            servers(Traffic(new_connections=True), other),
            (times_peer(4), times_other(0.75), peak_memory(60)),
            {},
        ),
        Scenario(
            "batch100",
            "100 events per request",
            servers(hundred, other) | direct(COPY, copy),
            (share_of_copy(0.75), times_peer(2), times_other(0.9), peak_memory(60)),
            PSQL_PACKAGE,
        ),
        Scenario(
            "batch1000",
            "1,000 events per request",
            servers(thousand, other) | direct(COPY, copy),
            (share_of_copy(0.7), times_peer(), times_other(0.9), peak_memory(60)),
            PSQL_PACKAGE,
        ),
        Scenario(
            "mix",
            "3 tables, json and unique, 10 events per request",
            servers(MIXED, other),
            (times_peer(), times_other(0.9), peak_memory(60)),
            {},
        ),
        Scenario(
            "gzip",
            "100 events per request, gzipped",
            servers(Traffic(100, gzipped=True), other),
            (times_peer(), times_other(), peak_memory(60)),
            {},
        ),
        Scenario(
            "alone",
            "1 client alone, 1 event per request",
            servers(Traffic(clients=1), other) | direct(COMMIT, commits),
            (
                Figure(
                    f"median latency, times {COMMIT}",
                    ratio(OURS, COMMIT, "p50_ms"),
                    panel=TIMES_LATENCY,
                ),
                Figure(
                    f"median latency, times {PEER}",
                    ratio(OURS, PEER, "p50_ms"),
                    Bound("<=", 1),
                    TIMES_LATENCY,
                ),
                Figure(
                    f"speed (1 / median latency), times {OTHER}",
                    ratio(OTHER, OURS, "p50_ms"),
                    Bound(">=", 0.7),
                    TIMES_OTHER,
                ),
                peak_memory(60),
            ),
            {},
        ),
        Scenario(
            "clients500",
            "500 clients, 1 event per request",
            servers(Traffic(clients=500), other),
            (
                times_peer(),
                times_other(),
                Figure("p99 / p50", ratio_of_latencies(OURS), Bound("<", 10)),
                peak_memory(90),
            ),
            {},
        ),
    ]


def ratio_of_latencies(who: str) -> Formula:
    p50, p99 = only(who, "p50_ms"), only(who, "p99_ms")
    return Formula(p50.whom, lambda one: p99.of(one) / p50.of(one))


QUIET, BESIDE = "8 clients with 1 event each", "the same beside 1 client with 1 MiB each"
QUIET_OTHER, BESIDE_OTHER = f"{OTHER}: {QUIET}", f"{OTHER}: {BESIDE}"


def measure_quiet(who: str, server: Server, traffic: Traffic, bench: Bench) -> Measurement:
    """Measure small requests that have a server to themselves."""
    return replace(measure_server(server, traffic, bench), who=who)


def fairness(other: Server | None) -> Scenario:
    small = Traffic(clients=8)
    contestants: Contestants = {}
    for server in copies(other):
        quiet, beside = (QUIET, BESIDE) if server is ATTOLYTICS else (QUIET_OTHER, BESIDE_OTHER)
        contestants[quiet] = partial(measure_quiet, quiet, server, small)
        contestants[beside] = partial(measure_beside_big_bodies, beside, server, small)
    at_p99 = difference(BESIDE, QUIET, "p99_ms")
    return Scenario(
        "fairness",
        "small requests beside large ones",
        contestants,
        (
            Figure("added delay at p50, ms", difference(BESIDE, QUIET, "p50_ms")),
            # How long that is depends on the machine, so beside another copy only the difference counts.
            Figure("added delay at p99, ms", at_p99, None if other else Bound("<=", 150)),
            Figure(
                f"added delay at p99, ms more than {OTHER}",
                at_p99 - difference(BESIDE_OTHER, QUIET_OTHER, "p99_ms"),
                Bound("<=", 120),
            ),
            Figure("added delay of the slowest, ms", difference(BESIDE, QUIET, "max_ms")),
            peak_memory(60, BESIDE),
        ),
        {},
    )


NGINX_1, NGINX_2 = "1 instance behind nginx", "2 instances behind nginx"


def nginx() -> Scenario:
    one = Traffic()
    return Scenario(
        "nginx",
        "behind nginx, 1 event per request (requests/s)",
        {
            OURS: partial(measure_server, ATTOLYTICS, one),
            NGINX_1: partial(measure_nginx, NGINX_1, 1, one),
            NGINX_2: partial(measure_nginx, NGINX_2, 2, one),
        },
        (
            Figure(
                "1 instance behind nginx, times 1 without",
                ratio(NGINX_1, OURS, "requests_per_s"),
                panel=TIMES_DIRECT,
            ),
            Figure(
                "2 instances behind nginx, times 1 without",
                ratio(NGINX_2, OURS, "requests_per_s"),
                panel=TIMES_DIRECT,
            ),
            Figure(
                "2 instances behind nginx, times 1 behind it",
                ratio(NGINX_2, NGINX_1, "requests_per_s"),
            ),
        ),
        {"nginx": "nginx"},
    )


def memory(other: Server | None) -> Scenario:
    return Scenario(
        "memory",
        "1,000,000 events, 100 per request",
        {server.name: partial(measure_memory, server) for server in copies(other)},
        (
            Figure("memory at the end, MB", only(OURS, "resident_mb"), Bound("<", 60), worst=True),
            peak_memory(60),
            Figure(f"peak memory, times {OTHER}", ratio(OURS, OTHER, "peak_mb")),
        ),
        {},
        lambda contestants, bench, title, _count: alternate(contestants, bench, title, 1),
    )


# --- Growth -------------------------------------------------------------------
# The same load on an empty table and, in turn, on a full one in another database. That is filled once;
# what a measurement adds is taken out before the next one.

FULL, COPY_FULL = f"{OURS}, full table", f"{COPY}, full table"


def measure_full(traffic: Traffic, bench: Bench) -> Measurement:
    """Measure Attolytics on the full table."""
    trim_table(bench.postgres)
    before = {"events": bench.postgres.rows()}
    start = serving(ATTOLYTICS, ONE_TABLE, bench.postgres, bench.home, filled=True)
    bench.postgres.settle()
    return measure(bench, FULL, traffic, start, before)


def measure_copy_full(bench: Bench) -> Measurement:
    """Measure `\\copy` on the full table."""
    trim_table(bench.postgres)
    return measure_direct(COPY_FULL, copy, bench, clear=False)


def measure_growth(contestants: Contestants, bench: Bench, title: str, count: int) -> list[Round]:
    """Fill a table in another database, and measure on that and on the empty one in turn."""
    with another_database(bench.postgres, bench.home, "filled", bench.postgres.tables) as filled:
        there = replace(bench, postgres=filled)
        with serving(ATTOLYTICS, ONE_TABLE, filled, bench.home):
            pass  # It has created the table.
        progress(f"filling the table with {bench.growth_rows:,} rows")
        fill_table(filled, bench.growth_rows)
        on_full = {who: lambda _bench, who=who: contestants[who](there) for who in (FULL, COPY_FULL)}
        return alternate({**contestants, **on_full}, bench, title, count)


def share_lost(who: str, full: str) -> Formula:
    kept = ratio(full, who, "events_per_s")
    return Formula(kept.whom, lambda one: 1 - kept.of(one))


def growth(rows: int) -> Scenario:
    hundred = Traffic(100)
    ours_lost, copy_lost = share_lost(OURS, FULL), share_lost(COPY, COPY_FULL)
    return Scenario(
        "growth",
        f"100 events per request, table of {rows:,} rows",
        {
            OURS: partial(measure_server, ATTOLYTICS, hundred),
            COPY: partial(measure_direct, COPY, copy),
            FULL: partial(measure_full, hundred),
            COPY_FULL: measure_copy_full,
        },
        (
            Figure(f"share of the events/s that {OURS} loses", ours_lost),
            Figure(f"share of the rows/s that {COPY} loses", copy_lost),
            Figure(
                "the first minus the second (0.05 is noise)",
                ours_lost - copy_lost,
                Bound("<=", 0.05),
            ),
        ),
        PSQL_PACKAGE,
        measure_growth,
    )


# --- Command line -------------------------------------------------------------

ONLY_WHEN_NAMED = "growth"  # It takes minutes.
NOT_OF_COPIES = ("nginx", "growth")  # They compare our ways to run, and us with \\copy, but no two copies.


def all_scenarios(growth_rows: int, other: Server | None = None) -> list[Scenario]:
    return [*plain_scenarios(other), fairness(other), nginx(), memory(other), growth(growth_rows)]


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type for integers from `low`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a number of at least {low}, got {text}")
        return int(text)

    return integer


def scenario_ids(text: str) -> list[str]:
    """Be an argparse type for names of scenarios."""
    known = [scenario.id for scenario in all_scenarios(DEFAULT_GROWTH_ROWS)]
    named = text.split(",")
    unknown = [name for name in named if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    return named


def program_path(text: str) -> Path:
    """Be an argparse type for another copy of attolytics.py."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a copy of attolytics.py, but there is no file {text}")
    return Path(text)


def plot_path(text: str) -> Path:
    """Be an argparse type for the plot."""
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .svg or .png, got {text}")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our options."""
    parser = argparse.ArgumentParser(
        description="Measures Attolytics beside the same service written with FastAPI and asyncpg, psql's"
        " \\copy, and a commit per row; and beside another copy of itself.",
        epilog="Everything runs on this machine and is gone afterwards. bench/README.md says more.",
    )
    add = parser.add_argument
    add("--rounds", metavar="N", type=at_least(1), default=DEFAULT_ROUNDS, help="rounds per scenario (5)")
    add("--seconds", metavar="N", type=at_least(1), default=DEFAULT_SECONDS, help="of a measurement (5)")
    add("--only", metavar="NAME,...", type=scenario_ids, help="some scenarios; without it all but growth")
    against_help = "another copy of attolytics.py, measured in turn with ours"
    add("--against", metavar="PATH", type=program_path, help=against_help)
    no_peers_help = "leave out all but copies of Attolytics, and scenarios that do not compare copies"
    add("--no_peers", action="store_true", help=no_peers_help)
    rows_help = "rows in the full table of growth (10,000,000)"
    add("--growth_rows", metavar="N", type=at_least(1), default=DEFAULT_GROWTH_ROWS, help=rows_help)
    add("--json", metavar="PATH", type=Path, help="write everything that was measured to a file")
    add("--plot", metavar="PATH", type=plot_path, help="draw the ratios, as .svg or .png")
    return parser


def check_tools(options: argparse.Namespace) -> None:
    """Raise BenchError for what the options cannot do without, and is not installed."""
    if not Path("/proc/self/status").exists():
        raise BenchError("this needs Linux: memory and CPU are read from /proc")
    if not shutil.which("wrk"):
        raise BenchError("wrk is not installed (Debian: apt install wrk)")
    needed = [*([] if options.no_peers else PEER_MODULES), *(["matplotlib"] if options.plot else [])]
    lacking = [module for module in needed if importlib.util.find_spec(module) is None]
    if lacking:
        raise BenchError(f"not installed: {', '.join(lacking)}; run pip install -e .[dev] in the repository")


def chosen_scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Return what the options ask for and can be run. Raises BenchError for a program that is missing.

    nginx alone may be missing, then its scenario is left out.
    """
    other = other_copy(options.against.absolute()) if options.against else None
    left_out = NOT_OF_COPIES if options.no_peers else (ONLY_WHEN_NAMED,)
    chosen = []
    for scenario in all_scenarios(options.growth_rows, other):
        if scenario.id not in options.only if options.only else scenario.id in left_out:
            continue
        if options.no_peers and scenario.id not in NOT_OF_COPIES:
            chosen.append(scenario.without_peers())
            continue
        if "nginx" in scenario.programs and not shutil.which("nginx"):
            progress("the scenario nginx is left out: nginx is not installed (Debian: apt install nginx)")
            continue
        for program, package in scenario.programs.items():
            if program != "nginx":
                find_program(program, package)
        chosen.append(scenario)
    if not chosen:
        raise BenchError("there is nothing left to measure")
    return chosen


def machine(postgres: Postgres) -> dict[str, object]:
    """Return what the numbers depend on."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "postgresql": postgres.version,
    }


def machine_text(facts: Mapping[str, object], options: argparse.Namespace) -> str:
    return (
        f"Python {facts['python']}, PostgreSQL {facts['postgresql']}, {facts['cpus']} CPUs"
        f" (load average {facts['load_average']:.1f} before the run); {options.rounds} rounds of"
        f" {options.seconds} s.\n{others_text(options)}"
    )


def others_text(options: argparse.Namespace) -> str:
    """Return which other copy was measured."""
    if not options.against:
        return ""
    program = options.against.read_bytes()
    lines, digest = program.count(b"\n"), hashlib.sha256(program).hexdigest()
    return f"The other copy: {options.against}, {lines:,} lines, SHA-256 {digest[:DIGEST_CHARS]}.\n"


def write_document(
    options: argparse.Namespace, facts: Mapping[str, object], results: Sequence[Result], home: Path
) -> None:
    """Write the JSON and the plot that the options ask for. Raises BenchError."""
    document = {
        "machine": facts,
        "settings": {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "against": str(options.against) if options.against else None,
        },
        "scenarios": [result_json(result) for result in results],
    }
    path = options.json or home / "results.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    if options.plot:
        command = [sys.executable, BENCH / "plot.py", path, options.plot]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"the plot could not be drawn:\n{done.stderr}")


def run_all(options: argparse.Namespace, home: Path) -> int:
    """Measure what the options ask for, print it and write it; return the exit code. Raises BenchError.

    A scenario that fails is reported, and the others are measured all the same.
    """
    scenarios = chosen_scenarios(options)
    results, failures = [], []
    with ExitStack() as stack:
        postgres = stack.enter_context(private_postgres(home))
        mix = stack.enter_context(another_database(postgres, home, "mix", list(MIXED.per_table)))
        facts = machine(postgres)
        bench = Bench(postgres, mix, home, options.seconds, options.growth_rows)
        write_rows(bench.rows_file)
        for scenario in scenarios:
            try:
                results.append(scenario.result(bench, options.rounds))
            except BenchError as error:
                failures.append(f"ingest.py: {scenario.id}: {error}\n")
                progress(failures[-1])
    if results:
        sys.stdout.write(f"{machine_text(facts, options)}\n{tables(results)}")
        write_document(options, facts, results, home)
    sys.stderr.writelines(failures)
    return 1 if failures or not results else 0


def main() -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args()

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)  # runs every clean-up, as Ctrl-C does

    signal.signal(signal.SIGTERM, end)
    try:
        check_tools(options)
        with tempfile.TemporaryDirectory(prefix="attolytics-bench-") as home:
            return run_all(options, Path(home))
    except BenchError as error:
        sys.stderr.write(f"ingest.py: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
