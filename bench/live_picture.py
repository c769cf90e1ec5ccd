"""Draws the picture of the live view for the README: .venv/bin/python bench/live_picture.py docs/live.png

It starts a server with the example schema, sends it what a game might, and takes the picture with Chromium.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent.parent
KEY = "qD3eRda0709mD/3kGp4DlJtEQy5aMY0m"
PORT, MONITOR_PORT = 8765, 8766


def send(*events: object, key: str = KEY) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    body = json.dumps({"secret_key": key, "events": events})
    connection.request("POST", "/apps/com.example.myapp/events", body, {"Content-Type": "application/json"})
    connection.getresponse().read()
    connection.close()


def event(kind: str, **more: object) -> dict[str, object]:
    return {"_t": "events", "platform": "linux", "version": "1.0", "event_type": kind, **more}


def play(seconds: float) -> None:
    """Send for a while what a game sends, more and less of it."""
    started = time.monotonic()
    number = 0
    while (now := time.monotonic() - started) < seconds:
        number += 1
        send(*[event("step", score=number)] * (1 + int(4 + 4 * (now * 0.7 % 3 - 1.5))))
        if number % 40 == 0:
            send(event("level_up", score="many"))
        time.sleep(0.05)


def main() -> None:
    command = [sys.executable, str(HERE / "attolytics.py"), "-s", str(HERE / "schema-example.conf.yaml")]
    command += ["-p", str(PORT), "--monitor_port", str(MONITOR_PORT), "-q"]
    with tempfile.TemporaryDirectory() as directory, subprocess.Popen(command, cwd=directory) as server:
        try:
            time.sleep(1.5)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
                )
                page = browser.new_page(viewport={"width": 1000, "height": 640}, color_scheme="light")
                page.goto(f"http://localhost:{MONITOR_PORT}/")
                play(25)
                time.sleep(2)
                send(event("game_start", user_id="Ann"))
                send(event("game_start", user_id="Bob"), event("level_up", score="7", platfrom="linux"))
                time.sleep(0.5)
                send(event("level_up", score=7, user_id="Ann"), event("level_up", score=9, user_id="Ann"))
                time.sleep(1.5)
                page.locator("details:has(.refused) summary").first.click()
                time.sleep(0.5)
                page.screenshot(path=sys.argv[1])
                browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
