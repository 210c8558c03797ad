"""Every defect of the list is found; the same case passes without it."""

import importlib
import importlib.util
from pathlib import Path

import pytest

from cuda.mutants import MUTANTS
from step3_hetero.backends.cuda import attention, linear, moe, norm, rope, rows, vision
from step3_hetero.conformance.checks import CHECKS
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.forms import OpTrial

FOLDER = Path(attention.__file__).parent / "kernels"
USES = {
    "attention": [(attention, "kernels")],
    "norm": [(norm, "kernels")],
    "rope": [(rope, "kernels"), (attention, "rope_kernels")],
    "rows": [(rows, "kernels"), (vision, "kernels"), (moe, "row_kernels")],
    "moe": [(moe, "kernels")],
    "gemm": [(linear, "kernels")],
    "numbers": [],
}
"""Which launcher knows a kernel file by which name."""

RESULTS = {n: CHECKS[n] for n in ("shape", "non-finite", "equal", "rows", "elements", "zeros")}
"""The checks of one run's results: what is wrong in a kernel shows in them."""


def mutated(mutant, folder):
    """Return a kernel file's module with the defect in it.

    Raises:
        AssertionError: the text to be replaced does not stand there exactly once or more.
    """
    source = (FOLDER / f"{mutant.file}.py").read_text(encoding="utf-8")
    assert mutant.old in source, f"{mutant.file}.py has no {mutant.old!r}: renew the list"
    path = folder / f"{mutant.file}_mutant.py"
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"mutant_{mutant.file}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def seeded(monkeypatch, tmp_path):
    """Put a mutant's kernels in the place of the real ones until the test ends."""

    def seed(mutant):
        module = mutated(mutant, tmp_path)
        for launcher, name in USES[mutant.file]:
            monkeypatch.setattr(launcher, name, module)
        if mutant.file == "numbers":
            for user in ("rows", "rope", "gemm", "attention"):
                kernels = importlib.import_module(f"step3_hetero.backends.cuda.kernels.{user}")
                for name in ("encode_e4m3", "decode_e4m3", "nearest_integer"):
                    if hasattr(kernels, name):
                        monkeypatch.setattr(kernels, name, getattr(module, name))

    return seed


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_defect_is_found(mutant, seeded, cuda):
    trial = OpTrial(mutant.case)
    seeded(mutant)
    assert examine(*cuda, trial, RESULTS).status == "failed"


@pytest.mark.parametrize("case", sorted({m.case for m in MUTANTS}, key=str), ids=str)
def test_case_passes_without_the_defect(case, cuda):
    found = examine(*cuda, OpTrial(case), RESULTS)
    assert found.status == "passed", found.findings


def test_list_is_long_enough():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15
