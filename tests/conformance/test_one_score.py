"""``tools/one_score.py``: draws the cases of decision 0013 again, and sees what it is to count."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

TOOL = Path(__file__).resolve().parents[2] / "tools" / "one_score.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("one_score", TOOL)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_it_counts_cases_beyond_either_bound(tool, monkeypatch):
    asked = ["--draws", "2"]
    said = CliRunner().invoke(tool.main, asked, catch_exceptions=False).output
    assert said.startswith("cpu, 24 wide: of 4 cases ") and "0 beyond that of 0013" in said
    monkeypatch.setattr(
        tool, "host_results", lambda device, found: {"out": device.to_host(found["out"]) * 1.001}
    )
    said = CliRunner().invoke(tool.main, asked, catch_exceptions=False).output
    assert "4 beyond the bound of 0009, 4 beyond that of 0013" in said


def test_other_seeds_are_other_draws(tool):
    trial = tool.chosen(False)[0]
    one, other = (
        tool.FORMS[trial.op].draw(trial.case, np.random.default_rng(seed)) for seed in (0, 1)
    )
    assert not np.array_equal(one.arrays["q"], other.arrays["q"])
    assert [len(tool.chosen(wide)) for wide in (False, True)] == [2, 2]
