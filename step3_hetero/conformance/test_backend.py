"""The suite as pytest runs it for a vendor: one test a case."""

from __future__ import annotations

import pytest

from step3_hetero.conformance.suite import AnyCase, Workers, apply_gaps


def test_case(
    conformance_case: AnyCase, conformance_workers: tuple[Workers, dict[str, str]]
) -> None:
    """The device keeps to what the reference's rounding allows."""
    pool, gaps = conformance_workers
    (result,) = apply_gaps(list(pool.examine([conformance_case])), gaps)
    said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
    if result.status == "unclaimed":
        pytest.skip(f"not claimed: {said}")
    if result.status == "known gap":
        pytest.xfail(said)
    assert result.status == "passed", f"{result.status}: {said}"
