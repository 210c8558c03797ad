"""--trace, --timings and --metrics-port: on standard error or in files, never in the answer."""

import json
import sys

import pytest

ASK = ("--prompt-ids", "21,22,23", "--max-tokens", "3", "--ignore-eos")


@pytest.fixture
def generate(run, digits):
    return lambda *more: run("generate", digits, *ASK, *more)


def test_answer_is_the_same_with_and_without(generate, tmp_path):
    trace = tmp_path / "trace.json"
    plain, seen = generate(), generate("--timings", "--trace", trace, "--metrics-port", 0)
    assert plain.code == seen.code == 0 and seen.out == plain.out and plain.err == ""


def test_trace_has_every_stage_that_the_json_counts(generate, tmp_path):
    trace = tmp_path / "trace.json"
    stages = generate("--json", "--trace", trace).json["timings"]["stages"]
    slices = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    for kind in {entry["stage"] for entry in stages}:
        counted = sum(entry["calls"] for entry in stages if entry["stage"] == kind)
        assert len([e for e in slices if e["cat"] == kind]) == counted > 0
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_timings_go_to_standard_error(generate):
    told = generate("--timings")
    assert "where" not in told.out
    for word in ("attention", "ffn", "median ms", "p99 ms", "of the run"):
        assert word in told.err


def test_folder_that_is_not_there_is_refused_before_anything_is_loaded(generate, tmp_path):
    told = generate("--trace", tmp_path / "none" / "trace.json")
    assert told.code == 2 and told.out == ""
    assert "no folder" in told.err and "loading" not in told.err


def test_port_out_of_range_is_refused(generate):
    told = generate("--metrics-port", 70000)
    assert told.code == 2 and "0<=x<=65535" in told.err


def test_metrics_without_their_library_are_refused_before_anything_is_loaded(generate, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("loaded all the same")

    monkeypatch.setattr("step3_hetero.cli.seeing.load_engine", load)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    told = generate("--metrics-port", 0)
    assert told.code == 2 and "pip install 'step3-hetero[serve]'" in told.err


def test_metrics_say_where_they_are(generate):
    assert "metrics at http://127.0.0.1:" in generate("--metrics-port", 0).err


def test_eval_takes_them_too(run, digits, tmp_path):
    trace = tmp_path / "t.json"
    told = run("eval", "digits", digits, "--limit", 2, "--timings", "--trace", trace)
    assert told.code == 0 and trace.exists() and "median ms" in told.err
