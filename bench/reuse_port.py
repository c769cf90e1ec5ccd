"""Measures instances that share a port (--reuse_port), and what a restart of one does to their clients.

    python bench/reuse_port.py [--rounds 3] [--seconds 4] [--restart_seconds 20]

Starts a private PostgreSQL and one or two instances, and drives them with wrk. While one of two is
restarted again and again it counts the requests that got no answer, with the kernel's setting tcp_migrate_req
off and, if we may change it, on. README.md says what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ingest import check_rows
from load import CLIENTS, Traffic, answers, run_wrk, write_script
from rig import PROGRAM, BenchError, Postgres, free_port, private_postgres, running
from servers import ONE_TABLE, attolytics_command

MIGRATE = Path("/proc/sys/net/ipv4/tcp_migrate_req")
KINDS = {"kept connections": Traffic(), "new connections": Traffic(new_connections=True)}
SERVED_S = 1  # How long a restarted instance serves before it is stopped again.


class Instances:
    """Instances on one port."""

    def __init__(self, postgres: Postgres, home: Path, count: int) -> None:
        self.port = free_port()
        self._postgres, self._home = postgres, home
        self._stacks = [contextlib.ExitStack() for _ in range(count)]

    def start(self, number: int) -> None:
        """Start one, and wait until it listens."""
        command = attolytics_command(PROGRAM, self.port, self._postgres.url, ONE_TABLE.schema, self._home)
        command = [part for part in command if part != "-q"]
        log = self._home / f"instance-{number}.log"
        child = self._stacks[number].enter_context(running([*command, "--reuse_port"], log, signal.SIGTERM))
        child.wait_until(lambda: "listens on" in log.read_text(), f"instance {number}")

    def stop(self, number: int) -> None:
        self._stacks[number].close()

    def __enter__(self) -> Instances:
        for number in range(len(self._stacks)):
            self.start(number)
        assert answers(self.port)
        self._postgres.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self._stacks)):
            self.stop(number)


def rates(postgres: Postgres, home: Path, seconds: int, rounds: int) -> Iterator[str]:
    """Yield what one instance and two serve, in turn."""
    for kind, traffic in KINDS.items():
        script, found = write_script(home, traffic), {1: list[float](), 2: list[float]()}
        for count in [1, 2] * rounds:
            with Instances(postgres, home, count) as instances:
                load = run_wrk(instances.port, script, seconds)
            if load.refused or load.broken or load.late:
                raise BenchError(f"{kind}, {count} instances: {load}")
            check_rows(kind, postgres.rows(), load.requests, CLIENTS)
            found[count].append(load.requests / load.seconds)
        one, two = map(statistics.median, found.values())
        ratios = [b / a for a, b in zip(*found.values(), strict=True)]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        numbers = f"1 instance {one:,.0f} /s, 2 instances {two:,.0f} /s"
        yield f"{kind}: {numbers}; median ratio {ratio:.2f} ({spread})"


def restarts(postgres: Postgres, home: Path, seconds: int, kind: str) -> str:
    """Restart one of two instances under load, again and again; return how many requests that cost."""
    script, count = write_script(home, KINDS[kind]), 0
    with Instances(postgres, home, 2) as instances, ThreadPoolExecutor(1) as pool:
        load = pool.submit(run_wrk, instances.port, script, seconds)
        deadline = time.monotonic() + seconds - SERVED_S
        while time.monotonic() < deadline:
            time.sleep(SERVED_S)
            instances.stop(1)
            instances.start(1)
            count += 1
        found = load.result()
    check_rows(kind, postgres.rows(), found.requests, CLIENTS + found.broken)
    lost = f"{found.broken} without an answer, {found.refused} refused"
    return f"{kind}: {count} restarts of one of two, {found.requests:,} requests answered, {lost}"


@contextlib.contextmanager
def migrating(setting: str) -> Iterator[bool]:
    """Set tcp_migrate_req for as long as the block runs, and say whether it is so."""
    before = MIGRATE.read_text() if MIGRATE.exists() else ""
    with contextlib.suppress(OSError):
        MIGRATE.write_text(setting)
    try:
        yield MIGRATE.exists() and MIGRATE.read_text().strip() == setting
    finally:
        with contextlib.suppress(OSError):
            MIGRATE.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=int, default=4, metavar="N")
    parser.add_argument("--restart_seconds", type=int, default=20, metavar="N")
    options = parser.parse_args()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="attolytics-bench-") as directory,
            private_postgres(Path(directory)) as postgres,
        ):
            home = Path(directory)
            for line in rates(postgres, home, options.seconds, options.rounds) if options.rounds else ():
                sys.stdout.write(f"{line}\n")
            for setting, kind in itertools.product("01", KINDS if options.restart_seconds else ()):
                with migrating(setting) as is_so:
                    line = restarts(postgres, home, options.restart_seconds, kind) if is_so else "not allowed"
                    sys.stdout.write(f"tcp_migrate_req={setting}, {line}\n")
    except BenchError as error:
        sys.stderr.write(f"reuse_port.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
