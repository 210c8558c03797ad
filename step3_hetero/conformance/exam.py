"""One case on one device: run it every way a check asks for, each way once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from step3_hetero.backend import Array, Backend, Device
from step3_hetero.conformance.calls import CallLog, logged
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.guards import Guarded, guarded
from step3_hetero.conformance.sketch import sketch_of
from step3_hetero.conformance.tolerance import Judged
from step3_hetero.conformance.trial import (
    Claims,
    Expected,
    Results,
    Trial,
    cache_content,
    expected_of,
    host_results,
)
from step3_hetero.specs import HostArray

Status = Literal["passed", "failed", "unclaimed", "known gap", "crashed", "timeout"]


RUNS = "runs"
"""The check that a case fails whose run raises an exception."""


@dataclass(frozen=True)
class Finding:
    """What one check holds against a result."""

    check: str
    message: str


@dataclass(frozen=True)
class CaseResult:
    """What became of one case.

    ``worst`` is the largest squared error as a part of what is allowed; ``error`` and ``bound`` are
    those of that row. ``near_ties`` counts rows whose routing rounding may change. ``sketch`` tells
    the results of two devices apart without holding them: see ``sketch_of``.
    """

    id: str
    op: str
    dtype: str
    status: Status
    findings: tuple[Finding, ...] = ()
    worst: float = 0.0
    error: float = 0.0
    bound: float = 0.0
    near_ties: int = 0
    seconds: float = 0.0
    reason: str = ""
    sketch: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Exam:
    """The runs of one case on one device; checks ask for those they need."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        trial: Trial,
        given: tuple[Inputs, Expected] | None = None,
    ) -> None:
        self.backend = backend
        self.device = device
        self.trial = trial
        self.inputs, self.expected = given or expected_of(trial)

    @cached_property
    def placed(self) -> Any:
        """Return the inputs in device memory."""
        return self.trial.place(self.device, self.inputs, self.trial.dtype)

    @cached_property
    def outputs(self) -> Mapping[str, Array]:
        """Return the first run's results where they are, noting who worked."""
        placed = self.placed
        with logged(self.device, self.backend.name, self.backend.borrows) as log:
            outputs = self.trial.call(self.device, placed, self.trial.dtype)
        self._log = log
        return outputs

    @cached_property
    def got(self) -> Results:
        """Return the first run's results on the host."""
        return host_results(self.device, self.outputs)

    @cached_property
    def log(self) -> CallLog:
        """Return who worked in the first run."""
        assert self.got is not None
        return self._log

    @cached_property
    def arrays_after(self) -> Results:
        """Return the inputs as they are after the first run."""
        assert self.got is not None
        return {n: self.device.to_host(x) for n, x in self.placed.arrays.items()}

    @cached_property
    def cache_after(self) -> dict[str, HostArray]:
        """Return keys and values in the cache after the first run."""
        assert self.got is not None
        return cache_content(self.placed.cache)

    @cached_property
    def again(self) -> Results:
        """Return what a second run with the same inputs gives."""
        assert self.arrays_after is not None
        placed = self.trial.place(self.device, self.inputs, self.trial.dtype)
        return host_results(self.device, self.trial.call(self.device, placed, self.trial.dtype))

    @cached_property
    def after_next_call(self) -> Results:
        """Return the first run's results as they are after a call with other inputs."""
        assert self.got is not None
        turned = {n: x[::-1].copy() for n, x in self.inputs.arrays.items()}
        other = self.trial.place(self.device, replace(self.inputs, arrays=turned), self.trial.dtype)
        self.trial.call(self.device, other, self.trial.dtype)
        return host_results(self.device, self.outputs)

    @cached_property
    def after_inputs_change(self) -> Results:
        """Return the first run's results as they are once its inputs are overwritten."""
        assert self.arrays_after is not None
        for name, x in self.inputs.arrays.items():
            if x.size:
                self.device.copy_in(np.zeros_like(x), self.placed.arrays[name]).wait()
        return host_results(self.device, self.outputs)

    @cached_property
    def fenced(self) -> tuple[Results, list[str]]:
        """Return the results of a run between sentinels, and which sentinels it disturbed."""
        fences: dict[str, Guarded] = {}

        def fence(name: str, x: HostArray) -> Array:
            fences[name] = guarded(self.device, x)
            return fences[name].view

        placed = self.trial.place(self.device, self.inputs, self.trial.dtype)
        placed.arrays = {n: fence(n, x) for n, x in self.inputs.arrays.items()}
        run = getattr(self.trial, "call_into", None)
        if run is None:
            outputs = self.trial.call(self.device, placed, self.trial.dtype)
        else:  # what counts is what lies in the buffers, not what is returned
            own = self.expected.own
            outputs = {n: fence(f"result {n}", np.zeros_like(x)) for n, x in own.items()}
            run(placed, outputs)
        results = host_results(self.device, outputs)
        return results, [n for n, fenced in fences.items() if fenced.disturbed(self.device)]

    def judged(self, results: Results) -> dict[str, Judged]:
        """Hold the real-number outputs against the exact ones, but for rows that may differ."""
        e, found = self.expected, {}
        for name, own in e.own.items():
            got = results.get(name)
            if self.trial.exact or own.dtype.kind in "iub" or got is None or got.shape != own.shape:
                continue
            keep = self.counted(name, len(own))
            found[name] = e.judged(name, got, keep)
        return found

    def counted(self, name: str, rows: int) -> HostArray:
        """Return which rows of an output count: all but those whose routing rounding may change."""
        near = self.expected.near.get(name)
        return np.ones(rows, bool) if near is None else ~near


Check = Callable[[Exam], Iterable[str]]
"""Looks at one exam and says what is wrong, a sentence each."""


def unclaimed(backend: Backend, device: Device, trial: Claims) -> str | None:
    """Return why a device does not claim a case, or None."""
    for spec in trial.specs():
        if reason := backend.supports(device.info, spec):
            return f"{spec}: {reason}"
    return None


def examine(
    backend: Backend,
    device: Device,
    trial: Trial,
    checks: Mapping[str, Check] | None = None,
    given: tuple[Inputs, Expected] | None = None,
) -> CaseResult:
    """Put one case through every check (or through ``checks``).

    ``given`` are inputs and expectation from elsewhere; the reference is not asked then.

    An exception of the backend is a finding of its own; an unclaimed case is told with its reason.
    """
    from step3_hetero.conformance.checks import CHECKS

    start = time.perf_counter()
    if reason := unclaimed(backend, device, trial):
        return CaseResult(trial.id, trial.op, trial.dtype, "unclaimed", reason=reason)
    exam = Exam(backend, device, trial, given)
    with np.errstate(all="ignore"):
        findings = list(_findings(exam, CHECKS if checks is None else checks))
        raised = any(f.check == RUNS for f in findings)
        worst, error, bound = (float("inf"), 0.0, 0.0) if raised else _figures(exam)
    return CaseResult(
        trial.id,
        trial.op,
        trial.dtype,
        "failed" if findings else "passed",
        tuple(findings),
        worst,
        error,
        bound,
        max((int(near.sum()) for near in exam.expected.near.values()), default=0),
        time.perf_counter() - start,
        sketch={} if raised else _sketches(exam),
    )


def _sketches(exam: Exam) -> dict[str, list[float]]:
    own, got = exam.expected.own, exam.got
    shapes_agree = all(n in got and got[n].shape == x.shape for n, x in own.items())
    if not shapes_agree:
        return {}
    return {n: sketch_of(f"{exam.trial.id} {n}", got[n], exam.expected.want[n]) for n in own}


def _findings(exam: Exam, checks: Mapping[str, Check]) -> Iterator[Finding]:
    for name, check in checks.items():
        try:
            yield from [Finding(name, message) for message in check(exam)]
        except Exception as error:  # a vendor's code may raise anything
            yield Finding(RUNS, f"{type(error).__name__}: {error}")
            return


def _figures(exam: Exam) -> tuple[float, float, float]:
    """Return the worst row of all outputs: error by bound, error, bound."""
    worst = (0.0, 0.0, 0.0)
    for judged in exam.judged(exam.got).values():
        if judged.row_error.size:
            parts = judged.row_error / judged.row_bound
            place = np.unravel_index(int(np.argmax(parts)), parts.shape)
            figures = (parts[place], judged.row_error[place], judged.row_bound[place])
            worst = max(worst, (float(figures[0]), float(figures[1]), float(figures[2])))
    return worst
