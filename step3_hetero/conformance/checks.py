"""What is asked of every result. Each check is a function that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from step3_hetero.conformance.exam import Check, Exam
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.stage_checks import (
    check_batch_invariance,
    check_composition,
    check_padding,
    check_reuse,
)
from step3_hetero.conformance.tolerance import same_bits
from step3_hetero.conformance.verdicts import ASPECTS, Aspect, beyond, held


def _plain(aspect: Aspect, exam: Exam) -> Iterator[str]:
    """Ask one aspect of the plain run."""
    for name, said in aspect(exam, exam.got):
        yield f"{name}: {said}"


def check_determinism(exam: Exam) -> Iterator[str]:
    """A second run gives the same bits."""
    for name, again in exam.again.items():
        if name in exam.got and not same_bits(again, exam.got[name]):
            yield f"{name}: a second run with the same inputs gives other bits"


def check_inputs(exam: Exam) -> Iterator[str]:
    """The inputs are as they were; the residual x alone is given away."""
    for name, after in exam.arrays_after.items():
        if name not in exam.trial.donated and not same_bits(after, exam.inputs.arrays[name]):
            yield f"input {name} was changed"


def check_sentinels(exam: Exam) -> Iterator[str]:
    """Nothing beside an array is read or written: NaN around it neither spreads nor changes.

    A stage is given buffers for its results here. What they hold is as good as a plain run's.
    """
    results, disturbed = exam.fenced
    for name in disturbed:
        yield f"memory beside {name} was written"
    yield from held(exam, results, "between sentinels")
    for name, got in results.items():
        plain = exam.got.get(name)
        if plain is None or plain.shape != got.shape:
            continue
        if exam.trial.exact or got.dtype.kind in "iub":
            if not same_bits(got, plain):
                yield f"{name}: other values between sentinels than without"
        elif (np.isnan(got.astype(float)) & ~np.isnan(plain.astype(float))).any():
            yield f"{name}: what lies beside an input was read: NaN between sentinels"


def check_aliasing(exam: Exam) -> Iterator[str]:
    """A result is an array of its own: neither its inputs nor the next call can change it."""
    if not isinstance(exam.trial, OpTrial) or exam.trial.op == "kv_cache":
        return
    changed = set()
    for said, after in (
        ("the next call changes it", exam.after_next_call),
        ("it is its input's memory", exam.after_inputs_change),
    ):
        for name, got in after.items():
            alike = name not in exam.got or same_bits(got, exam.got[name])
            if not alike and name not in changed:
                changed.add(name)
                yield f"{name}: {said}"


def check_cache(exam: Exam) -> Iterator[str]:
    """The cache holds the new rows at their slots and is untouched everywhere else."""
    meta, after, e = exam.inputs.meta, exam.cache_after, exam.expected
    if after:
        fresh = exam.device.open_cache(exam.placed.cache.spec)
        if any(np.any(x != 0) for x in fresh.read(range(fresh.spec.blocks))):
            yield "a cache that was just opened is not zero"
    if exam.trial.exact or meta is None:
        return
    for name, got in after.items():
        own = e.cache[name]
        written = meta.named_slots(len(own))
        if not same_bits(got[~written], own[~written]):
            yield f"cache {name}: a row that no slot names was written"
        judged = e.cache_judged(name, got, written)
        for said in beyond("written rows", judged.row_error, judged.row_bound):
            yield f"cache {name}: {said}"


def check_ownership(exam: Exam) -> Iterator[str]:
    """Every result of every run lies in the device's memory."""
    if exam.trial.op == "kv_cache":
        return
    assert exam.got is not None
    told = set()
    for run in exam.runs:
        for name, kind in run.elsewhere.items():
            if name not in told:
                told.add(name)
                yield f"{name}{_way(run.how)}: a {kind} that is not in {exam.device.info.name}"


def check_calls(exam: Exam) -> Iterator[str]:
    """The device did the work of every run: no other backend's code, no way through the host."""
    may_travel = exam.trial.op == "kv_cache"
    assert exam.got is not None
    told = set()
    for run in exam.runs:
        for said in run.log.complaints():
            if said not in told and not (may_travel and "data leaves" in said):
                told.add(said)
                yield f"{said}{_way(run.how)}"


def _way(how: str) -> str:
    return f" ({how})" if how else ""


CHECKS: Mapping[str, Check] = MappingProxyType({
    **{name: partial(_plain, aspect) for name, aspect in ASPECTS.items()},
    "determinism": check_determinism,
    "inputs": check_inputs,
    "sentinels": check_sentinels,
    "aliasing": check_aliasing,
    "cache": check_cache,
    "composition": check_composition,
    "padding": check_padding,
    "reuse": check_reuse,
    "batch-invariance": check_batch_invariance,
    "ownership": check_ownership,
    "calls": check_calls,
})  # fmt: skip
"""Every check by the name that a finding carries, in the order in which they are asked: the last
two look at the runs that the others have made."""
