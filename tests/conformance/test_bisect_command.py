"""The bisect command: its words, its exit codes, its files."""

import json
import sys
from pathlib import Path

import pytest
from conformance.bisect_defects import DEFECTS, planted
from PIL import Image

from step3_hetero import api
from step3_hetero.cli import COMMANDS, main
from step3_hetero.runtime import resolving

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
ASK = ("--prompt", "what is the sum ?", "--max-tokens", "2")


@pytest.fixture
def run(monkeypatch, capsys):
    """Call ``step3-hetero bisect``; return exit code, output and errors."""
    monkeypatch.setitem(COMMANDS, "bisect", "")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["step3-hetero", "bisect", *map(str, arguments)])
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
def defect(monkeypatch):
    """Give role a of every config a device that builds layer 2's attention without the scale."""
    opened = resolving.open_devices

    def open_devices(resolved):
        device = planted("attention", 2, DEFECTS[2].plant, "cpu")
        own = resolved.placement.roles["a"].device
        return {key: device if key == own else d for key, d in opened(resolved).items()}

    monkeypatch.setattr(resolving, "open_devices", open_devices)


def test_verdict_comes_first_and_the_table_after(run):
    code, out, err = run(DIGITS, "--suspect", "a", *ASK)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("no divergence beyond rounding: a (cpu) against reference in float")
    assert any(line.split()[0] == "attention[3]" for line in lines if line.strip())


def test_divergence_is_named_and_ends_with_code_1(run, defect):
    code, out, err = run(DIGITS, "--suspect", "a", *ASK)
    assert (code, err) == (1, "")
    assert out.startswith("divergence in layer 2, stage attention[2], op attention, at token ")
    assert "ops of attention[2]" in out


def test_json_says_the_same(run, defect):
    code, out, _ = run(DIGITS, "--suspect", "a", *ASK, "--json")
    told = json.loads(out)
    found = told["divergence"]
    assert (code, told["diverges"]) == (1, True)
    assert (found["layer"], found["stage"], found["op"]) == (2, "attention[2]", "attention")
    assert told["verdict"].startswith("divergence in layer 2")
    assert [s["stage"] for s in told["stages"]][-1] == "head"


def test_processes_of_a_config_are_said_to_be_left_out(run):
    code, out, err = run(DIGITS, "--suspect", "a", *ASK, "--set", "runtime.processes=per-role")
    assert code == 0 and out.startswith("no ")
    said = "bisect runs the stages of every role in this process, on the same backends; "
    assert err == said + "runtime.processes: per-role is not examined\n"
    assert run(DIGITS, "--suspect", "a", *ASK)[2] == ""


def test_image_goes_through_the_tower(run, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "red.png")
    code, out, _ = run(DIGITS, "--suspect", "a", "--image", tmp_path / "red.png", *ASK, "--json")
    worst = {s["stage"]: s["worst"] for s in json.loads(out)["stages"]}
    assert code == 0
    assert 0 < worst["vision"] <= 1


def test_another_backend_can_be_trusted(run):
    code, out, _ = run(DIGITS, "--suspect", "f", *ASK, "--trusted", "cpu")
    assert code == 0
    assert "f (reference) against cpu" in out


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_growth_is_drawn(run, defect, tmp_path, suffix):
    path = tmp_path / f"growth.{suffix}"
    code, _, err = run(DIGITS, "--suspect", "a", *ASK, "--plot", path)
    assert (code, err) == (1, "")
    data = path.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
        with Image.open(path) as picture:
            assert picture.size[0] > 1000
    else:
        text = data.decode()
        assert "<svg" in text
        assert "divergence in layer 2" in text
        assert "<td>attention[2]</td>" in text
        assert "http" not in text.replace("http://www.w3.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((), "give --suspect with the name of a role, or --replay with a file"),
        (("--suspect", "a"), "give either --prompt or --prompt-ids, and not both"),
        (("--suspect", "x", *ASK), "no role 'x' to suspect; roles: a, f"),
        (("--suspect", "a", *ASK, "--image", "none.png"), "none.png"),
        (("--suspect", "a", *ASK, "--trusted", "gpu"), "no backend 'gpu'; installed: "),
        (("--suspect", "a", *ASK, "--plot", "x.gif"), "unknown kind '.gif'; expected .html or"),
        (("--suspect", "a", *ASK, "--plot", "no/x.png"), "no folder 'no'"),
        (("--suspect", "a", "--prompt-ids", "1,2,99"), "token 99 at place 2 is outside"),
        (("--replay", "none.safetensors"), "none.safetensors: cannot be read"),
        (("--replay", "x", "--suspect", "a"), "--replay takes no --suspect"),
        (("--suspect", "a", *ASK, "--max-tokens", "0"), "--max-tokens"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, arguments, want):
    code, out, err = run(DIGITS, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert want in err
    assert err.count("\n") == 1


def test_kept_run_of_the_shadow_check_is_run_again(run, tmp_path, monkeypatch):
    from step3_hetero.conformance.shadow import ShadowCheck
    from step3_hetero.runtime.request import SamplingParams

    opened = resolving.open_devices

    def with_defect(resolved):
        device = planted("attention", 2, DEFECTS[2].plant, "cpu")
        own = resolved.placement.roles["a"].device
        return {key: device if key == own else d for key, d in opened(resolved).items()}

    with monkeypatch.context() as patched:
        patched.setattr(api, "open_devices", with_defect)
        runtime = {"runtime__shadow_backend": "reference", "runtime__shadow_sample": 1.0}
        with api.load(DIGITS, shadow_folder=tmp_path, **runtime) as engine:
            assert isinstance(engine.executor.observers[0], ShadowCheck)
            engine.generate("what is the sum ?", SamplingParams(max_tokens=2))
            (file,) = api.shadow_report(engine)["files"]
    code, out, _ = run(DIGITS, "--replay", file)
    assert (code, out) == (
        0, "attention[2]: beyond its bound as recorded, within it on cpu\n"
    )  # fmt: skip
    code, out, _ = run(DIGITS, "--replay", file, "--set", "roles.a.backend=reference", "--json")
    assert (code, json.loads(out)["backend"], json.loads(out)["again"]) == (0, "reference", [])


def test_help_has_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "step3-hetero bisect examples/digits.yaml --suspect a" in out
    assert "--replay shadow-excess/" in out
