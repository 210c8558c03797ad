"""The way to a role that stands, measured, and kept in a profile; what it must not cost."""

import json
import subprocess
import sys

import pytest

from step3_hetero import load
from step3_hetero.afd.doorman import Doorman
from step3_hetero.afd.drain import Drain
from step3_hetero.afd.echo import measure_link
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.placement.profile_file import Profile
from step3_hetero.transport.registry import get_transport

pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

FRAME = limits(1 << 22)
CONTRACT = {"protocol": 1}


@pytest.fixture
def door():
    """Return an idle role's doorman over tcp, and what connects to it."""
    transport = get_transport("tcp")
    listener = transport.listen("", FRAME)
    doorman = Doorman("f:0", CONTRACT, listener)
    links = []

    def connect():
        links.append(Link(transport.connect(listener.address, FRAME, 5), "f:0"))
        return links[-1]

    def front():
        link, traced = doorman.front(Drain(0.0), 5)
        links.append(link)
        return traced

    doorman.served = front
    yield doorman, connect
    for link in links:
        link.close()
    doorman.close()
    listener.close()


def hello(link, name="the front", **said):
    link.send(Kind.HELLO, said={"contract": CONTRACT, "from": name, **said})
    return link


def test_a_link_is_measured_in_both_of_its_figures(door):
    _, connect = door
    measured = measure_link(connect(), 1 << 22)
    assert 0 < measured.message_s < 0.1
    assert 1e7 < measured.bytes_per_s < 1e12
    small = measure_link(connect(), 1 << 12)
    assert small.nbytes == 1 << 12


def test_what_is_echoed_is_what_was_sent(door):
    import numpy as np

    _, connect = door
    link, sent = connect(), np.arange(1000, dtype=np.int32)
    link.send(Kind.ECHO, 7, arrays={"x": sent})
    answer = link.wants(Kind.ECHO, 5)
    assert answer.seq == 7
    np.testing.assert_array_equal(answer.arrays["x"], sent)


def test_a_role_with_a_front_does_not_echo(door):
    doorman, connect = door
    front = hello(connect())
    front.wants(Kind.AGREED, 5)
    assert doorman.served() is False
    with pytest.raises(EdgeMismatch, match="f:0 serves a front; measure when it is idle"):
        measure_link(connect(), 1 << 12)
    doorman.front_left()
    assert measure_link(connect(), 1 << 12).message_s > 0


def test_a_caller_without_a_front_is_refused_and_one_with_is_let_in(door):
    doorman, connect = door
    with pytest.raises(RoleLost, match="f:0 has no front now"):
        hello(connect(), "a:0").wants(Kind.AGREED, 5)
    hello(connect(), traced=True).wants(Kind.AGREED, 5)
    assert doorman.served() is True
    hello(connect(), "a:0").wants(Kind.AGREED, 5)
    assert doorman.caller().name == "a:0"
    assert doorman.caller() is None


@pytest.mark.parametrize(
    "said",
    [{}, {"from": "a:0"}, {"contract": 5, "from": "a:0"}, {"contract": [], "from": "a:0"},
     {"contract": {"protocol": 2}, "from": "a:0"}],
)  # fmt: skip
def test_a_greeting_that_is_none_costs_that_connection_alone(door, said):
    _, connect = door
    bad = connect()
    bad.send(Kind.HELLO, said=said)
    with pytest.raises((RoleLost, EdgeMismatch)):
        bad.wants(Kind.AGREED, 5)
    hello(connect()).wants(Kind.AGREED, 5)


def test_profile_writes_the_link_to_a_role_that_stands(command, write_config, tmp_path):
    pytest.importorskip("torch")
    config = write_config(transport__kind="tcp")
    role = command("role", config, "--name", "f", "--listen", "127.0.0.1:0")
    address = role.says("listens at").split()[-1]
    role.says("is ready")
    out = tmp_path / "cpu.yaml"
    empty = Profile("cpu", {"name": "cpu:0", "card": None}, "float32", 1e9, 1e9, 1e-6, (), ())
    empty.write(out)

    def profile(*more):
        edge = ["profile", "--edge", address, "--config", str(config), *more]
        return subprocess.run(
            [sys.executable, "-m", "step3_hetero.cli", *edge],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    told = profile("--json", "--out", str(out))
    assert told.returncode == 0
    links, said = Profile.read(out).links, json.loads(told.stdout)
    assert links.peers == (address,) == tuple(said["peers"])
    assert (links.bytes_per_s, links.message_s) == (said["bytes_per_s"], said["message_s"])
    assert Profile.read(out).bandwidth_bytes_per_s == 1e9

    missing = profile("--out", str(tmp_path / "none.yaml"))
    assert missing.returncode == 2 and "no profile there" in missing.stderr
    front = write_config("front.yaml", transport__kind="tcp", roles__f__hosts=[address])
    with load(front):
        busy = profile()
    assert busy.returncode == 2 and "f:0 serves a front" in busy.stderr
