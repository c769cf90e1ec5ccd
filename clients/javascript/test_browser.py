"""The JavaScript client in a real Chromium, against real servers and a real PostgreSQL.

Whatever happens to the page, the network, the server and the database: each event that `send` took is in the
table exactly once. Skipped where there is no Chromium or no Playwright.

    python clients/javascript/test_browser.py
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import signal
import sys
import threading
import time
import unittest
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import pg8000.exceptions  # noqa: E402

import test_attolytics as base  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "/usr/bin/chromium", "chromium-browser"))), None)
# This machine, but not as `localhost`: a page from there has no Web Locks and no crypto.randomUUID.
PLAIN_HOST = "plain.test"
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    f"--host-resolver-rules=MAP {PLAIN_HOST} 127.0.0.1",
)
SCHEMA = """
tables:
  events:
    columns:
      - { name: id, type: uuid, unique: true, required: true }
      - { name: time, type: timestamp, required: true }
      - { name: n, type: i64, required: true }
      - { name: text }
  simple:
    columns:
      - { name: time, type: timestamp, required: true }
      - { name: n, type: i64, required: true }
apps:
  game: { secret_key: key, tables: [events, simple], access_control_allow_origin: [%s] }
"""
# A page that plays: it numbers its events, and notes in the storage how many of them `send` has taken.
PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>player</title><script type="module">
import { Attolytics } from "/clients/javascript/attolytics.js";
window.start = (options) => {
  window.events = new Attolytics({ app: "game", key: "key", table: "events", waitMs: 100, ...options });
};
window.take = (player, count, columns) => {
  for (let n = 0; n < count; n++) {
    const number = Number(localStorage[player] ?? 0) + 1;
    if (events.send({ n: Number(player) * 1000000 + number, ...columns })) localStorage[player] = number;
  }
};
window.play = (player) => (window.game = setInterval(take, 10, player, 1));
window.rest = () => (clearInterval(window.game), events.flush());
window.ready = true;
</script>"""


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves the files of the repository, and the page."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(ROOT))

    def do_GET(self) -> None:
        if not self.path.startswith(("/page", "/favicon")):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_: object) -> None:
        pass


browser: Browser
pages: http.server.ThreadingHTTPServer


def setUpModule() -> None:
    global browser, pages  # noqa: PLW0603
    if not CHROMIUM:
        raise unittest.SkipTest("Chromium is not installed")
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415
    except ImportError as error:
        raise unittest.SkipTest("Playwright is not installed") from error
    base.setUpModule()
    unittest.addModuleCleanup(base.tearDownModule)
    manager = sync_playwright().start()
    unittest.addModuleCleanup(manager.stop)
    browser = manager.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
    unittest.addModuleCleanup(browser.close)
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    unittest.addModuleCleanup(pages.server_close)
    unittest.addModuleCleanup(pages.shutdown)
    threading.Thread(target=pages.serve_forever, daemon=True).start()


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """As that of the server's tests, but gentle: each look is a connection to PostgreSQL."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("this did not happen in time")
        time.sleep(0.1)


class BrowserCase(base.ProgramCase):
    """Tests with a profile of the browser and a server of their own."""

    def setUp(self) -> None:
        super().setUp()
        self.origins = {host: f"http://{host}:{pages.server_port}" for host in ("localhost", PLAIN_HOST)}
        self.schema_file.write_text(SCHEMA % ", ".join(map(repr, self.origins.values())))
        self.port = base.free_port()
        self.heard: list[str] = []
        self.context = self.new_context()

    def new_context(self) -> BrowserContext:
        context = browser.new_context()
        context.set_default_timeout(10_000)
        self.addCleanup(context.close)
        context.on("console", lambda message: self.heard.append(message.text))
        return context

    def start_server(self) -> base.Attolytics:
        return self.serve("-H", "127.0.0.1", "-p", self.port)

    def visit(self, host: str = "localhost", **options: object) -> Page:
        """Open the page in a new tab, with a client."""
        page = self.context.new_page()
        self.load_page(page, host, **options)
        return page

    def load_page(self, page: Page, host: str = "localhost", **options: object) -> None:
        page.goto(f"{self.origins[host]}/page")
        page.wait_for_function("window.ready")
        page.evaluate("start", {"url": f"http://127.0.0.1:{self.port}", **options})

    def take(self, page: Page, player: int, count: int, **columns: object) -> None:
        page.evaluate("([player, count, columns]) => take(player, count, columns)", [player, count, columns])

    def play(self, page: Page, player: int) -> None:
        """Let the page send an event every 10 ms from now on."""
        page.evaluate("(player) => void play(player)", player)

    def playing(self, host: str = "localhost") -> Page:
        """Open the page, and let it send events until some are stored."""
        page = self.visit(host)
        self.play(page, 1)
        self.wait_for_rows(20)
        return page

    def numbers(self, table: str = "events") -> list[int]:
        """Return what is in the table, of all players."""
        try:
            return sorted(row[0] for row in self.query(f"SELECT n FROM {table}"))
        except pg8000.exceptions.DatabaseError:
            return []  # There is no table yet.

    def check(self, page: Page, *players: int, unsure: int = 0, table: str = "events") -> int:
        """Wait until all that was taken is in the table, and see that nothing is there twice.

        After the sudden end of a tab there may be one event more, which it had no time to note: `unsure`.
        """
        page.bring_to_front()
        taken = {player: int(page.evaluate("(player) => localStorage[player]", player)) for player in players}
        wanted = {player * 1_000_000 + n for player, count in taken.items() for n in range(1, count + 1)}
        self.assertTrue(wanted)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: wanted <= set(self.numbers(table)))
        found = self.numbers(table)
        self.assertEqual(wanted - set(found), set(), "these are missing")
        self.assertEqual(len(found), len(set(found)), "some are there twice")
        self.assertLessEqual(len(set(found) - wanted), unsure)
        return len(found)

    def wait_for_rows(self, more: int = 1, table: str = "events") -> None:
        enough = len(self.numbers(table)) + more
        wait_until(lambda: len(self.numbers(table)) >= enough)

    def pause(self, page: Page, ms: int) -> None:
        """Let time pass; Playwright hears of what happens only while it waits itself."""
        page.wait_for_timeout(ms)


def in_both_worlds(test: Callable[[Any, str], None]) -> Callable[[Any], None]:
    """Run a test with Web Locks and without, which is where a page comes from."""

    @functools.wraps(test)
    def run(self: BrowserCase) -> None:
        for number, host in enumerate(self.origins):
            with self.subTest(host):
                if number:
                    self.doCleanups()
                    self.setUp()
                test(self, host)

    return run


class FaultTest(BrowserCase):
    """Each event that `send` took is in the table exactly once."""

    def test_the_server_is_killed_and_started_again(self) -> None:
        server = self.start_server()
        page = self.visit()
        self.play(page, 1)
        for _ in range(2):
            self.wait_for_rows(20)
            server.stop(signal.SIGKILL)
            self.pause(page, 300)
            server = self.start_server()
        self.wait_for_rows(20)
        page.evaluate("rest()")
        self.check(page, 1)

    def test_the_database_is_stopped(self) -> None:
        self.start_server()
        page = self.playing()
        self.postgres.stop()
        self.pause(page, 1_500)
        self.assertLess(page.evaluate("events.pending"), 60)  # The server takes them all the same.
        self.postgres.start()
        page.evaluate("rest()")
        self.check(page, 1)

    def test_the_network_is_cut(self) -> None:
        self.start_server()
        page = self.playing()
        self.context.set_offline(True)
        self.pause(page, 1_000)
        self.assertGreater(page.evaluate("events.pending"), 60)
        self.pause(page, 2_500)  # The next try would come after 4 s or more.
        page.evaluate("void events.flush().then(() => (window.arrived = performance.now()))")
        before = page.evaluate("performance.now()")
        self.context.set_offline(False)
        page.wait_for_function("window.arrived")
        self.assertLess(page.evaluate("arrived") - before, 1_000)
        page.evaluate("rest()")
        self.check(page, 1)

    @in_both_worlds
    def test_the_tab_is_reloaded(self, host: str) -> None:
        self.start_server()
        page = self.visit(host)
        for _ in range(3):
            self.play(page, 1)
            self.wait_for_rows(5)
            self.load_page(page, host)
        self.check(page, 1)

    @in_both_worlds
    def test_the_tab_is_closed_while_the_server_is_away(self, host: str) -> None:
        server = self.start_server()
        page = self.playing(host)
        server.stop(signal.SIGKILL)
        self.pause(page, 300)
        blank = self.context.new_page()
        # Without Web Locks nobody knows for minutes that a tab is gone that could not say so.
        page.close(run_before_unload=host != "localhost")
        while not page.is_closed():
            self.pause(blank, 50)
        self.start_server()
        self.check(self.visit(host), 1, unsure=1)

    def test_the_tab_crashes(self) -> None:
        self.start_server()
        page = self.visit(waitMs=60_000)
        self.take(page, 1, 30)
        self.pause(page, 100)
        with contextlib.suppress(Exception):
            page.goto("chrome://crash", timeout=1_000)
        self.assertEqual(self.numbers(), [])
        self.check(self.visit(), 1)

    @in_both_worlds
    def test_two_tabs_share_a_storage(self, host: str) -> None:
        server = self.start_server()
        pages = [self.visit(host), self.visit(host)]
        for number, page in enumerate(pages):
            self.play(page, number)
        self.wait_for_rows(50)
        server.stop(signal.SIGKILL)
        self.pause(pages[1], 300)
        pages[0].goto("about:blank")
        self.start_server()
        third = self.visit(host)
        self.play(third, 2)
        self.wait_for_rows(50)
        pages[1].evaluate("rest()")
        third.evaluate("rest()")
        self.check(third, 0, 1, 2)


class LeaveTest(BrowserCase):
    def test_what_is_left_arrives_although_the_page_is_left(self) -> None:
        self.start_server()
        for way in ("about:blank", "close"):
            with self.subTest(way):
                before = len(self.numbers())
                page = self.visit(waitMs=60_000, batchEvents=1_000, batchBytes=100_000)
                self.take(page, 1, 300, text="語" * 20)
                self.assertEqual(len(self.numbers()), before)
                if way == "close":
                    page.close(run_before_unload=True)
                else:
                    page.goto(way)
                wait_until(lambda: len(self.numbers()) == before + 300)  # noqa: B023
        self.pause(page := self.visit(), 1_500)  # It sends them again, since it has no verdict.
        self.assertEqual(self.check(page, 1), 600)
        kept = "Object.keys(localStorage).filter((key) => key.includes('-')).length"
        wait_until(lambda: page.evaluate(kept) == 0)

    def test_without_an_id_nothing_is_there_twice(self) -> None:
        self.start_server()
        page = self.visit(table="simple", id=False, waitMs=60_000, batchEvents=1_000)
        self.take(page, 1, 100)
        page.goto("about:blank")
        wait_until(lambda: len(self.numbers("simple")) == 100)
        self.load_page(page, table="simple", id=False)
        self.take(page, 1, 10)
        self.pause(page, 1_500)
        self.assertEqual(self.check(page, 1, table="simple"), 110)

    def test_a_hidden_tab_takes_the_verdict_of_what_it_sent(self) -> None:
        self.start_server()
        page = self.visit(waitMs=60_000)
        self.take(page, 1, 10)
        page.evaluate(
            "Object.defineProperty(document, 'visibilityState', {value: 'hidden'});"
            "document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))"
        )
        page.wait_for_function("events.pending === 0")
        self.assertEqual(self.check(page, 1), 10)
        self.assertEqual(self.heard, [])

    def test_the_browser_keeps_the_page_for_the_way_back(self) -> None:
        """The client is no reason against the back/forward cache, and goes on when the page is back."""
        kept = ["--disable-back-forward-cache"]  # Playwright's own argument
        other = browser.browser_type.launch(
            executable_path=CHROMIUM, args=list(ARGUMENTS), ignore_default_args=kept
        )
        self.addCleanup(other.close)
        self.context = other.new_context()
        self.start_server()
        page = self.context.new_page()
        page.add_init_script("addEventListener('pageshow', (event) => (window.isBack = event.persisted))")
        self.load_page(page, waitMs=60_000)
        self.take(page, 1, 10)
        page.goto(f"{self.origins['localhost']}/page/other")
        wait_until(lambda: len(self.numbers()) == 10)
        page.go_back(wait_until="commit")
        page.wait_for_function("window.isBack")
        self.take(page, 1, 10)
        page.evaluate("events.flush()")
        self.assertEqual(self.check(page, 1), 20)

    def test_a_beacon_arrives_as_a_string_and_not_as_a_blob_of_json(self) -> None:
        """What the README says of beacons."""
        self.start_server()
        page = self.visit()
        body = '{"secret_key":"key","events":[{"_t":"simple","time":1,"n":%d}]}'
        page.evaluate(
            """([url, text, blob]) => {
                navigator.sendBeacon(url, new Blob([blob], { type: "application/json" }));
                navigator.sendBeacon(url, text);
            }""",
            [f"http://127.0.0.1:{self.port}/apps/game/events", body % 1, body % 2],
        )
        wait_until(lambda: self.numbers("simple"))
        self.pause(page, 300)
        self.assertEqual(self.numbers("simple"), [1])

    def test_large_batches_are_compressed_across_origins(self) -> None:
        self.start_server()
        page = self.visit(waitMs=60_000)
        codings: list[Mapping[str, str]] = []
        self.context.on("request", lambda request: codings.append(request.headers))
        self.take(page, 1, 40, text="x" * 500)
        page.evaluate("events.flush()")
        self.assertEqual(self.check(page, 1), 40)
        self.assertIn("gzip", [headers.get("content-encoding") for headers in codings])
        self.assertEqual(self.heard, [])


class ExampleTest(BrowserCase):
    def test_the_example_page_plays_with_its_schema(self) -> None:
        schema = (ROOT / "examples" / "javascript" / "schema.conf.yaml").read_text()
        self.schema_file.write_text(
            base.replaced(schema, {"http://localhost:8080": self.origins["localhost"]})
        )
        self.start_server()
        page = self.context.new_page()
        server = f"http://127.0.0.1:{self.port}"
        page.goto(f"{self.origins['localhost']}/examples/javascript/?server={server}")
        page.click("#count")
        self.assertEqual(page.text_content("#state"), "Nothing is sent.")
        page.check("#consent")
        for _ in range(10):
            page.click("#count")
        page.reload()
        sql = "SELECT event_type, score FROM game_events ORDER BY time"
        wait_until(lambda: len(self.query(sql)) == 11)
        rows = [("counted", score) for score in range(2, 10)] + [("game_won", 10), ("counted", 1)]
        self.assertEqual([tuple(row) for row in self.query(sql)], [*rows, ("game_start", None)])
        page.uncheck("#consent")
        page.click("#count")
        self.pause(page, 300)
        self.assertEqual(page.evaluate("Object.keys(localStorage)"), ["consent"])
        self.assertEqual(len(self.query(sql)), 11)
        self.assertEqual(self.heard, [])


if __name__ == "__main__":
    unittest.main()
