"""Charts of a report as geometry in pixels; `figure.html.j2` turns them into inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from step3_hetero.placement.report_data import ContextLine, ParetoPoint

WIDE, NARROW = 1120, 358
HIGH_WIDE, HIGH_NARROW = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 14, 48
"""Margins: y labels, half of the last x label, half of the highest y label, x labels and title."""
COLOURS = 6
TICKS = 5
LABEL_WIDTH = 52
"""An x label and the space beside it."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One point, with the sentence that it shows when pointed at."""

    x: float
    y: float
    title: str
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a path and its points."""

    label: str
    colour: int
    path: str
    dots: Sequence[Dot]
    chosen: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart for one width; ``css`` is wide or narrow."""

    css: str
    width: int
    height: int
    title: str
    desc: str
    x_title: str
    y_title: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    series: Sequence[Series]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where values lie in a chart of one width."""

    narrow: bool
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (NARROW, HIGH_NARROW) if self.narrow else (WIDE, HIGH_WIDE)

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        low, high = self.x_range
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(LEFT + (value - low) / (high - low) * (self.size[0] - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        """Return the pixel of a y value; larger is higher."""
        low, high = self.y_range
        height = self.size[1] - TOP - BOTTOM
        return round(TOP + height * (high - value) / (high - low), 2)


def nice_ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Return round values that cover a range, ascending; the first and last lie outside or on it.

    >>> nice_ticks(0.0, 0.23)
    [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(p * power for p in (1, 2, 5, 10) if (high - low) / (p * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def context_figures(lines: Sequence[ContextLine]) -> list[Figure]:
    """Draw cost against context, for wide and narrow screens; contexts on a logarithmic scale."""
    contexts = sorted({p["context"] for line in lines for p in line["points"]})
    costs = [p["usd_per_mtok"] for line in lines for p in line["points"]]
    y_ticks = nice_ticks(0.0, max((cost for cost in costs if cost is not None), default=1.0))
    x_range = (float(contexts[0]), float(max(contexts[-1], contexts[0] * 2)))

    def draw(narrow: bool) -> Figure:
        frame = Frame(narrow, x_range, (y_ticks[0], y_ticks[-1]), log_x=True)
        return _figure(
            frame,
            ("Cost against context", f"{len(lines)} placements; dollars per million tokens."),
            ("context, tokens", "$ per million tokens"),
            _spaced([(frame.x(c), short_count(c)) for c in contexts]),
            y_ticks,
            [_context_series(frame, n, line) for n, line in enumerate(lines)],
        )

    return [draw(False), draw(True)]


def _context_series(frame: Frame, number: int, line: ContextLine) -> Series:
    dots = [
        Dot(
            frame.x(p["context"]),
            frame.y(p["usd_per_mtok"]),
            f"{line['label']} at {p['context']}: ${p['usd_per_mtok']:.4f}",
        )
        for p in line["points"]
        if p["usd_per_mtok"] is not None
    ]
    chosen = line.get("chosen", False)
    return Series(line["label"], number % COLOURS, _path(dots), dots, chosen)


def pareto_figures(points: Sequence[ParetoPoint]) -> list[Figure]:
    """Draw the Pareto front, TPOT against cost, for wide and narrow screens."""
    points = sorted(points, key=lambda p: p["tpot_ms"])
    x_ticks = nice_ticks(min(p["tpot_ms"] for p in points), max(p["tpot_ms"] for p in points))
    y_ticks = nice_ticks(0.0, max(p["usd_per_mtok"] for p in points))

    def draw(narrow: bool) -> Figure:
        frame = Frame(narrow, (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
        dots = [
            Dot(
                frame.x(p["tpot_ms"]),
                frame.y(p["usd_per_mtok"]),
                f"{p['label']}: {p['tpot_ms']:.1f} ms, ${p['usd_per_mtok']:.4f}",
                p.get("chosen", False),
            )
            for p in points
        ]
        return _figure(
            frame,
            ("Pareto front", f"{len(points)} placements that no other beats in both."),
            ("TPOT, ms", "$ per million tokens"),
            _spaced([(frame.x(value), f"{value:g}") for value in x_ticks]),
            y_ticks,
            [Series("Pareto front", 0, _steps(dots), dots, False)],
        )

    return [draw(False), draw(True)]


def _figure(
    frame: Frame,
    said: tuple[str, str],
    axes: tuple[str, str],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Iterable[float],
    series: Sequence[Series],
) -> Figure:
    width, height = frame.size
    return Figure(
        css="narrow" if frame.narrow else "wide",
        width=width,
        height=height,
        title=said[0],
        desc=said[1],
        x_title=axes[0],
        y_title=axes[1],
        x_ticks=x_ticks,
        y_ticks=[(frame.y(value), f"{value:g}") for value in y_ticks],
        series=series,
    )


def _spaced(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out labels that would touch the one before."""
    kept: list[tuple[float, str]] = []
    for x, text in ticks:
        if not kept or x - kept[-1][0] >= LABEL_WIDTH:
            kept.append((x, text))
    return kept


def _path(dots: Sequence[Dot]) -> str:
    return _joined(dots, lambda dot, before: f"L{dot.x} {dot.y}")


def _steps(dots: Sequence[Dot]) -> str:
    """Return a staircase: between two points of a front the earlier one's cost holds."""
    return _joined(dots, lambda dot, before: f"L{dot.x} {before.y} L{dot.x} {dot.y}")


def _joined(dots: Sequence[Dot], onward: Callable[[Dot, Dot], str]) -> str:
    if not dots:
        return ""
    parts = [onward(dot, before) for before, dot in pairwise(dots)]
    return " ".join([f"M{dots[0].x} {dots[0].y}", *parts])


def short_count(value: int) -> str:
    """Write a number of tokens as people say it.

    >>> short_count(8192), short_count(131072), short_count(1000), short_count(1_048_576)
    ('8K', '128K', '1000', '1M')
    """
    if value % 1024:
        return str(value)
    thousands = value // 1024
    return f"{thousands // 1024}M" if thousands % 1024 == 0 else f"{thousands}K"
