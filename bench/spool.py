"""What the spool costs, and how fast it is replayed.

    python bench/spool.py [--rounds 5] [--seconds 5] [--events 1000000] [--file PATH]

Needs what bench/ingest.py needs, and psql. Prints three things: the rate of one event per request, from
64 clients, with the database there and with it away; the rate of a replay, next to psql's \\copy of the same
rows into the same table; and the server's memory at the peak of the replay.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

from direct import run_client
from load import Traffic, answers, check_load, run_wrk, write_script
from rig import (
    PROGRAM,
    REPOSITORY,
    BenchError,
    Child,
    Postgres,
    find_program,
    free_port,
    memory_mb,
    private_postgres,
    running,
)

SPOOL_LIMIT = "100G"
ROUND_S = 5
REPLAY_S = 1_800  # As long as anybody waits for 10 million events.
DONE = re.compile(r"replayed all (\d+) events in ([0-9.]+) s")
AWAY = "postgres://bench@/postgres?host=%2Fnonexistent"


def serve(
    program: Path, home: Path, url: str, spool: str, port: int, *options: str
) -> AbstractContextManager[Child]:
    command = [
        sys.executable,
        str(program),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--schema", str(REPOSITORY / "schema-example.conf.yaml")),
        *("--spool", str(home / spool), "--spool_limit", SPOOL_LIMIT, *(["--db_url", url] if url else [])),
        *options,
    ]
    return running(command, home / "attolytics.log", signal.SIGTERM)


def requests_per_s(program: Path, home: Path, url: str, spool: str, seconds: int) -> float:
    """Return the rate of one event per request."""
    script = write_script(home, Traffic())
    port = free_port()
    with serve(program, home, url, spool, port, "-q") as child:
        child.wait_until(lambda: answers(port), "Attolytics")
        load = run_wrk(port, script, seconds)
        check_load("Attolytics", load)
    return load.requests / load.duration_us * 1e6


def compare_rates(program: Path, postgres: Postgres, home: Path, rounds: int, seconds: int) -> None:
    ratios, rates = [], []
    for number in range(rounds):
        places = [(postgres.url, "there.sqlite3"), (AWAY, f"away{number}.sqlite3")]
        measured = {}
        for url, spool in places if number % 2 else places[::-1]:
            measured[url] = requests_per_s(program, home, url, spool, seconds)
        rates.append((measured[postgres.url], measured[AWAY]))
        ratios.append(measured[AWAY] / measured[postgres.url])
        postgres.clear()
    there, away = (statistics.median(rate) for rate in zip(*rates, strict=True))
    sys.stdout.write(
        f"one event per request, 64 clients: {there:,.0f} /s with the database there, {away:,.0f} /s with it"
        f" away; median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n"
    )


def fill(program: Path, home: Path, events: int) -> int:
    """Fill a spool with at least so many events; return how many are acknowledged."""
    script = write_script(home, Traffic(100))
    port = free_port()
    acknowledged = 0
    with serve(program, home, "", "full.sqlite3", port, "-q") as child:
        child.wait_until(lambda: answers(port), "Attolytics")
        while acknowledged < events:
            load = run_wrk(port, script, ROUND_S)
            check_load("Attolytics", load)
            acknowledged += load.requests * 100
    return acknowledged


def replay(program: Path, postgres: Postgres, home: Path, acknowledged: int) -> float:
    """Replay the full spool and say how it went; return the events per second."""
    size = (home / "full.sqlite3").stat().st_size
    port = free_port()
    deadline = time.monotonic() + REPLAY_S
    with serve(program, home, postgres.url, "full.sqlite3", port) as child:
        while not (done := DONE.search(child.log.read_text())):
            if child.process.poll() is not None:
                raise child.failure("Attolytics ended:")
            if time.monotonic() > deadline:
                raise child.failure(f"the log does not say within {REPLAY_S} s that all was replayed:")
            time.sleep(0.5)
        peak_mb = memory_mb(child.process.pid, "VmHWM")
    events, seconds = int(done[1]), float(done[2])
    rows = postgres.rows()
    if not rows == events >= acknowledged:
        raise BenchError(f"{acknowledged} acknowledged, {events} replayed, {rows} rows")
    left = (home / "full.sqlite3").stat().st_size
    sys.stdout.write(
        f"replay of {events:,} events: {events / seconds:,.0f} per second; peak memory {peak_mb:.0f} MB;"
        f" the file had {size / 1e6:,.0f} MB, and {left / 1e6:.1f} MB afterwards\n"
    )
    return events / seconds


def copy(postgres: Postgres, home: Path) -> float:
    """Copy the table's rows out and in again with psql; return the rows per second of the way in."""
    file, rows = home / "rows.copy", postgres.rows()
    program = find_program("psql", "postgresql-client")
    psql: list[str | Path] = [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", postgres.url, "-c"]
    run_client([*psql, f"\\copy events TO '{file}'"])
    postgres.clear()
    started = time.monotonic()
    run_client([*psql, f"\\copy events FROM '{file}'"])
    return rows / (time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, default=PROGRAM, help="another copy of attolytics.py")
    options = parser.parse_args()
    program = options.file.absolute()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="attolytics-bench-") as directory,
            private_postgres(Path(directory)) as postgres,
        ):
            home = Path(directory)
            if options.rounds:
                compare_rates(program, postgres, home, options.rounds, options.seconds)
            if options.events:
                rate = replay(program, postgres, home, fill(program, home, options.events))
                limit = copy(postgres, home)
                sys.stdout.write(f"psql \\copy: {limit:,.0f} rows per second; ratio {rate / limit:.2f}\n")
    except BenchError as error:
        sys.stderr.write(f"spool.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
