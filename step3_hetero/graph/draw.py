"""Draw a stage graph as SVG: attention on the left, FFN on the right, time downwards.

Consecutive layers alike in kind and roles are one row. Colours are roles; an edge between two roles
is drawn strong, with what it carries beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from step3_hetero.graph.graph import GraphStage, StageGraph
from step3_hetero.specs import TensorSpec

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, legible to colour-blind readers."""

LEFT, RIGHT, WIDTH = 100, 480, 770
BOX, HIGH, STEP = 230, 58, 120
LINE, BELOW_LEGEND = 24, 46
GLYPH = 8
"""About as wide as a letter of the legend."""
INK, FAINT = "#1a1a1a", "#777777"


@dataclass(frozen=True)
class Row:
    """One row of the drawing: an attention stage and its FFN, or a stage by itself."""

    left: GraphStage
    right: GraphStage | None
    layers: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Return what stands left of the row."""
        if not self.layers:
            return ""
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first}–{last}"


def draw(graph: StageGraph, role_of: Mapping[str, str]) -> str:
    """Return the drawing as the text of an SVG file."""
    rows = _rows(graph, role_of)
    roles = list(dict.fromkeys(role_of[s.name] for s in graph.stages))
    colour = {role: COLOURS[i % len(COLOURS)] for i, role in enumerate(roles)}
    picture = _Picture(rows, colour, role_of)
    picture.legend(graph.name)
    for number, row in enumerate(rows):
        picture.row(number, row)
        if number + 1 < len(rows):
            picture.onward(number, row, rows[number + 1])
    ET.indent(picture.svg)
    return ET.tostring(picture.svg, encoding="unicode") + "\n"


def _rows(graph: StageGraph, role_of: Mapping[str, str]) -> list[Row]:
    """Fold consecutive layers whose two stages are alike and lie on the same roles."""
    named = graph.by_name
    rows = [Row(named[n], None) for n in ("vision", "embed") if n in named]
    layers = [s.layer for s in graph.stages if s.kind == "attention" and s.layer is not None]
    for layer in layers:
        a, f = named[f"attention[{layer}]"], named[f"ffn[{layer}]"]
        previous = rows[-1]
        if previous.right is not None and _alike(previous, a, f, role_of):
            rows[-1] = Row(previous.left, previous.right, (*previous.layers, layer))
        else:
            rows.append(Row(a, f, (layer,)))
    return [*rows, Row(named["head"], None)]


def _alike(row: Row, a: GraphStage, f: GraphStage, role_of: Mapping[str, str]) -> bool:
    assert row.right is not None
    same_roles = all(
        role_of[one.name] == role_of[other.name] for one, other in ((row.left, a), (row.right, f))
    )
    return same_roles and (row.left.spec, row.right.spec) == (a.spec, f.spec)


class _Picture:
    """An SVG document under construction."""

    def __init__(
        self, rows: Sequence[Row], colour: Mapping[str, str], role_of: Mapping[str, str]
    ) -> None:
        self.colour = colour
        self.role_of = role_of
        self.legend_places = _legend_places(colour)
        self.top = self.legend_places[-1][1] + BELOW_LEGEND
        width, height = WIDTH, self.top + (len(rows) - 1) * STEP + HIGH + 30
        self.svg = ET.Element(
            "svg",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=str(width),
            height=str(height),
            style="font-family:system-ui,sans-serif",
        )
        ET.SubElement(self.svg, "rect", width="100%", height="100%", fill="#ffffff")
        self._arrowheads()

    def _arrowheads(self) -> None:
        marker = ET.SubElement(
            ET.SubElement(self.svg, "defs"),
            "marker",
            id="tip",
            viewBox="0 0 8 8",
            refX="7",
            refY="4",
            markerWidth="7",
            markerHeight="7",
            markerUnits="userSpaceOnUse",
            orient="auto",
        )
        ET.SubElement(marker, "path", d="M0 0 L8 4 L0 8 z", fill=INK)

    def legend(self, model: str) -> None:
        """Write the model's name and a swatch for each role."""
        self.text(LEFT, 30, model, size=18, weight="600")
        for (x, y), (role, colour) in zip(self.legend_places, self.colour.items(), strict=True):
            box = {"x": x, "y": y, "width": 16, "height": 16, "rx": 3}
            ET.SubElement(self.svg, "rect", {k: str(v) for k, v in box.items()}, fill=colour)
            self.text(x + 24, y + 13, f"role {role}", size=13)

    def row(self, number: int, row: Row) -> None:
        """Draw a row's boxes and the A2F edge between them."""
        y = self.top + number * STEP
        self.box(LEFT, y, row.left, row)
        if row.right is not None:
            self.box(RIGHT, y, row.right, row)
            strong = self._crosses(row.left, row.right)
            self.arrow(f"M{LEFT + BOX} {y + 20} H{RIGHT - 2}", strong)
            self.text(
                (LEFT + BOX + RIGHT) / 2, y + 13, "A2F", size=12, anchor="middle", weight="600"
            )
            for line, tensor in enumerate(row.right.takes):
                middle, below = (LEFT + BOX + RIGHT) / 2, y + 34 + 13 * line
                self.text(middle, below, _name(tensor), size=11, anchor="middle", fill=FAINT)

    def onward(self, number: int, row: Row, after: Row) -> None:
        """Draw what goes on to the next row: x straight down, y back from the FFN."""
        y = self.top + number * STEP + HIGH
        end = self.top + (number + 1) * STEP - 2
        x = LEFT + 50
        self.arrow(f"M{x} {y} V{end}", self._crosses(row.left, after.left))
        self.text(x - 8, y + 36, _names(row.left.gives[:1]), size=11, fill=FAINT, anchor="end")
        if row.right is not None:
            strong = self._crosses(row.right, after.left)
            turn, target = y + 36, LEFT + BOX - 40
            self.arrow(f"M{RIGHT + 50} {y} V{turn} H{target} V{end}", strong)
            label = f"F2A  {_names(row.right.gives)}"
            self.text(
                (RIGHT + target) / 2 + 20, turn - 6, label, size=11, anchor="middle", fill=FAINT
            )

    def box(self, x: int, y: int, stage: GraphStage, row: Row) -> None:
        """Draw one stage."""
        colour = self.colour[self.role_of[stage.name]]
        place = {"x": x, "y": y, "width": BOX, "height": HIGH, "rx": 6}
        ET.SubElement(
            self.svg,
            "rect",
            {k: str(v) for k, v in place.items()},
            fill=colour,
            **{"fill-opacity": "0.22", "stroke": colour, "stroke-width": "2"},
        )
        layers = f" ×{len(row.layers)}" if len(row.layers) > 1 else ""
        self.text(x + 12, y + 23, _heading(stage) + layers, size=15, weight="600")
        note = " · ".join(part for part in (row.title, f"{_count(stage, row)} weights") if part)
        self.text(x + 12, y + 44, note, size=12, fill="#444444")

    def arrow(self, path: str, strong: bool) -> None:
        """Draw an edge; strong when it joins two roles."""
        width = "2.6" if strong else "1.1"
        line = {"stroke": INK, "stroke-width": width, "marker-end": "url(#tip)", "fill": "none"}
        ET.SubElement(self.svg, "path", {"d": path, **line})

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int,
        fill: str = INK,
        anchor: str = "start",
        weight: str = "400",
    ) -> None:
        """Write a line of text."""
        place = {"x": f"{x:g}", "y": f"{y:g}", "font-size": str(size), "fill": fill}
        style = {"text-anchor": anchor, "font-weight": weight}
        ET.SubElement(self.svg, "text", {**place, **style}).text = words

    def _crosses(self, one: GraphStage, other: GraphStage) -> bool:
        return self.role_of[one.name] != self.role_of[other.name]


def _heading(stage: GraphStage) -> str:
    if stage.kind == "ffn":
        return "ffn (MoE)" if getattr(stage.spec, "experts", 0) else "ffn (dense)"
    return stage.kind


def _count(stage: GraphStage, row: Row) -> str:
    """Return the weights of a row's stages, for people."""
    total = float(stage.elements * max(1, len(row.layers)))
    for unit in ("", " k", " M", " G"):
        if total < 1000 or unit == " G":
            return f"{total:.3g}{unit}"
        total /= 1000
    raise AssertionError("the last unit returns")


def _names(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(map(_name, tensors))


def _name(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype}"


def _legend_places(roles: Iterable[str]) -> list[tuple[int, int]]:
    """Return x and y of each role's swatch: side by side, in a new line where it gets narrow.

    >>> _legend_places(["a", "f"])
    [(100, 44), (196, 44)]
    """
    places: list[tuple[int, int]] = []
    x, y = LEFT, 44
    for role in roles:
        step = 48 + GLYPH * len(f"role {role}")
        if x > LEFT and x + step > WIDTH:
            x, y = LEFT, y + LINE
        places.append((x, y))
        x += step
    return places
