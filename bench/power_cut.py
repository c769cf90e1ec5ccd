"""Power cuts, simulated: is every acknowledged event in the spool, whatever the disk had written?

    python bench/power_cut.py [--requests 300] [--seed 1] [--file PATH]

Needs strace (a Debian package). It runs a server without a database under strace, sends it requests one
by one, and notes every write, truncation and sync of the spool's files, and every answer. Then it plays them
back: after each of them the power could have failed, and the disk could have any of the writes since the last
sync of their file: none, all, some, or the last one in part (by sectors of 512 bytes). Each such state is
opened as a spool, and its view of the table has to have every event that was answered with 200 until then.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import random
import re
import signal
import sqlite3
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from load import answers, encode, post
from rig import PROGRAM, BenchError, free_port, running
from servers import EXAMPLE_SCHEMA, SAMPLE

SPOOL = "spool.sqlite3"
SECTOR_BYTES = 512
CALLS = "pwrite64,write,ftruncate,fsync,fdatasync,sendto,sendmsg,unlink"
LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
UNFINISHED = re.compile(r"(?P<pid>\d+) +(?P<start>\w+\(.*) <unfinished \.\.\.>")
RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)")
PATH = re.compile(r"\d+<(?P<path>[^>]*)>")
TEXT = re.compile(r'"(?P<hex>(?:\\x[0-9a-f]{2})*)"')


@dataclass(slots=True)
class Disk:
    """A file as it is on disk for certain, and what was done to it since."""

    content: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut there

    def sync(self) -> None:
        self.content = apply(self.content, self.pending)
        self.pending = []


def apply(content: bytearray, changes: list[tuple[int, bytes | None]]) -> bytearray:
    result = bytearray(content)
    for at, data in changes:
        if data is None:
            del result[at:]
            continue
        result.extend(bytes(max(at + len(data) - len(result), 0)))
        result[at : at + len(data)] = data
    return result


def unescape(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()


def lines(trace: str) -> Iterator[str]:
    """Yield the lines of a trace with interrupted calls put together, where they ended."""
    started: dict[str, str] = {}
    for line in trace.splitlines():
        if match := UNFINISHED.match(line):
            started[match["pid"]] = match["start"]
        elif match := RESUMED.match(line):
            yield f"{match['pid']} {started.pop(match['pid'])}{match['rest']}"
        else:
            yield line


def crash_states(disk: Disk, chance: random.Random) -> Iterator[bytearray]:
    """Yield what the disk could have: nothing of the pending writes, all, some, one of them in part."""
    yield disk.content
    if disk.pending:
        yield apply(disk.content, disk.pending)
        yield apply(disk.content, [change for change in disk.pending if chance.random() < 0.5])
        *before, (at, data) = disk.pending
        if data and len(data) > SECTOR_BYTES:
            cut = chance.randrange(0, len(data), SECTOR_BYTES)
            yield apply(disk.content, [*before, (at, data[:cut])])


class Opener:
    """What opens a file as the server does: all that is asked of the inside of attolytics.py."""

    def __init__(self, program: Path) -> None:
        spec = importlib.util.spec_from_file_location("attolytics", program)
        if not spec or not spec.loader:
            raise BenchError(f"{program} is no Python file")
        self._module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self._module  # Where its dataclasses look for their types.
        spec.loader.exec_module(self._module)
        self._schema = self._module.parse_schema(EXAMPLE_SCHEMA.read_text(), str(EXAMPLE_SCHEMA))

    def open(self, path: Path) -> None:
        """Open a spool, which may repair it, and close it. Raises BenchError."""
        try:
            spool = self._module.Spool(str(path), 1 << 30, self._schema, str(uuid.uuid4()))
        except self._module.OperatorError as error:
            raise BenchError(str(error)) from None
        spool.close()


def check(directory: Path, files: dict[str, bytearray], opener: Opener, acknowledged: int) -> None:
    """Raise BenchError unless a spool has the first so many events, each once."""
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    try:
        opener.open(directory / SPOOL)
    except BenchError as error:
        raise BenchError(f"after {acknowledged} answers: {error}") from None
    with contextlib.closing(sqlite3.connect(directory / SPOOL)) as spool:
        scores = sorted(score for (score,) in spool.execute("SELECT score FROM events"))
    if scores[:acknowledged] != list(range(acknowledged)):
        raise BenchError(f"after {acknowledged} answers the spool has {len(scores)} events")


def play_back(trace: str, home: Path, opener: Opener, chance: random.Random) -> tuple[int, int]:
    """Check every state after every call; return how many answers and states there were."""
    disks: dict[str, Disk] = {SPOOL: Disk(), f"{SPOOL}-wal": Disk()}
    acknowledged = states = 0
    for line in lines(trace):
        match = LINE.match(line)
        path = PATH.match(match["arguments"]) if match else None
        if not match or not path or int(match["result"]) < 0:
            continue
        disk = disks.get(Path(unescape(path["path"]).decode()).name)
        text = TEXT.search(match["arguments"])
        data = unescape(text["hex"]) if text else b""
        if match["call"] in ("sendto", "sendmsg") and data.startswith(b"HTTP/1.1 200"):
            acknowledged += 1
        elif disk and match["call"] == "pwrite64":
            disk.pending.append((int(match["arguments"].rpartition(", ")[2]), data[: int(match["result"])]))
        elif disk and match["call"] == "ftruncate":
            disk.pending.append((int(match["arguments"].rpartition(", ")[2]), None))
        elif disk and match["call"] in ("fsync", "fdatasync"):
            disk.sync()
        else:
            continue
        if not acknowledged:
            continue
        main, journal = disks.values()
        for main_state in crash_states(main, chance):
            for journal_state in crash_states(journal, chance):
                check(home / "cut", {SPOOL: main_state, f"{SPOOL}-wal": journal_state}, opener, acknowledged)
                states += 1
    return acknowledged, states


def record(program: Path, home: Path, requests: int) -> str:
    """Run a server under strace, send it requests, and return the trace."""
    port = free_port()
    server = [str(program), "-q", "--host", "127.0.0.1", "--port", str(port)]
    server += ["--schema", str(EXAMPLE_SCHEMA)]
    server += ["--spool", str(home / SPOOL), "--spool_limit", "4M"]  # checkpoints come often then
    strace = [
        "strace",
        "-D",
        "-f",
        "-y",
        "-xx",
        "-s",
        "1000000",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(home / "trace"),
    ]
    with running([*strace, sys.executable, *server], home / "log", signal.SIGTERM) as child:
        child.wait_until(lambda: answers(port), "Attolytics")
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for number in range(requests):
            event = SAMPLE | {"score": number, "platform": "x" * (number * 37 % 3000)}
            status = post(client, encode([event]))
            if status != 200:
                raise child.failure(f"answered with {status}:")
        client.close()
    return (home / "trace").read_text()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", type=Path, default=PROGRAM, help="another copy of attolytics.py")
    options = parser.parse_args()
    program = options.file.absolute()
    with tempfile.TemporaryDirectory(prefix="attolytics-bench-") as directory:
        home = Path(directory)
        (home / "cut").mkdir()
        try:
            trace = record(program, home, options.requests)
            acknowledged, states = play_back(trace, home, Opener(program), random.Random(options.seed))
        except BenchError as error:
            sys.stderr.write(f"power_cut.py: {error}\n")
            return 1
    sys.stdout.write(
        f"{acknowledged} answers, {states} states of the disk, nothing acknowledged was missing\n"
    )
    return 0 if acknowledged == options.requests else 1


if __name__ == "__main__":
    sys.exit(main())
