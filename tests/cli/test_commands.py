"""The commands as a shell calls them: what they print, as text and as JSON."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from step3_hetero.cli import COMMANDS

ASK = ("--prompt", "which digit is this ?")
MAIN = "from step3_hetero.cli import main; main()"
REFERENCE = "step3_hetero.backends.reference:ReferenceBackend"


def shell(*arguments, **options):
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=60, **{"stdout": subprocess.PIPE, **options})


# generate


@pytest.fixture
def ask(succeed, digits, seven):
    """Ask the example model about a 7."""
    return lambda *more: succeed("generate", digits, *ASK, "--image", seven, *more)


def test_generate_prints_the_answer_and_nothing_else(ask):
    assert ask().out == "</think> 7\n"


def test_generate_prints_what_json_calls_text(ask):
    for more in ((), ("--max-tokens", 1), ("--stop", "think"), ("--ignore-eos", "--max-tokens", 9)):
        assert ask(*more).out == ask(*more, "--json").json["text"] + "\n"


def test_json_of_generate_has_every_key(ask):
    found = ask("--json", "--logprobs", 2).json
    assert found.keys() >= {
        *("text", "token_ids", "logprobs", "prompt_tokens", "placement", "timings"),
        "finish_reason",
    }
    assert found["timings"].keys() >= {"prefill_s", "decode_s", "tokens_per_s", "stages"}
    assert [r["backend"] for r in found["placement"]["roles"]] == ["cpu", "reference"]
    assert len(found["token_ids"]) == len(found["logprobs"]) == 3
    assert found["finish_reason"] == "stop"


def test_json_of_generate_gives_seconds_by_stage_kind_and_role(ask):
    timings = ask("--json").json["timings"]
    assert timings["prefill_s"] > 0 and timings["decode_s"] > 0 and timings["tokens_per_s"] > 0
    stages = {(s["role"], s["stage"]): s for s in timings["stages"]}
    assert stages.keys() == {
        *(("a", kind) for kind in ("vision", "embed", "attention", "ffn", "head", "sample")),
        ("f", "ffn"),
    }
    assert all(s["seconds"] > 0 and s["calls"] > 0 for s in stages.values())
    assert stages["a", "vision"]["calls"] == 1  # one view, no crops
    assert stages["a", "attention"]["calls"] == 4 * stages["a", "head"]["calls"]


def test_prompt_tokens_count_the_images_rows(ask, succeed, digits):
    without = succeed("generate", digits, *ASK, "--json").json["prompt_tokens"]
    assert ask("--json").json["prompt_tokens"] == without + 4 + 2  # 2 x 2 rows and two brackets


def test_token_ids_come_out_for_token_ids_without_a_tokenizer(model, config, succeed):
    arguments = ("generate", config(model), "--prompt-ids", "1,2,3", "--max-tokens", 3)
    found = succeed(*arguments, "--json").json
    assert (found["text"], found["prompt_tokens"], found["logprobs"]) == (None, 3, None)
    assert succeed(*arguments).out == ",".join(map(str, found["token_ids"])) + "\n"


def test_ids_with_blanks_are_read(model, config, succeed):
    arguments = ("generate", config(model), "--max-tokens", 3, "--prompt-ids")
    assert succeed(*arguments, "1, 2, 3").out == succeed(*arguments, "1,2,3").out


def test_logprobs_follow_the_answer_as_a_table(ask):
    answer, _, table = ask("--logprobs", 2).out.partition("\n")
    assert answer == "</think> 7"
    rows = [line.split() for line in table.splitlines() if re.match(r"\s+\d", line)]
    assert [row[0] for row in rows] == ["14", "22", "5"]
    assert all(-1e-2 < float(row[2 if "'" in row[1] else 1]) <= 0 for row in rows)
    assert "-0.0000" not in table
    assert rows[1][3:5] == ["22", "'7'"]


def test_answer_ends_before_a_stop_string(ask):
    found = ask("--json", "--stop", "7").json
    assert (found["text"], found["finish_reason"]) == ("</think> ", "stop")


def test_the_same_seed_is_the_same_answer_and_another_is_not(model, config, succeed):
    def sampled(seed):
        hot = ("--prompt-ids", "1,2", "--max-tokens", 12, "--temperature", 2, "--seed", seed)
        return succeed("generate", config(model), *hot).out

    assert sampled(3) == sampled(3)
    assert len({sampled(seed) for seed in range(4)}) == 4


def test_check_says_what_a_role_requantises(succeed, digits):
    asked = ("check", digits, "--set", "roles.f.weights=int8")
    (line,) = (line for line in succeed(*asked).out.splitlines() if "requantises" in line)
    said = (
        "note: role f: reference requantises 12 tensors of the checkpoint from bfloat16 to int8, "
    )
    assert line.startswith(said)
    assert "requantises" not in succeed("check", digits).out


def test_set_moves_a_stage_and_the_answer_stays(ask):
    moved = ask("--json", "--set", "roles.f.backend=cpu").json
    assert [r["backend"] for r in moved["placement"]["roles"]] == ["cpu", "cpu"]
    assert moved["token_ids"] == ask("--json").json["token_ids"]


@pytest.fixture
def terminal():
    """Return a terminal's file number and what reads all that was written to it."""
    ours, theirs = pty.openpty()
    seen = []

    def read():
        with suppress(OSError):  # what Linux says when the last writer is gone
            while part := os.read(ours, 1 << 12):
                seen.append(part)

    reader = Thread(target=read)
    reader.start()

    def all_of_it():
        os.close(theirs)
        reader.join()
        return b"".join(seen).decode()

    yield theirs, all_of_it
    os.close(ours)


def test_answer_goes_where_stdout_goes_while_stderr_is_a_terminal(digits, seven, terminal):
    number, seen = terminal
    ran = shell("generate", digits, *ASK, "--image", seven, stderr=number)
    assert "loading stages" in seen()
    assert (ran.returncode, ran.stdout) == (0, "</think> 7\n")


def test_terminal_sees_the_answer_as_one_piece(digits, seven, terminal):
    number, seen = terminal
    ran = shell("generate", digits, *ASK, "--image", seven, stdout=number, stderr=number)
    assert seen().replace("\r\n", "\n").endswith("</think> 7\n")
    assert ran.returncode == 0


def test_nothing_is_drawn_where_nobody_looks(digits, seven):
    ran = shell("generate", digits, *ASK, "--image", seven, stderr=subprocess.PIPE)
    assert (ran.stdout, ran.stderr) == ("</think> 7\n", "")


# backends


@pytest.fixture
def package(tmp_path):
    """Install a package that registers one backend; return the folder for PYTHONPATH."""

    def package(name, entry, source=""):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[step3_hetero.backends]\n{entry}\n")
        (tmp_path / "site" / f"{name}.py").write_text(source)
        return tmp_path / "site"

    return package


def test_backends_lists_versions_devices_and_dtypes(succeed):
    table = succeed("backends").out
    assert re.search(r"cpu +torch \d\S+ +cpu:0", table)
    assert re.search(r"reference +numpy \d\S+ +reference:0 .* float64, float32, bfloat16", table)
    for column in ("stored", "computed", "on the wire"):
        assert column in table


def test_backends_as_json(succeed):
    found = {b["name"]: b for b in succeed("backends", "--json").json}
    assert found["cpu"]["version"].startswith("torch ") and found["cpu"]["why"] is None
    device = found["reference"]["devices"][0]
    assert device["name"] == "reference:0" and device["memory_bytes"] > 0
    assert device["dtypes"].keys() == {"stored", "computed", "wire"}


def test_backend_that_does_not_import_is_listed_with_its_cause(package, succeed, monkeypatch):
    source = "import no_such_driver_library\n"
    monkeypatch.syspath_prepend(package("vendor_x", "broken = vendor_x:Backend", source))
    found = {b["name"]: b for b in succeed("backends", "--json").json}
    assert found["broken"]["devices"] == []
    assert "vendor_x does not load" in found["broken"]["why"]
    assert "No module named 'no_such_driver_library'" in found["broken"]["why"]
    assert found["cpu"]["devices"] and found["reference"]["devices"]
    assert re.search("broken .* none: 'broken' of vendor_x does not", succeed("backends").out)


def test_a_broken_backend_harms_only_who_asks_for_it(package, run, digits, monkeypatch):
    source = "import no_such_driver_library\n"
    monkeypatch.syspath_prepend(package("vendor_x", "broken2 = vendor_x:Backend", source))
    assert run("check", digits).code == 0
    asked = run("check", digits, "--set", "roles.f.backend=broken2")
    assert asked.code == 2 and "No module named 'no_such_driver_library'" in asked.err


def test_two_packages_with_one_name_are_both_named(package, run, digits, monkeypatch):
    package("vendor_a", f"twice = {REFERENCE}")
    monkeypatch.syspath_prepend(package("vendor_b", f"twice = {REFERENCE}"))
    asked = run("check", digits, "--set", "roles.f.backend=twice")
    assert asked.code == 2
    assert re.search("two packages register 'twice': vendor_a .*, vendor_b .*; unin", asked.err)


def test_a_strangers_backend_takes_a_role(package, succeed, digits, monkeypatch):
    source = (
        "from step3_hetero.backends.reference import ReferenceBackend\n"
        "class Backend(ReferenceBackend):\n    name = 'stranger'\n"
    )
    monkeypatch.syspath_prepend(package("stranger", "stranger = stranger:Backend", source))
    assert "stranger" in [b["name"] for b in succeed("backends", "--json").json]
    setting = ("--set", "roles.f.backend=stranger")
    found = succeed("generate", digits, "--prompt-ids", "3", "--max-tokens", 2, "--json", *setting)
    assert found.json["token_ids"]


def test_backend_of_another_api_is_listed_with_what_to_do(package, succeed, monkeypatch):
    source = (
        "from step3_hetero.backends.reference import ReferenceBackend\n"
        "class Backend(ReferenceBackend):\n    api_versions = range(90, 91)\n"
    )
    monkeypatch.syspath_prepend(package("vendor_new", "newer = vendor_new:Backend", source))
    found = {b["name"]: b for b in succeed("backends", "--json").json}
    assert "built for backend API [90]" in found["newer"]["why"]


# check


def test_check_shows_roles_edges_and_bytes(succeed, digits):
    text = succeed("check", digits).out
    assert re.search(r"a +cpu +cpu:0 +vision, embed, attention\[0-3\], ffn\[0,3\], head", text)
    assert re.search(r"f +reference +reference:0 +ffn\[1-2\] ", text)
    assert re.search(r"A2F +a +f +2 +816 B", text)
    assert re.search(r"F2A +f +a +2 +768 B", text)


def test_check_as_json_counts_the_bytes(succeed, digits):
    found = succeed("check", digits, "--json").json
    a, f = found["roles"]
    experts = 2 * 3 * 8 * 64 * 96 + 2 * 3 * 64 * 96  # two layers: routed, and shared
    assert f["weight_bytes"] == experts * 4
    assert (a["kv_bytes"], f["kv_bytes"]) == (found["kv_blocks"] * 128 * 4 * 2 * 32 * 4, 0)
    edges = {c["kind"]: (c["source"], c["target"], c["bytes_per_token"]) for c in found["crossing"]}
    assert edges == {
        "A2F": ("a", "f", 2 * (96 * 4 + 3 * 4 + 3 * 4)),  # u, weights, ids
        "F2A": ("f", "a", 2 * 96 * 4),
    }
    assert [(c["members"], c["sent_bytes_per_token"]) for c in found["crossing"]] == [
        (1, c["bytes_per_token"]) for c in found["crossing"]
    ]
    assert found["here"] is None


def test_check_shows_that_one_line_moves_a_stage(succeed, digits):
    found = succeed("check", digits, "--set", "roles.f.backend=cpu").out
    assert "no edge crosses between devices" in found


def test_check_here_opens_the_devices(succeed, digits):
    assert succeed("check", digits, "--here").out.endswith(
        "every device is on this machine and has the memory\n"
    )
    assert succeed("check", digits, "--here", "--json").json["here"] is True


def test_check_here_refuses_a_backend_without_devices(package, run, succeed, digits, monkeypatch):
    source = (
        "from step3_hetero.backends.reference import ReferenceBackend\n"
        "class Backend(ReferenceBackend):\n    name = 'absent'\n"
        "    def why_unavailable(self):\n        return 'the driver is missing'\n"
    )
    monkeypatch.syspath_prepend(package("vendor_absent", "absent = vendor_absent:Backend", source))
    setting = ("--set", "roles.f.backend=absent")
    succeed("check", digits, *setting)
    here = run("check", digits, "--here", *setting)
    assert here.code == 2 and "roles.f.backend: " in here.err
    assert "no device here: the driver is missing" in here.err


# checkpoint


def test_inspect_adds_up_the_parts(succeed, digits):
    tiny = digits.parents[1] / "models" / "tiny-step3-digits"
    found = succeed("checkpoint", "inspect", tiny, "--json").json
    parts = {g["name"]: g for g in found["groups"]}
    assert parts["experts"]["params"] == 2 * 3 * 8 * 64 * 96
    assert found["total"]["params"] == sum(g["params"] for g in parts.values())
    assert found["total"]["bytes"] == 2 * found["total"]["params"]
    table = succeed("checkpoint", "inspect", tiny).out
    assert re.search(r"experts +6 +294,912 +589\.8 kB +bfloat16", table)
    assert re.search(rf"total +\d+ +{found['total']['params']:,} ", table)


def test_quantise_writes_a_copy_that_answers(succeed, digits, seven, tmp_path, config):
    tiny, out = digits.parents[1] / "models" / "tiny-step3-digits", tmp_path / "fp8"
    found = succeed("checkpoint", "quantise", tiny, out, "--json").json
    assert Path(found["path"]) == out
    assert found["written"]["total"]["bytes"] < 0.75 * found["source"]["total"]["bytes"]
    assert "float8_e4m3fn" in found["written"]["total"]["dtypes"]
    assert succeed("generate", config(out), *ASK, "--image", seven).out == "</think> 7\n"
    again = succeed("checkpoint", "quantise", tiny, tmp_path / "second").out
    assert re.fullmatch(r"wrote \S+second: \S+ [kM]B of weights, from \S+ MB\n", again)


# help and eval


LEAVES = [*(c for c in COMMANDS if c not in ("eval", "checkpoint")), "eval digits", "checkpoint"]


@pytest.mark.parametrize("command", ["", *LEAVES])
def test_help_shows_examples_that_name_the_command(command, succeed):
    text = succeed(*command.split(), "--help").out
    examples = text.partition("Examples:\n")[2]
    assert f"step3-hetero {command}".strip() in examples


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_each_option_is_for(command, succeed):
    listed = succeed(*command.split(), "--help").out.partition("Options:\n")[2]
    names = [line for line in listed.splitlines() if line.startswith("  -")]
    assert names
    assert all(re.search(r"\S {2,}\S|^\s+-\S+.* [A-Z<\[]\S*$", line) for line in names)


def test_version_is_the_packages(succeed):
    assert re.fullmatch(r"step3-hetero, version \d+\.\d+\S*\n", succeed("--version").out)


def test_eval_reports_each_kind_of_question(succeed, digits):
    found = succeed("eval", "digits", digits, "--limit", 5, "--json").json
    assert [(s["name"], s["asked"]) for s in found["scores"]] == [
        ("single digits", 5),
        ("sums of two", 5),
    ]
    assert all(s["right"] + len(s["wrong"]) == 5 for s in found["scores"])
    assert found["ablate"] is None
    assert re.search(r"single digits +\d+\.\d% +\d of 5", succeed(*EVAL, digits, "--limit", 5).out)


EVAL = ("eval", "digits")


def test_eval_says_what_was_zeroed(succeed, digits):
    ablated = ("--ablate", "vision", "--limit", 5)
    assert "held-out accuracy, vision zeroed" in succeed(*EVAL, digits, *ablated).out
    assert succeed(*EVAL, digits, *ablated, "--json").json["ablate"] == "vision"
