#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pg8000>=1.31,<2", "PyYAML>=6.0,<7"]
# ///
"""Attolytics receives analytics events over HTTP and inserts them into PostgreSQL.

    python attolytics.py --schema schema.conf.yaml --db_url postgres://user@host/database

The life of a batch (the events of one request):

    HTTP thread    read request -> find app -> check key -> decode JSON -> convert every event
                   -> hand the batch to the writer, wait for the client's next request
    writer thread  take every batch that is waiting -> one transaction -> answer each -> repeat

While one flush is being committed the next batches pile up, and the next flush takes them all: no
timer, no added latency when idle, and under load the cost of a commit is shared. An answer of 200 is
sent only after COMMIT, in PostgreSQL or, while PostgreSQL cannot take events, in the spool: an SQLite
file that is replayed later. Without a database URL everything stays in the spool.

Threads, and what each owns:

    main           signals, systemd notifications, the watchdog, summaries of repeated complaints
    reloader       the schema file while it is read again, a connection of its own to prepare the tables
    acceptors      one listening socket each
    HTTP threads   one client connection each, from a bounded pool of reused threads
    monitor        the same for the monitor port, a few of them; they only look at what others publish
    writer         the connection to PostgreSQL, the spool, the number of the flush
    connector      the attempt to connect while the database is away; hands a session to the writer
    lane           a second connection, for large batches, from the first of them on; tells the writer

The file reads from top to bottom, a section uses only what stands above it:

    Limits, Errors, Schema, Conversion, Batches, SQL, Database URL, Metrics    pure, no I/O
    Database, Spool, Writer, HTTP, Monitor, systemd, Command line              the outside world
"""

from __future__ import annotations

import marshal
import os
import sys


def shed_syntax_tree() -> None:
    """Start this script anew, in this process, from its compiled code.

    Python keeps the syntax tree of the script that it runs for as long as it runs it: 13 MB of this one.
    Of a module it keeps only the code. Returns if the system has no file in memory to hand it over in.
    """
    start_module = (
        "import marshal, os, sys, types;"
        "module = sys.modules['attolytics'] = types.ModuleType('attolytics');"
        "file, directory = os.fdopen(int(sys.argv.pop(1)), 'rb'), sys.argv.pop(1);"
        "sys.path[0] = sys.path[0] or directory;"
        "code = marshal.load(file); file.close(); del sys.argv[0];"
        "exec(code, module.__dict__); module.run()"
    )
    try:
        descriptor = os.memfd_create("attolytics", 0)
        os.write(descriptor, marshal.dumps(sys._getframe(1).f_code))
        os.lseek(descriptor, 0, os.SEEK_SET)
        flags = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
        handed_over = [str(descriptor), sys.path[0]]
        os.execv(sys.executable, [sys.executable, *flags, "-c", start_module, *handed_over, *sys.argv])
    except (AttributeError, OSError):
        return


if __name__ == "__main__" and __spec__ is None:  # not under `python -m`, whose options are other ones
    shed_syntax_tree()  # before the imports, which it repeats

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import hmac
import ipaddress
import itertools
import json
import logging
import math
import pwd
import queue
import random
import re
import resource
import select
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import threading
import time
import traceback
import uuid
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
    Set,
)
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from email.utils import formatdate
from enum import StrEnum
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any, ClassVar, NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes

import pg8000.core
import pg8000.exceptions
import pg8000.native
import yaml

__version__ = "0.1.0"

log = logging.getLogger("attolytics")
TRACE = 5  # The level of -vv, below DEBUG (-v)


# --- Limits -------------------------------------------------------------------
# Every bound and time-out, with its unit in the name and its reason beside it.

REQUEST_LINE_BYTES_MAX = 8 << 10  # nginx's own default for one line.
HEADER_BYTES_MAX = 32 << 10  # nginx's default for all of them.
HEADER_COUNT_MAX = 100  # A browser behind two proxies sends about 30.
CHUNK_LINE_BYTES_MAX = 256  # A chunk's size in hex; nobody sends extensions.
BODY_BYTES_MAX = 1 << 20  # nginx's own default, so both refuse the same request.
EVENTS_MAX = 10_000  # Per request; keeps one transaction well below a second.
JSON_DEPTH_MAX = 100  # In a json value; PostgreSQL and every client cope with that.
PROBLEMS_MAX = 1_000  # Refused events listed in one answer, about 150 kB.
UNKNOWN_KEYS_MAX = 20  # Unknown keys named in one answer; each costs a search for a suggestion.
SHOWN_CHARS_MAX = 60  # Of a value quoted in a message.

HEAD_DEADLINE_S = 10  # A phone on a bad network needs 3 s; a slow attacker gets no more than this.
BODY_DEADLINE_S = 30  # 1 MiB at 35 kB/s.
IDLE_S = 75  # Longer than nginx keeps an upstream connection (60 s), so that nginx closes first.
IDLE_CROWDED_S = 2  # The same while connections are scarce.
SEND_TIMEOUT_S = 10  # Answers are small; only a client that stopped reading needs longer.
LINGER_S = 2  # Time for a refused client to read its answer before the connection is cut.
RETRY_AFTER_S = 5  # Sent with 503: clients come back about when the connector has tried again.
PREFLIGHT_AGE_S = 86_400  # Browsers cap it themselves (Chromium at 2 h).

CONNECTIONS_MAX = 512  # Default of --max_connections; a thread each, about 50 kB resident.
PLACE_PATIENCE_S = 0.2  # For a place, when all have just been taken: threads may be about to notice an end.
TURN_AWAY_THREADS = 8  # Serve the quick 503 past --max_connections.
SPARE_FILES = 64  # File descriptors beside the client connections: database, log, libraries.
TLS_SEND_BYTES = 16 << 10  # At once, to the database: one record.
RECEIVE_BYTES = 64 << 10  # Read at once: the head and the body of nearly every request.
MAPPED_BYTES = 128 << 10  # Larger pieces of memory go back to the system at once; RECEIVE_BYTES is less.
LARGE_BODY_BYTES = 32 << 10  # Larger ones are converted one at a time ...
LARGE_BATCHES_MAX = 6  # ... and so many are between that and their answer: enough for two flushes.
LISTEN_BACKLOG = 1_024  # Connections the kernel holds while we accept; the kernel caps it.
ACCEPT_PAUSE_S = 0.1  # When file descriptors ran out, instead of spinning.

FLUSH_EVENTS_MAX = 2_000  # About 25 ms; more at once is no faster, and small batches wait behind it.
TABLES_REMEMBERED = 256  # Their statements are not made anew for each flush.
LONG_FLUSH_EVENTS = 500  # The clients of a flush with so many are told after the next one is under way.
LARGE_BATCH_EVENTS = 1_000  # A batch of more, or ...
LARGE_BATCH_CHARS = 256 << 10  # ... a longer one, takes 10 ms and more: it is stored apart from others.
FLUSH_CHARS_MAX = 8 << 20  # Bounds memory and the time one flush takes.
AHEAD_S = 0.02  # Flushes that follow so soon are begun ahead; rolled back when nothing came for so long ...
AHEAD_S_MAX = 10  # ... or by PostgreSQL, should we be stopped or cut off.
PROVEN_S = 0.05  # A database that has answered so lately is not asked whether it is there.
PATIENCE_S = 0.8  # Clients wait so long for the database; then the flush goes to the spool.
LOCK_TIMEOUT_MS = 5_000  # Another session holds a lock on a table: the database is busy.
STATEMENT_TIMEOUT_S = 9  # Cancels a flush that hangs in the server ...
ANSWER_GRACE_S = 1  # ... and so much later a server that does not answer at all is given up.
LONG_STATEMENT_TIMEOUT_S = 120  # For one spooled flush that slow triggers kept from getting through.
KEEPALIVE_IDLE_S = 5  # Three numbers: PostgreSQL notices after 11 s ...
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3  # ... that the network has lost us.
PREPARE_LOCK_TIMEOUT_MS = 2_000  # Other instances could not insert behind us if we waited longer.
PREPARE_TIMEOUT_S = 3_600  # An index on a table of 100 million rows takes some minutes.
CHANGE_LOCK_TIMEOUT_MS = 200  # Inserts queue up behind a change that waits for its lock ...
CHANGE_TIMEOUT_MS = 400  # ... and while it runs: together less than half a second.
CHANGE_PAUSE_S = 1  # Between two tries, so that inserts get through.
CHANGE_PATIENCE_S = 60  # So long tries go on; a report that reads the table may take that.
BUILD_LOCK_TIMEOUT_MS = (
    10_000  # Nobody queues up behind this lock; PostgreSQL stops autovacuum for it after 1 s.
)
INDEX_NAMES_MAX = 100  # Of one column, taken by other indexes.
CONNECT_TIMEOUT_S = 5  # Default of connect_timeout in the URL.
CONFLICT_TRIES = 5  # For deadlocks and serialisation failures in a row.
BACKOFF_FIRST_S = 0.1  # Between attempts to connect, doubled each time ...
BACKOFF_MAX_S = 5  # ... up to this; half of it is jitter.
COMPLAINT_S = 60  # The same complaint is logged once, and how often it came up after so long.

SPOOL_BYTES_MAX = 1 << 30  # Default of --spool_limit: about five million small events.
SPOOL_BYTES_MIN = 1 << 20  # A smaller limit would refuse the largest batches for ever.
DISK_RESERVE_BYTES = 8 << 20  # Kept free, because deleting from the spool needs room as well.
ROOM_CHECK_CHARS = 128 << 10  # Written between looks at the room that is left.
SPOOL_LOCK_S = 3  # Our predecessor may be writing its last events, or being ended by the kernel.
SPOOL_LOCK_POLL_S = 0.05
SPOOL_BUSY_S = 2  # How long somebody with the sqlite3 program may hold the spool's lock.
QUICK_CHECK_BYTES_MAX = 256 << 20  # A spool up to this size is checked at start; that takes a second.
SHRINK_BYTES = 1 << 20  # Free room in the file that is worth giving back.
GOODBYE_S = 0.05  # To tell PostgreSQL that a connection ends; it would notice anyway.
SPOOL_DEPTH_SAFE = 500  # Levels of JSON that Python reads from anywhere; it gives up at about 1,000.
SPOOL_DEPTH_SLACK = 50  # Levels that must be left when a batch is spooled.
REPLAY_EVENTS_MAX = 4_000  # In one transaction: about 50 ms.
REPLAY_ALLOWANCE = 2_000  # New events for each such transaction; more wait for the next, up to PATIENCE_S.
REPLAY_TURN_S = 0.3  # A transaction that takes longer has had its turn: the database is slow, or away.
REPLAY_POLL_S = 0.002  # Between looks at new batches while the database works on a replay.
CHANGES_MAX = 20  # Named in the line about a reload.
PROGRESS_LOG_S = 5  # Between two lines about a replay.
REASONS_MAX = 20  # Why events stay in the quarantine, in lines of the log.
CULPRITS_MAX = 100  # Events that the database refuses, looked for in a batch before it is refused.

CHECK_UP_S = 0.2  # The monitor waits so long for the writer's newest state; it has it in a millisecond.
PROBE_S = 1  # The database is asked whether it is there when the monitor looks and it was idle for so long.
STALLED_S = 10  # A writer that is silent for so long is stuck, or shrinks a huge spool.
MONITOR_CONNECTIONS_MAX = 8  # Prometheus, a load balancer and somebody with curl.

CLOSE_S = 2  # For the database's last answer, when the process ends.
DRAIN_POLL_S = 0.01  # Between looks at connections while the server drains.
DRAIN_IDLE_S = 1  # So long a client may still use a connection that it keeps; then it is idle.
ACCEPT_POLL_S = 0.1  # How late the end may be noticed while no connections come.
SIGNAL_CHECK_S = 0.5  # How late a signal may be noticed in the worst case.
DRAIN_S = 9  # Requests in flight are answered; systemd and Docker kill after 90 s and 10 s.

SCHEMA_NODES_MAX = 100_000  # Values in a schema file: 10,000 columns.
NAME_BYTES_MAX = 63  # PostgreSQL manual, 4.1.1: longer identifiers are cut silently.
NUMERIC_DIGITS_BEFORE_POINT = 131_072  # PostgreSQL manual, table 8.2; jsonb holds numbers as numeric.
NUMERIC_DIGITS_AFTER_POINT = 16_383


# --- Errors -------------------------------------------------------------------
# Three families: what the operator must mend (one clear text, exit code 1), what
# a client did wrong (a reason; HTTP turns the class into a status, in one place),
# and what PostgreSQL and SQLite said.


class OperatorError(Exception):
    """Something only the operator can mend. str() is the whole message, no traceback needed."""


class SchemaError(OperatorError):
    """The schema file has mistakes. `problems` has all of them, a line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join([f"the schema file has {count}:", *problems]))
        self.problems = tuple(problems)


class RequestError(Exception):
    """A request is refused; `reason` is for the client."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MalformedRequest(RequestError):
    """Not HTTP that we accept; where the next request starts is unknown."""


class InvalidBody(RequestError):
    """Not JSON, or JSON of another shape."""


class WrongKey(RequestError):
    """The secret key is not the app's."""


class OriginRefused(RequestError):
    """A browser on a site that the app does not allow."""


class UnknownPath(RequestError):
    """No such path, or no such app."""


class MethodRefused(RequestError):
    """A method that exists, but not here."""


class RequestTooSlow(RequestError):
    """The request did not arrive before its deadline."""


class LengthMissing(RequestError):
    """A POST that does not say where its body ends."""


class BodyTooLarge(RequestError):
    """More bytes or events than the limits allow."""


class TargetTooLong(RequestError):
    """The request line is over its limit."""


class MediaRefused(RequestError):
    """A content type or a content coding that we do not read."""


class HeadersTooLarge(RequestError):
    """More or longer header fields than the limits allow."""


class NotImplementedHere(RequestError):
    """A method or a transfer coding that we do not know."""


class StorageAway(RequestError):
    """The batch cannot be stored now; the client should send it again later."""


class TooManyConnections(RequestError):
    """All connections that we serve at once are taken."""


@dataclass(frozen=True, slots=True)
class EventProblem:
    """Why one event is refused: its place in the request's `events`, and the column if it is one's."""

    index: int | None
    column: str | None
    reason: str


class InvalidEvents(RequestError):
    """Events that do not fit their table; `problems` has at most PROBLEMS_MAX of them.

    `count` is the number of events that are refused with them.
    """

    def __init__(self, reason: str, problems: Sequence[EventProblem], count: int) -> None:
        super().__init__(reason)
        self.problems = tuple(problems)
        self.count = count


class TableRefused(InvalidEvents):
    """Events for tables that the app may not write to."""


class SpoolError(Exception):
    """The spool cannot take events now; `reason` says why. What is in it stays."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DatabaseError(Exception):
    """PostgreSQL, or the way to it, said no. `sqlstate` is "" where there was none."""

    def __init__(self, reason: str, sqlstate: str = "", column: str | None = None, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate
        self.column = column
        self.detail = detail  # may quote rows: for the operator only


class DatabaseAway(DatabaseError):
    """Unreachable, shutting down, read-only, full or blocked: it may work again without anybody's help."""


class DatabaseConflict(DatabaseError):
    """A deadlock or a serialisation failure: nothing was stored, trying again is right."""


class DataRefused(DatabaseError):
    """The data is at fault: a constraint, a trigger or a type refused it."""


class DatabaseMisconfigured(DatabaseError):
    """A table, a permission or PostgreSQL itself is broken: the operator must mend it."""


# --- Schema -------------------------------------------------------------------
# The schema file as frozen dataclasses. Pure: text in, Schema or SchemaError out.
# Every mistake is found, each with its line, its place and, where a name is nearly
# right, a suggestion.


class Type(StrEnum):
    """Column types by their names in the schema file."""

    BOOL = "bool"
    I32 = "i32"
    I64 = "i64"
    F32 = "f32"
    F64 = "f64"
    STRING = "string"
    TIMESTAMP = "timestamp"
    JSON = "json"
    UUID = "uuid"


class Source(StrEnum):
    """What the server itself can fill into a column."""

    RECEIVED_AT = "received_at"
    CLIENT_IP = "client_ip"
    APP_ID = "app_id"


SOURCE_TYPES: Mapping[Source, Type] = {
    Source.RECEIVED_AT: Type.TIMESTAMP,
    Source.CLIENT_IP: Type.STRING,
    Source.APP_ID: Type.STRING,
}

# What people write who know SQL, Python or TypeScript better than our names.
TYPE_SYNONYMS: Mapping[str, Type] = {
    **dict.fromkeys(("boolean",), Type.BOOL),
    **dict.fromkeys(("int", "integer", "int4", "int32", "number"), Type.I32),
    **dict.fromkeys(("bigint", "int8", "int64", "long"), Type.I64),
    **dict.fromkeys(("real", "float4", "float32"), Type.F32),
    **dict.fromkeys(("float", "double", "float8", "float64", "numeric"), Type.F64),
    **dict.fromkeys(("str", "text", "varchar", "char"), Type.STRING),
    **dict.fromkeys(("time", "date", "datetime", "timestamptz"), Type.TIMESTAMP),
    **dict.fromkeys(("jsonb", "object", "dict", "map"), Type.JSON),
    **dict.fromkeys(("guid",), Type.UUID),
}

INVALID_EVENTS = ("refuse", "quarantine")
TABLE_KEY = "_t"  # In an event: the name of its table.
LEDGER = "attolytics_ledger"  # Our own table in PostgreSQL.
REQUEST_KEYS = frozenset({"secret_key", "events"})
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})  # PostgreSQL manual, 5.6
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2: token


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. At most one of `header`, `source` and `extra` is set."""

    name: str
    type: Type = Type.STRING
    header: str | None = None  # lower case
    source: Source | None = None
    extra: bool = False
    indexed: bool = False
    unique: bool = False
    required: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table that events can name in `_t`."""

    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class App:
    """An app: who may write (key, origins) and where to (tables)."""

    id: str
    secret_key: str
    origins: frozenset[str] | None  # lower case; None allows every origin
    tables: tuple[Table, ...]
    quarantines: bool = False  # bad events go to the quarantine instead of refusing their batch


@dataclass(frozen=True, slots=True)
class Schema:
    """The whole schema file."""

    tables: Mapping[str, Table]
    apps: Mapping[str, App]
    database_url: str | None = None


def suggestion(wrong: str, right: Iterable[str]) -> str:
    """Return ', did you mean "x"?' for the nearest of `right`, or "" when none is near."""
    near = difflib.get_close_matches(wrong, list(right), n=1)
    return f', did you mean "{near[0]}"?' if near else ""


def show(value: object) -> str:
    """Return a JSON value as it reads well in a message: short, and naming its kind."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list():
            return "an array"
        case float() if not math.isfinite(value):
            return str(value).replace("nan", "NaN").replace("inf", "Infinity")
        case str():
            text = json.dumps(value[: SHOWN_CHARS_MAX + 1], ensure_ascii=False)
            long = len(value) > SHOWN_CHARS_MAX
        case _:
            # str() of an integer of more than 4,300 digits raises.
            text = str(value) if not isinstance(value, int) or value.bit_length() < 4_096 else "a number"
            long = len(text) > SHOWN_CHARS_MAX
    return text[:SHOWN_CHARS_MAX] + "..." if long else text


class YamlLoader(yaml.SafeLoader):
    """YAML where every plain scalar is a string, except null, true and false as in YAML 1.2.

    The original reads its files so: `yes`, `on` and `12:30` are strings (in PyYAML's YAML 1.1 they are
    booleans and base-60 numbers). No setting of ours is a number.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        **{
            c: [("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"))]
            for c in ("~", "n", "N", "")
        },
        **{c: [("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE)$"))] for c in "tT"},
        **{c: [("tag:yaml.org,2002:bool", re.compile(r"(?:false|False|FALSE)$"))] for c in "fF"},
    }


def inside(place: str, key: str) -> str:
    """Return the place of a key in a section of the schema file."""
    return f"{place}.{key}" if place else key


class SchemaReader:
    """Reads one schema file: where things stand in it, and what is wrong with them.

    The methods add to `problems` and return something of the right type, so that one run finds every
    mistake.
    """

    def __init__(self, file: str) -> None:
        self.problems: list[str] = []
        self._file = file
        self._lines: dict[str, int] = {}
        self._nodes = 0
        self._unfinished: list[yaml.Node] = []

    def problem(self, place: str, reason: str) -> None:
        """Note a mistake at a place such as `tables.events.columns[2].type`."""
        nearest = place
        while nearest not in self._lines and nearest:
            nearest = re.sub(r"(^|[.\[])[^.\[]*$", "", nearest)
        position = f"{self._file}:{self._lines[nearest]}: " if nearest in self._lines else f"{self._file}: "
        self.problems.append(position + (f"{place}: {reason}" if place else reason))

    def plain(self, node: yaml.Node, place: str = "") -> object:
        """Return what a YAML node stands for, as dict, list, str, bool or None.

        Raises SchemaError for a file that aliases blow up.
        """
        self._lines.setdefault(place, node.start_mark.line + 1)
        self._nodes += 1
        if self._nodes > SCHEMA_NODES_MAX:
            raise SchemaError([f"{self._file}: more than {SCHEMA_NODES_MAX} values, aliases followed"])
        if node in self._unfinished:
            self.problem(place, "an alias that contains itself")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        self._unfinished.append(node)
        result: object
        if isinstance(node, yaml.SequenceNode):
            result = [self.plain(item, f"{place}[{i}]") for i, item in enumerate(node.value)]
        else:
            result = self._plain_mapping(node, place)
        self._unfinished.pop()
        return result

    def _scalar(self, node: yaml.ScalarNode, place: str) -> object:
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                if LONE_SURROGATE.search(node.value):
                    self.problem(place, "contains half of a surrogate pair")
                    return ""
                return str(node.value)
            case "bool" if node.value.lower() in ("true", "false"):
                return bool(node.value.lower() == "true")
            case "null":
                return None
        self.problem(place, f"expected a plain value, got the tag {node.tag}")
        return None

    def _plain_mapping(self, node: yaml.Node, place: str) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag != "tag:yaml.org,2002:str" or LONE_SURROGATE.search(key_node.value):
                got = show(key_node.value)
                self.problem(place, f"a key must be a string, got {got}; put it in quotes")
                continue
            key = key_node.value
            inner = inside(place, key)
            value = self.plain(value_node, inner)
            self._lines[inner] = key_node.start_mark.line + 1
            if key in result:
                self.problem(inner, "duplicate key")
            result[key] = value
        return result

    def mapping(self, value: object, place: str, what: str) -> dict[str, object]:
        """Return a mapping that is not empty."""
        if not isinstance(value, dict) or not value:
            self.problem(place, f"expected {what}, got {show(value) if value else 'nothing'}")
            return {}
        return value

    def known(self, section: Mapping[str, object], place: str, keys: Sequence[str]) -> None:
        """Report the keys of a section that mean nothing."""
        for key in section:
            if key not in keys:
                self.problem(inside(place, key), f"unknown key {show(key)}{suggestion(key, keys)}")

    def text(self, section: Mapping[str, object], place: str, key: str) -> str | None:
        """Return a string, or None if the key is missing or not a string (which is reported)."""
        value = section.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            return value
        quotes = "" if isinstance(value, (dict, list)) else "; put it in quotes"
        self.problem(inside(place, key), f"expected a string, got {show(value)}{quotes}")
        return None

    def required_text(self, section: Mapping[str, object], place: str, key: str) -> str:
        """Return a string that must be there and not be empty."""
        value = self.text(section, place, key)
        if value is None and section.get(key) is None:
            self.problem(inside(place, key), "missing, expected a string")
        elif value == "":
            self.problem(inside(place, key), "expected a string, got an empty one")
        return value or ""

    def flag(self, section: Mapping[str, object], place: str, key: str) -> bool:
        """Return true or false; missing is false."""
        value = section.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(inside(place, key), f"expected true or false, got {show(value)}")
        return False

    def name(self, name: str, place: str, what: str) -> None:
        """Report a name that PostgreSQL would not take as it is."""
        size = len(name.encode())
        if size > NAME_BYTES_MAX:
            self.problem(place, f"{what} has {size} bytes; PostgreSQL holds {NAME_BYTES_MAX}")
        if "\0" in name or not name:
            self.problem(place, f"{what} must not be empty or contain NUL")


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


COLUMN_KEYS = ("name", "type", "header", "source", "extra", "indexed", "unique", "required")


def parse_type(reader: SchemaReader, section: Mapping[str, object], place: str) -> Type:
    name = reader.text(section, place, "type")
    if name is None:
        return Type.STRING
    if name in list(Type):
        return Type(name)
    synonym = TYPE_SYNONYMS.get(name.lower())
    hint = f', did you mean "{synonym}"?' if synonym else suggestion(name, Type)
    known = "" if hint else f"; the types are {', '.join(Type)}"
    reader.problem(f"{place}.type", f'unknown type "{name}"{hint}{known}')
    return Type.STRING


def parse_header(reader: SchemaReader, section: Mapping[str, object], place: str) -> str | None:
    name = reader.text(section, place, "header")
    if name is not None and not HEADER_NAME.fullmatch(name):
        reader.problem(f"{place}.header", f"expected the name of a request header, got {show(name)}")
    return name.lower() if name else None


def parse_source(reader: SchemaReader, section: Mapping[str, object], place: str) -> Source | None:
    name = reader.text(section, place, "source")
    if name is None:
        return None
    if name in list(Source):
        return Source(name)
    hint = suggestion(name, Source) or f"; the sources are {', '.join(Source)}"
    reader.problem(f"{place}.source", f'unknown source "{name}"{hint}')
    return None


def check_column(reader: SchemaReader, column: Column, place: str) -> None:
    """Report properties of one column that contradict each other."""
    if column.header and column.type is not Type.STRING:
        reader.problem(f"{place}.type", f"a column filled from a header must be a string, not {column.type}")
    if column.source and column.type is not SOURCE_TYPES[column.source]:
        needed = SOURCE_TYPES[column.source]
        reader.problem(f"{place}.type", f"source {column.source} needs type {needed}, not {column.type}")
    if column.extra and column.type is not Type.JSON:
        reader.problem(f"{place}.type", f"an extra column must be json, not {column.type}")
    if column.extra and column.required:
        reader.problem(f"{place}.required", "an extra column is empty when there are no unknown keys")
    filled = [key for key in ("header", "source", "extra") if getattr(column, key)]
    if len(filled) > 1:
        reader.problem(place, f"a column can have only one of {' and '.join(filled)}")


def parse_column(reader: SchemaReader, raw: object, place: str) -> Column:
    section = reader.mapping(raw, place, "a column with a name")
    if not section:
        return Column("")
    reader.known(section, place, COLUMN_KEYS)
    name = reader.required_text(section, place, "name")
    if name:
        reader.name(name, f"{place}.name", "the column's name")
    if name in SYSTEM_COLUMNS:
        reader.problem(f"{place}.name", f'"{name}" is a system column of PostgreSQL\'s')
    if name == TABLE_KEY:
        reader.problem(f"{place}.name", f'"{TABLE_KEY}" names the table in an event, a column cannot have it')
    column = Column(
        name,
        parse_type(reader, section, place),
        header=parse_header(reader, section, place),
        source=parse_source(reader, section, place),
        extra=reader.flag(section, place, "extra"),
        indexed=reader.flag(section, place, "indexed"),
        unique=reader.flag(section, place, "unique"),
        required=reader.flag(section, place, "required"),
    )
    check_column(reader, column, place)
    return column


def check_columns(reader: SchemaReader, columns: Sequence[Column], place: str) -> None:
    """Report what is wrong between the columns of one table."""
    names: dict[str, int] = {}
    extra = None
    for i, column in enumerate(columns):
        first = names.setdefault(column.name, i)
        if first != i and column.name:
            reader.problem(f"{place}[{i}].name", f'duplicate column "{column.name}", also columns[{first}]')
        if column.extra and extra is not None:
            reader.problem(f"{place}[{i}].extra", f"only one column can be extra, columns[{extra}] is")
        elif column.extra:
            extra = i


def parse_tables(reader: SchemaReader, raw: object) -> dict[str, Table]:
    tables = {}
    for name, raw_table in reader.mapping(raw, "tables", "at least one table").items():
        place = f"tables.{name}"
        reader.name(name, place, "the table's name")
        if name == LEDGER:
            reader.problem(place, "the name is taken by the table that makes replay exactly-once")
        section = reader.mapping(raw_table, place, "a table with columns")
        reader.known(section, place, ("columns",))
        raw_columns = section.get("columns")
        if section and (not isinstance(raw_columns, list) or not raw_columns):
            got = show(raw_columns) if raw_columns else "nothing"
            reader.problem(f"{place}.columns", f"expected a list of columns, got {got}")
        columns = [
            parse_column(reader, column, f"{place}.columns[{i}]")
            for i, column in enumerate(raw_columns if isinstance(raw_columns, list) else [])
        ]
        check_columns(reader, columns, f"{place}.columns")
        tables[name] = Table(name, tuple(columns))
    return tables


APP_KEYS = ("secret_key", "access_control_allow_origin", "tables", "invalid_events")


def parse_invalid_events(reader: SchemaReader, section: Mapping[str, object], place: str) -> bool:
    """Return whether an app's bad events go to the quarantine."""
    policy = reader.text(section, place, "invalid_events")
    if policy is not None and policy not in INVALID_EVENTS:
        hint = suggestion(policy, INVALID_EVENTS) or ', expected "refuse" or "quarantine"'
        reader.problem(f"{place}.invalid_events", f'unknown policy "{policy}"{hint}')
    return policy == "quarantine"


ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+|null", re.IGNORECASE)


def parse_origins(reader: SchemaReader, raw: object, place: str) -> frozenset[str] | None:
    """Return the allowed origins in lower case, or None for all of them."""
    place = f"{place}.access_control_allow_origin"
    origins = []
    for i, origin in enumerate(raw if isinstance(raw, list) else [raw]):
        inner = f"{place}[{i}]" if isinstance(raw, list) else place
        if not isinstance(origin, str):
            reader.problem(inner, f"expected an origin, a list of origins or *, got {show(origin)}")
        elif origin != "*" and not ORIGIN.fullmatch(origin.removesuffix("/")):
            reader.problem(inner, f'expected an origin such as "https://example.com", got {show(origin)}')
        else:
            origins.append(origin.removesuffix("/").lower())
    return None if "*" in origins else frozenset(origins)


def parse_app_tables(
    reader: SchemaReader, raw: object, place: str, tables: Mapping[str, Table]
) -> tuple[Table, ...]:
    if not isinstance(raw, list):
        got = "nothing" if raw is None else show(raw)
        reader.problem(f"{place}.tables", f"expected a list of table names, got {got}")
        return ()
    found = {}
    for i, name in enumerate(raw):
        if isinstance(name, str) and name in tables:
            found[name] = tables[name]
        else:
            hint = suggestion(name, tables) if isinstance(name, str) else ""
            reader.problem(f"{place}.tables[{i}]", f"there is no table {show(name)}{hint}")
    return tuple(found.values())


def parse_apps(reader: SchemaReader, raw: object, tables: Mapping[str, Table]) -> dict[str, App]:
    apps = {}
    for app_id, raw_app in reader.mapping(raw, "apps", "at least one app").items():
        place = f"apps.{app_id}"
        section = reader.mapping(raw_app, place, "an app with a secret_key and tables")
        if not section:
            continue
        if "/" in app_id or not app_id:
            reader.problem(place, "an app's id must not be empty or contain a slash: it stands in a URL")
        reader.known(section, place, APP_KEYS)
        apps[app_id] = App(
            app_id,
            reader.required_text(section, place, "secret_key"),
            parse_origins(reader, section.get("access_control_allow_origin", "*"), place),
            parse_app_tables(reader, section.get("tables"), place, tables),
            parse_invalid_events(reader, section, place),
        )
    return apps


def parse_schema(text: str, file: str = "schema file") -> Schema:
    """Return the schema that a file's text describes.

    `file` is the name to use in messages. Raises SchemaError with every mistake in it.
    """
    reader = SchemaReader(file)
    try:
        node = yaml.compose(text, YamlLoader)
        raw = reader.plain(node) if node else None
    except yaml.YAMLError as error:
        raise SchemaError([f"{file}: not YAML: {one_line(error)}"]) from None
    except RecursionError:
        raise SchemaError([f"{file}: nested too deeply"]) from None
    document = reader.mapping(raw, "", "tables and apps")
    if document:
        reader.known(document, "", ("tables", "apps", "database_url"))
        tables = parse_tables(reader, document.get("tables"))
        apps = parse_apps(reader, document.get("apps"), tables)
        url = reader.text(document, "", "database_url")
    if reader.problems:
        raise SchemaError(reader.problems)
    return Schema(tables, apps, url)


def named_changes(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    """Return a text for each thing that was added, removed or changed, by name."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            yield f"{what} {show(name)} added"
        elif name not in after:
            yield f"{what} {show(name)} removed"
        elif before[name] != after[name]:
            yield f"{what} {show(name)} changed"


def changes(before: Schema, after: Schema) -> list[str]:
    """Return in words, and without keys, what tables, columns and apps another schema adds or changes."""

    def columns(schema: Schema) -> dict[str, Column]:
        return {
            f"{table.name}.{column.name}": column
            for table in schema.tables.values()
            if table.name in before.tables and table.name in after.tables
            for column in table.columns
        }

    def apps(schema: Schema) -> dict[str, tuple[App, list[str]]]:
        return {
            app.id: (replace(app, tables=()), [table.name for table in app.tables])
            for app in schema.apps.values()
        }

    return [
        *named_changes("table", dict.fromkeys(before.tables), dict.fromkeys(after.tables)),
        *named_changes("column", columns(before), columns(after)),
        *named_changes("app", apps(before), apps(after)),
    ]


def relaxed(schema: Schema, before: Schema) -> Schema:
    """Return a schema that requires no new columns of tables that were there before.

    As NOT NULL they would refuse the events that are still taken by the schema from before.
    """
    tables = dict(schema.tables)
    for name, old in before.tables.items():
        if name in tables:
            known = {column.name for column in old.columns}
            columns = [c if c.name in known else replace(c, required=False) for c in tables[name].columns]
            tables[name] = replace(tables[name], columns=tuple(columns))
    return replace(schema, tables=tables)


# --- Conversion ---------------------------------------------------------------
# JSON values to column values, as the texts that PostgreSQL reads for them. Pure: a
# function returns the text or raises ValueError with the reason, and knows nothing
# of tables, requests and SQL. Nothing is changed silently: what PostgreSQL would not
# give back equal is refused. These functions run once per value: the usual case of
# each comes first.


def to_bool(value: object) -> str:
    if value is True:
        return "true"
    if value is False:
        return "false"
    raise ValueError(f"expected true or false, got {show(value)}")


def to_integer(low: int, high: int, value: object) -> str:
    if type(value) is int and low <= value <= high:
        return str(value)
    if type(value) is float and value.is_integer():
        value = int(value)  # 5.0 and 1e3 have no fraction; Lua and GDScript write integers so
    elif type(value) is Decimal and value.adjusted() < 20 and value == value.to_integral_value():
        value = int(value)
    if type(value) is not int:  # bool is an int in Python, but not a number in JSON
        raise ValueError(f"expected an integer, got {show(value)}")
    if not low <= value <= high:
        raise ValueError(f"expected an integer from {low} to {high}, got {show(value)}")
    return str(value)


def to_float(limit: float, smallest: float, value: object) -> str:
    if type(value) is not float and type(value) is not int and type(value) is not Decimal:
        raise ValueError(f"expected a number, got {show(value)}")
    if not -limit <= value <= limit:  # NaN is not either
        raise ValueError(f"expected a finite number of at most {limit!r}, got {show(value)}")
    if value and -smallest < value < smallest:
        raise ValueError(f"expected zero or a number of at least {smallest!r}, got {show(value)}")
    number = float(value)
    # 2**60 is exact; 590295810358705700000 is how JavaScript writes 2**69; 2**53 + 1 is neither.
    is_long = type(value) is int and limit == sys.float_info.max and number != value
    if is_long and Decimal(repr(number)) != value:
        raise ValueError(f"the integer {show(value)} has more digits than double precision holds")
    return repr(number)


def to_string(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a string, got {show(value)}")
    if "\0" in value:
        raise ValueError("contains a NUL character (\\u0000), which PostgreSQL cannot store")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise ValueError(f"contains half of a surrogate pair (\\u{code:04x})") from None
    return value


RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:)(\d\d)(\.\d+)?(?:([Zz])|([+-])(\d\d):(\d\d))", re.ASCII
)
SECONDS_MIN = -62_135_596_800  # 0001-01-01, where Python's calendar starts
SECONDS_END = 253_402_300_800  # 10000-01-01, where it ends; in milliseconds that is 1978
MICROSECONDS_EXACT = 2**33  # Seconds up to which the last digits of a float are below a microsecond
EPOCH = datetime(1970, 1, 1)  # naive, which is faster; all our times are in UTC
MILLISECONDS = "looks like milliseconds; send seconds"


def parse_rfc_3339(text: str) -> datetime:
    """Return the time that an RFC 3339 string (section 5.6) means, to the microsecond, in UTC.

    A leap second is the second after it, as in POSIX and in PostgreSQL. Raises ValueError.
    """
    match = RFC_3339.fullmatch(text)
    if not match:
        lacks = RFC_3339.fullmatch(text + "Z")
        reason = "an offset is missing, such as Z or +02:00" if lacks else "expected RFC 3339"
        raise ValueError(f"{reason}: 2019-04-01T14:49:40Z is one, got {show(text)}")
    date, clock, second, fraction, _zulu, sign, hours, minutes = match.groups()
    leap = second == "60"
    try:
        # PostgreSQL rounds to microseconds as well.
        micros = round(float(fraction or 0) * 1_000_000)
        time_of_day = datetime.fromisoformat(f"{date}T{clock}{'59' if leap else second}")
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        if offset >= timedelta(days=1) or int(minutes or 0) > 59:
            raise ValueError("offset must be below 24:00")
        moment = time_of_day - (-offset if sign == "-" else offset)
        if leap and (moment.hour, moment.minute) != (23, 59):
            raise ValueError("a leap second is at 23:59:60 UTC only")
        return moment + timedelta(seconds=int(leap), microseconds=micros)
    except OverflowError:
        raise ValueError(f"expected a time in the years 1 to 9999, got {show(text)}") from None
    except ValueError as error:
        raise ValueError(f"no such time: {one_line(error)}, got {show(text)}") from None


@lru_cache(maxsize=4096)  # Events come with times close together.
def minute_text(minutes: float) -> str:
    """Return the minute that begins `minutes` after 1970-01-01. Raises OverflowError after year 9999."""
    return (EPOCH + timedelta(minutes=minutes)).isoformat(timespec="minutes")


def split_seconds(seconds: float | Decimal) -> tuple[int, int]:
    """Return whole seconds and microseconds, rounded to what PostgreSQL holds."""
    if not -MICROSECONDS_EXACT < seconds < MICROSECONDS_EXACT:
        seconds = Decimal(repr(seconds)) if isinstance(seconds, float) else seconds
    whole = math.floor(seconds)
    microseconds = round((seconds - whole) * 1_000_000)
    return (whole, microseconds) if microseconds < 1_000_000 else (whole + 1, 0)


def to_timestamp(value: object) -> str:
    if (type(value) is float or type(value) is int) and 0 <= value < MICROSECONDS_EXACT:
        minute = value // 60
        # May give 60 seconds by rounding, which PostgreSQL takes for the next minute.
        return "%s:%09.6fZ" % (minute_text(minute), value - minute * 60)  # noqa: UP031  # f"" takes longer
    if type(value) is str:
        return f"{parse_rfc_3339(value).isoformat()}Z"
    if type(value) is not float and type(value) is not int and type(value) is not Decimal:
        raise ValueError(
            f"expected seconds since 1970 or a string such as 2019-04-01T14:49:40Z, got {show(value)}"
        )
    if not SECONDS_MIN <= value < SECONDS_END:
        hint = f": {MILLISECONDS}" if SECONDS_END <= value < SECONDS_END * 1000 else ""
        raise ValueError(f"expected a time in the years 1 to 9999, got {show(value)}{hint}")
    whole, microseconds = split_seconds(value)
    try:
        return f"{minute_text(whole // 60)}:{whole % 60:02d}.{microseconds:06d}Z"
    except OverflowError:  # less than a microsecond before the end
        raise ValueError(f"expected a time in the years 1 to 9999, got {show(value)}") from None


UUID_TEXT = re.compile(r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}", re.IGNORECASE)


def to_uuid(value: object) -> str:
    if type(value) is not str or not UUID_TEXT.fullmatch(value):
        example = "123e4567-e89b-12d3-a456-426614174000"
        raise ValueError(f"expected a UUID such as {example}, got {show(value)}")
    return value


JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # \\u0000 is a backslash and five characters

TOO_DEEP = f"nested deeper than {JSON_DEPTH_MAX} levels"


def exact_json(value: object, depth: int) -> str:
    """Return the JSON text of a value that has numbers in Decimal. Raises ValueError as to_json does."""
    if type(value) is Decimal:
        after_point = -int(value.as_tuple().exponent)
        if value.adjusted() >= NUMERIC_DIGITS_BEFORE_POINT or after_point > NUMERIC_DIGITS_AFTER_POINT:
            raise ValueError(f"the number {show(value)} is out of range")
        return str(value)
    if type(value) is not dict and type(value) is not list:
        try:
            return JSON_ENCODER.encode(value)
        except ValueError:
            raise ValueError("NaN and Infinity are not JSON") from None
    if not depth:
        raise ValueError(TOO_DEEP)
    if type(value) is list:
        return "[" + ",".join([exact_json(item, depth - 1) for item in value]) + "]"
    assert isinstance(value, dict)
    items = [f"{JSON_ENCODER.encode(key)}:{exact_json(item, depth - 1)}" for key, item in value.items()]
    return "{" + ",".join(items) + "}"


def check_depth(value: object, depth: int) -> None:
    """Raise ValueError for arrays and objects nested deeper than `depth`."""
    if type(value) is not dict and type(value) is not list:
        return
    if not depth:
        raise ValueError(TOO_DEEP)
    for item in value.values() if type(value) is dict else value:
        check_depth(item, depth - 1)


def to_json(value: object) -> str:
    try:
        text = JSON_ENCODER.encode(value)
    except TypeError:  # A Decimal somewhere in it, which the encoder does not know
        text = exact_json(value, JSON_DEPTH_MAX)
    except ValueError:
        raise ValueError("NaN and Infinity are not JSON") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("{") + text.count("[") > JSON_DEPTH_MAX:
        check_depth(value, JSON_DEPTH_MAX)
    if ESCAPED_NUL.search(text):
        raise ValueError("contains a NUL character (\\u0000), which PostgreSQL cannot store in json")
    return to_string(text)


CONVERTERS: Mapping[Type, Callable[[object], str]] = {
    Type.BOOL: to_bool,
    Type.I32: partial(to_integer, -(2**31), 2**31 - 1),
    Type.I64: partial(to_integer, -(2**63), 2**63 - 1),
    # What still rounds to the largest real, and the smallest that does not round to zero.
    Type.F32: partial(to_float, 3.4028235677973362e38, 1.401298464324817e-45),
    Type.F64: partial(to_float, sys.float_info.max, 5e-324),
    Type.STRING: to_string,
    Type.TIMESTAMP: to_timestamp,
    Type.JSON: to_json,
    Type.UUID: to_uuid,
}


# --- Batches ------------------------------------------------------------------
# A request's body and headers to a Batch. Pure: an Intake is compiled from each
# app once, and turns a body into rows or raises a RequestError with the reason.


class Delivery(NamedTuple):
    """What a request brings beside its body."""

    headers: Mapping[str, str]  # names in lower case
    peer: str  # the IP address at the other end of the connection
    received_at: float  # seconds since the epoch


@dataclass(slots=True)
class Sorted:
    """Events as rows that are ready for PostgreSQL, and what is wrong with the others.

    `rows` has, by table, the rows of the good events as one text, in the table's RowFormat; `counts` has how
    many, by its name.
    """

    rows: dict[TableIntake, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[EventProblem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An event that cannot be stored as it is, with all that is needed to try again."""

    app_id: str
    delivery: Delivery
    event: str  # its JSON as it was received
    table: str | None
    column: str | None
    reason: str


@dataclass(slots=True)
class Batch:
    """The events of one request, converted and as they came."""

    intake: Intake
    delivery: Delivery
    body: bytes  # an object with "events", and in these exactly the events of `rows`
    rows: Mapping[TableIntake, str]  # as in Sorted
    counts: dict[str, int]  # events that are or will be stored, by table ...
    accepted: int  # ... and in all
    warnings: Sequence[str] = ()
    # With `invalid_events: quarantine`, what is to be kept there, and what to tell the client of it.
    quarantined: Sequence[Quarantined] = ()
    problems: Sequence[EventProblem] = ()
    # Where each event of `body` stood in the request, if some did not make it.
    places: Sequence[int] | None = None


class Repeating(dict[str, object]):
    """An object that had the key `key` twice."""

    key = ""


class ConstantRefused(Exception):
    """A JSON text has NaN or Infinity."""


def marked_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    marked = Repeating(result)
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            marked.key = key
            break
        seen.add(key)
    return marked


def exact_number(text: str) -> float | Decimal:
    """Return a JSON number with a fraction or an exponent; as Decimal where a float would change it."""
    number = float(text)
    # Up to 15 digits survive the way to binary and back (IEEE 754; DBL_DIG in C).
    if len(text) <= 16 and "e" not in text and "E" not in text:
        return number
    try:
        exact = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"the number {show(text)} cannot be held") from None
    return number if Decimal(repr(number)) == exact else exact


# Strings, and the words that Python's decoder takes for numbers.
STRING_OR_CONSTANT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|(NaN|-?Infinity)')


def refuse_constant(_name: str) -> NoReturn:
    raise ConstantRefused


DECODER = json.JSONDecoder(parse_float=exact_number, parse_constant=refuse_constant)
MARKING_DECODER = json.JSONDecoder(object_pairs_hook=marked_object)


def not_json(error: json.JSONDecodeError) -> InvalidBody:
    place = f"line {error.lineno}, column {error.colno}"
    return InvalidBody(f"the body is not JSON: {error.msg} at {place}")


def decode_json(decoder: json.JSONDecoder, text: str) -> object:
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        raise not_json(error) from None
    except ConstantRefused:
        # All before it is JSON, so it is the first one that is not in a string.
        found = next(match for match in STRING_OR_CONSTANT.finditer(text) if match[1])
        raise not_json(json.JSONDecodeError(found[1], text, found.start())) from None
    except ValueError:
        raise InvalidBody("the body has a number that is too long to be read") from None
    except RecursionError:
        raise InvalidBody("the body's JSON is nested too deeply") from None


def members(value: object) -> int:
    """Return how many members all objects in a JSON value have together."""
    count = 0
    unseen = [value]  # no recursion: the decoder goes deeper than Python code may
    while unseen:
        value = unseen.pop()
        if type(value) is dict:
            count += len(value)
            unseen.extend(value.values())
        elif type(value) is list:
            unseen.extend(value)
    return count


def may_repeat(document: dict[str, object], body: bytes) -> bool:
    """Return whether an object in a document may have a key twice, of which only the last one is there.

    Each member has a colon of its own in the body, so with as many members as colons none is lost. A
    hook that looks at each object while it is decoded takes a third longer.
    """
    events = document.get("events")
    if type(events) is list and body.count(b"{") == len(events) + 1 and set(map(type, events)) <= {dict}:
        count = len(document) + sum(map(len, events))  # no event holds another object
    else:
        count = members(document)
    # A colon in a string does not follow a quote, unless that is an escaped one.
    return count != body.count(b":") and count != body.translate(None, b" \t\n\r").count(b'":')


def repeats(value: object) -> Iterator[str]:
    """Yield the keys that objects in `value` have twice."""
    unseen = [value]  # no recursion: the decoder goes deeper than Python code may
    while unseen:
        value = unseen.pop()
        if isinstance(value, Repeating):
            yield value.key
        if isinstance(value, dict | list):
            unseen.extend(value.values() if isinstance(value, dict) else value)


def refused_events(problems: Sequence[EventProblem], count: int) -> InvalidEvents:
    """Return the refusal of a batch of `count` events because of `problems`, as one error."""
    bad = len({problem.index for problem in problems})
    reason = f"{bad} of {count} events do not fit, none was stored" if count > 1 else "the event does not fit"
    if len(problems) > PROBLEMS_MAX:
        reason = f"at least {reason}; the first {PROBLEMS_MAX} reasons are listed"
    return InvalidEvents(reason, problems[:PROBLEMS_MAX], count)


def repeated_key(document: object) -> RequestError | None:
    """Return the refusal of a document of MARKING_DECODER's, or None if no object has a key twice."""
    events = document.get("events") if isinstance(document, dict) else None
    reason = "the key stands twice in one object"
    problems = [
        EventProblem(index, key[:NAME_BYTES_MAX], reason)
        for index, event in enumerate(events if isinstance(events, list) else ())
        for key in repeats(event)
    ]
    if problems:
        return refused_events(problems, len(events or ()))
    key = next(repeats(document), None)
    return InvalidBody(f"the key {show(key)} stands twice in one object") if key is not None else None


def decode_body(body: bytes) -> dict[str, object]:
    """Return the JSON object in a request's body.

    Raises InvalidBody for what is not JSON (RFC 8259) or not an object, InvalidEvents for an event
    that has a key twice.
    """
    try:
        text = body.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidBody(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    document = decode_json(DECODER, text)
    if type(document) is not dict:
        raise InvalidBody(f'expected an object with "secret_key" and "events", got {show(document)}')
    if may_repeat(document, body) and (refusal := repeated_key(decode_json(MARKING_DECODER, text))):
        raise refusal
    return document


# Finds the end of a JSON value and does not care for numbers.
SCAN = json.JSONDecoder(parse_float=len, parse_int=len, parse_constant=len).scan_once  # type: ignore[attr-defined]
GAP = re.compile(r"[ \t\n\r]*[\[{,:]?[ \t\n\r]*")  # RFC 8259, section 2


def after_gap(text: str, at: int) -> int:
    """Return where the value after the punctuation at text[at] begins."""
    return GAP.match(text, at).end()  # type: ignore[union-attr]  # it matches everywhere


def item_spans(text: str, at: int) -> list[tuple[int, int]]:
    """Return where each value of the valid JSON array at text[at] begins and ends."""
    spans = []
    at = after_gap(text, at)
    while text[at] != "]":
        _, end = SCAN(text, at)
        spans.append((at, end))
        at = after_gap(text, end)
    return spans


def events_span(text: str, at: int) -> tuple[int, int]:
    """Return where the array "events" of the valid JSON object at text[at] begins and ends."""
    while True:
        key, end = SCAN(text, after_gap(text, at))
        start = after_gap(text, end)
        _, at = SCAN(text, start)
        if key == "events":
            return start, at


def body_text(body: bytes) -> str:
    """Return the JSON text of a body that decode_body took."""
    return body.decode().removeprefix("\ufeff")


def decoded_events(body: bytes) -> list[Any]:
    """Return the events in a body that was accepted."""
    events = decode_body(body)["events"]
    assert isinstance(events, list)
    return events


def event_texts(text: str) -> list[str]:
    """Return the JSON of each event in the text of a body, as it came."""
    start, _end = events_span(text, 0)
    return [text[slice(*span)] for span in item_spans(text, start)]


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How a statement wants its rows: what is around them, between fields and between rows, and NULL."""

    start: str
    field_separator: str
    row_separator: str
    end: str
    null: str

    def text(self, rows: Iterable[str]) -> str:
        """Return rows as one text."""
        return f"{self.start}{self.row_separator.join(rows)}{self.end}"


COPY_ROWS = RowFormat("", "\t", "\n", "\n", "\\N")
VALUES_ROWS = RowFormat("(", ",", "),(", ")", "NULL")

# PostgreSQL manual, COPY, "Text Format".
COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def quote(text: str) -> str:
    """Return a string literal. Complete for text without NUL (PostgreSQL manual, 4.1.2.1).

    Only with standard_conforming_strings = on, which every connection of ours asks for.
    """
    return "'" + text.replace("'", "''") + "'"


def copy_field(convert: Callable[[object], str], value: object) -> str:
    """Return a column's field for COPY."""
    text = convert(value)
    # Printable text has no control characters; nearly all text is.
    return text if text.isprintable() and "\\" not in text else text.translate(COPY_ESCAPES)


def values_field(convert: Callable[[object], str], value: object) -> str:
    """Return a column's literal for VALUES."""
    return quote(convert(value))


def field_converter(type_: Type, row_format: RowFormat) -> Callable[[object], str]:
    """Return the function that turns a JSON value into a field of a row. It raises ValueError."""
    if row_format is VALUES_ROWS:
        return partial(values_field, CONVERTERS[type_])
    # The texts of all other types have nothing to escape.
    return partial(copy_field, CONVERTERS[type_]) if type_ in (Type.STRING, Type.JSON) else CONVERTERS[type_]


def filled_by(column: Column) -> str:
    """Return what fills a column that is not the event's, for messages."""
    return f"the request header {column.header}" if column.header else f"the server ({column.source})"


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address without a zone, and IPv4 that came over an IPv6 socket as IPv4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=4096)
def believed_address(peer: str, real_ip: str, forwarded_for: str) -> str:
    """Return the client's IP address, given what a proxy may have said about it."""
    address = plain_address(peer)
    if address is None:
        return peer
    if address.is_loopback or address.is_private:
        for claimed in (real_ip, forwarded_for.rpartition(",")[2]):
            if proxied := plain_address(claimed.strip()):
                return str(proxied)
    return str(address)


def client_address(peer: str, headers: Mapping[str, str]) -> str:
    """Return the client's IP address.

    A proxy on this machine or in a private network is believed what it says in X-Real-IP or last in
    X-Forwarded-For; anybody else could say anything.
    """
    return believed_address(peer, headers.get("x-real-ip", ""), headers.get("x-forwarded-for", ""))


def kept(delivery: Delivery, headers: Iterable[str]) -> Delivery:
    """Return what of a delivery is kept with its events: the client's address, and some headers."""
    return Delivery(
        {name: delivery.headers[name] for name in headers if name in delivery.headers},
        client_address(delivery.peer, delivery.headers),
        delivery.received_at,
    )


def header_text(value: str) -> str:
    """Return a header's value, read as UTF-8 where it is that, else as Latin-1 (RFC 9110, section 5.5)."""
    try:
        return value if value.isascii() else value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def filled_value(column: Column, app_id: str, delivery: Delivery) -> object:
    """Return the value of a column that the request fills, None for NULL. Raises ValueError."""
    match column.source:
        case Source.APP_ID:
            return app_id
        case Source.CLIENT_IP:
            return client_address(delivery.peer, delivery.headers)
        case Source.RECEIVED_AT:
            return delivery.received_at
    value = delivery.headers.get(column.header or "")
    if value is not None:
        return header_text(value)
    if column.required:
        raise ValueError(f"the request header {column.header} is missing, but required")
    return None


NULL_REFUSED = "null, but required"


@dataclass(frozen=True, slots=True)
class EventColumn:
    """A column whose values come from events."""

    name: str
    type: Type
    required: bool
    null: str
    convert: Callable[[object], str]

    def field(self, value: object) -> str:
        """Return the field for a value. Raises ValueError."""
        if value is not None:
            return self.convert(value)
        if self.required:
            raise ValueError(NULL_REFUSED)
        return self.null


def usual_field(column: EventColumn, row_format: RowFormat, i: int) -> str:
    """Return an expression for column i's field: its usual case written out, else by its functions."""
    if column.type is Type.STRING and row_format is COPY_ROWS:
        # Printable text has no control characters and no surrogates; nearly all text is.
        return f"v{i} if type(v{i}) is str and v{i}.isprintable() and '\\\\' not in v{i} else field{i}(v{i})"
    return f"field{i}(v{i}) if v{i} is None else convert{i}(v{i})"


def compile_rows(
    columns: Sequence[EventColumn], row_format: RowFormat
) -> Callable[[Iterable[dict[str, object]], str], list[str]]:
    """Return a function of events, and of the end of each row, that returns their rows.

    It is written out for these columns and compiled, as `dataclasses` does with __init__; that takes
    about half the time of a loop over columns. For a string "a" and an integer "b":

        def rows(events, end):
            rows = []
            for event in events:
                get = event.get
                v0 = get('a')
                v1 = get('b')
                rows.append(join((
                    v0 if type(v0) is str and v0.isprintable() and '\\\\' not in v0 else field0(v0),
                    field1(v1) if v1 is None else convert1(v1),
                )) + end)
            return rows
    """
    lines = ["def rows(events, end):", " rows = []", " for event in events:", "  get = event.get"]
    lines += [f"  v{i} = get({column.name!r})" for i, column in enumerate(columns)]
    lines += ["  rows.append(join(("]
    lines += [f"   {usual_field(column, row_format, i)}," for i, column in enumerate(columns)]
    lines += ["  )) + end)", " return rows"]
    names: dict[str, Any] = {"join": row_format.field_separator.join}
    for i, column in enumerate(columns):
        names |= {f"field{i}": column.field, f"convert{i}": column.convert}
    exec("\n".join(lines), names)
    return names["rows"]  # type: ignore[no-any-return]


class TableIntake:
    """How events become rows of one table; compiled once from its columns.

    A row has first the columns that come from the event, then those that the request fills, then the
    catch-all column. `columns` has them all in that order.
    """

    def __init__(self, table: Table) -> None:
        self.name = table.name
        # COPY is faster for any number of rows, but cannot skip repeated values.
        self.format = VALUES_ROWS if any(c.unique for c in table.columns) else COPY_ROWS
        events = [c for c in table.columns if not (c.header or c.source or c.extra)]
        filled = [c for c in table.columns if c.header or c.source]
        extra = [c for c in table.columns if c.extra]
        self.columns = (*events, *filled, *extra)
        self._columns = [self._event_column(column) for column in events]
        self._extra = next((self._event_column(column) for column in extra), None)
        self._filled = [(column, field_converter(column.type, self.format)) for column in filled]
        self._rows = compile_rows(self._columns, self.format)
        self._names = frozenset(c.name for c in events)
        self._known = self._names | {TABLE_KEY}
        self._by_request = {c.name: filled_by(c) for c in filled}

    def filled(self, app_id: str, delivery: Delivery) -> tuple[list[str], list[tuple[str, str]]]:
        """Return the fields that a request fills, and (column, reason) for what cannot be filled."""
        fields, problems = [], []
        for column, convert in self._filled:
            try:
                value = filled_value(column, app_id, delivery)
                fields.append(self.format.null if value is None else convert(value))
            except ValueError as error:
                problems.append((column.name, str(error)))
        return fields, problems

    def rows(self, events: Sequence[dict[str, object]], filled: Sequence[str]) -> list[str]:
        """Return the rows of events; `filled` has the fields that the request fills.

        Raises ValueError if any of the events does not fit; explain() says what is wrong.
        """
        separator = self.format.field_separator
        end = separator.join(["", *filled] if self._columns else filled)
        rows = self._rows(events, end)
        if self._extra is None:
            return rows
        if end or self._columns:
            rows = [row + separator for row in rows]
        return [row + self._extra.field(self._rest(event)) for row, event in zip(rows, events, strict=True)]

    def explain(self, event: dict[str, object]) -> list[tuple[str, str]]:
        """Return (column, reason) for each value of an event that does not fit."""
        problems = []
        values = [(column, event.get(column.name)) for column in self._columns]
        if self._extra:
            values.append((self._extra, self._rest(event)))
        for column, value in values:
            try:
                column.field(value)
            except ValueError as error:
                reason = "missing, but required" if value is None and column.name not in event else str(error)
                problems.append((column.name, reason))
        return problems

    def knows(self, events: Iterable[dict[str, object]]) -> bool:
        """Return whether all keys of events have a column."""
        return self._extra is not None or all(map(self._known.issuperset, events))

    def unknown(self, event: dict[str, object]) -> set[str]:
        """Return the keys of an event that no column takes."""
        return set() if self._extra else event.keys() - self._known

    def describe(self, key: str) -> str:
        """Return why a key is not stored."""
        if key in self._by_request:
            return f'the key "{key}" is ignored: its column is filled from {self._by_request[key]}'
        return f"unknown key {show(key)}{suggestion(key[:NAME_BYTES_MAX], self._names)}"

    def _event_column(self, column: Column) -> EventColumn:
        convert = field_converter(column.type, self.format)
        return EventColumn(column.name, column.type, column.required, self.format.null, convert)

    def _rest(self, event: dict[str, object]) -> dict[str, object] | None:
        """Return what the catch-all column holds, None if there is nothing."""
        return {key: event[key] for key in event if key not in self._known} or None


class Warnings:
    """Collects what was ignored in a request: each unknown key once, with its first place."""

    def __init__(self, document: Mapping[str, object]) -> None:
        self._texts: dict[tuple[str, str], str] = {}
        self._more = False
        if len(document) > len(REQUEST_KEYS):
            for key in sorted(document.keys() - REQUEST_KEYS)[:UNKNOWN_KEYS_MAX]:
                hint = suggestion(key[:NAME_BYTES_MAX], REQUEST_KEYS)
                self._texts["", key] = f"unknown key {show(key)}{hint}"

    def note(self, table: TableIntake, places: Iterable[int], events: Iterable[dict[str, object]]) -> None:
        """Note the unknown keys of a table's events, which stand at `places` in the request."""
        for index, event in zip(places, events, strict=True):
            for key in sorted(table.unknown(event)):
                if (table.name, key) in self._texts:
                    continue
                if len(self._texts) >= UNKNOWN_KEYS_MAX:
                    self._more = True
                    return
                self._texts[table.name, key] = f"events[{index}]: {table.describe(key)}"

    def texts(self) -> Sequence[str]:
        """Return the warnings, table by table in the order of the events."""
        if not self._texts:
            return ()
        more = ["there are more unknown keys"] if self._more else []
        return [*self._texts.values(), *more]


def describe(problems: Iterable[EventProblem]) -> str:
    """Return in one line what is wrong with one event."""
    return "; ".join(f"{p.column}: {p.reason}" if p.column else p.reason for p in problems)


def table_of(event: object) -> str | None:
    """Return the name of the table that an event names, if it does."""
    name = event.get(TABLE_KEY) if isinstance(event, dict) else None
    return name if isinstance(name, str) else None


def quarantined_events(
    app_id: str,
    delivery: Delivery,
    events: Sequence[object],
    texts: Sequence[str],
    problems: Iterable[EventProblem],
) -> dict[int, Quarantined]:
    """Return for the quarantine, by index, the events that have problems."""
    by_index: dict[int, list[EventProblem]] = {}
    for problem in problems:
        by_index.setdefault(problem.index or 0, []).append(problem)
    return {
        index: Quarantined(
            app_id, delivery, texts[index], table_of(events[index]), found[0].column, describe(found)
        )
        for index, found in by_index.items()
    }


class Intake:
    """How requests of one app become batches; compiled once from the schema."""

    def __init__(self, app: App, tables: Mapping[str, TableIntake] | None = None) -> None:
        """Compile what `tables` has not."""
        self.app = app
        self._key = app.secret_key.encode(errors="surrogatepass")
        compiled = tables or {}
        self._tables = {table.name: compiled.get(table.name) or TableIntake(table) for table in app.tables}
        self.headers = sorted({c.header for table in app.tables for c in table.columns if c.header})

    def batch(self, body: bytes, delivery: Delivery) -> Batch:
        """Return the batch in a request's body.

        Raises InvalidBody, WrongKey, BodyTooLarge, InvalidEvents or TableRefused.
        """
        document = decode_body(body)
        key = document.get("secret_key")
        if type(key) is not str:
            got = show(key) if "secret_key" in document else "nothing"
            raise InvalidBody(f'expected a string "secret_key", got {got}')
        if not hmac.compare_digest(key.encode(errors="surrogatepass"), self._key):
            raise WrongKey("the secret key is wrong")
        events = document.get("events")
        if type(events) is not list:
            got = show(events) if "events" in document else "nothing"
            raise InvalidBody(f'expected an array "events", got {got}')
        if len(events) > EVENTS_MAX:
            raise BodyTooLarge(f"{len(events)} events; a request may bring {EVENTS_MAX}")
        warnings = Warnings(document)
        limit = None if self.app.quarantines else PROBLEMS_MAX
        content = self.sort(events, delivery, warnings, limit)
        problems = content.problems
        if problems and not self.app.quarantines:
            refusal = refused_events(problems, len(events))
            only_tables = all(self._is_misplaced(events[problem.index or 0]) for problem in problems)
            if only_tables:
                raise TableRefused(refusal.reason, refusal.problems, refusal.count)
            raise refusal
        count = sum(content.counts.values())
        batch = Batch(self, delivery, body, content.rows, content.counts, count, warnings.texts())
        if problems:
            self._set_apart(batch, events, problems)
        return batch

    def sort(
        self,
        events: Sequence[object],
        delivery: Delivery,
        warnings: Warnings | None = None,
        limit: int | None = None,
    ) -> Sorted:
        """Return events as rows, and the problems of those that do not fit their tables.

        With a `limit`, gives up after so many problems.
        """
        result = Sorted()
        for name, places in self._by_table(events, result.problems).items():
            table = self._tables[name]
            fields, lacking = table.filled(self.app.id, delivery)
            chosen = places
            here: Sequence[Any] = events if len(places) == len(events) else [events[i] for i in places]
            try:
                rows = [] if lacking else table.rows(here, fields)
            except ValueError:
                rows = []
            if not rows:
                chosen = self._fitting(table, events, places, lacking, result.problems, limit)
                here = [events[i] for i in chosen]
                rows = table.rows(here, fields)
            if rows:
                result.rows[table] = table.format.text(rows)
                result.counts[name] = len(rows)
            if warnings and not table.knows(here):
                warnings.note(table, chosen, here)
        if len(result.problems) > 1:
            result.problems.sort(key=lambda problem: problem.index or 0)
        return result

    def rows_in_order(self, events: Iterable[Any], delivery: Delivery) -> list[tuple[TableIntake, str]]:
        """Return the table and the row of each event in their order. All of them must fit."""
        filled = {name: table.filled(self.app.id, delivery)[0] for name, table in self._tables.items()}
        rows = []
        for event in events:
            table = self._tables[event[TABLE_KEY]]
            rows.append((table, table.format.text(table.rows([event], filled[table.name]))))
        return rows

    def _by_table(self, events: Sequence[object], problems: list[EventProblem]) -> dict[str, list[int]]:
        """Return the indexes of the events for each table, and note a problem for those that name none."""
        places: dict[str, list[int]] = {}
        for index, event in enumerate(events):
            name = event.get(TABLE_KEY) if type(event) is dict else None
            if type(name) is str and name in self._tables:
                places.setdefault(name, []).append(index)
            else:
                problems.append(self._table_problem(index, event))
        return places

    def _fitting(  # noqa: PLR0913, PLR0917  # all of them are what sort() works on
        self,
        table: TableIntake,
        events: Sequence[Any],
        places: Iterable[int],
        lacking: Sequence[tuple[str, str]],
        problems: list[EventProblem],
        limit: int | None,
    ) -> list[int]:
        """Return the indexes of those events that fit their table; note the problems of the others."""
        fitting = []
        for index in places:
            if limit is not None and len(problems) > limit:
                break
            reasons = [*lacking, *table.explain(events[index])]
            problems.extend([EventProblem(index, column, reason) for column, reason in reasons])
            if not reasons:
                fitting.append(index)
        return fitting

    def _set_apart(self, batch: Batch, events: Sequence[object], problems: Sequence[EventProblem]) -> None:
        """Move the events that have problems out of a batch, into its quarantine."""
        texts = event_texts(body_text(batch.body))
        delivery = kept(batch.delivery, self.headers)
        bad = quarantined_events(self.app.id, delivery, events, texts, problems)
        batch.quarantined = list(bad.values())
        batch.problems = problems[:PROBLEMS_MAX]
        batch.places = [index for index in range(len(events)) if index not in bad]
        batch.body = f'{{"events":[{",".join(texts[index] for index in batch.places)}]}}'.encode()

    def _is_misplaced(self, event: object) -> bool:
        name = table_of(event)
        return name is not None and name not in self._tables

    def _table_problem(self, index: int, event: object) -> EventProblem:
        if type(event) is not dict:
            return EventProblem(index, None, f"expected an object, got {show(event)}")
        name = event.get(TABLE_KEY)
        if type(name) is not str:
            got = show(name) if TABLE_KEY in event else "nothing"
            return EventProblem(index, TABLE_KEY, f"expected the name of a table, got {got}")
        near = suggestion(name[:NAME_BYTES_MAX], self._tables)
        return EventProblem(index, TABLE_KEY, f"the app has no table {show(name)}{near}")


def intakes(schema: Schema) -> dict[str, Intake]:
    """Return the intake of each app, by its id. They share their tables, so that a flush can merge rows."""
    tables = {name: TableIntake(table) for name, table in schema.tables.items()}
    return {app.id: Intake(app, tables) for app in schema.apps.values()}


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """Return a body without its content coding, which is gzip or deflate (RFC 9110, section 8.4.1).

    Some clients send deflate without the zlib header; both are read. Raises InvalidBody for data
    that is damaged or cut short and BodyTooLarge when the result has more than `limit` bytes.
    """
    zlib_header = len(body) >= 2 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    stream = zlib.decompressobj(31 if coding == "gzip" else 15 if zlib_header else -15)
    try:
        result = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidBody(f"the body is not {coding}: {one_line(error)}") from None
    if len(result) > limit:
        raise BodyTooLarge(f"the body inflates to more than {limit} bytes")
    if not stream.eof:
        raise InvalidBody(f"the body's {coding} data is cut short")
    if stream.unused_data:
        raise InvalidBody(f"the body has {len(stream.unused_data)} bytes after its {coding} data")
    return result


# --- SQL ----------------------------------------------------------------------
# Statement texts, and what an existing database lacks. Pure: a catalog (what the
# database has) and a Schema (what it should have) in, SQL out: everything that is
# missing, or a Plan of what --migrate does about it.


@dataclass(frozen=True, slots=True)
class SqlType:
    """How a column type is called in SQL, and which existing types (pg_type.typname) hold it."""

    name: str
    accepts: frozenset[str]


SQL_TYPES: Mapping[Type, SqlType] = {
    Type.BOOL: SqlType("boolean", frozenset({"bool"})),
    Type.I32: SqlType("integer", frozenset({"int4"})),
    Type.I64: SqlType("bigint", frozenset({"int8"})),
    Type.F32: SqlType("real", frozenset({"float4"})),
    Type.F64: SqlType("double precision", frozenset({"float8"})),
    Type.STRING: SqlType("varchar", frozenset({"varchar", "text", "citext"})),
    Type.TIMESTAMP: SqlType("timestamp with time zone", frozenset({"timestamptz"})),
    Type.JSON: SqlType("jsonb", frozenset({"jsonb"})),
    Type.UUID: SqlType("uuid", frozenset({"uuid"})),
}


@dataclass(frozen=True, slots=True)
class ExistingColumn:
    """A column of a table in the database."""

    type: str  # pg_type.typname
    not_null: bool
    has_default: bool
    generated: str = ""  # "stored" or "identity": GENERATED ALWAYS, refuses values
    primary_key: str = ""  # the name of the constraint if the column is part of it


def identifier(name: str) -> str:
    """Return a quoted identifier (PostgreSQL manual, 4.1.1)."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class Index:
    """An index on one column."""

    table: str
    column: str
    unique: bool = False
    method: str = "btree"

    def sql(self, *how: str) -> str:
        """Return the statement that creates it; `how` may be CONCURRENTLY and a quoted name.

        Without a name PostgreSQL finds a free one.
        """
        words = ["CREATE", *(["UNIQUE"] if self.unique else []), "INDEX", *how, "ON", identifier(self.table)]
        method = [] if self.method == "btree" else ["USING", self.method]
        return " ".join([*words, *method, f"({identifier(self.column)})"])

    def name(self, number: int) -> str:
        """Return the name that PostgreSQL gives it when `number` others are taken (its makeObjectName())."""
        parts = [self.table.encode(), self.column.encode()]
        label = f"idx{number or ''}"
        while len(parts[0]) + len(parts[1]) + len(label) + 2 > NAME_BYTES_MAX:
            longer = int(len(parts[0]) <= len(parts[1]))
            parts[longer] = parts[longer][:-1]
        return "_".join([*(part.decode(errors="ignore") for part in parts), label])

    def may_have_name(self, name: str) -> bool:
        """Return whether we or PostgreSQL may have given it this name."""
        found = re.search(r"idx(\d{0,6})$", name)
        return found is not None and self.name(int(found[1] or 0)) == name


@dataclass(frozen=True, slots=True)
class InvalidIndex:
    """An index in the database that is being built, or whose build was interrupted."""

    index: Index
    name: str
    qualified: str  # the name with its schema, quoted
    busy: bool  # somebody holds the lock of a build on the table


@dataclass(frozen=True, slots=True)
class ExistingTable:
    """A table in the database. `indexed` and `unique` are the columns that a usable index leads with."""

    columns: Mapping[str, ExistingColumn]
    indexed: frozenset[str] = frozenset()
    unique: frozenset[str] = frozenset()
    kind: str = "table"
    can_insert: bool = True
    can_select: bool = True
    row_security: bool = False  # applies to our user
    partitioned: bool = False
    invalid: tuple[InvalidIndex, ...] = ()
    empty: bool = False  # known only where empty_tables_matter() says so

    @property
    def can_index(self) -> bool:
        """Return whether PostgreSQL lets it have indexes."""
        return self.kind == "table"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a table does not fit, and the SQL that mends it ("" for none).

    What --migrate runs by itself has it as an `action` of ALTER TABLE too. `later` is SQL that may be worth
    running some day after it.
    """

    reason: str
    sql: str
    action: str = ""
    later: str = ""


def wanted_indexes(table: Table) -> Iterator[Index]:
    """Return the indexes that a table should have."""
    for column in table.columns:
        if column.unique:
            yield Index(table.name, column.name, unique=True)
        elif column.indexed:
            # A b-tree on jsonb only helps to compare whole values; GIN finds keys and values in them.
            yield Index(table.name, column.name, method="gin" if column.type is Type.JSON else "btree")


def missing_indexes(table: Table, existing: ExistingTable) -> list[Index]:
    """Return the indexes that an existing table lacks."""
    if not existing.can_index:
        return []
    return [
        index
        for index in wanted_indexes(table)
        if index.column not in (existing.unique if index.unique else existing.indexed)
    ]


def create_table(table: Table) -> list[str]:
    """Return the statements that create a table and its indexes."""
    columns = ", ".join(
        f"{identifier(c.name)} {SQL_TYPES[c.type].name}{' NOT NULL' if c.required else ''}"
        for c in table.columns
    )
    created = f"CREATE TABLE {identifier(table.name)} ({columns})"
    return [created, *(index.sql() for index in wanted_indexes(table))]


CREATE_LEDGER = (
    f"CREATE TABLE {LEDGER} (epoch uuid PRIMARY KEY, flush bigint NOT NULL,"
    " updated_at timestamp with time zone NOT NULL DEFAULT now())"
)


def missing_sql(schema: Schema, catalog: Mapping[str, ExistingTable]) -> list[str]:
    """Return the statements that create the tables and indexes which a database lacks."""
    statements = [] if LEDGER in catalog else [CREATE_LEDGER]
    for table in schema.tables.values():
        existing = catalog.get(table.name)
        if existing is None:
            statements += create_table(table)
        else:
            statements += [index.sql() for index in missing_indexes(table, existing)]
    return statements


def missing_column(place: str, alter: str, column: Column, existing: ExistingTable) -> Difference:
    name = identifier(column.name)
    add = f"ADD COLUMN {name} {SQL_TYPES[column.type].name}"
    later = ""
    if column.required and existing.empty:
        add += " NOT NULL"
    elif column.required:  # the rows that are there have no value; the server refuses events without one
        later = f"{alter} ALTER COLUMN {name} SET NOT NULL"
    reason = f'{place} has no column "{column.name}"'
    if existing.kind == "view":
        return Difference(reason, "")
    return Difference(reason, f"{alter} {add}", add if existing.kind == "table" else "", later)


def column_differences(
    place: str, alter: str, column: Column, existing: ExistingTable
) -> Iterator[Difference]:
    name = identifier(column.name)
    wanted = SQL_TYPES[column.type]
    found = existing.columns.get(column.name)
    if found is None:
        yield missing_column(place, alter, column, existing)
        return
    if found.generated:
        action = "SET GENERATED BY DEFAULT" if found.generated == "identity" else "DROP EXPRESSION"
        yield Difference(
            f'{place}, column "{column.name}": PostgreSQL generates it, so it takes no values',
            f"{alter} ALTER COLUMN {name} {action}",
        )
    if found.type not in wanted.accepts:
        # A default may not fit the new type. It is of no use: a missing value is stored as NULL.
        default = f"ALTER COLUMN {name} DROP DEFAULT, " if found.has_default and not found.generated else ""
        yield Difference(
            f'{place}, column "{column.name}": the type is {found.type}, expected {wanted.name}',
            f"{alter} {default}ALTER COLUMN {name} TYPE {wanted.name} USING {name}::text::{wanted.name}",
        )


# pg_class.relkind, as the words that ALTER takes too.
KINDS: Mapping[str, str] = {
    "r": "table",
    "p": "table",
    "v": "view",
    "v-": "view without an INSTEAD OF INSERT trigger",
    "f": "foreign table",
    "m": "materialized view",
    "S": "sequence",
    "i": "index",
    "I": "index",
    "c": "type",
}


def table_differences(table: Table, existing: ExistingTable, user: str) -> Iterator[Difference]:
    place = f'table "{table.name}"'
    name = identifier(table.name)
    if existing.kind == KINDS["v-"]:  # INSERT may work, but COPY does not
        yield Difference(f"{place} is a {existing.kind}", "")
        return
    if existing.kind not in ("table", "view", "foreign table"):
        rename = f"ALTER {existing.kind.upper()} {name} RENAME TO {identifier(table.name[:-4] + '_old')}"
        yield Difference(f"{place}: the name belongs to a {existing.kind}", rename)
        return
    unique = any(column.unique for column in table.columns)
    if unique and not existing.can_index:
        yield Difference(f"{place}: a {existing.kind} cannot have unique columns", "")
    if not existing.can_insert or (unique and not existing.can_select):  # ON CONFLICT reads as well
        grant = f"GRANT SELECT, INSERT ON {name} TO {identifier(user)}"
        yield Difference(f"{place}: no permission to {'select' if existing.can_insert else 'insert'}", grant)
    if existing.row_security and not unique:  # COPY cannot do it, INSERT can
        reason = f'{place}: row-level security applies to user "{user}"'
        yield Difference(reason, f"ALTER ROLE {identifier(user)} BYPASSRLS")
    alter = f"ALTER TABLE {name}"
    for column in table.columns:
        yield from column_differences(place, alter, column, existing)
    required = {column.name for column in table.columns if column.required}
    for column_name, found in existing.columns.items():
        if found.not_null and not found.has_default and column_name not in required:
            reason = (
                f'{place}, column "{column_name}": NOT NULL without a default, not required in the schema'
            )
            drop = f"ALTER COLUMN {identifier(column_name)} DROP NOT NULL"
            if found.primary_key:
                drop_key = f"DROP CONSTRAINT {identifier(found.primary_key)}"
                yield Difference(reason, f"{alter} {drop_key}, {drop}")
            else:
                yield Difference(reason, f"{alter} {drop}", drop if existing.kind == "table" else "")


def ledger_differences(catalog: Mapping[str, ExistingTable], user: str) -> list[Difference]:
    ledger = catalog.get(LEDGER)
    if not ledger or (ledger.can_insert and ledger.can_select):
        return []
    grant = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {LEDGER} TO {identifier(user)}"
    return [Difference(f'table "{LEDGER}": no permission to use it', grant)]


def differences(schema: Schema, catalog: Mapping[str, ExistingTable], user: str) -> list[Difference]:
    """Return where existing tables do not fit, by the rules of the original and those of new features."""
    return [
        difference
        for table in schema.tables.values()
        if table.name in catalog
        for difference in table_differences(table, catalog[table.name], user)
    ] + ledger_differences(catalog, user)


def differences_text(found: Sequence[Difference], what: str, ways: str) -> str:
    """Return a message that lists differences and the SQL that mends them."""
    count = "a difference" if len(found) == 1 else f"{len(found)} differences"
    return "\n".join(
        [
            f"the database does not fit the schema file, {count}{what}:",
            *(f"  {difference.reason}" for difference in found),
            f"{ways} mend the tables with:",
            *(f"  {difference.sql};" for difference in found if difference.sql),
        ]
    )


@dataclass(frozen=True, slots=True)
class Step:
    """What --migrate does in one go: the statements of a transaction, or the build of an `index`.

    `table` is the one that they change, "" for new tables.
    """

    table: str
    reasons: tuple[str, ...] = field(compare=False)
    statements: tuple[str, ...]
    index: Index | None = None
    shown: tuple[str, ...] | None = field(default=None, compare=False)  # by --check, if in another way


@dataclass(frozen=True, slots=True)
class Plan:
    """What --migrate does about a database, what it leaves to the operator, and SQL for some day after it."""

    steps: tuple[Step, ...]
    by_hand: tuple[Difference, ...]
    later: tuple[str, ...]

    @property
    def reasons(self) -> list[str]:
        """Return everything that does not fit, a line each."""
        return [reason for step in self.steps for reason in step.reasons] + [
            difference.reason for difference in self.by_hand
        ]


def plan_new_tables(schema: Schema, catalog: Mapping[str, ExistingTable]) -> list[Step]:
    new = [table for table in schema.tables.values() if table.name not in catalog]
    names = [table.name for table in new]
    statements = [statement for table in new for statement in create_table(table)]
    if LEDGER not in catalog:
        names.append(LEDGER)
        statements.append(CREATE_LEDGER)
    reasons = tuple(f'there is no table "{name}"' for name in names)
    return [Step("", reasons, tuple(statements))] if statements else []


def plan_columns(table: str, found: Iterable[Difference]) -> list[Step]:
    changes = [difference for difference in found if difference.action]
    if not changes:
        return []
    alter = f"ALTER TABLE {identifier(table)} {', '.join(change.action for change in changes)}"
    return [Step(table, tuple(change.reason for change in changes), (alter,))]


def plan_invalid_indexes(table: Table, existing: ExistingTable) -> Iterator[Step]:
    """Return the steps that drop what interrupted builds of ours left behind: it only slows down inserts.

    An index of another kind or name is not ours to drop.
    """
    wanted = set(wanted_indexes(table))
    for invalid in existing.invalid:
        if invalid.index not in wanted or not invalid.index.may_have_name(invalid.name):
            continue
        place = f'table "{table.name}", index "{invalid.name}"'
        drop = f"DROP INDEX {invalid.qualified}"
        # What may be under construction is dropped only by who can look again with a lock.
        shown = () if invalid.busy else (f"DROP INDEX CONCURRENTLY {invalid.qualified}",)
        state = "was left behind by an interrupted build"
        if invalid.busy:
            state = "is not complete, and somebody builds it or vacuums the table: look again later"
        yield Step(table.name, (f"{place} {state}",), (drop,), shown=shown)


def plan_indexes(table: Table, existing: ExistingTable) -> tuple[list[Step], list[Difference]]:
    """Return the steps that build indexes, and what cannot be built without blocking inserts."""
    busy = {invalid.index for invalid in existing.invalid if invalid.busy}
    steps, by_hand = [], []
    for index in missing_indexes(table, existing):
        kind = "unique index" if index.unique else "index"
        reason = f'table "{table.name}", column "{index.column}": there is no {kind}'
        if not existing.partitioned:
            shown = () if index in busy else None
            steps.append(Step(table.name, (reason,), (index.sql("CONCURRENTLY"),), index, shown))
        elif existing.empty:
            steps.append(Step(table.name, (reason,), (index.sql(),)))
        else:  # PostgreSQL has no CONCURRENTLY here
            reason += "; building it on a partitioned table blocks inserts"
            by_hand.append(Difference(reason, index.sql()))
    return steps, by_hand


def plan_migration(schema: Schema, catalog: Mapping[str, ExistingTable], user: str) -> Plan:
    """Return what is to be done about a database, quick things first."""
    columns: list[Step] = []
    invalid: list[Step] = []
    indexes: list[Step] = []
    by_hand: list[Difference] = []
    later: list[str] = []
    for table in schema.tables.values():
        existing = catalog.get(table.name)
        if not existing:
            continue
        found = list(table_differences(table, existing, user))
        columns += plan_columns(table.name, found)
        by_hand += [difference for difference in found if not difference.action]
        later += [difference.later for difference in found if difference.later]
        invalid += plan_invalid_indexes(table, existing)
        built, blocking = plan_indexes(table, existing)
        indexes += built
        by_hand += blocking
    by_hand += ledger_differences(catalog, user)
    steps = [*plan_new_tables(schema, catalog), *columns, *invalid, *indexes]
    return Plan(tuple(steps), tuple(by_hand), tuple(later))


def comment(text: str) -> str:
    """Return a text as comments of SQL."""
    return "\n".join(f"-- {line}".rstrip() for line in text.splitlines())


def script(plan: Plan) -> str:
    """Return what a plan says, for people and for psql alike.

    What --migrate would not run by itself psql does not run either: it stands in comments.
    """
    lines = [comment(f"  {reason}") for reason in plan.reasons]
    statements = [
        statement
        for step in plan.steps
        for statement in (step.statements if step.shown is None else step.shown)
    ]
    if statements:
        lines += [comment("What --migrate would run (it also waits for others, and lets nobody wait):")]
        lines += [f"{statement};" for statement in statements]
    by_hand = [difference.sql for difference in plan.by_hand if difference.sql]
    if by_hand:
        lines += [
            comment("What --migrate leaves to you, because it blocks, rewrites, drops or grants something:")
        ]
        lines += [comment(f"  {statement};") for statement in by_hand]
    if plan.later:
        lines += [comment("Some day, when the rows that are there now have values in them:")]
        lines += [comment(f"  {statement};") for statement in plan.later]
    return "\n".join(lines)


def empty_tables_matter(schema: Schema, catalog: Mapping[str, ExistingTable]) -> list[str]:
    """Return the tables for which the plan depends on whether they have rows."""
    return [
        table.name
        for table in schema.tables.values()
        if (existing := catalog.get(table.name)) and existing.kind == "table" and existing.can_select
        if (existing.partitioned and missing_indexes(table, existing))
        or any(column.required and column.name not in existing.columns for column in table.columns)
    ]


def is_empty_sql(table: str) -> str:
    """Return a query whether a table has no rows."""
    return f"SELECT NOT EXISTS (SELECT FROM {identifier(table)})"


def free_name_sql(index: Index) -> str:
    """Return a query for the name that PostgreSQL would choose for an index."""
    names = ",".join(quote(index.name(number)) for number in range(INDEX_NAMES_MAX))
    return (
        f"SELECT w.name FROM unnest(ARRAY[{names}]::text[]) WITH ORDINALITY AS w(name, number)"
        f" JOIN pg_class t ON t.oid = to_regclass({quote(identifier(index.table))}) WHERE NOT EXISTS"
        " (SELECT FROM pg_class c WHERE c.relname = w.name AND c.relnamespace = t.relnamespace)"
        " ORDER BY w.number LIMIT 1"
    )


def catalog_sql(tables: Iterable[str]) -> str:
    """Return a query for tables, their columns and their indexes; read_catalog understands its rows."""
    names = ",".join(quote(name) for name in tables)
    wanted = f"FROM unnest(ARRAY[{names}]::text[]) AS wanted(name)"
    found = "to_regclass(quote_ident(wanted.name))"
    return f"""
    SELECT 'table', wanted.name, has_table_privilege(c.oid, 'INSERT') AND (wanted.name <> {quote(LEDGER)}
        OR has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE')),
        has_table_privilege(c.oid, 'SELECT'),
        CASE WHEN row_security_active(c.oid) THEN 'yes' ELSE '' END, NULL,
        c.relkind::text || CASE WHEN c.relkind = 'v' AND NOT EXISTS (SELECT FROM pg_trigger t
        WHERE t.tgrelid = c.oid AND t.tgtype & 64 <> 0) THEN '-' ELSE '' END, NULL
    {wanted} JOIN pg_class c ON c.oid = {found}
    UNION ALL
    SELECT 'column', wanted.name, a.attnotnull, a.atthasdef OR a.attidentity <> '',
        CASE WHEN a.attgenerated <> '' THEN 'stored' WHEN a.attidentity = 'a' THEN 'identity' ELSE '' END,
        a.attname::text, t.typname::text, coalesce((SELECT k.conname::text FROM pg_constraint k
        WHERE k.conrelid = a.attrelid AND k.contype = 'p' AND a.attnum = ANY (k.conkey)), '')
    {wanted} JOIN pg_attribute a ON a.attrelid = {found} JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'index', wanted.name, i.indisunique AND i.indimmediate AND i.indpred IS NULL AND i.indnkeyatts = 1,
        NULL, NULL, a.attname::text, NULL, NULL
    {wanted} JOIN pg_index i ON i.indrelid = {found}
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] WHERE i.indisvalid
    UNION ALL
    SELECT 'invalid', wanted.name, i.indisunique, EXISTS (SELECT FROM pg_locks l WHERE l.relation = i.indrelid
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()),
        quote_ident(n.nspname) || '.' || quote_ident(c.relname), a.attname::text, m.amname::text,
        c.relname::text
    {wanted} JOIN pg_index i ON i.indrelid = {found}
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    JOIN pg_class c ON c.oid = i.indexrelid AND c.relkind = 'i'
    JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am m ON m.oid = c.relam
    WHERE NOT i.indisvalid AND i.indnatts = 1 AND i.indpred IS NULL"""


def read_catalog(rows: Iterable[Sequence[Any]]) -> dict[str, ExistingTable]:
    """Return the tables that the rows of catalog_sql describe."""
    tables: dict[str, ExistingTable] = {}
    columns: dict[str, dict[str, ExistingColumn]] = {}
    indexed: dict[str, set[str]] = {}
    unique: dict[str, set[str]] = {}
    invalid: dict[str, list[InvalidIndex]] = {}
    for what, table, first, second, third, name, kind, last in rows:
        if what == "table":
            tables[table] = ExistingTable(
                {},
                kind=KINDS.get(kind, "table"),
                can_insert=first,
                can_select=second,
                row_security=bool(third),
                partitioned=kind == "p",
            )
        elif what == "column":
            columns.setdefault(table, {})[name] = ExistingColumn(kind, first, second, third, last)
        elif what == "invalid":
            found = InvalidIndex(Index(table, name, first, kind), last, third, second)
            invalid.setdefault(table, []).append(found)
        else:
            (unique if first else indexed).setdefault(table, set()).add(name)
    return {
        name: replace(
            table,
            columns=columns.get(name, {}),
            indexed=frozenset(indexed.get(name, set()) | unique.get(name, set())),
            unique=frozenset(unique.get(name, set())),
            invalid=tuple(invalid.get(name, ())),
        )
        for name, table in tables.items()
    }


LEDGER_MOVED = "rows raised in the ledger for"


@dataclass(frozen=True, slots=True)
class Message:
    """A simple-protocol message, and the data of its COPY statements in their order.

    `inserts` has the tables of its INSERT statements, also in their order; `ahead` how the next message will
    probably begin: the database works on that while we do not have the rest yet.
    """

    sql: str
    copies: Sequence[bytes] = ()
    inserts: Sequence[str] = ()
    ahead: str = ""


@lru_cache(TABLES_REMEMBERED)
def insert_sql(table: TableIntake) -> tuple[str, str]:
    """Return what stands before and after the rows of an INSERT, or a COPY statement and ""."""
    columns = ",".join(identifier(column.name) for column in table.columns)
    into = f"{identifier(table.name)} ({columns})"
    if table.format is COPY_ROWS:
        return f"COPY {into} FROM STDIN", ""
    unique = [column.name for column in table.columns if column.unique]
    # With one unique column only its conflicts are skipped; a conflict with another constraint of the
    # operator's stays an error. SQL has no way to name two.
    target = f" ({identifier(unique[0])})" if len(unique) == 1 else ""
    return f"INSERT INTO {into} VALUES ", f" ON CONFLICT{target} DO NOTHING"


# Notices of triggers would fill the connection while we fill it with rows. The keep-alive ends a
# transaction whose client the network has lost, and with it its lock on the ledger.
def settings(statement_timeout: int, scope: str) -> str:
    """Return statements that make our settings for a transaction (LOCAL) or a SESSION."""
    values = {
        "lock_timeout": str(LOCK_TIMEOUT_MS),
        "statement_timeout": f"'{statement_timeout}s'",
        "client_min_messages": "error",
        "tcp_keepalives_idle": str(KEEPALIVE_IDLE_S),
        "tcp_keepalives_interval": str(KEEPALIVE_INTERVAL_S),
        "tcp_keepalives_count": str(KEEPALIVE_COUNT),
    }
    # (SET takes a tenth of the time that a SELECT of set_config() does.)
    return "".join(f"SET {scope} {name} = {value};\n" for name, value in values.items())


# The settings are the transaction's own where a pooler shares the session: nothing is left behind in it.
FLUSH_START = "BEGIN;\n" + settings(STATEMENT_TIMEOUT_S, "LOCAL")
PATIENT_FLUSH_START = "BEGIN;\n" + settings(LONG_STATEMENT_TIMEOUT_S, "LOCAL")


# A server that is set to forget commits when it crashes does not forget ours; a stronger setting stays.
DURABLY = (
    "set_config('synchronous_commit', CASE current_setting('synchronous_commit')"
    " WHEN 'off' THEN 'local' ELSE current_setting('synchronous_commit') END, true)"
)


def raise_sql(epoch: str, start: str, end: str) -> str:
    """Return the statement that takes an epoch's row in the ledger a step, given as SQL.

    It fails unless the row stands where we think: a message that comes late, when its flush was given up
    here and replayed elsewhere, must fail and not just update no row. The reason names the epoch, which
    no client knows.
    """
    return (
        # A setting is made on the way: that costs less than another statement or column.
        f"WITH raised AS (UPDATE {LEDGER} SET flush = {end},"
        f" updated_at = CASE WHEN {DURABLY} IS NOT NULL THEN now() END"
        f" WHERE epoch = {epoch} AND flush = {start} RETURNING 1)"
        f" SELECT CASE count(*) WHEN 1 THEN 1"
        f" ELSE (count(*)::text || ' {LEDGER_MOVED} ' || {epoch}::text)::integer END FROM raised"
    )


PREPARED_RAISE = "attolytics_raise"

# A session that is ours alone is told once what a shared one is told in every flush. That, and planning
# the statement once, takes a quarter of the time off a flush of one row.
OWN_SESSION = (
    f"{settings(STATEMENT_TIMEOUT_S, 'SESSION')}"
    f"SET SESSION idle_in_transaction_session_timeout = '{AHEAD_S_MAX}s';\n"
    f"PREPARE {PREPARED_RAISE} (uuid, bigint, bigint) AS {raise_sql('$1', '$2', '$3')}"
)


@dataclass(frozen=True, slots=True)
class Raise:
    """A step of an epoch's row in the ledger: from the last flush that is stored to the one that will be."""

    epoch: str
    start: int
    end: int

    def sql(self) -> str:
        """Return the statement that takes the step."""
        return raise_sql(f"'{self.epoch}'::uuid", str(self.start), str(self.end)) + ";\n"

    def prepared_sql(self) -> str:
        """Return the statement that takes the step in a session prepared by OWN_SESSION."""
        return f"EXECUTE {PREPARED_RAISE} ('{self.epoch}', {self.start}, {self.end});\n"

    def next(self) -> Raise:
        """Return the step to the flush after this one."""
        return Raise(self.epoch, self.end, self.end + 1)


def enlist_sql(epochs: Iterable[str]) -> str:
    """Return the transaction that gives epochs their rows in the ledger."""
    rows = ",".join(f"('{epoch}', 0)" for epoch in epochs)
    insert = f"INSERT INTO {LEDGER} (epoch, flush) VALUES {rows} ON CONFLICT DO NOTHING"
    return f"{FLUSH_START}SELECT {DURABLY};\n{insert};\nCOMMIT"


def read_ledger_sql(epochs: Iterable[str]) -> str:
    """Return a query for epochs and their last flush. It waits for transactions that still run."""
    listed = ",".join(f"'{epoch}'" for epoch in epochs)
    return f"SELECT epoch::text, flush FROM {LEDGER} WHERE epoch IN ({listed}) FOR UPDATE"


def finish_epochs_sql(epochs: Iterable[str]) -> str:
    """Return statements that delete the rows of finished epochs, and bring the epochs that still have one.

    A row that a transaction still holds is left for another time.
    """
    listed = ",".join(f"'{epoch}'" for epoch in epochs)
    mine = f"FROM {LEDGER} WHERE epoch IN ({listed})"
    return (
        f"DELETE FROM {LEDGER} WHERE epoch IN (SELECT epoch {mine} FOR UPDATE SKIP LOCKED);\n"
        f"SELECT epoch::text {mine}"
    )


def touch_sql(schema: Schema) -> str:
    """Return statements that get the locks of an insert into each table, and do nothing."""
    return ";".join(f"EXPLAIN INSERT INTO {identifier(name)} DEFAULT VALUES" for name in schema.tables)


def insert_message(
    start: str, texts: Iterable[tuple[TableIntake, str]], end: str, ahead: str = ""
) -> Message:
    """Return the message that stores rows between two statements; a text has one or more of a table.

    Each table says itself which columns its rows have: while a schema is replaced, rows of both may meet.
    """
    by_table: dict[TableIntake, list[str]] = {}
    for table, text in texts:
        by_table.setdefault(table, []).append(text)
    sql, copies, inserts = start, [], []
    # Always in the same order of tables, so that instances do not lock each other out.
    for table, rows in sorted(by_table.items(), key=lambda item: item[0].name):
        before_rows, after_rows = insert_sql(table)
        if table.format is COPY_ROWS:
            sql += f"{before_rows};\n"
            copies.append("".join(rows).encode())
        else:
            sql += f"{before_rows}{','.join(rows)}{after_rows};\n"
            inserts.append(table.name)
    return Message(sql + end, copies, inserts, ahead)


def flush_message(start: str, parts: Iterable[Mapping[TableIntake, str]], ahead: str = "") -> Message:
    """Return the message that stores rows, as texts by table, in the transaction that `start` begins."""
    return insert_message(start, (text for texts in parts for text in texts.items()), "COMMIT", ahead)


def attempt_message(rows: Iterable[tuple[TableIntake, str]]) -> Message:
    """Return a message that stores rows in the open transaction, deferred constraints checked.

    After an error, UNDO_ATTEMPT takes back what it did.
    """
    end = "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED; RELEASE SAVEPOINT attempt"
    return insert_message("SAVEPOINT attempt;\n", rows, end)


UNDO_ATTEMPT = "ROLLBACK TO SAVEPOINT attempt"


# Where a message may go on that was begun ahead. Without the savepoint, which needs a transaction that is
# open and has not failed, its rows could be stored when nothing of the beginning was.
AHEAD_END = "SAVEPOINT begun"
AHEAD_REST = "RELEASE begun;\n"


def sql_after(ahead: str, sql: str) -> str:
    """Return what of a message's SQL is to be sent when its beginning, or another one, was sent ahead."""
    if sql.startswith(ahead):
        return AHEAD_REST + sql[len(ahead) :]
    return sql if sql == "ROLLBACK" else f"ROLLBACK;\n{sql}"


# --- Database URL -------------------------------------------------------------
# libpq's connection URIs, environment variables and password file. Pure: texts and
# mappings in, Target out (PostgreSQL manual, 34.1.1.2, 34.15 and 34.16).

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

# Parameters of a URL, and the environment variables that stand in for them.
PARAMETERS: Mapping[str, str] = {
    "host": "PGHOST",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "application_name": "PGAPPNAME",
    "options": "PGOPTIONS",
}
DATABASE_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<host>\[[^\]]*\]|[^:/?\[\]@]*)(?::(?P<port>[^/?]*))?(?:/(?P<dbname>[^?]*))?(?:\?(?P<query>.*))?"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Which database to connect to, and how."""

    user: str
    dbname: str
    host: str | None  # None for a socket
    port: int
    socket: str | None  # full path, /dir/.s.PGSQL.5432
    password: str | None = field(default=None, repr=False)
    sslmode: str = "prefer"
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    connect_timeout: float = CONNECT_TIMEOUT_S
    application_name: str = "attolytics"
    options: str | None = None

    def __str__(self) -> str:
        """Return the target as it may stand in a log: without the password."""
        host = f"[{self.host}]" if ":" in str(self.host) else self.host
        return f'database "{self.dbname}" at {self.socket or f"{host}:{self.port}"} as user "{self.user}"'


def percent_decode(text: str, what: str) -> str:
    """Return a part of a URL decoded. As in libpq `+` is no space, and %00 is refused."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise OperatorError(
            f"database URL: {what} has a percent sign without two hex digits; write it as %25"
        )
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise OperatorError(f"database URL: {what} is not UTF-8 after decoding") from None
    if "\0" in decoded:
        raise OperatorError(f"database URL: {what} contains %00")
    return decoded


def split_url(url: str) -> dict[str, str]:
    """Return the parameters in a URL. Raises OperatorError; no message has the password."""
    if LONE_SURROGATE.search(url):  # how Python shows arguments that are not UTF-8
        raise OperatorError("database URL: not UTF-8")
    match = DATABASE_URL.fullmatch(url)
    if not match:
        raise OperatorError(
            "database URL: expected postgres://user:password@host:port/database;"
            " write special characters percent-encoded, for example @ as %40 and / as %2F"
        )
    parts = {k: v for k, v in match.groupdict().items() if v and k != "query"}
    if "host" in parts:
        parts["host"] = parts["host"].removeprefix("[").removesuffix("]")
    parameters = {key: percent_decode(value, f"the {key}") for key, value in parts.items()}
    for pair in filter(None, (match["query"] or "").split("&")):
        key, equals, value = pair.partition("=")
        key = percent_decode(key, "a parameter's name")
        if (key, value) == ("ssl", "true"):  # as in JDBC's URLs, which libpq takes too
            key, value = "sslmode", "require"
        if key not in PARAMETERS or not equals:
            hint = suggestion(key, PARAMETERS) or f"; the parameters are {', '.join(PARAMETERS)}"
            raise OperatorError(f'database URL: unknown parameter "{key}"{hint}')
        parameters[key] = percent_decode(value, f"the parameter {key}")
    return parameters


def parse_number(text: str, what: str, low: int, high: int) -> int:
    """Return a whole number. Raises OperatorError for anything else or outside low..high."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise OperatorError(f"database URL: {what} must be a number from {low} to {high}, got {show(text)}")
    return int(text)


def parse_connect_timeout(text: str) -> float:
    """Return the seconds of a connect_timeout; what libpq reads as "for ever" is our default."""
    seconds = parse_number(text, "connect_timeout", -1, 3600)
    return seconds if seconds > 0 else CONNECT_TIMEOUT_S


def parse_target(
    url: str, environ: Mapping[str, str], os_user: str, socket_dir: str, home: Path
) -> tuple[Target, Path]:
    """Return the target of a database URL and the password file to look into if it has no password.

    `socket_dir` is where a local PostgreSQL has its socket, "" for none. Raises OperatorError.
    """
    given = {key: environ[name] for key, name in PARAMETERS.items() if environ.get(name)}
    given |= {key: value for key, value in split_url(url).items() if value}
    host = given.get("host", socket_dir or "localhost")
    if "," in host:
        raise OperatorError("database URL: several hosts are not supported; name one")
    port = parse_number(given.get("port", "5432"), "port", 1, 65535)
    local = host.startswith("/")
    user = given.get("user", os_user)
    # As in libpq: the system's authorities vouch for anybody, so the name must be checked as well.
    system = given.get("sslrootcert") == "system"
    if system and given.get("sslmode", "verify-full") != "verify-full":
        raise OperatorError("database URL: sslrootcert=system needs sslmode=verify-full")
    target = Target(
        user=user,
        dbname=given.get("dbname", user),
        host=None if local else host,
        port=port,
        socket=f"{host.rstrip('/')}/.s.PGSQL.{port}" if local else None,
        password=given.get("password"),
        sslmode=given.get("sslmode", "verify-full" if system else "prefer"),
        sslrootcert=given.get("sslrootcert"),
        sslcert=given.get("sslcert"),
        sslkey=given.get("sslkey"),
        connect_timeout=parse_connect_timeout(given.get("connect_timeout", "0")),
        application_name=given.get("application_name", "attolytics"),
        options=given.get("options"),
    )
    if target.sslmode not in SSL_MODES:
        hint = suggestion(target.sslmode, SSL_MODES) or f"; the modes are {', '.join(SSL_MODES)}"
        raise OperatorError(f'database URL: unknown sslmode "{target.sslmode}"{hint}')
    return target, Path(given.get("passfile", home / ".pgpass"))


PASSFILE_LINE = re.compile(r"(?!#)" + r"((?:\\.|[^:\\])*):" * 4 + r"(?P<password>.*)")


def unescape(text: str) -> str:
    """Return a field of .pgpass without its backslashes."""
    return re.sub(r"\\(.)", r"\1", text)


def find_password(passfile: str, target: Target, socket_dir: str) -> str | None:
    """Return the password that the text of a .pgpass file has for a target.

    For a socket in the default directory the file says `localhost` (PostgreSQL manual, 34.16).
    """
    directory = target.socket.rpartition("/")[0] if target.socket else ""
    host = target.host or ("localhost" if directory in (socket_dir, "") else directory)
    wanted = (host, str(target.port), target.dbname, target.user)
    for line in passfile.splitlines():
        match = PASSFILE_LINE.fullmatch(line)
        if match and all(
            pattern == "*" or unescape(pattern) == value
            for pattern, value in zip(match.groups(), wanted, strict=False)
        ):
            return unescape(match["password"])
    return None


# --- Metrics ------------------------------------------------------------------
# What is counted, and Prometheus' text format. Pure. Labels have only values that
# the schema file or we ourselves give, so that no client can make more of them.

# The classes of refusals, by what a client did wrong; subclasses inherit.
REASONS: Mapping[type[RequestError], str] = {
    MalformedRequest: "malformed_request",
    InvalidBody: "invalid_body",
    InvalidEvents: "invalid_events",
    WrongKey: "wrong_key",
    OriginRefused: "origin",
    UnknownPath: "unknown_path",
    TableRefused: "unknown_table",
    MethodRefused: "method",
    RequestTooSlow: "too_slow",
    LengthMissing: "length_missing",
    BodyTooLarge: "too_large",
    TargetTooLong: "target_too_long",
    MediaRefused: "media",
    HeadersTooLarge: "headers_too_large",
    NotImplementedHere: "not_implemented",
    StorageAway: "storage_away",
    TooManyConnections: "too_many_connections",
}

# Shown before they are answered first: Prometheus sees no increase from nothing to 1.
ALERTING_STATUSES = ("400", "403", "404", "503")

# Upper bounds of the histograms' buckets. A commit takes about 1 ms, a batch waits at most for PATIENCE_S.
SECONDS_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
EVENTS_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def number_text(value: float) -> str:
    """Return a number as the text format has it."""
    if math.isinf(value):
        return "+Inf"
    return repr(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True, slots=True)
class Sample:
    """A number with its labels; `suffix` is added to the family's name."""

    labels: Mapping[str, str]
    value: float
    suffix: str = ""


class Histogram:
    """How often values were observed up to each bound. One thread at a time may observe()."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        """Return how many values were observed."""
        return sum(self._counts)

    def __add__(self, other: Histogram) -> Histogram:
        total = Histogram(self._bounds)
        total._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        total._sum = self._sum + other._sum
        return total

    def samples(self, **labels: str) -> list[Sample]:
        """Return the samples of the text format: cumulative buckets, the sum and the count."""
        totals = list(itertools.accumulate(self._counts))
        bounds = [*map(number_text, self._bounds), "+Inf"]
        buckets = [
            Sample({**labels, "le": bound}, total, "_bucket")
            for bound, total in zip(bounds, totals, strict=True)
        ]
        return [*buckets, Sample(labels, self._sum, "_sum"), Sample(labels, totals[-1], "_count")]


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name. `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    help: str
    samples: Sequence[Sample]


def one_sample(name: str, kind: str, help_: str, value: float, **labels: str) -> Family:
    """Return a family that has a single sample."""
    return Family(name, kind, help_, [Sample(labels, value)])


def labelled(counts: Mapping[tuple[str, ...], int], *names: str) -> list[Sample]:
    """Return the samples of a counter by the values of its labels."""
    # A copy, because other threads count on.
    return [Sample(dict(zip(names, key, strict=True)), n) for key, n in sorted(dict(counts).items())]


def label_text(value: str) -> str:
    """Return a label's value, escaped."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def exposition(families: Iterable[Family]) -> str:
    """Return families in Prometheus' text format, version 0.0.4."""
    lines = []
    for family in families:
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for sample in family.samples:
            labels = ",".join(f'{name}="{label_text(value)}"' for name, value in sample.labels.items())
            lines.append(
                f"{family.name}{sample.suffix}{f'{{{labels}}}' if labels else ''} {number_text(sample.value)}"
            )
    return "\n".join(lines) + "\n"


class Metrics:
    """What the writer and the HTTP threads count."""

    def __init__(self, schema: Schema) -> None:
        # The writer's thread alone changes these, so they need no lock. It gives every answer of 200.
        # By app and table; a plain dictionary, because a Counter takes twice as long.
        self.accepted: dict[tuple[str, ...], int] = {}
        self.duplicates: Counter[tuple[str, ...]] = Counter()  # by table
        self.spooled = self.replayed = self.quarantined = 0
        self.sessions = 0
        self.accepted_seconds = Histogram(SECONDS_BOUNDS)
        self.flush_events = Histogram(EVENTS_BOUNDS)
        self.database_seconds = Histogram(SECONDS_BOUNDS)
        self.spool_seconds = Histogram(SECONDS_BOUNDS)
        # Guards all below, which is about the other answers.
        self._lock = threading.Lock()
        self._refused: Counter[tuple[str, ...]] = Counter()  # by app and reason
        self._statuses: Counter[tuple[str, ...]] = Counter({(status,): 0 for status in ALERTING_STATUSES})
        self._other_seconds = Histogram(SECONDS_BOUNDS)
        self.declare(schema)

    def declare(self, schema: Schema) -> None:
        """Let the counters of a schema's apps and tables start with 0. Before the writer uses the schema."""
        for app in schema.apps.values():
            for table in app.tables:
                self.accepted.setdefault((app.id, table.name), 0)
        unique = [table.name for table in schema.tables.values() if any(c.unique for c in table.columns)]
        self.duplicates.update({(name,): 0 for name in unique})

    def refuse(self, error: RequestError, app_id: str = "", events: int = 1) -> None:
        """Count events that are refused; `app_id` is an app of the schema or "", never a client's text."""
        if isinstance(error, InvalidEvents):
            events = error.count
        reason = next(REASONS[kind] for kind in type(error).__mro__ if kind in REASONS)
        with self._lock:
            self._refused[app_id, reason] += events

    def answer(self, status: int, seconds: float | None) -> None:
        """Count an answer other than 200; `seconds` is None for a client that was turned away unheard."""
        with self._lock:
            self._statuses[(str(int(status)),)] += 1
            if seconds is not None:
                self._other_seconds.observe(seconds)

    def families(self) -> list[Family]:
        """Return what has been counted."""
        with self._lock:
            refused, statuses = self._refused.copy(), self._statuses.copy()
            seconds = self._other_seconds + self.accepted_seconds
        statuses[("200",)] = self.accepted_seconds.count
        flushes = [
            *self.database_seconds.samples(store="database"),
            *self.spool_seconds.samples(store="spool"),
        ]
        return [
            Family(
                "attolytics_events_accepted_total",
                "counter",
                "Events answered with 200: stored in the database or the spool.",
                labelled(self.accepted, "app", "table"),
            ),
            Family(
                "attolytics_events_refused_total",
                "counter",
                "Events answered with another status than 200; 1 for a request refused before its events"
                " were counted. The app is empty if the request named none of the schema file.",
                labelled(refused, "app", "reason"),
            ),
            one_sample(
                "attolytics_events_spooled_total",
                "counter",
                "Events stored in the spool, those that --retry_quarantine moved there included.",
                self.spooled,
            ),
            one_sample(
                "attolytics_events_replayed_total",
                "counter",
                "Events that left the spool because they are in the database.",
                self.replayed,
            ),
            one_sample(
                "attolytics_events_quarantined_total",
                "counter",
                "Events that went to the quarantine, from requests and from the spool.",
                self.quarantined,
            ),
            Family(
                "attolytics_events_duplicate_total",
                "counter",
                "Accepted events that were not inserted, because a unique column had their value already.",
                labelled(self.duplicates, "table"),
            ),
            Family(
                "attolytics_http_requests_total",
                "counter",
                "Requests answered, and clients turned away, by HTTP status.",
                labelled(statuses, "status"),
            ),
            one_sample(
                "attolytics_database_reconnects_total",
                "counter",
                "Sessions with the database after the first one.",
                max(self.sessions - 1, 0),
            ),
            Family(
                "attolytics_http_request_duration_seconds",
                "histogram",
                "Time from the first bytes of a request to its answer.",
                seconds.samples(),
            ),
            Family(
                "attolytics_flush_duration_seconds",
                "histogram",
                "Time that a transaction with new events took, by where it stored them.",
                flushes,
            ),
            Family(
                "attolytics_flush_events",
                "histogram",
                "New events in a transaction.",
                self.flush_events.samples(),
            ),
        ]


# --- Database -----------------------------------------------------------------
# One pg8000 connection, owned by one thread at a time, and the translation of
# SQLSTATEs to our errors. Everything here blocks, at most for the time-outs above.

# What an SQLSTATE means for a flush, by its beginning (PostgreSQL manual, appendix A): the database is
# away or busy; nothing was stored, try again; the operator must mend something. Everything else is about
# the data: values, constraints, and what triggers raise, codes of their own included.
AWAY_STATES = ("08", "25006", "53", "55P03", "57014", "57P")
CONFLICT_STATES = ("40",)
OPERATOR_STATES = ("0A", "0L", "0P", "25", "26", "28", "3D", "3F", "42", "55", "57", "58", "F0", "HV", "XX")

# A table is in use: a lock that was not to be had in time, or a deadlock.
BUSY_STATES = ("55P03", "57014", "40P01")

UNPREPARED_STATE = "26000"  # A prepared statement is not there.

ADVISORY_LOCK = 7_039_262_163_317  # Any number; held while tables are created.
BUILD_LOCK = ADVISORY_LOCK + 1  # Held by the session that builds indexes.
# Two sessions that create one table at once can fail with 23505, IF NOT EXISTS or not. A lock on a table
# that cannot be had soon is not waited for: other instances could not insert behind us.
BEGIN_PREPARING = (
    "BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0;"
    f" SELECT pg_advisory_xact_lock({ADVISORY_LOCK}); SET LOCAL lock_timeout = {PREPARE_LOCK_TIMEOUT_MS}"
)


def is_partition_missing(fields: Mapping[str, str]) -> bool:
    """Return whether a table has no partition for a row.

    That has the code of a violated CHECK, but no constraint; nor has what a trigger raises with this code,
    which has no table either (PostgreSQL manual, 55.8).
    """
    return fields.get("C") == "23514" and "n" not in fields and "t" in fields


def server_error(fields: Mapping[str, str]) -> DatabaseError:
    """Return our error for the fields of an ErrorResponse (PostgreSQL manual, 55.8)."""
    sqlstate = fields.get("C", "")
    kind: type[DatabaseError] = DataRefused
    if sqlstate.startswith(AWAY_STATES):
        kind = DatabaseAway
    elif sqlstate.startswith(CONFLICT_STATES):
        kind = DatabaseConflict
    elif sqlstate.startswith(OPERATOR_STATES) or is_partition_missing(fields):
        kind = DatabaseMisconfigured
    message = " ".join(fields.get("M", "unknown error").split())
    return kind(message, sqlstate, fields.get("c"), fields.get("D", ""))


def frame(kind: bytes, data: bytes) -> bytes:
    """Return a message of the protocol (PostgreSQL manual, 55.7)."""
    return kind + (len(data) + 4).to_bytes(4) + data


def limit_wait(sock: socket.socket, option: int, seconds: float) -> None:
    """Bound how long the kernel waits in recv (SO_RCVTIMEO) or send (SO_SNDTIMEO), as socket(7) says.

    Half the system calls of settimeout(), with which Python polls before each recv and send; past the
    time they raise BlockingIOError.
    """
    # At least a microsecond: zero would mean for ever.
    whole, fraction = divmod(max(seconds, 1e-6), 1)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(fraction * 1e6)))


class PgConnection(pg8000.native.Connection):  # type: ignore[misc]  # pg8000 has no type hints
    """A pg8000 connection that remembers the last error the server sent, and how many rows it inserted.

    pg8000 loses the text of a FATAL error, because the connection ends right after it; of the numbers of
    rows it only keeps their sum. The beginning of a message may be sent ahead of the rest.
    """

    last_error: Mapping[str, str] | None = None
    inserted: list[int]  # by each INSERT of the last message
    _tag = b""  # of the last statement
    _unread = b""  # from the server
    _unsent = memoryview(b"")  # of the message that it works on
    ahead = ""  # the beginning of the next message, as far as it was sent along with the last one
    _context: Any = None  # what the message brings
    _awaited: Sequence[Any] = ()  # what each answer to come is for: what was ahead of it, and the message
    _waits_s = 0.0  # what limit_wait() was told last

    def send(self, message: Message) -> None:
        """Send a message and its COPY data in one go.

        The server takes the data when it comes to the COPY, and drops it if an error comes first
        (PostgreSQL manual, 55.2.6). pg8000 by itself needs three round trips for a COPY. Of a message that
        begins with what was sent ahead, the rest is sent; any other one takes that back.
        """
        sql, ahead = message.sql, self.ahead
        if ahead:
            sql = sql_after(ahead, sql)
        self._context = pg8000.core.Context(sql)
        self._awaited = [self._context]
        if ahead:  # Its errors are those of a message that goes on with it, and nobody's otherwise.
            goes_on = message.sql.startswith(ahead)
            self._awaited.insert(0, self._context if goes_on else pg8000.core.Context(ahead))
        parts = [frame(b"Q", sql.encode() + b"\0")]
        for data in message.copies:
            parts += [frame(b"d", data), frame(b"c", b"")]
        self.ahead = message.ahead
        if self.ahead:
            parts.append(frame(b"Q", f"{self.ahead}{AHEAD_END}".encode() + b"\0"))
        self.inserted = []
        self._tag = b""
        self._unsent = memoryview(b"".join(parts))
        self._send_some()

    def receive(self, seconds: float) -> bool:
        """Return whether the server has answered the whole message; wait at most `seconds` for that.

        pg8000's own reading cannot be interrupted and taken up again. Sends the rest of the message as the
        server takes it: it may read the rows of a table only after it has stored those of another.
        """
        deadline = time.monotonic() + seconds
        while not self._handle_unread():
            left = deadline - time.monotonic()
            if not (self._send_and_read(left) if self._unsent or self._is_encrypted else self._read(left)):
                return False
        return True

    def result(self) -> list[list[Any]]:
        """Return the rows that the answered message brought; raise the error it ended with."""
        if self._context.error:
            raise self._context.error
        return self._context.rows or []

    def is_rolled_back(self) -> bool:
        """Return whether the answered message ends in a COMMIT that the server took for a ROLLBACK.

        It does so in a transaction that has failed, and only the tag tells.
        """
        return self._context.statement.endswith("COMMIT") and self._tag != b"COMMIT"

    def limit_sending(self, seconds: float) -> None:
        """Bound the time that the server may take no data."""
        if self._is_encrypted:
            self._usock.settimeout(seconds)
        else:
            self._usock.settimeout(None)
            limit_wait(self._usock, socket.SO_SNDTIMEO, seconds)

    def is_readable(self) -> bool:
        """Return whether the server says something, or has closed the connection. Does not block."""
        return bool(self._poll(select.POLLIN, 0))

    @property
    def _is_encrypted(self) -> bool:
        return isinstance(self._usock, ssl.SSLSocket)

    def _send_and_read(self, seconds: float) -> bool:
        """Send or read what can be; return False if there is nothing for so long."""
        ready = self._poll(select.POLLIN | (select.POLLOUT if self._unsent else 0), seconds)
        if ready & select.POLLOUT:
            self._send_some()
        if ready & ~select.POLLOUT:
            self._take_in(self._usock.recv(RECEIVE_BYTES))
        return bool(ready)

    def _read(self, seconds: float) -> bool:
        """Read what comes; return False if there is nothing for so long. One system call, mostly."""
        # In steps of a tenth the time-out is mostly the one that is set already.
        waits_s = math.ceil(seconds * 10) / 10 if seconds > 0.1 else seconds
        if waits_s != self._waits_s:
            limit_wait(self._usock, socket.SO_RCVTIMEO, waits_s)
            self._waits_s = waits_s
        try:
            self._take_in(self._usock.recv(RECEIVE_BYTES))
        except BlockingIOError:
            return False
        return True

    def _poll(self, wanted: int, seconds: float) -> int:
        """Return what the socket is ready for, 0 for nothing after `seconds`."""
        if isinstance(self._usock, ssl.SSLSocket) and self._usock.pending():
            return select.POLLIN
        poll = select.poll()
        poll.register(self._usock, wanted)
        return next((ready for _, ready in poll.poll(max(seconds, 0) * 1000)), 0)

    def _send_some(self) -> None:
        """Send what the socket takes. TLS would wait until all of it is sent, so it gets a little."""
        try:
            if self._is_encrypted:
                sent = self._usock.send(self._unsent[:TLS_SEND_BYTES])
            else:
                sent = self._usock.send(self._unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._unsent = self._unsent[sent:]

    def _take_in(self, data: bytes) -> None:
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._unread += data

    def _handle_unread(self) -> bool:
        """Handle the messages that have arrived whole; return whether the exchange is complete.

        PostgreSQL manual, 55.7: a byte for the kind, and a length that counts itself.
        """
        data, at = self._unread, 0
        while self._awaited and len(data) - at >= 5:
            end = at + 1 + int.from_bytes(data[at + 1 : at + 5])
            if end > len(data):
                break
            kind = data[at : at + 1]
            self.message_types[kind](data[at + 5 : end], self._awaited[0])
            if kind == pg8000.core.READY_FOR_QUERY:
                self._awaited = self._awaited[1:]
            at = end
        self._unread = data[at:]
        # After an error the server still wants the rest of the message, to drop it.
        return not self._awaited and not self._unsent

    def handle_COPY_IN_RESPONSE(self, data: bytes, context: Any) -> None:  # noqa: N802
        """Do nothing: the data is on its way already."""

    def handle_COMMAND_COMPLETE(self, data: bytes, context: Any) -> None:  # noqa: N802
        super().handle_COMMAND_COMPLETE(data, context)
        self._tag = data[:-1]
        if data.startswith(b"INSERT "):  # its row's identifier, which is 0, and the number of rows
            self.inserted.append(int(data[:-1].rpartition(b" ")[2]))

    def handle_ERROR_RESPONSE(self, data: bytes, context: Any) -> None:  # noqa: N802  # pg8000's name
        first = context.error
        super().handle_ERROR_RESPONSE(data, context)
        self.last_error = context.error.args[0]
        # What was sent ahead says what is wrong; its message then only that the transaction has failed.
        context.error = first or context.error


# What pg8000 raises when the connection ends, or when the peer does not speak PostgreSQL's protocol.
BROKEN = (
    pg8000.exceptions.InterfaceError,
    OSError,
    struct.error,
    KeyError,
    IndexError,
    ValueError,
    AttributeError,
)

NO_ANSWER = "no answer in time"
SESSION_ERRORS = (pg8000.exceptions.DatabaseError, pg8000.core.scramp.ScramException, *BROKEN)


class Database:
    """An open connection. Not safe for use by two threads at a time."""

    def __init__(self, connection: PgConnection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout  # of run(), in seconds
        self.limit_sending(timeout)

    def run(self, message: str | Message) -> list[list[Any]]:
        """Send one message, or the SQL of one without COPY, and return the rows it brings.

        Raises DatabaseAway when the connection is lost or the database cannot work now, and
        DataRefused, DatabaseConflict or DatabaseMisconfigured for what the server says.
        """
        self.start(Message(message) if isinstance(message, str) else message)
        rows = self.finish(self._timeout)
        if rows is None:
            raise DatabaseAway(NO_ANSWER)
        return rows

    def start(self, message: Message) -> None:
        """Send a message; finish() waits for the answer. Raises DatabaseAway."""
        try:
            self._connection.send(message)
        except BROKEN as error:
            raise self._lost(error) from None

    def finish(self, seconds: float) -> list[list[Any]] | None:
        """Return the rows that the message brought, or None if its answer is not there after `seconds`.

        Raises what run() does.
        """
        try:
            if not self._connection.receive(seconds):
                return None
            rows = self._connection.result()
        except pg8000.exceptions.DatabaseError as error:
            raise server_error(error.args[0]) from None
        except BROKEN as error:
            raise self._lost(error) from None
        if self._connection.is_rolled_back():
            raise DatabaseAway("the transaction was rolled back instead of committed")
        return rows

    def inserted(self) -> list[int]:
        """Return how many rows each INSERT of the last message inserted."""
        return self._connection.inserted

    def set_timeout(self, seconds: float) -> None:
        """Bound the time that run() waits."""
        self._timeout = seconds

    def limit_sending(self, seconds: float) -> None:
        """Bound the time that a server may take no data."""
        self._connection.limit_sending(seconds)

    def is_direct(self) -> bool:
        """Return whether no pooler is between us and PostgreSQL, so that the session's settings are ours.

        A pooler greets with a process number of its own making. Raises what run() does.
        """
        key = self._connection._backend_key_data
        return key is not None and self.run("SELECT pg_backend_pid()") == [[int.from_bytes(key[:4])]]

    def is_stale(self) -> bool:
        """Return whether the server closed the idle connection, or says something unasked for.

        Does not block. Noticing this before a flush is sent keeps its outcome from being unknown. False
        while the answer to something sent ahead may be there.
        """
        return not self.is_ahead and self._connection.is_readable()

    @property
    def is_ahead(self) -> bool:
        """Return whether a transaction has been begun ahead of its message."""
        return bool(self._connection.ahead)

    def close(self) -> None:
        """Close the connection, which may be dead already."""
        try:
            self.limit_sending(GOODBYE_S)
            self._connection.close()
        except BROKEN:
            log.debug("the connection to the database was closed already")

    def _lost(self, error: Exception) -> DatabaseAway:
        said = self._connection.last_error
        if said and said.get("S", said.get("V")) in ("FATAL", "PANIC"):
            return DatabaseAway(f"connection lost: {said.get('M')}", said.get("C", ""))
        if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
            return DatabaseAway(NO_ANSWER)
        return DatabaseAway(f"connection lost: {one_line(error.__cause__ or error)}")


def home_directory() -> Path:
    """Return our user's home; a container may have none for its number."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def os_user() -> str:
    """Return the name of the user we run as; a container may have none for its number."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "postgres"


def reason_of(error: OSError) -> str:
    """Return why a system call failed, without the numbers and paths that Python adds."""
    return error.strerror or one_line(error)


def ssl_contexts(target: Target) -> list[ssl.SSLContext | None]:
    """Return the ways to connect, None without TLS, in the order to try (PostgreSQL manual, 34.19).

    Raises OperatorError for a certificate file that cannot be read.
    """
    if target.socket or target.sslmode == "disable":
        return [None]
    default_root = home_directory() / ".postgresql" / "root.crt"
    root = target.sslrootcert or str(default_root)
    # As in libpq, a root certificate that is there turns `require` into `verify-ca`.
    found = bool(target.sslrootcert) or default_root.exists()
    verify = target.sslmode.startswith("verify") or (target.sslmode == "require" and found)
    context = ssl.create_default_context()
    try:
        if verify and root != "system":
            context.load_verify_locations(cafile=root)
        if target.sslcert:
            context.load_cert_chain(target.sslcert, target.sslkey)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(filter(None, (root if verify else None, target.sslcert, target.sslkey)))
        raise OperatorError(
            f"cannot read the certificates for sslmode={target.sslmode} ({files}): {reason_of(error)}"
        ) from None
    context.check_hostname = target.sslmode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    match target.sslmode:
        case "allow":
            return [None, context]
        case "prefer":
            return [context, None]
    return [context]


def open_unix_socket(path: str, timeout: float) -> socket.socket:
    """Return a connected Unix socket. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def open_socket(target: Target) -> socket.socket:
    """Return a connected socket. Raises DatabaseAway, or DatabaseMisconfigured for lacking permission."""
    place = target.socket or f"{target.host}:{target.port}"
    try:
        if target.socket:
            return open_unix_socket(target.socket, target.connect_timeout)
        sock = socket.create_connection((target.host, target.port), target.connect_timeout)
    except PermissionError as error:
        raise DatabaseMisconfigured(f"cannot connect to {place}: {reason_of(error)}") from None
    except OSError as error:
        raise DatabaseAway(f"cannot connect to {place}: {reason_of(error)}") from None
    # Without this every flush waits 40 ms for a delayed acknowledgement; pg8000 does not set it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def startup_error(target: Target, error: DatabaseError) -> DatabaseError:
    """Return a refused session's error; only what can pass by itself stays DatabaseAway."""
    if isinstance(error, DatabaseAway):
        return error
    missing = error.sqlstate == "28P01" and not target.password
    hint = " (no password was given: put it in the URL, PGPASSWORD or .pgpass)" if missing else ""
    return DatabaseMisconfigured(f"{error.reason}{hint}", error.sqlstate)


def tls_reason(error: ssl.SSLError) -> str:
    """Return why a TLS handshake failed, as OpenSSL says it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {error.verify_message}"
    return (error.reason or one_line(error)).replace("_", " ").lower()


def start_tls(sock: socket.socket, context: ssl.SSLContext, target: Target) -> ssl.SSLSocket:
    """Return an encrypted socket (PostgreSQL manual, 55.2.11). Raises what the other side deserves.

    Our own negotiation, because pg8000's takes an end of input for a server without TLS.
    """
    sock.sendall(struct.pack("!ii", 8, 80877103))
    match sock.recv(1):
        case b"S":
            return context.wrap_socket(sock, server_hostname=target.host)
        case b"":
            raise DatabaseAway("the connection ended early")
    raise DatabaseMisconfigured(f"sslmode={target.sslmode}, but the server does not offer TLS")


def log_in(target: Target, sock: socket.socket) -> PgConnection:
    """Return a session over a socket. Raises what pg8000 does."""
    # Settings that a server or a role may have changed, and that quoting relies on.
    settings = {"client_encoding": "UTF8", "standard_conforming_strings": "on"}
    if target.options:
        settings["options"] = target.options
    return PgConnection(
        target.user,
        sock=sock,
        database=target.dbname,
        # Without any password pg8000 fails where the server asks for one; an empty one is refused.
        password=target.password or "",
        application_name=target.application_name,
        ssl_context=False,  # done already
        startup_params=settings,
    )


def session_error(target: Target, error: Exception) -> DatabaseError:
    """Return our error for a session that did not come about."""
    # pg8000 closes the connection of a refused session, and that may fail and hide the refusal.
    hidden = error.__context__ and error.__context__.__context__
    for refusal in (error, hidden):
        if isinstance(refusal, pg8000.exceptions.DatabaseError):
            return startup_error(target, server_error(refusal.args[0]))
    result: DatabaseError = DatabaseAway(f"the connection ended early: {one_line(error)}")
    match error:
        case DatabaseError():
            result = error
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            result = DatabaseAway("the connection ended during the TLS handshake")
        case ssl.SSLError():
            result = DatabaseMisconfigured(f"TLS with {target.host} failed: {tls_reason(error)}")
        case TimeoutError():
            result = DatabaseAway(NO_ANSWER)
        case pg8000.core.scramp.ScramException():
            result = DatabaseMisconfigured(f"the password cannot be used with SCRAM: {one_line(error)}")
        case pg8000.exceptions.InterfaceError() if "Authentication method" in str(error):
            result = DatabaseMisconfigured(one_line(error))
    return result


def start_session(target: Target, context: ssl.SSLContext | None) -> PgConnection:
    """Return a session that the server has accepted, encrypted if there is a context.

    Raises DatabaseAway or DatabaseMisconfigured.
    """
    sock = open_socket(target)
    try:
        if context:
            sock = start_tls(sock, context, target)
        return log_in(target, sock)
    except (DatabaseError, *SESSION_ERRORS) as error:
        sock.close()
        raise session_error(target, error) from None


def check_session(database: Database, status: Mapping[str, str]) -> None:
    """Raise DatabaseError unless quoting is safe and rows can be written."""
    if status.get("standard_conforming_strings") != "on":
        raise DatabaseMisconfigured("standard_conforming_strings must be on")
    if status.get("client_encoding", "").upper().replace("-", "") not in ("UTF8", "UNICODE"):
        raise DatabaseMisconfigured("client_encoding must be UTF8")
    if database.run("SHOW transaction_read_only") != [["off"]]:
        raise DatabaseAway("the database is read-only", "25006")


def connect(target: Target) -> Database:
    """Return a connection that is ready for flushes. Blocks, each step at most connect_timeout.

    Raises DatabaseAway, DatabaseMisconfigured or OperatorError.
    """
    contexts = ssl_contexts(target)
    for attempt, context in enumerate(contexts, 1):
        try:
            connection = start_session(target, context)
        except DatabaseMisconfigured as error:
            # prefer and allow try the other way when the server refuses this one.
            if attempt < len(contexts) and error.sqlstate in ("", "28000"):
                continue
            raise
        database = Database(connection, target.connect_timeout)
        try:
            check_session(database, connection.parameter_statuses)
        except DatabaseError:
            database.close()
            raise
        return database
    raise AssertionError("the last attempt returns or raises")


def missing_after_check(database: Database, schema: Schema, user: str) -> list[str]:
    """Return the SQL for what is missing; raise OperatorError for what does not fit."""
    catalog = read_catalog(database.run(catalog_sql([*schema.tables, LEDGER])))
    found = differences(schema, catalog, user)
    if not found:
        return missing_sql(schema, catalog)
    additive = all(difference.action for difference in found)
    ways = "Change the schema file, start with --migrate, or" if additive else "Change the schema file, or"
    raise OperatorError(differences_text(found, "", ways))


def refused_by_database(error: DatabaseError, statements: Iterable[str], user: str) -> OperatorError:
    """Return the error for statements that PostgreSQL refuses for good."""
    detail = f" ({error.detail})" if error.detail else ""
    return OperatorError(
        f"cannot create what the schema needs: {error.reason}{detail}\n"
        f"Let the owner of the database run this, or allow user {identifier(user)} to:\n"
        + "\n".join(f"  {statement};" for statement in statements)
    )


def prepare_tables(database: Database, schema: Schema, user: str) -> None:
    """Create the tables and indexes that are missing.

    Blocks as long as PostgreSQL needs to build indexes, and while another instance does the same.
    Raises OperatorError when existing tables do not fit or PostgreSQL refuses, DatabaseAway when it
    went away.
    """
    if not missing_after_check(database, schema, user):
        return
    database.set_timeout(PREPARE_TIMEOUT_S)
    database.run(BEGIN_PREPARING)
    statements = missing_after_check(database, schema, user)
    try:
        for statement in statements:
            log.info("database: %s", statement)
            database.run(statement)
        database.run("COMMIT")
    except DatabaseAway as error:
        raise DatabaseAway(f"cannot create what the schema needs: {error.reason}", error.sqlstate) from None
    except (DataRefused, DatabaseConflict, DatabaseMisconfigured) as error:
        database.run("ROLLBACK")
        raise refused_by_database(error, statements, user) from None


def prepare_unnoticed(database: Database, schema: Schema, user: str) -> None:
    """Create the tables that are missing, while inserts into the others go on.

    Building an index of an existing table would block them, so that is refused. Raises what
    prepare_tables() does.
    """
    catalog = read_catalog(database.run(catalog_sql([*schema.tables, LEDGER])))
    blocking = [
        # PostgreSQL cannot build those of a partitioned table without blocking inserts.
        index.sql() if existing.partitioned else index.sql("CONCURRENTLY")
        for table in schema.tables.values()
        if (existing := catalog.get(table.name))
        for index in missing_indexes(table, existing)
    ]
    if blocking and not differences(schema, catalog, user):
        raise OperatorError(
            "indexes of existing tables are missing. Start with --migrate, which builds them while events"
            " are inserted, or run:\n" + "\n".join(f"  {statement};" for statement in blocking)
        )
    prepare_tables(database, schema, user)


def survey(database: Database, schema: Schema, user: str) -> Plan:
    """Return what is to be done about the tables. Changes nothing. Raises DatabaseError."""
    catalog = read_catalog(database.run(catalog_sql([*schema.tables, LEDGER])))
    for name in empty_tables_matter(schema, catalog):
        [[empty]] = database.run(is_empty_sql(name))
        catalog[name] = replace(catalog[name], empty=empty)
    return plan_migration(schema, catalog, user)


def check_database(database: Database, schema: Schema, user: str) -> Plan:
    """Return what is to be done about the tables, found out in a transaction that cannot write.

    Raises DatabaseError.
    """
    database.run("BEGIN READ ONLY")
    plan = survey(database, schema, user)
    database.run("ROLLBACK")
    return plan


class Migration:
    """Brings the tables of a database to a schema, one step at a time.

    Other instances may do the same, and operators build indexes by hand. So every step is planned anew
    with a lock that keeps others from taking it. That lock is a transaction's. The build of an index cannot
    be in one: it is started right after a transaction in which nobody else was building, under a name that
    another instance would choose as well, so that the second of two is refused. PostgreSQL takes two builds
    of one table for a deadlock and ends one of them after a second; the next plan clears up behind it. Only
    behind PgBouncer does that happen: otherwise a lock of the session keeps instances from it.
    """

    def __init__(
        self, database: Database, schema: Schema, user: str, patience_s: float = CHANGE_PATIENCE_S
    ) -> None:
        self._database = database
        self._schema = schema
        self._user = user
        self._patience_s = patience_s  # for a table that is in use
        self._repeated: dict[Index, DataRefused] = {}  # unique indexes that the data does not allow

    def run(self) -> None:
        """Take all steps. Raises what migrate() does."""
        plan = self._survey()
        if plan.by_hand:
            what = " that --migrate leaves to you (nothing was changed)"
            raise OperatorError(differences_text(plan.by_hand, what, "Change the schema file, or"))
        later = plan.later
        taken = Counter[Step]()
        while steps := [
            step for step in plan.steps if step.index is None or step.index not in self._repeated
        ]:
            step = steps[0]
            taken[step] += 1
            if taken[step] > CONFLICT_TRIES:
                raise OperatorError(
                    f"run {CONFLICT_TRIES} times without effect: {'; '.join(step.statements)}"
                )
            try:
                self._take(step)
            except (DataRefused, DatabaseConflict, DatabaseMisconfigured) as error:
                self._roll_back()
                # A row came between the look and NOT NULL; a deadlock: the next plan knows more.
                if error.sqlstate != "23502" and not isinstance(error, DatabaseConflict):
                    left = [statement for step in steps for statement in step.statements]
                    raise refused_by_database(error, left, self._user) from None
                time.sleep(random.uniform(0, CHANGE_PAUSE_S))  # so that two do not meet again
            plan = self._survey()
        for statement in later:
            log.info("database: when the rows from before have values in them, you may run: %s", statement)
        if self._repeated:
            raise OperatorError("\n".join(self._repeated_values()))

    def _survey(self) -> Plan:
        return survey(self._database, self._schema, self._user)

    def _take(self, step: Step) -> None:
        if step.index:
            self._build(step, step.index)
        elif step.table:
            self._patiently(step, self._patience_s, self._change)
        else:
            self._create(step)

    def _is_needed(self, step: Step) -> bool:
        """Return whether a step is still to be taken, now that a lock keeps others from taking it."""
        return step in self._survey().steps

    def _roll_back(self) -> None:
        with contextlib.suppress(DatabaseAway):
            self._database.run("ROLLBACK")

    def _create(self, step: Step) -> None:
        self._database.run(BEGIN_PREPARING)
        if self._is_needed(step):
            for statement in step.statements:
                log.info("database: %s", statement)
                self._database.run(statement)
        self._database.run("COMMIT")

    def _patiently(self, step: Step, patience_s: float, attempt: Callable[[Step], None]) -> None:
        """Try until it gets its lock. Raises DatabaseAway after `patience_s`."""
        deadline = time.monotonic() + patience_s
        waited = False
        while True:
            try:
                return attempt(step)
            except (DatabaseAway, DatabaseConflict) as error:
                self._roll_back()
                if error.sqlstate not in BUSY_STATES:
                    raise
                if time.monotonic() > deadline:
                    raise DatabaseAway(
                        f'table "{step.table}" is still in use after {patience_s} s ({error.reason});'
                        f" not run: {'; '.join(step.statements)}",
                        error.sqlstate,
                    ) from None
                if not waited:
                    log.info('database: table "%s" is in use, waiting for it: %s', step.table, error.reason)
                waited = True
                time.sleep(CHANGE_PAUSE_S)

    def _begin(self, step: Step) -> bool:
        """Begin a transaction in which nobody else changes the table; return whether the step is needed.

        Waits for the builds of others, and blocks no insert. LOCK has no snapshot while it waits, which a
        build of an index would wait for in turn.
        """
        self._database.run(
            f"BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {BUILD_LOCK_TIMEOUT_MS};"
            f" LOCK TABLE {identifier(step.table)} IN SHARE UPDATE EXCLUSIVE MODE"
        )
        return self._is_needed(step)

    def _change(self, step: Step) -> None:
        if not self._begin(step):
            self._roll_back()
            return
        for statement in step.statements:
            log.info("database: %s", statement)
        self._database.run(
            f"SET LOCAL lock_timeout = {CHANGE_LOCK_TIMEOUT_MS};"
            f" SET LOCAL statement_timeout = {CHANGE_TIMEOUT_MS}; {'; '.join(step.statements)}; COMMIT"
        )

    def _build(self, step: Step, index: Index) -> None:
        with self._alone(step):
            name = self._free_name(step, index)
            if name is None:
                return
            statement = index.sql("CONCURRENTLY", identifier(name))
            log.info("database: %s", statement)
            try:
                self._database.run(statement)
            except DataRefused as error:
                if error.sqlstate != "23505":
                    raise
                self._repeated[index] = error  # the next plan drops what is left of the index
            except DatabaseMisconfigured as error:
                if error.sqlstate != "42P07":  # another instance was quicker
                    raise
            except DatabaseAway as error:
                if error.sqlstate not in BUSY_STATES:
                    raise
                raise OperatorError(
                    f"PostgreSQL gave up building an index: {error.reason}; run this without a time-out,"
                    " or let the URL say ?options=-c%20statement_timeout%3D0%20-c%20lock_timeout%3D0\n"
                    f"  {index.sql('CONCURRENTLY')};"
                ) from None

    def _free_name(self, step: Step, index: Index) -> str | None:
        """Wait until nobody builds an index of the table; return the name for ours, None if it is there."""
        name: str | None = None

        def look(step: Step) -> None:
            nonlocal name
            if self._begin(step):
                [[name]] = self._database.run(free_name_sql(index))
            self._roll_back()

        self._patiently(step, PREPARE_TIMEOUT_S, look)
        return name

    @contextlib.contextmanager
    def _alone(self, step: Step) -> Iterator[None]:
        """Keep other instances from building, and the time-outs of a role or a database from ending it.

        That is up to the session. A pooler would give it to other clients, so nothing is done there.
        """
        if not self._database.is_direct():
            yield
            return
        self._patiently(step, PREPARE_TIMEOUT_S, self._lock_building)
        try:
            self._database.run("SET statement_timeout = 0; SET lock_timeout = 0")
            yield
        finally:
            self._roll_back()
            with contextlib.suppress(DatabaseAway):
                self._database.run(
                    f"SELECT pg_advisory_unlock({BUILD_LOCK}); RESET statement_timeout; RESET lock_timeout"
                )

    def _lock_building(self, _step: Step) -> None:
        # Not waiting in PostgreSQL, because a build waits for everybody who does that with a snapshot.
        if self._database.run(f"SELECT pg_try_advisory_lock({BUILD_LOCK})") != [[True]]:
            raise DatabaseAway("another instance builds indexes", "55P03")

    def _repeated_values(self) -> Iterator[str]:
        yield "columns cannot become unique, because values are repeated in them:"
        for index, error in self._repeated.items():
            yield f'  table "{index.table}", column "{index.column}": {error.detail or error.reason}'
        yield "Find them all with the SELECT, remove them, and start again or run the rest:"
        for index in self._repeated:
            column = identifier(index.column)
            yield (
                f"  SELECT {column}, count(*) FROM {identifier(index.table)}"
                f" GROUP BY {column} HAVING count(*) > 1;"
            )
            yield f"  {index.sql('CONCURRENTLY')};"


def migrate(database: Database, schema: Schema, user: str) -> None:
    """Create the tables, columns and indexes that are missing, and drop NOT NULL where nothing requires it.

    For any thread with a connection of its own; changes the connection's time-out. Logs what it runs.
    Blocks as long as PostgreSQL needs to build indexes. Inserts of others go on: no lock that stops them is
    held or waited for longer than half a second. Does nothing if there is something that it must not do.

    Raises OperatorError with everything that does not fit then and the SQL for it; DatabaseAway when the
    database went away or a table stayed in use too long: what was done until then stays, and trying again
    goes on from there.
    """
    database.set_timeout(PREPARE_TIMEOUT_S)
    Migration(database, schema, user).run()


def check_tables(database: Database, schema: Schema, user: str) -> None:
    """Raise OperatorError if tables that we had prepared are gone or have changed.

    They are not created anew: whoever renamed a table may be about to rename it back.
    """
    missing = missing_after_check(database, schema, user)
    needed = [statement for statement in missing if not statement.startswith("CREATE INDEX")]
    if needed:
        raise OperatorError(
            "tables or indexes that events need are gone; bring them back, or create them with:\n"
            + "\n".join(f"  {statement};" for statement in needed)
        )


@dataclass(frozen=True, slots=True)
class Session:
    """A connection that is ready for flushes, and the last flush of each epoch that is stored."""

    database: Database
    ledger: dict[str, int]
    is_own: bool = False  # prepared by OWN_SESSION
    distrust: Callable[[], object] = bool  # to be called when it turns out not to be our own

    def begin(self, raising: Raise, is_patient: bool = False) -> str:
        """Return the statements that begin a transaction and take its step in the ledger."""
        if is_patient:
            return PATIENT_FLUSH_START + raising.sql()
        return f"BEGIN;\n{raising.prepared_sql()}" if self.is_own else FLUSH_START + raising.sql()

    def end_reason(self, error: DatabaseError) -> str:
        """Return why the session is not what we take it for, if an error says so, or ""."""
        if error.sqlstate == UNPREPARED_STATE:
            self.distrust()
            return "a pooler gave our session to somebody else"
        if any(f"{LEDGER_MOVED} {epoch}" in error.reason for epoch in self.ledger):
            return "the ledger does not stand where we left it"
        return ""


LEDGER_EMPTIED = "somebody else deletes rows of the ledger"


def enlist(database: Database, schema: Schema, user: str, epochs: Sequence[str]) -> dict[str, int]:
    """Give epochs their rows in the ledger, and return the last flush that each has stored.

    Waits for a transaction of a lost connection that may still run, and finds out whether rows could be
    inserted into all tables, so that the writer need not. Raises DatabaseError or OperatorError.
    """
    try:
        database.run(enlist_sql(epochs))
        database.run(FLUSH_START)
        rows = database.run(read_ledger_sql(epochs))
        database.run(f"{touch_sql(schema)};\nCOMMIT")
    except DatabaseMisconfigured as error:
        if error.sqlstate != "42501":
            raise
        raise OperatorError(
            f"cannot use the tables: {error.reason}; run:\n"
            f"  GRANT SELECT, INSERT, UPDATE, DELETE ON {LEDGER} TO {identifier(user)};"
        ) from None
    ledger = {epoch: int(flush) for epoch, flush in rows}
    if ledger.keys() != set(epochs):
        raise DatabaseAway(LEDGER_EMPTIED)
    return ledger


class Opener:
    """Opens sessions. The first one prepares or migrates the tables, later ones check them."""

    def __init__(self, target: Target, schema: Schema, migrates: bool = False) -> None:
        self.target = target
        self._migrates = migrates
        # Replaced as a whole by use(): the schema, and whether its tables have been prepared.
        self._state = (schema, False)
        self._is_shared = False  # whatever is_direct() says

    def open(self, epochs: Sequence[str]) -> Session:
        """Return a session. Blocks, also while PostgreSQL builds indexes.

        Raises DatabaseError or OperatorError.
        """
        state = self._state
        schema, is_prepared = state
        database = connect(self.target)
        try:
            if is_prepared:
                check_tables(database, schema, self.target.user)
            else:
                self._prepare(database, schema, prepare_tables)
                if self._state is state:  # or else a reload has been quicker
                    self._state = (schema, True)
            database.set_timeout(STATEMENT_TIMEOUT_S + ANSWER_GRACE_S)
            database.limit_sending(PATIENCE_S)
            ledger = enlist(database, schema, self.target.user, epochs)
            is_own = not self._is_shared and database.is_direct()
            if is_own:
                database.run(OWN_SESSION)
            return Session(database, ledger, is_own, self._distrust)
        except (DatabaseError, OperatorError):
            database.close()
            raise

    def prepare(self, schema: Schema) -> None:
        """Prepare or migrate the tables for another schema, over a connection of its own, then use it.

        For any thread. Inserts go on meanwhile. Blocks and raises as open() does; the schema from before
        stays then.
        """
        with contextlib.closing(connect(self.target)) as database:
            self._prepare(database, relaxed(schema, self._state[0]), prepare_unnoticed)
        self._state = (schema, True)

    def use(self, schema: Schema) -> None:
        """Use a schema whose tables are those from before."""
        self._state = (schema, self._state[1])

    def _prepare(
        self, database: Database, schema: Schema, otherwise: Callable[[Database, Schema, str], None]
    ) -> None:
        (migrate if self._migrates else otherwise)(database, schema, self.target.user)

    def _distrust(self) -> None:
        """Note that a pooler gives our session to others, though it looks like PostgreSQL's own."""
        self._is_shared = True


# --- Spool --------------------------------------------------------------------
# The SQLite file that keeps events while no database can take them, and the ones in
# quarantine. A flush is one row, its batches as JSON, events exactly as they came:
# they are converted when they are replayed, by the schema of that day. One thread
# owns it. First the pure part: texts of batches, and SQL of views.


# Spools of former versions may have NaN under keys that are ignored.
SPOOL_DECODER = json.JSONDecoder(parse_float=exact_number)


def spooled_batch(app_id: str, delivery: Delivery, events: str) -> str:
    """Return the JSON of a batch for the spool; `events` is the JSON of its events, as they came."""
    about = {
        "app": app_id,
        "received_at": delivery.received_at,
        "client_ip": delivery.peer,
        "headers": delivery.headers,
    }
    return f'{JSON_ENCODER.encode(about)[:-1]},"events":{events}}}'


def batch_text(batch: Batch) -> str:
    """Return the JSON of a batch for the spool. Raises RecursionError for what it could not read again."""
    text = body_text(batch.body)
    events = text[slice(*events_span(text, 0))]
    # How deep Python reads depends on who calls it; in the spool events are nested a little deeper, too.
    if events.count("[") + events.count("{") > SPOOL_DEPTH_SAFE:
        SCAN("[" * SPOOL_DEPTH_SLACK + events + "]" * SPOOL_DEPTH_SLACK, 0)
    return spooled_batch(batch.intake.app.id, kept(batch.delivery, batch.intake.headers), events)


@dataclass(frozen=True, slots=True)
class Spooled:
    """A batch as it comes back from the spool."""

    app_id: str
    delivery: Delivery
    events: list[object]


def read_spooled(text: str) -> list[Spooled]:
    """Return the batches in the JSON of a flush. Raises ValueError for what is none."""
    try:
        return [
            Spooled(
                batch["app"],
                Delivery(batch["headers"], batch["client_ip"], float(batch["received_at"])),
                batch["events"],
            )
            for batch in SPOOL_DECODER.decode(text)
        ]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {one_line(error)}") from None


def spooled_events(text: str) -> list[list[str]]:
    """Return, for each batch in the JSON of a flush, the JSON of its events."""
    return [
        [text[slice(*span)] for span in item_spans(text, events_span(text, start)[0])]
        for start, _end in item_spans(text, 0)
    ]


def without_events(text: str, dropped: Set[tuple[int, int]]) -> str:
    """Return the JSON of a flush without some events, each given by its batch's index and its own."""
    batches = []
    for index, (start, end) in enumerate(item_spans(text, 0)):
        events, events_end = events_span(text, start)
        places = enumerate(item_spans(text, events))
        kept = [text[slice(*span)] for place, span in places if (index, place) not in dropped]
        if kept:
            batches.append(f"{text[start:events]}[{','.join(kept)}]{text[events_end:end]}")
    return f"[{','.join(batches)}]"


def json_path(name: str) -> str | None:
    """Return SQLite's path to a key, as an SQL literal, or None if it has no way to write it."""
    return quote(f'$."{name}"') if name.isascii() and '"' not in name and "\\" not in name else None


def sqlite_key(json_sql: str, name: str) -> tuple[str, str]:
    """Return SQL for the value of a key in a JSON object, and for its JSON type."""
    if path := json_path(name):
        return f"json_extract({json_sql}, {path})", f"json_type({json_sql}, {path})"
    # Keys may be written with escapes, which only json_each reads as what they mean.
    found = f"FROM json_each({json_sql}) WHERE key = {quote(name)}"
    return f"(SELECT value {found})", f"(SELECT type {found})"


def readable_time(value: str) -> str:
    """Return SQL for seconds since 1970, or an RFC 3339 text, as a time in UTC."""
    as_text = "'%Y-%m-%d %H:%M:%f'"
    return (
        f"CASE typeof({value}) WHEN 'text' THEN coalesce(strftime({as_text}, {value}), {value})"
        f" ELSE strftime({as_text}, {value}, 'unixepoch') END"
    )


def view_column(table: Table, column: Column) -> str:
    """Return SQL for what a column would have in PostgreSQL, readable."""
    value, kind = sqlite_key("e.value", column.name)
    if column.extra:
        known = [TABLE_KEY, *(c.name for c in table.columns if not (c.header or c.source or c.extra))]
        paths = ", ".join(path for path in map(json_path, known) if path)
        value = f"nullif(json_remove(e.value, {paths}), '{{}}')"
    elif column.header:
        value, _ = sqlite_key("b.value", "headers")
        value, _ = sqlite_key(value, column.header)
    elif column.source is Source.RECEIVED_AT:
        value = readable_time("json_extract(b.value, '$.received_at')")
    elif column.source:
        value = f"json_extract(b.value, '$.{'app' if column.source is Source.APP_ID else 'client_ip'}')"
    elif column.type is Type.TIMESTAMP:
        value = readable_time(value)
    elif column.type is Type.JSON:
        value = f"CASE WHEN {kind} <> 'null' THEN json_quote({value}) END"
    return f"{value} AS {identifier(column.name)}"


def view_sql(table: Table) -> str:
    """Return the statement that creates a table's view in the spool."""
    columns = ",\n  ".join(view_column(table, column) for column in table.columns)
    # Python reads JSON that is nested deeper than SQLite can.
    batches = "CASE WHEN json_valid(f.batches) THEN f.batches END"
    return (
        f"CREATE VIEW {identifier(table.name)} AS SELECT\n  {columns}\n"
        f"FROM attolytics_spool AS f, json_each({batches}) AS b, json_each(b.value, '$.events') AS e\n"
        f"WHERE json_extract(e.value, '$.{TABLE_KEY}') = {quote(table.name)}"
    )


# Where a flush says when its first batch was received: behind an app and before a client's headers.
OLDEST_CHARS = 2_000
RECEIVED_AT = re.compile(r'"received_at":([0-9.e+]+)')
APPLICATION_ID = 0x41_74_74_6F  # "Atto"; tells the file from other programs' (SQLite, application_id)
SPOOL_VERSION = 1

# `total` counts all events up to this flush, so that the number of events is known without a scan.
SPOOL_SQL = f"""
CREATE TABLE attolytics_epoch (epoch TEXT PRIMARY KEY, is_finished INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE attolytics_spool (
  id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, flush INTEGER NOT NULL,
  events INTEGER NOT NULL, total INTEGER NOT NULL, batches TEXT NOT NULL
);
CREATE TABLE attolytics_quarantine (
  id INTEGER PRIMARY KEY, quarantined_at REAL NOT NULL, app TEXT, table_name TEXT, column_name TEXT,
  reason TEXT NOT NULL, batch TEXT, event TEXT NOT NULL
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SPOOL_VERSION};
"""

QUARANTINE = "quarantine"
QUARANTINE_VIEW = f"""CREATE VIEW {QUARANTINE} AS SELECT
  id, {readable_time("quarantined_at")} AS quarantined_at, app,
  table_name AS "table", column_name AS "column", reason,
  {readable_time("json_extract(batch, '$.received_at')")} AS received_at,
  json_extract(batch, '$.client_ip') AS client_ip, event
FROM attolytics_quarantine"""


@dataclass(frozen=True, slots=True)
class SpooledFlush:
    """A row of the spool."""

    id: int
    epoch: str
    number: int
    events: int
    text: str  # JSON of its batches


@dataclass(frozen=True, slots=True)
class Retry:
    """An event in quarantine that is to be tried again."""

    id: int
    text: str  # JSON of a flush that has this event only
    reason: str


def check_spool(path: str, descriptor: int) -> None:
    """Raise OperatorError for a file that is not a spool, is damaged or too new. Changes nothing in it."""
    head = os.pread(descriptor, 16, 0)
    if head and head != b"SQLite format 3\0":
        raise OperatorError(f"--spool {path} is not a spool but some other file; it was left as it is")
    if not head:
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as db:
            is_small = os.fstat(descriptor).st_size <= QUICK_CHECK_BYTES_MAX
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone() if is_small else ("ok",)
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":  # we were killed while we created it
            return
        raise OperatorError(
            f"--spool {path} is damaged or cannot be read: {one_line(error)}; it was left as it is"
        ) from None
    if found != "ok":
        raise OperatorError(
            f"--spool {path} is damaged: {' '.join(found.split())}; it was left as it is."
            f" Try to save its events with: sqlite3 {path} .recover"
        )
    if tables and application != APPLICATION_ID:
        raise OperatorError(f"--spool {path} is another program's SQLite file; it was left as it is")
    if tables and version != SPOOL_VERSION:
        raise OperatorError(f"--spool {path} was made by another version of Attolytics (format {version})")


def wait_for_lock(descriptor: int, path: str) -> None:
    """Lock a file. Raises BlockingIOError when another process has it locked for SPOOL_LOCK_S."""
    deadline = time.monotonic() + SPOOL_LOCK_S
    said = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        if not said:
            log.info("waiting for the server that uses the spool %s", path)
        said = True
        time.sleep(SPOOL_LOCK_POLL_S)


def lock_spool(path: str) -> int:
    """Return the descriptor of the spool's file, which is created if need be, locked against other servers.

    It must stay open as long as SQLite has the file open: closing it would drop SQLite's own locks. Waits
    a little for a server that is about to end. Raises OperatorError.
    """
    try:
        # The events in it may be about people.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OperatorError(
            f"cannot open the spool {path}: {reason_of(error)}; name a file in a directory that user"
            f" {os_user()} may write to with --spool PATH"
        ) from None
    try:
        wait_for_lock(descriptor, path)
        check_spool(path, descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise OperatorError(
            f"another server uses the spool {path}: give each its own with --spool PATH"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise OperatorError(f"cannot use the spool {path}: {reason_of(error)}") from None
    except OperatorError:
        os.close(descriptor)
        raise
    return descriptor


def storable(text: str | None) -> str | None:
    """Return a text with lone surrogates written as escapes, because SQLite holds UTF-8."""
    return text and text.encode(errors="backslashreplace").decode()


def sync_directory(path: str) -> None:
    """Make sure that a new file is found in its directory after a power cut."""
    descriptor = os.open(Path(path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Spool:
    """An open spool. Methods block for the disk, and raise SpoolError when it fails them."""

    def __init__(self, path: str, bytes_max: int, schema: Schema, epoch: str) -> None:
        """Open or create a spool for a process. Raises OperatorError."""
        self.path = path
        self.epoch = epoch
        self.bytes_max = bytes_max
        self._unchecked = ROOM_CHECK_CHARS  # characters written since there was seen to be room
        self._failed = False  # SQLite did, the last time
        self._descriptor = lock_spool(path)
        try:
            self._db = self._open(schema)
            # The processes that used this spool and may have a row in the ledger; and those of them
            # that have nothing in the spool, and must never get a row again.
            epochs = dict(self._db.execute("SELECT epoch, is_finished FROM attolytics_epoch"))
            self.epochs = [epoch for epoch, is_finished in epochs.items() if not is_finished]
            self.finished = [epoch for epoch, is_finished in epochs.items() if is_finished]
            first = self._one("SELECT total - events FROM attolytics_spool ORDER BY id LIMIT 1")
            # Events of all flushes ever, and of those that are gone. Their difference is what is here.
            self._total = self._one("SELECT total FROM attolytics_spool ORDER BY id DESC LIMIT 1") or 0
            self._gone = self._total if first is None else first
            self.quarantined = self._one("SELECT count(*) FROM attolytics_quarantine")  # events in there
        except (sqlite3.Error, OSError) as error:
            os.close(self._descriptor)
            raise OperatorError(
                f"cannot use the spool {path}: {one_line(error)}; SQLite needs more files beside it, name one"
                f" in a directory that user {os_user()} may write to with --spool PATH"
            ) from None

    @property
    def events(self) -> int:
        """Return how many events wait for their replay."""
        return self._total - self._gone

    def check(self) -> None:
        """Raise SpoolError if no events can be stored now. After a failure, find out by writing."""
        self._unchecked = ROOM_CHECK_CHARS
        self._check_room(ROOM_CHECK_CHARS)
        if not self._failed:
            return
        with self._translated():
            self._db.execute("PRAGMA busy_timeout = 0")  # Somebody's lock is not waited for
            try:
                with self._transaction():
                    again = "UPDATE attolytics_epoch SET epoch = epoch WHERE epoch = ?"
                    self._db.execute(again, (self.epoch,))
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {SPOOL_BUSY_S * 1000}")
        self._failed = False

    def oldest(self) -> float | None:
        """Return when the first event that waits was received, in seconds since the epoch."""
        with self._translated():
            start = self._one(
                f"SELECT substr(batches, 1, {OLDEST_CHARS}) FROM attolytics_spool ORDER BY id LIMIT 1"
            )
        match = RECEIVED_AT.search(start or "")
        return float(match[1]) if match else None

    def append(
        self,
        number: int,
        events: int,
        batches: Sequence[str],
        quarantined: Sequence[Quarantined],
        epoch: str = "",
    ) -> None:
        """Keep a flush of this process, by the JSON of its batches, and events for the quarantine.

        `epoch` is another one that the process began.
        """
        text = f"[{','.join(batches)}]"
        self._check_room(len(text) + sum(len(item.event) for item in quarantined))
        # A single statement is a transaction by itself, and saves two.
        with self._transaction() if quarantined else self._translated():
            if events:
                self._insert_flush(epoch or self.epoch, number, events, text)
            self._insert_quarantined(quarantined)
        self._total += events
        self.quarantined += len(quarantined)
        self._failed = False

    def quarantine(self, quarantined: Sequence[Quarantined]) -> list[int]:
        """Keep events in the quarantine; return their ids."""
        self._check_room(sum(len(item.event) for item in quarantined))
        with self._transaction():
            ids = self._insert_quarantined(quarantined)
        self.quarantined += len(ids)
        return ids

    def release(self, ids: Iterable[int]) -> None:
        """Forget events in the quarantine."""
        with self._transaction():
            gone = self._db.executemany(
                "DELETE FROM attolytics_quarantine WHERE id = ?", [(i,) for i in ids]
            ).rowcount
        self.quarantined -= gone

    def head(self, events_max: int) -> list[SpooledFlush]:
        """Return the first flushes, at least one and all of one epoch, with about `events_max` events."""
        flushes: list[SpooledFlush] = []
        events = chars = 0
        with self._translated(), contextlib.closing(self._db.cursor()) as cursor:
            cursor.execute("SELECT id, epoch, flush, events, batches FROM attolytics_spool ORDER BY id")
            for row in cursor:
                flush = SpooledFlush(*row)
                events += flush.events
                chars += len(flush.text)
                is_more = events > events_max or chars > FLUSH_CHARS_MAX
                if flushes and (is_more or flush.epoch != flushes[0].epoch):
                    break
                flushes.append(flush)
        return flushes

    def amend(self, flushes: Sequence[SpooledFlush], quarantined: Sequence[Quarantined]) -> None:
        """Replace flushes by ones without some of their events, which go to the quarantine."""
        with self._transaction():
            self._db.executemany(
                "UPDATE attolytics_spool SET batches = ? WHERE id = ?", [(f.text, f.id) for f in flushes]
            )
            self._insert_quarantined(quarantined)
        self.quarantined += len(quarantined)

    def delete(self, flushes: Sequence[SpooledFlush]) -> None:
        """Delete the first flushes, which are stored."""
        with self._transaction():
            self._db.execute("DELETE FROM attolytics_spool WHERE id <= ?", (flushes[-1].id,))
        self._gone += sum(flush.events for flush in flushes)

    def delete_flush(self, number: int, events: int) -> None:
        """Delete a flush of this process, the first one in the spool."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM attolytics_spool WHERE epoch = ? AND flush = ?", (self.epoch, number)
            )
        self._gone += events

    def begin(self, epoch: str) -> None:
        """Note another epoch of this process, before it gets a row in the ledger."""
        with self._transaction():
            self._db.execute("INSERT INTO attolytics_epoch VALUES (?, 0)", (epoch,))
        self.epochs.append(epoch)

    def finish(self, epochs: Collection[str]) -> None:
        """Note that processes have nothing in the spool, before their rows leave the ledger."""
        with self._transaction():
            self._db.executemany(
                "UPDATE attolytics_epoch SET is_finished = 1 WHERE epoch = ?", [(e,) for e in epochs]
            )
        self.epochs = [epoch for epoch in self.epochs if epoch not in epochs]
        self.finished += epochs

    def forget(self, epochs: Collection[str]) -> None:
        """Forget finished processes that have no row in the ledger any more."""
        with self._transaction():
            self._db.executemany("DELETE FROM attolytics_epoch WHERE epoch = ?", [(e,) for e in epochs])
        self.finished = [epoch for epoch in self.finished if epoch not in epochs]

    def retries(self, after: int) -> list[Retry]:
        """Return the next events of the quarantine, in the order of their ids."""
        with self._translated():
            rows = self._db.execute(
                "SELECT id, batch, event, reason FROM attolytics_quarantine WHERE id > ? ORDER BY id LIMIT ?",
                (after, FLUSH_EVENTS_MAX),
            )
            retries: list[Retry] = []
            chars = 0
            for id_, batch, event, reason in rows:
                # An event without a batch is a whole flush that could not be read.
                text = f'[{batch[:-1]},"events":[{event}]}}]' if batch else event
                chars += len(text)
                if retries and chars > FLUSH_CHARS_MAX:
                    break
                retries.append(Retry(id_, text, reason))
            rows.close()
            return retries

    def retry(self, number: int, retries: Sequence[Retry], reasons: Mapping[int, str]) -> None:
        """Move events from the quarantine into a flush of this process; note why others stay."""
        with self._transaction():
            if retries:
                text = ",".join(retry.text[1:-1] for retry in retries)
                self._insert_flush(self.epoch, number, len(retries), f"[{text}]")
            self._db.executemany(
                "DELETE FROM attolytics_quarantine WHERE id = ?", [(retry.id,) for retry in retries]
            )
            self._db.executemany(
                "UPDATE attolytics_quarantine SET reason = ? WHERE id = ?",
                [(reason, id_) for id_, reason in reasons.items()],
            )
        self._total += len(retries)
        self.quarantined -= len(retries)

    def create_views(self, schema: Schema) -> None:
        """Replace the views of tables that another schema has changed."""
        with self._transaction():
            self._create_views(self._db, schema)

    def shrink(self) -> None:
        """Give the room of deleted events back to the disk."""
        with self._translated():
            free = self._one("PRAGMA freelist_count") or 0
            pages = self._one("PRAGMA page_count") or 0
            # VACUUM writes what stays: not worth it while that is most of the file.
            if free * self._page_bytes > SHRINK_BYTES and free * 2 > pages:
                self._db.execute("VACUUM")
            # Whoever reads the file with another program is not waited for.
            self._db.execute("PRAGMA busy_timeout = 0")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute(f"PRAGMA busy_timeout = {SPOOL_BUSY_S * 1000}")

    def close(self) -> None:
        """Close the file, and let others use it."""
        try:
            self._db.close()
        except sqlite3.Error as error:
            log.warning("the spool %s: %s", self.path, one_line(error))
        os.close(self._descriptor)

    def _open(self, schema: Schema) -> sqlite3.Connection:
        # Only one thread uses it, but not the one that opens it.
        db = sqlite3.connect(self.path, timeout=SPOOL_BUSY_S, isolation_level=None, check_same_thread=False)
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"its file system cannot do WAL, only {mode}")
        # NORMAL would lose what was acknowledged when the power fails.
        db.execute("PRAGMA synchronous = FULL")
        (self._page_bytes,) = db.execute("PRAGMA page_size").fetchone()
        checkpoint_pages = max(min(1000, self.bytes_max // 8 // self._page_bytes), 16)
        db.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(f"BEGIN IMMEDIATE;{SPOOL_SQL}COMMIT")
            sync_directory(self.path)
        db.execute("INSERT INTO attolytics_epoch VALUES (?, 0)", (self.epoch,))
        self._create_views(db, schema)
        return db

    def _create_views(self, db: sqlite3.Connection, schema: Schema) -> None:
        views = [(QUARANTINE, QUARANTINE_VIEW)]
        for table in schema.tables.values():
            if table.name.lower() == QUARANTINE:  # in SQLite that is one name
                log.warning(
                    'the spool has no view for the table "%s": the quarantine has its name', table.name
                )
            else:
                views.append((table.name, view_sql(table)))
        there = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view'"))
        for name, sql in views:
            if there.get(name) == sql:
                continue
            try:
                db.execute(f"DROP VIEW IF EXISTS {identifier(name)}")
                db.execute(sql)
            except sqlite3.OperationalError as error:  # a name that SQLite keeps for itself, say
                log.warning('the spool cannot have a view for the table "%s": %s', name, one_line(error))

    def _one(self, sql: str) -> Any:
        row = self._db.execute(sql).fetchone()
        return row[0] if row else None

    def _insert_flush(self, epoch: str, number: int, events: int, text: str) -> None:
        self._db.execute(
            "INSERT INTO attolytics_spool (epoch, flush, events, total, batches) VALUES (?, ?, ?, ?, ?)",
            (epoch, number, events, self._total + events, text),
        )

    def _insert_quarantined(self, quarantined: Iterable[Quarantined]) -> list[int]:
        now = time.time()
        ids = []
        for item in quarantined:
            about = spooled_batch(item.app_id, item.delivery, "")
            batch = about.removesuffix(',"events":}') + "}" if item.app_id else None
            about_it = (storable(item.table), storable(item.column), storable(item.reason))
            row = (now, item.app_id, *about_it, batch, item.event)
            added = self._db.execute(
                "INSERT INTO attolytics_quarantine"
                " (quarantined_at, app, table_name, column_name, reason, batch, event)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            ids.append(added.lastrowid or 0)
        return ids

    def _check_room(self, chars: int) -> None:
        """Raise SpoolError if so many characters more are too much for the limit or for the disk."""
        self._unchecked += chars
        if self._unchecked < ROOM_CHECK_CHARS:
            return
        with self._translated():
            pages = self._one("PRAGMA page_count") - self._one("PRAGMA freelist_count")
            disk = os.statvfs(self.path)
            journal = os.stat(f"{self.path}-wal").st_size
        if pages * self._page_bytes + journal + chars > self.bytes_max:
            raise SpoolError(f"the spool {self.path} is full: --spool_limit is {self.bytes_max} bytes")
        # Events are written twice: into the journal, and from there into the file.
        if disk.f_bavail * disk.f_frsize < DISK_RESERVE_BYTES + 2 * chars:
            raise SpoolError(f"the disk of the spool {self.path} is full")
        self._unchecked = 0

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        # What SQLite cannot hold, a text of a gigabyte say, is a ValueError or an OverflowError.
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
            self._failed = True
            raise SpoolError(f"the spool {self.path} fails: {one_line(error)}") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


# --- Writer -------------------------------------------------------------------
# Group commit. HTTP threads put batches into the inbox and wait; the writer takes
# all that are there and stores them as one flush, in the database or in the spool.
#
#                  away, busy, slow or broken: the flush goes to the spool
#      direct  ------------------------------------------------------->  spooling
#         ^                                                              |      ^
#         | the spool            the connector hands a session over      |      | away
#         | is empty                                                     v      | again
#         +---------------------------------------------------------  replaying
#
# direct     there is a session and the spool is empty: a flush goes to the database.
# spooling   there is no session: a flush goes to the spool.
# replaying  there are both: spooled flushes go to the database, many in a transaction;
#            new ones go to the spool meanwhile, so that their order stays.
#
# Exactly once: a process is an epoch with a row in the ledger, and numbers its
# flushes. A transaction raises its epoch's row from the last number to its own. When
# it is unknown whether a COMMIT came through, its flush is spooled under its number;
# the next session says up to which number everything is there.
#
# While flushes follow each other closely, each carries the beginning of the next one's
# transaction: the database raises the ledger while the next events are still on their way.
#
# Large batches take the database long, so while we are direct a lane stores them: a
# second session with an epoch of its own. What it cannot store comes back to the writer.


DATABASE = "database"
SPOOL = "spool"


class Pending:
    """A batch on its way through the writer. One verdict on it is given, by the writer."""

    __slots__ = ("_tell", "batch", "done", "is_left", "kept", "place", "since")

    def __init__(
        self, batch: Batch, tell: Callable[[Batch, str | RequestError], object], since: float
    ) -> None:
        self.batch = batch
        self.since = since  # when it came, by the writer's clock
        self.place = ""  # where it is stored
        self.is_left = False  # The lane does not store it
        self.kept: list[int] = []  # ids of its events that are in the quarantine already
        self._tell = tell
        # Held until the verdict has been told; a bare lock wakes its thread faster than an Event.
        self.done = threading.Lock()
        self.done.acquire()

    def settle(self, place: str) -> None:
        """Give the verdict: stored, in DATABASE or SPOOL."""
        self.place = place
        self._tell(self.batch, place)
        self.done.release()

    def refuse(self, error: RequestError) -> None:
        """Give the verdict: not stored."""
        self._tell(self.batch, error)
        self.done.release()


CLOSED = "the server closed the connection"
NO_LANE = "large batches have no connection of their own, and others wait for them"
SLOW = "the database is slow; events go to the spool until it has answered"


@dataclass(slots=True)
class Complaint:
    """What was logged, and how often it came up since."""

    level: int
    text: str
    since: float
    more: int = 0


class Complaints:
    """Logs what goes wrong again and again: at once, and then how often in each COMPLAINT_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Guards _open; never held while a line is logged.
        self._lock = threading.Lock()
        self._open: dict[str, Complaint] = {}

    def add(self, level: int, text: str, about: str = "", count: int = 1) -> None:
        """Log a text, unless one about the same (by default the text) was logged a moment ago: then count it.

        `count` is for how many failures it stands.
        """
        self.summarise()
        with self._lock:
            known = self._open.get(about or text)
            if known:
                known.level, known.text = level, text
                known.more += count
                return
            self._open[about or text] = Complaint(level, text, self._clock(), count - 1)
        log.log(level, "%s", text)

    def summarise(self) -> None:
        """Log how often the older complaints came up again. To be called now and then."""
        now = self._clock()
        lines = []
        with self._lock:
            for about, known in list(self._open.items()):
                seconds = now - known.since
                if seconds < COMPLAINT_S:
                    continue
                del self._open[about]
                if known.more:
                    lines.append((known.level, known.text, known.more, seconds))
                    self._open[about] = Complaint(known.level, known.text, now)
        for level, text, more, seconds in lines:
            log.log(level, "%s (and %s more in the last %.0f s)", text, f"{more:,}", seconds)


class Connector:
    """Opens sessions, as often as it takes."""

    def __init__(
        self,
        open_session: Callable[[Sequence[str]], Session],
        complaints: Complaints,
        complaint: str = "cannot use the database",
    ) -> None:
        self.reason = ""  # why the last attempt failed
        self._open = open_session
        self._complaint = complaint
        self._stop = threading.Event()
        self._wanted: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
        self._backoff = 0.0
        self._complaints = complaints

    def start(self, hand_over: Callable[[Session], object]) -> None:
        """Start a thread that opens the sessions asked for by connect(), and hands them over."""
        threading.Thread(target=self._work, args=(hand_over,), name="connector", daemon=True).start()

    def connect(self, epochs: Sequence[str]) -> None:
        """Let the thread connect, with back-off since the last time that settled() was called.

        The session will know the ledger's rows of `epochs`. Does not block.
        """
        self.reason = ""
        self._wanted.put(epochs)

    def settled(self) -> None:
        """Note that a session works, so that the next loss is retried at once."""
        self._backoff = 0.0

    def stop(self) -> None:
        """Give up soon; does not wait for it."""
        self._stop.set()

    def open(self, epochs: Sequence[str]) -> Session | None:
        """Return a session, or None after stop(). Blocks as long as it takes."""
        while not self._stop.wait(self._backoff * random.uniform(0.5, 1)):
            self._backoff = min(max(self._backoff * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
            try:
                return self._open(epochs)
            except (DatabaseError, OperatorError) as error:
                self.reason = str(error)
                self._complaints.add(logging.WARNING, f"{self._complaint}: {error}")
        return None

    def _work(self, hand_over: Callable[[Session], object]) -> None:
        while session := self.open(self._wanted.get()):
            hand_over(session)


class Progress:
    """Logs how a replay gets on."""

    def __init__(self, events: int, clock: Callable[[], float], complaints: Complaints) -> None:
        self._clock = clock
        self._complaints = complaints  # A slow database has us replay a little every second
        self._started = self._logged = clock()
        self._replayed = 0
        complaints.add(logging.INFO, f"replaying {events} events from the spool", "replaying")

    def add(self, events: int, left: int) -> None:
        """Note that events are replayed, and `left` are not."""
        self._replayed += events
        now = self._clock()
        if now - self._logged < PROGRESS_LOG_S:
            return
        self._logged = now
        rate = self._replayed / max(now - self._started, 0.001)
        log.info(
            "replayed %d events, %d left, %d per second, about %d s left",
            self._replayed,
            left,
            rate,
            left / max(rate, 1),
        )

    def finish(self, quarantined: int) -> None:
        """Note that nothing is left."""
        seconds = max(self._clock() - self._started, 0.001)
        self._complaints.add(
            logging.INFO,
            f"replayed all {self._replayed} events in {seconds:.1f} s,"
            f" {self._replayed / seconds:.0f} per second; {quarantined} of them went to the quarantine",
            "replayed",
        )


@dataclass(slots=True)
class Flight:
    """A flush that the database works on."""

    waiting: Sequence[Pending]
    number: int
    is_spooled: bool = False  # It took long: its batches have their verdict, and it is in the spool too


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a lane tells: that it is open, or what became of its flush.

    After DatabaseAway the flush may be stored or not; after any other error it is not.
    """

    lane: Lane
    seconds: float = 0.0  # that the flush took
    skipped: Mapping[tuple[str, ...], int] = field(default_factory=dict)  # rows that were there already
    error: DatabaseError | None = None
    is_over: bool = False  # The lane has ended


class Lane:
    """A second session, with a thread and an epoch of its own, so that nobody waits behind large batches.

    It stores one flush at a time, and tells the writer within twice PATIENCE_S what became of it. When that
    is unknown, the lane ends, and its epoch with it: the ledger's row of that knows, as soon as the flush
    has come to its end.
    """

    def __init__(
        self,
        epoch: str,
        connector: Connector,
        tell: Callable[[Outcome], object],
        clock: Callable[[], float],
    ) -> None:
        self.epoch = epoch
        # These belong to the writer's thread.
        self.is_open = False
        self.flight: Flight | None = None
        self._number = 0  # of the last flush
        # And these to the thread of the lane.
        self._connector = connector
        self._tell = tell
        self._clock = clock
        self._flights: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lane", daemon=True)

    def start(self) -> None:
        """Begin to connect. The first Outcome says that it is open. Raises RuntimeError without a thread."""
        self._thread.start()

    def store(self, pending: Pending) -> None:
        """Store a batch in a flush of its own. Does not block; there must be no other flight."""
        self._number += 1
        self.flight = Flight([pending], self._number)
        self._flights.put(self.flight)

    def end(self) -> None:
        """Let it close its session; waits for that, but not long."""
        self._connector.stop()
        self._flights.put(None)
        self._thread.join(2 * GOODBYE_S)

    def _work(self) -> None:
        session = self._connector.open([self.epoch])
        if session is None:
            return
        session.database.set_timeout(PATIENCE_S)
        outcome = Outcome(self)
        self._tell(outcome)
        while not outcome.is_over and (flight := self._flights.get()):
            outcome = self._store(session, flight)
            self._tell(outcome)
        # What takes long is spooled by now. Let it end by itself: the replay can begin when it has.
        with contextlib.suppress(DatabaseError):
            session.database.finish(STATEMENT_TIMEOUT_S + ANSWER_GRACE_S)
        session.database.close()

    def _store(self, session: Session, flight: Flight) -> Outcome:
        started = self._clock()
        raising = Raise(self.epoch, session.ledger[self.epoch], flight.number)
        message = flush_message(session.begin(raising), [pending.batch.rows for pending in flight.waiting])
        if session.database.is_stale():  # so nothing of it is sent
            return Outcome(self, error=DatabaseConflict(CLOSED), is_over=True)
        try:
            session.database.run(message)
        except DatabaseAway as error:
            return Outcome(self, error=error, is_over=True)
        except DatabaseError as error:
            is_over = bool(session.end_reason(error)) or not self._is_rolled_back(session)
            return Outcome(self, error=error, is_over=is_over)
        session.ledger[self.epoch] = flight.number
        sent = [pending.batch.counts for pending in flight.waiting]
        skipped = skipped_rows(message, session.database.inserted(), sent)
        return Outcome(self, self._clock() - started, skipped)

    def _is_rolled_back(self, session: Session) -> bool:
        try:
            session.database.run("ROLLBACK")
        except DatabaseError:
            return False
        return True


def is_large(batch: Batch) -> bool:
    """Return whether a batch takes the database so long that others should not wait behind it."""
    return batch.accepted > LARGE_BATCH_EVENTS or len(batch.body) > LARGE_BATCH_CHARS


def skipped_rows(
    message: Message, inserted: Sequence[int], sent: Iterable[Mapping[str, int]]
) -> Counter[tuple[str, ...]]:
    """Return how many rows of a message were there already, by table.

    `inserted` has the rows that each of its INSERTs stored, `sent` those of its batches by table.
    """
    stored: Counter[str] = Counter()
    for table, rows in zip(message.inserts, inserted, strict=False):
        stored[table] += rows
    return Counter(
        {
            (table,): max(sum(counts.get(table, 0) for counts in sent) - rows, 0)
            for table, rows in stored.items()
        }
    )


@dataclass(slots=True)
class Group:
    """Spooled flushes that are replayed in one transaction, converted."""

    flushes: list[SpooledFlush]
    # Where each good event stands: its flush's index in `flushes`, its batch's there and its own.
    places: list[tuple[int, int, int]] = field(default_factory=list)
    parts: list[dict[TableIntake, str]] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)  # of the rows in `parts`
    bad: dict[tuple[int, int, int], Quarantined] = field(default_factory=dict)


class Replayer:
    """Turns spooled flushes into rows, by the schema of today. Pure."""

    def __init__(self, schema: Schema) -> None:
        self._intakes = intakes(schema)

    def group(self, flushes: Sequence[SpooledFlush]) -> Group:
        """Return flushes converted, with the events that do not fit in `bad`."""
        group = Group(list(flushes))
        for index, flush in enumerate(flushes):
            try:
                batches = read_spooled(flush.text)
            except ValueError as error:
                # Cannot be taken apart, so all of it is kept as one.
                nobody = Delivery({}, "", 0)
                reason = f"cannot be read back: {one_line(error)}"
                group.bad[index, -1, -1] = Quarantined("", nobody, flush.text, None, None, reason)
                continue
            for batch_index, batch in enumerate(batches):
                self._add(group, index, batch_index, batch)
        return group

    def rows(self, group: Group) -> list[tuple[TableIntake, str]]:
        """Return the table and the row of each good event of a group, as in its `places`."""
        rows: list[tuple[TableIntake, str]] = []
        for (index, batch_index), places in itertools.groupby(group.places, lambda place: place[:2]):
            batch = read_spooled(group.flushes[index].text)[batch_index]
            events = [batch.events[event] for _, _, event in places]
            rows += self._intakes[batch.app_id].rows_in_order(events, batch.delivery)
        return rows

    def problem(self, text: str) -> str | None:
        """Return what is wrong with the only event in the JSON of a flush, or None."""
        group = self.group([SpooledFlush(0, "", 0, 1, text)])
        return next((item.reason for item in group.bad.values()), None)

    def _add(self, group: Group, index: int, batch_index: int, batch: Spooled) -> None:
        content = self._sort(batch)
        bad: dict[int, Quarantined] = {}
        if content.problems:
            texts = spooled_events(group.flushes[index].text)[batch_index]
            bad = quarantined_events(batch.app_id, batch.delivery, batch.events, texts, content.problems)
        good = [event for event in range(len(batch.events)) if event not in bad]
        group.places.extend([(index, batch_index, event) for event in good])
        group.parts.append(content.rows)
        group.counts.append(content.counts)
        group.bad |= {(index, batch_index, event): item for event, item in bad.items()}

    def _sort(self, batch: Spooled) -> Sorted:
        intake = self._intakes.get(batch.app_id)
        if intake:
            return intake.sort(batch.events, batch.delivery)
        reason = f"the schema file has no app {show(batch.app_id)}"
        return Sorted(problems=[EventProblem(i, None, reason) for i in range(len(batch.events))])


def amended(group: Group, bad: Iterable[tuple[int, int, int]]) -> list[SpooledFlush]:
    """Return those flushes of a group that have bad events, without them. `bad` has their places."""
    dropped: dict[int, set[tuple[int, int]]] = {}
    for index, batch, event in bad:
        dropped.setdefault(index, set()).add((batch, event))
    return [
        replace(
            group.flushes[index],
            text="[]" if (-1, -1) in events else without_events(group.flushes[index].text, events),
        )
        for index, events in dropped.items()
    ]


def refused_event(group: Group, row: int, table: str, error: DatabaseError) -> Quarantined:
    """Return for the quarantine an event of a group that the database refused."""
    index, batch_index, event = group.places[row]
    text = group.flushes[index].text
    batch = read_spooled(text)[batch_index]
    return Quarantined(
        batch.app_id,
        batch.delivery,
        spooled_events(text)[batch_index][event],
        table,
        error.column,
        error.reason,
    )


def refusals(batch: Batch, refused: Mapping[int, DatabaseError], error: DatabaseError) -> list[EventProblem]:
    """Return for the client why the database refuses events of a batch, by the index of their rows.

    Without any they are refused only together, with `error`.
    """
    places = batch.places if batch.places is not None else range(batch.accepted)
    found = {places[row]: reason for row, reason in refused.items()}
    return [
        EventProblem(index, reason.column, f"the database refuses it: {reason.reason}")
        for index, reason in (found.items() if found else [(None, error)])
    ]


@dataclass(frozen=True, slots=True)
class Replacement:
    """What another schema brings for the writer."""

    schema: Schema
    replayer: Replayer


class CheckUp:
    """A question of the monitor's, answered when `done` is set."""

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.done = threading.Event()


class Prod:
    """An item of the inbox that shows whether the writer takes it."""


class Stop:
    """The last item of the inbox."""


Item = Pending | Session | CheckUp | Replacement | Prod | Stop


@dataclass(frozen=True, slots=True)
class Condition:
    """How the writer found itself when it was asked last."""

    is_up: bool = False  # There is a session that worked last
    is_direct: bool = False  # New events go to the database
    database_reason: str = ""  # why there is no session
    spool_reason: str = ""  # why the spool takes no events
    spool_events: int = 0
    quarantine_events: int = 0
    oldest: float | None = None  # when the first event in the spool was received, in seconds since the epoch


def events_in(flush: SpooledFlush) -> int:
    """Return how many events a spooled flush still has."""
    try:
        return sum(len(batch.events) for batch in read_spooled(flush.text))
    except ValueError:
        return 0


class Writer:
    """Owns the session with the database and the spool; stores batches from all HTTP threads."""

    def __init__(
        self,
        schema: Schema,
        spool: Spool,
        open_session: Callable[[Sequence[str]], Session] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `open_session` there is no database, and everything stays in the spool."""
        self._replayer = Replayer(schema)
        self._clock = clock
        self.complaints = Complaints(clock)
        self.metrics = Metrics(schema)
        self.spool_limit = spool.bytes_max
        self.spool_path = spool.path
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()  # which pass what is in the inbox
        self._open_session = open_session
        self._connector = Connector(open_session, self.complaints) if open_session else None
        # Guards _check_up.
        self._lock = threading.Lock()
        self._check_up = CheckUp(0)
        self._check_up.done.set()
        # Replaced by the writer's thread, read by any.
        self._condition = Condition(spool_events=spool.events, quarantine_events=spool.quarantined)
        # Grows as long as the writer's thread gets on, whatever becomes of its events; others may read it.
        self.beat = 0
        # All below belongs to the writer's thread, once it runs.
        self._spool = spool
        self._session: Session | None = None
        self._number = 0  # of the last flush
        self._flight: Flight | None = None
        self._lane: Lane | None = None
        self._has_ended_lane = False  # so that its epoch can be finished
        self._no_lane_until = 0.0  # after a failure
        self._queued: list[Pending] = []  # large batches that wait for the lane
        self._left: list[Pending] = []  # batches that were taken, and wait for the next flush
        # Batches that are committed, and not told so before the database has the next flush to work on.
        self._landed: list[tuple[Sequence[Pending], float]] = []
        self._replacement: Replacement | None = None  # taken out of the inbox, not in use yet
        self._stopping = False
        self._patient_until = 0.0
        self._proven_at = 0.0  # when the database answered last
        self._landed_at = 0.0  # when it had stored the last flush
        self._away_since: float | None = None
        self._progress: Progress | None = None
        self._quarantined = 0  # events, in the replay that runs
        self._retried: Counter[str] | None = None  # why events of --retry_quarantine stay there
        self._retried_events = 0
        self._retried_until = 0  # the last flush that has such events
        self._taken_since = 0.0  # when the last batch that was taken had come
        self._allowance = sys.maxsize  # of events that may be spooled while others are replayed
        self._replay_events = REPLAY_EVENTS_MAX  # fewer while the database is too slow for so many
        self._statement_timeout = STATEMENT_TIMEOUT_S
        self._conflicts = 0
        self._suspect = False  # The database refused events for a reason that is not theirs
        self._database_reason = ""  # why the last session was given up
        self._skipped: Counter[tuple[str, ...]] = Counter()  # rows of the transaction that were there already

    def retry_quarantine(self) -> None:
        """Move the events in quarantine that fit the schema by now to the spool. Before start().

        Raises SpoolError.
        """
        self._retried = Counter()
        last = 0
        while retries := self._spool.retries(last):
            reasons = {retry.id: self._replayer.problem(retry.text) for retry in retries}
            going = [retry for retry in retries if reasons[retry.id] is None]
            staying = {id_: reason for id_, reason in reasons.items() if reason is not None}
            self._retried.update(staying.values())
            self._number += 1
            self._spool.retry(self._number, going, staying)
            self.metrics.spooled += len(going)
            self._retried_events += len(retries)
            last = retries[-1].id
        self._retried_until = self._number
        if not self._spool.events or not self._connector:
            self._report_retry()

    def start(self, session: Session | None) -> threading.Thread:
        """Start the writer's thread, with a session or (None) with the database away."""
        self._session = session
        self.metrics.sessions += session is not None
        if self._connector:
            self._connector.start(self._inbox.put)
        if session is None and self._connector:
            self._away_since = self._clock()
            self._connector.connect(self._open_epochs())
        thread = threading.Thread(target=self._work, name="writer", daemon=True)
        thread.start()
        return thread

    def submit(self, batch: Batch, tell: Callable[[Batch, str | RequestError], object]) -> threading.Lock:
        """Hand over a batch; return a lock that is held until its verdict has been told. Does not block.

        `tell` is called by the writer's thread after one or two flushes, with the batch and where it is
        committed, DATABASE or SPOOL; or with StorageAway when it cannot be stored now, or InvalidEvents
        when the database refuses it. It must not block or raise.
        """
        pending = Pending(batch, tell, self._clock())
        self._inbox.put(pending)
        return pending.done

    def use(self, schema: Schema) -> None:
        """Let spooled events be replayed, and shown by the spool's views, by another schema. Does not block.

        New batches say themselves how they are to be stored.
        """
        self.metrics.declare(schema)
        self._inbox.put(Replacement(schema, Replayer(schema)))

    def prod(self) -> None:
        """Let `beat` grow soon, even if there is nothing to do. Does not block."""
        self._inbox.put(Prod())

    @property
    def has_database(self) -> bool:
        """Return whether there is a database at all, up or away."""
        return self._connector is not None

    def condition(self) -> tuple[Condition, float]:
        """Return the newest condition, and for how many seconds the writer has not been able to renew it.

        Asks the writer's thread, and waits at most CHECK_UP_S for it.
        """
        with self._lock:
            if self._check_up.done.is_set():
                self._check_up = CheckUp(self._clock())
                self._inbox.put(self._check_up)
            check_up = self._check_up
        late = 0.0 if check_up.done.wait(CHECK_UP_S) else self._clock() - check_up.asked_at
        return self._condition, late

    def stop(self) -> None:
        """End the thread after what is in the inbox. Does not wait; no submit() may follow."""
        if self._connector:
            self._connector.stop()
        self._inbox.put(Stop())

    # The states of the picture above.

    def _work(self) -> None:
        self._finish_epochs()
        while not self._stopping or self._left or (self._lane and self._lane.flight):
            if self._replacement:
                self._replace(self._replacement)
            if self._has_ended_lane and self._is_direct:
                self._has_ended_lane = False
                self._patient_until = self._clock() + PATIENCE_S
                self._finish_epochs()
            if self._session and self._spool.events:
                self._allowance = REPLAY_ALLOWANCE
                self._spool_waiting()
                self._replay(self._session)
                self._allowance = sys.maxsize
            elif waiting := self._take(wait=True):
                # A flush must not overtake those in the spool: its number would declare them stored.
                if self._session and self._is_direct:
                    self._patient_until = self._clock() + PATIENCE_S
                    self._store(self._session, waiting)
                else:
                    self._append(waiting, self._next_number())
        self._close()

    def _take(self, wait: bool, events_max: int = FLUSH_EVENTS_MAX) -> list[Pending]:
        """Return the batches that are waiting, up to a flush; notice what else is in the inbox.

        With `wait`, blocks until there is something, or a transaction that was begun ahead is taken back.
        """
        self.beat += 1
        waiting: list[Pending] = []
        events = chars = 0
        is_idle = wait
        with contextlib.suppress(queue.Empty):
            while events < min(events_max, FLUSH_EVENTS_MAX) and chars < FLUSH_CHARS_MAX:
                item = self._next(wait)
                wait = False
                if isinstance(item, Pending):
                    is_idle = False
                    if self._queue(item):
                        continue
                    if waiting and is_large(item.batch):
                        self._left.insert(0, item)
                        break
                    waiting.append(item)
                    self._taken_since = item.since
                    events += item.batch.accepted
                    chars += len(item.batch.body)
                elif isinstance(item, CheckUp):
                    self._examine(item, is_idle)
                elif self._notice(item):
                    break
        return waiting

    def _examine(self, check_up: CheckUp, is_idle: bool) -> None:
        """Answer the monitor; `is_idle` when nobody waits and no message to the database is under way."""
        self._look_at_ourselves(is_idle)
        check_up.done.set()
        if is_idle and self._session:
            self._probe(self._session)

    def _notice(self, item: Session | Replacement | Prod | Stop) -> bool:
        """Note what is no batch; return whether it changes where those behind it go."""
        if isinstance(item, Session):
            self.metrics.sessions += 1
            self._session = item
            self._finish_epochs()
        elif isinstance(item, Replacement):
            self._replacement = item  # not before the replay that may run now is over
        elif isinstance(item, Stop):
            self._stopping = True
        return not isinstance(item, Prod)

    def _next(self, wait: bool) -> Item:
        """Return the next item; raise queue.Empty if there is none, and it is not waited for.

        A transaction that was begun ahead is taken back when nothing has come for AHEAD_S.
        """
        while not self._outcomes.empty():
            self._hear(self._outcomes.get())
        if self._left:
            return self._left.pop(0)
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            if not wait:
                raise
        self._tell_landed()
        if not self._session or not self._session.database.is_ahead:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=max(self._landed_at + AHEAD_S - self._clock(), 0))
        except queue.Empty:
            self._patient_until = self._clock() + PATIENCE_S
            self._roll_back(self._session)
            raise

    @property
    def _is_direct(self) -> bool:
        return self._session is not None and not self._spool.events

    def _open_epochs(self) -> list[str]:
        """Return the epochs that the ledger is to tell about: not the lane's, which knows itself."""
        return [epoch for epoch in self._spool.epochs if self._lane is None or epoch != self._lane.epoch]

    def _replace(self, replacement: Replacement) -> None:
        self._tell_landed()
        self._replacement = None
        self._replayer = replacement.replayer
        try:
            self._spool.create_views(replacement.schema)
        except SpoolError as error:
            log.warning("the views of the spool stay as they are: %s", error.reason)

    def _look_at_ourselves(self, is_idle: bool) -> None:
        """Renew the condition; is_idle as for _examine()."""
        if is_idle and self._session and self._session.database.is_stale():
            self._lose(DatabaseAway(CLOSED))
        try:
            oldest = self._spool.oldest()
            self._spool.check()
        except SpoolError as error:
            self._publish(error.reason, self._condition.oldest)
        else:
            self._publish("", oldest)

    def _probe(self, session: Session) -> None:
        """Ask the database whether it is there, for the next condition, unless it has just shown that.

        A pooler keeps our connection when PostgreSQL goes away, and a stopped PostgreSQL says nothing.
        """
        if self._clock() - self._proven_at < PROBE_S:
            return
        self._patient_until = self._clock() + PATIENCE_S
        try:
            self._run(session, Message("SELECT 1"))
        except DatabaseError as error:
            self._lose(error)

    def _publish(self, spool_reason: str, oldest: float | None) -> None:
        reason = (self._connector.reason if self._connector else "") or self._database_reason
        self._condition = Condition(
            is_up=self._session is not None,
            is_direct=self._is_direct,
            database_reason="" if self._session else reason,
            spool_reason=spool_reason,
            spool_events=self._spool.events,
            quarantine_events=self._spool.quarantined,
            oldest=oldest,
        )

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _close(self) -> None:
        """Leave nothing behind in the ledger unless the spool needs it, and close what is open."""
        self._tell_landed()
        self._patient_until = self._clock() + CLOSE_S
        if self._lane:
            self._lane.end()
            if self._lane.is_open:  # or else it may be about to get its row in the ledger
                self._lane = None
        try:
            if self._session and self._is_direct:
                self._spool.finish(self._open_epochs())
                self._forget_finished(self._session)
        except (DatabaseError, SpoolError) as error:
            log.debug("the ledger keeps the row of this process: %s", error)
        if self._session:
            self._session.database.close()
        self._spool.close()

    # To the database: large batches by a lane.

    def _queue(self, pending: Pending) -> bool:
        """Let a large batch wait for the lane; return False when it is to go with the others."""
        if not is_large(pending.batch) or pending.is_left or not self._is_direct:
            return False
        if self._lane is None and self._clock() > self._no_lane_until:
            self._open_lane()
        if self._lane is None or not self._lane.is_open:
            return False
        self._queued.append(pending)
        self._store_queued(self._lane)
        return True

    def _store_queued(self, lane: Lane) -> None:
        while self._queued and not lane.flight:
            for pending in self._keep_quarantined([self._queued.pop(0)]):
                lane.store(pending)

    def _open_lane(self) -> None:
        if self._open_session is None:
            return
        self._tell_landed()
        lane = Lane(
            str(uuid.uuid4()),
            Connector(self._open_session, self.complaints, NO_LANE),
            self._tell_from_lane,
            self._clock,
        )
        try:
            self._spool.begin(lane.epoch)
            lane.start()
        except (SpoolError, RuntimeError) as error:  # no disk, no thread
            self.complaints.add(logging.WARNING, f"{NO_LANE}: {one_line(error)}")
            self._no_lane_until = self._clock() + COMPLAINT_S
            self._has_ended_lane = True
            return
        self._lane = lane

    def _tell_from_lane(self, outcome: Outcome) -> None:
        """Let the writer hear of an outcome soon. Called by the lane's thread."""
        self._outcomes.put(outcome)
        self._inbox.put(Prod())

    def _hear(self, outcome: Outcome) -> None:
        """Note what the lane says, and what it leaves to us."""
        lane = outcome.lane
        lane.is_open = True
        flight, lane.flight = lane.flight, None
        if flight and outcome.error is None:
            self.metrics.duplicates.update(outcome.skipped)
            self.metrics.database_seconds.observe(outcome.seconds)
            self._settle(flight.waiting, self._clock() - outcome.seconds, DATABASE)
        elif flight and isinstance(outcome.error, DatabaseAway):
            text = f"a large batch goes to {self._spool.path}: {outcome.error.reason}"
            self.complaints.add(logging.WARNING, text)
            self._append(flight.waiting, flight.number, lane.epoch)
        elif flight:
            self._leave(flight.waiting)
        if outcome.is_over:
            self._lane = None
            self._has_ended_lane = True
        if self._lane and self._is_direct:
            self._store_queued(lane)
        else:
            self._leave(self._queued)
            self._queued.clear()

    def _leave(self, waiting: Iterable[Pending]) -> None:
        for pending in waiting:
            pending.is_left = True
            self._left.append(pending)

    def _store(self, session: Session, waiting: Sequence[Pending]) -> None:
        """Store batches in one transaction, or else in the spool; give each its verdict."""
        if self._clock() - self._proven_at > PROVEN_S and session.database.is_stale():
            self._lose(DatabaseAway(CLOSED))
            self._append(waiting, self._next_number())
            return
        waiting = self._keep_quarantined(waiting)
        number = self._next_number()
        raising = Raise(self._spool.epoch, session.ledger[self._spool.epoch], number)
        follows_closely = self._clock() - self._landed_at < AHEAD_S
        ahead = session.begin(raising.next()) if session.is_own and follows_closely else ""
        message = flush_message(session.begin(raising), [pending.batch.rows for pending in waiting], ahead)
        is_early = session.database.is_ahead
        started = self._clock()
        flight = self._flight = Flight(waiting, number)
        self._skipped.clear()
        try:
            self._run(session, message)
            self._note_skipped(session, message, [pending.batch.counts for pending in waiting])
        except DatabaseAway as error:
            self._flight = None
            self._lose(error)
        except DatabaseError as error:
            self._flight = None
            self._roll_back(session)
            if not flight.is_spooled and not isinstance(error, DatabaseConflict):
                self._store_apart(waiting, error, is_early)
                return
            number = self._next_number()  # of new flushes some may be in the spool by now
        else:
            self._flight = None
            self._land(session, raising, flight, started)
            return
        if not flight.is_spooled:
            self._append(waiting, number)

    def _land(self, session: Session, raised: Raise, flight: Flight, started: float) -> None:
        """Give the batches of a flush that is committed their verdict, if they do not have one."""
        self._landed_at = self._clock()
        seconds = self._landed_at - started
        if not flight.is_spooled:
            self._landed.append((flight.waiting, started))
            # Before a short flush it is better to wait for what the clients send next.
            if sum(pending.batch.accepted for pending in flight.waiting) < LONG_FLUSH_EVENTS:
                self._tell_landed()  # before we do our books: nobody waits for those
        self._succeed(session, raised)
        self.metrics.database_seconds.observe(seconds)
        if not flight.is_spooled:
            return
        events = sum(pending.batch.accepted for pending in flight.waiting if pending.place)
        try:
            self._spool.delete_flush(flight.number, events)
            self.metrics.replayed += events
        except SpoolError as error:  # the next session says that it is there
            self._lose(DatabaseAway(error.reason))

    def _tell_landed(self) -> None:
        while self._landed:
            self._settle(*self._landed.pop(0), DATABASE)

    def _settle(self, waiting: Sequence[Pending], started: float, place: str) -> None:
        for pending in waiting:
            pending.settle(place)
        self._count(waiting)
        if log.isEnabledFor(TRACE):
            events = sum(pending.batch.accepted for pending in waiting)
            milliseconds = (self._clock() - started) * 1e3
            log.log(
                TRACE, "flush: %d batches, %d events, %s, %.1f ms", len(waiting), events, place, milliseconds
            )

    def _count(self, waiting: Sequence[Pending]) -> None:
        """Count the events of batches that are stored."""
        accepted = self.metrics.accepted
        events = 0
        for pending in waiting:
            batch = pending.batch
            app_id = batch.intake.app.id
            for table, count in batch.counts.items():
                events += count
                accepted[app_id, table] = accepted.get((app_id, table), 0) + count
            if batch.problems:  # those of its events that are kept already, and those that came with it
                self.metrics.quarantined += len(pending.kept) + len(batch.quarantined)
        self.metrics.flush_events.observe(events)

    def _note_skipped(self, session: Session, message: Message, sent: Iterable[Mapping[str, int]]) -> None:
        if message.inserts:
            self._skipped += skipped_rows(message, session.database.inserted(), sent)

    def _succeed(self, session: Session, raised: Raise) -> None:
        self.metrics.duplicates.update(self._skipped)
        self._skipped.clear()
        session.ledger[raised.epoch] = raised.end
        self._suspect = False
        self._conflicts = 0
        if self._connector:
            self._connector.settled()
        if self._away_since is not None:
            seconds = self._clock() - self._away_since
            self.complaints.add(
                logging.INFO, f"the database is there again, after {seconds:.1f} s", "database there"
            )
            self._away_since = None

    def _store_apart(self, waiting: Sequence[Pending], error: DatabaseError, is_early: bool) -> None:
        """Store each batch of a refused flush by itself, so that a bad one does not harm the others.

        If the transaction was begun before the events were there, even a single one is tried again: to the
        database they came from the future, which is wrong for a check against now().
        """
        if len(waiting) == 1 and not is_early:
            self._blame(waiting[0], error)
            return
        for position, pending in enumerate(waiting):
            if not self._session or self._spool.events:  # the others must not overtake
                self._append(waiting[position:], self._next_number())
                return
            self._store(self._session, [pending])

    def _blame(self, pending: Pending, error: DatabaseError) -> None:
        """Give a batch that the database refused its verdict, naming the events at fault."""
        if not self._session or self._spool.events or isinstance(error, DatabaseMisconfigured):
            self._append([pending], self._next_number())
            return
        session, batch = self._session, pending.batch
        number = self._next_number()
        raising = Raise(self._spool.epoch, session.ledger[self._spool.epoch], number)
        started = self._clock()
        flight = self._flight = Flight([pending], number)
        quarantines = batch.intake.app.quarantines
        try:
            rows = batch.intake.rows_in_order(decoded_events(batch.body), batch.delivery)
            refused = self._sift(
                session, session.begin(raising), rows, EVENTS_MAX if quarantines else CULPRITS_MAX
            )
            is_ours = any(isinstance(e, DatabaseMisconfigured) for e in refused.values())
            if flight.is_spooled or is_ours or (quarantines and not refused):
                raise DatabaseConflict("left to the replay")
            problems = refusals(batch, refused, error)
            if quarantines:
                self._quarantine_refused(pending, rows, refused, problems)
                self._run(session, Message("COMMIT"))
            else:
                self._run(session, Message("ROLLBACK"))
        except DatabaseAway as lost:
            self._flight = None
            self._lose(lost)
        except (DatabaseError, SpoolError):
            self._flight = None
            self._roll_back(session)
            number = self._next_number()
        else:
            self._flight = None
            if quarantines:
                self._land(session, raising, flight, started)
            elif not flight.is_spooled:
                pending.refuse(refused_events(problems, batch.accepted))
            return
        if not flight.is_spooled:
            self._append([pending], number)

    def _quarantine_refused(
        self,
        pending: Pending,
        rows: Sequence[tuple[TableIntake, str]],
        refused: Mapping[int, DatabaseError],
        problems: Sequence[EventProblem],
    ) -> None:
        """Move the events that the database refused from a batch to the quarantine."""
        batch = pending.batch
        texts = event_texts(body_text(batch.body))
        delivery = kept(batch.delivery, batch.intake.headers)
        app_id = batch.intake.app.id
        items = [
            Quarantined(app_id, delivery, texts[row], rows[row][0].name, error.column, error.reason)
            for row, error in refused.items()
        ]
        pending.kept += self._spool.quarantine(items)
        batch.problems = [*batch.problems, *problems][:PROBLEMS_MAX]
        batch.accepted -= len(items)
        for item in items:
            batch.counts[item.table or ""] -= 1
        # What is left, should it have to go to the spool.
        left = [text for row, text in enumerate(texts) if row not in refused]
        batch.body = f'{{"events":[{",".join(left)}]}}'.encode()

    def _sift(
        self, session: Session, start: str, rows: Sequence[tuple[TableIntake, str]], limit: int
    ) -> dict[int, DatabaseError]:
        """Insert into a transaction that `start` begins all rows that the database takes, by bisection.

        Returns why it refuses the others, by their index; gives up after `limit` of them. Each row is
        tried after those before it, so that of two that are refused together the second one is found.
        """
        refused: dict[int, DatabaseError] = {}
        self._skipped.clear()
        self._run(session, Message(start))
        parts = [range(len(rows))]
        while parts and len(refused) < limit:
            part = parts.pop()
            if self._flight and self._flight.is_spooled:
                break  # the replay will do it, without anybody waiting
            tried = rows[part.start : part.stop]
            message = attempt_message(tried)
            try:
                self._run(session, message)
                self._note_skipped(session, message, [Counter(table.name for table, _row in tried)])
            except (DataRefused, DatabaseMisconfigured) as error:
                self._run(session, Message(UNDO_ATTEMPT))
                middle = (part.start + part.stop) // 2
                if len(part) == 1:
                    refused[part.start] = error
                else:
                    parts += [range(middle, part.stop), range(part.start, middle)]
        return refused

    def _run(self, session: Session, message: Message) -> list[list[Any]]:
        """Send a message and return the rows that it brings. Raises DatabaseError.

        When nobody should wait any longer, keeps the flush in flight and new batches in the spool meanwhile.
        """
        deadline = self._clock() + self._statement_timeout + ANSWER_GRACE_S
        if self._clock() > self._patient_until:
            self._spool_waiting()
        try:
            session.database.start(message)
        finally:
            self._tell_landed()
        while True:
            patience = self._patient_until - self._clock()
            try:
                rows = session.database.finish(max(patience, REPLAY_POLL_S))
            except (DataRefused, DatabaseMisconfigured) as error:
                if reason := session.end_reason(error):
                    raise DatabaseAway(reason) from None
                raise
            if rows is not None:
                self._proven_at = self._clock()
                return rows
            if self._stopping or self._clock() > deadline:
                raise DatabaseAway(NO_ANSWER)
            self._spool_waiting()

    def _roll_back(self, session: Session) -> None:
        """End the transaction after an error."""
        try:
            self._run(session, Message("ROLLBACK"))
        except DatabaseError as error:
            self._lose(error)

    def _lose(self, error: DatabaseError) -> None:
        """Give the session up, and let the connector open another."""
        if not self._stopping:
            level = logging.ERROR if isinstance(error, DatabaseMisconfigured) else logging.WARNING
            text = f"the database cannot store events: {error.reason}; they go to {self._spool.path}"
            self.complaints.add(level, text)
        self._database_reason = error.reason
        if self._session:
            self._session.database.close()
        self._session = None
        self._progress = None
        self._away_since = self._clock() if self._away_since is None else self._away_since
        if self._connector:
            self._connector.connect(self._open_epochs())

    # To the spool, and from there to the database.

    def _spool_waiting(self) -> None:
        """Keep the flush in flight and the batches that have come meanwhile."""
        if self._flight and not self._flight.is_spooled:
            self.complaints.add(logging.WARNING, SLOW)
            self._flight.is_spooled = True
            self._append(self._flight.waiting, self._flight.number)
        self.beat += 1
        # Clients that send a lot must not fill the spool faster than it is replayed, if it is.
        now = self._clock()
        is_late = now - self._taken_since > PATIENCE_S or now - self._patient_until > REPLAY_TURN_S
        if waiting := self._take(wait=False, events_max=sys.maxsize if is_late else self._allowance):
            self._allowance -= sum(pending.batch.accepted for pending in waiting)
            self._append(waiting, self._next_number())

    def _keep_quarantined(self, waiting: Sequence[Pending]) -> list[Pending]:
        """Put the bad events of batches into the quarantine; return the batches that can go on."""
        going = []
        for pending in waiting:
            try:
                if pending.batch.quarantined:
                    self._tell_landed()  # they should not wait for the disk
                    pending.kept += self._spool.quarantine(pending.batch.quarantined)
                    pending.batch.quarantined = []
                going.append(pending)
            except SpoolError as error:
                self._refuse([pending], error)
        return going

    def _append(self, waiting: Sequence[Pending], number: int, epoch: str = "") -> None:
        """Store batches in the spool, as the flush of that number, and give each its verdict.

        It is a flush of ours, or of the lane that had the epoch.
        """
        self._tell_landed()
        started = self._clock()
        texts, going = [], []
        for pending in waiting:
            try:
                texts.append(batch_text(pending.batch))
                going.append(pending)
            except RecursionError:
                pending.refuse(InvalidBody("the body's JSON is nested too deeply"))
        events = sum(pending.batch.accepted for pending in going)
        quarantined = [item for pending in going for item in pending.batch.quarantined]
        try:
            self._spool.append(number, events, texts, quarantined, epoch)
        except SpoolError as error:
            self._refuse(going, error)
        else:
            self.metrics.spooled += events
            self.metrics.spool_seconds.observe(self._clock() - started)
            self._settle(going, started, SPOOL)

    def _refuse(self, waiting: Sequence[Pending], error: SpoolError) -> None:
        text = f"requests are answered with 503: {error.reason}"
        self.complaints.add(logging.ERROR, text, count=len(waiting))
        self._publish(error.reason, self._condition.oldest)
        for pending in waiting:
            with contextlib.suppress(SpoolError):
                if pending.kept:  # the client will send them again
                    self._spool.release(pending.kept)
            pending.refuse(StorageAway("events cannot be stored now, send them again later"))

    def _replay(self, session: Session) -> None:
        """Replay the first flushes of the spool in one transaction."""
        self._progress = self._progress or Progress(self._spool.events, self._clock, self.complaints)
        self._patient_until = self._clock()  # nobody waits for this
        try:
            flushes = self._spool.head(self._replay_events)
            if flushes[0].epoch not in session.ledger:
                self._look_up(session, flushes[0].epoch)
            self._replay_group(session, flushes)
            if not self._spool.events:
                self._finish_replay()
        except SpoolError as error:
            self.complaints.add(logging.ERROR, f"the replay is held up: {error.reason}")
            self._lose(DatabaseAway(error.reason))
        except DatabaseConflict as error:
            self._conflicts += 1
            self._roll_back(session)
            if self._conflicts % CONFLICT_TRIES == 0 and self._session:
                self._lose(error)  # which tries again with back-off
        except DatabaseMisconfigured as error:
            self._roll_back(session)
            self._suspect = True
            if self._session:
                self._lose(error)
        except (DatabaseAway, DataRefused) as error:
            self._replay_events = max(self._replay_events // 4, 1)
            self._lose(error)
        self._statement_timeout = STATEMENT_TIMEOUT_S

    def _look_up(self, session: Session, epoch: str) -> None:
        """Find out what is stored of an epoch that a lane had. Waits for a flush of it that still runs."""
        rows = self._run(session, Message(f"{FLUSH_START}{read_ledger_sql([epoch])};\nCOMMIT"))
        if not rows:
            raise DatabaseAway(LEDGER_EMPTIED)
        session.ledger[epoch] = int(rows[0][1])

    def _replay_group(self, session: Session, flushes: Sequence[SpooledFlush]) -> None:
        epoch = flushes[0].epoch
        stored = session.ledger[epoch]
        if flushes[0].number <= stored:  # its COMMIT had come through
            there = [flush for flush in flushes if flush.number <= stored]
            self._delete(there)
            self.metrics.replayed += sum(map(events_in, there))
            return
        group = self._replayer.group(flushes)
        if group.bad:
            self._quarantine(group, group.bad)
        raising = Raise(epoch, stored, flushes[-1].number)
        is_patient = self._replay_events == 1  # too slow even for a single flush, which cannot be divided
        if is_patient:
            self._statement_timeout = LONG_STATEMENT_TIMEOUT_S
        start = session.begin(raising, is_patient)
        events = len(group.places)
        if group.places:
            message = flush_message(start, group.parts)
            self._skipped.clear()
            try:
                self._run(session, message)
                self._note_skipped(session, message, group.counts)
            except DataRefused:
                events -= self._replay_sifted(session, group, start)
            except DatabaseMisconfigured:
                if not self._suspect:  # the connector looks first whether the tables are there
                    raise
                events -= self._replay_sifted(session, group, start)
            self._succeed(session, raising)
            self._replay_events = min(self._replay_events * 2, REPLAY_EVENTS_MAX)
        self._delete(flushes)
        self.metrics.replayed += events

    def _replay_sifted(self, session: Session, group: Group, start: str) -> int:
        """Replay what the database takes of a group that it refused as a whole.

        Returns how many events it does not take.
        """
        self._run(session, Message("ROLLBACK"))
        rows = self._replayer.rows(group)
        refused = self._sift(session, start, rows, len(rows) + 1)
        ours = [error for error in refused.values() if isinstance(error, DatabaseMisconfigured)]
        if ours and (not self._suspect or len(ours) * 2 >= len(rows)):
            raise ours[0]
        # Durable before COMMIT: afterwards nobody would look at these flushes again.
        bad = {
            group.places[row]: refused_event(group, row, rows[row][0].name, error)
            for row, error in refused.items()
        }
        if bad:
            self._quarantine(group, bad)
        self._run(session, Message("COMMIT"))
        return len(bad)

    def _quarantine(self, group: Group, bad: Mapping[tuple[int, int, int], Quarantined]) -> None:
        """Move events from spooled flushes to the quarantine."""
        self._spool.amend(amended(group, group.bad.keys() | bad.keys()), list(bad.values()))
        self.metrics.quarantined += len(bad)
        for (index, _batch, _event), item in bad.items():
            self._quarantined += 1
            flush = group.flushes[index]
            is_retried = flush.epoch == self._spool.epoch and flush.number <= self._retried_until
            if self._retried is not None and is_retried:
                self._retried[item.reason] += 1
            text = f"a spooled event goes to the quarantine: {item.reason}"
            # The reason may quote the event.
            self.complaints.add(logging.WARNING, text, f"quarantine {item.app_id} {item.table} {item.column}")

    def _delete(self, flushes: Sequence[SpooledFlush]) -> None:
        self._spool.delete(flushes)
        if self._progress:
            self._progress.add(sum(flush.events for flush in flushes), self._spool.events)

    def _finish_replay(self) -> None:
        if self._progress:
            self._progress.finish(self._quarantined)
        self._progress = None
        self._quarantined = 0
        self._report_retry()
        try:
            self._spool.shrink()
        except SpoolError as error:  # somebody reads it; another time
            log.debug("%s", error.reason)
        self._finish_epochs()

    def _report_retry(self) -> None:
        """Say what came of --retry_quarantine, once."""
        if self._retried is None:
            return
        stay = self._retried.total()
        where = "went through" if self._connector else "fit by now"
        log.info(
            "quarantine: %d of %d events %s, %d stay",
            self._retried_events - stay,
            self._retried_events,
            where,
            stay,
        )
        for reason, count in self._retried.most_common(REASONS_MAX):
            log.warning("quarantine: %d stay: %s", count, reason)
        self._retried = None

    def _finish_epochs(self) -> None:
        """Take processes that have ended, and whose events are all replayed, out of the ledger."""
        others = [epoch for epoch in self._open_epochs() if epoch != self._spool.epoch]
        if not self._session or self._spool.events:
            return
        self._tell_landed()
        try:
            if others:
                self._spool.finish(others)
                for epoch in others:
                    self._session.ledger.pop(epoch, None)
            self._forget_finished(self._session)
        except DatabaseAway as error:
            self._lose(error)
        except (DatabaseError, SpoolError) as error:
            log.debug("old processes stay in the ledger: %s", error)

    def _forget_finished(self, session: Session) -> None:
        if finished := self._spool.finished:
            rows = self._run(session, Message(finish_epochs_sql(finished)))
            remaining = {epoch for (epoch,) in rows}
            self._spool.forget([epoch for epoch in finished if epoch not in remaining])


# --- HTTP ---------------------------------------------------------------------
# Strict parsing, one handler per connection, a bounded pool of threads. The
# parsing is our own because http.server's is neither fast nor safe behind a proxy:
# it takes `Content-Length: +5`, lets Content-Length and Transfer-Encoding disagree
# and drops headers after a malformed line, all of which smuggle requests.

# The one map from what went wrong to HTTP; subclasses inherit.
STATUSES: Mapping[type[RequestError], HTTPStatus] = {
    MalformedRequest: HTTPStatus.BAD_REQUEST,
    InvalidBody: HTTPStatus.BAD_REQUEST,
    InvalidEvents: HTTPStatus.BAD_REQUEST,
    WrongKey: HTTPStatus.FORBIDDEN,
    OriginRefused: HTTPStatus.FORBIDDEN,
    UnknownPath: HTTPStatus.NOT_FOUND,
    TableRefused: HTTPStatus.NOT_FOUND,
    MethodRefused: HTTPStatus.METHOD_NOT_ALLOWED,
    RequestTooSlow: HTTPStatus.REQUEST_TIMEOUT,
    LengthMissing: HTTPStatus.LENGTH_REQUIRED,
    BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    TargetTooLong: HTTPStatus.REQUEST_URI_TOO_LONG,
    MediaRefused: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HeadersTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    NotImplementedHere: HTTPStatus.NOT_IMPLEMENTED,
    StorageAway: HTTPStatus.SERVICE_UNAVAILABLE,
    TooManyConnections: HTTPStatus.SERVICE_UNAVAILABLE,
}

# What a status brings with it (RFC 9110, sections 15.5.6, 15.5.16 and 15.6.4).
STATUS_HEADERS: Mapping[HTTPStatus, str] = {
    HTTPStatus.METHOD_NOT_ALLOWED: "Allow: POST, OPTIONS\r\n",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: (
        "Accept: application/json, text/plain\r\nAccept-Encoding: gzip, deflate\r\n"
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: f"Retry-After: {RETRY_AFTER_S}\r\n",
}

KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
MEDIA_TYPES = frozenset({"application/json", "text/plain", ""})
CODINGS = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}

REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")  # RFC 9112, section 5
HOST = re.compile(r"(?:[0-9A-Za-z._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
TARGET = re.compile(r"(?:(?i:https?)://[^/?#]*)?/apps/([^/?#]+)/events(?:\?[^#]*)?")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*(?=\r\n|$)", re.IGNORECASE)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~]*)?")

# Bytes that no head has: bare line feeds and carriage returns, other control characters. Seeing one
# early answers a client that speaks another protocol (TLS, say) at once.
FORBIDDEN = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
ONCE_ONLY = frozenset(
    {"host", "content-length", "transfer-encoding", "content-type", "content-encoding", "origin"}
)


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head. `length` is the body's, or None for a chunked body."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case; repeated fields joined by ", "
    length: int | None
    keep_alive: bool
    expects_continue: bool


def check_request_line(line: str) -> tuple[str, str, str]:
    """Return the method, the target and the minor version (RFC 9112, section 3)."""
    if len(line) > REQUEST_LINE_BYTES_MAX:
        raise TargetTooLong(f"the request line has more than {REQUEST_LINE_BYTES_MAX} bytes")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise MalformedRequest(f"malformed request line {show(line)}")
    method, target, major, minor = match.groups()
    if major != "1":
        raise MalformedRequest(f"HTTP/{major}.{minor} is not supported, use HTTP/1.1")
    return method, target, minor


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    """Return header fields by lower-case name."""
    if len(fields) > HEADER_COUNT_MAX:
        raise HeadersTooLarge(f"{len(fields)} header fields; a request may have {HEADER_COUNT_MAX}")
    if sum(map(len, fields)) > HEADER_BYTES_MAX:
        raise HeadersTooLarge(f"the header fields have more than {HEADER_BYTES_MAX} bytes")
    headers: dict[str, str] = {}
    for line in fields:
        match = FIELD.fullmatch(line)
        if not match:
            kind = "folded" if line[:1] in (" ", "\t") else "malformed"
            raise MalformedRequest(f"{kind} header line {show(line)}")
        name = match[1].lower()
        value = match[2].rstrip(" \t")
        if name in headers:
            if name in ONCE_ONLY:
                raise MalformedRequest(f"the header {name} stands twice")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def body_length(headers: Mapping[str, str], minor: str) -> int | None:
    """Return the length of the body, or None if it is chunked (RFC 9112, section 6.3)."""
    coding = headers.get("transfer-encoding")
    length = headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise MalformedRequest("both Content-Length and Transfer-Encoding")
        if minor == "0":
            raise MalformedRequest("Transfer-Encoding in HTTP/1.0")
        codings = [item.strip(" \t").lower() for item in coding.split(",")]
        if set(codings) != {"chunked"}:
            raise NotImplementedHere(f"the transfer coding {show(coding)} is not supported, only chunked")
        if len(codings) > 1:
            raise MalformedRequest("chunked twice")
        return None
    if length is None:
        return 0
    if not length.isascii() or not length.isdigit() or len(length) > 18:
        raise MalformedRequest(f"malformed Content-Length {show(length)}")
    return int(length)


def parse_head(head: bytes) -> Head:
    """Return a parsed request head (without its final empty line).

    Raises MalformedRequest, NotImplementedHere, TargetTooLong or HeadersTooLarge (RFC 9112).
    """
    request_line, *fields = head.decode("latin-1").split("\r\n")
    method, target, minor = check_request_line(request_line)
    headers = parse_fields(fields)
    if minor != "0" and "host" not in headers:
        raise MalformedRequest("the Host header is missing")
    if not HOST.fullmatch(headers.get("host", "")):
        raise MalformedRequest(f"malformed Host header {show(headers['host'])}")
    connection = headers.get("connection", "").lower().replace(" ", "").split(",")
    return Head(
        method,
        target,
        headers,
        body_length(headers, minor),
        keep_alive="close" not in connection and (minor != "0" or "keep-alive" in connection),
        expects_continue=minor != "0" and headers.get("expect", "").lower() == "100-continue",
    )


def check_partial_head(head: bytes) -> None:
    """Raise for the beginning of a head that cannot become a good one."""
    if FORBIDDEN.search(head):
        raise MalformedRequest("a control character, or a line that does not end in CR LF")
    line_end = head.find(b"\r\n")
    if line_end < 0 and len(head) > REQUEST_LINE_BYTES_MAX:
        raise TargetTooLong(f"the request line has more than {REQUEST_LINE_BYTES_MAX} bytes")
    if line_end >= 0:  # HTTP/0.9, for example, sends no more than this
        check_request_line(head[:line_end].decode("latin-1"))
    if len(head) - line_end > HEADER_BYTES_MAX + 2 * HEADER_COUNT_MAX:
        raise HeadersTooLarge(f"the header fields have more than {HEADER_BYTES_MAX} bytes")


def check_media_type(headers: Mapping[str, str]) -> None:
    """Raise MediaRefused unless the body is JSON, or text as navigator.sendBeacon() sends it."""
    full = headers.get("content-type", "")
    kind, *parameters = (part.strip(" \t").lower() for part in full.split(";"))
    charsets = [
        value.strip('"') for name, _, value in (p.partition("=") for p in parameters) if name == "charset"
    ]
    if kind not in MEDIA_TYPES or any(charset not in ("utf-8", "utf8", "us-ascii") for charset in charsets):
        raise MediaRefused(f"the content type {show(full)} is not supported, send application/json in UTF-8")


def content_coding(headers: Mapping[str, str]) -> str:
    """Return "gzip", "deflate" or "". Raises MediaRefused for other codings."""
    coding = headers.get("content-encoding", "")
    if coding.lower() not in CODINGS:
        raise MediaRefused(f"the content encoding {show(coding)} is not supported, only gzip and deflate")
    return CODINGS[coding.lower()]


EXPOSED = "Access-Control-Expose-Headers: Retry-After\r\n"
ANY_ORIGIN = f"Access-Control-Allow-Origin: *\r\n{EXPOSED}"


class Cors:
    """The CORS headers of one app's answers (fetch.spec.whatwg.org, 3.2)."""

    def __init__(self, intake: Intake) -> None:
        self._origins = intake.app.origins
        names = ("Content-Type", "Content-Encoding", *intake.headers)
        self._preflight = (
            "Access-Control-Allow-Methods: POST\r\n"
            f"Access-Control-Allow-Headers: {', '.join(names)}\r\n"
            f"Access-Control-Max-Age: {PREFLIGHT_AGE_S}\r\n"
        )

    def allows(self, origin: str | None) -> bool:
        """Return whether a request with this Origin header is let in. Only browsers send one."""
        return origin is None or self._origins is None or origin.lower() in self._origins

    def headers(self, origin: str | None, preflight: bool = False) -> str:
        """Return the header lines of an answer."""
        if self._origins is None:
            lines = ANY_ORIGIN
        elif origin is not None and self.allows(origin):
            lines = f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n{EXPOSED}"
        else:
            return "Vary: Origin\r\n"
        return lines + (self._preflight if preflight else "")


def is_established(sock: socket.socket) -> bool:
    """Return whether the other side of a TCP connection may still send (tcp(7): tcpi_state)."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"
    except (OSError, AttributeError):  # another kind of socket, another system
        return False


class Incoming:
    """What a client sends, read under deadlines rather than per-read time-outs.

    Its methods raise RequestTooSlow at the deadline, MalformedRequest when the client stops early,
    and OSError when the connection breaks.
    """

    def __init__(self, sock: socket.socket, clock: Callable[[], float]) -> None:
        self._sock = sock
        self._clock = clock
        self._buffer = b""
        self._at = 0  # what is before it has been taken
        self._waits_s: float = HEAD_DEADLINE_S  # what limit_wait() was told last, by Server.server_bind()

    def wait(self, seconds: float) -> bool:
        """Return whether the next request has begun; False at the end of input or after `seconds`."""
        try:
            return self._at < len(self._buffer) or self._extend(self._receive(seconds))
        except RequestTooSlow:
            return False

    def head(self) -> bytes:
        """Return a request's head without its final empty line. Call it after wait()."""
        end = self._buffer.find(b"\r\n\r\n", self._at)
        if end < 0 or self._buffer.startswith(b"\r\n", self._at):
            end = self._await_head(self._clock() + HEAD_DEADLINE_S)
        head = self._buffer[self._at : end]
        self._at = end + 4
        return head

    def exactly(self, size: int, deadline: float) -> bytes:
        """Return `size` bytes of the body."""
        taken = self._take(size)
        missing = size - len(taken)
        if not missing:
            return taken
        parts = [taken]
        while missing:
            data = self._receive_more(deadline, missing)
            if not data:
                raise MalformedRequest(f"the body ended {missing} bytes early")
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def line(self, limit: int, deadline: float) -> bytes:
        """Return a line without its CRLF."""
        while (end := self._buffer.find(b"\r\n", self._at)) < 0 and len(self._buffer) - self._at <= limit:
            if not self._extend(self._receive_more(deadline)):
                raise MalformedRequest("the connection ended in the middle of a chunked body")
        if not 0 <= end - self._at <= limit:
            raise MalformedRequest(f"a line of more than {limit} bytes in a chunked body")
        line = self._buffer[self._at : end]
        self._at = end + 2
        return line

    def chunked(self, limit: int, deadline: float) -> bytes:
        """Return a chunked body (RFC 9112, section 7.1). Raises BodyTooLarge beyond `limit` bytes."""
        parts, total = [], 0
        while True:
            match = CHUNK_LINE.fullmatch(self.line(CHUNK_LINE_BYTES_MAX, deadline))
            if not match:
                raise MalformedRequest("malformed chunk size")
            size = int(match[1], 16)
            total += size
            if total > limit:
                raise BodyTooLarge(f"the body has more than {limit} bytes")
            if not size:
                break
            parts.append(self.exactly(size, deadline))
            if self.exactly(2, deadline) != b"\r\n":
                raise MalformedRequest("a chunk is longer than its size says")
        self._skip_trailers(deadline)
        return b"".join(parts)

    def drain(self, deadline: float) -> None:
        """Read and drop what still comes, until the client stops or the deadline."""
        try:
            while self._receive(deadline - self._clock()):
                pass
        except (RequestTooSlow, OSError):
            return

    def _await_head(self, deadline: float) -> int:
        """Return where the head ends, when all of it is there and nothing before it."""
        while True:
            # An empty line before the request line is ignored (RFC 9112, section 2.2).
            while self._buffer.startswith(b"\r\n", self._at):
                self._at += 2
            end = self._buffer.find(b"\r\n\r\n", self._at)
            if end > self._at:
                return end
            check_partial_head(self._buffer[self._at :])
            if not self._extend(self._receive_more(deadline)):
                raise MalformedRequest("the connection ended in the middle of the request's head")

    def _take(self, size: int) -> bytes:
        """Return at most `size` bytes of what is there."""
        taken = self._buffer[self._at : self._at + size]
        self._at += len(taken)
        if self._at == len(self._buffer):  # do not keep a large body while its events are stored
            self._buffer, self._at = b"", 0
        return taken

    def _skip_trailers(self, deadline: float) -> None:
        trailers: list[str] = []
        while line := self.line(HEADER_BYTES_MAX, deadline):
            trailers.append(line.decode("latin-1"))
            if len(trailers) > HEADER_COUNT_MAX:
                break
        parse_fields(trailers)

    def _extend(self, data: bytes) -> bool:
        """Add what was received to the buffer; return False at the end of input."""
        self._buffer = self._buffer[self._at :] + data if self._at < len(self._buffer) else data
        self._at = 0
        return bool(data)

    def _receive_more(self, deadline: float, size: int = 0) -> bytes:
        """Receive in the middle of a request, where Service.end_idle() may have faked an end of input."""
        while not (data := self._receive(deadline - self._clock(), size)):
            if not is_established(self._sock):
                break
            time.sleep(DRAIN_POLL_S)
        return data

    def _receive(self, seconds: float, size: int = 0) -> bytes:
        """Return what comes, b"" at the end of input.

        With a `size` waits until that much is there or RECEIVE_BYTES, the input ends or the time is over:
        not each piece of a large body wakes us.
        """
        if seconds <= 0:
            raise RequestTooSlow("the request did not arrive in time")
        if seconds != self._waits_s:
            limit_wait(self._sock, socket.SO_RCVTIMEO, seconds)
            self._waits_s = seconds
        try:
            return self._sock.recv(
                min(size or RECEIVE_BYTES, RECEIVE_BYTES), socket.MSG_WAITALL if size else 0
            )
        except BlockingIOError:
            raise RequestTooSlow("the request did not arrive in time") from None


def compile_apps(schema: Schema) -> Mapping[str, tuple[Intake, Cors]]:
    """Return what serves the requests of each app, by its id."""
    return {app_id: (intake, Cors(intake)) for app_id, intake in intakes(schema).items()}


class Service:
    """What all connections share: the apps, the writer, and the state of the process."""

    def __init__(
        self, schema: Schema, writer: Writer, body_bytes_max: int, clock: Callable[[], float]
    ) -> None:
        self.writer = writer
        self.metrics = writer.metrics
        self.observe_accepted = self.metrics.accepted_seconds.observe
        self.body_bytes_max = body_bytes_max
        self.clock = clock
        # Replaced as a whole by use().
        self.apps = compile_apps(schema)
        # Connections whose thread waits for a request. Set operations are atomic.
        self._idle: set[socket.socket] = set()
        # Set once, by the main thread: answers close their connections from then on.
        self.draining = False
        # Held while a large body is converted: their events would fill the memory, and small requests
        # would wait for all of them in turn to let go of the interpreter.
        self.converting = threading.Lock()
        # Counts the large batches that may still be converted and stored: their rows take as much memory
        # as their bodies once more.
        self.large_batches = threading.Semaphore(LARGE_BATCHES_MAX)
        self._ended = False
        self._date = (0, "")

    def use(self, schema: Schema) -> None:
        """Serve the apps of another schema, from the next request on. For any thread."""
        self.apps = compile_apps(schema)

    def find(self, target: str) -> tuple[Intake, Cors]:
        """Return the app that a request target names. Raises UnknownPath."""
        match = TARGET.fullmatch(target)
        if not match:
            raise UnknownPath("no such path; events go to /apps/<app>/events")
        try:
            app_id = unquote_to_bytes(match[1]).decode()
            return self.apps[app_id]
        except (KeyError, UnicodeDecodeError):
            raise UnknownPath(f"no such app {show(match[1])}") from None

    def await_request(self, sock: socket.socket, incoming: Incoming, seconds: float) -> bool:
        """Return whether another request comes; False when the connection should be closed."""
        self._idle.add(sock)
        try:
            # end_idle() sets the flag before it looks at the set: one of us sees the other.
            return not self._ended and incoming.wait(seconds)
        finally:
            self._idle.discard(sock)

    def has_idle(self) -> bool:
        """Return whether any connection waits for a request."""
        return bool(self._idle)

    def end_idle(self) -> None:
        """Let no connection wait for another request. What has begun is still answered."""
        self._ended = True
        for sock in self._idle.copy():
            try:
                sock.shutdown(socket.SHUT_RD)
            except OSError:
                log.debug("a client had closed its connection")

    def date(self) -> str:
        """Return the Date of answers (RFC 9110, section 6.6.1); formatted once a second."""
        now = int(time.time())
        second, text = self._date
        if now != second:
            text = formatdate(now, usegmt=True)
            self._date = (now, text)
        return text

    def answer(self, status: HTTPStatus, text: str, headers: str) -> bytes:
        """Return a whole answer, to be sent at once; `text` is its JSON body in ASCII, or ""."""
        kind = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
        head = f"HTTP/1.1 {status} {status.phrase}\r\nDate: {self.date()}\r\n"
        return f"{head}{kind}{headers}\r\n{text}".encode("latin-1")


def problems_json(problems: Iterable[EventProblem]) -> list[dict[str, object]]:
    return [
        {"index": problem.index, "column": problem.column, "reason": problem.reason} for problem in problems
    ]


def accepted_text(batch: Batch, place: str) -> str:
    """Return the JSON body that confirms a batch."""
    if not batch.warnings and not batch.problems:  # written out: half the time of json.dumps
        return f'{{"accepted": {batch.accepted}, "stored": "{place}"}}\n'
    accepted: dict[str, object] = {"accepted": batch.accepted, "stored": place}
    if batch.warnings:
        accepted["warnings"] = batch.warnings
    if batch.problems:
        accepted["quarantined"] = problems_json(batch.problems)
    return json.dumps(accepted) + "\n"


def error_text(error: RequestError) -> str:
    """Return the JSON body that explains a refusal."""
    body: dict[str, object] = {"error": error.reason}
    if isinstance(error, InvalidEvents):
        body["events"] = problems_json(error.problems)
    return json.dumps(body) + "\n"


def status_of(error: RequestError) -> HTTPStatus:
    """Return the status for an error, by its class or the nearest one above it."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


class Handler(BaseRequestHandler):
    """Serves one client connection: request after request, until one of us closes it.

    The writer's thread sends the answers to batches, so that this one sleeps once per request and not
    twice: it waits for the next request right away, and for the answer only when one comes.
    """

    server: Server
    request: socket.socket

    def setup(self) -> None:
        self._service = self.server.service
        self._incoming = Incoming(self.request, self._service.clock)
        # The last head that was let in, and what came of it: clients that keep their connection
        # repeat it byte for byte, but for the number in Content-Length. Good for these apps only.
        self._last_apps = self._service.apps
        self._last: tuple[bytes, bytes, Head, Intake, str] | None = None
        # Whether the connection ends with the answer that the writer's thread sends: it closes it then.
        self.has_parted = False
        # About the request that is being served. The writer's thread has it until _answered can be had.
        self._answered: threading.Lock | None = None
        self._head: Head | None = None
        self._intake: Intake | None = None
        self._cors = ANY_ORIGIN
        self._body_unread = False
        self._started = 0.0
        self._is_large = False
        self._unsent = b""  # of the last answer, because the client does not read
        # Held by the thread that sends it: this one, or another while this one waits for the next request.
        self._sending = threading.Lock()

    def handle(self) -> None:
        try:
            seconds: float = HEAD_DEADLINE_S
            while self._service.await_request(self.request, self._incoming, seconds):
                self._await_answer()
                self._send_unsent()  # before the next answer
                if not self._exchange():
                    break
                seconds = IDLE_CROWDED_S if self.server.pool.is_crowded() else IDLE_S
            if self.has_parted:  # The answer, and what of it may be unsent, is not ours any more.
                return
            self._await_answer()
            self._send_unsent()
            if self._body_unread:
                self._linger()
        except OSError as error:  # the client is gone: nobody to answer
            log.debug("%s: %s", self.client_address[0], reason_of(error))
        finally:
            self._await_answer()  # it must not meet a closed socket, nor that of another client
            if not self.has_parted:
                with self._sending:  # and neither must what is left of it
                    self._unsent = b""

    def _await_answer(self) -> None:
        """Wait until the writer has sent the answer to the last batch, if there is one."""
        if self._answered:
            self._answered.acquire()
            self._answered = None

    def _send(self, data: bytes) -> None:
        """Send what there is to send. Blocks up to SEND_TIMEOUT_S for a client that does not read."""
        if data:
            self.request.sendall(data)

    def _send_unsent(self) -> None:
        """Send what is left of the last answer. Blocks as _send() does, also while another thread sends."""
        with self._sending:
            data, self._unsent = self._unsent, b""
            try:
                self._send(data)
            except OSError:
                # Half an answer: nothing may follow it.
                with contextlib.suppress(OSError):
                    self.request.shutdown(socket.SHUT_RDWR)
                raise

    def _exchange(self) -> bool:
        """Serve one request; return whether there may be another."""
        self._started = self._service.clock()
        try:
            batch = self._serve()
        except RequestError as error:
            answer, keep = self._refusal(error)
            self._send(answer)
            return keep
        if batch is None:
            answer, keep = self._answer(HTTPStatus.NO_CONTENT, "")
            self._service.metrics.answer(HTTPStatus.NO_CONTENT, self._service.clock() - self._started)
            self._send(answer)
            return keep
        if self._head is None or not self._head.keep_alive:
            self.has_parted = True  # From here on the writer's thread has everything.
            self._service.writer.submit(batch, self._tell)
            return False
        self._answered = self._service.writer.submit(batch, self._tell)
        return True

    def _tell(self, batch: Batch, verdict: str | RequestError) -> None:
        """Send the answer to a batch. Called by the writer's thread; does not block."""
        if isinstance(verdict, RequestError):
            answer, keep = self._refusal(verdict, batch.accepted + len(batch.quarantined))
        else:
            answer, keep = self._answer(HTTPStatus.OK, accepted_text(batch, verdict))
            self._service.observe_accepted(self._service.clock() - self._started)
        if self._is_large:
            self._is_large = False
            self._service.large_batches.release()
        try:
            self._unsent = answer[self.request.send(answer, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            self._unsent = answer
        except OSError as error:
            log.debug("%s: %s", self.client_address[0], reason_of(error))
        if self.has_parted and self._unsent:
            self.server.pool.go_on(self._send_rest)
        elif self.has_parted:
            self.server.close_connection(self.request)
        elif not keep:
            self._wake()
        elif self._unsent:
            self.server.pool.go_on(self._send_meanwhile)

    def _wake(self) -> None:
        """Let the connection's own thread see that no other request will be served."""
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RD)

    def _send_meanwhile(self) -> None:
        """Send what the writer's thread could not, while the connection's own thread waits for a request."""
        try:
            self._send_unsent()
        except OSError as error:
            log.debug("%s: %s", self.client_address[0], reason_of(error))

    def _send_rest(self) -> None:
        """Send what the writer's thread could not, and close the connection."""
        try:
            self._send(self._unsent)
        except OSError as error:
            log.debug("%s: %s", self.client_address[0], reason_of(error))
        finally:
            self.server.close_connection(self.request)

    def _refusal(self, error: RequestError, events: int = 1) -> tuple[bytes, bool]:
        """Return the answer that refuses a request or its events; count it."""
        status = status_of(error)
        app_id = self._intake.app.id if self._intake else ""
        self._service.metrics.refuse(error, app_id, events)
        self._service.metrics.answer(status, self._service.clock() - self._started)
        return self._answer(status, error_text(error), error.reason)

    def _answer(self, status: HTTPStatus, text: str, reason: str = "") -> tuple[bytes, bool]:
        """Return an answer and whether the connection stays open after it; log it."""
        head = self._head
        keep = head is not None and head.keep_alive and not self._body_unread and not self._service.draining
        headers = self._cors + STATUS_HEADERS.get(status, "")
        headers += "Connection: keep-alive\r\n" if keep else "Connection: close\r\n"
        answer = self._service.answer(status, text, headers)
        if head and head.method == "HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        if log.isEnabledFor(logging.DEBUG):
            # Without the query: whoever mistakes the API puts the key there.
            line = f"{head.method} {head.target.partition('?')[0]}" if head else "-"
            milliseconds = (self._service.clock() - self._started) * 1e3
            log.debug("%s %s -> %d, %.1f ms %s", self.client_address[0], line, status, milliseconds, reason)
        return answer, keep

    def _serve(self) -> Batch | None:
        """Read a request; return its batch, or None for a preflight that is allowed."""
        self._body_unread = True
        head, length, intake = self._let_in()
        if head.expects_continue and length != 0:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.method == "OPTIONS":
            self._read_body(length)
            return None
        return self._receive_batch(head, length, intake)

    def _receive_batch(self, head: Head, length: int | None, intake: Intake) -> Batch:
        """Read and convert the body."""
        body = self._read_body(length)
        if coding := content_coding(head.headers):
            body = inflate(body, coding, self._service.body_bytes_max)
        delivery = Delivery(head.headers, self.client_address[0], time.time())
        if len(body) <= LARGE_BODY_BYTES:
            return intake.batch(body, delivery)
        self._service.large_batches.acquire()
        try:
            with self._service.converting:
                batch = intake.batch(body, delivery)
        except BaseException:
            self._service.large_batches.release()
            raise
        self._is_large = True
        return batch

    def _let_in(self) -> tuple[Head, int | None, Intake]:
        """Read a request's head; return it, the length of its body and its app.

        Raises a RequestError if the request may not go on.
        """
        self._head, self._intake, self._cors = None, None, ANY_ORIGIN
        raw = self._incoming.head()
        apps = self._service.apps  # before find() looks at them: these or later ones
        if self._last and apps is self._last_apps:
            before, after, head, intake, cors = self._last
            length = raw[len(before) : len(raw) - len(after)]
            if raw.startswith(before) and raw.endswith(after) and self._is_allowed_length(length):
                self._head, self._intake, self._cors = head, intake, cors
                return head, int(length), intake
        head = self._head = parse_head(raw)
        try:
            intake = self._admit(head)
        except RequestError:
            # Read the body all the same, so that the connection can go on. Not if the client waits
            # for a go-ahead that it will not get, nor if the body is too large.
            if not head.expects_continue and (head.length or 0) <= self._service.body_bytes_max:
                self._read_body(head.length)
            raise
        # If a column takes the length, each request needs its own head.
        repeats = head.length is not None and "content-length" not in intake.headers
        number = CONTENT_LENGTH.search(raw) if repeats else None
        self._last_apps = apps
        self._last = (
            (raw[: number.start(1)], raw[number.end(1) :], head, intake, self._cors) if number else None
        )
        return head, head.length, intake

    def _is_allowed_length(self, text: bytes) -> bool:
        return text.isdigit() and len(text) <= 18 and int(text) <= self._service.body_bytes_max

    def _admit(self, head: Head) -> Intake:
        """Return the app of a request whose head is in order; raise a RequestError otherwise."""
        if head.method not in KNOWN_METHODS:
            raise NotImplementedHere(f"the method {show(head.method)} is not known")
        intake, cors = self._service.find(head.target)
        self._intake = intake
        origin = head.headers.get("origin")
        self._cors = cors.headers(origin, preflight=head.method == "OPTIONS")
        if head.method not in ("POST", "OPTIONS"):
            raise MethodRefused(f"{head.method} is not allowed here, use POST")
        if not cors.allows(origin):
            raise OriginRefused(f"the app does not allow the origin {show(origin)}")
        if head.method == "POST":
            if head.length is not None and "content-length" not in head.headers:
                raise LengthMissing("a POST needs a Content-Length or chunked Transfer-Encoding")
            check_media_type(head.headers)
            content_coding(head.headers)
        if head.length is not None and head.length > self._service.body_bytes_max:
            limit = self._service.body_bytes_max
            raise BodyTooLarge(f"the body has {head.length} bytes; a request may have {limit}")
        return intake

    def _read_body(self, length: int | None) -> bytes:
        """Return the body, of a known length or (None) chunked."""
        deadline = self._service.clock() + BODY_DEADLINE_S
        if length is None:
            body = self._incoming.chunked(self._service.body_bytes_max, deadline)
        else:
            body = self._incoming.exactly(length, deadline)
        self._body_unread = False
        return body

    def _linger(self) -> None:
        """Let the client read its answer: closing at once would reset the connection under it."""
        self.request.shutdown(socket.SHUT_WR)
        self._incoming.drain(self._service.clock() + LINGER_S)


class Pool:
    """Serves at most `limit` connections at once, in threads that are reused.

    A connection holds its place until release(), which may be later than the end of its job: the
    writer's thread may still have to answer it.
    """

    def __init__(self, limit: int, name: str, complaints: Complaints) -> None:
        self._limit = limit
        self._name = name
        self._complaints = complaints
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        # Guards _places, _full_since, _busy and _threads.
        self._lock = threading.Lock()
        # Notified when _places shrinks.
        self._released = threading.Condition(self._lock)
        self._places = 0  # taken by connections
        self._full_since = 0.0  # when the last place was taken
        self._busy = 0  # jobs that run or wait for their thread
        self._threads = 0

    def run(self, job: Callable[[], object]) -> bool:
        """Give a connection a place and run its job in a thread soon.

        Returns False if all places are taken or no thread can be made. Blocks at most PLACE_PATIENCE_S, and
        not while they have all been taken for longer than that.
        """
        with self._lock:
            if not self._await_place() or not self._find_thread():
                return False
            self._places += 1
            if self.is_full():
                self._full_since = time.monotonic()
        self._jobs.put(job)
        return True

    def go_on(self, job: Callable[[], object]) -> None:
        """Run another job of a connection that has a place."""
        with self._lock:
            if not self._find_thread():  # one of the others will come to it
                self._busy += 1
        self._jobs.put(job)

    def release(self) -> None:
        """Give the place of a connection back."""
        with self._lock:
            self._places -= 1
            self._released.notify_all()

    @property
    def busy(self) -> int:
        """Return how many connections have a place. Not exact, as it takes no lock."""
        return self._places

    def is_full(self) -> bool:
        """Return whether all places are taken. Not exact, as it takes no lock."""
        return self._places >= self._limit

    def is_crowded(self) -> bool:
        """Return whether places are scarce. Not exact, as it takes no lock."""
        return self._places * 4 > self._limit * 3

    def wait_until_quiet(self, seconds: float) -> bool:
        """Return whether all connections are gone. Blocks at most `seconds`."""
        with self._lock:
            return self._released.wait_for(lambda: not self._places, seconds)

    def _await_place(self) -> bool:
        patience = self._full_since + PLACE_PATIENCE_S - time.monotonic() if self.is_full() else 0
        return self._released.wait_for(lambda: not self.is_full(), max(patience, 0))

    def _find_thread(self) -> bool:
        """Count a job in; return False if there is no thread for it."""
        if self._busy >= self._threads and not self._add_thread():
            return False
        self._busy += 1
        return True

    def _add_thread(self) -> bool:
        try:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError as error:  # the system's limit of threads or memory
            self._complaints.add(logging.ERROR, f"cannot start a thread: {error}")
            return False
        self._threads += 1
        return True

    def _work(self) -> NoReturn:
        while True:
            job = self._jobs.get()
            job()
            del job  # it holds the connection
            with self._lock:
                self._busy -= 1


def describe_bug(error: BaseException | None) -> str:
    """Return an exception that nobody expected, and where it was raised, in one line."""
    if error is None:
        return "for no reason given"
    trace = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(trace[-1].filename).name}:{trace[-1].lineno}" if trace else ""
    return f"{type(error).__name__}{place}: {one_line(error)}"


class Server(ThreadingHTTPServer):
    """One listening socket. Several of them may share a service and its pools."""

    request_queue_size = LISTEN_BACKLOG
    dual_stack = False
    is_inherited = False  # The socket is systemd's, and stays open when we are gone

    def __init__(
        self, family: int, address: tuple[str, int], service: Service, pool: Pool, turning_away: Pool
    ) -> None:
        self.address_family = family
        self.service = service
        self.pool = pool
        self._turning_away = turning_away
        super().__init__(address, Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # `::` alone is for IPv4 as well; beside `0.0.0.0` it would collide with it.
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self.dual_stack)
        # HTTPServer's own would look the name up in DNS.
        TCPServer.server_bind(self)
        self._set_options()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def adopt(self, sock: socket.socket) -> None:
        """Take a socket that listens already, instead of server_bind() and server_activate()."""
        self.socket.close()
        self.socket = sock
        self.is_inherited = True
        self._set_options()
        self.server_address = sock.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def _set_options(self) -> None:
        """Set what the connections that are accepted inherit (on Linux, all but O_NONBLOCK)."""
        # Without it an answer can wait 40 ms for the client's delayed acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_wait(self.socket, socket.SO_RCVTIMEO, HEAD_DEADLINE_S)
        limit_wait(self.socket, socket.SO_SNDTIMEO, SEND_TIMEOUT_S)
        self.socket.setblocking(False)

    def _handle_request_noblock(self) -> None:
        """Accept the connections that wait, all of them: one per look at the socket takes longer."""
        with contextlib.suppress(OSError):
            for _ in range(LISTEN_BACKLOG):
                self.process_request(*self.get_request())

    def stop_accepting(self) -> None:
        """Accept what has connected already, and close the listening socket.

        What waits at an inherited socket is for the next process.
        """
        self.shutdown()
        if not self.is_inherited:
            # Closing would reset connections that the kernel has accepted for us.
            self._handle_request_noblock()
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                text = f"cannot accept connections: {reason_of(error)}"
                self.service.writer.complaints.add(logging.ERROR, text)
                time.sleep(ACCEPT_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in the pool; beyond its limit give the client a quick 503."""
        if self.pool.run(partial(self._serve, request, client_address)):
            return
        if self.pool.is_full():
            text = "clients get 503: there are more connections than --max_connections allows"
            self.service.writer.complaints.add(logging.WARNING, text)
        if not self._turning_away.run(partial(self._turn_away, request)):
            # So many that not even this can be done with patience.
            with contextlib.suppress(OSError):
                request.send(self._too_many(), socket.MSG_DONTWAIT)
            self.shutdown_request(request)

    def _serve(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and close it unless the writer's thread will."""
        has_parted = False
        try:
            handler = self.RequestHandlerClass(request, client_address, self)  # type: ignore[arg-type]
            has_parted = isinstance(handler, Handler) and handler.has_parted
        except Exception:  # noqa: BLE001  # as socketserver does: a bug in one connection is not the others'
            self.handle_error(request, client_address)
        if not has_parted:
            self.close_connection(request)

    def close_connection(self, request: socket.socket) -> None:
        """Close a client's connection, and give its place to another. Does not block."""
        self.shutdown_request(request)
        self.pool.release()

    def _too_many(self) -> bytes:
        error = TooManyConnections("too many connections, try again later")
        status = status_of(error)
        self.service.metrics.refuse(error)
        self.service.metrics.answer(status, None)
        headers = f"{ANY_ORIGIN}{STATUS_HEADERS[status]}Connection: close\r\n"
        return self.service.answer(status, error_text(error), headers)

    def _turn_away(self, sock: socket.socket) -> None:
        try:
            sock.sendall(self._too_many())
            sock.shutdown(socket.SHUT_WR)
            Incoming(sock, self.service.clock).drain(self.service.clock() + LINGER_S)
        except OSError as error:
            log.debug("a client that was turned away is gone: %s", reason_of(error))
        finally:
            self.shutdown_request(sock)
            self._turning_away.release()

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Log a bug of ours in one line; BaseServer would print a traceback."""
        bug = describe_bug(sys.exception())
        text = f"a connection from {client_address[0]} was cut: {bug}"
        self.service.writer.complaints.add(logging.ERROR, text, bug)


def addresses(host: str, port: int) -> list[tuple[int, str]]:
    """Return the (address family, address) pairs that a host to listen on stands for."""
    if host == "localhost":
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "not a host name"
        raise OperatorError(f"cannot listen on {show(host)}: {reason}") from None
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def bind_one(
    make_server: Callable[[int, tuple[str, int]], Server], family: int, address: tuple[str, int], alone: bool
) -> Server:
    """Return a bound server. Raises OSError."""
    server = make_server(family, address)
    server.dual_stack = alone
    try:
        server.server_bind()
    except OSError:
        server.server_close()
        raise
    return server


def shown_address(host: str, port: int) -> str:
    """Return host:port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cannot_listen(host: str, port: int, error: OSError, option: str) -> OperatorError:
    """Return why an address cannot be had, and what to do about it; `option` sets the port."""
    hints = {
        errno.EADDRINUSE: f"the port is in use; stop the other program or choose another port with {option}",
        errno.EACCES: f"permission denied; ports below 1024 need root, choose another with {option}",
        errno.EADDRNOTAVAIL: "this machine does not have the address",
    }
    hint = hints.get(error.errno or 0, reason_of(error))
    return OperatorError(f"cannot listen on {shown_address(host, port)}: {hint}")


def bind(
    host: str, port: int, make_server: Callable[[int, tuple[str, int]], Server], option: str = "--port"
) -> list[Server]:
    """Return servers bound to every address of a host, not listening yet.

    `localhost` is 127.0.0.1 and ::1. With port 0 the system chooses one, the same for all. Raises
    OperatorError, which names the option that sets the port.
    """
    servers: list[Server] = []
    places = addresses(host, port)
    for family, address in places:
        chosen = servers[0].server_port if servers else port
        try:
            servers.append(bind_one(make_server, family, (address, chosen), alone=len(places) == 1))
        except OSError as error:
            # A machine without IPv6 still has its localhost.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and host == "localhost" and servers:
                continue
            for server in servers:
                server.server_close()
            raise cannot_listen(address, port, error, option) from None
    return servers


def adopt(
    sockets: Iterable[socket.socket], make_server: Callable[[int, tuple[str, int]], Server]
) -> list[Server]:
    """Return servers for sockets that listen already."""
    servers = []
    for sock in sockets:
        servers.append(make_server(sock.family, sock.getsockname()[:2]))
        servers[-1].adopt(sock)
    return servers


def listen(servers: Sequence[Server], option: str = "--port") -> None:
    """Let connections come. Raises OperatorError: Linux lets two programs bind a port, but not listen."""
    for server in servers:
        if server.is_inherited:  # listening again would replace the length of its queue
            continue
        try:
            server.server_activate()
        except OSError as error:
            raise cannot_listen(str(server.server_name), server.server_port, error, option) from None


def addresses_text(servers: Iterable[Server]) -> str:
    """Return the URLs of servers, as in a sentence."""
    return " and ".join(f"http://{shown_address(*server.server_address[:2])}" for server in servers)  # type: ignore[arg-type]


# --- Monitor ------------------------------------------------------------------
# Health and metrics for the operator, on a port of localhost. It only looks: at what
# is counted, at what the writer tells of itself, and at the process.

MONITOR_OPTION = "--monitor_port"
# Host names under which the port may be asked. A website whose name points to 127.0.0.1 (DNS rebinding)
# has a browser ask under its own name.
LOCAL_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]*)?", re.IGNORECASE)
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def spool_size(path: str) -> int:
    """Return the bytes that the spool's files have together."""
    size = 0
    for name in (path, f"{path}-wal"):
        with contextlib.suppress(OSError):  # SQLite removes its journal when it likes
            size += os.stat(name).st_size
    return size


def files_max() -> float:
    """Return how many files the process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if limit == resource.RLIM_INFINITY else limit


def process_families(started_at: float) -> list[Family]:
    """Return what Prometheus' clients say of every process; what only Linux tells is left out elsewhere."""
    families = [
        one_sample(
            "process_start_time_seconds",
            "gauge",
            "Start time of the process since the Unix epoch in seconds.",
            started_at,
        ),
        one_sample(
            "process_cpu_seconds_total",
            "counter",
            "Total user and system CPU time spent in seconds.",
            time.process_time(),
        ),
        one_sample(
            "process_max_fds",
            "gauge",
            "Maximum number of open file descriptors.",
            files_max(),
        ),
    ]
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        families += [
            one_sample(
                "process_resident_memory_bytes",
                "gauge",
                "Resident memory size in bytes.",
                pages * resource.getpagesize(),
            ),
            one_sample(
                "process_open_fds",
                "gauge",
                "Number of open file descriptors.",
                len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists them
            ),
        ]
    return families


class Monitor:
    """Health and metrics of a service."""

    def __init__(self, service: Service, pool: Pool) -> None:
        self._service = service
        self._writer = service.writer
        self._pool = pool  # of the client connections
        self._started_at = time.time()
        self._started = service.clock()

    def health(self) -> tuple[HTTPStatus, str]:
        """Return whether events can be stored, as a status and as JSON. Blocks at most CHECK_UP_S."""
        condition, late = self._writer.condition()
        reason = self._failure(condition, late)
        database = "up" if condition.is_up else "away" if self._writer.has_database else "none"
        answer = {
            "status": "failing" if reason else "ok",
            "reason": reason or None,
            "database": database,
            "database_reason": condition.database_reason or None,
            "spool": {
                "path": self._writer.spool_path,
                "events": condition.spool_events,
                "bytes": spool_size(self._writer.spool_path),
                "limit": self._writer.spool_limit,
                "reason": condition.spool_reason or None,
            },
            "quarantine": condition.quarantine_events,
            "version": __version__,
            "uptime_seconds": round(self._service.clock() - self._started, 3),
        }
        status = HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK
        return status, json.dumps(answer) + "\n"

    def metrics(self) -> str:
        """Return all metrics in Prometheus' text format. Blocks at most CHECK_UP_S."""
        condition, _late = self._writer.condition()
        families = [*self._service.metrics.families(), *self._gauges(condition)]
        return exposition([*families, *process_families(self._started_at)])

    def _failure(self, condition: Condition, late: float) -> str:
        """Return why events cannot be stored, "" if they can."""
        if self._service.draining:
            return "draining: the server is about to end"
        if late > STALLED_S:
            return f"the writer has not moved for {late:.0f} s"
        if condition.is_direct or not condition.spool_reason:
            return ""
        if condition.is_up:
            return f"the spool is being replayed and takes no events: {condition.spool_reason}"
        if not self._writer.has_database:
            return condition.spool_reason
        return f"the database is away, and {condition.spool_reason}"

    def _gauges(self, condition: Condition) -> list[Family]:
        age = max(time.time() - condition.oldest, 0) if condition.oldest is not None else 0
        python = ".".join(map(str, sys.version_info[:3]))
        gauges = [
            ("spool_bytes", "Size of the spool's files.", spool_size(self._writer.spool_path)),
            ("spool_events", "Events in the spool that wait for their replay.", condition.spool_events),
            ("spool_limit_bytes", "How large the spool may grow.", self._writer.spool_limit),
            (
                "spool_oldest_event_age_seconds",
                "Time since the first event in the spool was received; 0 for an empty spool.",
                age,
            ),
            ("quarantine_events", "Events in the quarantine.", condition.quarantine_events),
            ("http_connections", "Client connections that are open.", self._pool.busy),
        ]
        if self._writer.has_database:
            gauges.append(
                ("database_up", "1 if the database could be used the last time, else 0.", condition.is_up)
            )
        info = one_sample(
            "attolytics_build_info", "gauge", "Always 1.", 1, version=__version__, python_version=python
        )
        return [
            *(one_sample(f"attolytics_{name}", "gauge", text, value) for name, text, value in gauges),
            info,
        ]


class MonitorHandler(BaseRequestHandler):
    """Answers one request on a connection."""

    server: MonitorServer
    request: socket.socket

    def handle(self) -> None:
        incoming = Incoming(self.request, time.monotonic)
        try:
            limit_wait(self.request, socket.SO_SNDTIMEO, SEND_TIMEOUT_S)
            if not incoming.wait(HEAD_DEADLINE_S):
                return
            is_head = False
            try:
                head = parse_head(incoming.head())
                is_head = head.method == "HEAD"
                status, kind, text = self._look_up(head)
            except RequestError as error:
                status, kind, text = status_of(error), TEXT_TYPE, f"{error.reason}\n"
            self.request.sendall(self._answer(status, kind, text, is_head))
            self.request.shutdown(socket.SHUT_WR)
            incoming.drain(time.monotonic() + LINGER_S)
        except OSError as error:
            log.debug("the monitor's client is gone: %s", reason_of(error))

    def _look_up(self, head: Head) -> tuple[HTTPStatus, str, str]:
        """Return the answer to a request: its status, its content type and its text."""
        monitor = self.server.monitor
        path = head.target.partition("?")[0]
        if not LOCAL_HOST.fullmatch(head.headers.get("host", "localhost")):
            return HTTPStatus.MISDIRECTED_REQUEST, TEXT_TYPE, "ask for localhost\n"
        if path not in ("/healthz", "/metrics"):
            return HTTPStatus.NOT_FOUND, TEXT_TYPE, "there are /healthz and /metrics\n"
        if head.method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT_TYPE, "use GET\n"
        if path == "/metrics":
            return HTTPStatus.OK, METRICS_TYPE, monitor.metrics()
        status, text = monitor.health()
        return status, JSON_TYPE, text

    def _answer(self, status: HTTPStatus, kind: str, text: str, is_head: bool) -> bytes:
        body = text.encode()
        allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"{allow}Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if is_head else body)


class MonitorServer(Server):
    """One listening socket of the monitor port."""

    def __init__(
        self, family: int, address: tuple[str, int], monitor: Monitor, service: Service, pool: Pool
    ) -> None:
        super().__init__(family, address, service, pool, pool)
        self.RequestHandlerClass = MonitorHandler
        self.monitor = monitor

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in the pool, or close it if that is full."""
        if not self.pool.run(partial(self._serve, request, client_address)):
            self.shutdown_request(request)


def bind_monitor(port: int | None, service: Service, connections: Pool) -> list[Server]:
    """Return servers for the monitor port of localhost, none if it is None. Raises OperatorError."""
    if port is None:
        return []
    monitor = Monitor(service, connections)
    pool = Pool(MONITOR_CONNECTIONS_MAX, "monitor", service.writer.complaints)
    return bind(
        "localhost",
        port,
        lambda family, address: MonitorServer(family, address, monitor, service, pool),
        MONITOR_OPTION,
    )


# --- systemd ------------------------------------------------------------------
# What systemd and a service say to each other: notifications (sd_notify(3): datagrams
# to a Unix socket), the watchdog (sd_watchdog_enabled(3)) and sockets that are handed
# over (sd_listen_fds(3)).

LISTEN_FDS_START = 3
LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class Notifier:
    """Tells systemd about our state; does nothing when systemd did not start us."""

    def __init__(self, path: str | None) -> None:
        # A leading @ stands for a NUL byte: Linux' abstract namespace.
        self._path = "\0" + path[1:] if path and path.startswith("@") else path

    def send(self, *lines: str) -> None:
        """Send one datagram, for example send("READY=1", "STATUS=listening"). Never raises or blocks."""
        if not self._path:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), self._path)
            except OSError as error:
                log.debug("cannot notify systemd: %s", reason_of(error))


def watchdog_interval(environ: Mapping[str, str], pid: int) -> float | None:
    """Return after how many seconds without a ping systemd ends process `pid`; None for never."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not re.fullmatch("[0-9]{1,18}", usec) or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(usec) / 1e6 or None


class Watchdog:
    """Pings systemd at half the interval, as long as the writer gets on. For one thread."""

    def __init__(
        self,
        interval_s: float | None,
        notifier: Notifier,
        writer: Writer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without an interval it does nothing."""
        self._half_s = (interval_s or math.inf) / 2
        self._notifier = notifier
        self._writer = writer
        self._clock = clock
        self._due = clock() + self._half_s
        self._beat: int | None = None  # of the writer, when we began to wait for the next one

    @property
    def look_s(self) -> float:
        """Return how often look() is to be called, in seconds."""
        return min(self._half_s / 4, SIGNAL_CHECK_S)

    def look(self) -> None:
        """Ping if it is time and the writer got on since the last call. Does not block."""
        now = self._clock()
        if now < self._due:
            return
        if self._beat is None:
            self._beat = self._writer.beat
            self._writer.prod()
        elif self._writer.beat != self._beat:
            self._notifier.send("WATCHDOG=1")
            self._beat = None
            self._due = now + self._half_s


def check_inherited(descriptor: int, sock: socket.socket) -> None:
    """Raise OperatorError unless a socket listens for TCP connections."""
    listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not listens:
        raise OperatorError(
            f"descriptor {descriptor} from systemd is not a socket that listens for TCP connections: the"
            " socket unit needs ListenStream=ADDRESS:PORT and Accept=no"
        )


def inherited_sockets(environ: MutableMapping[str, str], pid: int) -> list[socket.socket]:
    """Return the listening sockets that systemd has opened for process `pid`, in their order.

    Takes the variables that tell of them out of `environ`: they are not for our children. Raises
    OperatorError.
    """
    for_pid, count, _names = [environ.pop(name, "") for name in LISTEN_VARIABLES]
    if not count:
        return []
    if for_pid != str(pid):
        log.warning("the sockets from systemd are for process %s and not for us (%d)", show(for_pid), pid)
        return []
    if not re.fullmatch("[0-9]{1,4}", count):
        raise OperatorError(f"expected a number in $LISTEN_FDS, got {show(count)}")
    sockets = []
    for descriptor in range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            raise OperatorError(f"descriptor {descriptor} from systemd: {reason_of(error)}") from None
        check_inherited(descriptor, sock)
        sockets.append(sock)
    return sockets


# --- Command line -------------------------------------------------------------
# Options, logging, and the life of the process: start, serve, reload, drain.

SIZE_MAX = 1 << 40
SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

DESCRIPTION = """\
Receive analytics events over HTTP and insert them into PostgreSQL.

Apps POST their events as JSON to /apps/<app>/events; the schema file says which
apps there are and which columns their tables have. Missing tables and indexes are
created at start. 200 is answered only after the events are committed: in PostgreSQL
or, while it is away or none is given, in the spool, from where they move over later."""

EPILOG = """\
database URL:
  postgres://user:password@host:port/database     over TCP; add ?sslmode=verify-full for TLS
  postgres://user@%2Frun%2Fpostgresql/database    over the Unix socket in /run/postgresql
  What the URL leaves out comes from PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE,
  PGSSLMODE and so on, and the password from ~/.pgpass. Others can see a password on the
  command line with ps: prefer ATTOLYTICS_DB_URL or .pgpass.

signals:
  SIGTERM, SIGINT  answer the requests in flight, then exit
  SIGHUP           read the schema file again, for the next requests

exit codes:
  0  stopped by SIGTERM or SIGINT, every request in flight answered; --check: everything fits
  1  something is wrong with the schema file, the database, the spool or the address; the message says what
  2  wrong options

changing the schema:
  attolytics --check --schema schema.conf.yaml --db_url ...          # what is wrong or missing?
  attolytics --check --schema schema.conf.yaml --db_url ... | psql   # create it, as --migrate does

example:
  attolytics --schema schema.conf.yaml --db_url postgres://attolytics@%2Frun%2Fpostgresql
  curl http://localhost:8000/apps/com.example.myapp/events -H 'Content-Type: application/json' \\
    -d '{"secret_key": "...", "events": [{"_t": "events", "event_type": "game_start"}]}'
"""


def parse_size(text: str) -> int:
    """Return a number of bytes, written as 1048576, 1024k, 1M or 1MiB."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not match or not 0 < int(match[1]) * SIZE_UNITS[match[2]] <= SIZE_MAX:
        raise argparse.ArgumentTypeError(f"expected a size such as 1048576 or 1M, got {show(text)}")
    return int(match[1]) * SIZE_UNITS[match[2]]


def parse_spool_limit(text: str) -> int:
    """Return a number of bytes that is enough for a spool."""
    size = parse_size(text)
    if size < SPOOL_BYTES_MIN:
        raise argparse.ArgumentTypeError(f"expected at least {SPOOL_BYTES_MIN}, got {size}")
    return size


def parse_count(low: int, high: int, text: str) -> int:
    """Return a whole number from low to high."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {show(text)}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our options."""
    parser = argparse.ArgumentParser(
        "attolytics",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-s", "--schema", metavar="PATH", default="schema.conf.yaml", help="schema file (./schema.conf.yaml)")
    add(
        "-d",
        "--db_url",
        metavar="URL",
        help="database; or $ATTOLYTICS_DB_URL; or database_url in the schema file",
    )
    add(
        "-H",
        "--host",
        default="localhost",
        help="address to listen on (localhost: both 127.0.0.1 and ::1); 0.0.0.0 or :: for all",
    )
    add("-p", "--port", type=partial(parse_count, 0, 65535), default=8000, help="port to listen on (8000)")
    add(
        "--max_body",
        metavar="N",
        type=parse_size,
        default=BODY_BYTES_MAX,
        help="largest request body in bytes, also after decompression (1M)",
    )
    add(
        "--max_connections",
        metavar="N",
        type=partial(parse_count, 1, 100_000),
        default=CONNECTIONS_MAX,
        help=f"client connections served at once ({CONNECTIONS_MAX}); beyond it clients get 503",
    )
    add(
        "--spool",
        metavar="PATH",
        default="attolytics.sqlite3",
        help="SQLite file for events that the database cannot take (./attolytics.sqlite3)",
    )
    add(
        "--spool_limit",
        metavar="N",
        type=parse_spool_limit,
        default=SPOOL_BYTES_MAX,
        help="how large the spool may grow (1G); beyond it clients get 503",
    )
    add(
        "--monitor_port",
        metavar="N",
        type=partial(parse_count, 0, 65535),
        help="answer /healthz and /metrics (Prometheus) on this port of localhost (off)",
    )
    add(
        "--retry_quarantine",
        action="store_true",
        help="at start, try the events in quarantine again, and say what came of it",
    )
    add(
        "--migrate",
        action="store_true",
        help="at start and on reload, also add columns, build indexes without blocking inserts, and drop"
        " NOT NULL where the schema no longer requires it; it never drops or rewrites data",
    )
    add(
        "--check",
        action="store_true",
        help="compare the schema file with the database, print what is wrong and the SQL that is missing,"
        " and exit; changes nothing",
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument(
        "-v", "--verbose", action="count", default=0, help="log every request; twice: every flush too"
    )
    volume.add_argument("-q", "--quiet", action="store_true", help="log only warnings and errors")
    add("--version", action="version", version=f"attolytics {__version__}")
    return parser


class JournalFormatter(logging.Formatter):
    """Log lines for systemd: a priority prefix per line and no time (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}
        prefix = f"<{priority.get(record.levelno, 7)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def under_systemd(journal_stream: str | None) -> bool:
    """Return whether stderr goes to the journal (systemd.exec(5): $JOURNAL_STREAM is device:inode)."""
    if not sys.stderr or not journal_stream:
        return False
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"


def set_up_logging(verbose: int, quiet: bool, journal: bool) -> None:
    handler = logging.StreamHandler()
    if journal:
        handler.setFormatter(JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.addLevelName(TRACE, "TRACE")
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else (logging.INFO, logging.DEBUG, TRACE)[min(verbose, 2)])


def read_schema(path: str) -> Schema:
    """Return the schema in a file. Raises OperatorError."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise OperatorError(f"cannot read the schema file {path}: {reason_of(error)}") from None
    except UnicodeDecodeError as error:
        raise OperatorError(
            f"the schema file {path} is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    return parse_schema(text, path)


def find_socket_dir(port: str) -> str:
    """Return where a local PostgreSQL has its socket: Debian's place, else PostgreSQL's own, else ""."""
    for directory in ("/run/postgresql", "/var/run/postgresql", "/tmp"):
        if Path(directory, f".s.PGSQL.{port}").exists():
            return directory
    return ""


def read_target(url: str, environ: Mapping[str, str]) -> Target:
    """Return the target of a database URL, with the password from .pgpass if it has none."""
    socket_dir = find_socket_dir(split_url(url).get("port") or environ.get("PGPORT") or "5432")
    target, passfile = parse_target(url, environ, os_user(), socket_dir, home_directory())
    if target.password is not None:
        return target
    try:
        status = passfile.stat()
        if stat.S_IMODE(status.st_mode) & 0o077:
            log.warning("%s is ignored: others may read it; run chmod 600 %s", passfile, passfile)
            return target
        password = find_password(passfile.read_text(), target, socket_dir)
    except FileNotFoundError:
        return target
    except (OSError, UnicodeDecodeError) as error:
        log.warning("cannot read %s: %s", passfile, one_line(error))
        return target
    return replace(target, password=password)


def raise_file_limit(connections: int) -> None:
    """Let the process have a file descriptor per connection. Raises OperatorError."""
    needed = connections + TURN_AWAY_THREADS + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            raise OperatorError(
                f"--max_connections {connections} needs {needed} open files, but the limit is {hard}:"
                " lower it, or raise LimitNOFILE (systemd) or ulimit -n"
            ) from None


def device_interrupts(table: str) -> dict[int, int]:
    """Return how many interrupts of devices each CPU has served, from the text of /proc/interrupts."""
    header, *rows = table.splitlines() or [""]
    cpus = [int(name.removeprefix("CPU")) for name in header.split()]
    counts = dict.fromkeys(cpus, 0)
    for row in rows:
        label, *numbers = row.split()[: len(cpus) + 1] or [""]
        if label.rstrip(":").isdigit() and all(number.isdigit() for number in numbers):
            for cpu, number in zip(cpus, numbers, strict=False):
                counts[cpu] += int(number)
    return counts


def claim_cpu(cpu: int) -> socket.socket | None:
    """Return a socket whose name claims a CPU as long as it is open, or None if it is claimed."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0attolytics-cpu-{cpu}")
    except OSError:
        claim.close()
        return None
    return claim


M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of glibc's malloc.h


def stay_on_one_cpu() -> socket.socket | None:
    """Run all our threads on one CPU: only one of them can run Python at a time anyway.

    Spread over several CPUs they wake each other across them and wait for the interpreter's lock;
    on one, 64 clients get 1.6 times the requests per second, and PostgreSQL has the others to itself.
    Each instance takes a CPU of its own, that with the fewest interrupts of devices first: the one
    that serves a busy disk is slower by a quarter. Returns what claims it, to be kept open. Does
    nothing where the system cannot do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        counts = device_interrupts(Path("/proc/interrupts").read_text())
    except OSError:
        counts = {}
    order = sorted(os.sched_getaffinity(0), key=lambda cpu: (counts.get(cpu, 0), cpu))
    claims = ((cpu, claim_cpu(cpu)) for cpu in order)
    cpu, claim = next((pair for pair in claims if pair[1]), (order[os.getpid() % len(order)], None))
    try:
        os.sched_setaffinity(0, {cpu})
        # sched(7): a thread that is woken does not push aside the one that woke it and that holds
        # the interpreter's lock. Worth another tenth.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:
        log.debug("cannot choose how to be scheduled: %s", reason_of(error))
    return claim


def use_memory_sparingly() -> None:
    """Let the C library keep little memory for itself. Does nothing where it is not glibc.

    By itself it gives threads up to eight arenas per CPU, in which rows and bodies leave holes. Only one
    thread at a time runs Python, so one arena is enough (mallopt(3)).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.malloc_trim(0)  # what compiling this file took
    except (OSError, AttributeError) as error:
        log.debug("cannot choose how memory is managed: %s", one_line(error))


def first_session(opener: Opener, epochs: Sequence[str]) -> Session | None:
    """Return a session, or None while PostgreSQL is not up yet. Raises OperatorError for the rest."""
    try:
        return opener.open(epochs)
    except DatabaseAway as error:
        log.warning("cannot use %s yet: %s; events go to the spool", opener.target, error.reason)
        return None
    except DatabaseError as error:
        raise OperatorError(f"cannot use {opener.target}: {error.reason}") from None


def wait_for_end(ends: queue.SimpleQueue[str], complaints: Complaints, watchdog: Watchdog) -> str:
    """Return why the server should end. Blocks until there is a reason.

    Meanwhile feeds the watchdog and sums up complaints.
    """
    while True:
        watchdog.look()
        # A signal that arrives just before the wait begins does not interrupt it.
        with contextlib.suppress(queue.Empty):
            return ends.get(timeout=watchdog.look_s)
        complaints.summarise()


def end_start_on_signals() -> None:
    """Until there are requests to answer, let SIGTERM end the start as Ctrl-C does, PID 1 included.

    A signal that arrives just before a system call waits does not interrupt it; the next alarm does.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_CHECK_S, SIGNAL_CHECK_S)


def catch_signals(ends: queue.SimpleQueue[str]) -> None:
    """Let the first SIGTERM or SIGINT end the server gently, and a second one at once."""

    def end(number: int, _frame: object) -> None:
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, signal.SIG_DFL)
        ends.put(signal.Signals(number).name)

    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, end)
    signal.setitimer(signal.ITIMER_REAL, 0)  # wait_for_end() looks by itself


BUG = "a thread ended that must not"


def catch_bugs(ends: queue.SimpleQueue[str]) -> None:
    """Stop the server when a thread dies: better restarted by systemd than half alive."""

    def end(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        log.critical("the thread %s ended: %s", name, describe_bug(args.exc_value))
        ends.put(BUG)

    threading.excepthook = end


def catch_reloads() -> queue.SimpleQueue[None]:
    """Return a queue that gets an item for each SIGHUP; put() may be called from a signal handler."""
    wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
    signal.signal(signal.SIGHUP, lambda _number, _frame: wanted.put(None))
    return wanted


def prepared_for(opener: Opener, before: Schema, after: Schema) -> None:
    """Let the database be ready for another schema. Raises DatabaseError or OperatorError."""
    try:
        opener.prepare(after)
    except DatabaseAway:
        if before.tables != after.tables:
            raise
        opener.use(after)


class Reloader:
    """Replaces the schema of a server that runs, in a thread of its own."""

    def __init__(  # noqa: PLR0913, PLR0917  # all of them have a part in it
        self,
        read: Callable[[], Schema],
        schema: Schema,
        opener: Opener | None,
        service: Service,
        writer: Writer,
        notifier: Notifier,
    ) -> None:
        """`read` returns the schema of today, or raises OperatorError."""
        self._read = read
        self._schema = schema
        self._opener = opener
        self._service = service
        self._writer = writer
        self._notifier = notifier
        self._status = ""  # of the service, between reloads
        # Set once, by the main thread.
        self._stopping = False

    def start(self, wanted: queue.SimpleQueue[None], status: str) -> None:
        """Reload whenever there are items in `wanted`; once for all that are there."""
        self._status = status
        threading.Thread(target=self._work, args=(wanted,), name="reloader", daemon=True).start()

    def stop(self) -> None:
        """Begin no other reload, and say nothing of one that runs. Does not wait for it."""
        self._stopping = True

    def _work(self, wanted: queue.SimpleQueue[None]) -> None:
        while True:
            wanted.get()
            with contextlib.suppress(queue.Empty):
                while True:
                    wanted.get_nowait()
            if self._stopping:
                return
            microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._notifier.send(
                "RELOADING=1", f"MONOTONIC_USEC={microseconds}", "STATUS=reading the schema file again"
            )
            self._reload()
            if not self._stopping:
                self._notifier.send("READY=1", f"STATUS={self._status}")

    def _reload(self) -> None:
        """Take the schema file over if it has no mistakes and fits the database."""
        try:
            schema = self._read()
            if self._opener:
                prepared_for(self._opener, self._schema, schema)
        except DatabaseAway as error:
            self._keep(f"the database cannot be compared with it: {error.reason}; try again when it can")
        except DatabaseError as error:
            self._keep(error.reason)
        except OperatorError as error:
            self._keep(str(error))
        else:
            self._replace(schema)

    def _replace(self, schema: Schema) -> None:
        if self._stopping:
            return
        # Before the first batch of the new schema can get into the spool.
        self._writer.use(schema)
        self._service.use(schema)
        changed = changes(self._schema, schema)
        more = [f"{len(changed) - CHANGES_MAX} more"] if len(changed) > CHANGES_MAX else []
        log.info("schema file read again: %s", ", ".join([*changed[:CHANGES_MAX], *more]) or "no change")
        if schema.database_url != self._schema.database_url:
            log.warning("database_url in the schema file has changed, which only a restart takes over")
        self._schema = schema

    def _keep(self, reason: str) -> None:
        if not self._stopping:
            log.error("the schema file is not taken over, the schema from before stays: %s", reason)


def drain(
    servers: Sequence[Server], service: Service, pool: Pool, writer: Writer, writing: threading.Thread
) -> None:
    """Accept nothing new, answer what is in flight, store it. Blocks at most DRAIN_S."""
    deadline = time.monotonic() + DRAIN_S
    service.draining = True
    for server in servers:
        server.stop_accepting()
    # A client that keeps its connection learns from its next answer that it ends. Closing the connection
    # now could meet a request on its way, and clients do not repeat a POST.
    idle_deadline = time.monotonic() + DRAIN_IDLE_S
    while service.has_idle() and time.monotonic() < idle_deadline:
        time.sleep(DRAIN_POLL_S)
    service.end_idle()
    if not pool.wait_until_quiet(deadline - time.monotonic()):
        log.warning("some requests were not complete after %d s and were cut", DRAIN_S)
    writer.stop()
    writing.join(max(deadline - time.monotonic(), 0))


def show_query(path: str, schema: Schema) -> str:
    """Return a command that shows the events of a table in the spool."""
    table = next(iter(schema.tables))
    return f"sqlite3 {shlex.quote(path)} {shlex.quote(f'SELECT * FROM {identifier(table)}')}"


def database_url(options: argparse.Namespace, environ: Mapping[str, str], schema: Schema) -> str | None:
    """Return where the database is, if there is one."""
    return options.db_url or environ.get("ATTOLYTICS_DB_URL") or schema.database_url


def write_report(text: str) -> None:
    """Write to standard output. Raises OperatorError."""
    if not sys.stdout:  # it was closed before we started
        return
    try:
        sys.stdout.buffer.write(f"{text}\n".encode())  # SQL is UTF-8, whatever the locale says
        sys.stdout.flush()
    except OSError as error:
        # What could not be written would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OperatorError(f"cannot write the report: {reason_of(error)}") from None


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, in the plural where it needs one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Report what is wrong with the schema file and the database; return the exit code.

    The report is a script for psql. Raises OperatorError when something cannot be checked.
    """
    try:
        schema = read_schema(options.schema)
    except SchemaError as error:
        write_report(comment(str(error)))
        return 1
    size = f"{counted(len(schema.tables), 'table')}, {counted(len(schema.apps), 'app')}"
    report = [comment(f"{options.schema}: {size}: no mistakes")]
    url = database_url(options, environ, schema)
    if not url:
        write_report("\n".join([*report, comment("no database URL: no database was compared")]))
        return 0
    target = read_target(url, environ)
    try:
        with contextlib.closing(connect(target)) as database:
            plan = check_database(database, schema, target.user)
    except DatabaseError as error:
        raise OperatorError(f"cannot use {target}: {error.reason}") from None
    if not plan.reasons:
        write_report("\n".join([*report, comment(f"{target}: fits")]))
        return 0
    report.append(comment(f"{target}: {counted(len(plan.reasons), 'difference')}"))
    write_report("\n".join([*report, script(plan)]))
    return 1


def serve(options: argparse.Namespace, environ: MutableMapping[str, str], notifier: Notifier) -> None:
    """Run the server until SIGTERM or SIGINT. Raises OperatorError when it cannot start or go on."""
    reloads = catch_reloads()
    sockets = inherited_sockets(environ, os.getpid())
    schema = read_schema(options.schema)
    url = database_url(options, environ, schema)
    opener = Opener(read_target(url, environ), schema, options.migrate) if url else None
    raise_file_limit(options.max_connections)
    spool = Spool(options.spool, options.spool_limit, schema, str(uuid.uuid4()))
    writer = Writer(schema, spool, opener.open if opener else None)
    service = Service(schema, writer, options.max_body, time.monotonic)
    pool = Pool(options.max_connections, "http", writer.complaints)
    turning_away = Pool(TURN_AWAY_THREADS, "turning-away", writer.complaints)

    def make_server(family: int, address: tuple[str, int]) -> Server:
        return Server(family, address, service, pool, turning_away)

    servers = adopt(sockets, make_server) if sockets else bind(options.host, options.port, make_server)
    monitors = bind_monitor(options.monitor_port, service, pool)
    cpu_claim = stay_on_one_cpu()
    use_memory_sparingly()
    session = first_session(opener, spool.epochs) if opener else None
    if options.retry_quarantine:
        writer.retry_quarantine()
    # Signals and the death of a thread arrive here; put() may be called from a signal handler.
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    catch_signals(ends)
    catch_bugs(ends)
    writing = writer.start(session)
    listen(servers)
    listen(monitors, MONITOR_OPTION)
    for server in [*servers, *monitors]:
        threading.Thread(
            target=server.serve_forever, args=(ACCEPT_POLL_S,), name="acceptor", daemon=True
        ).start()
    listening = addresses_text(servers)
    if sockets:
        listening += " (sockets from systemd)"
    place = opener.target if opener else f"the spool {spool.path}"
    log.info("attolytics %s listens on %s, writes to %s", __version__, listening, place)
    if monitors:
        log.info("/healthz and /metrics are at %s", addresses_text(monitors))
    if not opener:
        log.info("no database URL: read the events with %s", show_query(spool.path, schema))
    status = f"listening on {listening}"
    notifier.send("READY=1", f"STATUS={status}")
    reloader = Reloader(partial(read_schema, options.schema), schema, opener, service, writer, notifier)
    reloader.start(reloads, status)
    reason = wait_for_end(
        ends, writer.complaints, Watchdog(watchdog_interval(environ, os.getpid()), notifier, writer)
    )
    log.info("stopping: %s", reason)
    reloader.stop()
    notifier.send("STOPPING=1", "STATUS=answering the requests in flight")
    drain(servers, service, pool, writer, writing)
    if cpu_claim:
        cpu_claim.close()
    if reason == BUG:
        raise OperatorError("stopped because of a bug, see the message above")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(arguments)
    journal = under_systemd(os.environ.get("JOURNAL_STREAM"))
    set_up_logging(options.verbose, options.quiet, journal)
    end_start_on_signals()
    try:
        if options.check:
            return check(options, os.environ)
        serve(options, os.environ, Notifier(os.environ.get("NOTIFY_SOCKET")))
    except (OperatorError, SpoolError) as error:
        text = f"attolytics: {error}"
        if journal:
            text = "\n".join(f"<3>{line}" for line in str(error).splitlines())
        if sys.stderr:  # None when it was closed before we started
            sys.stderr.write(f"{text}\n")
        return 1
    except KeyboardInterrupt:
        log.info("stopped before it was up")
    return 0


def run() -> NoReturn:
    """Run the command line and exit: the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
