"""The example placements: the released model checked, its twin answering."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "step3_hetero.cli", *map(str, arguments)],
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_released_model_fits_its_cards():
    report = json.loads(run("check", EXAMPLES / "h800_attention_910b_ffn.yaml", "--json"))
    cards = [role for role in report["roles"] if role["backend"] == "ascend"]
    assert len(cards) == 6
    made = [role["requantised"] for role in cards]
    assert {(m["stored"], m["to"]) for m in made} == {("bfloat16", "int8")}
    assert sum(m["tensors"] for m in made) == 56 * 6
    assert all(r["weight_bytes"] + r["kv_bytes"] <= r["memory_bytes"] == 64e9 for r in cards)
    edges = sum(c["edges"] for c in report["crossing"] if c["kind"] == "A2F")
    assert edges == 56


def test_twin_reads_a_digit():
    picture = EXAMPLES / "digits" / "7_held-out_0007.png"
    said = run("generate", EXAMPLES / "h800_attention_910b_ffn_stand_in.yaml",
               "--prompt", "which digit is this ?", "--image", picture)  # fmt: skip
    assert "</think> 7" in said
