"""What is asked of every result. Each check is a function that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from step3_hetero.conformance.exam import Check, Exam
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.stage_checks import (
    check_batch_invariance,
    check_composition,
    check_padding,
)
from step3_hetero.conformance.tolerance import finite_pattern, same_bits
from step3_hetero.specs import HostArray


def check_shape(exam: Exam) -> Iterator[str]:
    """Every result is there, with the shape and dtype of the reference's."""
    own = exam.expected.own
    for name in own.keys() - exam.got.keys():
        yield f"{name}: missing"
    for name in own.keys() & exam.got.keys():
        got = exam.got[name]
        if (got.shape, got.dtype) != (own[name].shape, own[name].dtype):
            yield (f"{name}: {got.dtype} {got.shape}, expected {own[name].dtype} {own[name].shape}")


def check_finite(exam: Exam) -> Iterator[str]:
    """Infinities and NaN stand where the reference has them in this dtype, and nowhere else."""
    for name, got, own in _pairs(exam):
        differ = finite_pattern(got) != finite_pattern(own)
        if differ.any():
            place = tuple(int(i) for i in np.argwhere(differ)[0])
            yield (
                f"{name}: {int(differ.sum())} places, first at {place}: {got[place]}, "
                f"expected {own[place]}"
            )


def check_rows(exam: Exam) -> Iterator[str]:
    """No row errs by more than the reference's own rounding explains."""
    for name, judged in exam.judged(exam.got).items():
        yield from _beyond(name, "rows", judged.row_error, judged.row_bound)


def check_elements(exam: Exam) -> Iterator[str]:
    """No element errs by more than the reference's worst element does."""
    for name, judged in exam.judged(exam.got).items():
        yield from _beyond(name, "elements", judged.element_error, judged.element_bound)


def check_zeros(exam: Exam) -> Iterator[str]:
    """Rows that are zero in float64 are exactly zero."""
    for name, got, _ in _pairs(exam):
        want = exam.expected.want[name]
        zero = (want == 0).all(-1) if want.ndim > 1 else want == 0
        wrong = zero & ((got != 0).any(-1) if want.ndim > 1 else got != 0)
        if np.any(wrong):
            yield f"{name}: {int(wrong.sum())} rows should be zero, first {_first(wrong)}"


def check_equal(exam: Exam) -> Iterator[str]:
    """Integers, and results defined to the bit, are equal."""
    for name, own in exam.expected.own.items():
        if name not in exam.got or not (exam.trial.exact or own.dtype.kind in "iub"):
            continue
        keep = exam.counted(name, len(own))
        got = exam.got[name]
        if got.shape == own.shape and not same_bits(got[keep], own[keep]):
            differ = np.nan_to_num(got[keep].astype(float)) != np.nan_to_num(
                own[keep].astype(float)
            )
            yield f"{name}: {int(differ.sum())} values differ, first {_first(differ)}"


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

    A stage is given buffers for its results here. What they hold must be what a plain run returns:
    equal where it is defined to the bit, as good as it elsewhere.
    """
    results, disturbed = exam.fenced
    for name in disturbed:
        yield f"memory beside {name} was written"
    plain = exam.judged(exam.got)
    for name, judged in exam.judged(results).items():
        if name in plain:
            worse = (judged.row_error > judged.row_bound) & (
                plain[name].row_error <= plain[name].row_bound
            )
            if worse.any():
                yield f"{name}: {int(worse.sum())} rows leave their bound between sentinels"
    for name, got in results.items():
        own = exam.expected.own[name]
        if got.shape != own.shape or name not in exam.got:
            continue
        if exam.trial.exact or own.dtype.kind in "iub":
            if not same_bits(got, exam.got[name]):
                yield f"{name}: other values between sentinels than without"
        elif (np.isnan(got.astype(float)) & ~np.isnan(exam.got[name].astype(float))).any():
            yield f"{name}: what lies beside an input was read: NaN between sentinels"


def check_aliasing(exam: Exam) -> Iterator[str]:
    """A result is an array of its own: neither its inputs nor the next call can change it."""
    if not isinstance(exam.trial, OpTrial) or exam.trial.op == "kv_cache":
        return
    for said, after in (
        ("the next call changes it", exam.after_next_call),
        ("it is its input's memory", exam.after_inputs_change),
    ):
        for name, got in after.items():
            if name in exam.got and not same_bits(got, exam.got[name]):
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
        written = np.zeros(own.shape[:2], bool)
        written.reshape(-1)[meta.slots[meta.slots >= 0]] = True
        if not same_bits(got[~written], own[~written]):
            yield f"cache {name}: a row that no slot names was written"
        judged = e.cache_judged(name, got, written)
        yield from _beyond(f"cache {name}", "written rows", judged.row_error, judged.row_bound)


def check_ownership(exam: Exam) -> Iterator[str]:
    """Every result lies in the device's memory."""
    if exam.trial.op == "kv_cache":
        return
    for name, output in exam.outputs.items():
        if not exam.device.owns(output):
            yield f"{name}: a {type(output).__name__} that is not in {exam.device.info.name}"


def check_calls(exam: Exam) -> Iterator[str]:
    """The device did the work: no other backend's code ran, nothing went through the host."""
    trips = exam.trial.op == "kv_cache"
    for said in exam.log.complaints():
        if not (trips and "data leaves" in said):
            yield said


CHECKS: Mapping[str, Check] = MappingProxyType({
    "shape": check_shape,
    "non-finite": check_finite,
    "equal": check_equal,
    "rows": check_rows,
    "elements": check_elements,
    "zeros": check_zeros,
    "determinism": check_determinism,
    "inputs": check_inputs,
    "sentinels": check_sentinels,
    "aliasing": check_aliasing,
    "cache": check_cache,
    "ownership": check_ownership,
    "calls": check_calls,
    "composition": check_composition,
    "padding": check_padding,
    "batch-invariance": check_batch_invariance,
})  # fmt: skip
"""Every check by the name that a finding carries, in the order in which they are asked."""


def _pairs(exam: Exam) -> Iterator[tuple[str, HostArray, HostArray]]:
    """Yield the outputs of real numbers that can be compared: name, got, own."""
    for name, own in exam.expected.own.items():
        got = exam.got.get(name)
        if got is not None and got.shape == own.shape and own.dtype.kind not in "iub":
            yield name, got, own


def _beyond(name: str, what: str, error: HostArray, bound: HostArray) -> Iterator[str]:
    bad = error > bound
    if bad.any():
        parts = np.where(bad, error / np.where(bound > 0, bound, np.finfo(float).tiny), 0)
        place = np.unravel_index(int(np.argmax(parts)), parts.shape)
        yield (
            f"{name}: {int(bad.sum())} of {bad.size} {what} beyond their bound; worst at "
            f"{tuple(map(int, place))}: {error[place]:.3g}, allowed {bound[place]:.3g}"
        )


def _first(mask: HostArray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0]) if mask.ndim else ()
