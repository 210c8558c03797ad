"""Run many cases on one device, in a process of their own that may crash or hang."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as DeadlinePassed
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.backend import Backend, Device, DeviceInfo
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.exam import (
    RUNS,
    CaseResult,
    Finding,
    Status,
    described,
    examine,
)
from step3_hetero.conformance.trial import Trial
from step3_hetero.conformance.whole_model import ModelCase
from step3_hetero.errors import ConfigError, ConformanceError, PlacementError
from step3_hetero.registry import get_backend

if TYPE_CHECKING:
    from pebble import ProcessPool

DEADLINE_S = 300.0
"""A case that takes longer hangs."""

TAINTED = 113
"""How a worker ends that is asked for a case after one in which its device raised an exception."""

AnyCase = Trial | ModelCase

Option = tuple[str, str | int | float | bool]


@dataclass(frozen=True)
class Target:
    """The device on trial, ``cpu`` or ``cuda:1``, and the options it is opened with."""

    name: str
    index: int = 0
    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, text: str, options: Sequence[str] = ()) -> Target:
        """Read ``NAME`` or ``NAME:INDEX``, and options as ``KEY=VALUE``.

        Raises:
            ConfigError: it is neither, or names the reference, which is what others are held to.

        >>> Target.parse("cuda:1", ["interpret=true"])
        Target(name='cuda', index=1, options=(('interpret', True),))
        """
        name, colon, index = text.partition(":")
        if not name or (colon and not index.isdecimal()):
            raise ConfigError(f"backend {text!r} refused; expected NAME or NAME:INDEX, as cuda:1")
        if name == "reference":
            raise ConfigError(
                "backend 'reference' is what others are held to; its own judges are the oracles in "
                "tests/oracle (make test)"
            )
        return cls(name, int(index or 0), tuple(_option(said) for said in options))

    def __str__(self) -> str:
        return f"{self.name}:{self.index}"

    def open(self) -> tuple[Backend, Device]:
        """Open the device with its options."""
        backend = get_backend(self.name)
        return backend, backend.open(self.index, dict(self.options))

    def backend(self) -> Backend:
        """Import the backend and see that it has a device here.

        Raises:
            BackendNotFound, PlacementError: it is not installed, or has no device on this machine.
        """
        backend = get_backend(self.name)
        if (reason := backend.why_unavailable()) and not self.options:  # an option may bring one
            raise PlacementError(f"backend {self.name!r} has no device here: {reason}")
        return backend


def select(only: Sequence[str] = (), *, full: bool = False) -> list[AnyCase]:
    """Return the cases to run.

    Each term of ``only`` is words that a case's id must all contain, or, after a ``!``, a word that
    it must not; a case has to satisfy one of the former and all of the latter.

    Raises:
        ConfigError: nothing is left.
    """
    wanted = [term.split() for term in only if not term.startswith("!")]
    banned = [term[1:] for term in only if term.startswith("!")]
    chosen = [
        trial
        for trial in trials().values()
        if (full or not trial.full)
        and (not wanted or any(all(word in trial.id for word in words) for words in wanted))
        and not any(word in trial.id for word in banned)
    ]
    if not chosen:
        ops = ", ".join(dict.fromkeys(t.op for t in trials().values()))
        scope = "" if full else " in a quick run (--full has more)"
        raise ConfigError(f"no case matches {' | '.join(only)}{scope}; ops: {ops}")
    return chosen


@dataclass(frozen=True)
class Refused:
    """Bad input, in a worker's words: what was asked of a device that it does not have."""

    why: str


class Workers:
    """Processes that hold a device each; one that dies takes its case with it and is replaced."""

    def __init__(self, pool: ProcessPool, target: Target, deadline_s: float) -> None:
        self._pool = pool
        self._target = target
        self._deadline_s = deadline_s
        self._scheduled: list[tuple[AnyCase, Any]] = []

    def describe(self) -> DeviceInfo:
        """Return the device as it describes itself once opened.

        Raises:
            PlacementError: there is no such device, or it refuses an option.
            ConformanceError: it cannot be opened, or the attempt crashed or hung.
        """
        result = self._call(_describe, self._target)
        if isinstance(result, DeviceInfo):
            return result
        if isinstance(result, Refused):
            raise PlacementError(f"{self._target} cannot be opened: {result.why}")
        raise ConformanceError(f"{self._target} cannot be opened: {result}")

    def examine(self, chosen: Iterable[AnyCase]) -> Iterator[CaseResult]:
        """Yield one result a case, in order."""
        return self._each(_examine, chosen)

    def verify(self, file: Path, chosen: Iterable[AnyCase]) -> Iterator[CaseResult]:
        """Yield one result for each recorded case of a vector file, in order."""
        return self._each(_verify, chosen, file)

    def _each(
        self, function: Callable[..., CaseResult], chosen: Iterable[AnyCase], *more: Any
    ) -> Iterator[CaseResult]:
        def schedule(trial: AnyCase) -> Any:
            arguments = [self._target, trial.id, *more]
            return self._pool.schedule(function, args=arguments, timeout=self._deadline_s)

        self._scheduled = [(trial, schedule(trial)) for trial in chosen]
        for trial, future in self._scheduled:
            result = self._outcome(future)
            while result == _died(TAINTED):  # the case was never begun
                result = self._outcome(schedule(trial))
            yield result if isinstance(result, CaseResult) else _lost(trial, result)

    def found(self, told: Iterable[CaseResult]) -> list[CaseResult]:
        """Return the results that are there now beside those ``told``: after an interrupt."""
        known = {result.id for result in told}
        rest = [(t, future) for t, future in self._scheduled if t.id not in known]
        ended = [self._outcome(future) for _, future in rest if future.done()]
        return [result for result in ended if isinstance(result, CaseResult)]

    def stop(self) -> None:
        """End the processes without waiting for their cases."""
        self._pool.stop()  # type: ignore[no-untyped-call]  # pebble leaves it without

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._outcome(
            self._pool.schedule(function, args=list(args), timeout=self._deadline_s)
        )

    def _outcome(self, future: Any) -> Any:
        """Return what a worker returned, or a sentence on how it ended."""
        from pebble import ProcessExpired

        try:
            return future.result()
        except DeadlinePassed:
            return f"no answer within {self._deadline_s:g} s"
        except ProcessExpired as expired:
            return _died(expired.exitcode)
        except Exception as error:
            return described(error)


@contextmanager
def workers(target: Target, *, count: int = 1, deadline_s: float = DEADLINE_S) -> Iterator[Workers]:
    """Start processes for a device; they end with the context."""
    from pebble import ProcessPool

    spawn = get_context("spawn")
    with ProcessPool(max_workers=count, context=spawn, initializer=_deaf_to_the_keyboard) as pool:
        try:
            yield Workers(pool, target, deadline_s)
        except BaseException:
            pool.stop()  # type: ignore[no-untyped-call]  # pebble leaves it without
            raise


def _lost(trial: AnyCase, said: str) -> CaseResult:
    """Return the result of a case whose process gave none."""
    status: Status = "timeout" if said.startswith("no answer") else "crashed"
    finding = Finding(RUNS, said)
    return CaseResult(
        trial.id, trial.op, trial.dtype, status, (finding,), float("inf"), reason=said
    )


def _died(code: int) -> str:
    """Say how a process ended.

    >>> _died(-11), _died(-40), _died(3)
    ('the process died: signal SIGSEGV', 'the process died: signal 40', \
'the process died: exit code 3')
    """
    names = {int(s): s.name for s in signal.Signals}
    said = f"signal {names.get(-code, -code)}" if code < 0 else f"exit code {code}"
    return f"the process died: {said}"


def _option(said: str) -> Option:
    """Read one option; its value is as YAML reads it."""
    import yaml

    key, equals, text = said.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not key or not equals or not isinstance(value, str | int | float | bool):
        raise ConfigError(f"option {said!r} refused; expected KEY=VALUE, as interpret=true")
    return key, value


def _deaf_to_the_keyboard() -> None:
    """Leave an interrupt to the parent, which wants the results that there are."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_tainted = False
"""Whether this worker's device raised an exception: what it does next proves nothing."""


@cache
def _opened(target: Target) -> tuple[Backend, Device]:
    return target.open()


def _describe(target: Target) -> DeviceInfo | Refused | str:
    """Return the device's description as plain data: what a vendor raises may not travel."""
    try:
        info = _opened(target)[1].info
        said = {f.name: getattr(info, f.name) for f in fields(DeviceInfo)}
        for name in ("flops_per_s", "links"):
            said[name] = dict(said[name])
        return DeviceInfo(**said)
    except (ConfigError, PlacementError) as refused:
        return Refused(str(refused))
    except Exception as error:  # a vendor's code may raise anything
        return described(error)


def _examine(target: Target, case: str) -> CaseResult:
    def work(backend: Backend, device: Device, trial: AnyCase) -> CaseResult:
        if isinstance(trial, ModelCase):
            return trial.examine(backend, device)
        return examine(backend, device, trial)

    return _guarded(target, case, work)


def _verify(target: Target, case: str, file: Path) -> CaseResult:
    from step3_hetero.conformance import vectors

    def work(backend: Backend, device: Device, trial: AnyCase) -> CaseResult:
        return vectors.verify(backend, device, case, vectors.read_cases(file)[case])

    return _guarded(target, case, work)


def _guarded(
    target: Target, case: str, work: Callable[[Backend, Device, AnyCase], CaseResult]
) -> CaseResult:
    """Do the work on one case and return plain data, whatever a vendor's code raises."""
    global _tainted  # it is the process that is tainted
    if _tainted:
        os._exit(TAINTED)
    trial = trials()[case]
    try:
        result = work(*_opened(target), trial)
    except BaseException as error:
        findings = (Finding(RUNS, described(error)),)
        result = CaseResult(
            trial.id, trial.op, trial.dtype, "failed", findings, float("inf"), reason=""
        )
    _tainted = any(finding.check == RUNS for finding in result.findings)
    return result


def apply_gaps(results: Sequence[CaseResult], gaps: dict[str, str]) -> list[CaseResult]:
    """Return the results with failures that are known marked so, and gaps that are none failed."""
    return [_with_gap(r, gaps[r.id]) if r.id in gaps else r for r in results]


def _with_gap(result: CaseResult, reason: str) -> CaseResult:
    if result.status in ("failed", "crashed", "timeout"):
        return replace(result, status="known gap", reason=reason)
    said = "passes" if result.status == "passed" else "is not claimed"
    finding = Finding("known gaps", f"{said}; take the line out of known_gaps.txt ({reason})")
    return replace(result, status="failed", findings=(*result.findings, finding))
