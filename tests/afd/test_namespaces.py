"""Attention and FFN in two network namespaces, joined by a pair of virtual cables, with a key."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEVEN = ROOT / "examples" / "digits" / "7_held-out_0007.png"
A, F = "10.213.77.1", "10.213.77.2"

pytest.importorskip("torch")


def _why_not():
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no ip command on this machine"
    name = f"s3h-try-{secrets.token_hex(3)}"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"no network namespace to be had: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


WHY_NOT = _why_not()
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]


class Namespaces:
    """Two namespaces; nothing leads out of them but the cable between them."""

    def __init__(self):
        token = secrets.token_hex(3)
        self.a, self.f = f"s3h-a-{token}", f"s3h-f-{token}"
        self.cable = f"s3h{token}"
        for name in (self.a, self.f):
            _ip("netns", "add", name)
        try:
            ends = (f"{self.cable}a", f"{self.cable}f")
            _ip("-n", self.a, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1],
                "netns", self.f)  # fmt: skip
            for name, end, address in zip((self.a, self.f), ends, (A, F), strict=True):
                _ip("-n", name, "address", "add", f"{address}/30", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def cut(self):
        _ip("-n", self.a, "link", "set", f"{self.cable}a", "down")

    def heal(self):
        _ip("-n", self.a, "link", "set", f"{self.cable}a", "up")

    def close(self):
        for name in (self.a, self.f):
            _ip("netns", "delete", name)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def apart(no_leaks):
    namespaces = Namespaces()
    yield namespaces
    namespaces.close()


@pytest.fixture
def ffn(apart, command, write_config, tmp_path):
    """Start an FFN role in a namespace of its own; return the config of a front in the other."""
    key = tmp_path / "key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    transport = {"transport__kind": "tcp", "transport__key_file": "key"}
    role = write_config("role.yaml", **transport)
    within = ("ip", "netns", "exec", apart.f)
    listen = ("--listen", f"{F}:7001")
    one = command("role", role, "--name", "f", *listen, prefix=within)
    one.says("is ready")
    assert one.lines[0] == f"f:0 listens at {F}:7001"
    return write_config("front.yaml", **transport, roles__f__hosts=[f"{F}:7001"])


ASK = ("--prompt", "which digit is this ?", "--image", str(SEVEN))


def test_digits_are_read_across_two_namespaces(apart, command, ffn):
    front = command("generate", ffn, *ASK, prefix=("ip", "netns", "exec", apart.a))
    assert front.ends(120) == 0
    assert front.out == ["</think> 7"]


def test_the_namespaces_have_no_other_way(apart):
    """What the test above shows would be nothing if the host's own network were in between."""
    for name, mine, theirs in ((apart.a, A, F), (apart.f, F, A)):
        routes = subprocess.run(
            ["ip", "-n", name, "route"], capture_output=True, text=True, check=True
        ).stdout
        assert "default" not in routes and mine in routes and theirs not in routes


def test_a_peer_with_another_key_is_refused(apart, command, ffn):
    (ffn.parent / "key").write_text(secrets.token_hex(32))
    front = command("generate", ffn, *ASK, prefix=("ip", "netns", "exec", apart.a))
    assert front.ends(120) == 2
    assert re.search(rf"f:0 at {F}:7001: the peer .* the key", front.lines[-1])


TOKENS = """
import sys, time
from step3_hetero import SamplingParams, load
count, times = 0, []
def on_token(token):
    global count
    count += 1
    if count == 20:
        print("twenty", flush=True)
        sys.stdin.readline()
    times.append(time.monotonic())
with load(sys.argv[1]) as engine:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    print(engine.generate([21, 22, 23], params, on_token=on_token).token_ids)
print(max(b - a for a, b in zip(times[19:], times[20:])))
"""


def test_a_cut_and_healed_cable_costs_time_and_no_token(apart, ffn, tmp_path):
    script = tmp_path / "tokens.py"
    script.write_text(TOKENS)
    within = ["ip", "netns", "exec", apart.a, sys.executable, str(script), str(ffn)]

    def tokens(disturbance):
        front = subprocess.Popen(within, stdin=-1, stdout=-1, text=True)
        try:
            assert front.stdout.readline() == "twenty\n"
            with disturbance():  # it is cut before the next token is asked for
                front.stdin.write("go on\n")
                front.stdin.flush()
            said, _ = front.communicate(timeout=200)
        finally:
            front.kill()
            front.wait()
        told, gap_s = said.splitlines()
        return told, float(gap_s)

    @contextmanager
    def cut():
        apart.cut()
        yield
        time.sleep(6)  # three deadlines: both ends have given each other up
        apart.heal()

    undisturbed, _ = tokens(nullcontext)
    told, gap_s = tokens(cut)
    assert told == undisturbed
    assert gap_s > 3, "the cut was not felt"
