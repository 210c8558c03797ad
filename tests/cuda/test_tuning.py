"""The table of configurations and its search, with made-up times in a card's place."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from triton.runtime.errors import OutOfResources, PTXASError

from step3_hetero.backends.cuda import tuning
from step3_hetero.backends.cuda.configurations import TABLE, configuration, read, table, write
from step3_hetero.cli import cli
from step3_hetero.errors import ConfigError, PlacementError

ENTRY = configuration("gemm", arch=90, numbers="e4m3", size=64)


def test_entry_is_the_first_that_is_large_enough():
    assert configuration("gemm", arch=90, numbers="bfloat16", size=16).largest == 16
    assert configuration("gemm", arch=90, numbers="bfloat16", size=17).largest == 64
    assert configuration("rms_norm", arch=90, numbers="any", size=7168).largest == 8192


def test_newer_card_takes_the_newest_entries_that_it_can_run():
    assert configuration("attend", arch=100, numbers="bfloat16", size=256).arch == 90
    assert configuration("attend", arch=89, numbers="bfloat16", size=256).arch == 80


def test_missing_entry_is_told_with_those_there_are():
    with pytest.raises(ConfigError, match=r"gemm in float16 at size 5 for sm_90; .*\('gemm', 80"):
        configuration("gemm", arch=90, numbers="float16", size=5)


def test_a_format_is_not_looked_for_on_a_card_without_it():
    with pytest.raises(ConfigError, match="e4m3 x e4m3"):
        configuration("gemm", arch=80, numbers="e4m3 x e4m3", size=5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("[", "no table of configurations"),
        ('{"configurations": [{"kernel": "gemm"}]}', "no table of configurations"),
    ],
)
def test_damaged_table_is_refused_with_its_form(tmp_path, text, said):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read(path)


def test_written_table_reads_back_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "table.json"
    write(path, table(), {"card": "none"})
    assert read(path) == read(TABLE)
    assert json.loads(path.read_text())["measured"] == {"card": "none"}
    assert list(tmp_path.iterdir()) == [path]


def test_shipped_table_says_that_it_was_not_timed():
    assert json.loads(TABLE.read_text())["measured"]["card"] is None


def test_quickest_candidate_is_found():
    wanted = replace(ENTRY, num_warps=8, num_stages=2)
    found, seconds = tuning.best(ENTRY, lambda c: 1.0 if c == wanted else 2.0)
    assert (found, seconds) == (wanted, 1.0)


def test_entry_stays_where_nothing_is_quicker_or_nothing_runs():
    assert tuning.best(ENTRY, lambda _: 1.0) == (ENTRY, 1.0)
    assert tuning.best(ENTRY, lambda _: float("inf"))[0] == ENTRY


def test_candidates_keep_rows_and_divide_a_block_of_scales():
    found = list(tuning.candidates(ENTRY))
    assert found[0] == ENTRY
    assert len(set(found)) == len(found) > 20
    for one in found:
        assert one.block("BLOCK_M") == ENTRY.block("BLOCK_M")
        assert 128 % one.block("BLOCK_N") == 128 % one.block("BLOCK_K") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_tuning_without_a_card_is_refused_and_writes_nothing(tmp_path):
    asked = ["tune", "--backend", "cuda", "--out", str(tmp_path / "t.json")]
    done = CliRunner().invoke(cli, asked)
    assert isinstance(done.exception, PlacementError)
    assert "tuning times kernels on one" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_backend_without_kernels_to_tune_is_refused(tmp_path):
    done = CliRunner().invoke(cli, ["tune", "--backend", "cpu", "--out", str(tmp_path / "t.json")])
    assert isinstance(done.exception, ConfigError)
    assert "'cpu' has nothing to tune" in str(done.exception)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H800")


def test_what_was_found_so_far_is_kept_when_the_search_is_broken_off(card, tmp_path, monkeypatch):
    """The search takes most of an hour."""
    path, said = tmp_path / "t.json", []

    def timer(entry, arch):
        if len(said) == 2:
            raise KeyboardInterrupt
        return lambda one: 1.0 if one.num_stages == 4 else 2.0

    monkeypatch.setattr(tuning, "_timer", timer)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(path, said.append)
    found, before = read(path), read(TABLE)
    assert len(found) == len(before)
    changed = [i for i, (a, b) in enumerate(zip(found, before, strict=True)) if a != b]
    assert len(changed) == len(said) == len(json.loads(path.read_text())["measured"]["seconds"])
    assert all(found[i].num_stages == 4 for i in changed)


@pytest.mark.parametrize("error", [OutOfResources(1, 0, "shared memory"), PTXASError("spilled")])
def test_candidate_that_does_not_fit_is_passed_over(error, monkeypatch):
    def work(entry, arch):
        def call(configuration):
            raise error

        return call

    monkeypatch.setattr(tuning, "_product", work)
    assert tuning._timer(ENTRY, 90)(ENTRY) == float("inf")
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning._timer(ENTRY, 90)(ENTRY)
