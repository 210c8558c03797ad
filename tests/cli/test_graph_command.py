"""``step3-hetero graph``: a table, JSON, and a drawing in which nothing overlaps."""

import re
from xml.etree import ElementTree as ET

import pytest

SVG = "{http://www.w3.org/2000/svg}"


def test_graph_lists_like_layers_as_one_row(succeed, digits):
    text = succeed("graph", digits).out
    assert re.search(r"attention\[1-2\] +a .* weights \(tokens, top_k\) float32, ids", text)
    assert re.search(r"ffn\[1-2\] +f +u \(tokens, hidden\) float32, ", text)


def test_graph_as_json_has_stages_edges_and_groups(succeed, digits):
    found = succeed("graph", digits, "--json").json
    stages = {s["name"]: s for s in found["stages"]}
    assert len(stages) == 3 + 2 * 4
    assert {n for n, s in stages.items() if s["role"] == "f"} == {"ffn[1]", "ffn[2]"}
    edges = {(e["kind"], e["source"], e["target"]) for e in found["edges"]}
    assert edges >= {
        ("A2F", "attention[1]", "ffn[1]"),
        ("F2A", "ffn[1]", "attention[2]"),
        ("residual", "attention[1]", "attention[2]"),
        ("residual", "attention[3]", "head"),
    }
    assert sorted(n for group in found["groups"] for n in group) == sorted(stages)


@pytest.fixture
def drawing(succeed, run, tmp_path, digits):
    """Draw an example's graph; return the root of the SVG."""

    def drawing(name="digits.yaml", *more):
        ran = run("graph", digits.parent / name, "--svg", tmp_path / "g.svg", *more)
        assert (ran.code, ran.out) == (0, "")
        return ET.parse(tmp_path / "g.svg").getroot()

    return drawing


def words(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ["digits.yaml", "step3.yaml"])
def test_drawing_has_each_role_in_its_legend_and_each_kind_of_stage(name, drawing):
    svg = drawing(name)
    assert [w for w in words(svg) if w.startswith("role ")] == ["role a", "role f"]
    assert {"vision", "embed", "attention", "ffn (dense)", "head"} <= set(words(svg))


def test_drawing_folds_the_released_models_61_layers(drawing):
    found = words(drawing("step3.yaml"))
    assert "attention ×56" in found and "ffn (MoE) ×56" in found
    assert any(w.startswith("layers 4–59 · ") for w in found)


@pytest.mark.parametrize("name", ["digits.yaml", "step3.yaml"])
def test_drawing_paints_a_stage_in_its_roles_colour(name, drawing):
    svg = drawing(name)
    swatches = [r.get("fill") for r in svg.iter(f"{SVG}rect") if r.get("width") == "16"]
    boxes = [r.get("fill") for r in svg.iter(f"{SVG}rect") if r.get("stroke")]
    assert len(set(swatches)) == 2 and boxes.count(swatches[1]) == 1
    assert set(boxes) == set(swatches)


def box_of(text):
    """Return left, top, right and bottom of a text, its letters at most 0.62 of their size."""
    size, x, y = (float(text.get(k)) for k in ("font-size", "x", "y"))
    wide = 0.62 * size * len(text.text)
    left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
    return left, y - 0.75 * size, left + wide, y + 0.2 * size


@pytest.mark.parametrize("name", ["digits.yaml", "step3.yaml", "many"])
def test_no_words_of_a_drawing_overlap_or_leave_it(name, drawing, tmp_path, digits):
    if name == "many":
        name = tmp_path / "many.yaml"
        name.write_text(MANY.format(model=digits.parents[1] / "models" / "tiny-step3-digits"))
    svg = drawing(name)
    width, height = (float(svg.get(k)) for k in ("width", "height"))
    boxes = {t.text + str(i): box_of(t) for i, t in enumerate(svg.iter(f"{SVG}text"))}
    for one, (left, top, right, bottom) in boxes.items():
        assert min(left, top) >= 0 and right <= width and bottom <= height, one
        for other, (l2, t2, r2, b2) in boxes.items():
            apart = right <= l2 or r2 <= left or bottom <= t2 or b2 <= top
            assert one == other or apart, (one, other)


@pytest.mark.parametrize("name", ["digits.yaml", "step3.yaml"])
def test_labels_between_two_boxes_do_not_reach_into_them(name, drawing):
    svg = drawing(name)
    rects = [r for r in svg.iter(f"{SVG}rect") if r.get("stroke")]
    labels = [box_of(t) for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "middle"]
    for left, top, right, bottom in labels:
        for r in rects:
            x, y, w, h = (float(r.get(k)) for k in ("x", "y", "width", "height"))
            assert right <= x or x + w <= left or bottom <= y or y + h <= top


MANY = """\
version: 1
model: {model}
roles:
  entrance-and-exit: {{stages: [embed, head], backend: cpu}}
  the-eyes-of-the-model: {{stages: [vision], backend: reference}}
  attention-front: {{stages: ["attention[0-1]"], backend: cpu}}
  attention-rear: {{stages: ["attention[2-3]"], backend: reference}}
  experts-first: {{stages: ["ffn[1]"], backend: reference}}
  experts-others: {{stages: [ffn], backend: cpu}}
"""


def test_graph_needs_no_backend_and_no_memory(succeed, digits):
    table = succeed("graph", digits.with_name("step3.yaml"), "--set", "roles.f.backend=unheard")
    assert re.search(r"ffn\[4-59\] +f ", table.out)
