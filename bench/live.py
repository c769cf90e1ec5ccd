"""What a watcher of the live view costs: .venv/bin/python bench/live.py [--rounds 5] [--seconds 10]

In each round 64 clients send all they can, as in the scenario `keepalive` of ingest.py: while nobody
watches, while a program reads /live, and while the page is open in Chromium. All of them share the machine.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from load import Traffic, answers, check_load, run_wrk, write_script
from playwright.sync_api import Browser, sync_playwright
from rig import cpu_s, free_port, private_postgres, running
from servers import attolytics_command

PROGRAM = Path(__file__).parent.parent / "attolytics.py"
SCHEMA = PROGRAM.parent / "schema-example.conf.yaml"
WAYS = ("nobody", "stream", "page")


@contextmanager
def stream(port: int) -> Iterator[None]:
    """Read the stream, and throw it away."""
    command = ["curl", "-sN", f"http://127.0.0.1:{port}/live"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def page(browser: Browser, port: int) -> Iterator[None]:
    """Have the page open; say at the end how it did."""
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(f"http://localhost:{port}/")
    opened.get_by_text("live", exact=True).wait_for()
    # The longest time between two turns of its event loop.
    opened.evaluate(
        "() => { window.worst = 0; let last = performance.now(); setInterval(() => { const now ="
        " performance.now(); window.worst = Math.max(window.worst, now - last - 20); last = now }, 20) }"
    )
    yield
    rows = opened.locator("#rows > li").count()
    sys.stderr.write(f"  the page: {rows} rows, busy for at most {opened.evaluate('window.worst'):.0f} ms\n")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    costs: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as driver:
        home = Path(directory)
        home.chmod(0o755)
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        with private_postgres(home) as postgres:
            script = write_script(home, Traffic())
            port, monitor = free_port(), free_port()
            command = [*attolytics_command(PROGRAM, port, postgres.url, SCHEMA, home)]
            command += ["--monitor_port", str(monitor)]
            with running(command, home / "log", signal.SIGTERM) as child:
                child.wait_until(lambda: answers(port), "Attolytics")
                run_wrk(port, script, 3)
                for number in range(options.rounds):
                    for place in range(len(WAYS)):
                        way = WAYS[(number + place) % len(WAYS)]
                        watching = (
                            stream(monitor)
                            if way == "stream"
                            else page(browser, monitor)
                            if way == "page"
                            else nullcontext()
                        )
                        before = cpu_s(child.process.pid)
                        with watching:
                            load = run_wrk(port, script, options.seconds)
                        costs[way].append((cpu_s(child.process.pid) - before) / load.requests * 1e6)
                        check_load("Attolytics", load)
                        rates[way].append(load.requests / load.seconds)
                        sys.stderr.write(f"{way}: {rates[way][-1]:,.0f} requests/s, p99 {load.p99_us} us\n")
        browser.close()
    for way in WAYS:
        ratios = [one / none for one, none in zip(rates[way], rates["nobody"], strict=True)]
        rate, ratio = statistics.median(rates[way]), statistics.median(ratios)
        cost = statistics.median(costs[way])
        text = (
            f"{way}: {rate:,.0f} requests/s, {ratio:.3f} of nobody's; {cost:.1f} us of the server's CPU each"
        )
        sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
