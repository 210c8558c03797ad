"""What may be wrong with the results of a run: each aspect names outputs and says what.

The checks ask the aspects of the plain run, each under its own name; ``held`` asks all of them of
any other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from step3_hetero.conformance.exam import Exam
from step3_hetero.conformance.tolerance import finite_pattern, same_bits
from step3_hetero.conformance.trial import Results
from step3_hetero.specs import HostArray

Aspect = Callable[[Exam, Results], Iterator[tuple[str, str]]]
"""Looks at results and yields the name of an output and what is wrong with it."""


def shape(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """Every result is there, with the shape and dtype of the reference's."""
    for name, own in exam.expected.own.items():
        got = results.get(name)
        if got is None:
            yield name, "missing"
        elif (got.shape, got.dtype) != (own.shape, own.dtype):
            yield name, f"{got.dtype} {got.shape}, expected {own.dtype} {own.shape}"


def finite(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """Infinities and NaN stand where the reference has them in this dtype, and nowhere else."""
    for name, got, own in _real(exam, results):
        differ = finite_pattern(got) != finite_pattern(own)
        differ[~exam.counted(name, len(own))] = False
        if differ.any():
            place = first(differ)
            yield (
                name,
                f"{int(differ.sum())} places, first at {place}: {got[place]}, "
                f"expected {own[place]}",
            )


def equal(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """Integers, and results defined to the bit, are equal."""
    for name, own in exam.expected.own.items():
        got = results.get(name)
        is_defined = exam.trial.exact or own.dtype.kind in "iub"
        if got is None or got.shape != own.shape or not is_defined:
            continue
        keep = exam.counted(name, len(own))
        if not same_bits(got[keep], own[keep]):
            one, other = (np.nan_to_num(x[keep].astype(float)) for x in (got, own))
            differ = one != other
            yield name, f"{int(differ.sum())} values differ, first {first(differ)}"


def rows(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """No row errs by more than the reference's own rounding explains."""
    for name, judged in exam.judged(results).items():
        for said in beyond("rows", judged.row_error, judged.row_bound):
            yield name, said


def elements(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """No element errs by more than the reference's worst element does."""
    for name, judged in exam.judged(results).items():
        for said in beyond("elements", judged.element_error, judged.element_bound):
            yield name, said


def zeros(exam: Exam, results: Results) -> Iterator[tuple[str, str]]:
    """Rows that are zero in float64 are exactly zero."""
    for name, got, _ in _real(exam, results):
        want = exam.expected.want[name]
        zero = (want == 0).all(-1) if want.ndim > 1 else want == 0
        wrong = zero & ((got != 0).any(-1) if want.ndim > 1 else got != 0)
        if np.any(wrong):
            yield name, f"{int(wrong.sum())} rows should be zero, first {first(wrong)}"


ASPECTS: Mapping[str, Aspect] = MappingProxyType({
    "shape": shape,
    "non-finite": finite,
    "equal": equal,
    "rows": rows,
    "elements": elements,
    "zeros": zeros,
})  # fmt: skip
"""Every aspect by the name of the check that asks it of the plain run."""


def held(exam: Exam, results: Results, how: str) -> Iterator[str]:
    """Say what is wrong with another run than the plain one, all aspects together.

    What the plain run has wrong too is told there, under its own check.
    """
    for aspect_name, aspect in ASPECTS.items():
        known = exam.remembered(aspect_name, lambda asked=aspect: _names(asked, exam))  # type: ignore[misc]
        for name, said in aspect(exam, results):
            if name not in known:
                yield f"{name} {how}: {said}"


def _names(aspect: Aspect, exam: Exam) -> frozenset[str]:
    return frozenset(name for name, _ in aspect(exam, exam.got))


def beyond(what: str, error: HostArray, bound: HostArray) -> Iterator[str]:
    """Say how many errors exceed their bounds, and the worst. Shapes: error, bound alike."""
    bad = error > bound
    if bad.any():
        parts = np.where(bad, error / np.where(bound > 0, bound, np.finfo(float).tiny), 0)
        place = np.unravel_index(int(np.argmax(parts)), parts.shape)
        yield (
            f"{int(bad.sum())} of {bad.size} {what} beyond their bound; worst at "
            f"{tuple(map(int, place))}: {error[place]:.3g}, allowed {bound[place]:.3g}"
        )


def first(mask: HostArray) -> tuple[int, ...]:
    """Return the first place where a mask is true; nothing for a mask of one value."""
    return tuple(int(i) for i in np.argwhere(mask)[0]) if mask.ndim else ()


def _real(exam: Exam, results: Results) -> Iterator[tuple[str, HostArray, HostArray]]:
    """Yield the outputs of real numbers that can be compared: name, got, own."""
    for name, own in exam.expected.own.items():
        got = results.get(name)
        if got is not None and got.shape == own.shape and own.dtype.kind not in "iub":
            yield name, got, own
