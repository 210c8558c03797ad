"""``generate`` that is asked to end: its roles end, one line is said, a code tells by what."""

import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from afd.leaks import marked

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

ENDLESS = ("--prompt-ids", "21,22", "--max-tokens", "200000", "--ignore-eos")
SAID = {signal.SIGTERM: (143, "stopped by SIGTERM"), signal.SIGINT: (130, "stopped")}
EITHER = pytest.mark.parametrize("number", SAID, ids=lambda n: n.name)


def ended(run, number):
    """Wait for the end; hold its code and its words."""
    code, line = SAID[number]
    assert run.ends(30) == code
    words = [said for said in run.lines if said and not said.startswith("metrics at")]
    assert words == [line]


def generating(command, config, **options):
    run = command("generate", config, *ENDLESS, "--metrics-port", 0, **options)
    page = run.says("metrics at").split()[-1]
    until = time.monotonic() + 60
    while tokens_seen(page) < 5:  # in the midst of its tokens
        assert time.monotonic() < until
        time.sleep(0.02)
    return run


def tokens_seen(page):
    with urllib.request.urlopen(page, timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r'stage_seconds_count\{.*stage="sample".*\} (\S+)', text)
    return float(found[1]) if found else 0


@EITHER
@pytest.mark.parametrize("kind", ["shm", "tcp", "inproc"])
def test_it_ends_its_roles_while_it_generates(command, write_config, no_leaks, number, kind):
    run = generating(command, write_config(transport__kind=kind))
    roles = [pid for pid in marked(no_leaks.mark) if pid != run.popen.pid]
    assert len(roles) == (0 if kind == "inproc" else 2)
    run.popen.send_signal(number)
    ended(run, number)
    assert marked(no_leaks.mark) == []  # at once: they were waited for


@EITHER
def test_it_ends_its_roles_while_they_load(command, write_config, no_leaks, number):
    run = command("generate", write_config(), *ENDLESS)
    until = time.monotonic() + 60
    while len(marked(no_leaks.mark)) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
    run.popen.send_signal(number)
    ended(run, number)
    assert marked(no_leaks.mark) == []


@EITHER
def test_one_process_ends_alike(command, write_config, number):
    run = generating(command, write_config(runtime__processes="one"))
    run.popen.send_signal(number)
    ended(run, number)


def test_a_role_that_is_stopped_does_not_keep_it(command, write_config, no_leaks, stopped):
    run = generating(command, write_config())
    (role,) = [pid for pid in marked(no_leaks.mark) if b"--name\0f\0" in _arguments(pid)]
    with stopped(role):
        run.popen.send_signal(signal.SIGTERM)
        ended(run, signal.SIGTERM)
    assert marked(no_leaks.mark) == []


def _arguments(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_sigterm_again_while_the_roles_end_disturbs_nothing(command, write_config, no_leaks):
    run = generating(command, write_config())
    for _ in range(3):
        run.popen.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    ended(run, signal.SIGTERM)
    assert marked(no_leaks.mark) == []
