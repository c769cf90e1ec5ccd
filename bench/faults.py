"""Load and random faults for minutes, then a comparison of what was acknowledged with what is stored.

    python bench/faults.py [--minutes 2] [--seed 1]

Six clients send events to a server, while the server, PostgreSQL, its backends and the
network between them are killed, stopped, cut, blocked and restarted in turn. Exits with 1 if an event
that was answered with 200 is missing, or any event is stored twice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import test_attolytics as tests


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    postgres = tests.Postgres()
    admin = postgres.connect("postgres")
    admin.run("CREATE DATABASE storm")
    admin.close()
    with tempfile.TemporaryDirectory() as directory:
        storm = tests.Storm(postgres, "storm", Path(directory), options.seed)
        deadline = time.monotonic() + options.minutes * 60
        while time.monotonic() < deadline:
            storm.rage(1)
        stored = storm.end()
    postgres.remove()
    lost = len(storm.accepted - set(stored))
    doubled = len(stored) - len(set(stored))
    faults = ", ".join(f"{name} {count}" for name, count in sorted(storm.faults.items()))
    sys.stdout.write(
        f"{sum(storm.faults.values())} faults: {faults}\n"
        f"{len(storm.accepted)} events were answered with 200, the slowest after {storm.slowest:.1f} s\n"
        f"{lost} lost, {doubled} doubled\n"
    )
    return 1 if lost or doubled else 0


if __name__ == "__main__":
    sys.exit(main())
