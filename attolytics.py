#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pg8000>=1.31.3,<2", "PyYAML>=6.0,<7"]
# ///
"""Attolytics receives analytics events over HTTP and inserts them into PostgreSQL.

    python attolytics.py --schema schema.conf.yaml --db_url postgres://user@host/database

The life of a batch (the events of one request):

    HTTP thread   reads a request, finds the app, checks the key, decodes and converts every event, puts
                  the batch into the inbox and waits for the client's next request
    writer        takes every batch that is waiting and stores them in one flush: in PostgreSQL while it
                  has the session, else in the spool; answers each client
    replayer      while the writer has no session: connects, moves the spool into PostgreSQL over its own
                  session and, when the spool is empty, hands that session to the writer

While one flush is being committed the next batches pile up, and the next flush takes them all: no timer, and
under load the cost of a commit is shared. An answer of 200 is sent only after COMMIT, in PostgreSQL or in the
spool: an SQLite file that is replayed later. Without a database URL everything stays in the spool. There is
one session with PostgreSQL. While the writer has it the spool is empty; while the writer does not, new events
go to the spool, because they must not overtake what is in it.

Threads, and what each owns:

    main           signals, systemd notifications, the watchdog
    acceptors      one listening socket each
    HTTP threads   one client connection each, in a bounded pool that reuses them
    writer         the inbox, the flush numbers, the session while it has it
    replayer       the back-off, the session while it has it
    reloader       the reading of a changed schema file, a connection of its own to prepare the tables
    monitor        nothing: it looks at what the others publish

The file reads from top to bottom: a section uses only what stands above it.

    Limits, Errors, Schema, Conversion, Batches, SQL, Database URL, Metrics    pure: no I/O but complain()
    Database, Spool, Writer, HTTP, Live view, Monitor, systemd, Command line   the outside world
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import difflib
import errno
import fcntl
import gc
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
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
import struct
import sys
import threading
import time
import traceback
import uuid
import zlib
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from email.utils import formatdate
from enum import Enum, StrEnum, auto
from functools import cached_property, lru_cache, partial
from http import HTTPMethod, HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler
from typing import Any, NamedTuple, NoReturn, TypeVar
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

REQUEST_LINE_BYTES_MAX = 8 << 10  # As nginx by default: one of its four buffers of 8 KiB ...
HEADER_BYTES_MAX = 32 << 10  # ... and all four.
HEADER_COUNT_MAX = 100  # A browser behind two proxies sends about 30.
BODY_BYTES_MAX = 1 << 20  # nginx's own default, so both refuse the same request.
EVENTS_MAX = 10_000  # Per request; keeps one transaction well below a second.
JSON_DEPTH_MAX = 100  # Of a json value; PostgreSQL and every client cope with that.
BODY_DEPTH_MAX = 400  # Of the whole body; well below the recursion limits of Python and SQLite.
COLUMN_PROBLEMS_MAX = 10  # Listed for one event: a hundred for each would fill the memory and the quarantine.
PROBLEMS_MAX = 1_000  # Reasons listed in one answer, about 150 kB.
UNKNOWN_KEYS_MAX = 20  # Named in one answer; each costs a search for a suggestion.
SHOWN_CHARS_MAX = 60  # Of a value that a message quotes.

HEAD_DEADLINE_S = 10  # A phone on a bad network needs 3 s; a slow attacker gets no more than this.
BODY_DEADLINE_S = 30  # 1 MiB at 35 kB/s.
IDLE_S = 75  # Longer than nginx keeps an upstream connection (60 s), so that nginx closes first.
IDLE_CROWDED_S = 2  # The same while connections are scarce.
IDLE_SLICE_S = 1  # How late a connection that waits for a request notices that it should end.
SEND_TIMEOUT_S = 10  # Answers are small; only a client that stopped reading needs longer.
LINGER_S = 2  # Time for a refused client to read its answer before the connection is cut.
RETRY_AFTER_S = 5  # Sent with 503: by then the replayer has tried again to connect (BACKOFF_MAX_S).

CONNECTIONS_MAX = 512  # Default of --max_connections; a thread each, about 50 kB resident.
PLACE_PATIENCE_S = 0.2  # A connection waits so long for a thread when the pool has just become full.
TURN_AWAY_THREADS = 8  # Serve the quick 503 past --max_connections.
RECEIVE_BYTES = 16 << 10  # Read at once; holds the head and the body of nearly every request.
LARGE_BODY_BYTES = 32 << 10  # Larger bodies are converted one at a time ...
LARGE_BATCHES_MAX = 5  # ... and at most so many, enough for two flushes, wait for their answers.
LISTEN_BACKLOG = 1_024  # Connections that the kernel holds until we accept them; it may have a lower limit.

FLUSH_EVENTS_MAX = 2_000  # About 25 ms; more at once is no faster, and others wait behind it.
FLUSH_CHARS_MAX = 8 << 20  # Bounds memory and the time one flush takes.
LONG_FLUSH_EVENTS = 100  # After so many events the next flush is sent first, and then they are answered.
PATIENCE_S = 0.8  # The oldest batch of a flush waits so long for the database; then it goes to the spool ...
PATIENCE_MIN_S = 0.4  # ... but each flush gets at least so long: a backlog alone must not cost the session.
LOCK_TIMEOUT_MS = 5_000  # When another session has held a lock for so long, the database counts as busy.
STATEMENT_TIMEOUT_S = 9  # Cancels a flush that hangs in the server ...
ANSWER_GRACE_S = 1  # ... and so much later a server that does not answer at all is given up.
LONG_STATEMENT_TIMEOUT_S = 60  # Of a single spooled flush, which cannot be divided: its triggers may be slow.
PREPARE_TIMEOUT_S = 3_600  # An index on a table of 100 million rows takes some minutes.
CHANGE_PAUSE_S = 1  # Between two tries to change a table, so that inserts get through.
CHANGE_PATIENCE_S = 60  # The tries go on for so long: a report that reads the table may take that ...
START_PATIENCE_S = 10  # ... but without --migrate it is better to start soon and to spool.
CONNECT_TIMEOUT_S = 5  # Default of connect_timeout in the URL.
BACKOFF_MAX_S = 5  # Pauses between tries to connect double up to this; jitter may halve each.
COMPLAINT_S = 60  # A complaint is logged once in this time, and later with how often it came up.

SPOOL_BYTES_MAX = 1 << 30  # Default of --spool_limit: about five million small events.
SPOOL_BYTES_MIN = 1 << 20  # A smaller limit would refuse the largest batches for ever.
DISK_RESERVE_BYTES = 8 << 20  # Kept free, because deleting from the spool needs room as well.
SPOOL_LOCK_S = 3  # A predecessor may still be writing its last events, or the kernel be ending it.
SPOOL_BUSY_S = 0.4  # How long we wait for somebody who holds the spool's lock, say with the sqlite3 program.
QUICK_CHECK_BYTES_MAX = 256 << 20  # A spool up to this size is checked at start; that takes a second.
REPLAY_EVENTS_MAX = 4_000  # In one transaction: about 50 ms.
TURN_PATIENCE_S = 0.4  # New events wait at most so long for their turn, or for the end of a replay.
SLOW_REPLAY_S = 0.3  # A replay's transaction that takes longer shows that the database is slow ...
SLOW_S = 1  # ... and for so long after it the writer does not get the session.
HELD_UP_S = 10  # A replay that has not got on for so long is said to be held up.
HELD_S_MAX = 50  # The longest that an event holds others up when it is refused, but not for its data.
LOSSES_MAX = 3  # Sessions that are lost before we look for an event that costs them.
SIFT_IDLE_S = 5  # PostgreSQL ends a sift, or a change of a table, when we say nothing for so long.
LISTED_MAX = 20  # Reasons in the quarantine that are logged: as many as one look takes in.

POLL_S = 0.05  # Between two looks at something that cannot wake us.
STALLED_S = 10  # A writer that has not got on for so long is stuck, or waits while a huge spool is shrunk.
IDLE_LOOK_S = 0.5  # Between two looks of an idle writer whether its session is still there.
MONITOR_CONNECTIONS_MAX = 8  # Prometheus, a load balancer and somebody with curl.
DRAIN_OPEN_S = 5  # If systemd keeps the port, new clients are still served for so long: they need not wait.
DRAIN_IDLE_S = 1  # A connection that is kept open may bring a request for so long; then it counts as idle.
SIGNAL_CHECK_S = 0.5  # How late a signal may be noticed in the worst case.
DRAIN_S = 9  # All of it, until the last answer; Docker kills after 10 s, systemd after 90 s.

LIVE_WATCHERS_MAX = 8  # A thread each; some browsers, and programs that read along.
LIVE_TICK_S = 0.25  # Between two looks at what is new; nobody notices the delay.
LIVE_ROWS = 5  # Sent in a tick: more than 20 a second nobody can read, so the rest is only counted.
LIVE_STORED_MAX = 40  # Stored requests that are kept, for who watches or comes back within LIVE_GRACE_S.
LIVE_GRACE_S = 10
LIVE_REFUSED_MAX = 100  # Kept also while nobody watches: who comes to look comes because of them.
LIVE_REFUSED_BYTES_MAX = 1 << 20  # Of memory for these.
LIVE_BODY_BYTES_MAX = 32 << 10  # Kept of a body; nearly all are smaller.
LIVE_TEXT_CHARS_MAX = 1_000  # Shown of a text or a key: about ten lines.
LIVE_ITEMS_MAX = 50  # Shown of a request's events, and of the members of an object or array.
LIVE_DEPTH_MAX = 10  # Shown of their nesting.
LIVE_SEND_TIMEOUT_S = 5  # A watcher that does not read is cut off after so long ...
LIVE_BUFFER_BYTES = 128 << 10  # ... and until then so much waits for it in the kernel.
LIVE_HEARTBEAT_TICKS = 60  # Between two signs of life: tunnels cut what is silent for longer.
LIVE_SAMPLES_MAX = 301  # One a second, for the curves of the last five minutes.

NAME_BYTES_MAX = 63  # PostgreSQL manual, 4.1.1: longer identifiers are cut silently.


# --- Errors -------------------------------------------------------------------
# Three families: what the operator must mend (one clear text, exit code 1), what a client did wrong (a status
# and a reason), and what PostgreSQL and SQLite said. And how a complaint that comes up again is logged.


class OperatorError(Exception):
    """Something only the operator can mend. str() is the whole message, no traceback needed."""


@dataclass(frozen=True)
class Problem:
    """Why one event of a request is refused."""

    index: int | None  # in `events`, from 0; None if PostgreSQL does not say which event it was
    column: str | None  # None if it is not about one column
    reason: str


# Why requests are refused: labels for the metrics, by status.
REFUSALS = {
    400: ("malformed_request", "invalid_body", "invalid_events"),
    403: ("wrong_key", "origin"),
    404: ("unknown_path", "unknown_table"),
    405: ("method",),
    408: ("too_slow",),
    411: ("length_missing",),
    413: ("too_large",),
    414: ("target_too_long",),
    415: ("media",),
    431: ("headers_too_large",),
    501: ("not_implemented",),
    503: ("storage_away", "too_many_connections"),
}
STATUSES = {label: HTTPStatus(status) for status, labels in REFUSALS.items() for label in labels}


class Refusal(Exception):
    """A request is refused: with a label of REFUSALS, a reason for the client, and `problems` of events."""

    def __init__(self, label: str, reason: str, problems: Sequence[Problem] = (), events: int = 1) -> None:
        super().__init__(reason)
        self.label, self.status, self.reason = label, STATUSES[label], reason
        self.problems, self.events = problems, events  # `events`: how many, or 1 if nobody counted them


class SpoolError(Exception):
    """The spool cannot do its work now; str() says why. What is in it stays."""


class Fault(Enum):
    """Whose fault it is that PostgreSQL did not do what we asked."""

    DATA = auto()  # Nothing was stored, for sure: a value, a constraint, a trigger
    AWAY = auto()  # Unreachable, shutting down, read-only, full or busy: may pass without anybody's help
    OPERATOR = auto()  # A table, a permission or PostgreSQL itself is broken


class DatabaseError(Exception):
    """PostgreSQL, or the way to it, said no. `fields` are those of its answer; D (detail) may quote rows."""

    def __init__(self, reason: str, fault: Fault = Fault.AWAY, fields: Mapping[str, str] = {}) -> None:
        super().__init__(reason)
        self.fault, self.fields, self.sqlstate = fault, fields, fields.get("C", "")


def reason_of(error: BaseException) -> str:
    """Return an exception's message in one line; a system call's without the numbers and paths in it."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def complain(level: int, text: str, about: str = "") -> None:
    """Log a text, at most once in COMPLAINT_S for each `about` (by default the text itself), see Repeats."""
    log.log(level, "%s", text, extra={"about": about or text})


# --- Schema -------------------------------------------------------------------
# The schema file as frozen dataclasses. Pure: text in, Schema or OperatorError out. Every mistake is found,
# each with its line, its place and, where a name is nearly right, a suggestion.


class Type(StrEnum):
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
    CLIENT_NETWORK = "client_network"
    APP_ID = "app_id"


# What people write who know SQL, Python or TypeScript better than our names.
TYPE_SYNONYMS: Mapping[str, Type] = {
    **dict.fromkeys(("int", "integer", "int4", "int32", "number"), Type.I32),
    **dict.fromkeys(("bigint", "int8", "int64", "long"), Type.I64),
    **dict.fromkeys(("real", "float4", "float32"), Type.F32),
    **dict.fromkeys(("float", "double", "float8", "float64", "numeric"), Type.F64),
    **dict.fromkeys(("str", "text", "varchar", "char"), Type.STRING),
    **dict.fromkeys(("time", "date", "datetime", "timestamptz"), Type.TIMESTAMP),
    **dict.fromkeys(("jsonb", "object", "dict", "map"), Type.JSON),
}
TABLE_KEY = "_t"  # In an event: the name of its table.
LEDGER = "attolytics_ledger"  # Our own table in PostgreSQL.
REQUEST_KEYS = frozenset({"secret_key", "events"})
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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
    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class App:
    """An app: who may write (key, origins) and where to (tables)."""

    id: str
    secret_key: str
    origins: frozenset[str] | None  # lower case; None allows every origin
    tables: tuple[str, ...]
    quarantines: bool = False  # bad events go to the quarantine instead of refusing their batch

    def allows(self, origin: str | None) -> bool:
        """Return whether a request with this Origin header is let in. Only browsers send one."""
        return origin is None or self.origins is None or origin.lower() in self.origins


@dataclass(frozen=True, slots=True)
class Schema:
    tables: Mapping[str, Table]
    apps: Mapping[str, App]
    database_url: str | None = None


def show(value: object) -> str:
    """Return a JSON value for a message: a scalar as JSON, cut if it is long; of others only the kind."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and value.bit_length() >= 4_096:
        return "a number"  # str() raises when it has more than 4,300 digits
    if isinstance(value, str):
        value = value[: SHOWN_CHARS_MAX + 1]
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS_MAX + 2 else text[:SHOWN_CHARS_MAX] + "..."


def suggestion(wrong: str, right: Iterable[str]) -> str:
    """Return ', did you mean "x"?' for the nearest of `right`, or "" when none is near."""
    near = difflib.get_close_matches(wrong[:NAME_BYTES_MAX], list(right), n=1)  # slow for long texts
    return f', did you mean "{near[0]}"?' if near else ""


def unknown(kind: str, name: str, right: Collection[str], near: str = "") -> str:
    """Return a message: a name is none of `right`; it suggests one like `near` or the name, or lists all."""
    hint = suggestion(near or name, right) or f", expected one of {', '.join(right)}"
    return f"unknown {kind} {show(name)}{hint}"


# Plain scalars of YAML 1.2, as in the original (Rust) Attolytics. Others, such as `yes`, are strings.
PLAIN_VALUES: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_Choice = TypeVar("_Choice", bound=str)
_T = TypeVar("_T", str, bool)


@dataclass(frozen=True, slots=True)
class Part:
    """A node of the schema file with its place. What is wrong is reported, and something valid returned."""

    problems: list[str]  # those of the whole file, so that one run finds all
    node: yaml.Node | None  # None for a key that is missing
    line: int = 1
    place: str = ""  # such as `.tables.events.columns[2].type`

    def report(self, reason: str) -> None:
        place = f"{self.place[1:]}: " if self.place else ""
        self.problems.append(f"{self.line}: {place}{reason}")

    def child(self, key: str, node: yaml.Node, position: yaml.Node) -> Part:
        return Part(self.problems, node, position.start_mark.line + 1, self.place + key)

    def value(self) -> Any:
        """Return a string, a bool, None, or the parts of a list or a dict, which may contain itself."""
        match self.node:
            case yaml.SequenceNode(value=nodes):
                return [self.child(f"[{i}]", node, node) for i, node in enumerate(nodes)]
            case yaml.MappingNode(value=pairs):
                parts: dict[str, Part] = {}
                for key_node, node in pairs:
                    own = self.child("", key_node, key_node)
                    key = own.value() if isinstance(key_node, yaml.ScalarNode) else []
                    if not isinstance(key, str):
                        own.report(f"a key must be a string, got {show(key)}; put it in quotes")
                        continue
                    part = self.child(f".{key}", node, key_node)
                    if parts.setdefault(key, part) is not part:
                        part.report("duplicate key")
                return parts
            case yaml.ScalarNode(tag="tag:yaml.org,2002:str", value=text, style=style):
                if not LONE_SURROGATE.search(text):
                    return text if style else PLAIN_VALUES.get(text, text)  # a plain scalar has no style
                self.report("contains half of a surrogate pair")
            case yaml.ScalarNode(tag=tag):
                self.report(f"expected a plain value, got the tag {tag}")
        return None

    def parts(self, kind: type[Collection[Any]], what: str, least: int = 1) -> Any:
        """Return the parts of this list or dict (`kind`), which must have at least so many."""
        value = self.value()
        if isinstance(value, kind) and len(value) >= least:
            return value
        self.report(f"expected {what}, got {show(value) if value else 'nothing'}")
        return kind()

    def section(self, what: str, keys: Sequence[str]) -> dict[str, Part]:
        """Return a part for each key that this mapping may have: one without a node if it is missing."""
        parts: dict[str, Part] = self.parts(dict, what)
        for key, part in parts.items():
            if key not in keys:
                part.report(unknown("key", key, keys))
        problems = self.problems if parts else []  # only of a mapping it is reported what is missing
        return {key: parts.get(key, Part(problems, None, self.line, f"{self.place}.{key}")) for key in keys}

    def scalar(self, kind: type[_T], what: str, form: str = "(?s:.*)", required: bool = False) -> _T | None:
        """Return this string or bool (`kind`), None if null, missing or wrong; `required` also refuses ""."""
        value = self.value()
        if isinstance(value, kind) and re.fullmatch(form, str(value)) and (value or not required):
            return value
        if value is not None:
            quotes = "; put it in quotes" if isinstance(value, bool) else ""
            self.report(f"expected {what}, got {show(value) if value != '' else 'an empty one'}{quotes}")
        elif required:
            self.report(f"missing, expected {what}")
        return None

    def choice(self, kind: str, right: Sequence[_Choice], synonyms: Mapping[str, str]) -> _Choice | None:
        name = self.scalar(str, "a string")
        if name is not None and name not in right:
            self.report(unknown(kind, name, right, synonyms.get(name.lower(), name.lower())))
        return next((choice for choice in right if choice == name), None)


COLUMN_FLAGS = ("extra", "indexed", "unique", "required")
COLUMN_KEYS = ("name", "type", "header", "source", *COLUMN_FLAGS)
APP_KEYS = ("secret_key", "access_control_allow_origin", "tables", "invalid_events")
SYSTEM_COLUMNS = ("tableoid", "xmin", "cmin", "xmax", "cmax", "ctid")  # PostgreSQL manual, 5.6
RESERVED: Mapping[tuple[str, str], str] = {
    ("table", LEDGER): "is the table that makes replay exactly-once",
    ("column", TABLE_KEY): "names the table in an event, a column cannot have it",
    **{("column", name): "is a system column of PostgreSQL's" for name in SYSTEM_COLUMNS},
}
HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2: token
ORIGIN = r"(?i:\*|([a-z][a-z0-9+.-]*://[^/\s?#@]+|null)/?)"


def check_name(part: Part, name: str, kind: str) -> None:
    """Report the name of a table or a column if PostgreSQL would not take it as it is, or it is taken."""
    if (size := len(name.encode())) > NAME_BYTES_MAX:
        part.report(f"the {kind}'s name has {size} bytes; PostgreSQL holds {NAME_BYTES_MAX}")
    if "\0" in name or not name:
        part.report(f"the {kind}'s name must not be empty or contain NUL")
    if reason := RESERVED.get((kind, name)):
        part.report(f'"{name}" {reason}')


def parse_column(part: Part, others: Sequence[Column]) -> Column:
    """Return a column of a table that has `others` before it."""
    parts = part.section("a column with a name", COLUMN_KEYS)
    name = parts["name"].scalar(str, "a string", required=True) or ""
    if name:
        check_name(parts["name"], name, "column")
    column = Column(
        name,
        parts["type"].choice("type", tuple(Type), TYPE_SYNONYMS) or Type.STRING,
        (parts["header"].scalar(str, "the name of a request header", HEADER_NAME) or "").lower() or None,
        parts["source"].choice("source", tuple(Source), {}),
        **{flag: parts[flag].scalar(bool, "true or false") is True for flag in COLUMN_FLAGS},
    )
    source_type = Type.TIMESTAMP if column.source is Source.RECEIVED_AT else Type.STRING
    needed = {"header": Type.STRING, "source": source_type, "extra": Type.JSON}
    filled = {key: value for key in needed if (value := getattr(column, key))}
    for key, value in filled.items():
        if column.type is not needed[key]:
            parts["type"].report(f"{key} {show(value)} needs type {needed[key]}, not {column.type}")
    if column.extra and column.required:
        parts["required"].report("an extra column is empty when there are no unknown keys")
    if len(filled) > 1:
        part.report(f"a column can have only one of {' and '.join(filled)}")
    for i, other in enumerate(others):
        if name and other.name == name:
            parts["name"].report(f'duplicate column "{name}", also columns[{i}]')
        if column.extra and other.extra:
            parts["extra"].report(f"only one column can be extra, columns[{i}] is")
    return column


def parse_app(part: Part, app_id: str, tables: Collection[str]) -> App:
    parts = part.section("an app with a secret_key and tables", APP_KEYS)
    if "/" in app_id or not app_id:
        part.report("an app's id must not be empty or contain a slash: it stands in a URL")
    key = parts["secret_key"].scalar(str, "a string", required=True) or ""
    what, allowed = 'an origin such as "https://example.com"', parts["access_control_allow_origin"]
    items = allowed.value() if isinstance(allowed.node, yaml.SequenceNode) else [allowed]
    texts = [item.scalar(str, what, ORIGIN, required=allowed.node is not None) or "*" for item in items]
    origins = frozenset(text.removesuffix("/").lower() for text in texts)
    names = []
    for item in parts["tables"].parts(list, "a list of table names", least=0):
        name = item.scalar(str, "the name of a table", required=True) or ""
        if name and name not in tables:
            item.report(f"there is no table {show(name)}{suggestion(name, tables)}")
        names.append(name)
    policy = parts["invalid_events"].choice("policy", ("refuse", "quarantine"), {})
    return App(app_id, key, None if "*" in origins else origins, tuple(names), policy == "quarantine")


def parse_schema(text: str, file: str = "schema file") -> Schema:
    """Return the schema that a file's text describes. Raises OperatorError with every mistake in it."""
    try:
        node = yaml.compose(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last of "\UFFFFFFFF"
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not YAML: {reason_of(error)}"
        raise OperatorError(f"the schema file has 1 mistake:\n{file}: {reason}") from None
    root = Part([], node)
    parts = root.section("tables and apps", ("tables", "apps", "database_url"))
    tables = {}
    for name, part in parts["tables"].parts(dict, "at least one table").items():
        check_name(part, name, "table")
        columns: list[Column] = []
        section = part.section("a table with columns", ("columns",))
        for column in section["columns"].parts(list, "a list of columns"):
            columns.append(parse_column(column, columns))
        tables[name] = Table(name, tuple(columns))
    app_parts = parts["apps"].parts(dict, "at least one app")
    apps = {app_id: parse_app(part, app_id, tables) for app_id, part in app_parts.items()}
    url = parts["database_url"].scalar(str, "a string")
    if problems := [f"{file}:{problem}" for problem in root.problems]:
        count = counted(len(problems), "mistake")
        raise OperatorError("\n".join([f"the schema file has {count}:", *problems]))
    return Schema(tables, apps, url)


def changes(before: Schema, after: Schema) -> list[str]:
    """Return in words, without keys of apps, what another schema adds, changes and removes."""
    kept = [name for name in before.tables if name in after.tables]

    def things(schema: Schema) -> dict[tuple[str, str], object]:
        tables = {("table", name): True for name in schema.tables}
        columns = {("column", f"{name}.{c.name}"): c for name in kept for c in schema.tables[name].columns}
        return {**tables, **columns, **{("app", app_id): app for app_id, app in schema.apps.items()}}

    old, new = things(before), things(after)
    found = [(key, "changed" if key in new else "removed") for key in old if old[key] != new.get(key)]
    found += [(key, "added") for key in new if key not in old]
    return [f"{kind} {show(name)} {what}" for (kind, name), what in found]


# --- Conversion ---------------------------------------------------------------
# JSON values to column values, as the texts that PostgreSQL reads for them. Pure: a function returns the
# text or raises ValueError with the reason. Nothing is changed silently: what PostgreSQL would not give back
# equal is refused. These functions run once per value, so they are written to be fast in the usual case.


def to_bool(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    raise ValueError(f"expected true or false, got {show(value)}")


def to_integer(low: int, high: int, value: object) -> str:
    if type(value) is int and low <= value <= high:
        return str(value)
    if isinstance(value, float | Decimal) and -1e300 < value < 1e300 and value == int(value):
        # 5.0 and 1e3 have no fraction; Lua and GDScript write integers so. (int() of 1e99999999 hangs.)
        return to_integer(low, high, int(Decimal(str(value))))
    limits = f" from {low} to {high}" if type(value) is int else ""  # bool is an int in Python, not in JSON
    raise ValueError(f"expected an integer{limits}, got {show(value)}")


def to_float(largest: float, smallest: float, value: object) -> str:
    if type(value) is not float and type(value) is not int and type(value) is not Decimal:
        raise ValueError(f"expected a number, got {show(value)}")
    if not -largest <= value <= largest:  # also if it is NaN
        raise ValueError(f"expected a finite number of at most {largest!r}, got {show(value)}")
    if value and -smallest < value < smallest:
        raise ValueError(f"expected zero or a number of at least {smallest!r}, got {show(value)}")
    number = float(value)
    # f64 takes 2**60 (exact), and 590295810358705700000 (JavaScript's text of 2**69), but not 2**53 + 1.
    is_whole = type(value) is not float and largest == sys.float_info.max and value == int(value)
    if is_whole and number != value and value != Decimal(repr(number)):
        raise ValueError(f"the integer {show(value)} has more digits than double precision holds")
    return repr(number)


def to_string(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a string, got {show(value)}")
    if "\0" in value:
        raise ValueError("contains a NUL character (\\u0000), which PostgreSQL cannot store")
    if not value.isascii() and (half := LONE_SURROGATE.search(value)):
        raise ValueError(f"contains half of a surrogate pair (\\u{ord(half[0]):04x})")
    return value


RFC_3339 = re.compile(r"(?ai)(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(\.\d+)?(?:Z|([+-])(\d\d):(\d\d))")
SECONDS_END = 253_402_300_800  # 10000-01-01, where Python's calendar ends; so many milliseconds are 1978
MICROSECONDS_EXACT = 2**33  # Below so many seconds (in 2242) a float is exact to a microsecond
UUID_TEXT = re.compile(r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}", re.IGNORECASE)
EPOCH = datetime(1970, 1, 1)  # naive, which is faster; all our times are in UTC


def parse_rfc_3339(text: str) -> datetime:
    """Return the time in UTC that an RFC 3339 string (section 5.6) means, to the microsecond."""
    if not (match := RFC_3339.fullmatch(text)):
        lacks = RFC_3339.fullmatch(text + "Z")
        reason = "an offset is missing, such as Z or +02:00" if lacks else "expected RFC 3339"
        raise ValueError(f"{reason}: 2019-04-01T14:49:40Z is one, got {show(text)}")
    *numbers, fraction, sign, hours, minutes = match.groups()
    year, month, day, hour, minute, second = map(int, numbers)
    leap = int(second == 60)  # it is the second after it, as in POSIX and in PostgreSQL
    try:
        offset = EPOCH.replace(hour=int(hours or 0), minute=int(minutes or 0)) - EPOCH  # raises past 23:59
        local = datetime(year, month, day, hour, minute, second - leap)
        moment = local + offset if sign == "-" else local - offset
        if leap and (moment.hour, moment.minute) != (23, 59):
            raise ValueError("a leap second is at 23:59:60 UTC only")
        # PostgreSQL rounds to microseconds as well.
        return moment + timedelta(seconds=leap, microseconds=round(float(fraction or 0) * 1_000_000))
    except OverflowError:
        raise ValueError(f"expected a time in the years 1 to 9999, got {show(text)}") from None
    except ValueError as error:
        raise ValueError(f"no such time: {reason_of(error)}, got {show(text)}") from None


@lru_cache(maxsize=4096)  # The times of events are close together.
def minute_text(minutes_since_1970: float) -> str:
    return (EPOCH + timedelta(minutes=minutes_since_1970)).isoformat(timespec="minutes")


def to_timestamp(value: object) -> str:
    if (type(value) is float or type(value) is int) and 0 <= value < MICROSECONDS_EXACT:
        minute = value // 60
        # Rounding may make 60 seconds, which PostgreSQL takes for the next minute.
        return "%s:%09.6fZ" % (minute_text(minute), value - minute * 60)  # noqa: UP031  # f"" takes longer
    if type(value) is str:
        return f"{parse_rfc_3339(value).isoformat()}Z"
    if type(value) is not float and type(value) is not int and type(value) is not Decimal:
        example = "2019-04-01T14:49:40Z"
        raise ValueError(f"expected seconds since 1970 or a string such as {example}, got {show(value)}")
    try:
        if not -SECONDS_END < value < SECONDS_END:  # also if it is NaN
            raise OverflowError
        moment = EPOCH + timedelta(microseconds=round(Decimal(str(value)) * 1_000_000))
    except OverflowError:  # also before the year 1, and less than a microsecond before the end
        hint = ": looks like milliseconds; send seconds" if SECONDS_END <= value < SECONDS_END * 1000 else ""
        raise ValueError(f"expected a time in the years 1 to 9999, got {show(value)}{hint}") from None
    return f"{moment.isoformat(timespec='microseconds')}Z"


def to_uuid(value: object) -> str:
    if type(value) is not str or not UUID_TEXT.fullmatch(value):
        raise ValueError(f"expected a UUID such as 123e4567-e89b-12d3-a456-426614174000, got {show(value)}")
    return value


# The encoder writes a Decimal as a string that begins with this mark, then mark and quotes are taken away. No
# other string can begin so: the decoder makes one character of these two halves of a surrogate pair.
DECIMAL_MARK = "\ud800\udc00"
MARKED_DECIMAL = re.compile(f'"{DECIMAL_MARK}([^"]*)"')
JSON_ENCODER = json.JSONEncoder(
    default=lambda n: DECIMAL_MARK + str(n), ensure_ascii=False, allow_nan=False, separators=(",", ":")
)


def exact_json(value: object, decimal: str | Callable[[re.Match[str]], str] = r"\1") -> str:
    """Return a value as JSON with all digits; `decimal` writes a Decimal. Raises ValueError for infinity."""
    text = JSON_ENCODER.encode(value)
    return MARKED_DECIMAL.sub(decimal, text) if DECIMAL_MARK in text else text


def checked_decimal(marked: re.Match[str]) -> str:
    """Return a marked number. Raises ValueError if it is too long without an exponent, as in PostgreSQL."""
    number = Decimal(marked[1])
    # jsonb holds 131,072 digits before the point, which many programs cannot read, and 16,383 after it.
    if abs(number.adjusted()) > 1_000 or len(marked[1]) > 10_000:
        raise ValueError(f"the number {show(number)} is out of range")
    return marked[1]


def levels(value: object) -> Iterator[list[Any]]:
    """Yield what is in a decoded value, level by level: a recursion could not go as deep as the decoder."""
    items = [value]
    while items:
        yield items
        boxes = [item for item in items if isinstance(item, dict | list)]
        items = [item for box in boxes for item in (box.values() if isinstance(box, dict) else box)]


def is_deeper(value: object, depth: int) -> bool:
    """Return whether arrays and objects are nested deeper than `depth`."""
    deeper = itertools.islice(levels(value), depth, None)
    return any(isinstance(item, dict | list) for items in deeper for item in items)


def to_json(value: object) -> str:
    text = exact_json(value, checked_decimal)
    if text.count("{") + text.count("[") > JSON_DEPTH_MAX and is_deeper(value, JSON_DEPTH_MAX):
        raise ValueError(f"nested deeper than {JSON_DEPTH_MAX} levels")
    # \\u0000 is an escaped backslash before five other characters, and no NUL.
    if "\\u0000" in text and re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise ValueError("contains a NUL character (\\u0000), which PostgreSQL cannot store in json")
    return to_string(text)


CONVERTERS: Mapping[Type, Callable[[object], str]] = {
    Type.BOOL: to_bool,
    Type.I32: partial(to_integer, -(2**31), 2**31 - 1),
    Type.I64: partial(to_integer, -(2**63), 2**63 - 1),
    # The largest number that still rounds to a finite real, and the smallest real above zero.
    Type.F32: partial(to_float, 3.4028235677973362e38, 1.401298464324817e-45),
    Type.F64: partial(to_float, sys.float_info.max, 5e-324),
    Type.STRING: to_string,
    Type.TIMESTAMP: to_timestamp,
    Type.JSON: to_json,
    Type.UUID: to_uuid,
}


# --- Batches ------------------------------------------------------------------
# How a request's body and headers become a Batch, or a Refusal with the reason. Pure. Each app has an Intake,
# made when the schema is read, which also converts what comes back from the spool.


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address in a text without port or zone, IPv4 taken out of IPv6 (::ffff:...), or None."""
    text = re.sub(r"^\[(.*)\](?::\d+)?$|^([\d.]+):\d+$", r"\1\2", text.strip())  # some proxies add the port
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=4096)
def believed_address(peer: str, *claims: str) -> str:
    """Return the first address in `claims` if the peer may be a proxy of ours, or else the peer's."""
    address = plain_address(peer)
    if address and address.is_private:  # anybody else could claim anything
        return str(next(filter(None, map(plain_address, claims)), address))
    return str(address or peer)


def client_ip(headers: Mapping[str, str], peer: str) -> str:
    """Return the client's IP address, from X-Real-IP or last in X-Forwarded-For if they are believed."""
    # Cut, because a cache keeps them; an address has 45 characters, and perhaps a zone.
    real_ip = headers.get("x-real-ip", "")[:SHOWN_CHARS_MAX]
    forwarded_for = headers.get("x-forwarded-for", "").rpartition(",")[2][:SHOWN_CHARS_MAX]
    return believed_address(peer, real_ip, forwarded_for)


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """Return the network of an IP address: /24, in IPv6 /48. Anything else, such as a network, stays."""
    if ip := plain_address(address):
        return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))
    return address


class Delivery(NamedTuple):
    """What is kept of a request because columns need it; the spool's JSON has the same names."""

    app: str
    client_ip: str  # or only its network, or "", if no column needs more
    client_network: str
    headers: Mapping[str, str]  # names in lower case
    received_at: float  # seconds since the epoch


class Quarantined(NamedTuple):
    """An event that cannot be stored as it is, with all that is needed to try again."""

    app_id: str
    table: str | None
    column: str | None
    reason: str
    about: str | None  # its Delivery as JSON; None for a whole flush that could not be read
    event: str  # its JSON


class Flaw(ValueError):
    """A body has NaN, which is not JSON, or a key twice in an object; str() says which. See the decoders."""


def refuse_flaw(*_: object) -> NoReturn:
    raise Flaw


def unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    return result if len(result) == len(pairs) else refuse_flaw()


def marked_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(result := dict(pairs)) == len(pairs):
        return result
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return result | {key: Flaw(f"the key {show(key)} stands twice in one object") for key in twice}


def exact_number(text: str) -> float | Decimal:
    """Return a JSON number with a fraction or an exponent; as Decimal where a float would change it."""
    number = float(text)
    # Up to 15 digits survive the way to binary and back (IEEE 754; DBL_DIG in C).
    if len(text) <= 16 and "e" not in text and "E" not in text:
        return number
    exact = Decimal(text)
    return number if Decimal(repr(number)) == exact else exact


decoder = partial(json.JSONDecoder, parse_float=exact_number)
DECODER = decoder(object_pairs_hook=unique_object, parse_constant=refuse_flaw)
# For a body that DECODER, which is faster, has refused: puts each Flaw in the place of its value.
MARKING_DECODER = decoder(object_pairs_hook=marked_object, parse_constant=lambda s: Flaw(f"{s} is not JSON"))


def find_flaw(value: object) -> Flaw | None:
    return next((item for items in levels(value) for item in items if isinstance(item, Flaw)), None)


def refused_events(problems: Sequence[Problem], count: int, label: str = "invalid_events") -> Refusal:
    bad = len({problem.index for problem in problems})
    reason = f"{bad} of {count} events do not fit, none was stored" if count > 1 else "the event does not fit"
    if len(problems) > PROBLEMS_MAX:
        reason = f"at least {reason}; the first {PROBLEMS_MAX} reasons are listed"
    return Refusal(label, reason, problems[:PROBLEMS_MAX], count)


def flawed_body(document: object) -> Refusal:
    """Return the refusal of a body, as MARKING_DECODER reads it, with the events that the flaws are in."""
    found = document.get("events") if isinstance(document, dict) else None
    events: list[Any] = found if isinstance(found, list) else []
    all_problems = (
        Problem(index, key[:NAME_BYTES_MAX], str(flaw))
        for index, event in enumerate(events[:EVENTS_MAX])
        if isinstance(event, dict) and find_flaw(event) is not None
        for key, value in event.items()
        if (flaw := find_flaw(value)) is not None
    )
    # No key has been checked yet, and to find all may take a hundred times as long as to decode the body.
    if problems := list(itertools.islice(all_problems, PROBLEMS_MAX + 1)):
        return refused_events(problems, len(events))
    return Refusal("invalid_body", str(find_flaw(document)))


def decode_body(body: bytes) -> dict[str, object]:
    """Return the JSON object (RFC 8259) in a request's body. Raises Refusal for anything else."""
    try:
        text = body.decode().removeprefix("\ufeff")
        try:
            document = DECODER.decode(text)
        except Flaw:
            raise flawed_body(MARKING_DECODER.decode(text)) from None
    except UnicodeDecodeError as error:
        reason = f"the body is not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except (ValueError, ArithmeticError):
        reason = "the body has a number that is too long to be read"
    except RecursionError:
        reason = "the body's JSON is nested too deeply"
    else:
        if type(document) is dict:
            return document
        reason = f'expected an object with "secret_key" and "events", got {show(document)}'
    raise Refusal("invalid_body", reason)


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """Return a body of at most `limit` bytes without its coding (RFC 9110, section 8.4.1). Raises Refusal."""
    # Some clients send deflate without the zlib header (RFC 1950, section 2.2).
    has_header = len(body) >= 2 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0
    stream = zlib.decompressobj({"gzip": 31, "deflate": 15 if has_header else -15}[coding])
    try:
        result = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refusal("invalid_body", f"the body is not {coding}: {reason_of(error)}") from None
    if len(result) > limit:
        raise Refusal("too_large", f"the body inflates to more than {limit} bytes")
    if not stream.eof:
        raise Refusal("invalid_body", f"the body's {coding} data is cut short")
    if stream.unused_data:
        raise Refusal("invalid_body", f"the body has {len(stream.unused_data)} bytes after its {coding} data")
    return result


def filled_value(column: Column, delivery: Delivery) -> object:
    """Return the value of a column that is filled from the request, None for NULL. Raises ValueError."""
    if column.header:
        value = delivery.headers.get(column.header)
        if value is None and column.required:
            raise ValueError(f"the request header {column.header} is missing, but required")
        try:  # UTF-8 if it can be read as that, else Latin-1 (RFC 9110, section 5.5)
            return None if value is None else value.encode("latin-1").decode()
        except UnicodeDecodeError:
            return value
    value = delivery.app if column.source is Source.APP_ID else getattr(delivery, str(column.source))
    return None if value == "" else value


# PostgreSQL manual, COPY, "Text Format".
COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def quote(text: str) -> str:
    """Return a text that has no NUL as a string literal (PostgreSQL manual, 4.1.2.1)."""
    # No other character is special: every connection of ours asks for standard_conforming_strings = on.
    return "'" + text.replace("'", "''") + "'"


def copy_text(text: str) -> str:
    # Nearly all text is printable, and has no control characters then.
    return text if text.isprintable() and "\\" not in text else text.translate(COPY_ESCAPES)


class TableIntake:
    """How events become rows of one table.

    A row has the columns that come from the event, the catch-all column last, then those that the request
    fills. It is a line for COPY or, with unique columns, as COPY skips no repeated values, for VALUES (...).
    """

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.is_copied = not any(column.unique for column in table.columns)
        filled = [c for c in table.columns if c.header or c.source]
        own = sorted((c for c in table.columns if c not in filled), key=lambda c: c.extra)
        self.columns = (*own, *filled)
        self.known = frozenset(c.name for c in own if not c.extra) | {TABLE_KEY}  # keys that are not ignored
        self.extra = next((c.name for c in own if c.extra), "")
        self._null, self._separator = ("\\N", "\t") if self.is_copied else ("NULL", ",")
        self._filled = [(column, self._encoder(column.type)) for column in filled]
        # Of each column: its name, whether it is required, whether a string may be a field as it is, encoder
        self._own = [
            (c.name, c.required, self.is_copied and c.type is Type.STRING, self._encoder(c.type)) for c in own
        ]

    def filled(self, delivery: Delivery) -> tuple[list[str], list[tuple[str, str]]]:
        """Return the fields that a request fills, and (column, reason) for what cannot be filled."""
        fields, problems = [], []
        for column, to_field in self._filled:
            try:
                value = filled_value(column, delivery)
                fields.append(self._null if value is None else to_field(value))
            except ValueError as error:
                problems.append((column.name, str(error)))
        return fields, problems

    def rows(self, batch: Batch, places: Iterable[int], limit: float) -> tuple[dict[int, str], list[Problem]]:
        """Return rows of a batch's events, by place, and the problems of the others, up to `limit`."""
        events, problems, rows = batch.events, [], {}
        filled, lacking = self.filled(batch.delivery)
        own, extra, null, join = self._own, self.extra, self._null, self._separator.join
        width = len(self.columns)
        for index in places:
            event = self._with_extra(events[index]) if extra else events[index]
            fields = []
            for name, required, is_text, to_field in own:
                value = event.get(name)
                # copy_text(to_string()) written out: printable text has no surrogates and no NUL either.
                if is_text and type(value) is str and value.isprintable() and "\\" not in value:
                    fields.append(value)
                elif value is not None:
                    try:
                        fields.append(to_field(value))
                    except ValueError as error:
                        problems.append(Problem(index, name, str(error)))
                elif required:
                    what = "null" if name in event else "missing"
                    problems.append(Problem(index, name, f"{what}, but required"))
                else:
                    fields.append(null)
            fields += filled
            if len(fields) == width:
                rows[index] = join(fields)
                continue
            problems += [Problem(index, column, reason) for column, reason in lacking]
            if (more := width - len(fields) - COLUMN_PROBLEMS_MAX) > 0:
                problems[-more:] = [Problem(index, None, f"and {counted(more, 'column')} more")]
            if len(problems) > limit:
                break
        return rows, problems

    def why_ignored(self, key: str) -> str:
        for c, _ in self._filled:
            if c.name == key:
                source = f"the request header {c.header}" if c.header else f"the server ({c.source})"
                return f'the key "{key}" is ignored: its column is filled from {source}'
        return f"unknown key {show(key)}{suggestion(key, self.known - {TABLE_KEY})}"

    def _with_extra(self, event: dict[str, object]) -> dict[str, object]:
        """Return an event with the value of the catch-all column: the keys that have no column."""
        return event | {self.extra: {key: event[key] for key in event if key not in self.known} or None}

    def _encoder(self, kind: Type) -> Callable[[object], str]:
        convert = CONVERTERS[kind]
        if not self.is_copied:
            return lambda value: quote(convert(value))
        if kind in (Type.STRING, Type.JSON):
            return lambda value: copy_text(convert(value))
        return convert  # The texts of all other types have nothing to escape.


Rows = Mapping[TableIntake, Mapping[int, str]]  # by the places of their events in the batch


def storable(text: str) -> str:
    """Return a text with JSON's escapes for lone surrogates, which SQLite cannot hold: they have no UTF-8."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


@dataclass(slots=True, eq=False)
class Batch:
    """The events of one request, and the rows of those that fit; the others have problems."""

    delivery: Delivery
    events: list[Any]  # empty in the writer, for which `body` or `spooled` is enough
    rows: dict[TableIntake, dict[int, str]] = field(default_factory=dict)  # by their places in `events`
    accepted: int = 0  # how many events fit
    problems: list[Problem] = field(default_factory=list)
    unknown: list[tuple[TableIntake, int]] = field(default_factory=list)  # events with keys that are ignored
    quarantines: bool = False  # the app's policy for bad events
    # Set when the batch comes in a request, before the writer gets it. (A replay has no use for this.)
    body: bytes = b""
    warnings: Sequence[str] = ()
    kept: Sequence[int] = ()  # the ids in the quarantine of the events with problems
    spooled: str = ""  # text(), if it was made in advance
    # Set by Writer.submit().
    since: float = 0.0  # when that was, by the writer's clock
    tell: Callable[[Batch, str | Refusal], object] = lambda *_: None

    def text(self) -> str:
        """Return the batch's JSON for the spool, without the events that have problems."""
        events: Any = self.events or decode_body(self.body)["events"]
        if bad := {problem.index for problem in self.problems}:
            events = [event for index, event in enumerate(events) if index not in bad]
        return storable(exact_json(self.delivery._asdict() | {"events": events}))

    def quarantined(self, problems: Sequence[Problem]) -> list[Quarantined]:
        """Return the events that problems, in the order of their places, are about, for the quarantine."""
        app, about, items = self.delivery.app, exact_json(self.delivery._asdict()), []
        for index, found in itertools.groupby(problems, lambda problem: problem.index or 0):
            event, reasons = self.events[index], list(found)
            name = event.get(TABLE_KEY) if isinstance(event, dict) else None
            table = name if isinstance(name, str) else None
            reason = "; ".join(f"{p.column}: {p.reason}" if p.column else p.reason for p in reasons)
            items.append(Quarantined(app, table, reasons[0].column, reason, about, exact_json(event)))
        return items


def unknown_keys(document: Mapping[str, object], batch: Batch) -> list[str]:
    """Return what was ignored in a request: each unknown key once for its table, with its first place."""
    keys = [key for key in document if key not in REQUEST_KEYS][:UNKNOWN_KEYS_MAX]
    texts = {("", key): f"unknown key {show(key)}{suggestion(key, REQUEST_KEYS)}" for key in keys}
    for table, index in batch.unknown:
        new = {(table.name, key) for key in batch.events[index].keys() - table.known} - texts.keys()
        for name, key in sorted(new):
            if len(texts) >= UNKNOWN_KEYS_MAX:
                return [*texts.values(), "there are more unknown keys"]
            texts[name, key] = f"events[{index}]: {table.why_ignored(key)}"
    return list(texts.values())


class Intake:
    """How requests of one app become batches."""

    def __init__(self, app: App, tables: Mapping[str, TableIntake]) -> None:
        """`tables` are those of the schema: the apps share them, so that a flush can merge their rows."""
        self.app = app
        self._key = app.secret_key.encode(errors="surrogatepass")
        self.tables = {name: tables[name] for name in app.tables}
        columns = [column for table in self.tables.values() for column in table.columns]
        self.headers = sorted({column.header for column in columns if column.header})
        self._sources = {column.source for column in columns}

    def delivery(self, headers: Mapping[str, str], peer: str) -> Callable[[float], Delivery]:
        """Return a function that makes the Delivery of a request with these headers from its time."""
        ip = client_ip(headers, peer)
        if Source.CLIENT_IP not in self._sources:
            ip = network_of(ip) if Source.CLIENT_NETWORK in self._sources else ""
        kept = {name: headers[name] for name in self.headers if name in headers}
        return partial(Delivery, self.app.id, ip, network_of(ip), kept)

    def batch(self, body: bytes, delivery: Delivery) -> Batch:
        """Return the batch in a request's body. Raises Refusal."""
        document = decode_body(body)
        key, events = document.get("secret_key"), document.get("events")
        if type(key) is not str:
            got = "another type" if "secret_key" in document else "nothing"  # not shown: it may be the key
            raise Refusal("invalid_body", f'expected a string "secret_key", got {got}')
        if not hmac.compare_digest(key.encode(errors="surrogatepass"), self._key):
            raise Refusal("wrong_key", "the secret key is wrong")
        if type(events) is not list:
            got = show(events) if "events" in document else "nothing"
            raise Refusal("invalid_body", f'expected an array "events", got {got}')
        if len(events) > EVENTS_MAX:
            raise Refusal("too_large", f"{len(events)} events; a request may bring {EVENTS_MAX}")
        if (chars := sum(map(len, delivery.headers.values()))) * len(events) > FLUSH_CHARS_MAX:  # in all rows
            raise Refusal("too_large", f"{len(events)} events, and {chars} bytes of headers for each")
        # What is deeper might not be read back from the spool. Each level has a bracket, like each event.
        brackets = body.count(b"{") + body.count(b"[") - len(events)
        if brackets >= BODY_DEPTH_MAX and is_deeper(document, BODY_DEPTH_MAX):
            raise Refusal("invalid_body", f"the body's JSON is nested deeper than {BODY_DEPTH_MAX} levels")
        batch = self.convert(events, delivery, math.inf if self.app.quarantines else PROBLEMS_MAX)
        if (problems := batch.problems) and not self.app.quarantines:
            names = [events[p.index or 0].get(TABLE_KEY) if p.column == TABLE_KEY else None for p in problems]
            label = "unknown_table" if all(type(name) is str for name in names) else "invalid_events"
            raise refused_events(problems, len(events), label)
        has_unknown = batch.unknown or not REQUEST_KEYS.issuperset(document)
        batch.body, batch.warnings = body, unknown_keys(document, batch) if has_unknown else ()
        return batch

    def convert(self, events: list[Any], delivery: Delivery, limit: float = math.inf) -> Batch:
        """Return a batch of events, with their rows and problems; gives up when these exceed `limit`."""
        batch = Batch(delivery, events, quarantines=self.app.quarantines)
        places: dict[TableIntake, list[int]] = {}
        problems = batch.problems
        for index, event in enumerate(events):
            name = event.get(TABLE_KEY) if type(event) is dict else None
            if type(name) is str and name in self.tables:
                table = self.tables[name]
                places.setdefault(table, []).append(index)
                if not (table.extra or table.known.issuperset(event)):
                    batch.unknown.append((table, index))
            elif type(event) is not dict:
                problems.append(Problem(index, None, f"expected an object, got {show(event)}"))
            elif type(name) is not str:
                got = show(name) if TABLE_KEY in event else "nothing"
                problems.append(Problem(index, TABLE_KEY, f"expected the name of a table, got {got}"))
            else:
                near = suggestion(name, self.tables) if len(problems) < UNKNOWN_KEYS_MAX else ""
                problems.append(Problem(index, TABLE_KEY, f"the app has no table {show(name)}{near}"))
        for table, indexes in places.items():
            rows, misfits = table.rows(batch, indexes, limit - len(problems))
            problems += misfits
            if rows:
                batch.rows[table] = rows
                batch.accepted += len(rows)
        problems.sort(key=lambda problem: problem.index or 0)
        return batch


def intakes(schema: Schema) -> dict[str, Intake]:
    tables = {name: TableIntake(table) for name, table in schema.tables.items()}
    return {app.id: Intake(app, tables) for app in schema.apps.values()}


# --- SQL ----------------------------------------------------------------------
# The texts of statements, and what an existing database lacks. Pure. First the statements that store events,
# and those of the ledger, which make a flush exactly-once.


def identifier(name: str) -> str:
    """Return a quoted identifier (PostgreSQL manual, 4.1.1)."""
    return '"' + name.replace('"', '""') + '"'


class Message(NamedTuple):
    """A simple-protocol message, and the data of its COPY statements in their order."""

    sql: str
    copies: Sequence[bytes] = ()
    inserts: Sequence[tuple[str, int]] = ()  # the table and the number of rows of each INSERT


# The settings are the transaction's own: a pooler may share the session. Notices of triggers would fill the
# connection while we fill it with rows; keep-alives end a transaction, and its lock on the ledger, 11 s after
# the network has lost its client. (SET takes a tenth of the time that a SELECT of set_config() does.)
FLUSH_START = f"""BEGIN;
SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS};
SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_S}s';
SET LOCAL client_min_messages = error;
SET LOCAL tcp_keepalives_idle = 5;
SET LOCAL tcp_keepalives_interval = 2;
SET LOCAL tcp_keepalives_count = 3;
"""
PATIENTLY = f"SET LOCAL statement_timeout = '{LONG_STATEMENT_TIMEOUT_S}s';\n"

# now(), and beside that a setting: with synchronous_commit = off a server may forget commits when it crashes,
# so for ours it becomes `local`; a stronger setting stays. A statement of its own would cost more.
NOW_DURABLY = (
    "CASE WHEN set_config('synchronous_commit', CASE current_setting('synchronous_commit')"
    " WHEN 'off' THEN 'local' ELSE current_setting('synchronous_commit') END, true) IS NOT NULL"
    " THEN now() END"
)
LEDGER_REFUSAL = "21000"  # cardinality_violation: what RAISE fails with, by a subquery that has two rows

# Raises an epoch's row in the ledger to the number of a flush. If it is not there, belongs to a session with
# another token or is that far already, the transaction fails: a message may come late, when its flush was
# given up and replayed elsewhere, and must not store it again. (1/0 would fail when it is planned.)
RAISE = (
    f"WITH raised AS (UPDATE {LEDGER} SET flush = {{2}}, updated_at = {NOW_DURABLY}"
    " WHERE epoch = {0} AND session = {1} AND flush < {2} RETURNING 1)"
    " SELECT CASE count(*) WHEN 1 THEN 1 ELSE (SELECT 1 FROM generate_series(1, 2)) END FROM raised"
)
PREPARE_RAISE = f"PREPARE attolytics_raise (uuid, uuid, bigint) AS {RAISE.format('$1', '$2', '$3')}"
EXECUTE_RAISE = "EXECUTE attolytics_raise ({}, {}, {})"


def raise_sql(epoch: str, token: str, number: int, form: str = RAISE) -> str:
    return f"{form.format(quote(epoch), quote(token), number)};\n"


def take_over_sql(epochs: Iterable[str], token: str) -> str:
    """Return the statement by which a session takes over, or makes, the ledger's rows of some epochs."""
    # It waits for messages of older sessions that still run; those that come later will fail.
    rows = ",".join(f"({quote(epoch)}, 0, {quote(token)}, {NOW_DURABLY})" for epoch in sorted(epochs))
    return (
        f"INSERT INTO {LEDGER} (epoch, flush, session, updated_at) VALUES {rows} ON CONFLICT (epoch)"
        " DO UPDATE SET session = excluded.session, updated_at = excluded.updated_at"
        " RETURNING epoch::text, flush"
    )


# Ends the sessions whose open transactions hold the ledger's rows of some epochs.
TERMINATE_HOLDERS = (
    f"SELECT pg_terminate_backend(k.pid) FROM {LEDGER} l JOIN pg_locks k ON k.transactionid = l.xmax"
    " WHERE k.locktype = 'transactionid' AND k.granted AND l.epoch IN ({})"
)


@lru_cache  # of 128 tables
def insert_sql(table: TableIntake, partition_key: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return what an INSERT has before and after its rows or, for a table that is copied, COPY and ""."""
    columns = ",".join(identifier(column.name) for column in table.columns)
    into = f"{identifier(table.name)} ({columns})"
    if table.is_copied:
        return f"COPY {into} FROM STDIN", ""
    unique = [column.name for column in table.columns if column.unique]
    # With one unique column only its conflicts are skipped, and one with another constraint (of the operator)
    # is an error. SQL cannot name two. (In a partitioned table the unique index includes the partition key.)
    names = ",".join(map(identifier, dict.fromkeys([*unique, *partition_key])))
    target = f" ({names})" if len(unique) == 1 else ""
    return f"INSERT INTO {into} VALUES (", f") ON CONFLICT{target} DO NOTHING"


def insert_message(
    start: str, parts: Iterable[Rows], end: str, partition_keys: Mapping[str, tuple[str, ...]] = {}
) -> Message:
    """Return the message that stores rows of several batches between two texts of SQL."""
    # By TableIntake, not by name: while a schema is replaced, rows of the old one and the new one may meet.
    by_table: dict[TableIntake, list[str]] = {}
    for part in parts:
        for table, found in part.items():
            by_table.setdefault(table, []).extend(found.values())
    sql, copies, inserts = [start], [], []
    # Always in the same order of tables, so that instances do not lock each other out.
    for table, rows in sorted(by_table.items(), key=lambda item: item[0].name):
        before, after = insert_sql(table, partition_keys.get(table.name, ()))
        if table.is_copied:
            sql.append(f"{before};\n")
            copies.append("\n".join([*rows, ""]).encode())
        else:
            sql.append(f"{before}{'),('.join(rows)}{after};\n")
            inserts.append((table.name, len(rows)))
    return Message("".join(sql) + end, copies, inserts)


def refused_row(error: DatabaseError, part: Sequence[Batch]) -> tuple[Batch, int] | None:
    """Return the batch and the place of the event that an error is about: the only one, or what COPY says.

    The context (PostgreSQL manual, 55.8: W) is in the server's language, like `COPY t, line 3, column x`. Of
    two such lines neither is believed: one may quote a client, and a reload may bring two COPYs of a table.
    """
    rows = [(table, batch, place) for batch in part for table, found in batch.rows.items() for place in found]
    if len(rows) > 1:
        context = error.fields.get("W", "")
        lines = [
            (table, int(line) - 1)
            for table in {table for table, _, _ in rows}
            for line in re.findall(rf"^COPY {re.escape(table.name)}, [^\d\n]*(\d+)", context, re.MULTILINE)
        ]
        # With 54000 (a row is too big for a page) the line is wrong: PostgreSQL has read on by then.
        if len(lines) != 1 or error.sqlstate == "54000":
            return None
        [(copied, line)] = lines
        rows = [row for row in rows if row[0] is copied][line : line + 1]
    return rows[0][1:] if rows else None


# The rest is about tables. A Schema says what a database should have, its catalog what it has, and a plan is
# a list of steps: what is to be done, and by whom. A start, --check and --migrate all go by it.

# The name of a column type in SQL, and which types of an existing column (pg_type.typname) will do.
SQL_TYPES: Mapping[Type, tuple[str, Set[str]]] = {
    Type.BOOL: ("boolean", {"bool"}),
    Type.I32: ("integer", {"int4"}),
    Type.I64: ("bigint", {"int8"}),
    Type.F32: ("real", {"float4"}),
    Type.F64: ("double precision", {"float8"}),
    Type.STRING: ("varchar", {"varchar", "text", "citext"}),
    Type.TIMESTAMP: ("timestamp with time zone", {"timestamptz"}),
    Type.JSON: ("jsonb", {"jsonb"}),
    Type.UUID: ("uuid", {"uuid"}),
}
CREATE_LEDGER = (
    f"CREATE TABLE {LEDGER} (epoch uuid PRIMARY KEY, flush bigint NOT NULL, session uuid,"
    " updated_at timestamp with time zone NOT NULL DEFAULT now())"
)


class Index(NamedTuple):
    """An index on a column, and in a partitioned table on the columns of its key behind it."""

    table: str
    column: str
    unique: bool = False
    method: str = "btree"
    more: tuple[str, ...] = ()  # columns, of the partition key

    def sql(self, how: str = "", on: str = "") -> str:
        """Return the statement that creates it. Without a name in `how` PostgreSQL finds a free one."""
        create = "CREATE UNIQUE INDEX" if self.unique else "CREATE INDEX"
        method = "" if self.method == "btree" else f"USING {self.method} "
        columns = ", ".join(map(identifier, (self.column, *self.more)))
        return f"{create} {how}ON {on or identifier(self.table)} {method}({columns})"

    def names(self) -> tuple[str, str]:
        """Return the name that PostgreSQL gives it, and one that we give it if that is too long or taken."""
        plain, end = f"{self.table}_{self.column}_idx", f"_{zlib.crc32(self.sql().encode()):08x}"
        return plain, plain.encode()[: NAME_BYTES_MAX - len(end)].decode(errors="ignore") + end


def wanted_indexes(table: Table) -> list[Index]:
    # A b-tree on jsonb only helps to compare whole values; GIN finds keys and values in them.
    return [
        Index(table.name, c.name, c.unique, "gin" if c.type is Type.JSON and not c.unique else "btree")
        for c in table.columns
        if c.unique or c.indexed
    ]


class ExistingColumn(NamedTuple):
    type: str  # pg_type.typname
    not_null: bool = False  # and PostgreSQL fills nothing in
    has_default: bool = False
    generated: str = ""  # if it is GENERATED ALWAYS, and so refuses values: what ALTER COLUMN ends that with
    primary_key: str = ""  # the name of the constraint, if the column is part of it


class ExistingIndex(NamedTuple):
    column: str  # the first one
    columns: Collection[str] = ()  # all; none if it is partial, has expressions or may be checked late
    unique: bool = False
    method: str = "btree"
    valid: bool = True  # False while it is built, and when its build was interrupted
    name: str = ""
    sql_name: str = ""  # quoted, and with its schema where it needs that

    def serves_as(self, index: Index) -> bool:
        if index.unique:
            return self.valid and self.unique and {*self.columns} == {index.column, *index.more}
        return self.valid and self.column == index.column


class ExistingTable(NamedTuple):
    columns: Mapping[str, ExistingColumn]
    indexes: Sequence[ExistingIndex] = ()
    kind: str = "table"
    can_insert: bool = True
    can_select: bool = True
    row_security: bool = False  # applies to our user
    partition_key: Sequence[str] = ()  # with those of its partitions; "" is an expression; () without any
    names: Collection[str] = ()  # those for wanted indexes that are taken in its PostgreSQL schema
    ask: Callable[[str], Sequence[Sequence[Any]]] = lambda _sql: ()  # runs a query that only some steps need


def catalog_sql(schema: Schema) -> str:
    """Return the query for a schema's tables and the ledger: name, and ExistingTable's fields but `ask`."""
    tables = ",".join(quote(name) for name in [*schema.tables, LEDGER])
    indexes = [index for table in schema.tables.values() for index in wanted_indexes(table)]
    return f"""
SELECT w.name,
    (SELECT coalesce(json_object_agg(a.attname, json_build_array(t.typname,
            a.attnotnull AND NOT a.atthasdef AND a.attidentity = '',
            a.atthasdef AND a.attgenerated = '', CASE WHEN a.attgenerated <> '' THEN 'DROP EXPRESSION'
                WHEN a.attidentity = 'a' THEN 'SET GENERATED BY DEFAULT' ELSE '' END,
            coalesce((SELECT k.conname::text FROM pg_constraint k WHERE k.conrelid = c.oid
                AND k.contype = 'p' AND a.attnum = ANY (k.conkey)), '')) ORDER BY a.attnum), '{{}}')
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
    (SELECT coalesce(json_agg(json_build_array(a.attname,
            (SELECT coalesce(json_agg(k.attname), '[]') FROM pg_attribute k
                WHERE i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
                AND k.attrelid = c.oid AND k.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])),
            i.indisunique, m.amname, i.indisvalid, x.relname, x.oid::regclass)), '[]')
        FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0] WHERE i.indrelid = c.oid),
    CASE c.relkind WHEN 'f' THEN 'foreign table' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
        WHEN 'i' THEN 'index' WHEN 'I' THEN 'index' WHEN 'c' THEN 'type' WHEN 'v' THEN 'view'
            || CASE WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgtype & 68 = 68)
                THEN '' ELSE ' without an INSTEAD OF INSERT trigger' END ELSE 'table' END,
    has_table_privilege(c.oid, 'INSERT') AND (w.name <> '{LEDGER}' OR has_table_privilege(c.oid, 'UPDATE')),
    has_table_privilege(c.oid, 'SELECT'), row_security_active(c.oid),
    (WITH RECURSIVE t(id) AS (SELECT c.oid UNION SELECT inhrelid FROM pg_inherits JOIN t ON inhparent = t.id)
        SELECT coalesce(json_agg(DISTINCT coalesce(a.attname, '')), '[]') FROM t JOIN pg_partitioned_table p
        ON p.partrelid = t.id CROSS JOIN unnest(p.partattrs::int2[]) k(number) LEFT JOIN pg_attribute a
        ON a.attrelid = p.partrelid AND a.attnum = k.number),
    (SELECT coalesce(json_agg(o.relname), '[]') FROM pg_class o WHERE o.relnamespace = c.relnamespace
        AND o.relname = ANY (ARRAY[{",".join(quote(index.names()[0]) for index in indexes)}]::name[]))
FROM unnest(ARRAY[{tables}]::text[]) w(name) JOIN pg_class c ON c.oid = to_regclass(quote_ident(w.name))"""


class Way(Enum):
    """Who takes a step, in the order in which they are taken."""

    CREATE = auto()  # every start
    ALTER = auto()  # --migrate; without it the tables do not fit
    BUILD = auto()  # every start; also drops what an interrupted build left behind
    HAND = auto()  # the operator: it blocks, rewrites, drops or grants something


@dataclass(frozen=True, slots=True)
class Step:
    """Something that does not fit, and the statements that mend it."""

    way: Way
    table: str
    reason: str
    statements: tuple[str, ...]  # none if only another schema mends it
    index: Index | None = None  # the one that it builds; then every start takes it, also if it is to ALTER


def statements_of(steps: Iterable[Step]) -> list[str]:
    return [statement for step in steps for statement in step.statements]


def column_misfits(table: Table, existing: ExistingTable) -> Iterator[tuple[Way, str, str]]:
    """Yield what is wrong with columns: the way to mend it, the reason, the action for ALTER TABLE."""
    quick = Way.ALTER if existing.kind == "table" else Way.HAND
    for column in table.columns:
        name, (wanted, accepted) = identifier(column.name), SQL_TYPES[column.type]
        found, place = existing.columns.get(column.name), f', column "{column.name}": '
        if not found:
            # The rows, and events that were taken by the old schema, have no value. New events need one.
            null = " /* NOT NULL when all rows have values */" if column.required else ""
            yield quick, f' has no column "{column.name}"', f"ADD COLUMN {name} {wanted}{null}"
            continue
        if found.generated:
            reason = f"{place}PostgreSQL generates it, so it takes no values"
            yield Way.HAND, reason, f"ALTER COLUMN {name} {found.generated}"
        if found.type not in accepted:
            # The default may not fit the new type, and is of no use: a missing value is stored as NULL.
            drop = f"ALTER COLUMN {name} DROP DEFAULT, " if found.has_default else ""
            change = f"{drop}ALTER COLUMN {name} TYPE {wanted} USING {name}::text::{wanted}"
            yield Way.HAND, f"{place}the type is {found.type}, expected {wanted}", change
    required = {column.name for column in table.columns if column.required}
    for column_name, found in existing.columns.items():
        if found.not_null and column_name not in required:
            reason = f', column "{column_name}": NOT NULL without a default, not required in the schema'
            drop = f"DROP CONSTRAINT IF EXISTS {identifier(found.primary_key)}, " if found.primary_key else ""
            action = f"{drop}ALTER COLUMN {identifier(column_name)} DROP NOT NULL"
            yield Way.HAND if drop else quick, reason, action


def table_steps(table: Table, existing: ExistingTable, user: str) -> Iterator[Step]:
    name, kind, place = identifier(table.name), existing.kind, f'table "{table.name}"'
    by_hand = partial(Step, Way.HAND, table.name)
    if kind not in ("table", "view", "foreign table"):
        other_name = identifier(table.name.encode()[: NAME_BYTES_MAX - 4].decode(errors="ignore") + "_old")
        rename = f"ALTER {kind.upper()} {name} RENAME TO {other_name}"
        # INSERT may work with a view without a trigger, but COPY does not.
        yield by_hand(f"{place}: the name belongs to a {kind}", () if kind.startswith("view") else (rename,))
        return
    unique = any(column.unique for column in table.columns)
    if unique and kind != "table":
        yield by_hand(f"{place}: a {kind} cannot have unique columns", ())
    if not existing.can_insert or (unique and not existing.can_select):  # ON CONFLICT reads as well
        reason = f"{place}: no permission to {'select' if existing.can_insert else 'insert'}"
        yield by_hand(reason, (f"GRANT SELECT, INSERT ON {name} TO {identifier(user)}",))
    if existing.row_security and not unique:  # COPY cannot do it, INSERT can
        reason = f'{place}: row-level security applies to user "{user}"'
        yield by_hand(reason, (f"ALTER ROLE {identifier(user)} BYPASSRLS",))
    for way, reason, action in column_misfits(table, existing):
        alter = f"ALTER TABLE {name} {action}"  # which cannot mend a view
        yield Step(way, table.name, place + reason, () if kind == "view" else (alter,))


def partitioned_steps(table: Table, existing: ExistingTable, index: Index, reason: str) -> Iterator[Step]:
    """Yield what an index on a partitioned table needs: PostgreSQL builds none CONCURRENTLY there."""
    if index.unique:
        # A unique index has to include the partition key. A repeated event repeats both if it brings both.
        key = existing.partition_key
        index = index._replace(more=tuple(name for name in key if name != index.column))
        reason += f" on ({', '.join((index.column, *index.more))})"
        sent = {c.name for c in table.columns if not (c.header or c.source or c.extra)}
        if other := ", ".join(name or "an expression" for name in key if name not in sent):
            reason += f", nor can there be: it would take the partition key, and no event brings {other}"
            yield Step(Way.HAND, table.name, reason, ())
            return
    if any(item.serves_as(index) for item in existing.indexes):
        return
    way, statements = Way.ALTER, [index.sql()]
    if not existing.can_select or existing.ask(f"SELECT 1 FROM {identifier(table.name)} LIMIT 1"):
        way, statements = Way.HAND, []
        holders = (  # of its rows: their names, bare and as SQL
            "SELECT c.relname, c.oid::regclass::text FROM pg_class c"
            f" JOIN pg_partition_tree({quote(identifier(table.name))}) p ON c.oid = p.relid"
            " WHERE c.relkind = 'r' ORDER BY p.level, c.relname"
        )
        for partition, on in existing.ask(holders):
            own = index._replace(table=partition)
            statements.append(own.sql(f"CONCURRENTLY IF NOT EXISTS {identifier(own.names()[1])} ", on))
        # This one builds nothing but attaches the others. All have names, so that they may be run again.
        statements.append(index.sql(f"IF NOT EXISTS {identifier(index.names()[1])} "))
        reason += "; building it on a partitioned table blocks inserts, but not in these steps"
    yield Step(way, table.name, reason, tuple(statements), index)


def index_steps(table: Table, existing: ExistingTable) -> Iterator[Step]:
    for index in wanted_indexes(table) if existing.kind == "table" else ():
        what = "unique index" if index.unique else "index"
        reason = f'table "{table.name}", column "{index.column}": there is no {what}'
        if existing.partition_key:
            yield from partitioned_steps(table, existing, index, reason)
            continue
        # One of another kind or name is not ours to drop. What is left of ours only slows down inserts.
        ours, kind = index.names(), (index.column, index.unique, index.method)
        left = [item for item in existing.indexes if item.name in ours and not item.valid]
        left = [item for item in left if (*item.columns, item.unique, item.method) == kind]
        for item in left:
            state = f'table "{table.name}", index "{item.name}": its build goes on, or was interrupted'
            drop = f"DROP INDEX CONCURRENTLY IF EXISTS {item.sql_name}"
            yield Step(Way.BUILD, table.name, state, (drop,))
        if not any(item.serves_as(index) for item in existing.indexes):
            plain, coded = index.names()
            is_taken = plain in existing.names and plain not in [item.name for item in left]
            name = coded if is_taken or len(plain.encode()) > NAME_BYTES_MAX else plain
            build = index.sql(f"CONCURRENTLY IF NOT EXISTS {identifier(name)} ")
            yield Step(Way.BUILD, table.name, reason, (build,), index)


def ledger_steps(existing: ExistingTable | None, user: str) -> Iterator[Step]:
    place = f'table "{LEDGER}"'
    if not existing:
        yield Step(Way.CREATE, LEDGER, f"there is no {place}", (CREATE_LEDGER,))
        return
    if "session" not in existing.columns:  # made by an earlier version
        add = f"ALTER TABLE {LEDGER} ADD COLUMN IF NOT EXISTS session uuid"
        yield Step(Way.CREATE, LEDGER, f'{place} has no column "session"', (add,))
    # Citus lists the tables there that it has made its own. raise_sql() works only with others.
    listed = f"SELECT 1 FROM pg_dist_partition WHERE logicalrelid = to_regclass('{LEDGER}')"
    if existing.ask("SELECT to_regclass('pg_dist_partition')") != [[None]] and existing.ask(listed):
        local = f"SELECT undistribute_table('{LEDGER}')"
        yield Step(Way.HAND, LEDGER, f"{place} belongs to Citus, but has to be local", (local,))
    if not (existing.can_insert and existing.can_select):
        grant = f"GRANT SELECT, INSERT, UPDATE ON {LEDGER} TO {identifier(user)}"
        yield Step(Way.HAND, LEDGER, f"{place}: no permission to use it", (grant,))


def make_plan(schema: Schema, catalog: Mapping[str, ExistingTable], user: str) -> list[Step]:
    """Return what is to be done about a database, in the order of Way."""
    steps = list(ledger_steps(catalog.get(LEDGER), user))
    for table in schema.tables.values():
        if existing := catalog.get(table.name):
            steps += [*table_steps(table, existing, user), *index_steps(table, existing)]
            continue
        columns = [
            f"{identifier(c.name)} {SQL_TYPES[c.type][0]}{' NOT NULL' if c.required else ''}"
            for c in table.columns
        ]
        create = f"CREATE TABLE {identifier(table.name)} ({', '.join(columns)})"
        statements = (create, *(index.sql() for index in wanted_indexes(table)))
        steps.append(Step(Way.CREATE, table.name, f'there is no table "{table.name}"', statements))
    return sorted(steps, key=lambda step: step.way.value)


def to_run(text: str, statements: Iterable[str]) -> OperatorError:
    """Return an error with the statements that mend it."""
    return OperatorError("\n".join([text, *(f"  {statement};" for statement in statements)]))


def comment(text: str) -> str:
    return "\n".join(f"-- {line}".rstrip() for line in text.splitlines())


def script(plan: Collection[Step]) -> str:
    """Return a plan as a script: people can read it, and psql runs of it what --migrate would."""
    lines = [comment(f"  {step.reason}") for step in plan]
    if quick := statements_of(step for step in plan if step.way is not Way.HAND):
        lines += ["-- What --migrate would run (it also waits for others, and lets nobody wait):"]
        lines += [f"{statement};" for statement in quick]
    if by_hand := statements_of(step for step in plan if step.way is Way.HAND):
        lines += ["-- What --migrate leaves to you, because it blocks, rewrites, drops or grants something:"]
        lines += [comment(f"  {statement};") for statement in by_hand]
    return "\n".join(lines)


# --- Database URL -------------------------------------------------------------
# libpq's connection URIs, environment variables and password file (PostgreSQL manual, 34.1.1.2, 34.15 and
# 34.16). Pure: texts and mappings in, Target out.

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# The parameters that a URL may have, and the environment variables that apply where it has none.
NAMED_ALIKE = "host port user password passfile options sslmode sslrootcert sslcert sslkey connect_timeout"
PARAMETERS = {key: f"PG{key.upper()}" for key in NAMED_ALIKE.split()}
PARAMETERS |= {"dbname": "PGDATABASE", "application_name": "PGAPPNAME"}
DATABASE_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?"
    r"(?P<host>\[[^\]]*\]|[^:/?\[\]@]*)(?::(?P<port>[^/?@]*))?"
    r"(?:/(?P<dbname>[^?]*))?(?:\?(?P<query>.*))?"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Which database to connect to, and how. str() may stand in a log: it is without the password."""

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
        host = f"[{self.host}]" if ":" in str(self.host) else self.host
        return f'database "{self.dbname}" at {self.socket or f"{host}:{self.port}"} as user "{self.user}"'


def bad_url(reason: str) -> OperatorError:
    return OperatorError(f"database URL: {reason}")


def percent_decode(text: str, what: str) -> str:
    """Return a part of a URL decoded. As in libpq `+` is no space. Raises OperatorError, also for %00."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise bad_url(f"{what} has a percent sign without two hex digits; write it as %25")
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeError:  # Python shows arguments that are not UTF-8 with halves of surrogate pairs
        raise bad_url(f"{what} is not UTF-8 after decoding") from None
    if "\0" in decoded:
        raise bad_url(f"{what} contains %00")
    return decoded


def split_url(url: str) -> dict[str, str]:
    """Return the parameters in a URL. Raises OperatorError; no message has the password."""
    if not (match := DATABASE_URL.fullmatch(url)):
        raise bad_url(
            "expected postgres://user:password@host:port/database;"
            " write special characters percent-encoded, for example @ as %40 and / as %2F"
        )
    parts = match.groupdict(default="")
    query = parts.pop("query")
    parts["host"] = parts["host"].strip("[]")  # around an IPv6 address
    parameters = {key: percent_decode(text, f"the {key}") for key, text in parts.items() if text}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        key = percent_decode(key, "a parameter's name")
        if (key, value) == ("ssl", "true"):  # as in JDBC's URLs, which libpq takes too
            key, value = "sslmode", "require"
        if key not in PARAMETERS or not equals:
            raise bad_url(unknown("parameter", key, PARAMETERS))
        parameters[key] = percent_decode(value, f"the parameter {key}")
    return parameters


def parse_target(
    url: str, environ: Mapping[str, str], os_user: str, socket_dir: str, home: Path
) -> tuple[Target, Path]:
    """Return the target and its password file; `socket_dir` may be "", for none. Raises OperatorError."""
    given = {"host": socket_dir or "localhost", "port": "5432", "user": os_user, "connect_timeout": "0"}
    given |= {key: environ[name] for key, name in PARAMETERS.items() if environ.get(name)}
    given |= {key: value for key, value in split_url(url).items() if value}
    if "," in given["host"]:
        raise bad_url("several hosts are not supported; name one")
    # As in libpq: the system's authorities vouch for anybody, so the name must be checked as well.
    trusts_system = given.get("sslrootcert") == "system"
    sslmode = given.setdefault("sslmode", "verify-full" if trusts_system else "prefer")
    if sslmode not in SSL_MODES:
        raise bad_url(unknown("sslmode", sslmode, SSL_MODES))
    if trusts_system and sslmode != "verify-full":
        raise bad_url("sslrootcert=system needs sslmode=verify-full")
    for key, low, high in (("port", 1, 65535), ("connect_timeout", -1, 3600)):
        if not re.fullmatch(r"-?[0-9]{1,9}", given[key]) or not low <= int(given[key]) <= high:
            raise bad_url(f"{key} must be a number from {low} to {high}")  # what came may be a password
    host, port, timeout = given.pop("host"), int(given.pop("port")), int(given.pop("connect_timeout"))
    passfile = Path(given.pop("passfile", home / ".pgpass"))
    given.setdefault("dbname", given["user"])
    seconds = timeout if timeout > 0 else CONNECT_TIMEOUT_S  # libpq would wait for ever
    path = f"{host.rstrip('/')}/.s.PGSQL.{port}" if host.startswith("/") else None
    target = Target(host=None if path else host, port=port, socket=path, connect_timeout=seconds, **given)
    return target, passfile


PASSFILE_LINE = re.compile(r"(?!#)" + r"((?:\\.|[^:\\])*):" * 4 + r"(.*)")
unescape = partial(re.sub, r"\\(.)", r"\1")


def find_password(passfile: str, target: Target, socket_dir: str) -> str | None:
    directory = target.socket.rpartition("/")[0] if target.socket else ""
    # In the file `localhost` also means the socket in the default directory (PostgreSQL manual, 34.16).
    host = target.host or ("localhost" if directory in (socket_dir, "") else directory)
    wanted = (host, str(target.port), target.dbname, target.user)
    for match in filter(None, map(PASSFILE_LINE.fullmatch, re.split("\r?\n", passfile))):
        *patterns, password = match.groups()
        if all(p == "*" or unescape(p) == value for p, value in zip(patterns, wanted, strict=True)):
            return unescape(password)
    return None


# --- Metrics ------------------------------------------------------------------
# What is counted, and Prometheus' text format. Pure. The values of labels come only from the schema file or
# from us, so that no client can make more of them.

# The name and the labels of each, and its help. Names that end in _total are counters, those with BOUNDS are
# histograms, the others gauges. All but the usual ones of a process get the prefix attolytics_.
FAMILIES = {
    "events_accepted_total app table": "Events answered with 200: stored in the database or the spool.",
    "events_refused_total app reason": "Events not answered with 200, or 1 if a request's were not counted.",
    "events_spooled_total": "Events stored in the spool, those that --retry_quarantine moved there included.",
    "events_replayed_total": "Events that left the spool because they are in the database.",
    "events_quarantined_total": "Events that went to the quarantine, from requests and from the spool.",
    "events_duplicate_total table": "Accepted events skipped, as a unique column had their value already.",
    "http_requests_total status": "Requests answered, and clients turned away, by HTTP status.",
    "database_reconnects_total": "Sessions with the database after the first one.",
    "http_request_duration_seconds": "Time from the first bytes of a request to its answer.",
    "flush_duration_seconds store": "Time that a transaction with new events took, by where it stored them.",
    "flush_events": "New events in a transaction.",
    "build_info version python_version": "Always 1.",
    "spool_bytes": "Size of the spool's files.",
    "spool_events": "Events in the spool that wait for their replay.",
    "spool_limit_bytes": "How large the spool may grow.",
    "spool_oldest_event_age_seconds": "Time since the first event in the spool was received, else 0.",
    "quarantine_events": "Events in the quarantine.",
    "http_connections": "Client connections that are open.",
    "database_up": "1 if the database could be used the last time, else 0.",
    "process_start_time_seconds": "Start time of the process since the Unix epoch in seconds.",
    "process_cpu_seconds_total": "Total user and system CPU time spent in seconds.",
    "process_max_fds": "Maximum number of open file descriptors.",
    "process_resident_memory_bytes": "Resident memory size in bytes.",
    "process_open_fds": "Number of open file descriptors.",
}
# A commit takes about 1 ms; a batch waits about PATIENCE_S at most.
SECONDS_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BOUNDS: Mapping[str, Sequence[float]] = {
    "http_request_duration_seconds": SECONDS_BOUNDS,
    "flush_duration_seconds": SECONDS_BOUNDS,
    "flush_events": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000),
}
Counts = Counter[tuple[str, ...]]  # of one family, by the values of its labels
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{label}="{text.translate(LABEL_ESCAPES)}"' for label, text in labels.items())
    return f"{name}{f'{{{pairs}}}' if pairs else ''} {value}"


class Metrics:
    """What has been counted; for any thread."""

    def __init__(self, schema: Schema) -> None:
        self._lock = threading.Lock()  # guards _numbers
        # By name and the values of the labels: a histogram's buckets and the sum of values, or [number, 0].
        self._numbers: dict[str, dict[tuple[str, ...], list[float]]] = {}
        for name, *label_names in map(str.split, FAMILIES):
            zeros: list[float] = [0] * (len(BOUNDS.get(name, ())) + 2)
            self._numbers[name] = defaultdict(zeros.copy)
            # To Prometheus, what appears as 1 has not increased.
            if not label_names and (name in BOUNDS or name.endswith("_total")):
                self.count(name, 0)
        for status in ("200", "400", "403", "404", "503"):
            self.count("http_requests_total", 0, status)
        for store in ("database", "spool"):
            self.count("flush_duration_seconds", 0, store)
        self.count("build_info", 1, __version__, ".".join(map(str, sys.version_info[:3])))
        self.declare(schema)

    def declare(self, schema: Schema) -> None:
        """Let the counters of a schema's apps and tables start at 0."""
        for app in schema.apps.values():
            for name in app.tables:
                self.count("events_accepted_total", 0, app.id, name)
        for table in schema.tables.values():
            if any(column.unique for column in table.columns):
                self.count("events_duplicate_total", 0, table.name)

    def count(self, name: str, n: int = 1, *labels: str) -> None:
        """Add to the counter that has these values of its labels; adding 0 makes it appear."""
        with self._lock:
            self._numbers[name][labels][0] += n

    def count_all(self, name: str, counts: Mapping[tuple[str, ...], int]) -> None:
        for labels, count in counts.items():
            self.count(name, count, *labels)

    def observe(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            numbers = self._numbers[name][labels]
            numbers[bisect_left(BOUNDS[name], value)] += 1
            numbers[-1] += value

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of a family, summed up over all labels; [] if there are none yet."""
        with self._lock:
            return list(map(sum, zip(*self._numbers[name].values(), strict=True)))

    def exposition(self, gauges: Mapping[str, float]) -> str:
        """Return all that is counted, and the gauges, in Prometheus' text format, version 0.0.4."""
        lines: list[str] = []
        with self._lock:
            known = self._numbers | {name: {(): [value]} for name, value in gauges.items()}
            for family, text in FAMILIES.items():
                name, *label_names = family.split()
                if not known[name]:
                    continue
                kind = "histogram" if name in BOUNDS else "counter" if name.endswith("_total") else "gauge"
                full_name = name if name.startswith("process_") else f"attolytics_{name}"
                lines += [f"# HELP {full_name} {text}", f"# TYPE {full_name} {kind}"]
                for values, numbers in sorted(known[name].items()):
                    labels = dict(zip(label_names, values, strict=True))
                    if name not in BOUNDS:
                        lines.append(sample(full_name, labels, numbers[0]))
                        continue
                    *buckets, total = numbers
                    heights = list(itertools.accumulate(buckets))
                    for bound, height in zip((*BOUNDS[name], "+Inf"), heights, strict=True):
                        lines.append(sample(f"{full_name}_bucket", {**labels, "le": str(bound)}, height))
                    lines.append(sample(f"{full_name}_sum", labels, total))
                    lines.append(sample(f"{full_name}_count", labels, heights[-1]))
        return "\n".join(lines) + "\n"


# --- Database -----------------------------------------------------------------
# Sessions with PostgreSQL, each owned by one thread at a time, what its errors mean for us, and the tables:
# checked, created and migrated. Everything here blocks, at most for the time-outs above.

# Whose fault an error is, by the beginning of its SQLSTATE (PostgreSQL manual, appendix A). Everything
# else is the data's: values, constraints, and what triggers raise, codes of their own included.
FAULTS = {
    Fault.AWAY: re.compile("08|25006|40|53|55P03|57"),
    Fault.OPERATOR: re.compile("0A|0L|0P|21|22P05|25|26|28|2B|3D|3F|42|55|58|F0|HV|XX"),
}


def server_error(fields: Mapping[str, str]) -> DatabaseError:
    """Return our error for the fields of an ErrorResponse (PostgreSQL manual, 55.8)."""
    sqlstate = fields.get("C", "")
    fault = next((fault for fault, states in FAULTS.items() if states.match(sqlstate)), Fault.DATA)
    # A check_violation that names a table but no constraint: the table lacks a partition for a good event.
    if sqlstate == "23514" and "t" in fields and "n" not in fields:
        fault = Fault.OPERATOR
        fields = {**fields, "M": f"{fields.get('M')} ({fields.get('D', 'no detail')})"}  # says for which time
    text = " ".join(fields.get("M", "unknown error").split())
    if sqlstate == LEDGER_REFUSAL:
        text = f"the ledger says that this session is over ({text})"
    return DatabaseError(text, fault, fields)


# Converted values cannot cause these. An altered column can, or a trigger: Session.check_tables finds out.
MISFITS = ("22003", "22007", "22P02", "23502")
# What pg8000 raises when the connection ends, or when the peer does not speak PostgreSQL's protocol.
BROKEN = (pg8000.exceptions.InterfaceError, OSError, struct.error, LookupError, ValueError, AttributeError)
NO_ANSWER = "no answer in time"
Meanwhile = Callable[[], object]  # what is done while PostgreSQL works, and ...
NOTHING: Meanwhile = bool  # ... if there is nothing to do: a call without effect


def skipped_rows(message: Message, tags: Iterable[str]) -> Counts:
    """Return how many rows ON CONFLICT skipped, by table, from the tags that answered a message's INSERTs."""
    inserted = [int(tag.rpartition(" ")[2]) for tag in tags if tag.startswith("INSERT ")]
    skipped = Counts()
    for (table, rows), stored in zip(message.inserts, inserted, strict=True):
        skipped[table,] += rows - stored
    return skipped


# pg8000 by itself needs three round trips for a COPY, cannot send other statements in the same message, knows
# no deadline, and loses the text of a FATAL error, because the connection ends right after it.
class Session(pg8000.native.Connection):  # type: ignore[misc]  # pg8000 has no type hints
    """A connection that stores rows in one round trip, once take_over() is done. For one thread at a time."""

    timeout_s: float = STATEMENT_TIMEOUT_S + ANSWER_GRACE_S  # for messages that are given none of their own
    tags: list[str]  # of the last message's statements, such as `INSERT 0 5` and `COMMIT`
    start: str  # the statements that begin a flush, and ...
    raising: str  # ... the form of the one that raises the ledger; prepare_flushes() sets both
    token = ""  # by which the ledger knows this session
    stored: Mapping[str, int] = {}  # the last flush of each epoch that was stored before take_over()
    partition_keys: dict[str, tuple[str, ...]]  # of the tables, by name; all sessions of an Opener share them
    check_tables: Callable[[Session], object] = staticmethod(bool)  # raises OperatorError if they misfit now

    def run(
        self, message: str | Message, seconds: float | None = None, meanwhile: Meanwhile = NOTHING
    ) -> list[list[Any]]:
        """Send one message, or SQL that needs no COPY data, and return the rows that PostgreSQL answers.

        Blocks for `seconds` at most, by default timeout_s; calls `meanwhile` once the message is sent.
        Raises DatabaseError. If that has no SQLSTATE, the connection is of no use any more.
        """
        message = Message(message) if isinstance(message, str) else message
        context = pg8000.core.Context(message.sql)
        try:
            self._ask(message, context, self.timeout_s if seconds is None else seconds, meanwhile)
        except BROKEN as error:
            cause = error.__cause__ or error
            reason = NO_ANSWER if isinstance(cause, TimeoutError) else f"connection lost: {reason_of(cause)}"
            said = context.error.args[0] if context.error else {}  # what the server sent before it hung up
            if said.get("V", said.get("S")) in ("FATAL", "PANIC"):
                reason = f"connection lost: {said.get('M')}"
            raise DatabaseError(reason) from None
        if context.error:
            raise server_error(context.error.args[0])
        if message.sql.endswith("COMMIT") and self.tags[-1:] != ["COMMIT"]:
            # PostgreSQL turns the COMMIT of a transaction that has failed into a ROLLBACK, without an error.
            raise DatabaseError(f"expected COMMIT, got {' '.join(self.tags[-1:])}")
        return context.rows or []

    def store(
        self, epoch: str, number: int, parts: Iterable[Rows], seconds: float, meanwhile: Meanwhile = NOTHING
    ) -> Counts:
        """Store rows as one flush of an epoch; return how many were there already, by table.

        Blocks for one round trip, `seconds` at most, and after a refusal for the ROLLBACK. Raises
        DatabaseError. If its fault is DATA, nothing was stored, and the session goes on. After any other
        fault it is unknown whether the flush was stored: the ledger tells the next session.
        """
        patiently = PATIENTLY if seconds > LONG_STATEMENT_TIMEOUT_S else ""
        start = f"{self.start}{patiently}{raise_sql(epoch, self.token, number, self.raising)}"
        message = insert_message(start, parts, "COMMIT", self.partition_keys)
        try:
            self.run(message, seconds, meanwhile)
        except DatabaseError as error:
            if error.sqlstate and error.fault is not Fault.AWAY:
                self.run("ROLLBACK", seconds / 2)  # if that fails, the session is not well
            if error.sqlstate in MISFITS:
                try:
                    self.check_tables(self)
                except OperatorError as misfit:
                    raise DatabaseError(str(misfit), Fault.OPERATOR, error.fields) from None
            raise
        return skipped_rows(message, self.tags)

    def is_direct(self) -> bool:
        """Return whether no pooler is between us and PostgreSQL: it would greet with a made-up process id."""
        key = self._backend_key_data
        return key is not None and self.run("SELECT pg_backend_pid()") == [[int.from_bytes(key[:4])]]

    def prepare_flushes(self) -> None:
        """Without a pooler, do once what begins each flush: a fourth of PostgreSQL's work for a small one."""
        self.start, self.raising = FLUSH_START, RAISE
        if self.is_direct():
            self.run(f"{FLUSH_START.replace('SET LOCAL', 'SET')}{PREPARE_RAISE};\nCOMMIT")
            self.start, self.raising = "BEGIN;\n", EXECUTE_RAISE

    def check_idle(self) -> None:
        """Raise DatabaseError if the server closed the idle connection. Does not block."""
        poll = select.poll()  # select() cannot take descriptors from 1,024 on
        poll.register(self._usock, select.POLLIN)
        if poll.poll(0):
            raise DatabaseError("the server closed the connection")

    def close(self) -> None:
        with contextlib.suppress(*BROKEN):
            self._usock.settimeout(POLL_S)  # PostgreSQL would notice anyway
            super().close()

    def _ask(self, message: Message, context: Any, seconds: float, meanwhile: Meanwhile) -> None:
        """Send a message, and read its answer into `context` and `tags`. Raises the exceptions in BROKEN."""
        sql = message.sql.encode() + b"\0"
        parts = [b"Q", (len(sql) + 4).to_bytes(4), sql]
        # Sent without being asked for: after an error the server drops it (PostgreSQL manual, 55.2.6).
        for data in message.copies:
            parts += [b"d", (len(data) + 4).to_bytes(4), data, b"c\0\0\0\4"]
        self.tags = []
        self._usock.settimeout(seconds)
        self._usock.sendall(b"".join(parts))
        meanwhile()
        # RowDescription, DataRow: a flush has no use for them. CopyInResponse: its data is on its way.
        unread = (b"T", b"D", b"G") if message.copies or message.inserts else ()
        deadline, kind = time.monotonic() + seconds, b""
        while kind != pg8000.core.READY_FOR_QUERY:
            left = deadline - time.monotonic()
            if left < seconds - POLL_S:  # not each time: settimeout() lets other threads run first
                seconds = max(left, 0.001)
                self._usock.settimeout(seconds)
            head = self._sock.read(5)
            size = int.from_bytes(head[1:]) - 4
            data = self._sock.read(size) if size > 0 else b""
            if len(head) < 5 or len(data) < size:
                raise ConnectionResetError("the server closed the connection")
            kind = head[:1]
            if kind == pg8000.core.COMMAND_COMPLETE:
                self.tags.append(data[:-1].decode())
            elif kind not in unread:
                self.message_types[kind](data, context)


def os_user() -> str:
    """Return the name of the user we run as, "postgres" where there is none for its id, as in a container."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "postgres"


def ssl_contexts(target: Target) -> list[ssl.SSLContext | None]:
    """Return the ways to try in turn (PostgreSQL manual, 34.19), None without TLS. Raises OperatorError."""
    if target.socket or target.sslmode == "disable":
        return [None]
    root = target.sslrootcert or os.path.expanduser("~/.postgresql/root.crt")
    # As in libpq, a root certificate that is there turns `require` into `verify-ca`.
    found = bool(target.sslrootcert) or os.path.exists(root)
    verify = target.sslmode.startswith("verify") or (target.sslmode == "require" and found)
    try:
        # With a file it trusts only that, without one the system's authorities.
        context = ssl.create_default_context(cafile=root if verify and root != "system" else None)
        if target.sslcert:
            context.load_cert_chain(target.sslcert, target.sslkey)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(filter(None, (root if verify else None, target.sslcert, target.sslkey)))
        raise OperatorError(f"cannot read the certificates {files}: {reason_of(error)}") from None
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # PostgreSQL's manual makes certificates that fail it
    context.check_hostname = target.sslmode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    return {"allow": [None, context], "prefer": [context, None]}.get(target.sslmode, [context])


def session_error(target: Target, error: Exception) -> DatabaseError:
    """Return our error for a session that could not be opened; it is AWAY only if that can pass by itself."""
    if isinstance(error, pg8000.exceptions.DatabaseError):
        refusal, hint = server_error(error.args[0]), ""
        if refusal.sqlstate == "28P01" and not target.password:
            hint = " (no password was given: put it in the URL, PGPASSWORD or .pgpass)"
        if refusal.sqlstate == "28000" and target.socket:
            hint = (
                " (over a socket the role must be named like the system user; the dynamic user of a"
                " systemd unit is unknown to PostgreSQL without the Debian package libnss-systemd)"
            )
        fault = Fault.AWAY if refusal.fault is Fault.AWAY else Fault.OPERATOR
        return DatabaseError(f"{refusal}{hint}", fault, refusal.fields)
    reason, place = reason_of(error.__cause__ or error), target.socket or f"{target.host}:{target.port}"
    stays = isinstance(error, PermissionError | ssl.SSLError) or "Authentication method" in reason
    stays = stays and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)  # the server went away
    if isinstance(error, pg8000.core.scramp.ScramException):
        stays, reason = True, f"the password cannot be used with SCRAM: {reason}"
    return DatabaseError(f"cannot connect to {place}: {reason}", Fault.OPERATOR if stays else Fault.AWAY)


def open_socket(target: Target, context: ssl.SSLContext | None) -> socket.socket:
    """Return a connected socket, encrypted if there is a context. Raises DatabaseError, OSError."""
    with contextlib.ExitStack() as at_error:
        if target.socket:
            sock = at_error.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(target.connect_timeout)
            sock.connect(target.socket)
        else:
            sock = socket.create_connection((target.host, target.port), target.connect_timeout)
            at_error.enter_context(sock)
            # Without this every flush waits 40 ms for a delayed acknowledgement; pg8000 does not set it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:  # pg8000's own negotiation takes an end of input for a server without TLS
            sock.sendall(struct.pack("!ii", 8, 80877103))  # SSLRequest (PostgreSQL manual, 55.7)
            if (answer := sock.recv(1)) not in (b"S", b""):  # after an end of input the handshake fails
                reason = f"sslmode={target.sslmode}, but the server does not offer TLS ({answer!r})"
                raise DatabaseError(reason, Fault.OPERATOR)
            sock = context.wrap_socket(sock, server_hostname=target.host)
        at_error.pop_all()
    return sock


def start_session(target: Target, context: ssl.SSLContext | None) -> Session:
    """Return a session, encrypted if there is a context. Raises DatabaseError."""
    # Quoting relies on these settings, for which a server or a role may have other defaults.
    settings = {"client_encoding": "UTF8", "standard_conforming_strings": "on"}
    try:
        session = Session(
            target.user,
            sock=open_socket(target, context),
            database=target.dbname,
            # If the server asks for a password, pg8000 fails on None; an empty one the server refuses.
            password=target.password or "",
            application_name=target.application_name,
            ssl_context=False,  # done already
            startup_params={**settings, "options": target.options or None},
        )
    except (pg8000.exceptions.Error, pg8000.core.scramp.ScramException, *BROKEN) as error:
        raise session_error(target, error) from None
    session.partition_keys = {}
    if session.parameter_statuses.get("standard_conforming_strings") != "on":
        session.close()
        raise DatabaseError("standard_conforming_strings must be on", Fault.OPERATOR)
    return session


def connect(target: Target) -> Session:
    """Return a session. Each step blocks for connect_timeout at most. Raises DatabaseError, OperatorError."""
    ways = ssl_contexts(target)
    try:
        return start_session(target, ways[0])
    except DatabaseError as error:
        # With sslmode prefer or allow the other way is tried when the server refuses the first one.
        if len(ways) < 2 or error.fault is not Fault.OPERATOR or error.sqlstate not in ("", "28000"):
            raise
    return start_session(target, ways[1])


def take_over(session: Session, epochs: Iterable[str], token: str) -> None:
    """Make the ledger's rows of epochs the session's own; set its `token` and `stored`.

    A lost connection's message that still runs is waited for, then ended. Raises DatabaseError: try again.
    """
    try:
        rows = session.run(f"{FLUSH_START}{take_over_sql(epochs, token)};\nCOMMIT")
    except DatabaseError as error:
        if error.sqlstate == "55P03":  # lock_not_available
            session.run("ROLLBACK")
            with contextlib.suppress(DatabaseError):  # we may not end a superuser's
                ended = len(session.run(TERMINATE_HOLDERS.format(",".join(map(quote, epochs)))))
                log.warning("sessions that held the ledger for %d ms were ended: %d", LOCK_TIMEOUT_MS, ended)
        raise
    session.token, session.stored = token, {epoch: int(flush) for epoch, flush in rows}


# Inserts queue up behind a change while it waits for its lock and while it runs: for less than half a second.
ALTER_SETTINGS = (
    "SET LOCAL lock_timeout = 200; SET LOCAL statement_timeout = 400;"
    f" SET LOCAL idle_in_transaction_session_timeout = '{SIFT_IDLE_S}s'"
)
# After these a step is tried again: no lock in time, a deadlock, or somebody was quicker. Two sessions that
# create one table at once can fail with 23505, even with IF NOT EXISTS; 42710 does not pass if a type has the
# name. If two drop one index, the code is that of all internal errors, whose text is always English.
TRY_AGAIN = ("55P03", "57014", "40", "23505", "42P07", "42710")
DROPPED_TWICE = "tuple concurrently updated"


def survey(session: Session, schema: Schema, user: str) -> list[Step]:
    """Return what is to be done about the tables. It only looks at them. Raises DatabaseError."""
    catalog = {}
    for name, columns, indexes, *rest in session.run(catalog_sql(schema)):
        existing_columns = {column: ExistingColumn(*found) for column, found in columns.items()}
        existing_indexes = [ExistingIndex(*found) for found in indexes]
        catalog[name] = ExistingTable(existing_columns, existing_indexes, *rest)._replace(ask=session.run)
    session.partition_keys.update({name: (*table.partition_key,) for name, table in catalog.items()})
    return make_plan(schema, catalog, user)


def permitted(session: Session, schema: Schema, user: str, migrates: bool) -> list[Step]:
    """Return survey()'s plan. Raises OperatorError, with the SQL, if some of it is left to the operator."""
    plan = survey(session, schema, user)
    by_hand = [step for step in plan if step.way is Way.HAND]
    altering = [step for step in plan if step.way is Way.ALTER and not step.index and not migrates]
    if misfits := [*altering, *by_hand]:
        count = counted(len(misfits), "difference")
        what = " that --migrate leaves to you (nothing was changed)" if migrates else ""
        reasons = "".join(f"  {step.reason}\n" for step in misfits)
        migrating = "" if by_hand else "start with --migrate, "
        mending = f", {migrating}or mend the tables with:" if statements_of(misfits) else "."
        text = f"the database does not fit the schema file, {count}{what}:\n{reasons}"
        raise to_run(f"{text}Change the schema file{mending}", statements_of(misfits))
    return plan


def not_run(error: DatabaseError, statements: Iterable[str], user: str) -> DatabaseError | OperatorError:
    """Return what to raise for statements of which one failed: OperatorError, unless the database is away."""
    if error.fault is Fault.AWAY:
        return error
    detail = f" ({error.fields['D']})" if "D" in error.fields else ""
    allow = f"Let the owner of the database run this, or allow user {identifier(user)} to:"
    return to_run(f"cannot create what the schema needs: {error}{detail}\n{allow}", statements)


def take(session: Session, step: Step, plan: Callable[[], list[Step]]) -> None:
    """Take a step, unless others have taken it before we got the lock. Raises DatabaseError.

    An index cannot be built in the transaction that has the lock. It is built right after it, under a name
    that another instance would choose as well, so that the second of two does nothing. PostgreSQL takes two
    builds at once for a deadlock and ends one of them after a second; the next plan clears up behind it.
    """
    session.run("BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '10s'")
    if step.way is not Way.CREATE:
        # Waits for builds of others and blocks no insert. It waits without a snapshot, which builds wait for.
        session.run(f"LOCK TABLE {identifier(step.table)} IN SHARE UPDATE EXCLUSIVE MODE")
    statements = step.statements if step in plan() else ()
    if step.way is Way.ALTER:
        session.run(ALTER_SETTINGS)
    if step.way is Way.BUILD:
        session.run("COMMIT")
    for statement in statements:  # one a message: Citus hands the whole message of an ALTER to its workers
        log.info("database: %s", statement)
        session.run(statement)
    if step.way is not Way.BUILD:
        session.run("COMMIT")


def repeated_values(index: Index, error: DatabaseError) -> OperatorError:
    table, column = identifier(index.table), identifier(index.column)
    find = f"SELECT {column}, count(*) FROM {table} GROUP BY {column} HAVING count(*) > 1"
    place = f'table "{index.table}", column "{index.column}"'
    why = f"{place} cannot become unique, because values are repeated in it: {error.fields.get('D', error)}"
    what = "Find them with the SELECT, remove them, and start again or run the rest:"
    return to_run(f"{why}\n{what}", [find, index.sql("CONCURRENTLY ")])


def prepare(session: Session, schema: Schema, user: str, migrates: bool) -> None:
    """Create what is missing; with `migrates` also add columns, and drop NOT NULL where nothing requires it.

    Takes the first step of a plan, makes a new plan, and so on: others may take the same steps. Blocks while
    PostgreSQL builds indexes; inserts of others wait for half a second at most. Raises OperatorError with
    everything that does not fit and the SQL for it, before anything is done; DatabaseError when the database
    went away or a table stayed in use for long: trying again goes on from there.
    """
    session.timeout_s = PREPARE_TIMEOUT_S
    # Time-outs of the role or the database would end builds. A pooler would pass these settings on to others.
    # Without --migrate a server rather starts without the database, and spools, than wait for long.
    if session.is_direct():
        session.run(f"SET statement_timeout = 0; SET lock_timeout = {0 if migrates else 2000}")
    plan = partial(permitted, session, schema, user, migrates)
    deadlines: dict[Step, float] = {}
    taken = Counter[Step]()
    repeated: dict[Index, OperatorError] = {}
    while steps := [step for step in plan() if step.index not in repeated]:
        step = steps[0]
        # For a BUILD no insert has to wait, and another instance's build may take long.
        patience_s = PREPARE_TIMEOUT_S if step.way is Way.BUILD else CHANGE_PATIENCE_S
        patience_s = patience_s if migrates else START_PATIENCE_S
        deadline = deadlines.setdefault(step, time.monotonic() + patience_s)
        try:
            take(session, step, plan)
            taken[step] += 1
        except DatabaseError as error:
            # query_canceled: a time-out of the role ended it. (A DROP, which has no index, is tried again.)
            if step.way is Way.BUILD and step.index and error.sqlstate == "57014":
                text = f"PostgreSQL gave up building an index: {error}; run this without a time-out:"
                raise to_run(text, step.statements) from None
            if not error.sqlstate.startswith(TRY_AGAIN) and DROPPED_TWICE not in str(error):
                raise not_run(error, statements_of(steps), user) from None
            session.run("ROLLBACK")
            if step.index and step.index.unique and error.sqlstate == "23505":
                repeated[step.index] = repeated_values(step.index, error)  # the next plan drops what is left
                continue
            complain(logging.INFO, f'database: table "{step.table}" is in use, waiting for it: {error}')
            if time.monotonic() > deadline:
                reason = f'table "{step.table}" is still in use after {patience_s} s ({error}); not run: '
                raise DatabaseError(reason + "; ".join(step.statements), error.fault, error.fields) from None
            time.sleep(random.uniform(0.5, 1) * CHANGE_PAUSE_S)  # so that two do not meet again
        if taken[step] > 5:  # PostgreSQL accepts it each time, and the next plan has it again
            raise to_run(f"run {taken[step]} times without effect:", step.statements)
    if repeated:
        raise OperatorError("\n".join(map(str, repeated.values())))


class Opener:
    """Opens sessions. The first one prepares or migrates the tables, later ones check them."""

    def __init__(self, target: Target, schema: Schema, migrates: bool = False) -> None:
        self.target, self._schema, self._migrates = target, schema, migrates
        self._is_prepared = False  # whether prepare() has been through once
        self._partition_keys: dict[str, tuple[str, ...]] = {}

    def open(self, epochs: Iterable[str]) -> Session:
        """Return a session that has taken `epochs` over and may insert. Blocks, raises as prepare() does."""
        schema = self._schema
        session = connect(self.target)
        session.partition_keys = self._partition_keys
        try:
            if self._is_prepared:
                plan = permitted(session, schema, self.target.user, migrates=False)
                # Nothing is created: who renamed one may rename it back. (ON CONFLICT needs unique indexes.)
                if needed := [s for s in plan if s.way is Way.CREATE or (s.index and s.index.unique)]:
                    why = "tables or indexes that events need are gone; bring them back, or create them with:"
                    raise to_run(why, statements_of(needed))
            else:
                prepare(session, schema, self.target.user, self._migrates)
                self._is_prepared = True
            session.timeout_s = STATEMENT_TIMEOUT_S + ANSWER_GRACE_S
            session.check_tables = self._check
            # If a permission or a lock is not to be had, fail now: EXPLAIN needs both, and runs nothing.
            touches = [f"EXPLAIN INSERT INTO {identifier(name)} SELECT WHERE false" for name in schema.tables]
            session.run(f"{FLUSH_START}{';'.join(touches)};\nCOMMIT")
            take_over(session, epochs, str(uuid.uuid4()))
            session.prepare_flushes()
            return session
        except (DatabaseError, OperatorError):
            session.close()
            raise

    def _check(self, session: Session) -> None:
        """Raise OperatorError if somebody has changed a table so that it does not fit; DatabaseError."""
        session.timeout_s = PATIENCE_MIN_S  # clients wait
        try:
            permitted(session, self._schema, self.target.user, migrates=False)
        finally:
            session.timeout_s = STATEMENT_TIMEOUT_S + ANSWER_GRACE_S

    def prepare(self, schema: Schema) -> None:
        """Prepare or migrate the tables for another schema, over a new connection, and open sessions by it.

        While the database is away, only the schema's apps may have changed. Blocks and raises as open() does.
        """
        try:
            with contextlib.closing(connect(self.target)) as session:
                session.partition_keys = self._partition_keys
                prepare(session, schema, self.target.user, self._migrates)
            self._is_prepared = True
        except DatabaseError as error:
            if error.fault is not Fault.AWAY or schema.tables != self._schema.tables:
                raise
        self._schema = schema


# --- Spool --------------------------------------------------------------------
# The SQLite file that keeps events while no database can take them, and those in quarantine. A flush is one
# row: its batches as JSON, which are converted when they are replayed, by the schema that is in use then.


def sqlite_key(json_sql: str, name: str) -> str:
    """Return SQL for the value of a key in a JSON object."""
    if json.dumps(name) == f'"{name}"':
        path = quote(f'$."{name}"')
        return f"json_extract({json_sql}, {path})"
    # In the JSON such a key may be written with escapes, which only json_each() undoes.
    return f"(SELECT value FROM json_each({json_sql}) WHERE key = {quote(name)})"


def readable_time(value: str) -> str:
    """Return SQL for seconds since 1970, or an RFC 3339 text, as a time in UTC."""
    form = "'%Y-%m-%d %H:%M:%f'"
    # With 'unixepoch' strftime() returns NULL for a text.
    return f"coalesce(strftime({form}, {value}, 'unixepoch'), strftime({form}, {value}), {value})"


def view_column(table: Table, column: Column) -> str:
    """Return SQL for a view's column: what PostgreSQL would hold, in a form that people can read."""
    value = sqlite_key("e.value", column.name)
    if column.extra:
        known = [TABLE_KEY, *(c.name for c in table.columns if not (c.header or c.source or c.extra))]
        # A merge with null takes a key out (RFC 7396); json_remove() accepts no more than 126 paths.
        value = f"nullif(json_patch(e.value, {quote(exact_json(dict.fromkeys(known)))}), '{{}}')"
    elif column.header:
        value = sqlite_key("json_extract(b.value, '$.headers')", column.header)
    elif column.source:
        key = "app" if column.source is Source.APP_ID else column.source
        value = f"nullif(json_extract(b.value, '$.{key}'), '')"
    if column.type is Type.TIMESTAMP:
        value = readable_time(value)
    elif column.type is Type.JSON and not column.extra:
        value = f"nullif(json_quote({value}), 'null')"
    return f"{value} AS {identifier(column.name)}"


def view_sql(table: Table) -> str:
    columns = ",\n  ".join(view_column(table, column) for column in table.columns)
    # Former versions stored JSON that is nested more deeply than SQLite can read.
    batches = "CASE WHEN json_valid(f.batches) THEN f.batches END"
    return (
        f"CREATE VIEW {identifier(table.name)} AS SELECT\n  {columns}\n"
        f"FROM attolytics_spool AS f, json_each({batches}) AS b, json_each(b.value, '$.events') AS e\n"
        f"WHERE json_extract(e.value, '$.{TABLE_KEY}') = {quote(table.name)}"
    )


APPLICATION_ID = 0x41_74_74_6F  # "Atto"; tells the file from other programs' (SQLite, application_id)
SPOOL_VERSIONS = (1, 2)  # We can read both and write the last; 1 had one more table, which nobody needs.

# `total` counts the events of this flush and all before it, so that how many wait is known without a scan.
SPOOL_SQL = f"""
CREATE TABLE attolytics_spool (
  id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, flush INTEGER NOT NULL,
  events INTEGER NOT NULL, total INTEGER NOT NULL, batches TEXT NOT NULL
);
CREATE TABLE attolytics_quarantine (
  id INTEGER PRIMARY KEY, quarantined_at REAL NOT NULL, app TEXT, table_name TEXT, column_name TEXT,
  reason TEXT NOT NULL, batch TEXT, event TEXT NOT NULL
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SPOOL_VERSIONS[-1]};
"""

LAST_TOTAL = "(SELECT total FROM attolytics_spool ORDER BY id DESC LIMIT 1)"
DELETE_QUARANTINED = "DELETE FROM attolytics_quarantine WHERE id = ?"

QUARANTINE_VIEW = f"""CREATE VIEW quarantine AS SELECT
  id, {readable_time("quarantined_at")} AS quarantined_at, app,
  table_name AS "table", column_name AS "column", reason,
  {readable_time("json_extract(batch, '$.received_at')")} AS received_at,
  nullif(json_extract(batch, '$.client_ip'), '') AS client_ip, event
FROM attolytics_quarantine"""


class SpooledFlush(NamedTuple):
    """A row of the spool: a flush's id there, its epoch and number, and the JSON of its batches."""

    id: int
    epoch: str
    number: int
    events: int
    text: str


def check_spool(path: str, descriptor: int) -> None:
    """Raise OperatorError for a file that is not a spool, is damaged or too new. Changes nothing in it."""
    if os.pread(descriptor, 16, 0) not in (b"", b"SQLite format 3\0"):
        raise OperatorError(f"--spool {path} is not a spool but some other file; it was left as it is")
    is_small = os.fstat(descriptor).st_size <= QUICK_CHECK_BYTES_MAX
    check = "PRAGMA quick_check(1)" if is_small else "SELECT 'ok'"
    counting = "SELECT count(*) FROM sqlite_master"
    queries = (check, counting, "PRAGMA application_id", "PRAGMA user_version")
    try:
        with contextlib.closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as db:
            found, tables, application, version = [db.execute(sql).fetchone()[0] for sql in queries]
    except sqlite3.Error as error:
        if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":  # we were killed while we created it
            return
        reason = f"--spool {path} is damaged or cannot be read: {reason_of(error)}; it was left as it is"
        raise OperatorError(reason) from None
    if found != "ok":
        damage = f"--spool {path} is damaged: {' '.join(found.split())}; it was left as it is."
        raise OperatorError(f"{damage} Try to save its events with: sqlite3 {path} .recover, or .dump")
    if tables and application != APPLICATION_ID:
        raise OperatorError(f"--spool {path} is another program's SQLite file; it was left as it is")
    if tables and version not in SPOOL_VERSIONS:
        raise OperatorError(f"--spool {path} was made by another version of Attolytics (format {version})")


def wait_for_lock(descriptor: int, path: str) -> None:
    """Lock the spool's file against other servers. Raises OperatorError if one has it for SPOOL_LOCK_S."""
    deadline = time.monotonic() + SPOOL_LOCK_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        complain(logging.INFO, f"waiting for the server that uses the spool {path}")
        time.sleep(POLL_S)
    raise OperatorError(f"another server uses the spool {path}: give each its own with --spool PATH")


def open_sqlite(path: str, bytes_max: int) -> sqlite3.Connection:
    """Return a connection to the spool's file; a new one gets its tables. Raises sqlite3.Error, OSError."""
    db = sqlite3.connect(path, timeout=SPOOL_BUSY_S, isolation_level=None, check_same_thread=False)
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError(f"its file system cannot do WAL, only {mode}")
    # With NORMAL a power failure would lose what was acknowledged.
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {min(1000, bytes_max // 8 // 4096)}")  # in pages of 4 KiB
    if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        db.executescript(f"BEGIN IMMEDIATE;{SPOOL_SQL}COMMIT")
    return db


class SpoolFile:
    """An SQLite file that is ours alone; for any thread. Methods block for the disk and raise SpoolError."""

    def __init__(self, path: str, bytes_max: int) -> None:
        self.path, self.bytes_max = path, bytes_max
        # Guards the one SQLite connection (two can damage the file) and all that is known of what is in
        # it. Whoever holds it also decides who has the session with the database (see Writer), so it is
        # never held while something waits for the network, or during a conversion.
        self.switch = threading.RLock()
        self._failed = False  # whether SQLite did, the last time
        self.events = self.quarantined = 0  # how many wait for their replay, and how many are in quarantine
        try:
            # 0o600: events may be about people. It stays open, as closing it would drop SQLite's own locks.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            wait_for_lock(self._descriptor, path)
            check_spool(path, self._descriptor)
            self._db = open_sqlite(path, bytes_max)
        except (sqlite3.Error, OSError) as error:  # nothing is closed: it is the end of the process
            hint = f"name a file with --spool PATH in a directory that user {os_user()} may write to"
            reason = f"cannot use the spool {path}: {reason_of(error)}; {hint}: SQLite makes more beside it"
            raise OperatorError(reason) from None

    def check(self) -> None:
        """Raise SpoolError if no events can be stored now. After a failure it finds out by writing."""
        if not self.switch.acquire(timeout=SPOOL_BUSY_S):
            raise SpoolError(f"the spool {self.path} is busy")
        try:
            self.check_room(LARGE_BODY_BYTES)
            if self._failed:
                with self.transaction():
                    self._db.execute(f"PRAGMA user_version = {self.one('PRAGMA user_version')}")
        finally:
            self.switch.release()

    def check_room(self, chars: int) -> None:
        """Raise SpoolError if a text of so many characters is too much for the limit or for the disk."""
        with self.translated():
            pages = self.one("PRAGMA page_count") - self.one("PRAGMA freelist_count")
            used = pages * self.one("PRAGMA page_size") + os.stat(f"{self.path}-wal").st_size
            disk = os.statvfs(self.path)
        if used + chars > self.bytes_max:
            raise SpoolError(f"the spool {self.path} is full: --spool_limit is {self.bytes_max} bytes")
        # Events are written twice: into the journal, and from there into the file.
        if disk.f_bavail * disk.f_frsize < DISK_RESERVE_BYTES + 2 * chars:
            raise SpoolError(f"the disk of the spool {self.path} is full")

    def size(self) -> int:
        """Return how many bytes the file and its journal have. Does not lock."""
        return sum(os.stat(name).st_size for name in (self.path, f"{self.path}-wal") if os.path.exists(name))

    def shrink(self) -> None:
        """Give the room of deleted events back to the disk."""
        with self.translated():
            page_bytes, free = self.one("PRAGMA page_size"), self.one("PRAGMA freelist_count")
            stays = self.one("PRAGMA page_count") - free
            # VACUUM copies all that stays, and nobody else can write meanwhile: so that must be little.
            if free * page_bytes > SPOOL_BYTES_MIN and stays * page_bytes < 8 << 20:
                self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file, and let others use it."""
        with self.switch, contextlib.suppress(sqlite3.Error):  # what is in it stays
            self._db.close()
        os.close(self._descriptor)

    def rows(self, sql: str, *values: int) -> list[Any]:
        with self.translated():
            return self._db.execute(sql, values).fetchall()

    def one(self, sql: str) -> Any:
        """Return the first value that a query brings, None for nothing."""
        return (self.rows(sql) or [[None]])[0][0]

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Hold the lock; what SQLite and the disk raise becomes SpoolError."""
        with self.switch:
            try:
                yield
            # What SQLite cannot hold, a text of a gigabyte say, is a ValueError or an OverflowError.
            except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
                self._failed = True
                raise SpoolError(f"the spool {self.path} fails: {reason_of(error)}") from None

    @contextlib.contextmanager
    def transaction(self, events: int = 0, quarantined: int = 0) -> Iterator[None]:
        """Do all that is in the block, durably, or nothing of it; if all, add to the numbers of events."""
        with self.translated():
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:  # which ends in COMMIT or ROLLBACK
                yield
            self._failed = False
            self.events += events
            self.quarantined += quarantined


class Spool(SpoolFile):
    """The flushes that wait for their replay, the quarantine, and views of both. For any thread."""

    def __init__(self, path: str, bytes_max: int, schema: Schema, epoch: str) -> None:
        """Open or create the spool of a process. Raises OperatorError and SpoolError."""
        super().__init__(path, bytes_max)
        self.epoch = epoch
        # This epoch's flush numbers only go up, none is given twice, and flushes are appended in their order.
        self.numbers, self._last_number = itertools.count(1), 0
        gone = "(SELECT total - events FROM attolytics_spool ORDER BY id LIMIT 1)"
        self.events = self.one(f"SELECT {LAST_TOTAL} - {gone}") or 0
        self.quarantined = self.one("SELECT count(*) FROM attolytics_quarantine")
        self.create_views(schema)

    @cached_property  # it reads the whole file, and no other epochs come in while we run
    def epochs(self) -> set[str]:
        """The present epoch, and those that had flushes here at the start."""
        return {self.epoch, *(epoch for (epoch,) in self.rows("SELECT DISTINCT epoch FROM attolytics_spool"))}

    def oldest(self) -> float | None:
        """Return when the first event that waits was received, in seconds since 1970; None without any."""
        query = "SELECT json_extract(batches, '$[0].received_at') FROM attolytics_spool ORDER BY id LIMIT 1"
        return next((oldest for (oldest,) in self.rows(query)), None)

    def append(self, number: int, events: int, texts: Iterable[str], kept: Sequence[int] = ()) -> None:
        """Keep a flush, by the JSON of its batches. Delete the events `kept` in quarantine, which are in it.

        One that was sent to PostgreSQL has its number (others: 0) and may exceed the limit: its message may
        arrive late and store it all the same, so its client must not be asked to send it again.
        """
        text = f"[{','.join(texts)}]"
        insert = f"INSERT INTO attolytics_spool VALUES (NULL, ?, ?, ?, ? + ifnull({LAST_TOTAL}, 0), ?)"
        with self.transaction(events, -len(kept)):
            if not (number or kept):
                self.check_room(len(text))
            number = number or next(self.numbers)
            assert number > self._last_number  # the replay relies on their order
            self._last_number = number
            self._db.execute(insert, (self.epoch, number, events, events, text))
            self._db.executemany(DELETE_QUARANTINED, zip(kept))

    def quarantine(self, items: Sequence[Quarantined], left: Mapping[int, str] = {}) -> list[int]:
        """Keep events with what is against them; return their ids in the quarantine.

        Those of a replay leave their flushes: `left` is the JSON that remains of these, by their ids.
        """
        insert = "INSERT INTO attolytics_quarantine VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)"
        update = "UPDATE attolytics_spool SET batches = ? WHERE id = ?"
        now, ids = time.time(), []
        with self.transaction(quarantined=len(items)):
            if not left:
                self.check_room(sum(len(text or "") for item in items for text in item))
            self._db.executemany(update, [(text, id_) for id_, text in left.items()])
            for item in items:
                values = (now, *(None if text is None else storable(text) for text in item))
                ids.append(self._db.execute(insert, values).lastrowid or 0)
        return ids

    def release(self, ids: Sequence[int]) -> None:
        with self.transaction(quarantined=-len(ids)):
            self._db.executemany(DELETE_QUARANTINED, zip(ids))

    def head(self, events_max: int) -> list[SpooledFlush]:
        """Return the first flushes, all of one epoch, with about `events_max` events; at least one if any."""
        flushes: list[SpooledFlush] = []
        events = chars = 0
        query = "SELECT id, epoch, flush, events, batches FROM attolytics_spool ORDER BY id"
        with self.translated(), contextlib.closing(self._db.execute(query)) as rows:
            for flush in itertools.starmap(SpooledFlush, rows):
                events, chars = events + max(flush.events, 1), chars + len(flush.text)  # each may be alone
                is_more = events > events_max or chars > FLUSH_CHARS_MAX
                if flushes and (is_more or flush.epoch != flushes[0].epoch):
                    break
                flushes.append(flush)
        return flushes

    def delete(self, flushes: Sequence[SpooledFlush]) -> None:
        """Delete the first flushes, which head() returned."""
        with self.transaction(-sum(flush.events for flush in flushes)):
            self._db.execute("DELETE FROM attolytics_spool WHERE id <= ?", (flushes[-1].id,))

    def quarantine_reasons(self) -> list[tuple[str, int]]:
        count = "SELECT reason, count(*) FROM attolytics_quarantine GROUP BY 1 ORDER BY 2 DESC LIMIT ?"
        return self.rows(count, LISTED_MAX)

    def newest_quarantined(self, chars: int, count: int) -> list[Any]:
        """Return (time, app, table, reason, `chars` of the event) of the newest `count`, newest first."""
        columns = "quarantined_at, app, table_name, reason, substr(event, 1, ?)"
        query = f"SELECT {columns} FROM attolytics_quarantine ORDER BY id DESC LIMIT ?"
        return self.rows(query, chars, count)

    def retry(self, why: Callable[[str], str]) -> None:
        """Move quarantined events that fit now into new flushes; `why` says what is against a batch or ""."""
        last = 0
        select = "SELECT id, batch, event FROM attolytics_quarantine WHERE id > ? ORDER BY id LIMIT 100"
        update = "UPDATE attolytics_quarantine SET reason = ? WHERE id = ?"
        while found := self.rows(select, last):
            fit, unfit = dict[int, str](), list[tuple[str, int]]()
            for last, batch, event in found:
                # An event without a batch is a whole flush that could not be read: an array of batches.
                text = f'{batch[:-1]},"events":[{event}]}}' if batch else event[1:-1]
                if reason := why(text):
                    unfit.append((storable(reason), last))
                else:
                    fit[last] = text
            with self.transaction():
                self._db.executemany(update, unfit)
            if fit:
                self.append(0, len(fit), fit.values(), kept=[*fit])

    def create_views(self, schema: Schema) -> None:
        """Create the views of a schema's tables; replace those that were made for another schema."""
        views = {"quarantine": QUARANTINE_VIEW}  # by their names, as SQLite compares them
        for table in schema.tables.values():
            name = table.name.encode().lower().decode()  # lower() of bytes is for ASCII only, as SQLite's
            if name in views:
                log.warning('the spool has no view for the table "%s": another has the name', table.name)
            views.setdefault(name, view_sql(table))
        with self.transaction():
            there = dict(self._db.execute("SELECT lower(name), sql FROM sqlite_master WHERE type = 'view'"))
            for name, sql in views.items() - there.items():
                try:
                    self._db.execute(f"DROP VIEW IF EXISTS {identifier(name)}")
                    self._db.execute(sql)
                except sqlite3.OperationalError as error:  # a name that SQLite keeps for itself, say
                    log.warning('the spool cannot have a view for the table "%s": %s', name, reason_of(error))


# --- Writer -------------------------------------------------------------------
# Group commit. Who has the session with PostgreSQL decides where new events go. That changes only under the
# spool's lock, the switch, in one of three indivisible steps: "no flush is left, here is the session", "there
# is no session: take a number and append", "give the session up and append what was sent".
#
# Exactly once: a process is an epoch and numbers its flushes upwards; each transaction raises the epoch's row
# in the ledger to its number. A flush that was sent, but not answered, is spooled under its number. The next
# session takes the ledger over: nothing sent before can be committed then, and it says what has been stored.

DATABASE = "database"
SPOOL = "spool"
Apps = Mapping[str, Intake]  # by their ids
Clock = Callable[[], float]  # in seconds; never goes back
Flush = tuple[int, Sequence[Batch]]  # the number under which it was sent, or 0; its batches

# Reads what is in the spool. Former versions let NaN into it, under keys that have no column.
SPOOL_DECODER = json.JSONDecoder(parse_float=exact_number, parse_constant=lambda _name: None)
# Checks deferred constraints right away, while it is known which rows can have violated them.
ATTEMPT_END = "SET CONSTRAINTS ALL IMMEDIATE;\nSET CONSTRAINTS ALL DEFERRED;\nRELEASE attempt"
# Codes of a busy database, which triggers may raise, or cause, for single events as well.
RAISED_TOO = ("40001", "40P01", "57014")
SIFT_START = f"ROLLBACK;\n{FLUSH_START}SET LOCAL idle_in_transaction_session_timeout = '{SIFT_IDLE_S}s';\n"


class Group:
    """Spooled flushes of one epoch that are replayed in one transaction, converted by the schema in use."""

    def __init__(self, flushes: Sequence[SpooledFlush], apps: Apps) -> None:
        self.flushes = flushes
        self.epoch, self.number = flushes[0].epoch, flushes[-1].number
        self.unfit: list[Quarantined] = []  # the events that have to go to the quarantine
        self.refused: list[DatabaseError] = []  # why refuse() was called, where the data is not at fault
        self.lost_at: int | None = None  # the place in `rows` at which a sift lost the session
        self._by_flush: dict[int, list[Batch]] = {}
        for flush in flushes:
            batches: list[Batch] = []
            try:
                batches = [self._convert(raw, apps) for raw in SPOOL_DECODER.decode(flush.text)]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                # Its events cannot be told apart, so all of it is kept as one.
                reason = f"cannot be read back: {type(error).__name__}: {reason_of(error)}"
                self.unfit.append(Quarantined("", None, None, reason, None, flush.text))
            self.unfit += [item for b in batches if b.problems for item in b.quarantined(b.problems)]
            self._by_flush[flush.id] = batches
        self.batches = list(itertools.chain.from_iterable(self._by_flush.values()))

    @cached_property
    def rows(self) -> list[tuple[TableIntake, str, Batch, int]]:
        """All (table, row, batch, place of the event in the batch), in the order in which they are tried."""
        return [
            (table, row, batch, place)
            for batch in self.batches
            for table, rows in batch.rows.items()
            for place, row in rows.items()
        ]

    def refuse(self, row: int, error: DatabaseError) -> None:
        """Make the event of a row, by its place in `rows`, an unfit one, as the database refuses it."""
        _, _, batch, place = self.rows[row]
        problem = Problem(place, error.fields.get("c"), str(error))
        batch.problems.append(problem)
        batch.accepted -= 1
        self.unfit += batch.quarantined([problem])
        if error.fault is not Fault.DATA:
            self.refused.append(error)

    def left(self) -> dict[int, str]:
        """Return the JSON that remains of the flushes that had unfit events, by their ids in the spool."""
        return {
            id_: f"[{','.join(batch.text() for batch in batches if batch.events)}]"
            for id_, batches in self._by_flush.items()
            if not batches or any(batch.problems for batch in batches)
        }

    @staticmethod
    def _convert(raw: Any, apps: Apps) -> Batch:
        ip, events = raw["client_ip"], raw["events"]
        delivery = Delivery(raw["app"], ip, network_of(ip), raw["headers"], float(raw["received_at"]))
        if intake := apps.get(delivery.app):
            return intake.convert(events, delivery)
        reason = f"the schema file has no app {show(delivery.app)}"
        problems = [Problem(index, None, reason) for index in range(len(events))]
        return Batch(delivery, events, problems=problems)


class Trial(NamedTuple):
    """A try to store the head of the spool, and what those before it have shown, which all failed."""

    since: float  # when the first of them began
    is_again: bool = False  # so the session is a new one, and has seen that the tables are there and fit
    losses: int = 0  # how many sessions were lost while its first flush was tried alone, or while ...
    row: int | None = None  # ... this row of it was, by its place in Group.rows
    is_overdue: bool = False  # whether the events behind the head have waited for HELD_S_MAX

    def suspects_events(self, error: DatabaseError) -> bool:
        """Return whether an error may be the fault of single events, so that a sift should look for them."""
        if error.fault is Fault.AWAY:
            return self.is_overdue and error.sqlstate in RAISED_TOO
        return error.fault is Fault.DATA or self.is_again


def sift(session: Session, group: Group, trial: Trial, one_by_one: bool) -> Counts:
    """Insert the rows of a group that the database takes, by bisection or one by one; the caller commits.

    The group refuses the others. Returns how many were there already, by table. Raises DatabaseError.
    """
    session.run(f"{SIFT_START}{raise_sql(group.epoch, session.token, group.number)}")
    skipped = Counts()
    # Rows are tried in their order, so that of two that cannot be stored together the second one is refused.
    every = range(len(group.rows))
    parts = [range(row, row + 1) for row in reversed(every)] if one_by_one else [every]
    while parts:
        part = parts.pop()
        rows = [{table: {place: row}} for table, row, _, place in group.rows[part.start : part.stop]]
        message = insert_message("SAVEPOINT attempt;\n", rows, ATTEMPT_END, session.partition_keys)
        try:
            session.run(message)
            skipped += skipped_rows(message, session.tags)
        except DatabaseError as error:
            if not trial.suspects_events(error):
                group.lost_at = part.start
                raise
            session.run("ROLLBACK TO SAVEPOINT attempt")
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                group.refuse(part.start, error)
    return skipped


def set_apart(spool: Spool, metrics: Metrics, group: Group) -> None:
    """Move unfit events from their flushes to the quarantine, in one transaction. Raises SpoolError."""
    spool.quarantine(group.unfit, group.left())
    metrics.count("events_quarantined_total", len(group.unfit))
    for item in group.unfit:
        # What is complained about is not the reason, which may quote the event: each would be logged.
        about = f"quarantine {item.app_id} {item.table} {item.column}"
        complain(logging.WARNING, f"a spooled event goes to the quarantine: {item.reason}", about)


class Replayer:
    """While the writer has no session: opens one, moves the spool into the database, and hands it over."""

    def __init__(
        self, apps: Apps, spool: Spool, opener: Opener | None, metrics: Metrics, clock: Clock = time.monotonic
    ) -> None:
        self.has_database = opener is not None  # without one everything stays in the spool
        self.is_up = self.has_database  # whether the database could be used the last time
        self.reason = ""  # why there is no session; stays until the next one has stored something
        self.had_session = False  # ever
        self.retried = 0  # how many events --retry_quarantine tried, until the outcome has been logged
        self.turn = threading.Event()  # set while new events may go to the spool; else they wait a little
        self.turn.set()
        self.apps = apps  # replaced as a whole by a reload
        self._spool, self._opener, self._metrics, self._clock = spool, opener, metrics, clock
        self._taken: queue.SimpleQueue[Session | None] = queue.SimpleQueue()  # by take(): see there
        self._stop = threading.Event()
        # These belong to the replayer's thread; others only look.
        self._backoff_s = 0.0
        self._got_on_at = math.inf  # when the replay last got on; infinity before the first take()
        self._failed: Trial | None = None  # the last try to store the head of the spool, if it failed
        self._events_max = REPLAY_EVENTS_MAX  # in a group; fewer after a failure

    def stop(self) -> None:
        """Begin nothing new; does not wait."""
        self._stop.set()
        self._taken.put(None)

    def take(self, session: Session | None, reason: str = "") -> None:
        """Go on with a session, or connect if it was lost (None). To be called before events are spooled."""
        self.is_up, self.reason, self._got_on_at = session is not None, reason, self._clock()
        self._taken.put(session)

    def report_retried(self, outcome: str) -> None:
        """Log what has become of the events in quarantine that were retried. Raises SpoolError."""
        retried, stay = self.retried, self._spool.quarantined
        log.info("quarantine: %d of %d events %s, %d stay", max(retried - stay, 0), retried, outcome, stay)
        for reason, count in self._spool.quarantine_reasons():
            log.warning("quarantine: %d stay: %s", count, reason)
        self.retried = 0

    def held_up(self) -> str:
        """Return what holds the replay up, if it has not got on for HELD_UP_S, else ""."""
        events, seconds = self._spool.events, self._clock() - self._got_on_at
        if seconds < HELD_UP_S or not events:
            return ""
        why = self.reason or "the database has not answered yet"
        return f"the replay has been held up for {seconds:.0f} s: {why}"

    def work(self, hand_over: Callable[[Session], bool]) -> None:
        """Replay until stop(). `hand_over` gives a session to the writer, or returns False: events came."""
        session = self._taken.get()
        while not self._stop.wait(0 if session else self._backoff_s * random.uniform(0.5, 1)):
            try:
                session = session or self._connect()
                session = self._replay(session, hand_over)
            except (DatabaseError, OperatorError, SpoolError) as error:
                # What the spool fails at says nothing about the database.
                self.is_up, self.reason = self.is_up and isinstance(error, SpoolError), str(error)
                if session:
                    session.close()
                    session = None
                    is_away = isinstance(error, DatabaseError) and error.fault is Fault.AWAY
                    level = logging.WARNING if is_away else logging.ERROR
                    complain(level, f"the replay is held up: {error}", "held up")
                else:
                    complain(logging.WARNING, f"cannot use the database: {error}")
            finally:
                self.turn.set()
        if session:
            session.close()

    def _connect(self) -> Session:
        """Return a new session. Raises DatabaseError, OperatorError, SpoolError."""
        assert self._opener
        self._backoff_s = min(max(self._backoff_s * 2, 0.1), BACKOFF_MAX_S)
        session = self._opener.open(self._spool.epochs)
        self._metrics.count("database_reconnects_total", int(self.had_session))
        self.had_session = self.is_up = True
        seconds = self._clock() - self._got_on_at
        complain(logging.INFO, f"the database is there again, after {seconds:.1f} s", "database there")
        return session

    def _replay(self, session: Session, hand_over: Callable[[Session], bool]) -> Session | None:
        """Move the spool into the database, and hand the session over; return what take() gets after that."""
        started = logged = self._clock()
        replayed, slow_until, is_outrun = 0, 0.0, False
        if left := self._spool.events:
            complain(logging.INFO, f"replaying {left} events from the spool", "replaying")
        while not self._stop.is_set():
            if flushes := self._spool.head(self._events_max):
                began = self._clock()
                events = self._store(session, flushes)
                now = self._got_on_at = self._clock()
                came = self._spool.events - (left - events)
                replayed, left = replayed + events, self._spool.events
                slow_until = now + SLOW_S if now - began > SLOW_REPLAY_S else 0.0
                is_outrun = is_outrun or (events > 0 and came > events / 2)
                self._give_turn(left, is_outrun)
                if now - logged > 5:
                    logged, rate = now, replayed / (now - started)
                    text = "replayed %d events, %d left, %.0f per second, about %.0f s left"
                    log.info(text, replayed, left, rate, left / max(rate, 1))
            # A database that is slow would lose the writer's session at once.
            elif self._clock() >= slow_until and hand_over(session):
                self._backoff_s = 0.0
                self.turn.set()
                if replayed:
                    text = f"replayed all {replayed} events in {self._clock() - started:.1f} s"
                    complain(logging.INFO, text, "replayed")
                with contextlib.suppress(SpoolError):  # somebody is reading it: there will be another time
                    if self.retried:
                        self.report_retried("went through")
                    self._spool.shrink()
                return self._taken.get()
            else:
                self.turn.set()
                self._stop.wait(POLL_S)
        return session

    def _give_turn(self, left: int, is_outrun: bool) -> None:
        """Decide, between two transactions of the replay, whether new events may go to the spool now."""
        if left <= FLUSH_EVENTS_MAX:
            self.turn.clear()  # all wait for the end, which is near
            return
        self.turn.set()
        if is_outrun:  # clients send all they can, so that the end would never come
            self.turn.clear()  # only those that were waiting are let in

    def _store(self, session: Session, flushes: Sequence[SpooledFlush]) -> int:
        """Move flushes into the database, or first the unfit events; return how many have left the spool."""
        stored = [flush for flush in flushes if flush.number <= session.stored.get(flush.epoch, 0)]
        group = Group(stored or flushes, self.apps)
        if not stored:
            trial = self._failed or Trial(self._clock())
            trial = trial._replace(is_overdue=self._clock() - trial.since > HELD_S_MAX)
            # (When a reload makes events unfit, the rows behind them move up: trial.row is another then.)
            if trial.row is not None and trial.losses >= LOSSES_MAX and not group.unfit:
                reason = "whenever it is stored, the connection to the database is lost"
                group.refuse(trial.row, DatabaseError(reason))
            if group.unfit:
                set_apart(self._spool, self._metrics, group)
                self._failed = None
                return 0  # what is left of them comes next
            try:
                skipped = self._send(session, group, trial)
            except DatabaseError as error:
                self._failed = Trial(trial.since, is_again=True)
                if len(flushes) == 1 and not error.sqlstate and str(error) != NO_ANSWER:  # a loss
                    losses = trial.losses if group.lost_at == trial.row else 0
                    self._failed = Trial(trial.since, True, losses + 1, group.lost_at)
                needs_others = trial.is_overdue and error.sqlstate in RAISED_TOO  # to go through beside it
                self._events_max = REPLAY_EVENTS_MAX // 8 if needs_others else max(self._events_max // 8, 1)
                raise
            self._metrics.count_all("events_duplicate_total", skipped)
        # Deleted only after COMMIT: a crash here repeats the delete, never the events.
        self._spool.delete(group.flushes)
        self._metrics.count("events_replayed_total", sum(batch.accepted for batch in group.batches))
        self._backoff_s, self.reason, self._failed = 0.0, "", None
        self._events_max = min(self._events_max * 2, REPLAY_EVENTS_MAX)
        return sum(flush.events for flush in group.flushes)

    def _send(self, session: Session, group: Group, trial: Trial) -> Counts:
        """Store a group, but for what goes to the quarantine; return how many rows were there already."""
        one_by_one = trial.losses >= LOSSES_MAX or trial.row is not None
        if not one_by_one:
            try:
                # A single flush cannot be divided: it may take longer.
                is_long = trial.is_again and len(group.flushes) == 1
                limit_s = (LONG_STATEMENT_TIMEOUT_S if is_long else STATEMENT_TIMEOUT_S) + ANSWER_GRACE_S
                return session.store(group.epoch, group.number, [b.rows for b in group.batches], limit_s)
            except DatabaseError as error:
                if not (group.rows and trial.suspects_events(error)):
                    raise
        skipped = sift(session, group, trial, one_by_one)
        # The events are to blame if most others go through: none does while the database is away.
        is_away = any(error.fault is Fault.AWAY for error in group.refused)
        are_to_blame = len(group.refused) * 2 < len(group.rows) or (trial.is_overdue and not is_away)
        if group.refused and not are_to_blame:
            raise group.refused[0]
        if group.unfit:  # durable before COMMIT: afterwards nobody would look at these flushes again
            set_apart(self._spool, self._metrics, group)
        session.run("COMMIT")
        return skipped


def divide(part: Sequence[Batch], error: DatabaseError, left: list[Batch]) -> list[Sequence[Batch]]:
    """Return the parts in which a refused flush is to be tried again, the last one first.

    The batch at fault, if known, is refused or, if its app quarantines, put into `left` for the replay.
    """
    culprit, index = refused_row(error, part) or (part[0], None)  # the only one, or else it is not known
    if index is None and len(part) > 1:
        middle = len(part) // 2
        return [part[middle:], part[:middle]]
    if culprit.quarantines:
        left.append(culprit)
    else:
        problem = Problem(index, error.fields.get("c"), f"the database refuses it: {error}")
        culprit.tell(culprit, refused_events([problem], culprit.accepted))
    others = [batch for batch in part if batch is not culprit]
    return [others] if others else []


def cannot_store(error: SpoolError, events: int) -> Refusal:
    """Return the refusal of events that their client should send again later; log why."""
    complain(logging.ERROR, f"requests are answered with 503: {error}")
    return Refusal("storage_away", "events cannot be stored now, send them again later", events=events)


class Writer:
    """Stores the batches of all HTTP threads, and gives each its verdict."""

    def __init__(
        self, spool: Spool, replayer: Replayer, metrics: Metrics, clock: Clock = time.monotonic
    ) -> None:
        # With it new events go to the database, without it to the spool. Guarded by the spool's switch.
        self.session: Session | None = None
        self.beat_at = clock()  # when the thread last got on; at least every IDLE_LOOK_S while it is well
        self.is_watched = False  # set by the monitor: an idle database should be asked whether it is there
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.replayer, self._spool, self._metrics, self._clock = replayer, spool, metrics, clock
        # These belong to the writer's thread.
        self._stopping = False
        self._untold: Meanwhile = NOTHING  # answers the clients of the last flush, if none has yet

    def retry_quarantine(self) -> None:
        """Move the events in quarantine that fit by now into the spool. Before start(). Raises SpoolError."""

        def why(text: str) -> str:
            group = Group([SpooledFlush(0, "", 0, 1, f"[{text}]")], self.replayer.apps)
            return group.unfit[0].reason if group.unfit else ""

        retried = self.replayer.retried = self._spool.quarantined
        self._spool.retry(why)
        self._metrics.count("events_spooled_total", retried - self._spool.quarantined)
        if not (self._spool.events and self.replayer.has_database):  # else it follows after their replay
            self.replayer.report_retried("fit by now")

    def start(self, session: Session | None) -> threading.Thread:
        """Start both threads, with a session or (None) while the database is away; return the writer's."""
        self.replayer.had_session = session is not None
        threading.Thread(target=self.replayer.work, args=[self._accept], name="replayer", daemon=True).start()
        if self.replayer.has_database and not (session and self._accept(session)):
            self.replayer.take(session, "" if session else "it was away at the start")
        thread = threading.Thread(target=self._work, name="writer", daemon=True)
        thread.start()
        return thread

    def submit(self, batch: Batch, tell: Callable[[Batch, str | Refusal], object]) -> None:
        """Hand over a batch. Does not block.

        The writer's thread calls `tell` with the batch and where it is committed, DATABASE or SPOOL, or a
        Refusal if it cannot be stored now or the database refuses it. `tell` must not block or raise.
        """
        batch.tell, batch.since = tell, self._clock()
        self._inbox.put(batch)

    def stuck_s(self) -> float:
        """Return how many seconds the thread has been stuck, or 0. If it is, the spool may be locked."""
        silent_s = self._clock() - self.beat_at
        return silent_s if silent_s > STALLED_S else 0

    def stop(self) -> None:
        """End the thread after what is in the inbox. Does not wait; no submit() may follow."""
        self.replayer.stop()
        self._inbox.put(None)

    def _accept(self, session: Session) -> bool:
        """Take a session over; return False if there are events in the spool, which have to come first."""
        with self._spool.switch:
            if self._spool.head(1):
                return False
            self.session = session
            return True

    def _work(self) -> None:
        while not self._stopping:
            self.beat_at = self._clock()
            batches = self._take()
            if batches and not self.session:
                self.replayer.turn.wait(batches[0].since + TURN_PATIENCE_S - self._clock())
            if not batches:
                self._look_at_session()
            elif session := self.session:
                self._store(session, batches)
            else:
                self._to_spool([(0, batches)])
        self._tell_stored()
        if self.session:
            self.session.close()
        self._spool.close()

    def _take(self) -> list[Batch]:
        """Return the batches that are waiting, up to a flush. Blocks for IDLE_LOOK_S at most."""
        batches: list[Batch] = []
        events = size = 0
        with contextlib.suppress(queue.Empty):
            batch = self._inbox.get(timeout=IDLE_LOOK_S)
            while batch is not None:
                batches.append(batch)
                events, size = events + batch.accepted, size + len(batch.body)
                if events >= FLUSH_EVENTS_MAX or size >= FLUSH_CHARS_MAX:
                    return batches
                batch = self._inbox.get_nowait()
            self._stopping = True  # that was stop()'s None
        return batches

    def _look_at_session(self) -> None:
        """Find out whether an idle session has ended, before a batch needs it."""
        try:
            if self.session:
                self.session.check_idle()
                # Behind a pooler, or of a stopped PostgreSQL, the connection looks well: only a query tells.
                if self.is_watched:
                    self.is_watched = False
                    self.session.run("SELECT 1", PATIENCE_MIN_S)
        except DatabaseError as error:
            self._to_spool([], error)

    def _store(self, session: Session, batches: Sequence[Batch]) -> None:
        """Store batches in the database: in one flush or, if it refuses some, in several."""
        deadline = batches[0].since + PATIENCE_S
        loss: DatabaseError | None = None
        parts, left = [batches], list[Batch]()
        while parts and not loss:
            part = parts.pop()
            number, started = next(self._spool.numbers), self._clock()
            try:
                rows, seconds = [batch.rows for batch in part], max(deadline - started, PATIENCE_MIN_S)
                skipped = session.store(self._spool.epoch, number, rows, seconds, self._tell_stored)
            except DatabaseError as error:
                if error.fault is Fault.DATA:
                    parts += divide(part, error, left)
                else:
                    loss = error
            else:
                self._untold = partial(self._tell, part, DATABASE, self._clock() - started)
                if self._inbox.empty() or sum(batch.accepted for batch in part) < LONG_FLUSH_EVENTS:
                    self._tell_stored()
                self._metrics.count_all("events_duplicate_total", skipped)
            if self._clock() > deadline:  # so many are refused that others would wait too long
                break
        left += itertools.chain(*reversed(parts))
        if loss or left:
            self._to_spool([(number, part if loss else []), (0, left)], loss)

    def _to_spool(self, flushes: Sequence[Flush], loss: DatabaseError | None = None) -> None:
        """Append flushes, and give the session up, if we have one: after its loss, or for the replay."""
        self._tell_stored()
        started = self._clock()
        ready = [(n, batches, [b.spooled or b.text() for b in batches]) for n, batches in flushes if batches]
        done: list[tuple[Sequence[Batch], SpoolError | None]] = []  # clients are told without the lock
        with self._spool.switch:
            session, self.session = self.session, None
            if session:  # the replayer goes on with it, but has to wait for the switch
                self.replayer.take(None if loss else session, str(loss or ""))
            for number, batches, texts in ready:
                failure: SpoolError | None = None
                try:
                    self._spool.append(number, sum(batch.accepted for batch in batches), texts)
                except SpoolError as error:
                    failure = error
                done.append((batches, failure))
        for batches, failure in done:
            if not failure:
                self._tell(batches, SPOOL, self._clock() - started)
                continue
            for batch in batches:
                if batch.kept:  # the client will send them again
                    with contextlib.suppress(SpoolError):
                        self._spool.release(batch.kept)
                batch.tell(batch, cannot_store(failure, batch.accepted + len(batch.kept)))
        if session and loss:
            if not self._stopping:
                level = logging.ERROR if loss.fault is Fault.OPERATOR else logging.WARNING
                text = f"the database cannot store events: {loss}; they go to {self._spool.path}"
                complain(level, text, f"cannot store {loss.sqlstate or loss}")
            session.close()

    def _tell_stored(self) -> None:
        """Answer the clients of the last flush that is in the database, unless that has been done."""
        tell, self._untold = self._untold, NOTHING
        tell()

    def _tell(self, batches: Sequence[Batch], place: str, seconds: float) -> None:
        """Answer the clients of a flush; count it, and log it with -vv."""
        accepted = Counts()
        for batch in batches:
            batch.tell(batch, place)
            for table, rows in batch.rows.items():
                accepted[batch.delivery.app, table.name] += len(rows)
        events = accepted.total()
        self._metrics.count_all("events_accepted_total", accepted)
        self._metrics.count("events_spooled_total", events if place == SPOOL else 0)
        self._metrics.observe("flush_events", events)
        self._metrics.observe("flush_duration_seconds", seconds, place)
        text = "flush: %d batches, %d events, %s, %.1f ms"
        log.log(TRACE, text, len(batches), events, place, seconds * 1e3)


# --- HTTP ---------------------------------------------------------------------
# Strict parsing, one handler per connection, a bounded pool of threads. The parsing is our own because
# http.server's is neither fast nor safe behind a proxy: it takes `Content-Length: +5`, lets Content-Length
# and Transfer-Encoding disagree and drops headers after a malformed line, all of which smuggle requests.

# The header lines that belong to a status (RFC 9110, sections 15.5.6, 15.5.16 and 15.6.4).
STATUS_HEADERS = {
    405: "Allow: POST, OPTIONS\r\n",
    415: "Accept: application/json, text/plain\r\nAccept-Encoding: gzip, deflate\r\n",
    503: f"Retry-After: {RETRY_AFTER_S}\r\n",
}
EXPOSED = "Access-Control-Expose-Headers: Retry-After\r\n"
ANY_ORIGIN = f"Access-Control-Allow-Origin: *\r\n{EXPOSED}"
http_date = lru_cache(1)(partial(formatdate, usegmt=True))  # RFC 9110, section 6.6.1; made once a second

CODINGS = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
HEADERS_TOO_LARGE = f"a request may have {HEADER_COUNT_MAX} header fields, of {HEADER_BYTES_MAX} bytes in all"
ONCE_ONLY = {"host", "content-length", "transfer-encoding", "content-type", "content-encoding", "origin"}

REQUEST_LINE = re.compile(rf"({HEADER_NAME}) ([!-~]+) HTTP/1\.([0-9])")
FIELD = re.compile(rf"({HEADER_NAME}):([\t -~\x80-\xff]*)")  # RFC 9112, section 5
HOST = re.compile(r"(?:[0-9A-Za-z._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
TARGET = re.compile(r"(?:(?i:https?)://[^/?#]*)?/apps/([^/?#]+)/events(?:\?[^#]*)?")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*(?=\r\n|\Z)", re.IGNORECASE)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t -~]{0,247})?")  # 256 bytes (RFC 9112, section 7.1)
# Bytes that no head has: bare line feeds and carriage returns, other control characters. They are looked for
# before the head is whole, so that a client that speaks another protocol (TLS, say) is answered at once.
FORBIDDEN = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")


class Head(NamedTuple):
    """A request's head. `length` is the body's, or None for a chunked body."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case; repeated fields joined by ", "
    length: int | None
    keep_alive: bool
    expects_continue: bool

    def line(self) -> str:
        """Return what was asked, without the query, into which whoever mistakes the API puts the key."""
        return f"{self.method} {self.target.partition('?')[0]}"


def parse_request_line(line: str) -> tuple[str, str, str]:
    """Return the method, the target and the minor version (RFC 9112, section 3). Raises Refusal."""
    if len(line) > REQUEST_LINE_BYTES_MAX:
        raise Refusal("target_too_long", f"the request line has more than {REQUEST_LINE_BYTES_MAX} bytes")
    if not (match := REQUEST_LINE.fullmatch(line)):
        got = show(line.partition("?")[0])
        raise Refusal("malformed_request", f"expected a request line of HTTP/1.1, got {got}")
    return match[1], match[2], match[3]


def check_partial_head(head: bytes, start: int) -> None:
    """Raise Refusal if the beginning of a head cannot become a good one; from `start` on it is new."""
    if FORBIDDEN.search(head, start):
        raise Refusal("malformed_request", "a control character, or a line that does not end in CR LF")
    line, is_whole, _ = head.removeprefix(b"\r\n").partition(b"\r\n")
    if is_whole or len(head) > REQUEST_LINE_BYTES_MAX:  # HTTP/0.9, for example, sends no more than a line
        parse_request_line(line.decode("latin-1"))
    if len(head) - len(line) > HEADER_BYTES_MAX + 2 * HEADER_COUNT_MAX:
        raise Refusal("headers_too_large", HEADERS_TOO_LARGE)


def parse_fields(lines: Sequence[str]) -> dict[str, str]:
    """Return header fields by their names in lower case (RFC 9112, section 5). Raises Refusal."""
    if len(lines) > HEADER_COUNT_MAX or sum(map(len, lines)) > HEADER_BYTES_MAX:
        raise Refusal("headers_too_large", HEADERS_TOO_LARGE)
    headers: dict[str, str] = {}
    for line in lines:
        if not (match := FIELD.fullmatch(line)):
            raise Refusal("malformed_request", f"malformed header line {show(line)}")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers and name in ONCE_ONLY:
            raise Refusal("malformed_request", f"the header {name} stands twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def body_length(headers: Mapping[str, str], minor: str) -> int | None:
    """Return the length of the body, or None if it is chunked (RFC 9112, section 6.3). Raises Refusal."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is None:
        if length is not None and not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise Refusal("malformed_request", f"malformed Content-Length {show(length)}")
        return int(length or 0)
    if length is not None:
        raise Refusal("malformed_request", "both Content-Length and Transfer-Encoding")
    if minor == "0":
        raise Refusal("malformed_request", "Transfer-Encoding in HTTP/1.0")
    codings = [item.strip(" \t").lower() for item in coding.split(",")]
    if set(codings) != {"chunked"}:
        raise Refusal("not_implemented", f"expected chunked as the transfer coding, got {show(coding)}")
    if len(codings) > 1:
        raise Refusal("malformed_request", "chunked twice")
    return None


def parse_head(head: bytes) -> Head:
    """Return a parsed request head (without its final empty line). Raises Refusal (RFC 9112)."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, target, minor = parse_request_line(request_line)
    headers = parse_fields(lines)
    if minor != "0" and "host" not in headers:
        raise Refusal("malformed_request", "the Host header is missing")
    if not HOST.fullmatch(headers.get("host", "")):
        raise Refusal("malformed_request", f"malformed Host header {show(headers['host'])}")
    connection = [item.strip(" \t") for item in headers.get("connection", "").lower().split(",")]
    keep_alive = "close" not in connection and (minor != "0" or "keep-alive" in connection)
    expects_continue = minor != "0" and headers.get("expect", "").lower() == "100-continue"
    return Head(method, target, headers, body_length(headers, minor), keep_alive, expects_continue)


def find_app(head: Head, apps: Apps) -> Intake:
    """Return the app that the path of a request names. Raises Refusal."""
    if head.method not in HTTPMethod.__members__:
        raise Refusal("not_implemented", f"the method {show(head.method)} is not known")
    if not (match := TARGET.fullmatch(head.target)):
        raise Refusal("unknown_path", "no such path; events go to /apps/<app>/events")
    try:
        return apps[unquote_to_bytes(match[1]).decode()]
    except (KeyError, UnicodeDecodeError):
        raise Refusal("unknown_path", f"no such app {show(match[1])}") from None


def check_request(head: Head, intake: Intake, body_bytes_max: int) -> None:
    """Raise Refusal for a request whose method, origin, media type or length its app does not take."""
    origin = head.headers.get("origin")
    if head.method not in ("POST", "OPTIONS"):
        raise Refusal("method", f"{head.method} is not allowed here, use POST")
    if not intake.app.allows(origin):
        raise Refusal("origin", f"the app does not allow the origin {show(origin)}")
    if head.method == "POST":
        if head.length is not None and "content-length" not in head.headers:
            raise Refusal("length_missing", "a POST needs a Content-Length or chunked Transfer-Encoding")
        full, coding = head.headers.get("content-type", ""), head.headers.get("content-encoding", "")
        kind, *parameters = (part.strip(" \t").lower() for part in full.split(";"))
        charsets = {p.partition("=")[2].strip('"') for p in parameters if p.startswith("charset=")}
        # navigator.sendBeacon() sends text/plain.
        if kind not in ("application/json", "text/plain", "") or charsets - {"utf-8", "utf8", "us-ascii"}:
            raise Refusal("media", f"expected the content type application/json in UTF-8, got {show(full)}")
        if coding.lower() not in CODINGS:
            raise Refusal("media", f"expected gzip or deflate as the content encoding, got {show(coding)}")
    if head.length is not None and head.length > body_bytes_max:
        raise Refusal("too_large", f"the body has {head.length} bytes; a request may have {body_bytes_max}")


def cors_headers(intake: Intake, head: Head) -> str:
    """Return the CORS header lines of an answer (fetch.spec.whatwg.org, 3.2)."""
    lines = ANY_ORIGIN
    if intake.app.origins is not None:
        origin = head.headers.get("origin")
        if origin is None or not intake.app.allows(origin):
            return "Vary: Origin\r\n"
        lines = f"Vary: Origin\r\nAccess-Control-Allow-Origin: {origin}\r\n{EXPOSED}"
    if head.method == "OPTIONS":
        names = ", ".join(("Content-Type", "Content-Encoding", *intake.headers))
        lines += f"Access-Control-Allow-Methods: POST\r\nAccess-Control-Allow-Headers: {names}\r\n"
        lines += "Access-Control-Max-Age: 86400\r\n"  # browsers cap it themselves (Chromium at 2 h)
    return lines


def answer_text(verdict: str | Refusal, batch: Batch | None = None) -> str:
    """Return the body of an answer, JSON in ASCII: of a refusal, or to a stored batch; "" to a preflight."""
    values: dict[str, object]
    if isinstance(verdict, Refusal):
        values = {"error": verdict.reason, "events": [vars(problem) for problem in verdict.problems]}
    elif batch is None:
        return ""
    elif batch.warnings or batch.problems:
        values = {"accepted": batch.accepted, "stored": verdict, "warnings": [*batch.warnings]}
        values["quarantined"] = [vars(problem) for problem in batch.problems[:PROBLEMS_MAX]]
    else:
        return f'{{"accepted": {batch.accepted}, "stored": "{verdict}"}}\n'  # half the time of json.dumps
    return json.dumps({name: value for name, value in values.items() if value != []}) + "\n"


def answer_bytes(head: Head | None, status: HTTPStatus, headers: str, text: str) -> bytes:
    """Return a whole answer; to HEAD without its body (RFC 9110, section 9.3.2)."""
    kind = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
    headers = f"Date: {http_date(int(time.time()))}\r\n{kind}{headers}{STATUS_HEADERS.get(status, '')}"
    text = "" if head and head.method == "HEAD" else text
    return f"HTTP/1.1 {status} {status.phrase}\r\n{headers}\r\n{text}".encode("latin-1")


def limit_wait(sock: socket.socket, option: int, seconds: int) -> None:
    """Bound how long recv (SO_RCVTIMEO) or send (SO_SNDTIMEO) block until BlockingIOError, see socket(7)."""
    # settimeout() would not leave the socket blocking: the writer's thread sends to it with MSG_DONTWAIT.
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))


class Incoming:
    """What a client sends, read under deadlines. Raises Refusal past them or if the client ends early."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock, self._clock, self._buffer = sock, clock, b""
        self._waits_s = IDLE_SLICE_S  # what limit_wait() was told last, first by the listener

    def wait(self) -> bool:
        """Return whether the next request begins within IDLE_SLICE_S. Raises EOFError at the end of input."""
        if self._buffer in (b"", b"\r\n"):  # some clients send an empty line behind a body
            try:
                self._buffer = self._receive(self._clock() + IDLE_SLICE_S)
            except Refusal:
                return False
            if not self._buffer:
                raise EOFError
        return self._buffer != b"\r\n"

    def head(self, seconds: float = HEAD_DEADLINE_S) -> bytes:
        """Return a request's head without its final empty line. Call it after wait()."""
        deadline, head = self._clock() + seconds, b""
        while not head:  # an empty line before the request line is ignored (RFC 9112, section 2.2)
            head = self._until(b"\r\n\r\n", check_partial_head, deadline).removeprefix(b"\r\n")
        return head

    def body(self, length: int | None, limit: int) -> bytes:
        """Return a request's body: of `length` bytes or, if it is None, chunked and of at most `limit`."""
        deadline = self._clock() + BODY_DEADLINE_S
        if length is not None:
            return self._exactly(length, deadline)
        body, size = bytearray(), -1
        while size:  # RFC 9112, section 7.1
            match = CHUNK_LINE.fullmatch(self._line(256, deadline))
            if not match:
                raise Refusal("malformed_request", "malformed chunk size")
            size = int(match[1], 16)
            if len(body) + size > limit:
                raise Refusal("too_large", f"the body has more than {limit} bytes")
            body += self._exactly(size, deadline)
            if size and self._exactly(2, deadline) != b"\r\n":
                raise Refusal("malformed_request", "a chunk is longer than its size says")
        trailers: list[str] = []
        while (line := self._line(HEADER_BYTES_MAX, deadline)) and len(trailers) <= HEADER_COUNT_MAX:
            trailers.append(line.decode("latin-1"))
        parse_fields(trailers)
        return bytes(body)

    def linger(self) -> None:
        """End our side, and drop what still comes until the client ends its own. Blocks LINGER_S at most."""
        # Closing at once would reset the connection, and with it an answer that is on its way.
        deadline = self._clock() + LINGER_S
        with contextlib.suppress(Refusal, OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._receive(deadline):
                pass

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts, self._buffer = [self._buffer[:size]], self._buffer[size:]
        missing = size - len(parts[0])
        while missing:
            data = self._receive(deadline, missing)
            if not data:
                raise Refusal("malformed_request", f"the body ended {missing} bytes early")
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _line(self, limit: int, deadline: float) -> bytes:
        """Return a line of a chunked body without its CRLF. Raises Refusal for one of more than `limit`."""

        def check(line: bytes, start: int) -> None:
            if len(line) > limit or FORBIDDEN.search(line, start):
                raise Refusal("malformed_request", "a line of a chunked body is too long, or is not one")

        return self._until(b"\r\n", check, deadline)

    def _until(self, mark: bytes, check: Callable[[bytes, int], None], deadline: float) -> bytes:
        """Return what comes before a mark, and drop the mark. `check` sees it grow, and may refuse it."""
        start = 0
        while (end := self._buffer.find(mark)) < 0:
            check(self._buffer, start)
            start = max(len(self._buffer) - 1, 0)  # checking all of it for each byte would take long
            data = self._receive(deadline)
            if not data:
                raise Refusal("malformed_request", "the connection ended in the middle of the request")
            self._buffer += data
        taken, self._buffer = self._buffer[:end], self._buffer[end + len(mark) :]
        return taken

    def _receive(self, deadline: float, size: int = 0) -> bytes:
        """Return what comes, at most RECEIVE_BYTES, b"" at the end; with a `size` wait for that much."""
        seconds = math.ceil(deadline - self._clock())  # mostly the same as the last time
        try:
            if seconds <= 0:
                raise BlockingIOError
            if seconds != self._waits_s:
                self._waits_s = seconds
                limit_wait(self._sock, socket.SO_RCVTIMEO, seconds)
            if not size:
                return self._sock.recv(RECEIVE_BYTES)
            # So that not each piece of a large body wakes us and leaves a hole in the memory.
            return self._sock.recv(min(size, BODY_BYTES_MAX), socket.MSG_WAITALL)
        except BlockingIOError:
            raise Refusal("too_slow", "the request did not arrive in time") from None


class Pool:
    """Runs jobs in at most `limit` threads. A job that returns true keeps its place until release()."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit, self._name = limit, name
        self.jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()  # of those who have a place
        # Guards all below. Notified when busy shrinks.
        self._released = threading.Condition()
        self.busy = 0  # places that are taken; never more than there are threads
        self._threads = 0
        self._full_since = 0.0  # when busy last reached the limit

    def run(self, job: Callable[[], object]) -> bool:
        """Run a job in a thread soon; return False if none is to be had. Blocks at most PLACE_PATIENCE_S."""
        with self._released:
            # Counted from when all places had been taken, so that a flood does not block us again and again.
            patience_s = self._full_since + PLACE_PATIENCE_S - time.monotonic()
            if not self._released.wait_for(lambda: not self.is_full(), patience_s):
                return False
            if self.busy == self._threads:
                name = f"{self._name}-{self._threads}"
                try:
                    threading.Thread(target=self._work, name=name, daemon=True).start()
                except RuntimeError as error:  # the system's limit of threads or memory
                    complain(logging.ERROR, f"cannot start a thread: {error}")
                    return False
                self._threads += 1
            self.busy += 1
            if self.is_full():
                self._full_since = time.monotonic()
        self.jobs.put(job)
        return True

    def release(self) -> None:
        with self._released:
            self.busy -= 1
            self._released.notify_all()

    def is_full(self, share: float = 1) -> bool:
        return self.busy >= self._limit * share

    def wait_until_quiet(self, seconds: float) -> bool:
        """Return whether all jobs have ended. Blocks at most `seconds`."""
        with self._released:
            return self._released.wait_for(lambda: not self.busy, seconds)

    def _work(self) -> NoReturn:
        while True:
            if not self.jobs.get()():  # a variable would keep the job's connection alive until the next job
                self.release()


@dataclass
class Service:
    """What all connections share: the apps, the writer, and the state of the process."""

    apps: Apps  # replaced as a whole by a reload
    writer: Writer
    spool: Spool
    metrics: Metrics
    body_bytes_max: int
    clock: Clock
    draining: bool = False  # set once, by the main thread: answers end their connections, and ...
    ended: bool = False  # ... then idle ones end as well
    # Held while a large body is converted: the events of several would fill the memory, and small requests
    # would wait until each of them in turn lets go of the interpreter.
    _converting: threading.Lock = field(default_factory=threading.Lock)
    # How many more large batches may be on their way to an answer: they take more memory than their bodies.
    large: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(LARGE_BATCHES_MAX))
    live: Live | None = None  # with a monitor port

    def batch(self, intake: Intake, body: bytes, delivery: Delivery) -> Batch:
        """Return the batch in a body. Blocks while LARGE_BATCHES_MAX large ones wait for their answers.

        Its bad events go to the quarantine before anything of it is stored. Raises Refusal.
        """
        if len(body) <= LARGE_BODY_BYTES:
            return self._made_ready(intake.batch(body, delivery))
        with self._converting:
            batch = self._made_ready(intake.batch(body, delivery))
            self.large.acquire()
            return batch

    def _made_ready(self, batch: Batch) -> Batch:
        if batch.problems:
            try:
                batch.kept = self.spool.quarantine(batch.quarantined(batch.problems))
            except SpoolError as error:
                raise cannot_store(error, len(batch.events)) from None
            self.metrics.count("events_quarantined_total", len(batch.kept))
        batch.spooled = "" if self.writer.session else batch.text()  # the writer would hold everybody up
        batch.events = []  # the body takes a fifth of the memory, and can be decoded again for the spool
        return batch


class Handler(BaseRequestHandler):
    """Serves one client connection: request after request, until one of us closes it.

    The writer's thread sends the answers to batches; ours meanwhile waits for the next request.
    """

    server: Server
    request: socket.socket

    def setup(self) -> None:
        self._service = self.server.service
        self._incoming = Incoming(self.request, self._service.clock)
        # The last head that was let in, parsed; and by what it is known again: the apps there were then, and
        # its bytes before and behind the number in Content-Length, which clients repeat with each request.
        self._known: tuple[Head, Intake, Callable[[float], Delivery]] | None = None
        self._known_by: tuple[object, bytes, bytes] = None, b"", b""
        # Held while the writer has a batch of ours, from submit() until its answer is sent.
        self._answering = threading.Lock()
        self._rest = b""  # of that answer: what the kernel did not take
        self.has_parted = False  # from our thread: the writer's sends the last answer and ends the connection
        self._stays_open = True  # whether the connection does, after the answer
        # Of the request that is served, or that waits for its answer from the writer's thread.
        self.head: Head | None = None
        self.intake: Intake | None = None
        self.body = b""  # once it has been read, until the answer
        self._is_read = True  # to its end; if not, no other request can be read behind it
        self.started = 0.0

    def handle(self) -> None:
        with contextlib.suppress(EOFError):
            while self._stays_open and self._await_request():
                self._exchange()

    def finish(self) -> None:
        if not self.has_parted:
            self._finish_answer()  # it must not meet a closed socket, nor that of another client

    def _await_request(self) -> bool:
        """Return whether there is another request to serve. Raises EOFError if the client sends no more."""
        since = self._service.clock()
        while not self._incoming.wait():
            if self._answering.locked() or self._rest:  # a client that waits for its answer is not idle
                self._finish_answer()
                since = self._service.clock()
            limit_s = IDLE_CROWDED_S if self.server.pool.is_full(0.75) else IDLE_S
            limit_s = limit_s if self.head else HEAD_DEADLINE_S  # for the first request
            if self._service.ended or self._service.clock() - since > limit_s:
                return False
        self._finish_answer()
        return self._stays_open

    def _exchange(self) -> None:
        """Read a request, and answer it or leave that to the writer's thread. Raises OSError."""
        self.started = self._service.clock()
        self.head, self.intake, self._is_read = None, None, False
        try:
            batch = self._read_request()
        except Refusal as refusal:
            self.request.sendall(self._answer(refusal))
            if not self._is_read:
                self._incoming.linger()
            return
        if batch is None:
            self.request.sendall(self._answer(""))
            return
        self._answering.acquire()
        self.has_parted = not self._stays_open  # everything is the writer's thread's from submit() on
        self._service.writer.submit(batch, self._tell)
        if not self.has_parted and batch.problems:  # the kernel may not take all of a long answer at once
            self._finish_answer()

    def _tell(self, batch: Batch, verdict: str | Refusal) -> None:
        """Send the answer to a batch. Called by the writer's thread; does not block."""
        answer, has_parted = self._answer(verdict, batch), self.has_parted
        if len(batch.body) > LARGE_BODY_BYTES:
            self._service.large.release()
        try:
            self._rest = answer[self.request.send(answer, socket.MSG_DONTWAIT) :]
        except OSError:  # if the client is gone, that is noticed when the rest is sent
            self._rest = answer
        self._answering.release()  # unless we have parted, the next request may be served from here on
        if has_parted and self._rest:
            self.server.pool.jobs.put(self._part)
        elif has_parted:
            self.server.shutdown_request(self.request)
            self.server.pool.release()

    def _part(self) -> None:
        """Send the rest of a last answer, in a thread of the pool, and close the connection."""
        with contextlib.suppress(OSError):
            self._finish_answer()
        self.server.shutdown_request(self.request)

    def _finish_answer(self) -> None:
        """Wait until the writer has answered, and send what the kernel did not take from it."""
        with self._answering:
            rest, self._rest = self._rest, b""
            if rest:
                self.request.sendall(rest)

    def _answer(self, verdict: str | Refusal, batch: Batch | None = None) -> bytes:
        """Return the answer to a refused request, a stored batch or a preflight; count and log it."""
        service, head, intake = self._service, self.head, self.intake
        status = HTTPStatus.OK if batch else HTTPStatus.NO_CONTENT
        if isinstance(verdict, Refusal):
            batch, status = None, verdict.status
            app_id = intake.app.id if intake else ""  # never a client's text
            service.metrics.count("events_refused_total", verdict.events, app_id, verdict.label)
        if service.live and verdict:
            service.live.note(self, verdict, batch)
        seconds = service.clock() - self.started
        service.metrics.count("http_requests_total", 1, f"{status}")
        service.metrics.observe("http_request_duration_seconds", seconds)
        self._stays_open = self._stays_open and self._is_read and not service.draining
        self.body = b""  # takes no memory while the connection is idle
        cors = cors_headers(intake, head) if intake and head else ANY_ORIGIN
        headers = f"{cors}Connection: {'keep-alive' if self._stays_open else 'close'}\r\n"
        answer = answer_bytes(head, status, headers, answer_text(verdict, batch))
        if log.isEnabledFor(logging.DEBUG):
            line = head.line() if head else "-"
            client = network_of(self.client_address[0])  # more of it may not be kept
            text = str(verdict).partition('"')[0]  # what it quotes may be a key
            log.debug("%s %s -> %d, %.1f ms %s", client, line, status, seconds * 1e3, text)
        return answer

    def _read_request(self) -> Batch | None:
        """Return the batch of a request, or None for a preflight that is allowed. Raises Refusal."""
        raw, apps, limit = self._incoming.head(), self._service.apps, self._service.body_bytes_max
        known_apps, before, behind = self._known_by
        number = raw[len(before) : len(raw) - len(behind)]
        is_known = apps is known_apps and raw == before + number + behind
        length = int(number) if is_known and number.isdigit() and len(number) <= 18 else None
        if self._known and length is not None and length <= limit:
            head, intake, deliver = self._known
            self.head, self.intake = head, intake
        else:
            head = self.head = parse_head(raw)
            self._stays_open, length = head.keep_alive, head.length  # a known one kept the connection open
            try:
                intake = self.intake = find_app(head, apps)
                check_request(head, intake, limit)
            except Refusal:
                # Read the body all the same, so that the connection can go on. Not if the client waits
                # for a go-ahead that it will not get, nor if the body is too large.
                if not head.expects_continue and (length or 0) <= limit:
                    self.body, self._is_read = self._incoming.body(length, limit), True
                raise
            deliver = intake.delivery(head.headers, self.client_address[0])
            if (field := CONTENT_LENGTH.search(raw)) and "content-length" not in intake.headers:
                self._known_by = apps, raw[: field.start(1)], raw[field.end(1) :]
                self._known = head, intake, deliver
        if head.expects_continue and length != 0:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.body, self._is_read = self._incoming.body(length, limit), True
        if head.method == "OPTIONS":
            return None
        if coding := CODINGS[head.headers.get("content-encoding", "").lower()]:
            self.body = inflate(self.body, coding, limit)
        return self._service.batch(intake, self.body, deliver(time.time()))


def describe_bug(error: BaseException | None) -> str:
    """Return the name, the place and the message of an unexpected exception in one line."""
    trace = traceback.extract_tb(error.__traceback__) if error else []
    place = f" at {Path(trace[-1].filename).name}:{trace[-1].lineno}" if trace else ""
    return f"{type(error).__name__}{place}: {reason_of(error)}" if error else "for no reason given"


class Listener(ThreadingHTTPServer):
    """A socket that listens; a pool, which several may share, serves its connections."""

    def __init__(self, sock: socket.socket, handler: type[BaseRequestHandler], pool: Pool) -> None:
        super().__init__(sock.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.pool = sock, pool
        sock.setblocking(False)

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(POLL_S,), name="acceptor", daemon=True).start()

    def _handle_request_noblock(self) -> None:
        """Accept all connections that wait. (socketserver accepts one for each poll, which takes longer.)"""
        try:
            for _ in range(LISTEN_BACKLOG):
                self.process_request(*self.get_request())
        except OSError as error:  # BlockingIOError when there are no more
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                complain(logging.ERROR, f"cannot accept connections: {reason_of(error)}")
                time.sleep(POLL_S)  # instead of spinning

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in the pool; beyond its limit turn the client away."""
        # Without TCP_NODELAY an answer can wait 40 ms for the client's delayed acknowledgement.
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_wait(request, socket.SO_RCVTIMEO, IDLE_SLICE_S)
        limit_wait(request, socket.SO_SNDTIMEO, SEND_TIMEOUT_S)
        if not self.pool.run(partial(self._serve, request, client_address)):
            self.turn_away(request)

    def turn_away(self, request: socket.socket) -> None:
        self.shutdown_request(request)

    def _serve(self, request: Any, client_address: Any) -> bool:
        """Serve a connection and close it; return True if the writer's thread will close it instead."""
        try:
            make: Any = self.RequestHandlerClass
            if make(request, client_address, self).has_parted:
                return True
        except OSError as error:  # the client is gone: nobody to answer
            log.debug("%s: %s", network_of(client_address[0]), reason_of(error))
        except Exception:  # noqa: BLE001  # as socketserver does: a bug in one connection is not the others'
            bug = describe_bug(sys.exception())
            complain(logging.ERROR, f"a connection from {network_of(client_address[0])} was cut: {bug}", bug)
        self.shutdown_request(request)
        return False


class Server(Listener):
    """A listening socket for clients."""

    def __init__(self, sock: socket.socket, service: Service, pool: Pool, turning_away: Pool) -> None:
        super().__init__(sock, Handler, pool)
        self.service, self._turning_away = service, turning_away

    def stop_accepting(self, is_inherited: bool) -> None:
        """Close the socket. Accept who has connected, unless it is inherited: the next process does that."""
        self.shutdown()
        if not is_inherited:
            # Closing would reset connections that the kernel has accepted for us.
            self._handle_request_noblock()
        self.server_close()

    def turn_away(self, request: socket.socket) -> None:
        if self.pool.is_full():
            complain(logging.WARNING, "clients get 503: more connections than --max_connections allows")
        if not self._turning_away.run(partial(self._turn_away, request)):
            # There are so many that not even this can be done with patience: it must not block.
            self._turn_away(request, socket.MSG_DONTWAIT)

    def _turn_away(self, sock: socket.socket, flags: int = 0) -> None:
        """Answer 503, or a preflight. With flags (MSG_DONTWAIT) nothing is read, and nothing blocks."""
        refusal = Refusal("too_many_connections", "too many connections, try again later")
        status, headers, text = refusal.status, ANY_ORIGIN, answer_text(refusal)
        incoming, head = Incoming(sock, self.service.clock), None
        with contextlib.suppress(Refusal, OSError, EOFError):
            # Without an answer to its preflight a page cannot read the 503 that its request gets.
            if not flags and incoming.wait():
                head = parse_head(incoming.head(IDLE_SLICE_S))
                intake = find_app(head, self.service.apps)
                check_request(head, intake, 0)
                if head.method == "OPTIONS":
                    status, headers, text = HTTPStatus.NO_CONTENT, cors_headers(intake, head), ""
        if text:
            self.service.metrics.count("events_refused_total", 1, "", refusal.label)
        self.service.metrics.count("http_requests_total", 1, f"{status}")
        with contextlib.suppress(OSError):  # the client is gone
            sock.send(answer_bytes(head, status, f"{headers}Connection: close\r\n", text), flags)
            if not flags:
                incoming.linger()
        self.shutdown_request(sock)


def shown_address(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def listen(host: str, port: int, option: str = "--port", reuse_port: bool = False) -> list[socket.socket]:
    """Return sockets that listen on each address of a host; port 0 is any free one. Raises OperatorError."""
    hints = {
        errno.EADDRINUSE: f"the port is in use; stop the other program or choose another port with {option}",
        errno.EACCES: f"permission denied; ports below 1024 need root, choose another with {option}",
        errno.EADDRNOTAVAIL: "this machine does not have the address",
    }
    places = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    if host != "localhost":
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise OperatorError(f"cannot listen on {show(host)}: {reason_of(error)}") from None
        places = list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))
    make = partial(socket.create_server, backlog=LISTEN_BACKLOG, reuse_port=reuse_port)
    sockets: list[socket.socket] = []
    for family, address in places:
        port = sockets[0].getsockname()[1] if sockets else port  # all on the one that 0 became
        # `::` alone is for IPv4 as well; beside `0.0.0.0` it would collide with it.
        both = family == socket.AF_INET6 and len(places) == 1 and socket.has_dualstack_ipv6()
        try:
            sockets.append(make((address, port), family=family, dualstack_ipv6=both))
        except OSError as error:
            # A machine without IPv6 still has its localhost.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and host == "localhost" and sockets:
                continue
            hint = hints.get(error.errno or 0, reason_of(error))
            raise OperatorError(f"cannot listen on {shown_address(address, port)}: {hint}") from None
    return sockets


def addresses_text(servers: Iterable[Listener]) -> str:
    return " and ".join(f"http://{shown_address(*server.server_address[:2])}" for server in servers)


# --- Live view ----------------------------------------------------------------
# Every request with its verdict, as it comes: a page and a stream on the monitor port. Who answers it notes
# it, if it is refused or somebody watches. What is shown is made in the watcher's thread, and only of the few
# that are sent. Texts of clients go through without_keys() before they leave.

STYLE = """
:root { color-scheme: light dark; background: light-dark(#f5f6f8, #13151a) } ol { padding: 0 }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit } [hidden] { display: none !important }
body { margin: auto; padding: 1rem; max-width: 72rem; overflow-wrap: anywhere } summary { cursor: pointer }
body { font: 14px/1.5 system-ui, sans-serif; color: light-dark(#1a1e26, #e3e7ee) }
header,nav,#filters,summary,.pair { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: baseline }
#cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem }
.card, details, button, select, input { background: light-dark(#fff, #1c1f26); padding: .45rem .8rem;
  border: 1px solid light-dark(#dfe3e9, #333944); border-radius: .5rem }
button, select, input { padding: .2rem .6rem } h2, h3, time, .dim { color: light-dark(#586174, #9aa4b5) }
svg { width: 100%; height: 2rem; fill: #5b8def33; stroke: #5b8def } [aria-selected=true] { font-weight: 650 }
#text, summary > :nth-child(4) { flex: 1; min-width: 8rem } summary > :nth-child(2) { min-width: 8.5rem }
h1, b { font-size: 1.15rem; font-weight: 650 } .database, .up { color: light-dark(#18774c, #4cc38a) }
#cards, nav, #filters { margin: .7rem 0 } .spool, .quarantined, .warn { color: light-dark(#925500, #f0b048) }
li { display: block; margin-bottom: .35rem } .refused, .away, .why { color: light-dark(#bd232b, #ff8a84) }
.event { margin: .5rem 0; padding-left: .7rem; border-left: 3px solid light-dark(#dfe3e9, #333944) }
code, pre, time { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap }
"""
SCRIPT = r"""
const $ = id => document.getElementById(id), own = Object.hasOwn, held = [], KEPT = 300;
const VERDICTS = {database: "stored", spool: "in the spool", quarantined: "partly quarantined"};
const EXAMPLES = {bool: true, i32: 7, i64: 7e9, f32: 0.5, f64: 0.25, string: "text", json: {any: ["json", 1]},
  uuid: "123e4567-e89b-42d3-a456-426614174000", timestamp: new Date().toISOString()};
const el = (tag, className, ...kids) => {  // texts among the kids become text nodes, whatever they are
  const made = Object.assign(document.createElement(tag), {className});
  return made.append(...kids.flat(3).filter(kid => kid != null && kid !== "")), made; };
const copy = (title, text) => Object.assign(el("button", "", title), {onclick: event =>
  navigator.clipboard.writeText(text).then(() => event.target.textContent = "Copied")});
const clock = s => new Date(s * 1000).toLocaleTimeString("en-GB"), number = n => n.toLocaleString("en");
const sum = numbers => numbers.reduce((a, b) => a + b, 0), json = JSON.stringify;
let apps = {}, paused = false, last = "";
const eventBox = (row, {index, event}) => {
  const has = event && typeof event === "object", problems = row.problems.filter(p => p.index === index);
  const columns = has && own(apps, row.app) && own(apps[row.app], event._t) ? apps[row.app][event._t] : {};
  const rest = Object.keys(columns).find(name => columns[name] === "catch-all") ?? "no column";
  const names = [...(has ? Object.keys(event) : []), ...problems.map(p => p.column).filter(name => name)];
  const why = name => problems.filter(p => p.column === name).map(p => el("p", "why", `↑ ${p.reason}`));
  const line = name => [el("div", why(name)[0] ? "pair why" : "pair",
    el("code", "", `${json(name)}: ${has && own(event, name) ? json(event[name]) : "missing"}`),
    el("span", "dim", own(columns, name) ? columns[name] : name === "_t" ? "table" : rest)), why(name)];
  return el("div", "event", el("h3", "", `events[${index}]`), el("code", "", has ? "" : json(event)),
    why(null), [...new Set(names)].map(line)); };
const rowItem = row => {
  const counts = Object.entries(row.tables), more = sum(Object.values(row.tables)) - row.events.length;
  const others = row.problems.filter(p => !row.events.some(event => event.index === p.index));
  const box = el("details", "", el("summary", "", el("time", "", clock(row.time)),
    el("span", row.verdict, VERDICTS[row.verdict] ?? `refused ${row.status}`),
    el("span", "", row.app ?? row.request ?? "no HTTP"),
    el("span", "", counts.map(([table, n]) => `${number(n)} ${table}`).join(", ")),
    el("span", "dim", `${row.client}, ${row.ms} ms`)));
  box.ontoggle = () => box.children[1] ?? box.append(el("div", "event", el("p", "why", row.reason),
    others.map(p => el("p", "why", `events[${p.index ?? "?"}] ${p.column ?? ""}: ${p.reason}`)),
    row.warnings.map(text => el("p", "warn", text)), row.events.map(event => eventBox(row, event)),
    el("p", "dim", more > 0 ? `and ${number(more)} more events` : ""), el("pre", "", row.sent),
    copy("Copy link", `${location.origin}/#${row.id}`), " ", copy("Copy JSON", json(row, null, 1))));
  return el("li", "", box, el("p", "dim", row.skipped ? `and ${number(row.skipped)} more` : "")); };
const sift = item => item.hidden = !item.text.includes($("text").value.toLowerCase()) ||
  $("table").value && !own(item.row.tables, $("table").value) ||
  ["app", "verdict"].some(name => $(name).value && item.row[name] !== $(name).value);
const unfold = item => { item.firstChild.open = true; item.scrollIntoView(); };
const add = row => {
  if ($(row.id)) return;
  const item = Object.assign(rowItem(row), {id: row.id, row, text: json(row).toLowerCase()});
  sift($("rows").insertBefore(item, [...$("rows").children].find(other => +other.id < row.id) ?? null));
  $("rows").children[KEPT]?.remove();
  if (location.hash === `#${row.id}`) unfold(item); };
const listen = () => {
  const stream = new EventSource("/live"), says = text => $("said").textContent = text;
  stream.onopen = () => says("live");
  stream.onmessage = ({data}) => {
    if (!paused) return add(JSON.parse(data));
    if (held.push(JSON.parse(data)) > KEPT) held[1].skipped += held.shift().skipped + 1;
    $("pause").textContent = `Resume (${number(sum(held.map(row => row.skipped + 1)))} new)`; };
  stream.onerror = () => says(stream.readyState === 2 ? "too many watch already" : "connecting again"); };
const card = (id, text, more, looks = "", values = []) => {
  const [, now, below, drawing] = $(id).children, top = Math.max(1, ...values), left = 300 - values.length;
  const points = values.map((value, i) => `L${left + i} ${39 - 37 * value / top}`).join("");
  [now.textContent, now.className, below.textContent] = [text, looks, more];
  drawing.firstChild.setAttribute("d", points && `M${left} 40${points}V40Z`); };
const quantile = (share, counts, bounds) => {  // in ms, about, as Prometheus does
  let left = share * sum(counts);
  const i = counts.findIndex(n => n && (left -= n) <= 0), low = bounds[i - 1] ?? 0, high = bounds[i] ?? low;
  return i < 0 ? "-" : +(1000 * (low + (high - low) * (1 + left / counts[i]))).toPrecision(2); };
const look = async () => {
  const state = await fetch("/live/state").then(answer => answer.json()).catch(() => null);
  setTimeout(look, 1000); if (!state) return card("database", "no answer", "is it there?", "away");
  const {spool, counts, bounds, samples} = state, full = (100 * spool.bytes / spool.limit).toPrecision(2);
  const up = state.database, ms = share => `${quantile(share, counts, bounds)} ms`;
  card("database", up, `since ${clock(state.since)} ${state.database_reason ?? ""}`, up);
  card("spool", `${number(spool.events)} waiting`, `${full} % full`, spool.events ? "spool" : "");
  card("kept", number(state.quarantine), state.reason ?? "events", state.quarantine ? "quarantined" : "");
  card("latency", ms(0.5), `p99 ${ms(0.99)}, of a minute`);
  ["accepted", "refused"].forEach((id, i) => {
    const rates = samples.slice(1).map((b, j) => (b[i + 1] - samples[j][i + 1]) / (b[0] - samples[j][0]));
    const now = +(sum(rates.slice(-5)) / 5).toFixed(1), top = Math.round(Math.max(0, ...rates));
    card(id, number(now), `at most ${number(top)}`, "", rates); });
  if (last === (last = json([apps = state.apps, state.items]))) return;
  const pairs = Object.keys(apps).flatMap(app => Object.keys(apps[app]).map(table => [app, table]));
  const options = i => Array.from(new Set(pairs.map(pair => pair[i])), name => new Option(name));
  ["app", "table"].forEach((id, i) => $(id).replaceChildren($(id)[0], ...options(i)));
  $("items").replaceChildren(...state.items.map(([time, ...texts]) => el("li", "card",
    el("p", "dim", clock(time)), texts.map((text, i) => el("p", i === 2 ? "why" : "", text)))));
  $("examples").replaceChildren(...pairs.map(([app, table]) => {
    const filled = Object.entries(apps[app][table]).filter(([, type]) => type !== "catch-all");
    const event = {_t: table, ...Object.fromEntries(filled.map(([name, type]) => [name, EXAMPLES[type]]))};
    const body = json({secret_key: "...", events: [event]}), quoted = body.replaceAll("'", "'\\''");
    const url = `${state.address}/apps/${encodeURIComponent(app).replaceAll("'", "%27")}/events`;
    const curl = `curl '${url}' -H 'Content-Type: application/json' -d '${quoted}'`;
    const script = `fetch("${url}", {method: "POST", keepalive: true, body: JSON.stringify(${body})})`;
    return el("li", "card", el("h3", "", `${app}, ${table}`), el("pre", "", curl), copy("Copy curl", curl),
      el("pre", "", script), copy("Copy JavaScript", script)); })); };
const choose = tab => document.querySelectorAll("nav button").forEach(other => {
  other.onclick = () => choose(other);
  [other.ariaSelected, $(other.value).hidden] = [other === tab, other !== tab]; });
$("pause").onclick = () => {
  $("pause").textContent = (paused = !paused) ? "Resume" : held.splice(0).forEach(add) ?? "Pause"; };
$("filters").oninput = () => [...$("rows").children].forEach(sift);
onhashchange = () => [...$("rows").children].filter(item => location.hash === `#${item.id}`).forEach(unfold);
look(choose(document.querySelector("nav button"))).then(listen);
"""
CARD = """<div class="card" id="{}"><h2>{}</h2><b></b><p class="dim"></p>
<svg viewBox="0 0 300 40" preserveAspectRatio="none" aria-hidden="true"><path></path></svg></div>"""
PAGE = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Attolytics</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style>
<header><h1>Attolytics</h1><p id="said" role="status"></p></header><section id="cards" aria-label="Status">
{CARD.format("database", "Database")}{CARD.format("spool", "Spool")}{CARD.format("kept", "Quarantine")}
{CARD.format("latency", "Median latency")}{CARD.format("accepted", "Accepted / s")}
{CARD.format("refused", "Refused / s")}</section><nav role="tablist" aria-label="Views">
<button role="tab" value="feed">Feed</button><button role="tab" value="quarantine">Quarantine</button>
<button role="tab" value="send">Send one</button></nav><main><section id="feed" aria-label="Newest first">
<div id="filters" role="search"><select id="app" aria-label="App"><option value="">every app</select>
<select id="table" aria-label="Table"><option value="">every table</select>
<select id="verdict" aria-label="Verdict"><option value="">every verdict<option value="database">stored
<option value="spool">in the spool<option value="quarantined">partly quarantined<option>refused</select>
<input id="text" type="search" aria-label="Text" placeholder="any text"><button id="pause">Pause</button>
</div><ol id="rows"></ol></section><section id="quarantine" aria-label="Quarantine"><p>The newest events
that do not fit. Mend the schema file or the database, then start the server as always, but with one option
more:</p> <code>python attolytics.py --retry_quarantine ...</code><ol id="items"></ol></section>
<section id="send" aria-label="Send one"><p>Put the app's key where the dots are.</p><ol id="examples"></ol>
</section></main><script>{SCRIPT}</script></html>"""
# Nothing but our own script and style may run, whatever clients send, and nothing be fetched from elsewhere.
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'; "
POLICY += "form-action 'none'; require-trusted-types-for 'script'; script-src '{}'; style-src '{}'"
HASHES = [f"sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}" for s in (SCRIPT, STYLE)]
PAGE_HEADERS = {"Content-Security-Policy": POLICY.format(*HASHES), "Referrer-Policy": "no-referrer"}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\nretry: 1000\n\n"
HIDDEN = "(secret key)"
# What stands in a text where a key should, in whatever form, up to the events. (Without an end to \W, a body
# of blanks would take it half a minute, in which no other thread runs.)
NAMED_KEY = r"(?is)(secret[ _-]?key\W{,6}[:=])(?!\(secret).*?(?=\W{,16}events\b|\Z)"
NO_TEXT = re.compile("[\0-\x08\x0b-\x1f\x7f\ufffd]")
Note = tuple[dict[str, Any], Sequence[Problem], bytes, int]  # of a request: row, problems, body, memory used
Page = tuple[HTTPStatus, str, str]  # status, text, content type


def without_escapes(text: str) -> str:
    """Return a text with the escapes of JSON and URLs resolved, and without all other backslashes."""
    text = re.sub(r"(?<!\\)\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unquote_to_bytes(text).decode(errors="replace").replace("\\", "")


@lru_cache(1)
def key_patterns(keys: Collection[str]) -> Sequence[re.Pattern[str]]:
    """Return patterns for whole keys, for what stands in a key's place, and for keys that were cut off."""
    keys = sorted(keys, key=len, reverse=True)  # one may begin with another
    # A short one must stand alone: it may be a part of words.
    whole = "|".join(re.escape(k) if len(k) > 7 else rf"(?<!\w){re.escape(k)}(?!\w)" for k in keys)
    begun = "|".join(rf"{re.escape(k[:8])}.*|{re.escape(k[:4])}.{{,4}}(?=\.\.\.)" for k in keys if len(k) > 7)
    return [re.compile(pattern) for pattern in (whole, NAMED_KEY, begun) if pattern]


def without_keys(text: str, keys: Iterable[str]) -> str:
    """Return a text without secret keys, even escaped or cut ones, and without what stands in their place."""
    text = NO_TEXT.sub("", text)
    ways: Sequence[Callable[[str], str]] = (str, without_escapes) if "\\" in text or "%" in text else (str,)
    for pattern, way in itertools.product(key_patterns(frozenset(keys)), ways):
        plain = way(text)
        if pattern.search(plain):
            text = pattern.sub(lambda m: (m[1] if m.lastindex else "") + HIDDEN, plain)
    return text


def presentable(value: Any, keys: Collection[str], depth: int = LIVE_DEPTH_MAX) -> Any:
    """Return a JSON value that every reader can take, cut to the bounds above and without secret keys."""
    if isinstance(value, str):
        text = without_keys(value, keys)
        return text if len(text) <= LIVE_TEXT_CHARS_MAX else f"{text[:LIVE_TEXT_CHARS_MAX]}..."
    if isinstance(value, list):
        return [presentable(item, keys, depth - 1) for item in value[:LIVE_ITEMS_MAX]] if depth else "..."
    if isinstance(value, dict):
        items = [*value.items()][:LIVE_ITEMS_MAX] if depth else []
        secret = {key: HIDDEN for key, _ in items if re.fullmatch("(?i)secret[ _-]?key", key)}
        return {presentable(k, keys): secret.get(k) or presentable(v, keys, depth - 1) for k, v in items}
    # Infinity is no JSON, and JavaScript would round a large number.
    return show(value) if type(value) in (int, float) and not abs(value) < 1 << 53 else value


def whole_row(note: Note, keys: Collection[str]) -> Any:
    """Return all that the page shows of a request; of a body that is no text (not inflated, say) its size."""
    row, problems, body, _ = note
    text, found = body.decode(errors="replace").removeprefix("\ufeff"), None
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        found = json.loads(text, parse_constant=str).get("events")
    if len(NO_TEXT.findall(text)) > len(text) / 10:
        text = f"({row['bytes']} bytes that are no text)"
    events, bad = found if isinstance(found, list) else [], {problem.index for problem in problems}
    first = sorted(range(len(events)), key=lambda index: index not in bad)[:LIVE_ITEMS_MAX]
    names = [event.get(TABLE_KEY) for event in events if isinstance(event, dict)]
    tables = row["tables"] or Counter(name for name in names if isinstance(name, str))
    sent = None if events or row["status"] == HTTPStatus.OK else text
    row = row | {"tables": tables, "problems": [vars(problem) for problem in problems], "sent": sent}
    return presentable(row | {"events": [{"index": i, "event": events[i]} for i in first]}, keys)


class Live:
    """What is noted of the requests, for those who watch; for any thread."""

    def __init__(self, service: Service) -> None:
        self._service, self._replayer = service, service.writer.replayer
        self.address = "http://localhost:8000"  # where clients send to
        self._first_id = self._last_id = time.time_ns() // 1_000  # so that ids go up beyond a restart
        self._ids = itertools.count(self._first_id + 1)
        self._places = threading.Semaphore(LIVE_WATCHERS_MAX)
        self._room, self._watched_until = 0, 0.0  # how many more stored requests are noted, not just counted
        self._stored = deque[Note](maxlen=LIVE_STORED_MAX)  # without the lock: the writer waits for nobody
        self._lock = threading.Lock()  # guards what is below; never held for long
        self._refused = deque[Note](maxlen=LIVE_REFUSED_MAX)
        self._keys: Set[str] = frozenset()  # of all apps there have been
        self._was_up, self._since = self._replayer.is_up, time.time()  # the database was; since when
        self._samples = deque[tuple[float, float, float, list[float]]](maxlen=LIVE_SAMPLES_MAX)  # see tick()
        self.tick()

    def note(self, handler: Handler, verdict: str | Refusal, batch: Batch | None = None) -> None:
        """Keep a request that has its verdict, if anybody may want to see it. Does not block."""
        if self._room < 1 and batch and not batch.problems:
            self._last_id = next(self._ids)
            return
        head, intake, body = handler.head, handler.intake, handler.body
        problems: Sequence[Problem] = batch.problems if batch else []
        row: dict[str, Any] = {"time": time.time(), "app": intake and intake.app.id, "bytes": len(body)}
        row["client"] = client_ip(head.headers if head else {}, handler.client_address[0])
        row["ms"] = round((self._service.clock() - handler.started) * 1e3, 2)
        row["request"] = head.line() if head else None
        row |= {"verdict": "quarantined" if problems else verdict, "status": 200, "reason": None}
        if isinstance(verdict, Refusal):
            problems = verdict.problems
            row |= {"verdict": "refused", "status": verdict.status, "reason": verdict.reason}
        row["tables"] = {table.name: len(rows) for table, rows in batch.rows.items()} if batch else {}
        row["warnings"] = [*batch.warnings] if batch else []
        problems, body = problems[:LIVE_ITEMS_MAX], body[:LIVE_BODY_BYTES_MAX]
        self._last_id = row["id"] = next(self._ids)
        note = row, problems, body, 2_000 + len(body) + 300 * len(problems)
        if row["verdict"] == verdict:  # all of it was stored
            self._stored.append(note)
            self._room -= 1
            return
        with self._lock:
            self._refused.append(note)
            while sum(size for _, _, _, size in self._refused) > LIVE_REFUSED_BYTES_MAX:
                self._refused.popleft()

    def tick(self) -> None:
        """Take a sample each second, and forget what nobody watches. The acceptors call it all the time."""
        now, numbers = self._service.clock(), self._service.metrics.numbers
        if self._samples and now < self._samples[-1][0] + 1:
            return
        accepted, refused = (sum(numbers(f"events_{kind}_total")[:1]) for kind in ("accepted", "refused"))
        keys = {intake.app.secret_key for intake in self._service.apps.values()}
        with self._lock:
            self._samples.append((now, accepted, refused, numbers("http_request_duration_seconds")[:-1]))
            self._keys |= keys | {key.replace("\\", "") for key in keys}
            if self._replayer.is_up != self._was_up:
                self._was_up, self._since = not self._was_up, time.time()
            self._room = LIVE_STORED_MAX if now < self._watched_until else 0
            if not self._room:
                self._stored.clear()

    def watch(self, handler: MonitorHandler) -> None:
        """Send the requests as server-sent events until the watcher leaves, or reads no more."""
        if not self._places.acquire(blocking=False):
            handler.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{LIVE_WATCHERS_MAX} watch already")
            return
        with contextlib.ExitStack() as at_end:
            at_end.callback(self._places.release)
            sock, asked = handler.connection, handler.headers.get("Last-Event-ID", "")
            sock.settimeout(LIVE_SEND_TIMEOUT_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIVE_BUFFER_BYTES)
            has_left = select.poll()
            has_left.register(sock, select.POLLIN)  # a watcher sends nothing but its end
            sock.sendall(STREAM)
            known = re.fullmatch("[0-9]{1,18}", asked) and self._first_id <= int(asked) <= self._last_id
            after = int(asked) if known else 0  # others may be of a process whose clock was ahead of ours
            # Notes that wait to be sent; the ids kept the last time; the id up to which all is accounted for.
            bad, good = deque[Note](maxlen=LIVE_REFUSED_MAX), deque[Note](maxlen=LIVE_STORED_MAX // 2)
            seen, counted = set[int](), after or math.inf
            for tick in itertools.count(1):
                self._watched_until, last_id = self._service.clock() + LIVE_GRACE_S, self._last_id
                self._room = LIVE_STORED_MAX
                with self._lock:
                    kept = self._refused.copy(), self._stored.copy()
                for waiting, notes in zip((bad, good), kept, strict=True):
                    waiting.extend(note for note in notes if after < note[0]["id"] not in seen)
                seen = {note[0]["id"] for note in itertools.chain(*kept)}
                skipped = max(last_id - counted - len(bad) - len(good), 0)
                for _ in range(min(LIVE_ROWS, len(bad) + len(good))):
                    row = whole_row((bad or good).popleft(), self._keys) | {"skipped": skipped}
                    sock.sendall(f"id: {row['id']}\ndata: {json.dumps(row)}\n\n".encode())
                    skipped = 0
                counted = last_id - len(bad) - len(good)
                sock.sendall(b"" if tick % LIVE_HEARTBEAT_TICKS else b":\n\n")
                if has_left.poll(LIVE_TICK_S * 1e3):
                    return

    def state(self, health: str) -> Page:
        """Return what the page shows beside the feed; `health` is the monitor's."""
        service, rows = self._service, list[Any]()
        with self._lock:
            samples, since = [*self._samples], self._since
        minute = next(sample for sample in samples if sample[0] >= samples[-1][0] - 60)
        counts = [after - before for before, after in zip(minute[3], samples[-1][3], strict=True)]
        if not service.writer.stuck_s():
            with contextlib.suppress(SpoolError):
                rows = service.spool.newest_quarantined(LIVE_TEXT_CHARS_MAX, LIVE_ITEMS_MAX)
        apps: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
        for app_id, intake in service.apps.items():
            for table in intake.tables.values():
                own = [c for c in table.columns if not (c.header or c.source)]
                apps[app_id][table.name] = {c.name: "catch-all" if c.extra else c.type for c in own}
        state = presentable(json.loads(health) | {"items": [list(row) for row in rows]}, self._keys)
        state |= {"since": since, "apps": apps, "bounds": SECONDS_BOUNDS, "counts": counts}
        state |= {"address": self.address, "samples": [sample[:3] for sample in samples]}
        return HTTPStatus.OK, json.dumps(state), "application/json"


# --- Monitor ------------------------------------------------------------------
# Health and metrics for the operator, on a port of localhost. It only looks at what the others publish.

# No other is answered: a website whose name points to 127.0.0.1 (DNS rebinding) makes browsers ask for that.
LOCAL_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]*)?", re.IGNORECASE)
PLAIN = "text/plain; charset=utf-8"


class MonitorHandler(BaseHTTPRequestHandler):
    """Answers one request on a connection."""

    server: Monitor
    protocol_version = default_request_version = "HTTP/1.1"  # so that every answer has a status line
    timeout = HEAD_DEADLINE_S
    has_parted = False

    def do_GET(self) -> None:
        hosts, path = self.headers.get_all("Host", []), self.path.partition("?")[0]
        page = self.server.pages.get(path)
        if not hosts and self.request_version != "HTTP/1.0":
            self._answer(HTTPStatus.BAD_REQUEST, "the Host header is missing\n")
        elif not all(map(LOCAL_HOST.fullmatch, hosts)):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "ask for localhost\n")
        elif not page:
            self._answer(HTTPStatus.NOT_FOUND, "there are /, /live, /healthz and /metrics\n")
        elif self.command not in ("GET", "HEAD"):
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "use GET\n", Allow="GET, HEAD")
        elif self.command == "GET" and path == "/live":
            self.server.live.watch(self)
        else:
            self._answer(*page())

    def send_error(self, code: int, message: str | None = None, _explain: str | None = None) -> None:
        """Answer what is no request. It is called for all methods but GET, too: do_GET() serves HEAD."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self.do_GET()
        else:
            self._answer(HTTPStatus(code), f"{message or HTTPStatus(code).phrase}\n")

    def log_message(self, text: str, *args: object) -> None:
        log.debug(f"the monitor's client: {text}", *args)

    def _answer(self, status: HTTPStatus, text: str, kind: str = PLAIN, **headers: str) -> None:
        body = text.encode()
        headers |= {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} | PAGE_HEADERS
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Monitor(Listener):
    """A listening socket of the monitor port; `clients` is the pool whose connections it counts."""

    def __init__(self, sock: socket.socket, service: Service, pool: Pool, clients: Pool) -> None:
        super().__init__(sock, MonitorHandler, pool)
        self._service, self._writer, self._spool = service, service.writer, service.spool
        self._replayer, self._clients = service.writer.replayer, clients
        self._started_at, self._started = time.time(), service.clock()
        self.live = service.live = service.live or Live(service)
        self.pages: dict[str, Callable[[], Page]] = {"/healthz": self.health, "/metrics": self.metrics}
        self.pages["/"] = lambda: (HTTPStatus.OK, PAGE, "text/html")
        self.pages["/live"] = lambda: (HTTPStatus.OK, "", "text/event-stream")  # for HEAD only
        self.pages["/live/state"] = lambda: self.live.state(self.health()[1])

    def service_actions(self) -> None:
        self.live.tick()

    def health(self) -> Page:
        """Return whether events can be stored, as a status and as JSON."""
        replayer, spool = self._replayer, self._spool
        self._writer.is_watched = True
        failure, spool_reason = self._failure()
        held_up = replayer.held_up()
        files = {"path": spool.path, "events": spool.events, "bytes": spool.size()}
        health = {
            "status": "failing" if failure else "degraded" if held_up else "ok",
            "reason": failure or held_up or None,
            "database": "up" if replayer.is_up else "away" if replayer.has_database else "none",
            "database_reason": None if replayer.is_up else replayer.reason or None,
            "spool": {**files, "limit": spool.bytes_max, "reason": spool_reason or None},
            "replay": held_up or None,
            "quarantine": spool.quarantined,
            "version": __version__,
            "uptime_seconds": round(self._service.clock() - self._started, 3),
        }
        status = HTTPStatus.SERVICE_UNAVAILABLE if failure else HTTPStatus.OK
        return status, json.dumps(health) + "\n", "application/json"

    def metrics(self) -> Page:
        """Return all metrics in Prometheus' text format; what only Linux tells is left out elsewhere."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        gauges = {
            "spool_bytes": self._spool.size(),
            "spool_events": self._spool.events,
            "spool_limit_bytes": self._spool.bytes_max,
            "quarantine_events": self._spool.quarantined,
            "http_connections": self._clients.busy,
            "process_start_time_seconds": self._started_at,
            "process_cpu_seconds_total": time.process_time(),
            "process_max_fds": math.inf if limit == resource.RLIM_INFINITY else limit,
        }
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            gauges["process_resident_memory_bytes"] = pages * resource.getpagesize()
            gauges["process_open_fds"] = len(os.listdir("/proc/self/fd")) - 1  # without listdir()'s own
        if self._replayer.has_database:
            self._writer.is_watched = True
            gauges["database_up"] = int(self._replayer.is_up)
        if not self._writer.stuck_s():  # else the age is left out: 0 would end an alert
            with contextlib.suppress(SpoolError):
                oldest = self._spool.oldest()
                gauges["spool_oldest_event_age_seconds"] = max(time.time() - oldest, 0) if oldest else 0
        text = self._service.metrics.exposition(gauges)
        return HTTPStatus.OK, text, "text/plain; version=0.0.4; charset=utf-8"

    def _failure(self) -> tuple[str, str]:
        """Return why events cannot be stored, and why the spool takes none: "" if they can, or it does."""
        if silent_s := self._writer.stuck_s():
            return f"the writer has not moved for {silent_s:.0f} s", ""
        reason = ""
        try:
            self._spool.check()
        except SpoolError as error:
            reason = str(error)
        if self._service.draining:
            return "draining: the server is about to end", reason
        if self._writer.session or not reason:
            return "", reason
        if self._replayer.is_up:
            return f"the spool is being replayed and takes no events: {reason}", reason
        return (f"the database is away, and {reason}" if self._replayer.has_database else reason), reason


# --- systemd ------------------------------------------------------------------
# What systemd and a service say to each other: notifications (sd_notify(3): datagrams to a Unix socket), the
# watchdog (sd_watchdog_enabled(3)) and sockets that are handed over (sd_listen_fds(3)).


def send_notice(path: str | None, *lines: str) -> None:
    """Send one datagram to systemd, for example ("READY=1", "STATUS=listening"). Never raises or blocks."""
    if not path:  # systemd did not start us
        return
    text = "\n".join(" ".join(line.split())[:900] for line in lines)  # systemd drops what is over 4 KiB
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            # A leading @ stands for a NUL byte: Linux' abstract namespace.
            sock.sendto(text.encode(errors="replace"), re.sub("^@", "\0", path))
    except OSError as error:
        log.debug("cannot notify systemd: %s", reason_of(error))


def watchdog_interval(environ: Mapping[str, str], pid: int) -> float:
    """Return after how many seconds without a ping systemd ends process `pid`; infinity for never."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not re.fullmatch("[0-9]{1,18}", usec) or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return math.inf
    return int(usec) / 1e6 or math.inf


def inherited_sockets(environ: Mapping[str, str], pid: int) -> list[socket.socket]:
    """Return the listening sockets that systemd has opened for process `pid`. Raises OperatorError."""
    for_pid, count = environ.get("LISTEN_PID", ""), environ.get("LISTEN_FDS", "")
    if not count:
        return []
    if for_pid != str(pid):
        log.warning("the sockets from systemd are for process %s and not for us (%d)", show(for_pid), pid)
        return []
    if not re.fullmatch("[0-9]{1,4}", count):
        raise OperatorError(f"expected a number in $LISTEN_FDS, got {show(count)}")
    sockets = []
    for descriptor in range(3, 3 + int(count)):  # 3 is SD_LISTEN_FDS_START
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            raise OperatorError(f"descriptor {descriptor} from systemd: {reason_of(error)}") from None
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not listens:
            need = "the socket unit needs ListenStream=ADDRESS:PORT and Accept=no"
            raise OperatorError(f"descriptor {descriptor} from systemd does not listen for TCP: {need}")
        sockets.append(sock)
    return sockets


# --- Command line -------------------------------------------------------------
# Options, logging, and the life of the process: start, serve, reload, drain.

DESCRIPTION = """\
Receive analytics events over HTTP and insert them into PostgreSQL.

Apps POST their events as JSON to /apps/<app>/events; the schema file says which
apps there are and which columns their tables have. Missing tables and indexes are
created at start and on reload. 200 is answered only after the events are committed:
in PostgreSQL or, while it is away or none is given, in the spool, from where they
move over later."""

EPILOG = """\
database URL:
  postgres://user:password@host:port/database     over TCP; add ?sslmode=verify-full for TLS
  postgres://user@%2Frun%2Fpostgresql/database    over the Unix socket in /run/postgresql
  What it leaves out comes from PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSSLMODE
  and so on, the password also from ~/.pgpass. Others can see a password on the command
  line with ps: prefer ATTOLYTICS_DB_URL or .pgpass.

signals:
  SIGTERM, SIGINT  answer the requests in flight, then exit
  SIGHUP           read the schema file again, for the next requests

exit codes:
  0  stopped by SIGTERM or SIGINT, every request in flight answered; --check: everything fits
  1  something is wrong with the schema file, the database, the spool or the address; the message says what
  2  wrong options

examples:
  attolytics --schema schema.conf.yaml --db_url postgres://attolytics@%2Frun%2Fpostgresql
  attolytics --check --schema ... --db_url ...          # what is wrong or missing?
  attolytics --check --schema ... --db_url ... | psql   # create it, as --migrate does
  curl http://localhost:8000/apps/com.example.myapp/events -H 'Content-Type: application/json' \\
    -d '{"secret_key": "...", "events": [{"_t": "events", "event_type": "game_start"}]}'
"""


def parse_size(text: str, low: int = 1) -> int:
    """Return a number of bytes, written as 1048576, 1024k, 1M or 1MiB. Raises ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([kmg]?)(?:i?b)?", text.strip().lower())
    size = int(match[1]) * 1024 ** ["", "k", "m", "g"].index(match[2]) if match else 0
    if not low <= size <= 1 << 40:
        wanted = f"expected a size such as 1048576 or 1M, from {low} bytes to 1024G"
        raise argparse.ArgumentTypeError(f"{wanted}, got {show(text)}")
    return size


def parse_count(text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {show(text)}")
    return int(text)


BUG = "a thread ended that must not"  # why the process ends then
SWITCHES = {
    "--reuse_port": "share the port with other instances that have this option, run by the same user; the"
    " system spreads new connections over them",
    "--retry_quarantine": "at start, try the events in quarantine again, and say what came of it",
    "--migrate": "at start and on reload, also add columns, and drop NOT NULL where the schema no longer"
    " requires it; it waits for others and blocks no inserts, and never drops or rewrites data",
    "--check": "compare the schema file with the database, print what is wrong and the SQL that is missing,"
    " and exit; changes nothing",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("attolytics", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, port = parser.add_argument, partial(parse_count, low=0, high=65535)
    add("-s", "--schema", metavar="PATH", default="schema.conf.yaml", help="schema file (%(default)s)")
    text = "database; or $ATTOLYTICS_DB_URL; or database_url in the schema file"
    add("-d", "--db_url", metavar="URL", help=text)
    text = "where to listen; localhost is 127.0.0.1 and ::1, 0.0.0.0 or :: is all (%(default)s)"
    add("-H", "--host", default="localhost", help=text)
    add("-p", "--port", type=port, default=8000, help="port to listen on (%(default)s)")
    text = f"largest request body in bytes, also when decompressed ({BODY_BYTES_MAX >> 20}M)"
    add("--max_body", metavar="SIZE", type=parse_size, default=BODY_BYTES_MAX, help=text)
    text = "client connections served at once; others get 503 (%(default)s)"
    number = partial(parse_count, low=1, high=100_000)
    add("--max_connections", metavar="N", type=number, default=CONNECTIONS_MAX, help=text)
    text = "SQLite file for events that the database cannot take (%(default)s)"
    add("--spool", metavar="PATH", default="attolytics.sqlite3", help=text)
    text = f"how large it may grow; beyond it clients get 503 ({SPOOL_BYTES_MAX >> 30}G)"
    limit = partial(parse_size, low=SPOOL_BYTES_MIN)
    add("--spool_limit", metavar="LIMIT", type=limit, default=SPOOL_BYTES_MAX, help=text)
    text = "live page, /healthz, /metrics (Prometheus) on this port of localhost (off)"
    add("--monitor_port", metavar="PORT", type=port, help=text)
    for switch, text in SWITCHES.items():
        add(switch, action="store_true", help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    add("-v", "--verbose", action="count", default=0, help="log every request; twice: every flush too")
    add("-q", "--quiet", action="store_true", help="log only warnings and errors")
    parser.add_argument("--version", action="version", version=f"attolytics {__version__}")
    return parser


class Repeats(logging.Filter):
    """Lets a complaint pass once in COMPLAINT_S, with how often it has come up in between."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        # Guards _known: when a complaint last passed and how many were kept back since, by what it is about.
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, about = self._clock(), getattr(record, "about", None)  # see complain()
        if about is None:
            return True
        with self._lock:
            since, more = self._known.get(about, (-math.inf, 0))
            passes = now - since >= COMPLAINT_S
            self._known[about] = (now, 0) if passes else (since, more + 1)
            if passes:  # what came up once need not be known for ever
                self._known = {k: v for k, v in self._known.items() if v[1] or now - v[0] < COMPLAINT_S}
        if passes and more:
            record.msg = f"%s (and {more:,} more in the last {now - since:.0f} s)"  # complain() gives the %s
        return passes


class JournalFormatter(logging.Formatter):
    """Log lines for systemd: a priority prefix per line and no time (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priorities = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}
        priority = priorities.get(record.levelno, 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def under_systemd(journal_stream: str | None) -> bool:
    """Return whether stderr goes to the journal (systemd.exec(5): $JOURNAL_STREAM is device:inode)."""
    with contextlib.suppress(OSError):  # stderr was closed before we started
        status = os.fstat(2)
        return journal_stream == f"{status.st_dev}:{status.st_ino}"
    return False


def read_schema(path: str) -> Schema:
    """Return the schema in a file. Raises OperatorError."""
    try:
        return parse_schema(Path(path).read_text("utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"cannot read the schema file {path}: {reason_of(error)}") from None


def find_target(options: argparse.Namespace, environ: Mapping[str, str], schema: Schema) -> Target | None:
    """Return where the database is, with .pgpass's password; None without a URL. Raises OperatorError."""
    url = options.db_url or environ.get("ATTOLYTICS_DB_URL") or schema.database_url
    if not url:
        return None
    port = split_url(url).get("port") or environ.get("PGPORT") or "5432"
    places = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # Debian's, and PostgreSQL's own
    socket_dir = next((place for place in places if Path(place, f".s.PGSQL.{port}").exists()), "")
    target, passfile = parse_target(url, environ, os_user(), socket_dir, Path(os.path.expanduser("~")))
    if target.password is not None:
        return target
    try:
        if not passfile.stat().st_mode & 0o077:
            return replace(target, password=find_password(passfile.read_text(), target, socket_dir))
        log.warning("%s is ignored: others may read it; run chmod 600 %s", passfile, passfile)
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        log.warning("cannot read %s: %s", passfile, reason_of(error))
    return target


def raise_file_limit(connections: int) -> None:
    """Allow ourselves as many open files as we need. Raises OperatorError if the system does not."""
    needed = connections + TURN_AWAY_THREADS + 64  # and for the database, the log, libraries
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            problem = f"--max_connections {connections} needs {needed} open files, but the limit is {hard}"
            raise OperatorError(f"{problem}: lower it, or raise LimitNOFILE (systemd) or ulimit -n") from None


def stay_on_one_cpu() -> socket.socket:
    """Run all our threads on one CPU, as only one can run Python at a time; return the socket that claims it.

    Spread over several they wait for each other: on one, 64 clients get 1.6 times the requests per second.
    CPUs with few interrupts of devices come first, as a busy disk costs a quarter.
    """
    interrupts: Counter[int] = Counter()
    with contextlib.suppress(OSError, ValueError):
        header, *rows = map(str.split, Path("/proc/interrupts").read_text().splitlines())
        for name, *numbers in rows:
            if name.rstrip(":").isdigit():  # it is a device's
                interrupts.update({int(cpu[3:]): int(n) for cpu, n in zip(header, numbers, strict=False)})
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        cpus = sorted(os.sched_getaffinity(0), key=lambda cpu: (interrupts[cpu], cpu))
        for cpu in (*cpus, cpus[os.getpid() % len(cpus)]):  # some CPU or other if all have been claimed
            with contextlib.suppress(OSError):
                claim.bind(f"\0attolytics-cpu-{cpu}")
                break
        os.sched_setaffinity(0, {cpu})
        # sched(7): a thread that is woken does not push aside the one that woke it and that holds
        # the interpreter's lock. Worth another tenth.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError) as error:  # not on Linux, or not allowed
        log.debug("cannot choose how to be scheduled: %s", reason_of(error))
    return claim


def use_memory_sparingly() -> None:
    """Let glibc keep little memory for itself (mallopt(3)), and Python look for cycles less often."""
    with contextlib.suppress(OSError, AttributeError):  # another library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: in each arena rows and bodies leave holes
        libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD: larger pieces go back to the system at once
        libc.malloc_trim(0)  # what compiling this file took
    # To look for cycles, of which we make few, takes four times as long as to make the arrays of a body that
    # has nothing else, and no other thread runs meanwhile.
    gc.set_threshold(50_000)


def first_session(opener: Opener, epochs: Iterable[str]) -> Session | None:
    """Return a session, or None while the database is away. Raises OperatorError for all other errors."""
    try:
        return opener.open(epochs)
    except DatabaseError as error:
        if error.fault is not Fault.AWAY:
            raise OperatorError(f"cannot use {opener.target}: {error}") from None
        log.warning("cannot use %s yet: %s; events go to the spool", opener.target, error)
        return None


def end_for_bug(news: queue.SimpleQueue[str], args: threading.ExceptHookArgs) -> None:
    """End the process, as threading.excepthook: better restarted by systemd than half alive."""
    log.critical("the thread %s ended: %s", args.thread and args.thread.name, describe_bug(args.exc_value))
    news.put(BUG)


def attend(news: queue.SimpleQueue[str], writer: Writer, notify: partial[None], interval_s: float) -> str:
    """Block until there is news, and return it; meanwhile ping the watchdog while the writer gets on."""
    pinged_at = time.monotonic()
    while True:
        if time.monotonic() - pinged_at >= interval_s / 2 and writer.beat_at > pinged_at:
            notify("WATCHDOG=1")
            pinged_at = time.monotonic()
        # A signal that arrives just before the wait begins does not interrupt it: it must be short.
        with contextlib.suppress(queue.Empty):
            return news.get(timeout=min(interval_s / 8, SIGNAL_CHECK_S))


@dataclass(slots=True)
class Reloader:
    """Replaces the schema of a server that runs."""

    path: str  # of the schema file
    schema: Schema  # that is in use
    opener: Opener | None
    service: Service

    def work(self, told: queue.SimpleQueue[int], notify: partial[None], status: str) -> None:
        """Reload whenever a signal's number is told; `status` is what systemd shows in between."""
        while told.get():
            while not told.empty():  # one reload is for all who have asked by now
                told.get()
            now = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
            notify("RELOADING=1", now, "STATUS=reading the schema file again")
            said = status
            try:
                self._reload()
            except (DatabaseError, OperatorError) as error:
                said = f"the schema file is not taken over, the schema from before stays: {error}"
                log.error("%s", said)
            if not self.service.draining:
                notify("READY=1", f"STATUS={said}")

    def _reload(self) -> None:
        """Take the file over. Raises DatabaseError or OperatorError before it has changed anything."""
        schema = read_schema(self.path)
        if self.opener:
            self.opener.prepare(schema)
        self.service.metrics.declare(schema)
        try:
            self.service.spool.create_views(schema)
        except SpoolError as error:
            log.warning("the views of the spool stay as they are: %s", error)
        self.service.apps = self.service.writer.replayer.apps = intakes(schema)
        log.info("schema file read again: %s", ", ".join(changes(self.schema, schema)) or "no change")
        if schema.database_url != self.schema.database_url:
            log.warning("database_url in the schema file has changed, which only a restart takes over")
        self.schema = schema


def drain(servers: Sequence[Server], are_inherited: bool, writing: threading.Thread) -> None:
    """Accept nothing new, answer what is in flight, store it. Blocks at most DRAIN_S."""
    deadline, service, pool = time.monotonic() + DRAIN_S, servers[0].service, servers[0].pool
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, signal.SIG_DFL)  # a second one ends us at once
    if are_inherited:  # they stay open when we are gone
        pool.wait_until_quiet(DRAIN_OPEN_S)
    for server in servers:
        server.stop_accepting(are_inherited)
    # A client that keeps its connection learns from its next answer that it ends. Closing the connection
    # now could meet a request on its way, and clients do not repeat a POST.
    pool.wait_until_quiet(DRAIN_IDLE_S)
    service.ended = True
    if not pool.wait_until_quiet(deadline - time.monotonic()):
        log.warning("some requests were not complete after %d s and were cut", DRAIN_S)
    service.writer.stop()
    writing.join(max(deadline - time.monotonic(), 0))


def write_report(lines: Iterable[str]) -> None:
    """Write to standard output, in UTF-8 whatever the locale says. Raises OperatorError."""
    if not sys.stdout:  # it was closed before we started
        return
    try:
        number = sys.stdout.fileno()
        with open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as output:
            output.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise OperatorError(f"cannot write the report: {reason_of(error)}") from None


def check(options: argparse.Namespace, environ: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return the exit code of --check and the lines of its report. Raises OperatorError if it cannot."""
    schema = read_schema(options.schema)
    size = f"{counted(len(schema.tables), 'table')}, {counted(len(schema.apps), 'app')}"
    report = [comment(f"{options.schema}: {size}: no mistakes")]
    target = find_target(options, environ, schema)
    if not target:
        return 0, [*report, comment("no database URL: no database was compared")]
    try:
        with contextlib.closing(connect(target)) as session:
            session.run("BEGIN READ ONLY")
            plan = survey(session, schema, target.user)
    except DatabaseError as error:
        raise OperatorError(f"cannot use {target}: {error}") from None
    if not plan:
        return 0, [*report, comment(f"{target}: fits")]
    return 1, [*report, comment(f"{target}: {counted(len(plan), 'difference')}"), script(plan)]


def serve(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Run the server until SIGTERM or SIGINT. Raises OperatorError when it cannot start or go on."""
    # What the handlers of signals put in: why we are to end, and that the schema file is to be read again.
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    signal.signal(signal.SIGHUP, lambda number, _frame: told.put(number))
    notify = partial(send_notice, environ.get("NOTIFY_SOCKET"))
    sockets = inherited_sockets(environ, os.getpid())
    schema = read_schema(options.schema)
    target = find_target(options, environ, schema)
    opener = Opener(target, schema, options.migrate) if target else None
    spool = Spool(options.spool, options.spool_limit, schema, str(uuid.uuid4()))
    metrics, apps = Metrics(schema), intakes(schema)
    writer = Writer(spool, Replayer(apps, spool, opener, metrics), metrics)
    service = Service(apps, writer, spool, metrics, options.max_body, time.monotonic)
    pool, turning_away = Pool(options.max_connections, "http"), Pool(TURN_AWAY_THREADS, "turning-away")
    _claim = stay_on_one_cpu()  # kept open until we end
    use_memory_sparingly()
    session = first_session(opener, spool.epochs) if opener else None
    if options.retry_quarantine:
        writer.retry_quarantine()
    public = sockets or listen(options.host, options.port, reuse_port=options.reuse_port)
    servers = [Server(sock, service, pool, turning_away) for sock in public]
    monitors: list[Monitor] = []
    if options.monitor_port is not None:
        watching = Pool(MONITOR_CONNECTIONS_MAX + LIVE_WATCHERS_MAX, "monitor")
        local = listen("localhost", options.monitor_port, "--monitor_port")
        monitors = [Monitor(sock, service, watching, pool) for sock in local]
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, lambda number, _frame: news.put(signal.Signals(number).name))
    threading.excepthook = partial(end_for_bug, news)
    writing = writer.start(session)
    for listener in (*servers, *monitors):
        listener.start()
    listening = f"{addresses_text(servers)}{' (sockets from systemd)' if sockets else ''}"
    place = target or f"the spool {spool.path}"
    log.info("attolytics %s listens on %s, writes to %s", __version__, listening, place)
    if service.live:
        service.live.address = addresses_text(servers[:1])
        log.info("the live view, /healthz and /metrics are at %s", addresses_text(monitors))
    if not target:
        query = spool.path, f"SELECT * FROM {identifier(next(iter(schema.tables)))}"
        log.info("no database URL: read the events with sqlite3 %s", shlex.join(query))
    status = f"listening on {listening}"
    notify("READY=1", f"STATUS={status}")
    reloader = Reloader(options.schema, schema, opener, service)
    threading.Thread(target=reloader.work, args=(told, notify, status), name="reloader", daemon=True).start()
    reason = attend(news, writer, notify, watchdog_interval(environ, os.getpid()))
    log.info("stopping: %s", reason)
    service.draining = True
    notify("STOPPING=1", "STATUS=answering the requests in flight")
    drain(servers, bool(sockets), writing)
    if reason == BUG:
        raise OperatorError("stopped because of a bug, see the message above")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    journal = under_systemd(os.environ.get("JOURNAL_STREAM"))
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JournalFormatter() if journal else plain)
    logging.addLevelName(TRACE, "TRACE")
    log.addHandler(handler)
    log.addFilter(Repeats(time.monotonic))
    levels = (logging.INFO, logging.DEBUG, TRACE)
    log.setLevel(logging.WARNING if options.quiet else levels[min(options.verbose, 2)])
    # Until there are requests to answer SIGTERM ends the start as Ctrl-C does, PID 1 included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.check:
            code, report = check(options, os.environ)
            write_report(report)
            return code
        raise_file_limit(options.max_connections)
        serve(options, os.environ)
    except (OperatorError, SpoolError) as error:
        send_notice(os.environ.get("NOTIFY_SOCKET"), f"STATUS={error}")  # for systemctl status
        if journal:
            log.error("%s", error)
        elif sys.stderr:  # None when it was closed before we started
            sys.stderr.write(f"attolytics: {error}\n")
        return 1
    except KeyboardInterrupt:
        log.info("stopped before it was up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
