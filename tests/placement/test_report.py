"""The report: one page, nothing fetched, every section there or said to be left out."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_plan import full_plan

from step3_hetero.errors import PlacementError, RequestError
from step3_hetero.placement import report as module
from step3_hetero.placement.report import report_page, write_report
from step3_hetero.placement.report_charts import context_figures, nice_ticks, pareto_figures
from step3_hetero.placement.report_data import PlanJson

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Text, elements and references of a page; an element that is not closed is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.fetched, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(**changes):
    return Page(report_page({**full_plan(), **changes}))


def test_page_is_well_formed_and_fetches_nothing():
    found = page()
    source = report_page(full_plan())
    assert not found.fetched
    assert "script" not in found.tags and "link" not in found.tags
    assert not re.search(r"url\(|@import|@font-face|https?://", source)
    assert found.tags.count("svg") == found.tags.count("desc") == 6
    assert found.tags.count("details") == 3


def test_headline_certificate_and_figures_are_the_plans():
    text = page().text
    for said in (
        "$0.0551 per million tokens",
        "Split attention and FFN",
        "16 × h800, 16 × ascend-910b",
        "costs less than $0.0549: the gap to this plan is 0.36 %",
        "48.6 ms of 50",
        "26,825",
        "$0.0489 to $0.0634",
        "The FFN's stage time of 260 µs",
        "and 6 more servers",
        "ascend-910b is uncalibrated",
    ):
        assert said in text, said


def test_groups_of_a_role_have_a_panel_each_where_there_are_several():
    group = {"pool": "h20", "batch": 61.5}
    one = page(attention={"pool": "h20", "groups": [group]})
    two = page(attention={"pool": "h20, h800", "groups": [group, {**group, "pool": "h800"}]})
    assert "Attention, group" not in one.text
    assert "Attention, group 1 pool h20 batch 61.5 Attention, group 2 pool h800" in two.text


def test_do_not_split_is_said_in_so_many_words():
    text = page(split=False).text
    assert "Do not split : attention and FFN stay on the same cards" in text
    assert "Split attention" not in text


@pytest.mark.parametrize("key", ["breakdown", "cost_by_context", "pareto", "racks", "pipeline"])
def test_section_without_its_key_is_left_out_and_says_so(key):
    plan = full_plan()
    del plan[key]
    assert f"is left out: the plan has no key {key} ." in Page(report_page(plan)).text
    assert "is left out" not in page().text


def test_page_needs_no_optional_key():
    plan = {key: full_plan()[key] for key in PlanJson.__required_keys__}
    assert Page(report_page(plan)).text.count("is left out") == 5


def test_infeasible_plan_gives_the_reason_and_what_was_tried():
    nothing = dict.fromkeys(("objective_usd_per_mtok", "lower_bound", "gap", "tpot_ms"))
    text = page(
        **nothing, tokens_per_s=None, paper_bound=None, feasible=False, cards={},
        reason="Memory: 12 GB short on h800; 8 cards more would do.",
    ).text  # fmt: skip
    assert "No feasible plan" in text and "12 GB short on h800" in text
    assert "What was tried" in text and "Cost against context" not in text


def test_ten_alternatives_with_what_each_loses_on():
    found = page()
    assert "case 9" in found.text and "case 10" not in found.text
    assert "+2.0%" in found.text
    assert "memory" in found.text


def test_text_of_a_plan_is_never_markup():
    source = report_page({**full_plan(), "binding": "<script>alert(1)</script>"})
    assert "<script>" not in source
    assert "&lt;script&gt;" in source


def test_card_is_drawn_once_and_too_many_are_refused():
    source = report_page(full_plan())
    assert len(re.findall(r'<span class="card"', source)) == 4 * 8
    assert len(re.findall(r'<span class="card idle"', source)) == 8
    plan = full_plan()
    plan["racks"][0]["servers"][0]["used"][0]["cards"] = 9
    with pytest.raises(PlacementError, match="'h800-0' has 8 cards, 9 used"):
        report_page(plan)


def test_a_thousand_servers_are_counted_and_not_drawn():
    server = full_plan()["racks"][0]["servers"][0]
    racks = [{"name": f"rack {n}", "servers": [server] * 50} for n in range(20)]
    found = page(racks=racks)
    assert "and 4 more servers" in found.text
    assert "18 more racks are not drawn." in found.text


@pytest.mark.parametrize("key", sorted(PlanJson.__required_keys__))
def test_required_key_that_is_missing_is_named(key):
    plan = full_plan()
    del plan[key]
    with pytest.raises(PlacementError, match=f"plan: no key {key};"):
        report_page(plan)


@pytest.mark.parametrize("value", [None, "cheap", float("nan")])
def test_cost_that_is_no_number_is_refused(value):
    with pytest.raises(PlacementError, match="objective_usd_per_mtok: expected a number"):
        page(objective_usd_per_mtok=value)


def test_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_report(full_plan(), path)
    before = path.read_text()
    assert before == report_page(full_plan())
    with pytest.raises(PlacementError):
        write_report({}, path)
    assert path.read_text() == before
    (tmp_path / "taken").mkdir()
    for refused in (tmp_path / "none" / "report.html", tmp_path / "taken"):
        with pytest.raises(RequestError, match="cannot be written"):
            write_report(full_plan(), refused)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "taken"}


def test_dots_stand_where_the_figures_say():
    wide, narrow = pareto_figures(full_plan()["pareto"])
    for figure in (wide, narrow):
        ticks = {float(text): y for y, text in figure.y_ticks}
        low, high = min(ticks), max(ticks)
        assert ticks[high] < ticks[low], "larger is higher"
        for point, dot in zip(full_plan()["pareto"], figure.series[0].dots, strict=True):
            share = (ticks[low] - dot.y) / (ticks[low] - ticks[high])
            assert low + share * (high - low) == pytest.approx(point["usd_per_mtok"], abs=1e-4)
            assert 0 < dot.x < figure.width
        assert [dot.chosen for dot in figure.series[0].dots] == [False, False, True, False]
    contexts = context_figures(full_plan()["cost_by_context"])[0]
    xs = [dot.x for dot in contexts.series[0].dots]
    steps = {round(b - a) for a, b in pairwise(xs)}
    assert len(steps) == 1  # doubling contexts are equally far apart
    assert [len(s.dots) for s in contexts.series] == [6, 5, 5, 5]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0, 0.0551), (21, 72), (3, 3), (0, 1e9)])
def test_ticks_cover_the_range_evenly(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    assert {round((b - a) / step, 6) for a, b in pairwise(ticks)} == {1.0}


def test_one_point_is_a_front_and_one_context_a_line():
    assert page(pareto=full_plan()["pareto"][:1]).tags.count("svg") == 6
    lines = full_plan()["cost_by_context"]
    only = [{**line, "points": line["points"][:1]} for line in lines]
    assert page(cost_by_context=only).tags.count("svg") == 6


def test_money_keeps_three_digits():
    assert [module.money(usd) for usd in (0.05512, 2.5, None)] == ["$0.0551", "$2.500", "–"]
    assert [module.money(usd) for usd in (0.00512, 1.384e-5, 0.0)] == [
        "$0.00512", "$1.38e-05", "$0.0000",
    ]  # fmt: skip


@pytest.mark.parametrize("objective", ["tokens", "cards"])
def test_a_plan_of_another_objective_has_a_page_without_a_bound_in_dollars(objective):
    asked = {"objective": objective, "lower_bound": None}
    text = page(**asked).text
    assert "$0.0551 per million tokens" in text and "but for a gap of 0.36 %" in text
    unpriced = page(**asked, objective_usd_per_mtok=None, breakdown=None, paper_bound=None).text
    assert "26,825 tokens/s, unpriced" in unpriced


def test_a_plan_of_the_least_dollars_needs_its_bound():
    with pytest.raises(PlacementError, match="lower_bound: expected a number, got None"):
        report_page({**full_plan(), "lower_bound": None})


def test_seconds_of_a_role_are_told_in_milliseconds_and_an_edge_by_its_slowest_hop():
    edge = {"attention": "h800", "ffn": "ascend-910b", "slowest_hop": "PCIe of h800"}
    role = {**full_plan()["attention"], "pass_s": 0.0090378}
    text = page(attention=role, edges=[edge]).text
    assert "pass, ms 9.04" in text and "pass s" not in text
    assert "slowest hop, h800 to ascend-910b PCIe of h800" in text
