"""Cost against context as a chart: one HTML page that needs no network, or a PNG."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from step3_hetero.errors import PlacementError
from step3_hetero.placement.cost import cost
from step3_hetero.placement.cost_table import CostTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png")
SHORTEST, LONGEST = 1024, 131_072
"""Tokens; the chart covers them, and every context that was asked for beyond."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
           "#8c564b", "#7f7f7f")  # fmt: skip
"""Eight that colour-blind readers tell apart (Okabe and Ito, without the yellow), then two more."""

MARKERS = "osD^vPX*h"
PNG_DOTS_PER_INCH = 200
WIDE_AND_HIGH_INCHES = (5.6, 6.0)
"""So narrow that its 10-point text can be read when a phone shows the whole width."""

HEADING_COLUMNS = 74
MOST_TICKS = 10


@dataclass(frozen=True, slots=True)
class Line:
    """One line: dollars per million tokens at each context."""

    name: str
    usd: tuple[float, ...]
    dashed: bool = False


def write_chart(table: CostTable, path: Path) -> None:
    """Write the chart to ``path``, whole or not at all; the suffix says which kind.

    Raises:
        PlacementError: the suffix is neither .html nor .png, matplotlib is not installed, or the
            file cannot be written.
    """
    check_suffix(path)
    _require_matplotlib()
    contexts = _contexts(table.contexts)
    lines = _lines(table, contexts)
    if path.suffix.lower() == ".png":
        data = _bytes(_draw(_heading(table), contexts, lines), "png")
    else:
        drawing = _bytes(_draw("", contexts, lines), "svg").decode()
        data = _page(table, contexts, lines, drawing).encode()
    _write(path, data)


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither a page nor a picture.

    Raises:
        PlacementError: the suffix is another one.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = " or ".join(SUFFIXES)
        raise PlacementError(f"--chart {path}: unknown kind {path.suffix!r}; expected {known}")


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise PlacementError(
            "--chart needs matplotlib, which is not installed: pip install matplotlib"
        )


def _contexts(asked: Sequence[int]) -> list[int]:
    """Return powers of two over the chart's range, widened to what was asked for."""
    least, most = min(SHORTEST, *asked), max(LONGEST, *asked)
    powers = {2**n for n in range(64) if least <= 2**n <= most}
    return sorted({*powers, *asked})


def _lines(table: CostTable, contexts: Sequence[int]) -> list[Line]:
    """Return each model's AFD; for one model, each card doing both halves beside it."""
    lines = [
        Line(model.name, tuple(table.split(model, c).usd for c in contexts))
        for model in table.models
    ]
    if len(table.models) > 1:
        return lines
    (model,) = table.models
    return [
        Line("AFD, cheapest cards", lines[0].usd),
        *(
            Line(f"{a.name} alone", tuple(cost(model, a, c).total_usd for c in contexts), True)
            for a in table.accelerators
        ),
    ]


def _title(table: CostTable) -> str:
    if len(table.models) == 1:
        return f"{table.models[0].name}: decoding cost against context"
    return "Decoding cost against context, attention and FFN on their cheapest cards (AFD)"


def _draw(heading: str, contexts: Sequence[int], lines: Sequence[Line]) -> Figure:
    """Draw the lines, dearest first in the legend; no heading: the page has its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=WIDE_AND_HIGH_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(sorted(lines, key=lambda line: -line.usd[-1])):
        axes.plot(
            contexts,
            line.usd,
            label=line.name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="--" if line.dashed else "-",
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [c for c in contexts if c & (c - 1) == 0] or list(contexts)
    ticks = ticks[:: 1 + len(ticks) // MOST_TICKS]
    axes.set_xticks(ticks, [_tokens(c) for c in ticks])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("USD per million decoded tokens")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(lambda value, _: _minor_tick(value))
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    axes.set_title(heading, loc="left", fontsize=8.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _heading(table: CostTable) -> str:
    """Return title and notes for a picture that stands alone, in lines that fit it."""
    notes = [*table.notes(), _hardware(table)]
    return "\n".join(
        line for text in (_title(table), *notes) for line in wrap(text, HEADING_COLUMNS)
    )


def _hardware(table: CostTable) -> str:
    return f"hardware: {', '.join(a.name for a in table.accelerators)}"


def _minor_tick(value: float) -> str:
    """Label 2 and 5 of each decade: the lines seldom span two decades."""
    return f"{value:.3g}" if f"{value:e}"[0] in "25" else ""


def _tokens(count: int) -> str:
    """Write a context for people.

    >>> _tokens(8192), _tokens(131072), _tokens(1000), _tokens(2097152)
    ('8K', '128K', '1000', '2M')
    """
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def _bytes(figure: Figure, kind: str) -> bytes:
    """Return the figure as a file; the same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "step3-hetero", "svg.fonttype": "path"}):
        figure.savefig(file, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata)
    return file.getvalue()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem;
       padding: 0 .8rem; color: #1a1a1a; background: #fff }}
h1 {{ font-size: 1.3rem }}
h2 {{ font-size: 1.1rem }}
svg {{ width: 100%; max-width: 44rem; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
</style>
<h1>{title}</h1>
<p>USD per million decoded tokens. {notes}</p>
<figure style="margin: 0" role="img" aria-label="{title}">
{svg}
</figure>
<h2>Values, USD per million decoded tokens</h2>
<div class="wide">
<table>
<thead><tr><th>context, tokens</th>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</html>
"""


def _page(table: CostTable, contexts: Sequence[int], lines: Sequence[Line], svg: str) -> str:
    notes = [*table.notes(), _hardware(table)]
    rows = [
        "<tr><th>"
        + f"{context:,}"
        + "</th>"
        + "".join(f"<td>{_usd(line.usd[at])}</td>" for line in lines)
        + "</tr>"
        for at, context in enumerate(contexts)
    ]
    return _PAGE.format(
        title=html.escape(_title(table)),
        notes=html.escape(". ".join(note[0].upper() + note[1:] for note in notes) + "."),
        svg=_inline(svg),
        header="".join(f"<th>{html.escape(line.name)}</th>" for line in lines),
        rows="\n".join(rows),
    )


def _usd(value: float) -> str:
    return f"{value:.4f}" if value >= 0.01 else f"{value:.3g}"


def _inline(svg: str) -> str:
    """Cut what belongs to a file of its own, and the fixed size: the page scales the drawing."""
    drawing = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", drawing, count=1)


def _write(path: Path, data: bytes) -> None:
    """Write beside the target, then rename over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as cause:
        beside.unlink(missing_ok=True)
        raise PlacementError(f"--chart {path}: cannot be written: {cause.strerror}") from cause
