"""One case on one device: run it every way a check asks for, each way once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from step3_hetero.backend import Array, Backend, Device, DeviceInfo, Weights
from step3_hetero.conformance.calls import CallLog, logged
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.guards import Guarded, guarded
from step3_hetero.conformance.last import Last
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
from step3_hetero.errors import UnsupportedOp
from step3_hetero.specs import HostArray, OpSpec

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
    the results of two devices apart without holding them: see ``sketch_of``. ``held`` is the
    method by which the device holds the op's weights, as ``Weights.method`` says.
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
    held: str = ""


@dataclass(frozen=True)
class Run:
    """One run: in which way it was one, which results lie elsewhere, and who worked."""

    how: str
    elsewhere: Mapping[str, str]
    log: CallLog


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
        self.runs: list[Run] = []
        self._remembered: dict[str, Any] = {}
        self._judged = Last()

    def ran(self, how: str, work: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Run once more, noting who works and where the results lie; ``how`` is empty once."""
        with logged(self.device, self.backend.name, self.backend.borrows) as log:
            outputs = work()
        elsewhere = {n: type(x).__name__ for n, x in outputs.items() if not self.device.owns(x)}
        self.runs.append(Run(how, elsewhere, log))
        return outputs

    def results(self, how: str, work: Callable[[], Mapping[str, Array]]) -> Results:
        """Run once more and bring the results to the host."""
        return host_results(self.device, self.ran(how, work))

    def call(self, how: str, inputs: Inputs) -> Results:
        """Place ``inputs`` and run the case on them."""
        placed = self.trial.place(self.device, inputs, self.trial.dtype)
        return self.results(how, lambda: self.trial.call(self.device, placed, self.trial.dtype))

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made under this name, made when first asked for."""
        if name not in self._remembered:
            self._remembered[name] = make()
        return self._remembered[name]

    @cached_property
    def placed(self) -> Any:
        """Return the inputs in device memory."""
        return self.trial.place(self.device, self.inputs, self.trial.dtype)

    @cached_property
    def outputs(self) -> Mapping[str, Array]:
        """Return the plain run's results where they are."""
        placed = self.placed
        return self.ran("", lambda: self.trial.call(self.device, placed, self.trial.dtype))

    @cached_property
    def got(self) -> Results:
        """Return the plain run's results on the host."""
        return host_results(self.device, self.outputs)

    @cached_property
    def arrays_after(self) -> Results:
        """Return the inputs as they are after the plain run."""
        assert self.got is not None
        return {n: self.device.to_host(x) for n, x in self.placed.arrays.items()}

    @cached_property
    def cache_after(self) -> dict[str, HostArray]:
        """Return keys and values in the cache after the plain run."""
        assert self.got is not None
        return cache_content(self.placed.cache)

    @cached_property
    def again(self) -> Results:
        """Return what a second run with the same inputs gives."""
        assert self.arrays_after is not None
        return self.call("a second time", self.inputs)

    @cached_property
    def after_next_call(self) -> Results:
        """Return the plain run's results as they are after a call with other inputs."""
        assert self.got is not None
        turned = {n: x[::-1].copy() for n, x in self.inputs.arrays.items()}
        self.call("with other inputs", replace(self.inputs, arrays=turned))
        return host_results(self.device, self.outputs)

    @cached_property
    def after_inputs_change(self) -> Results:
        """Return the plain run's results as they are once its inputs are overwritten."""
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
        how, into = "between sentinels", getattr(self.trial, "call_into", None)
        if into is None:
            outputs = self.ran(how, lambda: self.trial.call(self.device, placed, self.trial.dtype))
        else:  # what counts is what lies in the buffers, not what is returned
            own = self.expected.own
            buffers = {n: fence(f"result {n}", np.zeros_like(x)) for n, x in own.items()}
            self.ran(how, lambda: into(placed, buffers))
            outputs = buffers
        results = host_results(self.device, outputs)
        return results, [n for n, fenced in fences.items() if fenced.disturbed(self.device)]

    def judged(self, results: Results) -> dict[str, Judged]:
        """Hold the real-number outputs against the exact ones, but for rows that may differ."""
        found: dict[str, Judged] = self._judged.get(results, None, lambda: self._judge(results))
        return found

    def _judge(self, results: Results) -> dict[str, Judged]:
        e, found = self.expected, {}
        for name, own in e.own.items():
            got = results.get(name)
            if self.trial.exact or own.dtype.kind in "iub" or got is None or got.shape != own.shape:
                continue
            found[name] = e.judged(name, got, self.counted(name, len(own)))
        return found

    def counted(self, name: str, rows: int) -> HostArray:
        """Return which rows of an output count: all but those whose routing rounding may change."""
        near = self.expected.near.get(name)
        return np.ones(rows, bool) if near is None else ~near


Check = Callable[[Exam], Iterable[str]]
"""Looks at one exam and says what is wrong, a sentence each."""


def refusal(backend: Backend, info: DeviceInfo, spec: OpSpec) -> str | None:
    """Return why a device does not claim an op, or None; an exception of ``supports`` is a why."""
    try:
        return backend.supports(info, spec)
    except Exception as error:  # a vendor's code may raise anything
        return f"supports raises {described(error)}"


def unclaimed(backend: Backend, device: Device, trial: Claims) -> str | None:
    """Return why a device does not claim a case, or None.

    Weights in a dtype that a device does not list as stored may be refused by ``prepare`` too.
    """
    for spec in trial.specs():
        if reason := refusal(backend, device.info, spec):
            return f"{spec}: {reason}"
    return None


def described(error: BaseException) -> str:
    """Return an exception in words, whatever its class does when asked."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


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
        raises = "supports raises" in reason
        return CaseResult(
            trial.id, trial.op, trial.dtype, "failed" if raises else "unclaimed",
            (Finding(RUNS, reason),) if raises else (), reason="" if raises else reason,
        )  # fmt: skip
    exam = Exam(backend, device, trial, given)
    with np.errstate(all="ignore"):
        if reason := _not_stored(exam):
            return CaseResult(trial.id, trial.op, trial.dtype, "unclaimed", reason=reason)
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
        held="" if raised else _held(exam),
    )


def _held(exam: Exam) -> str:
    """Return the method by which the device holds an op's weights; empty if there are none."""
    weights = getattr(exam.placed, "weights", None)
    return weights.method if isinstance(weights, Weights) else ""


def _not_stored(exam: Exam) -> str | None:
    """Return the refusal of a dtype that the device does not say it stores, or None."""
    stored, dtypes = exam.trial.stored, exam.device.info.dtypes
    if not stored or stored in (*dtypes.stored, *dtypes.wire):
        return None
    try:
        assert exam.placed is not None
    except UnsupportedOp as error:
        return f"{stored} weights: {error}"
    except Exception:
        return None  # the checks meet it again and tell it
    return None


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
            yield Finding(RUNS, described(error))
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
