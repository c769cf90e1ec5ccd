"""What a watcher of the live view costs: .venv/bin/python bench/live.py [--rounds 5] [--seconds 10]

In each round 256 clients send about 10,000 requests per second, and 64 clients all they can, as in the
scenario `keepalive` of ingest.py: while nobody watches, while a program reads /live, and while the page is
open in Chromium. All of them share the machine.
"""

from __future__ import annotations

import argparse
import itertools
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
# How many clients there are, and for how many milliseconds each of them pauses between two requests.
LOADS = {"10,000 per second": (256, 14), "all they can": (64, 0)}


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
    rates: dict[tuple[str, str], list[float]] = {(load, way): [] for load in LOADS for way in WAYS}
    costs = {key: list[float]() for key in rates}
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as driver:
        home = Path(directory)
        home.chmod(0o755)
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        with private_postgres(home) as postgres:
            script, paced = write_script(home, Traffic()), home / "paced.lua"
            port, monitor = free_port(), free_port()
            command = [*attolytics_command(PROGRAM, port, postgres.url, SCHEMA, home)]
            command += ["--monitor_port", str(monitor)]
            with running(command, home / "log", signal.SIGTERM) as child:
                child.wait_until(lambda: answers(port), "Attolytics")
                run_wrk(port, script, 3)
                for number in range(options.rounds):
                    for name, place in itertools.product(LOADS, range(len(WAYS))):
                        way, (clients, pause_ms) = WAYS[(number + place) % len(WAYS)], LOADS[name]
                        paced.write_text(f"{script.read_text()}function delay() return {pause_ms} end\n")
                        watching = (
                            stream(monitor)
                            if way == "stream"
                            else page(browser, monitor)
                            if way == "page"
                            else nullcontext()
                        )
                        before = cpu_s(child.process.pid)
                        with watching:
                            load = run_wrk(port, paced if pause_ms else script, options.seconds, clients)
                        check_load("Attolytics", load)
                        costs[name, way].append((cpu_s(child.process.pid) - before) / load.requests * 1e6)
                        rates[name, way].append(load.requests / load.seconds)
                        said = f"{rates[name, way][-1]:,.0f} requests/s, p99 {load.p99_us} us"
                        sys.stderr.write(f"{name}, {way}: {said}\n")
        browser.close()
    for (name, way), measured in rates.items():
        ratios = [one / none for one, none in zip(measured, rates[name, "nobody"], strict=True)]
        rate, ratio = statistics.median(measured), statistics.median(ratios)
        share = f"{ratio:.3f} of nobody's ({min(ratios):.2f} to {max(ratios):.2f})"
        cost = f"{statistics.median(costs[name, way]):.1f} us of the server's CPU each"
        sys.stdout.write(f"{name}, {way}: {rate:,.0f} requests/s, {share}; {cost}\n")


if __name__ == "__main__":
    main()
