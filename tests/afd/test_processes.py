"""Roles in processes: the tokens of one process, whatever is split, and whatever dies."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from afd.questions import under_way

from step3_hetero import SamplingParams, load
from step3_hetero.afd.front import MOST_DEATHS
from step3_hetero.errors import CheckpointError, ConfigError, RoleLost
from step3_hetero.runtime.request import Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))
INVARIANT = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {"runtime__processes": "per-role"}

pytest.importorskip("torch")

pytestmark = pytest.mark.xdist_group("processes")  # each test has processes of its own


def requests(count):
    """Return questions about digits, every other one sampled."""
    return [
        Request(
            "which digit is this ?",
            SamplingParams(max_tokens=8, logprobs=1, temperature=0.7 * (n % 2), seed=n),
            [PICTURES[n % len(PICTURES)]],
        )
        for n in range(count)
    ]


def answers(count=6, disturb=None, **overrides):
    """Return each answer's tokens and log-probabilities; ``disturb`` meets the engine at work."""
    config = {**INVARIANT, **overrides}
    with load(DIGITS, **config) as engine, under_way(disturb, engine.executor) as tick:
        done = engine.generate_all(requests(count), on_progress=tick)
        assert engine.lanes.free_blocks == engine.executor.kv_blocks * engine.executor.instances
    return [(c.token_ids, [p.chosen for p in c.logprobs]) for c in done]


def sent(name, number):
    """Return a disturbance: a signal to one process."""
    return lambda executor: os.kill(executor.processes()[name], number)


def roles_running():
    """Return the process ids of role processes of this test's own process."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "step3_hetero.cli role"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.split()


@pytest.fixture(scope="module")
def together():
    return answers()


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert roles_running() == []


@pytest.mark.parametrize(
    "split",
    [
        {},
        {"transport__kind": "tcp"},
        {"transport__kind": "inproc", "roles__f__spares": 1},
        {"runtime__microbatches": 3},
        {"roles__a__instances": 2, "roles__f__instances": 2, "runtime__microbatches": 2},
    ],
    ids=["1A1F", "tcp", "threads", "three micro-batches", "2A2F"],
)
def test_tokens_and_logprobs_are_those_of_one_process(together, split):
    assert answers(**APART, **split) == together


@pytest.mark.parametrize(
    ("name", "number"),
    [("f:0", signal.SIGKILL), ("a:0", signal.SIGKILL), ("f:0", signal.SIGSTOP)],
    ids=["FFN killed", "attention killed", "FFN stopped"],
)
def test_tokens_are_the_same_when_a_role_dies_or_falls_silent(together, name, number):
    assert answers(disturb=sent(name, number), **APART) == together


def test_vision_may_be_a_role_of_its_own(together, tmp_path):
    values = yaml.safe_load(DIGITS.read_text())
    values["model"] = str((DIGITS.parent / values["model"]).resolve())
    values["roles"]["a"]["stages"].remove("vision")
    values["roles"]["f"]["backend"] = "cpu"
    values["roles"]["v"] = {"stages": ["vision"], "backend": "cpu"}
    values["runtime"] |= {"processes": "per-role", "batch_invariant": True}
    with load(values) as engine:
        done = engine.generate_all(requests(6))
    assert [(c.token_ids, [p.chosen for p in c.logprobs]) for c in done] == together


def test_many_requests_with_cancellations_leak_no_block():
    rng = np.random.default_rng(0)
    with load(DIGITS, roles__f__backend="cpu", **APART, runtime__microbatches=2) as engine:
        numbers, ended = [], 0
        for count in range(150):
            prompt = rng.integers(20, 60, int(rng.integers(1, 40))).tolist()
            numbers.append(engine.submit(prompt, SamplingParams(max_tokens=6, ignore_eos=True)))
            if count % 3 == 0:
                ended += len(engine.step())
            if count % 7 == 0 and numbers[-1] in engine._sequences:
                engine.cancel(numbers[-1])
        while engine._sequences:
            ended += len(engine.step())
        ended += len(engine.step())
        assert ended == len(numbers)
        assert engine.lanes.free_blocks == engine.executor.kv_blocks
        assert not engine.lanes.waiting


def test_a_replica_takes_over(together):
    split = {"roles__f__instances": 2}
    assert answers(disturb=sent("f:0", signal.SIGKILL), **APART, **split) == together


def test_a_role_that_is_killed_whenever_it_starts_fails_the_requests():
    def again_and_again(executor):
        killed, until = set(), time.monotonic() + 60
        while len(killed) <= MOST_DEATHS and time.monotonic() < until:
            number = executor.processes().get("f:0")
            if number is not None and number not in killed:
                os.kill(number, signal.SIGKILL)
                killed.add(number)
            time.sleep(0.005)

    with pytest.raises(RoleLost, match=r"f:0 ended with signal SIGKILL, 6 times in a row"):
        answers(disturb=again_and_again, **APART)


def test_a_role_that_is_killed_once_more_while_it_starts_comes_up(together):
    def twice(executor):
        first = executor.processes()["f:0"]
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 60
        while executor.processes().get("f:0", first) == first and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(executor.processes()["f:0"], signal.SIGKILL)

    assert answers(disturb=twice, **APART) == together


def test_a_role_that_ends_by_itself_when_started_again_fails_the_requests(tmp_path):
    """Its checkpoint is gone: there is nothing to be had from trying again."""
    values = yaml.safe_load(DIGITS.read_text())
    folder = shutil.copytree((DIGITS.parent / values["model"]).resolve(), tmp_path / "model")
    values["model"] = str(folder)
    values["roles"]["f"]["backend"] = "cpu"
    values["runtime"]["processes"] = "per-role"

    def gone(executor):
        (folder / "config.json").rename(folder / "config.gone")
        os.kill(executor.processes()["f:0"], signal.SIGKILL)

    said = r"f:0 ended with exit code 2 before it was ready"
    with (
        load(values) as engine,
        under_way(gone, engine.executor) as tick,
        pytest.raises(RoleLost, match=said),
    ):
        engine.generate_all(requests(6), on_progress=tick)


def test_wire_in_bfloat16_answers_the_same_digits(together):
    wires = {"transport__a2f_dtype": "bf16", "transport__f2a_dtype": "bf16"}
    rounded = answers(**APART, **wires)
    greedy = slice(None, None, 2)
    assert [t for t, _ in rounded[greedy]] == [t for t, _ in together[greedy]]
    assert [p for _, p in rounded] != [p for _, p in together]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"roles__f__instances": 2}, "allowed: 1 with runtime.processes: one"),
        ({**APART, "runtime__shadow_backend": "reference", "runtime__shadow_sample": 0.1},
         "not available yet with runtime.processes: per-role"),
        ({**APART, "roles__a__stages": ["embed", "vision", "attention"],
          "roles__f__stages": ["ffn", "head"]}, "head in another process than embed"),
        ({"runtime__microbatches": 5}, "microbatches"),
    ],
)  # fmt: skip
def test_a_cut_that_cannot_be_made_is_refused_with_its_key(overrides, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        load(DIGITS, **overrides)


def test_a_damaged_tokenizer_is_refused_before_a_role_is_started(tmp_path, monkeypatch):
    def start(*_):
        raise AssertionError("a role was started")

    monkeypatch.setattr("step3_hetero.afd.launch.start", start)
    values = yaml.safe_load(DIGITS.read_text())
    folder = shutil.copytree((DIGITS.parent / values["model"]).resolve(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        load(DIGITS, model=str(folder), **APART)
