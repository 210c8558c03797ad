"""``step3-hetero simulate``: the plan's keys, the command's options, and what is refused."""

import json
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from report_plan import predicted

from step3_hetero.cli.simulate_command import command
from step3_hetero.errors import ConfigError, Step3HeteroError
from step3_hetero.placement.pipeline import PredictedPipeline

ROLES = {
    "a": {"stages": ["embed", "attention", "head", "ffn[0-3,60]"], "backend": "cuda"},
    "f": {"stages": ["ffn"], "backend": "ascend"},
}


@pytest.fixture
def plan(tmp_path):
    """Write a plan whose pipeline a test may change; return its path."""

    def write(change=lambda pipeline: None, **more):
        pipeline = predicted().to_json()
        change(pipeline)
        path = tmp_path / "plan.yaml"
        values = {"version": 1, "model": "step3", "roles": ROLES, **more}
        path.write_text(yaml.safe_dump({**values, "predicted": {"pipeline": pipeline}}))
        return path

    return write


def run(*arguments):
    return CliRunner().invoke(command, [*map(str, arguments)])


def refused(*arguments):
    """Return the message of the error that a call ends with."""
    error = run(*arguments).exception
    assert isinstance(error, Step3HeteroError), error
    assert error.exit_code == 2
    return str(error)


def test_pipeline_survives_a_round_trip():
    for found in (predicted(), replace(predicted(), ffn_serves="in-turn", between_tokens_s=0.0)):
        assert PredictedPipeline.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_json_holds_percentiles_throughput_and_roles(plan):
    ran = run(plan(), "--tokens", 20, "--jitter", 0.1, "--seed", 3, "--json")
    found = json.loads(ran.stdout)
    assert set(found["tpot_s"]) == {"mean", "p50", "p90", "p95", "p99", "max"}
    assert [role["what"] for role in found["roles"]] == ["attention", "a2f", "ffn", "f2a"]
    assert found["tokens_per_s"] == pytest.approx(1536 / found["tpot_s"]["mean"], rel=0.02)
    assert json.loads(run(plan(), "--tokens", 20, "--jitter", 0.1, "--json").stdout) != found


def test_tables_name_every_role_and_the_rate(plan):
    out = run(plan(), "--tokens", 10).stdout
    assert all(word in out for word in ("attention", "A2F", "FFN", "F2A", "p99", "tokens/s"))
    assert "10 tokens of 2 attention instances, 61 layers, seed 0" in out


@pytest.mark.parametrize(("word", "role"), [("f", "ffn"), ("ffn", "ffn"), ("a", "attention")])
def test_role_is_lost_by_its_name_or_its_stage(plan, word, role):
    path = plan(transport={"deadline_s": 0.25})
    loss = json.loads(run(path, "--fail", f"{word}@0.3", "--json").stdout)["loss"]
    assert (loss["role"], loss["at_s"], loss["deadline_s"]) == (role, 0.3, 0.25)


def test_trace_and_chart_are_written_whole(plan, tmp_path):
    trace, page = tmp_path / "trace.json", tmp_path / "gantt.html"
    ran = run(plan(), "--tokens", 3, "--trace", trace, "--html", page)
    assert ran.exit_code == 0
    assert "all 3 tokens" in ran.stderr
    assert json.loads(trace.read_text())["traceEvents"]
    assert page.read_text().startswith("<!doctype html>")
    assert {p.name for p in tmp_path.iterdir()} == {"plan.yaml", "trace.json", "gantt.html"}


def test_file_that_cannot_be_written_leaves_nothing(plan, tmp_path):
    said = refused(plan(), "--trace", tmp_path / "none" / "trace.json")
    assert "trace.json: no folder" in said and "make it first" in said
    (tmp_path / "taken").mkdir()
    assert "is a directory" in run(plan(), "--trace", tmp_path / "taken").stderr
    assert {p.name for p in tmp_path.iterdir()} == {"plan.yaml", "taken"}


def test_contexts_come_from_a_file(plan, tmp_path):
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("100\n\n65536\n")
    longer = json.loads(run(plan(), "--tokens", 5, "--contexts", lengths, "--json").stdout)
    usual = json.loads(run(plan(), "--tokens", 5, "--json").stdout)
    assert longer["tpot_s"]["mean"] > usual["tpot_s"]["mean"]
    lengths.write_text("100\nmany\n")
    assert refused(plan(), "--contexts", lengths).startswith(f"{lengths}:2: expected tokens")
    lengths.write_text("\n")
    assert "holds no contexts" in refused(plan(), "--contexts", lengths)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ffn", "expected ROLE@T"),
        ("ffn@-1", "expected ROLE@T"),
        ("ffn@soon", "expected ROLE@T"),
        ("ffn@nan", "expected ROLE@T"),
        ("g@1", "unknown role 'g'; roles: attention, ffn, a, f"),
    ],
)
def test_loss_that_cannot_be_is_refused(plan, word, said):
    assert said in refused(plan(), "--fail", word)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (("micro_batches",), 0, "micro_batches: expected a whole number from 1 to 64, got 0"),
        (("context",), None, "context: expected a whole number"),
        (("ffn_serves",), "both", "ffn_serves: expected together or in-turn, got 'both'"),
        (("layers",), [], "layers: is empty"),
        (("layers", 0, "ffn"), "here", "layers.0.ffn: expected local or remote"),
        (("layers", 0, "ffn"), "remote", "layers.0.kind: kind 'dense' is both local and remote"),
        (("attention", 0, "a2f_s"), -1, "attention.0.a2f_s: expected seconds, a number from 0"),
        (("attention", 0, "batch"), 2.5, "attention.0.batch: expected a whole number from 1"),
        (("attention", 0, "feeds"), "h20", "'h20' is no entry of ffn; entries: ascend-910b"),
        (("attention", 0, "seconds"), {"moe": 1.0}, "missing for layers of kind dense"),
        (("attention", 0, "colour"), 1, "attention.0.colour: unknown key; keys: a2f_s, batch"),
        (("ffn", 0, "seconds"), {"moe": 7200}, "ffn.0.seconds.moe: expected seconds"),
        (("ffn", 0, "instances"), 7, "7 sets of 'ascend-910b', but only 6 micro-batches"),
        (("ffn",), [], "ffn: is empty, but `layers` has FFNs that are remote"),
    ],
)
def test_wrong_key_is_refused_by_file_and_line(plan, key, value, said):
    def change(pipeline):
        for part in key[:-1]:
            pipeline = pipeline[part]
        pipeline[key[-1]] = value

    path = plan(change)
    message = refused(path)
    place, line, rest = message.split(":", 2)
    assert place == str(path)
    assert 1 < int(line) <= len(path.read_text().splitlines())
    assert said in rest


def test_missing_key_names_what_is_expected():
    values = predicted().to_json()
    del values["context"]
    with pytest.raises(ConfigError, match=r"predicted\.pipeline\.context: missing; expected"):
        PredictedPipeline.from_json(values)


def test_config_without_a_prediction_is_no_plan(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("version: 1\nmodel: step3\n")
    assert "no key predicted.pipeline: this config is no plan" in refused(path)
    assert "cannot be read" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize("option", [("--tokens", 1), ("--jitter", -0.1), ("--seed", -1)])
def test_absurd_number_is_refused_by_its_option(plan, option):
    ran = run(plan(), *option)
    assert ran.exit_code == 2
    assert option[0] in ran.stderr


def test_deadline_that_is_no_time_is_refused(plan):
    with pytest.raises(ConfigError, match="deadline_s: expected seconds above 0, got 'x'"):
        raise run(plan(transport={"deadline_s": "x"})).exception
