"""How the error grows layer by layer, as a picture or as one HTML page that needs no network."""

from __future__ import annotations

import html
import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from step3_hetero.conformance.bisect_report import HEADER, BisectReport
from step3_hetero.errors import RequestError
from step3_hetero.placement.written import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png")
BLUE, ORANGE = "#0072b2", "#d55e00"
"""Two of Okabe and Ito's colours, which colour-blind readers tell apart."""

TICKS = 16
"""Stages named along the axis, at most about so many."""


def check_plot(path: Path) -> None:
    """Refuse, before any work, what could not be written in the end.

    Raises:
        RequestError: the suffix is neither .html nor .png, the folder is missing, or matplotlib is
            not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = " or ".join(SUFFIXES)
        raise RequestError(f"--plot {path}: unknown kind {path.suffix!r}; expected {known}")
    check_writable("--plot", path)
    if find_spec("matplotlib") is None:
        raise RequestError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        )


def write_plot(report: BisectReport, path: Path) -> None:
    """Write the growth of the error to ``path``, whole or not at all.

    Raises:
        RequestError: as ``check_plot``, or the file cannot be written.
    """
    check_plot(path)
    if path.suffix.lower() == ".png":
        data = _drawn(_draw(report, title=report.sentence()), "png")
    else:
        data = _page(report, _drawn(_draw(report), "svg").decode()).encode()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as cause:
        raise RequestError(f"--plot {path}: cannot be written: {cause}") from cause
    finally:
        part.unlink(missing_ok=True)


def _draw(report: BisectReport, title: str = "") -> Figure:
    """Draw both free chains over the stages; the stage that diverges is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    stages = [s for s in report.stages if s.free is not None or s.rounding is not None]
    names = [s.stage for s in stages]
    for label, values, colour in (
        ("suspect, running freely", [s.free for s in stages], BLUE),
        ("rounding alone (reference in the same dtype)", [s.rounding for s in stages], ORANGE),
    ):
        shown = [v if v else float("nan") for v in values]
        axes.plot(range(len(names)), shown, label=label, color=colour, marker="o", markersize=3)
    if report.divergence is not None and report.divergence.stage in names:
        place = names.index(report.divergence.stage)
        axes.axvline(place, color="#000000", linewidth=0.8, linestyle="--", label="diverges here")
    step = max(1, len(names) // TICKS)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("relative error against float64")
    axes.grid(which="both", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, loc="left", fontsize=8, wrap=True)
    return figure


def _drawn(figure: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "step3-hetero", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def _page(report: BisectReport, drawing: str) -> str:
    """Return a page with the verdict, the drawing and the table."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADER)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in report.table()
    )
    flips = "".join(f"<p>{html.escape(f.sentence())}</p>" for f in report.flips)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>step3-hetero bisect</title>'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:2rem auto}"
        "td,th{padding:.1rem .8rem;text-align:left}svg{max-width:100%;height:auto}</style>"
        f"<h1>Bisect</h1><p>{html.escape(report.sentence())}</p>{flips}"
        f"{drawing[drawing.index('<svg') :]}<table><tr>{head}</tr>{rows}</table></html>\n"
    )
