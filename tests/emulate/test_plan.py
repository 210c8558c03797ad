"""A plan for two vendors, played by a laptop as docs/emulation.md says it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("scipy")
pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "emulation.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.processes]


def commands():
    """Return the commands of the page's section on plans, as lists of words."""
    section = PAGE.split("## Playing a plan")[1].split("\n## ")[0]
    lines = re.findall(r"```\n(.*?)```", section, re.S)[0].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("step3-hetero ")]


def run(words, folder):
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", *words[1:]],
        text=True, capture_output=True, timeout=300, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pages_commands_plan_check_and_answer(tmp_path):
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    plan, check, generate = commands()
    assert (plan[1], check[1], generate[1]) == ("plan", "check", "generate")
    run(plan, tmp_path)
    roles = yaml.safe_load((tmp_path / "plan.yaml").read_text())["roles"]
    assert [(r["backend"], r["card"]) for r in roles.values()] == [
        ("cuda", "h800"), ("ascend", "ascend-910b")
    ]  # fmt: skip
    assert roles["f"]["ep"] > 1 and roles["a"]["tp"] > 1  # so the overrides of degrees are needed
    shown = run(check, tmp_path)
    assert "h800 emulated on cpu:0" in shown and "ascend-910b emulated on cpu:0" in shown
    assert "this build cannot run" not in shown
    assert "</think> 7" in run(generate, tmp_path)
