"""``bench.transport`` without the library that it compares with: one line, and the other rows."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import transport

ROWS = (
    "memcpy", "shm", "tcp", "cards, one by one", "cards, in pieces",
    "bare shared memory", "bare tcp", "bare socketpair", "multiprocessing pipe",
)  # fmt: skip


@pytest.mark.parametrize("is_there", [True, False])
def test_rows_of_pyzmq_are_left_out_where_it_is_not_installed(monkeypatch, capsys, is_there):
    monkeypatch.setattr(transport, "find_spec", lambda name: is_there or None)
    found = set(transport.sides("/nowhere"))
    assert found == {*ROWS, *(("pyzmq tcp", "pyzmq ipc") if is_there else ())}
    said = capsys.readouterr()
    line = "no pyzmq here, its rows are left out: pip install 'step3-hetero[bench]'\n"
    assert (said.out, said.err) == ("", "" if is_there else line)


def test_the_command_measures_what_is_left(monkeypatch):
    monkeypatch.setattr(transport, "find_spec", lambda name: None)
    monkeypatch.setattr(transport, "measure", lambda sides, trips: [
        {"side": name, "median_us": 1.0, "p10_us": 1.0, "p99_us": 1.0} for name in sides
    ])  # fmt: skip
    monkeypatch.setattr(transport, "_stay", lambda core: None)
    ran = CliRunner().invoke(transport.main, ["--trips", "1"])
    assert ran.exit_code == 0, ran.output
    told = [line for line in ran.stdout.splitlines() if line.startswith(ROWS)]
    assert [line[:22].strip() for line in told] == list(ROWS)


def test_the_extra_that_is_named_is_there():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert 'bench = ["pyzmq' in text
