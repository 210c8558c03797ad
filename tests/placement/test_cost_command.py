"""``cost`` and ``hardware`` as a shell calls them."""

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from step3_hetero import cli
from step3_hetero.placement.cost_tables import cells, paper_tables

COMMANDS = ("cost", "hardware")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line; return exit code, output and errors."""
    for name in COMMANDS:
        monkeypatch.setitem(cli.COMMANDS, name, name)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["step3-hetero", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def succeed(call):
    """Call the command line and demand that it did well, without a word on stderr."""

    def succeed(*arguments):
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        return out

    return succeed


@pytest.fixture
def refuse(call):
    """Call the command line; return the one line with which it refuses."""

    def refuse(*arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err

    return refuse


def test_paper_as_json_is_the_tables_unrounded(succeed):
    assert json.loads(succeed("cost", "--paper", "--json")) == paper_tables()


def test_paper_as_csv_has_every_cell_unrounded(succeed):
    rows = csv.DictReader(io.StringIO(succeed("cost", "--paper", "--csv")))
    assert {row["cell"]: float(row["value"]) for row in rows} == dict(cells(paper_tables()))


def table_row(out, title, name):
    """Return one row of one printed table, single-spaced."""
    _, _, below = out.partition(title)
    found = next(line for line in below.splitlines() if line.split()[:1] == [name])
    return " ".join(found.split())


def test_paper_prints_the_papers_cells(succeed):
    out = succeed("cost", "--paper")
    want = ".048 .040 .040 .043 .176 .114 .120 .133 .015 .040 .036 .035".replace(".", "0.")
    assert table_row(out, "Table 6", "Step-3") == f"Step-3 {want}"
    assert table_row(out, "AFD", "Step-3") == "Step-3 0.055 H20 + H800 0.129 H20 + H800"
    assert table_row(out, "Table 7", "0.058") == "0.058 0.007 0.031 0.034"
    want = "Step-3 2.559e+08 3.275e+10 2.066e+10 5.329e+10"
    assert table_row(out, "Table 2", "Step-3") == want
    assert "no network, weight reads, memory capacity, embedding or head" in out


def test_paper_needs_no_heavy_library():
    """Each of these takes longer to import than the tables to compute."""
    code = (
        "import sys; sys.argv = ['x', '--paper', '--json'];"
        "from step3_hetero.cli.cost_command import command; command(standalone_mode=False);"
        "heavy = {'numpy', 'scipy', 'matplotlib', 'pydantic', 'torch'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_cost_prices_what_is_asked_for(succeed):
    asked = ["--model", "step3", "--model", "Kimi", "--context", "8K", "--context", "100"]
    found = json.loads(succeed("cost", *asked, "--hardware", "H20", "--hardware", "h200", "--json"))
    assert [(r["model"], r["context"], r["hardware"]) for r in found["costs"]] == [
        (model, context, card)
        for model in ("step3", "Kimi K2")
        for context in (8192, 100)
        for card in ("H20", "h200")
    ]
    assert [r["figures"] for r in found["costs"][:2]] == ["paper", "catalogue"]
    assert any("catalogue, not the paper's: h200" in note for note in found["notes"])
    step3 = found["models"][0]["weight_bytes"]
    assert step3["bf16"]["ffn"] == 2 * step3["fp8"]["ffn"] == pytest.approx(608.2e9, rel=1e-4)


def test_cost_as_csv_equals_json(succeed):
    rows = list(csv.DictReader(io.StringIO(succeed("cost", "--model", "step3", "--csv"))))
    found = json.loads(succeed("cost", "--model", "step3", "--json"))
    assert [float(row["attention_usd_per_mtok"]) for row in rows] == [
        row["attention_usd_per_mtok"] for row in found["costs"]
    ]
    assert float(rows[0]["afd_usd_per_mtok"]) == found["afd"][0]["usd_per_mtok"]


def test_cost_as_text_has_a_line_for_each_split_and_the_warning(succeed):
    out = succeed("cost", "--model", "Step-3")
    assert re.search(r"Step-3 +8,192 +AFD: H20 \+ H800 +0\.055", out)
    assert re.search(r"Step-3 +32,768 +AFD: H20 \+ H800 +0\.129", out)
    assert "note: policy paper; roofline, a lower bound" in out


def test_policy_changes_the_count(succeed):
    usd = {}
    for policy in ("paper", "mla-512"):
        asked = ("--model", "deepseek", "--hardware", "h20", "--policy", policy, "--json")
        usd[policy] = json.loads(succeed("cost", *asked))["costs"][0]["attention_flops"]
    assert usd["mla-512"] / usd["paper"] == pytest.approx(1088 / 1152)


def test_users_catalogue_sets_the_price(succeed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("cards: {h20: {usd_per_hour: 0.40}}\n")
    asked = ("cost", "--model", "step3", "--hardware", "h20", "--json")
    before = json.loads(succeed(*asked))["costs"][0]
    after = json.loads(succeed(*asked, "--catalogue", mine))["costs"][0]
    assert after["total_usd_per_mtok"] == pytest.approx(before["total_usd_per_mtok"] / 2)
    assert (before["policy"], after["policy"]) == ("paper", "catalogue")


def test_policy_that_keeps_the_papers_figures_says_that_the_file_is_not_used(succeed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("cards: {h20: {usd_per_hour: 0.40}}\n")
    asked = ("cost", "--model", "step3", "--hardware", "h20", "--policy", "paper")
    out = succeed(*asked, "--catalogue", mine)
    assert f"keeps the paper's figures for H20; policy catalogue takes those of {mine}" in out


def test_price_in_a_file_lets_an_unpriced_card_in(succeed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("cards: {l20: {usd_per_hour: 0.40}}\n")
    out = succeed("cost", "--model", "step3", "--catalogue", mine)
    assert re.search(r"step3 +8,192 +l20 ", out)
    assert "left out: ascend-910b-313t, ascend-910b-376t, ascend-910b1, ascend-910c" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "-5"], r"'-5': expected tokens, from 1 to 100,000,000, as in 8192 or 8K"),
        (["--context", "0"], "'0': expected tokens"),
        (["--context", "8192.5"], "'8192.5': expected tokens"),
        (["--context", "900000000"], "expected tokens, from 1 to 100,000,000"),
        (["--model", "gpt-5"], r"unknown model 'gpt-5'.*Step-3"),
        (["--model", "examples"], "unknown model 'examples'.*folder with the config.json"),
        (["--hardware", "h801"], "unknown card 'h801'; did you mean h800"),
        (["--hardware", "l20"], r"l20 has no usd_per_hour .*cards\.l20\.usd_per_hour"),
        (["--hardware", "ascend-910b1"], r"no tflops\.bf16"),
        (["--policy", "fast"], "unknown policy 'fast'; policies: paper, int8, mla-512, catalogue"),
        (["--catalogue", "nowhere.yaml"], r"nowhere\.yaml: cannot be read"),
        (["--chart", "x.pdf"], r"--chart x\.pdf: unknown kind '\.pdf'; expected \.html or \.png"),
        (["--chart", "no/such/folder/x.png"], r"cannot be written: No such file or directory"),
        (["--paper", "--model", "step3"], "--paper takes no --model"),
        (["--paper", "--policy", "int8"], "--paper takes no --policy"),
        (["--json", "--csv"], "--json and --csv exclude each other"),
    ],
)
def test_bad_input_is_refused_in_one_line(refuse, arguments, said):
    assert re.search(said, refuse("cost", *arguments))


def test_wrong_catalogue_is_refused_with_file_and_line(refuse, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("cards:\n  h20:\n    usd_per_hour: free\n")
    said = f"{mine}:3: cards.h20.usd_per_hour: expected a number, got 'free'"
    assert said in refuse("cost", "--catalogue", mine)
    assert said in refuse("hardware", "--catalogue", mine)


class Page(HTMLParser):
    """Counts what a page holds, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_chart_page_is_self_contained_with_its_values(call, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "cost.html"
    code, _, err = call("cost", "--model", "step3", "--chart", page)
    assert (code, err) == (0, f"wrote {page}\n")
    text = page.read_text()
    found = Page(text)
    assert found.tags.count("svg") == 1
    assert all(link.startswith("#") for link in found.fetched)
    assert "step3: decoding cost against context" in text
    assert "USD per million decoded tokens" in text and "no network" in text
    assert re.search(r"<tr><th>8,192</th><td>0\.0551</td>", text)
    assert list(tmp_path.iterdir()) == [page]


def test_chart_picture_is_a_png(call, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "cost.png"
    assert call("cost", "--paper", "--chart", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_chart_of_a_model_called_like_markup_is_text(call, tmp_path):
    pytest.importorskip("matplotlib")
    from oracle.random_checkpoint import write_checkpoint

    folder = write_checkpoint(tmp_path / "<script>")
    page = tmp_path / "cost.html"
    assert call("cost", "--model", folder, "--chart", page)[0] == 0
    assert "script" not in Page(page.read_text()).tags


def test_hardware_lists_every_card(succeed):
    out = succeed("hardware")
    for name in ("h800", "h20", "b200", "l20", "ascend-910b", "ascend-910c"):
        assert re.search(rf"^ +{name} ", out, re.MULTILINE)


def test_hardware_shows_each_number_with_its_source(succeed):
    out = succeed("hardware", "ASCEND-910B")
    assert re.search(r"usd_per_hour +0\.67 +USD per hour +arXiv .*authors' estimate", out)
    assert re.search(r"flops_per_s\.fp8 +- +TFLOP/s +the card has none", out)
    assert re.search(r"server\.host_nics +- .*not known", out)
    assert "Ascend910B4" in out


def test_hardware_as_json_holds_figures_and_sources(succeed):
    card = json.loads(succeed("hardware", "h800", "--json"))
    assert (card["usd_per_hour"], card["flops_per_s"]["fp8"]) == (2.0, 1979e12)
    assert card["sources"]["usd_per_hour"] == "arXiv 2507.19427, Table 4"
    everything = json.loads(succeed("hardware", "--json"))
    assert card in everything and len(everything) == 13


def test_hardware_shows_where_a_users_number_stands(succeed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("cards:\n  l20:\n    usd_per_hour: 0.35\n")
    out = succeed("hardware", "l20", "--catalogue", mine)
    assert re.search(rf"usd_per_hour +0\.35 .*{re.escape(str(mine))}:3", out)


def test_unknown_hardware_is_refused(refuse):
    assert "unknown card 'h2000'; did you mean h200" in refuse("hardware", "h2000")
