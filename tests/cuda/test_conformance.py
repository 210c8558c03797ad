"""The suite on the cuda backend's kernels in Triton's interpreter, in this process.

Left out here are sizes at which the interpreter takes a minute and more; ``make cuda-interpreted``
runs them too.
"""

import pytest

from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.suite import select
from step3_hetero.conformance.whole_model import ModelCase

TOO_SLOW = [
    "!contexts=65536",
    "!tokens=10000",
    "!inter=18432",
    "!n=7168",
    "!hidden=7168",
    "!experts=48,top_k=3,hidden",
    "!contexts=128+700+261",
    "!queries=40",
    "!queries=192",
    "!layer[",
    "!stored=float8_e4m3fn,float32",
    "!images=2,side=24",
    "!vocab=128815",
]
SLOW_BUT_TOLD = [
    "attention queries=40 kv_heads=2 bfloat16",
    "attention queries=40 large float32",
    "head_dim=256 contexts=128+700+261 bfloat16",
    "layer[ layer=1 bfloat16",
]


def is_quick(trial):
    """Say whether a case is tried here: stages in float32 alone, where a defect shows best."""
    both = trial.op.endswith("_stage") and trial.dtype == "bfloat16" and "stored" not in trial.id
    return not isinstance(trial, ModelCase) and not both


CASES = [t for t in (*select(TOO_SLOW), *select([*SLOW_BUT_TOLD, "!kv="])) if is_quick(t)]


@pytest.mark.parametrize("trial", CASES, ids=lambda trial: trial.id)
def test_interpreted_kernels_keep_to_what_rounding_explains(trial, cuda):
    result = examine(*cuda, trial)
    said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
    assert result.status == ("passed"), said


def test_every_op_is_tried_here():
    from step3_hetero.ops import OPS

    assert OPS.keys() <= {trial.op for trial in CASES}
