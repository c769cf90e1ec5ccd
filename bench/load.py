"""The load: the events, the requests made of them, and what sends them.

The first half is pure: the same random seed gives every server the same events.
"""

from __future__ import annotations

import gzip
import http.client
import itertools
import json
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rig import BenchError

# --- Limits -------------------------------------------------------------------

CLIENTS = 64  # Connections at once, where a scenario does not say otherwise.
WRK_THREADS = 1  # One is enough for all of them, and takes the least of the machine from the servers.
BODIES = 50  # Different requests that the clients send in turn.
BODY_BYTES_MAX = 1 << 20  # Of a request, Attolytics' default, and so of the peer.
EVENTS_MAX = 10_000  # Of a request, likewise.
REQUEST_TIMEOUT_S = 10
TIMED_EVENTS = 100  # Per request; from there on its rate is that between the first answer and the last.


# --- Events -------------------------------------------------------------------

APP_ID = "com.example.myapp"
PATH = f"/apps/{APP_ID}/events"
SECRET_KEY = "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"  # of schema-example.conf.yaml and mix.conf.yaml
REFERER = "http://example.com/game"
HEADERS = {"Content-Type": "application/json", "Referer": REFERER}
SEED = 2019
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
START = 1_554_130_180  # of the events' times
PLATFORMS = ("android", "ios", "linux", "macos", "web", "windows")
EVENT_TYPES = ("game_start", "level_start", "level_end", "purchase", "game_end")
COLUMNS = ("time", "referer", "platform", "version", "user_id", "event_type", "score")
PLACEHOLDER = "00000000-0000-0000-0000-000000000000"  # wrk puts a new id in its place in each request.
MIX = {"events": 6, "purchases": 2, "sessions": 2}  # In each request of the mix.

Event = dict[str, object]


def make_event(choose: random.Random) -> Event:
    """Return an event as a game sends it; every column of the table has a value."""
    return {
        "_t": "events",
        "time": START + choose.randrange(10_000_000) / 1_000,
        "platform": choose.choice(PLATFORMS),
        "version": f"1.{choose.randrange(20)}.{choose.randrange(10)}",
        "user_id": f"{choose.getrandbits(64):016x}",
        "event_type": choose.choice(EVENT_TYPES),
        "score": choose.randrange(1_000_000),
    }


def make_purchase(choose: random.Random) -> Event:
    """Return an event with a json column."""
    return {
        "_t": "purchases",
        "time": START + choose.randrange(10_000_000) / 1_000,
        "user_id": f"{choose.getrandbits(64):016x}",
        "product": choose.choice(("coins", "hat", "level pack", "no ads")),
        "price": choose.randrange(10_000) / 100,
        "details": {
            "currency": choose.choice(("EUR", "JPY", "USD")),
            "quantity": choose.randrange(1, 10),
            "shelf": [choose.choice(("top", "middle")), choose.randrange(40)],
            "gift": choose.random() < 0.1,
        },
    }


def make_session(choose: random.Random) -> Event:
    """Return an event with a unique column."""
    return {
        "_t": "sessions",
        "id": PLACEHOLDER,
        "started": START + choose.randrange(10_000_000) / 1_000,
        "user_id": f"{choose.getrandbits(64):016x}",
        "seconds": choose.randrange(10_000),
    }


def make_mix(choose: random.Random) -> list[Event]:
    """Return the events of a request of the mix, in any order, as they happen."""
    make = {"events": make_event, "purchases": make_purchase, "sessions": make_session}
    events = [make[table](choose) for table, count in MIX.items() for _ in range(count)]
    choose.shuffle(events)
    return events


def row_of(event: Event) -> list[object]:
    """Return what the columns of the table `events` have of an event, in the order of COLUMNS."""
    time_ms = round(float(str(event["time"])) * 1_000)
    values = event | {"time": EPOCH + timedelta(milliseconds=time_ms), "referer": REFERER}
    return [values[column] for column in COLUMNS]


def encode(events: Sequence[object], key: str = SECRET_KEY) -> str:
    """Return the body of a request."""
    return json.dumps({"secret_key": key, "events": events}, separators=(",", ":"))


# --- Traffic ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """A kind of requests, and how many clients send them one after the other."""

    events_per_request: int = 1
    clients: int = CLIENTS
    new_connections: bool = False  # One for each request.
    gzipped: bool = False
    mixed: bool = False  # Three tables; then `events_per_request` is the sum of MIX.

    @property
    def timed(self) -> bool:
        """Whether wrk is to note when it gets answers, which takes it too long if there are many."""
        return self.events_per_request >= TIMED_EVENTS

    @property
    def per_table(self) -> Mapping[str, int]:
        """The events per request that each table gets."""
        return MIX if self.mixed else {"events": self.events_per_request}

    @property
    def headers(self) -> Mapping[str, str]:
        more = {"Content-Encoding": "gzip"} if self.gzipped else {}
        return HEADERS | more | ({"Connection": "close"} if self.new_connections else {})

    def bodies(self) -> list[bytes]:
        """Return BODIES different bodies."""
        choose = random.Random(SEED)
        requests = [
            make_mix(choose) if self.mixed else [make_event(choose) for _ in range(self.events_per_request)]
            for _ in range(BODIES)
        ]
        bodies = [encode(events).encode() for events in requests]
        return [gzip.compress(body, mtime=0) for body in bodies] if self.gzipped else bodies


MIXED = Traffic(sum(MIX.values()), mixed=True)


def big_body(choose: random.Random) -> tuple[bytes, int]:
    """Return a body with as many events as fit into a request, and their number."""
    events: list[Event] = []
    size = len(encode([]))
    while len(events) < EVENTS_MAX:
        event = make_event(choose)
        size += len(json.dumps(event, separators=(",", ":"))) + 1  # The comma.
        if size > BODY_BYTES_MAX:
            break
        events.append(event)
    return encode(events).encode(), len(events)


# wrk calls init() once, request() for each request and done() at the end, with times in microseconds.
# Bodies are read from files because Lua's own strings could not hold every byte as it is.
LUA = """\
local requests, last, made = {}, 0, 0

local function between_placeholders(text)
  local pieces, from = {}, 1
  while true do
    local at = text:find("%(placeholder)s", from, true)
    if not at then break end
    pieces[#pieces + 1] = text:sub(from, at - 1)
    from = at + %(placeholder_length)d
  end
  pieces[#pieces + 1] = text:sub(from)
  return pieces
end

-- As random as a client's, so that the index grows in all places, and yet never the same.
local function new_id()
  made = made + 1
  local r = math.random
  return string.format(
    "%%08x-%%04x-4%%03x-8%%03x-%%012x", r(0, 2^31 - 1), r(0, 65535), r(0, 4095), r(0, 4095), made)
end

function init()
  for i = 1, %(bodies)d do
    local file = assert(io.open("%(files)s" .. i, "rb"))
    requests[i] = between_placeholders(wrk.format("POST", nil, {%(headers)s}, file:read("*a")))
    file:close()
  end
end

function request()
  last = last %% #requests + 1
  local pieces = requests[last]
  if #pieces == 1 then return pieces[1] end
  local text = {}
  for i = 1, #pieces - 1 do
    text[#text + 1] = pieces[i]
    text[#text + 1] = new_id()
  end
  text[#text + 1] = pieces[#pieces]
  return table.concat(text)
end

local thread

function setup(the_only_thread)
  thread = the_only_thread
end

function done(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %%d, "duration_us": %%d, "refused": %%d, "broken": %%d, "late": %%d, '
      .. '"p50_us": %%d, "p99_us": %%d, "max_us": %%d, "timed": %%d, "timed_us": %%d}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50), latency:percentile(99), latency.max,
    thread:get("timed") or 0, (thread:get("last_us") or 0) - (thread:get("first_us") or 0)))
end
"""
# done() sees only the global variables of the thread.
LUA_TIMED = """\

local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long ns; } moment; int clock_gettime(int clock, moment *now);")
local MONOTONIC = 1
local now = ffi.new("moment")
timed = 0

function response()
  ffi.C.clock_gettime(MONOTONIC, now)
  last_us = tonumber(now.s) * 1e6 + tonumber(now.ns) / 1e3
  first_us = first_us or last_us
  timed = timed + 1
end
"""


def write_script(home: Path, traffic: Traffic) -> Path:
    """Write a script for wrk, which sends the bodies in turn and writes its counts to stderr as JSON."""
    bodies = traffic.bodies()
    for number, body in enumerate(bodies, 1):
        (home / f"body-{number}").write_bytes(body)
    script = home / "load.lua"
    text = LUA % {
        "bodies": len(bodies),
        "files": home / "body-",
        "headers": ", ".join(f'["{name}"] = "{value}"' for name, value in traffic.headers.items()),
        "placeholder": PLACEHOLDER,
        "placeholder_length": len(PLACEHOLDER),
    }
    script.write_text(text + LUA_TIMED if traffic.timed else text)
    return script


# --- wrk ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk counted: answers, of which `refused` were not 2xx, and `late` over REQUEST_TIMEOUT_S.

    `timed_us` is how long after the first of `timed` answers the last one came, if wrk noted it.
    """

    requests: int
    duration_us: int
    refused: int
    broken: int
    late: int
    p50_us: int
    p99_us: int
    max_us: int
    timed: int
    timed_us: int

    @property
    def seconds(self) -> float:
        """In what time the server does as many requests.

        Of large requests a second's worth is under way when wrk ends, all done but not answered, so its
        own duration would say too much. In the time between two answers one whole request is done.
        """
        if self.timed < 2:
            return self.duration_us / 1e6
        return self.timed_us / 1e6 / (self.timed - 1) * self.requests


def run_wrk(port: int, script: Path, seconds: int, clients: int = CLIENTS) -> Load:
    """Send requests for some seconds. Raises BenchError when wrk fails."""
    command = ["wrk", f"-t{WRK_THREADS}", f"-c{clients}", f"-d{seconds}s"]
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


# --- Other clients ------------------------------------------------------------


def post(client: http.client.HTTPConnection, body: str | bytes, **headers: str) -> int:
    """Send a request and return the status of its answer. Raises BenchError when there is none.

    A name in `headers` has _ for the - of HTTP.
    """
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        client.request("POST", PATH, body, HEADERS | more)
        answer = client.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"no answer to a request: {error!r}") from None
    return answer.status


@contextmanager
def connected(port: int) -> Iterator[http.client.HTTPConnection]:
    """Give a client for as long as the block runs."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        yield client
    finally:
        client.close()


def answers(port: int) -> bool:
    """Return whether a server speaks HTTP on a port."""
    with connected(port) as client:
        try:
            client.request("GET", "/")
            client.getresponse()
        except (OSError, http.client.HTTPException):
            return False
    return True


def send_all(port: int, requests: int, traffic: Traffic) -> None:
    """Send a number of requests from CLIENTS connections. Raises BenchError unless all are acknowledged."""
    bodies = traffic.bodies()
    left = iter(range(requests))
    lock = threading.Lock()  # Guards left.

    def client_thread() -> None:
        with connected(port) as client:
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                status = post(client, bodies[number % BODIES])
                if status != 200:
                    raise BenchError(f"Attolytics answered {status} after {number} requests")

    with ThreadPoolExecutor(traffic.clients) as threads:
        for future in [threads.submit(client_thread) for _ in range(traffic.clients)]:
            future.result()


@contextmanager
def big_bodies(port: int) -> Iterator[Callable[[], int]]:
    """Let one client send the largest requests there are, back to back, until the block ends.

    Yields a function that returns how many events were acknowledged. The block ends when the last request
    was answered, and raises BenchError if not all were.
    """
    choose = random.Random(SEED)
    bodies = [big_body(choose) for _ in range(4)]
    end = threading.Event()
    acknowledged: list[int] = []

    def client_thread() -> None:
        with connected(port) as client:
            for body, events in itertools.cycle(bodies):
                if end.is_set():
                    return
                status = post(client, body)
                if status != 200:
                    raise BenchError(f"a body of {len(body)} bytes was answered with {status}")
                acknowledged.append(events)

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(client_thread)
        try:
            yield lambda: sum(acknowledged)
        finally:
            end.set()
            future.result()
