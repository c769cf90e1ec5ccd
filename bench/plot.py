"""Draws the ratios of a run of ingest.py.

python bench/plot.py results.json results.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Everything is placed in inches, so that all bars have the same height.
WIDTH = 9.0
LEFT, RIGHT = 2.5, 0.15  # For the labels of the bars, and for nothing.
BAR = 0.46  # For each bar, with the space between it and the next.
ABOVE, BELOW = 0.5, 0.32  # The title and the axis of a panel.
CAPTION = 0.6
LABEL_CHARS = 34
BLUE, RED, GREY = "#3b6ea8", "#b8473a", "#5f6368"


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio: its median, the smallest and the largest round, and what is required."""

    label: str
    median: float
    smallest: float
    largest: float
    sign: str
    limit: float | None
    missed: bool


def read_panels(document: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, list[Bar]]:
    """Return the bars of each panel, both in the order of the file."""
    panels: dict[str, list[Bar]] = {}
    for scenario in document["scenarios"]:
        figures = [figure for figure in scenario["figures"] if figure["panel"]]  # type: ignore[attr-defined]
        for figure in figures:
            required = figure["required"] or {"sign": "", "limit": None}
            same = [other for other in figures if other["panel"] == figure["panel"]]
            bar = Bar(
                # Two bars of a scenario in one panel need their own names.
                str(figure["name"] if len(same) > 1 else scenario["title"]),
                figure["result"],
                figure["smallest"],
                figure["largest"],
                required["sign"],
                required["limit"],
                figure["verdict"] == "missed",
            )
            panels.setdefault(figure["panel"], []).append(bar)
    return panels


def draw_panel(axes: Axes, title: str, bars: Sequence[Bar]) -> None:
    """Draw bars below each other, each with its whiskers and the mark of what is required."""
    right = max(max(bar.largest, bar.limit or 0, 1) for bar in bars) * 1.2
    for place, bar in enumerate(bars):
        spread = [[bar.median - bar.smallest], [bar.largest - bar.median]]
        axes.barh(place, bar.median, height=0.56, color=BLUE, zorder=2)
        axes.errorbar(bar.median, place, xerr=spread, color="black", capsize=3, lw=1, zorder=4)
        text = f"{bar.median:.2f}"
        if bar.limit is not None:
            axes.plot([bar.limit] * 2, [place - 0.42, place + 0.42], color=RED, lw=2.2, zorder=5)
            required = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}[bar.sign]
            text += f"   required {required} {bar.limit:g}{', missed' if bar.missed else ''}"
        edge = max(bar.largest, bar.limit or 0) + right * 0.015
        colour, box = RED if bar.missed else "black", {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        axes.text(edge, place, text, va="center", fontsize=8.5, color=colour, bbox=box, zorder=6)
    axes.axvline(1, color=GREY, lw=0.9, ls=(0, (4, 3)), zorder=3)
    axes.set_yticks(range(len(bars)), [fill(bar.label, LABEL_CHARS) for bar in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, right * 1.18)  # Room for the text beside the longest bar.
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(axis="x", labelsize=8, color=GREY)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e3e5e8", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def caption(document: Mapping[str, Mapping[str, object]]) -> str:
    facts, settings = document["machine"], document["settings"]
    return (
        f"Bars: medians of {settings['rounds']} rounds of {settings['seconds']} s; whiskers: smallest and"
        f" largest round; red marks: what is required.\nPython {facts['python']}, PostgreSQL"
        f" {str(facts['postgresql']).split()[0]}, {facts['cpus']} CPUs shared by server, database and load."
    )


def draw(document: Mapping[str, object], path: Path) -> None:
    """Draw the panels below each other into a file; its name says in which format."""
    panels = read_panels(document)  # type: ignore[arg-type]
    if not panels:
        raise ValueError("none of the scenarios has a ratio to draw")
    mpl.rcParams["svg.fonttype"] = "none"  # Text stays text.
    mpl.rcParams["svg.hashsalt"] = "attolytics"  # The same numbers give the same file.
    height = CAPTION + sum(ABOVE + BAR * len(bars) + BELOW for bars in panels.values())
    figure = Figure(figsize=(WIDTH, height))
    top = height
    for title, bars in panels.items():
        bottom = top - ABOVE - BAR * len(bars)
        place = (LEFT / WIDTH, bottom / height, (WIDTH - LEFT - RIGHT) / WIDTH, BAR * len(bars) / height)
        draw_panel(figure.add_axes(place), title, bars)
        top = bottom - BELOW
    figure.text(0.15 / WIDTH, 0.12 / height, caption(document), fontsize=8, color=GREY)  # type: ignore[arg-type]
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path)
    options = parser.parse_args()
    try:
        draw(json.loads(options.results.read_text()), options.plot)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"plot.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
