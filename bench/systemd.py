"""The units on a real systemd: is anything lost or doubled, whatever systemd does to the service?

    sudo .venv/bin/python bench/systemd.py [--suite bookworm] [--base DIR] [--keep]

Needs root and the Debian packages systemd-container and debootstrap; without them, or where no container
can be booted, it says so and ends with 77. It makes a Debian from the mirror that apt uses here (once, in
--base), installs the service in a copy of it by the commands of docs/operating.md, boots it, and sends it
events from eight clients, which do not repeat any. Meanwhile the service is restarted with and without
the socket unit, reloaded, killed, stopped for longer than its watchdog waits, left without PostgreSQL and
started with a mistake in its schema file, and the machine is powered off. At the end the table has to
have every event that was answered with 200, and none twice. Exits with 1 if not, or if a client noticed
more than it should. Takes five minutes, the first time eight.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rig import REPOSITORY, BenchError, progress

SKIPPED = 77  # The exit code that automake and meson take for it.
BOOT_S = 60
CLIENTS = 8
PAUSE_S = 0.01  # Between two requests of a client: this is no benchmark.
AWAY_PAUSE_S = 0.05  # After a request that got no answer.
IDLE = 40  # Connections that are kept and not used for a while.
PORT = 8005
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "libnss-systemd", "postgresql", "python3-venv"),
    *("ca-certificates", "procps", "sudo"),
)
SCHEMA = """
tables:
  plain:
    columns:
      - {name: id, required: true}
apps:
  app: {secret_key: KEY, tables: [plain]}
"""
MISTAKE = SCHEMA.replace("required", "requird")
MORE = SCHEMA.replace("apps:", "      - {name: more, type: i32}\napps:")
SCHEMA_FILE = "/etc/attolytics/schema.conf.yaml"
CLONE_NEWNET = 0x40000000  # setns(2)


class Skip(Exception):
    """This machine cannot do it. str() is the reason."""


# --- The machine --------------------------------------------------------------


def run(*command: str | Path, **environment: str) -> str:
    """Return what a command says. Raises BenchError when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode:
        shown = " ".join(map(str, command))
        raise BenchError(f"{shown} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def mirror() -> str:
    """Return where apt gets Debian from on this machine."""
    layout = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
    for line in run("apt-get", "indextargets", "--format", layout, "Identifier: Packages").splitlines():
        source, codename, *rest = line.split()
        if rest == ["main", "Debian"] and "-" not in codename:  # such as bookworm-security
            return source
    raise Skip("apt has no source of Debian here")


def install_commands() -> list[str]:
    """Return the commands by which docs/operating.md installs the service."""
    page = Path(REPOSITORY, "docs", "operating.md").read_text()
    block = page.partition("\n## systemd\n")[2].partition("```sh\n")[2].partition("```")[0]
    return [line for line in block.splitlines() if not re.search("journalctl|apt install", line)]


def needs_network(command: str) -> bool:
    return "venv" in command or "pip " in command


def make_base(base: Path, suite: str) -> None:
    """Make a Debian with PostgreSQL, and with what the service needs from PyPI."""
    source, unfinished = mirror(), base.with_suffix(".unfinished")
    progress(f"making a Debian {suite} in {base}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    include = "--include=" + ",".join(PACKAGES)
    run("debootstrap", "--variant=minbase", include, suite, unfinished, source)
    # What pip needs to reach an index from here, it needs in there as well.
    for name in ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(name).exists():
            shutil.copy(name, f"{unfinished}{name}")
    settings = [f"--setenv={k}={v}" for k, v in os.environ.items() if k.startswith("PIP_")]
    for command in filter(needs_network, install_commands()):
        inside = ("systemd-nspawn", "-q", *nspawn_options(), "--pipe", "-D", str(unfinished), *settings)
        run(*inside, "sh", "-c", command)
    for path in Path(unfinished, "etc/postgresql").glob("*/main/conf.d"):
        Path(path, "port.conf").write_text("listen_addresses = ''\n")
    Path(unfinished, "var/log/journal").mkdir(exist_ok=True)
    unfinished.rename(base)


def nspawn_options() -> list[str]:
    """Without a systemd outside there is nobody to register with, or to ask for a unit."""
    return [] if Path("/run/systemd/system").is_dir() else ["--register=no", "--keep-unit"]


@dataclass(slots=True)
class Machine:
    """A container in which systemd is PID 1, with a loopback interface of its own and no other."""

    root: Path
    process: subprocess.Popen[bytes]
    leader: int  # its PID 1, as we see it

    def run(self, command: str) -> str:
        """Run a command of the shell as root. Raises BenchError when it fails."""
        return run("nsenter", "-t", str(self.leader), "-a", "sh", "-c", f"cd /root && {command}")

    def tries(self, command: str) -> str:
        """Run a command that may fail; return what it said."""
        return self.run(f"{command} || true").strip()

    def show(self, what: str) -> str:
        return self.run(f"systemctl show -P {what} attolytics.service").strip()

    def sql(self, query: str) -> list[str]:
        return self.run(f'sudo -u postgres psql -qAtX attolytics -c "{query}"').splitlines()

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        target = Path(f"{self.root}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> float:
        """Return how long it took. Raises BenchError when it takes too long."""
        started = time.monotonic()
        while not ready():
            if time.monotonic() - started > seconds:
                log = self.tries("journalctl -b -u attolytics -n 15 --no-pager")
                raise BenchError(f"{what} not within {seconds:.0f} s:\n{log}")
            time.sleep(0.1)
        return time.monotonic() - started

    def power_off(self) -> float:
        """Return how long it took."""
        started = time.monotonic()
        with contextlib.suppress(BenchError):  # its own process may end with the rest
            self.run("systemctl poweroff")
        self.process.wait(120)
        return time.monotonic() - started


@contextlib.contextmanager
def booted(root: Path) -> Iterator[Machine]:
    """Boot a directory; let us into its network. Raises Skip when it does not come up."""
    command: list[str | Path] = [
        "systemd-nspawn",
        "-q",
        "-b",
        "-D",
        root,
        "--private-network",
        "--console=pipe",
        *nspawn_options(),
    ]
    console = Path(f"{root}.console")
    with console.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
    try:
        deadline, state = time.monotonic() + BOOT_S, ""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and state not in ("running", "degraded"):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
            with contextlib.suppress(OSError, IndexError, BenchError):
                machine = Machine(root, process, int(children.read_text().split()[0]))
                state = machine.tries("systemctl is-system-running")
        if state not in ("running", "degraded"):
            said = console.read_text(errors="replace").strip()[-500:] or "nothing"
            raise Skip(
                f"no systemd came up within {BOOT_S} s (it is {state or 'not there'}); it said: {said}"
            )
        with open(f"/proc/{machine.leader}/ns/net") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                raise Skip(f"cannot enter the container's network: {os.strerror(ctypes.get_errno())}")
        yield machine
    finally:
        if process.poll() is None:
            process.terminate()  # it halts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


# --- The load -----------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What the clients saw during one fault."""

    answered: list[tuple[float, float]] = field(default_factory=list)  # when, and after how many seconds
    failed: Counter[str] = field(default_factory=Counter)
    spooled: int = 0

    def __str__(self) -> str:
        failures = ", ".join(f"{count} {what}" for what, count in self.failed.most_common(3))
        figures = (
            f"{len(self.answered):,} answers, the slowest {self.slowest_s:.2f} s, gap {self.gap_s:.2f} s"
        )
        return f"{figures}, spooled {self.spooled:,}, failed: {failures or 'none'}"

    @property
    def slowest_s(self) -> float:
        return max((seconds for _, seconds in self.answered), default=0)

    @property
    def gap_s(self) -> float:
        """The longest time without any answer."""
        times = sorted(when for when, _ in self.answered)
        return max((b - a for a, b in itertools.pairwise(times)), default=0)


class Load:
    """Clients that send an event each, again and again; every second one keeps its connection."""

    def __init__(self) -> None:
        # Guards all below.
        self._lock = threading.Lock()
        self._accepted: list[str] = []
        self._seen = Seen()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._send, args=(client,)) for client in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)

    def watch(self) -> Seen:
        """Return what is seen from now on, until the next call."""
        with self._lock:
            self._seen = Seen()
            return self._seen

    @property
    def accepted(self) -> list[str]:
        with self._lock:
            return list(self._accepted)

    def post(self, connection: http.client.HTTPConnection, event_id: str) -> bool:
        """Send an event; return whether it was answered with 200."""
        started = time.monotonic()
        body = json.dumps({"secret_key": "KEY", "events": [{"_t": "plain", "id": event_id}]})
        try:
            connection.request("POST", "/apps/app/events", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            problem = "" if response.status == http.HTTPStatus.OK else f"{response.status} {text.strip()}"
        except (OSError, http.client.HTTPException) as error:
            text, problem = "", type(error).__name__
            connection.close()
        now = time.monotonic()
        with self._lock:
            if problem:
                self._seen.failed[problem] += 1
                return False
            self._accepted.append(event_id)
            self._seen.answered.append((now, now - started))
            self._seen.spooled += '"spool"' in text
        return True

    def _send(self, client: int) -> None:
        keeps, start = client % 2 == 0, time.monotonic_ns()
        connection = connect()
        for number in itertools.count():
            if self._stop.is_set():
                break
            answered = self.post(connection, f"{start}-{client}-{number}")
            if not keeps:
                connection.close()
            time.sleep(PAUSE_S if answered else AWAY_PAUSE_S)
        connection.close()


def connect() -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)


# --- The faults ---------------------------------------------------------------


class Trial:
    """What is done to a machine under load, and what must come of it."""

    def __init__(self, machine: Machine, load: Load) -> None:
        self.machine, self.load = machine, load
        self.broken: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)
            progress(f"    NOT AS EXPECTED: {what}")

    def under_load(self, name: str, fault: Callable[[], object], unnoticed: bool = False) -> Seen:
        """Let a fault happen, then a few seconds of calm; if it is to be `unnoticed`, no client may fail."""
        time.sleep(1)
        seen = self.load.watch()
        fault()
        self.machine.wait_until(lambda: self.machine.show("ActiveState") == "active", f"{name}: active")
        time.sleep(3)
        progress(f"{name}: {seen}")
        self.expect(not unnoticed or not seen.failed, f"{name}: a client noticed it")
        self.expect(bool(seen.answered), f"{name}: no answers")
        return seen

    def restart(self) -> None:
        self.machine.run("systemctl restart attolytics")

    def kill(self) -> None:
        self.machine.run("systemctl kill -s KILL attolytics")
        self.machine.wait_until(lambda: self.machine.show("ActiveState") != "active", "killed", 5)

    def idle_clients(self) -> int:
        """Restart while connections are idle, and use them 3 s later; return how many failed."""
        connections = [connect() for _ in range(IDLE)]
        now = time.monotonic_ns()
        for number, connection in enumerate(connections):
            self.expect(self.load.post(connection, f"{now}-idle-{number}"), "an answer before")
        time.sleep(2)
        self.machine.run("systemctl restart --no-block attolytics")
        time.sleep(3)
        failed = [not self.load.post(c, f"{now}-again-{number}") for number, c in enumerate(connections)]
        for connection in connections:
            connection.close()
        time.sleep(5)
        progress(f"    used 3 s after the restart began: {sum(failed)} of {IDLE} idle connections failed")
        return sum(failed)

    def reload(self, schema: str, expected: str) -> None:
        self.machine.write(SCHEMA_FILE, schema, 0o640)
        self.machine.run("systemctl reload attolytics")
        # Before systemd 253 a reload is over when the signal is sent.
        self.machine.wait_until(
            lambda: bool(re.match(expected, self.machine.show("StatusText"))), expected, 10
        )

    def stop_for_40_s(self) -> None:
        restarts = int(self.machine.show("NRestarts"))
        self.machine.run("systemctl kill -s STOP --kill-whom=main attolytics")
        took = self.machine.wait_until(
            lambda: int(self.machine.show("NRestarts")) > restarts, "the watchdog's restart", 40
        )
        progress(f"    restarted by the watchdog after {took:.1f} s")

    def away_for_30_s(self) -> None:
        self.machine.run("systemctl stop postgresql")
        time.sleep(30)
        self.machine.run("systemctl start postgresql")
        self.wait_for_rows()

    def wait_for_rows(self) -> None:
        """Wait until everything is in the table that has been accepted by now."""
        known = set(self.load.accepted)
        took = self.machine.wait_until(
            lambda: known <= set(self.machine.sql("SELECT id FROM plain")), "the replay"
        )
        progress(f"    all {len(known):,} accepted events are in the table after {took:.1f} s")

    def bad_starts(self) -> None:
        self.machine.write(SCHEMA_FILE, MISTAKE, 0o640)
        restarts = int(self.machine.show("NRestarts"))
        self.machine.run("systemctl restart --no-block attolytics")
        self.machine.wait_until(lambda: int(self.machine.show("NRestarts")) >= restarts + 6, "bad starts", 60)
        reason = "the schema file has 1 mistake"
        self.machine.wait_until(lambda: reason in self.machine.show("StatusText"), "the reason", 5)
        self.machine.write(SCHEMA_FILE, MORE, 0o640)

    def has_peer_hint(self) -> bool:
        return "libnss-systemd" in self.machine.show("StatusText")

    def install(self) -> None:
        """Do what docs/operating.md says, and let the first start fail as without libnss-systemd."""
        for name in ("attolytics.py", "attolytics.service", "schema-example.conf.yaml"):
            shutil.copy(REPOSITORY / name, self.machine.root / "root")
        shutil.copy(REPOSITORY / "examples" / "attolytics.socket", self.machine.root / "root")
        for command in install_commands():
            if "enable --now" in command:
                self.machine.write(SCHEMA_FILE, SCHEMA)
                self.machine.run("sed -i.bak 's/ systemd//' /etc/nsswitch.conf")
                self.machine.tries(command)
                self.machine.wait_until(self.has_peer_hint, "the hint at libnss-systemd", 20)
                self.machine.run("mv /etc/nsswitch.conf.bak /etc/nsswitch.conf")
            elif not needs_network(command):
                self.machine.run(command)
        self.machine.wait_until(lambda: self.machine.show("ActiveState") == "active", "the first start", 20)
        # Only the service may read the file, and --migrate is an option of the environment file.
        self.machine.run("groupadd --system attolytics-schema")
        self.machine.run(f"chgrp attolytics-schema {SCHEMA_FILE} && chmod 640 {SCHEMA_FILE}")
        group = "[Service]\nSupplementaryGroups=attolytics-schema\n"
        self.machine.write("/etc/systemd/system/attolytics.service.d/override.conf", group)
        self.machine.write("/etc/attolytics/environment", "ATTOLYTICS_OPTIONS=--migrate -v\n", 0o600)
        self.machine.run("systemctl daemon-reload && systemctl restart attolytics")
        # As docs/operating.md says, for a file that is for a group only.
        check = f"--check --schema {SCHEMA_FILE} --db_url postgres://attolytics@%2Frun%2Fpostgresql"
        python = "sudo -u attolytics -g attolytics-schema /opt/attolytics/bin/python"
        self.expect("fits" in self.machine.run(f"{python} - <attolytics.py {check}"), "--check")
        exposure = self.machine.run("systemd-analyze security attolytics").splitlines()[-1]
        progress(
            f"installed on {self.machine.run('systemctl --version').splitlines()[0]}; {exposure.strip()}"
        )
        log = self.machine.run("journalctl -b --no-pager")
        doubts = [line for line in log.splitlines() if re.search("Unknown key|Referenced but unset", line)]
        self.expect(not doubts, f"systemd understands the units: {doubts}")
        self.expect(" attolytics[" in log, "lines of the log are tagged attolytics")

    def use_socket(self) -> None:
        self.machine.run("cp attolytics.socket /etc/systemd/system/ && systemctl daemon-reload")
        self.machine.run("systemctl stop attolytics")
        # A machine whose IPv6 is switched off.
        network = ("nsenter", "-t", str(self.machine.leader), "-n", "sysctl", "-qw")
        run(*network, "net.ipv6.conf.all.disable_ipv6=1")
        self.machine.run("systemctl enable --now attolytics.socket && systemctl start attolytics")
        run(*network, "net.ipv6.conf.all.disable_ipv6=0")

    def faults(self) -> None:
        """All that happens while the clients go on."""
        self.under_load("restart", self.restart)
        self.under_load("restart, idle connections", self.idle_clients)
        self.under_load("kill -9", self.kill)
        self.under_load("reload", lambda: self.reload(MORE, "listening"), unnoticed=True)
        refused = "the schema file is not taken over"
        self.under_load("reload refused", lambda: self.reload(MISTAKE, refused), unnoticed=True)
        self.machine.write(SCHEMA_FILE, MORE, 0o640)
        self.under_load("changing to the socket unit, IPv6 off", self.use_socket)
        self.under_load("restart, socket unit", self.restart, unnoticed=True)
        self.under_load("restart again", self.restart, unnoticed=True)
        seen = self.under_load("restart, idle connections, socket unit", self.idle_clients, unnoticed=True)
        self.expect(seen.slowest_s < 5, "a restart is a short delay")
        self.under_load("kill -9, socket unit", self.kill)
        self.under_load("SIGSTOP", self.stop_for_40_s)
        seen = self.under_load("PostgreSQL away for 30 s", self.away_for_30_s, unnoticed=True)
        self.expect(seen.spooled > 0, "events were spooled")
        self.under_load("six bad starts", self.bad_starts, unnoticed=True)

    def count(self) -> None:
        """Compare the table with the answers."""
        self.wait_for_rows()
        rows, accepted = Counter(self.machine.sql("SELECT id FROM plain")), set(self.load.accepted)
        lost, doubled = accepted - rows.keys(), [row for row, count in rows.items() if count > 1]
        progress(f"{len(accepted):,} events answered with 200, {sum(rows.values()):,} rows:")
        unanswered = len(rows) - len(accepted)
        progress(f"    {len(lost)} lost, {len(doubled)} doubled, {unanswered} stored without an answer")
        self.expect(not lost and not doubled, "every accepted event is stored once")


def trial(root: Path) -> list[str]:
    """Return what was not as it must be."""
    load = Load()
    with booted(root) as machine:
        first = Trial(machine, load)
        first.install()
        with load.going_on():
            first.faults()
            time.sleep(1)
            seen = load.watch()
            took = machine.power_off()
            progress(f"poweroff: off after {took:.1f} s; until then {seen}")
    with booted(root) as machine:
        second = Trial(machine, load)
        machine.wait_until(lambda: machine.show("ActiveState") == "active", "the service after the boot")
        second.count()
    return first.broken + second.broken


def prepare(options: argparse.Namespace) -> Path:
    """Return the directory of a Debian that can be booted. Raises Skip."""
    if os.geteuid():
        raise Skip("only root can boot a container")
    for program in ("systemd-nspawn", "debootstrap", "nsenter", "apt-get"):
        if not shutil.which(program):
            raise Skip(f"{program} is not installed (Debian: apt install systemd-container debootstrap)")
    base = Path(options.base or f"/var/tmp/attolytics-systemd-{options.suite}")
    if not base.exists():
        make_base(base, options.suite)
    return base


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the units on a real systemd.")
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    parser.add_argument("--suite", default=suite, help=f"of Debian ({suite})")
    parser.add_argument("--base", help="where that Debian is, or will be (/var/tmp/attolytics-systemd-SUITE)")
    parser.add_argument("--keep", action="store_true", help="keep the machine that was tried")
    options = parser.parse_args()
    try:
        base = prepare(options)
        with ExitStack() as stack:
            directory = tempfile.mkdtemp(prefix="attolytics-systemd-", dir="/var/tmp")
            if not options.keep:
                stack.callback(shutil.rmtree, directory)
            root = Path(directory, "machine")
            run("cp", "-a", "--reflink=auto", base, root)
            broken = trial(root)
    except Skip as reason:
        sys.stdout.write(f"skipped: {reason}\n")
        return SKIPPED
    except BenchError as error:
        sys.stdout.write(f"FAILED: {error}\n")
        return 1
    sys.stdout.write(f"{'FAILED: ' + '; '.join(broken) if broken else 'everything as it must be'}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
