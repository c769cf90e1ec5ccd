"""Rows that go into the database without a server, as what the servers are measured against: a COPY of
many rows, a commit per row, and a table that was in use for long.
"""

from __future__ import annotations

import itertools
import random
import re
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pg8000.native
from load import BODIES, COLUMNS, EVENT_TYPES, PLATFORMS, REFERER, SEED, START, make_event, row_of
from rig import BenchError, Postgres, child_environment, find_program

COPY_ROWS = 200_000  # In the file that psql copies.


@dataclass(frozen=True, slots=True)
class Inserted:
    """Rows that something other than a server inserted; times in seconds, `cpu_s` of the client."""

    rows: int
    seconds: float
    cpu_s: float
    latencies_s: Sequence[float] = ()  # Sorted; of each row's commit.


def copy_field(value: object) -> str:
    """Return a value in COPY's text format; our values have nothing that would need escaping."""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def write_rows(path: Path) -> None:
    """Write the file that psql copies."""
    choose = random.Random(SEED)
    with path.open("w") as file:
        for _ in range(COPY_ROWS):
            file.write("\t".join(map(copy_field, row_of(make_event(choose)))) + "\n")


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_client(command: Sequence[str | Path]) -> str:
    """Run a client program of PostgreSQL and return what it printed. Raises BenchError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if done.returncode:
        raise BenchError(f"{Path(command[0]).name} failed:\n{done.stderr or done.stdout}")
    return done.stdout


TIMING = re.compile(r"^Time: ([0-9.]+) ms", re.MULTILINE)


def run_copy(postgres: Postgres, file: Path, seconds: int) -> Inserted:
    """Let psql copy the file into the table, again and again until the seconds are over; at least once.

    The start of psql is not counted: it measures the command itself.
    """
    psql: list[str | Path] = [find_program("psql", "postgresql-client"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
    copy = f"\\copy events ({', '.join(COLUMNS)}) FROM '{file}'"
    copies, spent, cpu_before = 0, 0.0, children_cpu_s()
    while spent < seconds:
        timing = TIMING.search(run_client([*psql, "-d", postgres.url, "-c", r"\timing on", "-c", copy]))
        if not timing:
            raise BenchError("psql did not say how long it took")
        spent += float(timing[1]) / 1e3
        copies += 1
    return Inserted(copies * COPY_ROWS, spent, children_cpu_s() - cpu_before)


def sql_choice(values: Sequence[str], number: str) -> str:
    quoted = ", ".join(pg8000.native.literal(value) for value in values)
    return f"(ARRAY[{quoted}])[{number}]"


PGBENCH_SCRIPT = f"""\
\\set ms random(0, 9999999)
\\set platform random(1, {len(PLATFORMS)})
\\set minor random(0, 19)
\\set patch random(0, 9)
\\set user random(0, 9223372036854775806)
\\set type random(1, {len(EVENT_TYPES)})
\\set score random(0, 999999)
INSERT INTO events ({", ".join(COLUMNS)}) VALUES (
  to_timestamp({START} + :ms / 1000.0), '{REFERER}', {sql_choice(PLATFORMS, ":platform")},
  '1.' || :minor::int || '.' || :patch::int, lpad(to_hex(:user::bigint), 16, '0'),
  {sql_choice(EVENT_TYPES, ":type")}, :score);
"""
PROCESSED = re.compile(r"number of transactions actually processed: (\d+)")
FAILED = re.compile(r"number of failed transactions: ([1-9]\d*)")
RATE = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


def run_pgbench(postgres: Postgres, home: Path, clients: int, seconds: int) -> Inserted:
    """Let pgbench insert and commit one row after the other from some connections."""
    script = home / "commit.sql"
    script.write_text(PGBENCH_SCRIPT)
    pgbench: list[str | Path] = [
        find_program("pgbench", "postgresql-contrib"),
        "--no-vacuum",
        "--protocol=prepared",
    ]
    cpu_before = children_cpu_s()
    text = run_client([*pgbench, "-f", script, f"-c{clients}", "-j1", f"-T{seconds}", postgres.url])
    processed, rate = PROCESSED.search(text), RATE.search(text)
    if not processed or not rate or FAILED.search(text):
        raise BenchError(f"pgbench did not do what it should:\n{text}")
    # Its rate leaves out the time that connecting took.
    rows = int(processed[1])
    return Inserted(rows, rows / float(rate[1]), children_cpu_s() - cpu_before)


def run_commits(connection: pg8000.native.Connection, seconds: int) -> Inserted:
    """Insert and commit one row after the other over a connection of pg8000."""
    choose = random.Random(SEED)
    statements = []
    for _ in range(BODIES):
        values = map(pg8000.native.literal, row_of(make_event(choose)))
        statements.append(f"INSERT INTO events ({', '.join(COLUMNS)}) VALUES ({', '.join(values)})")
    latencies: list[float] = []
    started, cpu_before = time.monotonic(), time.process_time()
    ends = before = started
    for statement in itertools.cycle(statements):
        connection.execute_simple(statement)
        ends = time.monotonic()
        latencies.append(ends - before)
        before = ends
        if ends - started >= seconds:
            break
    cpu = time.process_time() - cpu_before
    return Inserted(len(latencies), ends - started, cpu, sorted(latencies))


# --- A table that was in use for long -----------------------------------------

FILL = f"""\
INSERT INTO events ({", ".join(COLUMNS)})
SELECT to_timestamp({START} - 7776000.0 * (:rows - i) / :rows - random()), '{REFERER}',
  {sql_choice(PLATFORMS, f"1 + floor(random() * {len(PLATFORMS)})::int")},
  '1.' || floor(random() * 20) || '.' || floor(random() * 10),
  lpad(to_hex((random() * 9e18)::bigint), 16, '0'),
  {sql_choice(EVENT_TYPES, f"1 + floor(random() * {len(EVENT_TYPES)})::int")},
  floor(random() * 1000000)::int
FROM generate_series(1, :rows) AS i
"""


def fill_table(postgres: Postgres, rows: int) -> None:
    """Fill the table with rows of the 90 days before our events, in the order of their times."""
    postgres.connection.run(FILL.replace(":rows", str(rows)))
    postgres.connection.run("VACUUM ANALYZE events")
    postgres.settle()


def trim_table(postgres: Postgres) -> None:
    """Leave only what fill_table() filled the table with."""
    postgres.connection.run(f"DELETE FROM events WHERE time >= to_timestamp({START})")
    postgres.connection.run("VACUUM events")
