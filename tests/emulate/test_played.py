"""The emulated example answers, in one process and in two; nothing calls it a card's own run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.cli.backends_command import _describe
from step3_hetero.config import Config
from step3_hetero.conformance.certificate import certify
from step3_hetero.conformance.ops_page import page
from step3_hetero.registry import get_backend
from step3_hetero.runtime.resolving import open_devices, resolve

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EMULATED = EXAMPLES / "h800_attention_910b_ffn_emulated.yaml"
QUESTION = "which digit is this ?"
SEVEN = EXAMPLES / "digits" / "7_held-out_0007.png"

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", *map(str, arguments)],
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_check_shows_the_cards_and_says_that_they_are_emulated():
    a, f = json.loads(run("check", EMULATED, "--here", "--json"))["roles"]
    assert [a["device"], f["device"]] == [
        "h800 emulated on cpu:0", "ascend-910b emulated on reference:0"
    ]  # fmt: skip
    assert (a["memory_bytes"], f["memory_bytes"]) == (80_000_000, 64_000_000)
    assert f["emulated"] == {
        "card": "ascend-910b", "memory": 0.001, "slow": 2.0, "latency_s": 0.0005,
        "bytes_per_s": 2.5e7, "copy_bytes_per_s": None, "corrupt_every": None, "cut_every": None,
    }  # fmt: skip
    assert (f["weights"], f["requantised"]["to"]) == ("int8", "int8")
    shown = run("check", EMULATED)
    assert "note: role a: h800 emulated on cpu:0, 0.001 of its memory; dtypes and memory" in shown
    assert "stages slower by 2, edges late by 0.0005 s, edges of 25.0 MB a second" in shown
    assert [r["emulated"] for r in json.loads(run("check", EXAMPLES / "digits.yaml", "--json"))[
        "roles"]] == [None, None]  # fmt: skip


@pytest.mark.parametrize("processes", ["one", "per-role"])
def test_example_reads_digits(processes):
    with load(EMULATED, runtime__processes=processes) as engine:
        for picture in sorted(EXAMPLES.glob("digits/*.png"))[:4]:
            answer = engine.generate(QUESTION, SamplingParams(max_tokens=8), images=[picture])
            assert answer.text == f"</think> {picture.name[0]}"


def seconds(overrides):
    """Return tokens of an answer and the seconds that it took, weights loaded."""
    with load(EMULATED, **overrides) as engine:
        engine.generate(QUESTION, SamplingParams(max_tokens=2), images=[SEVEN])
        start = time.monotonic()
        answer = engine.generate(QUESTION, SamplingParams(max_tokens=8), images=[SEVEN])
        return answer.token_ids, time.monotonic() - start


@pytest.mark.parametrize("processes", ["one", "per-role"])
def test_late_edges_cost_their_time_and_change_no_token(processes):
    plain = {"card": "ascend-910b"}
    fast, _ = seconds({"runtime__processes": processes, "roles__f__emulate": plain})
    late = {**plain, "latency_s": 0.1}
    slow, took_s = seconds({"runtime__processes": processes, "roles__f__emulate": late})
    assert slow == fast
    # Two layers cross to f and back for each token; the first token's step is the prompt's.
    assert took_s >= len(slow) * 2 * 2 * 0.1


@pytest.mark.parametrize(
    ("fault", "told"), [("corrupt_every", "damaged at frame 5"), ("cut_every", "cut at frame 5")]
)
def test_faults_change_no_answer_and_are_told(fault, told, capfd):
    def answered(emulate):
        changes = {"roles__f__emulate": emulate, "runtime__processes": "per-role"}
        with load(EMULATED, **changes) as engine:
            params = SamplingParams(max_tokens=10, ignore_eos=True)
            return engine.generate(QUESTION, params, images=[SEVEN]).token_ids

    undisturbed = answered({"card": "ascend-910b"})
    assert "emulated link" not in capfd.readouterr().err
    assert answered({"card": "ascend-910b", fault: 5}) == undisturbed
    assert told in capfd.readouterr().err


def test_an_emulated_card_is_never_listed_as_a_device():
    resolved = resolve(Config.read(EMULATED))
    devices = open_devices(resolved).values()
    assert {device.info.tier for device in devices} == {"emulated"}
    listed = [d["name"] for name in ("cpu", "reference") for d in _describe(name)["devices"]]
    assert listed == ["cpu:0", "reference:0"]


def test_a_certificate_of_an_emulated_card_is_not_of_its_hardware():
    backend = get_backend("cpu")
    (device, *_) = open_devices(resolve(Config.read(EMULATED))).values()
    made = certify(backend, device.info, [], "selected")
    assert made.device.tier == "emulated"
    shown = page([made])
    assert "none of its kernels | emulated |" in shown
    assert "its own hardware" not in shown
