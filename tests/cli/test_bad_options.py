"""Options that cannot be met, of every command that writes, measures or certifies.

Each is one line on stderr, exit code 2, before any work is done and with nothing written.
"""

import json
import re

import pytest
from safetensors.numpy import save_file

ASK = ("--prompt-ids", "1,2,3", "--max-tokens", "2")
PLAN = ("plan", "--model", "step3", "--pool", "h800=32")
RUN = ("conformance", "run", "--backend", "cpu", "--only", "rms_norm")
NO_FOLDER = r"no folder '\S*none'; make it first, or name another"


@pytest.fixture
def planned(run, tmp_path):
    """Write a plan."""
    path = tmp_path / "plan.yaml"
    assert run(*PLAN, "--out", path).code == 0
    return path


@pytest.mark.parametrize(
    "command",
    [
        (*PLAN, "--out", "none/plan.yaml"),
        (*PLAN, "--html", "none/report.html"),
        (*PLAN, "--out", "plan.yaml", "--html", "none/report.html"),
        ("generate", "CONFIG", *ASK, "--trace", "none/trace.json"),
        ("bisect", "CONFIG", "--suspect", "a", *ASK, "--plot", "none/growth.png"),
        (*RUN, "--json", "none/c.json"),
        (*RUN, "--json", "c.json", "--junit", "none/j.xml"),
        ("conformance", "record", "--backend", "cpu", "--out", "none/v.safetensors"),
        ("profile", "--backend", "cpu", "--out", "none/cpu.yaml"),
        ("up", "CONFIG", "--set", "runtime.processes=per-role", "--attach", "none/roles.json"),
    ],
    ids=" ".join,
)
def test_file_in_a_folder_that_is_not_there_is_refused_first(
    command, digits, tmp_path, monkeypatch, refuse
):
    monkeypatch.chdir(tmp_path)
    said = refuse(*(digits if word == "CONFIG" else word for word in command))
    assert re.search(NO_FOLDER, said)


@pytest.mark.parametrize("option", ["--trace", "--html"])
def test_simulate_refuses_it_too_before_the_other_file_is_written(option, planned, refuse):
    other = "--html" if option == "--trace" else "--trace"
    files = (other, planned.with_name("other"), option, planned.parent / "none" / "file")
    assert re.search(NO_FOLDER, refuse("simulate", planned, *files))


@pytest.mark.parametrize(
    "command",
    [
        (*PLAN, "--out"),
        (*PLAN, "--html"),
        ("generate", "CONFIG", *ASK, "--trace"),
        ("profile", "--backend", "cpu", "--out"),
    ],
    ids=" ".join,
)
def test_folder_for_a_file_is_refused_first(command, digits, tmp_path, refuse):
    said = refuse(*(digits if word == "CONFIG" else word for word in command), tmp_path)
    assert re.search(r"--\w+ \S+: is a folder; name a file in it", said)


@pytest.mark.parametrize("option", ["--jitter", "--context-cv"])
@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "some"])
def test_simulate_takes_no_number_that_is_none(option, value, planned, refuse):
    assert f"'{option}'" in refuse("simulate", planned, option, value)


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_conformance_takes_no_deadline_that_is_none(value, refuse):
    assert "'--deadline'" in refuse(*RUN, "--deadline", value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "cpu:9"), "cpu:9 cannot be opened: cpu has one device, cpu:0; asked for 9"),
        (
            ("--backend", "cpu", "--option", "thread=1"),
            "cpu:0 cannot be opened: backend 'cpu' has no option 'thread'; options: threads",
        ),
    ],
)
def test_device_that_cannot_be_opened_as_asked_is_bad_input(options, words, refuse):
    assert words in refuse("conformance", "run", *options, "--only", "rms_norm")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"roles": {}}', '{"version": 1}'])
def test_attach_takes_what_up_wrote_and_says_so(text, digits, tmp_path, refuse):
    path = tmp_path / "roles.json"
    path.write_text(text)
    apart = ("--set", "runtime.processes=per-role")
    said = refuse("generate", digits, *ASK, *apart, "--attach", path)
    assert "no file of step3-hetero up; give what `step3-hetero up --attach` wrote" in said


def test_weights_are_no_vector_file(digits, tmp_path, refuse):
    shard = digits.parents[1] / "models/tiny-step3-digits/model-00001-of-00002.safetensors"
    for path in (shard, tmp_path / "empty.safetensors"):
        if path != shard:
            save_file({}, path)
        said = refuse("conformance", "verify", path, "--backend", "cpu")
        assert "no vector file; step3-hetero conformance record writes them" in said


def test_any_json_is_no_certificate(tmp_path, refuse):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a": 1}))
    said = refuse("conformance", "compare", path, path)
    assert "no certificate: " in said and "conformance run --json FILE writes one" in said


def test_replay_that_is_not_there_is_named_once(digits, tmp_path, refuse):
    said = refuse("bisect", digits, "--replay", tmp_path / "gone")
    assert said.count("gone") == 1


def test_quantise_into_no_folder_says_what_to_do(digits, tmp_path, refuse):
    tiny = digits.parents[1] / "models/tiny-step3-digits"
    said = refuse("checkpoint", "quantise", tiny, tmp_path / "none" / "fp8")
    assert re.search(r"fp8: cannot be written: no folder '\S*none'; make it first", said)


@pytest.mark.parametrize("number", ["-1", "1"])
def test_role_says_which_processes_there_are(number, digits, refuse):
    apart = ("--set", "runtime.processes=per-role")
    said = refuse("role", digits, "--name", "f", "--number", number, *apart)
    assert f"no process {number}, there are 1; allowed: 0" in said


def test_bounds_of_the_planner_are_written_out(refuse):
    assert "--context 0: expected 1 to 100,000,000 tokens" in refuse(*PLAN, "--context", 0)
    assert "expected 0.001 to 1,000,000 milliseconds" in refuse(*PLAN, "--tpot-ms", "nan")
    assert "expected 0.000001 to 1,000,000,000,000" in refuse(*PLAN, "--demand", -5)
