"""The quick suite on cpu, in this process: what every change has to keep."""

import pytest

from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.suite import select
from step3_hetero.conformance.whole_model import ModelCase


@pytest.mark.parametrize("trial", select(), ids=lambda trial: trial.id)
def test_cpu_keeps_to_what_rounding_explains(trial, cpu):
    backend, device = cpu
    one_model = isinstance(trial, ModelCase)
    result = trial.examine(backend, device) if one_model else examine(backend, device, trial)
    said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
    assert result.status == "passed", said
