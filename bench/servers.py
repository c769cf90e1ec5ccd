"""What is compared: how each server is started, and the check that each does the same job."""

from __future__ import annotations

import gzip
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import UUID

from load import (
    BODY_BYTES_MAX,
    COLUMNS,
    REFERER,
    Event,
    answers,
    connected,
    encode,
    post,
)
from rig import BENCH, PROGRAM, REPOSITORY, BenchError, Child, Postgres, database_account, free_port, running

EXAMPLE_SCHEMA = REPOSITORY / "schema-example.conf.yaml"
MIX_SCHEMA = BENCH / "mix.conf.yaml"

# --- Behaviour ----------------------------------------------------------------
# What both servers must store and refuse before they are measured.

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
PURCHASE: Event = {
    "_t": "purchases",
    "user_id": "u",
    "product": "hat",
    "price": 1,
    "details": {"a": [1, None, "\\u0000"], "b\n": 0.5},
}
PURCHASE_ROW = [None, "u", "hat", 1.0, {"a": [1, None, "\\u0000"], "b\n": 0.5}]
SESSION: Event = {
    "_t": "sessions",
    "id": "123e4567-e89b-42d3-a456-426614174000",
    "started": 1_554_130_180.5,
    "user_id": "u",
}
SESSION_ROW = [UUID("123e4567-e89b-42d3-a456-426614174000"), SAMPLE_ROW[0], "u", None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a server must do with a schema; `good` is sent twice, the second time gzipped."""

    schema: Path
    good: Sequence[Event]
    stored: Sequence[tuple[str, Sequence[object]]]  # Queries, and the rows they give then.
    bad: Sequence[str | bytes]


def spoilt(sample: Event, *changes: Event) -> list[str]:
    """Return bodies in which a good event is followed by one that does not fit."""
    return [encode([sample, sample | change]) for change in changes]


BAD_GZIP = (
    gzip.compress(encode([SAMPLE]).encode())[:-9],
    gzip.compress((encode([SAMPLE]) + " " * BODY_BYTES_MAX).encode()),
)
ONE_TABLE = Job(
    EXAMPLE_SCHEMA,
    [SAMPLE],
    [(f"SELECT {', '.join(COLUMNS)} FROM events", [SAMPLE_ROW, SAMPLE_ROW])],
    (
        "{",
        "[]",
        encode([SAMPLE], key="wrong"),
        encode([{k: v for k, v in SAMPLE.items() if k != "platform"}]),
        *spoilt(
            SAMPLE,
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
        ),
        *BAD_GZIP,
    ),
)
MIX_JOB = Job(
    MIX_SCHEMA,
    [SAMPLE, PURCHASE, SESSION, SESSION],
    [
        *ONE_TABLE.stored,
        ("SELECT time, user_id, product, price, details FROM purchases", [PURCHASE_ROW, PURCHASE_ROW]),
        ("SELECT id, started, user_id, seconds FROM sessions", [SESSION_ROW]),
    ],
    (
        *ONE_TABLE.bad,
        *spoilt(
            PURCHASE,
            {"price": "1"},
            {"price": True},
            {"product": None},
            {"details": {"a": "\0"}},
            {"details": ["\ud800"]},
            {"details": float("nan")},
        ),
        *spoilt(SESSION, {"id": "1"}, {"id": 1}, {"id": None}, {"seconds": 2**31}),
    ),
)


def check_behaviour(name: str, port: int, job: Job, postgres: Postgres) -> None:
    """Check that a server stores a good batch as sent and refuses bad ones. Raises BenchError."""
    good = encode(job.good)
    with connected(port) as client:
        statuses = [post(client, good)]
        statuses.append(post(client, gzip.compress(good.encode()), Content_Encoding="gzip"))
        refusals = [
            post(client, body, **({"Content_Encoding": "gzip"} if isinstance(body, bytes) else {}))
            for body in job.bad
        ]
    if statuses != [200, 200]:
        raise BenchError(f"{name} answered {statuses} to a good batch, as it is and gzipped")
    for body, status in zip(job.bad, refusals, strict=True):
        if not 400 <= status <= 499:
            raise BenchError(f"{name} answered {status} to a bad batch: {body[:300]!r}")
    for query, rows in job.stored:
        stored = [list(row) for row in postgres.connection.run(query)]
        if stored != rows:
            raise BenchError(f"{name} stored something else than it was sent: {stored}")


# --- Servers ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server, given its port, the database, the schema file and a directory."""

    name: str
    command: Callable[[int, str, Path, Path], Sequence[str | Path]]


def attolytics_command(program: Path, port: int, url: str, schema: Path, home: Path) -> Sequence[str | Path]:
    """Return the command of a copy of attolytics.py, with a spool that no other one had before."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--db_url", url]
    spool = Path(tempfile.mkdtemp(prefix="spool-", dir=home)) / "spool.sqlite3"
    python: Sequence[str | Path] = [sys.executable, program]  # the only way that old versions know
    if program == PROGRAM:  # as attolytics.service starts it, from a directory that it may not write to
        python = ["env", f"PYTHONPATH={program.parent}", sys.executable, "-B", "-P", "-m", program.stem]
    return [*python, "-q", "--schema", schema, *where, "--spool", spool]


def fastapi_command(port: int, _url: str, _schema: Path, _home: Path) -> Sequence[str | Path]:
    """Return uvicorn's command, with its fastest event loop and parser and, as ours, no access log."""
    fast = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    where = ["--app-dir", str(BENCH), "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", "peer_fastapi:app", *where, *fast]


def other_copy(program: Path) -> Server:
    """Return the server in another copy of attolytics.py."""
    return Server(OTHER, partial(attolytics_command, program))


ATTOLYTICS = Server("Attolytics", partial(attolytics_command, PROGRAM))
OTHER = "the other copy"
FASTAPI = Server("FastAPI + asyncpg", fastapi_command)
PEER_MODULES = ("asyncpg", "fastapi", "httptools", "uvicorn", "uvloop")


@dataclass(frozen=True, slots=True)
class Running:
    """Servers under one port; `others` stand in front of them and are not asked for their memory."""

    port: int
    servers: Sequence[Child]
    others: Sequence[Child] = ()

    @property
    def pids(self) -> Sequence[int]:
        return [child.process.pid for child in (*self.servers, *self.others)]


@contextmanager
def serving(
    server: Server, job: Job, postgres: Postgres, home: Path, filled: bool = False
) -> Iterator[Running]:
    """Run a server that was seen to do its job, on empty tables.

    With `filled` the tables stay as they are, and the job is not checked.
    """
    port = free_port()
    log = home / f"{server.name.replace(' ', '-').lower()}-{port}.log"
    command = server.command(port, postgres.url, job.schema, home)
    with running(command, log, signal.SIGTERM, DATABASE_URL=postgres.url) as child:
        child.wait_until(lambda: answers(port), server.name)
        if not filled:
            postgres.clear()
            check_behaviour(server.name, port, job, postgres)
            postgres.clear()
        yield Running(port, [child])


# --- nginx --------------------------------------------------------------------

# Everything it writes stays in our directory; what is not named here is nginx's default.
NGINX_CONFIG = """\
daemon off;
worker_processes 1;
pid {home}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/nginx-body;
    proxy_temp_path {home}/nginx-proxy;
    fastcgi_temp_path {home}/nginx-fastcgi;
    uwsgi_temp_path {home}/nginx-uwsgi;
    scgi_temp_path {home}/nginx-scgi;
    upstream attolytics {{
        least_conn;
{upstreams}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://attolytics;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Real-IP $remote_addr;
        }}
    }}
}}
"""


@contextmanager
def behind_nginx(instances: int, job: Job, postgres: Postgres, home: Path) -> Iterator[Running]:
    """Run instances of Attolytics behind nginx, which keeps its connections to them."""
    with ExitStack() as stack:
        found = [stack.enter_context(serving(ATTOLYTICS, job, postgres, home)) for _ in range(instances)]
        port = free_port()
        upstreams = "\n".join(f"        server 127.0.0.1:{one.port};" for one in found)
        config = home / "nginx.conf"
        config.write_text(NGINX_CONFIG.format(home=home, upstreams=upstreams, port=port))
        # As root nginx would run its worker as yet another user; so all of it is PostgreSQL's, to whom
        # the directory belongs.
        command = ["nginx", "-e", "stderr", "-p", str(home), "-c", str(config)]
        nginx = stack.enter_context(running(command, home / "nginx.log", signal.SIGTERM, database_account()))
        nginx.wait_until(lambda: answers(port), "nginx")
        check_behaviour("nginx", port, job, postgres)
        postgres.clear()
        yield Running(port, [one.servers[0] for one in found], [nginx])
