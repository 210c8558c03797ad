"""Nothing that a test of processes starts may outlive it."""

import gc
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from afd.leaks import MARK, Before
from afd.played import CONTRACT, FRAME, ONE, TRANSPORT

from step3_hetero.afd.front import ProcessExecutor
from step3_hetero.afd.link import Link
from step3_hetero.specs import Limits

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
TINY = ROOT / "models" / "tiny-step3-digits"


@pytest.fixture
def no_leaks(monkeypatch):
    """Fail the test if a process, socket, descriptor or segment of shared memory is left."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    gc.collect()
    before = Before(mark)
    yield before
    gc.collect()
    left = before.wait()
    for entry in left:
        if entry.startswith("process "):
            os.kill(int(entry.split()[1]), signal.SIGKILL)
    assert not left


@pytest.fixture
def write_config(tmp_path):
    """Write the digits' config with other keys; dotted names override."""

    def write(name="run.yaml", **keys):
        values = yaml.safe_load(DIGITS.read_text())
        values["model"] = str(TINY)
        values["roles"]["f"]["backend"] = "cpu"
        values["runtime"] |= {"processes": "per-role", "batch_invariant": True}
        for key, value in keys.items():
            place = values
            *path, last = key.split("__")
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


class Standing:
    """A command of ours that runs on; its lines are kept."""

    def __init__(self, *arguments, prefix=(), **options):
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-m", "step3_hetero.cli", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        self.lines, self.out = [], []
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.popen.stderr, self.lines), (self.popen.stdout, self.out))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream, lines):
        with stream:
            for line in stream:
                lines.append(line.rstrip("\n"))

    def says(self, text, deadline_s=120.0, *, after=0):
        """Wait for a line that holds ``text``; return it."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            is_over = not any(thread.is_alive() for thread in self._threads)  # all has been read
            found = [line for line in [*self.lines, *self.out][after:] if text in line]
            if found:
                return found[0]
            assert not is_over, self.lines
            time.sleep(0.05)
        raise AssertionError(f"no {text!r} within {deadline_s} s: {self.lines} {self.out}")

    def ends(self, deadline_s=60.0):
        """Wait for its end; return its code."""
        code = self.popen.wait(deadline_s)
        for thread in self._threads:
            thread.join(10)
        return code

    def facts(self):
        """Return the JSON objects that it printed, one a line."""
        return [json.loads(line) for line in list(self.out)]


@pytest.fixture
def command():
    """Run a command of ours in the background; it is killed at the end."""
    started = []

    def start(*arguments, **options):
        started.append(Standing(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
        one.ends()


@pytest.fixture
def stopped():
    """Stop a process and let it go on at the end, whatever happens between."""

    @contextmanager
    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # it may have been killed meanwhile
                os.kill(pid, signal.SIGCONT)

    return stop


@pytest.fixture
def front():
    """Start a front over played roles: by default one attention instance."""
    made = []

    def start(stage, members=ONE, microbatches=2, **counts):
        made.append(
            ProcessExecutor(
                members, counts or {"a": 1}, stage,
                lambda name, address: Link(TRANSPORT.connect(address, FRAME, 2), name),
                CONTRACT, Limits(8, 8, 8), 4, microbatches, 2.0,
            )
        )  # fmt: skip
        return made[-1]

    yield start
    while made:  # a channel of this transport goes with the last who knows it
        made.pop().close()
