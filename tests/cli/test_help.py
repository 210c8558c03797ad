"""What ``--help`` promises: an example for each command and bench, with files that are there."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench.__main__ import BENCHES
from bench.__main__ import main as benches
from step3_hetero.cli import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[2]
NOT_FOR_PEOPLE = {"worker", "afd_predict"}
"""Started by a bench, as one side of it."""


def every_command(group=cli, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


def image(word):
    """Say whether a word of an example is a picture to be read (charts are .html there)."""
    return word.endswith(".png")


def examples(text):
    """Return the command lines below ``Examples:``, continued lines joined."""
    part = text.partition("Examples:\n")[2].replace("\\\n", " ")
    return [shlex.split(line) for line in part.splitlines() if re.search(r"step3-hetero ", line)]


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_each_command_has_examples_of_itself_that_parse(path):
    done = CliRunner().invoke(cli, [*path, "--help"], prog_name="step3-hetero")
    own = [line for line in examples(done.output) if line[1 : len(path) + 1] == list(path)]
    assert own, done.output
    for line in examples(done.output):
        words = line[line.index("step3-hetero") + 1 :]
        assert words[0] in COMMANDS
        named = [w for w in words if re.match("examples/|models/", w) or image(w)]
        assert all((ROOT / word).exists() for word in named), named
        parses(cli, words)


def parses(group, words):
    """Hold words against the options of the command that they name, without running it."""
    context = group.make_context(group.name, list(words), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    if isinstance(command, click.Group):
        parses(command, rest)
    else:
        command.make_context(name, rest)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", BENCHES)
def test_each_bench_has_examples_too(name, option):
    done = CliRunner().invoke(importlib.import_module(f"bench.{name}").main, [option])
    assert done.exit_code == 0
    assert f"python -m bench.{name}" in done.output.partition("Examples:")[2]


def test_every_bench_is_listed():
    there = {
        path.stem
        for path in (ROOT / "bench").glob("[a-z]*.py")
        if 'if __name__ == "__main__"' in path.read_text("utf-8")
    }
    assert set(BENCHES) == there - NOT_FOR_PEOPLE
    told = CliRunner().invoke(benches, ["--list"]).output.splitlines()
    assert [line.split()[2] for line in told] == [f"bench.{name}" for name in BENCHES]
    assert len({line.index(what) for line, what in zip(told, BENCHES.values(), strict=True)}) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("memory", ("--backend", "nope"), "no backend 'nope'; installed: "),
        ("planner", ("--generate", "--config", "none.yaml"), "none.yaml: cannot be read"),
        ("planner", ("--json", "none/x.json"), "--json none/x.json: no folder 'none'"),
        ("decode", ("--no-vllm", "--json", "none/x.json"), "--json none/x.json: no folder 'none'"),
        ("gpu", ("--json", "none/x.json"), "--json none/x.json: no folder 'none'"),
    ],
)
def test_a_bench_refuses_in_one_line(name, arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.memory.checkpoint", lambda *_: ROOT / "models/tiny-step3-digits")
    done = CliRunner().invoke(importlib.import_module(f"bench.{name}").main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr and done.stderr.count("\n") == 1
