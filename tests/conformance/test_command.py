"""``conformance run|compare|record|verify`` as a user and a vendor's CI see them."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from unittest.mock import Mock

import jsonschema
import pytest

from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.certificate import Certificate, schema_text
from step3_hetero.conformance.exam import CaseResult
from step3_hetero.conformance.suite import Workers

LITTLE = ("--only", "tokens=5,hidden=64", "--only", "rope tokens=9", "--only", "concat")
SIZES = ("tokens=5,hidden=64", "tokens=5,inter=80", "tokens=5,n=64", "rope tokens=9",
         "tokens=7,n=96", "resize size=5", "layer_norm tokens=0")  # fmt: skip


def terms(*words):
    return [part for word in words for part in ("--only", word)]


def test_a_crash_a_hang_and_an_exception_fail_their_own_case_and_no_other(command, tmp_path):
    done = command("conformance", "run", "--backend", "bad", "--deadline", 15,
                   *terms(*SIZES), "--only", "!bfloat16", "--json", "bad.json",
                   "--junit", "bad.xml")  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {c["op"]: c for c in json.loads((tmp_path / "bad.json").read_text())["cases"]}
    assert (found["add"]["status"], found["swiglu"]["status"]) == ("crashed", "timeout")
    assert "SIGSEGV" in found["add"]["findings"][0]["message"]
    assert "within 15 s" in found["swiglu"]["findings"][0]["message"]
    assert found["quick_gelu"]["findings"][0] == {
        "check": "runs", "message": "LostError: device lost: 700 at quick_gelu"
    }  # fmt: skip
    assert {f["check"] for f in found["rope"]["findings"]} == {"rows", "elements"}
    assert "supports raises KeyError: 'rows'" in found["layer_norm"]["findings"][0]["message"]
    assert found["rms_norm"]["status"] == "passed"
    assert found["resize"]["status"] == "unclaimed"
    assert "no kernel for resize" in found["resize"]["reason"]
    suite = ElementTree.parse(tmp_path / "bad.xml").getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("6", "1")
    assert "FAILED" in done.stdout


def test_a_stage_may_bring_its_plan_to_the_device(command):
    done = command(
        "conformance", "run", "--backend", "bad", "--only", "attention_stage contexts=1,"
    )
    assert "data leaves" not in done.stdout + done.stderr
    assert "attention_stage" in done.stdout


def test_an_interrupt_keeps_what_was_found(bad_vendor, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(bad_vendor.parent), "OMP_NUM_THREADS": "1",
                   "BAD_MARK": str(tmp_path / "hangs")}  # fmt: skip
    arguments = ("--backend", "bad", *terms("tokens=7,n=96", "swiglu"), "--json", "c.json")
    with subprocess.Popen(
        [sys.executable, "-m", "step3_hetero.cli", "conformance", "run", *arguments],
        cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        while not (tmp_path / "hangs").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted after" in said
    raw = json.loads((tmp_path / "c.json").read_text())
    assert raw["scope"] == "selected"
    assert {c["op"]: c["status"] for c in raw["cases"]}["rms_norm"] == "passed"


def test_an_interrupt_keeps_what_is_found_behind_a_case_that_hangs():
    first, second, third = list(trials().values())[:3]
    result = CaseResult(second.id, second.op, second.dtype, "passed")
    hangs, done, refused = Future(), Future(), Future()
    hangs.result = Mock(side_effect=KeyboardInterrupt)
    done.set_result(result)
    refused.set_exception(CancelledError())
    pool = SimpleNamespace(schedule=Mock(side_effect=[hangs, done, refused]))
    workers = Workers(pool, None, 1.0)
    with pytest.raises(KeyboardInterrupt):
        next(workers.examine([first, second, third]))
    assert workers.found([]) == [result]
    assert workers.found([result]) == []


def test_a_known_gap_is_no_failure_until_it_passes(command, bad_vendor):
    chosen = terms("rope tokens=9", "tokens=7,n=96")
    (bad_vendor / "known_gaps.txt").write_text(
        "# rope is wrong on this card\n"
        "rope[tokens=9,heads=3,head_dim=16,last=511,theta=10000.0,float32]  driver 1.2\n"
    )
    done = command("conformance", "run", "--backend", "bad", *chosen, "--only", "!bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 known gap" in done.stdout
    (bad_vendor / "known_gaps.txt").write_text("rms_norm[tokens=7,n=96,eps=1e-05,float32]  old\n")
    done = command("conformance", "run", "--backend", "bad", *chosen, "--only", "!rope")
    assert done.returncode == 1
    assert "known gaps: passes; take the line out of known_gaps.txt (old)" in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rope[nothing]  because", "known_gaps.txt:1: 'rope[nothing]' is no case of the suite"),
        ("rope[nothing]", "known_gaps.txt:1: 'rope[nothing]' has no reason"),
    ],
)
def test_a_gap_that_is_none_is_refused_before_anything_runs(command, bad_vendor, line, said):
    (bad_vendor / "known_gaps.txt").write_text(line + "\n")
    done = command("conformance", "run", "--backend", "bad", "--only", "concat")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "none"), "no backend 'none'; installed: ascend, bad, cpu"),
        (("--backend", "cpu:x"), "backend 'cpu:x' refused; expected NAME or NAME:INDEX"),
        (("--backend", "reference"), "is what others are held to"),
        (("--backend", "cpu", "--option", "fast"), "option 'fast' refused; expected KEY=VALUE"),
        (("--backend", "cpu", "--only", "ropes"), "no case matches ropes"),
        (("--backend", "cpu", "--only", "rope", "--json", "no/c.json"), "no folder 'no'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(command, arguments, said):
    done = command("conformance", "run", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_device_that_cannot_be_opened_is_told_with_its_signal(command):
    done = command("conformance", "run", "--backend", "bad", "--only", "concat", BAD_OPEN="1")
    assert done.returncode == 1
    assert "bad:0 cannot be opened: the process died: signal SIGABRT" in done.stderr
    done = command("conformance", "run", "--backend", "bad", BAD_WHY="no driver")
    assert (done.returncode, "no driver" in done.stderr) == (2, True)


def test_certificate_follows_its_published_schema_and_reads_back(command, tmp_path):
    done = command("conformance", "run", "--backend", "cpu", *LITTLE, "--json", "c.json")
    assert done.returncode == 0, done.stdout + done.stderr
    raw = json.loads((tmp_path / "c.json").read_text())
    jsonschema.validate(raw, json.loads(schema_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**raw, "tier": "device"}, json.loads(schema_text()))
    read = Certificate.read(tmp_path / "c.json")
    assert (read.scope, read.passed, read.backend) == ("selected", True, "cpu")
    assert {c.op for c in read.cases} == {"add", "rope", "concat"}
    assert all(len(values) == 8 for c in read.cases for values in c.sketch.values())


def test_compare_lists_where_two_devices_differ_although_both_pass(command, tmp_path):
    for name in ("cpu", "bad"):
        command("conformance", "run", "--backend", name, *terms("tokens=7,n=96", "rope tokens=9"),
                "--json", f"{name}.json")  # fmt: skip
    done = command("conformance", "compare", "cpu.json", "bad.json", "--json")
    found = json.loads(done.stdout)
    assert {d["id"].split("[")[0] for d in found["status"]} == {"rope"}
    both = [d for d in found["results"] if d["id"].startswith("rms_norm")]
    assert both and all(0 < d["apart"] < 4 * d["allowed"] for d in both)
    done = command("conformance", "compare", "cpu.json", "gone.json")
    assert (done.returncode, "gone.json: cannot be read" in done.stderr) == (2, True)
