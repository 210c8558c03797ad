"""The clean twin passes every quick case; every seeded defect is caught, under the right name."""

import pytest

from meta import (
    defects_attention,
    defects_contract,
    defects_formats,
    defects_products,
    defects_rows,
    defects_stages,
)
from meta.twin import Twin, failing, quick_trials
from step3_hetero.conformance.exam import examine
from step3_hetero.ops import OPS

DEFECTS = (
    *defects_rows.DEFECTS,
    *defects_products.DEFECTS,
    *defects_attention.DEFECTS,
    *defects_stages.DEFECTS,
    *defects_contract.DEFECTS,
    *defects_formats.DEFECTS,
)

EVERYWHERE = ("route: sigmoid for softmax", "rope: pairs for halves")
"""Defects that meet every case: op cases must fail under their own op's name alone."""


@pytest.fixture(scope="module")
def clean():
    backend = Twin()
    device = backend.open(0)
    return [examine(backend, device, trial) for trial in quick_trials()]


def test_clean_twin_passes_every_quick_case(clean):
    assert {r.dtype for r in clean} == {"float32", "bfloat16"}
    assert not [(r.id, r.reason, r.findings) for r in clean if r.status != "passed"]


def test_there_are_many_defects_for_every_op_and_no_two_alike():
    names = [str(defect) for defect in DEFECTS]
    assert len(set(names)) == len(names) >= 35
    assert {d.op for d in DEFECTS} >= {*OPS, "kv_cache"}
    assert set(EVERYWHERE) <= set(names)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_defect_is_caught_by_cases_of_its_op(defect):
    if "another backend" in defect.what:
        pytest.importorskip("torch")
    found = next(failing(defect, quick_trials(defect.op)), None)
    assert found is not None, f"no case of {defect.op} fails"
    assert found.findings
    assert found.id.startswith(f"{defect.op}[")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_defect_of_a_kernel_fails_no_other_op(name):
    (defect,) = (d for d in DEFECTS if str(d) == name)
    failed = {r.op for r in failing(defect, quick_trials())}
    assert defect.op in failed
    assert failed & {*OPS, "kv_cache"} == {defect.op}
    assert failed - {defect.op}, "a whole stage built of the kernel should fail too"
