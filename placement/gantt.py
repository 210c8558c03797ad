"""A simulated run as a Gantt chart: some layers of one token, inline SVG in one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step3_hetero.placement.pipeline import REMOTE
from step3_hetero.placement.simulate_recurrence import A2F, ATTENTION, F2A, FFN
from step3_hetero.placement.simulate_result import Result
from step3_hetero.placement.trace import TITLES, Slice, SliceRecorder, lane
from step3_hetero.placement.written import fill

COLOURS = 6
"""Micro-batches that have a colour of their own; further ones start over."""
LANES_OF_EACH = 2
"""Attention instances drawn, and FFN sets."""
LAYERS_WIDE, LAYERS_NARROW = 8, 3
"""Layers drawn on a screen and on a phone: a bar stays wide enough for its number."""
WIDE, NARROW = 1120, 358
LANE, BAR, TOP = 48, 24, 26
"""Heights: a lane with its name, its bars, and the scale above."""
NUMBER_FITS = 20
"""Width of a bar from which its layer's number stands in it."""
TICKS_WIDE, TICKS_NARROW = 9, 4


@dataclass(frozen=True, slots=True)
class Bar:
    """One service, in pixels."""

    x: float
    y: int
    width: float
    colour: int
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class Gantt:
    """A drawing; it is made once for wide and once for narrow screens."""

    css: str
    width: int
    height: int
    title: str
    desc: str
    lanes: Sequence[tuple[int, str]]
    ticks: Sequence[tuple[float, str]]
    bars: Sequence[Bar]


def draw(recorder: SliceRecorder, *, narrow: bool) -> Gantt | None:
    """Return the drawing of some layers of the second token; None where nothing happened."""
    layers = LAYERS_NARROW if narrow else LAYERS_WIDE
    width = NARROW if narrow else WIDE
    shown = _window(recorder, layers)
    if not shown:
        return None
    lanes = _lanes(recorder, shown)
    start = min(s.start_s for s in shown)
    end = max(s.end_s for s in shown)
    scale = width / (end - start)
    rows = {key: number for number, key in enumerate(lanes)}
    bars = [
        _bar(s, (s.start_s - start) * scale, (s.end_s - s.start_s) * scale, rows)
        for s in shown
        if (TITLES[s.what], s.unit) in rows
    ]
    names = [(TOP + LANE * rows[key], name) for key, name in lanes.items()]
    step = _nice((end - start) / (TICKS_NARROW if narrow else TICKS_WIDE))
    ticks = [
        (n * step * scale, f"{n * step * 1e3:g}") for n in range(int((end - start) / step) + 1)
    ]
    first, last = min(s.layer for s in shown), max(s.layer for s in shown)
    return Gantt(
        css="narrow" if narrow else "wide",
        width=width,
        height=TOP + LANE * len(lanes),
        title=f"Layers {first} to {last} of token {shown[0].token}",
        desc=f"{len(lanes)} lanes over {(end - start) * 1e3:.2f} ms; a bar is one micro-batch in "
        "one layer, its colour the micro-batch, the number in it the layer.",
        lanes=names,
        ticks=ticks,
        bars=bars,
    )


def _window(recorder: SliceRecorder, layers: int) -> list[Slice]:
    """Return some layers of the second token: the first one fills the pipeline.

    They begin one layer before the first whose FFN is remote, so that the wires are seen.
    """
    first = _first_layer(recorder)
    kept = [s for s in recorder.slices() if first <= s.layer < first + layers and s.token <= 1]
    token = max((s.token for s in kept), default=0)
    return [s for s in kept if s.token == token]


def _first_layer(recorder: SliceRecorder) -> int:
    local = 0
    for run in recorder.pipeline.layers:
        if run.ffn == REMOTE:
            return max(0, local - 1)
        local += run.count
    return 0


def _lanes(recorder: SliceRecorder, shown: Sequence[Slice]) -> dict[tuple[str, int], str]:
    """Return the lanes from top to bottom, in the order a token passes them."""
    found: dict[tuple[str, int], str] = {}
    for what in (ATTENTION, A2F, FFN, F2A):
        units = sorted({s.unit for s in shown if s.what == what})[:LANES_OF_EACH]
        for unit in units:
            found[TITLES[what], unit] = ", ".join(lane(recorder.pipeline, what, unit))
    return found


def _bar(s: Slice, x: float, width: float, rows: dict[tuple[str, int], int]) -> Bar:
    title = (
        f"{TITLES[s.what]}, micro-batch {s.micro_batch}, layer {s.layer}, token {s.token}: "
        f"{(s.end_s - s.start_s) * 1e6:.0f} µs from {s.start_s * 1e3:.3f} ms"
    )
    return Bar(
        x=round(x, 2),
        y=TOP + LANE * rows[TITLES[s.what], s.unit] + LANE - BAR - 4,
        width=round(max(width - 1, 0.5), 2),
        colour=s.micro_batch % COLOURS,
        text=str(s.layer) if width >= NUMBER_FITS else "",
        title=title,
    )


def _nice(step: float) -> float:
    """Return the next larger of 1, 2 and 5 times a power of ten.

    >>> [_nice(step) for step in (0.3, 1.5, 7.0)]
    [0.5, 2.0, 10.0]
    """
    power: float = 10.0 ** len(str(int(step))) if step >= 1 else 10.0
    while power / 10 >= step:
        power /= 10
    return next((power * part for part in (0.2, 0.5) if power * part >= step), power)


def gantt_values(recorder: SliceRecorder, result: Result) -> dict[str, Any]:
    """Return what the template part `gantt.html.j2` needs."""
    drawn = [draw(recorder, narrow=False), draw(recorder, narrow=True)]
    micro_batches = recorder.pipeline.micro_batches
    return {
        "drawings": [one for one in drawn if one is not None],
        "legend": [(j, j % COLOURS) for j in range(micro_batches)],
        "uses": [
            {
                "what": TITLES[use.what],
                "name": use.name,
                "units": use.units,
                "percent": round(100 * use.utilisation, 1),
                "spread": f"{use.least:.1%} to {use.most:.1%}",
                "bubble_ms": f"{use.bubble_s * 1e3:.2f}",
            }
            for use in result.roles
        ],
        "tpot_ms": {name: f"{seconds * 1e3:.2f}" for name, seconds in result.tpot_s.items()},
    }


def gantt_page(recorder: SliceRecorder, result: Result) -> str:
    """Return one self-contained HTML page: the drawing, the use of each role, TPOT percentiles."""
    return fill(
        "gantt_page.html.j2",
        gantt=gantt_values(recorder, result),
        result=result,
        micro_batches=recorder.pipeline.micro_batches,
    )
