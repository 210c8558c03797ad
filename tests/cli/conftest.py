"""The command line in this process: as a shell calls it, without the seconds of a new Python."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.cli import main

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
TINY = ROOT / "models" / "tiny-step3-digits"


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line with some arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["step3-hetero", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def succeed(run):
    """Call the command line and demand that it did well, without a word on stderr."""

    def succeed(*arguments):
        ran = run(*arguments)
        assert (ran.code, ran.err) == (0, "")
        return ran

    return succeed


@pytest.fixture
def digits():
    """Return the example config: a tiny model, attention on cpu, experts on reference."""
    return DIGITS


@pytest.fixture
def seven():
    """Return a picture of a handwritten 7 that the model never saw."""
    return ROOT / "examples" / "digits" / "7_held-out_0007.png"


@pytest.fixture
def model(tmp_path):
    """Return a small random text checkpoint in two files, to be damaged."""
    return write_checkpoint(tmp_path / "model", shards=2)


@pytest.fixture
def config(tmp_path):
    """Write a config over ``model``; other keys replace roles, or join the top."""

    def config(model, **keys):
        stages = ["embed", "vision", "attention", "head"]
        roles = {
            "a": {"stages": stages, "backend": "cpu"},
            "f": {"stages": ["ffn"], "backend": "cpu"},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.dump({"version": 1, "model": str(model), "roles": roles, **keys}))
        return path

    return config


def tree(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


@pytest.fixture
def refuse(run, tmp_path):
    """Call the command line; return the one line with which it refuses."""

    def refuse(*arguments):
        before = tree(tmp_path)
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
        assert tree(tmp_path) == before
        return ran.err

    return refuse


@pytest.fixture
def files():
    """Return a folder's files with their bytes."""
    return tree
