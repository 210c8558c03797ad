"""Roles that somebody else started: one front after another, refusals, returns, SIGTERM."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from afd.questions import under_way

from step3_hetero import SamplingParams, load
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.runtime.request import Request

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0)
PROMPTS = [[21 + n, 22, 23] for n in range(4)]


def free_port():
    """Return a port for a role that others look for before it listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(config, disturb=None, **overrides):
    with load(config, **overrides) as engine, under_way(disturb) as tick:
        done = engine.generate_all([Request(p, PARAMS) for p in PROMPTS], on_progress=tick)
    return [(c.token_ids, [p.chosen for p in c.logprobs]) for c in done]


@pytest.fixture
def role(command, write_config):
    """Start a role that stands; return it, its address and the front's config."""

    def start(name="f", wait=True, **keys):
        config = write_config(f"{name}.yaml", transport__kind="tcp", **keys)
        address = f"127.0.0.1:{0 if wait else free_port()}"
        one = command("role", config, "--name", name, "--listen", address)
        if wait:
            address = one.says("listens at").split()[-1]
            one.says("is ready")
        front = {"transport__kind": "tcp", f"roles__{name}__hosts": [address]}
        return one, address, write_config(f"front-{name}.yaml", **front)

    return start


@pytest.fixture
def together(write_config):
    return answers(write_config("one.yaml", runtime__processes="one"))


def test_a_role_serves_one_front_after_another(role, together):
    ffn, _, config = role()
    assert answers(config) == together
    assert answers(config) == together
    assert sum("is serving" in line for line in ffn.lines) == 2


def test_an_attention_role_stands_too_and_its_cache_is_no_ones(role, together):
    _, _, config = role("a")
    assert answers(config) == answers(config) == together


def test_a_second_front_is_refused_with_the_roles_name(role, monkeypatch):
    _, _, config = role()
    monkeypatch.setattr("step3_hetero.afd.front.BUSY_S", 0.5)
    with load(config), pytest.raises(RoleLost, match="f:0 serves another front: end that one"):
        load(config)


def test_a_front_that_comes_before_the_role_waits_for_it(role, together):
    ffn, _, config = role(wait=False)
    assert answers(config) == together
    assert ffn.popen.poll() is None


def test_tokens_are_the_same_when_a_role_that_stands_dies_and_returns(role, command, together):
    ffn, address, config = role()

    def die_and_return():
        ffn.popen.kill()
        ffn.popen.wait()
        command("role", config.parent / "f.yaml", "--name", "f", "--listen", address)

    assert answers(config, die_and_return) == together


def test_a_role_that_returns_with_another_model_is_refused(role, command, tmp_path):
    ffn, address, config = role()
    other = tmp_path / "other"
    shutil.copytree(os.path.realpath(_model(config)), other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text + "\n")

    def die_and_return():
        ffn.popen.kill()
        ffn.popen.wait()
        changed = ["--set", f"model={other}"]
        command("role", config.parent / "f.yaml", "--name", "f", "--listen", address, *changed)

    with pytest.raises(EdgeMismatch, match=r"f:0 and the front do not agree: model: '\w{64}'"):
        answers(config, die_and_return)


def _model(config):
    import yaml

    return yaml.safe_load(config.read_text())["model"]


def test_a_role_that_never_comes_fails_the_start_within_its_deadline(write_config, monkeypatch):
    for module in ("elsewhere", "front", "seats"):
        monkeypatch.setattr(f"step3_hetero.afd.{module}.START_S", 1.5)
    config = write_config(
        transport__kind="tcp", transport__deadline_s=0.5, roles__f__hosts=["127.0.0.1:9"],
        roles__a__hosts=["127.0.0.1:9"],
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises((RoleLost, Exception), match=r"within 1\.5 s|not ready after 1\.5 s"):
        load(config)
    assert time.monotonic() - start < 10


def test_sigterm_lets_what_is_under_way_be_answered(role, command, together):
    ffn, address, config = role()
    codes = []

    def leave_and_return():
        ffn.popen.send_signal(signal.SIGTERM)
        codes.append(ffn.ends(20))
        command("role", config.parent / "f.yaml", "--name", "f", "--listen", address)

    assert answers(config, leave_and_return) == together
    assert codes == [0]
    assert "is leaving" in ffn.lines[-1]


@pytest.mark.parametrize("name", ["a", "f"])
def test_sigterm_ends_an_idle_role_with_code_0(role, name):
    one, _, _ = role(name)
    one.popen.send_signal(signal.SIGTERM)
    assert one.ends(20) == 0
    assert one.lines[-1].endswith("is ready"), "it had nothing to finish and nobody to leave"


def test_sigterm_ends_a_role_that_loads_with_code_0(role):
    one, _, _ = role(wait=False)
    one.says("is loading")
    one.popen.send_signal(signal.SIGTERM)
    assert one.ends(20) == 0


def test_silent_peers_at_the_door_keep_nobody_out(role, together):
    _, address, config = role()
    host, port = address.rsplit(":", 1)
    held = [socket.create_connection((host, int(port))) for _ in range(8)]
    try:
        assert answers(config) == together
    finally:
        for sock in held:
            sock.close()


def test_an_address_that_others_reach_needs_a_key(write_config):
    import sys

    config = write_config(transport__kind="tcp")
    ran = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", "role", config, "--name", "f",
         "--listen", "0.0.0.0:0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "can be reached from other machines: give a key" in ran.stderr
