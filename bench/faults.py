"""Load and random faults for minutes, then a comparison of what was acknowledged with what is stored.

    python bench/faults.py [--minutes 2] [--seeds 1-3] [--file PATH] [--pgbouncer]

Six clients send events to a server, while the server, PostgreSQL, its backends and the
network between them are killed, stopped, cut, blocked and restarted in turn; with each seed anew, for so many
minutes. Exits with 1 if an event that was answered with 200 is missing, any event is stored twice, an answer
took more than 1.2 s or blamed a client. What the server wrote is then kept.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pg8000.exceptions
from load import HEADERS, answers, connected
from rig import (
    PROGRAM,
    START_S,
    BenchError,
    Child,
    accepts,
    connect,
    create_cluster,
    database_account,
    find_binaries,
    free_port,
    progress,
    running,
    stop,
)

CLIENTS = 6
LARGE_EVENTS = 1_001  # Of the last client's requests; the others send 1, 2, 3 and so on.
LARGE_PAUSE_S = 0.05  # Between them, so that there is not too much to count.
AWAY_PAUSE_S = 0.02  # Before a client that got no answer tries again.
ANSWER_S_MAX = 1.2
REPLAY_S = 120  # For all that is in the spool, while the clients go on.
POLL_S = 0.02
SESSIONS = "application_name = 'attolytics' AND datname = 'storm'"
PATH = "/apps/app/events"
SCHEMA = """
tables:
  events:
    columns: [{ name: number, type: i64 }]
  probe:
    columns: [{ name: text }]
apps:
  app: { secret_key: key, tables: [events, probe] }
"""


def encode(events: list[dict[str, object]]) -> bytes:
    """Return the body of a request."""
    return json.dumps({"secret_key": "key", "events": events}).encode()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Block until a condition holds. Raises BenchError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{what} did not happen within {seconds:g} s")
        time.sleep(POLL_S)


# --- What the faults hit --------------------------------------------------------
# A PostgreSQL and a server that can be stopped and started again, and the network between them.


class Cluster:
    """A private PostgreSQL, reached over a Unix socket in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._stack = ExitStack()
        create_cluster(find_binaries(), home, database_account())
        self.start()

    def start(self) -> None:
        """Start PostgreSQL, and wait until it answers. Raises BenchError."""
        deadline = time.monotonic() + START_S
        # A crash of the machine would lose something without fsync, but not one of PostgreSQL.
        options = ["-p", "5432", "-c", "listen_addresses=", "-c", "fsync=off", "-c", "log_min_messages=fatal"]
        program, log = find_binaries() / "postgres", self.home / "postgres.log"
        command: list[str | Path] = [program, "-D", self.home / "data", "-k", self.home, *options]
        while True:
            child = self._stack.enter_context(running(command, log, signal.SIGQUIT, database_account()))
            try:
                child.wait_until(lambda: accepts(self.home), "PostgreSQL")
            except BenchError:
                # The backends of one that was killed hold its memory until they notice.
                self._stack.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
                continue
            self._process = child.process
            return

    def stop(self, how: signal.Signals) -> None:
        """End PostgreSQL: SIGINT is a fast shutdown, SIGKILL a crash."""
        stop(self._process, how)
        self._stack.close()

    def close(self) -> None:
        self._stack.close()

    def sql(self, sql: str, database: str = "storm") -> list[list[object]]:
        """Run SQL; waits for a PostgreSQL that is about to be there again. Raises BenchError."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                with contextlib.closing(connect(self.home, database)) as connection:
                    return list(connection.run(sql) or [])
            except (pg8000.exceptions.Error, OSError) as error:
                if time.monotonic() > deadline:
                    raise BenchError(f"{sql}: {error}") from None
            time.sleep(POLL_S)


@contextlib.contextmanager
def pooler(home: Path) -> Iterator[Path]:
    """Run a PgBouncer in transaction mode before a PostgreSQL; yield its socket. Raises BenchError."""
    directory = home / "pooler"
    directory.mkdir()
    settings = ["pool_mode = transaction", "auth_type = any", "listen_port = 6432"]
    # It asks again soon after PostgreSQL was away, and a session that was read-only does not stay so.
    settings += [f"unix_socket_dir = {directory}", "server_login_retry = 1", "server_idle_timeout = 1"]
    databases = f"* = host={home} port=5432 user=bench"
    (directory / "pgbouncer.ini").write_text(
        "\n".join(["[databases]", databases, "[pgbouncer]", *settings]) + "\n"
    )
    account, program = database_account(), shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        raise BenchError("pgbouncer is not installed")
    if account:
        os.chown(directory, account.uid, account.gid)
    command: list[str | Path] = [program, directory / "pgbouncer.ini"]
    with running(command, directory / "log", signal.SIGKILL, account) as child:
        path = directory / ".s.PGSQL.6432"
        child.wait_until(path.exists, "PgBouncer")
        yield path


class Proxy:
    """A TCP proxy in front of PostgreSQL that can lose what goes through it."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.drops_requests = False
        self.drops_answers = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut all connections."""
        for pair in self._pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._pairs.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(str(self._target))
                except OSError:
                    client.close()
                    server.close()
                    continue
                self._pairs.append((client, server))
                for source, sink, is_request in [(client, server, True), (server, client, False)]:
                    threading.Thread(target=self._pump, args=(source, sink, is_request), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not (self.drops_requests if is_request else self.drops_answers):
                    sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Server:
    """An Attolytics on a port, with a spool in `home`, that can be stopped and started again."""

    def __init__(self, program: Path, url: str, home: Path) -> None:
        self.port = free_port()
        self.spool = home / "spool.sqlite3"
        self._home = home
        self._stack = ExitStack()
        self._starts = 0
        (home / "schema.yaml").write_text(SCHEMA)
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--db_url", url]
        files = ["--schema", str(home / "schema.yaml"), "--spool", str(self.spool)]
        self._command: list[str | Path] = [sys.executable, program, *where, *files]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers. Raises BenchError."""
        self._starts += 1
        log = self._home / f"attolytics-{self._starts}.log"
        self._child = self._stack.enter_context(running(self._command, log, signal.SIGTERM))
        self._child.wait_until(lambda: answers(self.port), "Attolytics")

    def stop(self, how: signal.Signals) -> None:
        """End it. Raises BenchError when SIGTERM is not followed by a proper end."""
        child: Child = self._child
        stop(child.process, how)
        self._stack.close()
        if how is signal.SIGTERM and child.process.returncode:
            raise child.failure(f"Attolytics ended with code {child.process.returncode}:")

    def close(self) -> None:
        self._stack.close()

    def left(self, table: str) -> int:
        """Return how many rows a table of its spool has, when it has ended."""
        with contextlib.closing(sqlite3.connect(self.spool)) as spool:
            return int(spool.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


# --- Clients ------------------------------------------------------------------


class Clients:
    """Threads that send events, each its own, and the account of the answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._end = threading.Event()
        self._lock = threading.Lock()  # Guards what follows.
        self.accepted: set[int] = set()
        self.statuses: Counter[int] = Counter()
        self.unanswered = 0
        self.slowest_s = 0.0
        self.slowest_during = ""
        self.fault = "the start"  # Or what happens now.
        self._threads = [threading.Thread(target=self._send_all, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _send_all(self, client: int) -> None:
        """Send requests until the end; every other client keeps its connection."""
        with connected(self._port) as connection:
            size = LARGE_EVENTS if client == CLIENTS - 1 else 1 + client
            number = client * 100_000_000
            while not self._end.is_set():
                numbers = range(number, number + size)
                number += size
                self._send(connection, numbers)
                if client % 2:
                    connection.close()
                if size == LARGE_EVENTS:
                    time.sleep(LARGE_PAUSE_S)

    def _send(self, connection: http.client.HTTPConnection, numbers: range) -> None:
        body = encode([{"_t": "events", "number": n} for n in numbers])
        before, started = self.fault, time.monotonic()
        status = None
        try:
            connection.request("POST", PATH, body, HEADERS)
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, http.client.HTTPException):
            connection.close()
        # Who waits in vain waits, too.
        seconds = time.monotonic() - started
        with self._lock:
            if seconds > self.slowest_s:
                self.slowest_s = seconds
                self.slowest_during = " to ".join(dict.fromkeys([before, self.fault]))
            if status is None:
                self.unanswered += 1
            else:
                self.statuses[status] += 1
            if status == 200:
                self.accepted.update(numbers)
        if status is None:
            time.sleep(AWAY_PAUSE_S)


# --- Faults -------------------------------------------------------------------


class Storm:
    """Faults that happen at random, one after the other; each is over when the next begins."""

    def __init__(self, cluster: Cluster, proxy: Proxy, server: Server, chance: random.Random) -> None:
        self._cluster = cluster
        self._proxy = proxy
        self._server = server
        self._random = chance
        self.kinds: list[Callable[[], bool | None]] = [
            self.kill_server,
            self.stop_server,
            self.kill_postgres,
            self.restart_postgres,
            self.kill_both,
            self.kill_backend,
            self.terminate_backend,
            self.cancel_statements,
            self.pause_backend,
            self.cut_network,
            self.lose_answers,
            self.lose_everything,
            self.lock_table,
            self.be_read_only,
            self.hide_table,
        ]

    def rage(self, seconds: float, clients: Clients) -> Counter[str]:
        """Let faults happen; return how many of each kind."""
        happened: Counter[str] = Counter()
        deadline = time.monotonic() + seconds
        while True:
            for fault in self._random.sample(self.kinds, len(self.kinds)):
                self.pause(0.3, 1.2)
                if time.monotonic() > deadline:
                    return happened
                name = fault.__name__.replace("_", " ")
                clients.fault = name
                if fault() is not False:
                    happened[name] += 1
                clients.fault = f"after {name}"

    def pause(self, low: float, high: float) -> None:
        time.sleep(self._random.uniform(low, high))

    def wait_for_database(self) -> None:
        """Wait until the spool is empty. Raises BenchError."""
        body = encode([{"_t": "probe", "text": "x"}])

        def is_stored() -> bool:
            with connected(self._server.port) as connection:
                try:
                    connection.request("POST", PATH, body, HEADERS)
                    answer = json.loads(connection.getresponse().read())
                except (OSError, http.client.HTTPException):
                    return False
            return bool(answer.get("stored") == "database")

        wait_until(is_stored, REPLAY_S, "an answer that says: stored in the database")

    def backend(self) -> int | None:
        """Return the process of one of the server's sessions; None if there is none for a while."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            if rows := self._cluster.sql(f"SELECT pid FROM pg_stat_activity WHERE {SESSIONS}"):
                return int(str(self._random.choice(rows)[0]))
            time.sleep(POLL_S)
        return None

    # The faults. False: there was nothing to hit.

    def kill_server(self) -> None:
        self._server.stop(signal.SIGKILL)
        self._server.start()

    def stop_server(self) -> None:
        self._server.stop(signal.SIGTERM)
        self._server.start()

    def kill_postgres(self) -> None:
        self._cluster.stop(signal.SIGKILL)
        self.pause(0, 2)
        self._cluster.start()

    def restart_postgres(self) -> None:
        self._cluster.stop(signal.SIGINT)
        self._cluster.start()

    def kill_both(self) -> None:
        self._cluster.stop(signal.SIGKILL)
        self._server.stop(signal.SIGKILL)
        steps = [self._cluster.start, self._server.start]
        self._random.shuffle(steps)
        for step in steps:
            step()

    def kill_backend(self) -> bool:
        if not (pid := self.backend()):
            return False
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)  # PostgreSQL ends all the others, too, and starts anew.
        self._cluster.sql("SELECT 1")
        return True

    def terminate_backend(self) -> bool:
        if not (pid := self.backend()):
            return False
        self._cluster.sql(f"SELECT pg_terminate_backend({pid})")
        return True

    def cancel_statements(self) -> None:
        for _ in range(20):
            self._cluster.sql(f"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {SESSIONS}")
            self.pause(0, 0.05)

    def pause_backend(self) -> bool:
        if not (pid := self.backend()):
            return False
        os.kill(pid, signal.SIGSTOP)
        self.pause(0.2, 14)  # Sometimes it is given up, and runs its flush late.
        os.kill(pid, signal.SIGCONT)
        return True

    def cut_network(self) -> None:
        self._proxy.cut()

    def lose_answers(self) -> None:
        self._proxy.drops_answers = True
        self.pause(0.1, 0.5)
        self._proxy.cut()
        self._proxy.drops_answers = False

    def lose_everything(self) -> None:
        self._proxy.drops_answers = self._proxy.drops_requests = True
        self.pause(0.5, 3)
        self._proxy.drops_answers = self._proxy.drops_requests = False
        self._proxy.cut()  # What was dropped cannot come back.

    def lock_table(self) -> None:
        with contextlib.closing(connect(self._cluster.home, "storm")) as session:
            session.run("BEGIN; LOCK TABLE events")
            self.pause(0.2, 3)
            session.run("COMMIT")

    def be_read_only(self) -> None:
        self._cluster.sql("ALTER DATABASE storm SET default_transaction_read_only = on", "postgres")
        self.terminate_backend()
        self.pause(0.2, 1)
        self._cluster.sql("ALTER DATABASE storm RESET default_transaction_read_only", "postgres")

    def hide_table(self) -> None:
        self.wait_for_database()  # At its start the server would create the table.
        self._cluster.sql("ALTER TABLE events RENAME TO hidden")
        self.pause(0.2, 1)
        self._cluster.sql("ALTER TABLE hidden RENAME TO events")


# --- Command line -------------------------------------------------------------


def run(program: Path, seed: int, seconds: float, home: Path, pooled: bool) -> tuple[int, bool]:
    """Let faults happen, and print what came of it; return how many and whether all is well."""
    with ExitStack() as stack:
        cluster = Cluster(home)
        stack.callback(cluster.close)
        cluster.sql("CREATE DATABASE storm", "postgres")
        front = stack.enter_context(pooler(home)) if pooled else home / ".s.PGSQL.5432"
        proxy = Proxy(front)
        stack.callback(proxy.close)
        url = f"postgres://bench@127.0.0.1:{proxy.port}/storm?connect_timeout=2"
        server = Server(program, url, home)
        stack.callback(server.close)
        storm = Storm(cluster, proxy, server, random.Random(seed))
        clients = Clients(server.port)
        stack.callback(clients.stop)
        faults = storm.rage(seconds, clients)
        clients.stop()
        storm.wait_for_database()
        server.stop(signal.SIGTERM)
        stored = [row[0] for row in cluster.sql("SELECT number FROM events")]
    lost, doubled = len(clients.accepted - set(stored)), len(stored) - len(set(stored))
    spooled, quarantined = server.left("attolytics_spool"), server.left("attolytics_quarantine")
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
    statuses = ", ".join(f"{status} {count:,}" for status, count in sorted(clients.statuses.items()))
    blamed = any(400 <= status <= 499 for status in clients.statuses)
    late = clients.slowest_s > ANSWER_S_MAX
    sys.stdout.write(
        f"seed {seed}: {faults.total()} faults: {kinds}\n"
        f"  answers: {statuses}; none to {clients.unanswered:,} requests; the slowest after"
        f" {clients.slowest_s:.2f} s ({clients.slowest_during}){', TOO SLOW' if late else ''}\n"
        f"  {len(clients.accepted):,} events were answered with 200: {lost} lost, {doubled} doubled;"
        f" left: {spooled} flushes in the spool, {quarantined} events in the quarantine\n"
    )
    sys.stdout.flush()
    return faults.total(), not (lost or doubled or late or blamed or spooled or quarantined)


def seeds(text: str) -> list[int]:
    """Be an argparse type for numbers and ranges of them."""

    def numbers() -> Iterator[int]:
        for part in text.split(","):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)

    try:
        found = list(numbers())
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"expected numbers, such as 7 or 1-5 or 1,3,8-9, got {text}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2, help="with each seed (2)")
    parser.add_argument("--seeds", type=seeds, default=[1], help="of the faults: 7 or 1-5 or 1,3 (1)")
    parser.add_argument("--file", type=Path, default=PROGRAM, help="another copy of attolytics.py")
    parser.add_argument("--pgbouncer", action="store_true", help="put a PgBouncer before PostgreSQL")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # Runs every clean-up.
    happened, failed = 0, []
    for seed in options.seeds:
        home = Path(tempfile.mkdtemp(prefix="attolytics-faults-"))
        is_well = False
        try:
            faults, is_well = run(
                options.file.absolute(), seed, options.minutes * 60, home, options.pgbouncer
            )
            happened += faults
        except BenchError as error:
            sys.stdout.write(f"seed {seed}: {error}\n")
        if is_well:
            shutil.rmtree(home)
        else:
            failed.append(seed)
            progress(f"the server's logs and its spool are in {home}")
    verdict = f"failed with the seeds {failed}" if failed else "nothing lost, doubled or late"
    sys.stdout.write(f"{happened} faults with {len(options.seeds)} seeds: {verdict}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
