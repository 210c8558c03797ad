"""Run many cases on one device, in a process of their own that may crash or hang."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as DeadlinePassed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from step3_hetero.backend import Backend, Device, DeviceInfo
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.exam import CaseResult, Finding, Status, examine
from step3_hetero.conformance.trial import Trial
from step3_hetero.conformance.whole_model import ModelCase
from step3_hetero.errors import ConfigError, ConformanceError, PlacementError
from step3_hetero.registry import get_backend

if TYPE_CHECKING:
    from pebble import ProcessPool

DEADLINE_S = 300.0
"""A case that takes longer hangs."""

AnyCase = Trial | ModelCase


@dataclass(frozen=True)
class Target:
    """The device on trial: ``cpu`` or ``cuda:1``."""

    name: str
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``NAME`` or ``NAME:INDEX``.

        Raises:
            ConfigError: it is neither, or names the reference, which is what others are held to.

        >>> Target.parse("cuda:1")
        Target(name='cuda', index=1)
        """
        name, colon, index = text.partition(":")
        if not name or (colon and not index.isdecimal()):
            raise ConfigError(f"backend {text!r} refused; expected NAME or NAME:INDEX, as cuda:1")
        if name == "reference":
            raise ConfigError(
                "backend 'reference' is what others are held to; its own judges are the oracles in "
                "tests/oracle (make test)"
            )
        return cls(name, int(index or 0))

    def __str__(self) -> str:
        return f"{self.name}:{self.index}"

    def backend(self) -> Backend:
        """Import the backend and see that it has a device here.

        Raises:
            BackendNotFound, PlacementError: it is not installed, or has no device on this machine.
        """
        backend = get_backend(self.name)
        if reason := backend.why_unavailable():
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


class Workers:
    """Processes that hold a device each; one that dies takes its case with it and is replaced."""

    def __init__(self, pool: ProcessPool, target: Target, deadline_s: float) -> None:
        self._pool = pool
        self._target = target
        self._deadline_s = deadline_s

    def describe(self) -> DeviceInfo:
        """Return the device as it describes itself once opened.

        Raises:
            ConformanceError: it cannot be opened, or the attempt crashed or hung.
        """
        result = self._call(_describe, self._target)
        if isinstance(result, DeviceInfo):
            return result
        raise ConformanceError(f"{self._target} cannot be opened: {result}")

    def examine(self, chosen: Iterable[AnyCase]) -> Iterator[CaseResult]:
        """Yield one result a case, in order."""
        waiting = [
            (t, self._pool.schedule(_examine, args=[self._target, t.id], timeout=self._deadline_s))
            for t in chosen
        ]
        for trial, future in waiting:
            result = self._outcome(future)
            yield result if isinstance(result, CaseResult) else _lost(trial, result)

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
            return f"the process died: {_cause(expired.exitcode)}"
        except Exception as error:  # whatever a vendor's open or the drawing of inputs may raise
            return f"{type(error).__name__}: {error}"


@contextmanager
def workers(target: Target, *, count: int = 1, deadline_s: float = DEADLINE_S) -> Iterator[Workers]:
    """Start processes for a device; they end with the context."""
    from pebble import ProcessPool

    with ProcessPool(max_workers=count, context=get_context("spawn")) as pool:
        try:
            yield Workers(pool, target, deadline_s)
        except BaseException:
            pool.stop()  # type: ignore[no-untyped-call]  # pebble leaves it without
            raise


def _lost(trial: AnyCase, said: str) -> CaseResult:
    """Return the result of a case whose process gave none."""
    status: Status = "timeout" if said.startswith("no answer") else "crashed"
    finding = Finding("runs", said)
    return CaseResult(
        trial.id, trial.op, trial.dtype, status, (finding,), float("inf"), reason=said
    )


def _cause(code: int) -> str:
    """Say how a process ended.

    >>> _cause(-11), _cause(3)
    ('signal SIGSEGV', 'exit code 3')
    """
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@cache
def _opened(target: Target) -> tuple[Backend, Device]:
    backend = get_backend(target.name)
    return backend, backend.open(target.index)


def _describe(target: Target) -> DeviceInfo:
    return _opened(target)[1].info


def _examine(target: Target, case: str) -> CaseResult:
    backend, device = _opened(target)
    trial = trials()[case]
    if isinstance(trial, ModelCase):
        return trial.examine(backend, device)
    return examine(backend, device, trial)


def apply_gaps(results: Sequence[CaseResult], gaps: dict[str, str]) -> list[CaseResult]:
    """Return the results with failures that are known marked so, and gaps that are none failed."""
    return [_with_gap(r, gaps[r.id]) if r.id in gaps else r for r in results]


def _with_gap(result: CaseResult, reason: str) -> CaseResult:
    if result.status in ("failed", "crashed", "timeout"):
        return replace(result, status="known gap", reason=reason)
    said = "passes" if result.status == "passed" else "is not claimed"
    finding = Finding("known gaps", f"{said}; take the line out of known_gaps.txt ({reason})")
    return replace(result, status="failed", findings=(*result.findings, finding))
