"""``step3-hetero plan`` as a user sees it: what it prints, what it writes, what it refuses."""

import json
import sys

import pytest
import yaml

from step3_hetero.cli import main

pytest.importorskip("scipy")

ASKED = ("--model", "step3", "--context", "8192", "--tpot-ms", "50")
MIXED = ("--pool", "h800=32", "--pool", "h20=64")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["step3-hetero", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def planned(run):
    def planned(*arguments):
        code, out, _ = run("plan", *ASKED, *arguments, "--json")
        found = json.loads(out)
        assert code == (0 if found["feasible"] else 2)
        return found

    return planned


def test_json_holds_what_is_promised(planned):
    found = planned(*MIXED)
    assert found.keys() >= {
        "feasible", "objective_usd_per_mtok", "lower_bound", "gap", "paper_bound", "tpot_ms",
        "tokens_per_s", "cards", "attention", "ffn", "split", "alternatives", "solve_s",
    }  # fmt: skip
    assert found["split"]
    assert found["cards"].keys() == {"h800", "h20"}
    assert found["cards"]["h800"] <= 32 and found["cards"]["h20"] <= 64
    assert found["paper_bound"] < found["lower_bound"] <= found["objective_usd_per_mtok"]
    assert found["tpot_ms"] <= 50


def test_price_is_that_of_the_cards_over_the_tokens(planned):
    found = planned(*MIXED)
    an_hour = 2.00 * found["cards"]["h800"] + 0.80 * found["cards"]["h20"]
    a_million = an_hour / 3600 / found["tokens_per_s"] * 1e6
    assert found["objective_usd_per_mtok"] == pytest.approx(a_million)


def test_more_of_anything_never_costs_more(planned):
    base = planned(*MIXED)["objective_usd_per_mtok"]
    assert planned("--pool", "h800=64", "--pool", "h20=64")["objective_usd_per_mtok"] <= base
    assert planned(*MIXED, "--pool", "a800=64")["objective_usd_per_mtok"] <= base
    code = planned(*MIXED, "--tpot-ms", "100")["objective_usd_per_mtok"]
    assert code <= base


def test_vendors_are_not_joined_over_unknown_host_nics(planned):
    pools = ("--pool", "h800=32", "--pool", "ascend-910b=64")
    found = planned(*pools)
    crossing = [a for a in found["alternatives"] if "host" in json.dumps(a)]
    assert not found["split"]
    assert any("host_nics" in json.dumps(a) for a in crossing)
    slow = planned(*pools, "--host-nic-gbit", "25", "--host-nics-per-server", "1")
    assert not slow["split"]


def test_plan_file_is_one_that_simulate_reads(run, tmp_path):
    path = tmp_path / "plan.yaml"
    code, _, _ = run("plan", *ASKED, *MIXED, "--out", path)
    written = yaml.safe_load(path.read_text())
    assert (code, written["version"]) == (0, 1)
    assert {"embed", "attention", "head"} <= set(written["roles"]["a"]["stages"])
    assert written["roles"]["f"]["stages"] == ["ffn"]
    code, out, _ = run("simulate", path, "--tokens", "5", "--json")
    assert code == 0
    assert json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pool", "h99=4"), "unknown card 'h99'; cards: h800"),
        (("--pool", "h800"), "expected CARD=COUNT"),
        (("--pool", "h800=-3"), "expected CARD=COUNT with a whole number of cards"),
        (("--pool", "h800=32", "--tpot-ms", "-1"), "expected 0.001 to 1,000,000 milliseconds"),
        (("--pool", "h800=32", "--model", "none"), "unknown model 'none'; models of the paper"),
        (("--pool", "h800=32", "--model", "none"), "or step3, or a folder with the config.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, arguments, said):
    code, out, err = run("plan", *ASKED, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_what_cannot_be_served_says_why_and_what_would_change_it(planned):
    few = planned("--pool", "h800=1")
    assert not few["feasible"]
    assert "304.1 GB" in json.dumps(few) and "h800=6" in json.dumps(few)
    assert planned("--pool", "h800=6")["feasible"]


def test_sets_that_outnumber_their_micro_batches_are_told_of(run):
    cards = ("--pool", "h800=1104", "--pool", "ascend-910b=9936", "--exclude", "ffn:h800")
    nics = ("--host-nic-gbit", "25", "--host-nics-per-server", "1")
    only = ("--exclude", "attention:ascend-910b", "--exclude", "colocated")
    code, out, err = run("plan", *ASKED, *cards, *nics, *only, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    sets = found["ffn"]["sets"]
    fed = found["attention"]["instances"] * found["attention"]["micro_batches"]
    assert sets > fed
    (said,) = (note for note in found["notes"] if "micro-batches feed them" in note)
    assert f"{sets} sets" in said and f"only {fed} micro-batches" in said


def test_exclusions_that_leave_a_role_no_card_are_named_as_the_reason(run):
    cards = ("--pool", "h800=32", "--pool", "h20=32")
    none_left = ("--exclude", "ffn:h800", "--exclude", "ffn:h20")
    code, _, err = run("plan", *ASKED, *cards, *none_left)
    assert code == 2
    assert "no card is left for ffn; leave out --exclude ffn:h20 or --exclude ffn:h800" in err
    code, _, err = run("plan", *ASKED, "--pool", "h800=4", *none_left[:2])
    assert "no card is left for ffn" in err


@pytest.mark.parametrize(
    ("pool", "said"), [("h800=16", "per million tokens"), ("ascend-910c=64", "tokens/s, unpriced")]
)
def test_most_tokens_have_a_page_with_a_price_and_without(run, tmp_path, pool, said):
    page = tmp_path / "plan.html"
    asked = ("--pool", pool, "--objective", "tokens", "--html", page)
    code, out, err = run("plan", *ASKED, *asked)
    assert (code, err) == (0, f"wrote {page}\n")
    assert said in page.read_text() and "serves more tokens a second" in page.read_text()
    assert "the range shows" not in out
